"""The journal's partitions on PostgreSQL: made ahead, dropped by retention, never in the way of a record."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import Unavailable
from strongroom.storage.postgres import partitions
from strongroom.storage.postgres.journal_indexes import INDEXES
from strongroom.storage.postgres.partitions import drop_partitions_before, ensure_partitions, journal_time
from strongroom.storage.postgres.schema import prepare
from strongroom.testing.storage.samples import COLLECTIONS
from strongroom.testing.storage.schema import declare
from tests.helpers.postgres_schema import NOW, Place, Roles, append, on_each_version, us, whole


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
    assert len(definitions) == len(INDEXES)
    assert {" btree (sequence)", " btree (tenant_id, sequence)", " btree (actor, sequence)"} < {
        row["indexdef"].partition("USING")[2] for row in definitions
    }


@on_each_version
async def test_only_past_partitions_without_records_are_dropped(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [])
    first = datetime(2020, 1, 1, tzinfo=UTC)
    await ensure_partitions(connection, place.settings, first, 3)
    for sequence, month in enumerate((1, 2, 3), 1):
        await append(connection, place, sequence, us(datetime(2020, month, 28, tzinfo=UTC)))
    drop = f"SELECT {place.schema}.strongroom_drop_records(NULL, $1)"

    async def left() -> list[str]:
        rows = await connection.fetch(
            "SELECT relname::text FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid "
            "WHERE inhparent = $1::text::regclass AND relname LIKE '%_2020_%' ORDER BY 1",
            place.table("strongroom_journal"),
        )
        return [row["relname"].removeprefix("strongroom_journal_") for row in rows]

    assert await drop_partitions_before(connection, place.settings, NOW) == 1, "the one of April has none"
    assert await connection.fetchval(drop, 2) == 2
    assert await drop_partitions_before(connection, place.settings, datetime(2020, 2, 15, tzinfo=UTC)) == 1
    assert await left() == ["2020_02", "2020_03"]
    assert await drop_partitions_before(connection, place.settings, NOW + timedelta(days=4_000)) == 1
    assert await left() == ["2020_03"], "it has a record"
    assert await connection.fetchval(drop, 9) == 1
    later = datetime.now(UTC) + timedelta(days=4_000)
    assert await drop_partitions_before(connection, place.settings, later) == 1, "none of this month or a later one"
    assert await connection.fetchval(f"SELECT floor FROM {place.table('strongroom_journal_head')}") == 3


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
