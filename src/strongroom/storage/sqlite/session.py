"""The connections of an open SQLite store: some for scans, one for writes, one for reads of single documents."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import apsw

from ...entities import Collection
from ..sql import Codec
from .dialect import SqliteDialect
from .isolation import Guarded, Table
from .threads import MAX_READERS, Threads
from .writer import OWN_TEXTS, Writer

POINT_TIMEOUT_S = 0.02
"""How long the loop's thread waits for a process that has locked the whole file. After that a reader thread waits."""


MAX_AUDITS = 2
"""Reads of the whole journal's rows that run at the same time. Fewer than MAX_READERS, so that scans find a thread."""


class Readers:
    """A pool of connections for scans. A connection is made when it is first needed, and serves one scan at a time."""

    def __init__(self, threads: Threads, connect: Callable[[], Guarded], most: int) -> None:
        self._threads = threads
        self._connect = connect
        self._most = most
        self._slots = asyncio.Semaphore(most)
        self._free: list[Guarded] = []

    async def rows(self, sql: str, values: Sequence[Any], tenant: str | None) -> list[tuple[Any, ...]]:
        """The rows of a statement that computes all of them in its first step, on a thread. Raises apsw.Error."""
        await self._slots.acquire()
        step = self._threads.read(self._first_step, self._free.pop() if self._free else None, sql, values, tenant)
        try:
            guarded = await asyncio.shield(step)
        except asyncio.CancelledError:
            step.add_done_callback(self._abandon)  # the thread still uses the connection
            raise
        except BaseException:
            self._slots.release()
            raise
        try:
            rows = guarded.cursor.fetchall()
        except BaseException:
            guarded.close()
            raise
        else:
            guarded.set_tenant(None)
            self._free.append(guarded)
        finally:
            self._slots.release()
        return rows

    def _first_step(self, free: Guarded | None, sql: str, values: Sequence[Any], tenant: str | None) -> Guarded:
        guarded = free or self._connect()
        try:
            guarded.set_tenant(tenant)
            guarded.execute(sql, values)
        except BaseException:
            guarded.close()  # the next scan begins on a new connection
            raise
        return guarded

    def _abandon(self, step: asyncio.Future[Guarded]) -> None:
        self._slots.release()
        if not step.cancelled() and step.exception() is None:
            step.result().close()

    async def finish(self) -> None:
        """Wait for all scans, running and waiting. No scan can begin after that."""
        for _ in range(self._most):
            await self._slots.acquire()

    def close(self) -> None:
        for guarded in self._free:
            guarded.close()


class Session:
    """The connections for one set of declarations. `prepare` makes a new session."""

    def __init__(self, path: str, collections: Sequence[Collection], busy_timeout_s: float, threads: Threads) -> None:
        dialect = SqliteDialect()
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self.tables: Mapping[str, Table] = {c.name: Table(Codec(c, dialect)) for c in collections}
        self.points = Guarded(path, self.tables.values(), POINT_TIMEOUT_S)
        self.scans = Readers(threads, lambda: Guarded(path, self.tables.values(), busy_timeout_s), MAX_READERS)
        self.journal = Readers(threads, lambda: Guarded(path, (), busy_timeout_s, whole_journal=True), 1)
        # Its own connections: a search of a large journal must not keep the change feed waiting.
        self.audits = Readers(threads, lambda: Guarded(path, (), busy_timeout_s, whole_journal=True), MAX_AUDITS)
        self.writer: Writer | None = None

    def open_writer(self) -> Writer:
        guarded = Guarded(self._path, self.tables.values(), self._busy_timeout_s, writes=True, own_texts=OWN_TEXTS)
        self.writer = Writer(self._path, guarded, self.tables)
        return self.writer

    def drop_writer(self) -> None:
        """Roll back and close the writing connection. After a disk error its cached pages cannot be trusted, and a
        failed fsync must not be retried on it."""
        writer, self.writer = self.writer, None
        if writer is not None:
            with suppress(apsw.Error):  # the first error is reported
                writer.roll_back()
            writer.close()

    async def finish(self) -> None:
        """Wait for all scans. The caller makes sure that no other work is running."""
        await self.scans.finish()
        await self.journal.finish()
        await self.audits.finish()

    def close(self) -> None:
        """Close every connection. The last connection to the file checkpoints the write-ahead log."""
        self.scans.close()
        self.journal.close()
        self.audits.close()
        self.points.close()
        if self.writer is not None:
            self.writer.close()
