"""Tails the journal: one task follows it for this process's caches, and wakes whoever follows a tenant's changes.

A follower keeps no buffer: it reads the journal itself, from its own cursor. So a slow reader loses nothing and costs
no memory, and one that reconnects with its last cursor goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from .errors import StrongroomError
from .storage.port import ChangesPage, Record, Store

POLL_S = 0.25
"""How long a change made by another process may stay unseen; one of this process is seen at once."""
PAGE = 500
_log = logging.getLogger(__name__)


class ChangeFeed:
    """The journal as it grows. `start` before use; `close` after."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._callbacks: list[Callable[[Record], None]] = []
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def on_record(self, callback: Callable[[Record], None]) -> None:
        """Call `callback` with every record committed from now on, by any process, within POLL_S."""
        self._callbacks.append(callback)

    def wake(self) -> None:
        """Something was committed here: look at once."""
        self._wake.set()

    async def start(self) -> None:
        page = await self._store.changes("end")
        self._task = asyncio.get_running_loop().create_task(self._run(page.cursor))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _run(self, cursor: str) -> None:
        while True:
            self._wake.clear()  # before reading: what is committed while the journal is read may not be in the page
            try:
                page = await self._store.changes(cursor, limit=PAGE)
            except StrongroomError as error:
                _log.warning("the journal cannot be read, trying again: %s", error)
                await asyncio.sleep(POLL_S)
                continue
            cursor = page.cursor
            for record in page.records:
                for callback in self._callbacks:
                    try:
                        callback(record)
                    except Exception:  # the others, and the records to come, must be told: keys are revoked by them
                        _log.exception("a listener failed on journal record %s", record.id)
            if page.records:
                self._moved.set()
                self._moved = asyncio.Event()
                continue
            try:
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def follow(
        self, tenant: str, after: str | None = "end", *, heartbeat_s: float = 15.0
    ) -> AsyncGenerator[ChangesPage, None]:
        """One tenant's records from a cursor on (None: from the beginning), in commit order, without end.

        A page without records comes at once (it carries the cursor one stands at) and then every `heartbeat_s`.
        Raises InvalidInput for a text that is not a cursor.
        """
        first = True
        while True:
            moved = self._moved
            page = await self._store.changes(after, tenant=tenant, limit=PAGE)
            after = page.cursor
            if page.records or first:
                first = False
                yield page
                continue
            try:
                async with asyncio.timeout(heartbeat_s):
                    await moved.wait()
            except TimeoutError:
                yield page
