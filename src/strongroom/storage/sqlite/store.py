"""The SQLite store: one file, any number of processes, every commit on the disk before it is acknowledged.

`threads` explains which thread runs which call.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

import apsw

from ...cooperative import in_slices
from ...entities import Aggregate, And, Collection, Document, Filter, Op, Or, Query, Where
from ...errors import Gone, InvalidInput, Problem, StrongroomError, Unavailable
from ..group_commit import GroupCommit, Waiting, up_to
from ..journal_rows import record_of
from ..port import (
    MAX_CHANGES_PAGE,
    MAX_TENANTS_PAGE,
    WHOLE_JOURNAL,
    Batch,
    Capabilities,
    ChangesPage,
    Committed,
    Health,
    JournalFilter,
    JournalRow,
    Pack,
    RowsPage,
    SchemaChange,
    past_the_end,
)
from ..sql import RecentRows, canonical, content_size
from .bulk_load import Loader, checkpoint
from .bulk_rows import SqlitePacker
from .dialect import commit_error, translated
from .isolation import Table
from .journal import JournalPage, journal_rows
from .journal_upkeep import DROPPED_AT_ONCE, drop_some, rewrite
from .schema import (
    fit,
    integrity_problems,
    make_or_recognise,
    tenants_of,
    write_snapshot,
)
from .session import Readers, Session
from .threads import Threads
from .writer import PartialWrite, Writer

BUSY_TIMEOUT_S = 5.0
"""How long a commit waits for the lock of another process before it fails with Unavailable."""

MAX_GROUP = 512
MAX_APPLY_S = 0.005
"""A group commit takes MAX_GROUP batches at most, and no more after MAX_APPLY_S, since it blocks the loop."""

_CURSOR = re.compile(r"[0-9]{1,18}")
_END = "end"
_T = TypeVar("_T")
_Waiting = Waiting[Batch, Committed]
_log = logging.getLogger(__name__)

_HEAD = "SELECT seq FROM main.sqlite_sequence WHERE name = '_journal'"


class SqliteStore:
    """The storage port over one SQLite file.

    Operators have two more methods: `integrity` checks the whole file, `snapshot` writes a consistent copy.
    """

    def __init__(self, path: str, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.path = os.path.abspath(path)
        self._busy_timeout_s = busy_timeout_s
        self._session: Session | None = None
        self._threads = Threads()
        self._commits: GroupCommit[Batch, Committed] = GroupCommit(
            self.path, up_to(MAX_GROUP), self._write_group, self._interrupted
        )
        self._closing = False
        self._recent = RecentRows()
        self._checkpointing: asyncio.Future[None] | None = None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("sqlite", multi_process=True, persistent=True, embedded=True, ordered_journal=True)

    # --- Opening and closing ---

    async def open(self) -> None:
        if self._session is not None:
            return
        self._threads = Threads()
        self._recent.clear()
        try:
            await self._awaited(self._threads.write(make_or_recognise, self.path, self._busy_timeout_s))
            self._session = await self._awaited(self._threads.write(self._new_session, ()))
        except BaseException:
            self._threads.stop()
            raise
        self._closing = False

    async def close(self) -> None:
        self._closing = True
        await self._commits.drain()
        await self._checkpointed()
        async with self._commits.writing:  # a prepare may be under way
            session, self._session = self._session, None
            if session is not None:
                await session.finish()
                await self._awaited(self._threads.write(session.close))
            self._threads.stop()

    def _opened(self) -> Session:
        if self._session is None:
            raise Unavailable(f"{self.path}: the store is not open")
        return self._session

    def _new_session(self, collections: Sequence[Collection]) -> Session:
        return Session(self.path, collections, self._busy_timeout_s, self._threads)

    async def _awaited(self, work: Awaitable[_T]) -> _T:
        """The result of the work, with SQLite's errors as Strongroom's."""
        try:
            return await work
        except apsw.Error as error:
            raise translated(error, self.path) from error

    async def prepare(
        self,
        collections: Sequence[Collection],
        *,
        mode: Literal["apply", "plan"] = "apply",
        allow_destructive: bool = False,
    ) -> tuple[SchemaChange, ...]:
        self._opened()
        work = functools.partial(
            fit,
            self.path,
            collections,
            apply=mode == "apply",
            allow_destructive=allow_destructive,
            busy_timeout_s=self._busy_timeout_s,
        )
        if mode == "plan":
            return await self._awaited(self._threads.read(work))
        async with self._commits.writing:
            before = self._opened()
            changes = await self._awaited(self._threads.write(work))
            self._session = await self._awaited(self._threads.write(self._new_session, collections))
        await before.finish()
        await self._awaited(self._threads.write(before.close))
        return changes

    # --- Reading ---

    def _table(self, collection: str, tenant: str | None) -> Table:
        table = self._opened().tables.get(collection)
        if table is None:
            raise InvalidInput(f"{collection}: the store was not prepared for this collection")
        if tenant is None and table.tenant_scoped:
            raise InvalidInput([Problem("tenant", f"is needed: {collection} belongs to tenants")])
        return table

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        session = self._session
        table = session.tables.get(collection) if session is not None else None
        if session is None or table is None or (tenant is None and table.tenant_scoped):
            table = self._table(collection, tenant)  # raises the exact error
            session = self._opened()
        points = session.points
        points.set_tenant(tenant)
        try:
            rows = points.execute(table.by_id, (id,)).fetchall()
        except apsw.Error as error:
            rows = await self._patiently(error, session, table.by_id, (id,), tenant)
        return table.decode(rows[0]) if rows else None

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        table = self._table(collection, tenant)
        session = self._opened()
        if _is_point(query.where, table.point_fields):
            select, values = table.points.find(query)
            points = session.points
            points.set_tenant(tenant)
            try:
                rows = points.execute(select.sql, values).fetchall()
            except apsw.Error as error:
                rows = await self._patiently(error, session, select.sql, values, tenant)
            return [select.decode(row) for row in rows]
        select, values = table.pages.find(query)
        return await in_slices(select.decode, await self._scan(session.scans, select.sql, values, tenant))

    async def tenants(self, after: str | None = None, limit: int = MAX_TENANTS_PAGE) -> list[str]:
        names = [name for name, table in self._opened().tables.items() if table.tenant_scoped]
        return await self._awaited(
            self._threads.read(tenants_of, self.path, self._busy_timeout_s, names, after or "", limit)
        )

    async def now_us(self) -> int:
        return time.time_ns() // 1_000  # a file belongs to one machine, and so does its clock

    async def aggregate(
        self, collection: str, tenant: str | None, aggregates: Sequence[Aggregate], where: Filter | None
    ) -> dict[str, Any]:
        totals, values = self._table(collection, tenant).points.aggregate(aggregates, where)
        return totals.read((await self._scan(self._opened().scans, totals.sql, values, tenant))[0])

    async def changes(
        self, after: str | None, *, tenant: str | None = None, limit: int = MAX_CHANGES_PAGE
    ) -> ChangesPage:
        if after == _END:
            return ChangesPage((), str(await self._head()))
        session = self._opened()
        page = await self._journal_page(
            session.journal if tenant is None else session.scans, JournalFilter(tenant=tenant), after, limit
        )
        if after is not None and page.position < page.floor:
            raise Gone("the records that come after the cursor were dropped")
        records = await in_slices(record_of, page.rows)
        return ChangesPage(tuple(records), page.cursor, content_size(page.rows))

    async def _journal_page(self, readers: Readers, where: JournalFilter, after: str | None, limit: int) -> JournalPage:
        """Rows of the journal after a cursor. InvalidInput for a text that is not a cursor, Gone for one past the
        end."""
        if after is not None and not _CURSOR.fullmatch(after):
            raise InvalidInput([Problem("after", "is not a cursor of this journal")])
        position = int(after or 0)
        sql, values = journal_rows(where, position, limit)
        page = JournalPage.of(await self._scan(readers, sql, values, where.tenant), position, limit)
        if position > page.head:
            raise past_the_end()
        return page

    async def _head(self) -> int:
        """The journal's last sequence."""
        # read again: a prepare may have replaced the session
        rows = await self._scan(self._opened().scans, _HEAD, (), None)
        return rows[0][0] if rows else 0

    async def _scan(
        self, readers: Readers, sql: str, values: Sequence[Any], tenant: str | None
    ) -> list[tuple[Any, ...]]:
        return await self._awaited(readers.rows(sql, values, tenant))

    async def _patiently(
        self, error: apsw.Error, session: Session, sql: str, values: Sequence[Any], tenant: str | None
    ) -> list[tuple[Any, ...]]:
        """Read again on a thread, which waits, if another process had locked the file. Any other error is raised."""
        if isinstance(error, apsw.BusyError):
            return await self._scan(session.scans, sql, values, tenant)
        raise translated(error, self.path) from error

    # --- Writing ---

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        if self._closing or self._session is None:
            refused: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
            refused.set_exception(Unavailable(f"{self.path}: the store is not open"))
            return refused
        return self._commits.submit(batch)

    def _interrupted(self, error: BaseException) -> str:
        self._closing = True
        return f"{self.path}: writing ended with {type(error).__name__}: open the store again"

    async def _write_group(self, group: list[_Waiting]) -> list[_Waiting]:
        """Write as many of the batches as MAX_APPLY_S allows in one transaction. Returns the others."""
        session = self._opened()
        answers: list[Committed | Exception] = []
        committing = False
        try:
            writer = await self._begin(session)
            try:
                self._apply(writer, group, answers)
            except PartialWrite as partial:
                # One batch is written in part, and it cannot be taken back alone: all the others begin again.
                writer.roll_back()
                group.pop(len(answers)).answer(partial.reason)
                return group
            committing = writer.has_changes
            if committing:
                await self._threads.commit(writer.commit)
                self._recent.committed(writer.rows)
            else:
                writer.commit()
        except apsw.Error as error:
            # A failed precondition fails, too: it was evaluated against changes that were not committed.
            await self._threads.write(session.drop_writer)
            if committing:
                answers = [self._failed_commit(error, answer) for answer in answers]
            else:
                answers = [translated(error, self.path) for _ in group]
        for waiting, answer in zip(group, answers, strict=False):
            waiting.answer(answer)
        return group[len(answers) :]

    def _failed_commit(self, error: apsw.Error, answer: Committed | Exception) -> StrongroomError:
        """The error for a batch whose transaction failed at its COMMIT. `answer` is its result before the COMMIT."""
        return commit_error(error, self.path) if isinstance(answer, Committed) else translated(error, self.path)

    async def _begin(self, session: Session) -> Writer:
        writer = session.writer
        if writer is not None:
            try:
                writer.begin(0)
                return writer
            except apsw.BusyError:
                pass  # another process is writing: a thread waits for it
        return await self._threads.write(self._begin_patiently, session)

    def _begin_patiently(self, session: Session) -> Writer:
        writer = session.writer or session.open_writer()
        writer.begin(self._busy_timeout_s)
        return writer

    def _apply(self, writer: Writer, group: Sequence[_Waiting], answers: list[Committed | Exception]) -> None:
        until = time.perf_counter() + MAX_APPLY_S
        for batch, _ in group:
            try:
                answers.append(writer.apply(batch))
            except (apsw.Error, PartialWrite):
                raise
            except Exception as error:
                answers.append(error)
            if time.perf_counter() > until:
                return

    # --- Loading ---

    def packer(self) -> SqlitePacker:
        return SqlitePacker([table.codec.collection for table in self._opened().tables.values()])

    async def load(self, packs: AsyncIterable[Pack], now_us: int, *, rebuild: bool = False) -> float:
        held = packs if rebuild else _given([pack async for pack in packs])
        async with self._commits.writing:
            loader = Loader(self.path, self._opened().tables)
            try:
                await self._awaited(self._threads.write(loader.begin, self._busy_timeout_s, now_us, rebuild))
                began = time.perf_counter()
                async for pack in held:
                    await self._awaited(self._threads.write(loader.add, pack))
                await self._awaited(self._threads.write(loader.build))
                try:
                    await self._threads.write(loader.commit)
                except apsw.Error as error:
                    raise commit_error(error, self.path) from error
            finally:
                await asyncio.shield(self._threads.write(loader.close))  # after the work that its thread has begun
        locked_s = time.perf_counter() - began
        await self._checkpointed()
        self._checkpointing = asyncio.ensure_future(self._threads.read(checkpoint, self.path, self._busy_timeout_s))
        return locked_s

    async def _checkpointed(self) -> None:
        """Wait for the checkpoint of the last load or removal, which is durable without it."""
        checkpointing, self._checkpointing = self._checkpointing, None
        if checkpointing is not None:
            try:
                await checkpointing
            except apsw.Error as error:
                _log.warning("%s: a checkpoint failed: %s", self.path, error)

    async def rows(
        self, after: str | None = None, where: JournalFilter = WHOLE_JOURNAL, limit: int = MAX_CHANGES_PAGE
    ) -> RowsPage:
        session = self._opened()
        if where == WHOLE_JOURNAL and after is not None and _CURSOR.fullmatch(after):
            recent = self._recent.after(int(after), min(limit, MAX_CHANGES_PAGE))
            if recent:
                return RowsPage(recent, str(recent[-1][0]))
        readers = session.audits if where.tenant is None else session.scans
        page = await self._journal_page(readers, where, after, limit)
        return RowsPage(await in_slices(canonical, page.rows), page.cursor)

    async def rewrite(self, rows: Sequence[JournalRow]) -> int:
        self._opened()
        async with self._commits.writing:
            found = await self._awaited(self._threads.write(rewrite, self.path, self._busy_timeout_s, rows))
            self._recent.clear()
        await self._emptied_log()
        return found

    async def drop(self, tenant: str | None, through_sequence: int) -> int:
        self._opened()
        total = 0
        while True:
            async with self._commits.writing:
                self._opened()
                self._recent.clear()
                removed = await self._awaited(
                    self._threads.write(drop_some, self.path, self._busy_timeout_s, tenant, through_sequence)
                )
            total += removed
            if removed < DROPPED_AT_ONCE:
                break
        await self._emptied_log()
        return total

    async def _emptied_log(self) -> None:
        """Empty the write-ahead log after content was removed, unless a reader needs it: then it is emptied later."""
        await self._checkpointed()
        self._checkpointing = asyncio.ensure_future(
            self._threads.read(functools.partial(checkpoint, self.path, self._busy_timeout_s, truncate=True))
        )
        await self._checkpointed()

    # --- For operators ---

    def on_change(self, callback: Callable[[], None]) -> None:
        """SQLite does not notify a process of the commits of another process."""

    async def check(self) -> Health:
        began = time.perf_counter()
        queued = self._commits.queued
        details: dict[str, Any] = {"path": self.path, "sqlite": apsw.sqlite_lib_version(), "queued": queued}
        try:
            details["journal"] = await self._head()
        except StrongroomError as error:
            return Health(False, time.perf_counter() - began, {**details, "problem": error.message})
        latency_s = time.perf_counter() - began
        for name, suffix in (("file_bytes", ""), ("wal_bytes", "-wal")):
            with suppress(OSError):
                details[name] = os.stat(self.path + suffix).st_size
        return Health(True, latency_s, details)

    async def integrity(self) -> list[str]:
        """The problems of the file, a sentence each; an empty list if it is sound. Reads the whole file."""
        self._opened()
        return await self._awaited(self._threads.read(integrity_problems, self.path, self._busy_timeout_s))

    async def snapshot(self, path: str) -> None:
        """Write a consistent copy of the store to a new file. The store can be written to meanwhile."""
        self._opened()
        await self._awaited(self._threads.read(write_snapshot, self.path, self._busy_timeout_s, path))


async def _given(packs: Sequence[Pack]) -> AsyncIterator[Pack]:
    for pack in packs:
        yield pack


def _is_point(where: Filter | None, point_fields: frozenset[str]) -> bool:
    """Whether a filter selects only a few documents, by their key or a unique index."""
    if isinstance(where, Where):
        return where.field in point_fields and (where.op is Op.EQ or where.op is Op.IN) and where.value is not None
    if isinstance(where, Or):  # each part is looked up by its own index
        return all(_is_point(part, point_fields) for part in where.filters)
    return isinstance(where, And) and any(_is_point(part, point_fields) for part in where.filters)
