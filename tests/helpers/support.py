"""What several test files share: a store that fails on purpose and counts its reads, rooms over it, a fixed clock."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch
from urllib.parse import quote, unquote

import strongroom.app
from strongroom import Limit, Rolling, Strongroom
from strongroom.clock import MachineClock
from strongroom.entities.entity import Collection, Document, Registry
from strongroom.entities.query import Aggregate, Filter, Query
from strongroom.limits.ledger import UsageState
from strongroom.storage import open_store
from strongroom.storage.port import (
    Batch,
    Capabilities,
    ChangesPage,
    Committed,
    Health,
    SchemaChange,
    Store,
)

STORES = ["json-memory", "sqlite"]
"""On which stores the core is tested: the simplest one, and the default one with its threads and real commits."""


def new_url(kind: str, folder: Path, name: str = "store") -> str:
    """Where a new store of this kind is; `sqlite` is a file in `folder`."""
    return "json://:memory:" if kind == "json-memory" else f"sqlite:///{quote(str(folder / name))}.db"


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

    def on_change(self, callback: Callable[[], None]) -> None:
        self.store.on_change(callback)

    async def check(self) -> Health:
        return await self.store.check()


@asynccontextmanager
async def opened(
    url: str, *, beside: FaultyStore | None = None, **options: Any
) -> AsyncIterator[tuple[Strongroom, FaultyStore]]:
    """A Strongroom over a FaultyStore, by the machine's clock, which tests can move. `beside`: another node on that
    one's store; a file is opened once more."""
    wrapped: list[FaultyStore] = []
    if url.startswith("sqlite:///"):
        file = Path(unquote(url.removeprefix("sqlite:///")))
        if file.parent.is_dir() and not file.exists():  # noqa: ASYNC240 - a look takes microseconds
            shutil.copyfile(await _template(), file)

    async def open_faulty(url: str) -> FaultyStore:
        if beside is not None and not beside.capabilities.multi_process:
            wrapped.append(FaultyStore(beside.store, shared=True))
        else:
            wrapped.append(FaultyStore(await open_store(url)))
        return wrapped[-1]

    manager = Strongroom.open(url, **options)
    by_machine = patch.object(strongroom.app, "clock_of", lambda store: MachineClock())
    with patch.object(strongroom.app, "open_store", open_faulty), by_machine:
        room = await manager.__aenter__()
    try:
        yield room, wrapped[0]
    finally:
        await manager.__aexit__(None, None, None)


_made_template: Path | None = None


async def _template() -> Path:
    """An empty SQLite file with the schema of Strongroom's own entities. A new file is a copy of it, because making the
    schema takes longer than most tests."""
    global _made_template  # noqa: PLW0603 - one for each test process
    if _made_template is None:
        folder = Path(tempfile.mkdtemp(prefix="strongroom-template-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        made = folder / "template.db"
        await with_schema(f"sqlite:///{quote(str(made))}")
        _made_template = made
    return _made_template


async def with_schema(url: str) -> None:
    """Make the tables of Strongroom's own entities in a store."""
    store = await open_store(url)
    await store.prepare(Registry(strongroom.app.SYSTEM_ENTITIES).collections)
    await store.close()


def rolling(resource: str, limit: int, seconds: int = 3600) -> Limit:
    return Limit(resource=resource, limit=limit, window=Rolling(seconds=seconds))


async def stored_usage(store: Store, id: str) -> UsageState:
    """A key's usage as the store has it."""
    return UsageState(await store.get("key_usage", None, id))
