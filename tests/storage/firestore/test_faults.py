"""Firestore unreachable, slow, refusing or late: typed errors in bounded time, and nothing is applied twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import grpc  # type: ignore[import-untyped]
import pytest

from strongroom.entities.query import Aggregate, And, Query, Where
from strongroom.errors import (
    ConfigError,
    SchemaError,
    StoreError,
    StrongroomError,
    TooManyRequests,
    Unavailable,
)
from strongroom.storage.firestore.client import Code, Rejected
from strongroom.storage.firestore.store import FirestoreStore
from strongroom.storage.port import Add, Append, Create, Delete, Patch
from strongroom.testing.storage.samples import COLLECTIONS, batch, item, record
from tests.helpers.servers import answers, firestore, free_port
from tests.helpers.servers.proxy import Proxy
from tests.helpers.waiting import PATIENCE_S, wait_until


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[FirestoreStore]:
    store = FirestoreStore.from_url(url)
    await store.open()
    try:
        await store.prepare(COLLECTIONS)
        yield store
    finally:
        await store.close()


@pytest.fixture
def new_url(request: pytest.FixtureRequest) -> Callable[[], str]:
    return firestore.urls(firestore.start(request))


@pytest.fixture
async def store(new_url: Callable[[], str]) -> AsyncIterator[FirestoreStore]:
    async with opened(new_url()) as store:
        yield store


def failing(code: Any, text: str = "no") -> Callable[..., Any]:
    """A call that fails with a status of gRPC's."""

    class Call:
        def __await__(self) -> Generator[Any, Any, Any]:
            yield from ()
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), text)

        def __aiter__(self) -> Call:
            return self

        async def __anext__(self) -> Any:
            await self

    return lambda *_, **__: Call()


# --- What Firestore says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (Code.PERMISSION_DENIED, ConfigError, "roles/datastore.user"),
        (Code.UNAUTHENTICATED, ConfigError, "GOOGLE_APPLICATION_CREDENTIALS"),
        (Code.RESOURCE_EXHAUSTED, TooManyRequests, "quota"),
        (Code.UNAVAILABLE, Unavailable, "does not answer"),
        (Code.DEADLINE_EXCEEDED, Unavailable, "does not answer"),
        (Code.DATA_LOSS, StoreError, "DATA_LOSS"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
async def test_each_grpc_status_maps_to_a_strongroom_error(
    store: FirestoreStore, code: Any, error: type[StrongroomError], says: str
) -> None:
    store._writer.timeout_s = 0.5
    for method in ("get", "query", "aggregate", "commit", "batch_get"):
        store.wire._calls[method] = failing(code)
    for doing in (
        store.get("items", "acme", "x"),
        store.find("items", "acme", Query()),
        store.aggregate("items", "acme", [Aggregate("count")], None),
        store.changes(None),
        store.now_us(),
    ):
        with pytest.raises(error, match=says) as caught:
            await doing
        assert type(caught.value) is error
    with pytest.raises(error):
        await store.commit(batch("acme", Create("items", "x", item())))
    assert not (await store.check()).ok


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        (Query(Where("label", "==", "a"), ("-used",)), ["label ASCENDING", "used DESCENDING"]),
        (Query(And(Where("label", "in", ["a", "b"]), Where("used", ">", 1)), ("used", "code")),
         ["label ASCENDING", "used ASCENDING", "code ASCENDING"]),
    ],
)  # fmt: skip
async def test_a_missing_index_is_named_with_its_definition(
    store: FirestoreStore, query: Query, fields: list[str]
) -> None:
    store.wire._calls["query"] = failing(Code.FAILED_PRECONDITION, "The query requires an index.")
    with pytest.raises(SchemaError, match=r"firestore\.indexes\.json") as caught:
        await store.find("items", "acme", query)
    assert type(caught.value) is SchemaError
    entry = caught.value.details["index"]
    assert (entry["collectionGroup"], entry["queryScope"]) == ("items", "COLLECTION")
    assert [f"{field['fieldPath']} {field['order']}" for field in entry["fields"]] == fields
    assert json.dumps(entry) in caught.value.message


async def test_a_missing_index_of_a_sum_is_named_too(store: FirestoreStore) -> None:
    store.wire._calls["aggregate"] = failing(Code.FAILED_PRECONDITION)
    with pytest.raises(SchemaError) as caught:
        await store.aggregate("items", "acme", [Aggregate("sum", "used")], Where("label", "==", "a"))
    assert [field["fieldPath"] for field in caught.value.details["index"]["fields"]] == ["label", "used"]


class TestAborted:
    async def test_an_aborted_commit_is_retried(self, store: FirestoreStore) -> None:
        commit, times = store.wire.commit, 0

        async def aborting(writes: Any) -> Any:
            nonlocal times
            times += 1
            if times <= 6:
                raise Rejected(Code.ABORTED, "too much contention on these documents")
            return await commit(writes)

        store.wire.commit = aborting  # type: ignore[method-assign]
        committed = await store.commit(batch("acme", Create("items", "x", item()), Append(record("x"), 0)))
        assert times == 7
        assert (await store.get("items", "acme", "x") or {})["version"] == committed.versions[0]

    async def test_endless_contention_is_given_up_in_time(self, store: FirestoreStore) -> None:
        async def aborting(writes: Any) -> Any:
            raise Rejected(Code.ABORTED, "too much contention on these documents")

        store.wire.commit = aborting  # type: ignore[method-assign]
        store._writer.timeout_s = 0.5
        began = time.monotonic()
        with pytest.raises(Unavailable, match="nothing was changed") as caught:
            await store.commit(batch("acme", Create("items", "x", item())))
        assert time.monotonic() - began < PATIENCE_S
        assert caught.value.details["retry_after_s"] > 0
        assert await store.get("items", "acme", "x") is None


# --- Answers that are lost -------------------------------------------------------------------------------------


class Losing:
    """Between the store and Firestore: commits that fail `before` they arrive, whose answers are lost `after`, or that
    arrive `late`: with the next one."""

    def __init__(self, store: FirestoreStore, *faults: str, between: Callable[[], Any] | None = None) -> None:
        self.commit = store.wire.commit
        self.faults = list(faults)
        self.between = between
        self.calls = 0
        self.late: list[Any] = []
        store.wire.commit = self  # type: ignore[method-assign]

    async def __call__(self, writes: Any) -> Any:
        self.calls += 1
        fault = self.faults.pop(0) if self.faults else None
        if fault == "late":
            self.late = [type(write).FromString(write.SerializeToString()) for write in writes]
            raise Rejected(Code.DEADLINE_EXCEEDED, "on the way")
        if self.late:
            late, self.late = self.late, []
            await self.commit(late)
        if fault == "before":
            raise Rejected(Code.UNAVAILABLE, "lost on the way")
        answer = await self.commit(writes)
        if fault == "after":
            if self.between is not None:
                await self.between()
            raise Rejected(Code.DEADLINE_EXCEEDED, "lost on the way back")
        return answer


class TestLostAnswers:
    async def test_a_commit_whose_answer_is_lost_is_found_and_not_applied_again(self, store: FirestoreStore) -> None:
        losing = Losing(store, "after", "after", "after")
        created = await store.commit(batch("acme", Create("items", "x", item(code="c")), Append(record("x"), 0)))
        patched = await store.commit(batch("acme", Patch("items", "x", {"label": "b"}), Append(record("x"), 0)))
        added = await store.commit(batch("acme", Add("items", "x", "used", 5)))
        assert losing.calls == 3
        assert added.values == {0: 5}
        found = await store.get("items", "acme", "x")
        assert found is not None
        assert (found["label"], found["used"], found["version"]) == ("b", 5, added.versions[0])
        assert created.versions[0] < patched.versions[0] < added.versions[0]
        records = (await store.changes(None)).records
        assert [one.version for one in records] == [created.versions[0], patched.versions[0]]
        assert [one.sequence for one in records] == [created.sequence, patched.sequence]

    async def test_a_commit_that_did_not_arrive_is_sent_again(self, store: FirestoreStore) -> None:
        losing = Losing(store, "before", "before")
        await store.commit(batch("acme", Create("items", "x", item()), Append(record("x"), 0)))
        added = await store.commit(batch("acme", Add("items", "x", "used", 5)))
        assert losing.calls == 4
        assert added.values == {0: 5}
        assert len((await store.changes(None)).records) == 1

    async def test_a_commit_that_arrives_late_is_applied_once(self, store: FirestoreStore) -> None:
        await store.commit(batch("acme", Create("items", "x", item())))
        for total in (5, 10):  # as after a Create, and as after an addition
            Losing(store, "late")
            assert (await store.commit(batch("acme", Add("items", "x", "used", 5)))).values == {0: total}
        Losing(store, "late")
        await store.commit(batch("acme", Patch("items", "x", {"label": "late"}), Append(record("x"), 0)))
        Losing(store, "late")
        added = await store.commit(batch("acme", Add("items", "x", "used", 5, at_most=15), Append(record("y"), 0)))
        assert added.values == {0: 15}
        assert (await store.get("items", "acme", "x") or {})["used"] == 15
        records = (await store.changes(None)).records
        assert [one.entity_id for one in records] == ["x", "y"]

    async def test_an_unknown_outcome_is_reported_as_unknown(self, store: FirestoreStore) -> None:
        await store.commit(batch("acme", Create("items", "x", item())))
        Losing(store, "after")
        with pytest.raises(Unavailable, match="not known") as caught:
            await store.commit(batch("acme", Delete("items", "x")))
        assert caught.value.details["outcome"] == "unknown"

    async def test_a_lost_addition_is_never_added_twice(self, new_url: Callable[[], str]) -> None:
        """Another node adds before anyone can look: with a record the journal tells, without one nobody can."""
        url = new_url()
        async with opened(url) as store, opened(url) as other:
            await store.commit(batch("acme", Create("items", "x", item())))

            async def between() -> None:
                await other.commit(batch("acme", Add("items", "x", "used", 100)))

            Losing(store, "after", between=between)
            with pytest.raises(Unavailable, match="not known"):
                await store.commit(batch("acme", Add("items", "x", "used", 1)))
            found = await store.get("items", "acme", "x")
            assert found is not None
            assert found["used"] == 101
            Losing(store, "after", between=between)
            bounded = Add("items", "x", "used", 1, at_most=1_000)
            committed = await store.commit(batch("acme", bounded, Append(record("x"), 0)))
            assert committed.values == {0: 102}
            found = await store.get("items", "acme", "x")
            assert found is not None
            assert found["used"] == 202
            assert len((await store.changes(None)).records) == 1


# --- An emulator that dies -------------------------------------------------------------------------------------


class Emulator:
    """An emulator of this test's own, to be killed."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.log = folder / "emulator.log"
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = self._popen(log)
        await wait_until(lambda: answers(self.port), 60)

    def _popen(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(firestore.command(self.port), stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
async def emulator(tmp_path: Path) -> AsyncIterator[Emulator]:
    emulator = Emulator(tmp_path)
    await emulator.start()
    try:
        yield emulator
    finally:
        emulator.kill()


async def test_an_emulator_killed_under_load_gives_typed_errors_in_time_and_is_found_again(emulator: Emulator) -> None:
    async with opened(f"firestore://p?emulator=127.0.0.1:{emulator.port}") as store:
        store._writer.timeout_s = 2
        store.on_change(lambda: None)
        ended: list[BaseException] = []
        committed = 0
        stop = asyncio.Event()

        async def write(writer: int) -> None:
            nonlocal committed
            for n in range(100_000):
                if stop.is_set():
                    return
                try:
                    operation = Create("items", f"{writer}-{n}", item(code=f"{writer}-{n}"))
                    await store.commit(batch(f"t{writer}", operation, Append(record(f"{n}", f"t{writer}"), 0)))
                    committed += 1
                except Exception as error:  # every kind, to be looked at below
                    ended.append(error)
                    return

        writers = [asyncio.create_task(write(n)) for n in range(6)]
        await wait_until(lambda: committed > 20)
        emulator.kill()
        began = time.monotonic()
        await wait_until(lambda: len(ended) == 6)
        assert time.monotonic() - began < PATIENCE_S
        assert all(isinstance(error, Unavailable) for error in ended), ended
        with pytest.raises(Unavailable):
            await store.get("items", "t0", "x")
        assert not (await store.check()).ok
        await emulator.start()  # it has forgotten everything
        ended.clear()
        stop.set()
        await asyncio.gather(*writers)

        async def works() -> bool:
            try:
                await store.commit(batch("t0", Create("items", "after", item()), Append(record("after", "t0"), 0)))
            except Unavailable:
                return False
            return True

        await wait_until(works)
        assert (await store.get("items", "t0", "after") or {})["id"] == "after"
        await wait_until(lambda: store._listener.is_live)


async def test_a_server_that_does_not_answer_is_given_up_in_time(emulator: Emulator) -> None:
    async with opened(f"firestore://p?emulator=127.0.0.1:{emulator.port}") as store:
        store.wire.timeout_s = 0.5
        store._writer.timeout_s = 1
        assert emulator.process is not None
        os.kill(emulator.process.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await store.get("items", "acme", "x")
            with pytest.raises(Unavailable):
                await store.commit(batch("acme", Create("items", "x", item())))
            assert time.monotonic() - began < PATIENCE_S
        finally:
            os.kill(emulator.process.pid, signal.SIGCONT)

        async def answered() -> bool:
            return (await store.check()).ok

        await wait_until(answered)
        assert await store.get("items", "acme", "nothing") is None


async def test_a_connection_that_falls_silent_is_not_taken_for_a_quiet_journal(new_url: Callable[[], str]) -> None:
    """Keys are revoked by what the journal says: "nothing new" must never mean "nothing heard"."""
    url = new_url()
    port = int(url.rpartition(":")[2])
    async with Proxy(port) as proxy, opened(url) as first, opened(url.replace(f":{port}", f":{proxy.port}")) as second:
        second.on_change(lambda: None)
        await wait_until(lambda: second._listener.is_live)
        cursor = (await second.changes(None)).cursor
        proxy.fall_silent()
        await first.commit(batch("acme", Append(record("1"))))
        second.wire.timeout_s = 0.5
        with pytest.raises(Unavailable):
            await second.changes(cursor)
        proxy.heal()

        async def arrived() -> bool:
            try:
                return [one.entity_id for one in (await second.changes(cursor)).records] == ["1"]
            except Unavailable:
                return False

        await wait_until(arrived)


async def test_an_unreachable_store_at_the_start_raises_unavailable() -> None:
    store = FirestoreStore("p", emulator=f"127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable):
        await store.open()
    await store.close()


async def test_missing_credentials_are_a_configuration_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FIRESTORE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    store = FirestoreStore("p")
    with pytest.raises(ConfigError, match="no credentials"):
        await store.open()
    await store.close()
