"""The cache of one process: one read of the store for many callers, bounded staleness, no use in transactions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from strongroom import (
    And,
    Cached,
    CachedList,
    Context,
    Counter,
    Entity,
    Query,
    Secret,
    Strongroom,
    Transaction,
    Where,
)
from strongroom.cache import read_through as cache
from strongroom.errors import Denied, InvalidInput, NotFound, SchemaError, Unavailable
from strongroom.rules import Decision, Request, default_policy
from strongroom.state.model import ENTITIES, PENDING_ACTIONS, Action, Policy, Signal
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.stores import STORES, new_url, opened
from tests.helpers.waiting import wait_until


class Note(Entity, collection="notes"):
    text: str


@pytest.fixture(params=STORES)
async def both(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Strongroom, FaultyStore]]:
    url = new_url(request.param, tmp_path)
    async with opened(url, entities=[*ENTITIES, Note], cache=cache.MEMORY_URL) as both:
        yield both


def policy(**fields: Any) -> Policy:
    return Policy(**{"id": "p", "policy_type": "quota", "policy_name": "n", "rules": {"a": {"b": 1}}, **fields})


def reads(store: FaultyStore, collection: str = "policies") -> int:
    return sum(name == collection for _, name in store.reads)


async def quiet(room: Strongroom) -> None:
    """Wait until the journal has told all there is: the record of a change ends the reads that it overtakes."""
    told: list[str] = []
    room.feed.on_record(lambda record: told.append(record.entity_id))
    last = await room.tenant("quiet").create(Note(text="x"))
    await wait_until(lambda: last.id in told)


# --- Hits, and what is shared ---------------------------------------------------------------------------------


async def test_a_second_read_does_not_reach_the_store(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    made = await acme.create(policy())
    await quiet(room)
    before = reads(store)
    found = [await acme.get(Policy, "p") for _ in range(5)]
    assert found == [made] * 5
    assert reads(store) - before == 1
    assert room.cache is not None
    assert (room.cache.stats.misses, room.cache.stats.local_hits) == (1, 4)


async def test_entities_without_a_declaration_are_read_from_the_store(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    await acme.create(Note(id="n", text="x"))
    before = reads(store, "notes")
    for _ in range(3):
        await acme.get(Note, "n")
    assert reads(store, "notes") - before == 3


async def test_concurrent_reads_of_one_document_are_one_read_of_the_store(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    await acme.create(policy())
    await quiet(room)
    before = reads(store)
    held = asyncio.Event()

    async def hold(method: str, collection: str) -> None:
        await held.wait()

    store.before_read = hold
    waiting = [asyncio.create_task(acme.get(Policy, "p")) for _ in range(200)]
    await wait_until(lambda: reads(store) > before)
    waiting += [asyncio.create_task(acme.get(Policy, "p")) for _ in range(200)]
    held.set()
    assert {found.policy_name for found in await asyncio.gather(*waiting)} == {"n"}
    assert reads(store) - before == 1


async def test_a_cancelled_reader_does_not_cancel_the_shared_read(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    await acme.create(policy())
    await quiet(room)
    held = asyncio.Event()

    async def hold(method: str, collection: str) -> None:
        await held.wait()

    store.before_read = hold
    before = reads(store)
    first = asyncio.create_task(acme.get(Policy, "p"))
    await wait_until(lambda: reads(store) > before)
    second = asyncio.create_task(acme.get(Policy, "p"))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    held.set()
    assert (await second).policy_name == "n"
    assert reads(store) - before == 1


async def test_a_failed_shared_read_raises_for_every_caller_and_is_not_cached(
    room: Strongroom, store: FaultyStore
) -> None:
    acme = room.tenant("acme")
    await acme.create(policy())
    await quiet(room)

    async def fail(method: str, collection: str) -> None:
        raise Unavailable("gone")

    store.before_read = fail
    answers = await asyncio.gather(*(acme.get(Policy, "p") for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 3
    store.before_read = None
    assert (await acme.get(Policy, "p")).policy_name == "n"


async def test_the_absence_of_a_document_is_cached_until_it_is_created(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    before = reads(store)
    for _ in range(4):
        assert await acme.get_or_none(Policy, "p") is None
    assert reads(store) - before == 1
    assert room.cache is not None
    assert room.cache.stats.absent_hits == 3
    await acme.create(policy())
    assert (await acme.get(Policy, "p")).policy_name == "n"


async def test_a_caller_that_mutates_a_cached_document_changes_no_other_read(room: Strongroom) -> None:
    acme = room.tenant("acme")
    await acme.create(policy())
    await quiet(room)
    for _ in range(3):
        found = await acme.get(Policy, "p")
        assert found.rules == {"a": {"b": 1}}
        found.rules["a"]["b"] = 2


# --- Never old ------------------------------------------------------------------------------------------------


async def test_a_node_reads_its_own_writes(room: Strongroom) -> None:
    acme = room.tenant("acme")
    await acme.create(policy())
    for number in range(100):
        await acme.update(Policy, "p", {"policy_name": f"n{number}"})
        assert (await acme.get(Policy, "p")).policy_name == f"n{number}"
    await acme.delete(Policy, "p")
    with pytest.raises(NotFound):
        await acme.get(Policy, "p")
    await acme.create(policy(policy_name="again"))
    assert (await acme.get(Policy, "p")).policy_name == "again"


async def test_a_slow_read_does_not_cache_an_overwritten_document(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    await acme.create(policy(policy_name="old"))
    await quiet(room)
    held = asyncio.Event()

    async def hold(method: str, collection: str) -> None:
        if collection == "policies":
            await held.wait()

    store.after_read = hold
    before = reads(store)
    slow = asyncio.create_task(acme.get(Policy, "p"))
    await wait_until(lambda: reads(store) > before)
    store.after_read = None
    await acme.update(Policy, "p", {"policy_name": "new"})
    assert (await acme.get(Policy, "p")).policy_name == "new", "it joined a read that began before the change"
    held.set()
    await slow
    assert (await acme.get(Policy, "p")).policy_name == "new"


async def test_a_change_by_another_process_is_seen(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    options: dict[str, Any] = {"entities": ENTITIES, "cache": cache.MEMORY_URL}
    async with Strongroom.open(url, **options) as here, Strongroom.open(url, **options) as there:
        await here.tenant("acme").create(policy(policy_name="old"))
        await wait_until(lambda: there.cache is not None and there.cache.stats.invalidations)
        assert (await there.tenant("acme").get(Policy, "p")).policy_name == "old"
        await here.tenant("acme").update(Policy, "p", {"policy_name": "new"})

        async def seen() -> bool:
            return (await there.tenant("acme").get(Policy, "p")).policy_name == "new"

        await wait_until(seen)


async def test_while_the_journal_cannot_be_read_reads_go_to_the_store(
    room: Strongroom, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = room.tenant("acme")
    await acme.create(policy())
    await quiet(room)
    await acme.get(Policy, "p")
    before = reads(store)
    room.feed.current_at -= cache.MAX_BEHIND_S + 60  # as if it had failed for a minute
    monkeypatch.setattr(store.store, "changes", _unavailable)
    room.feed.wake()
    for _ in range(3):
        await acme.get(Policy, "p")
    assert reads(store) - before == 3
    monkeypatch.undo()
    await wait_until(lambda: room.feed.behind_s < cache.MAX_BEHIND_S)
    before = reads(store)
    await acme.get(Policy, "p")
    await acme.get(Policy, "p")
    assert reads(store) - before <= 1


async def _unavailable(*_: Any, **__: Any) -> None:
    raise Unavailable("gone")


async def test_an_unknown_journal_record_clears_the_cache(
    room: Strongroom, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    acme = room.tenant("acme")
    await acme.create(policy())
    await quiet(room)
    await acme.get(Policy, "p")
    assert room.cache is not None
    monkeypatch.setattr(room.cache, "changed", None)
    monkeypatch.setattr(room.database.reads, "cache", None)
    await acme.create(policy(id="q"))
    await wait_until(lambda: "cannot be decoded" in caplog.text)
    assert room.cache is not None
    assert not room.cache._local


async def test_transactions_never_read_the_cache(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    await acme.create(policy())
    await acme.create(Action(id="a", action_type="t", source_service="s"))
    await quiet(room)
    await acme.get(Policy, "p")
    await acme.find(Action, PENDING)
    before = reads(store), reads(store, "actions")

    async def body(tx: Transaction) -> None:
        await tx.get(Policy, "p")
        await tx.find(Action, PENDING)

    await room.database.transaction(acme.context, body)
    assert (reads(store), reads(store, "actions")) == (before[0] + 1, before[1] + 1)


async def test_an_idempotent_retry_is_answered_from_the_store(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    made = await acme.create(policy(), idempotency_key="k")
    await quiet(room)
    await acme.get(Policy, "p")
    before = reads(store)
    assert await acme.create(policy(), idempotency_key="k") == made
    assert reads(store) > before


# --- Rules, expiry, tenants -----------------------------------------------------------------------------------


async def test_rules_decide_on_every_read(tmp_path: Path) -> None:
    asked: list[Any] = []

    def rules(request: Request) -> Decision:
        if request.collection.name == "policies" and request.operation == "get":
            asked.append(request.before)
            return Decision(request.context.claims.get("may", False), "no")
        return default_policy(request)

    url = new_url("json-memory", tmp_path)
    async with Strongroom.open(url, entities=ENTITIES, cache=cache.MEMORY_URL, policy=rules) as room:
        await room.tenant("acme").create(policy())
        for _ in range(2):
            assert (await room.tenant("acme", claims={"may": True}).get(Policy, "p")).policy_name == "n"
            with pytest.raises(Denied):
                await room.tenant("acme").get(Policy, "p")
    assert [document["policy_name"] for document in asked] == ["n"] * len(asked)


async def test_a_cached_document_is_gone_once_it_expires(room: Strongroom) -> None:
    acme = room.tenant("acme")
    now = acme.context.now
    await acme.create(Signal(id="s", signal_type="t", timestamp_ns=1, expires_at=now + timedelta(seconds=30)))
    await acme.get(Signal, "s")
    later = Context("acme", now_us=acme.context.now_us + 40_000_000)
    assert await room.database.get_or_none(later, Signal, "s") is None


@pytest.mark.parametrize("other", ["acme:policy", "acme%3Apolicy", "ACME", "acme:policy:p", "a"])
async def test_no_tenant_reads_the_cache_entry_of_another(room: Strongroom, other: str) -> None:
    await room.tenant("acme").create(policy())
    await quiet(room)
    await room.tenant("acme").get(Policy, "p")
    for id in ("p", "policy:p", ":p", "%3Ap"):
        assert await room.tenant(other).get_or_none(Policy, id) is None


async def test_the_memory_of_the_cache_is_bounded(room: Strongroom, monkeypatch: pytest.MonkeyPatch) -> None:
    assert room.cache is not None
    room.cache.local_entries = 10
    acme = room.tenant("acme")
    for number in range(30):
        await acme.get_or_none(Policy, f"p{number}")
    assert len(room.cache._local) == 10
    monkeypatch.setattr(cache, "MAX_LOCAL_BYTES", 50)
    for number in range(30):
        await acme.get_or_none(Policy, f"q{number}")
    assert 0 < len(room.cache._local) < 10
    assert room.cache._local_bytes == sum(len(key) + len(kept.body) for key, kept in room.cache._local.items())


async def test_an_entry_ends_with_its_time_to_live(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    await acme.get_or_none(Policy, "p")
    assert room.cache is not None
    (kept,) = room.cache._local.values()
    kept.until -= 5  # the life of an absence
    before = reads(store)
    await acme.get_or_none(Policy, "p")
    assert reads(store) - before == 1


# --- Lists ----------------------------------------------------------------------------------------------------

PENDING = Query(And(Where("source_service", "==", "s"), Where("status", "==", "pending")), ("-created_at",))


async def test_a_declared_list_is_cached_and_follows_every_change(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    made = [await acme.create(Action(action_type="t", source_service="s")) for _ in range(3)]
    await acme.create(Action(action_type="t", source_service="other"))

    async def ids() -> set[str]:
        return {found.id for found in (await acme.find(Action, PENDING)).items}

    await quiet(room)
    before = reads(store, "actions")
    for _ in range(4):
        assert await ids() == {action.id for action in made}
    assert reads(store, "actions") - before == 1
    await acme.update(Action, made[0].id, {"status": "accepted"})
    assert await ids() == {made[1].id, made[2].id}
    await acme.update(Action, made[1].id, {"source_service": "other"})
    assert await ids() == {made[2].id}
    await acme.update(Action, made[1].id, {"source_service": "s"})
    assert await ids() == {made[1].id, made[2].id}
    await acme.delete(Action, made[1].id)
    assert await ids() == {made[2].id}
    assert await room.tenant("beta").find(Action, PENDING) == await room.tenant("beta").find(Action, PENDING)
    assert not (await room.tenant("beta").find(Action, PENDING)).items


async def test_a_cached_list_follows_a_change_that_does_not_touch_its_filter_field(
    tmp_path: Path,
) -> None:
    url = new_url("sqlite", tmp_path)
    options: dict[str, Any] = {"entities": ENTITIES, "cache": cache.MEMORY_URL}
    async with Strongroom.open(url, **options) as here, Strongroom.open(url, **options) as there:
        made = await here.tenant("acme").create(Action(action_type="t", source_service="s"))
        await wait_until(lambda: there.cache is not None and there.cache.stats.invalidations)
        assert len((await there.tenant("acme").find(Action, PENDING)).items) == 1
        await here.tenant("acme").update(Action, made.id, {"status": "accepted"})

        async def seen() -> bool:
            return not (await there.tenant("acme").find(Action, PENDING)).items

        await wait_until(seen)


async def test_pages_of_a_cached_list_are_those_of_the_store(room: Strongroom) -> None:
    acme = room.tenant("acme")
    for number in range(7):
        await acme.create(Action(id=f"a{number}", action_type="t", source_service="s"))
    await quiet(room)
    for limit in (1, 3, 7, 100, 101, 150):
        query = Query(PENDING.where, PENDING.order_by, limit=limit)
        cached = await acme.find(Action, query)
        direct = await room.database.find(acme.context, Action, query, fresh=True)
        assert cached == direct
        if cached.next_cursor is not None:
            following = await acme.find(Action, query, cached.next_cursor)
            assert following == await room.database.find(acme.context, Action, query, cached.next_cursor, fresh=True)


@pytest.mark.parametrize(
    "query",
    [
        Query(Where("source_service", "==", "s"), ("-created_at",)),
        Query(PENDING.where, ("created_at",)),
        Query(And(Where("source_service", "==", "s"), Where("status", "==", "failed")), ("-created_at",)),
        Query(And(Where("source_service", "in", ["s"]), Where("status", "==", "pending")), ("-created_at",)),
    ],
)
async def test_any_other_query_goes_to_the_store(room: Strongroom, store: FaultyStore, query: Query) -> None:
    acme = room.tenant("acme")
    before = reads(store, "actions")
    await acme.find(Action, query)
    await acme.find(Action, query)
    assert reads(store, "actions") - before == 2


# --- Declaring ------------------------------------------------------------------------------------------------


def test_a_cache_declaration_that_cannot_work_is_refused_with_a_reason() -> None:
    with pytest.raises(SchemaError, match="not journalled"):

        class One(Entity, collection="ones", journalled=False, cache=Cached(seconds=60)):
            text: str

    with pytest.raises(SchemaError, match="token is secret"):

        class Two(Entity, collection="twos", cache=Cached(seconds=60)):
            token: Annotated[str, Secret()]

    with pytest.raises(SchemaError, match="'hits' is a counter"):

        class Three(Entity, collection="threes", cache=Cached(seconds=60, lists=[CachedList("by_owner", by="owner")])):
            owner: str
            hits: Annotated[int, Counter()] = 0

    with pytest.raises(SchemaError, match="expected 'nobody' to be a field"):

        class Four(Entity, collection="fours", cache=Cached(seconds=60, lists=[CachedList("l", by="nobody")])):
            owner: str

    with pytest.raises(SchemaError, match="expected 1 to"):

        class Five(Entity, collection="fives", cache=Cached(seconds=0)):
            owner: str

    with pytest.raises(SchemaError, match="expected different ones"):

        class Six(Entity, collection="sixes", cache=Cached(seconds=9, name="l", lists=[CachedList("l", by="owner")])):
            owner: Literal["a", "b"]


async def test_two_entities_cannot_share_a_name_in_the_cache(tmp_path: Path) -> None:
    class Mine(Entity, collection="mine", cache=Cached(seconds=60, name="policy")):
        text: str

    with pytest.raises(SchemaError, match="'policy'"):
        async with Strongroom.open(
            new_url("json-memory", tmp_path), entities=[*ENTITIES, Mine], cache=cache.MEMORY_URL
        ):
            pytest.fail("it opened")


async def test_an_invalid_id_is_refused_before_the_cache(room: Strongroom) -> None:
    with pytest.raises(InvalidInput):
        await room.tenant("acme").get(Policy, "x" * 600)


def test_the_list_of_seed_002_has_the_pending_actions_of_a_service() -> None:
    assert PENDING_ACTIONS.name == "actions"
    assert dict(PENDING_ACTIONS.where) == {"status": "pending"}
