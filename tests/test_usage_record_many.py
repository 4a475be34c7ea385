"""Many records of usage at once: each is counted once, whatever happens to their keys and to the store meanwhile."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.errors import InvalidInput, Unavailable
from strongroom.recording import Usage
from strongroom.rotation import IssuedKey
from strongroom.storage.port import Patch

from .support import Fault, FaultyStore, rolling

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
    return sum(
        any(isinstance(one, Patch) and one.collection == "key_usage" for one in b.operations) for b in store.batches
    )


async def test_records_of_many_keys_share_a_commit(room: Strongroom, store: FaultyStore) -> None:
    made = await keys_of(room)
    store.batches.clear()
    answers = await room.keys.record_many(events_of(made))
    assert [answer.key_id for answer in answers] == [one.key.id for one in made]
    assert usage_batches(store) == 1


async def test_keys_that_were_changed_unheard_are_counted_once_and_cost_later_commits_nothing(
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


async def test_a_key_that_is_remembered_as_deleted_is_no_key(room: Strongroom) -> None:
    made = await keys_of(room)
    await room.keys.delete(made[4].key.id)
    assert (await room.keys.verify(made[4].text)).code == "NOT_FOUND"
    with pytest.raises(InvalidInput) as caught:
        await room.keys.record_many(events_of(made))
    assert [problem.path for problem in caught.value.problems] == ["items.4.key"]
    assert await used(room, made[:4]) == [5] * 4


async def test_a_store_out_of_reach_is_one_error_and_leaves_none_unseen(room: Strongroom, store: FaultyStore) -> None:
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
