"""Other processes: a process that is killed while it commits, and several processes at one store."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import replace

from ...entities import Query, Where
from ...storage.port import Create, Store
from .backend import Backend
from .journal import tail
from .process import TENANT, add
from .reopening import prepared
from .samples import NOW, batch, item

PATIENCE_S = 30
MANY = 1_000


@contextlib.asynccontextmanager
async def running(backend: Backend, what: str, url: str, number: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that runs `what`, and is killed at the end."""
    process = await asyncio.create_subprocess_exec(
        *backend.command(what, url, str(number)), stdout=asyncio.subprocess.PIPE, env=backend.environment()
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)).decode().rstrip("\n")


async def all_items(store: Store, *, prefix: str) -> dict[str, str]:
    """The labels by id of all items whose id starts with `prefix`."""
    query = Query(Where("id", ">=", prefix), limit=MANY)
    found: dict[str, str] = {}
    while page := await store.find("items", TENANT, query):
        found |= {d["id"]: d["label"] for d in page if d["id"].startswith(prefix)}
        query = replace(query, start_after=(page[-1]["id"],))
    return found


class TestProcesses:
    async def test_a_killed_process_loses_nothing_acknowledged_and_leaves_no_partial_batch(
        self, backend: Backend
    ) -> None:
        """Three processes one after the other, each killed after a random number of commits with others in flight."""
        url = backend.new_url()
        randoms = random.Random(20_250_615)
        store = await prepared(backend, url)
        persistent = store.capabilities.persistent
        await store.close()
        names: set[str] = set()
        for life in range(3):
            acknowledged = set()
            async with running(backend, "write", url, life) as process:
                assert await line(process) == "opened"
                for _ in range(randoms.randint(5, 80)):
                    acknowledged.add((await line(process)).removeprefix("committed "))
                process.kill()
                rest, _ = await process.communicate()
                acknowledged |= {text.removeprefix("committed ") for text in rest.decode().splitlines()}
            store = await prepared(backend, url)
            try:
                there = await all_items(store, prefix=f"{life}-")
                if not persistent:
                    assert there == {}, "it says that it keeps nothing"
                    continue
                committed = set(there.values())
                assert acknowledged <= committed, "an acknowledged commit is lost"
                assert there.keys() == {f"{name}-{half}" for name in committed for half in "ab"}, (
                    "half a batch is there"
                )
                total = await store.get("items", TENANT, f"total-{life}")
                assert total is not None
                assert total["used"] == len(committed)
                names |= committed
                records, _ = await tail(store, len(names))
                assert sorted(one.entity_id for one in records) == sorted(names), "the journal tells another story"
                await store.commit(batch(TENANT, Create("items", f"alive-{life}", item(code=f"alive-{life}"))))
            finally:
                await store.close()

    async def test_two_processes_share_a_store_exactly_or_the_second_is_refused(self, backend: Backend) -> None:
        url = backend.new_url()
        store = await prepared(backend, url)
        bound = 200
        try:
            await store.commit(batch(TENANT, Create("items", "total", item())))
            async with running(backend, "add", url, bound) as process:
                first = await line(process)
                if not store.capabilities.persistent:
                    assert first == "opened", "there is nothing to share"
                    return
                if not store.capabilities.multi_process:
                    kind, _, message = first.removeprefix("refused ").partition(" ")
                    assert kind == "Unavailable", first
                    assert url.rpartition("/")[2] in message, "the sentence names the store"
                    assert await process.wait() == 0
                else:
                    assert first == "opened"
                    await add(store, bound)
                    word, _, admitted = (await line(process)).partition(" ")
                    assert word == "admitted"
                    assert 0 <= int(admitted) <= bound
            if store.capabilities.multi_process:
                total = await store.get("items", TENANT, "total")
                assert total is not None
                assert total["used"] == bound
                records, _ = await tail(store, bound)
                assert len(records) == bound
                assert len({one.sequence for one in records}) == bound
            await store.commit(batch(TENANT, Create("items", "after", item()), now_us=NOW))
        finally:
            await store.close()

    async def test_a_store_is_free_again_once_it_is_closed_or_its_process_is_killed(self, backend: Backend) -> None:
        url = backend.new_url()
        for life in range(2):
            store = await prepared(backend, url)
            await store.close()
            async with running(backend, "write", url, life) as process:
                assert await line(process) == "opened"
