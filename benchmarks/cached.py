"""Our side of `cache` and `zipf`: reads through Redis, and a Zipf load on one or two nodes, store reads counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from itertools import accumulate, cycle
from pathlib import Path
from random import Random
from typing import Any, Literal
from unittest.mock import patch

import redis.asyncio

import strongroom.app
from strongroom import Cached, Entity, Index, Strongroom
from strongroom.cache.read_through import Cache
from strongroom.entities.entity import Document
from strongroom.entities.query import Query
from strongroom.errors import Conflict
from strongroom.storage import open_store
from strongroom.storage.port import Store

from .harness import BenchmarkError, Job, Round, Sample, closed_loop
from .notes import TENANT, note

AT_ONCE = 64
CONNECT_TIMEOUT_S = 10
READS_SHARE = 0.95
ZIPF_S = 1.1


class CachedNote(
    Entity, collection="cached_notes", indexes=[Index("status", "-created_at")], cache=Cached(seconds=300, name="note")
):
    """The note of `notes.py`, cached."""

    title: str
    body: str
    status: Literal["draft", "done"] = "draft"
    author: str
    priority: int = 0
    due_at: datetime | None = None


class CountingStore:
    """A store that counts what is read from it, by whomever."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        self.reads += collection == CachedNote.__collection__.name
        return await self._store.get(collection, tenant, id)

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        self.reads += collection == CachedNote.__collection__.name
        return await self._store.find(collection, tenant, query)


@asynccontextmanager
async def _node(url: str, cache: str | None) -> AsyncIterator[tuple[Strongroom, CountingStore]]:
    counting: list[CountingStore] = []

    async def open_counting(url: str) -> Any:
        counting.append(CountingStore(await open_store(url)))
        return counting[-1]

    manager = Strongroom.open(url, entities=[CachedNote], cache=cache)
    with patch.object(strongroom.app, "open_store", open_counting):
        room = await manager.__aenter__()
    try:
        if room.cache is not None:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await _connected(room.cache)
        yield room, counting[0]
    finally:
        await manager.__aexit__(None, None, None)


async def _connected(cache: Cache) -> None:
    while cache.redis_state != "closed":  # noqa: ASYNC110 - the cache tells nobody: it connects in the background
        await asyncio.sleep(0.01)


async def _fill(room: Strongroom, rows: int) -> list[str]:
    tenant = room.tenant(TENANT)
    ids: list[str] = []
    for begin in range(0, rows, AT_ONCE):
        fresh = [CachedNote(**note(number)) for number in range(begin, min(begin + AT_ONCE, rows))]
        ids += [made.id for made in await asyncio.gather(*map(tenant.create, fresh))]
    return ids


def sqlite_url(folder: str) -> str:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path.absolute()}/strongroom.db"


@asynccontextmanager
async def through_redis(folder: str, redis_url: str, rows: int) -> AsyncIterator[Round]:
    """For a `Worker`. Job `get`: `tenant.get(CachedNote, id)` with the local tier switched off, all in Redis."""
    async with _node(sqlite_url(folder), redis_url) as (room, store):
        assert room.cache is not None
        room.cache.local_entries = 0
        tenant = room.tenant(TENANT)
        ids = await _fill(room, rows)
        Random(1).shuffle(ids)
        turn = cycle(ids)

        async def get() -> None:
            await tenant.get(CachedNote, next(turn))

        async def measure(job: Job) -> Sample:
            for begin in range(0, rows, AT_ONCE):
                await asyncio.gather(*(tenant.get(CachedNote, id) for id in ids[begin : begin + AT_ONCE]))
            before = store.reads
            sample = await closed_loop(get, job.seconds, job.callers)
            if store.reads - before > sample.operations / 50:
                raise BenchmarkError(f"{store.reads - before} of {sample.operations} reads reached the store")
            return sample

        yield measure


@asynccontextmanager
async def bare_redis(redis_url: str, rows: int) -> AsyncIterator[Round]:
    """For a `Worker`. Job `get`: redis-py's `await client.get(key)`, a value as large as ours."""
    async with redis.asyncio.from_url(redis_url) as client:
        value = repr(note(1)).encode()
        keys = [f"bare:{number}" for number in range(rows)]
        for key in keys:
            await client.set(key, value)
        Random(1).shuffle(keys)
        turn = cycle(keys)

        async def get() -> None:
            assert await client.get(next(turn)) is not None

        async def measure(job: Job) -> Sample:
            return await closed_loop(get, job.seconds, job.callers)

        yield measure


@asynccontextmanager
async def zipf(urls: tuple[str, str], redis_url: str, rows: int, node_count: int) -> AsyncIterator[Round]:
    """For a `Worker`. `urls`: two new stores of one kind, for the nodes that have the cache and for a node without.

    Job `spared`: the load on both; the sample's rate is how many of a hundred store reads the cache spares, by
    operation. Job `cached` and `plain`: the load on one of them; the rate is operations a second.
    """
    random = Random(7)
    weights = list(accumulate(1 / rank**ZIPF_S for rank in range(1, rows + 1)))
    async with AsyncExitStack() as stack:
        cached = [await stack.enter_async_context(_node(urls[0], redis_url)) for _ in range(node_count)]
        plain = [await stack.enter_async_context(_node(urls[1], None))]
        ids = {id(group): await _fill(group[0][0], rows) for group in (cached, plain)}

        def load(group: list[tuple[Strongroom, CountingStore]]) -> Callable[[], Awaitable[None]]:
            tenants = [room.tenant(TENANT) for room, _ in group]
            keys = ids[id(group)]

            async def operation() -> None:
                tenant = random.choice(tenants)
                key = random.choices(keys, cum_weights=weights)[0]
                if random.random() < READS_SHARE:
                    await tenant.get(CachedNote, key)
                else:
                    with suppress(Conflict):  # too many at once want the few hottest documents; the reads are counted
                        await tenant.update(CachedNote, key, {"priority": random.randrange(10)})

            return operation

        async def per_operation(group: list[tuple[Strongroom, CountingStore]], job: Job) -> tuple[float, Sample]:
            before = sum(store.reads for _, store in group)
            sample = await closed_loop(load(group), job.seconds, job.callers)
            reads = sum(store.reads for _, store in group) - before
            return reads / sample.operations, sample  # the warm-up's reads count too: rather too many than too few

        for room, _ in cached:
            tenant = room.tenant(TENANT)
            for begin in range(0, rows, AT_ONCE):
                some = ids[id(cached)][begin : begin + AT_ONCE]
                await asyncio.gather(*(tenant.get(CachedNote, key) for key in some))

        async def measure(job: Job) -> Sample:
            if job.what == "plain":
                return (await per_operation(plain, job))[1]
            with_cache, sample = await per_operation(cached, job)
            if job.what == "cached":
                return sample
            without, _ = await per_operation(plain, job)
            return Sample(round(10_000 * (1 - with_cache / without)), 100.0)

        yield measure
