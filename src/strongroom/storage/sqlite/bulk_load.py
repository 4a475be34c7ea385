"""Bulk load of new documents: one statement for many rows, in one large transaction.

A transaction writes each page once, however many rows it adds to the page. New keys fall on random pages of most
indexes: a small transaction writes a page or two for each key and index, a large one writes a page for many keys. The
page cache must hold the pages of a transaction. Where most documents are new, it is faster still to rebuild the indexes
at the end, each from its sorted entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from typing import Any

import apsw

from ...context import utc_from_us
from ...errors import AlreadyExists
from .. import tagged_json as _values
from ..port import Pack
from ..sql import listed, quoted
from .bulk_rows import JOURNAL, Part
from .isolation import Table
from .schema import FIND_TIMES, LockWait, connect

CACHE_KIB = 64 * 1024
"""The page cache of a load: enough for the pages of some 500,000 new keys. With more, SQLite spills pages to the log
while the load waits for the next keys."""
TRUNCATE_WAIT_S = 0.05
"""How long a checkpoint that empties the log waits for readers of older pages."""
ROWS = 32
"""Rows in one statement. SQLite looks up the journal's last number, and gives up the interpreter's lock, once for each
statement."""
_TAKEN = "{}: a document with the same id or unique value exists already"


class Loader:
    """One load: `begin`, `add` for each pack, `build`, `commit`, and always `close`, which rolls back what is not
    committed. Raises apsw.Error. Used by one thread at a time."""

    _connection: apsw.Connection

    def __init__(self, path: str, tables: Mapping[str, Table]) -> None:
        self._path = path
        self._open = False
        self._tables = frozenset(name for name, table in tables.items() if not table.tenant_scoped)
        self._version = 0
        self._now = ""
        self._rebuild = False
        self._dropped: dict[str, list[str]] = {}
        self._texts: dict[tuple[Any, ...], str] = {}

    def begin(self, busy_timeout_s: float, now_us: int, rebuild: bool) -> None:
        """Take the file's write lock."""
        self._rebuild = rebuild
        self._connection = connection = connect(self._path, busy_timeout_s)
        self._open = True
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}").fetchall()
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()  # `checkpoint` does it, when others may write
        connection.execute("BEGIN IMMEDIATE").fetchall()
        rows: list[tuple[Any, ...]] = connection.execute(
            "SELECT value FROM _meta WHERE name = 'deleted_version'"
        ).fetchall()
        deleted = rows[0][0]
        self._version = max(now_us, deleted + 1)  # greater than any deleted version, as for a batch
        self._now = _values.time_to_text(utc_from_us(now_us))

    def add(self, pack: Pack) -> None:
        for part in pack.parts:
            if self._rebuild and part.table in self._tables and part.table not in self._dropped:
                self._dropped[part.table] = self._without_indexes(part.table)
            try:
                self._insert(part)
            except apsw.ConstraintError:
                raise AlreadyExists(_TAKEN.format(part.table)) from None

    def _insert(self, part: Part) -> None:
        same, width = (self._version, self._now, *part.same.values()), len(part.columns)
        step = ROWS * width
        whole = len(part.values) // step * step

        def bound(begin: int, end: int, step: int) -> Iterator[tuple[Any, ...]]:
            return ((*same, *part.values[at : at + step]) for at in range(begin, end, step))

        self._connection.executemany(self._text(part, ROWS), bound(0, whole, step))
        self._connection.executemany(self._text(part, 1), bound(whole, len(part.values), width))

    def _text(self, part: Part, rows: int) -> str:
        """The statement that inserts this many rows of a part."""
        key = (part.table, tuple(part.same), part.columns, rows)
        text = self._texts.get(key)
        if text is None:
            # values that all rows share are bound once: ?1 is the version, ?2 the time
            same = {"version": "?1", **{name: f"?{number}" for number, name in enumerate(part.same, 3)}}
            if part.table != JOURNAL:
                same = {"created_at": "?2", "updated_at": "?2", **same}
            names = [*(name for name in same if name not in part.columns), *part.columns]
            first, lines = len(part.same) + 3, []
            for row in range(rows):
                own = {name: f"?{first + row * len(part.columns) + at}" for at, name in enumerate(part.columns)}
                cells = {**same, **{name: _cell(part.table, name, value) for name, value in own.items()}}
                lines.append(f"({', '.join(cells[name] for name in names)})")
            # OR FAIL: without it SQLite copies each page that it writes, to undo one statement; a load is undone whole
            text = f"INSERT OR FAIL INTO {quoted(part.table)} ({listed(names)}) VALUES {', '.join(lines)}"
            self._texts[key] = text
        return text

    def _without_indexes(self, table: str) -> list[str]:
        """Drop a table's indexes, except the primary key. Returns the statements that create them again."""
        sql = "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL"
        found: list[tuple[Any, ...]] = self._connection.execute(sql, (table,)).fetchall()
        for name, _ in found:
            self._connection.execute(f"DROP INDEX {quoted(name)}").fetchall()
        return [made for _, made in found]

    def build(self) -> None:
        """Build the indexes that were dropped. AlreadyExists if the documents break a unique one."""
        for table, indexes in self._dropped.items():
            for made in indexes:
                try:
                    self._connection.execute(made).fetchall()
                except apsw.ConstraintError:
                    raise AlreadyExists(_TAKEN.format(table)) from None

    def commit(self) -> None:
        """Returns when everything is on the disk."""
        self._connection.execute(FIND_TIMES).fetchall()
        self._connection.execute("COMMIT").fetchall()

    def close(self) -> None:
        if not self._open:
            return
        with suppress(apsw.Error):  # SQLite rolls back by itself after some errors
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK").fetchall()
        self._connection.close()
        self._open = False


def _cell(table: str, name: str, value: str) -> str:
    if table == JOURNAL:
        return f"CAST({value} AS TEXT)" if name == "after" else value  # UTF-8 bytes, or text
    return f"ifnull({value}, ?2)" if name in ("created_at", "updated_at") else value


def checkpoint(path: str, busy_timeout_s: float, *, truncate: bool = False) -> None:
    """Checkpoint the write-ahead log, as far as no reader needs it. Others can write meanwhile. Raises apsw.Error.

    `truncate` also empties the log, so that nothing of older pages is left in it, if that needs no longer wait.
    """
    with closing(connect(path, busy_timeout_s)) as connection:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        if truncate:
            connection.set_busy_handler(LockWait(TRUNCATE_WAIT_S))  # writers wait meanwhile
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
