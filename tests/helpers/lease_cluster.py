"""Nodes over one store in one process, for tests of limit leases: each with a clock, a ledger and leases of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from strongroom import ApiKey, Database, Limit, Registry
from strongroom.app import SYSTEM_ENTITIES
from strongroom.context import new_id, system_context
from strongroom.errors import Unavailable
from strongroom.keys.cached_key import subjects_of
from strongroom.limits.lease import UsageLease
from strongroom.limits.lease_manager import LeaseManager
from strongroom.limits.ledger import Ledger
from strongroom.limits.usage_state import Subject, Subjects, UsageState
from strongroom.quotas.model import Quota, quota_id, quota_subject
from strongroom.storage import open_store
from strongroom.storage.port import Batch, Delete
from tests.helpers.faulty_store import Fault, FaultyStore

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
    lease_manager: LeaseManager
    clock: SkewedClock
    holds: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Reservations in its memory: (key, tokens)."""

    def lose_next(self, fault: Fault) -> None:
        """What becomes of its next commit."""
        at = len(self.store.batches)
        self.store.fault = lambda number, batch: fault if number == at else None

    def fault_free(self) -> None:
        self.store.fault = lambda number, batch: None


class Cluster:
    """Nodes over one store, in one process: each with a clock, a ledger and leases of its own."""

    def __init__(self, folder: Path, limits: Sequence[Limit], quota: Sequence[Limit], keys: int = 2) -> None:
        self.folder = folder
        self.world = World()
        self.limits = list(limits)
        self.quota = list(quota)
        self.count = keys
        self.nodes: list[Node] = []
        self.subjects: list[Subjects] = []
        self.by_id: dict[str, Subject] = {}
        self.quotas: list[Quota] = []

    async def open(self) -> None:
        self.registry = Registry(SYSTEM_ENTITIES)
        self.store = await open_store("json://:memory:")
        await self.store.prepare(self.registry.collections)
        database = Database(self.store, self.registry)
        if self.quota:
            made = Quota(id=quota_id("tenant", "acme"), tenant="acme", kind="tenant", limits=self.quota)
            self.quotas.append(await database.create(SYSTEM, made))
            self.by_id[made.id or ""] = quota_subject(self.quotas[0])
        for _ in range(self.count):
            id = new_id("key_")
            key = ApiKey(id=id, tenant="acme", name="n", hash=f"h:{id}", display="sr_…", limits=self.limits)
            self.subjects.append(subjects_of(await database.create(SYSTEM, key), self.quotas))
            self.by_id[id] = self.subjects[-1].all[0]

    def add(self, offset_us: int = 0) -> Node:
        store = FaultyStore(self.store, shared=True)
        clock = SkewedClock(self.world, offset_us)
        ledger = Ledger(Database(store, self.registry), store, clock)
        ledger.states.shared = True

        async def describe(id: str) -> Subject | None:
            return self.by_id.get(id)

        lease_manager = LeaseManager(ledger, clock, lease_s=LEASE_S, folder=self.folder, describe=describe)
        node = Node(store, ledger, lease_manager, clock)
        self.nodes.append(node)
        return node

    async def verify(self, node: Node, key: int, cost: Mapping[str, int]) -> bool:
        """As the verifier does it: from memory, else by the ledger."""
        if node.lease_manager.admit(self.subjects[key], cost, node.clock.now_us()) is not None:
            return True
        try:
            return (await node.ledger.admit(self.subjects[key], cost)).allowed
        except Unavailable:
            return False  # nobody was told that it was admitted

    async def tick(self, node: Node) -> None:
        node.lease_manager.renew_leases()
        await node.ledger.settled()

    async def change(self, key: int, *, limits: Sequence[Limit]) -> None:
        """Other limits for a key, as an administrator gives them: known to all nodes at once, as after the feed."""
        database = Database(self.store, self.registry)
        before = self.subjects[key]
        changed = await database.update(SYSTEM, ApiKey, before.id, {"limits": list(limits)})
        self.subjects[key] = subjects_of(changed, self.quotas)
        self.by_id[before.id] = self.subjects[key].all[0]

    async def change_quota(self, *, limits: Sequence[Limit]) -> None:
        """Other limits for the tenant; a quota that is not there is made. Known to all nodes at once."""
        database = Database(self.store, self.registry)
        id = quota_id("tenant", "acme")
        if self.quotas:
            changed = await database.update(SYSTEM, Quota, id, {"limits": list(limits)})
        else:
            changed = await database.create(SYSTEM, Quota(id=id, tenant="acme", kind="tenant", limits=list(limits)))
        self.quotas = [changed]
        self.by_id[id] = quota_subject(changed)
        for number, known in enumerate(self.subjects):
            self.subjects[number] = subjects_of(await database.get(SYSTEM, ApiKey, known.id), self.quotas)

    async def remove(self, collection: str, id: str) -> None:
        self.by_id.pop(id, None)
        await self.store.commit(Batch(None, (Delete(collection, id),), self.world.now_us))

    def usage_lease(self, node: Node, key: int = 0) -> UsageLease:
        """A node's lease of a key's limits."""
        usage_lease = node.lease_manager.usage_lease(self.subjects[key].id)
        assert usage_lease is not None
        return usage_lease

    def spend(self, node: Node, cost: Mapping[str, int], *, key: int = 0, most: int = 10_000) -> int:
        """How many calls are admitted from memory, without a commit, until one is not."""
        count = 0
        while count < most and node.lease_manager.admit(self.subjects[key], cost, node.clock.now_us()) is not None:
            count += 1
        return count

    async def fill(self, node: Node, cost: Mapping[str, int], key: int = 0) -> int:
        """How many calls are admitted until one is not."""
        count = 0
        while await self.verify(node, key, cost):
            count += 1
        return count

    async def kill(self, node: Node, *, log: bool = True) -> None:
        """As kill -9: nothing is given back, and only the log stays (if even that does)."""
        self.nodes.remove(node)
        await node.ledger.group_commit.stop()
        node.lease_manager.log.abandon()
        if not log:
            for path in self.folder.glob(f"{node.lease_manager.log.lease}.*"):
                path.unlink()

    async def stop(self, node: Node) -> None:
        self.nodes.remove(node)
        await node.ledger.close()

    async def usage_state(self, id: str) -> UsageState:
        return UsageState(await self.store.get("key_usage", None, id))

    async def close(self) -> None:
        for node in list(self.nodes):
            node.fault_free()
            await self.stop(node)
        await self.store.close()
