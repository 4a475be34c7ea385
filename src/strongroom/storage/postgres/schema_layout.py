"""The store's own tables on PostgreSQL: the script that makes them, and the state of the schema that they record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from ...errors import StoreError
from ..sql import quoted
from . import journal_indexes, journal_upkeep, partitions
from .journal_access import POLICIES, READER_POLICY, policies
from .schema_tables import Stored, comment_text, stored

LAYOUT = 3
"""The version of the layout below, kept in `strongroom_layout`."""
OLDEST_LAYOUT = 1
"""The oldest version that this one can use."""


def make_layout(schema: str) -> str:
    """The script that makes the store's own tables in an existing schema."""
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
    after text COLLATE "C",
    salt bytea NOT NULL DEFAULT '',
    claims text COLLATE "C",
    rules text COLLATE "C"
) PARTITION BY RANGE (at);
CREATE TABLE {name}.strongroom_journal_default PARTITION OF {name}.strongroom_journal DEFAULT;
{journal_indexes.create(schema)}
-- One row, written by each commit that appends: room beside it keeps its versions on its page.
CREATE TABLE {name}.strongroom_journal_head (sequence bigint NOT NULL, floor bigint NOT NULL DEFAULT 0)
WITH (fillfactor = 10);
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
{journal_upkeep.functions(schema)}
{partitions.functions(schema)}
SELECT {name}.strongroom_make_partitions(now(), {partitions.MONTHS_AHEAD});
{policies(schema)}
{comments(schema)}
"""


def upgrade_layout(schema: str) -> str:
    """The script that makes the present layout of an older one, or sets up again what was changed by hand. Since layout
    2 the journal has a floor, and row-level security as the list of tenants has. Since layout 3 records have `salt`,
    `claims` and `rules`, and each tenant has a floor. The journal's indexes come afterwards."""
    name = quoted(schema)
    return f"""
ALTER TABLE {name}.strongroom_journal NO FORCE ROW LEVEL SECURITY, DISABLE ROW LEVEL SECURITY;
ALTER TABLE {name}.strongroom_tenants NO FORCE ROW LEVEL SECURITY, DISABLE ROW LEVEL SECURITY;
DO $body$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = '{name}.strongroom_journal_head'::regclass
            AND attname = 'floor') THEN
        ALTER TABLE {name}.strongroom_journal_head ADD COLUMN floor bigint NOT NULL DEFAULT 0;
        UPDATE {name}.strongroom_journal_head
        SET floor = coalesce((SELECT min(sequence) - 1 FROM {name}.strongroom_journal), sequence);
    END IF;
END $body$;
ALTER TABLE {name}.strongroom_journal ADD COLUMN IF NOT EXISTS salt bytea NOT NULL DEFAULT '',
    ADD COLUMN IF NOT EXISTS claims text COLLATE "C", ADD COLUMN IF NOT EXISTS rules text COLLATE "C";
{journal_upkeep.functions(schema)}
-- Whose records the dropped ones were is not known any more, so they count for every tenant.
INSERT INTO {name}.strongroom_journal_floors
SELECT tenant_id, floor FROM {name}.strongroom_journal_head,
    (SELECT tenant_id FROM {name}.strongroom_tenants UNION SELECT NULL) AS tenants
WHERE floor > 0 AND (SELECT version FROM {name}.strongroom_layout) < 3 ON CONFLICT DO NOTHING;
{partitions.functions(schema)}
{policies(schema)}
{comments(schema)}
UPDATE {name}.strongroom_layout SET version = {LAYOUT};
"""


_COMMENTS = {
    "strongroom_layout": "The version of how Strongroom keeps its own tables in this schema.",
    "strongroom_schema": "The declarations of the collections as they were last applied.",
    "strongroom_tenants": "The tenants that have, or once had, documents. Under row-level security.",
    "strongroom_journal": "Who changed what, when, from what to what, in which request; only ever added to, "
    "partitioned by month. Under row-level security: a tenant's own records, or all of them for the reader role.",
    "strongroom_journal_head": "One row: how far the journal goes, and what retention has dropped of it.",
    "strongroom_journal_floors": "What retention has dropped of each tenant's records. Under row-level security.",
    "strongroom_journal.sequence": "The place in the journal: records are added in the order of their commits.",
    "strongroom_journal.at": "When, as far as a calendar has it; at_us is exact.",
    "strongroom_journal.at_us": "When: microseconds since 1970-01-01T00:00:00Z.",
    "strongroom_journal.id": "The record's own id.",
    "strongroom_journal.tenant_id": "The tenant whom the change concerns; null is the platform itself.",
    "strongroom_journal.actor": "Who made the change: key:ID, or the name that a library call gave.",
    "strongroom_journal.request_id": "The request that it was made in.",
    "strongroom_journal.action": "create, update, delete, add (to a counter), expire, or deny (refused by the rules).",
    "strongroom_journal.collection": "The collection of the document, which is its table's name.",
    "strongroom_journal.entity_id": "The document's id.",
    "strongroom_journal.version": "The document's version after the change.",
    "strongroom_journal.before": "The changed fields before, as JSON, secrets masked.",
    "strongroom_journal.after": "The changed fields after, as JSON, secrets masked.",
    "strongroom_journal.salt": "What hides the record's values in its leaf of the Merkle tree; longer once redacted.",
    "strongroom_journal.claims": "The claims of the caller's token, as JSON.",
    "strongroom_journal.rules": "The version of the access rules that decided; null: the default rules.",
    "strongroom_journal_floors.tenant_id": "The tenant; null is the platform itself.",
    "strongroom_journal_floors.sequence": "The greatest sequence of its dropped records.",
    "strongroom_journal_head.sequence": "The last record's sequence.",
    "strongroom_journal_head.floor": "The greatest sequence that retention has dropped; 0 if nothing was.",
    "strongroom_tenants.tenant_id": "The tenant.",
    "strongroom_schema.collection": "The collection, which is its table's name.",
    "strongroom_schema.declaration": "Its fields with type and default, and its indexes.",
    "strongroom_schema.fingerprint": "What its table looked like after the apply; it tells of changes by hand.",
    "strongroom_schema.applied_at": "When it was last applied.",
    "strongroom_layout.version": "The layout's version.",
    "strongroom_layout.made_at": "When the schema was made.",
}


def comments(schema: str) -> str:
    """The statements that write comments on the store's own tables and columns into the database."""
    lines = []
    for what, text in _COMMENTS.items():
        table, _, column = what.partition(".")
        kind = "COLUMN" if column else "TABLE"
        place = f"{quoted(schema)}.{table}" + (f".{column}" if column else "")
        lines.append(f"COMMENT ON {kind} {place} IS {comment_text(text)};")
    return "\n".join(lines)


_STATE = """
SELECT namespace.oid IS NOT NULL AS schema_exists,
    to_regclass(format('%I.strongroom_layout', $1::text)) IS NOT NULL AS made,
    CASE WHEN namespace.oid IS NULL THEN has_database_privilege(current_database(), 'CREATE')
        ELSE pg_has_role(namespace.nspowner, 'USAGE') END AS may_change,
    ARRAY(SELECT relname::text FROM pg_class WHERE relnamespace = namespace.oid AND relkind IN ('r', 'p', 'f')
        AND relname !~ '^strongroom_') AS tables,
    (SELECT count(*) FROM pg_class WHERE relnamespace = namespace.oid AND relname = ANY($2::text[])
        AND relrowsecurity AND relforcerowsecurity) AS forced,
    ARRAY(SELECT relname::text || '.' || polname::text FROM pg_policy JOIN pg_class ON pg_class.oid = polrelid
        WHERE relnamespace = namespace.oid AND relname = ANY($2::text[]) AND polname <> $3) AS policies,
    (SELECT count(*) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
        WHERE relnamespace = namespace.oid AND relname = ANY($4::text[]) AND indisvalid) AS indexes
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
"""A fingerprint of a collection's table: a text that changes whenever the table does."""


_NEWS = {
    1: "row-level security for the journal and the list of tenants, and what 2 lacks",
    2: "salts, claims and rules of journal records, floors of tenants, and indexes for searches",
}
"""What the present layout adds to older ones."""


@dataclass(frozen=True, slots=True)
class State:
    """The state of the schema now."""

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
    layout: int = LAYOUT
    secured: bool = True
    """The store's own tables are under row-level security as they were made."""
    indexed: bool = True
    """Every index of the journal is complete."""

    @property
    def outdated(self) -> str | None:
        """What must be done to the store's own tables, if anything."""
        if not self.made:
            return None
        if self.layout < LAYOUT:
            return f"layout {self.layout} becomes {LAYOUT}: {_NEWS[self.layout]}"
        if not self.secured:
            return "row-level security was changed"
        return None if self.indexed else "the journal lacks an index"


async def read_state(connection: asyncpg.Connection, schema: str) -> State:
    """The state of the schema. StoreError for a layout that this version cannot use, and for a foreign schema."""
    try:
        return await _read_state(connection, schema)
    except asyncpg.InsufficientPrivilegeError:
        raise StoreError(
            f"schema {schema}: this role may not read it: as an administrator run what `strongroom schema roles` prints"
        ) from None


async def _read_state(connection: asyncpg.Connection, schema: str) -> State:
    row = await connection.fetchrow(_STATE, schema, list(POLICIES), READER_POLICY, journal_indexes.NAMES)
    tables = frozenset(row["tables"])
    if not row["made"]:
        if tables:
            raise StoreError(f"schema {schema}: holds tables that are not Strongroom's; name another one with ?schema=")
        return State(row["schema_exists"], False, row["may_change"], {}, frozenset(), tables)
    version = await check_layout(connection, schema)
    rows = await connection.fetch(
        f"SELECT collection, declaration::text, fingerprint = ({_FINGERPRINT}) IS TRUE AS intact "
        f"FROM {quoted(schema)}.strongroom_schema",
        schema,
    )
    applied = {row["collection"]: stored(json.loads(row["declaration"])) for row in rows}
    drifted = frozenset(row["collection"] for row in rows if not row["intact"])
    expected = {f"{table}.{policy}" for table, names in POLICIES.items() for policy in names}
    secured = row["forced"] == len(POLICIES) and set(row["policies"]) == expected
    indexed = row["indexes"] == len(journal_indexes.NAMES)
    return State(True, True, row["may_change"], applied, drifted, tables, version, secured, indexed)


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


async def check_layout(connection: asyncpg.Connection, schema: str) -> int:
    """The layout of the store's own tables. StoreError for one that this version cannot use."""
    found: int | None = await connection.fetchval(f"SELECT version FROM {quoted(schema)}.strongroom_layout")
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
    return found
