"""Opened stores for tests: their URLs, a Strongroom over a FaultyStore, and short forms of limits."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote, unquote

import strongroom.app
from strongroom import Limit, Rolling, Strongroom
from strongroom.clock import MachineClock
from strongroom.entities.entity import Registry
from strongroom.limits.ledger import UsageState
from strongroom.storage import open_store
from strongroom.storage.port import (
    Store,
)
from tests.helpers.faulty_store import FaultyStore

STORES = ["json-memory", "sqlite"]
"""On which stores the core is tested: the simplest one, and the default one with its threads and real commits."""


def new_url(kind: str, folder: Path, name: str = "store") -> str:
    """Where a new store of this kind is; `sqlite` is a file in `folder`."""
    return "json://:memory:" if kind == "json-memory" else f"sqlite:///{quote(str(folder / name))}.db"


@asynccontextmanager
async def opened(
    url: str, *, beside: FaultyStore | None = None, **options: Any
) -> AsyncIterator[tuple[Strongroom, FaultyStore]]:
    """A Strongroom over a FaultyStore, by the machine's clock, which tests can move. `beside`: another node on that
    one's store; a file is opened once more. It seals no journal unless `sealing` says so: what a test counts are the
    commits of its own."""
    options.setdefault("sealing", False)
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
