"""The change feed: one task follows the journal for the caches of this process, and wakes the followers of tenants.

A follower has no buffer: it reads the journal itself, from its own cursor. So a slow follower loses nothing and costs
no memory, and a follower that reconnects with its last cursor continues there.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress

from ..entities import MAX_PAGE_BYTES
from ..errors import Gone, StrongroomError
from ..retry_log import RetryLog
from ..storage.port import ChangesPage, Record, Store, document_size
from .records import is_redacted

POLL_S = 0.25
"""How long a change of another process may stay unseen; a change of this process is seen at once."""
PAGE = 100
"""Records that are read at once, at most: the next ones may each be of the largest size."""
FIRST_PAGE = 20
"""Records that are read at once while their size is not known: each may hold two documents."""
MAX_OWN = 512
"""Own records that wait to be told, at most: a group commit has as many, and a slow read must not let them pile up."""
READ_TIMEOUT_S = 5.0
"""A read of the journal that takes longer is given up: a half-open connection would stop the feed for ever."""
MAX_PAUSE_S = 5.0
"""The longest pause after unexpected errors; each pause is twice the one before."""
MAX_FAILURES = 10
_log = logging.getLogger(__name__)


class ChangeFeed:
    """The journal as it grows. `start` before use; `close` after."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._callbacks: list[Callable[[Record], None]] = []
        self._resets: list[Callable[[], None]] = []
        self._cursor: str | None = None
        self._limit = FIRST_PAGE
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._own: deque[Record] = deque()
        self._read_at = 0.0
        self.current_at = 0.0
        """The time, by `time.monotonic`, up to which every change in the store has been told to the callbacks."""

    @property
    def behind_s(self) -> float:
        """For how long a change may have stayed unseen: normally less than POLL_S and the time of a read."""
        return time.monotonic() - self.current_at

    def on_record(self, callback: Callable[[Record], None]) -> None:
        """Call `callback` with every record committed from now on, by any process, within POLL_S."""
        self._callbacks.append(callback)

    def on_reset(self, callback: Callable[[], None]) -> None:
        """Call `callback` when records may have been missed (an older copy of the store was put back): everything that
        was derived from earlier records, or read from the store, must be dropped."""
        self._resets.append(callback)

    def wake(self) -> None:
        """Look at once: something was committed, here or, if the store reports it, by another process."""
        self._wake.set()

    def committed(self, records: Sequence[Record]) -> None:
        """Records that this process has just committed to an ordered journal. If they come directly after the feed's
        cursor, nothing was committed in between, and they are told without a read of the journal."""
        if len(self._own) + len(records) <= MAX_OWN:
            self._own.extend(records)
        else:
            self._own.clear()  # the next record leaves a gap, so the journal is read

    async def start(self) -> None:
        began = time.monotonic()
        page = await self._store.changes("end")
        self.current_at = began
        self._store.on_change(self.wake)
        self._cursor = page.cursor
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _run(self) -> None:
        failures = 0
        told = RetryLog(_log, "the journal cannot be read")
        while True:
            self._wake.clear()  # before reading: the page may lack a commit that is made while the journal is read
            if self._own and self._tell_own() and time.monotonic() - self._read_at < POLL_S:
                await self._rest()
                continue
            try:
                more = await self._read()
            except Gone as error:
                _log.error("%s; what is kept in memory is dropped, and the feed begins anew", error)
                self._cursor = None
                continue
            except (StrongroomError, TimeoutError) as error:
                told.failed(str(error) or type(error).__name__)
                await asyncio.sleep(POLL_S)
                continue
            except Exception:  # the feed must go on after any error: later records revoke keys
                _log.exception("the journal cannot be followed, because of an unexpected error; trying again")
                await asyncio.sleep(min(MAX_PAUSE_S, POLL_S * 2**failures) * random.uniform(0.5, 1))  # noqa: S311
                failures = min(failures + 1, MAX_FAILURES)
                continue
            failures = 0
            told.succeeded()
            self._read_at = time.monotonic()
            if not more:
                await self._rest()

    async def _rest(self) -> None:
        """Wait until something was committed here, for POLL_S after the last read at most."""
        if self._wake.is_set():
            await asyncio.sleep(0)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._read_at + POLL_S - time.monotonic()):
                await self._wake.wait()

    def _tell_own(self) -> bool:
        """Tell the own records that come directly after the cursor; False if there is a gap: then the journal must be
        read."""
        if self._cursor is None:
            return False
        own, position = self._own, int(self._cursor)
        in_order = True
        while own and in_order:
            record = own.popleft()
            if record.sequence == position + 1:
                self._tell(self._callbacks, record)
                position += 1
            elif record.sequence > position:  # another process has committed in between; else a read has found it
                own.clear()
                in_order = False
        if self._cursor != (cursor := str(position)):
            self._cursor = cursor
            self._move()
        return in_order

    def _move(self) -> None:
        """Wake those who follow a tenant."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def _read(self) -> bool:
        """Read one page and tell its records; whether there may be more at once."""
        began = time.monotonic()
        if self._cursor is None:
            await self._begin_anew(began)
            return True
        async with asyncio.timeout(READ_TIMEOUT_S):
            page = await self._store.changes(self._cursor, limit=self._limit)
        if any(map(is_redacted, page.records)):  # of what document they were is not known any more
            self._tell(self._resets)
        for record in page.records:
            self._tell(self._callbacks, record)
        self._cursor = page.cursor
        if len(page.records) < self._limit:  # after a full page there may be more
            self.current_at = began
        self._limit = next_limit(self._limit, page)
        if page.records:
            self._move()
        return bool(page.records)

    async def _begin_anew(self, began: float) -> None:
        """Continue at the present end. The records in between are not known, so everything that was kept is dropped."""
        async with asyncio.timeout(READ_TIMEOUT_S):
            page = await self._store.changes("end")
        self._tell(self._resets)
        self._cursor, self.current_at = page.cursor, began
        self._move()  # the followers of tenants must check their own cursors

    @staticmethod
    def _tell(callbacks: Sequence[Callable[..., None]], *arguments: Record) -> None:
        for callback in callbacks:
            try:
                callback(*arguments)
            except Exception:  # the other listeners, and later records, must be told: they revoke keys
                _log.exception("a listener failed on journal record %s", arguments[0].id if arguments else "(a reset)")

    async def follow(
        self, tenant: str, after: str | None = "end", *, heartbeat_s: float = 15.0
    ) -> AsyncGenerator[ChangesPage, None]:
        """One tenant's records from a cursor on (None: from the beginning), in commit order, without end.

        A page without records comes at once (it carries the present cursor) and then every `heartbeat_s`.
        Raises InvalidInput for a text that is not a cursor; Gone, at any time, once records after the cursor are lost.
        """
        first = True
        limit = FIRST_PAGE
        while True:
            moved = self._moved
            page = await self._store.changes(after, tenant=tenant, limit=limit)
            after = page.cursor
            limit = next_limit(limit, page)
            if page.records or first:
                first = False
                yield page
                continue
            try:
                async with asyncio.timeout(heartbeat_s):
                    await moved.wait()
            except TimeoutError:
                yield page


def next_limit(limit: int, page: ChangesPage) -> int:
    """How many records to read at once after this page, so that a page has about MAX_PAGE_BYTES at most."""
    if 2 * len(page.records) < limit:
        return limit
    size = page.size
    if size is None:
        size = sum(document_size(part) for one in page.records for part in (one.before, one.after) if part is not None)
    fitting = MAX_PAGE_BYTES * len(page.records) // max(size, 1)
    return max(1, min(2 * limit, fitting, PAGE))
