"""The deletion of a tenant: everything it has, on every store, with a statement of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from strongroom import Entity, Strongroom
from strongroom.context import system_context
from strongroom.database import Transaction
from strongroom.database.write_state import WriteSwitch, switch_id
from strongroom.entities import Query, with_fields
from strongroom.errors import Conflict, InvalidInput, NotFound, Unavailable
from strongroom.events import event
from strongroom.journal.signed_note import (
    ED25519,
    Checkpoint,
    NoteError,
    Signature,
    SignedNote,
    VerifierKey,
    signed_message,
)
from strongroom.journal.trees import JournalTree, tree_id
from strongroom.keys import Leak
from strongroom.storage.port import Check
from strongroom.tenants import CloudAccount, Role, Tenant, TenantDeletion, User
from strongroom.tenants.deletion import HEADLINE
from strongroom.webhooks import Delivery
from tests.helpers.stores import rolling
from tests.helpers.waiting import wait_until
from tests.tenants.test_service import names


class Note(Entity, collection="notes"):
    text: str


KEPT = {"deletion_statements", "journal_trees", "retention_policies", "legal_holds"}
"""What says of a tenant what was done, and for how long that is kept: it stays with the tenant's journal."""


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Note]


async def fill(room: Strongroom, tenant: str, notes: int = 5) -> None:
    """Give a tenant some of everything."""
    room.tenants.deletions.settle_s = 0
    await room.tenants.create(tenant, name=tenant.upper())
    own = room.tenant(tenant)
    for number in range(notes):
        await own.create(Note(text=f"note {number}"))
    await own.create(User(email="ann@example.com", external_subject="s1"))
    await own.create(Role(id="owner", scopes=["admin"]))
    await own.create(CloudAccount(provider="aws", account_id="123456789012", credentials="s3cret"))
    limit = rolling("tokens", 100)
    issued = await room.keys.create(name="k", tenant=tenant, user_id="u", limits=[limit])
    await room.quotas.put(kind="tenant", tenant=tenant, limits=[limit])
    assert (await room.keys.verify(issued.text, cost={"tokens": 5})).valid
    await room.keys.reserve(issued.text, cost={"tokens": 5})
    await room.leaks.set_policy(tenant, action="notify")
    leak = Leak(tenant=tenant, key_id="x", display="x", type="x", url="x", source="x", reporter="x", done="notified")
    await room.database.create(system_context(), leak)
    await room.database.create(system_context(), WriteSwitch(id=switch_id(tenant), tenant=tenant))
    await room.webhooks.create(url="https://example.com/", tenant=tenant)
    told = with_fields(event("key.leaked", tenant, {"key_id": "x"}), due_at=None)  # nobody delivers it
    await room.database.create(system_context(), told)
    fields: dict[str, Any] = {"webhook_id": "x", "event_id": told.id, "event_type": told.type, "state": "delivered"}
    await room.database.create(system_context(), Delivery(tenant=tenant, expires_at=told.expires_at, **fields))


async def what_is_left(room: Strongroom, tenant: str) -> dict[str, int]:
    """The documents of a tenant, by collection, journal and its trees left out."""
    found: dict[str, int] = {}
    for cls in room.database.registry.by_name.values():
        name, fields = cls.__collection__.name, cls.__collection__.fields
        if cls.__collection__.tenant_scoped:
            documents = await room.store.find(name, tenant, Query(limit=1000))
        elif name in ("tenants", "tenant_deletions"):
            documents = [d for d in await room.store.find(name, None, Query(limit=1000)) if d["id"] == tenant]
        elif "tenant" in fields and name not in KEPT:
            documents = [d for d in await room.store.find(name, None, Query(limit=1000)) if d["tenant"] == tenant]
        else:
            continue
        if documents:
            found[name] = len(documents)
    return found


async def test_everything_of_a_tenant_is_deleted_and_nothing_of_another(url: str) -> None:
    async with Strongroom.open(url, entities=[Note]) as room:
        await fill(room, "acme")
        await fill(room, "other")
        before = await what_is_left(room, "other")
        assert before == await what_is_left(room, "acme")
        owned = {c.name for c in room.database.registry.collections if not c.tenant_scoped and "tenant" in c.fields}
        assert owned - KEPT <= set(before), "each collection whose documents name their tenant"
        usages = len(await room.store.find("key_usage", None, Query(limit=1000)))
        statement = await room.tenants.delete("acme", "the contract ended")
        assert statement is not None
        assert await what_is_left(room, "acme") == {}
        assert await what_is_left(room, "other") == before
        assert len(await room.store.find("key_usage", None, Query(limit=1000))) == usages - 2
        counted = {name: count for name, count in before.items() if name != "tenants"}
        assert statement.counts == {**counted, "key_usage": 2}
        assert (statement.tenant, statement.reason, statement.actor) == ("acme", "the contract ended", "system")
        assert statement.started_at <= statement.finished_at
        assert await names(room) == ["other"]
        with pytest.raises(NotFound):
            await room.tenants.get("acme")
        with pytest.raises(NotFound):
            await room.tenants.delete("acme", "again")
        deleted = (await room.audit.list(tenant="acme", action="delete", collection="notes")).items
        assert len(deleted) == 5, "each removal is in the journal"


async def test_the_statement_is_kept_and_says_the_same_as_its_text(room: Strongroom) -> None:
    await fill(room, "acme")
    statement = await room.tenants.delete("acme", "the contract ended")
    assert statement is not None
    assert (await room.tenants.deletions.statements("acme")).items == [statement]
    headline, line, _ = statement.note.split("\n", 2)
    assert headline == HEADLINE
    said = json.loads(line)
    assert said["counts"] == statement.counts
    assert (said["tenant"], said["id"], said["reason"]) == ("acme", statement.id, "the contract ended")
    records = (await room.audit.list(collection="deletion_statements")).items
    assert [(record.tenant, record.entity_id) for record in records] == [(None, statement.id)]


async def test_the_statement_names_the_tree_of_the_tenant_and_is_signed_by_the_journals_key(tmp_path: Path) -> None:
    async with Strongroom.open(f"sqlite:///{tmp_path}/store.db", entities=[Note]) as room:
        await fill(room, "acme")

        async def sealed() -> JournalTree | None:
            tree = await room.database.get_or_none(system_context(), JournalTree, tree_id("acme"))
            return tree if tree is not None and tree.size >= 10 else None

        before = await wait_until(sealed)
        statement = await room.tenants.delete("acme", "x")
        assert statement is not None
        assert statement.journal_size is not None
        assert statement.journal_size >= before.size
        note = SignedNote.parse(statement.note)
        valid, invalid = note.signers(await room.proofs.verifiers())
        assert statement.signed
        assert [key.algorithm for key in valid] == [ED25519]
        assert invalid == []
        now = await room.proofs.size_and_root("acme")
        assert now is not None
        if now[0] == statement.journal_size:  # else more was sealed since
            assert now[1] == statement.journal_root
        assert f'"journal_root":"{statement.journal_root}"' in statement.note


async def test_a_signed_statement_is_verified_by_the_public_key_and_any_change_of_it_found(room: Strongroom) -> None:
    private = Ed25519PrivateKey.generate()
    public = VerifierKey("log.example", ED25519, private.public_key().public_bytes_raw())

    async def sign(text: str) -> str:
        content = private.sign(signed_message(ED25519, public.name, text, 0))
        return str(SignedNote(text, (Signature(public.name, public.id, content),)))

    room.tenants.deletions.hooks.sign = sign
    await fill(room, "acme")
    statement = await room.tenants.delete("acme", "a\n\n— reason")
    assert statement is not None
    assert statement.signed
    note = SignedNote.parse(statement.note)
    assert note.signers([public]) == ([public], [])
    headline, line = note.text.splitlines()
    assert (headline, json.loads(line)["reason"]) == (HEADLINE, "a\n\n— reason")
    forged = SignedNote.parse(statement.note.replace('"notes":5', '"notes":4'))
    assert forged.signers([public]) == ([], [public])
    with pytest.raises(NoteError):
        Checkpoint.parse(note.text)  # nobody can take it for a checkpoint of the log


async def test_a_name_can_be_used_again_after_its_deletion(room: Strongroom) -> None:
    await fill(room, "acme")
    await room.tenants.delete("acme", "x")
    await room.tenant("acme").create(Note(text="new"))
    assert await names(room) == ["acme"]
    await room.tenants.create("acme")
    second = await room.tenants.delete("acme", "y")
    assert second is not None
    assert second.counts == {"notes": 1}


async def test_a_tenant_that_nobody_created_is_deleted_too(room: Strongroom) -> None:
    room.tenants.deletions.settle_s = 0
    await room.keys.create(name="k", tenant="acme")
    statement = await room.tenants.delete("acme", "x")
    assert statement is not None
    assert statement.counts == {"api_keys": 1}
    assert await names(room) == []


async def test_many_and_large_documents_are_deleted_in_steps(room: Strongroom) -> None:
    room.tenants.deletions.settle_s = 0
    own = room.tenant("acme")
    for _ in range(8):
        await own.create(Note(text="x" * 890_000))  # with their records, more than a batch may have
    for number in range(200):
        await own.create(Note(text=f"{number}"))
    statement = await room.tenants.delete("acme", "x")
    assert statement is not None
    assert statement.counts == {"notes": 208}


async def test_a_deletion_that_was_broken_off_goes_on_and_counts_each_document_once(
    room: Strongroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(room, "acme", notes=100)
    before = await what_is_left(room, "acme")
    steps = 0
    step = room.tenants.deletions._step

    async def breaking(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 4:
            raise Unavailable("killed")
        return await step(*given)

    with monkeypatch.context() as patched:
        patched.setattr(room.tenants.deletions, "_step", breaking)
        with pytest.raises(Unavailable):
            await room.tenants.delete("acme", "x")
    assert (await room.tenants.get("acme")).status == "deleting"
    left = await what_is_left(room, "acme")
    assert 0 < left["notes"] < 100
    for call in (room.tenants.suspend("acme", "x"), room.tenants.resume("acme"), room.tenants.update("acme", plan="x")):
        with pytest.raises(Conflict):
            await call
    statement = await room.tenants.delete("acme", "another reason")
    assert statement is not None
    assert statement.reason == "x", "that of the call which began it"
    assert statement.counts == {**{n: c for n, c in before.items() if n != "tenants"}, "key_usage": 2}
    assert await what_is_left(room, "acme") == {}


async def test_the_job_completes_what_a_call_had_no_time_for(room: Strongroom) -> None:
    await fill(room, "acme", notes=100)
    assert await room.tenants.delete("acme", "x", within_s=0) is None
    assert (await room.tenants.get("acme")).status == "deleting"
    await room.tenants.deletions.run(_Lease())
    assert await what_is_left(room, "acme") == {}
    assert len((await room.tenants.deletions.statements("acme")).items) == 1


class _Lease:
    async def save(self, position: str | None) -> None:
        """A lease that is held."""


async def test_two_deletions_at_once_are_one(room: Strongroom) -> None:
    await fill(room, "acme", notes=60)
    before = await what_is_left(room, "acme")
    results = await asyncio.gather(room.tenants.delete("acme", "x"), room.tenants.delete("acme", "y"))
    statements = (await room.tenants.deletions.statements("acme")).items
    assert len(statements) == 1
    assert statements[0].counts == {**{n: c for n, c in before.items() if n != "tenants"}, "key_usage": 2}
    assert list(results) == statements * 2


async def test_a_legal_hold_refuses_and_stops_a_deletion(room: Strongroom) -> None:
    await fill(room, "acme")
    before = await what_is_left(room, "acme")
    held: list[str | None] = ["court order 7"]

    async def legal_hold(tenant: str) -> str | None:
        return held[0]

    room.tenants.deletions.hooks.legal_hold = legal_hold
    with pytest.raises(Conflict, match="legal hold and cannot be deleted: court order 7"):
        await room.tenants.delete("acme", "x")
    assert (await room.tenants.get("acme")).status == "active"
    held[0] = None
    assert await room.tenants.delete("acme", "x", within_s=0) is None
    held[0] = "court order 8"
    with pytest.raises(Conflict):
        await room.tenants.delete("acme", "x")
    await room.tenants.deletions.run(_Lease())
    left = await what_is_left(room, "acme")
    assert left["notes"] == before["notes"], "nothing goes while the legal hold stands"
    held[0] = None
    await room.tenants.deletions.run(_Lease())
    assert await what_is_left(room, "acme") == {}


async def test_a_legal_hold_of_the_audit_trail_refuses_and_stops_a_deletion(room: Strongroom) -> None:
    await fill(room, "acme")
    hold = await room.legal_holds.place("court order 7", tenant="acme")
    with pytest.raises(Conflict, match="court order 7"):
        await room.tenants.delete("acme", "x")
    await room.legal_holds.lift(hold.id, "settled")
    before = await room.tenants.deletions.hooks.guard()  # type: ignore[misc]
    second = await room.legal_holds.place("court order 8", user="ann")
    assert await room.tenants.deletions.hooks.guard() != before, "so no step that began before is committed"  # type: ignore[misc]
    with pytest.raises(Conflict, match="court order 8"):
        await room.tenants.delete("acme", "x")
    await room.legal_holds.lift(second.id, "settled")
    assert await room.tenants.delete("acme", "x") is not None


async def test_no_step_is_committed_once_a_legal_hold_was_placed(
    room: Strongroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(room, "acme")
    before = await what_is_left(room, "acme")
    policy = await room.tenants.create("policy")
    held: list[str | None] = [None]

    async def legal_hold(tenant: str) -> str | None:
        return held[0]

    async def guard() -> Check:
        return Check("tenants", "policy", (await room.tenants.get("policy")).version)

    documents = room.tenants.deletions._parts[0]
    remove = documents.remove

    async def held_meanwhile(tx: Transaction, tenant: str, limit: int) -> Any:
        removed = await remove(tx, tenant, limit)
        if held[0] is None:  # a hold is placed just before the commit
            held[0] = "court order 9"
            await room.tenants.update("policy", plan="touched", expected=policy.version)
        return removed

    room.tenants.deletions.hooks.legal_hold, room.tenants.deletions.hooks.guard = legal_hold, guard
    with monkeypatch.context() as patched:
        patched.setattr(documents, "remove", held_meanwhile)
        with pytest.raises(Conflict, match="court order 9"):
            await room.tenants.delete("acme", "x")
    left = await what_is_left(room, "acme")
    assert {name: count for name, count in left.items() if name != "tenant_deletions"} == before
    held[0] = None
    assert await room.tenants.delete("acme", "x") is not None


async def test_a_deletion_needs_the_right_version_and_a_reason(room: Strongroom) -> None:
    made = await room.tenants.create("acme")
    changed = await room.tenants.update("acme", plan="gold")
    with pytest.raises(Conflict):
        await room.tenants.delete("acme", "x", expected=made.version)
    with pytest.raises(InvalidInput):
        await room.tenants.delete("acme", "")
    room.tenants.deletions.settle_s = 0
    first = await room.tenants.delete("acme", "x", expected=changed.version, idempotency_key="k")
    assert await room.tenants.delete("acme", "x", expected=changed.version, idempotency_key="k") == first
    assert await room.database.get_or_none(system_context(), Tenant, "acme") is None
    assert await room.database.get_or_none(system_context(), TenantDeletion, "acme") is None
