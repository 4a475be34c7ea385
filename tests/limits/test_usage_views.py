"""Usage views for analysts: who used how much, in total and this month."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import apsw
import asyncpg
import pytest

from strongroom import Limit, Strongroom, Total
from strongroom.context import us_from_utc
from strongroom.errors import ConfigError
from strongroom.limits.usage_state import UsageState
from strongroom.limits.usage_views import views_sql
from tests.helpers.servers import postgres
from tests.helpers.stores import new_url

MOST_TOKENS = (
    "SELECT tenant_id, name, used FROM {schema}strongroom_usage_by_month "
    "WHERE key_id IS NOT NULL AND resource = 'tokens' AND month = {month} ORDER BY used DESC LIMIT 10"
)
IN_ALL = "SELECT name, resource, used FROM {schema}strongroom_usage WHERE tenant_id = 'acme' ORDER BY name, resource"


async def used(url: str) -> None:
    async with Strongroom.open(url) as room:
        limited = await room.keys.create(
            name="limited", tenant="acme", limits=[Limit(resource="tokens", limit=1000, window=Total())]
        )
        free = await room.keys.create(name="free", tenant="other")
        await room.keys.verify(limited.text, cost={"requests": 1, "tokens": 300, "cost": Decimal("1.25")})
        await room.keys.verify(free.text, cost={"tokens": 700})
        await room.keys.verify(limited.text, cost={"tokens": 1})


def asked(schema: str, month: str) -> tuple[str, str]:
    return MOST_TOKENS.format(schema=schema, month=month), IN_ALL.format(schema=schema)


EXPECTED = [("other", "free", 700), ("acme", "limited", 301)]
EXPECTED_IN_ALL = [("limited", "cost", 1.25), ("limited", "requests", 1), ("limited", "tokens", 301)]


async def test_which_keys_used_most_tokens_this_month_is_a_query_on_sqlite(tmp_path: Path) -> None:
    await used(new_url("sqlite", tmp_path))
    with closing(apsw.Connection(str(tmp_path / "store.db"))) as connection:
        for _ in range(2):  # made again, they are as before
            connection.execute(views_sql("sqlite")).fetchall()
        month, total = asked("", "strftime('%Y-%m')")
        assert connection.execute(month).fetchall() == EXPECTED
        assert connection.execute(total).fetchall() == EXPECTED_IN_ALL
    async with Strongroom.open(new_url("sqlite", tmp_path)) as room:  # which finds nothing changed
        assert (await room.store.check()).ok


@pytest.fixture
def server(request: pytest.FixtureRequest) -> postgres.Server:
    return postgres.start(request, "postgres-18", postgres.bundled())


async def test_which_keys_used_most_tokens_this_month_is_a_query_on_postgresql(server: postgres.Server) -> None:
    schema = postgres.new_schema()
    await used(server.url(schema))
    connection = await asyncpg.connect(f"postgresql://app:app@127.0.0.1:{server.port}/postgres")
    try:
        for _ in range(2):
            await connection.execute(views_sql("postgresql", schema))
        month, total = asked(f"{schema}.", "to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM')")
        assert [tuple(row) for row in await connection.fetch(month)] == EXPECTED
        assert [tuple(row) for row in await connection.fetch(total)] == EXPECTED_IN_ALL
        shown = [str(row["used"]) for row in await connection.fetch(total)]
        assert shown == ["1.25", "1", "301"], "psql prints a number with all the zeros that it has"
    finally:
        await connection.close()
    async with Strongroom.open(server.url(schema)) as room:
        assert (await room.store.check()).ok


def test_an_engine_without_sql_has_no_views() -> None:
    with pytest.raises(ConfigError, match="a firestore store has no views"):
        views_sql("firestore")


def test_a_usage_state_keeps_the_totals_of_its_last_two_months() -> None:
    state = UsageState()
    for month, day in ((9, 30), (10, 1), (10, 31), (11, 2), (11, 3)):
        state.add_totals({"tokens": day}, 1, us_from_utc(datetime(2026, month, day, 12, tzinfo=UTC)))
    kept: dict[str, Any] = {"2026-10": {"tokens": 32}, "2026-11": {"tokens": 5}}
    assert state.months == kept
    again = UsageState({**state.document(), "version": 1})
    again.add_totals({"tokens": 1}, 1, us_from_utc(datetime(2026, 11, 30, 23, 59, 59, 999_999, tzinfo=UTC)))
    assert again.months == {**kept, "2026-11": {"tokens": 6}}
