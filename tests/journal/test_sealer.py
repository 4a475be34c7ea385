"""Sealing: every record becomes a leaf of its tree, once and in order, whenever a process is killed."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from strongroom import Entity, Strongroom
from strongroom.entities import Query, Where
from strongroom.errors import Conflict, Unavailable
from strongroom.jobs import JobLeases
from strongroom.jobs.sealing import EVERY_S, LEASE_S, LONGEST_S, Sealing, interval_s
from strongroom.journal import sealer as sealing
from strongroom.journal.sealer import Sealer
from strongroom.journal.trees import new_round, round_leaf, tree_id
from strongroom.storage.port import Append, Batch, Check, Patch, Put, Record
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import opened
from tests.helpers.trees import check_trees
from tests.helpers.waiting import wait_until

NOW_US = 1_800_000_000_000_000


class Note(Entity, collection="sealed_notes"):
    text: str = ""


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Note]


async def written(room: Strongroom, tenants: int = 3, records: int = 5) -> None:
    await asyncio.gather(
        *(
            room.tenant(f"tenant-{number}").create(Note(text=f"{number}.{count}"))
            for count in range(records)
            for number in range(tenants)
        )
    )


def records(tenant: str | None, count: int, *, salt: bytes = bytes(16), begin: int = 0) -> list[Append]:
    return [
        Append(
            Record(f"{tenant}-{number}", tenant, 1_800_000_000_000_000 + number, "a", "", "create", "c", "e", salt=salt)
        )
        for number in range(begin, begin + count)
    ]


async def append(store: FaultyStore, tenant: str | None, count: int, **options: Any) -> None:
    """Append records alone, which is faster than writing documents."""
    operations = records(tenant, count, **options)
    for at in range(0, count, 500):
        await store.store.commit(Batch(tenant, tuple(operations[at : at + 500]), 1))


def another(room: Strongroom, store: FaultyStore) -> Sealing:
    """The sealing job of another process."""
    return Sealing(Sealer(store, room.clock), JobLeases(room.database, room.clock, lease_s=LEASE_S))


async def test_every_record_is_a_leaf_of_its_tree(room: Strongroom, store: FaultyStore) -> None:
    await written(room)
    await room.sealer.seal_now()
    first = await check_trees(store)
    assert len(first.leaves) == 4
    await written(room)
    await room.sealer.seal_now()
    second = await check_trees(store)
    for tree, leaves in first.leaves.items():
        assert second.leaves[tree][: len(leaves)] == leaves
    assert second.log["round"] == first.log["round"] + 1


async def test_where_nothing_was_committed_nothing_is_sealed(room: Strongroom, store: FaultyStore) -> None:
    await written(room)
    await room.sealer.seal_now()
    before = await check_trees(store)
    await another(room, store).seal_now()
    await room.sealer.seal_now()
    assert (await check_trees(store)).log == before.log


@pytest.mark.parametrize("tenant", ["acme", None])
async def test_complete_tiles_are_stored_on_every_level(
    room: Strongroom, store: FaultyStore, tenant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "MAX_RECORDS", 700)  # so that there are many rounds
    for begin in range(0, 3_000, 1_000):
        await append(store, tenant, 1_000, begin=begin)
        await expired(room)
        await another(room, store).seal_now()
    await check_trees(store)


async def test_a_process_killed_between_any_two_commits_is_continued(room: Strongroom, store: FaultyStore) -> None:
    """Each commit of a round fails in turn, before it is applied and after; the next process finishes the round."""
    step, number = 0, 0
    while True:
        await append(store, "big", 300, begin=number * 300)
        await append(store, None, 3, begin=number * 3)
        await written(room, tenants=2, records=1)
        number += 1
        when: Literal["before", "after"] = "before" if number % 2 else "after"
        store.batches.clear()
        store.fault = failing(step, Fault(when, Unavailable("killed")))
        failed = False
        try:
            await another(room, store).seal_now()
        except Unavailable:
            failed = True
        store.fault = lambda count, batch: None
        await expired(room)
        if await store.get("journal_log", None, "log"):
            await check_trees(store, sealed=False)
        await written(room, tenants=3, records=1)  # the next process reads more than the killed one
        await another(room, store).seal_now()
        await check_trees(store)
        await expired(room)
        if not failed:
            break
        if when == "after":
            step += 1
    assert step >= 3, "the lease, the log, the trees and the end of the round"


def is_sealing(batch: Batch) -> bool:
    first = batch.operations[0]
    return isinstance(first, Check | Put) and first.id == "journal-sealing"


def failing(step: int, fault: Fault) -> Callable[[int, Batch], Fault | None]:
    """Fail the sealing job's commit of this number."""
    numbers = itertools.count()

    def of(number: int, batch: Batch) -> Fault | None:
        return fault if is_sealing(batch) and next(numbers) == step else None

    return of


async def expired(room: Strongroom) -> None:
    """End the lease of a killed process at once."""
    found = await room.store.get("leases", None, "journal-sealing")
    if found is not None:
        operation = Patch("leases", "journal-sealing", {"holder": "", "expires_at": None})
        await room.store.commit(Batch(None, (operation,), 1))


async def test_small_batches_keep_each_tree_in_one(
    room: Strongroom, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "MAX_OPERATIONS", 4)
    await written(room, tenants=7, records=2)
    store.batches.clear()
    await room.sealer.seal_now()
    assert max(len(batch.operations) for batch in store.batches) == 4
    assert (await check_trees(store)).rounds == 1


async def test_trees_with_and_without_new_tiles_are_sealed_in_one_round(room: Strongroom, store: FaultyStore) -> None:
    for count in (1, 300, 5):
        for number in range(12):
            await append(store, f"t{number}", count if number % 3 else 1, begin=1_000 * count)
        await room.sealer.seal_now()
    trees = await check_trees(store)
    assert (len(trees.leaves), trees.rounds) == (13, 3)


def test_long_rounds_are_fewer_and_still_seal_within_a_second() -> None:
    assert interval_s(0.0) == interval_s(0.04) == EVERY_S
    assert interval_s(0.06) == pytest.approx(0.6)
    for took_s in (0.1, 0.15, 0.2):
        assert EVERY_S <= interval_s(took_s) == pytest.approx(LONGEST_S - took_s)
    assert interval_s(1.0) == EVERY_S


def test_the_leaf_of_a_new_round_is_that_of_its_stored_entries() -> None:
    entries = [(tree_id(tenant), size, f"{size:064x}") for tenant, size in (("acme", 1), ('é"', 2**40), ("x", 0))]
    for some in (entries, entries[:1], []):
        text, leaf = new_round(7, some)
        assert leaf == round_leaf(7, text)


async def test_a_thousand_tenants_are_sealed_in_one_round(room: Strongroom, store: FaultyStore) -> None:
    operations = [record for number in range(1_000) for record in records(f"t{number}", 1)]
    await asyncio.gather(
        *(store.store.commit(Batch(one.record.tenant, (one,), 1)) for one in operations)  # a batch is of one tenant
    )
    await room.sealer.seal_now()
    trees = await check_trees(store)
    assert (len(trees.leaves), trees.rounds) == (1_001, 1)


async def test_records_without_salts_are_sealed_with_salts_of_the_log(room: Strongroom, store: FaultyStore) -> None:
    await append(store, "old", 600, salt=b"")
    await append(store, None, 10, salt=b"")
    await room.sealer.seal_now()
    trees = await check_trees(store)
    assert trees.log["legacy_secret"] not in (b"", bytes(32))


async def test_a_tree_whose_records_were_changed_is_not_extended_and_the_others_are(
    room: Strongroom, store: FaultyStore
) -> None:
    await append(store, "acme", 5)
    await append(store, "umbrella", 5)
    await room.sealer.seal_now()
    (tree,) = await store.find("journal_trees", None, of_tenant("acme"))
    changed = bytes(32) + tree["frontier"][32:]
    await store.commit(Batch(None, (Patch("journal_trees", tree["id"], {"frontier": changed}),), 1))
    await append(store, "acme", 5, begin=5)
    await append(store, "umbrella", 5, begin=5)
    job = another(room, store)
    await expired(room)
    await job.seal_now()
    (tree,) = await store.find("journal_trees", None, of_tenant("acme"))
    assert (tree["size"], job.sealer.broken) == (5, {tree["id"]: tree["broken"]})
    assert "do not lead to its hashes" in tree["broken"]
    (other,) = await store.find("journal_trees", None, of_tenant("umbrella"))
    assert (other["size"], other["broken"]) == (10, "")


def of_tenant(tenant: str) -> Query:
    return Query(Where("tenant", "==", tenant))


async def test_of_two_processes_one_seals(url_of_any: str, entities: list[type[Entity]]) -> None:
    async with opened(url_of_any, entities=entities) as (room, store):
        jobs = [another(room, store) for _ in range(3)]
        for number in range(10):
            await append(store, "acme", 50, begin=number * 50)
            await asyncio.gather(*(job.seal_now() for job in jobs))
            await check_trees(store)
        assert sum(job.rounds > 0 for job in jobs) == 1, "the holder keeps the lease"


async def test_a_process_that_was_paused_past_its_lease_changes_nothing(room: Strongroom, store: FaultyStore) -> None:
    paused, other = another(room, store), another(room, store)
    await append(store, "acme", 300)
    await paused.seal_now()
    await append(store, "acme", 300, begin=300)
    await expired(room)
    await other.seal_now()
    await append(store, "acme", 300, begin=600)
    lease = paused._lease
    assert lease is not None
    with pytest.raises(Conflict):
        await paused.sealer.round(lease)
    await check_trees(store, sealed=False)
    await other.seal_now()
    await check_trees(store)


def sealing_commits(store: FaultyStore) -> int:
    return sum(is_sealing(batch) for batch in store.batches)


async def test_a_record_is_sealed_within_a_second_by_itself(url_of_any: str, entities: list[type[Entity]]) -> None:
    async with opened(url_of_any, entities=entities, sealing=True) as (room, store):
        await written(room, tenants=1, records=1)
        await wait_until(lambda: room.sealer.records > 0)
        assert room.sealer.lag_s < 1
        await room.sealer.seal_now()
        records, commits = room.sealer.records, sealing_commits(store)
        await asyncio.sleep(1.2)
        if room.sealer.records == records:  # else a background job has written something
            assert sealing_commits(store) - commits <= 1, "an idle store is not written to"
        await check_trees(store)


async def test_closing_seals_what_this_process_wrote(tmp_path: Path, entities: list[type[Entity]]) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    async with Strongroom.open(url, entities=entities) as room:
        await written(room, tenants=1, records=1)
    async with Strongroom.open(url, entities=entities, sealing=False) as room:
        assert len((await check_trees(room.store)).leaves) == 2


async def test_every_store_seals_what_is_written_to_it(url: str, entities: list[type[Entity]]) -> None:
    async with Strongroom.open(url, entities=entities) as room:
        for _ in range(2):
            await written(room)
            await room.sealer.seal_now()
        trees = await check_trees(room.store)
        assert [len(trees.leaves[tree_id(f"tenant-{number}")]) for number in range(3)] == [10, 10, 10]


async def test_another_process_continues_when_the_one_that_seals_was_killed(
    room: Strongroom, store: FaultyStore
) -> None:
    killed, other = another(room, store), another(room, store)
    await append(store, "acme", 5)
    await killed.seal_now()  # it has the lease now, and does nothing any more
    await append(store, "acme", 5, begin=5)
    began = time.monotonic()
    other.start()
    await wait_until(lambda: other.records)
    assert time.monotonic() - began > LEASE_S / 2, "not before the lease is over"
    await other.close()
    await check_trees(store)
