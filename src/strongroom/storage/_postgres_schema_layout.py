"""The tables in PostgreSQL that are the store's own: the script that makes them, and what they say of what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from ..errors import StoreError
from . import _postgres_partitions
from ._postgres_schema_tables import Stored, stored
from ._sql import quoted

LAYOUT = 1
"""The version of what is written below, kept in `strongroom_layout`."""
OLDEST_LAYOUT = 1
"""The oldest version that this one can use."""

JOURNAL_COLUMNS = (
    "sequence", "at", "at_us", "id", "tenant_id", "actor", "request_id", "action", "collection", "entity_id", "version",
    "before", "after",
)  # fmt: skip


def make_layout(schema: str) -> str:
    """The script that makes the store's own tables, in a schema that is there."""
    name = quoted(schema)
    return f"""
CREATE TABLE {name}.strongroom_layout (version integer NOT NULL, made_at timestamptz NOT NULL DEFAULT now());
INSERT INTO {name}.strongroom_layout VALUES ({LAYOUT});
CREATE TABLE {name}.strongroom_schema (
    collection text COLLATE "C" PRIMARY KEY,
    declaration jsonb NOT NULL,
    fingerprint text,
    applied_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE {name}.strongroom_tenants (tenant_id text COLLATE "C" PRIMARY KEY);
CREATE TABLE {name}.strongroom_journal (
    sequence bigint NOT NULL,
    at timestamptz NOT NULL,
    at_us bigint NOT NULL,
    id text COLLATE "C" NOT NULL,
    tenant_id text COLLATE "C",
    actor text COLLATE "C" NOT NULL,
    request_id text COLLATE "C" NOT NULL,
    action text COLLATE "C" NOT NULL,
    collection text COLLATE "C" NOT NULL,
    entity_id text COLLATE "C" NOT NULL,
    version bigint,
    before text COLLATE "C",
    after text COLLATE "C"
) PARTITION BY RANGE (at);
CREATE TABLE {name}.strongroom_journal_default PARTITION OF {name}.strongroom_journal DEFAULT;
CREATE INDEX "strongroom_journal.index.sequence" ON {name}.strongroom_journal (sequence);
CREATE INDEX "strongroom_journal.index.tenant_id.sequence" ON {name}.strongroom_journal (tenant_id, sequence);
-- One row, written by each commit that appends: room beside it keeps its versions on its page.
CREATE TABLE {name}.strongroom_journal_head (sequence bigint NOT NULL) WITH (fillfactor = 10);
CREATE UNIQUE INDEX "strongroom_journal_head.unique" ON {name}.strongroom_journal_head ((true));
INSERT INTO {name}.strongroom_journal_head VALUES (0);
DO $body$ BEGIN
    -- Begins at the present, in microseconds, so that a store made anew never gives an old version again.
    EXECUTE format('CREATE SEQUENCE {name}.strongroom_version AS bigint CACHE 1 START %s',
        floor(extract(epoch FROM clock_timestamp()) * 1000000)::bigint);
END $body$;
CREATE FUNCTION {name}.strongroom_require(holds boolean) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF holds IS NOT TRUE THEN
        RAISE EXCEPTION 'a precondition does not hold' USING ERRCODE = 'SR001';
    END IF;
    RETURN true;
END
$body$;
REVOKE ALL ON FUNCTION {name}.strongroom_require FROM PUBLIC;
{_postgres_partitions.functions(schema)}
SELECT {name}.strongroom_make_partitions(now(), {_postgres_partitions.MONTHS_AHEAD});
"""


_STATE = """
SELECT namespace.oid IS NOT NULL AS schema_exists,
    to_regclass(format('%I.strongroom_layout', $1::text)) IS NOT NULL AS made,
    CASE WHEN namespace.oid IS NULL THEN has_database_privilege(current_database(), 'CREATE')
        ELSE pg_has_role(namespace.nspowner, 'USAGE') END AS may_change,
    ARRAY(SELECT relname::text FROM pg_class WHERE relnamespace = namespace.oid AND relkind IN ('r', 'p', 'f')
        AND relname !~ '^strongroom_') AS tables
FROM (SELECT 1) AS one LEFT JOIN pg_namespace AS namespace ON nspname = $1
"""


_FINGERPRINT = """
SELECT md5(concat_ws('|', relrowsecurity, relforcerowsecurity,
    (SELECT string_agg(concat_ws(' ', attname, format_type(atttypid, atttypmod), attnotnull, attcollation), ','
            ORDER BY attname)
        FROM pg_attribute WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped),
    (SELECT string_agg(concat_ws(' ', pg_get_indexdef(indexrelid), indisvalid), ',' ORDER BY indexrelid)
        FROM pg_index WHERE indrelid = pg_class.oid),
    (SELECT string_agg(concat_ws(' ', polname, polcmd, pg_get_expr(polqual, polrelid),
            pg_get_expr(polwithcheck, polrelid)), ',' ORDER BY polname)
        FROM pg_policy WHERE polrelid = pg_class.oid)))
FROM pg_class WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = $1::text)
    AND relname = collection COLLATE "C"
"""
"""What a collection's table looks like, as one text that changes when anyone changes the table."""


@dataclass(frozen=True, slots=True)
class State:
    """What is in the schema now."""

    schema_exists: bool
    made: bool
    """The store's own tables are there."""
    may_change: bool
    """This role owns the schema or, if there is none, may make one."""
    applied: Mapping[str, Stored]
    """The declarations as they were last applied."""
    drifted: frozenset[str]
    """Collections whose tables were changed since, by hand or by an apply that did not end."""
    tables: frozenset[str]
    """Every table of the schema that is not the store's own."""


async def read_state(connection: asyncpg.Connection, schema: str) -> State:
    """What is there. StoreError for a layout that this version cannot use, and for a schema that is somebody else's."""
    try:
        return await _read_state(connection, schema)
    except asyncpg.InsufficientPrivilegeError:
        raise StoreError(
            f"schema {schema}: this role may not read it: as an administrator run what `strongroom schema roles` prints"
        ) from None


async def _read_state(connection: asyncpg.Connection, schema: str) -> State:
    row = await connection.fetchrow(_STATE, schema)
    tables = frozenset(row["tables"])
    if not row["made"]:
        if tables:
            raise StoreError(f"schema {schema}: holds tables that are not Strongroom's; name another one with ?schema=")
        return State(row["schema_exists"], False, row["may_change"], {}, frozenset(), tables)
    await check_layout(connection, schema)
    rows = await connection.fetch(
        f"SELECT collection, declaration::text, fingerprint = ({_FINGERPRINT}) IS TRUE AS intact "
        f"FROM {quoted(schema)}.strongroom_schema",
        schema,
    )
    applied = {row["collection"]: stored(json.loads(row["declaration"])) for row in rows}
    drifted = frozenset(row["collection"] for row in rows if not row["intact"])
    return State(True, True, row["may_change"], applied, drifted, tables)


async def remember(
    connection: asyncpg.Connection, schema: str, collection: str, declared: Mapping[str, Any], *, finished: bool
) -> None:
    """Keep a declaration as applied. One that is not `finished` counts as drifted, so that the next apply goes on."""
    fingerprint = f"({_FINGERPRINT})" if finished else "$1"
    await connection.execute(
        f"""
        INSERT INTO {quoted(schema)}.strongroom_schema AS kept (collection, declaration, fingerprint)
        SELECT collection, $3::jsonb, {fingerprint} FROM (SELECT $2::text AS collection) AS one
        ON CONFLICT (collection) DO UPDATE
        SET declaration = excluded.declaration, fingerprint = excluded.fingerprint, applied_at = now()
        """,
        schema if finished else None,
        collection,
        json.dumps(declared),
    )


async def check_layout(connection: asyncpg.Connection, schema: str) -> None:
    """StoreError if the store's own tables are of a layout that this version cannot use."""
    found = await connection.fetchval(f"SELECT version FROM {quoted(schema)}.strongroom_layout")
    if found is None:
        raise StoreError(f"schema {schema}: strongroom_layout has no row: the schema is damaged, restore a backup")
    if found > LAYOUT:
        raise StoreError(
            f"schema {schema}: found layout {found}, expected at most {LAYOUT}: a later version of Strongroom made it"
        )
    if found < OLDEST_LAYOUT:
        raise StoreError(
            f"schema {schema}: found layout {found}, expected at least {OLDEST_LAYOUT}: an earlier version of "
            "Strongroom made it; move the data with `strongroom migrate`"
        )
