"""PostgreSQL's schema: made, compared, changed under those who use it; who may do what; the journal's partitions."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from strongroom.app import SYSTEM_ENTITIES
from strongroom.entities.entity import Collection, Entity, FieldSpec, FieldType, Index, Secret
from strongroom.entities.query import Aggregate, Query
from strongroom.errors import (
    ConfigError,
    Conflict,
    Denied,
    Gone,
    SchemaError,
    StoreError,
    Unavailable,
)
from strongroom.storage.port import (
    Append,
    ChangeKind,
    Create,
    Delete,
    Patch,
    Put,
    SchemaChange,
)
from strongroom.storage.postgres import partitions
from strongroom.storage.postgres import schema as schema_module
from strongroom.storage.postgres import schema_apply as online
from strongroom.storage.postgres import schema_layout as layout
from strongroom.storage.postgres.journal_access import AS_OWNER, POLICIES, READER_POLICY
from strongroom.storage.postgres.partitions import drop_partitions_before, ensure_partitions, journal_time
from strongroom.storage.postgres.roles import check_role, roles_sql
from strongroom.storage.postgres.schema import prepare
from strongroom.storage.postgres.schema_tables import identifier, is_of_secrets, physical_indexes
from strongroom.storage.postgres.store import PostgresStore
from strongroom.testing.storage.backend import examples
from strongroom.testing.storage.samples import COLLECTIONS, batch, item, record
from strongroom.testing.storage.schema import declare
from tests.helpers.servers import postgres
from tests.helpers.waiting import wait_until

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
_databases: dict[str, str] = {}


@pytest.fixture
def dsn(request: pytest.FixtureRequest) -> str:
    """The URL, as administrator, of a database that this process has to itself: the build of an index waits for the
    transactions of its database, and other tests leave some open."""
    version = getattr(request, "param", "bundled")
    if version not in _databases:
        binaries = postgres.bundled() if version == "bundled" else postgres.installed()
        assert binaries is not None
        server = postgres.start(request, "postgres-18" if version == "bundled" else "postgres-installed", binaries)
        name = f"schema_{os.getpid()}"
        server.execute(f"CREATE DATABASE {name}")
        _databases[version] = postgres.admin_dsn(server.port, name)
    return _databases[version]


@pytest.fixture
async def admin(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def place(admin: asyncpg.Connection, dsn: str) -> Place:
    """A role that may make schemas, and no schema yet."""
    unique = f"{os.getpid()}_{next(_numbers)}"
    owner = f"owner_{unique}"
    database = await admin.fetchval("SELECT current_database()")
    await admin.execute(f"CREATE ROLE {owner} LOGIN PASSWORD 'secret'; GRANT CREATE ON DATABASE {database} TO {owner}")
    return Place(dsn, Settings(f"s_{unique}"), owner)


@pytest.fixture
async def connection(place: Place) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the schema's owner-to-be."""
    opened = await place.connect()
    yield opened
    await opened.close()


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


# --- What is made ---------------------------------------------------------------------------------------------


@on_each_version
async def test_every_tenant_table_has_forced_policies_and_indexes_led_by_the_tenant(
    connection: asyncpg.Connection, place: Place
) -> None:
    collections = [cls.__collection__ for cls in SYSTEM_ENTITIES] + list(COLLECTIONS)
    await prepare(connection, place.settings, collections)
    for collection in collections:
        columns, indexes, policies, flags = (await catalog(connection, place.schema, collection.name))[collection.name]
        assert [name for name, *_ in columns if name == "tenant_id"] == ["tenant_id"] * collection.tenant_scoped
        assert {collation for _, kind, _, collation, _ in columns if kind == "text"} == {"C"}
        secured = collection.tenant_scoped or is_of_secrets(collection)
        assert flags[:2] == (secured, secured)
        assert {command for _, command, _, _ in policies} == (set("rawd") if secured else set())
        assert len(indexes) == len(physical_indexes(collection)) + 1
        if collection.tenant_scoped:
            assert all("(tenant_id, " in definition for definition, *_ in indexes), indexes
        wanted = "NULLIF(current_setting('app.current_tenant'::text, true), ''::text)"
        if not collection.tenant_scoped:
            wanted = "current_setting('app.secrets'::text, true)"
        assert all(wanted in (using or check) for _, _, using, check in policies)


async def test_collections_with_a_long_common_prefix_have_distinct_index_names(
    connection: asyncpg.Connection, place: Place
) -> None:
    long = "c" * 58
    fields = [FieldSpec("f" * 40 + end, FieldType.TEXT) for end in "ab"]
    indexes = tuple(Index(spec.name) for spec in fields)
    collections = [declare(*fields, indexes=indexes, name=long + end) for end in "xy"]
    await prepare(connection, place.settings, collections)
    assert await prepare(connection, place.settings, collections, mode="plan") == ()
    for collection in collections:
        assert all(len(name) <= 63 for name in physical_indexes(collection))
        found = (await catalog(connection, place.schema, collection.name))[collection.name][1]
        comments = {comment for _, _, _, comment in found if comment}
        assert comments == {f"{collection.name}.index.{spec.name}" for spec in fields}


@given(st.text("abc.-_", max_size=200), st.text("abc.-_", max_size=200))
def test_a_shortened_name_fits_and_is_unique(one: str, other: str) -> None:
    assert len(identifier(one)) <= 63
    assert (identifier(one) == identifier(other)) == (one == other)


async def test_a_collection_with_a_reserved_name_is_refused(connection: asyncpg.Connection, place: Place) -> None:
    with pytest.raises(SchemaError, match="strongroom_journal"):
        await prepare(connection, place.settings, [declare(name="strongroom_journal")])


async def test_versions_keep_growing_when_the_store_is_recreated(connection: asyncpg.Connection, place: Place) -> None:
    async def version() -> int:
        await prepare(connection, place.settings, [declare()])
        given: int = await connection.fetchval(f"SELECT nextval('{place.schema}.strongroom_version')")
        return given

    first = await version()
    assert abs(first - datetime.now(UTC).timestamp() * 1e6) < 600e6
    await connection.execute(f"DROP SCHEMA {place.schema} CASCADE")
    assert await version() > first


async def test_every_table_and_column_has_a_comment(connection: asyncpg.Connection, place: Place) -> None:
    class Told(Entity, collection="told", ttl="until"):
        """What the owner's people read.

        Not this.
        """

        tenant: str = Field(default="", description="It's theirs.")
        until: datetime | None = None
        token: Annotated[str, Secret()] = ""

    collections = [*(entity.__collection__ for entity in SYSTEM_ENTITIES), Told.__collection__]
    await prepare(connection, place.settings, collections)
    tables = await connection.fetch(
        "SELECT relname::text AS name, obj_description(oid, 'pg_class') AS text FROM pg_class "
        "WHERE relnamespace = $1::text::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition",
        place.schema,
    )
    assert [row["name"] for row in tables if not row["text"]] == []
    assert {row["name"]: row["text"] for row in tables}["told"].startswith("What the owner's people read. One tenant")
    columns = await connection.fetch(
        "SELECT relname::text AS table, attname::text AS name, col_description(attrelid, attnum) AS text "
        "FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid WHERE attnum > 0 AND NOT attisdropped "
        "AND relnamespace = $1::text::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition",
        place.schema,
    )
    texts = {(row["table"], row["name"]): row["text"] for row in columns}
    own = {"tenant_id", "tenant", "id", "version", "created_at", "updated_at"}
    silent = [key for key, text in texts.items() if not text and (key[1] in own or key[0].startswith("strongroom_"))]
    assert silent == []
    assert texts["told", "tenant"] == "It's theirs."
    assert "Secret" in texts["told", "token"]
    assert "the document is gone" in texts["told", "until"]
    assert "tenant_id" in texts["api_keys", "tenant"], "one thing under two names says so"
    assert await prepare(connection, place.settings, collections, mode="plan") == (), "comments are no difference"


async def test_the_head_of_the_journal_stays_one_row(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [])
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute(f"INSERT INTO {place.table('strongroom_journal_head')} VALUES (1)")


async def test_a_precondition_that_does_not_hold_raises_its_own_sqlstate(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [])
    assert await connection.fetchval(f"SELECT {place.schema}.strongroom_require(true)") is True
    for wrong in ("false", "null"):
        with pytest.raises(asyncpg.PostgresError) as raised:
            await connection.fetchval(f"SELECT {place.schema}.strongroom_require({wrong})")
        assert raised.value.sqlstate == "SR001"


# --- Comparing ------------------------------------------------------------------------------------------------


async def test_a_plan_writes_nothing_at_all(connection: asyncpg.Connection, place: Place) -> None:
    planned = await prepare(connection, place.settings, [declare()], mode="plan")
    assert kinds(planned) == [(ChangeKind.CREATE_COLLECTION, None)]
    assert await connection.fetchval("SELECT to_regnamespace($1)", place.schema) is None
    await prepare(connection, place.settings, [declare()])
    before = await catalog(connection, place.schema, "things")
    await prepare(connection, place.settings, [declare(RANK, indexes=(Index("rank"),))], mode="plan")
    assert await catalog(connection, place.schema, "things") == before


BY_HAND = {
    'DROP INDEX {s}."things.index.name"': (ChangeKind.ADD_INDEX, "name_index"),
    "CREATE INDEX mine ON {s}.things (tenant_id)": (ChangeKind.DROP_INDEX, "mine"),
    "ALTER TABLE {s}.things DROP COLUMN rank": (ChangeKind.ADD_FIELD, "rank"),
    "ALTER TABLE {s}.things ADD COLUMN mine int": (ChangeKind.DROP_FIELD, "mine"),
    "ALTER TABLE {s}.things ALTER COLUMN rank TYPE integer": (ChangeKind.CHANGE_FIELD, "rank"),
    'ALTER TABLE {s}.things ALTER COLUMN word TYPE text COLLATE "POSIX"': (ChangeKind.CHANGE_FIELD, "word"),
    "ALTER TABLE {s}.things ALTER COLUMN maybe SET NOT NULL": (ChangeKind.CHANGE_FIELD, "maybe"),
    "ALTER TABLE {s}.things NO FORCE ROW LEVEL SECURITY": (ChangeKind.CHANGE_POLICIES, None),
    "ALTER TABLE {s}.things DISABLE ROW LEVEL SECURITY": (ChangeKind.CHANGE_POLICIES, None),
    "DROP POLICY tenant_delete ON {s}.things": (ChangeKind.CHANGE_POLICIES, None),
    "ALTER POLICY tenant_select ON {s}.things USING (true)": (ChangeKind.CHANGE_POLICIES, None),
    "CREATE POLICY mine ON {s}.things USING (true)": (ChangeKind.CHANGE_POLICIES, None),
}


@on_each_version
@pytest.mark.parametrize("statement", BY_HAND)
async def test_manual_schema_changes_are_shown_by_plan_and_undone_by_apply(
    connection: asyncpg.Connection, place: Place, statement: str
) -> None:
    maybe = FieldSpec("maybe", FieldType.INT, optional=True)
    word = FieldSpec("word", FieldType.TEXT, has_default=True, default="")
    declared = [declare(RANK, maybe, word, indexes=(Index("name"),))]
    await prepare(connection, place.settings, declared)
    assert await prepare(connection, place.settings, declared) == ()
    made = await catalog(connection, place.schema, "things")
    await connection.execute(statement.format(s=place.schema))
    expected = [BY_HAND[statement]]
    assert kinds(await prepare(connection, place.settings, declared, mode="plan"))[:1] == expected
    assert kinds(await prepare(connection, place.settings, declared, allow_destructive=True))[:1] == expected
    assert await prepare(connection, place.settings, declared, mode="plan") == ()
    after = await catalog(connection, place.schema, "things")
    assert after == made


async def test_changed_system_columns_are_refused_instead_of_repaired(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    await connection.execute(f"ALTER TABLE {place.table()} DROP COLUMN version")
    with pytest.raises(SchemaError, match=r"things: its column version was changed by hand"):
        await prepare(connection, place.settings, [declare()], allow_destructive=True)


async def test_changing_a_list_into_a_map_is_a_change_of_type(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [declare(FieldSpec("more", FieldType.LIST, optional=True))])
    changed = declare(FieldSpec("more", FieldType.MAP, optional=True))
    (change,) = await prepare(connection, place.settings, [changed], mode="plan")
    assert (str(change), change.destructive) == ("change field things.more: from list to map", True)


async def test_a_changed_default_is_a_change_without_loss(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [declare(RANK)])
    other = declare(replace(RANK, default=8))
    assert told(await prepare(connection, place.settings, [other])) == ["change field things.rank: its default"]
    await insert(connection, place, "acme", "a", "a")
    assert [row["rank"] for row in await documents(connection, place, "acme")] == [8]
    assert await prepare(connection, place.settings, [other], mode="plan") == ()


# --- Migrations ≡ schema --------------------------------------------------------------------------------------

DEFAULTS = {
    FieldType.BOOL: True,
    FieldType.INT: -(2**63),
    FieldType.FLOAT: 0.5,
    FieldType.DECIMAL: Decimal("-1.5"),
    FieldType.TEXT: "it's 100% \\ :a {} é",
    FieldType.BYTES: b"\x00'",
    FieldType.TIMESTAMP: NOW,
    FieldType.LIST: ["a", {"$b": [1, 1.0]}],
    FieldType.MAP: {"a": b"x"},
}


@st.composite
def field_specs(draw: st.DrawFn, name: str) -> FieldSpec:
    kind = draw(st.sampled_from(list(FieldType)))
    optional = draw(st.booleans())
    # one without value for old rows is added as one that may be null, unlike in a new table: see its own test
    has_default = draw(st.booleans()) or not optional
    return FieldSpec(name, kind, optional, has_default=has_default, default=DEFAULTS[kind] if has_default else None)


@st.composite
def declarations(draw: st.DrawFn) -> Collection:
    names = draw(st.sets(st.sampled_from("abc")))
    fields = {"name": FieldSpec("name", FieldType.TEXT)} | {name: draw(field_specs(name)) for name in sorted(names)}
    scalars = [f"{sign}{spec.name}" for spec in fields.values() if spec.type.is_scalar for sign in ("", "-")]
    columns = st.lists(
        st.sampled_from([*scalars, "-created_at", "id"]), min_size=1, max_size=3, unique_by=lambda n: n.strip("-")
    )
    drawn = draw(st.lists(st.builds(lambda c, u: Index(*c, unique=u), columns, st.booleans()), max_size=3))
    scoped = draw(st.sampled_from([True, True, True, False]))
    return Collection("things", scoped, MappingProxyType(fields), tuple(dict.fromkeys(drawn)))


def relaxed(old: Collection, new: Collection) -> Collection:
    """`new`, but for fields that may be null in the old one: such a field stays so."""
    kept = {
        spec.name: replace(spec, optional=True)
        if (was := old.fields.get(spec.name)) is not None and was.optional and was.type is spec.type
        else spec
        for spec in new.fields.values()
    }
    return replace(new, fields=MappingProxyType(kept)) if old.tenant_scoped == new.tenant_scoped else new


@examples(0.6)
@given(old=declarations(), new=declarations(), filled=st.booleans())
async def test_a_migrated_old_schema_equals_the_new_schema(
    connection: asyncpg.Connection, place: Place, old: Collection, new: Collection, filled: bool
) -> None:
    await connection.execute(f"DROP SCHEMA IF EXISTS {place.schema} CASCADE")
    await prepare(connection, place.settings, [old])
    if filled and old.tenant_scoped:
        await insert(connection, place, "acme", "a", "a")
        await insert(connection, place, "other", "a", "a")
    planned = await prepare(connection, place.settings, [new], mode="plan")
    assert await prepare(connection, place.settings, [new], allow_destructive=True) == planned
    assert await prepare(connection, place.settings, [new], mode="plan") == ()
    migrated = await catalog(connection, place.schema, "things")
    if filled and old.tenant_scoped and new.tenant_scoped:
        assert [row["id"] for row in await documents(connection, place, "other")] == ["a"]
    await connection.execute(f"DROP SCHEMA {place.schema} CASCADE")
    await prepare(connection, place.settings, [relaxed(old, new)])
    assert migrated == await catalog(connection, place.schema, "things")


async def test_a_new_required_field_is_nullable_for_processes_that_write_without_it(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    await insert(connection, place, "acme", "a", "a")
    with pytest.raises(SchemaError, match=r"things\.must: it is required and has no default, and there are documents"):
        await prepare(connection, place.settings, [declare(REQUIRED)])
    async with connection.transaction():
        await connection.execute("SELECT set_config('app.current_tenant', 'acme', true)")
        await connection.execute(f"DELETE FROM {place.table()}")
    assert told(await prepare(connection, place.settings, [declare(REQUIRED)])) == ["add field things.must"]
    await insert(connection, place, "acme", "b", "b")
    assert [row["must"] for row in await documents(connection, place, "acme")] == [None]


# --- Online ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def old_writers(place: Place, most_s: float) -> AsyncIterator[list[float]]:
    """Writers who know the first declaration only, all the time; what they waited for each write."""
    waits: list[float] = []
    stop = asyncio.Event()

    async def write(tenant: str) -> None:
        connection = await place.connect()
        try:
            for number in itertools.count():
                begun = asyncio.get_running_loop().time()
                await insert(connection, place, tenant, f"{tenant}-{number}", f"name {number}")
                waits.append(asyncio.get_running_loop().time() - begun)
                if stop.is_set():
                    return
        finally:
            await connection.close()

    async with asyncio.TaskGroup() as group:
        for tenant in ("acme", "other"):
            group.create_task(write(tenant))
        try:
            yield waits
        finally:
            stop.set()
    assert max(waits) < most_s, max(waits)


async def test_old_code_keeps_writing_during_and_after_a_schema_change(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    tags = FieldSpec("tags", FieldType.LIST, has_default=True, default=[])
    maybe = FieldSpec("maybe", FieldType.TIMESTAMP, optional=True)
    grown = declare(RANK, tags, maybe, indexes=(Index("rank", "-created_at"), Index("name", unique=True)))
    async with old_writers(place, most_s=10) as waits:
        await insert(connection, place, "third", "first", "first")
        await prepare(connection, place.settings, [grown])
        after = len(waits) + 20
        await wait_until(lambda: len(waits) >= after)
    assert await prepare(connection, place.settings, [grown], mode="plan") == ()
    rows = await documents(connection, place, "acme")
    assert {(row["rank"], row["tags"], row["maybe"]) for row in rows} == {(7, "[]", None)}


async def test_a_schema_change_does_not_queue_writers_behind_an_open_transaction(
    connection: asyncpg.Connection, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepare(connection, place.settings, [declare()])
    monkeypatch.setattr(online, "LOCK_TIMEOUT_MS", 100)
    reader = await place.connect()
    transaction = reader.transaction()
    await transaction.start()
    await reader.fetch(f"SELECT FROM {place.table()}")
    try:
        # A writer that waits behind the alteration waits for its lock time-out, and no longer.
        async with old_writers(place, most_s=5) as waits:
            applying = asyncio.create_task(prepare(connection, place.settings, [declare(RANK)]))
            await wait_until(lambda: len(waits) >= 100, 60)
            assert not applying.done(), "the reader still holds its lock"
            await transaction.rollback()
            assert told(await applying) == ["add field things.rank"]
    finally:
        await reader.close()


async def test_writers_continue_while_an_index_build_waits_for_an_older_transaction(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    writer = await place.connect()
    transaction = writer.transaction()
    await transaction.start()
    await writer.execute("SELECT set_config('app.current_tenant', 'slow', true)")
    await writer.execute(f"UPDATE {place.table()} SET name = name")
    try:
        async with old_writers(place, most_s=5) as waits:
            applying = asyncio.create_task(prepare(connection, place.settings, [declare(indexes=(Index("name"),))]))
            begun = "SELECT count(*) FROM pg_index WHERE indrelid = $1::text::regclass AND NOT indisvalid"
            await wait_until(lambda: _value(writer, begun, place.table()))
            after = len(waits) + 50
            await wait_until(lambda: len(waits) >= after)
            assert not applying.done(), "the older transaction is still open"
            await transaction.rollback()
            assert kinds(await applying) == [(ChangeKind.ADD_INDEX, "name_index")]
    finally:
        await writer.close()


async def _value(connection: asyncpg.Connection, sql: str, *arguments: Any) -> Any:
    return await connection.fetchval(sql, *arguments)


async def test_a_schema_change_of_a_locked_table_gives_up_and_changes_nothing(
    connection: asyncpg.Connection, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepare(connection, place.settings, [declare()])
    monkeypatch.setattr(online, "LOCK_TIMEOUT_MS", 20)
    monkeypatch.setattr(online, "ALTER_DEADLINE_S", 0.2)
    reader = await place.connect()
    async with reader.transaction():
        await reader.fetch(f"SELECT FROM {place.table()}")
        with pytest.raises(Unavailable, match="things: its table was in use"):
            await prepare(connection, place.settings, [declare(RANK)])
    await reader.close()
    assert told(await prepare(connection, place.settings, [declare(RANK)])) == ["add field things.rank"]


class _KilledError(Exception):
    """The connection and its process are gone."""


def killed_after(statements: int) -> type[asyncpg.Connection]:
    """A connection that is cut instead of sending its next statement, once it has sent so many."""
    left = itertools.count(statements, -1)

    class Mortal(asyncpg.Connection):  # type: ignore[misc]  # asyncpg is not typed
        async def execute(self, *arguments: Any, **options: Any) -> Any:
            if next(left) <= 0:
                self.terminate()
                raise _KilledError
            return await super().execute(*arguments, **options)

    return Mortal


async def test_an_apply_that_is_killed_at_any_step_is_finished_by_the_next(
    connection: asyncpg.Connection, place: Place
) -> None:
    bag = FieldSpec("bag", FieldType.LIST, optional=True)
    old = [declare(bag, FieldSpec("gone", FieldType.INT, optional=True), indexes=(Index("gone"), Index("-name")))]
    changed = replace(bag, type=FieldType.MAP)
    new = [declare(RANK, changed, indexes=(Index("rank"), Index("name", unique=True))), declare(name="also")]

    async def begin() -> None:
        await connection.execute(f"DROP SCHEMA IF EXISTS {place.schema} CASCADE")
        await prepare(connection, place.settings, old)
        await insert(connection, place, "acme", "a", "a")

    await begin()
    await prepare(connection, place.settings, new, allow_destructive=True)
    expected = await catalog(connection, place.schema, "things", "also")
    every = 4 if settings().max_examples < 100 else 1  # `make soak` takes each of them
    for statements in itertools.count(0, every):
        await begin()
        mortal = await place.connect(connection_class=killed_after(statements))
        try:
            await prepare(mortal, place.settings, new, allow_destructive=True)
            break
        except (_KilledError, asyncpg.InterfaceError):
            assert mortal.is_closed()
        await prepare(connection, place.settings, new, allow_destructive=True)
        assert await catalog(connection, place.schema, "things", "also") == expected, statements
        assert len(await documents(connection, place, "acme")) == 1
    assert statements > 10, "there were steps to be killed at"
    assert await prepare(connection, place.settings, new, mode="plan") == ()
    await mortal.close()


async def test_an_invalid_index_of_a_failed_build_is_replaced(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [declare()])
    await insert(connection, place, "acme", "a", "same")
    await insert(connection, place, "acme", "b", "same")
    unique = declare(indexes=(Index("name", unique=True),))
    (name,) = physical_indexes(unique)
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute(f'CREATE UNIQUE INDEX CONCURRENTLY "{name}" ON {place.table()} (tenant_id, name)')
    with pytest.raises(SchemaError):
        await prepare(connection, place.settings, [unique])
    async with connection.transaction():
        await connection.execute("SELECT set_config('app.current_tenant', 'acme', true)")
        await connection.execute(f"UPDATE {place.table()} SET name = id")
    assert kinds(await prepare(connection, place.settings, [unique])) == [(ChangeKind.ADD_INDEX, "name_unique")]
    indexes = (await catalog(connection, place.schema, "things"))["things"][1]
    assert all(valid for _, valid, _, _ in indexes)
    assert len(indexes) == 2


@on_each_version
async def test_a_unique_index_that_documents_break_is_refused_by_their_ids_and_changes_nothing(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    for tenant, id in (("acme", "a"), ("other", "x"), ("other", "y's")):
        await insert(connection, place, tenant, id, "same")
    before = await catalog(connection, place.schema, "things")
    for index, fields in ((Index("name", unique=True), "name"), (Index("rank", "name", unique=True), "rank and name")):
        wanted = [declare(name="also"), declare(RANK, indexes=(index,))]
        message = f"two documents \\('x' and \"y's\"\\) have the same {fields}; change one first"
        with pytest.raises(SchemaError, match=message):
            await prepare(connection, place.settings, wanted)
        assert await catalog(connection, place.schema, "things") == before
        assert await connection.fetchval("SELECT to_regclass($1)", place.table("also")) is None
    optional = replace(RANK, optional=True, default=None)  # null in every document: nothing to compare
    await prepare(connection, place.settings, [declare(optional, indexes=(Index("rank", "name", unique=True),))])


async def test_a_duplicate_during_the_build_of_a_unique_index_stops_it_and_leaves_no_invalid_index(
    connection: asyncpg.Connection, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepare(connection, place.settings, [declare()])
    for id in "ab":
        await insert(connection, place, "acme", id, "same")

    async def too_early(*_: Any) -> None:
        """The documents came after this was asked."""

    monkeypatch.setattr(online, "refuse_duplicates", too_early)
    before = await catalog(connection, place.schema, "things")
    with pytest.raises(SchemaError, match="two documents have the same name"):
        await prepare(connection, place.settings, [declare(indexes=(Index("name", unique=True),))])
    assert await catalog(connection, place.schema, "things") == before


async def test_concurrent_applies_do_not_collide(place: Place) -> None:
    grown = [declare(RANK, indexes=(Index("rank"), Index("name"))), declare(name="also")]

    async def apply(collections: list[Collection]) -> tuple[SchemaChange, ...]:
        connection = await place.connect()
        try:
            return await prepare(connection, place.settings, collections)
        finally:
            await connection.close()

    for collections in ([declare()], grown):
        answers = await asyncio.gather(*(apply(collections) for _ in range(4)))
        assert len([changes for changes in answers if changes]) == 1, answers


async def test_an_apply_that_waits_too_long_for_another_raises(
    connection: asyncpg.Connection, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema_module, "LOCK_WAIT_S", 0.2)
    other = await place.connect()
    async with schema_module._sole_applier(other, place.settings):
        with pytest.raises(Unavailable, match="another process has been changing it"):
            await prepare(connection, place.settings, [declare()])
    await other.close()
    assert await prepare(connection, place.settings, [declare()])


_OWN_ADVISORY_LOCKS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"


async def test_an_apply_restores_the_settings_of_its_connection(connection: asyncpg.Connection, place: Place) -> None:
    await connection.execute("SET statement_timeout = 0")
    settings = ("statement_timeout", "lock_timeout", "app.current_tenant")

    async def now() -> list[Any]:
        return [await connection.fetchval("SELECT nullif(current_setting($1, true), '')", name) for name in settings]

    before = await now()
    await prepare(connection, place.settings, [declare()])
    await insert(connection, place, "acme", "a", "a")
    await prepare(connection, place.settings, [declare(RANK, indexes=(Index("name", unique=True),))])
    assert await now() == before
    assert await connection.fetchval(_OWN_ADVISORY_LOCKS) == 0


async def test_through_pgbouncer_new_tables_are_created_and_tables_in_use_are_not_altered(
    connection: asyncpg.Connection, place: Place
) -> None:
    settings = replace(place.settings, pgbouncer=True)
    await prepare(connection, settings, [declare()])
    assert kinds(await prepare(connection, settings, [declare(), declare(name="also")]))
    with pytest.raises(SchemaError, match="goes to PostgreSQL directly"):
        await prepare(connection, settings, [declare(RANK)])
    assert await prepare(connection, settings, [declare()]) == ()


# --- Foreign, too new, too old --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "sentence"),
    [("9", "a later version of Strongroom made it"), ("0", "an earlier version of Strongroom made it")],
)
async def test_a_schema_of_another_layout_is_refused(
    connection: asyncpg.Connection, place: Place, version: str, sentence: str
) -> None:
    await prepare(connection, place.settings, [declare()])
    await connection.execute(f"UPDATE {place.table('strongroom_layout')} SET version = {version}")
    for mode in ("apply", "plan"):
        with pytest.raises(StoreError, match=f"found layout {version}, .*{sentence}"):
            await prepare(connection, place.settings, [declare()], mode=mode)


async def test_a_schema_without_its_layout_is_damaged(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [declare()])
    await connection.execute(f"DELETE FROM {place.table('strongroom_layout')}")
    with pytest.raises(StoreError, match="damaged, restore a backup"):
        await prepare(connection, place.settings, [declare()])


async def test_a_foreign_schema_is_left_unchanged(connection: asyncpg.Connection, place: Place) -> None:
    await connection.execute(f"CREATE SCHEMA {place.schema}; CREATE TABLE {place.table('theirs')} (id int)")
    with pytest.raises(StoreError, match=r"holds tables that are not Strongroom's"):
        await prepare(connection, place.settings, [declare()])
    assert await connection.fetchval("SELECT to_regclass($1)", place.table("strongroom_layout")) is None


# --- The journal's partitions ---------------------------------------------------------------------------------


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


@on_each_version
async def test_a_record_of_any_time_finds_a_partition(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [])
    now = datetime.now(UTC)
    assert await append(connection, place, 1, us(now)) == f"strongroom_journal_{now:%Y_%m}"
    for sequence, at_us in enumerate((0, -1, -(2**63), 2**63 - 1, 9_223_372_036_854_775_000), 2):
        assert await append(connection, place, sequence, at_us) == "strongroom_journal_default"
    kept = await whole(connection, f"SELECT at_us FROM {place.table('strongroom_journal')} ORDER BY sequence")
    assert [row["at_us"] for row in kept][1:] == [0, -1, -(2**63), 2**63 - 1, 9_223_372_036_854_775_000]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_the_calendars_time_of_a_record_keeps_the_order(one: int, other: int) -> None:
    assert (journal_time(one) <= journal_time(other)) or one > other


@on_each_version
async def test_partitions_are_created_ahead_once_and_take_over_earlier_records(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [])
    month = datetime(2031, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    moments = [month, month + timedelta(microseconds=1), month - timedelta(days=31)]
    for sequence, moment in enumerate(moments, 1):
        assert await append(connection, place, sequence, us(moment)) == "strongroom_journal_default"
    assert await ensure_partitions(connection, place.settings, month, 1) == 2
    assert await ensure_partitions(connection, place.settings, month, 1) == 0
    held = await whole(
        connection,
        f"SELECT tableoid::regclass::text AS partition FROM {place.table('strongroom_journal')} ORDER BY sequence",
    )
    assert [row["partition"].rpartition(".")[2] for row in held] == [
        "strongroom_journal_2031_12",
        "strongroom_journal_2032_01",
        "strongroom_journal_default",
    ]
    definitions = await connection.fetch(
        "SELECT indexdef FROM pg_indexes WHERE schemaname = $1 AND tablename = 'strongroom_journal_2031_12'",
        place.schema,
    )
    assert {row["indexdef"].partition("USING")[2] for row in definitions} == {
        " btree (sequence)",
        " btree (tenant_id, sequence)",
    }


@on_each_version
async def test_retention_drops_whole_past_partitions_and_never_the_current_one(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [])
    first = datetime(2020, 1, 1, tzinfo=UTC)
    await ensure_partitions(connection, place.settings, first, 3)
    for sequence, month in enumerate((1, 2, 3, 4), 1):
        await append(connection, place, sequence, us(datetime(2020, month, 28, tzinfo=UTC)))
    now = datetime.now(UTC)
    await append(connection, place, 9, us(now))

    async def held() -> list[int]:
        rows = await whole(connection, f"SELECT sequence FROM {place.table('strongroom_journal')} ORDER BY sequence")
        return [row["sequence"] for row in rows]

    assert await drop_partitions_before(connection, place.settings, datetime(2020, 2, 29, tzinfo=UTC)) == 1
    assert await held() == [2, 3, 4, 9]
    assert await connection.fetchval(f"SELECT floor FROM {place.table('strongroom_journal_head')}") == 1
    assert await drop_partitions_before(connection, place.settings, datetime(2020, 4, 1, tzinfo=UTC)) == 2
    assert await held() == [4, 9]
    assert await drop_partitions_before(connection, place.settings, now + timedelta(days=4_000)) == 1
    assert await held() == [9]


async def test_each_start_creates_upcoming_partitions_and_never_fails_for_it(
    roles: tuple[Place, Roles], caplog: pytest.LogCaptureFixture
) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    held = "SELECT count(*) FROM pg_inherits WHERE inhparent = $1::text::regclass"
    journal = place.table("strongroom_journal")
    full = await owner.fetchval(held, journal)
    month = datetime.now(UTC)
    assert full == 1 + 1 + partitions.MONTHS_AHEAD
    await owner.execute(f"DROP TABLE {place.schema}.strongroom_journal_{month:%Y_%m}")
    await append(owner, place, 1, us(month))
    await prepare(app, place.settings, [declare(), *COLLECTIONS])
    assert await owner.fetchval(held, journal) == full
    assert await owner.fetchval(f"SELECT count(*) FROM {place.schema}.strongroom_journal_{month:%Y_%m}") == 1
    await owner.execute(
        f"REVOKE ALL ON FUNCTION {place.schema}.strongroom_make_partitions FROM "
        + '"'
        + who.application.replace('"', '""')
        + '"'
    )
    assert await prepare(app, place.settings, [declare(), *COLLECTIONS]) == ()
    assert "next partitions were not made" in caplog.text
    await app.close()
    await owner.close()


async def test_partitioning_leaves_a_journal_in_use_unchanged(
    connection: asyncpg.Connection, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepare(connection, place.settings, [])
    monkeypatch.setattr(partitions, "LOCK_TIMEOUT_MS", 50)
    past = datetime(2020, 1, 1, tzinfo=UTC)
    await ensure_partitions(connection, place.settings, past, 0)
    reader = await place.connect()
    async with reader.transaction():
        await reader.fetch(f"SELECT FROM {place.table('strongroom_journal')}")
        with pytest.raises(Unavailable, match="the journal is in use"):
            await drop_partitions_before(connection, place.settings, NOW)
        with pytest.raises(Unavailable, match="the journal is in use"):
            await ensure_partitions(connection, place.settings, past, 5)
    await reader.close()
    assert await drop_partitions_before(connection, place.settings, NOW) == 1


# --- Roles ----------------------------------------------------------------------------------------------------


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


@pytest.fixture(params=["roles first", "apply first"])
async def roles(request: pytest.FixtureRequest, admin: asyncpg.Connection, place: Place) -> AsyncIterator[Any]:
    async with split(admin, place, apply_first=request.param == "apply first") as made:
        yield made


@on_each_version
async def test_the_application_role_only_reads_and_writes_documents_and_appends_to_the_journal(
    roles: tuple[Place, Roles],
) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    for user in (owner, app):
        await check_role(user, place.settings)
    assert await prepare(app, place.settings, [declare(), *COLLECTIONS]) == ()
    await insert(app, place, "acme", "a", "a")
    await insert(app, place, "other", "b", "b")
    assert [row["id"] for row in await documents(app, place, "acme")] == ["a"]
    assert await app.fetch(f"SELECT * FROM {place.table()}") == [], "no tenant, no rows"
    assert await owner.fetch(f"SELECT * FROM {place.table()}") == [], "the owner is under the policies too"
    await app.execute(
        f"INSERT INTO {place.table('strongroom_journal')} ({RECORD}) VALUES (1, now(), 0, 'r', 'a', 'q', 'x', 'c', 'e')"
    )
    await app.execute(f"UPDATE {place.table('strongroom_journal_head')} SET sequence = sequence + 1")
    await app.fetchval(f"SELECT nextval('{place.schema}.strongroom_version')")
    assert await app.fetchval(f"SELECT {place.schema}.strongroom_require(true)")
    assert await ensure_partitions(app, place.settings, datetime(2040, 1, 1, tzinfo=UTC)) == 4
    month = f"{datetime.now(UTC):%Y_%m}"
    forbidden = [
        "TRUNCATE {s}.strongroom_journal",
        "DELETE FROM {s}.strongroom_journal",
        "ALTER TABLE {s}.things RENAME TO x",
        "UPDATE {s}.strongroom_journal SET actor = 'x'",
        *(f"DELETE FROM {{s}}.strongroom_journal_{part}" for part in (month, "default", "2040_02")),
        *(f"UPDATE {{s}}.strongroom_journal_{part} SET actor = 'x'" for part in (month, "default", "2040_02")),
        f"SELECT * FROM {{s}}.strongroom_journal_{month}",
        f"DROP TABLE {{s}}.strongroom_journal_{month}",
        f"ALTER TABLE {{s}}.strongroom_journal DETACH PARTITION {{s}}.strongroom_journal_{month}",
        "DELETE FROM {s}.strongroom_journal_head",
        "DELETE FROM {s}.strongroom_tenants",
        "UPDATE {s}.strongroom_tenants SET tenant_id = 'x'",
        "UPDATE {s}.strongroom_schema SET declaration = '{{}}'",
        "UPDATE {s}.strongroom_layout SET version = 9",
        "ALTER TABLE {s}.things DISABLE ROW LEVEL SECURITY",
        "DROP POLICY tenant_select ON {s}.things",
        "CREATE POLICY mine ON {s}.things USING (true)",
        "ALTER TABLE {s}.things ADD COLUMN x int",
        "CREATE INDEX ON {s}.things (name)",
        "TRUNCATE {s}.things",
        "CREATE TABLE {s}.mine (id int)",
        "SELECT setval('{s}.strongroom_version', 1)",
        "SELECT {s}.strongroom_drop_partitions(now())",
        f"SET ROLE {who.owner}",
    ]
    for statement in forbidden:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.execute(statement.format(s=place.schema))
    with pytest.raises(Denied, match="expected that of the schema's owner or of retention"):
        await drop_partitions_before(app, place.settings, NOW)
    async with app.transaction():
        await app.execute("SELECT set_config('app.current_tenant', 'acme', true)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with app.transaction():
                await app.execute(f"UPDATE {place.table()} SET tenant_id = 'other'")
        for verb in (f"UPDATE {place.table()} SET name = 'x'", f"DELETE FROM {place.table()}"):
            assert await app.execute(f"{verb} WHERE tenant_id = 'other'") in ("UPDATE 0", "DELETE 0")
    await app.close()
    await owner.close()


@on_each_version
async def test_the_application_role_sees_records_of_its_tenant_only_and_the_reader_role_all(
    roles: tuple[Place, Roles],
) -> None:
    place, who = roles
    journal, tenants = place.table("strongroom_journal"), place.table("strongroom_tenants")
    store = PostgresStore(place.url(who.application))
    await store.open()
    await store.prepare([declare(), *COLLECTIONS])
    given = [store.commit(batch(name, Create("items", "x", item()), Append(record("x", name)))) for name in ("a", "b")]
    await asyncio.gather(*given, store.commit(batch(None, Append(record("platform", None)))))
    assert [r.tenant for r in (await store.changes(None, tenant="a")).records] == ["a"]
    assert {r.tenant for r in (await store.changes(None)).records} == {"a", "b", None}
    assert await store.tenants() == ["a", "b"]
    await store.close()

    app = await place.connect(who.application)
    for table in (journal, tenants):
        assert await app.fetch(f"SELECT * FROM {table}") == [], "no tenant, no rows"
        async with app.transaction():
            await app.execute("SET LOCAL app.journal = 'whole'")
            assert await app.fetch(f"SELECT * FROM {table}") == [], "only the owner may say this"
    added = f"INSERT INTO {journal} (tenant_id, {RECORD}) VALUES ($1, 99, now(), 0, 'r', 'a', 'q', 'x', 'c', 'e')"
    for present, other in (("a", "b"), ("a", None), ("", "a")):
        async with app.transaction():
            await app.execute("SELECT set_config('app.current_tenant', $1, true)", present)
            for table in (journal, tenants):
                seen = await app.fetch(f"SELECT DISTINCT tenant_id FROM {table}")
                assert [row["tenant_id"] for row in seen] == ([present] if present else [])
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                async with app.transaction():
                    await app.execute(added, other)
            if other is not None:
                with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                    async with app.transaction():
                        await app.execute(f"INSERT INTO {tenants} VALUES ('new')")
    async with app.transaction():
        reader = '"' + who.reader + '"'
        await app.execute(f"SET LOCAL ROLE {reader}")
        assert await app.fetchval(f"SELECT count(*) FROM {journal}") == 3
        for statement in (added.replace("$1", "NULL"), f"SELECT * FROM {place.table()}", f"DELETE FROM {tenants}"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with app.transaction():
                    await app.execute(statement)
    await app.close()


class Vault(Entity, collection="vault", scope="global"):
    secret: Annotated[bytes, Secret()]


async def test_a_collection_of_secrets_is_visible_only_to_statements_that_declare_it(
    roles: tuple[Place, Roles],
) -> None:
    """As the peppers are: whoever reads another table by a mistake, or a stray SELECT, finds nothing."""
    place, who = roles
    owner, vault = await place.connect(), place.table("vault")
    declared = [declare(), *COLLECTIONS, Vault.__collection__]
    await prepare(owner, place.settings, declared)
    store = PostgresStore(place.url(who.application))
    await store.open()
    await store.prepare(declared)
    made = await store.commit(batch(None, Create("vault", "1", {"secret": b"one"}), Append(record("1", None), 0)))
    await store.commit(batch(None, Create("vault", "2", {"secret": b"two"})))
    await store.commit(batch(None, Put("vault", "2", {"secret": b"zwei"}), Patch("vault", "2", {"secret": b"deux"})))
    with pytest.raises(Conflict):
        await store.commit(batch(None, Put("vault", "1", {"secret": b"x"}, expected=made.versions[0] + 1)))
    assert [d["secret"] for d in await store.find("vault", None, Query(order_by=("-id",)))] == [b"deux", b"one"]
    assert (await store.get("vault", None, "1") or {})["secret"] == b"one"
    assert (await store.aggregate("vault", None, [Aggregate("count")], None))["count"] == 2
    await store.commit(batch(None, Delete("vault", "2")))
    await store.close()

    app = await place.connect(who.application)
    for user in (app, owner):
        assert await user.fetch(f"SELECT * FROM {vault}") == []
        assert await user.execute(f"UPDATE {vault} SET secret = 'x'") == "UPDATE 0"
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            await user.execute(f"INSERT INTO {vault} VALUES ('3', 1, now(), now(), 'x')")
        async with user.transaction():
            await user.execute("SET LOCAL app.secrets = 'on'")
            assert [row["secret"] for row in await user.fetch(f"SELECT * FROM {vault}")] == [b"one"]
    await owner.execute(f"ALTER TABLE {vault} DISABLE ROW LEVEL SECURITY")  # or a store of the first release
    (change,) = await prepare(owner, place.settings, declared)
    assert (change.kind, change.collection) == (ChangeKind.CHANGE_POLICIES, "vault")
    assert await app.fetch(f"SELECT * FROM {vault}") == []
    assert await prepare(owner, place.settings, declared, mode="plan") == ()
    await app.close()
    await owner.close()


async def test_a_store_of_layout_1_is_upgraded_by_its_owner_and_only_then_served(
    admin: asyncpg.Connection, roles: tuple[Place, Roles]
) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    declared = [declare(), *COLLECTIONS]
    for sequence in (5, 6):
        await append(owner, place, sequence, us(datetime.now(UTC)))
    for table, policies in (("strongroom_journal", POLICIES), ("strongroom_tenants", POLICIES)):
        for policy in (*policies, READER_POLICY):
            await owner.execute(f"DROP POLICY {policy} ON {place.table(table)}")
        await owner.execute(f"ALTER TABLE {place.table(table)} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY")
    head = place.table("strongroom_journal_head")
    await owner.execute(f"ALTER TABLE {head} DROP COLUMN floor; UPDATE {head} SET sequence = 6")
    await owner.execute(f"UPDATE {place.table('strongroom_layout')} SET version = 1")
    with pytest.raises(SchemaError, match=r"layout 1 becomes 2.*run `strongroom schema apply"):
        await prepare(app, place.settings, declared)
    (planned,) = await prepare(owner, place.settings, declared, mode="plan")
    assert planned.kind is ChangeKind.CHANGE_POLICIES
    assert not planned.destructive
    await prepare(owner, place.settings, declared)
    assert await prepare(app, place.settings, declared) == await prepare(owner, place.settings, declared) == ()
    assert await owner.fetchval(f"SELECT floor FROM {head}") == 4, "what retention had dropped before"
    assert await app.fetch(f"SELECT * FROM {place.table('strongroom_journal')}") == []
    store = PostgresStore(place.url(who.application))
    await store.open()
    await store.prepare(declared)
    assert [r.sequence for r in (await store.changes(None)).records] == [5, 6]
    with pytest.raises(Gone):
        await store.changes("3")
    await store.close()
    # What is changed by hand is set up again, and no node starts before.
    await owner.execute(f"DROP POLICY tenant_insert ON {place.table('strongroom_journal')}")
    with pytest.raises(SchemaError, match="row-level security was changed"):
        await prepare(app, place.settings, declared)
    await prepare(owner, place.settings, declared)
    assert await prepare(app, place.settings, declared) == ()
    # A reader that an administrator has not made yet
    made_by_owner = f"ALTER DEFAULT PRIVILEGES FOR ROLE {who.owner} IN SCHEMA {place.schema}"
    await admin.execute(f"{made_by_owner} REVOKE USAGE ON TYPES FROM {who.reader}")
    await owner.execute(f"UPDATE {place.table('strongroom_layout')} SET version = 1")
    with pytest.raises(SchemaError, match="run what `strongroom schema roles` prints, then this again"):
        await prepare(owner, place.settings, declared)
    await app.close()
    await owner.close()


async def test_a_role_with_permanent_reader_rights_is_refused(
    admin: asyncpg.Connection, roles: tuple[Place, Roles]
) -> None:
    place, who = roles
    application = '"' + who.application.replace('"', '""') + '"'
    await admin.execute(f"ALTER ROLE {application} INHERIT; REVOKE {who.reader} FROM {application}")
    await admin.execute(f"GRANT {who.reader} TO {application}")
    app = await place.connect(who.application)
    with pytest.raises(StoreError, match=r"in every statement.*NOINHERIT"):
        await check_role(app, place.settings)
    await app.close()


async def test_a_cursor_before_dropped_records_raises_gone(connection: asyncpg.Connection, place: Place) -> None:
    store = PostgresStore(place.url(place.owner))
    await store.open()
    await store.prepare(COLLECTIONS)
    past = us(datetime(2020, 1, 15, tzinfo=UTC))
    await ensure_partitions(connection, place.settings, datetime(2020, 1, 1, tzinfo=UTC), 0)
    begun = (await store.changes("end")).cursor
    for number in range(3):
        await store.commit(batch("acme", Append(record(f"{number}", "acme", at_us=past))))
    middle = (await store.changes(None, limit=2)).cursor
    end = (await store.changes(None)).cursor
    await store.commit(batch("other", Append(record("new", "other"))))
    quiet = (await store.changes(end, tenant="acme")).cursor
    assert await store.drop_journal_before(us(datetime(2020, 3, 1, tzinfo=UTC))) == 1
    for tenant in (None, "acme"):
        for cursor in (begun, middle):
            with pytest.raises(Gone, match="past the journal's retention"):
                await store.changes(cursor, tenant=tenant)
        assert (await store.changes(quiet, tenant=tenant)).records == ()
    assert [r.entity_id for r in (await store.changes(end)).records] == ["new"]
    assert [r.entity_id for r in (await store.changes(None)).records] == ["new"], (
        "what is left of it, from its beginning"
    )
    await store.close()


@on_each_version
async def test_tables_added_later_are_granted_to_the_application_role(roles: tuple[Place, Roles]) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    grown = [declare(RANK), declare(name="also"), *COLLECTIONS]
    with pytest.raises(SchemaError, match=r"add field things\.rank; create collection also; run `strongroom schema"):
        await prepare(app, place.settings, grown)
    await prepare(owner, place.settings, grown)
    assert await prepare(app, place.settings, grown) == ()
    await insert(app, place, "acme", "a", "a")
    assert await app.fetchval(f"SELECT count(*) FROM {place.table('also')}") == 0
    await ensure_partitions(owner, place.settings, datetime(2050, 1, 1, tzinfo=UTC))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await app.execute(f"DELETE FROM {place.table('strongroom_journal_2050_01')}")
    await check_role(app, place.settings)
    await app.close()
    await owner.close()


@on_each_version
async def test_retention_drops_partitions_and_sees_no_document(roles: tuple[Place, Roles]) -> None:
    place, who = roles
    retention = await place.connect(who.retention)
    await ensure_partitions(retention, place.settings, datetime(2020, 1, 1, tzinfo=UTC), 0)
    assert await drop_partitions_before(retention, place.settings, NOW) == 1
    for statement in ("SELECT * FROM {s}.things", "SELECT * FROM {s}.strongroom_journal", "DELETE FROM {s}.things"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await retention.execute(statement.format(s=place.schema))
    await retention.close()


async def test_a_hand_made_index_does_not_keep_the_application_from_starting(roles: tuple[Place, Roles]) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    await owner.execute(f"CREATE INDEX mine ON {place.table()} (tenant_id, created_at)")
    assert await prepare(app, place.settings, [declare(), *COLLECTIONS]) == ()
    await app.close()
    await owner.close()


@on_each_version
async def test_without_a_schema_the_application_role_is_told_the_command_to_run(
    admin: asyncpg.Connection, place: Place
) -> None:
    await admin.execute(roles_sql(place.settings, *(f"{place.owner}_{end}" for end in "oarw")))
    await admin.execute(f"ALTER ROLE {place.owner}_a PASSWORD 'secret'")
    app = await place.connect(f"{place.owner}_a")
    with pytest.raises(SchemaError, match="`strongroom schema apply --store URL` with the owner's URL"):
        await prepare(app, place.settings, [declare()])
    await app.close()


async def test_a_role_without_access_is_told_the_command_to_run(
    admin: asyncpg.Connection, connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    await admin.execute(f"CREATE ROLE {place.owner}_x LOGIN PASSWORD 'secret'")
    stranger = await place.connect(f"{place.owner}_x")
    with pytest.raises(StoreError, match=r"may not read it: .*`strongroom schema roles`"):
        await prepare(stranger, place.settings, [declare()])
    await stranger.close()


UNSAFE = {
    "SUPERUSER": "is a superuser",
    "BYPASSRLS": "has BYPASSRLS",
    "IN ROLE {owner}": "is a member of {owner}",
    "NOINHERIT IN ROLE {owner}": "is a member of {owner}",
    "IN ROLE {super}": "is a member of {super}, whom row-level security does not bind",
    "CREATEROLE": "has CREATEROLE",
    "IN ROLE pg_write_all_data": "may do more than append and read in strongroom_journal",
}


@on_each_version
@pytest.mark.parametrize("attributes", UNSAFE)
async def test_an_unsafe_role_is_refused_with_what_to_run(
    admin: asyncpg.Connection, connection: asyncpg.Connection, place: Place, attributes: str
) -> None:
    await prepare(connection, place.settings, [declare()])
    names = {"owner": place.owner, "super": f"{place.owner}_super"}
    await admin.execute(f"CREATE ROLE {names['super']} SUPERUSER")
    role = f"{place.owner}_app"
    await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret' {attributes.format_map(names)}")
    await admin.execute(f"GRANT USAGE ON SCHEMA {place.schema} TO {role}")
    opened = await place.connect(role)
    with pytest.raises(StoreError) as raised:
        await check_role(opened, place.settings)
    text = str(raised.value).replace(f"{place.schema}.", "")
    assert text.startswith(f"role {role}: {UNSAFE[attributes].format_map(names)}"), text
    assert "run what `strongroom schema roles` prints" in text
    await opened.close()


def test_the_peppers_are_a_collection_of_secrets_alone() -> None:
    collections = [entity.__collection__ for entity in SYSTEM_ENTITIES]
    assert {collection.name for collection in collections if is_of_secrets(collection)} == {"peppers", "key_sources"}


async def test_a_role_that_owns_one_table_is_refused(
    admin: asyncpg.Connection, connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    role = f"{place.owner}_app"
    await admin.execute(
        f"CREATE ROLE {role} LOGIN PASSWORD 'secret'; GRANT USAGE ON SCHEMA {place.schema} TO {role}; "
        f"ALTER TABLE {place.table()} OWNER TO {role}"
    )
    opened = await place.connect(role)
    with pytest.raises(StoreError, match=r"owns .*\.things, though not the schema"):
        await check_role(opened, place.settings)
    await opened.close()


async def test_an_owner_may_serve_in_a_single_role_set_up_with_a_warning(
    connection: asyncpg.Connection, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    await check_role(connection, place.settings)
    assert caplog.records == [], "there is nothing to own yet"
    await prepare(connection, place.settings, [declare()])
    with caplog.at_level(logging.WARNING):
        await check_role(connection, place.settings)
    (record,) = caplog.records
    assert "`strongroom schema roles` prints the SQL that splits owner and application" in record.getMessage()
    await insert(connection, place, "acme", "a", "a")
    assert await connection.fetch(f"SELECT * FROM {place.table()}") == [], "FORCE holds for the owner"


@pytest.mark.parametrize(
    "names",
    [("", "b", "c"), ("a", "a", "c"), ("pg_x", "b", "c"), ("a\n", "b", "c"), ("a" * 64, "b", "c"), ("r", "b", "c")],
)
def test_names_that_cannot_be_four_roles_are_refused(names: tuple[str, str, str]) -> None:
    with pytest.raises(ConfigError, match="role"):
        roles_sql(Settings("strongroom"), *names, "r")


async def test_an_existing_superuser_is_never_made_the_application(admin: asyncpg.Connection, place: Place) -> None:
    await admin.execute(f"CREATE ROLE {place.owner}_a SUPERUSER")
    with pytest.raises(asyncpg.RaiseError, match="is a superuser or has BYPASSRLS"):
        await admin.execute(roles_sql(place.settings, *(f"{place.owner}_{end}" for end in "oarw")))
    await admin.execute("ROLLBACK")


def test_the_oldest_supported_layout_is_not_newer_than_the_current_one() -> None:
    assert 1 <= layout.OLDEST_LAYOUT <= layout.LAYOUT
