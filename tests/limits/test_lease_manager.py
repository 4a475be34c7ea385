"""Limit leases against a brute-force model: never over-admitted through crashes, clock skew and lost commits, and
unspent units are returned. test_lease_promises has the promises one by one."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from strongroom import Anchored, Calendar, Limit, Refill, Rolling, Total
from strongroom.errors import Conflict, Unavailable
from strongroom.limits import lease as leased_limits
from strongroom.limits import tuning
from strongroom.limits.usage_state import UsageState
from tests.helpers.faulty_store import Fault
from tests.helpers.lease_cluster import LEASE_S, SKEW_US, WINDOW_S, Cluster, Node
from tests.helpers.waiting import PATIENCE_S

T = TypeVar("T")
SECOND = 1_000_000
REFILL = 200
LIMITS = st.sampled_from(
    [
        Limit(resource="tokens", limit=1_600, window=Rolling(seconds=WINDOW_S)),
        Limit(resource="tokens", limit=1_200, window=Anchored(seconds=WINDOW_S)),
        Limit(resource="tokens", limit=1_400, window=Calendar(unit="minute", timezone="Asia/Kathmandu")),
        Limit(resource="tokens", limit=2_400, window=Total()),
        Limit(resource="tokens", limit=1_600, window=Total(refill=Refill(amount=REFILL, seconds=WINDOW_S))),
    ]
)
COSTS = st.sampled_from([{"tokens": 1}, {"tokens": 3, "requests": 1}, {"tokens": 9}, {"requests": 1}, {"tokens": 40}])
BIG = {"tokens": 40}
SMALL = {"tokens": 1}
NODES = st.integers(0, 3)
KEYS = st.integers(0, 1)


class Admitted:
    """What was admitted of one key: tokens by the true time of the answer, and what happened whatever the limit."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = defaultdict(int)
        self.recorded = 0
        """Tokens in all, those included that were recorded and not asked for."""
        self.count = 0

    def add(self, at_us: int, cost: Mapping[str, int], count: int = 1, *, forced: bool = False) -> None:
        if not count:
            return
        tokens = cost.get("tokens", 0) * count
        if not forced:
            self.tokens[at_us] += tokens
        self.recorded += tokens
        self.count += count


class Machine(RuleBasedStateMachine):
    """Nodes that verify, renew, are cut off, are killed and come back, with clocks apart and commits lost; a model that
    only adds up what was admitted."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="strongroom-test-"))
        self.admitted: dict[int, Admitted] = {0: Admitted(), 1: Admitted()}
        self.certain = True
        """Nothing happened that makes the store count more than was answered: a log lost, or an answer."""
        self.killed = False
        """The log of a process that was killed tells what it had spent of its limits, not its lifetime totals."""
        self.believed = tuning.REREAD_AFTER_S
        # The machine's time is not the test's: by it leases would have other sizes each time.
        tuning.REREAD_AFTER_S = 0.0
        leased_limits.time = SimpleNamespace(monotonic=lambda: self.cluster.world.now_us / 1_000_000)  # type: ignore[assignment,attr-defined]

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 2 * PATIENCE_S))

    @initialize(limit=LIMITS, shared=st.booleans(), offsets=st.lists(st.integers(-1, 1), min_size=2, max_size=3))
    def begin(self, limit: Limit, shared: bool, offsets: list[int]) -> None:
        self.limit = limit
        requests = Limit(resource="requests", limit=900, window=Rolling(seconds=WINDOW_S))
        quota = [limit.model_copy(update={"limit": int(limit.limit * 3 // 2)})] if shared else []
        self.cluster = Cluster(self.folder, [limit, requests], quota)
        self.run(self.cluster.open())
        for offset in offsets:
            self.start(offset)

    @property
    def now_us(self) -> int:
        return self.cluster.world.now_us

    def node(self, number: int) -> Node:
        return self.cluster.nodes[number % len(self.cluster.nodes)]

    def other(self, number: int) -> Node:
        return self.node(number + 1)

    # --- Time and use -----------------------------------------------------------------------------------------

    @rule(offset=st.integers(-1, 1))
    @precondition(lambda self: len(self.cluster.nodes) < 4)
    def start(self, offset: int) -> None:
        async def started() -> None:
            self.cluster.add(offset * SKEW_US // 2)

        self.run(started())

    @rule(ms=st.sampled_from([1, 50, 300, 1_000, 4_000, 12_000, 61_000]))
    def advance(self, ms: int) -> None:
        self.cluster.world.now_us += ms * 1_000

    @rule(number=NODES, key=KEYS, cost=COSTS, count=st.integers(2, 20))
    @precondition(lambda self: self.cluster.nodes)
    def verify(self, number: int, key: int, cost: dict[str, int], count: int) -> None:
        """One after the other: from memory, where there is a lease; with the renewals that this asks for."""

        async def calls() -> int:
            return sum([await self.cluster.verify(self.node(number), key, cost) for _ in range(count)])

        self.admitted[key].add(self.now_us, cost, self.run(calls()))

    @rule(cost=COSTS, count=st.integers(1, 6))
    @precondition(lambda self: len(self.cluster.nodes) > 1)
    def verify_everywhere(self, cost: dict[str, int], count: int) -> None:
        calls = [(node, key) for node in self.cluster.nodes for key in (0, 1) for _ in range(count)]

        async def answers() -> list[bool]:
            return await asyncio.gather(*(self.cluster.verify(node, key, cost) for node, key in calls))

        for (_, key), valid in zip(calls, self.run(answers()), strict=True):
            self.admitted[key].add(self.now_us, cost, int(valid))

    @rule(number=NODES, key=KEYS)
    @precondition(lambda self: self.cluster.nodes)
    def fill(self, number: int, key: int) -> None:
        self._fill(self.node(number), key)

    def _fill(self, node: Node, key: int) -> None:
        """Use all that a node can get of a key's limit."""
        for cost in (BIG, SMALL):
            self.admitted[key].add(self.now_us, cost, self.run(self.cluster.fill(node, cost, key)))

    def _burst(self, node: Node, key: int, most: int) -> None:
        """Have a share lent, then spend from memory alone: what nobody else knows of."""

        async def burst() -> int:
            first = await self.cluster.verify(node, key, {"tokens": 9})
            self.admitted[key].add(self.now_us, {"tokens": 9}, int(first))
            return self.cluster.spend(node, SMALL, key=key, most=most)

        self.admitted[key].add(self.now_us, SMALL, self.run(burst()))

    @rule(number=NODES, key=KEYS, most=st.sampled_from([3, 60, 500]))
    @precondition(lambda self: self.cluster.nodes)
    def burst(self, number: int, key: int, most: int) -> None:
        self._burst(self.node(number), key, most)

    # --- Reservations in memory -------------------------------------------------------------------------------

    @rule(number=NODES, key=KEYS, tokens=st.integers(1, 60), seconds=st.integers(1, 20))
    @precondition(lambda self: self.cluster.nodes)
    def reserve(self, number: int, key: int, tokens: int, seconds: int) -> None:
        node, now_us = self.node(number), self.node(number).clock.now_us()
        held = node.lease_manager.hold(
            self.cluster.subjects[key], {"tokens": tokens}, now_us, now_us + seconds * SECOND, "acme", None, None
        )
        if held is not None:
            node.holds[held[0]] = (key, tokens)

    @rule(less=st.integers(0, 60))
    @precondition(lambda self: any(node.holds for node in self.cluster.nodes))
    def settle(self, less: int) -> None:
        node = next(node for node in self.cluster.nodes if node.holds)
        id, (key, tokens) = node.holds.popitem()
        cost = {"tokens": max(0, tokens - less)}
        if node.lease_manager.held(id, node.clock.now_us()) is None:
            return  # it has ended by itself

        async def settled() -> bool:
            return node.lease_manager.settle(id, cost, node.clock.now_us())

        if self.run(settled()):
            self.admitted[key].add(self.now_us, cost)
        else:  # as the verifier does it then: what has happened is recorded
            node.lease_manager.end(id)
            try:
                self.run(self._record(node, key, cost))
            except Unavailable:
                self.certain = False
            else:
                self.admitted[key].add(self.now_us, cost, forced=True)

    async def _record(self, node: Node, key: int, cost: dict[str, int]) -> None:
        await node.ledger.admit(self.cluster.subjects[key], cost, force=True)

    # --- What goes wrong --------------------------------------------------------------------------------------

    @rule(number=NODES)
    @precondition(lambda self: self.cluster.nodes)
    def tick(self, number: int) -> None:
        self.run(self.cluster.tick(self.node(number)))

    @rule(number=NODES, when=st.sampled_from(["before", "after"]), unknown=st.booleans())
    @precondition(lambda self: self.cluster.nodes)
    def lose_a_commit(self, number: int, when: Any, unknown: bool) -> None:
        """The next commit of a node fails, or commits and its answer is lost."""
        error = Unavailable("lost", outcome="unknown") if when == "after" or unknown else Conflict("faster")
        self.node(number).lose_next(Fault(when, error))
        self.certain = self.certain and when == "before"

    @rule(number=NODES, key=KEYS, filled=st.booleans(), end=st.sampled_from(["lands", "before", "after", "killed"]))
    @precondition(lambda self: len(self.cluster.nodes) > 1)
    def spend_while_a_renewal_is_on_its_way(self, number: int, key: int, filled: bool, end: Any) -> None:
        """The renewal may take from the lease, and nobody knows when it is true: what both leases allow is spent."""
        node, other = self.node(number), self.other(number)
        node.fault_free()
        self._burst(node, key, 40)
        if filled:
            self._fill(other, key)

        async def spend() -> int:
            lease_manager, store = node.lease_manager, node.store
            await node.ledger.settled()
            store.gate = asyncio.Event()
            if end in ("before", "after"):
                node.lose_next(Fault(end, Unavailable("lost", outcome="unknown")))
            batches = len(store.batches)
            lease_manager.renew_leases()
            for _ in range(50):
                if len(store.batches) > batches:
                    break
                await asyncio.sleep(0)
            spent = self.cluster.spend(node, SMALL, key=key, most=500)
            store.gate.set()
            store.gate = None
            if end == "killed":
                await self.cluster.kill(node)
            else:
                await node.ledger.settled()
            return spent

        self.killed = self.killed or end == "killed"
        self.admitted[key].add(self.now_us, SMALL, self.run(spend()))
        if end == "killed":
            self.run(other.lease_manager.reconcile_dead())
        self._fill(other, key)

    @rule(number=NODES, key=KEYS, log=st.booleans(), seconds=st.sampled_from([0, 1, 6, 14]))
    @precondition(lambda self: len(self.cluster.nodes) > 1)
    def crash_with_much_spent(self, number: int, key: int, log: bool, seconds: int) -> None:
        """What a dead process had spent from memory counts, whether somebody can know how much it was or not."""
        node, other = self.node(number), self.other(number)
        node.fault_free()
        self._burst(node, key, 500)
        self.certain, self.killed = self.certain and log, True
        self.run(self.cluster.kill(node, log=log))
        self.cluster.world.now_us += seconds * SECOND
        other.fault_free()
        if log:
            self.run(other.lease_manager.reconcile_dead())
        self._fill(other, key)

    @rule(number=NODES, key=KEYS, ms=st.sampled_from([500, 5_500, 16_000, 61_000]))
    @precondition(lambda self: len(self.cluster.nodes) > 1)
    def cut_off(self, number: int, key: int, ms: int) -> None:
        """A node that does not reach the store spends what it has, until its lease ends."""
        node, other = self.node(number), self.other(number)
        node.fault_free()
        self._burst(node, key, 20)
        node.store.fault = lambda n, batch: Fault("before", Unavailable("cut off"))
        self.run(self.cluster.tick(node))
        self.cluster.world.now_us += ms * 1_000
        self._fill(other, key)
        self.admitted[key].add(self.now_us, SMALL, self.cluster_spend(node, key))
        node.fault_free()

    def cluster_spend(self, node: Node, key: int) -> int:
        async def spend() -> int:
            return self.cluster.spend(node, SMALL, key=key, most=500)

        return self.run(spend())

    @rule(number=NODES, log=st.booleans(), working=st.booleans())
    @precondition(lambda self: self.cluster.nodes)
    def kill(self, number: int, log: bool, working: bool) -> None:
        async def killed() -> None:
            node = self.node(number)
            if working:  # in the midst of a renewal, which may or may not commit
                node.lease_manager.renew_leases()
                await asyncio.sleep(0)
            await self.cluster.kill(node, log=log)

        self.certain, self.killed = self.certain and log, True
        self.run(killed())

    @rule(number=NODES)
    @precondition(lambda self: self.cluster.nodes)
    def find_the_dead(self, number: int) -> None:
        self.node(number).fault_free()
        self.run(self.node(number).lease_manager.reconcile_dead())

    @rule(number=NODES)
    @precondition(lambda self: self.cluster.nodes)
    def stop(self, number: int) -> None:
        node = self.node(number)
        node.fault_free()
        self.run(self.cluster.stop(node))

    # --- What holds -------------------------------------------------------------------------------------------

    @invariant()
    def no_window_admits_more_than_its_limit(self) -> None:
        if not hasattr(self, "cluster"):
            return
        for key, admitted in self.admitted.items():
            hold_the_limit(self.limit, admitted.tokens, f"key {key}", certain=self.certain)
        if self.cluster.quota:
            together: dict[int, int] = defaultdict(int)
            for admitted in self.admitted.values():
                for at_us, units in admitted.tokens.items():
                    together[at_us] += units
            hold_the_limit(self.cluster.quota[0], together, "tenant", certain=self.certain)

    def teardown(self) -> None:
        try:
            if hasattr(self, "cluster"):
                self.run(self._all_is_counted())
                self.run(self.cluster.close())
        finally:
            tuning.REREAD_AFTER_S = self.believed
            leased_limits.time = time  # type: ignore[attr-defined]
            shutil.rmtree(self.folder, ignore_errors=True)
            self.loop.close()

    async def _all_is_counted(self) -> None:
        """At the end every admitted use is recorded, or in a lease that nobody could set right; nothing is lent that
        somebody could; and when the windows are over, all of each limit can be used again."""
        last = self.cluster.add()
        await last.lease_manager.reconcile_dead()
        for node in list(self.cluster.nodes):
            node.fault_free()
            await self.cluster.stop(node)
        for key, admitted in self.admitted.items():
            self._key_is_counted(await self.cluster.usage_state(self.cluster.subjects[key].id), key, admitted)
        if self.cluster.quota:
            state = await self.cluster.usage_state(self.cluster.subjects[0].shared[0].id)
            self._totals_are_exact(state, list(self.admitted.values()))
        if not isinstance(self.limit.window, Total):
            self.cluster.world.now_us += 62 * SECOND + round(LEASE_S * SECOND)
            node = self.cluster.add()
            for key in (0, 1):
                subjects = self.cluster.subjects[key]
                outcome = await node.ledger.admit(subjects, {"tokens": int(self.limit.limit)})
                assert outcome.allowed or (key and self.cluster.quota), f"something of a past window counts: {outcome}"

    def _key_is_counted(self, state: UsageState, key: int, admitted: Admitted) -> None:
        compiled_limit = self.cluster.subjects[key].compiled_limits[0]
        recorded, reserved, leased = state.standing(compiled_limit, self.now_us)
        assert reserved == 0
        if self.certain:
            assert leased == 0, "lent, and nobody gave it back"
        self._totals_are_exact(state, [admitted])
        match self.limit.window:
            case Total(refill=None):
                assert recorded + leased >= admitted.recorded, "admitted, and not counted"
                if self.certain:
                    assert recorded == admitted.recorded, "counted, and not admitted"
            case Rolling(seconds=seconds):
                start = self.now_us - seconds * SECOND
                surely = sum(units for at, units in admitted.tokens.items() if at > start + SKEW_US)
                assert recorded + leased >= surely, "admitted, and not counted"
                if self.certain and not self.killed and admitted.recorded == sum(admitted.tokens.values()):
                    bucket_us = seconds * SECOND // 300 + 1
                    possibly = sum(units for at, units in admitted.tokens.items() if at >= start - bucket_us - SKEW_US)
                    assert recorded <= possibly, "counted, and not admitted"

    def _totals_are_exact(self, state: UsageState, admitted: list[Admitted]) -> None:
        tokens, count = sum(one.recorded for one in admitted), sum(one.count for one in admitted)
        found = state.totals.get("tokens", 0), state.count
        if self.killed:  # a log tells what was used of limits, as long as it counts
            return
        assert found[0] >= tokens, "used, and not in the totals"
        assert found[1] >= count, "used, and not counted"
        assert found == (tokens, count) or not self.certain, "counted, and not used"


def hold_the_limit(limit: Limit, tokens: Mapping[int, int], whose: str, *, certain: bool) -> None:
    """No window of the limit, wherever it begins, holds more than the limit of what was admitted. Clocks that are apart
    by SKEW_US shift what is near a window's edge by so much, and nothing else."""
    spent = sorted(tokens.items())

    def within(start: int, end: int) -> int:
        return sum(units for at, units in spent if start <= at < end)

    match limit.window:
        case Rolling(seconds=seconds):
            worst = max((within(at, at + seconds * SECOND - SKEW_US) for at, _ in spent), default=0)
            assert worst <= limit.limit, f"{whose}: {worst} of {limit.limit} in a rolling window"
        case Anchored(seconds=seconds) if certain:  # what is not known to be recorded may have begun a window
            start = 0
            for at, _ in spent:
                end = start + seconds * SECOND
                if at < end - SKEW_US:
                    continue
                if at <= end + SKEW_US:
                    break  # nobody can tell in which window that was
                start = at
                worst = within(start, start + seconds * SECOND)
                assert worst <= limit.limit, f"{whose}: {worst} of {limit.limit} in an anchored window"
        case Calendar():
            minutes: dict[int, int] = defaultdict(int)
            for at, units in spent:
                if SKEW_US <= at % 60_000_000 <= 60_000_000 - SKEW_US:
                    minutes[at // 60_000_000] += units
            worst = max(minutes.values(), default=0)
            assert worst <= limit.limit, f"{whose}: {worst} of {limit.limit} in a minute"
        case Total(refill=None):
            assert sum(tokens.values()) <= limit.limit, f"{whose}: {sum(tokens.values())} of {limit.limit} in all"
        case Total():
            step = WINDOW_S * SECOND
            for number, (start, _) in enumerate(spent):
                for end, _ in spent[number:]:
                    refills = (end + SKEW_US) // step - (start - SKEW_US) // step
                    worst = within(start, end + 1)
                    assert worst <= limit.limit + REFILL * refills, f"{whose}: {worst} with {refills} refills"


Machine.TestCase.settings = settings(settings(), max_examples=max(60, settings().max_examples), stateful_step_count=20)
TestLeases = Machine.TestCase


def test_a_dead_nodes_lease_is_returned_by_a_node_that_remembers_an_older_state() -> None:
    machine = Machine()
    machine.begin(
        limit=Limit(resource="tokens", limit=1_600, window=Rolling(seconds=10)), shared=False, offsets=[0, 0, 0]
    )
    machine.burst(key=1, most=3, number=1)
    machine.crash_with_much_spent(key=0, log=True, number=1, seconds=0)  # the last node remembers key 1 from here
    machine.crash_with_much_spent(key=1, log=True, number=0, seconds=0)
    machine.teardown()
