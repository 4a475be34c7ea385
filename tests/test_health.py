"""Health names the failing dependency, and a server without its database stays up, reports it, and recovers."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from strongroom import Strongroom, health
from strongroom.cache.read_through import Cache
from strongroom.clock import ClockState, StoreClock
from strongroom.config import Settings, load
from strongroom.errors import ConfigError, Conflict, StoreError, Unavailable
from strongroom.journal import feed as changes
from strongroom.server import run, starting
from strongroom.storage.port import ChangesPage
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.server_app import ADMIN, check_problem, serving
from tests.helpers.stores import new_url, opened, rolling
from tests.helpers.waiting import PATIENCE_S, wait_until


async def found_of(room: Strongroom) -> dict[str, health.Dependency]:
    return await health.check(room.store, room.feed, room.clock, room.background, room.cache)


async def test_a_healthy_store_reports_ok() -> None:
    async with Strongroom.open("json://:memory:", cache="memory://") as room:
        found = await found_of(room)
        assert {name: d.status for name, d in found.items()} == dict.fromkeys(
            ("store", "cache", "feed", "clock", "background"), "ok"
        )
        assert health.overall(found) == "ok"


async def test_a_feed_that_cannot_be_read_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened("json://:memory:") as (room, store):

        async def fail(after: str | None, **options: Any) -> ChangesPage:
            raise Unavailable("gone")

        monkeypatch.setattr(store, "changes", fail)
        await wait_until(lambda: health.of_feed(room.feed).status == "degraded")
        found = await found_of(room)
        assert health.overall(found) == "degraded"
        assert found["feed"].latency_s > health.FEED_LATE_S


async def test_a_clock_that_was_not_synchronised_for_long_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened("json://:memory:") as (_, store):
        clock = StoreClock(store)
        await clock.sample()
        assert health.of_clock(clock).status == "ok"
        monkeypatch.setattr(clock, "state", lambda: ClockState(5_000, 200, 61.0, True))
        told = health.of_clock(clock)
        assert (told.status, told.details["offset_ms"], told.details["uncertainty_ms"]) == ("degraded", 5.0, 0.2)


async def test_a_background_job_that_fails_or_is_late_is_degraded() -> None:
    async with Strongroom.open("json://:memory:") as room:
        (job, *_) = room.background.jobs
        leases = room.background.leases

        async def fail(turn: Any) -> None:
            raise RuntimeError("a bug")

        await leases.run_once(job.name, job.every_s, job.run)
        now_us = room.clock.now_us()
        told = health.of_background(room.background, now_us)
        assert told.status == "ok"
        assert told.details[job.name]["last_success"] is not None
        assert health.of_background(room.background, now_us + round(4e6 * job.every_s)).status == "degraded"
        leases.jobs[job.name].error = "RuntimeError: a bug"
        assert health.of_background(room.background, now_us).status == "degraded"


async def test_an_unreachable_redis_is_degraded_and_not_down(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Strongroom.open("json://:memory:", cache="memory://") as room:
        monkeypatch.setattr(Cache, "redis_state", property(lambda self: "open"))
        found = await found_of(room)
        assert (found["cache"].status, health.overall(found)) == ("degraded", "degraded")


# --- Metrics of the store -------------------------------------------------------------------------------------


async def metrics_of(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    text = (await client.get("/metrics")).text
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_the_store_is_counted_by_backend_and_collection() -> None:
    async with serving() as served:
        before = await metrics_of(served.client)
        made = await served.make_key(limits=[{"resource": "requests", "limit": 5, "window": {"kind": "total"}}])
        for _ in range(3):
            assert (await served.verify(made["key"])).json["valid"]
        await served.get("/v1/tenants/acme/policies")
        found = await metrics_of(served.client)

        def grown(name: str, *labels: str) -> float:
            return found.get((name, *labels), 0) - before.get((name, *labels), 0)

        # the first of a minute names all of its fields, those after it what changes
        kinds = ("put", "patch")
        assert sum(grown("strongroom_store_operations_total", "json", "key_usage", kind) for kind in kinds) == 3
        assert grown("strongroom_store_operations_total", "json", "api_keys", "create") == 1
        assert grown("strongroom_store_operations_total", "json", "api_keys", "check") == 3
        assert grown("strongroom_store_operations_total", "json", "journal", "append") == 1
        assert grown("strongroom_store_operations_total", "json", "key_usage", "get") == 1
        assert grown("strongroom_store_operations_total", "json", "policies", "find") == 1
        assert grown("strongroom_store_seconds_count", "json", "key_usage", "commit") == 3
        assert found["strongroom_feed_behind_seconds",] < 5


async def test_conflicts_retries_and_errors_are_counted(tmp_path: Any) -> None:
    async with opened(new_url("json-memory", tmp_path)) as (room, store):
        issued = await room.keys.create(name="k", limits=[rolling("requests", 5)])
        faults = [Conflict("x", operation=1), Unavailable("gone")]
        start = len(store.batches)
        store.fault = lambda number, batch: _fault(faults, number - start)
        with pytest.raises(Unavailable):
            await room.keys.verify(issued.text)
        assert room.store.metrics.conflicts == {"key_usage": 1}
        assert room.store.metrics.calls["key_usage", "commit"].errors == {"unavailable": 1}
        assert room.ledger.retries == 1

        async def refuse(method: str, collection: str) -> None:
            raise Unavailable("gone")

        store.before_read = refuse
        with pytest.raises(Unavailable):
            await room.keys.get(issued.key.id)
        assert room.store.metrics.calls["api_keys", "get"].errors == {"unavailable": 1}


def _fault(errors: list[Any], number: int) -> Any:
    return Fault("before", errors[number]) if number < len(errors) else None


# --- A start without the database -----------------------------------------------------------------------------


@dataclass
class Database:
    """A database that is gone until a test says otherwise."""

    there: asyncio.Event = field(default_factory=asyncio.Event)
    attempts: int = 0
    error: Exception | None = None

    @asynccontextmanager
    async def opened(self, settings: Settings, spans: object = None) -> AsyncIterator[Strongroom]:
        self.attempts += 1
        if self.error is not None:
            raise self.error
        if not self.there.is_set():
            raise Unavailable("db.example:5432: connection refused")
        async with Strongroom.open("json://:memory:") as room:
            yield room


@pytest.fixture
async def database(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    database = Database()
    monkeypatch.setattr(run, "_opened", database.opened)
    monkeypatch.setattr(run, "_may_come_back", lambda settings: True)
    monkeypatch.setattr(starting, "FIRST_PAUSE_S", 0.01)
    yield database
    gc.unfreeze()


@asynccontextmanager
async def started() -> AsyncIterator[tuple[asyncio.Task[None], httpx.AsyncClient]]:
    settings = load(store="json://:memory:", admin_key=ADMIN)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        task = asyncio.create_task(run._work(settings, listener, announce=lambda text: None))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {ADMIN}"}) as client:
                yield task, client
        finally:
            if not task.done():
                await wait_until(lambda: signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None))
                os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait([task], timeout=PATIENCE_S)
            assert task.done()


@pytest.mark.server
async def test_a_server_without_its_database_stays_up_reports_it_and_recovers(database: Database) -> None:
    async with started() as (task, client):
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["ready"], ready.json()["message"]) == (503, False, starting.SENTENCE)
        for method, path in (
            ("GET", "/v1/keys"), ("POST", "/v1/keys/verify"), ("POST", "/v1/usage"),
            ("PUT", "/v1/tenants/acme/policies/p"), ("GET", "/metrics"),
        ):  # fmt: skip
            answer = await client.request(method, path, json={} if method != "GET" else None)
            assert answer.status_code == 503, path
            assert int(answer.headers["retry-after"]) >= 1
            check_problem(answer)
            assert "db.example" not in answer.text
        await wait_until(lambda: database.attempts >= 3)
        database.there.set()

        async def recovered() -> bool:
            return (await client.get("/readyz")).status_code == 200

        await wait_until(recovered)
        made = await client.post("/v1/keys", json={"name": "n"})  # on a connection that was there before
        assert made.status_code == 201
        async with httpx.AsyncClient(base_url=client.base_url, headers=client.headers) as new:
            assert (await new.get("/v1/keys")).status_code == 200
    task.result()


@pytest.mark.server
async def test_a_server_that_waits_for_its_database_can_be_stopped(database: Database) -> None:
    async with started() as (task, client):
        assert (await client.get("/healthz")).status_code == 200
    task.result()
    assert database.attempts >= 1


@pytest.mark.server
@pytest.mark.parametrize("error", [ConfigError("the password is wrong"), StoreError("the role is unsafe")])
async def test_a_configuration_error_ends_the_start(error: Exception, database: Database) -> None:
    async with started() as (task, client):
        assert (await client.get("/healthz")).status_code == 200
        database.error = error
        await asyncio.wait([task], timeout=PATIENCE_S)
    with pytest.raises(type(error), match=str(error)):
        task.result()
    async with started() as (task, _):
        await asyncio.wait([task], timeout=PATIENCE_S)
    with pytest.raises(type(error), match=str(error)):
        task.result()


# --- The database goes away while keys are being verified ------------------------------------------------------


async def fails(call: Callable[[], Awaitable[Any]]) -> bool:
    try:
        await call()
    except Unavailable:
        return True
    return False


@pytest.mark.parametrize("limited", [True, False])
async def test_without_the_store_a_key_is_answered_from_memory_only_where_that_is_safe(
    limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "POLL_S", 0.02)
    async with opened("json://:memory:") as (room, store):
        limits = [rolling("requests", 5)] if limited else []
        issued = await room.keys.create(name="k", limits=limits)
        assert (await room.keys.verify(issued.text)).valid
        gone(store, monkeypatch)
        if limited:
            assert await fails(lambda: room.keys.verify(issued.text)), "a debit must be durable"
        else:
            assert (await room.keys.verify(issued.text)).valid, "what was known a moment ago holds for as long"
            await wait_until(lambda: fails(lambda: room.keys.verify(issued.text)))
        assert await fails(lambda: room.keys.create(name="another"))
        monkeypatch.undo()
        store.fault = lambda number, batch: None
        store.before_read = None
        assert (await room.keys.verify(issued.text)).valid


def gone(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every call of the store fails."""

    async def refuse(*_: Any, **__: Any) -> Any:
        raise Unavailable("gone")

    store.fault = lambda number, batch: Fault("before", Unavailable("gone"))
    store.before_read = refuse
    monkeypatch.setattr(store, "changes", refuse)


async def test_an_unavailable_store_is_answered_503_with_retry_after() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[{"resource": "requests", "limit": 5, "window": {"kind": "total"}}])

        async def refuse(*_: Any, **__: Any) -> Any:
            raise Unavailable("gone")

        inner: Any = served.room.store.store
        inner.commit = inner.find = inner.get = refuse
        for method, path, body in (
            ("POST", "/v1/keys/verify", {"key": made["key"]}),
            ("POST", "/v1/keys/verify:batch", {"items": [{"key": made["key"]}]}),
            ("POST", "/v1/usage", {"key": made["key"], "cost": {"requests": 1}}),
            ("POST", "/v1/keys", {"name": "n"}),
            ("GET", "/v1/keys", None),
            ("PUT", "/v1/tenants/acme/policies/p", {"policy_type": "t", "policy_name": "n"}),
            ("GET", "/v1/tenants/acme/policies", None),
            ("GET", "/v1/tenants/acme/policies/p", None),
        ):
            answer = await served.call(method, path, body)
            assert (answer.status, answer.code) == (503, "unavailable"), (method, path, answer)
            assert int(answer.headers["retry-after"]) >= 1
