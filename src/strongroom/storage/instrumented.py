"""A store that counts: what is asked of it, how long it takes, what conflicts and fails; as plain numbers, cheaply.

Every store is used through this. What is counted costs a tenth of a microsecond or two for a point read, of which one
in SAMPLE_EVERY is timed; everything else is timed each time.
"""

from __future__ import annotations

import asyncio
import functools
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, TypeVar

from ..entities import Aggregate, Collection, Document, Filter, Query
from ..errors import AlreadyExists, BoundExceeded, Conflict, StrongroomError
from .port import (
    MAX_CHANGES_PAGE,
    MAX_TENANTS_PAGE,
    Add,
    Append,
    Batch,
    Capabilities,
    ChangesPage,
    Check,
    Committed,
    Create,
    Delete,
    Health,
    Patch,
    Put,
    SchemaChange,
    Store,
)

SAMPLE_EVERY = 16
BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
JOURNAL = "journal"
"""The label of what concerns the journal and no collection; no collection is called so."""
T = TypeVar("T")


class Histogram:
    """How often something took how long."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def __add__(self, other: Histogram) -> Histogram:
        both = Histogram()
        both.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        both.sum_s = self.sum_s + other.sum_s
        return both

    def buckets(self) -> list[tuple[str, float]]:
        total, found = 0, []
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Series:
    """One operation on one collection: how often, how long, what went wrong (by the error's code)."""

    __slots__ = ("count", "errors", "latency")

    def __init__(self) -> None:
        self.count = 0
        self.errors: dict[str, int] = {}
        self.latency = Histogram()

    def failed(self, error: BaseException) -> None:
        code = error.code if isinstance(error, StrongroomError) else type(error).__name__
        self.errors[code] = self.errors.get(code, 0) + 1


class StoreMetrics:
    """What was asked of a store since the process began. Collections are those of the declarations: a bounded number.

    `calls`: by (collection, call), where a call is get, find, aggregate, commit or changes; a commit counts for the
    collection of its first change. `operations`: by (collection, kind of operation) within committed batches.
    `conflicts`: commits that were refused because something had changed or was there already, by collection.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.calls: dict[tuple[str, str], Series] = {}
        self.operations: dict[tuple[str, str], int] = {}
        self.conflicts: dict[str, int] = {}

    def series(self, collection: str, call: str) -> Series:
        found = self.calls.get((collection, call))
        if found is None:
            found = self.calls[collection, call] = Series()
        return found


class ObservedStore:
    """A store, with its metrics. It adds nothing else; what the port does not name is the store's own."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.metrics = StoreMetrics(store.capabilities.name)
        self.get = _counting(store, self.metrics)

    def __getattr__(self, name: str) -> Any:
        """What only some stores have (`drop_journal_before`, `advise`)."""
        return getattr(self.store, name)

    @property
    def capabilities(self) -> Capabilities:
        return self.store.capabilities

    async def open(self) -> None:
        await self.store.open()

    async def close(self) -> None:
        await self.store.close()

    async def prepare(
        self,
        collections: Sequence[Collection],
        *,
        mode: Literal["apply", "plan"] = "apply",
        allow_destructive: bool = False,
    ) -> tuple[SchemaChange, ...]:
        return await self.store.prepare(collections, mode=mode, allow_destructive=allow_destructive)

    async def tenants(self, after: str | None = None, limit: int = MAX_TENANTS_PAGE) -> list[str]:
        return await self.store.tenants(after, limit)

    async def now_us(self) -> int:
        return await self.store.now_us()

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        return await self._timed(collection, "find", self.store.find(collection, tenant, query))

    async def aggregate(
        self, collection: str, tenant: str | None, aggregates: Sequence[Aggregate], where: Filter | None
    ) -> dict[str, Any]:
        return await self._timed(collection, "aggregate", self.store.aggregate(collection, tenant, aggregates, where))

    async def changes(
        self, after: str | None, *, tenant: str | None = None, limit: int = MAX_CHANGES_PAGE
    ) -> ChangesPage:
        return await self._timed(JOURNAL, "changes", self.store.changes(after, tenant=tenant, limit=limit))

    async def _timed(self, collection: str, call: str, answer: Awaitable[T]) -> T:
        series = self.metrics.series(collection, call)
        series.count += 1
        began = time.perf_counter()
        try:
            return await answer
        except Exception as error:
            series.failed(error)
            raise
        finally:
            series.latency.observe(time.perf_counter() - began)

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        began = time.perf_counter()
        answer = asyncio.ensure_future(self.store.commit(batch))
        answer.add_done_callback(functools.partial(self._committed, batch, began))
        return answer

    def _committed(self, batch: Batch, began: float, answer: asyncio.Future[Committed]) -> None:
        metrics = self.metrics
        collection = _collection_of(batch)
        series = metrics.series(collection, "commit")
        series.count += 1
        series.latency.observe(time.perf_counter() - began)
        if answer.cancelled():
            return
        error = answer.exception()
        if error is None:
            operations = metrics.operations
            for operation in batch.operations:
                if isinstance(operation, Append):
                    key = JOURNAL, "append"
                else:
                    key = operation.collection, _KINDS[type(operation)]
                operations[key] = operations.get(key, 0) + 1
        elif isinstance(error, Conflict | AlreadyExists | BoundExceeded):
            metrics.conflicts[collection] = metrics.conflicts.get(collection, 0) + 1
        else:
            series.failed(error)

    def on_change(self, callback: Callable[[], None]) -> None:
        self.store.on_change(callback)

    async def check(self) -> Health:
        return await self.store.check()


def _counting(
    store: Store, metrics: StoreMetrics
) -> Callable[[str, str | None, str], Coroutine[Any, Any, Document | None]]:
    """`store.get`, counted. The hottest read of all: a closure, since each attribute that it looked up would be seen in
    the figures, and the clock only now and then."""
    all_series: dict[str, Series] = {}
    perf_counter = time.perf_counter

    async def timed(series: Series, collection: str, tenant: str | None, id: str) -> Document | None:
        began = perf_counter()
        try:
            return await store.get(collection, tenant, id)
        finally:
            series.latency.observe(perf_counter() - began)

    async def get(collection: str, tenant: str | None, id: str) -> Document | None:
        try:
            series = all_series[collection]
        except KeyError:
            series = all_series[collection] = metrics.series(collection, "get")
        series.count = count = series.count + 1
        try:
            if count % SAMPLE_EVERY == 1:
                return await timed(series, collection, tenant, id)
            return await store.get(collection, tenant, id)
        except Exception as error:
            series.failed(error)
            raise

    return get


_KINDS = {kind: kind.__name__.lower() for kind in (Create, Put, Patch, Delete, Add, Check)}


def _collection_of(batch: Batch) -> str:
    for operation in batch.operations:
        if not isinstance(operation, Check | Append):
            return operation.collection
    return JOURNAL


__all__ = ["BOUNDS_S", "JOURNAL", "Histogram", "ObservedStore", "Series", "StoreMetrics"]
