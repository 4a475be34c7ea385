"""Limit leases, promise by promise: crashes, lost answers, lost connections, key changes, window ends, statistics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from strongroom import Anchored, Calendar, Limit, Refill, Rolling, Total
from strongroom.errors import Conflict, Unavailable
from strongroom.limits import tuning
from strongroom.limits.lease import KEPT_AFTER_US, MAX_ENDED
from strongroom.limits.lease_manager import LEASE_S, LOOK_FOR_DEAD_EVERY, RENEW_EVERY_S
from tests.helpers.faulty_store import Fault
from tests.helpers.lease_cluster import Cluster, Node
from tests.helpers.waiting import PATIENCE_S, wait_until

SECOND = 1_000_000
WINDOW_S = 60
ONE = {"tokens": 1}
TEN = {"tokens": 10}
LOST = Unavailable("lost", outcome="unknown")
Make = Callable[..., Awaitable[Cluster]]


def tokens(limit: int = 1_000, window: object = None, **more: object) -> Limit:
    return Limit(resource="tokens", limit=limit, window=window or Rolling(seconds=WINDOW_S), **more)  # type: ignore[arg-type]


@pytest.fixture
async def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Makes a cluster of two nodes, whose keys have these limits."""
    monkeypatch.setattr(tuning, "REREAD_AFTER_S", 0.0)  # the cluster's time is not the machine's
    async with AsyncExitStack() as stack:

        async def made(*limits: Limit, quota: tuple[Limit, ...] = (), keys: int = 1) -> Cluster:
            cluster = Cluster(tmp_path / "leases", limits or (tokens(),), quota, keys)
            await cluster.open()
            stack.push_async_callback(cluster.close)
            cluster.add()
            cluster.add()
            return cluster

        yield made


async def lent(cluster: Cluster, node: Node, cost: dict[str, int] | None = None, key: int = 0) -> None:
    """Have a key's limits leased, with one call."""
    assert await cluster.verify(node, key, cost if cost is not None else TEN)
    leases = [node.lease_manager.usage_lease(subject.id) for subject in cluster.subjects[key].all]
    assert all(
        leased_limit.cap > leased_limit.spent
        for usage_lease in leases
        if usage_lease is not None
        for leased_limit in usage_lease.leased_limits.values()
    )
    assert any(usage_lease is not None for usage_lease in leases)


async def standing(cluster: Cluster, key: int = 0, number: int = 0) -> tuple[int, int, int]:
    state = await cluster.usage_state(cluster.subjects[key].id)
    return state.standing(cluster.subjects[key].compiled_limits[number], cluster.world.now_us)


def stays(cluster: Cluster, seconds: float) -> None:
    cluster.world.now_us += round(seconds * SECOND)


# --- Crashes ----------------------------------------------------------------------------------------------------


async def test_a_crash_without_a_log_admits_no_more_than_the_limit(make: Make) -> None:
    cluster = await make()
    one, two = cluster.nodes
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE)
    assert spent > 100
    await cluster.kill(one, log=False)
    for wait_s in (0, LEASE_S, WINDOW_S - LEASE_S - 1):  # also when the lease has ended: it counts as spent at its end
        stays(cluster, wait_s)
        spent += await cluster.fill(two, ONE)
        assert spent <= 1_000
    assert spent == 1_000  # all of it was spent, and what of it was lent counts


async def test_an_expired_lease_counts_as_used_for_one_window(make: Make) -> None:
    cluster = await make()
    one, two = cluster.nodes
    await lent(cluster, one)
    leased = (await standing(cluster))[2]
    await cluster.kill(one, log=False)
    stays(cluster, LEASE_S + WINDOW_S - 0.001)
    await cluster.verify(two, 0, ONE)
    assert (await standing(cluster))[2] >= leased
    stays(cluster, 2 * WINDOW_S / 300 + 0.002)
    ledger = two.ledger
    assert (await ledger.admit(cluster.subjects[0], {"tokens": 999})).allowed


async def test_after_a_crash_the_lease_log_returns_every_unspent_unit(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=37)
    await cluster.kill(one)
    await two.lease_manager.reconcile_dead()
    assert await standing(cluster) == (spent, 0, 0)
    state = await cluster.usage_state(cluster.subjects[0].id)
    assert state.totals == {"tokens": spent}
    assert (await two.ledger.admit(cluster.subjects[0], {"tokens": 1_000 - spent})).allowed
    assert [path.name for path in cluster.folder.iterdir() if one.lease_manager.log.lease in path.name] == []


async def test_usage_of_a_dead_process_is_counted_once(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    spent = 10
    for _ in range(3):
        spent += cluster.spend(one, ONE, most=20)
        await cluster.tick(one)
    spent += cluster.spend(one, ONE, most=5)
    await cluster.kill(one)
    await two.lease_manager.reconcile_dead()
    assert await standing(cluster) == (spent, 0, 0)


@pytest.mark.parametrize("lands", [True, False])
async def test_a_process_killed_during_a_renewal_is_reconciled(make: Make, lands: bool) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=30)
    one.lose_next(Fault("after" if lands else "before", LOST))
    await cluster.tick(one)
    spent += cluster.spend(one, ONE, most=30)
    await cluster.kill(one)
    await two.lease_manager.reconcile_dead()
    assert await standing(cluster) == (spent, 0, 0)


async def test_a_lease_log_found_by_two_nodes_is_reconciled_once(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    three = cluster.add()
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=30)
    await cluster.kill(one)
    await asyncio.gather(two.lease_manager.reconcile_dead(), three.lease_manager.reconcile_dead())
    assert await standing(cluster) == (spent, 0, 0)


async def test_a_lease_log_that_cannot_be_reconciled_yet_is_kept(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=30)
    await cluster.kill(one)
    two.lose_next(Fault("before", LOST))
    await two.lease_manager.reconcile_dead()
    assert (await standing(cluster))[2] > 0
    await two.lease_manager.reconcile_dead()
    assert await standing(cluster) == (spent, 0, 0)


async def test_a_graceful_stop_returns_its_leases_at_once(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=37)
    await cluster.stop(one)
    assert await standing(cluster) == (spent, 0, 0)
    assert (await two.ledger.admit(cluster.subjects[0], {"tokens": 1_000 - spent})).allowed
    state = await cluster.usage_state(cluster.subjects[0].id)
    assert (state.count, state.totals["tokens"]) == (39, 1_000)


# --- Commits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("when", "error"), [("before", LOST), ("before", Conflict("faster")), ("after", LOST)])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_lost_answer_neither_doubles_nor_loses_usage(
    make: Make, when: str, times: int, error: Exception
) -> None:
    cluster = await make(tokens(window=Total()))
    one, _ = cluster.nodes
    await lent(cluster, one)
    spent, uses = 10, 1
    for _ in range(times):
        more = cluster.spend(one, ONE, most=11)
        spent, uses = spent + more, uses + more
        one.lose_next(Fault(when, error))  # type: ignore[arg-type]
        await cluster.tick(one)
    await cluster.stop(one)
    assert await standing(cluster) == (spent, 0, 0)
    state = await cluster.usage_state(cluster.subjects[0].id)
    assert (state.count, state.totals) == (uses, {"tokens": spent})


async def test_a_lost_answer_to_the_last_commit_of_a_stop_neither_doubles_nor_loses_usage(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, _ = cluster.nodes
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=11)
    one.lose_next(Fault("after", LOST))
    await cluster.stop(one)
    state = await cluster.usage_state(cluster.subjects[0].id)
    assert (state.count, state.totals, state.leases) == (12, {"tokens": spent}, {})


async def test_during_a_renewal_no_more_is_spent_than_either_lease_allows(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=10)
    spent += await cluster.fill(two, ONE)  # all that is not lent: so the renewal lends nothing any more
    one.store.gate = asyncio.Event()
    one.lease_manager.renew_leases()
    batches = len(one.store.batches)
    await wait_until(lambda: len(one.store.batches) > batches)
    spent += cluster.spend(one, ONE)
    one.store.gate.set()
    await one.ledger.settled()
    spent += await cluster.fill(two, ONE)
    assert spent <= 1_000
    spent += await cluster.fill(one, ONE)
    assert spent == 1_000


@pytest.mark.parametrize("error", [LOST, Conflict("faster"), RuntimeError("unforeseen")])
async def test_a_failed_renewal_is_retried(make: Make, error: Exception) -> None:
    cluster = await make()
    one, _ = cluster.nodes
    await lent(cluster, one)
    cluster.spend(one, ONE, most=5)
    one.lose_next(Fault("before", error))
    await cluster.tick(one)
    assert not cluster.usage_lease(one).renewing
    await cluster.tick(one)
    assert (await standing(cluster))[0] == 15


async def test_a_renewal_refused_by_a_full_ledger_is_retried(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await make()
    one, _ = cluster.nodes
    await lent(cluster, one)
    cluster.spend(one, ONE, most=5)
    with monkeypatch.context() as full:
        full.setattr(tuning, "MAX_WAITING", 0)
        one.lease_manager.renew_leases()
        await one.ledger.settled()
    assert not cluster.usage_lease(one).renewing
    await cluster.tick(one)
    assert (await standing(cluster))[0] == 15


async def test_a_renewal_whose_usage_cannot_be_read_is_retried(make: Make) -> None:
    cluster = await make()
    one, _ = cluster.nodes
    await lent(cluster, one)
    cluster.spend(one, ONE, most=5)
    one.ledger.forget(cluster.subjects[0].id)

    async def gone(method: str, collection: str) -> None:
        raise Unavailable("gone")

    one.store.before_read = gone
    await cluster.tick(one)
    assert not cluster.usage_lease(one).renewing
    one.store.before_read = None
    await cluster.tick(one)
    assert (await standing(cluster))[0] == 15


# --- How much is lent, and how long ------------------------------------------------------------------------------


async def test_leases_shrink_near_the_limit(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    leased_limits = []
    while await cluster.verify(one, 0, ONE):
        usage_lease = cluster.usage_lease(one)
        (leased_limit,) = usage_lease.leased_limits.values()
        leased_limits.append(leased_limit.cap - leased_limit.spent)
        recorded, _, leased = await standing(cluster)
        assert leased <= max(1_000 - recorded, 0) // 4 + 1  # a quarter of what was free
    assert leased_limits[-1] == 0
    assert await cluster.fill(two, ONE) == 0
    assert await standing(cluster) == (1_000, 0, 0)


async def test_when_one_limit_has_nothing_to_lease_no_limit_is_leased(make: Make) -> None:
    cluster = await make(tokens(), Limit(resource="requests", limit=3, window=Total()))
    one, _ = cluster.nodes
    assert await cluster.verify(one, 0, {"tokens": 10, "requests": 1})
    assert (await standing(cluster, number=0))[2] == 0
    assert (await standing(cluster, number=1))[2] == 0


async def test_an_idle_lease_is_returned_after_two_checks(make: Make) -> None:
    cluster = await make()
    one, two = cluster.nodes
    await lent(cluster, one)
    assert (await standing(cluster))[2] > 0
    await cluster.tick(one)  # it was used since the last look
    await cluster.tick(one)
    assert await standing(cluster) == (10, 0, 0)
    assert (one.lease_manager.leases, one.lease_manager.keys) == (0, 0)
    assert cluster.spend(one, ONE) == 0, "nothing is admitted from memory any more"
    assert (await two.ledger.admit(cluster.subjects[0], {"tokens": 990})).allowed


async def test_a_disconnected_node_spends_its_lease_until_it_expires(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    one.store.fault = lambda number, batch: Fault("before", Unavailable("cut off"))
    spent = 10
    for _ in range(4):
        spent += cluster.spend(one, ONE, most=3)
        await cluster.tick(one)
        stays(cluster, 1)
    assert spent == 22
    stays(cluster, LEASE_S - 4 + 0.001)
    assert cluster.spend(one, ONE) == 0
    assert not await cluster.verify(one, 0, ONE)
    others = await cluster.fill(two, ONE)
    assert spent + others < 1_000
    one.fault_free()
    others += await cluster.fill(one, ONE) + await cluster.fill(two, ONE)
    assert spent + others == 1_000


@pytest.mark.parametrize("cut_s", [LEASE_S + 1, LEASE_S + WINDOW_S + 2])
async def test_statistics_are_exact_after_a_node_was_disconnected(make: Make, cut_s: float) -> None:
    """Longer than its lease counts, too: others have forgotten it by then, but for what it counts its uses by."""
    cluster = await make()
    one, two = cluster.nodes
    await lent(cluster, one)
    one.store.fault = lambda number, batch: Fault("before", Unavailable("cut off"))
    spent = 10 + cluster.spend(one, ONE, most=30)
    await cluster.tick(one)
    stays(cluster, cut_s)
    assert await cluster.verify(two, 0, ONE)
    one.fault_free()
    await cluster.tick(one)
    state = await cluster.usage_state(cluster.subjects[0].id)
    assert (state.count, state.totals["tokens"]) == (32, spent + 1)


async def test_expired_leases_do_not_accumulate(make: Make) -> None:
    cluster = await make(tokens(limit=100_000))
    two = cluster.nodes[1]
    for _ in range(MAX_ENDED + 8):
        node = cluster.add()
        await lent(cluster, node)
        await cluster.kill(node, log=False)
    stays(cluster, LEASE_S + WINDOW_S + 1)
    await cluster.verify(two, 0, ONE)
    assert len((await cluster.usage_state(cluster.subjects[0].id)).leases) <= MAX_ENDED + 1
    stays(cluster, KEPT_AFTER_US / SECOND)
    await cluster.verify(two, 0, ONE)
    assert len((await cluster.usage_state(cluster.subjects[0].id)).leases) <= 1


# --- Clocks and windows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [Anchored(seconds=WINDOW_S), Calendar(unit="minute")])
async def test_leases_end_with_their_window(make: Make, window: object) -> None:
    cluster = await make(tokens(window=window))
    one, two = cluster.nodes
    stays(cluster, 60 - cluster.world.now_us / SECOND % 60)  # a minute begins
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=20)
    for _ in range(14):
        stays(cluster, 4)
        spent += cluster.spend(one, ONE, most=1)
        await cluster.tick(one)
    stays(cluster, 3.999)
    spent += cluster.spend(one, ONE, most=1)
    assert (await standing(cluster))[2] > 0
    stays(cluster, 0.001)
    assert cluster.spend(one, ONE) == 0, "spent from a lease of the last window"
    assert await standing(cluster) == (0, 0, 0)
    assert (await two.ledger.admit(cluster.subjects[0], {"tokens": 1_000})).allowed
    await cluster.tick(one)
    assert (await standing(cluster))[0] == 1_000  # what was spent in the last window is none of this one's
    assert (await cluster.usage_state(cluster.subjects[0].id)).totals["tokens"] == spent + 1_000


async def test_leased_usage_leaves_a_rolling_window_by_its_time_of_use(
    make: Make,
) -> None:
    cluster = await make()
    one, two = cluster.nodes
    await lent(cluster, one, {"tokens": 20})
    stays(cluster, 3)
    spent = cluster.spend(one, ONE, most=50)
    stays(cluster, 1.5)
    for _ in range(3):
        await cluster.tick(one)
    stays(cluster, WINDOW_S - 1.5 - 0.001)
    assert (await standing(cluster))[0] == spent
    stays(cluster, WINDOW_S / 300 + 0.001)
    assert await standing(cluster) == (0, 0, 0)
    assert (await two.ledger.admit(cluster.subjects[0], {"tokens": 1_000})).allowed


async def test_a_total_with_a_refill_is_leased_and_returned(make: Make) -> None:
    cluster = await make(tokens(limit=100, window=Total(refill=Refill(amount=40, seconds=60))))
    one, two = cluster.nodes
    stays(cluster, 60 - cluster.world.now_us / SECOND % 60)
    spent = await cluster.fill(one, ONE) + await cluster.fill(two, ONE)
    assert spent == 100
    stays(cluster, 60)
    assert await cluster.fill(one, ONE) + await cluster.fill(two, ONE) == 40


async def test_nodes_with_different_clocks_never_exceed_a_leased_limit(make: Make) -> None:
    cluster = await make()
    ahead, behind = cluster.nodes
    ahead.clock.offset_us, behind.clock.offset_us = 400_000, -400_000
    admitted: list[tuple[int, int]] = []
    for _ in range(40):
        for node in (ahead, behind):
            if await cluster.verify(node, 0, TEN):
                admitted += [(cluster.world.now_us, 10), (cluster.world.now_us, cluster.spend(node, ONE, most=20))]
            await cluster.tick(node)
        stays(cluster, 3)
    width = WINDOW_S * SECOND - 800_000
    assert max(sum(n for at, n in admitted if start <= at < start + width) for start, _ in admitted) <= 1_000
    assert sum(units for _, units in admitted) > 1_000


async def test_a_clock_behind_the_lease_spends_at_the_time_of_the_grant(make: Make) -> None:
    """A moment before the grant could be in a window that others have counted already."""
    cluster = await make()
    one, two = cluster.nodes
    assert await cluster.verify(two, 0, ONE)
    one.clock.offset_us = -30 * SECOND
    await lent(cluster, one)
    cluster.spend(one, ONE, most=20)
    await cluster.tick(one)
    stays(cluster, WINDOW_S - 1)
    assert (await standing(cluster))[0] == 31


# --- Answers and statistics ---------------------------------------------------------------------------------------


async def test_a_denial_caused_by_leases_of_other_nodes_says_so_and_when_to_retry(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    denied = await two.ledger.admit(cluster.subjects[0], {"tokens": 990})
    (status,) = denied.statuses
    assert not denied.allowed
    assert status.exceeded
    assert status.leased > 0
    assert status.used == status.recorded + status.reserved + status.leased
    assert status.frees_at_us == cluster.world.now_us + round(LEASE_S * SECOND)


async def test_a_denial_caused_by_an_expired_lease_says_when_it_stops_counting(make: Make) -> None:
    cluster = await make()
    one, two = cluster.nodes
    await lent(cluster, one)
    await cluster.kill(one, log=False)
    stays(cluster, LEASE_S + 1)
    denied = await two.ledger.admit(cluster.subjects[0], {"tokens": 1_000})
    (status,) = denied.statuses
    assert status.frees_at_us is not None
    assert status.frees_at_us > cluster.world.now_us + (WINDOW_S - 2) * SECOND
    cluster.world.now_us = status.frees_at_us
    assert (await two.ledger.admit(cluster.subjects[0], {"tokens": 1_000})).allowed


async def test_statistics_include_unrecorded_leased_usage(make: Make) -> None:
    cluster = await make(tokens(), Limit(resource="requests", limit=500, window=Total()))
    one, two = cluster.nodes
    subjects = cluster.subjects[0]
    both = {"tokens": 3, "requests": 1}
    assert await cluster.verify(one, 0, both)
    stays(cluster, 1)
    spent = 1 + cluster.spend(one, both, most=7)
    state = await one.ledger.usage_state(subjects.id)
    assert (state.count, state.totals) == (spent, {"tokens": 3 * spent, "requests": spent})
    assert state.last_used_us == cluster.world.now_us
    for node in (one, two):
        for status in await node.ledger.statuses(subjects, cluster.world.now_us):
            assert status.used == status.recorded + status.reserved + status.leased
    mine = await one.ledger.statuses(subjects, cluster.world.now_us)
    assert [status.recorded for status in mine] == [3 * spent, spent]
    assert [status.leased for status in mine] == [0, 0]


async def test_statistics_count_nothing_twice_during_a_renewal(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, _ = cluster.nodes
    subjects = cluster.subjects[0]
    await lent(cluster, one)
    cluster.spend(one, ONE, most=7)
    one.lose_next(Fault("after", LOST))
    await cluster.tick(one)
    cluster.spend(one, ONE, most=2)
    state = await one.ledger.usage_state(subjects.id)
    assert (state.count, state.totals) == (10, {"tokens": 19})
    assert (await one.ledger.statuses(subjects, cluster.world.now_us))[0].recorded == 19


async def test_usage_of_a_key_without_limits_counts_once_on_its_quota(make: Make) -> None:
    cluster = await make(tokens(), quota=(tokens(),))
    await cluster.change(0, limits=[])
    one, _ = cluster.nodes
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=20)
    await cluster.stop(one)
    for id in (cluster.subjects[0].id, cluster.quotas[0].id or ""):
        state = await cluster.usage_state(id)
        assert (state.count, state.totals) == (21, {"tokens": spent})


async def test_a_quota_is_leased_together_with_its_keys(make: Make) -> None:
    cluster = await make(tokens(), quota=(tokens(limit=1_200),), keys=2)
    one, two = cluster.nodes
    admitted = [0, 0]
    for _ in range(30):
        for key in (0, 1):
            for node in (one, two):
                if await cluster.verify(node, key, TEN):
                    admitted[key] += 10 + cluster.spend(node, ONE, key=key, most=20)
    assert max(admitted) <= 1_000
    assert sum(admitted) <= 1_200
    for node in (one, two):
        for key in (0, 1):
            admitted[key] += await cluster.fill(node, ONE, key)
    assert sum(admitted) == 1_200


# --- Scopes -----------------------------------------------------------------------------------------------------


async def test_a_leased_scoped_limit_is_spent_only_by_calls_in_its_scope(make: Make) -> None:
    cluster = await make(tokens(models=("small",)), tokens(limit=500, models=("large*",)))
    one, _ = cluster.nodes
    subjects = cluster.subjects[0]
    for model in ("small", "large-1"):
        assert (await one.ledger.admit(subjects, {"tokens": 1}, model=model)).allowed
    now_us = one.clock.now_us()
    for model, number in (("small", 0), ("large-2", 1)):  # what the one is lent does not cost the other its share
        entries = one.lease_manager.admit(subjects, ONE, now_us, model)
        assert [leased_limit.compiled_limit for leased_limit, _ in entries or ()] == [subjects.compiled_limits[number]]
    await cluster.stop(one)
    assert (await standing(cluster, number=0))[0] == 2
    assert (await standing(cluster, number=1))[0] == 2


async def test_usage_that_no_limit_covers_is_counted_without_a_lease(make: Make) -> None:
    """They need no lease; but a use that no lease stands for must not be forgotten with it."""
    cluster = await make(tokens(limit=10, models=("small",)), quota=(tokens(),))
    one, _ = cluster.nodes
    subjects = cluster.subjects[0]
    uses = 0
    assert (await one.ledger.admit(subjects, {"tokens": 10}, model="small")).allowed
    for _ in range(3):
        for _ in range(5):
            if one.lease_manager.admit(subjects, ONE, one.clock.now_us(), "other") is None:
                assert (await one.ledger.admit(subjects, ONE, model="other")).allowed
            uses += 1
        await cluster.tick(one)
    await cluster.tick(one)
    await cluster.stop(one)
    for id in (subjects.id, cluster.quotas[0].id or ""):
        state = await cluster.usage_state(id)
        assert (state.count, state.totals) == (1 + uses, {"tokens": 10 + uses})


# --- Reservations in memory -------------------------------------------------------------------------------------


async def test_a_local_reservation_cannot_be_spent_and_is_released(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    now_us = one.clock.now_us()
    held = one.lease_manager.hold(cluster.subjects[0], {"tokens": 100}, now_us, now_us + 60 * SECOND, None, None, None)
    assert held is not None
    spent = 10 + cluster.spend(one, ONE)
    for _ in range(3):  # nobody gets it, whatever is renewed
        await cluster.tick(one)
        spent += await cluster.fill(one, ONE) + await cluster.fill(two, ONE)
    assert spent == 900
    assert one.lease_manager.settle(held[0], {"tokens": 30}, one.clock.now_us())
    assert cluster.spend(one, ONE) == 70  # what the settlement left of it, from memory at once
    assert await cluster.fill(one, ONE) + await cluster.fill(two, ONE) == 0


async def test_a_local_reservation_expires_and_releases_its_hold(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    now_us = one.clock.now_us()
    held = one.lease_manager.hold(cluster.subjects[0], {"tokens": 100}, now_us, now_us + 2 * SECOND, None, None, None)
    assert held is not None
    assert one.lease_manager.settle(held[0], {"tokens": 7}, now_us, last=False)  # reported as used: it stays charged
    stays(cluster, 2)
    for _ in range(3):
        await cluster.tick(one)
    assert await standing(cluster) == (17, 0, 0)
    state = await cluster.usage_state(cluster.subjects[0].id)
    assert (state.count, state.totals) == (1, {"tokens": 17})
    assert (await two.ledger.admit(cluster.subjects[0], {"tokens": 983})).allowed


async def test_concurrency_is_taken_from_a_lease_and_returned(make: Make) -> None:
    cluster = await make(Limit(resource="concurrency", limit=40))
    one, two = cluster.nodes
    subjects = cluster.subjects[0]
    assert (await one.ledger.admit(subjects, {})).allowed
    open_there = 0
    now_us = one.clock.now_us()
    ids = []
    for node in (one, two):
        cost = {"concurrency": 1}
        while True:
            held = node.lease_manager.hold(subjects, cost, now_us, now_us + 60 * SECOND, None, None, None)
            if held is None:
                break
            ids.append((node, held[0]))
        await cluster.tick(node)
        usage_lease = node.lease_manager.usage_lease(subjects.id)
        if usage_lease is not None:
            open_there += sum(leased_limit.held for leased_limit in usage_lease.leased_limits.values())
    assert open_there <= 40
    for node, id in ids:
        node.lease_manager.end(id)
    await cluster.stop(one)
    assert await standing(cluster) == (0, 0, 0)


# --- Changes while leased ----------------------------------------------------------------------------------------


async def test_a_limit_that_is_lowered_while_leased_holds_from_the_next_commit_on(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    old = cluster.subjects[0]
    await cluster.change(0, limits=[tokens(limit=50, window=Total())])
    assert cluster.spend(one, ONE) == 0, "spent by limits that the key has no longer"
    await cluster.tick(one)
    assert await standing(cluster) == (10, 0, 0)
    assert await cluster.fill(one, ONE) + await cluster.fill(two, ONE) == 40
    assert one.lease_manager.admit(old, ONE, one.clock.now_us()) is None


async def test_a_hold_during_a_lowering_leases_nothing_by_the_old_limit(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    now_us = one.clock.now_us()
    held = one.lease_manager.hold(cluster.subjects[0], {"tokens": 10}, now_us, now_us + 60 * SECOND, None, None, None)
    assert held is not None
    await cluster.change(0, limits=[tokens(limit=100, window=Total())])
    await cluster.tick(one)
    assert await standing(cluster) == (10, 0, 10)
    renewal = asyncio.ensure_future(cluster.tick(one))
    spent = 20 + await cluster.fill(one, ONE) + await cluster.fill(two, ONE)
    await renewal
    assert spent == 100


async def test_removing_a_leased_limit_returns_its_lease(make: Make) -> None:
    requests = Limit(resource="requests", limit=500, window=Total())
    cluster = await make(tokens(window=Total()), requests)
    one, _ = cluster.nodes
    both = {"tokens": 1, "requests": 1}
    await lent(cluster, one, both)
    spent = 1 + cluster.spend(one, both, most=9)
    await cluster.change(0, limits=[requests])
    await cluster.tick(one)
    assert await standing(cluster) == (spent, 0, 0)
    await cluster.change(0, limits=[tokens(window=Total()), requests])  # it comes back with what was used
    assert await standing(cluster) == (spent, 0, 0)


async def test_removing_a_leased_key_leaves_no_lease(make: Make) -> None:
    cluster = await make()
    one, _ = cluster.nodes
    await lent(cluster, one)
    cluster.spend(one, ONE, most=9)
    for collection in ("api_keys", "key_usage"):
        await cluster.remove(collection, cluster.subjects[0].id)
    for _ in range(3):
        await cluster.tick(one)
    assert (one.lease_manager.leases, one.lease_manager.keys) == (0, 0)
    assert cluster.spend(one, ONE) == 0, "nothing is admitted from memory any more"
    assert await cluster.store.get("key_usage", None, cluster.subjects[0].id) is None


async def test_a_quota_that_is_lowered_while_leased_holds_from_the_next_commit_on(make: Make) -> None:
    cluster = await make(tokens(), quota=(tokens(window=Total()),))
    one, two = cluster.nodes
    await lent(cluster, one)
    await cluster.change_quota(limits=[tokens(limit=50, window=Total())])
    assert await cluster.fill(one, ONE) + await cluster.fill(two, ONE) == 40


async def test_a_quota_created_during_a_lease_counts_from_then_on(make: Make) -> None:
    cluster = await make(tokens())
    one, two = cluster.nodes
    await lent(cluster, one)
    await cluster.change_quota(limits=[tokens(limit=50, window=Total())])
    assert await cluster.fill(one, ONE) + await cluster.fill(two, ONE) == 50
    await cluster.change_quota(limits=[])
    assert await cluster.fill(one, ONE) + await cluster.fill(two, ONE) == 1_000 - 60


# --- Ends and bounds ----------------------------------------------------------------------------------------------


async def test_a_stop_without_the_store_ends_in_time_and_keeps_the_lease_log(make: Make) -> None:
    cluster = await make(tokens(window=Total()))
    one, two = cluster.nodes
    await lent(cluster, one)
    spent = 10 + cluster.spend(one, ONE, most=9)
    one.store.fault = lambda number, batch: Fault("before", Unavailable("gone"))
    cluster.nodes.remove(one)
    await asyncio.wait_for(one.ledger.close(), PATIENCE_S)
    await two.lease_manager.reconcile_dead()
    assert await standing(cluster) == (spent, 0, 0)


async def test_a_quotas_lease_forgets_keys_that_are_not_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota's lease lives for as long as any of its keys is used: it must not remember every key that ever was."""
    monkeypatch.setattr("strongroom.limits.lease_manager.MAX_LEASED_KEYS", 10)
    cluster = await make(tokens(limit=10_000), quota=(tokens(limit=100_000),), keys=25)
    one, _ = cluster.nodes
    for key in range(25):
        assert await cluster.verify(one, key, ONE)
    id = cluster.quotas[0].id or ""
    quota_lease = one.lease_manager.usage_lease(id)
    assert quota_lease is not None
    assert len(quota_lease.keys) == one.lease_manager.keys == 10
    for key in range(25):
        assert await cluster.verify(one, key, ONE)
        assert cluster.spend(one, ONE, key=key, most=2) == 2
        if key % 5 == 0:
            await cluster.tick(one)
    assert len(quota_lease.keys) == one.lease_manager.keys <= 10
    await cluster.stop(one)
    assert (await cluster.usage_state(id)).count == 25 + 75


async def test_scopes_that_are_remembered_of_one_key_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strongroom.limits.leased_key.MAX_SCOPES", 5)
    cluster = await make(tokens(models=("m*",)))
    one, _ = cluster.nodes
    subjects = cluster.subjects[0]
    assert (await one.ledger.admit(subjects, ONE, model="m")).allowed
    for number in range(20):
        assert one.lease_manager.admit(subjects, ONE, one.clock.now_us(), f"m{number}") is not None
    assert len(one.lease_manager._leased_keys[subjects.id]._by_scope) <= 5
    await cluster.stop(one)
    assert (await standing(cluster))[0] == 21


def test_a_dead_process_is_reconciled_within_the_duration_of_a_lease() -> None:
    assert LOOK_FOR_DEAD_EVERY * min(RENEW_EVERY_S, LEASE_S / 4) < LEASE_S
