"""The store's clock is the clock of every node: a node's own clock may be wrong, and limits still hold."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import time_machine
from hypothesis import example, given
from hypothesis import strategies as st

from strongroom import (
    Anchored,
    ApiKey,
    Calendar,
    Database,
    Limit,
    Registry,
    Rolling,
    Total,
    clock,
)
from strongroom.app import SYSTEM_ENTITIES
from strongroom.clock import DRIFT_PPM, MAX_HOLD_US, MachineClock, StoreClock, clock_of
from strongroom.context import system_context
from strongroom.errors import Unavailable
from strongroom.keys.cached_key import subjects_of
from strongroom.limits.counters import BUCKETS_PER_WINDOW
from strongroom.limits.ledger import KeyUsage, Ledger
from strongroom.storage.jsonfile.store import JsonStore
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.stores import rolling
from tests.helpers.waiting import wait_until

SYSTEM = system_context()
SECOND = 1_000_000


@dataclass
class World:
    """A store on another machine: its clock, the way there and back, and this machine's monotonic clock."""

    true_us: int = 1_800_000_000_000_000
    store_ahead_us: int = 0
    there_us: int = 100
    back_us: int = 100
    monotonic_ppm: int = 0
    """How much faster this machine's oscillator is than the store's."""
    started_us: int = field(init=False)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.started_us = self.true_us

    @property
    def store_us(self) -> int:
        return self.true_us + self.store_ahead_us

    def monotonic_ns(self) -> int:
        passed = self.true_us - self.started_us
        return 1_000 * (5 * SECOND + passed + passed * self.monotonic_ppm // SECOND)

    async def now_us(self) -> int:
        if self.error is not None:
            raise self.error
        self.true_us += self.there_us
        told = self.store_us
        self.true_us += self.back_us
        return told


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(time, "monotonic_ns", world.monotonic_ns)
    return world


def off(world: World, kept: StoreClock) -> int:
    return abs(kept.now_us() - world.store_us)


async def test_an_embedded_stores_clock_is_the_machines() -> None:
    store = JsonStore(None)
    own = clock_of(store)
    assert isinstance(own, MachineClock)
    moment = datetime(2027, 3, 4, tzinfo=UTC)
    with time_machine.travel(moment, tick=False):
        assert own.now_us() == round(moment.timestamp() * SECOND) == await store.now_us()


async def test_the_estimate_of_the_stores_clock_stays_within_its_error_bound(world: World) -> None:
    chance = random.Random(1)
    for _ in range(50):
        world.store_ahead_us = chance.randint(-(10**12), 10**12)
        world.monotonic_ppm = chance.randint(-DRIFT_PPM, DRIFT_PPM)
        kept = StoreClock(world)  # type: ignore[arg-type]
        for _ in range(30):
            world.there_us, world.back_us = chance.choice([50, 500, 20_000]), chance.choice([50, 500, 20_000])
            await kept.sample()
            world.true_us += chance.randint(0, 8 * SECOND)
            assert off(world, kept) <= kept.state().uncertainty_us + 1
        assert kept.times_set == 0, "drift and slow answers are no reason to think that the clock was set"


async def test_the_fastest_sample_of_the_clock_is_used_until_it_is_too_old(world: World) -> None:
    kept = StoreClock(world)  # type: ignore[arg-type]
    await kept.sample()
    assert kept.state().uncertainty_us == 100
    world.there_us, world.back_us = 0, 40_000  # an answer that stood in a queue: half of its way is 20 ms wrong
    await kept.sample()
    assert off(world, kept) <= 100 + 20
    assert kept.state().uncertainty_us < 200
    world.true_us += 200 * SECOND  # at DRIFT_PPM the quick one may be off by 40 ms by now
    await kept.sample()
    assert 20_000 <= kept.state().uncertainty_us <= 20_001


async def test_a_jump_of_a_nodes_wall_clock_does_not_change_the_stores_time() -> None:
    store = FaultyStore(JsonStore(None))
    kept = StoreClock(store)
    await kept.sample()
    before = kept.now_us()
    for jump in (timedelta(days=400), timedelta(days=-400), timedelta(0)):
        with time_machine.travel(datetime.now(UTC) + jump, tick=True):
            assert 0 <= kept.now_us() - before < 60 * SECOND
    assert abs(kept.now_us() - time.time_ns() // 1_000) < SECOND


async def test_a_correction_never_turns_the_clock_back(world: World) -> None:
    kept = StoreClock(world)  # type: ignore[arg-type]
    world.there_us, world.back_us = 100_000, 0
    await kept.sample()  # 50 ms fast
    last = kept.now_us()
    world.there_us = world.back_us = 10
    world.true_us += 1_000
    await kept.sample()
    assert kept.now_us() == last, "it stands still"
    world.true_us += 200_000
    assert off(world, kept) <= 100


async def test_the_clock_follows_a_stores_clock_that_was_set_in_either_direction(world: World) -> None:
    kept = StoreClock(world)  # type: ignore[arg-type]
    await kept.sample()
    for number, jump_s in enumerate((3_600, -7_200, 5), 1):
        world.store_ahead_us += jump_s * SECOND
        world.true_us += 4 * SECOND
        await kept.sample()
        assert off(world, kept) <= 1_000
        assert kept.times_set == number


async def test_the_clock_continues_while_the_store_is_unavailable(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "SAMPLE_EVERY_S", 0.001)
    kept = StoreClock(world)  # type: ignore[arg-type]
    await kept.start()
    world.error = Unavailable("gone")
    world.true_us += 61 * SECOND
    assert off(world, kept) <= kept.state().uncertainty_us
    assert kept.state().degraded
    assert kept.state().age_s >= 61
    world.error = None
    await wait_until(lambda: not kept.state().degraded)
    await kept.close()
    await kept.close()


async def test_the_clock_does_not_wait_for_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SAMPLE_TIMEOUT_S", 0.01)
    store: Any = FaultyStore(JsonStore(None))

    async def now_us() -> int:
        await asyncio.Event().wait()
        return 0

    store.now_us = now_us
    with pytest.raises(Unavailable, match="did not answer"):
        await StoreClock(store).start()


async def test_a_store_that_answers_its_first_question_late_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SAMPLE_TIMEOUT_S", 0.05)
    store: Any = FaultyStore(JsonStore(None))
    asked = 0

    async def now_us() -> int:
        nonlocal asked
        asked += 1
        if asked < clock.START_ATTEMPTS:
            await asyncio.Event().wait()
        return 1_000_000

    store.now_us = now_us
    started = StoreClock(store)
    await started.start()
    assert started.now_us() >= 1_000_000
    await started.close()


def test_the_machines_clock_waits_out_a_small_step_back_and_follows_a_large_one() -> None:
    own = MachineClock()
    moment = datetime(2027, 3, 4, tzinfo=UTC)
    with time_machine.travel(moment, tick=False) as traveller:
        start = own.now_us()
        traveller.shift(-timedelta(microseconds=MAX_HOLD_US))
        assert own.now_us() == start
        traveller.shift(-timedelta(microseconds=1))
        assert own.now_us() == start - MAX_HOLD_US - 1


# --- Many nodes with clocks of their own ----------------------------------------------------------------------


class SkewedClock:
    """A node's clock: the true time, and what is wrong with it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.ahead_us = 0

    def now_us(self) -> int:
        return self._cluster.true_us + self.ahead_us


class Cluster:
    """Ledgers of several nodes, with skewed clocks, on one store."""

    def __init__(self) -> None:
        self.true_us = 1_800_000_000_000_000
        self.stores: list[FaultyStore] = []
        self.clocks: list[SkewedClock] = []
        self.ledgers: list[Ledger] = []

    @asynccontextmanager
    async def opened(self, nodes: int) -> AsyncIterator[Database]:
        inner = JsonStore(None)
        await inner.open()
        registry = Registry(SYSTEM_ENTITIES)
        await inner.prepare(registry.collections)
        database = Database(inner, registry)
        for _ in range(nodes):
            store = FaultyStore(inner, shared=True)
            own = SkewedClock(self)
            self.clocks.append(own)
            self.ledgers.append(Ledger(Database(store, registry), store, own))
        try:
            yield database
        finally:
            for ledger in self.ledgers:
                await ledger.close()
            await inner.close()


WINDOWS = [
    Rolling(seconds=60), Rolling(seconds=3), Anchored(seconds=60), Calendar(unit="minute"), Total(),
]  # fmt: skip
STEP = st.tuples(
    st.integers(0, 2),  # the node
    st.sampled_from([0, 1, 200_000, SECOND, 7 * SECOND, 61 * SECOND]),  # the time that passes before
    st.sampled_from([0, -5_000, 5_000, -30 * SECOND, 30 * SECOND]),  # what is wrong with the node's clock by then
    st.integers(1, 4),  # units
    st.integers(1, 3),  # charges at once
)


def over(limit: Limit, admitted: list[tuple[int, int]]) -> int:
    """The most that any window holds, of charges as (moment, units): by brute force from the windows' definition."""
    window = limit.window
    most = 0
    for end, _ in admitted:
        if isinstance(window, Rolling):
            inside = [units for moment, units in admitted if end - window.seconds * SECOND < moment <= end]
        elif isinstance(window, Calendar):
            inside = [units for moment, units in admitted if moment // (60 * SECOND) == end // (60 * SECOND)]
        elif isinstance(window, Total):
            inside = [units for _, units in admitted]
        else:
            inside = _anchored(admitted, end, window.seconds * SECOND)
        most = max(most, sum(inside))
    return most


def _anchored(admitted: list[tuple[int, int]], moment: int, length: int) -> list[int]:
    """The units of the anchored window that `moment` lies in: windows begin with the first use after the last one."""
    start: int | None = None
    inside: list[int] = []
    for at, units in admitted:
        if start is None or at >= start + length:
            if start is not None and start <= moment < start + length:
                return inside
            start, inside = at, []
        inside.append(units)
    return inside


NINE_AND_THEN_ONE_LATER = [*[(0, 0, 0, 1, 1)] * 4, (0, 0, 30 * SECOND, 1, 1), *[(0, 0, 0, 1, 1)] * 2]


@given(window=st.sampled_from(WINDOWS), steps=st.lists(STEP, min_size=5, max_size=30))
@example(  # a node denies while its clock is ahead; its clock is mended, and then it decides on the same state
    window=Rolling(seconds=60),
    steps=[*NINE_AND_THEN_ONE_LATER, (0, 61 * SECOND, 0, 3, 3), (0, 0, 30 * SECOND, 2, 1), (0, 0, 0, 1, 1)],
)
async def test_nodes_with_any_clocks_never_exceed_a_limit_in_any_window(
    window: Any, steps: list[tuple[int, int, int, int, int]]
) -> None:
    limit = Limit(resource="requests", limit=10, window=window)
    cluster = Cluster()
    async with cluster.opened(3) as database:
        key = await database.create(SYSTEM, ApiKey(id="k", tenant="t", name="n", hash="h", display="d", limits=[limit]))
        admitted: list[tuple[int, int]] = []
        for node, passes, ahead_us, units, count in steps:
            cluster.true_us += passes
            cluster.clocks[node].ahead_us = ahead_us
            others = cluster.ledgers[(node + 1) % 3]
            charges = [cluster.ledgers[node].admit(subjects_of(key), {"requests": units}) for _ in range(count)]
            charges.append(others.admit(subjects_of(key), {"requests": 1}))
            outcomes = await asyncio.gather(*charges)
            costs = [*[units] * count, 1]
            done = sorted((o.now_us, n) for n, o in enumerate(outcomes) if o.allowed)
            if admitted and done:
                assert done[0][0] >= admitted[-1][0], "along the versions of a usage document time never goes back"
            admitted += [(moment, costs[number]) for moment, number in done]
        assert over(limit, admitted) <= 10


async def test_a_node_with_a_slow_clock_does_not_free_usage_of_another() -> None:
    cluster = Cluster()
    async with cluster.opened(2) as database:
        key = await database.create(
            SYSTEM,
            ApiKey(id="k", tenant="t", name="n", hash="h", display="d", limits=[rolling("requests", 5, 60)]),
        )
        ahead, behind = cluster.ledgers
        for _ in range(5):
            assert (await ahead.admit(subjects_of(key), {"requests": 1})).allowed
        cluster.clocks[1].ahead_us = -50 * SECOND
        assert not (await behind.admit(subjects_of(key), {"requests": 1})).allowed
        cluster.true_us += 61 * SECOND
        assert not (await behind.admit(subjects_of(key), {"requests": 1})).allowed, "by its own clock it is too early"
        outcome = await ahead.admit(subjects_of(key), {"requests": 1})
        assert outcome.allowed
        late = await behind.admit(subjects_of(key), {"requests": 1}, force=True)
        assert late.statuses[0].used == 2
        assert late.now_us == outcome.now_us, "what was decided already is not before now"


async def test_a_denial_while_the_clock_is_ahead_frees_nothing_once_the_clock_is_mended() -> None:
    cluster = Cluster()
    async with cluster.opened(1) as database:
        (ledger,), limit = cluster.ledgers, rolling("requests", 5, 60)
        key = await database.create(SYSTEM, ApiKey(id="k", tenant="t", name="n", hash="h", display="d", limits=[limit]))
        assert (await ledger.admit(subjects_of(key), {"requests": 5})).allowed
        cluster.clocks[0].ahead_us = 90 * SECOND
        assert not (await ledger.admit(subjects_of(key), {"requests": 6})).allowed
        cluster.clocks[0].ahead_us = 0
        assert not (await ledger.admit(subjects_of(key), {"requests": 1})).allowed


async def test_an_import_with_usage_in_the_future_does_not_advance_the_keys_clock() -> None:
    cluster = Cluster()
    async with cluster.opened(1) as database:
        key = await database.create(
            SYSTEM, ApiKey(id="k", tenant="t", name="n", hash="h", display="d", limits=[rolling("requests", 1, 60)])
        )
        await database.create(SYSTEM, KeyUsage(id="k", last_used_at=datetime(2199, 1, 1, tzinfo=UTC)))
        assert (await cluster.ledgers[0].admit(subjects_of(key), {"requests": 1})).allowed
        cluster.true_us += 60 * SECOND + 60 * SECOND // BUCKETS_PER_WINDOW
        assert (await cluster.ledgers[0].admit(subjects_of(key), {"requests": 1})).allowed
