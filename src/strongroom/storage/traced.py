"""A store whose calls are OpenTelemetry spans, below the span of the request that makes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..entities import Aggregate, Collection, Document, Filter, Query
from .port import (
    MAX_CHANGES_PAGE,
    MAX_TENANTS_PAGE,
    WHOLE_JOURNAL,
    Append,
    Batch,
    Capabilities,
    ChangesPage,
    Check,
    Committed,
    Health,
    JournalFilter,
    JournalRow,
    RowsPage,
    SchemaChange,
    Store,
)

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

T = TypeVar("T")


class TracedStore:
    """A store with a span for each call that belongs to a request. Calls of background work have no span, and the spans
    name collections, never tenants or ids."""

    def __init__(self, store: Store, provider: TracerProvider) -> None:
        from opentelemetry import trace

        self.store = store
        self._tracer = provider.get_tracer("strongroom.store")
        self._current = trace.get_current_span

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

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        return await self._spanned("get", collection, self.store.get(collection, tenant, id))

    async def tenants(self, after: str | None = None, limit: int = MAX_TENANTS_PAGE) -> list[str]:
        return await self.store.tenants(after, limit)

    async def now_us(self) -> int:
        return await self.store.now_us()

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        return await self._spanned("find", collection, self.store.find(collection, tenant, query))

    async def aggregate(
        self, collection: str, tenant: str | None, aggregates: Sequence[Aggregate], where: Filter | None
    ) -> dict[str, Any]:
        answer = self.store.aggregate(collection, tenant, aggregates, where)
        return await self._spanned("aggregate", collection, answer)

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        return _SpannedCommit(self, batch, self.store.commit(batch))

    async def changes(
        self, after: str | None, *, tenant: str | None = None, limit: int = MAX_CHANGES_PAGE
    ) -> ChangesPage:
        return await self._spanned("changes", "journal", self.store.changes(after, tenant=tenant, limit=limit))

    async def rows(
        self, after: str | None = None, where: JournalFilter = WHOLE_JOURNAL, limit: int = MAX_CHANGES_PAGE
    ) -> RowsPage:
        return await self._spanned("rows", "journal", self.store.rows(after, where, limit))

    async def rewrite(self, rows: Sequence[JournalRow]) -> int:
        return await self._spanned("rewrite", "journal", self.store.rewrite(rows))

    async def drop(self, tenant: str | None, through_sequence: int) -> int:
        return await self._spanned("drop", "journal", self.store.drop(tenant, through_sequence))

    def on_change(self, callback: Callable[[], None]) -> None:
        self.store.on_change(callback)

    async def check(self) -> Health:
        return await self.store.check()

    @property
    def belongs_to_a_request(self) -> bool:
        return bool(self._current().get_span_context().is_valid)

    def span(self, call: str, collection: str) -> Any:
        attributes = {"db.system.name": self.store.capabilities.name, "db.collection.name": collection}
        return self._tracer.start_as_current_span(f"{call} {collection}", attributes=attributes)

    async def _spanned(self, call: str, collection: str, answer: Awaitable[T]) -> T:
        if not self.belongs_to_a_request:
            return await answer
        with self.span(call, collection):
            return await answer


class _SpannedCommit(Awaitable[Committed]):
    """A commit under way, in a span from its call to its answer."""

    def __init__(self, traced: TracedStore, batch: Batch, answer: Awaitable[Committed]) -> None:
        self._traced = traced
        self._batch = batch
        self._answer = answer

    def __await__(self) -> Generator[Any, None, Committed]:
        if not self._traced.belongs_to_a_request:
            return (yield from self._answer.__await__())
        changed = [one.collection for one in self._batch.operations if not isinstance(one, Append | Check)]
        with self._traced.span("commit", changed[0] if changed else "journal"):
            return (yield from self._answer.__await__())


__all__ = ["TracedStore"]
