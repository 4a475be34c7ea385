"""The journal: in commit order, complete, and never with a new record before a cursor that was returned."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ...entities import INT64_MAX, Document
from ...errors import AlreadyExists, Conflict, Gone, InvalidInput
from ...storage.port import (
    MAX_CHANGES_PAGE,
    Add,
    Append,
    Check,
    Create,
    Delete,
    Patch,
    Put,
    Record,
    Store,
)
from .backend import Backend, StorageSuite, examples
from .samples import (
    COLLECTIONS,
    HOSTILE_NAMES,
    batch,
    documents,
    identical,
    item,
    record,
    shared,
)

PATIENCE_S = 20


async def tail(
    store: Store, count: int, *, after: str | None = None, tenant: str | None = None, limit: int = MAX_CHANGES_PAGE
) -> tuple[list[Record], str]:
    """Follow the journal until `count` records have arrived; returns them and the cursor after them.

    A backend may show a record a moment after its commit was acknowledged, so this waits; but not for ever.
    """
    found: list[Record] = []
    async with asyncio.timeout(PATIENCE_S):
        while True:
            page = await store.changes(after, tenant=tenant, limit=limit)
            assert len(page.records) <= limit
            found += page.records
            after = page.cursor
            if len(found) >= count:
                return found, after
            await asyncio.sleep(0 if page.records else 0.002)


class TestJournal(StorageSuite):
    async def test_an_ordered_journal_numbers_the_records_of_a_batch_one_after_the_other(self, store: Store) -> None:
        if not store.capabilities.ordered_journal:
            return  # nothing is promised
        for number in range(3):
            other = await store.commit(batch("zeta", Append(record("z", "zeta"))))
            creates = [(Create("items", f"{number}{name}", item(name)), Append(record(name))) for name in "abc"]
            committed = await store.commit(batch("acme", *(one for pair in creates for one in pair)))
            assert other.sequence is not None
            assert committed.sequence is not None
            assert committed.sequence >= other.sequence + 3
            page = await store.changes(str(committed.sequence - 3))
            assert [one.sequence for one in page.records] == [committed.sequence + n for n in (-2, -1, 0)]
            assert [one.entity_id for one in page.records] == ["a", "b", "c"]
            assert page.cursor == str(committed.sequence)

    async def test_a_record_is_returned_unchanged_with_its_sequence(self, store: Store) -> None:
        given = [
            record("full", before={"a": 1, "$": [b"x", None]}, after={"a": 1.0, "b": {"$bytes": "x"}}, version=7),
            record("bare", None),
            record("later", at_us=INT64_MAX, actor="key:k'\"", request_id="é", action="denied", collection="secret"),
            *(record(name, name, id=name, actor=name) for name in HOSTILE_NAMES),
        ]
        committed = await store.commit(batch("acme", *(Append(one) for one in given)))
        assert committed.versions == (0,) * len(given)
        found, _ = await tail(store, len(given))
        sequences = [one.sequence for one in found]
        assert len(set(sequences)) == len(given)
        assert min(sequences) > 0
        of = {one.id: one for one in found}
        assert committed.sequence == of[given[-1].id].sequence
        assert [one.sequence for one in found if one.tenant == "acme"] == sorted(
            one.sequence for one in found if one.tenant == "acme"
        )
        for expected in given:
            one = of[expected.id]
            assert structs.replace(one, sequence=0) == expected
            assert identical([one.before, one.after], [expected.before, expected.after])

    @examples(2)
    @given(before=st.none() | documents, after=st.none() | documents)
    async def test_any_document_fits_into_a_record(
        self, store: Store, before: Document | None, after: Document | None
    ) -> None:
        cursor = (await store.changes("end")).cursor
        await store.commit(batch("acme", Append(record(before=before, after=after))))
        (found,), _ = await tail(store, 1, after=cursor)
        assert identical([found.before, found.after], [before, after]), found

    async def test_a_record_takes_the_version_of_its_operation(self, store: Store) -> None:
        committed = await store.commit(
            batch(
                "acme",
                Append(record("none")),
                Create("items", "x", item()),
                Append(record("create"), of=1),
                Put("items", "x", item("put")),
                Append(record("put"), of=3),
                Patch("items", "x", {"label": "patched"}),
                Add("items", "x", "used", 1),
                Append(record("add"), of=6),
                Append(record("patch"), of=5),
                Append(record("own", version=99)),
            )
        )
        found, _ = await tail(store, 6)
        versions = {one.entity_id: one.version for one in found}
        made = {"create": 1, "put": 3, "patch": 5, "add": 6}
        expected = {name: committed.versions[number] for name, number in made.items()}
        assert versions == {"none": None, "own": 99, **expected}
        assert committed.sequence == found[-1].sequence

    async def test_a_failed_batch_leaves_no_record(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "x", item()), Append(record("1"), 0)))
        for _ in range(3):
            with pytest.raises(AlreadyExists):
                await store.commit(batch("acme", Append(record("lie")), Create("items", "x", item())))
        await store.commit(batch("acme", Append(record("2"))))
        found, _ = await tail(store, 2)
        assert [one.entity_id for one in found] == ["1", "2"]

    async def test_a_cursor_continues_where_it_stands(self, store: Store) -> None:
        for n in range(10):
            await store.commit(batch("acme", Append(record(f"{n}-a")), Append(record(f"{n}-b"))))
        everything, end = await tail(store, 20)
        by_threes, last = await tail(store, 20, limit=3)
        assert by_threes == everything
        for cursor in (end, last):
            page = await store.changes(cursor)
            assert page.records == ()
            assert (await store.changes(page.cursor)).records == ()
        page = await store.changes(None, limit=7)
        for _ in range(2):  # a cursor can be used again
            assert (await store.changes(page.cursor, limit=5)).records == tuple(everything[7:12])

    async def test_the_cursor_end_is_the_current_end(self, store: Store) -> None:
        empty = await store.changes("end")
        assert empty.records == ()
        await store.commit(batch("acme", Append(record("1"))))
        found, _ = await tail(store, 1, after=empty.cursor)
        assert [one.entity_id for one in found] == ["1"]
        end = await store.changes("end")
        assert end.records == ()
        await store.commit(batch("acme", Append(record("2"))))
        found, _ = await tail(store, 1, after=end.cursor)
        assert [one.entity_id for one in found] == ["2"]

    async def test_the_start_of_an_empty_journal_is_a_valid_cursor(self, store: Store) -> None:
        page = await store.changes(None)
        assert page.records == ()
        await store.commit(batch("acme", Append(record("1"))))
        found, _ = await tail(store, 1, after=page.cursor)
        assert [one.entity_id for one in found] == ["1"]

    @pytest.mark.parametrize(
        "cursor", ["", " ", "nonsense", "-1", "1.5", "None", "END", "' OR 1=1 --", "é", "9" * 100, "\x00"]
    )
    async def test_an_invalid_journal_cursor_is_refused(self, store: Store, cursor: str) -> None:
        with pytest.raises(InvalidInput):
            await store.changes(cursor)

    async def test_a_cursor_past_the_end_is_gone(self, backend: Backend, store: Store) -> None:
        """As after the restore of an older copy: followers must read everything again."""
        newer = await backend.open(backend.new_url())
        try:
            await newer.prepare(COLLECTIONS)
            for name in ("acme", "other", None):
                await newer.commit(batch("acme", *(Append(record(f"{n}", name)) for n in range(5))))
            await tail(newer, 15)
            end = (await newer.changes("end")).cursor
        finally:
            await newer.close()
        await store.commit(batch("acme", Append(record("1"))))
        await tail(store, 1)
        for tenant in (None, "acme"):
            with pytest.raises(Gone):
                await store.changes(end, tenant=tenant)
        assert (await store.changes("end")).records == ()

    async def test_each_tenant_reads_its_own_part_of_the_journal(self, store: Store) -> None:
        names = ["acme", "other", None]
        for n in range(30):
            name = names[n % 3]
            await store.commit(batch("acme", Append(record(f"{n}", name))))
        for name in ("acme", "other"):
            found, cursor = await tail(store, 10, tenant=name, limit=4)
            assert [(one.entity_id, one.tenant) for one in found] == [
                (f"{n}", name) for n in range(30) if names[n % 3] == name
            ]
            assert (await store.changes(cursor, tenant=name)).records == ()
        assert (await store.changes(None, tenant="nobody")).records == ()
        everything, _ = await tail(store, 30)
        assert sorted(int(one.entity_id) for one in everything) == list(range(30))
        for name in names:  # the platform's records as well
            assert [one.entity_id for one in everything if one.tenant == name] == [
                f"{n}" for n in range(30) if names[n % 3] == name
            ]

    @pytest.mark.parametrize("seed", [1, 2])
    async def test_followers_miss_nothing_and_see_nothing_twice_while_many_write(self, store: Store, seed: int) -> None:
        """Small batches race large ones, and some fail. Followers begin at the start, at the end and in the middle."""
        writers, rounds = 8, 15
        await store.commit(batch(None, Create("shared", "lock", shared())))
        committed: dict[str, list[str]] = defaultdict(list)
        sequences: dict[str, int] = {}
        done = asyncio.Event()

        async def write(writer: int) -> None:
            randoms = random.Random(1_000 * seed + writer)
            tenant = f"tenant-{writer % 2}"
            for n in range(rounds):
                size = randoms.choice([1, 1, 2, 20])
                names = [f"{writer}/{n}/{k}" for k in range(size)]
                operations = [Append(record(name, tenant)) for name in names]
                fails = randoms.random() < 0.2
                check = Check("shared", "lock", 0) if fails else Put("items", f"{writer}", item(f"{n}"))
                try:
                    answer = await store.commit(batch(tenant, *operations, check))
                except Conflict:
                    assert fails
                    continue
                assert answer.sequence is not None
                sequences[names[-1]] = answer.sequence
                committed[tenant] += names

        async def follow(tenant: str | None, limit: int, start: str | None) -> list[Record]:
            seen: list[Record] = []
            cursor = start
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    wanted = [name for t, names in committed.items() if tenant in (None, t) for name in names]
                    if done.is_set() and len(seen) >= len(wanted):
                        break
                    page = await store.changes(cursor, tenant=tenant, limit=limit)
                    seen += page.records
                    cursor = page.cursor
                    await asyncio.sleep(0)
            return seen

        async with asyncio.TaskGroup() as tasks:
            followers = [
                (tenant, tasks.create_task(follow(tenant, limit, None)))
                for tenant, limit in ((None, 1000), (None, 7), ("tenant-0", 5), ("tenant-1", 1000))
            ]
            await asyncio.gather(*(write(n) for n in range(writers)))
            done.set()
        assert sum(map(len, committed.values())) > 200
        for tenant, follower in followers:
            seen = follower.result()
            expected = [name for t, names in committed.items() if tenant in (None, t) for name in names]
            for name in committed if tenant is None else [tenant]:
                order = [one.sequence for one in seen if one.tenant == name]
                assert order == sorted(set(order)), "out of order, or twice"
            assert sorted(one.entity_id for one in seen) == sorted(expected)
            for writer in range(writers):  # each writer awaits its commits, so its records are in its own order
                own = [name for name in expected if name.startswith(f"{writer}/")]
                assert [one.entity_id for one in seen if one.entity_id.startswith(f"{writer}/")] == own
            for one in seen:
                assert sequences.get(one.entity_id, one.sequence) == one.sequence

    async def test_deleting_a_document_keeps_its_journal_records(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "x", item()), Append(record("x"), 0)))
        await store.commit(batch("acme", Delete("items", "x"), Append(record("x", action="delete"), 0)))
        found, _ = await tail(store, 2)
        assert [one.action for one in found] == ["create", "delete"]
