"""A store that fails on purpose, counts its reads, keeps its batches, and can hold commits back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from strongroom.entities.entity import Collection, Document
from strongroom.entities.query import Aggregate, Filter, Query
from strongroom.storage.port import (
    MAX_CHANGES_PAGE,
    WHOLE_JOURNAL,
    Batch,
    Capabilities,
    ChangesPage,
    Committed,
    Health,
    JournalFilter,
    JournalRow,
    RowsPage,
    SchemaChange,
    Store,
)


@dataclass(frozen=True)
class Fault:
    """What becomes of a commit: it fails `before` anything is applied, or is applied and its answer lost (`after`)."""

    when: Literal["before", "after"]
    error: Exception


class FaultyStore:
    """A store that counts what is asked of it, fails the commits that `fault` names, and can hold them back."""

    def __init__(self, store: Store, *, shared: bool = False) -> None:
        self.store = store
        self._shared = shared
        self.reads: list[tuple[str, str]] = []
        """(method, collection) of each read."""
        self.batches: list[Batch] = []
        self.fault: Callable[[int, Batch], Fault | None] = lambda number, batch: None
        self.before_read: Callable[[str, str], Awaitable[None]] | None = None
        self.after_read: Callable[[str, str], Awaitable[None]] | None = None
        self.gate: asyncio.Event | None = None
        """Where set, a commit is held until the event is."""

    @property
    def capabilities(self) -> Capabilities:
        return self.store.capabilities

    async def open(self) -> None:
        await self.store.open()

    async def close(self) -> None:
        if not self._shared:
            await self.store.close()

    async def prepare(self, collections: Sequence[Collection], **options: Any) -> tuple[SchemaChange, ...]:
        return await self.store.prepare(collections, **options)

    async def _reading(self, method: str, collection: str, answer: Callable[[], Awaitable[Any]]) -> Any:
        self.reads.append((method, collection))
        if self.before_read is not None:
            await self.before_read(method, collection)
        found = await answer()
        if self.after_read is not None:
            await self.after_read(method, collection)
        return found

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        found: Document | None = await self._reading("get", collection, lambda: self.store.get(collection, tenant, id))
        return found

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        found: list[Document] = await self._reading(
            "find", collection, lambda: self.store.find(collection, tenant, query)
        )
        return found

    async def aggregate(
        self, collection: str, tenant: str | None, aggregates: Sequence[Aggregate], where: Filter | None
    ) -> dict[str, Any]:
        self.reads.append(("aggregate", collection))
        return await self.store.aggregate(collection, tenant, aggregates, where)

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        fault = self.fault(len(self.batches), batch)
        self.batches.append(batch)
        return asyncio.ensure_future(self._commit(batch, fault))

    async def _commit(self, batch: Batch, fault: Fault | None) -> Committed:
        if self.gate is not None:
            await self.gate.wait()
        if fault is not None and fault.when == "before":
            raise fault.error
        committed = await self.store.commit(batch)
        if fault is not None:
            raise fault.error
        return committed

    async def changes(self, after: str | None, *, tenant: str | None = None, limit: int = 1_000) -> ChangesPage:
        return await self.store.changes(after, tenant=tenant, limit=limit)

    async def tenants(self, after: str | None = None, limit: int = 1_000) -> list[str]:
        return await self.store.tenants(after, limit)

    async def now_us(self) -> int:
        return await self.store.now_us()

    async def rows(
        self, after: str | None = None, where: JournalFilter = WHOLE_JOURNAL, limit: int = MAX_CHANGES_PAGE
    ) -> RowsPage:
        self.reads.append(("rows", "journal"))
        return await self.store.rows(after, where, limit)

    async def rewrite(self, rows: Sequence[JournalRow]) -> int:
        return await self.store.rewrite(rows)

    async def drop(self, tenant: str | None, through_sequence: int) -> int:
        return await self.store.drop(tenant, through_sequence)

    def on_change(self, callback: Callable[[], None]) -> None:
        self.store.on_change(callback)

    async def check(self) -> Health:
        return await self.store.check()
