"""Writes off: for all tenants or one, on every node within a second, and what goes on meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from strongroom import Entity, Strongroom
from strongroom.app import SYSTEM_ENTITIES
from strongroom.context import Context, system_context
from strongroom.database import WriteSwitch
from strongroom.entities import Registry, parse
from strongroom.errors import (
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    StrongroomError,
    TenantSuspended,
    Unavailable,
    WritesOff,
)
from strongroom.keys import ApiKey
from strongroom.keys.filter import KeyFilter
from strongroom.migrate import migrate
from strongroom.migrate.state import fence
from strongroom.storage import open_store
from strongroom.storage.port import Batch, Create, Pack
from strongroom.tenants import Tenant, WritesChange
from tests.helpers.stores import new_url, rolling
from tests.helpers.waiting import wait_until

WITHIN_S = 1.0


class Note(Entity, collection="notes"):
    text: str


class Draft(Entity, collection="drafts", journalled=False):
    text: str


class Rate(Entity, collection="rates", scope="global", journalled=False):
    text: str


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Note, Draft, Rate]


async def off(room: Strongroom, tenant: str | None = None, *, usage: bool = True) -> None:
    await room.writes.set(WritesChange(allowed=False, tenant=tenant, usage=usage, reason="a rollback"))


async def on(room: Strongroom, tenant: str | None = None) -> None:
    await room.writes.set(WritesChange(allowed=True, tenant=tenant))


# --- What is refused, and what goes on --------------------------------------------------------------------------


async def test_while_writes_are_off_every_write_is_refused_with_the_reason(room: Strongroom) -> None:
    acme = room.tenant("acme")
    note = await acme.create(Note(text="before"))
    issued = await room.keys.create(name="k", tenant="acme")
    await off(room)
    for write in (
        acme.create(Note(text="x")),
        acme.replace(Note(id=note.id, text="x")),
        acme.update(Note, note.id, {"text": "x"}),
        acme.delete(Note, note.id),
        room.keys.create(name="k2", tenant="acme"),
        room.keys.disable(issued.key.id),
        room.keys.rotate(issued.key.id),
        room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("tokens", 5)]),
        room.tenants.suspend("acme"),
        room.tenants.create("other"),
    ):
        with pytest.raises(WritesOff, match="writes of all tenants are off: a rollback"):
            await write
    assert (await acme.get(Note, note.id)).text == "before"
    await on(room)
    await acme.update(Note, note.id, {"text": "after"})


@pytest.mark.parametrize("tenant", [None, "acme"])
async def test_what_an_application_writes_without_a_journal_is_refused_too(
    room: Strongroom, tenant: str | None
) -> None:
    acme = room.tenant("acme")
    draft = await acme.create(Draft(text="before"))
    await off(room, tenant)
    for write in (
        acme.create(Draft(text="x")),
        acme.update(Draft, draft.id, {"text": "x"}),
        acme.delete(Draft, draft.id),
    ):
        with pytest.raises(WritesOff):
            await write
    if tenant is None:
        with pytest.raises(WritesOff):
            await room.database.create(system_context(), Rate(text="x"))
    await on(room, tenant)
    await room.tenants.suspend("acme")
    for write in (
        acme.create(Draft(text="x")),
        acme.update(Draft, draft.id, {"text": "x"}),
        acme.delete(Draft, draft.id),
    ):
        with pytest.raises(TenantSuspended):
            await write
    assert (await acme.get(Draft, draft.id)).text == "before"


async def test_reads_of_keys_and_of_the_audit_trail_go_on_while_writes_are_off(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", tenant="acme")
    await off(room)
    assert (await room.keys.get(issued.key.id)).name == "k"
    assert len((await room.keys.list(tenant="acme")).items) == 1
    assert (await room.keys.stats(issued.key.id)).key.id == issued.key.id
    assert (await room.audit.list(tenant="acme")).items
    assert (await room.tenants.get("acme")).status == "active"


async def test_verification_usage_and_reservations_go_on_while_writes_are_off(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", tenant="acme", limits=[rolling("tokens", 100)])
    await off(room)
    assert (await room.keys.verify(issued.text, cost={"tokens": 10}, idempotency_key="one")).valid
    await room.keys.record(key_id=issued.key.id, cost={"tokens": 10})
    held = await room.keys.reserve(issued.text, cost={"tokens": 10}, durable=True)
    assert (await room.keys.settle(held.reservation_id or "", {"tokens": 5})).valid
    assert (await room.keys.verify(issued.text, cost={"tokens": 1})).limits[0].used == 26


@pytest.mark.parametrize("tenant", [None, "acme"])
async def test_with_usage_off_verifications_usage_and_reservations_are_refused_as_well(
    room: Strongroom, tenant: str | None
) -> None:
    issued = await room.keys.create(name="k", tenant="acme", limits=[rolling("tokens", 100)])
    held = await room.keys.reserve(issued.text, cost={"tokens": 10}, durable=True)
    await room.keys.verify(issued.text, cost={"tokens": 1})
    await off(room, tenant, usage=False)
    id = held.reservation_id or ""
    for call in (
        room.keys.verify(issued.text, cost={"tokens": 1}),
        room.keys.verify(issued.text, cost={"tokens": 1}, idempotency_key="one"),
        room.keys.verify(issued.text, peek=True),
        room.keys.verify_many([{"text": issued.text}]),
        room.keys.record(key_id=issued.key.id, cost={"tokens": 1}),
        room.keys.reserve(issued.text, cost={"tokens": 1}),
        room.keys.settle(id, {"tokens": 1}),
        room.keys.extend(id),
        room.keys.release(id),
    ):
        with pytest.raises(WritesOff, match="a rollback"):
            await call
    with pytest.raises(WritesOff):
        room.keys.verifier.start(issued.text, cost={"tokens": 1})
    await on(room, tenant)
    assert (await room.keys.verify(issued.text, cost={"tokens": 0})).limits[0].used == 11


async def test_a_switch_of_one_tenant_leaves_the_others_alone(room: Strongroom) -> None:
    other = await room.keys.create(name="k", tenant="other")
    await room.tenant("acme").create(Note(text="x"))
    await off(room, "acme", usage=False)
    with pytest.raises(WritesOff, match="the tenant 'acme'"):
        await room.tenant("acme").create(Note(text="x"))
    with pytest.raises(WritesOff):
        await room.keys.create(name="k", tenant="acme")
    await room.tenant("other").create(Note(text="x"))
    await room.keys.disable(other.key.id)
    await room.tenants.create("third")
    await off(room)
    await on(room, "acme")
    with pytest.raises(WritesOff, match="all tenants"):
        await room.tenant("acme").create(Note(text="x"))


async def test_the_systems_own_bookkeeping_is_written_while_writes_are_off(room: Strongroom) -> None:
    await off(room)
    lease = await room.background.leases.acquire("a-job")
    assert lease is not None
    await lease.save("there")
    await lease.release(done=True)
    caller = Context("acme", "key:k", {"tenant": "other"})
    with pytest.raises(Denied):
        await room.database.get(caller, Note, "x")
    assert (await room.audit.list(action="deny")).items, "a denial is journalled as always"


async def test_expired_documents_stay_until_writes_are_on_again_and_the_sweep_goes_on(room: Strongroom) -> None:
    from strongroom.jobs.maintenance import Sweeper

    await off(room)
    await room.background.leases.run_once("expiry", 60, Sweeper(room.database, room.store).run)
    assert room.background.leases.jobs["expiry"].error is None


# --- The switch itself ------------------------------------------------------------------------------------------


async def test_a_switch_is_journalled_with_who_and_why(room: Strongroom) -> None:
    await room.tenant("acme").create(Note(text="x"))
    by = system_context(actor="cli:ann")
    await room.writes.set(WritesChange(allowed=False, tenant="acme", reason="a breach"), context=by)
    await room.writes.set(WritesChange(allowed=False, reason="a rollback"), context=by)
    await room.writes.set(WritesChange(allowed=True, reason="it is over"), context=by)
    records = (await room.audit.list(collection="write_switches")).items
    said = {(r.tenant, r.actor, (r.after or {})["allowed"], (r.after or {})["reason"]) for r in records}
    assert said == {
        ("acme", "cli:ann", False, "a breach"),
        (None, "cli:ann", False, "a rollback"),
        (None, "cli:ann", True, "it is over"),
    }


async def test_the_status_names_each_tenant_whose_writes_are_off(room: Strongroom) -> None:
    for tenant in ("a", "b", "c"):
        await room.tenant(tenant).create(Note(text="x"))
        await off(room, tenant, usage=tenant != "b")
    await on(room, "c")
    status = await room.writes.status()
    assert (status.allowed, status.usage, status.reason, status.migration) == (True, True, None, None)
    assert [(one.tenant, one.allowed, one.usage, one.reason) for one in status.items] == [
        ("a", False, True, "a rollback"),
        ("b", False, False, "a rollback"),
    ]
    first = await room.writes.status(limit=1)
    assert [one.tenant for one in first.items] == ["a"]
    second = await room.writes.status(limit=1, cursor=first.next_cursor)
    assert [one.tenant for one in second.items] == ["b"]
    assert [one.tenant for one in (await room.writes.status("b")).items] == ["b"]
    await off(room)
    assert (await room.writes.status()).allowed is False


async def test_only_an_administrator_of_all_tenants_turns_writes_off(room: Strongroom) -> None:
    for claims in ({"tenant": "acme", "admin": True, "scope": "admin"}, {"admin": True, "scope": "write"}, {}):
        with pytest.raises(Denied):
            await room.writes.set(
                WritesChange(allowed=False, tenant="acme", reason="x"), context=Context("acme", "key:k", claims)
            )
    bound = Context("acme", "key:k", {"tenant": "acme", "admin": True, "scope": "read"})
    await room.tenant("acme").create(Note(text="x"))
    await room.tenant("other").create(Note(text="x"))
    await off(room, "acme")
    await off(room, "other")
    assert [one.tenant for one in (await room.writes.status("other", context=bound)).items] == ["acme"]


async def test_a_wrong_switch_is_refused_with_every_problem(room: Strongroom) -> None:
    wrong: list[tuple[dict[str, Any], set[str]]] = [
        ({"allowed": False}, {"reason"}),
        ({"allowed": True, "usage": False}, {"usage"}),
        ({"reason": "x" * 1001, "tenant": "*", "x": 1}, {"allowed", "reason", "tenant", "x"}),
        ({"allowed": "no", "usage": 7}, {"allowed", "usage"}),
    ]
    for fields, paths in wrong:
        with pytest.raises(InvalidInput) as found:
            parse(WritesChange, fields)
        assert {problem.path for problem in found.value.problems} == paths
    with pytest.raises(NotFound, match="acem"):
        await off(room, "acem")


async def test_a_repeated_switch_with_its_idempotency_key_is_one(room: Strongroom) -> None:
    change = WritesChange(allowed=False, reason="x")
    first = await room.writes.set(change, idempotency_key="one")
    assert await room.writes.set(change, idempotency_key="one") == first
    assert len((await room.audit.list(collection="write_switches")).items) == 1


async def test_an_operator_cannot_turn_writes_of_a_migrations_source_on(room: Strongroom) -> None:
    await room.store.commit(Batch(None, fence(False, "the data moves", "postgresql://x"), 1))
    await wait_until(lambda: room.database.writes.refusal)
    with pytest.raises(Conflict, match="a migration keeps the writes of this store off: the data moves"):
        await on(room)
    with pytest.raises(WritesOff, match="the data moves"):
        await room.tenant("acme").create(Note(text="x"))
    assert (await room.writes.status()).migration == "the data moves"
    await room.store.commit(Batch(None, fence(True), 2))
    await wait_until(lambda: room.database.writes.refusal is None)
    await room.tenant("acme").create(Note(text="x"))


async def test_the_end_of_a_migration_does_not_turn_an_operators_switch_on(room: Strongroom) -> None:
    await off(room)
    await room.store.commit(Batch(None, fence(False, "the data moves"), 1))
    await wait_until(lambda: room.database.writes.refusal)
    await room.store.commit(Batch(None, fence(True), 2))
    await wait_until(lambda: room.database.writes.refusal is None)
    with pytest.raises(WritesOff, match="a rollback"):
        await room.tenant("acme").create(Note(text="x"))


# --- Every node, within a second --------------------------------------------------------------------------------


@asynccontextmanager
async def two_nodes(url: str, **options: Any) -> AsyncIterator[tuple[Strongroom, Strongroom]]:
    opened = [Strongroom.open(url, entities=[Note], **options) for _ in range(2)]
    async with opened[0] as one, opened[1] as two:
        yield one, two


@pytest.fixture(params=["sqlite", "postgres", "firestore"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    """A store that several nodes can use."""
    from tests.conftest import backend_of

    return backend_of(request.param, tmp_path, request).new_url()


async def refusal(call: Any) -> type[StrongroomError] | None:
    try:
        await call
    except StrongroomError as error:
        return type(error)
    return None


def broken(room: Strongroom, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the change feed of a node read nothing more."""

    async def failing(*given: Any, **named: Any) -> Any:
        raise Unavailable("the journal cannot be read")

    monkeypatch.setattr(room.feed._store, "changes", failing)


def measured_loop() -> list[float]:
    """The longest time for which this process's event loop did not run, which a test's bound must allow for."""
    longest = [0.0]

    async def beat() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            longest[0] = max(longest[0], time.monotonic() - began - 0.01)

    task = asyncio.get_running_loop().create_task(beat())
    _beats.add(task)
    return longest


_beats: set[asyncio.Task[None]] = set()


def not_heard_for(began: float, calls: list[float]) -> float:
    """How long after the switch a call still began that the node let pass as before; 0 if none did. The last call is
    the first that it decided anew, and how long a call takes is the disk's affair."""
    return calls[-2] - began if len(calls) > 1 else 0.0


@pytest.mark.parametrize("feed", ["working", "broken"])
async def test_writes_are_off_on_every_node_within_a_second(
    shared_url: str, feed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_nodes(shared_url) as (one, two):
        await two.tenant("acme").create(Note(text="x"))
        if feed == "broken":
            broken(two, monkeypatch)
        delays = measured_loop()
        for tenant in (None, "acme"):
            for turn, expected in ((off, WritesOff), (on, None)):
                await turn(one, tenant)
                began = time.monotonic()
                calls: list[float] = []

                async def heard(expected: Any = expected, calls: list[float] = calls) -> bool:
                    calls.append(time.monotonic())
                    return await refusal(two.tenant("acme").create(Note(text="x"))) is expected

                await wait_until(heard)
                assert not_heard_for(began, calls) < WITHIN_S + 20 * delays[0], (tenant, expected)


@pytest.mark.parametrize("feed", ["working", "broken"])
async def test_a_suspended_tenants_keys_and_writes_are_refused_on_every_node_within_a_second(
    shared_url: str, feed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_nodes(shared_url) as (one, two):
        issued = await one.keys.create(name="k", tenant="acme", limits=[rolling("tokens", 1_000_000)])
        await wait_until(lambda: _verified(two, issued.text))
        if feed == "broken":
            broken(two, monkeypatch)
        delays = measured_loop()
        for change, code, expected in (
            (one.tenants.suspend("acme", "unpaid"), "DISABLED", TenantSuspended),
            (one.tenants.resume("acme"), "VALID", None),
        ):
            await change
            began = time.monotonic()
            calls: list[float] = []

            async def heard(code: str = code, expected: Any = expected, calls: list[float] = calls) -> bool:
                calls.append(time.monotonic())
                answer = await two.keys.verify(issued.text, cost={"tokens": 1})
                return answer.code == code and await refusal(two.tenant("acme").create(Note(text="x"))) is expected

            await wait_until(heard)
            assert not_heard_for(began, calls) < WITHIN_S + 20 * delays[0], code


async def _verified(room: Strongroom, text: str) -> bool:
    return (await room.keys.verify(text, cost={"tokens": 1})).valid


@pytest.mark.parametrize("backend", ["sqlite", "json", "postgres", "firestore"], indirect=True)
async def test_a_switch_outlives_the_processes(url: str) -> None:
    async with Strongroom.open(url, entities=[Note]) as room:
        issued = await room.keys.create(name="k", tenant="acme")
        await room.tenant("other").create(Note(text="x"))
        await off(room, "other")
        await room.tenants.suspend("acme", "unpaid")
    async with Strongroom.open(url, entities=[Note]) as room:
        assert (await room.keys.verify(issued.text)).code == "DISABLED"
        with pytest.raises(TenantSuspended):
            await room.tenant("acme").create(Note(text="x"))
        with pytest.raises(WritesOff):
            await room.tenant("other").create(Note(text="x"))


async def test_later_changes_and_denials_take_no_switch_and_no_suspension_back(shared_url: str) -> None:
    """The journal's record of a change has the changed fields alone, and that of a denial has none of the document."""
    async with two_nodes(shared_url) as (one, two):
        issued = await one.keys.create(name="k", tenant="acme")
        await one.tenant("other").create(Note(text="x"))
        await one.tenants.suspend("acme", "unpaid")
        await off(one, "other")
        await one.tenants.update("acme", plan="gold")
        change = WritesChange(allowed=False, tenant="other", reason="another reason")
        await one.writes.set(change)
        by = Context("acme", "key:k", {"tenant": "x", "admin": True})
        with pytest.raises(Denied):
            await one.database.update(by, Tenant, "acme", {"plan": "x"})
        with pytest.raises(Denied):
            await one.database.delete(by, WriteSwitch, "tenant:other")
        await one.tenant("third").create(Note(text="the last record"))
        seen: list[str] = []
        two.feed.on_record(lambda record: seen.append(record.collection))
        await one.tenant("third").create(Note(text="the last record"))
        await wait_until(lambda: "notes" in seen)
        for room in (one, two):
            answer = await room.keys.verify(issued.text)
            assert (answer.code, answer.message) == ("DISABLED", "the tenant 'acme' is suspended: unpaid")
            with pytest.raises(WritesOff, match="another reason"):
                await room.tenant("other").create(Note(text="x"))


# --- Imports and migrations -------------------------------------------------------------------------------------


async def test_a_bulk_load_ends_when_writes_are_turned_off_during_it(tmp_path: Path) -> None:
    async with Strongroom.open(new_url("sqlite", tmp_path), entities=[Note]) as room:
        await room.tenant("other").create(Note(text="x"))
        await room.keys.create(name="k", tenant="acme")
        await room.tenants.suspend("other", "unpaid")
        database, context = room.database, system_context("acme")
        loading = database.loading
        assert loading is not None, "another tenant's suspension does not slow an import down"

        async def packs(turned: Callable[[], Awaitable[object]] | None) -> AsyncIterator[Pack]:
            for number in range(3):
                fields = {"tenant": "acme", "name": "n", "hash": f"h{number}{turned is None}", "display": "d"}
                document = ApiKey.__codec__.encode(ApiKey.parse({"id": f"{turned is None}{number}", **fields}))
                yield loading.packer().pack([Create("api_keys", f"{turned is None}{number}", document)])
                if turned is not None and number == 1:
                    await turned()

        await database.load_packs(context, ApiKey, packs(None))
        assert await room.keys.count(KeyFilter()) == 4
        for turned, error in (
            (lambda: off(room, "acme"), WritesOff),
            (lambda: room.tenants.suspend("acme"), TenantSuspended),
        ):
            with pytest.raises(error):
                await database.load_packs(context, ApiKey, packs(turned))
            assert await room.keys.count(KeyFilter()) == 4, "nothing of it was written"
            await on(room, "acme")


async def test_switches_and_suspensions_move_with_the_data(tmp_path: Path) -> None:
    one, two = new_url("sqlite", tmp_path, "one"), new_url("sqlite", tmp_path, "two")
    async with Strongroom.open(one, entities=[Note]) as room:
        issued = await room.keys.create(name="k", tenant="acme")
        await room.tenant("other").create(Note(text="x"))
        await off(room, "other")
        await room.tenants.suspend("acme", "unpaid")
    source, target = await open_store(one), await open_store(two)
    report = await migrate(source, target, Registry((*SYSTEM_ENTITIES, Note)).collections)
    assert report.equal
    await source.close()
    await target.close()
    async with Strongroom.open(two, entities=[Note]) as room:
        assert (await room.keys.verify(issued.text)).code == "DISABLED"
        with pytest.raises(WritesOff, match="a rollback"):
            await room.tenant("other").create(Note(text="x"))
        await on(room, "other")
        await room.tenant("other").create(Note(text="x"))
