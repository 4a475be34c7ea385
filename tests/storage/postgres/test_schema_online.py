"""Schema changes on PostgreSQL while other processes write, and applies that are killed or run at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from hypothesis import settings

from strongroom.entities.entity import Collection, FieldSpec, FieldType, Index
from strongroom.errors import SchemaError, Unavailable
from strongroom.storage.port import ChangeKind, SchemaChange
from strongroom.storage.postgres import schema as schema_module
from strongroom.storage.postgres import schema_apply as online
from strongroom.storage.postgres.schema import prepare
from strongroom.storage.postgres.schema_tables import physical_indexes
from strongroom.testing.storage.schema import declare
from tests.helpers.postgres_schema import RANK, Place, catalog, documents, insert, kinds, on_each_version, told
from tests.helpers.waiting import wait_until


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
