"""Changes PostgreSQL's tables to fit the declarations while other processes read and write them.

No step holds a lock that writers wait for longer than LOCK_TIMEOUT_MS: a change of the catalogue gives up and tries
again; an index is built and dropped CONCURRENTLY; a new column's constant default is kept in the catalogue, so no row
is touched, and NOT NULL is never added to an existing column. Each step leaves the tables usable by the old
declarations and by the new ones, and a killed apply is finished by the next.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence

import asyncpg

from ...entities import Collection, FieldSpec, Index
from ...errors import SchemaError, Unavailable
from ..sql import listed, quoted
from . import journal_indexes
from .journal_access import AS_OWNER, WITH_SECRETS
from .roles import granted_roles, grants
from .schema_compare import Difference
from .schema_layout import State, make_layout, remember, upgrade_layout
from .schema_tables import (
    DIALECT,
    add_column,
    comment_on_index,
    comments_on,
    create_collection,
    create_index,
    declaration,
    physical_indexes,
    secure,
)

LOCK_TIMEOUT_MS = 500
"""How long writers may wait behind a change of the catalogue that itself waits for a lock."""
ALTER_DEADLINE_S = 60.0
"""How long a change of the catalogue is tried."""
INDEX_LOCK_TIMEOUT_S = 600
"""How long the build of an index waits for transactions that were open before it. No other one waits behind it."""
STATEMENT_TIMEOUT_S = 86_400
"""A day: the build of an index takes as long as the table is large."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_INDEX_ATTEMPTS = 5

_log = logging.getLogger(__name__)


# --- At once: tables that are not in use yet --------------------------------------------------------------------


async def create(
    connection: asyncpg.Connection, schema: str, state: State, collections: Sequence[Collection], replaced: set[str]
) -> None:
    """Make the store's own tables, if they are not there, and new collections, in the transaction that is open.

    The tables of `replaced` are dropped first."""
    script = []
    if not state.schema_exists:
        script.append(f"CREATE SCHEMA {quoted(schema)};")
    if not state.made:
        script.append(make_layout(schema))
    for collection in collections:
        if collection.name in replaced:
            script.append(f"DROP TABLE {quoted(schema)}.{quoted(collection.name)};")
        script.append(create_collection(schema, collection))
    await connection.execute("\n".join(script))
    if not state.made:
        await connection.execute(grants(schema, *await granted_roles(connection, schema)))
    for collection in collections:
        await remember(connection, schema, collection.name, declaration(collection), finished=True)


async def upgrade(connection: asyncpg.Connection, schema: str) -> None:
    """Make the present layout of an earlier one. SchemaError if a role that it needs is missing."""
    applications, retentions, readers = await granted_roles(connection, schema)
    if applications and not readers:
        raise SchemaError(
            f"schema {schema}: the journal is to be read by a role of its own, which is not there: as an administrator "
            "run what `strongroom schema roles` prints, then this again"
        )
    script = f"{upgrade_layout(schema)}\n{grants(schema, applications, retentions, readers)}"

    async def change() -> None:
        await connection.execute(script)

    _log.info("schema %s: bringing the store's own tables to their present layout", schema)
    await _patiently(connection, "the journal", change)


async def index_journal(connection: asyncpg.Connection, schema: str) -> None:
    """Build the journal's missing indexes, partition by partition, beside those who append. Raises Unavailable."""

    async def briefly(sql: str) -> None:
        async def change() -> None:
            await connection.execute(sql)

        await _patiently(connection, "the journal", change)

    for end in journal_indexes.INDEXES:
        await briefly(journal_indexes.declare(schema, end))
        for partition, valid in await journal_indexes.unattached(connection, schema, end):
            name = journal_indexes.index_name(partition, end)
            if valid is False:
                await _drop_index(connection, schema, name)
            if not valid:
                _log.info("schema %s: building index %s", schema, name)
                await _build(connection, schema, "the journal", name, journal_indexes.build(schema, partition, end))
            await briefly(journal_indexes.attach(schema, partition, end))


# --- Online: tables in use --------------------------------------------------------------------------------------


async def change(connection: asyncpg.Connection, schema: str, difference: Difference) -> None:
    """Change one collection's table to fit. Unavailable if its lock is not free in time, SchemaError for a unique index
    that the documents break. Steps that were done by then stay, and do no harm."""
    collection = difference.collection
    await _alter(connection, schema, difference)
    declared = physical_indexes(collection)
    invalid = [name for name in difference.old_indexes if name in declared]
    for name in invalid:
        await _drop_index(connection, schema, name)
    missing = [*difference.new_indexes, *difference.rebuilt_indexes]
    for number, name in enumerate(missing, 1):
        _log.info("%s: building index %s (%d of %d)", collection.name, name, number, len(missing))
        await _build_index(connection, schema, collection, name, declared[name])
    for name in difference.old_indexes:
        if name not in declared:
            _log.info("%s: dropping index %s", collection.name, name)
            await _drop_index(connection, schema, name)
    await finish(connection, schema, collection)


async def finish(connection: asyncpg.Connection, schema: str, collection: Collection) -> None:
    """Record that a collection's table fits its declaration."""
    for name, index in physical_indexes(collection).items():  # an apply that was killed may have left these undone
        await connection.execute(comment_on_index(schema, name, collection, index))
    await comment(connection, schema, collection)
    await remember(connection, schema, collection.name, declaration(collection), finished=True)


async def comment(connection: asyncpg.Connection, schema: str, collection: Collection) -> None:
    """Write the comments that describe the collection into the database."""
    await connection.execute(";\n".join(comments_on(schema, collection)))


def _clauses(difference: Difference) -> list[str]:
    fields = difference.collection.fields
    clauses = [f"DROP COLUMN {quoted(name)}" for name in (*difference.dropped, *difference.retyped)]
    clauses += [add_column(fields[name]) for name in difference.retyped]
    clauses += [add_column(spec) for spec in difference.added]
    clauses += [f"ALTER COLUMN {quoted(name)} DROP NOT NULL" for name in difference.nullable]
    clauses += [f"ALTER COLUMN {quoted(name)} {_default(fields[name])}" for name in difference.defaults]
    return clauses


def _default(spec: FieldSpec) -> str:
    return "DROP DEFAULT" if spec.default is None else f"SET DEFAULT {DIALECT.literal(spec)}"


async def _alter(connection: asyncpg.Connection, schema: str, difference: Difference) -> None:
    """Columns and policies, in one short transaction that waits for its lock only so long, and is tried again."""
    collection = difference.collection
    name = f"{quoted(schema)}.{quoted(collection.name)}"
    clauses = _clauses(difference)
    script = [f"ALTER TABLE {name} {', '.join(clauses)}"] if clauses else []
    if difference.policies is not None:
        script += secure(schema, collection, difference.policies)
    if not script:
        return
    _log.info("%s: altering the table", collection.name)
    # Its indexes come later: if they were recorded now, the next apply would not finish a killed one.
    half = {**declaration(collection), "indexes": []}

    async def change() -> None:
        await connection.execute(";\n".join(script))
        await remember(connection, schema, collection.name, half, finished=False)

    await _patiently(connection, collection.name, change)


async def _patiently(connection: asyncpg.Connection, what: str, change: Callable[[], Awaitable[None]]) -> None:
    """Change the catalogue in one short transaction that waits for its locks only so long, and is tried again."""
    deadline = time.monotonic() + ALTER_DEADLINE_S
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
                await change()
            return
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{what}: its table was in use for {ALTER_DEADLINE_S:g} s without a gap (a transaction "
                    "left open?): nothing was changed, try again"
                ) from None
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311  # jitter, not a secret
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _build_index(
    connection: asyncpg.Connection, schema: str, collection: Collection, name: str, index: Index
) -> None:
    try:
        await _build(
            connection, schema, collection.name, name, create_index(schema, collection, name, concurrently=True)
        )
    except asyncpg.UniqueViolationError:
        await _drop_index(connection, schema, name)
        raise broken_index(collection, index) from None


async def _build(connection: asyncpg.Connection, schema: str, what: str, name: str, sql: str) -> None:
    """Build an index CONCURRENTLY. Raises Unavailable, and the driver's error for documents that break a unique one."""
    for attempt in range(1, _INDEX_ATTEMPTS + 1):
        try:
            await connection.execute(sql, timeout=STATEMENT_TIMEOUT_S)
            break
        except asyncpg.LockNotAvailableError:
            await _drop_index(connection, schema, name)
            raise Unavailable(
                f"{what}: index {name} was not built: a transaction is open since before it began"
            ) from None
        except asyncpg.DeadlockDetectedError:
            await _drop_index(connection, schema, name)
            if attempt == _INDEX_ATTEMPTS:
                raise Unavailable(f"{what}: index {name} was not built: deadlocks, try again") from None


async def _drop_index(connection: asyncpg.Connection, schema: str, name: str) -> None:
    sql = f"DROP INDEX CONCURRENTLY IF EXISTS {quoted(schema)}.{quoted(name)}"
    await connection.execute(sql, timeout=STATEMENT_TIMEOUT_S)


# --- Questions about the documents ------------------------------------------------------------------------------
#
# Row-level security hides the documents from the owner too, so they are asked tenant by tenant.


async def has_documents(connection: asyncpg.Connection, schema: str, collection: str, by_tenant: bool) -> bool:
    """Whether a collection has a document, of any tenant. `by_tenant`: as its table is."""
    table = f"{quoted(schema)}.{quoted(collection)}"
    if not await connection.fetchval("SELECT pg_relation_size($1::text::regclass)", table):
        return False
    if not by_tenant:
        async with connection.transaction():
            await connection.execute(WITH_SECRETS)  # those of a collection of secrets are hidden, too
            return bool(await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table})"))
    sql = f"SELECT 'yes' FROM {table} WHERE tenant_id = _tenant LIMIT 1"
    return await _first_answer(connection, schema, sql) is not None


async def refuse_duplicates(connection: asyncpg.Connection, schema: str, difference: Difference) -> None:
    """Raises SchemaError, before any change, for a new unique index that the documents break."""
    collection = difference.collection
    table = f"{quoted(schema)}.{quoted(collection.name)}"
    for name in (*difference.new_indexes, *difference.rebuilt_indexes):
        index = physical_indexes(collection)[name]
        if not index.unique:
            continue
        begun = {spec.name: spec.default for spec in difference.added}
        begun |= {field: collection.fields[field].default for field in difference.retyped}
        columns = [column for column, _ in index.columns]
        if any(column in begun and begun[column] is None for column in columns):
            continue  # null in every document, and nulls are not compared
        compared = [column for column in columns if column not in begun]
        conditions = [f"{quoted(column)} IS NOT NULL" for column in compared]
        grouped = f" GROUP BY {listed(compared)}" if compared else ""
        ids = "json_build_array(min(id), max(id))::text"
        having = f"{grouped} HAVING count(*) > 1 LIMIT 1"
        if collection.tenant_scoped:
            where = " AND ".join(["tenant_id = _tenant", *conditions])
            answer = await _first_answer(connection, schema, f"SELECT {ids} FROM {table} WHERE {where}{having}")
        else:
            where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
            answer = await connection.fetchval(f"SELECT {ids} FROM {table}{where}{having}")
        if answer is not None:
            raise broken_index(collection, index, *json.loads(answer))


def broken_index(collection: Collection, index: Index, *ids: str) -> SchemaError:
    fields = " and ".join(name for name, _ in index.columns)
    which = f" ({' and '.join(map(repr, ids))})" if ids else ""
    return SchemaError(
        f"add index {collection.name}.{index.name}: two documents{which} have the same {fields}; change one first"
    )


async def _first_answer(connection: asyncpg.Connection, schema: str, sql: str) -> str | None:
    """The first text that `sql` returns for any tenant, which it names `_tenant`; None if it returns none."""
    block = f"""
        DO $body$
        DECLARE
            _tenant text;
            _answer text;
        BEGIN
            {AS_OWNER};  -- the list of tenants is under row-level security as well
            FOR _tenant IN SELECT tenant_id FROM {quoted(schema)}.strongroom_tenants LOOP
                PERFORM set_config('app.current_tenant', _tenant, true);
                {sql} INTO _answer;
                EXIT WHEN _answer IS NOT NULL;
            END LOOP;
            PERFORM set_config('app.current_tenant', '', true), set_config('strongroom.answer', _answer, true);
        END $body$"""
    async with connection.transaction():
        await connection.execute(block, timeout=STATEMENT_TIMEOUT_S)
        found: str | None = await connection.fetchval("SELECT nullif(current_setting('strongroom.answer', true), '')")
    return found
