"""Two nodes, one Redis, slow readers, lost invalidations, flushes, old snapshots: no read is older than its node saw.

The state machine simulates the store and the change feeds, to decide when a node receives a change; Redis is real.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import redis.asyncio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from strongroom import Cached, CachedList, Entity, Query, Where
from strongroom.cache import redis_tier as _cache_redis
from strongroom.cache.read_through import Cache
from strongroom.context import utc_from_us
from strongroom.entities.entity import Document
from strongroom.journal.feed import ChangeFeed
from strongroom.storage.port import Record, Store
from tests.helpers.servers.redis import RedisServer, redis_server
from tests.helpers.waiting import wait_until

__all__ = ["redis_server"]
pytestmark = pytest.mark.server
TENANT = "acme"
IDS = ["a", "b"]


class Thing(
    Entity, collection="things", cache=Cached(seconds=60, name="thing", lists=[CachedList("by_owner", by="owner")])
):
    owner: str
    number: int


ALL_OF_ONE = Query(Where("owner", "==", "one")).check(Thing.__collection__)


@dataclass
class World:
    """What is committed: for each moment, all the documents; and the journal."""

    states: list[dict[str, Document]] = field(default_factory=lambda: [{}])
    records: list[Record] = field(default_factory=list)

    def commit(self, id: str, document: Document | None) -> Record:
        before = self.states[-1].get(id)
        state = {key: value for key, value in self.states[-1].items() if key != id}
        number = len(self.states)
        if document is not None:
            state[id] = {**document, "id": id, "version": number, "created_at": NOW, "updated_at": NOW}
        self.states.append(state)
        action = "delete" if document is None else "update" if before is not None else "create"
        version = number if document is not None else 0
        record = Record(str(number), TENANT, 0, "t", "r", action, "things", id, before, state.get(id), version, number)
        self.records.append(record)
        return record


GATE: ContextVar[asyncio.Event] = ContextVar("gate")
"""What the answer of the store waits for, of the read that asked first."""
NOW = utc_from_us(1_700_000_000_000_000)


class SlowStore:
    """Reads the world at once, and gives the answer when it is let."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def _later(self, answer: Any) -> Any:
        await GATE.get().wait()
        return answer

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        found = self.world.states[-1].get(id)
        return cast("Document | None", await self._later(found))

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        found = sorted((d for d in self.world.states[-1].values() if d["owner"] == "one"), key=lambda d: str(d["id"]))
        return cast("list[Document]", await self._later(found))


class StepFeed:
    """A change feed that tells when the machine says so."""

    behind_s = 0.0

    def __init__(self) -> None:
        self.tell: Callable[[Record], None] = lambda _: None

    def on_record(self, callback: Callable[[Record], None]) -> None:
        self.tell = callback

    def on_reset(self, callback: Callable[[], None]) -> None:
        """This feed never loses its place."""


class Node:
    def __init__(self, world: World, url: str, local_entries: int) -> None:
        self.world = world
        self.store = SlowStore(world)
        self.feed = StepFeed()
        store, feed = cast(Store, self.store), cast(ChangeFeed, self.feed)
        self.cache = Cache(store, feed, [Thing.__collection__], url, "machine", local_entries=local_entries)
        self.known = len(world.states) - 1  # a feed begins at the end of the journal
        self.own: dict[str, int] = {}
        """By id, the moment of the node's own last commit."""
        self.cache.start()

    def hear(self) -> None:
        for record in self.world.records[self.known :]:
            self.feed.tell(record)
        self.known = len(self.world.states) - 1


@dataclass
class Reading:
    """A read under way: whose, of what, what its node knew when it began, and the answer to come."""

    node: Node
    id: str | None
    known: int
    gate: asyncio.Event
    task: asyncio.Task[Any]


DISTURBANCES = [
    "expire", "evict_the_counter", "flush", "forget_locally", "save", "restart_from_the_snapshot", "rollback",
    "lose_the_connection", "restart", "crash",
]  # fmt: skip
nodes_ = st.sampled_from([0, 1])
_read = st.tuples(st.just("read"), nodes_, st.sampled_from([*IDS, None]), st.booleans(), st.integers(0, 6))
_write = st.tuples(st.just("write"), nodes_, st.sampled_from(IDS), st.sampled_from(["one", "two"]), st.booleans())
_let_go = st.tuples(st.just("let_go"), st.integers(0, 50), st.integers(0, 4))
steps_ = st.one_of(
    _read,
    _read,
    _read,
    _write,
    _let_go,
    _let_go,
    st.tuples(st.just("delete"), nodes_, st.sampled_from(IDS), st.booleans()),
    st.tuples(st.just("hear"), nodes_),
)


class Nodes(RuleBasedStateMachine):
    server: RedisServer

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World()
        self.readings: list[Reading] = []
        self.snapshot: dict[bytes, bytes] = {}
        self.run(self._start())

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    async def _start(self) -> None:
        self.client: Any = redis.asyncio.from_url(self.server.url)
        await self.client.flushall()
        self.nodes = [self._node(number) for number in range(2)]
        await self._connected()

    def _node(self, number: int) -> Node:
        """The first has both tiers, the second asks Redis for every read."""
        return Node(self.world, self.server.url, 100 if number == 0 else 0)

    async def _connected(self) -> None:
        await wait_until(lambda: all(node.cache.redis_state == "closed" for node in self.nodes))

    def teardown(self) -> None:
        async def end() -> None:
            for reading in self.readings:
                reading.gate.set()
            await asyncio.gather(*(reading.task for reading in self.readings))
            for node in self.nodes:
                await node.cache.close()
            await self.client.aclose()

        self.run(end())
        for reading in self.readings:
            self._check(reading)
        self.loop.close()

    # --- What happens -----------------------------------------------------------------------------------------

    @rule(steps=st.lists(steps_, min_size=8, max_size=16))
    def happen(self, steps: list[tuple[Any, ...]]) -> None:
        """Several steps at once, since a race takes some: hypothesis alone would seldom draw enough of them."""
        for name, *arguments in steps:
            getattr(self, name)(*arguments)

    def write(self, node: int, id: str, owner: str, told: bool) -> None:
        """Not `told`: the writer was killed after its commit, before it could invalidate (and another one runs now)."""
        self._commit(node, self.world.commit(id, {"owner": owner, "number": len(self.world.states)}), told)

    def delete(self, node: int, id: str, told: bool) -> None:
        if id in self.world.states[-1]:
            self._commit(node, self.world.commit(id, None), told)

    def _commit(self, node: int, record: Record, told: bool) -> None:
        if told:

            async def forget() -> None:
                version = record.version or 0
                self.nodes[node].own[record.entity_id] = record.sequence
                self.nodes[node].cache.changed("things", TENANT, record.entity_id, version, record.before, record.after)

            self.run(forget())

    def hear(self, node: int) -> None:
        async def tell() -> None:
            self.nodes[node].hear()

        self.run(tell())

    def read(self, node: int, id: str | None, slow: bool, steps: int) -> None:
        async def begin() -> None:
            reader = self.nodes[node]
            gate = asyncio.Event()
            if not slow:
                gate.set()
            GATE.set(gate)
            work = reader.cache.get("things", TENANT, id) if id else reader.cache.find("things", TENANT, ALL_OF_ONE)
            task = asyncio.ensure_future(work)
            known = max(reader.known, reader.own.get(id or "", 0))
            self.readings.append(Reading(reader, id, known, gate, task))
            for _ in range(steps):
                await asyncio.wait([task], timeout=0.001)

        self.run(begin())

    def let_go(self, which: int, steps: int) -> None:
        """A slow reader gets its answer."""

        async def release() -> None:
            waiting = [reading for reading in self.readings if not reading.task.done()]
            if waiting:
                reading = waiting[which % len(waiting)]
                reading.gate.set()
                for _ in range(steps):
                    await asyncio.wait([reading.task], timeout=0.001)

        self.run(release())
        for reading in self.readings:
            if reading.task.done():
                self._check(reading)
        self.readings = [reading for reading in self.readings if not reading.task.done()]

    @rule(node=nodes_, what=st.sampled_from(DISTURBANCES))
    def disturb(self, node: int, what: str) -> None:
        getattr(self, f"_{what}")(node)

    def _expire(self, node: int) -> None:
        self.run(self.client.delete(*(f"strongroom:machine:{TENANT}:{key}" for key in ("thing:a", "by_owner:one"))))

    def _evict_the_counter(self, node: int) -> None:
        self.run(self.client.delete("strongroom:machine"))

    def _flush(self, node: int) -> None:
        self.run(self.client.flushall())

    def _forget_locally(self, node: int) -> None:
        """So that Redis is asked."""
        for key in list(self.nodes[node].cache._local):
            self.nodes[node].cache._forget_local(key)

    def _save(self, node: int) -> None:
        async def dump() -> None:
            self.snapshot = {key: await self.client.dump(key) for key in await self.client.keys("*")}

        self.run(dump())

    def _restart_from_the_snapshot(self, node: int) -> None:
        """As a Redis that was killed and has loaded what it saved: connections end, then the old entries are there."""

        async def load() -> None:
            sessions = [self._session(node) for node in self.nodes]
            pipeline = self.client.pipeline(transaction=True)
            pipeline.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            pipeline.flushall()
            for key, value in self.snapshot.items():
                pipeline.restore(key, 0, value)
            await pipeline.execute()
            await wait_until(lambda: all(self._session(n) > s for n, s in zip(self.nodes, sessions, strict=True)))
            await self._connected()

        self.run(load())

    def _lose_the_connection(self, node: int) -> None:
        async def drop() -> None:
            session = self._session(self.nodes[node])
            self.nodes[node].cache._distrust("the test says so")
            await wait_until(lambda: self._session(self.nodes[node]) > session)
            await self._connected()

        self.run(drop())

    def _restart(self, node: int) -> None:
        """The node ends and another one starts: it hears only of what comes from now on."""

        async def again() -> None:
            old = self.nodes[node]
            for reading in self.readings:
                if reading.node is old:
                    reading.task.cancel()
                    with suppress(asyncio.CancelledError):
                        await reading.task
            self.readings = [reading for reading in self.readings if reading.node is not old]
            await old.cache.close()
            self.nodes[node] = self._node(node)
            await self._connected()

        self.run(again())

    def _crash(self, node: int) -> None:
        """Every node dies after a commit that none of them has heard of."""
        self.write(node, "a", "one", False)
        for number in range(2):
            self._restart(number)

    def _rollback(self, node: int) -> None:
        """Redis saves what is there, changes are committed and heard of, and Redis comes back with what it saved."""
        self._save(node)
        for id in IDS:
            self.write(node, id, "one", True)
        self.hear(0)
        self.hear(1)
        self._restart_from_the_snapshot(node)

    # --- What must hold ---------------------------------------------------------------------------------------

    @staticmethod
    def _session(node: Node) -> int:
        return node.cache.stats.connections

    def _check(self, reading: Reading) -> None:
        """The answer was true at some moment between what the node knew when the read began, and now."""
        found = reading.task.result()
        since = self.world.states[reading.known :]
        if reading.id is not None:
            assert any(state.get(reading.id) == found for state in since), (found, since)
        else:
            lists = [
                sorted((d for d in state.values() if d["owner"] == "one"), key=lambda d: str(d["id"]))
                for state in since
            ]
            assert found in lists, (found, lists)


@pytest.fixture
def quick_takeover(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that holds a lease is waited for so shortly that leases are often taken over."""
    monkeypatch.setattr(_cache_redis, "OTHERS_FILL_S", 0.004)
    monkeypatch.setattr(_cache_redis, "OTHERS_POLL_S", 0.001)


@pytest.mark.timeout(600)
def test_no_read_is_older_than_what_its_node_has_seen(
    redis_server: RedisServer, quick_takeover: None, tmp_path: Path
) -> None:
    class Machine(Nodes):
        server = redis_server

    thorough = settings.default.max_examples > 100 if settings.default is not None else False
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=500 if thorough else 40,
            stateful_step_count=12,
            suppress_health_check=list(HealthCheck),
        ),
    )
