"""Reads a whole store with one page ahead, and writes with several batches in flight."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self

from ..entities import MAX_LIMIT, Collection, Document, Query
from ..errors import StrongroomError
from ..storage.port import Batch, Committed, Store, document_size
from .state import Part

FIRST_PAGE = 50
PAGE_BYTES = 4_000_000
"""The approximate size of a page. Two pages of a store are in memory at once."""
MIN_PAGE = 4
SAMPLES = 10
IN_FLIGHT = 6
"""Batches in flight: the store commits one while the next is built, and may join their commits (group commit)."""


# --- Reading --------------------------------------------------------------------------------------------------


async def pages(store: Store, part: Part, after: str = "") -> AsyncGenerator[list[Document], None]:
    """The part's documents in the order of their ids, after an id; the next page is read ahead."""

    async def read(limit: int, last: str) -> list[Document]:
        query = Query(limit=limit, start_after=(last,) if last else None)
        return await store.find(part.collection.name, part.tenant, query)

    limit = FIRST_PAGE
    task: asyncio.Task[list[Document]] | None = asyncio.ensure_future(read(limit, after))
    try:
        while task is not None:
            page = await task
            task = None
            if not page:
                return
            if len(page) == limit:
                limit = _page_limit(page)
                task = asyncio.ensure_future(read(limit, page[-1]["id"]))
            yield page
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _page_limit(page: Sequence[Document]) -> int:
    """The length of the next page, by the sizes of a sample of this page."""
    some = page[:: max(1, len(page) // SAMPLES)]
    mean = sum(map(document_size, some)) // len(some)
    return max(MIN_PAGE, min(MAX_LIMIT, PAGE_BYTES // mean))


async def tenants(*stores: Store) -> AsyncGenerator[str, None]:
    """The tenants of the stores, each once, in the order of their UTF-8 bytes."""
    queues: list[deque[str]] = [deque() for _ in stores]
    after: list[str | None] = [None for _ in stores]
    ended = [False for _ in stores]
    while True:
        for number, store in enumerate(stores):
            if not queues[number] and not ended[number]:
                found = await store.tenants(after[number])
                queues[number].extend(found)
                if found:
                    after[number] = found[-1]
                else:
                    ended[number] = True
        heads = [queue[0] for queue in queues if queue]
        if not heads:
            return
        first = min(heads, key=str.encode)
        for queue in queues:
            if queue and queue[0] == first:
                queue.popleft()
        yield first


async def parts(collections: Iterable[Collection], *stores: Store) -> AsyncGenerator[Part, None]:
    """Every part that one of the stores may have: each global collection, and each collection of each tenant."""
    for collection in collections:
        if not collection.tenant_scoped:
            yield Part(collection, None)
            continue
        async with aclosing(tenants(*stores)) as names:
            async for tenant in names:
                yield Part(collection, tenant)


# --- Writing --------------------------------------------------------------------------------------------------


class Refused(Exception):
    """The store refused a batch. Used within this package only."""

    def __init__(self, batch: Batch, error: StrongroomError) -> None:
        super().__init__(error.message)
        self.batch = batch
        self.error = error


class Pipeline:
    """Commits batches, several at once. Answers are handled in order, and the first failure ends the pipeline.

    On exit it waits for every batch in flight.
    """

    def __init__(self, store: Store, width: int = IN_FLIGHT) -> None:
        self._store = store
        self._width = width
        self._in_flight: deque[tuple[Batch, asyncio.Future[Committed], Callable[[], None]]] = deque()

    async def commit(self, batch: Batch, on_commit: Callable[[], None]) -> None:
        """Send a batch; `on_commit` is called once it is committed. Raises Refused, possibly for an earlier batch."""
        while len(self._in_flight) >= self._width:
            await self._complete_oldest()
        self._in_flight.append((batch, asyncio.ensure_future(self._store.commit(batch)), on_commit))

    async def _complete_oldest(self) -> None:
        batch, future, on_commit = self._in_flight.popleft()
        try:
            await future
        except StrongroomError as error:
            raise Refused(batch, error) from error
        on_commit()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._in_flight:
                await self._complete_oldest()
        finally:
            rest = [future for _, future, _ in self._in_flight]
            self._in_flight.clear()
            # The first failure is raised. A retry reads the outcome of the later batches from the store.
            await asyncio.gather(*rest, return_exceptions=True)
