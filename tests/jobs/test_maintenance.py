"""Background jobs: only expired documents are removed, of every tenant; usage shows in lists of keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine

from strongroom import ApiKey, Entity, Query, Strongroom
from strongroom.context import system_context
from strongroom.database.idempotency import IdempotentCall
from strongroom.errors import Unavailable
from strongroom.jobs import maintenance as lifecycle
from strongroom.jobs.job_lease import AcquiredLease, JobLeaseLost
from strongroom.jobs.maintenance import PAGE, Sweeper
from strongroom.keys import jobs as keywork
from strongroom.storage.port import Patch
from tests.conftest import backend_of
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import STORES, new_url, opened, rolling

START = datetime(2026, 11, 20, 12, tzinfo=UTC)
IDEMPOTENT = IdempotentCall.__collection__.name


class Pass(Entity, collection="passes", ttl="until"):
    until: datetime | None = None


class Stay(Entity, collection="stays"):
    text: str = ""


@pytest.fixture(params=STORES)
async def both(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Strongroom, FaultyStore]]:
    async with opened(new_url(request.param, tmp_path), entities=[Pass, Stay]) as both:
        yield both


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return backend_of("postgres", tmp_path, request).new_url()


@pytest.fixture
def room(both: tuple[Strongroom, FaultyStore]) -> Strongroom:
    return both[0]


@asynccontextmanager
async def acquired(room: Strongroom, name: str) -> AsyncIterator[tuple[Any, AcquiredLease]]:
    """A job, and its lease."""
    lease = await room.background.leases.acquire(name)
    assert lease is not None
    (job,) = [job for job in room.background.jobs if job.name == name]
    yield job, lease
    await lease.release(done=True)


async def run(room: Strongroom, name: str) -> None:
    async with acquired(room, name) as (job, lease):
        await job.run(lease)


async def stored(room: Strongroom, name: str, tenant: str | None) -> int:
    return len(await room.store.find(name, tenant, Query(limit=1_000)))


# --- Expiry ---------------------------------------------------------------------------------------------------


async def test_expired_documents_are_removed_for_each_tenant_and_others_stay(room: Strongroom) -> None:
    with time_machine.travel(START, tick=False) as clock:
        for tenant in ("acme", "globex"):
            handle = room.tenant(tenant)
            await handle.create(Pass(until=START + timedelta(hours=1)))
            await handle.create(Pass(until=START + timedelta(hours=9)))
            await handle.create(Pass())
            await handle.create(Stay(), idempotency_key="once")
        end = (await room.store.changes("end")).cursor
        await run(room, "expiry")
        assert [await stored(room, "passes", t) for t in ("acme", "globex")] == [3, 3]
        clock.shift(timedelta(hours=2))
        await run(room, "expiry")
        assert [await stored(room, "passes", t) for t in ("acme", "globex")] == [2, 2]
        assert await stored(room, IDEMPOTENT, None) == 2
        clock.shift(timedelta(days=2))
        await run(room, "expiry")
        assert [await stored(room, "passes", t) for t in ("acme", "globex")] == [1, 1]
        assert await stored(room, IDEMPOTENT, None) == 0
        assert await stored(room, "stays", "acme") == 1
        actions = [r.action for r in (await room.store.changes(end)).records]
        assert actions == ["expire"] * 4  # idempotency keys are not journalled


async def test_one_run_removes_more_than_a_page(room: Strongroom) -> None:
    with time_machine.travel(START, tick=False) as clock:
        acme = room.tenant("acme")
        for n in range(PAGE + 5):
            await acme.create(Stay(), idempotency_key=f"call {n}")
        clock.shift(timedelta(days=2))
        await run(room, "expiry")
        assert await stored(room, IDEMPOTENT, None) == 0


async def test_a_run_is_bounded_and_the_next_continues_at_its_position(
    room: Strongroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "TENANTS_PAGE", 2)
    monkeypatch.setattr(lifecycle, "MAX_TENANTS_A_RUN", 4)
    tenants = [f"t{number}" for number in range(7)]
    with time_machine.travel(START, tick=False) as clock:
        for tenant in tenants:
            await room.tenant(tenant).create(Pass(until=START + timedelta(hours=1)))
        clock.shift(timedelta(hours=2))
        left = []
        for _ in range(2):
            await run(room, "expiry")
            left.append([tenant for tenant in tenants if await stored(room, "passes", tenant)])
        assert left == [["t4", "t5", "t6"], []]
        await room.tenant("t0").create(Pass(until=START + timedelta(hours=3)))
        clock.shift(timedelta(hours=2))
        await run(room, "expiry")  # it began again
        assert await stored(room, "passes", "t0") == 0


async def test_an_expiry_job_that_lost_its_lease_removes_nothing(room: Strongroom) -> None:
    with time_machine.travel(START, tick=False) as clock:
        await room.tenant("acme").create(Pass(until=START + timedelta(hours=1)))
        await room.tenant("acme").create(Stay(), idempotency_key="once")
        clock.shift(timedelta(days=2))
        paused = await room.background.leases.acquire("expiry")
        clock.shift(timedelta(minutes=1))
        async with acquired(room, "expiry"):
            assert paused is not None
            with pytest.raises(JobLeaseLost):
                await Sweeper(room.database, room.store).run(paused)
            assert (await stored(room, "passes", "acme"), await stored(room, IDEMPOTENT, None)) == (1, 1)


# --- Roll-up --------------------------------------------------------------------------------------------------


async def used(room: Strongroom, id: str) -> tuple[datetime | None, int]:
    key = await room.keys.get(id)
    return key.last_used, key.usage_count


async def test_lists_of_keys_show_the_last_use_and_the_use_count(room: Strongroom) -> None:
    with time_machine.travel(START, tick=False) as clock:
        keys = [await room.keys.create(name="k", limits=[rolling("requests", 100)]) for _ in range(3)]
        for _ in range(5):
            await room.keys.verify(keys[0].text)
        await room.keys.verify(keys[1].text)
        end = (await room.store.changes("end")).cursor
        await run(room, "usage-roll-up")
        assert [await used(room, k.key.id) for k in keys] == [(START, 5), (START, 1), (None, 0)]
        page = await room.keys.list()
        assert sorted(key.usage_count for key in page.items) == [0, 1, 5]
        clock.shift(timedelta(minutes=10))
        assert (await room.keys.verify(keys[1].text)).valid  # its version has changed: it is read again
        await run(room, "usage-roll-up")
        assert [await used(room, k.key.id) for k in keys] == [
            (START, 5),
            (START + timedelta(minutes=10), 2),
            (None, 0),
        ]
        assert (await room.store.changes(end)).records == (), "it is no change that the journal tells of"


async def test_a_key_that_was_not_used_keeps_its_version(both: tuple[Strongroom, FaultyStore]) -> None:
    room, store = both
    with time_machine.travel(START, tick=False) as clock:
        issued = await room.keys.create(name="k", limits=[rolling("requests", 100)])
        await room.keys.verify(issued.text)
        await run(room, "usage-roll-up")
        version = (await room.keys.get(issued.key.id)).version
        for _ in range(3):
            clock.shift(timedelta(minutes=1))
            await run(room, "usage-roll-up")
        assert (await room.keys.get(issued.key.id)).version == version
        clock.shift(timedelta(minutes=10))
        store.reads.clear()
        await run(room, "usage-roll-up")
        assert ("find", "api_keys") not in store.reads, "what was not used since is not even looked at"


async def test_an_interrupted_roll_up_of_many_keys_continues_at_its_page(
    both: tuple[Strongroom, FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keywork, "USAGE_PAGE", 10)
    room, store = both
    keys = [await room.keys.create(name="k", limits=[rolling("requests", 100)]) for _ in range(35)]
    await asyncio.gather(*(room.keys.verify(key.text) for key in keys))
    pages = 0

    async def fail(method: str, collection: str) -> None:
        nonlocal pages
        if (method, collection) != ("find", "key_usage"):
            return
        pages += 1
        if pages == 3:
            raise RuntimeError("the process dies here")

    store.before_read = fail
    lease = await room.background.leases.acquire("usage-roll-up")
    assert lease is not None
    (job,) = [job for job in room.background.jobs if job.name == "usage-roll-up"]
    with pytest.raises(RuntimeError):
        await job.run(lease)
    await lease.release(done=False)
    done = [key.usage_count for key in (await room.keys.list()).items]
    assert sum(done) == 20
    assert json.loads(lease.position or "{}")["cursor"]
    pages = 10
    await run(room, "usage-roll-up")
    assert pages == 12, "two pages were left"
    assert [key.usage_count for key in (await room.keys.list()).items] == [1] * 35


async def test_a_roll_up_does_not_overwrite_a_concurrent_change_of_a_key(both: tuple[Strongroom, FaultyStore]) -> None:
    room, store = both
    issued = await room.keys.create(name="k", limits=[rolling("requests", 100)])
    await room.keys.verify(issued.text)
    changed = False

    async def change(method: str, collection: str) -> None:
        nonlocal changed
        if (method, collection) == ("find", "api_keys") and not changed:
            changed = True
            await room.database.update(system_context(), ApiKey, issued.key.id, {"enabled": False})

    store.after_read = change
    await run(room, "usage-roll-up")
    key = await room.keys.get(issued.key.id)
    assert (key.enabled, key.usage_count) == (False, 0)
    await run(room, "usage-roll-up")  # what was missed is looked at again
    key = await room.keys.get(issued.key.id)
    assert (key.enabled, key.usage_count) == (False, 1)


# --- Retention ------------------------------------------------------------------------------------------------


@pytest.mark.server
async def test_on_postgresql_every_job_does_its_work(postgres_url: str) -> None:
    async with Strongroom.open(postgres_url, entities=[Pass], journal_days=1) as room:
        gone = datetime.now(UTC) - timedelta(seconds=1)
        await room.tenant("acme").create(Pass(until=gone))
        issued = await room.keys.create(name="k", limits=[rolling("requests", 5)])
        assert (await room.keys.verify(issued.text)).valid
        leases = room.background.leases
        for job in room.background.jobs:
            assert await leases.run_once(job.name, job.every_s, job.run) == job.every_s
        assert {job.name for job in room.background.jobs} == {
            "keys", "tenant-deletions", "expiry", "usage-roll-up", "journal-partitions", "journal-retention",
        }  # fmt: skip
        assert all(state.done_us and not state.error for state in leases.jobs.values())
        assert await stored(room, "passes", "acme") == 0
        assert (await used(room, issued.key.id))[1] == 1


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_a_short_process_rolls_up_its_usage_when_it_ends(limits: str, tmp_path: Path) -> None:
    """A program that verifies and ends, a command line: no server runs, and no minute passes."""
    url = new_url("sqlite", tmp_path)
    async with opened(url, limits=limits) as (room, _):
        limited = await room.keys.create(name="limited", limits=[rolling("requests", 9)])
        plain, unused = await room.keys.create(name="plain"), await room.keys.create(name="unused")
        for issued in (limited, limited, plain):
            assert (await room.keys.verify(issued.text)).valid
    async with opened(url) as (room, store):
        shown = {key.name: key for key in (await room.keys.list()).items}
        assert {name: key.usage_count for name, key in shown.items()} == {"limited": 2, "plain": 1, "unused": 0}
        assert [shown[name].last_used is None for name in ("limited", "plain", "unused")] == [False, False, True]
        assert shown["unused"].version == unused.key.version
        before = len(store.batches)
    changed = [one for batch in store.batches[before:] for one in batch.operations if isinstance(one, Patch)]
    assert not any(one.collection == "api_keys" for one in changed), "nothing was used"
    assert plain.key.id != limited.key.id


async def test_closing_without_the_store_is_no_error(tmp_path: Path) -> None:
    async with opened(new_url("sqlite", tmp_path)) as (room, store):
        issued = await room.keys.create(name="k", limits=[rolling("requests", 9)])
        assert (await room.keys.verify(issued.text)).valid
        store.fault = lambda number, batch: Fault("before", Unavailable("gone"))
