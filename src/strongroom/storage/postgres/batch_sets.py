"""Many batches as one statement: operations of one kind on one collection are a set, bound as arrays.

This works for batches that touch no document twice between them: the order of their operations does not matter, since
each set sees the state before the statement. The statement returns a row for each operation that applied, a Check
included. An operation without a row has a precondition that does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from ...context import utc_from_us
from ...errors import StrongroomError
from ..port import (
    MAX_BATCH_BYTES,
    MAX_DOCUMENT_BYTES,
    Add,
    Append,
    Batch,
    Check,
    Create,
    Operation,
    Patch,
    Put,
    check_batch_size,
    check_operations,
)
from ..sql import MAX_SHAPES, Line, line, listed, quoted
from .batch_steps import (
    BYTES_PER_CHARACTER,
    Locks,
    already_exists,
    bound_exceeded,
    bounds,
    conflict,
    encode_fields,
    encoded,
    missing,
    numbered,
    prepared,
)
from .dialect import ARRAY_TYPES
from .tables import Statements, Table

CHECK, INSERT, UPSERT, UPDATE, PATCH, ADD, DELETE = "check", "insert", "upsert", "update", "patch", "add", "delete"
_TEXT, _BIGINT, _TIME = "text[]", "bigint[]", "timestamptz[]"

Key = tuple[Any, ...]
"""The properties that all operations of one set share: (kind, collection, details of the kind)."""


class Slot(NamedTuple):
    """Where an operation stands: the batch's number in the commit, and the operation's in the batch."""

    batch: int
    number: int
    operation: Operation


@dataclass(slots=True)
class Group:
    """One set: a row for each document, in the order of ids, and the operation of each row."""

    key: Key
    table: Table
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    slots: dict[str, Slot] = field(default_factory=dict)
    buckets: set[int] = field(default_factory=set)


class Statement(NamedTuple):
    sql: str
    arguments: list[Any]
    groups: Sequence[Group]


class Outcome:
    """The versions and values that one batch made."""

    def __init__(self, batch: Batch) -> None:
        self.versions = [0] * len(batch.operations)
        self.values: dict[int, int] = {}

    def lines(self, batch: Batch) -> list[Line]:
        """The batch's journal records with their versions."""
        return [
            line(op.record, op.record.version if op.of is None else self.versions[op.of])
            for op in batch.operations
            if type(op) is Append
        ]


class Sets:
    """The operations of some batches of one tenant (or of none), as groups."""

    def __init__(self, statements: Mapping[str, Statements], locks: Locks) -> None:
        self._statements = statements
        self._locks = locks
        self.groups: dict[Key, Group] = {}

    def add(self, position: int, batch: Batch) -> None:
        """Add a batch. Raises the error of a batch that is invalid whatever is stored (its size, its collections), and
        then adds nothing of it."""
        check_operations(batch)
        tenant, now = batch.tenant, utc_from_us(batch.now_us)
        size = 0
        staged: list[tuple[Key, Table, tuple[Any, ...], Slot, int | None]] = []
        for number, operation in enumerate(batch.operations):
            if type(operation) is Append:
                record = operation.record
                size += len(str(record.before or "")) + len(str(record.after or ""))
                continue
            try:
                table = prepared(self._statements, operation.collection, tenant).table  # type: ignore[union-attr]
                key, row = _row(table, operation, now)
            except StrongroomError as error:
                raise numbered(error, number) from None
            for value in row:
                if type(value) is str or type(value) is bytes:
                    size += len(value)
            bucket = None
            if key[0] is INSERT or key[0] is UPSERT:
                bucket = self._locks.bucket(table, tenant, operation.id)  # type: ignore[union-attr]
            staged.append((key, table, row, Slot(position, number, operation), bucket))
        if size * BYTES_PER_CHARACTER > MAX_BATCH_BYTES:
            check_batch_size(batch)
        for key, table, row, slot, bucket in staged:
            group = self.groups.get(key)
            if group is None:
                group = self.groups[key] = Group(key, table)
            group.rows.append(row)
            group.slots[row[0]] = slot
            if bucket is not None:
                group.buckets.add(bucket)

    def statement(self, tenant: str | None, require: str | None = None) -> Statement:
        """All groups as one statement, which returns (group, id, version, value) for each operation that applied. With
        `require`, a function of the store, the statement fails unless all applied."""
        groups = [self.groups[key] for key in sorted(self.groups, key=repr)]
        scoped = any(group.table.tenant_scoped for group in groups)
        arguments: list[Any] = [tenant] if scoped else []
        parts, counts = [], []
        for number, group in enumerate(groups):
            # Every commit locks rows in the order of their ids, so that two commits cannot deadlock.
            group.rows.sort(key=_first)
            parts.append(_text(group.table, group.key, number, len(arguments)))
            arguments += map(list, zip(*group.rows, strict=True))
            if group.buckets:
                arguments.append(sorted(group.buckets))
            if require is not None:
                arguments.append(len(group.rows))
                counts.append(_complete(group, number, len(arguments)))
        answers = " UNION ALL ".join(f"SELECT {n} AS g, id, version, value FROM g{n}" for n in range(len(groups)))
        sql = f"WITH {', '.join(parts)} {answers}"
        if require is not None:
            sql = (
                f"WITH {', '.join(parts)} SELECT g, id, version, value FROM ({answers}) AS answer "
                f"WHERE (SELECT {require}({' AND '.join(counts)}))"
            )
        return Statement(sql, arguments, groups)


def _complete(group: Group, number: int, parameter: int) -> str:
    """The condition that all rows of a group applied, and that no document may be too large now."""
    if group.key[0] is not PATCH:
        return f"(SELECT count(*) FROM g{number}) = ${parameter}::bigint"
    most = (MAX_DOCUMENT_BYTES - group.table.fixed_size) // BYTES_PER_CHARACTER
    return f"(SELECT count(*) FILTER (WHERE value <= {most}) FROM g{number}) = ${parameter}::bigint"


def take(statement: Statement, rows: Sequence[Any], outcomes: Mapping[int, Outcome]) -> bool:
    """Enter the returned rows into the outcomes. Whether all operations applied, and no document may be too large."""
    groups = statement.groups
    for number, id, version, value in rows:
        group = groups[number]
        slot = group.slots[id]
        kind = group.key[0]
        if kind is CHECK or kind is DELETE:
            continue
        outcomes[slot.batch].versions[slot.number] = version
        if kind is ADD:
            outcomes[slot.batch].values[slot.number] = value
        elif kind is PATCH and value * BYTES_PER_CHARACTER + group.table.fixed_size > MAX_DOCUMENT_BYTES:
            return False
    return len(rows) == sum(len(group.rows) for group in groups)


def unapplied(statement: Statement, rows: Sequence[Any]) -> list[tuple[Table, list[Slot]]]:
    """The operations of a statement that did not apply, by collection."""
    applied = {(number, id) for number, id, _, _ in rows}
    found = []
    for number, group in enumerate(statement.groups):
        slots = [slot for id, slot in group.slots.items() if (number, id) not in applied]
        if slots:
            found.append((group.table, slots))
    return found


def verdict(slot: Slot, version: int) -> StrongroomError | None:
    """Why an operation did not apply, given its document's present version (0: absent). None if it would apply now."""
    operation = slot.operation
    error: StrongroomError | None = None
    match operation:
        case Create():
            error = already_exists(operation) if version else None
        case Check() | Put():
            if operation.expected is not None and version != operation.expected:
                error = conflict(operation, version)
        case Add():
            error = bound_exceeded(operation) if version else missing(operation)
        case Append():
            pass
        case _:
            if not version:
                error = missing(operation)
            elif operation.expected is not None and version != operation.expected:
                error = conflict(operation, version)
    return None if error is None else numbered(error, slot.number)


# --- Rows ---------------------------------------------------------------------------------------------------------


def _first(row: Sequence[Any]) -> Any:
    return row[0]


def _row(table: Table, operation: Operation, now: datetime) -> tuple[Key, tuple[Any, ...]]:
    """The set that an operation belongs to, and its row there; the id is the row's first value."""
    name = table.name
    kind = type(operation)
    # The ledger's operations first: a durable verify is one of each.
    if kind is Check:
        return (CHECK, name), (operation.id, operation.expected)  # type: ignore[union-attr]
    if kind is Patch:
        patch: Patch = operation  # type: ignore[assignment]
        names = tuple(patch.fields)
        values = encode_fields(table.encoders(names), patch.fields)
        if patch.expected is None:
            return (PATCH, name, False, *names), (patch.id, now, *values)
        return (PATCH, name, True, *names), (patch.id, patch.expected, now, *values)
    if kind is Put or kind is Create:
        given: Create | Put = operation  # type: ignore[assignment]
        row = encoded(table, given)
        created_at, updated_at = given.created_at, given.updated_at or now
        expected = given.expected if kind is Put else 0  # type: ignore[union-attr]
        if expected == 0:
            return (INSERT, name), (given.id, created_at or now, updated_at, *row)
        if expected is None:
            return (UPSERT, name, created_at is not None), (given.id, created_at or now, updated_at, *row)
        if created_at is None:
            return (UPDATE, name, False), (given.id, expected, updated_at, *row)
        return (UPDATE, name, True), (given.id, expected, updated_at, created_at, *row)
    if kind is Add:
        add: Add = operation  # type: ignore[assignment]
        table.encoders((add.field,))
        low, high = bounds(add)
        return (ADD, name, add.field), (add.id, now, add.amount, low, high)
    if operation.expected is None:  # type: ignore[union-attr]
        return (DELETE, name, False), (operation.id,)  # type: ignore[union-attr]
    return (DELETE, name, True), (operation.id, operation.expected)  # type: ignore[union-attr]


# --- Texts --------------------------------------------------------------------------------------------------------


def _text(table: Table, key: Key, number: int, bound: int) -> str:
    """The group as a member of a WITH, its first parameter after `bound` others; $1 is the tenant."""
    cached = table.texts.get((key, number, bound))
    if cached is None:
        if len(table.texts) >= MAX_SHAPES:
            table.texts.clear()
        made = _TEXTS[key[0]](table, key, bound)
        cached = table.texts[key, number, bound] = f"g{number} AS ({made})"
    return cached


# "Expected" is a name that no field can have: fields stand beside it.


def _unnest(columns: Sequence[tuple[str, str]], bound: int) -> str:
    arrays = ", ".join(f"${n}::{kind}" for n, (_, kind) in enumerate(columns, bound + 1))
    return f"unnest({arrays}) AS u({listed([name for name, _ in columns])})"


def _fields(table: Table, names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, ARRAY_TYPES[table.collection.fields[name].type]) for name in names]


def _match(table: Table, *, versioned: bool) -> str:
    tenant = "d.tenant_id = $1 AND " if table.tenant_scoped else ""
    return f"{tenant}d.id = u.id" + (' AND d.version = u."Expected"' if versioned else "")


def _check(table: Table, key: Key, bound: int) -> str:
    source = _unnest([("id", _TEXT), ("Expected", _BIGINT)], bound)
    return (
        f"SELECT d.id, d.version, NULL::bigint AS value FROM {source} "
        f"JOIN {table.sql_name} AS d ON {_match(table, versioned=True)} FOR SHARE OF d"
    )


def _insert(table: Table, key: Key, bound: int) -> str:
    names = table.codec.fields
    columns = [("id", _TEXT), ("created_at", _TIME), ("updated_at", _TIME), *_fields(table, names)]
    tenant_column, tenant = ("tenant_id, ", "$1, ") if table.tenant_scoped else ("", "")
    conflict_key = "tenant_id, id" if table.tenant_scoped else "id"
    if key[0] is INSERT:
        action = "NOTHING"
    else:
        replaced = (*(("created_at",) if key[2] else ()), "updated_at", *names)
        sets = "".join(f", {quoted(name)} = excluded.{quoted(name)}" for name in replaced)
        action = f"UPDATE SET version = {table.next_version}{sets}"
    locked = f"SELECT pg_advisory_xact_lock_shared(bucket) FROM unnest(${bound + len(columns) + 1}::bigint[]) AS bucket"
    return (
        f"INSERT INTO {table.sql_name} AS d ({tenant_column}version, {listed([name for name, _ in columns])}) "
        f"SELECT {tenant}{table.next_version}, {', '.join(f'u.{quoted(name)}' for name, _ in columns)} "
        f"FROM (SELECT count(*) FROM ({locked} OFFSET 0) AS each) AS locked, {_unnest(columns, bound)} "
        f"ON CONFLICT ({conflict_key}) DO {action} RETURNING d.id, d.version, NULL::bigint AS value"
    )


def _update(table: Table, key: Key, bound: int) -> str:
    names: tuple[str, ...]
    if key[0] is UPDATE:
        versioned, names, value = True, table.codec.fields, "NULL::bigint"
        fields = ([("created_at", _TIME)] if key[2] else []) + _fields(table, names)
    else:
        versioned, names, value = key[2], key[3:], f"({table.length})::bigint"
        fields = _fields(table, names)
    columns = [("id", _TEXT), *([("Expected", _BIGINT)] if versioned else []), ("updated_at", _TIME), *fields]
    sets = "".join(f", {quoted(name)} = u.{quoted(name)}" for name in ("updated_at", *(name for name, _ in fields)))
    return (
        f"UPDATE {table.sql_name} AS d SET version = {table.next_version}{sets} FROM {_unnest(columns, bound)} "
        f"WHERE {_match(table, versioned=versioned)} RETURNING d.id, d.version, {value} AS value"
    )


def _add(table: Table, key: Key, bound: int) -> str:
    columns = [("id", _TEXT), ("at", _TIME), ("amount", _BIGINT), ("low", _BIGINT), ("high", _BIGINT)]
    column = quoted(key[2])
    return (
        f"UPDATE {table.sql_name} AS d SET version = {table.next_version}, updated_at = u.at, "
        f"{column} = d.{column} + u.amount FROM {_unnest(columns, bound)} "
        f"WHERE {_match(table, versioned=False)} AND d.{column} BETWEEN u.low AND u.high "
        f"RETURNING d.id, d.version, d.{column} AS value"
    )


def _delete(table: Table, key: Key, bound: int) -> str:
    columns = [("id", _TEXT), *([("Expected", _BIGINT)] if key[2] else [])]
    return (
        f"DELETE FROM {table.sql_name} AS d USING {_unnest(columns, bound)} "
        f"WHERE {_match(table, versioned=key[2])} RETURNING d.id, d.version, NULL::bigint AS value"
    )


_TEXTS: Mapping[str, Callable[[Table, Key, int], str]] = {
    CHECK: _check,
    INSERT: _insert,
    UPSERT: _insert,
    UPDATE: _update,
    PATCH: _update,
    ADD: _add,
    DELETE: _delete,
}

# --- Which batches may go together --------------------------------------------------------------------------------


class Footprint:
    """The documents and unique indexes that the batches of one commit touch."""

    def __init__(self, statements: Mapping[str, Statements]) -> None:
        self._statements = statements
        self._documents: set[tuple[str, str | None, str]] = set()
        self._ordered: dict[tuple[str, str | None], bool] = {}

    def admits(self, batch: Batch) -> bool:
        """Add the batch if it can join the commit. On an empty footprint: whether it can run as sets at all."""
        documents: set[tuple[str, str | None, str]] = set()
        ordered: dict[tuple[str, str | None], bool] = {}
        tenant = batch.tenant
        for operation in batch.operations:
            if type(operation) is Append:
                continue
            collection, id = operation.collection, operation.id  # type: ignore[union-attr]
            found = self._statements.get(collection)
            if found is None:
                continue  # refused when its values are encoded
            table = found.table
            document = (collection, tenant if table.tenant_scoped else None, id)
            if document in documents or document in self._documents:
                return False
            documents.add(document)
            if type(operation) is Check:
                if operation.expected == 0:
                    return False  # needs a lock first, and a read in a later statement
            elif table.unique_fields and _moves_values(operation, table):
                # Of the operations that change values of a unique index only creations may run together: for the others
                # their order decides which of them fails.
                place = document[:2]
                alone = type(operation) is not Create
                before = ordered.get(place, self._ordered.get(place))
                if before is not None and (alone or before):
                    return False
                ordered[place] = alone
        self._documents |= documents
        self._ordered |= ordered
        return True


def _moves_values(operation: Operation, table: Table) -> bool:
    """Whether an operation changes a value of a unique index."""
    if isinstance(operation, Patch):
        return not table.unique_fields.isdisjoint(operation.fields)
    if isinstance(operation, Add):
        return operation.field in table.unique_fields
    return True
