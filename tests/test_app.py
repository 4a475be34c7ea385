"""The composition root closes everything it opened, in order and on every failure; peppers; tenant handles."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pytest

from strongroom import Aggregate, Counter, Entity, Query, Strongroom, Where
from strongroom.blocking import BlockingStrongroom
from strongroom.errors import ConfigError, Denied, NotFound, SchemaError, Unavailable
from strongroom.keys.token import generate
from tests.helpers.faulty_store import Fault
from tests.helpers.stores import STORES, new_url, opened, rolling, stored_usage
from tests.helpers.waiting import wait_until


class Note(Entity, collection="notes"):
    text: str
    read: int = 0


class Tagged(Entity, collection="notes"):
    """The collection of Note, declared otherwise."""

    text: int


class Counted(Entity, collection="counted"):
    used: Annotated[int, Counter()] = 0


@pytest.mark.parametrize("kind", STORES)
async def test_closing_writes_pending_usage(kind: str, tmp_path: Path) -> None:
    async with opened(new_url(kind, tmp_path)) as (room, store):
        free = await room.keys.create(name="free")
        limited = await room.keys.create(name="limited", limits=[rolling("requests", 5)])
        await room.keys.verify(free.text)
        waiting = [asyncio.ensure_future(room.keys.verify(limited.text)) for _ in range(3)]
        await asyncio.sleep(0)
        close = store.store.close
        totals: list[dict[str, int]] = []

        async def look_and_close() -> None:
            totals.extend([(await stored_usage(store.store, key.key.id)).totals for key in (free, limited)])
            await close()

        store.store.close = look_and_close  # type: ignore[method-assign]
    assert totals == [{"requests": 1}, {"requests": 3}]
    assert all(answer.valid for answer in await asyncio.gather(*waiting))


async def test_a_persistent_store_has_everything_after_reopening(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url, entities=[Note]) as room:
        note = await room.tenant("acme").create(Note(text="x"))
        issued = await room.keys.create(name="k", limits=[rolling("requests", 2)])
        await room.keys.verify(issued.text)
    async with Strongroom.open(url, entities=[Note]) as room:
        assert await room.tenant("acme").get(Note, note.id) == note
        assert (await room.keys.verify(issued.text)).limits[0].used == 2
        assert (await room.keys.verify(issued.text)).code == "RATE_LIMITED"


async def test_an_exception_in_the_block_closes_everything(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    with suppress(RuntimeError):
        async with Strongroom.open(url) as room:
            issued = await room.keys.create(name="k")
            await room.keys.verify(issued.text)
            raise RuntimeError("mine")
    with pytest.raises(Unavailable):
        await room.store.get("api_keys", None, issued.key.id)
    async with Strongroom.open(url) as room:
        assert (await room.keys.stats(issued.key.id)).totals == {"requests": 1}


async def test_no_task_is_left_after_closing(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with opened(new_url("sqlite", tmp_path)) as (room, _):
        issued = await room.keys.create(name="k", limits=[rolling("requests", 5)])
        await room.keys.verify(issued.text)
        await room.rotate_pepper()  # heard of by the feed, which reads the peppers again
    await wait_until(lambda: asyncio.all_tasks() == before)


async def test_a_schema_that_does_not_fit_is_refused_and_the_store_is_released(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url, entities=[Note]) as room:
        await room.tenant("acme").create(Note(text="x"))
    with pytest.raises(SchemaError):
        async with Strongroom.open(url, entities=[Tagged]):
            pytest.fail("it opened")
    async with Strongroom.open(url, entities=[Note]) as room:
        assert len((await room.tenant("acme").find(Note)).items) == 1


async def test_two_entities_of_one_name_are_refused() -> None:
    with pytest.raises(SchemaError, match="both declare the collection 'notes'"):
        async with Strongroom.open("json://:memory:", entities=[Note, Tagged]):
            pytest.fail("it opened")


@pytest.mark.parametrize("url", ["", "sqlite", "mysql://x", "sqlite://", "sqlite:///", "json://x"])
async def test_an_invalid_store_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        async with Strongroom.open(url):
            pytest.fail("it opened")


async def test_no_error_shows_the_password_of_a_url() -> None:
    with pytest.raises(ConfigError) as caught:
        async with Strongroom.open("mysql://user:hunter2@host/db"):
            pytest.fail("it opened")
    assert "hunter2" not in str(caught.value)


# --- Peppers --------------------------------------------------------------------------------------------------


async def test_two_processes_that_start_together_make_one_pepper(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    rooms = [Strongroom.open(url) for _ in range(3)]
    started = await asyncio.gather(*(room.__aenter__() for room in rooms))
    try:
        issued = await started[0].keys.create(name="k")
        assert [(await room.keys.verify(issued.text)).valid for room in started] == [True] * 3
    finally:
        for room in rooms:
            await room.__aexit__(None, None, None)


async def test_a_short_pepper_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="32") as caught:
        async with Strongroom.open("json://:memory:", peppers=["hunter2"]):
            pytest.fail("it opened")
    assert "hunter2" not in str(caught.value)


async def test_a_configured_pepper_cannot_be_rotated_by_a_call() -> None:
    async with Strongroom.open("json://:memory:", peppers=["p" * 32]) as room:
        with pytest.raises(ConfigError, match="configuration"):
            await room.rotate_pepper()
        issued = await room.keys.create(name="k")
        assert issued.key.hash.startswith("c")
        assert (await room.keys.verify(issued.text)).valid


async def test_a_pepper_rotated_while_a_process_starts_is_known_to_it(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url) as here:
        manager = opened(url)
        # Between reading the peppers and following the journal lies at least the reading of the journal's end.
        original = Strongroom.__init__

        def slow(self: Strongroom, *args: Any) -> None:
            original(self, *args)
            start = self.feed.start

            async def start_later() -> None:
                await here.rotate_pepper()
                await start()

            self.feed.start = start_later  # type: ignore[method-assign]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Strongroom, "__init__", slow)
            there, _ = await manager.__aenter__()
        try:
            issued = await here.keys.create(name="k")
            assert (await there.keys.verify(issued.text)).valid
        finally:
            await manager.__aexit__(None, None, None)


async def test_reading_the_peppers_is_retried_after_a_failure(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url) as here, opened(url) as (there, store):
        failures = 2

        async def fail(method: str, collection: str) -> None:
            nonlocal failures
            if collection == "peppers" and failures:
                failures -= 1
                raise Unavailable("gone")

        store.before_read = fail
        await here.rotate_pepper()
        await wait_until(lambda: there.keys.hasher.current_id == "000002")
        assert not failures


async def test_concurrent_pepper_rotations_add_one_or_two_peppers(tmp_path: Path) -> None:
    async with Strongroom.open(new_url("sqlite", tmp_path)) as room:
        issued = await room.keys.create(name="k")
        answers = await asyncio.gather(room.rotate_pepper(), room.rotate_pepper(), return_exceptions=True)
        assert None in answers
        room.keys.changed(issued.key.id)
        assert (await room.keys.verify(issued.text)).valid


# --- Tenant handles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORES)
async def test_a_tenant_handle_does_what_the_database_does(kind: str, tmp_path: Path) -> None:
    async with Strongroom.open(new_url(kind, tmp_path), entities=[Note, Counted]) as room:
        acme, beta = room.tenant("acme"), room.tenant("beta")
        note = await acme.create(Note(id="n", text="x"), idempotency_key="i")
        assert await acme.create(Note(id="n", text="x"), idempotency_key="i") == note
        assert (await acme.update(Note, "n", {"read": 1}, expected=note.version)).read == 1
        assert (await acme.replace(Note(id="n", text="y"))).text == "y"
        assert [n.id for n in (await acme.find(Note, Query(Where("text", "==", "y")))).items] == ["n"]
        assert await acme.aggregate(Note, Aggregate("count"), where=Where("read", "==", 0)) == {"count": 1}
        assert await beta.get_or_none(Note, "n") is None
        counted = await acme.create(Counted())
        await acme.add(Counted, counted.id, "used", 3, at_most=3)
        assert (await acme.get(Counted, counted.id)).used == 3
        await acme.delete(Note, "n")
        with pytest.raises(NotFound):
            await acme.get(Note, "n")


async def test_a_tenant_handle_keeps_its_actor_and_claims_and_reads_the_clock_at_each_call() -> None:
    async with Strongroom.open("json://:memory:", entities=[Note]) as room:
        ada = room.tenant("acme", actor="user:ada", claims={"tenant": "acme"})
        first = ada.context
        assert (first.tenant, first.actor, first.claims) == ("acme", "user:ada", {"tenant": "acme"})
        await ada.create(Note(text="x"))
        (record,) = (await room.store.changes(None, tenant="acme")).records
        assert record.actor == "user:ada"
        assert ada.context.now_us > first.now_us
        with pytest.raises(Denied):
            await room.tenant("beta", claims={"tenant": "acme"}).find(Note)


async def test_a_failing_store_raises_unavailable_and_recovers() -> None:
    async with opened("json://:memory:", entities=[Note]) as (room, store):
        store.fault = lambda number, batch: Fault("before", Unavailable("gone"))
        with pytest.raises(Unavailable):
            await room.tenant("acme").create(Note(text="x"))
        store.fault = lambda number, batch: None
        await room.tenant("acme").create(Note(text="x"))
        assert (await room.keys.verify(generate())).code == "NOT_FOUND"


def test_the_blocking_facade_opens_the_same_urls() -> None:
    with BlockingStrongroom.open("json://:memory:") as room:
        issued = room.call(lambda inner: inner.keys.create(name="a"))
        assert room.verify(issued.text).valid
        assert room.open() is room
    with pytest.raises(TypeError, match="colour"):
        BlockingStrongroom.open("json://:memory:", colour="red")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="nope"):
        BlockingStrongroom.open("nope://x")
