"""A PostgreSQL schema of a test's own: its roles and connections, what its catalog says, documents in it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest

from strongroom.entities.entity import FieldSpec, FieldType
from strongroom.storage.port import ChangeKind, SchemaChange
from strongroom.storage.postgres.journal_access import AS_OWNER
from strongroom.storage.postgres.partitions import journal_time
from strongroom.storage.postgres.roles import roles_sql
from strongroom.storage.postgres.schema import prepare
from strongroom.testing.storage.samples import COLLECTIONS
from strongroom.testing.storage.schema import declare
from tests.helpers.servers import postgres

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
_numbers = itertools.count()


@dataclass(frozen=True)
class Settings:
    schema: str
    pgbouncer: bool = False


@dataclass(frozen=True)
class Place:
    """A schema of its own, in the database of this test's worker; `connect` gives connections by role."""

    dsn: str
    settings: Settings
    owner: str

    def url(self, user: str) -> str:
        """The store's URL for a role."""
        parts = urlsplit(self.dsn)
        place = f"{quote(user, safe='')}:secret@{parts.hostname}:{parts.port}{parts.path}"
        return f"postgresql://{place}?schema={self.schema}"

    def connect(self, user: str | None = None, **more: Any) -> Any:
        return asyncpg.connect(self.dsn, user=user or self.owner, password="secret", statement_cache_size=0, **more)

    @property
    def schema(self) -> str:
        return self.settings.schema

    def table(self, name: str = "things") -> str:
        return f'"{self.schema}"."{name}"'


VERSIONS = ["bundled", *(["installed"] if postgres.installed() else [])]
on_each_version = pytest.mark.parametrize("dsn", VERSIONS, indirect=True)
"""Also on the machine's own PostgreSQL, where it has one: the oldest that is supported, as Debian has it."""


def kinds(changes: Sequence[SchemaChange]) -> list[tuple[ChangeKind, str | None]]:
    return [(change.kind, change.name) for change in changes]


def told(changes: Sequence[SchemaChange]) -> list[str]:
    return [str(change) for change in changes]


async def catalog(connection: asyncpg.Connection, schema: str, *tables: str) -> dict[str, Any]:
    """What PostgreSQL says of the tables: columns, indexes, policies, constraints, privileges; order aside."""
    found: dict[str, Any] = {}
    for table in tables:
        oid = await connection.fetchval("SELECT to_regclass($1)::oid", f'"{schema}"."{table}"')
        columns = await connection.fetch(
            """SELECT attname::text, format_type(atttypid, atttypmod) AS type, attnotnull, collname::text,
                pg_get_expr(adbin, adrelid) AS default
            FROM pg_attribute LEFT JOIN pg_collation ON pg_collation.oid = attcollation
            LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attname""",
            oid,
        )
        indexes = await connection.fetch(
            """SELECT pg_get_indexdef(indexrelid) AS definition, indisvalid, indisunique,
                obj_description(indexrelid, 'pg_class') AS comment
            FROM pg_index WHERE indrelid = $1 ORDER BY 1""",
            oid,
        )
        policies = await connection.fetch(
            """SELECT polname::text, polcmd::text, pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)
            FROM pg_policy WHERE polrelid = $1 ORDER BY 1""",
            oid,
        )
        flags = await connection.fetchrow(
            "SELECT relrowsecurity, relforcerowsecurity, relacl::text FROM pg_class WHERE oid = $1", oid
        )
        found[table] = [list(map(tuple, part)) for part in (columns, indexes, policies)] + [tuple(flags or ())]
    return found


async def insert(
    connection: asyncpg.Connection, place: Place, tenant: str, id: str, name: str, version: int = 1
) -> None:
    """A document as a store with the first declaration of `declare()` writes it."""
    async with connection.transaction():
        await connection.execute("SELECT set_config('app.current_tenant', $1, true)", tenant)
        await connection.execute(
            f"INSERT INTO {place.table('strongroom_tenants')} VALUES ($1) ON CONFLICT DO NOTHING", tenant
        )
        await connection.execute(
            f"INSERT INTO {place.table()} (tenant_id, id, version, created_at, updated_at, name) "
            "VALUES ($1, $2, $3, now(), now(), $4)",
            tenant,
            id,
            version,
            name,
        )


async def documents(connection: asyncpg.Connection, place: Place, tenant: str, table: str = "things") -> list[Any]:
    async with connection.transaction():
        await connection.execute("SELECT set_config('app.current_tenant', $1, true)", tenant)
        return list(await connection.fetch(f"SELECT * FROM {place.table(table)} ORDER BY id"))


RANK = FieldSpec("rank", FieldType.INT, has_default=True, default=7)
REQUIRED = FieldSpec("must", FieldType.TEXT)


# --- The journal ---

RECORD = "sequence, at, at_us, id, actor, request_id, action, collection, entity_id"


async def whole(connection: asyncpg.Connection, sql: str) -> list[Any]:
    """What the owner sees of the journal where it says that it is to see all of it."""
    async with connection.transaction():
        await connection.execute(AS_OWNER)
        return list(await connection.fetch(sql))


async def append(connection: asyncpg.Connection, place: Place, sequence: int, at_us: int) -> str:
    """A journal record of no tenant, added by the owner; the partition that holds it."""
    async with connection.transaction():
        await connection.execute(AS_OWNER)
        partition: str = await connection.fetchval(
            f"INSERT INTO {place.table('strongroom_journal')} ({RECORD}) "
            "VALUES ($1, $2, $3, 'r', 'a', 'q', 'x', 'c', 'e') RETURNING tableoid::regclass::text",
            sequence,
            journal_time(at_us),
            at_us,
        )
    return partition.rpartition(".")[2]


def us(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


# --- Roles ---


@dataclass(frozen=True)
class Roles:
    owner: str
    application: str
    retention: str
    reader: str


@asynccontextmanager
async def split(admin: asyncpg.Connection, place: Place, *, apply_first: bool) -> AsyncIterator[tuple[Place, Roles]]:
    """The roles as an operator makes them from `roles_sql`, and the schema applied by the owner."""
    roles = Roles(f"{place.owner}_o", f'{place.owner} "app"', f"{place.owner}_r", f"{place.owner}_w")
    owned = replace(place, owner=roles.owner)
    script = roles_sql(place.settings, roles.owner, roles.application, roles.retention, roles.reader)

    async def apply() -> None:
        connection = await owned.connect()
        await prepare(connection, place.settings, [declare(), *COLLECTIONS])
        await connection.close()

    database = await admin.fetchval("SELECT current_database()")
    await admin.execute(script)
    for role in (roles.owner, roles.application, roles.retention):
        await admin.execute(f"""ALTER ROLE "{role.replace('"', '""')}" PASSWORD 'secret'""")
    if apply_first:
        # A schema from before the roles were split: its application has no right yet.
        await admin.execute(f"GRANT CREATE ON DATABASE {database} TO {roles.owner}")
        quoted = '"' + roles.application.replace('"', '""') + '"'
        for kind in ("TABLES", "SEQUENCES", "FUNCTIONS"):
            await admin.execute(
                f"ALTER DEFAULT PRIVILEGES FOR ROLE {roles.owner} IN SCHEMA {place.schema} "
                f"REVOKE ALL ON {kind} FROM {quoted}, {roles.retention}"
            )
        await apply()
        await admin.execute(script)
    else:
        await apply()
        await admin.execute(script)  # twice is as once
    yield owned, roles
