"""Limit leases: never over-admitted through crashes, clock skew and lost commits; nothing is lost; what is unspent comes
back. A stateful machine against a brute-force model, and the promises one by one."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from strongroom import Anchored, ApiKey, Calendar, Database, Limit, Registry, Rolling, Total, usage
from strongroom.accounts import Account, Metered, Part
from strongroom.app import SYSTEM_ENTITIES
from strongroom.context import new_id, system_context
from strongroom.errors import Conflict, Unavailable
from strongroom.knownkey import metered, quota_part
from strongroom.lending import Lending
from strongroom.quotas import Quota, is_quota, quota_id
from strongroom.storage import open_store
from strongroom.usage import KeyChanged, Ledger, Outcome

from .support import Fault, FaultyStore

T = TypeVar("T")
SYSTEM = system_context()
START_US = 1_790_000_000_000_000
LEASE_S = 5.0
WINDOW_S = 10
SKEW_US = 200_000
"""How far the nodes' clocks are apart, at most."""


@dataclass
class World:
    """The true time, by which everything is judged."""

    now_us: int = START_US


@dataclass
class SkewedClock:
    """A node's idea of the store's time."""

    world: World
    offset_us: int

    def now_us(self) -> int:
        return self.world.now_us + self.offset_us


@dataclass
class Admitted:
    """One use that was admitted: when it was answered (true time), and what it cost."""

    at_us: int
    cost: Mapping[str, int]
    forced: bool = False


@dataclass
class Node:
    store: FaultyStore
    ledger: Ledger
    lending: Lending
    clock: SkewedClock
    holds: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Reservations in its memory: (key, tokens)."""


class Cluster:
    """Nodes over one store, in one process: each with a clock, a ledger and leases of its own."""

    def __init__(self, folder: Path, limits: Sequence[Limit], quota: Sequence[Limit], keys: int = 2) -> None:
        self.folder = folder
        self.world = World()
        self.limits = list(limits)
        self.quota = list(quota)
        self.count = keys
        self.nodes: list[Node] = []
        self.metered: list[Metered] = []
        self.parts: dict[str, Part] = {}

    async def open(self) -> None:
        self.registry = Registry(SYSTEM_ENTITIES)
        self.store = await open_store("json://:memory:")
        await self.store.prepare(self.registry.collections)
        database = Database(self.store, self.registry)
        quotas: list[Quota] = []
        if self.quota:
            made = Quota(id=quota_id("tenant", "acme"), tenant="acme", kind="tenant", limits=self.quota)
            quotas.append(await database.create(SYSTEM, made))
            self.parts[quotas[0].id] = quota_part(quotas[0])
        for _ in range(self.count):
            id = new_id("key_")
            key = ApiKey(id=id, tenant="acme", name="n", hash=f"h:{id}", display="sr_…", limits=self.limits)
            self.metered.append(metered(await database.create(SYSTEM, key), quotas))
            self.parts[id] = self.metered[-1].parts[0]

    def add(self, offset_us: int = 0) -> Node:
        store = FaultyStore(self.store, shared=True)
        clock = SkewedClock(self.world, offset_us)
        ledger = Ledger(Database(store, self.registry), store, clock)
        ledger._shared = True

        async def describe(id: str) -> Part | None:
            return self.parts.get(id)

        lending = Lending(ledger, clock, lease_s=LEASE_S, folder=self.folder, describe=describe)
        node = Node(store, ledger, lending, clock)
        self.nodes.append(node)
        return node

    async def verify(self, node: Node, key: int, cost: Mapping[str, int]) -> bool:
        """As the verifier does it: from memory, else by the ledger."""
        if node.lending.admit(self.metered[key], cost, node.clock.now_us()) is not None:
            return True
        try:
            return (await node.ledger.charge(self.metered[key], cost)).allowed
        except Unavailable:
            return False  # nobody was told that it was admitted

    async def tick(self, node: Node) -> None:
        node.lending._look_at_wallets()
        await node.ledger.settled()

    async def kill(self, node: Node, *, log: bool = True) -> None:
        """As kill -9: nothing is given back, and only the log stays (if even that does)."""
        self.nodes.remove(node)
        if node.ledger._task is not None:
            node.ledger._task.cancel()
            await asyncio.wait([node.ledger._task])
        node.lending.log.abandon()
        if not log:
            for path in self.folder.glob(f"{node.lending.log.lease}.*"):
                path.unlink()

    async def stop(self, node: Node) -> None:
        self.nodes.remove(node)
        await node.ledger.close()

    async def account(self, id: str) -> Account:
        return Account(await self.store.get("key_usage", None, id))

    async def close(self) -> None:
        for node in list(self.nodes):
            node.store.fault = lambda number, batch: None
            await self.stop(node)
        await self.store.close()


LIMITS = st.sampled_from(
    [
        Limit(resource="tokens", limit=1_600, window=Rolling(seconds=WINDOW_S)),
        Limit(resource="tokens", limit=1_200, window=Anchored(seconds=WINDOW_S)),
        Limit(resource="tokens", limit=2_000, window=Calendar(unit="minute", timezone="Asia/Kathmandu")),
        Limit(resource="tokens", limit=4_000, window=Total()),
    ]
)
COSTS = st.sampled_from([{"tokens": 1}, {"tokens": 3, "requests": 1}, {"tokens": 9}, {"requests": 1}, {"tokens": 40}])


class Machine(RuleBasedStateMachine):
    """Nodes that verify, tick, are killed and come back, with clocks apart and commits lost; a model that only adds up
    what was admitted."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="strongroom-test-"))
        self.admitted: dict[int, list[Admitted]] = defaultdict(list)
        self.certain = True
        """Nothing happened that makes the store count more than was answered: a log lost, or an answer."""
        self.believed = usage.BELIEVED_FOR_S
        usage.BELIEVED_FOR_S = 0.0  # the machine's time is not the test's

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 20))

    @initialize(limit=LIMITS, shared=st.booleans(), nodes=st.integers(2, 3), data=st.data())
    def begin(self, limit: Limit, shared: bool, nodes: int, data: st.DataObject) -> None:
        self.limit = limit
        requests = Limit(resource="requests", limit=900, window=Rolling(seconds=WINDOW_S))
        quota = [limit.model_copy(update={"limit": int(limit.limit * 1.5)})] if shared else []
        self.cluster = Cluster(self.folder, [limit, requests], quota)
        self.run(self.cluster.open())
        for _ in range(nodes):
            self.start(data.draw(st.integers(-SKEW_US // 2, SKEW_US // 2)))

    @rule(offset=st.integers(-SKEW_US // 2, SKEW_US // 2))
    @precondition(lambda self: len(self.cluster.nodes) < 4)
    def start(self, offset: int) -> None:
        async def started() -> None:
            self.cluster.add(offset)

        self.run(started())

    @rule(ms=st.sampled_from([1, 50, 300, 1_000, 4_000, 12_000, 61_000]))
    def advance(self, ms: int) -> None:
        self.cluster.world.now_us += ms * 1_000

    def node(self, number: int) -> Node:
        return self.cluster.nodes[number % len(self.cluster.nodes)]

    @rule(number=st.integers(0, 3), key=st.integers(0, 1), cost=COSTS, count=st.integers(5, 60))
    @precondition(lambda self: self.cluster.nodes)
    def verify(self, number: int, key: int, cost: dict[str, int], count: int) -> None:
        """One after the other: from memory, where there is a lease; with the renewals that this asks for."""

        async def calls() -> list[bool]:
            return [await self.cluster.verify(self.node(number), key, cost) for _ in range(count)]

        for valid in self.run(calls()):
            if valid:
                self.admitted[key].append(Admitted(self.cluster.world.now_us, cost))

    @rule(cost=COSTS, count=st.integers(1, 10))
    @precondition(lambda self: len(self.cluster.nodes) > 1)
    def verify_everywhere(self, cost: dict[str, int], count: int) -> None:
        calls = [(node, key) for node in self.cluster.nodes for key in (0, 1) for _ in range(count)]

        async def answers() -> list[bool]:
            return await asyncio.gather(*(self.cluster.verify(node, key, cost) for node, key in calls))

        for (_, key), valid in zip(calls, self.run(answers()), strict=True):
            if valid:
                self.admitted[key].append(Admitted(self.cluster.world.now_us, cost))

    @rule(number=st.integers(0, 3), key=st.integers(0, 1), tokens=st.integers(1, 60), seconds=st.integers(1, 20))
    @precondition(lambda self: self.cluster.nodes)
    def reserve(self, number: int, key: int, tokens: int, seconds: int) -> None:
        node, now_us = self.node(number), self.node(number).clock.now_us()
        held = node.lending.hold(
            self.cluster.metered[key], {"tokens": tokens}, now_us, now_us + seconds * 1_000_000, "acme", None, None
        )
        if held is not None:
            node.holds[held[0]] = (key, tokens)

    @rule(number=st.integers(0, 3), less=st.integers(0, 60))
    @precondition(lambda self: any(node.holds for node in self.cluster.nodes))
    def settle(self, number: int, less: int) -> None:
        node = next(node for node in self.cluster.nodes if node.holds)
        id, (key, tokens) = node.holds.popitem()
        used = max(0, tokens - less)
        if node.lending.held(id, node.clock.now_us()) is None:
            return  # it has ended by itself
        if node.lending.settle(id, {"tokens": used}, node.clock.now_us()):
            self.admitted[key].append(Admitted(self.cluster.world.now_us, {"tokens": used}))
        else:  # as the verifier does it then: what has happened is recorded
            try:
                self.run(_outcome(node.ledger.charge(self.cluster.metered[key], {"tokens": used}, force=True)))
            except Unavailable:
                self.certain = False
            else:
                self.admitted[key].append(Admitted(self.cluster.world.now_us, {"tokens": used}, forced=True))

    @rule(number=st.integers(0, 3))
    @precondition(lambda self: self.cluster.nodes)
    def tick(self, number: int) -> None:
        self.run(self.cluster.tick(self.node(number)))

    @rule(number=st.integers(0, 3), when=st.sampled_from(["before", "after"]), unknown=st.booleans())
    @precondition(lambda self: self.cluster.nodes)
    def lose_a_commit(self, number: int, when: Any, unknown: bool) -> None:
        """The next commit of a node fails, or commits and its answer is lost."""
        store = self.node(number).store
        error = Unavailable("lost", outcome="unknown") if when == "after" or unknown else Conflict("faster")
        at = len(store.batches)
        store.fault = lambda n, batch: Fault(when, error) if n == at else None
        self.certain = self.certain and when == "before"

    @rule(number=st.integers(0, 3), log=st.booleans(), working=st.booleans())
    @precondition(lambda self: self.cluster.nodes)
    def kill(self, number: int, log: bool, working: bool) -> None:
        async def killed() -> None:
            node = self.node(number)
            if working:  # in the midst of a renewal, which may or may not commit
                node.lending._look_at_wallets()
                await asyncio.sleep(0)
            await self.cluster.kill(node, log=log)

        self.certain = self.certain and log and not working
        self.run(killed())

    @rule(number=st.integers(0, 3))
    @precondition(lambda self: self.cluster.nodes)
    def find_the_dead(self, number: int) -> None:
        node = self.node(number)
        node.store.fault = lambda n, batch: None
        self.run(node.lending._look_for_dead())

    @rule(number=st.integers(0, 3))
    @precondition(lambda self: self.cluster.nodes)
    def stop(self, number: int) -> None:
        node = self.node(number)
        node.store.fault = lambda n, batch: None
        self.run(self.cluster.stop(node))

    @invariant()
    def no_window_admits_more_than_its_limit(self) -> None:
        for key, uses in getattr(self, "admitted", {}).items():
            _hold_the_limit(self.limit, uses, f"key {key}")
        if self.cluster.quota if hasattr(self, "cluster") else False:
            together = sorted((use for uses in self.admitted.values() for use in uses), key=lambda use: use.at_us)
            _hold_the_limit(self.cluster.quota[0], together, "tenant")

    def teardown(self) -> None:
        usage.BELIEVED_FOR_S = self.believed
        try:
            if hasattr(self, "cluster"):
                self.run(self._all_is_counted())
                self.run(self.cluster.close())
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.loop.close()

    async def _all_is_counted(self) -> None:
        """At the end every admitted use is in the lifetime total or in a lease that nobody could set right; and nothing
        is lent any more that somebody could."""
        for node in self.cluster.nodes:
            node.store.fault = lambda n, batch: None
        last = self.cluster.add()
        await last.lending._look_for_dead()
        for node in list(self.cluster.nodes):
            await self.cluster.stop(node)
        for key, uses in self.admitted.items():
            account = await self.cluster.account(self.cluster.metered[key].id)
            if isinstance(self.limit.window, Total):
                allowance = self.cluster.metered[key].allowances[0]
                recorded, _, leased = account.standing(allowance, self.cluster.world.now_us)
                spent = sum(use.cost.get("tokens", 0) for use in uses)
                assert recorded + leased >= spent, "admitted, and not counted"
                if self.certain:
                    assert (recorded, leased) == (spent, 0), "counted, and not admitted"


async def _outcome(future: asyncio.Future[Outcome]) -> Outcome:
    return await future


def _hold_the_limit(limit: Limit, uses: Sequence[Admitted], whose: str) -> None:
    """No window of the limit, wherever it begins, holds more than the limit of what was admitted. Clocks that are apart
    by SKEW_US shift what is near a window's edge by so much, and nothing else."""
    spent = [(use.at_us, use.cost.get(limit.resource, 0)) for use in uses if not use.forced]
    match limit.window:
        case Rolling(seconds=seconds):
            for start, _ in spent:
                window = [units for at, units in spent if start <= at < start + seconds * 1_000_000 - SKEW_US]
                assert sum(window) <= limit.limit, f"{whose}: {sum(window)} of {limit.limit} in a rolling window"
        case Anchored(seconds=seconds):
            # A window begins with a use. Where it began depends on what came before, so: in the first one at least.
            if spent:
                first = [units for at, units in spent if at < spent[0][0] + seconds * 1_000_000 - SKEW_US]
                assert sum(first) <= limit.limit, f"{whose}: {sum(first)} of {limit.limit} in an anchored window"
        case Calendar():
            minutes: dict[int, int] = defaultdict(int)
            for at, units in spent:
                if SKEW_US <= at % 60_000_000 <= 60_000_000 - SKEW_US:
                    minutes[at // 60_000_000] += units
            worst = max(minutes.values(), default=0)
            assert worst <= limit.limit, f"{whose}: {worst} of {limit.limit} in a minute"
        case _:
            total = sum(units for _, units in spent)
            assert total <= limit.limit, f"{whose}: {total} of {limit.limit} in all"


Machine.TestCase.settings = settings(settings.get_profile("quick"), max_examples=100, stateful_step_count=40)
TestLeases = Machine.TestCase
