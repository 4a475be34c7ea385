"""The journal's raw rows: what sealing, verification and searches read, and how records are redacted and dropped."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ...entities import Document
from ...errors import Gone, InvalidInput, NotFound
from ...storage.port import (
    MAX_CHANGES_PAGE,
    WHOLE_JOURNAL,
    Append,
    Create,
    Delete,
    JournalFilter,
    JournalRow,
    Record,
    Store,
)
from ...storage.tagged_json import loads, quick_dumps
from .backend import Backend, StorageSuite, examples
from .journal import tail
from .reopening import prepared
from .samples import HOSTILE_NAMES, NOW, batch, documents, item, record

SALT = bytes(range(16))
TENANTS = ("acme", "beta", None)
ACTORS = ("user:ada", "key:k'\"", "é")
ACTIONS = ("create", "deny")
NAMES = ("items", "samples")
REQUESTS = ("request-1", "request-2", "R")


def row_of(record: Record) -> JournalRow:
    """The row of a record, as every store returns it."""

    def text(value: Document | None) -> str | None:
        return None if value is None else quick_dumps(value)

    return (
        record.sequence,
        record.id,
        record.tenant,
        record.at_us,
        record.actor,
        record.request_id,
        record.action,
        record.collection,
        record.entity_id,
        record.version,
        text(record.before),
        text(record.after),
        record.salt,
        text(record.claims),
        record.rules,
    )


async def all_rows(
    store: Store, where: JournalFilter = WHOLE_JOURNAL, *, after: str | None = None, limit: int = MAX_CHANGES_PAGE
) -> list[JournalRow]:
    """The rows of all pages."""
    found: list[JournalRow] = []
    while True:
        page = await store.rows(after, where, limit)
        assert len(page.rows) <= limit
        found += page.rows
        if page.cursor == after:
            return found
        after = page.cursor


def own_part(rows: Sequence[JournalRow], tenant: str | None) -> list[JournalRow]:
    return [row for row in rows if row[2] == tenant]


async def filled(store: Store, count: int) -> list[Record]:
    """Append records of three tenants whose fields take turns, and return them as the store has them."""
    combinations = itertools.cycle(itertools.product(ACTIONS, REQUESTS, ACTORS, NAMES))
    for number, (action, request, actor, name) in zip(range(count), combinations, strict=False):
        one = record(
            f"e{number % 5}",
            TENANTS[number % 3],
            id=f"r{number}",
            at_us=NOW + (number * 7) % 11,  # not in the order of the sequences
            actor=actor,
            action=action,
            request_id=request,
            collection=name,
            after={"n": number},
            salt=SALT,
        )
        await store.commit(batch("acme", Append(one)))
    found, _ = await tail(store, count)
    return found


filters = st.builds(
    JournalFilter,
    tenant=st.none() | st.sampled_from(["acme", "beta", "nobody"]),
    actor=st.none() | st.sampled_from([*ACTORS, "nobody"]),
    action=st.none() | st.sampled_from(ACTIONS),
    collection=st.none() | st.sampled_from(NAMES),
    entity_id=st.none() | st.sampled_from(["e0", "e3", "E0"]),
    request_id=st.none() | st.sampled_from(REQUESTS),
    since_us=st.none() | st.integers(NOW - 1, NOW + 11),
    until_us=st.none() | st.integers(NOW - 1, NOW + 11),
)


class TestJournalRows(StorageSuite):
    async def test_a_row_has_every_field_of_its_record(self, store: Store) -> None:
        given = [
            record("bare", None),
            record("full", claims={"roles": ["a", "é"], "$": 1}, rules="r7", salt=SALT, version=3, after={"a": 1.5}),
            record("redacted", salt=bytes(range(162)), before={"$bytes": "x"}, after={"blob": b"\x00\xff"}),
            *(record(name, name, id=name, actor=name, rules=name, salt=SALT) for name in HOSTILE_NAMES[:20]),
        ]
        await store.commit(batch("acme", *(Append(one) for one in given)))
        records, _ = await tail(store, len(given))
        assert {one.id: structs.replace(one, sequence=0) for one in records} == {one.id: one for one in given}
        rows = await all_rows(store)
        assert {row[1]: tuple(row) for row in rows} == {one.id: row_of(one) for one in records}
        assert all(type(row[12]) is bytes for row in rows)

    @examples(2)
    @given(before=st.none() | documents, after=st.none() | documents, claims=st.none() | documents)
    async def test_the_texts_of_a_row_are_the_same_on_every_store(
        self, store: Store, before: Document | None, after: Document | None, claims: Document | None
    ) -> None:
        cursor = (await store.changes("end")).cursor
        await store.commit(batch("acme", Append(record(before=before, after=after, claims=claims, salt=SALT))))
        await tail(store, 1, after=cursor)
        (row,) = await all_rows(store, after=cursor)
        for value, text in ((before, row[10]), (after, row[11]), (claims, row[13])):
            assert text == (None if value is None else quick_dumps(value))
            assert text is None or quick_dumps(loads(text)) == text

    async def test_pages_of_rows_join_to_the_whole_journal(self, store: Store) -> None:
        records = await filled(store, 25)
        rows = await all_rows(store)
        for tenant in TENANTS:
            assert own_part(rows, tenant) == [row_of(one) for one in records if one.tenant == tenant]
        for limit in (1, 3, 25):
            paged = await all_rows(store, limit=limit)
            assert [own_part(paged, tenant) for tenant in TENANTS] == [own_part(rows, tenant) for tenant in TENANTS]
        end = (await store.changes("end")).cursor
        await store.commit(batch("acme", Append(record("later", salt=SALT))))
        await tail(store, 1, after=end)
        assert [row[8] for row in await all_rows(store, after=end)] == ["later"]

    @examples(3)
    @given(where=filters, platform=st.booleans(), limit=st.sampled_from([2, 7, 100]))
    async def test_a_filter_finds_what_it_matches(
        self, store: Store, where: JournalFilter, platform: bool, limit: int
    ) -> None:
        if not await all_rows(store):
            await filled(store, 60)
        where = structs.replace(where, platform=platform and where.tenant is None)
        everything = await all_rows(store)
        found = await all_rows(store, where, limit=limit)
        for tenant in TENANTS:
            assert own_part(found, tenant) == [row for row in own_part(everything, tenant) if where.matches(row)]

    @pytest.mark.parametrize("tenant", ["acme", None])
    async def test_sequences_bound_the_rows_of_one_tenant(self, store: Store, tenant: str | None) -> None:
        records = [one for one in await filled(store, 30) if one.tenant == tenant]
        sequences = [one.sequence for one in records]
        for first, last in ((0, 9), (3, 5), (4, 4)):
            where = JournalFilter(
                tenant=tenant,
                platform=tenant is None,
                after_sequence=sequences[first],
                through_sequence=sequences[last],
            )
            assert [row[0] for row in await all_rows(store, where, limit=2)] == sequences[first + 1 : last + 1]

    async def test_a_reader_close_behind_the_writers_reads_what_is_stored(self, backend: Backend) -> None:
        """As sealing does. A store may answer it from memory; failed batches, and another process, must not matter."""
        url = backend.new_url()
        store = await prepared(backend, url)
        other = await prepared(backend, url) if store.capabilities.multi_process else store
        try:
            cursor = (await store.rows()).cursor
            followed: list[JournalRow] = []
            count = 0
            for number in range(12):
                names = [f"{number}-{n}" for n in range(3)]
                writing = [
                    store.commit(batch("acme", Append(record(name, salt=SALT, after={"n": 1})))) for name in names
                ]
                failing = batch("acme", Append(record("fails")), Create("items", "x", item()), Delete("items", "y"))
                answers = await asyncio.gather(*writing, store.commit(failing), return_exceptions=True)
                assert isinstance(answers[-1], NotFound)
                if number % 3 == 1:
                    await other.commit(batch("acme", Append(record(f"{number}-other", salt=SALT)), now_us=NOW + 1))
                    count += 1
                count += len(names)
                await tail(store, count)
                while (page := await store.rows(cursor, limit=2)).cursor != cursor:
                    followed += page.rows
                    cursor = page.cursor
            assert [tuple(row) for row in followed] == [tuple(row) for row in await all_rows(other)]
            assert len(followed) == count
        finally:
            if other is not store:
                await other.close()
            await store.close()

    async def test_rows_refuse_cursors_as_changes_do(self, backend: Backend, store: Store) -> None:
        for cursor in ("", "nonsense", "-1", "9" * 100, "\x00"):
            with pytest.raises(InvalidInput):
                await store.rows(cursor)
        newer = await prepared(backend, backend.new_url())
        try:
            await filled(newer, 9)
            end = (await newer.changes("end")).cursor
        finally:
            await newer.close()
        await store.commit(batch("acme", Append(record("1"))))
        await tail(store, 1)
        for where in (WHOLE_JOURNAL, JournalFilter(tenant="acme"), JournalFilter(actor="user:ada")):
            with pytest.raises(Gone):
                await store.rows(end, where)


REDACTED: dict[str, Any] = {
    "actor": "",
    "entity_id": "",
    "before": None,
    "after": {"redacted": {"by": "user:ada", "reason": "asked"}},
    "salt": b"\x01" * 162,
    "claims": None,
}


class Life:
    """A new store that is closed and opened again in between, if it is persistent."""

    store: Store

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._url = backend.new_url()

    async def __aenter__(self) -> Life:
        self.store = await prepared(self._backend, self._url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.store.close()

    async def stores(self) -> AsyncIterator[Store]:
        """The store, and the store after it was opened again."""
        yield self.store
        if self.store.capabilities.persistent:
            await self.store.close()
            self.store = await prepared(self._backend, self._url)
            yield self.store


class TestJournalUpkeep:
    async def test_a_rewrite_replaces_what_redaction_replaces_and_nothing_else(self, backend: Backend) -> None:
        async with Life(backend) as life:
            store = life.store
            records = await filled(store, 12)
            redacted = {
                one.id: structs.replace(one, **REDACTED) for one in records if one.id in ("r1", "r2", "r7", "r11")
            }
            # what a rewrite must leave alone is different in the rows that it is given
            given = [
                row_of(structs.replace(one, request_id="x", action="x", rules="x", version=9))
                for one in redacted.values()
            ]
            absent = row_of(structs.replace(records[0], id="no such id", **REDACTED))
            assert await store.rewrite([*given, absent]) == len(given)
            assert await store.rewrite([]) == 0
            expected = {one.id: redacted.get(one.id, one) for one in records}
            async for current in life.stores():
                rows = await all_rows(current)
                assert {row[1]: tuple(row) for row in rows} == {id: row_of(one) for id, one in expected.items()}
                assert {one.id: one for one in (await tail(current, 12))[0]} == expected
            found = await all_rows(life.store, JournalFilter(entity_id="e1"))
            assert {row[1] for row in found} == {"r6"}, "a redacted value is not found any more"
            assert await life.store.rewrite(given) == len(given), "a repeated call finds the same rows"

    @pytest.mark.parametrize("tenant", ["acme", None])
    async def test_dropped_rows_are_gone_and_all_others_stay(self, backend: Backend, tenant: str | None) -> None:
        async with Life(backend) as life:
            store = life.store
            records = await filled(store, 30)
            own = [one.sequence for one in records if one.tenant == tenant]
            assert await store.drop("nobody", own[-1]) == 0
            assert await store.drop(tenant, own[3]) == 4
            assert await store.drop(tenant, own[3]) == 0
            assert await store.drop(tenant, own[5]) == 2
            kept = [one for one in records if one.tenant != tenant or one.sequence > own[5]]
            async for current in life.stores():
                rows = await all_rows(current)
                for name in TENANTS:
                    assert own_part(rows, name) == [row_of(one) for one in kept if one.tenant == name]
            end = (await life.store.changes("end")).cursor
            await life.store.commit(batch("acme", Append(record("new", tenant, salt=SALT))))
            (new,), _ = await tail(life.store, 1, after=end)
            assert new.sequence > own[-1]

    async def test_a_cursor_from_before_dropped_records_is_gone(self, backend: Backend) -> None:
        async with Life(backend) as life:
            store = life.store
            start = (await store.changes("end")).cursor
            records = await filled(store, 30)
            (early,), early_cursor = await tail(store, 1, tenant="acme", limit=1)
            own = [one.sequence for one in records if one.tenant == "acme"]
            assert early.sequence == own[0]
            after_all = (await store.changes("end")).cursor
            assert await store.drop("acme", own[4]) == 5
            async for current in life.stores():
                for cursor in (start, early_cursor):
                    with pytest.raises(Gone):
                        await current.changes(cursor, tenant="acme")
                    with pytest.raises(Gone):
                        await current.changes(cursor)
                # records of others are all there
                assert len((await tail(current, 10, after=start, tenant="beta"))[0]) == 10
                # from the beginning, and after the dropped records, nothing is missed
                assert [one.sequence for one in (await tail(current, 5, tenant="acme"))[0]] == own[5:]
                assert (await current.changes(after_all, tenant="acme")).records == ()
                assert (await current.changes(after_all)).records == ()
                # sealing and searches go on
                assert len(await all_rows(current, after=start)) == 25

    async def test_a_tenants_whole_journal_can_be_dropped(self, backend: Backend) -> None:
        async with Life(backend) as life:
            store = life.store
            count = MAX_CHANGES_PAGE + 200
            for begin in range(0, count, 300):
                names = [f"{n}" for n in range(begin, min(begin + 300, count))]
                await store.commit(batch("acme", *(Append(record(name, salt=SALT)) for name in names)))
            await store.commit(batch("beta", Append(record("other", "beta", salt=SALT))))
            found, cursor = await tail(store, count, tenant="acme")
            assert await store.drop("acme", found[-1].sequence + 1_000_000) == count
            assert [row[8] for row in await all_rows(store)] == ["other"]
            assert (await store.changes(cursor, tenant="acme")).records == ()
            await store.commit(batch("acme", Append(record("next", salt=SALT))))
            (found_next,), _ = await tail(store, 1, after=cursor, tenant="acme")
            assert found_next.sequence > found[-1].sequence
