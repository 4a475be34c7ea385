"""What has expired is removed, for good and for every tenant that was written to, and nothing else is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import time_machine

from strongroom import Entity, Query, Strongroom
from strongroom.database import IdempotentCall
from strongroom.lifecycle import PAGE
from tests.support import wait_until

START = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Pass(Entity, collection="passes", ttl="until"):
    until: datetime | None = None


class Stay(Entity, collection="stays"):
    text: str = ""


@asynccontextmanager
async def opened(url: str = "json://:memory:") -> AsyncIterator[Strongroom]:
    async with Strongroom.open(url, entities=[Pass, Stay]) as room:
        yield room


async def stored(room: Strongroom, name: str, tenant: str | None) -> int:
    return len(await room.store.find(name, tenant, Query(limit=1_000)))


async def test_what_has_expired_is_removed_for_each_tenant_and_the_rest_stays() -> None:
    with time_machine.travel(START, tick=False) as clock:
        async with opened() as room:
            for tenant in ("acme", "globex"):
                handle = room.tenant(tenant)
                await handle.create(Pass(until=START + timedelta(hours=1)))
                await handle.create(Pass(until=START + timedelta(hours=9)))
                await handle.create(Pass())
                await handle.create(Stay(), idempotency_key="once")
            page = await room.store.changes(None)
            for record in page.records:
                room.sweeper.seen(record)
            assert await room.sweeper.sweep() == 0
            clock.shift(timedelta(hours=2))
            assert await room.sweeper.sweep() == 2
            assert [await stored(room, "passes", t) for t in ("acme", "globex")] == [2, 2]
            clock.shift(timedelta(days=2))
            assert await stored(room, IdempotentCall.__collection__.name, None) == 2
            assert await room.sweeper.sweep() == 4  # two passes, two idempotency keys
            assert await stored(room, IdempotentCall.__collection__.name, None) == 0
            assert await stored(room, "stays", "acme") == 1
            actions = [r.action for r in (await room.store.changes(page.cursor)).records]
            assert actions == ["expire"] * 4  # idempotency keys are not journalled


async def test_more_than_a_page_is_removed_in_one_sweep() -> None:
    with time_machine.travel(START, tick=False) as clock:
        async with opened() as room:
            acme = room.tenant("acme")
            for n in range(PAGE + 5):
                await acme.create(Stay(), idempotency_key=f"call {n}")
            clock.shift(timedelta(days=2))
            assert await room.sweeper.sweep() == PAGE + 5


async def test_the_feed_tells_the_sweeper_of_its_tenants() -> None:
    async with opened() as room:
        await room.tenant("acme").create(Pass(until=datetime.now(UTC) + timedelta(days=1)))
        await wait_until(lambda: ("passes", "acme") in room.sweeper._tenants, 5)
