"""PostgreSQL under faults: acknowledged writes survive, failures are timely and typed, nothing is applied twice."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from strongroom.errors import AlreadyExists, ConfigError, Conflict, TooLarge, Unavailable
from strongroom.storage import open_store
from strongroom.storage.port import (
    MAX_DOCUMENT_BYTES,
    Add,
    Append,
    Check,
    Committed,
    Create,
    Operation,
    Patch,
    Put,
    Store,
)
from strongroom.storage.postgres.store import PostgresStore
from strongroom.testing.storage.samples import COLLECTIONS, batch, item, record, shared
from tests.helpers.servers import free_port, postgres
from tests.helpers.servers.proxy import Proxy
from tests.helpers.waiting import PATIENCE_S, wait_until


@pytest.fixture
def server(request: pytest.FixtureRequest) -> postgres.Server:
    return postgres.start(request, "postgres-18", postgres.bundled())


async def prepared(url: str) -> PostgresStore:
    store = PostgresStore(url)
    await store.open()
    await store.prepare(COLLECTIONS)
    return store


@pytest_asyncio.fixture
async def proxy(server: postgres.Server) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as proxy:
        yield proxy


def through(proxy: Proxy, server: postgres.Server, schema: str, **options: Any) -> str:
    return server.url(schema, **options).replace(f":{server.port}/", f":{proxy.port}/")


def is_commit(chunk: bytes) -> bool:
    return chunk == b"Q\x00\x00\x00\x0bCOMMIT\x00"


# --- A commit whose answer is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("journalled", [True, False], ids=["with a record", "without"])
async def test_a_commit_whose_answer_is_lost_is_found_and_applied_once(
    server: postgres.Server, proxy: Proxy, journalled: bool
) -> None:
    store = await prepared(through(proxy, server, postgres.new_schema()))
    try:
        await store.commit(batch("acme", Create("items", "a", item())))
        operations: list[Operation] = [Add("items", "a", "used", 1), *([Append(record("a"), 0)] if journalled else [])]
        proxy.drop_answer_to(is_commit)
        committed = await store.commit(batch("acme", *operations))
        assert proxy.dropped.is_set()
        found = await store.get("items", "acme", "a")
        assert found is not None
        assert found["used"] == 1
        assert committed.versions[0] == found["version"]
        assert committed.values == {0: 1}
        if journalled:
            page = await store.changes(None)
            assert [r.sequence for r in page.records] == [committed.sequence]
    finally:
        await store.close()


@pytest.mark.parametrize("journalled", [True, False], ids=["with a record", "without"])
async def test_a_commit_that_never_arrived_is_retried(server: postgres.Server, proxy: Proxy, journalled: bool) -> None:
    store = await prepared(through(proxy, server, postgres.new_schema()))
    try:
        await store.commit(batch("acme", Create("items", "a", item())))
        operations: list[Operation] = [Add("items", "a", "used", 1), *([Append(record("a"), 0)] if journalled else [])]
        proxy.drop_request(is_commit)
        await store.commit(batch("acme", *operations))
        assert proxy.dropped.is_set()
        found = await store.get("items", "acme", "a")
        assert found is not None
        assert found["used"] == 1
        assert len((await store.changes(None)).records) == journalled
    finally:
        await store.close()


async def test_a_commit_that_never_arrived_is_not_acknowledged_while_the_server_is_away(
    server: postgres.Server, proxy: Proxy
) -> None:
    store = await prepared(through(proxy, server, postgres.new_schema(), connect_timeout_s=2))
    try:
        await store.commit(batch("acme", Create("items", "a", item())))

        def last_word(chunk: bytes) -> bool:
            if is_commit(chunk):
                proxy.refuse()
                return True
            return False

        proxy.drop_request(last_word)
        with pytest.raises(Unavailable):
            await store.commit(batch("acme", Create("items", "b", item()), Append(record("b"), 0)))
        assert proxy.dropped.is_set()
        proxy.heal()

        async def absent() -> bool:
            try:
                return await store.get("items", "acme", "b") is None
            except Unavailable:
                return False

        await wait_until(absent)
    finally:
        await store.close()


async def test_a_ledger_commit_whose_answer_is_lost_reports_an_unknown_outcome(
    server: postgres.Server, proxy: Proxy
) -> None:
    store = await prepared(through(proxy, server, postgres.new_schema()))
    try:
        await store.commit(batch(None, Create("shared", "a", shared())))
        proxy.drop_answer_to(lambda chunk: b"bench" not in chunk and chunk[:1] == b"B")
        with pytest.raises(Unavailable, match="whether it was done is not known") as caught:
            await store.commit(batch(None, Add("shared", "a", "used", 1)))
        assert caught.value.details["outcome"] == "unknown"
        found = await store.get("shared", None, "a")
        assert found is not None
        assert found["used"] == 1
    finally:
        await store.close()


async def test_the_ledgers_patches_and_checks_commit_in_one_round_trip(server: postgres.Server, proxy: Proxy) -> None:
    store = await prepared(through(proxy, server, postgres.new_schema()))
    try:
        created = await store.commit(batch(None, *(Create("shared", id, shared()) for id in ("a", "b"))))
        version = created.versions[0]
        for number in range(2):  # the first one prepares the statement
            sent: list[bytes] = []
            proxy.drop_request(lambda chunk, sent=sent: bool(sent.append(chunk)))  # type: ignore[misc]  # drops none
            check = Check("shared", "b", created.versions[1])
            committed = await store.commit(batch(None, Patch("shared", "a", {"used": number}, version), check))
            version = committed.versions[0]
        assert len(sent) == 1
        assert (await store.get("shared", None, "a") or {})["used"] == 1
    finally:
        await store.close()


async def test_a_patch_that_makes_a_document_too_large_is_refused_and_no_other_of_its_commit(
    server: postgres.Server,
) -> None:
    store = await prepared(server.url(postgres.new_schema()))
    try:
        text = "x" * (MAX_DOCUMENT_BYTES - 10_000)
        created = await store.commit(batch(None, Create("shared", "a", shared()), Create("shared", "b", shared())))
        outcomes = await asyncio.gather(
            store.commit(batch(None, Patch("shared", "a", {"label": text + "x" * 20_000}, created.versions[0]))),
            store.commit(batch(None, Patch("shared", "b", {"label": text}, created.versions[1]))),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [TooLarge, Committed]
        assert (await store.get("shared", None, "a") or {})["version"] == created.versions[0]
        assert (await store.get("shared", None, "b") or {})["label"] == text
    finally:
        await store.close()


# --- Backends and servers that end ------------------------------------------------------------------------------


async def test_a_transaction_whose_backend_is_terminated_is_retried(server: postgres.Server) -> None:
    schema = postgres.new_schema()
    store = await prepared(server.url(schema))
    admin = await asyncpg.connect(server.admin)
    # Apart, since in a transaction what is seen of the others' activity stays as it was at the first look.
    observer = await asyncpg.connect(server.admin)
    try:
        await store.commit(batch("acme", Create("items", "a", item())))
        async with admin.transaction():
            # The row is locked, so the commit waits in mid-transaction.
            await admin.execute(f'SELECT 1 FROM "{schema}".items FOR UPDATE')
            committing = asyncio.ensure_future(
                store.commit(batch("acme", Add("items", "a", "used", 1), Append(record("a"), 0)))
            )
            waiting = (
                "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = 'app' AND query LIKE $1"
            )
            pid = await wait_until(lambda: observer.fetchval(waiting, f"%{schema}%"))
            # With a time to wait, it answers when the backend is gone.
            assert await observer.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)
        await committing
        found = await store.get("items", "acme", "a")
        assert found is not None
        assert found["used"] == 1
        assert len((await store.changes(None)).records) == 1
    finally:
        await observer.close()
        await admin.close()
        await store.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[postgres.OwnServer]:
    own = postgres.OwnServer(tmp_path)
    own.start()
    own.server.execute(*postgres.APP_ROLE)
    yield own
    own.remove()


async def test_kill_9_under_load_loses_nothing_that_was_acknowledged(own_server: postgres.OwnServer) -> None:
    store = await prepared(own_server.server.url("s", connect_timeout_s=2))
    acknowledged: set[str] = set()
    uncertain: set[str] = set()
    stopping = False

    async def work(writer: int) -> None:
        for number in itertools.count():
            if stopping:
                return
            id = f"{writer}-{number}"
            try:
                await store.commit(batch(f"t{writer % 3}", Create("items", id, item()), Append(record(id), 0)))
            except Unavailable:
                uncertain.add(id)
                await asyncio.sleep(0.01)
            except AlreadyExists:
                pytest.fail(f"{id} was begun again after it had committed")
            else:
                acknowledged.add(id)

    writers = [asyncio.ensure_future(work(n)) for n in range(12)]
    try:
        for _ in range(2):
            before = len(acknowledged)
            await wait_until(lambda before=before: len(acknowledged) > before + 100)  # type: ignore[misc]
            await asyncio.to_thread(own_server.kill)
            await asyncio.to_thread(own_server.start)
        before = len(acknowledged)
        await wait_until(lambda: len(acknowledged) > before + 100)
    finally:
        stopping = True
        await asyncio.gather(*writers)
    try:
        recorded: list[str] = []
        cursor = None
        while (page := await store.changes(cursor)).records:
            recorded += [r.entity_id for r in page.records]
            cursor = page.cursor
        assert len(recorded) == len(set(recorded))
        assert acknowledged <= set(recorded)
        assert set(recorded) <= acknowledged | uncertain
        for id in recorded:
            assert await store.get("items", f"t{int(id.partition('-')[0]) % 3}", id) is not None, id
    finally:
        await store.close()


async def test_an_unreachable_server_fails_fast_and_is_reconnected(server: postgres.Server, proxy: Proxy) -> None:
    store = await prepared(through(proxy, server, postgres.new_schema(), connect_timeout_s=5))
    try:
        await store.commit(batch("acme", Create("items", "a", item())))
        proxy.refuse()
        with pytest.raises(Unavailable):
            await store.get("items", "acme", "a")
        tried = proxy.accepted
        began = time.perf_counter()
        refusals = 0
        for _ in range(200):
            with pytest.raises(Unavailable) as caught:
                await store.get("items", "acme", "a")
            refusals += "retry_after_s" in caught.value.details
        assert refusals > 150  # by the breaker: the server was not asked
        assert proxy.accepted - tried < 50
        assert time.perf_counter() - began < PATIENCE_S
        with pytest.raises(Unavailable):
            await store.commit(batch("acme", Add("items", "a", "used", 1)))
        assert not (await store.check()).ok
        proxy.heal()

        async def answers() -> bool:
            try:
                return await store.get("items", "acme", "a") is not None
            except Unavailable:
                return False

        await wait_until(answers)
        await store.commit(batch("acme", Add("items", "a", "used", 1)))
    finally:
        await store.close()


async def test_a_server_that_does_not_answer_is_given_up_in_time(server: postgres.Server, proxy: Proxy) -> None:
    options = {"connect_timeout_s": 1.0, "statement_timeout_s": 1.0}
    store = await prepared(through(proxy, server, postgres.new_schema(), **options))
    try:
        await store.commit(batch("acme", Create("items", "a", item())))
        proxy.fall_silent()
        began = time.perf_counter()
        results = await asyncio.gather(
            *(store.get("items", "acme", "a") for _ in range(10)),
            store.commit(batch("acme", Add("items", "a", "used", 1))),
            return_exceptions=True,
        )
        assert all(isinstance(result, Unavailable) for result in results), results
        # A read tries one connection; a commit its own, then a new one to ask what became of it, until it gives up.
        assert time.perf_counter() - began < PATIENCE_S
        assert not (await store.check()).ok
        proxy.heal()

        async def answers() -> bool:
            try:
                return await store.get("items", "acme", "a") is not None
            except Unavailable:
                return False

        await wait_until(answers)
    finally:
        await store.close()


# --- Opening ----------------------------------------------------------------------------------------------------


async def test_a_missing_server_raises_unavailable() -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        await open_store(f"postgresql://app:app@127.0.0.1:{free_port()}/postgres")


async def test_a_wrong_password_is_a_configuration_error_and_is_never_shown(
    own_password_server: postgres.OwnServer,
) -> None:
    url = own_password_server.server.url("s").replace("app:app@", "app:hunter2@")
    store = PostgresStore(url)
    with pytest.raises(ConfigError, match="refuses the user or the password") as caught:
        await store.open()
    seen: list[BaseException | None] = [caught.value]
    while seen[-1] is not None:
        assert "hunter2" not in f"{seen[-1]!r} {seen[-1]}"
        seen.append(seen[-1].__cause__)
    assert "hunter2" not in repr(store.settings)
    assert "hunter2" not in repr(vars(store))


@pytest.fixture
def own_password_server(tmp_path: Path) -> Iterator[postgres.OwnServer]:
    own = postgres.OwnServer(tmp_path)
    (own.data / "pg_hba.conf").write_text(
        "host all admin 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
    )
    own.start()
    own.server.execute(*postgres.APP_ROLE)
    yield own
    own.remove()


async def test_a_missing_database_is_named(server: postgres.Server) -> None:
    with pytest.raises(ConfigError, match="there is no such database: run createdb"):
        await open_store(server.url("s").replace("/postgres?", "/nowhere?"))


# --- Locks ------------------------------------------------------------------------------------------------------


async def test_commits_of_the_same_documents_in_opposite_orders_all_end(server: postgres.Server) -> None:
    url = server.url(postgres.new_schema())
    stores = [await prepared(url) for _ in range(3)]
    try:
        ids = [f"d{n}" for n in range(20)]
        await stores[0].commit(batch("acme", *(Create("items", id, item()) for id in ids)))

        async def work(store: Store, order: list[str]) -> None:
            for _ in range(15):
                await store.commit(batch("acme", *(Add("items", id, "used", 1) for id in order), Append(record("x"))))

        orders = (ids, ids[::-1], ids[10:] + ids[:10])
        await asyncio.gather(*(work(store, order) for store, order in zip(stores, orders, strict=True)))
        for id in ids:
            found = await stores[0].get("items", "acme", id)
            assert found is not None
            assert found["used"] == 45
        page = await stores[0].changes(None)
        assert [r.sequence for r in page.records] == list(range(1, 46))
    finally:
        for store in stores:
            await store.close()


async def test_a_deadlocked_transaction_is_retried(server: postgres.Server) -> None:
    schema = postgres.new_schema()
    store = await prepared(server.url(schema))
    other = await asyncpg.connect(server.admin)
    try:
        await store.commit(batch("acme", Create("items", "a", item()), Create("items", "b", item())))
        await other.execute("BEGIN; SET LOCAL deadlock_timeout = '60s'")  # the store's side finds it
        await other.execute(f"UPDATE \"{schema}\".items SET label = 'other' WHERE id = 'b'")
        committing = asyncio.ensure_future(
            store.commit(batch("acme", Add("items", "a", "used", 1), Add("items", "b", "used", 1)))
        )
        await wait_until(lambda: _is_waiting(other, schema))
        await other.execute(f"UPDATE \"{schema}\".items SET label = 'other' WHERE id = 'a'")
        await other.execute("COMMIT")
        await committing
        for id in ("a", "b"):
            found = await store.get("items", "acme", id)
            assert found is not None
            assert (found["used"], found["label"]) == (1, "other")
    finally:
        await other.close()
        await store.close()


async def _is_waiting(connection: asyncpg.Connection, schema: str) -> bool:
    sql = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = 'app' AND query LIKE $1"
    await connection.execute("SELECT pg_stat_clear_snapshot()")  # or, in a transaction, the first look would last
    return bool(await connection.fetch(sql, f"%{schema}%"))


async def test_a_lock_that_is_not_released_raises_unavailable_and_applies_nothing(server: postgres.Server) -> None:
    schema = postgres.new_schema()
    store = await prepared(server.url(schema, lock_timeout_s=0.2))
    other = await asyncpg.connect(server.admin)
    try:
        await store.commit(batch("acme", Create("items", "a", item())))
        async with other.transaction():
            await other.execute(f'SELECT 1 FROM "{schema}".items FOR UPDATE')
            with pytest.raises(Unavailable, match="lock_timeout_s"):
                await store.commit(batch("acme", Create("items", "b", item()), Add("items", "a", "used", 1)))
        assert await store.get("items", "acme", "b") is None
    finally:
        await other.close()
        await store.close()


async def test_a_checked_absence_still_holds_at_the_commit(server: postgres.Server) -> None:
    """Of two that each make one document if the other's is absent, one may succeed: a tenant's documents, and those
    that two tenants share."""
    url = server.url(postgres.new_schema())
    one, two = await prepared(url), await prepared(url)

    async def attempt(store: Store, tenant: str, mine: Create, others: str) -> bool:
        try:
            await store.commit(batch(tenant, Check(mine.collection, others, 0), mine))
        except (Conflict, Unavailable):
            return False
        return True

    try:
        for n in range(40):
            tenant = f"t{n}"
            of_a_tenant = (Create("items", "a", item()), Create("items", "b", item()))
            of_all = (Create("shared", f"a{n}", shared()), Create("shared", f"b{n}", shared()))
            for (mine, theirs), other in ((of_a_tenant, tenant), (of_all, "other")):
                made = await asyncio.gather(attempt(one, tenant, mine, theirs.id), attempt(two, other, theirs, mine.id))
                assert sum(made) == 1, (tenant, mine.collection)
    finally:
        await one.close()
        await two.close()


# --- Being told -------------------------------------------------------------------------------------------------


async def test_a_lost_listening_connection_is_reopened_and_still_wakes_at_once(
    server: postgres.Server,
) -> None:
    url = server.url(postgres.new_schema())
    store, other = await prepared(url), await prepared(url)
    woken = asyncio.Event()
    admin = await asyncpg.connect(server.admin)

    async def wakes() -> float:
        woken.clear()
        began = time.perf_counter()
        await other.commit(batch("acme", Put("items", "a", item()), Append(record("a"), 0)))
        await asyncio.wait_for(woken.wait(), PATIENCE_S)
        return time.perf_counter() - began

    try:
        store.on_change(woken.set)
        first = await _listening(store)
        for _ in range(5):
            await wakes()
        await admin.fetch("SELECT pg_terminate_backend($1)", first)
        await wait_until(lambda: _listens_as_other_than(store, first))
        await wakes()
    finally:
        await admin.close()
        await store.close()
        await other.close()


async def _listening(store: PostgresStore) -> int:
    connection = await wait_until(lambda: store._listener.connection)
    assert connection is not None
    pid: int = connection.get_server_pid()
    return pid


def _listens_as_other_than(store: PostgresStore, pid: int) -> bool:
    connection = store._listener.connection
    return connection is not None and connection.get_server_pid() != pid
