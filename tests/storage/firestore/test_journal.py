"""The journal in Firestore beyond the suite: searches by index, records of older versions, redaction, dropped parts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.context import new_salt
from strongroom.entities import INT64_MAX
from strongroom.errors import Gone, TooLarge, Unavailable
from strongroom.storage import tagged_json
from strongroom.storage.firestore import journal_upkeep
from strongroom.storage.firestore.client import CommitRequest
from strongroom.storage.firestore.journal import shard_of
from strongroom.storage.firestore.journal_documents import record_name
from strongroom.storage.firestore.paths import HEADS, JOURNAL, JOURNAL_PARTS
from strongroom.storage.firestore.schema import firestore_indexes
from strongroom.storage.firestore.search_fields import (
    AHEAD_US,
    LENGTHS,
    MAX_VALUES,
    PERIODS,
    REQUEST,
    needs_search_fields,
    periods_of,
    put_search_fields,
)
from strongroom.storage.firestore.store import FirestoreStore
from strongroom.storage.firestore.values import DocumentPb
from strongroom.storage.port import (
    WHOLE_JOURNAL,
    Append,
    JournalFilter,
    JournalRow,
    Put,
    Record,
    Store,
)
from strongroom.testing.storage.samples import COLLECTIONS, NOW, batch, item, record
from tests.helpers.servers import firestore

Write: Any = type(CommitRequest().writes.add())
HOUR = 3_600_000_000
LARGE = {f"k{n}": random.Random(n).randbytes(30_000) for n in range(45)}
"""More than one further document holds, compressed."""


@pytest.fixture
def new_url(request: pytest.FixtureRequest) -> Callable[[], str]:
    return firestore.urls(firestore.start(request))


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
async def store(new_url: Callable[[], str]) -> AsyncIterator[FirestoreStore]:
    async with opened(new_url()) as store:
        yield store


async def rows_of(store: Store, where: JournalFilter = WHOLE_JOURNAL, limit: int = 1000) -> list[JournalRow]:
    """All rows that match, page by page."""
    found: list[JournalRow] = []
    cursor = None
    while True:
        page = await store.rows(cursor, where, limit)
        assert len(page.rows) <= limit
        found += page.rows
        if page.cursor == cursor:
            return found
        cursor = page.cursor


async def stored(store: FirestoreStore, collection: str, name: str) -> Any:
    return await store.wire.get(store.paths.internal(collection, name))


# --- Searches -------------------------------------------------------------------------------------------------

_times = st.integers(-10, 40 << 46) | st.sampled_from([0, NOW, INT64_MAX]) | st.integers(NOW - HOUR, NOW + 3 * HOUR)


@given(at=_times, since=st.none() | _times, until=st.none() | _times, skew=st.integers(-AHEAD_US, AHEAD_US))
def test_the_periods_of_a_search_find_every_record_of_its_time(
    at: int, since: int | None, until: int | None, skew: int
) -> None:
    document = DocumentPb()
    put_search_fields(document.fields, at, "request-1", NOW - skew)
    where = JournalFilter(since_us=since, until_us=until)
    periods = periods_of(where, NOW)
    if periods is None:
        assert not needs_search_fields(where)
        return
    name, values = periods
    assert len(values) == len(set(values)) <= MAX_VALUES
    if where.matches((1, "r", None, at, "", "", "", "", "", None, None, None, b"", None, None)):
        assert document.fields[name].integer_value in values


def test_the_periods_of_an_hour_and_of_a_year_reach_little_beyond() -> None:
    for span in (HOUR, 24 * HOUR, 24 * 365 * HOUR):
        where = JournalFilter(since_us=NOW - span, until_us=NOW)
        found = periods_of(where, NOW)
        assert found is not None
        length = 1 << LENGTHS[PERIODS.index(found[0])]
        assert length * sum(value >= 0 for value in found[1]) <= 2 * span + length


def test_the_index_file_has_what_searches_of_the_journal_need() -> None:
    overrides = {
        one["fieldPath"]: one["indexes"]
        for one in firestore_indexes([])["fieldOverrides"]
        if one["collectionGroup"] == JOURNAL
    }
    for name in (REQUEST, *PERIODS):
        assert overrides[name] == [{"order": "ASCENDING", "queryScope": "COLLECTION"}]
    for name in ("salt", "claims", "rules", "at_us", "request_id", "before", "after"):
        assert overrides[name] == []
    for name in ("tenant", "actor", "action", "collection", "entity_id"):
        assert name not in overrides, "it has Firestore's own index"


def _some_records() -> list[Record]:
    randoms = random.Random(7)
    return [
        record(
            randoms.choice(["a", "b", "c"]),
            randoms.choice(["acme", "other", None]),
            id=f"r-{n}",
            at_us=randoms.choice([NOW - n * HOUR, NOW + n * HOUR, NOW, 0, INT64_MAX]),
            actor=randoms.choice(["user:ada", "key:k"]),
            action=randoms.choice(["create", "update"]),
            collection=randoms.choice(["items", "shared"]),
            request_id=f"request-{randoms.randrange(8)}",
            salt=new_salt(),
        )
        for n in range(90)
    ]


_FILTERS = [
    JournalFilter(tenant="acme"),
    JournalFilter(platform=True),
    JournalFilter(actor="key:k"),
    JournalFilter(tenant="other", action="update", collection="items", entity_id="b"),
    JournalFilter(request_id="request-3"),
    JournalFilter(tenant="acme", request_id="request-3"),
    JournalFilter(since_us=NOW),
    JournalFilter(until_us=NOW),
    JournalFilter(since_us=NOW - 9 * HOUR, until_us=NOW + 11 * HOUR),
    JournalFilter(platform=True, since_us=NOW - 40 * HOUR, until_us=NOW, actor="user:ada"),
    JournalFilter(since_us=NOW, until_us=NOW),
    JournalFilter(tenant="nobody"),
]


@pytest.mark.parametrize("emulated", [True, False])
async def test_each_filter_finds_what_matches_and_reads_little_else(store: FirestoreStore, emulated: bool) -> None:
    """Against the emulator a page reads its whole shard, because its queries lag; against Firestore what matches."""
    for one in _some_records():
        await store.commit(batch("acme", Append(one)))
    everything = await rows_of(store)
    assert len(everything) == 90
    if not emulated:
        store.wire.emulator = None
    for where in _FILTERS:
        expected = [row for row in everything if where.matches(row)]
        assert [row[1] for row in await rows_of(store, where, 7)] == [row[1] for row in expected], where
        before = store.wire.billed["reads"]
        assert await rows_of(store, where) == expected
        if not emulated and where.since_us is None and where.until_us is None:
            # Twice the heads, a query that finds nothing in each shard, and the records.
            assert store.wire.billed["reads"] - before <= len(expected) + 2 * 17, where
    for bounds in ((3, None), (None, 500), (100, 600), (0, INT64_MAX), (10_000, None)):
        where = JournalFilter(tenant="acme", after_sequence=bounds[0], through_sequence=bounds[1])
        expected = [row for row in everything if where.matches(row)]
        assert [row[0] for row in await rows_of(store, where, 5)] == [row[0] for row in expected]


async def test_a_page_of_a_rare_match_ends_before_it_has_read_everything(
    store: FirestoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strongroom.storage.firestore.journal.MAX_EXAMINED", 20)
    for n in range(4):
        await store.commit(batch("acme", *(Append(record(f"{n}-{m}", id=f"{n}-{m}")) for m in range(15))))
    where = JournalFilter(entity_id="3-14")
    page = await store.rows(None, where, 10)
    assert page.rows == []
    assert [row[8] for row in await rows_of(store, where, 10)] == ["3-14"]


# --- Records of older versions --------------------------------------------------------------------------------


async def _as_an_older_version(store: FirestoreStore, tenant: str, numbers: range) -> None:
    """Leave these records and the tenant's head as a version without salts and searches wrote them."""
    shard = shard_of(tenant)
    for number in numbers:
        document = await stored(store, JOURNAL, record_name(shard, number))
        for name in ("salt", "claims", "rules", REQUEST, *PERIODS):
            document.fields.pop(name, None)
        for side in ("before", "after"):
            text = document.fields[side].string_value
            document.fields[side].string_value = tagged_json.dumps(tagged_json.loads(text))
        await store.wire.commit([Write(update=document)])
    head = await stored(store, HEADS, f"{shard:02}")
    del head.fields["searchable"]
    await store.wire.commit([Write(update=head)])


async def test_records_of_an_older_version_are_read_and_found_like_new_ones(new_url: Callable[[], str]) -> None:
    url = new_url()
    async with opened(url) as store:
        for n in range(6):
            after = {"n": n, "half": 1e16}
            await store.commit(batch("acme", Append(record(f"{n}", request_id=f"q-{n}", at_us=NOW + n, after=after))))
        before = await rows_of(store)
        await _as_an_older_version(store, "acme", range(1, 7))
    async with opened(url) as store:
        assert await rows_of(store) == before
        assert {row[12] for row in before} == {b""}
        text = json.dumps({"n": 0, "half": 1e16}, separators=(",", ":"))
        assert before[0][11] == tagged_json.quick_dumps({"n": 0, "half": 1e16}) != text
        for n in range(6, 9):
            later = record(f"{n}", request_id=f"q-{n}", at_us=NOW + n, salt=new_salt())
            await store.commit(batch("acme", Append(later)))
        store.wire.emulator = None
        for where, expected in (
            (JournalFilter(request_id="q-2"), "2"),
            (JournalFilter(tenant="acme", request_id="q-7"), "7"),
            (JournalFilter(since_us=NOW + 4, until_us=NOW + 8), "4567"),
            (JournalFilter(tenant="acme", actor="user:ada", since_us=NOW + 5), "5678"),
        ):
            assert "".join(row[8] for row in await rows_of(store, where)) == expected
        head = await stored(store, HEADS, f"{shard_of('acme'):02}")
        assert head.fields["searchable"].integer_value == 7


# --- Redaction ------------------------------------------------------------------------------------------------


async def test_redaction_removes_the_further_documents_and_keeps_order_and_version(store: FirestoreStore) -> None:
    given = record("big", after=LARGE, before={"a": 1}, salt=new_salt(), claims={"sub": "ada"})
    await store.commit(batch("acme", Append(record("1", id="1"))))
    await store.commit(batch("acme", Put("items", "x", item()), Append(given, of=0)))
    await store.commit(batch("other", Append(record("3", "other", id="3"))))
    assert shard_of("other") != shard_of("acme"), "their order is that of the commits' times"
    rows = await rows_of(store)
    name = record_name(shard_of("acme"), 2)
    parts = [store.paths.internal(JOURNAL_PARTS, f"{name}-{n}") for n in (1, 2)]
    assert await store.wire.get(parts[0]) is not None
    old = rows[1]
    redacted = (*old[:4], "", *old[5:8], "", old[9], None, '{"$$redacted":{"by":"ada"}}', b"\1" * 162, None, old[14])
    assert await store.rewrite([redacted]) == 1
    assert await rows_of(store) == [rows[0], redacted, rows[2]]
    assert [await store.wire.get(part) for part in parts] == [None, None]
    read = (await store.changes(None)).records[1]
    assert (read.after, read.before, read.claims) == ({"$redacted": {"by": "ada"}}, None, None)
    # A large one may also stay large.
    large = (*old[:10], None, tagged_json.quick_dumps(LARGE), b"\2" * 162, None, old[14])
    assert await store.rewrite([large]) == 1
    assert (await rows_of(store))[1] == large


async def test_redaction_finds_rows_by_sequence_and_id_and_is_all_or_nothing(store: FirestoreStore) -> None:
    await store.commit(batch("acme", *(Append(record(f"{n}", id=f"{n}", after={"n": n})) for n in range(3))))
    rows = await rows_of(store)
    strange = [(rows[0][0], "another", *rows[0][2:]), (10**6, "0", *rows[0][2:]), (0, "0", *rows[0][2:])]
    assert await store.rewrite(strange) == 0
    assert await store.rewrite([]) == 0
    wiped = [(*row[:10], None, None, b"\1" * 162, None, None) for row in rows]
    assert await store.rewrite([*wiped[:2], *strange[1:]]) == 2
    assert await rows_of(store) == [*wiped[:2], rows[2]]
    big = '"' + "x" * 1_000_000 + '"'
    # Random, so that compression does not help.
    noise = [tagged_json.quick_dumps(random.Random(n).randbytes(1_500_000)) for n in range(3)]
    too_large = [(*row[:10], big, text, *row[12:]) for row, text in zip(rows, noise, strict=True)]
    with pytest.raises(TooLarge, match="rewrite fewer at once"):
        await store.rewrite(too_large)
    assert await rows_of(store) == [*wiped[:2], rows[2]]


# --- Dropped parts --------------------------------------------------------------------------------------------


async def _filled(store: FirestoreStore) -> None:
    """Ten records of each of three owners in one part of the journal, one of them large."""
    assert shard_of("other") == shard_of(None) != shard_of("acme")
    for n in range(10):
        for tenant in ("other", None, "acme"):
            after = LARGE if n == 2 and tenant == "other" else {"n": n}
            await store.commit(batch("acme", Append(record(f"{n}", tenant, id=f"{tenant}-{n}", after=after))))


async def test_dropped_records_are_gone_with_their_further_documents(new_url: Callable[[], str]) -> None:
    url = new_url()
    async with opened(url) as store, opened(url) as second:
        await _filled(store)
        end = (await second.changes("end")).cursor
        early = {name: (await second.changes(None, tenant=name, limit=2)).cursor for name in ("other", "acme")}
        both = (await second.changes(None, limit=2)).cursor
        middle = (await second.changes(None, tenant="other", limit=6)).cursor
        mine = await rows_of(store, JournalFilter(tenant="other"))
        assert await store.drop("other", mine[5][0] + 1) == 6
        for node in (store, second):
            assert await rows_of(node, JournalFilter(tenant="other")) == mine[6:]
            assert len(await rows_of(node)) == 24
            for cursor, tenant in ((both, None), (early["other"], "other")):
                with pytest.raises(Gone, match="were dropped"):
                    await node.changes(cursor, tenant=tenant)
            assert len((await node.changes(early["acme"], tenant="acme")).records) == 8
            assert [r.entity_id for r in (await node.changes(middle, tenant="other")).records] == ["6", "7", "8", "9"]
            assert [r.entity_id for r in (await node.changes(None, tenant="other")).records] == ["6", "7", "8", "9"]
            assert (await node.changes(end)).records == ()
        names = [store.paths.internal(JOURNAL_PARTS, f"{record_name(0, n)}-1") for n in range(1, 21)]
        assert not any((await store.wire.batch_get(names))[0].values())
        assert await store.drop("other", mine[5][0]) == 0
        assert await store.drop("nobody", INT64_MAX) == 0
        await store.commit(batch("other", Append(record("later", "other"))))
        assert [r.entity_id for r in (await second.changes(end)).records] == ["later"]
        assert await second.drop("other", INT64_MAX) == 5
        assert await rows_of(store, JournalFilter(tenant="other")) == []
        await store.commit(batch("other", Append(record("last", "other"))))
        assert [row[8] for row in await rows_of(second, JournalFilter(tenant="other"))] == ["last"]
        assert await store.drop(None, INT64_MAX) == 10


async def test_an_interrupted_drop_is_repeated_and_readers_know_at_once(
    store: FirestoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _filled(store)
    start = (await store.changes(None, limit=1)).cursor
    monkeypatch.setattr(journal_upkeep, "DROPPED_AT_ONCE", 4)
    upkeep, calls = store._upkeep, 0
    removed = upkeep._removed

    async def interrupted(names: list[str]) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise Unavailable("the process was killed")
        await removed(names)

    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "_removed", interrupted)
        with pytest.raises(Unavailable):
            await store.drop("other", INT64_MAX)
    left = await rows_of(store, JournalFilter(tenant="other"))
    assert [row[8] for row in left] == ["4", "5", "6", "7", "8", "9"], "the oldest went first"
    with pytest.raises(Gone):
        await store.changes(start)
    assert await store.drop("other", INT64_MAX) == 6
    assert await rows_of(store, JournalFilter(tenant="other")) == []


async def test_a_gap_above_the_dropped_part_is_still_an_error(store: FirestoreStore) -> None:
    await _filled(store)
    await store.drop("acme", (await rows_of(store, JournalFilter(tenant="acme")))[3][0])
    name = store.paths.internal(JOURNAL, record_name(shard_of("acme"), 7))
    await store.wire.commit([Write(delete=name)])
    with pytest.raises(Unavailable, match=f"no record {name.rpartition('/')[2]}"):
        await store.changes(None)
    assert len(await rows_of(store)) == 30 - 4 - 1, "readers of rows find it by the trees"
    before = time.monotonic()
    assert len(await rows_of(store)) == 25
    assert time.monotonic() - before < 1.5, "and do not wait for it again"


async def test_a_commit_beside_a_drop_keeps_the_floor(store: FirestoreStore) -> None:
    """The head is written by both: neither loses what the other wrote."""
    await _filled(store)
    cursor = (await store.changes(None, limit=1)).cursor
    await store.drop("acme", INT64_MAX)
    for n in range(3):
        await store.commit(batch("acme", Append(record(f"later-{n}", id=f"later-{n}"))))
    head = await stored(store, HEADS, f"{shard_of('acme'):02}")
    fields = head.fields
    assert [fields[name].integer_value for name in ("last", "dropped", "searchable")] == [13, 10, 1]
    store._journal.forget_heads()
    with pytest.raises(Gone):
        await store.changes(cursor)
