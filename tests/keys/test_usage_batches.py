"""Batches of usage records: each record counts once, whatever happens to their keys and to the store."""

from __future__ import annotations

import asyncio
import gc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine

from strongroom import Anchored, Calendar, Limit, Strongroom, Total
from strongroom.context import utc_from_us
from strongroom.errors import Conflict, InvalidInput, Unavailable
from strongroom.keys.model import IssuedKey
from strongroom.keys.usage_recorder import Usage
from strongroom.limits import admission
from strongroom.storage.port import Batch, Patch, Put
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import new_url, opened, rolling

KEYS = 12
COST = {"tokens": 5}


async def keys_of(room: Strongroom) -> list[IssuedKey]:
    made = [await room.keys.create(name="n", limits=[rolling("tokens", 1_000)]) for _ in range(KEYS)]
    await room.keys.record_many(events_of(made))  # now they are in memory, and their usage
    return made


def events_of(made: list[IssuedKey]) -> list[Usage]:
    return [Usage(COST, key=one.text) for one in made]


async def used(room: Strongroom, made: list[IssuedKey]) -> list[Any]:
    return [(await room.keys.stats(one.key.id)).totals["tokens"] for one in made]


def usage_batches(store: FaultyStore) -> int:
    """How many batches wrote usage."""
    return sum(writes_usage(batch) for batch in store.batches)


def writes_usage(batch: Batch) -> bool:
    return any(isinstance(one, Patch | Put) and one.collection == "key_usage" for one in batch.operations)


async def test_records_of_many_keys_share_a_commit(room: Strongroom, store: FaultyStore) -> None:
    made = await keys_of(room)
    store.batches.clear()
    answers = await room.keys.record_many(events_of(made))
    assert [answer.key_id for answer in answers] == [one.key.id for one in made]
    assert usage_batches(store) == 1


async def test_keys_changed_on_another_node_are_counted_once_without_cost_for_later_commits(
    room: Strongroom, store: FaultyStore
) -> None:
    """As the background does it, which copies the usage of a key into it, once a minute."""
    made = await keys_of(room)
    for one in made[3:8]:
        version = (await store.store.get("api_keys", None, one.key.id) or {})["version"]
        await room.database.commit_counters([Patch("api_keys", one.key.id, {"usage_count": 1}, version)], 1)
    answers = await room.keys.record_many(events_of(made))
    assert [answer.limits[0].used for answer in answers] == [10] * KEYS
    assert await used(room, made) == [10] * KEYS
    await room.keys.record_many(events_of(made))
    store.batches.clear()
    await room.keys.record_many(events_of(made))
    assert usage_batches(store) == 1, "its keys must share a commit again"
    assert await used(room, made) == [20] * KEYS


async def test_a_key_cached_as_deleted_is_unknown(room: Strongroom) -> None:
    made = await keys_of(room)
    await room.keys.delete(made[4].key.id)
    assert (await room.keys.verify(made[4].text)).code == "NOT_FOUND"
    with pytest.raises(InvalidInput) as caught:
        await room.keys.record_many(events_of(made))
    assert [problem.path for problem in caught.value.problems] == ["items.4.key"]
    assert await used(room, made[:4]) == [5] * 4


async def test_an_unreachable_store_is_one_error_for_the_whole_batch(room: Strongroom, store: FaultyStore) -> None:
    made = await keys_of(room)
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    store.fault = lambda _, __: Fault("before", Unavailable("gone"))
    with pytest.raises(Unavailable):
        await room.keys.record_many(events_of(made))
    store.fault = lambda _, __: None
    await asyncio.sleep(0)
    gc.collect()
    assert unseen == []
    await room.keys.record_many(events_of(made))
    assert await used(room, made) == [10] * KEYS


# --- What a batch says that could not be counted whole ----------------------------------------------------------


async def test_a_partly_counted_batch_reports_the_counted_records(room: Strongroom) -> None:
    one, two = [await room.keys.create(name="n", limits=[rolling("tokens", 1_000)]) for _ in range(2)]
    await room.keys.record(key_id=one.key.id, cost=COST, idempotency_key="taken")
    events = [
        Usage({"tokens": 1}, key_id=one.key.id),
        Usage({"tokens": 7}, key_id=one.key.id, idempotency_key="taken"),  # of another amount
        Usage({"tokens": 1}, key_id=one.key.id),
        Usage({"tokens": 2}, key_id=two.key.id, idempotency_key="own"),
    ]
    for _ in range(2):  # what was counted under a key of its own counts once
        with pytest.raises(Conflict, match=r"^1 of 4 records were not counted: the idempotency key was used") as caught:
            await room.keys.record_many(events)
        assert caught.value.details["counted"] == [0, 2, 3]
        (failed,) = caught.value.details["failed"]
        assert (failed["code"], failed["items"]) == ("conflict", [1])
    assert await used(room, [one, two]) == [9, 2]


async def test_a_batch_under_an_idempotency_key_of_other_events_counts_nothing(room: Strongroom) -> None:
    made = [await room.keys.create(name="n", limits=[rolling("tokens", 1_000)]) for _ in range(3)]
    for _ in range(2):
        await room.keys.record_many(events_of(made[:2]), idempotency_key="batch")
    others = [events_of(made), events_of(made[2:]), [Usage({"tokens": 6}, key=made[0].text)], events_of(made[:1]) * 2]
    for events in others:
        with pytest.raises(Conflict, match="used for a different request"):
            await room.keys.record_many(events, idempotency_key="batch")
    assert await used(room, made[:2]) == [5, 5]
    assert (await room.keys.stats(made[2].key.id)).totals == {}


async def test_a_store_failure_within_a_batch_reports_the_counted_records(
    room: Strongroom, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commits of a batch are several; the repeat counts what is missing, and nothing twice."""
    made = await keys_of(room)
    monkeypatch.setattr(admission, "MAX_OPERATIONS", 12)
    commits = 0

    def after_the_first(number: int, batch: Any) -> Fault | None:
        nonlocal commits
        commits += writes_usage(batch)
        return Fault("after", Unavailable("lost", outcome="unknown")) if commits > 1 else None

    store.fault = after_the_first
    with pytest.raises(Unavailable) as caught:
        await room.keys.record_many(events_of(made), idempotency_key="b")
    details = caught.value.details
    (failed,) = details["failed"]
    assert details["outcome"] == "unknown"
    assert details["counted"]
    assert sorted(details["counted"] + failed["items"]) == list(range(KEYS))
    store.fault = lambda _, __: None
    await room.keys.record_many(events_of(made), idempotency_key="b")
    assert await used(room, made) == [10] * KEYS


# --- Usage of before -------------------------------------------------------------------------------------------


NOON = datetime(2026, 5, 5, 12, tzinfo=UTC)


def ago(**span: float) -> datetime:
    return NOON - timedelta(**span)


async def counted(room: Strongroom, id: str) -> list[int]:
    return [int(status.used) for status in (await room.keys.stats(id)).limits]


async def test_past_usage_counts_in_the_windows_that_include_it(tmp_path: Path) -> None:
    limits = [
        rolling("tokens", 1_000, 60),
        rolling("tokens", 1_000, 7_200),
        Limit(resource="tokens", limit=1_000, window=Calendar(unit="day")),
        Limit(resource="tokens", limit=1_000, window=Total()),
    ]
    with time_machine.travel(NOON, tick=False) as clock:
        async with opened(new_url("sqlite", tmp_path)) as (room, _):
            id = (await room.keys.create(name="n", limits=limits)).key.id
            await room.keys.record(key_id=id, cost={"tokens": 1})
            await room.keys.record(key_id=id, cost={"tokens": 10}, at=ago(hours=1))
            assert await counted(room, id) == [1, 11, 11, 11]
            await room.keys.record_many([Usage({"tokens": 100}, key_id=id, at=ago(hours=13))])  # yesterday
            assert await counted(room, id) == [1, 11, 11, 111]
            stats = await room.keys.stats(id)
            assert (stats.totals, stats.count, stats.last_used_at) == ({"tokens": 111}, 3, NOON)
            clock.shift(timedelta(minutes=61))  # the hour-old use leaves the two hours when it would have
            assert await counted(room, id) == [0, 1, 11, 111]


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_usage_before_every_window_is_refused_and_counts_nothing(limits: str, tmp_path: Path) -> None:
    with time_machine.travel(NOON, tick=False):
        async with opened(new_url("sqlite", tmp_path), limits=limits) as (room, _):
            issued = await room.keys.create(name="n", limits=[rolling("tokens", 9, 60)])
            id = issued.key.id
            await room.keys.verify(issued.text, cost={"tokens": 1})
            found = "found 2026-05-05T11:00:00.*, expected 2026-05-05T11:5.* or later"
            with pytest.raises(InvalidInput, match=found) as caught:
                await room.keys.record(key_id=id, cost={"tokens": 1}, at=ago(hours=1))
            assert [problem.path for problem in caught.value.problems] == ["at"]
            with pytest.raises(InvalidInput, match="1 of 2 records") as caught:
                await room.keys.record_many(
                    [Usage(COST, key_id=id, at=ago(hours=1)), Usage({"requests": 1}, key_id=id, at=ago(days=9))]
                )
            assert [problem.path for problem in caught.value.problems] == ["items.0.at"]
            assert caught.value.details["counted"] == [1]  # no limit concerns it
            assert (await room.keys.stats(id)).totals == {"tokens": 1, "requests": 1}


async def test_future_usage_and_naive_times_are_refused_before_anything_is_counted(
    room: Strongroom,
) -> None:
    id = (await room.keys.create(name="n", limits=[rolling("tokens", 9)])).key.id
    for at, what in (
        (utc_from_us(room.clock.now_us()) + timedelta(minutes=5), "not ahead of now"),
        (datetime(2026, 5, 5), "with its time zone"),  # noqa: DTZ001 - what is refused
    ):
        with pytest.raises(InvalidInput, match=what):
            await room.keys.record(key_id=id, cost=COST, at=at)
        with pytest.raises(InvalidInput, match=what):
            await room.keys.record_many([Usage(COST, key_id=id), Usage(COST, key_id=id, at=at)])
    await room.keys.record(key_id=id, cost=COST, at=utc_from_us(room.clock.now_us()) + timedelta(seconds=20))
    assert (await room.keys.stats(id)).totals == COST


async def test_the_time_of_usage_belongs_to_the_request_of_an_idempotency_key(tmp_path: Path) -> None:
    with time_machine.travel(NOON, tick=False):
        async with opened(new_url("sqlite", tmp_path)) as (room, _):
            id = (await room.keys.create(name="n", limits=[rolling("tokens", 99)])).key.id
            for _ in range(2):
                await room.keys.record(key_id=id, cost=COST, at=ago(minutes=1), idempotency_key="u")
            with pytest.raises(Conflict):
                await room.keys.record(key_id=id, cost=COST, at=ago(minutes=2), idempotency_key="u")
            events = [Usage(COST, key_id=id, at=ago(minutes=minute)) for minute in (3, 2, 3, 9)]
            for _ in range(2):
                await room.keys.record_many(events, idempotency_key="batch")
            assert (await room.keys.stats(id)).totals == {"tokens": 25}


async def test_an_anchored_window_begins_with_the_first_use_whatever_the_order_of_the_records(tmp_path: Path) -> None:
    with time_machine.travel(NOON, tick=False):
        async with opened(new_url("sqlite", tmp_path)) as (room, _):
            limit = Limit(resource="tokens", limit=99, window=Anchored(seconds=3_600))
            id = (await room.keys.create(name="n", limits=[limit])).key.id
            await room.keys.record_many([Usage(COST, key_id=id, at=ago(minutes=minute)) for minute in (5, 50, 20)])
            (status,) = (await room.keys.stats(id)).limits
            assert (status.used, status.resets_at) == (15, NOON + timedelta(minutes=10))
