"""Rotation: both secrets during the overlap, held and claimed secrets, schedules, retries, new peppers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from strongroom import ApiKey, Context, IssuedKey, Strongroom
from strongroom.context import system_context
from strongroom.entities.query import Query
from strongroom.errors import Conflict, InvalidInput, NotFound, Unavailable
from strongroom.jobs.job_lease import AcquiredLease, JobLeaseLost
from strongroom.journal.feed import POLL_S
from strongroom.keys.model import (
    DEFAULT_SCHEDULED_OVERLAP_S,
    MAX_OVERLAP_S,
    RESTORABLE_FOR_S,
    due_at,
)
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import new_url, opened, rolling
from tests.helpers.waiting import wait_until

MOMENT = datetime(2026, 5, 5, 12, tzinfo=UTC)
ADMIN = Context(None, "key:admin", {"admin": True}, "request-1")
SYSTEM = system_context()
HOUR = 3_600
DAY = 86_400


async def code(room: Strongroom, text: str) -> str:
    return (await room.keys.verify(text, cost={})).code


async def codes(room: Strongroom, *texts: str) -> list[str]:
    return [await code(room, text) for text in texts]


@asynccontextmanager
async def acquired(room: Strongroom) -> AsyncIterator[AcquiredLease]:
    """The lease of the work on keys."""
    lease = await room.background.leases.acquire("keys")
    assert lease is not None
    yield lease
    await lease.release(done=True)


async def work(room: Strongroom, lease: AcquiredLease) -> None:
    (job,) = [job for job in room.background.jobs if job.name == "keys"]
    await job.run(lease)


async def run(room: Strongroom) -> None:
    """What the background does to keys, now."""
    async with acquired(room) as lease:
        await work(room, lease)


# --- Held texts -----------------------------------------------------------------------------------------------


async def test_a_held_secret_is_claimed_once_and_then_forgotten(room: Strongroom) -> None:
    first = await room.keys.create(name="k", limits=[rolling("tokens", 100)])
    held = await room.keys.rotate(first.key.id, overlap_s=60, hold=True)
    assert held.text == ""
    assert held.key.unclaimed
    assert held.key.shown()["unclaimed"] is True
    await room.keys.verify(first.text, cost={"tokens": 60})
    claimed = await room.keys.claim(first.key.id)
    assert claimed.key.id == first.key.id
    assert claimed.text not in ("", first.text)
    assert claimed.key.unclaimed is None
    assert claimed.key.shown()["unclaimed"] is False
    assert (await room.keys.verify(claimed.text, cost={"tokens": 30})).limits[0].used == 90
    assert (await room.keys.verify(first.text, cost={"tokens": 30})).code == "USAGE_EXCEEDED"
    with pytest.raises(Conflict, match="no secret to claim"):
        await room.keys.claim(first.key.id)
    with pytest.raises(NotFound):
        await room.keys.claim("key_none")


async def test_an_unclaimed_secret_is_replaced_by_the_next_rotation(room: Strongroom) -> None:
    """The holder has the text before it: that is the one whose overlap a further rotation states."""
    with time_machine.travel(MOMENT, tick=False) as clock:
        first = await room.keys.create(name="k")
        await room.keys.rotate(first.key.id, overlap_s=60, hold=True)
        clock.shift(30)
        second = await room.keys.rotate(first.key.id, overlap_s=60)
        assert second.key.unclaimed is None
        clock.shift(45)
        assert await codes(room, first.text, second.text) == ["VALID", "VALID"]
        clock.shift(15)
        assert await codes(room, first.text, second.text) == ["NOT_FOUND", "VALID"]


async def test_no_rotation_restores_a_secret_whose_overlap_ended(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        first = await room.keys.create(name="k")
        await room.keys.rotate(first.key.id, overlap_s=60, hold=True)
        clock.shift(60)
        second = await room.keys.rotate(first.key.id, overlap_s=60)
        assert await codes(room, first.text, second.text) == ["NOT_FOUND", "VALID"]
        assert (second.key.previous_hash, second.key.previous_until) == (None, None)


async def test_a_held_secret_without_overlap_ends_the_old_one_at_once(room: Strongroom) -> None:
    first = await room.keys.create(name="k")
    await room.keys.rotate(first.key.id, hold=True)
    assert await code(room, first.text) == "NOT_FOUND"
    assert await code(room, (await room.keys.claim(first.key.id)).text) == "VALID"


async def test_a_held_secret_is_stored_encrypted_and_bound_to_its_key(room: Strongroom, store: FaultyStore) -> None:
    one, other = await room.keys.create(name="one"), await room.keys.create(name="other")
    for issued in (one, other):
        await room.keys.rotate(issued.key.id, hold=True, context=ADMIN, idempotency_key=issued.key.id)
    documents = [await store.store.find(name, None, Query(limit=100)) for name in ("api_keys", "idempotent_calls")]
    said = [repr(documents), repr((await store.changes(None)).records), repr(await room.keys.get(one.key.id))]
    # Whoever can write the database gets no text by moving it to a key that they may claim.
    stolen = (await room.keys.get(one.key.id)).unclaimed
    await room.database.update(SYSTEM, ApiKey, other.key.id, {"unclaimed": stolen})
    with pytest.raises(Conflict, match="rotate the key again"):
        await room.keys.claim(other.key.id)
    text = (await room.keys.claim(one.key.id, context=ADMIN, idempotency_key="c")).text
    said += [repr((await store.changes(None)).records), repr(await store.store.find("idempotent_calls", None, Query()))]
    assert not [line for line in said if text in line or text[-49:-6] in line]
    assert stolen is not None
    assert repr(stolen)[2:-1] not in said[1]


async def test_a_retried_claim_returns_the_same_secret(room: Strongroom, store: FaultyStore) -> None:
    first = await room.keys.create(name="k")
    id = first.key.id
    await room.keys.rotate(id, overlap_s=60, hold=True)
    number = len(store.batches)
    store.fault = lambda n, batch: Fault("after", Unavailable("lost")) if n == number else None
    with pytest.raises(Unavailable):
        await room.keys.claim(id, context=ADMIN, idempotency_key="c")
    claims = await asyncio.gather(*(room.keys.claim(id, context=ADMIN, idempotency_key="c") for _ in range(4)))
    assert len({claim.text for claim in claims}) == 1
    assert await code(room, claims[0].text) == "VALID"
    with pytest.raises(Conflict, match="no secret to claim"):
        await room.keys.claim(id, context=ADMIN, idempotency_key="another")
    with pytest.raises(Conflict, match="different request"):
        await room.keys.rotate(id, context=ADMIN, idempotency_key="c")


async def test_of_concurrent_claims_one_gets_the_secret(room: Strongroom) -> None:
    issued = await room.keys.create(name="k")
    await room.keys.rotate(issued.key.id, hold=True)
    claims = await asyncio.gather(*(room.keys.claim(issued.key.id) for _ in range(5)), return_exceptions=True)
    assert len([claim for claim in claims if isinstance(claim, IssuedKey)]) == 1
    assert len([claim for claim in claims if isinstance(claim, Conflict)]) == 4


async def test_a_secret_replaced_during_its_claim_is_not_returned(room: Strongroom, store: FaultyStore) -> None:
    issued = await room.keys.create(name="k")
    await room.keys.rotate(issued.key.id, hold=True)

    async def overtake(method: str, collection: str) -> None:
        store.after_read = None
        await room.keys.rotate(issued.key.id, hold=True)

    store.after_read = overtake
    claimed = await room.keys.claim(issued.key.id)
    assert await code(room, claimed.text) == "VALID"


# --- Repeats --------------------------------------------------------------------------------------------------


async def test_a_rotation_repeated_on_two_nodes_at_once_happens_once(url_of_any: str) -> None:
    async with opened(url_of_any) as (here, store), opened(url_of_any, beside=store) as (there, _):
        first = await here.keys.create(name="k")
        id = first.key.id
        calls = (room.keys.rotate(id, overlap_s=HOUR, context=ADMIN, idempotency_key="r") for room in [here, there] * 4)
        rotated = await asyncio.gather(*calls)
        assert len({issued.text for issued in rotated}) == 1
        assert len({issued.key.version for issued in rotated}) == 1
        for room in (here, there):
            room.keys.changed(id)  # what the journal would tell in a moment
            assert await codes(room, first.text, rotated[0].text) == ["VALID", "VALID"]


@pytest.mark.parametrize("hold", [False, True])
async def test_a_retried_rotation_after_a_lost_answer_rotates_once(
    room: Strongroom, store: FaultyStore, hold: bool
) -> None:
    first = await room.keys.create(name="k")
    id = first.key.id
    number = len(store.batches)
    store.fault = lambda n, batch: Fault("after", Unavailable("lost")) if n == number else None
    with pytest.raises(Unavailable):
        await room.keys.rotate(id, overlap_s=HOUR, hold=hold, context=ADMIN, idempotency_key="r")
    again = await room.keys.rotate(id, overlap_s=HOUR, hold=hold, context=ADMIN, idempotency_key="r")
    text = (await room.keys.claim(id)).text if hold else again.text
    room.keys.changed(id)
    assert await codes(room, first.text, text) == ["VALID", "VALID"]  # twice, and the first would have ended


async def test_a_second_rotation_in_an_overlap_ends_the_oldest_secret(room: Strongroom) -> None:
    texts = [(issued := await room.keys.create(name="k")).text]
    for _ in range(2):
        texts.append((await room.keys.rotate(issued.key.id, overlap_s=HOUR)).text)
    assert await codes(room, *texts) == ["NOT_FOUND", "VALID", "VALID"]


# --- Schedules ------------------------------------------------------------------------------------------------


async def test_a_scheduled_rotation_leaves_its_holder_a_working_secret(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        first = await room.keys.create(
            name="k", limits=[rolling("tokens", 100, 30 * DAY)], rotate_every_s=DAY, rotation_overlap_s=HOUR
        )
        id = first.key.id
        await room.keys.verify(first.text, cost={"tokens": 60})
        assert first.key.next_rotation_at == MOMENT + timedelta(days=1)
        clock.shift(DAY - 1)
        await run(room)
        assert (await room.keys.get(id)).version == first.key.version
        clock.shift(1 + 7)  # the background comes by a little late
        await run(room)
        key = await room.keys.get(id)
        assert key.unclaimed
        assert key.next_rotation_at == MOMENT + timedelta(days=2, seconds=7)
        assert await code(room, first.text) == "VALID"
        claimed = await room.keys.claim(id)
        assert (await room.keys.verify(claimed.text, cost={"tokens": 40})).limits[0].used == 100
        clock.shift(HOUR - 1)
        assert await codes(room, first.text, claimed.text) == ["VALID", "VALID"]
        clock.shift(1)
        assert await codes(room, first.text, claimed.text) == ["NOT_FOUND", "VALID"]
        clock.shift(DAY)
        await run(room)
        assert await code(room, claimed.text) == "VALID"
        assert (await room.keys.claim(id)).text != claimed.text


async def test_a_scheduled_rotation_does_not_replace_an_unclaimed_secret(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        first = await room.keys.create(name="k", rotate_every_s=DAY, rotation_overlap_s=HOUR)
        clock.shift(DAY)
        await run(room)
        held = await room.keys.get(first.key.id)
        for _ in range(3):
            clock.shift(DAY)
            await run(room)
        now = await room.keys.get(first.key.id)
        assert (now.hash, now.unclaimed) == (held.hash, held.unclaimed)
        assert now.next_rotation_at == MOMENT + timedelta(days=5)
        assert await code(room, first.text) == "NOT_FOUND"  # its overlap ended as stated
        assert await code(room, (await room.keys.claim(first.key.id)).text) == "VALID"


async def test_a_disabled_or_expired_key_is_not_rotated(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        schedule: dict[str, Any] = {"name": "k", "rotate_every_s": DAY}
        expired = await room.keys.create(**schedule, expires_at=MOMENT + timedelta(hours=1))
        disabled = await room.keys.create(**schedule)
        await room.keys.disable(disabled.key.id)
        clock.shift(DAY)
        await run(room)
        for issued in (expired, disabled):
            key = await room.keys.get(issued.key.id)
            assert (key.hash, key.unclaimed) == (issued.key.hash, None)
            assert key.next_rotation_at == MOMENT + timedelta(days=2)
        await room.keys.enable(disabled.key.id)
        assert await code(room, disabled.text) == "VALID"
        clock.shift(DAY)
        await run(room)
        assert (await room.keys.get(disabled.key.id)).unclaimed


async def test_a_schedule_is_changed_and_ended(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        issued = await room.keys.create(name="k")
        id = issued.key.id
        assert (issued.key.next_rotation_at, issued.key.due_at) == (None, None)
        key = await room.keys.update(id, rotate_every_s=30 * DAY)
        assert key.next_rotation_at == key.due_at == MOMENT + timedelta(days=30)
        assert key.scheduled_overlap_s == DEFAULT_SCHEDULED_OVERLAP_S
        clock.shift(DAY)
        key = await room.keys.update(id, rotation_overlap_s=HOUR)
        assert (key.next_rotation_at, key.scheduled_overlap_s) == (MOMENT + timedelta(days=30), HOUR)
        key = await room.keys.update(id, rotate_every_s=2 * DAY)
        assert key.next_rotation_at == MOMENT + timedelta(days=3)
        rotated = await room.keys.rotate(id)
        assert rotated.key.next_rotation_at == MOMENT + timedelta(days=3)  # a rotation begins the period again
        key = await room.keys.update(id, rotate_every_s=None)
        assert (key.next_rotation_at, key.due_at, key.rotation_overlap_s) == (None, None, None)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"rotate_every_s": HOUR - 1}, "rotate_every_s"),
        ({"rotate_every_s": 401 * DAY}, "rotate_every_s"),
        ({"rotate_every_s": "3600"}, "rotate_every_s"),
        ({"rotate_every_s": True}, "rotate_every_s"),
        ({"rotate_every_s": DAY, "rotation_overlap_s": DAY}, "rotation_overlap_s"),
        ({"rotate_every_s": DAY, "rotation_overlap_s": 0}, "rotation_overlap_s"),
        ({"rotate_every_s": 60 * DAY, "rotation_overlap_s": MAX_OVERLAP_S + 1}, "rotation_overlap_s"),
        ({"rotation_overlap_s": HOUR}, "rotation_overlap_s"),
    ],
)
async def test_an_invalid_schedule_is_refused(fields: dict[str, Any], path: str) -> None:
    async with Strongroom.open("json://:memory:") as room:
        with pytest.raises(InvalidInput) as caught:
            await room.keys.create(name="k", **fields)
        assert [problem.path for problem in caught.value.problems] == [path]
        issued = await room.keys.create(name="k")
        with pytest.raises(InvalidInput) as caught:
            await room.keys.update(issued.key.id, **fields)
        assert [problem.path for problem in caught.value.problems] == [path]
        assert await room.keys.get(issued.key.id) == issued.key


async def test_a_partial_schedule_change_is_checked_against_the_stored_schedule() -> None:
    async with Strongroom.open("json://:memory:") as room:
        issued = await room.keys.create(name="k", rotate_every_s=30 * DAY, rotation_overlap_s=2 * DAY)
        with pytest.raises(InvalidInput, match="rotation_overlap_s: found 172800, expected less than"):
            await room.keys.update(issued.key.id, rotate_every_s=DAY)
        with pytest.raises(InvalidInput, match="rotation_overlap_s"):
            await room.keys.update(issued.key.id, rotation_overlap_s=30 * DAY)


async def test_a_node_that_lost_the_lease_rotates_nothing(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    with time_machine.travel(MOMENT, tick=False) as clock:
        async with opened(url) as (here, store), opened(url, beside=store) as (there, _):
            issued = await here.keys.create(name="k", rotate_every_s=DAY)
            clock.shift(DAY)
            paused = await here.background.leases.acquire("keys")
            assert paused is not None
            clock.shift(HOUR)  # it was stopped for longer than its lease lasts
            async with acquired(there) as lease:
                with pytest.raises(JobLeaseLost):
                    await work(here, paused)
                assert (await here.keys.get(issued.key.id)).unclaimed is None
                await work(there, lease)
            assert (await here.keys.get(issued.key.id)).unclaimed


async def test_an_interrupted_run_continues_and_rotates_no_key_twice(room: Strongroom, store: FaultyStore) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        made = [await room.keys.create(name=f"k{n}", rotate_every_s=DAY) for n in range(45)]
        clock.shift(DAY)
        broken = len(store.batches) + 30

        def fault(n: int, batch: Any) -> Fault | None:
            return Fault("after" if n % 2 else "before", Unavailable("gone")) if n >= broken else None

        store.fault = fault
        async with acquired(room) as lease:
            with pytest.raises(Unavailable):
                await work(room, lease)
            store.fault = lambda n, batch: None
            rotated = {key.id: key.hash for key in await _all(room) if key.unclaimed}
            assert 0 < len(rotated) < len(made)
        turn_again = await room.background.leases.acquire("keys")
        assert turn_again is not None
        await work(room, turn_again)
        keys = await _all(room)
        assert all(key.unclaimed for key in keys)
        assert {key.id: key.hash for key in keys if key.id in rotated} == rotated


async def _all(room: Strongroom) -> list[ApiKey]:
    return (await room.keys.list(limit=1_000)).items


# --- Peppers --------------------------------------------------------------------------------------------------


async def test_secrets_sealed_under_an_old_pepper_stay_readable_on_every_node(url_of_any: str) -> None:
    """The text that is held, the repeat of a rotation, the hash sealed for exports, both texts in the overlap."""
    async with opened(url_of_any) as (here, store), opened(url_of_any, beside=store) as (there, _):
        first = await here.keys.create(name="k")
        id = first.key.id
        second = await here.keys.rotate(id, overlap_s=HOUR, context=ADMIN, idempotency_key="r")
        held = await here.keys.create(name="held")
        await here.keys.rotate(held.key.id, overlap_s=HOUR, hold=True)
        await here.rotate_pepper()
        for room in (there, here):
            await room._reload_peppers()  # as the journal makes it do in a moment
            room.keys.changed(id)
            assert await codes(room, first.text, second.text, held.text) == ["VALID"] * 3
            again = await room.keys.rotate(id, overlap_s=HOUR, context=ADMIN, idempotency_key="r")
            assert again.text == second.text
            key = await room.keys.get(held.key.id)
            assert key.sealed is not None
            room.keys.hasher.unseal(key.sealed)
        claimed = await there.keys.claim(held.key.id, context=ADMIN, idempotency_key="c")
        await there.rotate_pepper()
        await here._reload_peppers()
        again = await here.keys.claim(held.key.id, context=ADMIN, idempotency_key="c")
        assert again.text == claimed.text
        here.keys.changed(held.key.id)
        assert await codes(here, held.text, claimed.text) == ["VALID", "VALID"]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_pepper_rotation_that_is_killed_at_its_commit_leaves_every_key_working(
    room: Strongroom, store: FaultyStore, when: Any, tmp_path: Path
) -> None:
    issued = await room.keys.create(name="k")
    number = len(store.batches)
    store.fault = lambda n, batch: Fault(when, Unavailable("killed")) if n == number else None
    with pytest.raises(Unavailable):
        await room.rotate_pepper()
    made = await room.keys.create(name="made meanwhile")
    await room.rotate_pepper()
    for one in (issued, made, await room.keys.create(name="made after")):
        room.keys.changed(one.key.id)
        assert await code(room, one.text) == "VALID"
        assert (await room.keys.get(one.key.id)).hash.startswith(room.keys.hasher.current_id + ":")


async def test_a_slow_reload_of_the_peppers_does_not_bring_an_older_one_back(
    room: Strongroom, store: FaultyStore
) -> None:
    await room.rotate_pepper()
    await wait_until(lambda: room.feed.behind_s < POLL_S)
    read, go_on = asyncio.Event(), asyncio.Event()

    async def slow(method: str, collection: str) -> None:
        if collection == "peppers" and not read.is_set():
            read.set()
            await go_on.wait()

    store.after_read = slow
    reload = asyncio.create_task(room._reload_peppers())  # as the journal makes it do in a moment
    await read.wait()
    rotation = asyncio.create_task(room.rotate_pepper())
    await asyncio.wait([rotation], timeout=0.3)  # it ends only if it does not wait for the reload
    go_on.set()
    await asyncio.gather(reload, rotation)
    assert room.keys.hasher.current_id == "000003"


async def test_two_nodes_that_rotate_the_pepper_at_once_do_not_lose_a_key(url_of_any: str) -> None:
    async with opened(url_of_any) as (here, store), opened(url_of_any, beside=store) as (there, _):
        issued = await here.keys.create(name="k")
        results = await asyncio.gather(here.rotate_pepper(), there.rotate_pepper(), return_exceptions=True)
        assert None in results
        made = [await room.keys.create(name="new") for room in (here, there)]
        for room in (here, there):
            await room._reload_peppers()
            for one in (issued, *made):
                room.keys.changed(one.key.id)
                assert await code(room, one.text) == "VALID"


# --- A law ----------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("rotate"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("claim"), st.just(0), st.just(False)),
        st.tuples(st.just("wait"), st.integers(1, 3), st.just(False)),
    ),
    max_size=12,
)


@given(steps=STEPS)
async def test_exactly_the_documented_secrets_are_valid(steps: list[tuple[str, int, bool]]) -> None:
    """A model in five lines: the text that was handed out last, the one before it until its overlap ends, no other."""
    with time_machine.travel(MOMENT, tick=False) as clock:
        async with Strongroom.open("json://:memory:") as room:
            issued = await room.keys.create(name="k")
            id, texts = issued.key.id, [issued.text]
            current: str | None = issued.text  # None: the current text is held
            old, until = "", 0
            now = 0
            for what, number, hold in steps:
                if what == "wait":
                    clock.shift(60 * number)
                    now += number
                elif what == "claim":
                    if current is None:
                        current = (await room.keys.claim(id)).text
                        texts.append(current)
                else:
                    handed = current if current is not None else (old if now < until else "")
                    old, until = (handed, now + number) if number else ("", 0)
                    text = (await room.keys.rotate(id, overlap_s=60 * number, hold=hold)).text
                    current = text or None
                    texts += [text] if text else []
                valid = {text for text in (current, old if now < until else None) if text}
                assert {text for text in texts if await code(room, text) == "VALID"} == valid


def test_the_removal_of_a_deleted_key_is_due_before_its_rotation() -> None:
    soon, gone = MOMENT, MOMENT + timedelta(days=9)
    assert due_at(soon, None) == soon
    assert due_at(soon, gone) == gone + timedelta(seconds=RESTORABLE_FOR_S)
    assert due_at(None, None) is None
