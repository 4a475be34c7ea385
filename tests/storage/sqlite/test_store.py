"""The SQLite store beyond the suite: its file, isolation in the engine, disk faults, other processes."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import stat
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import apsw
import pytest
from msgspec import structs

from strongroom.entities.entity import Collection, Counter, Entity, Index, Secret
from strongroom.entities.query import Query, Where
from strongroom.errors import (
    AlreadyExists,
    Conflict,
    Gone,
    InvalidInput,
    SchemaError,
    StorageFull,
    StoreError,
    Unavailable,
)
from strongroom.storage.port import (
    Add,
    Append,
    Batch,
    ChangeKind,
    Check,
    Committed,
    Create,
    Delete,
    JournalFilter,
    Operation,
    Patch,
    Put,
    Record,
)
from strongroom.storage.sqlite import schema as _sqlite_schema
from strongroom.storage.sqlite import threads as sqlite_threads
from strongroom.storage.sqlite.isolation import Guarded
from strongroom.storage.sqlite.journal import journal_rows
from strongroom.storage.sqlite.schema import BLOCK
from strongroom.storage.sqlite.session import Session
from strongroom.storage.sqlite.store import SqliteStore
from strongroom.storage.sqlite.threads import Threads
from strongroom.storage.sqlite.writer import OWN_TEXTS, Writer
from tests.helpers.paths import DATA, ROOT
from tests.helpers.waiting import PATIENCE_S, tear_down_the_loop, wait_until

SAVED = DATA / "sqlite"
NOW = 1_750_000_000_000_000


class Note(Entity, collection="notes", indexes=[Index("status", "-stars"), Index("slug", unique=True)]):
    text: str = ""
    status: str = "draft"
    stars: Annotated[int, Counter()] = 0
    slug: str | None = None
    token: Annotated[str | None, Secret()] = None


class Key(Entity, collection="api_keys", scope="global", indexes=[Index("hash", unique=True)]):
    hash: str
    owner: str = ""


COLLECTIONS = (Note.__collection__, Key.__collection__)


def note(text: str = "", **given: Any) -> dict[str, Any]:
    return {"text": text, "status": "draft", "stars": 0, "slug": None, "token": None, **given}


def batch(*operations: Operation, tenant: str | None = "acme", now_us: int = NOW) -> Batch:
    return Batch(tenant, operations, now_us)


def record(entity_id: str = "a", tenant: str | None = "acme", **given: Any) -> Record:
    return Record(f"r-{entity_id}", tenant, NOW, "user:ada", "request", "create", "notes", entity_id, **given)


@asynccontextmanager
async def opened(
    path: Path | str, collections: Sequence[Collection] = COLLECTIONS, **given: Any
) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(str(path), **given)
    await store.open()
    try:
        await store.prepare(collections)
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with opened(tmp_path / "store.db") as one:
        yield one


def raw(store: SqliteStore | Path) -> apsw.Connection:
    """A connection of one's own to the file, past the store."""
    return apsw.Connection(store.path if isinstance(store, SqliteStore) else str(store))


async def warmed_up(store: SqliteStore) -> None:
    """Make the first commit, for which the store opens its writing connection."""
    await store.commit(batch(Create("notes", "warm-up", note())))


@pytest.fixture
async def session(store: SqliteStore) -> AsyncIterator[Session]:
    """Connections to the store's file, made as the store makes its own."""
    threads = Threads()
    one = Session(store.path, COLLECTIONS, 1.0, threads)
    yield one
    await one.finish()
    one.close()
    threads.stop()


@pytest.fixture
def guarded_writer(store: SqliteStore, session: Session) -> Iterator[Guarded]:
    """A writing connection to the store's file, made as the store makes its own."""
    one = Guarded(store.path, session.tables.values(), 1.0, writes=True, own_texts=OWN_TEXTS)
    yield one
    one.close()


@pytest.fixture
def connections() -> Iterator[list[apsw.Connection]]:
    """Every connection that is opened from now on."""
    found: list[apsw.Connection] = []
    apsw.connection_hooks.append(found.append)
    yield found
    apsw.connection_hooks.remove(found.append)


# --- A schema to be proud of ----------------------------------------------------------------------------------


async def test_the_file_is_readable_with_plain_sqlite(store: SqliteStore) -> None:
    await store.commit(batch(Create("notes", "a", note("hello"), None), Append(record(after={"text": "hello"}), of=0)))
    with closing(raw(store)) as connection:
        (sql,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'notes'").fetchall()
        assert [line.strip(" ,") for line in textwrap.dedent(str(sql[0])).replace("\t", "").splitlines()] == [
            "CREATE TABLE notes (",
            "tenant_id TEXT NOT NULL",
            "id TEXT NOT NULL",
            "version INTEGER NOT NULL",
            "created_at TEXT NOT NULL",
            "updated_at TEXT NOT NULL",
            "text TEXT DEFAULT '' NOT NULL",
            "status TEXT DEFAULT 'draft' NOT NULL",
            "stars INTEGER DEFAULT 0 NOT NULL",
            "slug TEXT",
            "token TEXT",
            "PRIMARY KEY (tenant_id, id)",
            ")",
            "STRICT",
        ]
        assert connection.execute("SELECT tenant_id, id, created_at, text FROM notes").fetchall() == [
            ("acme", "a", "2025-06-15T15:06:40.000000Z", "hello")
        ]
        assert connection.execute('SELECT at, "after" FROM _journal').fetchall() == [
            ("2025-06-15T15:06:40.000000Z", '{"text":"hello"}')
        ]
        tables = "SELECT name FROM pragma_table_list WHERE schema = 'main' AND name NOT LIKE 'sqlite%' AND NOT strict"
        assert connection.execute(tables).fetchall() == []


async def test_every_index_of_a_tenant_begins_with_the_tenant(store: SqliteStore) -> None:
    with closing(raw(store)) as connection:
        indexes = connection.execute(
            "SELECT i.name, (SELECT name FROM pragma_index_info(i.name) WHERE seqno = 0) "
            "FROM pragma_index_list('notes') i"
        ).fetchall()
    assert len(indexes) == 3
    assert {first for _, first in indexes} == {"tenant_id"}


def plan(session: Session, sql: str, values: Sequence[Any]) -> str:
    points = session.points
    points.set_tenant("acme")
    rows = points.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall()
    return "; ".join(detail for *_, detail in rows)


async def test_reads_through_the_view_use_the_primary_key_and_the_indexes(session: Session) -> None:
    table = session.tables["notes"]
    by_key = "SEARCH main.notes USING INDEX sqlite_autoindex_notes_1 (tenant_id=? AND id=?)"
    assert plan(session, table.by_id, ("a",)) == by_key
    queries = {
        Query(Where("id", "in", ["a", "b"])): "(tenant_id=? AND id=?)",
        Query(Where("slug", "==", "x")): "USING INDEX notes.unique.slug (tenant_id=? AND slug=?)",
        Query(order_by=("id",), start_after=("a",)): "(tenant_id=? AND id>?)",
        Query(Where("status", "==", "draft"), ("-stars",)): "notes.index.status.-stars (tenant_id=? AND status=?)",
        Query(Where("status", "==", "draft"), ("-stars",), start_after=(3, "a")): (
            "notes.index.status.-stars (tenant_id=? AND status=?"
        ),
    }
    for query, expected in queries.items():
        for compiler in (table.points, table.pages):
            select, values = compiler.find(query.check(Note.__collection__))
            found = plan(session, select.sql, values)
            assert expected in found, query
            if query.where is None or query.where.field == "status":  # type: ignore[union-attr]
                assert "TEMP B-TREE" not in found, "the index gives the order"


# --- Isolation by the engine ----------------------------------------------------------------------------------

REFUSED = [
    "SELECT * FROM main.notes",
    "SELECT count(*) FROM main.notes",
    "SELECT 1 FROM main.notes",
    "SELECT text FROM notes UNION ALL SELECT text FROM main.notes",
    "SELECT * FROM notes, main.notes AS others",
    "SELECT (SELECT max(text) FROM main.notes) FROM notes",
    # SQLite names a common table expression to the authorizer just as it names a view.
    "WITH notes AS (SELECT * FROM main.notes) SELECT * FROM notes",
    "WITH notes AS MATERIALIZED (SELECT * FROM main.notes) SELECT * FROM notes",
    "WITH RECURSIVE notes AS (SELECT * FROM main.notes UNION SELECT * FROM notes) SELECT * FROM notes",
    "EXPLAIN SELECT * FROM main.notes",
    "SELECT name FROM sqlite_schema",
    "SELECT name FROM sqlite_temp_schema",
    "SELECT * FROM pragma_table_list",
    "SELECT * FROM dbstat",
    "PRAGMA table_list",
    "PRAGMA query_only = OFF",
    "PRAGMA writable_schema = ON",
    "INSERT INTO main.notes (tenant_id, id) VALUES ('other', 'x')",
    "INSERT INTO notes (id, text) SELECT id, text FROM main.notes",
    "UPDATE main.notes SET text = 'mine'",
    "UPDATE notes SET text = (SELECT text FROM main.notes LIMIT 1)",
    "DELETE FROM main.notes",
    "REPLACE INTO main.notes (tenant_id, id) VALUES ('other', 'a')",
    "CREATE TEMP VIEW mine AS SELECT * FROM main.notes",
    "CREATE TABLE mine AS SELECT * FROM main.notes",
    "CREATE TEMP TRIGGER mine INSTEAD OF DELETE ON notes BEGIN DELETE FROM main.notes; END",
    "DROP TABLE main.notes",
    "DROP VIEW temp.notes",
    "ALTER TABLE main.notes RENAME TO mine",
    "ATTACH 'mine.db' AS mine",
    "VACUUM INTO 'mine.db'",
    "SELECT * FROM main._journal",
    "DELETE FROM main._journal",
    "UPDATE main._journal SET actor = 'nobody'",
    "DELETE FROM main._fields",
]


@pytest.mark.parametrize("sql", REFUSED)
async def test_sqlite_itself_refuses_a_statement_past_the_tenants_view(
    store: SqliteStore, session: Session, guarded_writer: Guarded, sql: str
) -> None:
    await store.commit(batch(Create("notes", "theirs", note("secret")), tenant="other"))
    for guarded in (session.points, guarded_writer):
        guarded.set_tenant("acme")
        with pytest.raises(
            (apsw.AuthError, apsw.SQLError),
            match=r"not authorized|authorization denied|is prohibited|because it is a view",
        ):
            guarded.execute(sql).fetchall()
    with closing(raw(store)) as connection:
        assert connection.execute("SELECT text FROM notes WHERE tenant_id = 'other'").fetchall() == [("secret",)]


async def test_every_connection_that_the_store_keeps_refuses_the_tables_of_tenants(
    connections: list[apsw.Connection], store: SqliteStore
) -> None:
    await store.commit(batch(Create("notes", "a", note()), Append(record("a"))))
    await store.get("notes", "acme", "a")
    await store.find("notes", "acme", Query())
    await store.changes(None)
    await store.changes(None, tenant="acme")
    refused = 0
    for connection in connections:
        try:
            connection.execute("SELECT * FROM main.notes").fetchall()
        except apsw.ConnectionClosedError:
            continue
        except apsw.AuthError:
            refused += 1
        else:
            pytest.fail("a connection reads past the view of the tenant")
    assert refused == 4, "of single documents, of scans, of the journal, of the writer"


def attacks(guards: Sequence[str]) -> Iterator[str]:
    """Statements of raw SQL that would read, or change, what is not the tenant's, in every guise we thought of."""
    names = ["notes", "x", "_journal", *guards]
    quotes = ['"{}"', "[{}]", "`{}`"]
    reads = ["main.notes", "main._journal", "main . [notes]", "`main`.NOTES", "main.sqlite_schema", "sqlite_master"]
    for name, table in product([quote.format(name) for name in names for quote in quotes], reads):
        yield f"WITH {name} AS (SELECT * FROM {table}) SELECT * FROM {name}"
        yield f"WITH {name} AS MATERIALIZED (SELECT * FROM {table}) SELECT * FROM {name}"
        yield f"WITH RECURSIVE {name} AS (SELECT * FROM {table} UNION SELECT * FROM {name}) SELECT * FROM {name}"
        yield f"WITH a AS (WITH {name} AS (SELECT * FROM {table}) SELECT * FROM {name}) SELECT * FROM a"
        yield f"SELECT * FROM (SELECT * FROM {table}) AS {name}"
        yield f"SELECT * FROM {table} AS {name}"
        yield f"SELECT (SELECT count(*) FROM {table} AS {name})"
        yield f"SELECT * FROM notes WHERE EXISTS (SELECT 1 FROM {table} AS {name} WHERE {name}.rowid > 0)"
        yield f"WITH {name} AS (SELECT * FROM {table}) UPDATE notes SET text = (SELECT max(text) FROM {name})"
        yield f"UPDATE notes SET text = {name}.text FROM {table} AS {name}"
        yield f"INSERT INTO notes SELECT * FROM {table} AS {name}"
        yield f"DELETE FROM notes WHERE id IN (SELECT id FROM {table} AS {name}) RETURNING *"
        yield f"CREATE TEMP VIEW {name} AS SELECT * FROM {table}"
        yield f"CREATE TEMP TRIGGER {name} INSTEAD OF DELETE ON notes BEGIN DELETE FROM {table}; END"
        yield f"CREATE TEMP TABLE {name} AS SELECT * FROM {table}"
    for name in (quote.format(name) for name in names for quote in quotes):
        yield f"DROP VIEW {name}"
        yield f"DROP TRIGGER {name}"
        yield f"ALTER TABLE main.notes RENAME TO {name}"
        yield f"UPDATE temp.{name} SET text = 'changed'"
        yield f"DELETE FROM temp.{name}"
    row = "(1, 'r', 'acme', 0, 'a', 'q', 'changed', 'notes', 'n', 1, NULL, NULL)"
    for table in ("_journal", "main._journal", "main.[_JOURNAL]", "`_journal`"):
        for verb in ("INSERT", "REPLACE", "INSERT OR REPLACE", "INSERT OR IGNORE", "INSERT OR FAIL"):
            yield f"{verb} INTO {table} VALUES {row}"
            yield f"/* */ {verb} INTO {table} VALUES {row} ON CONFLICT DO UPDATE SET action = 'changed'"
        yield f"UPDATE {table} SET action = 'changed'"
        yield f"UPDATE OR REPLACE {table} SET sequence = 1"
        yield f"DELETE FROM {table}"
    for table in ("_meta", "_fields", "sqlite_sequence", "sqlite_schema", "temp.sqlite_schema", "sqlite_stat1"):
        yield f"DELETE FROM {table}"
        yield f"REPLACE INTO main.{table} SELECT * FROM main.{table}"
        yield f"UPDATE {table} SET rowid = rowid + 7"
    for pragma in (
        "writable_schema = ON",
        "query_only = OFF",
        "recursive_triggers = ON",
        "table_info(notes)",
        "user_version = 9",
    ):
        yield f"PRAGMA {pragma}"
        yield f"SELECT * FROM pragma_{pragma.partition(' ')[0].partition('(')[0]}"
    yield from (
        "ATTACH 'store.db' AS other",
        "ATTACH ':memory:' AS other",
        "DETACH main",
        "VACUUM",
        "REINDEX",
        "ANALYZE",
    )
    yield from (
        "VACUUM INTO 'other.db'",
        "SELECT load_extension('x')",
        "DROP TABLE notes",
        "CREATE INDEX i ON notes (text)",
    )
    yield from ("SELECT * FROM dbstat", "SELECT * FROM sqlite_dbpage", "CREATE VIRTUAL TABLE v USING fts5(a)")


async def test_no_raw_statement_reads_or_changes_another_tenants_rows(
    store: SqliteStore, session: Session, guarded_writer: Guarded
) -> None:
    """On each kind of connection, by one who knows the random token: EXPLAIN shows it to anyone."""
    operations = (Create("notes", "theirs", note("SECRET")), Append(record("SECRET", "other")))
    await store.commit(batch(*operations, tenant="other"))
    await store.commit(batch(Create("notes", "mine", note("mine")), Append(record("mine", "acme"))))
    with closing(raw(store)) as connection:
        before = [connection.execute(sql).fetchall() for sql in WHOLE]
    reader = Guarded(store.path, session.tables.values(), 1.0)
    ran = 0
    try:
        for guarded in (session.points, reader, guarded_writer):
            authorizer, guarded.connection.authorizer = guarded.connection.authorizer, None
            found = guarded.connection.execute(
                "SELECT name FROM sqlite_temp_schema WHERE name LIKE 'notes _%'"
            ).fetchall()
            guards = [str(name) for (name,) in found]
            guarded.connection.authorizer = authorizer
            assert guards
            guarded.set_tenant("acme")
            others = not_ours(guarded)
            for prefix, sql in product(("", "EXPLAIN ", "EXPLAIN QUERY PLAN "), attacks(guards)):
                try:
                    guarded.execute("SAVEPOINT attack").fetchall()
                    rows = guarded.execute(prefix + sql).fetchall()
                    ran += 1
                    assert prefix or "SECRET" not in str(rows), sql
                    if not prefix:
                        assert not_ours(guarded) == others, sql
                except apsw.Error:
                    pass
                finally:
                    guarded.execute("ROLLBACK TO attack").fetchall()
                    guarded.execute("RELEASE attack").fetchall()
    finally:
        reader.close()
    with closing(raw(store)) as connection:
        assert [connection.execute(sql).fetchall() for sql in WHOLE] == before
    assert ran > 0, "some are harmless, and are run"


def not_ours(guarded: Guarded) -> list[Any]:
    """What no statement of tenant acme may change, as the connection sees it in its transaction."""
    connection = guarded.connection
    guards = connection.authorizer, connection.exec_trace
    connection.authorizer = connection.exec_trace = None
    try:
        texts = (
            "SELECT * FROM main.notes WHERE tenant_id <> 'acme'",
            "SELECT * FROM main._journal",
            "SELECT * FROM _meta",
        )
        return [connection.execute(text).fetchall() for text in texts]
    finally:
        connection.authorizer, connection.exec_trace = guards


WHOLE = (
    "SELECT * FROM notes ORDER BY tenant_id, id",
    "SELECT * FROM _journal ORDER BY sequence",
    "SELECT * FROM _meta",
)


async def test_the_journal_is_append_only(store: SqliteStore, guarded_writer: Guarded) -> None:
    await store.commit(batch(Append(record("kept", "acme"))))
    for sql in attacks([]):
        if "_journal" not in sql.lower():
            continue
        with pytest.raises((apsw.AuthError, apsw.SQLError)):
            guarded_writer.execute(sql).fetchall()
    assert [r.entity_id for r in (await store.changes(None)).records] == ["kept"]


async def test_a_collection_may_have_a_name_similar_to_the_journals(tmp_path: Path) -> None:
    class Journal(Entity, collection="audit_journal"):
        text: str = ""

    store = SqliteStore(str(tmp_path / "store.db"))
    await store.open()
    await store.prepare((Journal.__collection__,))
    await store.commit(batch(Create("audit_journal", "a", {"text": "x"})))
    assert await store.get("audit_journal", "acme", "a") is not None
    await store.close()


async def test_a_connection_without_a_tenant_sees_and_changes_nothing(
    store: SqliteStore, guarded_writer: Guarded
) -> None:
    await warmed_up(store)
    guarded = guarded_writer
    guarded.set_tenant(None)
    assert guarded.execute("SELECT * FROM notes").fetchall() == []
    assert guarded.execute("UPDATE notes SET text = 'x' RETURNING id").fetchall() == []
    assert guarded.execute("DELETE FROM notes RETURNING id").fetchall() == []
    with pytest.raises(apsw.ConstraintError):
        guarded.execute(
            "INSERT INTO notes (id, version, created_at, updated_at, text, status, stars)"
            " VALUES ('x', 1, '', '', '', '', 0)"
        )


async def test_a_reader_keeps_no_tenant_after_an_error(
    store: SqliteStore, session: Session, connections: list[apsw.Connection]
) -> None:
    await store.commit(batch(Create("notes", "a", note())))
    scans = session.scans
    assert len(await scans.rows("SELECT id FROM notes", (), "acme")) == 1
    with pytest.raises(apsw.AuthError):
        await scans.rows("SELECT id FROM main.notes", (), "acme")
    assert await scans.rows("SELECT id FROM notes", (), None) == []
    assert len(await scans.rows("SELECT id FROM notes", (), "acme")) == 1
    idle = connections[-1]
    assert idle.execute("SELECT id FROM notes").fetchall() == []


async def test_only_the_reader_of_all_changes_sees_every_tenants_journal(store: SqliteStore, session: Session) -> None:
    await store.commit(batch(Append(record("a", "acme")), Append(record("b", "other")), Append(record("c", None))))
    assert [r.entity_id for r in (await store.changes(None)).records] == ["a", "b", "c"]
    assert [r.entity_id for r in (await store.changes(None, tenant="acme")).records] == ["a"]
    assert await session.scans.rows("SELECT id FROM _journal", (), None) == []
    with pytest.raises(apsw.SQLError, match="no such table"):
        await session.journal.rows("SELECT id FROM notes_of_all", (), None)
    with pytest.raises(apsw.AuthError):
        await session.journal.rows("SELECT id FROM main.notes", (), None)


# --- Group commit ---------------------------------------------------------------------------------------------


async def test_a_batch_that_fails_halfway_fails_alone(store: SqliteStore) -> None:
    """The record cannot be encoded, which shows only once the document is written: no savepoint was planned for it."""
    good = [store.commit(batch(Create("notes", f"good-{n}", note()))) for n in range(2)]
    partial = store.commit(batch(Create("notes", "partial", note()), Append(record(after={"bad": object()}))))
    denied = store.commit(batch(Create("notes", "good-0", note())))
    late = store.commit(batch(Create("notes", "late", note()), Append(record("late"))))
    with pytest.raises(TypeError):
        await partial
    with pytest.raises(AlreadyExists):
        await denied
    await asyncio.gather(*good, late)
    found = await store.find("notes", "acme", Query())
    assert [d["id"] for d in found] == ["good-0", "good-1", "late"]
    assert [r.entity_id for r in (await store.changes(None)).records] == ["late"]


async def test_concurrent_batches_share_an_fsync(disk: Disk, tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db") as store:
        await warmed_up(store)
        disk.syncs = []
        await asyncio.gather(*(store.commit(batch(Create("notes", str(n), note()))) for n in range(100)))
        assert len(disk.syncs) < 20


async def test_a_commit_whose_caller_was_cancelled_is_applied(store: SqliteStore) -> None:
    given_up = asyncio.ensure_future(store.commit(batch(Create("notes", "a", note()))))
    given_up.cancel()
    await store.commit(batch(Check("notes", "a", NOW)))


async def test_a_cancelled_scan_keeps_its_connection_until_it_ends(store: SqliteStore, session: Session) -> None:
    await store.commit(batch(Append(record("a", "acme")), Append(record("b", "other"))))
    readers = session.journal  # it has one connection only, so the next scan would meet it
    slow = "SELECT sum(a.value + b.value) FROM json_each(?1) AS a, json_each(?1) AS b"
    scan = asyncio.create_task(readers.rows(slow, (f"[{'1,' * 1500}1]",), None))
    await asyncio.sleep(0.01)  # it is under way, on its thread
    scan.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scan
    following = asyncio.create_task(readers.rows("SELECT entity_id FROM _journal", (), None))
    await asyncio.sleep(0.01)
    assert not following.done(), "the thread of the first one still works"
    assert await following == [("a",), ("b",)]


class UnindexedNote(Entity, collection="notes"):
    text: str = ""
    status: str = "draft"
    stars: Annotated[int, Counter()] = 0
    slug: str | None = None
    token: Annotated[str | None, Secret()] = None


async def test_reads_and_writes_continue_during_prepare(store: SqliteStore) -> None:
    done = asyncio.Event()

    async def write(worker: int) -> int:
        for n in range(1_000_000):
            if done.is_set():
                return n
            id = f"{worker}-{n}"
            await store.commit(batch(Create("notes", id, note()), Append(record(id))))
            assert await store.get("notes", "acme", id) is not None
        raise AssertionError("the preparing never ends")

    async def read() -> None:
        while not done.is_set():
            await store.find("notes", "acme", Query(limit=3))
            end = (await store.changes("end")).cursor
            await store.changes(end, tenant="acme", limit=3)

    work = [asyncio.create_task(write(worker)) for worker in range(3)]
    reading = [asyncio.create_task(read()) for _ in range(8)]
    for _ in range(10):
        await store.prepare((UnindexedNote.__collection__, Key.__collection__))
        await store.prepare(COLLECTIONS)
    done.set()
    written = sum(await asyncio.wait_for(asyncio.gather(*work), 30))
    await asyncio.wait_for(asyncio.gather(*reading), 30)
    assert len((await store.changes(None)).records) == written


# --- The disk -------------------------------------------------------------------------------------------------


def told(connection: apsw.Connection, pragma: str) -> Any:
    """The answer of a PRAGMA, which a store's own connection refuses."""
    authorizer, connection.authorizer = connection.authorizer, None
    rows = connection.execute(f"PRAGMA {pragma}").fetchall()
    connection.authorizer = authorizer
    return rows[0][0]


async def test_a_full_disk_fails_the_whole_group_and_reads_continue(
    connections: list[apsw.Connection], store: SqliteStore
) -> None:
    await warmed_up(store)
    writing = connections[-1]
    told(writing, f"max_page_count = {told(writing, 'page_count') + 2}")  # SQLite then answers as for a full disk
    given = [store.commit(batch(Create("notes", str(n), note("x" * 5_000)))) for n in range(20)]
    given.append(store.commit(batch(Check("notes", "warm-up", 1))))
    answers = await asyncio.gather(*given, return_exceptions=True)
    assert {type(answer) for answer in answers} == {StorageFull}
    assert "disk is full" in str(answers[0])
    assert [d["id"] for d in await store.find("notes", "acme", Query())] == ["warm-up"]
    # The connection is a new one now, without the limit, as if someone had made room.
    await store.commit(batch(Create("notes", "later", note())))
    assert (await store.check()).ok


class Disk(apsw.VFS):
    """A file system that can fail to sync, and that remembers what was written, synced and acknowledged, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.fail_sync_of: str | None = None
        self.syncs: list[int] = []
        self.full = False
        self.beneath = apsw.vfs_names()[0]
        super().__init__("test-disk", self.beneath, makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802  (SQLite's names)
        return File(self, name, flags)

    def xDelete(self, name: str, sync_folder: bool) -> None:  # noqa: N802
        super().xDelete(name, sync_folder)
        self.log.append(("delete", os.path.basename(name)))


class File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        super().__init__(disk.beneath, name, flags)
        self.disk = disk
        self.name = os.path.basename(name.filename() if isinstance(name, apsw.URIFilename) else name or "")

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self.disk.full and self.name.endswith("-wal"):
            raise apsw.FullError("no room")
        super().xWrite(data, offset)
        self.disk.log.append(("write", self.name, offset, bytes(data)))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        super().xTruncate(size)
        self.disk.log.append(("truncate", self.name, size))

    def xSync(self, flags: int) -> None:  # noqa: N802
        self.disk.syncs.append(id(self))
        if self.disk.fail_sync_of is not None and self.name.endswith(self.disk.fail_sync_of):
            raise apsw.IOError("the disk did not take it")
        super().xSync(flags)
        self.disk.log.append(("sync", self.name))


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    yield made
    made.unregister()


async def test_a_failed_fsync_is_an_error_and_never_retried_on_its_handle(disk: Disk, tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db") as store:
        await warmed_up(store)
        disk.fail_sync_of, disk.syncs = "-wal", []
        given = [store.commit(batch(Create("notes", f"lost-{n}", note()))) for n in range(3)]
        given.append(store.commit(batch(Check("notes", "warm-up", 7))))
        answers = await asyncio.gather(*given, return_exceptions=True)
        assert {type(answer) for answer in answers} == {Unavailable}
        outcomes = [answer.details.get("outcome") for answer in answers if isinstance(answer, Unavailable)]
        assert outcomes == ["unknown", "unknown", "unknown", None], "the last would have been refused in any case"
        assert len(disk.syncs) == 1, "one fsync, and no other try"
        assert await store.get("notes", "acme", "lost-0") is None
        failed, disk.fail_sync_of, disk.syncs = disk.syncs[0], None, []
        await store.commit(batch(Create("notes", "kept", note())))
        assert failed not in disk.syncs
        assert await store.get("notes", "acme", "kept") is not None


async def test_a_commit_whose_fsync_failed_may_be_there_after_a_crash(disk: Disk, tmp_path: Path) -> None:
    """Why its outcome is unknown: the log holds all of it, and whoever opens the file after a crash takes it over."""
    async with opened(tmp_path / "store.db") as store:
        await warmed_up(store)
        disk.fail_sync_of = "-wal"
        with pytest.raises(Unavailable, match="whether it was done is not known"):
            await store.commit(batch(Create("notes", "lost", note())))
        disk.fail_sync_of = None
        assert await store.get("notes", "acme", "lost") is None
        (tmp_path / "image").mkdir()
        for suffix in ("", "-wal"):
            shutil.copy(f"{store.path}{suffix}", tmp_path / "image" / f"store.db{suffix}")
    async with opened(tmp_path / "image" / "store.db") as survivor:
        assert await survivor.get("notes", "acme", "lost") is not None


async def test_a_commit_that_never_reached_the_disk_is_reported_as_not_applied(disk: Disk, tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db") as store:
        await warmed_up(store)
        disk.full = True
        with pytest.raises(StorageFull) as caught:
            await store.commit(batch(Create("notes", "lost", note())))
        assert "outcome" not in caught.value.details
        disk.full = False
        await store.commit(batch(Create("notes", "kept", note())))


async def test_a_loop_that_ends_during_a_commit_gives_no_false_answer(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await warmed_up(store)
    monkeypatch.setattr(sqlite_threads, "QUICK_COMMIT_S", -1.0)  # each disk is slow: the writer thread commits
    there, go_on = threading.Event(), threading.Event()

    def slow(self: Writer, commit: Any = Writer.commit) -> None:
        there.set()
        assert go_on.wait(PATIENCE_S)
        commit(self)

    monkeypatch.setattr(Writer, "commit", slow)
    begun = store.commit(batch(Create("notes", "begun", note())))
    await wait_until(there.is_set)
    queued = store.commit(batch(Create("notes", "queued", note())))
    tear_down_the_loop()
    answers = await asyncio.gather(begun, queued, return_exceptions=True)
    go_on.set()
    assert [type(answer) for answer in answers] == [Unavailable, Unavailable]
    assert [answer.details.get("outcome") for answer in answers if isinstance(answer, Unavailable)] == ["unknown", None]


async def test_a_bulk_load_whose_fsync_failed_has_an_unknown_outcome(disk: Disk, tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db") as store:
        await warmed_up(store)
        pack = store.packer().pack([Create("api_keys", "k", {"hash": "h", "owner": ""})])

        async def packs() -> AsyncIterator[Any]:
            yield pack

        disk.fail_sync_of = "-wal"
        with pytest.raises(Unavailable) as caught:
            await store.load(packs(), NOW)
        disk.fail_sync_of = None
        assert caught.value.details["outcome"] == "unknown"


def after_power_loss(log: Sequence[tuple[Any, ...]], folder: Path, randoms: random.Random) -> None:
    """The files as a power loss may leave them: all that was synced, and of the rest whatever reached the disk."""
    safe: dict[str, int] = {}
    for position, (what, name, *_) in enumerate(log):
        if what == "sync":
            safe[name] = position
    files: dict[str, bytearray] = {}
    for position, (what, name, *details) in enumerate(log):
        if what == "delete":
            files.pop(name, None)
        if what not in ("write", "truncate") or (position > safe.get(name, -1) and randoms.random() < 0.5):
            continue
        content = files.setdefault(name, bytearray())
        if what == "truncate":
            del content[details[0] :]
            continue
        offset, data = details
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data
    for name, content in files.items():
        if not name.endswith("-shm"):
            (folder / name).write_bytes(content)


async def test_a_power_loss_loses_nothing_acknowledged_and_leaves_no_partial_batch(
    disk: Disk, connections: list[apsw.Connection], tmp_path: Path
) -> None:
    async def work(store: SqliteStore, worker: int) -> None:
        for n in range(25):
            name = f"{worker}-{n}"
            await store.commit(
                batch(
                    Create("notes", f"{name}-a", note("x" * 600)),
                    Append(record(name)),
                    Create("notes", f"{name}-b", note()),
                )
            )
            disk.log.append(("acknowledged", name))

    async with opened(tmp_path / "store.db") as store:
        begun = len(disk.log)
        await warmed_up(store)
        told(connections[-1], "wal_autocheckpoint = 20")  # so that the database is written to as well
        await asyncio.gather(*(work(store, worker) for worker in range(4)))
    log = list(disk.log)
    assert {name for what, name, *_ in log[begun:] if what == "sync"} == {"store.db", "store.db-wal"}
    randoms = random.Random(7)
    for image in range(60):
        cut = randoms.randrange(begun, len(log))
        folder = tmp_path / f"image-{image}"
        folder.mkdir()
        after_power_loss(log[:cut], folder, randoms)
        acknowledged = {name for what, name, *_ in log[:cut] if what == "acknowledged"}
        async with opened(folder / "store.db") as survivor:
            assert await survivor.integrity() == []
            there = {d["id"] for d in await survivor.find("notes", "acme", Query(limit=1_000))} - {"warm-up"}
            journal = {r.entity_id for r in (await survivor.changes(None)).records}
        assert acknowledged <= journal, "an acknowledged commit is lost"
        assert there == {f"{name}-{half}" for name in journal for half in "ab"}, "half a batch is there"


# --- The file -------------------------------------------------------------------------------------------------


async def refusal(path: Path | str, **given: Any) -> Exception:
    store = SqliteStore(str(path), **given)
    with pytest.raises(StoreError if not given else Exception) as caught:
        await store.open()
    await store.close()
    return caught.value


async def test_a_file_that_is_not_a_database_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    content = random.Random(1).randbytes(20_000)
    path.write_bytes(content)
    assert "is damaged, or is not a SQLite file" in str(await refusal(path))
    assert path.read_bytes() == content


async def test_another_programs_database_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    for number, statement in enumerate(
        ("CREATE TABLE t (a)", "PRAGMA application_id = 7", "PRAGMA user_version = 3", "CREATE VIEW v AS SELECT 1")
    ):
        path = tmp_path / f"{number}.db"
        with closing(raw(path)) as connection:
            connection.execute(statement).fetchall()
        content = path.read_bytes()
        assert "is a SQLite file, but not Strongroom's" in str(await refusal(path))
        assert path.read_bytes() == content
        assert os.listdir(tmp_path) == [f"{number}.db"]
        path.unlink()


async def test_a_later_layout_is_refused_with_what_was_found_and_expected(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path):
        pass
    with closing(raw(path)) as connection:
        connection.execute(f"PRAGMA user_version = {_sqlite_schema.LAYOUT + 1}").fetchall()
    message = str(await refusal(path))
    assert f"found layout {_sqlite_schema.LAYOUT + 1}, expected at most {_sqlite_schema.LAYOUT}" in message


async def test_a_folder_and_a_path_below_a_file_are_refused(tmp_path: Path) -> None:
    assert "is a folder, expected a file" in str(await refusal(tmp_path))
    (tmp_path / "file").write_text("")
    store = SqliteStore(str(tmp_path / "file" / "store.db"))
    with pytest.raises(Unavailable, match="its folder cannot be made: "):
        await store.open()
    store = SqliteStore("/proc/store.db")  # not even root may write there
    with pytest.raises(Unavailable, match="cannot be made: "):
        await store.open()
    assert not (await store.check()).ok


async def test_an_empty_file_and_a_missing_folder_become_a_store(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "store.db"
    path.parent.mkdir(parents=True)
    path.touch()
    for one in (path, tmp_path / "other" / "folder" / "store.db"):
        async with opened(one) as store:
            assert (await store.check()).ok


async def test_a_new_file_is_private_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path) as store:
        await store.commit(batch(Create("notes", "a", note())))
        modes = {name: stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in os.listdir(tmp_path)}
    assert modes == {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600}


async def test_a_damaged_page_is_an_error_that_names_the_file_and_integrity_finds_it(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path) as store:
        await asyncio.gather(*(store.commit(batch(Create("notes", f"{n:03}", note("x" * 500)))) for n in range(200)))
        assert await store.integrity() == []
    with closing(raw(path)) as connection:
        size = connection.pragma("page_size")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'notes'").fetchall()[0]
        assert isinstance(root, int)
        assert isinstance(size, int)
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(random.Random(2).randbytes(size))
    async with opened(path) as store:
        for read in (store.get("notes", "acme", "001"), store.find("notes", "acme", Query())):
            with pytest.raises(StoreError, match=r"store\.db: is damaged"):
                await read
        with pytest.raises(StoreError, match=r"store\.db: is damaged"):
            await store.commit(batch(Create("notes", "new", note())))
        assert await store.integrity() != []


async def test_a_lock_of_another_process_is_awaited_and_then_raises_unavailable(tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db", busy_timeout_s=0.2) as store:
        await store.commit(batch(Create("notes", "a", note())))
        with closing(raw(store)) as other:
            other.execute("BEGIN IMMEDIATE").fetchall()
            with pytest.raises(Unavailable, match="another process holds the store's lock"):
                await store.commit(batch(Patch("notes", "a", {"text": "x"})))
            assert await store.get("notes", "acme", "a") is not None, "reads go on"
            with pytest.raises(Unavailable, match="another process holds the store's lock"):
                await store.prepare(COLLECTIONS)
            waiting = asyncio.ensure_future(store.commit(batch(Patch("notes", "a", {"text": "y"}))))
            await asyncio.sleep(0)
            other.execute("ROLLBACK").fetchall()
            await waiting


COMMITTING_WITHOUT_A_PAUSE = """
import sys, time
import apsw

connection = apsw.Connection(sys.argv[1])
connection.set_busy_timeout(5_000)
print("begun", flush=True)
while True:
    connection.execute("BEGIN IMMEDIATE").fetchall()
    time.sleep(0.02)
    connection.execute("COMMIT").fetchall()
    time.sleep(0.000_5)
"""


async def test_a_process_that_commits_without_a_pause_does_not_starve_the_others(tmp_path: Path) -> None:
    """The lock is free for half a millisecond in twenty, so it has to be tried often."""
    async with opened(tmp_path / "store.db", busy_timeout_s=2.0) as store:
        other = await asyncio.create_subprocess_exec(
            sys.executable, "-c", COMMITTING_WITHOUT_A_PAUSE, store.path, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert other.stdout is not None
            assert await asyncio.wait_for(other.stdout.readline(), PATIENCE_S) == b"begun\n"
            for number in range(12):
                await store.commit(batch(Create("notes", f"{number}", note())))
        finally:
            other.kill()
            await other.wait()


async def test_a_store_locked_by_another_process_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path):
        pass
    with closing(raw(path)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").fetchall()
        store = SqliteStore(str(path), busy_timeout_s=0.1)
        with pytest.raises(Unavailable, match="another process holds the store's lock"):
            await store.open()


async def test_a_snapshot_is_consistent(store: SqliteStore, tmp_path: Path) -> None:
    await store.commit(batch(Create("notes", "a", note()), Append(record("a"))))
    copy = tmp_path / "copy.db"
    given = [store.commit(batch(Create("notes", f"n{n}", note()), Append(record(f"n{n}")))) for n in range(50)]
    await store.snapshot(str(copy))
    await asyncio.gather(*given)
    with pytest.raises(StoreError, match="exists already"):
        await store.snapshot(str(copy))
    async with opened(copy) as other:
        documents = {d["id"] for d in await other.find("notes", "acme", Query(limit=1_000))}
        assert documents == {r.entity_id for r in (await other.changes(None)).records}
        assert "a" in documents


async def test_a_cursor_from_before_an_older_copy_was_restored_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with opened(path) as store:
        await store.commit(batch(Append(record("a"))))
        await store.snapshot(str(tmp_path / "old.db"))
        await store.commit(batch(Append(record("b"))))
        cursor = (await store.changes(None)).cursor
    shutil.move(tmp_path / "old.db", path)
    async with opened(path) as store:
        with pytest.raises(Gone, match="older copy"):
            await store.changes(cursor)


# --- Several processes ----------------------------------------------------------------------------------------

PREPARING = """
import asyncio, sys
from tests.storage.sqlite.test_store import opened

async def main():
    async with opened(sys.argv[1]) as store:
        print(len(await store.prepare(())), flush=True)

asyncio.run(main())
"""


async def test_processes_that_create_one_store_at_once_do_not_collide(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", PREPARING, str(path), cwd=ROOT, stderr=asyncio.subprocess.PIPE
        )
        for _ in range(4)
    ]
    for process in processes:
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, errors.decode()
    async with opened(path) as store:
        assert await store.integrity() == []
        assert await store.prepare(COLLECTIONS, mode="plan") == ()


async def test_the_switch_to_write_ahead_logging_waits_for_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of processes that switch at the same time, SQLite refuses one in a few hundred without waiting."""
    refusals = 2

    class Refusing(apsw.Connection):
        def execute(self, sql: str, *arguments: Any) -> Any:  # type: ignore[override]
            nonlocal refusals
            if sql == "PRAGMA journal_mode = WAL" and refusals:
                refusals -= 1
                raise apsw.BusyError("database is locked")
            return super().execute(sql, *arguments)

    monkeypatch.setattr(apsw, "Connection", Refusing)
    async with opened(tmp_path / "store.db"):
        assert refusals == 0
        with closing(raw(tmp_path / "store.db")) as connection:
            assert connection.pragma("journal_mode") == "wal"


class NoteWithMood(Entity, collection="notes", indexes=[Index("status", "-stars"), Index("mood")]):
    text: str = ""
    status: str = "draft"
    stars: Annotated[int, Counter()] = 0
    slug: str | None = None
    token: Annotated[str | None, Secret()] = None
    mood: str = "calm"


async def test_a_process_with_older_declarations_continues_while_a_newer_one_adds_a_field(store: SqliteStore) -> None:
    await store.commit(batch(Create("notes", "before", note())))
    async with opened(store.path, (NoteWithMood.__collection__,)) as newer:
        await store.commit(batch(Create("notes", "by-the-older", note("x")), Add("notes", "before", "stars", 2)))
        await newer.commit(batch(Create("notes", "by-the-newer", note("y", mood="glad"))))
        await store.commit(batch(Patch("notes", "by-the-newer", {"text": "z"})))
        assert [(d["id"], d["text"], d["mood"]) for d in await newer.find("notes", "acme", Query())] == [
            ("before", "", "calm"),
            ("by-the-newer", "z", "glad"),
            ("by-the-older", "x", "calm"),
        ]
        assert [d["id"] for d in await store.find("notes", "acme", Query())] == [
            "before",
            "by-the-newer",
            "by-the-older",
        ]


class ShortNote(Entity, collection="notes"):
    text: str = ""


async def test_writing_a_field_that_another_process_dropped_fails_alone_with_a_sentence(
    store: SqliteStore,
) -> None:
    await store.commit(batch(Create("notes", "a", note())))
    async with opened(store.path, ()) as other:
        await other.prepare((ShortNote.__collection__,), allow_destructive=True)
        spoiled = store.commit(batch(Create("notes", "b", note())))
        sound = store.commit(batch(Create("api_keys", "k", {"hash": "h", "owner": ""})))
        with pytest.raises(SchemaError, match="changed by another process"):
            await spoiled
        await sound
        for read in (store.get("notes", "acme", "a"), store.find("notes", "acme", Query())):
            with pytest.raises(SchemaError, match="changed by another process"):
                await read
    assert [c.kind for c in await store.prepare((ShortNote.__collection__,))] == []
    assert (await store.find("notes", "acme", Query()))[0]["text"] == ""


# --- Schema ---------------------------------------------------------------------------------------------------


class OptionalNote(Entity, collection="notes", indexes=[Index("status", "-stars"), Index("slug", unique=True)]):
    text: str | None = None
    status: str = "draft"
    stars: Annotated[int, Counter()] = 0
    slug: str | None = None
    token: Annotated[str | None, Secret()] = None


async def test_a_field_becomes_optional_without_loss(store: SqliteStore) -> None:
    await store.commit(batch(Create("notes", "a", note("kept", slug="s"))))
    (change,) = await store.prepare((OptionalNote.__collection__,))
    assert (change.kind, change.name, change.destructive) == (ChangeKind.CHANGE_FIELD, "text", False)
    await store.commit(batch(Create("notes", "b", note(None))))  # type: ignore[arg-type]
    assert [d["text"] for d in await store.find("notes", "acme", Query())] == ["kept", None]
    with pytest.raises(AlreadyExists, match="another document has this slug"):
        await store.commit(batch(Create("notes", "c", note(slug="s"))))
    assert await store.prepare(COLLECTIONS) == (), "a document may be null there, so the column stays as it is"
    await store.prepare((ShortNote.__collection__,), allow_destructive=True)
    assert [d["text"] for d in await store.find("notes", "acme", Query())] == ["kept", None]


async def test_an_index_dropped_by_hand_is_created_again(store: SqliteStore) -> None:
    with closing(raw(store)) as connection:
        connection.execute('DROP INDEX "notes.unique.slug"').fetchall()
    assert [str(change) for change in await store.prepare(COLLECTIONS)] == ["add index notes.slug_unique"]


async def test_equally_named_indexes_of_two_collections_are_distinct(tmp_path: Path) -> None:
    class Pair(Entity, collection="pairs", indexes=[Index("a_b"), Index("a", "b")]):
        a: str = ""
        b: str = ""
        a_b: str = ""

    async with opened(tmp_path / "store.db", (Pair.__collection__,)) as store:
        with closing(raw(store)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM pragma_index_list('pairs')").fetchall()}
    assert {"pairs.index.a_b", "pairs.index.a.b"} <= names


async def test_sql_keywords_are_valid_names(tmp_path: Path) -> None:
    class Order(Entity, collection="order", indexes=[Index("group", "-select")]):
        group: str = ""
        select: int = 0
        value: list[str] = []
        key: str = ""

    document = {"group": "g", "select": 1, "value": ["x"], "key": "k"}
    async with opened(tmp_path / "store.db", (Order.__collection__,)) as store:
        await store.commit(batch(Create("order", "a", document)))
        await store.commit(batch(Patch("order", "a", {"select": 2}), Put("order", "b", document)))
        query = Query(Where("value", "array-contains", "x"), ("-select", "group")).check(Order.__collection__)
        assert [d["select"] for d in await store.find("order", "acme", query)] == [2, 1]
        await store.commit(batch(Delete("order", "b")))


async def test_a_file_of_an_older_layout_is_read_and_upgraded(tmp_path: Path) -> None:
    """`layout-1.db` is a store as the first release wrote it; see the README beside it."""
    path = tmp_path / "store.db"
    shutil.copy(SAVED / "layout-1.db", path)
    store = SqliteStore(str(path))
    await store.open()
    try:
        planned = [str(change) for change in await store.prepare(COLLECTIONS, mode="plan")]
        assert planned == ["add field notes.slug", "add field notes.token", "add index notes.slug_unique"]
        await store.prepare(COLLECTIONS)
        found = await store.get("notes", "acme", "first")
        assert found is not None
        assert (found["text"], found["stars"], found["slug"], found["version"]) == ("Grüße", 3, None, NOW + 1)
        assert [r.entity_id for r in (await store.changes(None)).records] == ["first", "key"]
        assert (await store.find("api_keys", None, Query(Where("hash", "==", "h"))))[0]["owner"] == "ada"
        # A document was deleted at NOW + 5: what is made under its id now must not repeat that version.
        committed = await store.commit(batch(Create("notes", "gone", note())))
        assert committed.versions == (NOW + 6,)
        with pytest.raises(Conflict):
            await store.commit(batch(Put("notes", "gone", note(), expected=NOW + 5)))
        salted = record("salted", "acme", salt=b"s" * 16, claims={"a": 1}, rules="r1")
        await store.commit(batch(Append(salted)))
        rows = (await store.rows()).rows
        assert [(row[8], row[12], row[13], row[14]) for row in rows] == [
            ("first", b"", None, None),
            ("key", b"", None, None),
            ("salted", b"s" * 16, '{"a":1}', "r1"),
        ]
    finally:
        await store.close()


UPGRADE = """
import sys
from strongroom.storage.sqlite.schema import make_or_recognise
print("ready", flush=True)
sys.stdin.readline()
make_or_recognise(sys.argv[1], 5.0)
print("done", flush=True)
"""


async def upgrading(path: Path) -> asyncio.subprocess.Process:
    """A process that upgrades the file once it is told to."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", UPGRADE, str(path), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


def layout_1(path: Path, records: int) -> None:
    """Write a file of layout 1 with so many records more."""
    shutil.copy(SAVED / "layout-1.db", path)
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute(
            "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?) INSERT INTO _journal "
            '(id, tenant_id, at_us, actor, request_id, "action", collection, entity_id) '
            "SELECT 'r' || n, 'acme', n, 'user:ada', 'q' || n, 'create', 'notes', 'n' || n % 100 FROM n",
            (records,),
        ).fetchall()


def described(path: Path) -> list[Any]:
    """The store's own tables and indexes, and the layout."""
    with closing(apsw.Connection(str(path))) as connection:
        columns = connection.execute("SELECT name, type, \"notnull\", dflt_value FROM pragma_table_info('_journal')")
        return [
            connection.execute("PRAGMA user_version").fetchall(),
            columns.fetchall(),
            connection.execute(
                "SELECT name, iif(name LIKE '\\_%' ESCAPE '\\' AND type = 'index', sql, '') FROM sqlite_schema "
                "WHERE tbl_name LIKE '\\_%' ESCAPE '\\' ORDER BY name"
            ).fetchall(),
            connection.execute("SELECT count(*) FROM _journal").fetchall(),
            connection.execute("PRAGMA integrity_check").fetchall(),
        ]


async def test_an_upgrade_by_several_openers_that_are_killed_is_whole_or_not_begun(tmp_path: Path) -> None:
    records = 3_000
    path, new = tmp_path / "store.db", tmp_path / "new.db"
    layout_1(path, records)
    with closing(apsw.Connection(str(path))) as connection:
        (written,) = connection.execute("SELECT count(*) FROM _journal").fetchall()
    store = SqliteStore(str(new))
    await store.open()
    await store.close()
    version, columns, tables, _, _ = described(new)
    for attempt in range(6):
        processes = [await upgrading(path) for _ in range(2)]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
        await asyncio.sleep(attempt * 0.004)
        for process in processes:
            if process.returncode is None and attempt < 5:
                process.kill()
        outputs = [(await process.communicate())[0] for process in processes]
        found = described(path)
        assert found[0] in ([(1,)], version)
        assert found[3:] == [[written], [("ok",)]]
        if found[0] == version:
            assert found[1:3] == [columns, tables]
    assert outputs == [b"done\n", b"done\n"]
    assert found[0] == version


# --- Searching the journal ------------------------------------------------------------------------------------

FIELDS: tuple[tuple[dict[str, Any], str, str], ...] = (
    # the filter, the index without a tenant, the index with one
    ({}, "INTEGER PRIMARY KEY (rowid>?)", "tenant_id (tenant_id=? AND rowid>?)"),
    ({"actor": "a"}, "actor (actor=? AND rowid>?)", "actor (actor=? AND rowid>?)"),
    ({"action": "a"}, "action (action=? AND rowid>?)", "tenant_id (tenant_id=? AND rowid>?)"),
    ({"collection": "a"}, "collection (collection=? AND rowid>?)", "tenant_id (tenant_id=? AND rowid>?)"),
    ({"entity_id": "a"}, "entity_id (entity_id=? AND rowid>?)", "entity_id (entity_id=? AND rowid>?)"),
    ({"request_id": "a"}, "request_id (request_id=? AND rowid>?)", "request_id (request_id=? AND rowid>?)"),
    ({"since_us": 1}, "INTEGER PRIMARY KEY (rowid>?)", "tenant_id (tenant_id=? AND rowid>?)"),
    ({"until_us": 1}, "INTEGER PRIMARY KEY (rowid>? AND rowid<?)", "tenant_id (tenant_id=? AND rowid>? AND rowid<?)"),
    (
        {"after_sequence": 1, "through_sequence": 2},
        "INTEGER PRIMARY KEY (rowid>? AND rowid<?)",
        "tenant_id (tenant_id=? AND rowid>? AND rowid<?)",
    ),
    (
        {"actor": "a", "action": "a", "collection": "a", "until_us": 9, "since_us": 1},
        "actor (actor=? AND rowid>? AND rowid<?)",
        "actor (actor=? AND rowid>? AND rowid<?)",
    ),
    ({"action": "a", "collection": "a"}, "action (action=? AND rowid>?)", "tenant_id (tenant_id=? AND rowid>?)"),
)


@pytest.mark.parametrize(("fields", "alone", "of_tenant"), FIELDS)
@pytest.mark.parametrize("scope", [{}, {"tenant": "acme"}, {"platform": True}])
async def test_an_index_serves_every_search_of_the_journal(
    session: Session, scope: dict[str, Any], fields: dict[str, Any], alone: str, of_tenant: str
) -> None:
    where = JournalFilter(**scope, **fields)
    sql, values = journal_rows(where, 5, 10)
    readers = session.audits if where.tenant is None else session.scans
    plan = [row[3] for row in await readers.rows(f"EXPLAIN QUERY PLAN {sql}", values, where.tenant)]
    (search,) = (line.replace("main.", "") for line in plan if "_journal" in line)
    index = of_tenant if scope else alone
    assert search in (f"SEARCH _journal USING {index}", f"SEARCH _journal USING INDEX _journal.index.{index}")
    assert not [line for line in plan if "TEMP B-TREE" in line], "nothing is sorted"


def examined(store: SqliteStore, where: JournalFilter) -> int:
    """How many records a search reads from the journal's table."""
    sql, values = journal_rows(where, 0, 1_000)
    with closing(Guarded(store.path, (), 1.0, whole_journal=True)) as guarded:
        guarded.connection.exec_trace = None
        guarded.connection.authorizer = None
        steps = [0]

        def count() -> bool:
            steps[0] += 1
            return False

        guarded.connection.set_progress_handler(count, 1)
        guarded.execute(sql, values).fetchall()
        return steps[0]


async def test_a_search_by_time_reads_the_blocks_of_that_time_only(store: SqliteStore) -> None:
    count = 6 * BLOCK
    for begin in range(0, count, 256):
        times = (NOW + n + (50 if n % 97 == 0 else 0) for n in range(begin, begin + 256))  # not quite in order
        await store.commit(
            batch(*(Append(structs.replace(record(f"{at - NOW}"), at_us=at)) for at in times), now_us=NOW)
        )
    rows = [row for number in range(7) for row in (await store.rows(f"{number * 1_000}")).rows]
    for since, until in ((0, 10), (100, 163), (3_000, 3_001), (count - 5, count + 99), (count + 99, count + 100)):
        where = JournalFilter(since_us=NOW + since, until_us=NOW + until)
        found = (await store.rows(None, where)).rows
        assert found == [row for row in rows[:count] if where.matches(row)]
    whole = examined(store, JournalFilter(since_us=NOW))
    short = examined(store, JournalFilter(action="none", since_us=NOW + 3_000, until_us=NOW + 3_001))
    blocks = examined(store, JournalFilter(since_us=NOW + 3_000, until_us=NOW + 3_001))
    late = examined(store, JournalFilter(since_us=NOW + 10 * count))
    assert late < BLOCK < blocks < whole
    assert short < BLOCK, "the index of the action finds none"


async def test_records_that_an_earlier_version_appends_are_found_by_their_time(store: SqliteStore) -> None:
    """An earlier version that had opened the file before it was upgraded does not note the times."""

    async def found(since: int) -> list[str]:
        page = await store.rows(None, JournalFilter(since_us=since, until_us=since + 1))
        return [row[8] for row in page.rows]

    def append(name: str, at_us: int) -> None:
        with closing(raw(store)) as connection:
            connection.execute(
                'INSERT INTO _journal (id, at_us, actor, request_id, "action", collection, entity_id) '
                "VALUES (?, ?, 'a', 'r', 'create', 'notes', ?)",
                (name, at_us, name),
            ).fetchall()

    append("first", 5)
    assert await found(5) == ["first"]
    await store.commit(batch(Append(record("own"))))
    assert (await found(5), await found(NOW)) == (["first"], ["own"])
    append("second", 7)
    assert (await found(7), await found(NOW), await found(8)) == (["second"], ["own"], [])
    for number in range(3):
        await store.commit(batch(Append(record(f"{number}"))))
    assert (await found(7), await found(5), await found(8)) == (["second"], ["first"], [])
    with closing(raw(store)) as connection:
        assert connection.execute("SELECT * FROM _times").fetchall() == [(0, 5, NOW, 6)]


async def test_the_times_of_records_that_were_taken_back_are_not_noted(store: SqliteStore) -> None:
    failing = batch(Create("notes", "a", note()), Append(record("a")), Create("notes", "a", note()))
    writing = [
        store.commit(batch(Append(record("first")))),
        store.commit(failing),
        store.commit(batch(Append(record("last")))),
    ]
    answers = await asyncio.gather(*writing, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Committed, AlreadyExists, Committed]
    with closing(raw(store)) as connection:
        assert connection.execute("SELECT * FROM _times").fetchall() == [(0, NOW, NOW, 2)]


# --- Redaction and retention ----------------------------------------------------------------------------------

SECRET_NAME = "Wolfgang Amadeus Nobody"


async def test_what_was_redacted_or_dropped_is_nowhere_in_the_file(store: SqliteStore) -> None:
    name = SECRET_NAME.encode()
    for number in range(60):
        told = structs.replace(
            record(SECRET_NAME, "acme", after={"name": SECRET_NAME}, salt=b"s" * 16),
            id=f"r{number}",
            actor=SECRET_NAME,
        )
        await store.commit(batch(Append(told)))
    rows = list((await store.rows()).rows)
    redacted = [(*row[:4], "", *row[5:8], "", row[9], None, None, b"\x01" * 162, None, row[14]) for row in rows[30:]]
    assert await store.rewrite(redacted) == 30
    assert await store.drop("acme", rows[29][0]) == 30
    assert len((await store.rows()).rows) == 30
    for path in (store.path, store.path + "-wal"):
        assert name not in Path(path).read_bytes()  # noqa: ASYNC240 - a small file


async def test_pages_of_dropped_records_are_used_again(store: SqliteStore) -> None:
    async def fill() -> int:
        for begin in range(0, 3_000, 300):
            many = (Append(record(f"{begin + n}", "acme", after={"n": "x" * 100})) for n in range(300))
            await store.commit(batch(*many))
        last = (await store.changes("end")).cursor
        await store.drop("acme", int(last))
        return os.stat(store.path).st_size

    first = await fill()
    for _ in range(3):
        assert await fill() <= first * 1.1


async def test_only_redaction_and_retention_change_the_journal_and_only_by_their_statements(store: SqliteStore) -> None:
    await store.commit(batch(Create("notes", "x", note()), Append(record("kept", "acme"))))
    own = "SELECT count(*) FROM main._journal"
    statements = (
        "UPDATE main._journal SET tenant_id = 'other'",
        "UPDATE main._journal SET at_us = 1, actor = ''",
        "UPDATE main._journal SET id = ''",
        "INSERT INTO main._journal (id) VALUES ('x')",
        "INSERT OR REPLACE INTO main._journal SELECT * FROM main._journal",
        "SELECT * FROM notes",
        "DELETE FROM main.notes",
        "DELETE FROM main._floors",
        "DROP TABLE main._journal",
        "PRAGMA secure_delete = OFF",
    )
    redact = "UPDATE main._journal SET actor = '' WHERE sequence = -1"
    with closing(Guarded(store.path, (), 1.0, upkeep=True, own_texts=(own, redact, *statements))) as upkeep:
        for sql in statements:
            with pytest.raises((apsw.AuthError, apsw.SQLError), match=r"not authorized|prohibited|no such table"):
                upkeep.execute(sql).fetchall()
        upkeep.execute(redact).fetchall()
        with pytest.raises(apsw.AuthError, match="names one of the store's own tables"):
            upkeep.execute("DELETE FROM main._journal").fetchall()
        assert upkeep.execute(own).fetchall() == [(1,)]


async def test_a_drop_lets_others_write_in_between(store: SqliteStore) -> None:
    for begin in range(0, 3_000, 300):
        await store.commit(batch(*(Append(record(f"{begin + n}", "acme")) for n in range(300))))
    dropping = asyncio.create_task(store.drop("acme", 3_000))
    written = 0
    while not dropping.done():
        await store.commit(batch(Create("notes", f"{written}", note())))
        written += 1
        await asyncio.sleep(0)
    assert dropping.result() == 3_000
    assert written >= 3


# --- Many checks in a batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, 0, 7, 19])
async def test_many_checks_in_one_batch_are_exact(store: SqliteStore, wrong: int | None) -> None:
    keys = {"hash": "", "owner": "o"}
    made = [Create("api_keys", f"k{n}", {**keys, "hash": f"h{n}"}) for n in range(19)]
    versions = (await store.commit(batch(*made))).versions
    expected = {**{f"k{n}": version for n, version in enumerate(versions)}, "missing": 0}
    checks = [Check("api_keys", id, version) for id, version in expected.items()]
    if wrong is not None:
        checks[wrong] = Check("api_keys", checks[wrong].id, checks[wrong].expected + 1)
    writing = store.commit(batch(*checks, Create("notes", "n", note())))
    if wrong is None:
        await writing
    else:
        with pytest.raises(Conflict) as caught:
            await writing
        assert caught.value.details["operation"] == wrong
        assert checks[wrong].id in caught.value.message
    assert (await store.get("notes", "acme", "n") is not None) == (wrong is None)


async def test_checks_behind_a_write_of_the_same_batch_see_it(store: SqliteStore) -> None:
    made = [Create("api_keys", f"k{n}", {"hash": f"h{n}", "owner": ""}) for n in range(10)]
    versions = (await store.commit(batch(*made))).versions
    checks = [Check("api_keys", f"k{n}", version) for n, version in enumerate(versions)]
    with pytest.raises(Conflict) as caught:
        await store.commit(batch(Patch("api_keys", "k9", {"owner": "new"}), *checks))
    assert caught.value.details["operation"] == 10
    found = await store.get("api_keys", None, "k9")
    assert found is not None
    assert found["owner"] == ""


# --- Where a commit runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [False, True])
async def test_a_slow_disk_commits_on_a_thread_and_a_fast_one_on_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    threads: list[str] = []
    commit = Writer.commit

    def watched(self: Writer) -> None:
        threads.append(threading.current_thread().name)
        if slow:
            time.sleep(0.005)  # the disk, not a wait for luck
        commit(self)

    monkeypatch.setattr(Writer, "commit", watched)
    monkeypatch.setattr(sqlite_threads, "QUICK_COMMIT_S", 0.000_5 if slow else 60.0)
    async with opened(tmp_path / "store.db") as store:
        for n in range(20):
            await store.commit(batch(Create("notes", f"{n}", note())))
        assert len(await store.find("notes", "acme", Query())) == 20
    loop = threading.current_thread().name
    late = set(threads[-10:])
    assert loop not in late if slow else late == {loop}


async def test_one_slow_commit_does_not_move_fast_commits_to_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each commit that moves the log over into the database is one."""
    threads: list[str] = []
    commit = Writer.commit

    def watched(self: Writer) -> None:
        threads.append(threading.current_thread().name)
        if len(threads) == 20:
            time.sleep(2.0)  # the disk, not a wait for luck
        commit(self)

    monkeypatch.setattr(Writer, "commit", watched)
    monkeypatch.setattr(sqlite_threads, "QUICK_COMMIT_S", 0.2)
    async with opened(tmp_path / "store.db") as store:
        for n in range(40):
            await store.commit(batch(Create("notes", f"{n}", note())))
    assert set(threads) == {threading.current_thread().name}


async def test_an_operation_that_is_invalid_among_many_is_named(store: SqliteStore) -> None:
    """Checks and patches that could be applied together, if the last or the last but one were not what it is."""
    keys = [Create("api_keys", f"k{n}", {"hash": f"h{n}", "owner": ""}) for n in range(8)]
    made = await store.commit(batch(*keys, *(Create("notes", f"n{n}", note()) for n in range(8)), tenant="acme"))
    patches = [Patch("api_keys", f"k{n}", {"hash": f"new {n}", "owner": "o"}, made.versions[n]) for n in range(8)]
    checks = [Check("notes", f"n{n}", made.versions[8 + n]) for n in range(8)]
    absent = [Check("absent", f"a{n}", 1) for n in range(8)]
    for operations, at, tenant in (
        ([*patches[1:], Patch("api_keys", "k0", {"hash": "x", "absent": 1}, made.versions[0])], 7, "acme"),
        ([*patches, Patch("absent", "k0", {"hash": "x"}, 1)], 8, "acme"),
        ([*patches, absent[0], patches[0]], 8, "acme"),
        ([*absent, *patches], 0, "acme"),
        ([*checks, *patches], 0, None),
    ):
        with pytest.raises(InvalidInput) as caught:
            await store.commit(batch(*operations, tenant=tenant))
        assert caught.value.details["operation"] == at
    stored = await store.get("api_keys", None, "k1")
    assert stored is not None
    assert stored["hash"] == "h1"
