"""The interface between the storage suite and a backend: URLs of new stores, and how to open them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest_asyncio
from hypothesis import HealthCheck, settings

from ...storage.port import Store
from .samples import COLLECTIONS


@dataclass(frozen=True)
class Backend:
    """A backend under test.

    `new_url` gives, each time, the URL of a new and empty store. `opener` names the coroutine function that turns a
    URL into an opened store, as `module:function`: by name, because some tests open the store in other processes.
    """

    new_url: Callable[[], str]
    opener: str = "strongroom.storage:open_store"

    async def open(self, url: str) -> Store:
        return await opened(self.opener, url)

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs `strongroom.testing.storage.process` on this backend, in another process."""
        return [sys.executable, "-m", "strongroom.testing.storage.process", self.opener, *arguments]

    def environment(self) -> dict[str, str]:
        """The environment for `command`, with the import path of this process."""
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


async def opened(opener: str, url: str) -> Store:
    module, _, function = opener.partition(":")
    store: Store = await getattr(importlib.import_module(module), function)(url)
    return store


class StorageSuite:
    """The base of the suite's classes. `store` is new, empty, and prepared for the sample collections."""

    @pytest_asyncio.fixture
    async def store(self, backend: Backend) -> AsyncIterator[Store]:
        store = await backend.open(backend.new_url())
        try:
            await store.prepare(COLLECTIONS)
            yield store
        finally:
            await store.close()


def examples(factor: float = 1) -> settings:
    """`factor` times the profile's number of examples, on one store; each example uses a tenant of its own."""
    return settings(
        max_examples=max(1, int(settings().max_examples * factor)),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
