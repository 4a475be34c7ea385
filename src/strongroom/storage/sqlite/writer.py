"""Applies batches to SQLite, each operation in as few statements as possible, with an exact error if it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import apsw

from ...context import utc_from_us
from ...entities import INT64_MAX, INT64_MIN, Document
from ...errors import (
    AlreadyExists,
    BoundExceeded,
    Conflict,
    InvalidInput,
    NotFound,
    Problem,
    StrongroomError,
    TooLarge,
)
from .. import tagged_json as _values
from ..port import (
    MAX_BATCH_BYTES,
    MAX_DOCUMENT_BYTES,
    Add,
    Append,
    Batch,
    Check,
    Committed,
    Create,
    Delete,
    JournalRow,
    Operation,
    Patch,
    Put,
    check_batch_size,
    check_operations,
    document_size,
)
from ..sql import JOURNAL_COLUMNS, line, listed, quoted
from .dialect import translated
from .isolation import Guarded, Table
from .schema import ADD_TIMES, BLOCK, FIND_TIMES, LockWait
from .statements import Statements

_BYTES_PER_CHARACTER = 8
"""The most that one character of a stored text or JSON can count in `document_size`: `[1]` counts eight bytes."""

MANY_CHECKS = 8
"""From this many checks of one collection on, one statement reads all their versions."""

_BEFORE, _AFTER = JOURNAL_COLUMNS.index("before") - 1, JOURNAL_COLUMNS.index("after") - 1  # in a line
_APPEND = (
    f"INSERT INTO main._journal ({listed(JOURNAL_COLUMNS[1:])}) VALUES ({', '.join('?' for _ in JOURNAL_COLUMNS[1:])})"
)
_BEGUN = (
    "SELECT value, (SELECT through FROM main._times ORDER BY block DESC LIMIT 1) FROM main._meta "
    "WHERE name = 'deleted_version'"
)
_KEEP_DELETED = "UPDATE main._meta SET value = ? WHERE name = 'deleted_version'"
OWN_TEXTS = (_APPEND, _BEGUN, _KEEP_DELETED, ADD_TIMES, FIND_TIMES)
"""The only statements by which the writer uses the store's own tables."""

_OF_ONE_STATEMENT = (apsw.SQLError, apsw.ConstraintError, apsw.MismatchError, apsw.TooBigError, apsw.AuthError)
"""Errors of one operation. Any other error is of the file or the disk, and ends the transaction of the whole group."""


class PartialWrite(Exception):
    """A batch failed after it had written, and it had no savepoint. Its transaction must begin again without it."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Writer:
    """Applies batches on one connection, between its `begin` and its `commit`. Used by one thread at a time."""

    def __init__(self, path: str, guarded: Guarded, tables: Mapping[str, Table]) -> None:
        self._path = path
        self._guarded = guarded
        self._connection = guarded.connection
        self._lock_wait = LockWait(0.0)
        self._connection.set_busy_handler(self._lock_wait)
        self._execute = guarded.execute
        self._statements = {name: Statements(table) for name, table in tables.items()}
        self._deleted_version = 0  # new documents get a greater version than any deleted one had
        self._deleted_version_before = 0
        self._changes_before = 0
        self._next = 0  # the sequence of the next record, if the times of all before are noted; 0 if they may not be
        self.rows: list[JournalRow] = []
        """The journal rows of this transaction."""
        self._times: dict[int, list[int]] = {}  # of this transaction's records, by block
        self._tenant: str | None = None
        self._now_us = -1
        self._now_text = ""
        self._size = 0  # an upper bound, of the present batch

    # --- The transaction ---

    def begin(self, busy_timeout_s: float) -> None:
        """Take the file's write lock. apsw.BusyError if another process keeps it for longer."""
        self._lock_wait.timeout_s = busy_timeout_s
        self._execute("BEGIN IMMEDIATE").fetchall()
        deleted_version, timed = self._execute(_BEGUN).fetchall()[0]
        self._deleted_version = self._deleted_version_before = deleted_version
        self._changes_before = self._connection.total_changes()
        self._next = (timed or 0) + 1
        self._times.clear()
        self.rows = []
        self._guarded.trust(True)

    @property
    def has_changes(self) -> bool:
        return self._connection.total_changes() != self._changes_before

    def commit(self) -> None:
        """Returns when everything is on the disk. Blocks for an fsync if there are changes."""
        self._guarded.trust(False)
        if self._times:
            self._keep_times()
        if self._deleted_version != self._deleted_version_before:
            self._execute(_KEEP_DELETED, (self._deleted_version,))
        self._execute("COMMIT").fetchall()

    def _keep_times(self) -> None:
        """Note the times of this transaction's records, and of those that an earlier version appended before."""
        if self._next:
            for block, times in self._times.items():
                self._execute(ADD_TIMES, (block, *times)).fetchall()
        else:
            self._execute(FIND_TIMES).fetchall()

    def roll_back(self) -> None:
        self._guarded.trust(False)
        if self._connection.in_transaction:  # SQLite rolls back by itself after some errors
            self._execute("ROLLBACK").fetchall()

    def close(self) -> None:
        self._guarded.close()

    # --- A batch ---

    def apply(self, batch: Batch) -> Committed:
        """The batch's outcome, if the transaction commits. Raises what its operations say, with nothing of it applied;
        PartialWrite if something of it is; apsw.Error if SQLite itself fails."""
        operations = batch.operations
        check_operations(batch)
        self._tenant = batch.tenant
        self._guarded.set_tenant(batch.tenant)
        if batch.now_us != self._now_us:
            self._now_text = _values.time_to_text(utc_from_us(batch.now_us))
            self._now_us = batch.now_us
        self._size = 0
        guarded = _may_fail_late(operations)
        if guarded:
            self._execute("SAVEPOINT batch").fetchall()
        deleted_version, changes = self._deleted_version, self._connection.total_changes()
        rows = len(self.rows)
        try:
            committed = self._run_patches(batch) if len(operations) >= MANY_CHECKS else None
            if committed is None:
                committed = self._run(batch)
        except Exception as error:
            if isinstance(error, apsw.Error) and not isinstance(error, _OF_ONE_STATEMENT):
                raise
            reason = translated(error, self._path) if isinstance(error, apsw.Error) else error
            self._deleted_version = deleted_version
            self._next = 0  # records may be taken back
            del self.rows[rows:]
            if guarded:
                self._execute("ROLLBACK TO batch; RELEASE batch").fetchall()
            elif self._connection.total_changes() != changes:
                raise PartialWrite(reason) from error
            raise reason from error
        if guarded:
            self._execute("RELEASE batch").fetchall()
        return committed

    def _run_patches(self, batch: Batch) -> Committed | None:
        """Apply checks, and patches of one collection that name versions and the same fields, in two statements:
        a group commit of usage has this form. None, with nothing applied, for any other batch, and if an operation
        fails: applying one operation at a time then finds the failed one."""
        first = batch.operations[-1]
        if type(first) is not Patch:
            return None
        collection, fields = first.collection, tuple(first.fields)
        statements = self._usable(collection)
        how = statements.patches(fields) if statements is not None else None
        if statements is None or how is None:
            return None
        checks, versions, rows, size = [], [], [], 0
        now_us, now_text, encoders, measured = self._now_us, self._now_text, how.encoders, how.measured
        for operation in batch.operations:
            if type(operation) is Check:
                checks.append(operation)
                versions.append(0)
                continue
            if type(operation) is not Patch or operation.collection != collection or operation.expected is None:
                return None
            if tuple(operation.fields) != fields:
                return None
            expected, given = operation.expected, operation.fields.values()
            values = [
                value if encode is None or value is None else encode(value)
                for encode, value in zip(encoders, given, strict=False)
            ]
            length = statements.fixed_size
            for position in measured:
                length += len(values[position] or "") * _BYTES_PER_CHARACTER
            if length > MAX_DOCUMENT_BYTES:
                return None
            size += length
            rows.append((now_us, now_text, *values, operation.id, expected))
            versions.append(now_us if now_us > expected else expected + 1)
        if size > MAX_BATCH_BYTES or not self._checks_hold(checks, collection, batch.operations):
            return None
        before = self._connection.total_changes()
        try:
            self._guarded.cursor.executemany(how.sql, rows).fetchall()
        except apsw.ConstraintError:
            pass
        else:
            if self._connection.total_changes() - before == len(rows):
                return Committed(tuple(versions), {}, None)
        if self._connection.total_changes() != before:
            self._execute("ROLLBACK TO batch").fetchall()  # there is a savepoint, since one patch was written before
        return None

    def _checks_hold(self, checks: Sequence[Check], written: str, operations: Sequence[Operation]) -> bool:
        """Whether all checks hold, of collections other than the written one."""
        found = self._versions(operations)
        for check in checks:
            there = found.get(check.collection)
            if there is not None:
                version = there.get(check.id, 0)
            else:
                statements = self._usable(check.collection)
                if statements is None or check.collection == written:
                    return False
                version = self._version(statements, check.id)
            if version != check.expected:
                return False
        return True

    def _run(self, batch: Batch) -> Committed:
        versions: list[int] = []
        values: dict[int, int] = {}
        sequence = None
        found = self._versions(batch.operations) if len(batch.operations) >= MANY_CHECKS else _NONE_FOUND
        for number, operation in enumerate(batch.operations):
            version = 0
            try:
                # The most frequent kinds come first: this is the hottest loop of the store.
                kind = type(operation)
                if kind is Append:
                    sequence = self._append(operation, versions)  # type: ignore[arg-type]  # mypy cannot follow `kind`
                elif kind is Check:
                    self._check(operation, found)  # type: ignore[arg-type]
                elif kind is Put:
                    version = self._put(operation)  # type: ignore[arg-type]
                elif kind is Create:
                    version = self._create(operation)  # type: ignore[arg-type]
                elif kind is Patch:
                    version = self._patch(operation)  # type: ignore[arg-type]
                elif kind is Add:
                    version, values[number] = self._add(operation)  # type: ignore[arg-type]
                else:
                    self._delete(operation)  # type: ignore[arg-type]
            except StrongroomError as error:
                error.message = f"operation {number}: {error.message}"
                error.args = (error.message,)
                error.details["operation"] = number
                raise
            versions.append(version)
        if self._size > MAX_BATCH_BYTES:
            check_batch_size(batch)
        return Committed(tuple(versions), values, sequence)

    def _usable(self, collection: str) -> Statements | None:
        """The collection's statements; None where `_of` raises, which then names the operation."""
        statements = self._statements.get(collection)
        return None if statements is None or (self._tenant is None and statements.table.tenant_scoped) else statements

    def _of(self, collection: str) -> Statements:
        statements = self._statements.get(collection)
        if statements is None:
            raise InvalidInput(f"{collection}: the store was not prepared for this collection")
        if self._tenant is None and statements.table.tenant_scoped:
            raise InvalidInput([Problem("tenant", f"is needed: {collection} belongs to tenants")])
        return statements

    # --- Operations: each gives the new version ---

    def _check(self, operation: Check, versions: Mapping[str, Mapping[str, int]]) -> None:
        there = versions.get(operation.collection)
        if there is not None:
            found = there.get(operation.id, 0)
        else:
            found = self._version(self._of(operation.collection), operation.id)
        if found != operation.expected:
            raise _conflict(operation, found)

    def _versions(self, operations: Sequence[Operation]) -> Mapping[str, Mapping[str, int]]:
        """The versions that a batch checks, by collection and id, for collections of which it checks many documents and
        writes none."""
        checked: dict[str, list[str]] = {}
        written = set()
        for operation in operations:
            kind = type(operation)
            if kind is Check:
                checked.setdefault(operation.collection, []).append(operation.id)  # type: ignore[union-attr]
            elif kind is not Append:
                written.add(operation.collection)  # type: ignore[union-attr]
        return {
            name: dict(self._execute(statements.versions, (_values.dumps(ids),)).fetchall())
            for name, ids in checked.items()
            if len(ids) >= MANY_CHECKS and name not in written and (statements := self._usable(name)) is not None
        }

    def _create(self, operation: Create) -> int:
        statements = self._of(operation.collection)
        row = self._encoded(statements, operation)
        try:
            return self._insert(statements, operation, row)
        except apsw.ConstraintError:
            if self._version(statements, operation.id):
                raise AlreadyExists(f"{_name(operation)}: a document with this id exists already") from None
            raise self._misfit(statements, operation, operation.document) from None

    def _put(self, operation: Put) -> int:
        statements = self._of(operation.collection)
        row = self._encoded(statements, operation)
        id, expected = operation.id, operation.expected
        try:
            if expected:
                changed = (self._now_us, self._now_text, *row, id, expected)
                found = self._execute(statements.put_version, changed).fetchall()
            elif expected is None:
                found = self._execute(statements.put, (self._now_us, self._now_text, *row, id)).fetchall()
                if not found:
                    return self._insert(statements, operation, row)
            else:
                return self._insert(statements, operation, row)
        except apsw.ConstraintError:
            version = self._version(statements, id)
            if expected is not None and expected != version:
                raise _conflict(operation, version) from None
            raise self._misfit(statements, operation, operation.document) from None
        if not found:
            raise _conflict(operation, self._version(statements, id))
        if operation.created_at is not None or operation.updated_at is not None:
            times = (self._time(operation.created_at), self._time(operation.updated_at) or self._now_text)
            self._execute(statements.times, (*times, id)).fetchall()
        return int(found[0][0])

    def _insert(self, statements: Statements, operation: Create | Put, row: tuple[Any, ...]) -> int:
        # greater than every deleted version, so that a reused id never repeats one
        version = max(self._now_us, self._deleted_version + 1)
        created_at = self._time(operation.created_at) or self._now_text
        updated_at = self._time(operation.updated_at) or self._now_text
        self._execute(statements.insert, (operation.id, version, created_at, updated_at, *row))
        return version

    @staticmethod
    def _time(given: datetime | None) -> str | None:
        return None if given is None else _values.time_to_text(given)

    def _patch(self, operation: Patch) -> int:
        statements = self._of(operation.collection)
        fields, id, expected = operation.fields, operation.id, operation.expected
        sql, encoders = statements.patch(tuple(fields), expected is not None)
        values = [
            value if encode is None or value is None else encode(value)
            for encode, value in zip(encoders, fields.values(), strict=True)
        ]
        which = (id,) if expected is None else (id, expected)
        try:
            found = self._execute(sql, (self._now_us, self._now_text, *values, *which)).fetchall()
        except apsw.ConstraintError:
            raise self._misfit(statements, operation, fields) from None
        if not found:
            raise self._missing_or_conflict(statements, operation)
        version, length = found[0]
        size = length * _BYTES_PER_CHARACTER + statements.fixed_size
        self._size += size  # of the whole document, of which the fields are a part
        if size > MAX_DOCUMENT_BYTES:
            _check_size(operation, statements, self._stored(statements, id))
        return int(version)

    def _add(self, operation: Add) -> tuple[int, int]:
        statements = self._of(operation.collection)
        sql = statements.add(operation.field)
        id, amount = operation.id, operation.amount
        least = INT64_MIN if operation.at_least is None else operation.at_least
        most = INT64_MAX if operation.at_most is None else operation.at_most
        low, high = max(least - amount, INT64_MIN), min(most - amount, INT64_MAX)
        if low <= high:
            try:
                found = self._execute(sql, (self._now_us, self._now_text, amount, id, low, high)).fetchall()
            except apsw.ConstraintError:
                stored = self._stored(statements, id)
                changed = {operation.field: stored[operation.field] + amount}
                raise self._misfit(statements, operation, changed) from None
            if found:
                version, value = found[0]
                return version, value
        if not self._version(statements, id):
            raise NotFound(f"{_name(operation)}: there is no such document")
        raise BoundExceeded(
            f"{_name(operation)}: adding {amount} to {operation.field} would leave {least} to {most}; nothing was added"
        )

    def _delete(self, operation: Delete) -> None:
        statements = self._of(operation.collection)
        id, expected = operation.id, operation.expected
        if expected is None:
            found = self._execute(statements.delete, (id,)).fetchall()
        else:
            found = self._execute(statements.delete_version, (id, expected)).fetchall()
        if not found:
            raise self._missing_or_conflict(statements, operation)
        # A document that is made again under this id must not repeat a version, even if the clock goes back.
        self._deleted_version = max(self._deleted_version, found[0][0])

    def _append(self, operation: Append, versions: Sequence[int]) -> int:
        record = operation.record
        row = line(record, record.version if operation.of is None else versions[operation.of])
        self._size += (len(row[_BEFORE] or "") + len(row[_AFTER] or "")) * _BYTES_PER_CHARACTER
        self._execute(_APPEND, row)
        sequence, at_us = self._connection.last_insert_rowid(), record.at_us
        self._next = sequence + 1 if sequence == self._next else 0
        self.rows.append((sequence, *row))
        times = self._times.get(sequence // BLOCK)
        if times is None:
            self._times[sequence // BLOCK] = [at_us, at_us, sequence]
        else:
            if at_us > times[1]:
                times[1] = at_us
            elif at_us < times[0]:
                times[0] = at_us
            times[2] = sequence
        return sequence

    # --- Helpers ---

    def _version(self, statements: Statements, id: str) -> int:
        found = self._execute(statements.version, (id,)).fetchall()
        return found[0][0] if found else 0

    def _stored(self, statements: Statements, id: str) -> Document:
        return statements.table.decode(self._execute(statements.table.by_id, (id,)).fetchall()[0])

    def _encoded(self, statements: Statements, operation: Create | Put) -> tuple[Any, ...]:
        """The row of the operation's document. TooLarge if that is too large."""
        row = statements.encode(operation.document)
        length = 0
        for number in statements.variable:
            value = row[number]
            if value:
                length += len(value)
        size = length * _BYTES_PER_CHARACTER + statements.fixed_size
        if size > MAX_DOCUMENT_BYTES:
            size = _check_size(operation, statements, operation.document)
        self._size += size
        return row

    def _missing_or_conflict(self, statements: Statements, operation: Patch | Delete) -> StrongroomError:
        found = self._version(statements, operation.id)
        return _conflict(operation, found) if found else NotFound(f"{_name(operation)}: there is no such document")

    def _misfit(
        self, statements: Statements, operation: Create | Put | Patch | Add, given: Document
    ) -> StrongroomError:
        """The error for a row that SQLite refused. A query for the conflicting document finds the unique index."""
        table = statements.table
        if type(operation) is Patch or type(operation) is Add:
            given = {**self._stored(statements, operation.id), **given}
        collection, dialect = table.codec.collection, table.codec.dialect
        for index in collection.indexes:
            columns = [name for name, _ in index.columns]
            if not index.unique or any(given.get(name) is None for name in columns):
                continue
            condition = " AND ".join(f"{quoted(name)} = ?" for name in columns)
            values = [dialect.encode(collection.type_of(name), given[name]) for name in columns]
            sql = f"SELECT id FROM {quoted(table.name)} WHERE {condition} AND id <> ?"
            if self._execute(sql, (*values, operation.id)).fetchall():
                return AlreadyExists(f"{_name(operation)}: another document has this {' and '.join(columns)}")
        return InvalidInput(
            f"{_name(operation)}: a value does not fit its field: check the document before it is stored"
        )


_NONE_FOUND: Mapping[str, Mapping[str, int]] = {}


def _may_fail_late(operations: Sequence[Operation]) -> bool:
    """Whether an operation may fail after another has written. If not, the batch needs no savepoint: one statement
    applies wholly or not at all, and an Append does not fail."""
    written = False
    for operation in operations:
        kind = type(operation)
        if kind is Append:
            written = True
        elif written:
            return True
        elif kind is not Check:
            written = True
    return False


def _name(operation: Create | Put | Patch | Delete | Add | Check) -> str:
    return f"{operation.collection}/{operation.id}"


def _conflict(operation: Put | Patch | Delete | Check, found: int) -> Conflict:
    return Conflict(f"{_name(operation)}: found version {found}, expected {operation.expected}")


def _check_size(operation: Create | Put | Patch, statements: Statements, document: Document) -> int:
    size = document_size({name: document[name] for name in statements.table.codec.fields})
    if size > MAX_DOCUMENT_BYTES:
        raise TooLarge(f"{_name(operation)}: found {size} bytes in a document, expected at most {MAX_DOCUMENT_BYTES}")
    return size
