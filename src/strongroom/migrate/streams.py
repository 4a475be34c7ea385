"""Reading a store from one end to the other with a page ahead, and writing with some batches in flight."""

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
"""A page is as many documents as come to about so much: two pages of a store are in memory at once."""
MIN_PAGE = 4
SAMPLES = 10
IN_FLIGHT = 6
"""Batches that are being committed at once: the store writes one while the next is made, and may join their commits."""


# --- Reading --------------------------------------------------------------------------------------------------


async def pages(store: Store, part: Part, after: str = "") -> AsyncGenerator[list[Document], None]:
    """The part's documents in the order of their ids, after an id; the next page is read while one is worked on."""

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
    """How many documents the next page should have, by the size of some of these."""
    some = page[:: max(1, len(page) // SAMPLES)]
    mean = sum(map(document_size, some)) // len(some)
    return max(MIN_PAGE, min(MAX_LIMIT, PAGE_BYTES // mean))


async def tenants(*stores: Store) -> AsyncGenerator[str, None]:
    """The tenants of the stores, each once, in the order of their UTF-8 bytes."""
    held: list[deque[str]] = [deque() for _ in stores]
    after: list[str | None] = [None for _ in stores]
    ended = [False for _ in stores]
    while True:
        for number, store in enumerate(stores):
            if not held[number] and not ended[number]:
                found = await store.tenants(after[number])
                held[number].extend(found)
                if found:
                    after[number] = found[-1]
                else:
                    ended[number] = True
        heads = [queue[0] for queue in held if queue]
        if not heads:
            return
        first = min(heads, key=str.encode)
        for queue in held:
            if queue and queue[0] == first:
                queue.popleft()
        yield first


async def parts(collections: Iterable[Collection], *stores: Store) -> AsyncGenerator[Part, None]:
    """Every part that one of the stores may have: a collection of the platform, or of each tenant."""
    for collection in collections:
        if not collection.tenant_scoped:
            yield Part(collection, None)
            continue
        async with aclosing(tenants(*stores)) as names:
            async for tenant in names:
                yield Part(collection, tenant)


# --- Writing --------------------------------------------------------------------------------------------------


class Refused(Exception):
    """The store refused a batch. Never leaves the package."""

    def __init__(self, batch: Batch, error: StrongroomError) -> None:
        super().__init__(error.message)
        self.batch = batch
        self.error = error


class Pipeline:
    """Commits batches, some at once; their answers are taken in order, and the first failure ends it.

    On leaving it waits for all that is in flight.
    """

    def __init__(self, store: Store, width: int = IN_FLIGHT) -> None:
        self._store = store
        self._width = width
        self._flying: deque[tuple[Batch, asyncio.Future[Committed], Callable[[], None]]] = deque()

    async def commit(self, batch: Batch, landed: Callable[[], None]) -> None:
        """Send a batch; `landed` is called once it is committed. Raises Refused, perhaps for one before it."""
        while len(self._flying) >= self._width:
            await self._land()
        self._flying.append((batch, asyncio.ensure_future(self._store.commit(batch)), landed))

    async def _land(self) -> None:
        batch, future, landed = self._flying.popleft()
        try:
            await future
        except StrongroomError as error:
            raise Refused(batch, error) from error
        landed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._flying:
                await self._land()
        finally:
            rest = [future for _, future, _ in self._flying]
            self._flying.clear()
            # What failed first is told. What became of those behind it is read from the store, where it goes on.
            await asyncio.gather(*rest, return_exceptions=True)
