"""One batch on PostgreSQL, one operation at a time: slower than sets, and it names the operation that fails.

It runs after a commit as sets failed without a reason, and for batches that change one document twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from ...context import utc_from_us
from ...entities import INT64_MAX, INT64_MIN, Document
from ...errors import AlreadyExists, BoundExceeded, Conflict, InvalidInput, NotFound, Problem, StrongroomError, TooLarge
from ..port import MAX_DOCUMENT_BYTES, Add, Append, Batch, Check, Create, Delete, Operation, Patch, Put, document_size
from .errors import UNIQUE_VIOLATION, sqlstate
from .tables import Statements, Table

BYTES_PER_CHARACTER = 8
"""The most bytes that one character of a stored text or JSON counts in `document_size`: `[1]` counts eight there."""
LOCK_BUCKETS = 64
"""The absence of a document is locked through the bucket of its key, so that a commit of many documents takes few
locks."""


class Steps:
    """Applies batches on one connection, in an open transaction. An error leaves the transaction aborted: roll back, or
    roll back to a savepoint."""

    def __init__(self, connection: asyncpg.Connection, statements: Mapping[str, Statements], locks: Locks) -> None:
        self._connection = connection
        self._statements = statements
        self._locks = locks
        self._tenant: str | None = None
        self._now = utc_from_us(0)

    async def apply(self, batch: Batch) -> tuple[list[int], dict[int, int]]:
        """The versions, and the values of the additions, by operation; the caller writes journal records.

        Raises the errors of the operations, or the driver's error."""
        self._tenant = batch.tenant
        self._now = utc_from_us(batch.now_us)
        if batch.tenant is not None:
            await self._connection.fetch("SELECT set_config('app.current_tenant', $1, true)", batch.tenant)
        await self._lock_keys(batch.operations)
        versions: list[int] = []
        values: dict[int, int] = {}
        for number, operation in enumerate(batch.operations):
            try:
                version, value = await self._step(operation)
            except StrongroomError as error:
                raise numbered(error, number) from None
            except asyncpg.PostgresError as error:
                misfit = self._misfit(operation, error)
                if misfit is None:
                    raise
                raise numbered(misfit, number) from error
            versions.append(version)
            if value is not None:
                values[number] = value
        return versions, values

    async def _lock_keys(self, operations: Sequence[Operation]) -> None:
        """Lock the checked absences until the end of the transaction: a creation of such a document waits. All commits
        lock in one order, so that they cannot deadlock."""
        locks = self._locks.of(self._tenant, operations, self._statements)
        if locks:
            await self._connection.fetch(TAKE_LOCKS, [key for key, _ in locks], [exclusive for _, exclusive in locks])

    async def _step(self, operation: Operation) -> tuple[int, int | None]:
        match operation:
            case Append():
                return 0, None
            case Check():
                await self._check(operation)
                return 0, None
            case Create():
                return await self._create(operation), None
            case Put():
                return await self._put(operation), None
            case Patch():
                return await self._patch(operation), None
            case Add():
                return await self._add(operation)
            case Delete():
                await self._delete(operation)
                return 0, None

    def _of(self, operation: Create | Put | Patch | Delete | Add | Check) -> tuple[Statements, tuple[str, ...]]:
        """The texts for the operation's collection, and its document's key."""
        statements = prepared(self._statements, operation.collection, self._tenant)
        if statements.table.tenant_scoped and self._tenant is not None:
            return statements, (self._tenant, operation.id)
        return statements, (operation.id,)

    async def _check(self, operation: Check) -> None:
        statements, key = self._of(operation)
        found = await self._version(statements.locked if operation.expected else statements.version, key)
        if found != operation.expected:
            raise conflict(operation, found)

    async def _create(self, operation: Create) -> int:
        statements, key = self._of(operation)
        row = encoded(statements.table, operation)
        created_at, updated_at = operation.created_at or self._now, operation.updated_at or self._now
        found = await self._connection.fetch(statements.insert, *key, created_at, updated_at, *row)
        if not found:
            raise already_exists(operation)
        return int(found[0][0])

    async def _put(self, operation: Put) -> int:
        statements, key = self._of(operation)
        row = encoded(statements.table, operation)
        expected, created_at = operation.expected, operation.created_at
        updated_at = operation.updated_at or self._now
        if expected != 0:
            columns: tuple[str, ...] = ("updated_at", *statements.table.codec.fields)
            values: tuple[Any, ...] = (updated_at, *row)
            if created_at is not None:
                columns, values = ("created_at", *columns), (created_at, *values)
            sql = statements.update(columns, versioned=expected is not None)
            which = key if expected is None else (*key, expected)
            found = await self._connection.fetch(sql, *which, *values)
            if found:
                return int(found[0][0])
            if expected is not None:
                raise conflict(operation, await self._version(statements.version, key))
        while True:
            found = await self._connection.fetch(statements.insert, *key, created_at or self._now, updated_at, *row)
            if found:
                return int(found[0][0])
            version = await self._version(statements.version, key)
            if expected is not None:
                raise conflict(operation, version)
            if version:  # another transaction has created it since the read
                return await self._put(operation)

    async def _patch(self, operation: Patch) -> int:
        statements, key = self._of(operation)
        names, expected = tuple(operation.fields), operation.expected
        encoders = statements.table.encoders(names)
        sql = statements.update(("updated_at", *names), versioned=expected is not None)
        which = key if expected is None else (*key, expected)
        values = encode_fields(encoders, operation.fields)
        found = await self._connection.fetch(sql, *which, self._now, *values)
        if not found:
            raise await self._missing_or_conflict(operation, statements, key)
        version, length = found[0]
        if length * BYTES_PER_CHARACTER + statements.table.fixed_size > MAX_DOCUMENT_BYTES:
            stored = await self._connection.fetch(statements.stored, *key)
            check_size(operation, statements.table, statements.table.decode(stored[0]))
        return int(version)

    async def _add(self, operation: Add) -> tuple[int, int]:
        statements, key = self._of(operation)
        sql = statements.add(operation.field)
        low, high = bounds(operation)
        if low <= high:
            found = await self._connection.fetch(sql, *key, self._now, operation.amount, low, high)
            if found:
                return int(found[0][0]), int(found[0][1])
        if not await self._version(statements.version, key):
            raise missing(operation)
        raise bound_exceeded(operation)

    async def _delete(self, operation: Delete) -> None:
        statements, key = self._of(operation)
        if operation.expected is None:
            found = await self._connection.fetch(statements.delete, *key)
        else:
            found = await self._connection.fetch(statements.delete_version, *key, operation.expected)
        if not found:
            raise await self._missing_or_conflict(operation, statements, key)

    async def _version(self, sql: str, key: Sequence[str]) -> int:
        found = await self._connection.fetch(sql, *key)
        return int(found[0][0]) if found else 0

    async def _missing_or_conflict(
        self, operation: Patch | Delete, statements: Statements, key: Sequence[str]
    ) -> StrongroomError:
        found = await self._version(statements.version, key)
        return conflict(operation, found) if found else missing(operation)

    def _misfit(self, operation: Operation, error: asyncpg.PostgresError) -> StrongroomError | None:
        """Why PostgreSQL refused the row of an operation; None if the operation is not the cause."""
        state = sqlstate(error)
        if isinstance(operation, Append | Check | Delete) or state[:2] not in ("22", "23", "54"):
            return None
        if state[:2] == "54":
            return TooLarge(
                f"{named(operation)}: a value is larger than PostgreSQL can index: of an index's fields, tenant and id "
                "together about 2,600 bytes fit"
            )
        if state == UNIQUE_VIOLATION:
            table = self._statements[operation.collection].table
            index = table.indexes.get(error.constraint_name)
            if index is not None:
                fields = " and ".join(name for name, _ in index.columns)
                return AlreadyExists(f"{named(operation)}: another document has this {fields}")
            return already_exists(operation)
        return InvalidInput(
            f"{named(operation)}: a value does not fit its field: check the document before it is stored"
        )


# --- Absence ----------------------------------------------------------------------------------------------------

TAKE_LOCKS = (
    "SELECT CASE WHEN u.exclusive THEN pg_advisory_xact_lock(u.key) ELSE pg_advisory_xact_lock_shared(u.key) END "
    "FROM unnest($1::bigint[], $2::boolean[]) AS u(key, exclusive)"
)


class Locks:
    """The advisory locks of one store. A check that a document is absent takes the lock of its bucket exclusively; an
    operation that may create a document takes it shared. A row that does not exist cannot be locked itself."""

    def __init__(self, schema: str) -> None:
        self._base = zlib.crc32(schema.encode()) << 16

    def bucket(self, table: Table, tenant: str | None, id: str) -> int:
        owner = tenant if table.tenant_scoped else None  # a global document is the same one for every tenant
        return self._base | zlib.crc32(f"{table.name}\0{owner}\0{id}".encode()) % LOCK_BUCKETS

    def of(
        self, tenant: str | None, operations: Sequence[Operation], statements: Mapping[str, Statements]
    ) -> list[tuple[int, bool]]:
        """The locks that these operations need, each once, in their order: (key, exclusive)."""
        needed: dict[int, bool] = {}
        for operation in operations:
            found = None if isinstance(operation, Append) else statements.get(operation.collection)
            if found is None or isinstance(operation, Append):
                continue
            if isinstance(operation, Create) or (isinstance(operation, Put) and not operation.expected):
                needed.setdefault(self.bucket(found.table, tenant, operation.id), False)
            elif isinstance(operation, Check) and operation.expected == 0:
                needed[self.bucket(found.table, tenant, operation.id)] = True
        return sorted(needed.items())


# --- The values of an operation, and its errors -------------------------------------------------------------------


def prepared(statements: Mapping[str, Statements], collection: str, tenant: str | None) -> Statements:
    found = statements.get(collection)
    if found is None:
        raise InvalidInput(f"{collection}: the store was not prepared for this collection")
    if tenant is None and found.table.tenant_scoped:
        raise InvalidInput([Problem("tenant", f"is needed: {collection} belongs to tenants")])
    return found


def encoded(table: Table, operation: Create | Put) -> tuple[Any, ...]:
    """The row of the operation's document. Raises TooLarge."""
    row = table.encode(operation.document)
    length = 0
    for number in table.variable:
        value = row[number]
        if value:
            length += len(value)
    if length * BYTES_PER_CHARACTER + table.fixed_size > MAX_DOCUMENT_BYTES:
        check_size(operation, table, operation.document)
    return row


def encode_fields(encoders: Sequence[Any], fields: Document) -> list[Any]:
    return [
        value if encode is None or value is None else encode(value)
        for encode, value in zip(encoders, fields.values(), strict=True)
    ]


def check_size(operation: Create | Put | Patch, table: Table, document: Document) -> None:
    size = document_size({name: document[name] for name in table.codec.fields})
    if size > MAX_DOCUMENT_BYTES:
        raise TooLarge(f"{named(operation)}: found {size} bytes in a document, expected at most {MAX_DOCUMENT_BYTES}")


def limits(operation: Add) -> tuple[int, int]:
    """The least and the greatest value that the field may have after the addition."""
    least = INT64_MIN if operation.at_least is None else operation.at_least
    return least, (INT64_MAX if operation.at_most is None else operation.at_most)


def bounds(operation: Add) -> tuple[int, int]:
    """The least and the greatest value that the field may have before the addition; crossed if no value is possible."""
    least, most = limits(operation)
    return max(least - operation.amount, INT64_MIN), min(most - operation.amount, INT64_MAX)


def named(operation: Create | Put | Patch | Delete | Add | Check) -> str:
    return f"{operation.collection}/{operation.id}"


def numbered(error: StrongroomError, number: int) -> StrongroomError:
    """The error, with the position of its operation."""
    error.message = f"operation {number}: {error.message}"
    error.args = (error.message,)
    error.details["operation"] = number
    return error


def conflict(operation: Put | Patch | Delete | Check, found: int) -> Conflict:
    return Conflict(f"{named(operation)}: found version {found}, expected {operation.expected}")


def missing(operation: Patch | Delete | Add) -> NotFound:
    return NotFound(f"{named(operation)}: there is no such document")


def already_exists(operation: Create | Put | Patch | Add) -> AlreadyExists:
    return AlreadyExists(f"{named(operation)}: a document with this id exists already")


def bound_exceeded(operation: Add) -> BoundExceeded:
    least, most = limits(operation)
    return BoundExceeded(
        f"{named(operation)}: adding {operation.amount} to {operation.field} would leave {least} to {most}; nothing "
        "was added"
    )
