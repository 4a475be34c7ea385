"""Creates and recognises the SQLite file, and fits its tables to the declarations.

A collection is a table of its name. Names of Strongroom's own tables begin with an underscore, which no collection's
name does: `_journal`, `_floors` (the greatest dropped sequence of each tenant), `_times` (of the journal's records),
`_fields` (the declared type of each column, since three types look alike as text) and `_meta`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import apsw
import sqlalchemy as sa
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable

from ...entities import Collection, FieldSpec, FieldType, Index
from ...errors import SchemaError, StoreError, Unavailable
from ..port import ChangeKind, SchemaChange
from ..sql import (
    describe,
    describe_field,
    index_columns,
    index_name,
    listed,
    quoted,
)
from .dialect import ENGINE, SqliteDialect, translated

APPLICATION_ID = int.from_bytes(b"SROM", "big")
LAYOUT = 2
"""The version of the tables below, kept in PRAGMA user_version. An older file is upgraded when it is opened."""

UPGRADE_WAIT_S = 300.0
"""How long an opener waits for another process that upgrades the file."""

LOCK_POLL_S = 0.002
"""The pause between two tries of another process's lock. A try costs about 10 microseconds of processor time."""

MAX_WAL_BYTES = 64_000_000
"""The size in bytes to which SQLite truncates the write-ahead log after a checkpoint."""

BLOCK = 1_024
"""Sequences whose records share a row of `_times`. A search by time reads up to two blocks too many."""

_UPSERT_TIMES = """ON CONFLICT (block) DO UPDATE
SET first_us = min(first_us, excluded.first_us), last_us = max(last_us, excluded.last_us), through = excluded.through
"""
ADD_TIMES = f"INSERT INTO main._times VALUES (?, ?, ?, ?) {_UPSERT_TIMES}"
"""Notes the block of some records, their earliest and latest time, and the last one's sequence."""
FIND_TIMES = f"""
INSERT INTO main._times SELECT sequence / {BLOCK}, min(at_us), max(at_us), max(sequence) FROM main._journal
WHERE sequence > ifnull((SELECT through FROM main._times ORDER BY block DESC LIMIT 1), 0) GROUP BY 1
{_UPSERT_TIMES}"""
"""Notes the times of all records whose times are not noted, those that an earlier version appended too."""

_MAKE_2 = """
CREATE TABLE _floors (tenant_id TEXT UNIQUE, sequence INTEGER NOT NULL) STRICT;
CREATE INDEX "_journal.index.actor" ON _journal (actor);
CREATE INDEX "_journal.index.action" ON _journal ("action");
CREATE INDEX "_journal.index.collection" ON _journal (collection);
CREATE INDEX "_journal.index.entity_id" ON _journal (entity_id);
CREATE INDEX "_journal.index.request_id" ON _journal (request_id);
CREATE TABLE _times (
    block INTEGER PRIMARY KEY, first_us INTEGER NOT NULL, last_us INTEGER NOT NULL, through INTEGER NOT NULL
) STRICT;
"""
"""What layout 2 added. The order of the records' times is not quite that of their sequences, so an index of the times
could not give a page in the order of the sequences without sorting all that it finds. `_times` has of each block of
records the earliest and the latest time, and the last sequence of which that is true."""
_MAKE = f"""
CREATE TABLE _journal (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    tenant_id TEXT,
    at_us INTEGER NOT NULL,
    at TEXT GENERATED ALWAYS AS (
        strftime('%Y-%m-%dT%H:%M:%S', at_us / 1000000, 'unixepoch') || printf('.%06dZ', at_us % 1000000)
    ) VIRTUAL,
    actor TEXT NOT NULL,
    request_id TEXT NOT NULL,
    "action" TEXT NOT NULL,
    collection TEXT NOT NULL,
    entity_id TEXT NOT NULL,
    version INTEGER,
    "before" TEXT,
    "after" TEXT,
    salt BLOB NOT NULL DEFAULT X'',
    claims TEXT,
    rules TEXT
) STRICT;
CREATE INDEX "_journal.index.tenant_id" ON _journal (tenant_id);
CREATE TABLE _fields (
    collection TEXT NOT NULL,
    name TEXT NOT NULL,
    type TEXT NOT NULL,
    PRIMARY KEY (collection, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE _meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO _meta VALUES ('deleted_version', 0);
{_MAKE_2}
"""
_FROM_LAYOUT_1 = f"""
ALTER TABLE _journal ADD COLUMN salt BLOB NOT NULL DEFAULT X'';
ALTER TABLE _journal ADD COLUMN claims TEXT;
ALTER TABLE _journal ADD COLUMN rules TEXT;
{_MAKE_2}
{FIND_TIMES};
"""

_CACHED_STATEMENTS = 300
_DIALECT = SqliteDialect()
_REBUILT = "_rebuilt"


# --- The file -------------------------------------------------------------------------------------------------


class LockWait:
    """A busy handler: it tries a lock that another process holds every LOCK_POLL_S, for at most `timeout_s`.

    SQLite's own handler soon sleeps 100 ms between two tries: about 55 tries in 5 s. A process that commits without a
    pause leaves the lock free for well under a millisecond between two transactions, and those tries miss it. Of six
    such processes one waited 2.3 s; on a busy machine some waited in vain.
    """

    __slots__ = ("_until", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._until = 0.0

    def __call__(self, tries: int) -> bool:
        now = time.monotonic()
        if tries == 0:
            self._until = now + self.timeout_s
        if now >= self._until:
            return False
        # Random, so that two waiters do not keep in step.
        time.sleep(LOCK_POLL_S * random.uniform(0.5, 1.5))  # noqa: S311
        return True


def connect(path: str, busy_timeout_s: float) -> apsw.Connection:
    """A connection, with what every connection needs. Raises apsw.Error."""
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    connection = apsw.Connection(path, flags=flags, statementcachesize=_CACHED_STATEMENTS)
    try:
        connection.set_busy_handler(LockWait(busy_timeout_s))
        # or else SQLite reads "name" as the text 'name' after another process has dropped that column
        connection.config(apsw.SQLITE_DBCONFIG_DQS_DML, 0)
        connection.config(apsw.SQLITE_DBCONFIG_DQS_DDL, 0)
        for pragma, value in (
            ("synchronous", "FULL"),  # with NORMAL a power loss takes acknowledged commits
            ("fullfsync", "ON"),  # macOS: its plain fsync does not reach the disk
            ("trusted_schema", "OFF"),
            ("cell_size_check", "ON"),
            # overwrite moved and removed content where a page is written anyway; redaction needs it (`journal_upkeep`)
            ("secure_delete", "FAST"),
            ("journal_size_limit", str(MAX_WAL_BYTES)),
        ):
            connection.execute(f"PRAGMA {pragma} = {value}").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def make_or_recognise(path: str, busy_timeout_s: float) -> None:
    """Make the file if there is none, and upgrade one of an older layout. StoreError if it is damaged, foreign or of a
    later layout; Unavailable if it is locked or cannot be reached."""
    if os.path.isdir(path):
        raise StoreError(f"{path}: is a folder, expected a file")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{path}: its folder cannot be made: {error.strerror}") from None
    try:
        # Only its owner may read it: it holds hashes of keys, and the pepper if none is configured. SQLite gives the
        # write-ahead log the same mode.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise Unavailable(f"{path}: cannot be made: {error.strerror}") from None
    try:
        with closing(connect(path, busy_timeout_s)) as connection:
            # in a transaction, which sees one state: another process may be making the file at this moment
            connection.execute("BEGIN").fetchall()
            layout = _layout(connection, path)
            connection.execute("COMMIT").fetchall()
            if layout < LAYOUT:
                if layout:
                    connection.set_busy_handler(LockWait(UPGRADE_WAIT_S))
                _make(connection, path)
            _use_wal(connection, path, busy_timeout_s)
    except apsw.Error as error:
        raise translated(error, path) from error


def _one(connection: apsw.Connection, sql: str) -> Any:
    """The first value of the first row; None if there is no row."""
    rows = connection.execute(sql).fetchall()
    return rows[0][0] if rows else None


def _layout(connection: apsw.Connection, path: str) -> int:
    """The layout of a Strongroom file, 0 if it is empty. StoreError otherwise."""
    application = _one(connection, "PRAGMA application_id")
    layout: int = _one(connection, "PRAGMA user_version")
    if application == APPLICATION_ID:
        if layout > LAYOUT:
            raise StoreError(
                f"{path}: found layout {layout}, expected at most {LAYOUT}: a later version of Strongroom made it"
            )
        return layout
    if application or layout or _one(connection, "SELECT 1 FROM sqlite_schema"):
        raise StoreError(f"{path}: is a SQLite file, but not Strongroom's; it was left as it is")
    return 0


def _make(connection: apsw.Connection, path: str) -> None:
    """Make or upgrade the tables, in one transaction: a process that is killed leaves the file as it was."""
    connection.execute("BEGIN IMMEDIATE").fetchall()
    layout = _layout(connection, path)  # another process may have been faster
    if layout < LAYOUT:
        connection.execute(_FROM_LAYOUT_1 if layout else _MAKE).fetchall()
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}").fetchall()
        connection.execute(f"PRAGMA user_version = {LAYOUT}").fetchall()
    connection.execute("COMMIT").fetchall()


def _use_wal(connection: apsw.Connection, path: str, busy_timeout_s: float) -> None:
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            mode = _one(connection, "PRAGMA journal_mode = WAL")
        except apsw.BusyError:
            # SQLite does not wait here by itself when another process is making the same step.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise Unavailable(
                f"{path}: found journal mode {mode!r}, expected 'wal': its file system cannot share memory"
            )
        return


def integrity_problems(path: str, busy_timeout_s: float) -> list[str]:
    """The problems that SQLite finds in the file: at most a hundred sentences."""
    with closing(connect(path, busy_timeout_s)) as connection:
        try:
            found = [str(line) for (line,) in connection.execute("PRAGMA integrity_check").fetchall()]
        except apsw.CorruptError as error:
            return [str(error)]  # the damage ended the check
    return [] if found == ["ok"] else found


def write_snapshot(path: str, busy_timeout_s: float, target: str) -> None:
    """Write a consistent copy with VACUUM INTO: a stepwise `backup` restarts after each commit of another process."""
    if os.path.exists(target):
        raise StoreError(f"{target}: exists already, expected a new file")
    with closing(connect(path, busy_timeout_s)) as connection:
        connection.execute("VACUUM INTO ?", (target,)).fetchall()


def tenants_of(path: str, busy_timeout_s: float, tables: Sequence[str], after: str, limit: int) -> list[str]:
    """The tenants in these tables, in order, after `after`. Each step of the recursion is one look into the index."""
    found: set[str] = set()
    with closing(connect(path, busy_timeout_s)) as connection:
        for table in map(quoted, tables):
            rows = connection.execute(
                f"WITH RECURSIVE step(tenant) AS (SELECT min(tenant_id) FROM {table} WHERE tenant_id > ?1 "
                f"UNION ALL SELECT (SELECT min(tenant_id) FROM {table} WHERE tenant_id > step.tenant) FROM step "
                "WHERE step.tenant IS NOT NULL LIMIT ?2) SELECT tenant FROM step WHERE tenant IS NOT NULL",
                (after, limit),
            )
            found.update(tenant for (tenant,) in rows)
    return sorted(found)[:limit]  # code points are in the order of their UTF-8 bytes


# --- Stored tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Field:
    """A stored column: its declared type (None if unrecorded), and whether it may be null."""

    type: str | None
    nullable: bool


@dataclass(frozen=True, slots=True)
class _Found:
    """One collection's stored table."""

    tenant_scoped: bool
    fields: Mapping[str, _Field]
    indexes: frozenset[str]
    has_documents: bool


_OWN_COLUMNS = frozenset({"tenant_id", "id", "version", "created_at", "updated_at"})


def _found(connection: apsw.Connection, name: str) -> _Found | None:
    def rows(sql: str) -> list[tuple[Any, ...]]:
        return connection.execute(sql, (name,)).fetchall()

    columns = rows('SELECT name, "notnull" FROM pragma_table_info(?)')
    if not columns:
        return None
    kinds = dict(rows("SELECT name, type FROM _fields WHERE collection = ?"))
    indexes = rows("SELECT name FROM sqlite_schema WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL")
    return _Found(
        any(column == "tenant_id" for column, _ in columns),
        {column: _Field(kinds.get(column), not notnull) for column, notnull in columns if column not in _OWN_COLUMNS},
        frozenset(index for (index,) in indexes),
        _one(connection, f"SELECT 1 FROM {quoted(name)} LIMIT 1") is not None,
    )


# --- Differences ----------------------------------------------------------------------------------------------


def _indexes(collection: Collection) -> dict[str, Index]:
    """The indexes by name. A list field has none here: SQLite cannot index the items of JSON."""
    return {
        index_name(collection, index): index
        for index in collection.indexes
        if all(collection.type_of(name) is not FieldType.LIST for name, _ in index.columns)
    }


def _differences(collection: Collection, found: _Found | None) -> list[SchemaChange]:
    name = collection.name
    if found is None:
        return [SchemaChange(ChangeKind.CREATE_COLLECTION, name)]
    if found.tenant_scoped != collection.tenant_scoped:
        scopes = ("tenant", "global") if found.tenant_scoped else ("global", "tenant")
        detail = f"its scope is {scopes[0]} in the store, {scopes[1]} in the declaration"
        dropped = SchemaChange(ChangeKind.DROP_COLLECTION, name, destructive=True, detail=detail)
        return [dropped, SchemaChange(ChangeKind.CREATE_COLLECTION, name)]
    changes = []
    for spec in collection.fields.values():
        column = found.fields.get(spec.name)
        if column is None:
            changes.append(_addition(name, spec, found.has_documents))
        elif column.type != spec.type:
            detail = f"from {column.type or 'an unknown type'} to {spec.type}"
            changes.append(SchemaChange(ChangeKind.CHANGE_FIELD, name, spec.name, destructive=True, detail=detail))
        elif spec.optional and not column.nullable:
            changes.append(SchemaChange(ChangeKind.CHANGE_FIELD, name, spec.name, detail="it may be null"))
    for field in found.fields:
        if field not in collection.fields:
            changes.append(SchemaChange(ChangeKind.DROP_FIELD, name, field, destructive=True))
    declared = _indexes(collection)
    changes += [
        SchemaChange(ChangeKind.ADD_INDEX, name, index.name)
        for full_name, index in declared.items()
        if full_name not in found.indexes
    ]
    changes += [
        SchemaChange(ChangeKind.DROP_INDEX, name, full_name.removeprefix(f"{name}."))
        for full_name in sorted(found.indexes - declared.keys())
    ]
    return changes


def _addition(collection: str, spec: FieldSpec, has_documents: bool) -> SchemaChange:
    if has_documents and not spec.optional and not spec.has_default:
        detail = "it is required and has no default, and there are documents"
        return SchemaChange(ChangeKind.ADD_FIELD, collection, spec.name, destructive=True, detail=detail)
    return SchemaChange(ChangeKind.ADD_FIELD, collection, spec.name)


# --- Fitting --------------------------------------------------------------------------------------------------


def fit(
    path: str, collections: Sequence[Collection], *, apply: bool, allow_destructive: bool, busy_timeout_s: float
) -> tuple[SchemaChange, ...]:
    """Compare, and unless `apply` is false make the tables fit, in one transaction. Raises as `Store.prepare`."""
    try:
        with closing(connect(path, busy_timeout_s)) as connection:
            connection.execute("BEGIN IMMEDIATE" if apply else "BEGIN").fetchall()
            try:
                changes = _fit(connection, collections, apply, allow_destructive)
            except BaseException:
                _roll_back(connection)
                raise
            connection.execute("COMMIT" if apply else "ROLLBACK").fetchall()
            return changes
    except apsw.Error as error:
        raise translated(error, path) from error


def _roll_back(connection: apsw.Connection) -> None:
    if connection.in_transaction:  # SQLite rolls back by itself after some errors
        connection.execute("ROLLBACK").fetchall()


def _fit(
    connection: apsw.Connection, collections: Sequence[Collection], apply: bool, allow_destructive: bool
) -> tuple[SchemaChange, ...]:
    planned = []
    for collection in collections:
        found = _found(connection, collection.name)
        planned.append((collection, found, _differences(collection, found)))
    changes = tuple(change for _, _, some in planned for change in some)
    if not apply:
        return changes
    refused = [change for change in changes if change.destructive]
    if refused and not allow_destructive:
        raise SchemaError(
            f"the declarations would lose stored data or not match it: {'; '.join(map(str, refused))}; "
            "allow_destructive permits it"
        )
    for collection, found, some in planned:
        if some:
            _fit_one(connection, collection, found, some)
    return changes


def _fit_one(
    connection: apsw.Connection, collection: Collection, found: _Found | None, changes: Sequence[SchemaChange]
) -> None:
    kinds = {change.kind for change in changes}
    name = collection.name
    standing: Container[str] = ()
    if found is None or ChangeKind.CREATE_COLLECTION in kinds:
        connection.execute(f"DROP TABLE IF EXISTS {quoted(name)}").fetchall()
        _create(connection, collection, name)
    elif ChangeKind.CHANGE_FIELD in kinds or ChangeKind.DROP_FIELD in kinds:
        _rebuild(connection, collection, found)
    else:
        for spec in collection.fields.values():
            if spec.name not in found.fields:
                _add_field(connection, name, spec)
        for index in found.indexes - _indexes(collection).keys():
            connection.execute(f"DROP INDEX {quoted(index)}").fetchall()
        standing = found.indexes
    for full_name, declared in _indexes(collection).items():
        if full_name not in standing:
            _add_index(connection, collection, full_name, declared)
    connection.execute("DELETE FROM _fields WHERE collection = ?", (name,)).fetchall()
    rows = [(name, spec.name, str(spec.type)) for spec in collection.fields.values()]
    connection.executemany("INSERT INTO _fields VALUES (?, ?, ?)", rows).fetchall()


def _ddl(element: CreateTable | CreateColumn | CreateIndex) -> str:
    return str(element.compile(dialect=ENGINE)).strip()


def _create(connection: apsw.Connection, collection: Collection, table: str, nullable: Container[str] = ()) -> None:
    described = describe(collection, _DIALECT, sa.MetaData(), table=table, nullable=nullable)
    connection.execute(_ddl(CreateTable(described))).fetchall()


def _add_field(connection: apsw.Connection, table: str, spec: FieldSpec) -> None:
    # A new column needs a default or null for existing documents.
    column = describe_field(spec, _DIALECT, nullable=spec.optional or spec.default is None)
    connection.execute(f"ALTER TABLE {quoted(table)} ADD COLUMN {_ddl(CreateColumn(column))}").fetchall()


def _rebuild(connection: apsw.Connection, collection: Collection, found: _Found) -> None:
    """Create the table again and copy the fields that still fit. A changed or new field gets its default, or null."""
    values = {}
    nullable = set()
    for spec in collection.fields.values():
        column = found.fields.get(spec.name)
        if column is not None and column.type == spec.type:
            values[spec.name] = quoted(spec.name)
            if column.nullable:
                nullable.add(spec.name)
        elif spec.default is not None:
            values[spec.name] = _DIALECT.literal(spec)
        else:
            values[spec.name] = "NULL"
            nullable.add(spec.name)
    _create(connection, collection, _REBUILT, nullable)
    own = [*(["tenant_id"] if collection.tenant_scoped else []), "id", "version", "created_at", "updated_at"]
    names, taken = listed([*own, *values]), ", ".join([*map(quoted, own), *values.values()])
    old = quoted(collection.name)
    connection.execute(f"INSERT INTO {_REBUILT} ({names}) SELECT {taken} FROM {old}").fetchall()
    connection.execute(f"DROP TABLE {old}").fetchall()
    connection.execute(f"ALTER TABLE {_REBUILT} RENAME TO {old}").fetchall()


def _add_index(connection: apsw.Connection, collection: Collection, full_name: str, index: Index) -> None:
    table = describe(collection, _DIALECT, sa.MetaData())
    columns = [table.c[name].desc() if down else table.c[name] for name, down in index_columns(collection, index)]
    try:
        connection.execute(_ddl(CreateIndex(sa.Index(full_name, *columns, unique=index.unique)))).fetchall()
    except apsw.ConstraintError:
        fields = " and ".join(name for name, _ in index.columns)
        raise SchemaError(
            f"add index {collection.name}.{index.name}: two documents have the same {fields}; change one first"
        ) from None
