"""The PostgreSQL store beyond the suite: isolation in the engine, plans, group commit, order, its URL."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from strongroom.entities.query import Aggregate, Query, Where
from strongroom.errors import AlreadyExists, ConfigError, StoreError, StrongroomError, Unavailable
from strongroom.storage import open_store
from strongroom.storage.port import Add, Append, Batch, Check, Committed, Create, Delete, Operation, Patch, Put
from strongroom.storage.postgres.settings import read_settings
from strongroom.storage.postgres.store import PostgresStore
from strongroom.testing.storage import Backend
from strongroom.testing.storage.backend import examples
from strongroom.testing.storage.batches import TestAtomicBatches
from strongroom.testing.storage.isolation import TestIsolation
from strongroom.testing.storage.journal import TestJournal
from strongroom.testing.storage.preconditions import TestPreconditions
from strongroom.testing.storage.samples import COLLECTIONS, NOW, batch, item, record, sample, shared, tenants
from tests.conftest import missing
from tests.helpers.servers import postgres
from tests.helpers.waiting import PATIENCE_S, wait_until


@pytest.fixture
def server(request: pytest.FixtureRequest) -> postgres.Server:
    return postgres.start(request, "postgres-18", postgres.bundled())


@pytest.fixture
def schema() -> str:
    return postgres.new_schema()


@pytest_asyncio.fixture
async def store(server: postgres.Server, schema: str) -> AsyncIterator[PostgresStore]:
    store = await prepared(server.url(schema))
    yield store
    await store.close()


@pytest_asyncio.fixture
async def app(server: postgres.Server, store: PostgresStore) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the store's own role, which owns the tables."""
    connection = await asyncpg.connect(f"postgresql://app:app@127.0.0.1:{server.port}/postgres")
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def admin(server: postgres.Server) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(server.admin)
    yield connection
    await connection.close()


async def prepared(url: str) -> PostgresStore:
    store = PostgresStore(url)
    await store.open()
    await store.prepare(COLLECTIONS)
    return store


# --- Isolation in the engine ------------------------------------------------------------------------------------


async def test_without_a_tenant_postgresql_shows_and_changes_no_row(
    store: PostgresStore, schema: str, app: asyncpg.Connection
) -> None:
    for tenant in ("acme", "umbrella"):
        await store.commit(batch(tenant, Create("items", "a", item())))
    items = f'"{schema}".items'
    assert await app.fetch(f"SELECT * FROM {items}") == []
    assert await app.execute(f"UPDATE {items} SET used = 9") == "UPDATE 0"
    assert await app.execute(f"DELETE FROM {items}") == "DELETE 0"
    async with app.transaction():
        await app.execute("SELECT set_config('app.current_tenant', 'acme', true)")
        assert [row["tenant_id"] for row in await app.fetch(f"SELECT * FROM {items}")] == ["acme"]
        assert await app.execute(f"UPDATE {items} SET used = 9 WHERE tenant_id = 'umbrella'") == "UPDATE 0"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with app.transaction():
                await app.execute(f"UPDATE {items} SET tenant_id = 'umbrella'")
    assert await app.fetch(f"SELECT * FROM {items}") == []


async def test_without_row_level_security_statements_still_filter_by_tenant(
    store: PostgresStore, admin: asyncpg.Connection
) -> None:
    for tenant in ("acme", "umbrella"):
        await store.commit(batch(tenant, Create("items", "a", item(tenant))))
    table = store._tables["items"]
    page, values = table.pages.find(Query().check(table.collection))
    totals, _ = table.pages.aggregate([Aggregate("count")], None)
    # A superuser, whom no policy binds.
    assert [row["label"] for row in await admin.fetch(table.by_id, "acme", "a")] == ["acme"]
    assert [row["label"] for row in await admin.fetch(page.sql, "acme", *values)] == ["acme"]
    assert [row["count"] for row in await admin.fetch(totals.sql, "acme")] == [1]


async def test_the_tenant_setting_ends_with_its_statement_even_on_failure(store: PostgresStore, schema: str) -> None:
    """On one connection, as the pool lends it: after a read, a failed read, a failed commit, no row is seen."""
    await store.commit(batch("acme", Create("items", "a", item())))
    assert await store.get("items", "acme", "a") is not None
    lent = await store._opened().acquire()
    connection = lent.connection
    pid = connection.get_server_pid()
    every = f'SELECT id FROM "{schema}".items'

    async def sees_nothing() -> None:
        assert connection.get_server_pid() == pid
        assert await connection.fetch(every) == []
        assert not await connection.fetchval("SELECT current_setting('app.current_tenant', true)")

    await sees_nothing()
    by_id = store._tables["items"].by_id
    assert len(await connection.fetch(by_id, "acme", "a")) == 1
    await sees_nothing()
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.fetch(by_id.replace("SELECT n.*", "SELECT 1 / (n.used * 0), n.*"), "acme", "a")
    await sees_nothing()
    store._opened().give_back(lent)

    writer = store._tenants
    assert writer is not None
    with pytest.raises(StrongroomError):
        await store.commit(batch("acme", Create("items", "a", item())))
    assert writer.commits._connection is not None
    assert await writer.commits._connection.fetch(every) == []


async def test_a_read_uses_the_primary_key_and_a_page_an_index(
    store: PostgresStore, server: postgres.Server, schema: str, app: asyncpg.Connection
) -> None:
    for begin in range(0, 2000, 400):
        documents = [Create("samples", f"{n:05}", sample(name=f"n{n % 50}", rank=n)) for n in range(begin, begin + 400)]
        await store.commit(batch("acme", *documents))
    server.execute(f'ANALYZE "{schema}".samples')
    table = store._tables["samples"]
    query = Query(Where("name", "==", "n7"), order_by=("-rank",), limit=5).check(table.collection)
    assert [d["rank"] for d in await store.find("samples", "acme", query)] == [1957, 1907, 1857, 1807, 1757]
    page, values = table.pages.find(query)
    point = await _plan(app, table.by_id, ["acme", "00007"])
    assert 'Index Scan using "samples.key"' in point, point
    assert "Seq Scan" not in point
    ordered = await _plan(app, page.sql, ["acme", *values])
    assert 'using "samples.index.name.-rank"' in ordered, ordered
    assert "Sort" not in ordered


async def _plan(connection: asyncpg.Connection, sql: str, values: Sequence[Any]) -> str:
    """The plan that the statement has once it is kept: the general one, for whatever values."""
    async with connection.transaction():
        await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        await connection.execute(f"PREPARE probe AS {sql}")
        literals = ", ".join(str(value) if isinstance(value, int) else f"'{value}'" for value in values)
        rows = await connection.fetch(f"EXPLAIN (ANALYZE) EXECUTE probe({literals})")
        await connection.execute("DEALLOCATE probe")
    return "\n".join(row[0] for row in rows)


# --- Through pgbouncer ------------------------------------------------------------------------------------------


async def test_tenants_stay_apart_through_pgbouncer_in_transaction_mode(
    request: pytest.FixtureRequest, server: postgres.Server, schema: str
) -> None:
    port = postgres.start_pgbouncer(request, server, 2)
    through = server.url(schema, pgbouncer=1).replace(f":{server.port}/", f":{port}/")
    await (await prepared(server.url(schema))).close()
    store = await prepared(through)
    plain = await asyncpg.connect(f"postgresql://app:app@127.0.0.1:{port}/postgres", statement_cache_size=0)
    names = [f"t{n}" for n in range(10)]
    try:

        async def work(tenant: str) -> None:
            for n in range(10):
                await store.commit(
                    batch(tenant, Put("items", "a", item(f"{tenant}-{n}")), Append(record("a", tenant), 0))
                )
                found = await store.get("items", tenant, "a")
                assert found is not None
                assert found["label"] == f"{tenant}-{n}"
                everything = await store.find("items", tenant, Query())
                assert [d["label"] for d in everything] == [f"{tenant}-{n}"]
                assert await store.aggregate("items", tenant, [Aggregate("count")], None) == {"count": 1}

        async def look() -> None:
            for _ in range(50):
                async with plain.transaction():
                    assert await plain.fetch(f'SELECT * FROM "{schema}".items') == []

        await asyncio.gather(look(), *map(work, names))
        assert len((await store.changes(None)).records) == 100
        assert (await store.check()).ok
    finally:
        await plain.close()
        await store.close()


# --- Group commit -----------------------------------------------------------------------------------------------


async def test_concurrent_batches_share_few_transactions(
    store: PostgresStore, schema: str, admin: asyncpg.Connection
) -> None:
    commits = (
        store.commit(batch(f"t{n % 7}", Create("items", f"{n}", item()), Append(record(f"{n}", f"t{n % 7}"), 0)))
        for n in range(300)
    )
    await asyncio.gather(*commits)
    transactions = await admin.fetchval(f'SELECT count(DISTINCT xmin::text) FROM "{schema}".items')
    assert transactions <= 3


async def test_the_platforms_batches_do_not_wait_for_a_tenants(
    store: PostgresStore, schema: str, admin: asyncpg.Connection
) -> None:
    await store.commit(batch("acme", Create("items", "a", item())))
    async with admin.transaction():
        await admin.execute(f'SELECT 1 FROM "{schema}".items FOR UPDATE')
        waiting = asyncio.ensure_future(store.commit(batch("acme", Add("items", "a", "used", 1))))
        await asyncio.wait_for(store.commit(batch(None, Create("shared", "a", shared()))), PATIENCE_S)
        assert not waiting.done()
    await waiting


_IDS = st.sampled_from(["a", "b", "c"])
_LABELS = st.sampled_from(["x", "y"])
_CODES = st.sampled_from([None, None, "k1", "k2"])
_ITEMS = st.builds(lambda label, code: item(label, code=code), _LABELS, _CODES)


def _operations() -> st.SearchStrategy[Operation]:
    return st.one_of(
        st.builds(Create, st.just("items"), _IDS, _ITEMS),
        st.builds(Put, st.just("items"), _IDS, _ITEMS, st.sampled_from([None, None, 0, 1])),
        st.builds(Patch, st.just("items"), _IDS, st.fixed_dictionaries({"label": _LABELS})),
        st.builds(Patch, st.just("items"), _IDS, st.fixed_dictionaries({"code": _CODES})),
        st.builds(Delete, st.just("items"), _IDS),
        st.builds(lambda id, n: Add("items", id, "used", n, at_most=3), _IDS, st.integers(1, 2)),
        st.builds(Check, st.just("items"), _IDS, st.just(0)),
    )


_some_tenants = tenants("sets")


@examples(4)
@given(st.lists(st.lists(_operations(), min_size=1, max_size=3), min_size=1, max_size=6))
async def test_concurrent_batches_end_as_if_serial(store: PostgresStore, batches: list[list[Operation]]) -> None:
    """As sets, in groups, or a step at a time alone: the same successes, the same errors, the same documents."""
    together, alone = next(_some_tenants), next(_some_tenants)
    grouped = await asyncio.gather(
        *(store.commit(Batch(together, tuple(operations), NOW)) for operations in batches), return_exceptions=True
    )
    writer = store._tenants
    assert writer is not None
    stepped = []
    for operations in batches:
        async with writer.writing:
            stepped += await writer.commits.write([Batch(alone, tuple(operations), NOW)], as_sets=False)
    assert list(map(_shape, grouped)) == list(map(_shape, stepped))
    found = [await store.find("items", tenant, Query()) for tenant in (together, alone)]
    documents = [[{**d, "version": 0} for d in documents] for documents in found]
    assert documents[0] == documents[1]


def _shape(answer: object) -> object:
    """An answer without its versions: those are the store's own."""
    if isinstance(answer, Committed):
        return [version > 0 for version in answer.versions], dict(answer.values)
    assert isinstance(answer, StrongroomError), repr(answer)
    return type(answer), answer.details.get("operation")


async def test_unique_values_can_be_swapped_between_documents_in_batch_order(store: PostgresStore) -> None:
    await store.commit(batch("acme", Create("items", "a", item(code="k1")), Create("items", "b", item(code="k2"))))
    # One statement, in the order of ids, would let both through.
    taken, freed = await asyncio.gather(
        store.commit(batch("acme", Patch("items", "b", {"code": "k1"}))),
        store.commit(batch("acme", Patch("items", "a", {"code": "k3"}))),
        return_exceptions=True,
    )
    assert isinstance(taken, AlreadyExists)
    assert "code" in taken.message
    assert isinstance(freed, Committed)
    await store.commit(batch("acme", Delete("items", "a"), Create("items", "c", item(code="k3"))))


# --- The journal's order ----------------------------------------------------------------------------------------


async def test_no_record_appears_behind_a_cursor_though_a_transaction_is_held_open(
    store: PostgresStore, schema: str, admin: asyncpg.Connection
) -> None:
    append = store._journal._append
    line = ("r-held", "acme", NOW, "user:ada", "request-1", "create", "items", "held", 1, None, None, b"", None, None)
    await admin.execute("BEGIN")
    times = [await admin.fetchval("SELECT now()")]
    ((sequence, _, _),) = await admin.fetch(append, 1, "nobody", times, *([value] for value in line))
    committing = [
        asyncio.ensure_future(store.commit(batch(tenant, Create("items", "a", item()), Append(record("a", tenant), 0))))
        for tenant in ("acme", "umbrella")
    ]
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1"
    await wait_until(lambda: _fresh(store, blocked, f"%{schema}%"))
    page = await store.changes(None)
    assert (page.records, page.cursor) == ((), "0")
    await admin.execute("COMMIT")
    await asyncio.gather(*committing)
    records = (await store.changes(page.cursor)).records
    assert [r.sequence for r in records] == [sequence, sequence + 1, sequence + 2]
    assert records[0].entity_id == "held"


async def _fresh(store: PostgresStore, sql: str, *values: Any) -> int:
    count: int = (await store._rows(sql, values))[0][0]
    return count


async def test_the_journal_is_read_by_many_while_many_write_and_nothing_is_skipped(
    server: postgres.Server, schema: str, store: PostgresStore
) -> None:
    others = [await prepared(server.url(schema)) for _ in range(2)]
    seen: list[int] = []
    done = asyncio.Event()

    async def read() -> None:
        cursor = "0"
        while True:
            ended = done.is_set()
            page = await store.changes(cursor)
            seen.extend(r.sequence for r in page.records)
            cursor = page.cursor
            if ended and not page.records:
                return

    async def write(node: PostgresStore, name: str) -> None:
        for n in range(60):
            await node.commit(batch(name, Put("items", "a", item(f"{n}")), Append(record("a", name), 0)))

    reader = asyncio.ensure_future(read())
    try:
        await asyncio.gather(
            *(write(node, f"{number}-{n}") for number, node in enumerate((store, *others)) for n in range(3))
        )
        done.set()
        await reader
        assert seen == list(range(1, 541))
    finally:
        for other in others:
            await other.close()


# --- Opening, and the URL -----------------------------------------------------------------------------------------


async def test_a_superuser_is_refused_with_what_to_run(server: postgres.Server) -> None:
    with pytest.raises(StoreError, match=r"superuser.*strongroom schema roles"):
        await open_store(f"{server.admin}?schema=nowhere")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("postgresql://u:hunter2@h/db?shema=x", "the unknown option shema, expected some of schema, max_connections"),
        ("postgresql://u:hunter2@h/", "found no database"),
        ("postgresql://u:hunter2@h:port/db", "expected postgresql://user:password@host:port/database"),
        ("postgresql://u:hunter2@h/db?schema=public", "schema: found 'public', expected a name"),
        ("postgresql://u:hunter2@h/db?schema=A", "schema: found 'A', expected a name"),
        (
            "postgresql://u:hunter2@h/db?max_connections=2",
            "max_connections: found 2, expected a whole number of at least 3",
        ),
        ("postgresql://u:hunter2@h/db?max_connections=many", "max_connections: found 'many', expected a whole number"),
        (
            "postgresql://u:hunter2@h/db?lock_timeout_s=0",
            "lock_timeout_s: found 0, expected a number of at least 0.001",
        ),
        ("postgresql://u:hunter2@h/db?statement_timeout_s=nan", "statement_timeout_s: found nan, expected a number"),
        ("postgresql://u:hunter2@h/db?pgbouncer=yes", "pgbouncer: found 'yes', expected 0 or 1"),
    ],
)
def test_an_invalid_url_option_is_refused_by_name_without_the_password(url: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(url)
    assert problem in caught.value.message
    assert "hunter2" not in caught.value.message


def test_a_urls_options_are_read_and_the_drivers_are_passed_on() -> None:
    settings = read_settings(
        "postgres://u:p%40ss@db.example.com:6432/my%20db?schema=s1&max_connections=7&connect_timeout_s=1.5"
        "&statement_timeout_s=2&lock_timeout_s=3&pgbouncer=1&sslmode=require"
    )
    assert (
        settings.dsn == "postgresql://u:p%40ss@db.example.com:6432/my%20db?sslmode=require&application_name=strongroom"
    )
    assert dataclasses.replace(settings, dsn="") == dataclasses.replace(
        settings,
        dsn="",
        place="db.example.com:6432/my db",
        schema="s1",
        max_connections=7,
        connect_timeout_s=1.5,
        statement_timeout_s=2,
        lock_timeout_s=3,
        pgbouncer=True,
    )
    assert "p%40ss" not in repr(settings)


async def test_the_pool_is_bounded_and_a_caller_that_waits_too_long_gets_an_error(
    server: postgres.Server, schema: str, admin: asyncpg.Connection
) -> None:
    url = server.url(schema, max_connections=5, connect_timeout_s=2, application_name=f"test-{schema}")
    store = await prepared(url)
    store.on_change(lambda: None)
    try:
        await store.commit(batch("acme", Create("items", "a", item())))
        await store.commit(batch(None, Create("shared", "a", shared())))
        await asyncio.gather(*(store.get("items", "acme", "a") for _ in range(100)))
        await wait_until(lambda: store._listener.connection)
        count = await admin.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", f"test-{schema}"
        )
        assert count == 5
        async with admin.transaction():
            await admin.execute(f'LOCK TABLE "{schema}".items')
            reads = [asyncio.ensure_future(store.get("items", "acme", "a")) for _ in range(3)]
            done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_EXCEPTION)
            with pytest.raises(Unavailable, match="all 2 connections are in use"):
                await done.pop()
        for read in reads:
            if not read.done():
                assert await read is not None
    finally:
        await store.close()


async def test_a_cancelled_read_leaves_the_pool_whole(
    server: postgres.Server, schema: str, store: PostgresStore, admin: asyncpg.Connection
) -> None:
    await store.commit(batch("acme", Create("items", "a", item())))
    async with admin.transaction():
        await admin.execute(f'LOCK TABLE "{schema}".items')
        reads = [asyncio.ensure_future(store.get("items", "acme", "a")) for _ in range(30)]
        await wait_until(lambda: store._opened().in_use == store.settings.max_connections - 3)
        for read in reads:
            read.cancel()
        assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*reads, return_exceptions=True))
    assert store._opened().in_use == 0
    found = await asyncio.gather(*(store.get("items", "acme", "a") for _ in range(50)))
    assert all(document is not None for document in found)


async def test_health_reports_version_role_queue_and_connections(store: PostgresStore) -> None:
    health = await store.check()
    assert health.ok
    assert 0 < health.latency_s < 5
    assert health.details["postgresql"].startswith("18")
    assert health.details["standby"] is False
    assert {"queued", "connections_in_use", "schema", "server", "replicas"} <= health.details.keys()
    await store.close()
    assert not (await store.check()).ok


async def test_a_role_that_owns_its_tables_gives_a_warning(
    server: postgres.Server, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    await (await prepared(server.url(schema))).close()
    with caplog.at_level(logging.WARNING):
        await (await prepared(server.url(schema))).close()
    assert "owns schema" in caplog.text


# --- The oldest PostgreSQL there is --------------------------------------------------------------------------------


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    binaries = postgres.installed()
    if binaries is None:
        missing("The machine's own PostgreSQL", "install Debian's package postgresql-15")
    old = postgres.start(request, "postgres-installed", binaries)
    return Backend(lambda: old.url(postgres.new_schema()))


class TestOldestPreconditions(TestPreconditions):
    """On the machine's own PostgreSQL."""


class TestOldestJournal(TestJournal):
    """On the machine's own PostgreSQL."""


class TestOldestAtomicBatches(TestAtomicBatches):
    """On the machine's own PostgreSQL."""


class TestOldestIsolation(TestIsolation):
    """On the machine's own PostgreSQL."""


del TestAtomicBatches, TestIsolation, TestJournal, TestPreconditions
