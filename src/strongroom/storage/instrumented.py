"""A store that counts its calls, their latency, their conflicts and their errors, as plain numbers.

Every store is used through this one. Counting adds 0.1 to 0.2 µs to a point read. One point read in SAMPLE_EVERY is
timed; every other call is timed.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from typing import Any, Literal, TypeVar

from ..entities import Aggregate, Collection, Document, Filter, Query
from ..errors import AlreadyExists, BoundExceeded, Conflict, StrongroomError
from .port import (
    MAX_CHANGES_PAGE,
    MAX_TENANTS_PAGE,
    WHOLE_JOURNAL,
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
    JournalFilter,
    JournalRow,
    Patch,
    Put,
    RowsPage,
    SchemaChange,
    Store,
)

SAMPLE_EVERY = 16
BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
JOURNAL = "journal"
"""The label of calls that concern the journal and no collection. No collection has this name."""
T = TypeVar("T")


class Histogram:
    """Durations, counted by the bucket that they fall into."""

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
    """One kind of call on one collection: its count, its latencies, and its errors by their code."""

    __slots__ = ("count", "errors", "latency")

    def __init__(self) -> None:
        self.count = 0
        self.errors: dict[str, int] = {}
        self.latency = Histogram()

    def failed(self, error: BaseException) -> None:
        code = error.code if isinstance(error, StrongroomError) else type(error).__name__
        self.errors[code] = self.errors.get(code, 0) + 1


class StoreMetrics:
    """The calls of a store since the process began, by collection. Only declared collections occur: a bounded number.

    `calls`: by (collection, call), where a call is get, find, aggregate, commit, or one of the journal; a commit counts
    for the collection of its first change. `conflicts`: commits that were refused because a document had changed or
    existed already, by collection.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.calls: dict[tuple[str, str], Series] = {}
        self.conflicts: dict[str, int] = {}
        self._operations = {kind: defaultdict[str, int](int) for kind in (Create, Put, Patch, Delete, Add, Check)}
        self._appends = 0

    @property
    def operations(self) -> dict[tuple[str, str], int]:
        """The operations of committed batches, by (collection, kind of operation)."""
        found = {
            (collection, kind.__name__.lower()): count
            for kind, counts in self._operations.items()
            for collection, count in counts.items()
        }
        return {**found, (JOURNAL, "append"): self._appends} if self._appends else found

    def commit(self, batch: Batch, began: float, error: BaseException | None) -> None:
        """Count a commit that was answered, and the operations of its batch if it was made."""
        collection = _collection_of(batch)
        series = self.series(collection, "commit")
        series.count += 1
        series.latency.observe(time.perf_counter() - began)
        if error is None:
            kinds = self._operations
            for operation in batch.operations:
                if type(operation) is Append:
                    self._appends += 1
                else:
                    kinds[type(operation)][operation.collection] += 1  # type: ignore[index, union-attr]  # no Append
        elif isinstance(error, Conflict | AlreadyExists | BoundExceeded):
            self.conflicts[collection] = self.conflicts.get(collection, 0) + 1
        elif isinstance(error, Exception):  # no cancellation
            series.failed(error)

    def series(self, collection: str, call: str) -> Series:
        found = self.calls.get((collection, call))
        if found is None:
            found = self.calls[collection, call] = Series()
        return found


class InstrumentedStore:
    """A store with its metrics. `unwrapped` gives the store behind it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.metrics = StoreMetrics(store.capabilities.name)
        self.get = _counting(store, self.metrics)

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

    async def rows(
        self, after: str | None = None, where: JournalFilter = WHOLE_JOURNAL, limit: int = MAX_CHANGES_PAGE
    ) -> RowsPage:
        return await self._timed(JOURNAL, "rows", self.store.rows(after, where, limit))

    async def rewrite(self, rows: Sequence[JournalRow]) -> int:
        return await self._timed(JOURNAL, "rewrite", self.store.rewrite(rows))

    async def drop(self, tenant: str | None, through_sequence: int) -> int:
        return await self._timed(JOURNAL, "drop", self.store.drop(tenant, through_sequence))

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
        return _Commit(self.metrics, batch, self.store.commit(batch))

    def on_change(self, callback: Callable[[], None]) -> None:
        self.store.on_change(callback)

    async def check(self) -> Health:
        return await self.store.check()


class _Commit(Awaitable[Committed]):
    """A commit under way. It is counted when its caller gets the answer: a callback of the store's future would cost
    another turn of the loop."""

    __slots__ = ("_answer", "_batch", "_began", "_metrics")

    def __init__(self, metrics: StoreMetrics, batch: Batch, answer: Awaitable[Committed]) -> None:
        self._metrics = metrics
        self._batch = batch
        self._answer = answer
        self._began = time.perf_counter()

    def __await__(self) -> Generator[Any, None, Committed]:
        try:
            committed = yield from self._answer.__await__()
        except BaseException as error:
            self._metrics.commit(self._batch, self._began, error)
            raise
        self._metrics.commit(self._batch, self._began, None)
        return committed


def _counting(
    store: Store, metrics: StoreMetrics
) -> Callable[[str, str | None, str], Coroutine[Any, Any, Document | None]]:
    """`store.get`, counted. A closure, because attribute lookups would show in the figures of the hottest read."""
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


def _collection_of(batch: Batch) -> str:
    for operation in batch.operations:
        kind = type(operation)
        if kind is not Check and kind is not Append:
            return operation.collection  # type: ignore[union-attr]  # no Append
    return JOURNAL


__all__ = ["BOUNDS_S", "JOURNAL", "Histogram", "InstrumentedStore", "Series", "StoreMetrics"]
