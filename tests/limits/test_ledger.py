"""The ledger: never over-admitted, all limits or none, nothing lost; many callers, several nodes, through failures."""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter as Bag
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
import time_machine

from strongroom import Anchored, ApiKey, Calendar, Database, Limit, Registry, Rolling, Total
from strongroom.app import SYSTEM_ENTITIES
from strongroom.context import new_id, system_context
from strongroom.entities.entity import Document
from strongroom.errors import (
    AlreadyExists,
    Conflict,
    StorageFull,
    TooLarge,
    TooManyRequests,
    Unavailable,
)
from strongroom.keys.cached_key import subjects_of
from strongroom.limits import ledger as usage
from strongroom.limits import tuning
from strongroom.limits.corrections import MAX_WRITERS, AggregatedUse, add_once
from strongroom.limits.ledger import AdmissionDecision, KeyChanged, Ledger
from strongroom.storage import open_store
from strongroom.storage.port import Batch, Capabilities, Committed, Patch, Put
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import STORES, new_url, rolling, stored_usage
from tests.helpers.waiting import PATIENCE_S, wait_until

SYSTEM = system_context()
MOMENT = datetime(2026, 5, 5, tzinfo=UTC)


@dataclass
class Node:
    """One process's ledger on a store that others use as well."""

    store: FaultyStore
    database: Database
    ledger: Ledger


@dataclass
class Cluster:
    url: str
    nodes: list[Node] = field(default_factory=list)

    @property
    def one(self) -> Node:
        return self.nodes[0]

    async def key(self, *limits: Limit) -> ApiKey:
        id = new_id("key_")
        key = ApiKey(id=id, tenant="acme", name="n", hash=f"h:{id}", display="sr_…", limits=list(limits))
        return await self.one.database.create(SYSTEM, key)

    async def used(self, id: str) -> dict[str, int]:
        return (await stored_usage(self.one.store.store, id)).totals


@asynccontextmanager
async def cluster_of(kind: str, folder: Path, nodes: int) -> AsyncIterator[Cluster]:
    cluster = Cluster(new_url(kind, folder))
    registry = Registry(SYSTEM_ENTITIES)
    for number in range(nodes):
        if number and kind == "json-memory":
            store = FaultyStore(cluster.one.store.store, shared=True)
        else:
            store = FaultyStore(await open_store(cluster.url))
        await store.prepare(registry.collections)
        database = Database(store, registry)
        cluster.nodes.append(Node(store, database, Ledger(database, store)))
    try:
        yield cluster
    finally:
        for node in cluster.nodes:
            await node.ledger.close()
        for node in reversed(cluster.nodes):
            await node.store.close()


@pytest.fixture(params=STORES)
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_of(request.param, tmp_path, 1) as cluster:
        yield cluster


async def settled(futures: Sequence[Awaitable[AdmissionDecision]]) -> list[AdmissionDecision | BaseException]:
    return list(await asyncio.gather(*futures, return_exceptions=True))


def admitted(answers: Sequence[AdmissionDecision | BaseException]) -> int:
    return sum(isinstance(answer, AdmissionDecision) and answer.allowed for answer in answers)


async def memory_is_the_stores(node: Node, id: str) -> None:
    """What the ledger holds of a key is what the store holds, if it holds the version that is there."""
    state = node.ledger.states.known.get(id)
    stored = await node.store.store.get("key_usage", None, id)
    if state is None:
        return
    if stored is None:
        assert state.version == 0
        assert state.count == 0
    elif state.version == stored["version"]:
        assert state.document() == {name: stored[name] for name in state.document()}


# --- Many callers, several nodes, every window ----------------------------------------------------------------

LIMITS: list[list[Limit]] = [
    [rolling("tokens", 700), rolling("requests", 40, 60)],
    [Limit(resource="tokens", limit=500, window=Anchored(seconds=3600))],
    [Limit(resource="tokens", limit=900, window=Total()), Limit(resource="cost", limit=3, window=Total())],
    [Limit(resource="requests", limit=30, window=Calendar(unit="month")), rolling("tokens", 5_000, 18_000)],
    [rolling("tokens", 0)],
]


@dataclass
class Call:
    node: Node
    key: ApiKey
    cost: dict[str, int]
    answer: AdmissionDecision | BaseException | None = None


def random_cost(chance: random.Random) -> dict[str, int]:
    cost = {"requests": 1, "tokens": chance.choice([0, 1, 10, 50, 200])}
    return {**cost, "cost": 10**8 * chance.randint(0, 5)} if chance.random() < 0.5 else cost


async def charge_at_random(
    cluster: Cluster, chance: random.Random, keys: Sequence[ApiKey], calls: int, *, cancel: float = 0.0
) -> list[Call]:
    """Charges of any key at any node, at once; a few callers go away while they wait."""

    async def one(call: Call) -> None:
        for _ in range(chance.randint(0, 8)):
            await asyncio.sleep(0)
        future = call.node.ledger.admit(subjects_of(call.key), call.cost)
        if chance.random() < cancel:
            await asyncio.sleep(0)
            future.cancel()
        try:
            call.answer = await future
        except (Exception, asyncio.CancelledError) as error:
            call.answer = error

    made = [Call(chance.choice(cluster.nodes), chance.choice(keys), random_cost(chance)) for _ in range(calls)]
    await asyncio.gather(*map(one, made))
    return made


async def check_books(cluster: Cluster, calls: Sequence[Call], *, exact: bool) -> None:
    """The store's totals are what was admitted: exactly, or (with failures) that and at most what was not answered."""
    for key in {call.key.id: call.key for call in calls}.values():
        known, unknown = Bag[str](), Bag[str]()
        mine = [call for call in calls if call.key.id == key.id]
        for call in mine:
            if isinstance(call.answer, AdmissionDecision):
                known.update(call.cost if call.answer.allowed else {})
            else:
                unknown.update(call.cost)
        state = await stored_usage(cluster.one.store.store, key.id)
        for resource in ("requests", "tokens", "cost"):
            stored = state.totals.get(resource, 0)
            assert known[resource] <= stored <= known[resource] + (0 if exact else unknown[resource])
        counted = []
        for compiled_limit in subjects_of(key).compiled_limits:
            used = state.counter(compiled_limit).used(max(state.last_used_us or 0, 1))
            assert used <= compiled_limit.most, "over-admitted"
            assert used == state.totals.get(compiled_limit.resource, 0), "one limit was charged and another not"
            counted.append((compiled_limit, used))
        for call in mine:
            if isinstance(call.answer, AdmissionDecision) and not call.answer.allowed:
                exceeded = [s.compiled_limit.id for s in call.answer.statuses if s.exceeded]
                assert exceeded
                # Usage only grew, so whoever was denied then would be denied now.
                for compiled_limit, used in counted:
                    if compiled_limit.id in exceeded:
                        assert used + call.cost.get(compiled_limit.resource, 0) > compiled_limit.most
        for node in cluster.nodes:
            await memory_is_the_stores(node, key.id)


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("seed", range(3))
async def test_many_callers_on_several_nodes_are_admitted_exactly(
    kind: str, nodes: int, seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    async with cluster_of(kind, tmp_path, nodes) as cluster:
        keys = [await cluster.key(*limits) for limits in LIMITS]
        calls = await charge_at_random(cluster, chance, keys, 400)
        assert not [call.answer for call in calls if isinstance(call.answer, BaseException)]
        assert any(isinstance(call.answer, AdmissionDecision) and not call.answer.allowed for call in calls)
        await check_books(cluster, calls, exact=True)


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("seed", range(4))
async def test_failed_commits_and_lost_answers_never_admit_too_much(
    kind: str, nodes: int, seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)

    def fault(number: int, batch: Batch) -> Fault | None:
        match chance.randint(0, 12):
            case 0:
                return Fault("before", Unavailable("refused on purpose"))
            case 1:
                return Fault("after", Unavailable("the answer was lost on purpose"))
            case 2:
                return Fault("before", Conflict("on purpose", operation=1))
            case 3:
                return Fault("before", StorageFull())
            case _:
                return None

    async with cluster_of(kind, tmp_path, nodes) as cluster:
        keys = [await cluster.key(*limits) for limits in LIMITS]
        for node in cluster.nodes:
            node.store.fault = fault
        calls = [call for _ in range(8) for call in await charge_at_random(cluster, chance, keys, 40, cancel=0.1)]
        for node in cluster.nodes:
            node.store.fault = lambda number, batch: None
            await node.ledger.close()  # what was cancelled is settled too
        assert {type(c.answer) for c in calls} >= {AdmissionDecision, Unavailable}
        await check_books(cluster, calls, exact=False)


async def test_of_two_nodes_that_claim_the_same_remainder_one_succeeds(tmp_path: Path) -> None:
    async with cluster_of("sqlite", tmp_path, 2) as cluster:
        for _ in range(20):
            key = await cluster.key(rolling("tokens", 100))
            for node in cluster.nodes:  # both have the account in memory
                await node.ledger.admit(subjects_of(key), {"tokens": 20})
            answers = await settled([node.ledger.admit(subjects_of(key), {"tokens": 60}) for node in cluster.nodes])
            assert admitted(answers) == 1
            assert await cluster.used(key.id) == {"tokens": 100}


class DistantStore(FaultyStore):
    """A store some way off: a read takes a millisecond there and back, and so does a commit."""

    WAY_S = 0.0005

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.store.capabilities, multi_process=True)

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        await asyncio.sleep(self.WAY_S)
        found = await super().get(collection, tenant, id)
        await asyncio.sleep(self.WAY_S)
        return found

    async def _commit(self, batch: Batch, fault: Fault | None) -> Committed:
        await asyncio.sleep(self.WAY_S)
        try:
            return await super()._commit(batch, fault)
        finally:
            await asyncio.sleep(self.WAY_S)


@pytest.mark.parametrize("nodes", [2, 4])
async def test_contending_nodes_spend_one_key_exactly_and_none_starves(nodes: int, tmp_path: Path) -> None:
    async with cluster_of("json-memory", tmp_path, 1) as cluster:
        inner, registry = cluster.one.store.store, Registry(SYSTEM_ENTITIES)
        key = await cluster.key(rolling("requests", 600))
        stores = [DistantStore(inner, shared=True) for _ in range(nodes)]
        ledgers = [Ledger(Database(store, registry), store) for store in stores]
        admitted_by = [0] * nodes

        async def caller(node: int) -> None:
            while (await ledgers[node].admit(subjects_of(key), {"requests": 1})).allowed:
                admitted_by[node] += 1

        async with asyncio.timeout(2 * PATIENCE_S):
            await asyncio.gather(*(caller(node) for node in range(nodes) for _ in range(4)))
        assert sum(admitted_by) == 600
        assert await cluster.used(key.id) == {"requests": 600}
        assert min(admitted_by) >= 600 // nodes // 5, "one node kept the others out"
        for ledger in ledgers:
            await ledger.close()


async def test_a_contended_key_does_not_delay_others(cluster: Cluster) -> None:
    contended, quiet = await cluster.key(rolling("requests", 100)), await cluster.key(rolling("requests", 100))
    node = cluster.one
    lost = 0

    def fault(number: int, batch: Batch) -> Fault | None:
        nonlocal lost
        if not any(isinstance(op, Put | Patch) and op.id == contended.id for op in batch.operations):
            return None
        lost += 1
        return Fault("before", Conflict("another node was faster", operation=1))

    node.store.fault = fault
    waiting = node.ledger.admit(subjects_of(contended), {"requests": 1})
    for _ in range(3):  # beside its first attempts; the attempts are bounded, so do not wait for many
        assert (await node.ledger.admit(subjects_of(quiet), {"requests": 1})).allowed
    assert lost >= 2
    assert not waiting.done()
    node.store.fault = lambda number, batch: None
    assert (await waiting).allowed
    assert await cluster.used(contended.id) == {"requests": 1}


async def test_more_waiting_admissions_share_a_slow_commit(tmp_path: Path) -> None:
    async with cluster_of("json-memory", tmp_path, 1) as cluster:
        keys = [await cluster.key(rolling("requests", 10**9)) for _ in range(50)]
        store = DistantStore(cluster.one.store.store, shared=True)
        ledger = Ledger(Database(store, Registry(SYSTEM_ENTITIES)), store)
        a_commit = []
        for callers in (10, 100, 1_000):

            async def caller(key: ApiKey) -> None:
                for _ in range(5):
                    assert (await ledger.admit(subjects_of(key), {"requests": 1})).allowed

            before = len(store.batches)
            await asyncio.gather(*(caller(keys[number % 50]) for number in range(callers)))
            a_commit.append(5 * callers / (len(store.batches) - before))
        await ledger.close()
        # Two cohorts: those whose commit is under way, and those who gather meanwhile. So at least a third each.
        assert a_commit[0] >= 3
        assert a_commit[1] >= 30
        assert a_commit[2] >= 300


async def test_a_denial_by_one_limit_debits_no_other(cluster: Cluster) -> None:
    key = await cluster.key(rolling("requests", 10), rolling("tokens", 100))
    assert (await cluster.one.ledger.admit(subjects_of(key), {"requests": 1, "tokens": 90})).allowed
    for _ in range(5):
        denied = await cluster.one.ledger.admit(subjects_of(key), {"requests": 1, "tokens": 11})
        assert not denied.allowed
        assert [(s.used, s.exceeded) for s in denied.statuses] == [(1, False), (90, True)]
    assert await cluster.used(key.id) == {"requests": 1, "tokens": 90}
    assert (await cluster.one.ledger.admit(subjects_of(key), {"requests": 1, "tokens": 10})).allowed


async def test_admissions_that_arrive_together_share_a_commit(cluster: Cluster) -> None:
    key = await cluster.key(rolling("requests", 1_000))
    before = len(cluster.one.store.batches)
    await settled([cluster.one.ledger.admit(subjects_of(key), {"requests": 1}) for _ in range(500)])
    assert len(cluster.one.store.batches) == before + 1
    assert await cluster.used(key.id) == {"requests": 500}


async def test_a_commit_waits_for_an_announced_batch_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of("sqlite", tmp_path, 1) as cluster:
        key, ledger = await cluster.key(rolling("requests", 1_000)), cluster.one.ledger

        def use() -> asyncio.Future[AdmissionDecision]:
            return ledger.admit(subjects_of(key), {"requests": 1})

        await use()  # now a round has been timed
        before = len(cluster.one.store.batches)
        with ledger.announced():  # another batch, which never arrives
            await asyncio.wait_for(use(), PATIENCE_S)
        assert len(cluster.one.store.batches) == before + 1
        monkeypatch.setattr(tuning, "ANNOUNCED_PART", 1e9)
        monkeypatch.setattr(tuning, "MAX_ANNOUNCED_S", 2 * PATIENCE_S)
        with ledger.announced():
            first = use()
            for _ in range(10):
                await asyncio.sleep(0.001)
            assert not first.done()
            second = use()
        await asyncio.wait_for(asyncio.gather(first, second), PATIENCE_S)
        assert len(cluster.one.store.batches) == before + 2


async def test_returning_callers_share_a_group_commit_and_a_single_caller_does_not_wait(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "GATHER_PART", 1e9)
    monkeypatch.setattr(tuning, "MAX_GATHER_S", 2 * PATIENCE_S)  # who waits for others now waits for ever
    key = await cluster.key(rolling("requests", 1_000))

    def charge() -> asyncio.Future[AdmissionDecision]:
        return cluster.one.ledger.admit(subjects_of(key), {"requests": 1})

    async with asyncio.timeout(PATIENCE_S):
        for _ in range(5):
            await charge()
        for count in (10, 10, 10):
            await settled([charge() for _ in range(count)])
        before = len(cluster.one.store.batches)
        first = [charge() for _ in range(5)]
        for _ in range(3):
            await asyncio.sleep(0)
        await settled([*first, *(charge() for _ in range(5))])
    assert len(cluster.one.store.batches) == before + 1
    assert await cluster.used(key.id) == {"requests": 45}


async def test_no_admission_is_answered_before_it_is_durable(cluster: Cluster) -> None:
    key = await cluster.key(rolling("requests", 10))
    cluster.one.store.gate = asyncio.Event()
    future = cluster.one.ledger.admit(subjects_of(key), {"requests": 1})
    await wait_until(lambda: any(isinstance(op, Put | Patch) for op in cluster.one.store.batches[-1].operations))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not future.done()
    cluster.one.store.gate.set()
    assert (await future).allowed


# --- When a commit fails --------------------------------------------------------------------------------------


def failing_once(store: FaultyStore, when: Any, error: Exception) -> None:
    first = len(store.batches)
    store.fault = lambda number, batch: Fault(when, error) if number == first else None


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [Unavailable("gone"), StorageFull()], ids=["unavailable", "full"])
async def test_a_failed_commit_is_reported_and_the_usage_is_read_again(
    cluster: Cluster, when: str, error: Exception
) -> None:
    node = cluster.one
    key = await cluster.key(rolling("tokens", 100))
    await node.ledger.admit(subjects_of(key), {"tokens": 10})
    failing_once(node.store, when, error)
    answers = await settled([node.ledger.admit(subjects_of(key), {"tokens": 40}) for _ in range(2)])
    assert [type(a) for a in answers] == [type(error)] * 2
    happened = 80 if when == "after" else 0  # it was not acknowledged: it may have happened, or not
    assert await cluster.used(key.id) == {"tokens": 10 + happened}
    outcome = await node.ledger.admit(subjects_of(key), {"tokens": 5})
    assert outcome.statuses[0].used == 10 + happened + 5
    await memory_is_the_stores(node, key.id)
    rest = 100 - 15 - happened
    assert not (await node.ledger.admit(subjects_of(key), {"tokens": rest + 1})).allowed
    assert (await node.ledger.admit(subjects_of(key), {"tokens": rest})).allowed


@pytest.mark.parametrize("error", [Conflict("x", operation=1), Conflict("x"), AlreadyExists("x", operation=1)])
async def test_a_conflict_on_the_usage_is_retried(cluster: Cluster, error: Exception) -> None:
    key = await cluster.key(rolling("tokens", 100))
    failing_once(cluster.one.store, "before", error)
    assert (await cluster.one.ledger.admit(subjects_of(key), {"tokens": 40})).allowed
    assert await cluster.used(key.id) == {"tokens": 40}


async def test_endless_conflicts_end_in_an_error(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "RETRY_FOR_S", 0.02)
    key = await cluster.key(rolling("tokens", 100))
    before = len(cluster.one.store.batches)
    cluster.one.store.fault = lambda number, batch: Fault("before", Conflict("always", operation=1))
    with pytest.raises(Unavailable, match="too many nodes"):
        await cluster.one.ledger.admit(subjects_of(key), {"tokens": 40})
    assert len(cluster.one.store.batches) > before + 1
    cluster.one.store.fault = lambda number, batch: None
    assert (await cluster.one.ledger.admit(subjects_of(key), {"tokens": 100})).allowed


async def test_the_failure_of_one_key_does_not_affect_others(cluster: Cluster) -> None:
    good, bad = await cluster.key(rolling("tokens", 100)), await cluster.key(rolling("tokens", 100))

    def fault(number: int, batch: Batch) -> Fault | None:
        mine = any(isinstance(op, Put | Patch) and op.id == bad.id for op in batch.operations)
        return Fault("before", TooLarge("this one's document")) if mine else None

    cluster.one.store.fault = fault
    answers = await settled([cluster.one.ledger.admit(subjects_of(key), {"tokens": 40}) for key in (bad, good)])
    assert isinstance(answers[0], TooLarge)
    assert admitted(answers) == 1
    assert await cluster.used(good.id) == {"tokens": 40}


async def test_keys_admitted_together_share_commits_within_the_batch_limits(cluster: Cluster) -> None:
    keys = [await cluster.key(rolling("tokens", 100)) for _ in range(600)]
    for expected in (1, 2):
        before = len(cluster.one.store.batches)
        answers = await settled([cluster.one.ledger.admit(subjects_of(key), {"tokens": 40}) for key in keys])
        assert admitted(answers) == 600
        assert len(cluster.one.store.batches) - before == 3  # two operations a key, 500 a batch; and no conflict
        for key in keys[::100]:
            assert await cluster.used(key.id) == {"tokens": 40 * expected}
            await memory_is_the_stores(cluster.one, key.id)


async def test_usage_recorded_together_is_cached_at_its_committed_version(cluster: Cluster) -> None:
    keys = [await cluster.key(rolling("tokens", 100)) for _ in range(5)]
    await settled([recording(cluster.one, key, f"i{n}", {"tokens": 10}) for key in keys for n in range(3)])
    before = len(cluster.one.store.batches)
    assert admitted(await settled([cluster.one.ledger.admit(subjects_of(key), {"tokens": 10}) for key in keys])) == 5
    assert len(cluster.one.store.batches) == before + 1
    assert [await cluster.used(key.id) for key in keys] == [{"tokens": 40}] * 5


async def test_a_lost_answer_for_several_keys_is_reported_to_all_and_committed_once(cluster: Cluster) -> None:
    keys = [await cluster.key(rolling("tokens", 100)) for _ in range(3)]
    failing_once(cluster.one.store, "after", Unavailable("lost"))
    answers = await settled([cluster.one.ledger.admit(subjects_of(key), {"tokens": 40}) for key in keys])
    assert [type(answer) for answer in answers] == [Unavailable] * 3
    assert [await cluster.used(key.id) for key in keys] == [{"tokens": 40}] * 3


async def test_a_failed_read_is_reported_and_the_next_admission_reads_again(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))

    async def fail(method: str, collection: str) -> None:
        raise Unavailable("cannot be read")

    cluster.one.store.before_read = fail
    with pytest.raises(Unavailable, match="cannot be read"):
        await cluster.one.ledger.admit(subjects_of(key), {"tokens": 40})
    cluster.one.store.before_read = None
    assert (await cluster.one.ledger.admit(subjects_of(key), {"tokens": 40})).allowed


async def test_an_unexpected_error_leaves_no_caller_waiting_and_no_stale_usage(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = cluster.one
    keys = [await cluster.key(rolling("tokens", 100)) for _ in range(3)]
    await settled([node.ledger.admit(subjects_of(key), {"tokens": 10}) for key in keys])

    def commit_counters(operations: Any, now_us: int) -> Any:
        if any(isinstance(operation, Put | Patch) and operation.id == keys[1].id for operation in operations):
            raise RuntimeError("a bug")
        return original(operations, now_us)

    original = node.database.commit_counters
    with monkeypatch.context() as patch:
        patch.setattr(node.database, "commit_counters", commit_counters)
        answers = await settled([node.ledger.admit(subjects_of(key), {"tokens": 40}) for key in keys])
    assert all(isinstance(answer, Unavailable) for answer in answers)
    used = [(await node.ledger.admit(subjects_of(key), {"tokens": 1})).statuses[0].used for key in keys]
    assert used == [11, 11, 11]
    for key in keys:
        assert (await cluster.used(key.id))["tokens"] == used.pop(0)
        await memory_is_the_stores(node, key.id)


# --- When the key is changed meanwhile ------------------------------------------------------------------------


async def change(cluster: Cluster, key: ApiKey, how: str) -> None:
    match how:
        case "disabled":
            await cluster.one.database.update(SYSTEM, ApiKey, key.id, {"enabled": False})
        case "limit lowered":
            await cluster.one.database.update(SYSTEM, ApiKey, key.id, {"limits": [rolling("tokens", 1)]})
        case "deleted":
            await cluster.one.database.delete(SYSTEM, ApiKey, key.id)


@pytest.mark.parametrize("how", ["disabled", "limit lowered", "deleted"])
async def test_an_admission_of_a_changed_key_is_refused_and_debits_nothing(cluster: Cluster, how: str) -> None:
    key = await cluster.key(rolling("tokens", 100))
    old = subjects_of(key)
    await cluster.one.ledger.admit(old, {"tokens": 10})
    await change(cluster, key, how)
    for force in (False, True):
        with pytest.raises(KeyChanged):
            await cluster.one.ledger.admit(old, {"tokens": 10}, force=force)
    assert await cluster.used(key.id) == {"tokens": 10}


@pytest.mark.parametrize("how", ["disabled", "limit lowered", "deleted"])
async def test_a_key_changed_during_its_commit_is_not_charged(cluster: Cluster, how: str) -> None:
    key = await cluster.key(rolling("tokens", 100))
    gate = cluster.one.store.gate = asyncio.Event()
    before = len(cluster.one.store.batches)
    future = cluster.one.ledger.admit(subjects_of(key), {"tokens": 10})
    await wait_until(lambda: len(cluster.one.store.batches) > before)
    cluster.one.store.gate = None  # the change overtakes the charge
    assert len(cluster.one.store.batches) == before + 1
    await change(cluster, key, how)
    gate.set()
    with pytest.raises(KeyChanged):
        await future
    assert await cluster.used(key.id) == {}


async def test_admissions_of_an_older_and_a_newer_key_version_share_a_group(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))
    newer = await cluster.one.database.update(SYSTEM, ApiKey, key.id, {"limits": [rolling("tokens", 50)]})
    answers = await settled(
        [cluster.one.ledger.admit(subjects_of(which), {"tokens": 30}) for which in (key, newer, newer, key)]
    )
    assert [type(answer) for answer in answers] == [KeyChanged, AdmissionDecision, AdmissionDecision, KeyChanged]
    assert admitted(answers) == 1
    assert await cluster.used(key.id) == {"tokens": 30}


async def test_usage_is_kept_when_a_limit_changes(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))
    await cluster.one.ledger.admit(subjects_of(key), {"tokens": 60})
    for limit, allowed in ((50, False), (65, True), (64, False)):
        key = await cluster.one.database.update(SYSTEM, ApiKey, key.id, {"limits": [rolling("tokens", limit)]})
        outcome = await cluster.one.ledger.admit(subjects_of(key), {"tokens": 5})
        assert outcome.allowed is allowed


# --- Recording once -------------------------------------------------------------------------------------------


def recording(node: Node, key: ApiKey, idempotency_key: str, cost: dict[str, int]) -> asyncio.Future[AdmissionDecision]:
    once = node.database.once(f"usage {key.id}", "system", idempotency_key, key.id)
    return node.ledger.admit(subjects_of(key), cost, force=True, once=once)


@pytest.mark.parametrize("kind", STORES)
async def test_a_usage_record_counts_once_however_often_and_on_any_node(kind: str, tmp_path: Path) -> None:
    async with cluster_of(kind, tmp_path, 2) as cluster:
        key = await cluster.key(rolling("tokens", 100))
        made = [recording(node, key, f"i{n % 5}", {"tokens": 10}) for n in range(20) for node in cluster.nodes]
        outcomes = await asyncio.gather(*made)
        assert sum(not outcome.repeated for outcome in outcomes) == 5
        again = await recording(cluster.nodes[1], key, "i0", {"tokens": 10})
        assert again.repeated
        first = next(outcome for outcome in outcomes if not outcome.repeated)
        assert again.statuses == first.statuses
        assert await cluster.used(key.id) == {"tokens": 50}


async def test_more_usage_records_than_a_batch_holds_are_all_counted_once(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 10_000))
    made = [recording(cluster.one, key, f"i{number % 1_200}", {"tokens": 1}) for number in range(1_300)]
    outcomes = await asyncio.gather(*made)
    assert sum(not outcome.repeated for outcome in outcomes) == 1_200
    assert await cluster.used(key.id) == {"tokens": 1_200}


async def test_a_usage_record_whose_answer_was_lost_is_retried_without_effect(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))
    failing_once(cluster.one.store, "after", Unavailable("lost"))
    with pytest.raises(Unavailable):
        await recording(cluster.one, key, "i", {"tokens": 10})
    assert (await recording(cluster.one, key, "i", {"tokens": 10})).repeated
    assert await cluster.used(key.id) == {"tokens": 10}


async def test_an_idempotency_key_is_forgotten_after_a_day_whether_or_not_it_was_purged(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))
    with time_machine.travel(MOMENT, tick=False) as clock:
        assert not (await recording(cluster.one, key, "i", {"tokens": 10})).repeated
        clock.shift(86_399)
        assert (await recording(cluster.one, key, "i", {"tokens": 10})).repeated
        clock.shift(2)
        made = [recording(cluster.one, key, "i", {"tokens": 10}) for _ in range(3)]
        assert [outcome.repeated for outcome in await asyncio.gather(*made)] == [False, True, True]
        assert (await recording(cluster.one, key, "i", {"tokens": 10})).repeated
    assert await cluster.used(key.id) == {"tokens": 20}


async def test_a_failed_usage_record_counts_when_it_is_retried(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))
    failing_once(cluster.one.store, "before", Unavailable("gone"))
    answers = await settled([recording(cluster.one, key, "i", {"tokens": 10}) for _ in range(3)])
    assert all(isinstance(answer, Unavailable) for answer in answers)
    assert not (await recording(cluster.one, key, "i", {"tokens": 10})).repeated
    assert await cluster.used(key.id) == {"tokens": 10}


async def test_usage_is_recorded_in_full_over_a_limit_and_the_next_call_is_denied(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))
    outcome = await cluster.one.ledger.admit(subjects_of(key), {"tokens": 250}, force=True)
    assert outcome.statuses[0].used == 250
    assert not (await cluster.one.ledger.admit(subjects_of(key), {"tokens": 1})).allowed
    assert await cluster.used(key.id) == {"tokens": 250}


@pytest.mark.parametrize("window", [Rolling(seconds=60), Anchored(seconds=60), Calendar(unit="month"), Total()])
async def test_no_amount_recorded_makes_a_key_unusable(cluster: Cluster, window: Any) -> None:
    key = await cluster.key(Limit(resource="cost", limit=5, window=window), rolling("requests", 100))
    for _ in range(25):
        await cluster.one.ledger.admit(subjects_of(key), {"cost": 10**18, "requests": 1}, force=True)
    outcome = await cluster.one.ledger.admit(subjects_of(key), {"requests": 1})
    assert not outcome.allowed
    assert await cluster.used(key.id) == {"cost": 2**63 - 1, "requests": 25}


# --- Callers that go away, and too many of them ---------------------------------------------------------------


async def test_a_caller_cancelled_before_the_decision_is_not_charged(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))
    waiting = [asyncio.ensure_future(cluster.one.ledger.admit(subjects_of(key), {"tokens": 10})) for _ in range(4)]
    waiting[0].cancel()
    waiting[2].cancel()
    answers = await settled(waiting)
    assert admitted(answers) == 2
    assert await cluster.used(key.id) == {"tokens": 20}


async def test_a_caller_cancelled_during_the_commit_delays_no_other(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))
    gate = cluster.one.store.gate = asyncio.Event()
    before = len(cluster.one.store.batches)
    first = cluster.one.ledger.admit(subjects_of(key), {"tokens": 10})
    await wait_until(lambda: len(cluster.one.store.batches) > before)
    first.cancel()
    second = cluster.one.ledger.admit(subjects_of(key), {"tokens": 10})
    gate.set()
    assert (await second).statuses[0].used == 20
    assert await cluster.used(key.id) == {"tokens": 20}


async def test_usage_is_recorded_even_if_its_caller_is_cancelled(cluster: Cluster) -> None:
    key = await cluster.key(rolling("tokens", 100))
    recording(cluster.one, key, "i", {"tokens": 10}).cancel()
    cluster.one.ledger.admit(subjects_of(key), {"tokens": 5}, force=True).cancel()
    await cluster.one.ledger.close()
    assert await cluster.used(key.id) == {"tokens": 15}


async def test_admissions_over_the_queue_bound_are_refused_and_the_others_served(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "MAX_WAITING", 10)
    key = await cluster.key(rolling("tokens", 100))
    futures = [cluster.one.ledger.admit(subjects_of(key), {"tokens": 1}) for _ in range(15)]
    answers = await settled(futures)
    assert [type(answer) for answer in answers] == [AdmissionDecision] * 10 + [TooManyRequests] * 5
    assert (await cluster.one.ledger.admit(subjects_of(key), {"tokens": 1})).allowed
    assert await cluster.used(key.id) == {"tokens": 11}


async def test_the_memory_for_usage_states_is_bounded(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MAX_USAGE_STATES", 10)
    keys = [await cluster.key(rolling("tokens", 2)) for _ in range(35)]
    for _ in range(3):
        for key in keys:
            await cluster.one.ledger.admit(subjects_of(key), {"tokens": 1})
            assert len(cluster.one.ledger.states.known) <= 11
    assert [await cluster.used(key.id) for key in keys] == [{"tokens": 2}] * 35


# --- Tallies: keys without limits -----------------------------------------------------------------------------


async def test_aggregated_usage_is_written_within_its_bound_many_keys_at_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "AGGREGATE_FOR_S", 0.05)
    key = await cluster.key()
    before = len(cluster.one.store.batches)
    for _ in range(1_000):
        cluster.one.ledger.aggregate(subjects_of(key), {"requests": 1, "tokens": 2})
    assert (await cluster.one.ledger.usage_state(key.id)).totals == {"requests": 1_000, "tokens": 2_000}
    assert len(cluster.one.store.batches) == before

    async def written() -> bool:
        return await cluster.used(key.id) == {"requests": 1_000, "tokens": 2_000}

    await wait_until(written)
    assert len(cluster.one.store.batches) == before + 1
    state = await cluster.one.ledger.usage_state(key.id)
    assert (state.count, state.totals) == (1_000, {"requests": 1_000, "tokens": 2_000})


@pytest.mark.parametrize("fails", [False, True])
async def test_statistics_include_aggregated_usage_during_its_write(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(tuning, "AGGREGATE_FOR_S", 0.01)
    monkeypatch.setattr(tuning, "SHOWN_WITHOUT_S", 2 * PATIENCE_S)
    key, node = await cluster.key(), cluster.one
    node.store.gate = asyncio.Event()
    batches = len(node.store.batches)
    for _ in range(5):
        node.ledger.aggregate(subjects_of(key), {"requests": 1})
    await wait_until(lambda: len(node.store.batches) > batches)  # it is on its way, and nobody knows how far
    shown = asyncio.create_task(node.ledger.usage_state(key.id))
    await asyncio.sleep(0)
    if fails:
        failing_once(node.store, "before", Unavailable("gone"))
    node.store.gate.set()
    assert (await asyncio.wait_for(shown, PATIENCE_S)).totals == {"requests": 5}
    await wait_until(lambda: node.ledger.aggregation.settled)


async def test_aggregated_usage_is_written_on_close(cluster: Cluster) -> None:
    keys = [await cluster.key() for _ in range(20)]
    for key in keys:
        cluster.one.ledger.aggregate(subjects_of(key), {"requests": 1})
    await cluster.one.ledger.close()
    assert [await cluster.used(key.id) for key in keys] == [{"requests": 1}] * 20


async def test_aggregated_usage_survives_a_failed_write_and_a_changed_key(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "AGGREGATE_FOR_S", 0.01)
    key = await cluster.key()
    await cluster.one.database.update(SYSTEM, ApiKey, key.id, {"name": "another"})
    failing_once(cluster.one.store, "before", Unavailable("gone"))
    before = len(cluster.one.store.batches)
    cluster.one.ledger.aggregate(subjects_of(key), {"requests": 3})

    async def written() -> bool:
        return await cluster.used(key.id) == {"requests": 3}

    await wait_until(written)
    assert len(cluster.one.store.batches) == before + 3  # failed, an old key, done


def written(node: Node) -> bool:
    return node.ledger.aggregation.settled


@pytest.mark.parametrize("when", ["before", "after"])
async def test_aggregated_usage_whose_answer_was_lost_counts_once(cluster: Cluster, when: str) -> None:
    key, node = await cluster.key(), cluster.one
    failing_once(node.store, when, Unavailable("the answer was lost"))
    node.ledger.aggregate(subjects_of(key), {"requests": 1, "tokens": 7})
    node.ledger.aggregation.flush()
    await node.ledger.settled()
    assert not node.ledger.aggregation.idle
    node.ledger.aggregate(subjects_of(key), {"requests": 1, "tokens": 2})  # another one, meanwhile
    shown = await node.ledger.usage_state(key.id)
    assert (shown.count, shown.totals) == (2, {"requests": 2, "tokens": 9})
    for _ in range(2):  # the first one writes what is unsure, which the other one waits for
        node.ledger.aggregation.flush()
        await node.ledger.settled()
    assert written(node)
    state = await stored_usage(node.store, key.id)
    assert (state.count, state.totals) == (2, {"requests": 2, "tokens": 9})


@pytest.mark.parametrize("when", ["before", "after"])
async def test_aggregated_usage_whose_answer_is_lost_on_close_is_written_once(
    when: Literal["before", "after"], tmp_path: Path
) -> None:
    async with cluster_of("sqlite", tmp_path, 1) as cluster:
        key, node = await cluster.key(), cluster.one
        failing_once(node.store, when, Conflict("another node's"))
        node.ledger.aggregate(subjects_of(key), {"requests": 1})
        await node.ledger.close()
        assert (await stored_usage(node.store, key.id)).count == 1


async def test_aggregated_usage_of_several_nodes_counts_once_through_lost_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "AGGREGATE_FOR_S", 0.005)
    async with cluster_of("json-memory", tmp_path, 3) as cluster:
        key, dice = await cluster.key(), random.Random(7)

        def sometimes(number: int, batch: Batch) -> Fault | None:
            return Fault(dice.choice(("before", "after")), Unavailable("lost")) if dice.random() < 0.4 else None

        for node in cluster.nodes:
            node.store.fault = sometimes
        for _ in range(30):
            for node in cluster.nodes:
                node.ledger.aggregate(subjects_of(key), {"requests": 1})
            await asyncio.sleep(0.002)
        for node in cluster.nodes:
            node.store.fault = lambda number, batch: None
            await wait_until(functools.partial(written, node))
        state = await stored_usage(cluster.one.store, key.id)
        assert (state.count, state.totals) == (90, {"requests": 90})
        assert len(state.aggregated) == 3


async def test_a_usage_state_remembers_a_bounded_number_of_aggregating_processes() -> None:
    state = usage.UsageState()
    for number in range(200):
        assert add_once(state, AggregatedUse(f"writer {number}", 1), {}, 1, 1)
        assert not add_once(state, AggregatedUse(f"writer {number}", 1), {}, 1, 1)
    assert (state.count, len(state.aggregated)) == (200, MAX_WRITERS)


async def test_aggregated_usage_of_a_deleted_key_is_dropped(cluster: Cluster) -> None:
    key = await cluster.key()
    cluster.one.ledger.aggregate(subjects_of(key), {"requests": 3})
    await cluster.one.database.delete(SYSTEM, ApiKey, key.id)
    await cluster.one.ledger.close()
    assert await cluster.used(key.id) == {}


async def test_aggregated_usage_and_admissions_of_one_key_are_all_counted(cluster: Cluster) -> None:
    key = await cluster.key()
    limited = await cluster.one.database.update(SYSTEM, ApiKey, key.id, {"limits": [rolling("requests", 5)]})
    for _ in range(7):
        cluster.one.ledger.aggregate(subjects_of(key), {"requests": 1})
    outcomes = await asyncio.gather(
        *(cluster.one.ledger.admit(subjects_of(limited), {"requests": 1}) for _ in range(9))
    )
    await cluster.one.ledger.close()
    assert admitted(outcomes) == 5
    assert await cluster.used(key.id) == {"requests": 12}


async def test_a_failed_read_of_a_changed_key_loses_no_usage(cluster: Cluster) -> None:
    node = cluster.one
    aggregated, charged = await cluster.key(), await cluster.key(rolling("tokens", 100))
    await node.ledger.admit(subjects_of(charged), {"tokens": 1})
    old = subjects_of(aggregated)
    await node.database.update(SYSTEM, ApiKey, aggregated.id, {"name": "another"})
    node.ledger.aggregate(old, {"requests": 3})
    failures = 1

    async def fail(method: str, collection: str) -> None:
        nonlocal failures
        if collection == "api_keys" and failures:
            failures -= 1
            raise Unavailable("cannot be read")

    node.store.before_read = fail
    charge = node.ledger.admit(subjects_of(charged), {"tokens": 10})
    await node.ledger.close()
    assert not failures
    assert (await charge).allowed
    assert await cluster.used(charged.id) == {"tokens": 11}
    await memory_is_the_stores(node, charged.id)
    node.store.before_read = None
    await node.ledger.close()
    assert await cluster.used(aggregated.id) == {"requests": 3}


async def test_closing_ends_even_if_the_store_fails(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "AGGREGATE_FOR_S", 0.01)
    key = await cluster.key()
    cluster.one.store.fault = lambda number, batch: Fault("before", Unavailable("gone"))
    cluster.one.ledger.aggregate(subjects_of(key), {"requests": 1})
    await asyncio.wait_for(cluster.one.ledger.close(), PATIENCE_S)
    assert cluster.one.ledger.aggregation._timer is None
    with pytest.raises(Unavailable, match="closed"):
        await cluster.one.ledger.admit(subjects_of(key), {"requests": 1})
    assert cluster.one.ledger.aggregation._timer is None
    cluster.one.store.fault = lambda number, batch: None
    await cluster.one.ledger.close()  # nothing was thrown away: a second closing writes it
    assert await cluster.used(key.id) == {"requests": 1}


# --- Accounts that are forgotten while a round is decided -------------------------------------------------------


async def test_evicting_a_usage_state_during_a_read_fails_no_admission(cluster: Cluster) -> None:
    node = cluster.one
    known, unknown = await cluster.key(rolling("tokens", 100)), await cluster.key(rolling("tokens", 100))
    assert (await node.ledger.admit(subjects_of(known), {"tokens": 10})).allowed
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def hold_back(method: str, collection: str) -> None:
        reading.set()
        await go_on.wait()

    node.store.before_read = hold_back
    charges = [node.ledger.admit(subjects_of(key), {"tokens": 20}) for key in (known, unknown)]
    await reading.wait()
    node.ledger.forget(known.id)  # as a quota's removal, or a key's, does it
    go_on.set()
    answers = await settled(charges)
    assert admitted(answers) == 2, answers
    assert [await cluster.used(key.id) for key in (known, unknown)] == [{"tokens": 30}, {"tokens": 20}]


async def test_a_read_from_before_an_eviction_decides_nothing(cluster: Cluster) -> None:
    node = cluster.one
    key = await cluster.key(rolling("tokens", 100))
    assert (await node.ledger.admit(subjects_of(key), {"tokens": 100})).allowed
    node.ledger.forget(key.id)
    reads = 0

    async def removed_meanwhile(method: str, collection: str) -> None:
        nonlocal reads
        reads += 1
        if reads == 1:  # it was read with 100 used, and is removed before the reader has it
            await node.database.delete(SYSTEM, usage.KeyUsage, key.id)
            node.ledger.forget(key.id)

    node.store.after_read = removed_meanwhile
    assert (await node.ledger.admit(subjects_of(key), {"tokens": 60})).allowed, "a denial would never read again"
    assert await cluster.used(key.id) == {"tokens": 60}
