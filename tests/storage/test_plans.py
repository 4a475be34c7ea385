"""An index serves every documented list and every declared index: no query reads or sorts a whole collection."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from strongroom.app import SYSTEM_ENTITIES
from strongroom.entities.entity import Collection, FieldType, Index
from strongroom.entities.query import And, Query, Where
from strongroom.state.model import ENTITIES
from strongroom.storage.port import JournalFilter
from strongroom.storage.postgres.store import PostgresStore
from strongroom.storage.sqlite.store import SqliteStore
from tests.helpers.servers import postgres
from tests.helpers.stores import opened

COLLECTIONS = [entity.__collection__ for entity in (*SYSTEM_ENTITIES, *ENTITIES)]
LATER = datetime(2026, 1, 1, tzinfo=UTC)
VALUES: dict[FieldType, Any] = {
    FieldType.BOOL: True,
    FieldType.INT: 1,
    FieldType.FLOAT: 1.0,
    FieldType.DECIMAL: Decimal(1),
    FieldType.TEXT: "x",
    FieldType.BYTES: b"x",
    FieldType.TIMESTAMP: LATER,
}


def of_index(collection: Collection, index: Index) -> Iterator[Query]:
    """The lists that an index is declared for: its first fields have a value each, or none; the last one orders."""
    kinds = [collection.type_of(name) for name, _ in index.columns]
    if any(kind is FieldType.LIST for kind in kinds):
        return  # looked into, not ordered by
    if index.unique:  # looked up by
        yield Query(And(*(Where(n, "==", VALUES[collection.fields[n].type]) for n, _ in index.columns)), (), 100)
        return
    *leading, (last, descending) = index.columns
    for nulls in (False, True):
        parts = []
        for name, _ in leading:
            kind, spec = collection.type_of(name), collection.fields.get(name)
            assert kind is not None
            parts.append(Where(name, "==", None if nulls and spec is not None and spec.optional else VALUES[kind]))
        where = And(*parts) if len(parts) > 1 else parts[0] if parts else None
        for down in (descending, not descending):
            yield Query(where, (f"-{last}" if down else last,), 100)
            if nulls or not leading:
                continue
            yield Query(where, (f"-{last}" if down else last,), 100, start_after=_place(collection, last))


def _place(collection: Collection, name: str) -> tuple[Any, ...]:
    kind = collection.type_of(name)
    assert kind is not None
    return (VALUES[kind],) if name == "id" else (VALUES[kind], "x")


async def documented() -> list[tuple[Collection, Query]]:
    """What the lists of the library, the server and the command line ask of a store, as they ask it."""
    found: list[tuple[Collection, Query]] = []
    of = {collection.name: collection for collection in COLLECTIONS}
    async with opened("json://:memory:", entities=ENTITIES) as (room, store):
        made = await room.webhooks.create(tenant="acme", url="https://example.com/", events=["limit.threshold"])
        original = store.find

        async def find(collection: str, tenant: str | None, query: Query) -> Any:
            found.append((of[collection], query))
            return await original(collection, tenant, query)

        setattr(store, "find", find)  # noqa: B010
        for given in (
            {}, {"tenant": "t"}, {"user_id": "u"}, {"tenant": "t", "user_id": "u"}, {"owner": "o"},
            {"environment": "test"}, {"tenant": "t", "environment": "live"}, {"name_prefix": "n"},
            {"tenant": "t", "name_prefix": "n"}, {"created_after": LATER}, {"deleted": True},
        ):  # fmt: skip
            await room.keys.list(**given)
        for given in ({}, {"tenant": "t"}, {"tenant": "t", "kind": "user"}):
            await room.quotas.list(**given)  # type: ignore[arg-type]
        for given in ({}, {"tenant": "t"}):
            await room.webhooks.list(**given)  # type: ignore[arg-type]
            await room.leaks.list(**given)  # type: ignore[arg-type]
        for state in (None, "pending", "dead"):
            await room.deliveries.list(made.webhook.id, state=state)
    return found


@pytest.fixture
async def lists() -> list[tuple[Collection, Query]]:
    declared = [(c, query.check(c)) for c in COLLECTIONS for index in c.indexes for query in of_index(c, index)]
    return [*declared, *await documented()]


# --- PostgreSQL -------------------------------------------------------------------------------------------------


@pytest.fixture
def server(request: pytest.FixtureRequest) -> postgres.Server:
    return postgres.start(request, "postgres-18", postgres.bundled())


@pytest.fixture
async def postgres_store(server: postgres.Server) -> AsyncIterator[tuple[PostgresStore, asyncpg.Connection]]:
    """A store and a connection of the application's role, which owns nothing."""
    schema = postgres.new_schema()
    owner, app, retention, reader = (f"{schema}_{end}" for end in ("owner", "app", "retention", "reader"))
    owners = PostgresStore(f"postgresql://{owner}:{owner}@127.0.0.1:{server.port}/postgres?schema={schema}")
    server.execute(owners.roles_sql(owner, app, retention, reader))
    server.execute(*(f"ALTER ROLE {role} PASSWORD '{role}'" for role in (owner, app)))
    await owners.open()
    await owners.prepare(COLLECTIONS)
    await owners.close()
    place = f"postgresql://{app}:{app}@127.0.0.1:{server.port}/postgres"
    store = PostgresStore(f"{place}?schema={schema}")
    await store.open()
    assert await store.prepare(COLLECTIONS) == ()
    connection = await asyncpg.connect(place)
    yield store, connection
    await connection.close()
    await store.close()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


async def wasteful(connection: asyncpg.Connection, sql: str, values: Sequence[Any], *before: str) -> str | None:
    """What in the plan reads or sorts a whole table, although the planner is to do anything rather than that."""
    async with connection.transaction():
        for setting in ("enable_seqscan", "enable_sort", "enable_bitmapscan", "enable_incremental_sort"):
            await connection.execute(f"SET LOCAL {setting} = off")
        for statement in before:
            await connection.execute(statement)
        found = json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) {sql}", *values))
    kinds = {
        f"{node['Node Type']} {node.get('Relation Name', '')}"
        for node in nodes(found[0]["Plan"])
        if "Sort" in node["Node Type"]
        or (node["Node Type"] == "Seq Scan" and node.get("Relation Name") != "strongroom_journal_head")
    }
    return ", ".join(sorted(kinds)) or None


async def test_postgresql_serves_every_list_by_an_index_under_row_level_security(
    postgres_store: tuple[PostgresStore, asyncpg.Connection], lists: list[tuple[Collection, Query]]
) -> None:
    store, connection = postgres_store
    wrong = []
    for collection, query in lists:
        table = store._tables[collection.name]
        select, values = table.pages.find(query)
        bound = ["acme", *values] if table.tenant_scoped else values
        if problem := await wasteful(connection, select.sql, bound):
            wrong.append(f"{collection.name}: {query}: {problem}")
    assert not wrong, "\n".join(wrong)
    assert len(lists) > 100


async def test_postgresql_serves_the_journal_and_the_tenants_by_an_index(
    postgres_store: tuple[PostgresStore, asyncpg.Connection],
) -> None:
    store, connection = postgres_store
    assert store._taking_all is not None
    assert await wasteful(connection, store._journal.page_of_tenant, (1, 100, "acme")) is None
    assert await wasteful(connection, store._journal.page, (1, 100), store._taking_all) is None
    assert await wasteful(connection, store._tenants_page, ("a", 100), store._taking_all) is None


MONTH = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
BEGAN_US = round(MONTH.timestamp()) * 1_000_000
RECORDS = 20_000
FIELDS: dict[str, Any] = {
    "tenant": "t3", "platform": True, "actor": "actor-7", "action": "action-3", "collection": "collection-3",
    "entity_id": "e77", "request_id": "q77", "since_us": BEGAN_US + RECORDS - 100, "until_us": BEGAN_US + 100,
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
async def test_postgresql_finds_journal_rows_by_each_field_with_an_index(
    postgres_store: tuple[PostgresStore, asyncpg.Connection], field: str
) -> None:
    """With statistics, and with what the planner chooses by itself; alone and with a tenant."""
    store, connection = postgres_store
    await fill_journal(store)
    assert store._taking_all is not None
    wheres = [JournalFilter(**{field: FIELDS[field]})]
    if field != "platform":
        wheres.append(JournalFilter(**{"tenant": "t3", field: FIELDS[field]}))
    for where in wheres:
        sql, values = store._journal.rows(where, 0, 100)
        async with connection.transaction():
            if where.tenant is None:
                await connection.execute(store._taking_all)
            (found,) = json.loads(await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", *values))
        read = {
            node["Node Type"]: sum(node.get(part, 0) for part in ("Actual Rows", *READ_IN_VAIN))
            for node in nodes(found["Plan"])
            if node.get("Relation Name") == f"strongroom_journal_{MONTH:%Y_%m}"
        }
        assert read, f"{where}: {found}"
        assert "Seq Scan" not in read, f"{where}: {found}"
        assert sum(read.values()) < RECORDS / 8, f"{where}: {read}: {found}"


READ_IN_VAIN = ("Rows Removed by Filter", "Rows Removed by Index Recheck")


async def fill_journal(store: PostgresStore) -> None:
    """Fill the journal with records of this month, one a microsecond, and count them for the planner."""
    schema = store.settings.schema
    owner = await asyncpg.connect(f"postgresql://{schema}_owner:{schema}_owner@{store.settings.place}")
    await owner.execute(
        f"ALTER TABLE {schema}.strongroom_journal DISABLE ROW LEVEL SECURITY; "
        f"INSERT INTO {schema}.strongroom_journal (sequence, at, at_us, id, tenant_id, actor, request_id, action, "
        f"collection, entity_id) SELECT n, '{MONTH.isoformat()}', {BEGAN_US} + n, 'r' || n, "
        "CASE WHEN n % 20 < 19 THEN 't' || n % 20 END, 'actor-' || n % 100, 'q' || n, "
        "'action-' || (n % 1000) / 100, 'collection-' || (n % 1000) / 100, 'e' || n "
        f"FROM generate_series(1, {RECORDS}) AS n; "
        f"UPDATE {schema}.strongroom_journal_head SET sequence = {RECORDS}; "
        f"ALTER TABLE {schema}.strongroom_journal ENABLE ROW LEVEL SECURITY"
    )
    await owner.execute(f"VACUUM ANALYZE {schema}.strongroom_journal")
    await owner.close()


async def test_a_page_of_many_keys_reads_only_that_page(
    postgres_store: tuple[PostgresStore, asyncpg.Connection],
) -> None:
    """With statistics, and with what the planner chooses by itself."""
    store, connection = postgres_store
    owner = store.settings.schema + "_owner"
    filler = await asyncpg.connect(f"postgresql://{owner}:{owner}@{store.settings.place}")
    columns = await filler.fetch(
        "SELECT attname, attnotnull, format_type(atttypid, -1) AS type FROM pg_attribute "
        "WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT atthasdef AND attname <> 'id'",
        f"{store.settings.schema}.api_keys",
    )
    given = {"created_at": "now() - n * interval '1 s'", "hash": "sha256(n::text::bytea)", "tenant": "'t' || n % 5"}
    kinds = {"text": "n::text", "bigint": "n", "boolean": "true", "json": "'[]'", "bytea": "'x'::bytea"}
    cells = {
        row["attname"]: given.get(row["attname"]) or kinds.get(row["type"], "now()")
        for row in columns
        if row["attnotnull"] or row["attname"] in given
    }
    if not any(row["attname"] == "hash" and row["type"] == "bytea" for row in columns):
        cells["hash"] = "md5(n::text)"
    names = ", ".join(f'"{name}"' for name in cells)
    await filler.execute(
        f"INSERT INTO {store.settings.schema}.api_keys (id, {names}) "
        f"SELECT 'k' || n, {', '.join(cells.values())} FROM generate_series(1, 3000) AS n; "
        f"ANALYZE {store.settings.schema}.api_keys"
    )
    await filler.close()
    keys = next(collection for collection in COLLECTIONS if collection.name == "api_keys")
    for where in (Where("deleted_at", "==", None), And(Where("tenant", "==", "t1"), Where("deleted_at", "==", None))):
        select, values = store._tables["api_keys"].pages.find(Query(where, ("-created_at",), 10).check(keys))
        sql = f"EXPLAIN (ANALYZE, FORMAT JSON) {select.sql}"
        (found,) = json.loads(await connection.fetchval(sql, *values))
        read = [node["Actual Rows"] for node in nodes(found["Plan"])]
        assert max(read) == 10, found


# --- SQLite -----------------------------------------------------------------------------------------------------


async def test_sqlite_serves_every_list_by_an_index(tmp_path: Path, lists: list[tuple[Collection, Query]]) -> None:
    store = SqliteStore(str(tmp_path / "store.db"))
    await store.open()
    await store.prepare(COLLECTIONS)
    assert store._session is not None
    points = store._session.points
    points.set_tenant("acme")
    wrong = []
    for collection, query in lists:
        select, values = store._session.tables[collection.name].pages.find(query)
        rows = points.execute(f"EXPLAIN QUERY PLAN {select.sql}", values).fetchall()
        plan = "; ".join(str(row[-1]) for row in rows)
        if "USE TEMP B-TREE" in plan:
            wrong.append(f"{collection.name}: {query}: {plan}")
    await store.close()
    assert not wrong, "\n".join(wrong)
