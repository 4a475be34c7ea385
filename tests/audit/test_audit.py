"""The audit trail: every filter, pages that miss nothing and are bounded, and who may read it."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import pytest
import time_machine

from strongroom import Context, Entity, Secret, Strongroom
from strongroom.audit import AuditFilter, AuditRecord
from strongroom.audit import trail as audit
from strongroom.audit.trail import AuditGiven
from strongroom.cli import main
from strongroom.context import system_context
from strongroom.database.transaction import Transaction
from strongroom.errors import Denied, InvalidInput
from strongroom.keys.model import ApiKey
from strongroom.storage.port import MAX_OPERATIONS
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.server_app import serving
from tests.helpers.stores import STORES, new_url, opened

NOON = datetime(2026, 5, 5, 12, tzinfo=UTC)


class Note(Entity, collection="notes"):
    text: str = ""
    token: Annotated[str | None, Secret()] = None


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Note]


def caller(tenant: str, actor: str, request_id: str = "") -> Context:
    return Context(tenant, actor, {"admin": True, "tenant": tenant}, request_id)


async def everything(room: Strongroom, limit: int = 100, **wanted: Any) -> list[AuditRecord]:
    found: list[AuditRecord] = []
    cursor = None
    while True:
        page = await room.audit.list(**wanted, limit=limit, cursor=cursor)
        assert len(page.items) <= limit
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            return found


async def fill(room: Strongroom) -> None:
    """Changes of two tenants by two actors; a secret; a denial."""
    ada, bob = caller("acme", "user:ada", "r1"), caller("beta", "user:bob", "r2")
    await room.database.create(ada, Note(id="a", text="one", token="hunter2"))
    await room.database.create(bob, Note(id="b", text="one"))
    await room.database.update(ada, Note, "a", {"text": "two"})
    await room.database.update(bob, Note, "b", {"text": "two"})
    await room.database.delete(ada, Note, "a")
    with pytest.raises(Denied):
        await room.database.find(Context("beta", "user:ada", {"tenant": "acme"}, "r3"), Note)


async def test_an_audit_record_has_the_actor_the_change_before_and_after(url: str) -> None:
    async with Strongroom.open(url, entities=[Note], sealing=False) as room:
        await fill(room)
        created, updated, deleted = await everything(room, tenant="acme")
        assert [one.action for one in (created, updated, deleted)] == ["create", "update", "delete"]
        assert (created.tenant, created.actor, created.request_id) == ("acme", "user:ada", "r1")
        assert (created.collection, created.entity_id, created.index) == ("notes", "a", None)
        assert (created.before, created.after) == (None, {"text": "one", "token": "***"})
        assert (updated.before, updated.after) == ({"text": "one"}, {"text": "two"})
        assert deleted.after is None
        assert created.sequence < updated.sequence < deleted.sequence
        assert created.at.tzinfo is not None


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"tenant": "beta"}, ["b create", "b update", " deny"]),
        ({"actor": "user:ada"}, ["a create", "a update", "a delete", " deny"]),
        ({"action": "update"}, ["a update", "b update"]),
        ({"entity_id": "b"}, ["b create", "b update"]),
        ({"request_id": "r3"}, [" deny"]),
        ({"collection": "notes", "tenant": "acme", "action": "delete"}, ["a delete"]),
        ({"collection": "other"}, []),
        ({"until": datetime(2000, 1, 1, tzinfo=UTC)}, []),
        ({"since": datetime(2999, 1, 1, tzinfo=UTC)}, []),
        ({"since": datetime(2000, 1, 1, tzinfo=UTC), "action": "deny"}, [" deny"]),
    ],
)
async def test_each_filter_finds_its_records(wanted: dict[str, Any], expected: list[str], room: Strongroom) -> None:
    await fill(room)
    given = {"collection": "notes", **wanted}
    for limit in (1, 2, 100):
        found = await everything(room, limit, **given)
        assert sorted(f"{one.entity_id} {one.action}" for one in found) == sorted(expected)


async def write(room: Strongroom, tenant: str, count: int, prefix: str = "n") -> None:
    async def body(tx: Transaction) -> None:
        for number in range(count):
            await tx.create(Note(id=f"{prefix}{number}"))

    await room.database.transaction(system_context(tenant), body)


async def test_pages_of_any_size_give_each_record_once(room: Strongroom) -> None:
    for number in range(3):
        await write(room, ("acme", "beta")[number % 2], 60, f"{number}-")
    whole = [one.sequence for one in await everything(room, 1_000)]
    assert len(set(whole)) == len(whole) >= 180
    for limit in (1, 7, 50):
        assert [one.sequence for one in await everything(room, limit)] == whole
        ours = [one.entity_id for one in await everything(room, limit, tenant="acme")]
        assert ours == [f"0-{n}" for n in range(60)] + [f"2-{n}" for n in range(60)]


async def test_a_rare_record_is_found_by_its_index(room: Strongroom, store: FaultyStore) -> None:
    """However large the journal is: the store finds it, it is not searched for page by page."""
    await write(room, "acme", 240)
    await room.tenant("acme", actor="user:eve").create(Note(id="rare"))
    await write(room, "acme", 240, "m")
    searches: list[AuditGiven] = [{"actor": "user:eve"}, {"entity_id": "rare"}, {"actor": "user:eve", "tenant": "acme"}]
    for wanted in searches:
        store.reads.clear()
        page = await room.audit.list(**wanted)
        assert [one.entity_id for one in page.items] == ["rare"]
        assert page.next_cursor is None
        assert store.reads.count(("rows", "journal")) <= 3


async def test_a_call_makes_a_bounded_number_of_reads_and_continues(
    room: Strongroom, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MAX_READS", 2)
    monkeypatch.setattr(audit, "FIRST_PAGE", 10)
    await write(room, "acme", 100)
    store.reads.clear()
    page = await room.audit.list(tenant="acme", limit=1_000)
    assert 10 <= len(page.items) < 100
    assert page.next_cursor is not None
    assert store.reads.count(("rows", "journal")) == 2
    assert len(await everything(room, 1_000, tenant="acme")) == 100


async def test_a_page_is_bounded_in_bytes(room: Strongroom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_PAGE_BYTES", 3_000)
    acme = room.tenant("acme")
    for number in range(6):
        await acme.create(Note(id=f"n{number}", text="x" * (5_000 if number == 4 else 1_000)))
    page = await room.audit.list(tenant="acme")
    assert [one.entity_id for one in page.items] == ["n0", "n1"]
    assert [one.entity_id for one in await everything(room, tenant="acme")] == [f"n{number}" for number in range(6)]


@pytest.mark.parametrize("scheme", STORES)
async def test_the_start_of_a_time_range_is_found_with_few_reads(scheme: str, tmp_path: Any) -> None:
    async with opened(new_url(scheme, tmp_path), entities=[Note]) as (room, store):
        with time_machine.travel(NOON - timedelta(days=10), tick=False) as clock:
            for number in range(8):
                await write(room, "acme", MAX_OPERATIONS // 3, f"{number}-")
                clock.shift(timedelta(days=1))
            clock.move_to(NOON)
            await room.tenant("acme").create(Note(id="late"))
        store.reads.clear()
        page = await room.audit.list(tenant="acme", since=NOON)
        assert [one.entity_id for one in page.items] == ["late"]
        assert page.next_cursor is None
        assert store.reads.count(("rows", "journal")) <= 3
        days = await everything(
            room, since=NOON - timedelta(days=8), until=NOON - timedelta(days=7), collection="notes"
        )
        assert {one.entity_id.partition("-")[0] for one in days} == {"2"}
        assert len(days) == MAX_OPERATIONS // 3


async def test_a_caller_bound_to_a_tenant_reads_only_its_records(room: Strongroom) -> None:
    await fill(room)
    bound = caller("acme", "user:ada")
    page = await room.audit.list(context=bound)
    assert {one.tenant for one in page.items} == {"acme"}
    with pytest.raises(Denied):
        await room.audit.list(tenant="beta", context=bound)
    (denied,) = await everything(room, collection=audit.NAME)
    assert (denied.tenant, denied.action, denied.actor) == ("beta", "deny", "user:ada")


async def test_a_cursor_is_valid_for_its_own_query_only(room: Strongroom) -> None:
    await fill(room)
    cursor = (await room.audit.list(limit=1)).next_cursor
    assert cursor is not None
    at_end = audit._cursor(audit._fingerprint(AuditFilter(), None), "end", 0)
    for tenant, wrong in (
        ("acme", cursor),
        (None, "nonsense"),
        (None, cursor[:-3]),
        (None, "x" * 10_000),
        (None, at_end),
    ):
        with pytest.raises(InvalidInput) as caught:
            await room.audit.list(tenant=tenant, cursor=wrong)
        assert [problem.path for problem in caught.value.problems] == ["cursor"]
    for given, path in (
        ({"limit": 0}, "limit"),
        ({"since": datetime(2026, 1, 1)}, "since"),  # noqa: DTZ001 - it has no zone on purpose
        ({"since": NOON, "until": NOON}, "until"),
        ({"action": "vanish"}, "action"),
    ):
        with pytest.raises(InvalidInput) as caught:
            await room.audit.list(**given)
        assert [problem.path for problem in caught.value.problems] == [path]


async def test_audit_records_mask_key_hashes(room: Strongroom) -> None:
    """An imported hash has no pepper: whoever may read the trail could guess a weak text from it."""
    digest = hashlib.sha256(b"hunter2hunter2").hexdigest()
    known = await room.keys.create(name="k", tenant="acme")
    await room.keys.rotate(known.key.id, overlap_s=60)
    (stored,) = (await room.database.find(system_context("acme"), ApiKey)).items
    hashes = {one for one in (stored.hash, stored.previous_hash) if one is not None}
    assert len(hashes) == 2
    await room.database.update(system_context("acme"), ApiKey, known.key.id, {"hash": f"sha256:{digest}"})
    found = await everything(room, tenant="acme", collection="api_keys")
    assert len(found) == 3
    text = repr(found)
    assert digest not in text
    assert not [one for one in hashes if one in text]
    assert found[0].after is not None
    assert (found[0].after["hash"], found[0].after["previous_hash"]) == ("***", None)
    assert found[2].before == found[2].after == {"hash": "***"}


async def test_over_http_only_administrators_and_the_tenants_own_keys_read_the_audit_trail() -> None:
    async with serving() as served:
        await served.post("/v1/tenants/acme/accounts", {"owner": "o", "token": "hunter2"}, X_Request_Id="r1")
        await served.post("/v1/tenants/beta/accounts", {"owner": "o"}, X_Request_Id="r2")
        ours, reader = await served.manager("read", "acme"), await served.manager("write")
        found = (await served.get("/v1/audit?collection=accounts")).json["items"]
        assert [(one["tenant"], one["request_id"], one["index"]) for one in found] == [
            ("acme", "r1", None), ("beta", "r2", None),
        ]  # fmt: skip
        assert found[0]["after"]["token"] == "***"
        own = (await served.get("/v1/audit?collection=accounts", key=ours)).json["items"]
        assert [one["tenant"] for one in own] == ["acme"]
        assert (await served.get("/v1/audit?tenant=beta", key=ours)).status == 403
        assert (await served.get("/v1/audit", key=reader)).status == 403, "a key of all tenants needs to administer"
        assert (await served.get("/v1/audit", key=(await served.make_key())["key"])).status == 403
        assert (await served.get("/v1/audit?colour=red&limit=0")).paths == ["colour", "limit"]
        assert (await served.get("/v1/audit?action=vanish")).paths == ["action"]
        assert (await served.get("/v1/audit?since=1700000000")).paths == ["since"]
        first = (await served.get("/v1/audit?limit=1")).json
        second = (await served.get(f"/v1/audit?limit=1&cursor={first['next_cursor']}")).json
        assert first["items"][0]["sequence"] < second["items"][0]["sequence"]


def test_the_command_line_lists_audit_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STRONGROOM_STORE", new_url("sqlite", tmp_path))

    def run(*arguments: str, status: int = 0) -> tuple[str, str]:
        assert main(arguments) == status
        return capsys.readouterr()

    made = json.loads(run("keys", "create", "--name", "k", "--tenant", "acme", "--json")[0])
    run("keys", "disable", made["id"])
    wanted = ("--tenant", "acme", "--collection", "api_keys", "--since", "1h")
    listed = json.loads(run("audit", "list", *wanted, "--json")[0])
    assert [one["action"] for one in listed["items"]] == ["create", "update"]
    assert listed["items"][1]["after"]["enabled"] is False
    assert listed["next_cursor"] is None
    text, _ = run("audit", "list", "--entity-id", made["id"])
    assert "api_keys/" + made["id"] in text
    assert "enabled" in text
    assert "there are no records" in run("audit", "list", "--until", "7d")[1]
    _, wrong = run("audit", "list", "--since", "soon", "--until", "2026-01-01T00:00:00", status=2)
    assert "--since" in wrong
    assert "--until" in wrong
