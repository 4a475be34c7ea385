"""Many new documents into SQLite at once: rows made ready beforehand, one statement for many, one large transaction.

A transaction writes each page that it touches once, however many rows came to be on it. New keys fall anywhere in most
of their indexes, so that small transactions write a page or two for each key and index; a large one writes a page for
many keys. The page cache must hold what a transaction touches. Where most documents are new, it is faster still to
build the indexes anew at the end, each from its sorted entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import apsw

from ..context import utc_from_us
from ..entity import Collection, FieldType
from ..errors import AlreadyExists, InvalidInput, TooLarge
from . import _values
from ._sql import JOURNAL_COLUMNS, Codec, line, listed, quoted
from ._sqlite_dialect import SqliteDialect
from ._sqlite_guard import Table
from ._sqlite_schema import connect
from .port import MAX_DOCUMENT_BYTES, Append, Create, Pack, document_size

CACHE_KIB = 128 * 1024
"""What a load keeps of the file in memory."""
CHECKPOINT_PAGES = 32_768
"""The log is taken over into the file when it has so many pages (128 MiB): a page that several transactions wrote
meanwhile is copied once."""
_BYTES_PER_CHARACTER = 8
_VARIABLE = frozenset({FieldType.TEXT, FieldType.BYTES, FieldType.LIST, FieldType.MAP})
_TAKEN = "{}: a document with the same id or unique value exists already"
_VERSION = JOURNAL_COLUMNS[1:].index("version")


class SqlitePacker:
    """Documents as the rows of their tables: (id, created_at or None, updated_at or None, *fields)."""

    def __init__(self, collections: Sequence[Collection]) -> None:
        self._collections = tuple(collections)
        dialect = SqliteDialect()
        self._codecs = {c.name: Codec(c, dialect) for c in collections if not c.tenant_scoped}
        self._variable = {
            name: [i for i, spec in enumerate(codec.collection.fields.values()) if spec.type in _VARIABLE]
            for name, codec in self._codecs.items()
        }

    def __reduce__(self) -> tuple[type[SqlitePacker], tuple[list[Collection]]]:
        return SqlitePacker, ([replace(c, fields=dict(c.fields)) for c in self._collections],)

    def pack(self, operations: Sequence[Create | Append]) -> Pack:
        rows: dict[str, list[tuple[Any, ...]]] = {}
        lines = []
        for operation in operations:
            if isinstance(operation, Append):
                lines.append(_without_version(operation))
                continue
            codec = self._codecs.get(operation.collection)
            if codec is None:
                raise InvalidInput(f"{operation.collection}: is no global collection that the store was prepared for")
            row = codec.encode(operation.document)
            length = 0
            for number in self._variable[operation.collection]:
                if value := row[number]:
                    length += len(value)
            if length * _BYTES_PER_CHARACTER > MAX_DOCUMENT_BYTES // 2:
                _check_size(operation, codec)
            times = (_text(operation.created_at), _text(operation.updated_at))
            rows.setdefault(operation.collection, []).append((operation.id, *times, *row))
        return Pack(sum(map(len, rows.values())), rows, lines)


def _without_version(operation: Append) -> tuple[Any, ...]:
    found = line(operation.record, 0)
    return (*found[:_VERSION], *found[_VERSION + 1 :])


def _text(moment: Any) -> str | None:
    return None if moment is None else _values.time_to_text(moment)


def _check_size(operation: Create, codec: Codec) -> None:
    size = document_size({name: operation.document[name] for name in codec.fields})
    if size > MAX_DOCUMENT_BYTES:
        name = f"{operation.collection}/{operation.id}"
        raise TooLarge(f"{name}: found {size} bytes in a document, expected at most {MAX_DOCUMENT_BYTES}")


class Loader:
    """One load: `begin`, `add` for each pack, `commit`; `close` in any case, which takes back what is not committed.
    Raises apsw.Error. Used by one thread at a time."""

    _connection: apsw.Connection

    def __init__(self, path: str, tables: Mapping[str, Table]) -> None:
        self._path = path
        self._open = False
        self._columns = {name: table.codec.fields for name, table in tables.items() if not table.tenant_scoped}
        self._version = 0
        self._now = ""
        self._rebuild = False
        self._dropped: dict[str, list[str]] = {}

    def begin(self, busy_timeout_s: float, now_us: int, rebuild: bool) -> None:
        """Take the file's write lock."""
        self._rebuild = rebuild
        self._connection = connection = connect(self._path, busy_timeout_s)
        self._open = True
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}").fetchall()
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}").fetchall()
        connection.execute("BEGIN IMMEDIATE").fetchall()
        rows: list[tuple[Any, ...]] = connection.execute(
            "SELECT value FROM _meta WHERE name = 'deleted_version'"
        ).fetchall()
        deleted = rows[0][0]
        self._version = max(now_us, deleted + 1)  # as a batch's: greater than any that was deleted
        self._now = _values.time_to_text(utc_from_us(now_us))

    def add(self, pack: Pack) -> None:
        connection = self._connection
        for name, rows in pack.rows.items():
            if self._rebuild and name not in self._dropped:
                self._dropped[name] = self._without_indexes(name)
            names = ("id", "created_at", "updated_at", *self._columns[name], "version")
            marks = f"?, ifnull(?, '{self._now}'), ifnull(?, '{self._now}'), {'?, ' * len(self._columns[name])}"
            try:
                connection.executemany(
                    f"INSERT INTO {quoted(name)} ({listed(names)}) VALUES ({marks}{self._version})", rows
                )
            except apsw.ConstraintError:
                raise AlreadyExists(_TAKEN.format(name)) from None
        names = (*(name for name in JOURNAL_COLUMNS[1:] if name != "version"), "version")
        marks = "?, " * (len(names) - 1)
        connection.executemany(f"INSERT INTO _journal ({listed(names)}) VALUES ({marks}{self._version})", pack.lines)

    def _without_indexes(self, table: str) -> list[str]:
        """Drop a table's indexes; the statements that make them again. (The primary key stays.)"""
        sql = "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL"
        found: list[tuple[Any, ...]] = self._connection.execute(sql, (table,)).fetchall()
        for name, _ in found:
            self._connection.execute(f"DROP INDEX {quoted(name)}").fetchall()
        return [made for _, made in found]

    def commit(self) -> None:
        """Returns when everything is on the disk."""
        for table, indexes in self._dropped.items():
            for made in indexes:
                try:
                    self._connection.execute(made).fetchall()
                except apsw.ConstraintError:
                    raise AlreadyExists(_TAKEN.format(table)) from None
        self._connection.execute("COMMIT").fetchall()

    def close(self) -> None:
        if not self._open:
            return
        with suppress(apsw.Error):  # after some errors SQLite has done it already
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK").fetchall()
        self._connection.close()
        self._open = False
