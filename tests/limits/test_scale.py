"""Many keys: the costs that grow with their number, by counted queries and steps instead of time."""

from __future__ import annotations

import asyncio
import functools
import gc
import hashlib
import json
import pickle
import tracemalloc
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from strongroom import Strongroom
from strongroom.context import Context, system_context, us_from_utc, utc_from_us
from strongroom.entities.query import MAX_LIMIT, Query
from strongroom.errors import AlreadyExists, Conflict
from strongroom.journal.records import change_record
from strongroom.keys import cache as keycache
from strongroom.keys.model import ApiKey
from strongroom.keys.service import KeyFilter
from strongroom.keys.token import generate
from strongroom.keys.transfer import key_file_chunks
from strongroom.keys.transfer import key_file_export as keyexport
from strongroom.keys.transfer.import_plan import Standing
from strongroom.keys.transfer.key_file import KeyRow, render_file
from strongroom.keys.transfer.key_file_chunks import survey
from strongroom.keys.transfer.key_file_export import Exported, export_rows, file_of
from strongroom.keys.transfer.key_file_import import KeyImport
from strongroom.keys.transfer.key_file_parse import parse
from strongroom.keys.transfer.key_file_rows import new_usage, usage_document
from strongroom.limits import tuning
from strongroom.limits.usage_state import UsageState
from strongroom.rules import default_policy
from strongroom.storage.port import Alike, Append, Create, Pack, unwrapped
from strongroom.storage.sqlite.bulk_rows import SqlitePacker
from strongroom.storage.sqlite.store import SqliteStore
from tests.helpers.stores import new_url, opened
from tests.helpers.waiting import PATIENCE_S

START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = datetime.now(UTC).replace(microsecond=0)
NOW_US = us_from_utc(NOW)
SYSTEM = system_context()


def z(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def text(number: int) -> str:
    return "pk_" + hashlib.sha256(b"%d" % number).hexdigest()[:40]


def row(number: int, **fields: Any) -> dict[str, Any]:
    made = {
        "key": text(number),
        "name": f"customer {number % 7} key {number:05d}",
        "token_limit_per_5h": 1_000,
        "expiry_date": "2099-01-01T00:00:00Z",
        "created_at": z(START + timedelta(seconds=number)),
        "last_used": None,
        "total_lifetime_tokens": number,
        "usage_windows": [{"window_start": z(NOW - timedelta(hours=1)), "tokens_used": 5}] if number % 2 else [],
    }
    return {**made, **fields}


def plain_file(folder: Path, keys: int, name: str = "keys.json") -> Path:
    file = folder / name
    file.write_text(json.dumps({"keys": [row(number) for number in range(keys)]}))
    return file


async def imported(room: Strongroom, file: Path, **options: Any) -> KeyImport:
    source = survey(file, NOW_US)
    job = KeyImport(room.database, room.keys.hasher, source.shape, "default", SYSTEM, **options)
    plan = await job.compare(source)
    await job.carry_out(source, plan, update=False)
    assert (await job.check(source, plan, NOW_US, updated=False)).equal
    return job


# --- Lists ------------------------------------------------------------------------------------------------------


LISTS: dict[str, dict[str, Any]] = {
    "all": {},
    "of a tenant": {"tenant": "default"},
    "of a user": {"tenant": "default", "user_id": "u"},
    "of an owner": {"owner": "o"},
    "of an environment": {"environment": "live"},
    "created before": {"created_before": START + timedelta(days=1)},
    "created between": {"tenant": "default", "created_after": START, "created_before": START + timedelta(days=1)},
    "by name": {"name_prefix": "customer"},
    "by name, of a tenant": {"tenant": "default", "name_prefix": "customer"},
    "deleted": {"deleted": True},
}


@pytest.mark.parametrize("name", LISTS)
async def test_a_page_costs_the_same_wherever_it_lies_in_the_list(tmp_path: Path, name: str) -> None:
    """Steps of SQLite's machine: an index serves filter, order and position, or they would grow with the depth."""
    keys, path = 1_500, tmp_path / "store.db"
    async with Strongroom.open(f"sqlite:///{path}") as room:
        await imported(room, plain_file(tmp_path, keys))
        filter = KeyFilter(**{**dict.fromkeys(_FILTERS), "deleted": False, **LISTS[name]})
        with closing(apsw.Connection(str(path))) as connection:
            deleted = "strftime('%Y-%m-%dT%H:%M:%S', created_at, '+1 day') || '.000000Z'"
            connection.execute(
                f"UPDATE api_keys SET user_id = 'u', owner = 'o', deleted_at = {deleted if filter.deleted else 'NULL'}"
            )
            query = filter.query(20).check(ApiKey.__collection__)
            store = unwrapped(room.store)
            assert isinstance(store, SqliteStore)
            pages = store._table("api_keys", None).pages
            costs = []
            for depth in (0, keys - 200):
                found = await room.store.find("api_keys", None, replace(query, limit=max(depth, 1)))
                position = tuple(found[-1][field] for field, _ in query.order) if depth else None
                select, values = pages.find(replace(query, start_after=position))
                costs.append(steps(connection, select.sql, values, 20))
    assert costs[1] < 1.5 * costs[0] + 200, costs


_FILTERS = ("tenant", "user_id", "owner", "environment", "name_prefix", "created_after", "created_before")


def steps(connection: apsw.Connection, sql: str, values: Any, rows: int) -> int:
    """About how many steps a statement takes, to the next ten."""
    count = 0

    def step() -> bool:
        nonlocal count
        count += 10
        return False

    connection.set_progress_handler(step, 10)
    assert len(connection.execute(sql, values).fetchall()) == rows
    connection.set_progress_handler(None)
    return count


async def test_litellm_19477_the_list_of_many_keys_is_a_page_at_a_time(tmp_path: Path) -> None:
    """There, the list of 380,000 keys took the service down. Here a page is one query for one document more."""
    async with opened(new_url("sqlite", tmp_path)) as (room, store):
        await imported(room, plain_file(tmp_path, 700))
        asked: list[int] = []
        find = store.store.find

        async def counted(collection: str, tenant: str | None, query: Any) -> Any:
            found = await find(collection, tenant, query)
            asked.append(len(found))
            return found

        store.store.find = counted  # type: ignore[method-assign]
        seen, cursor = set[str](), None
        while True:
            page = await room.keys.list(limit=100, cursor=cursor)
            seen |= {key.id for key in page.items}
            cursor = page.next_cursor
            if cursor is None:
                break
        assert max(asked) == 101
        assert len(asked) <= 8, "the first page looks at a few keys, to learn how large they are"
        assert len(seen) == 700


# --- Memory -----------------------------------------------------------------------------------------------------


async def test_litellm_42689_unknown_keys_write_nothing_and_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, each invalid key wrote a row until memory ran out."""
    monkeypatch.setattr(keycache, "MAX_UNKNOWN", 50)
    async with opened(new_url("sqlite", tmp_path)) as (room, store):
        await imported(room, plain_file(tmp_path, 10))
        commits = len(store.batches)
        for begin in range(0, 400, 50):
            answers = await asyncio.gather(*(room.keys.verify(generate()) for _ in range(begin, begin + 50)))
            assert {answer.code for answer in answers} == {"NOT_FOUND"}
        assert len(room.keys.cache._unknown) <= 50
        assert not room.ledger.states.known
        assert not [op for batch in store.batches[commits:] for op in batch.operations if _is_of_a_key(op)]


def _is_of_a_key(operation: Any) -> bool:
    return getattr(operation, "collection", "") in ("api_keys", "key_usage")


async def test_the_memory_for_keys_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((keycache, "MAX_CACHED_KEYS"), (tuning, "MAX_USAGE_STATES")):
        monkeypatch.setattr(module, name, 40)
    async with opened(new_url("sqlite", tmp_path)) as (room, _):
        await imported(room, plain_file(tmp_path, 200))
        for number in [*range(200), *range(200)]:
            assert (await room.keys.verify(text(number), cost={"tokens": 1})).valid
        cache = room.keys.cache
        assert max(len(cache._known), len(cache._by_id), len(room.ledger.states.known) - 1) <= 40
        stats = await room.keys.stats(cache._by_id[next(iter(cache._by_id))].id)
        assert stats.count == 2  # what had to go from memory was in the store


async def test_the_metadata_of_keys_in_memory_is_bounded_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keycache, "MAX_LARGE_BYTES", 100_000)
    async with opened(new_url("json-memory", tmp_path)) as (room, _):
        issued = [await room.keys.create(name="k", metadata={"text": str(n) * 5_000}) for n in range(40)]
        for turn in range(2):
            for number, one in enumerate(issued):
                answer = await room.keys.verify(one.text)
                assert (answer.valid, answer.metadata) == (True, {"text": str(number) * 5_000}), turn
        cache = room.keys.cache
        kept = {id(known): known for known in [*cache._by_id.values(), *(found.key for found in cache._known.values())]}
        assert sum(len(known.metadata["text"]) for known in kept.values()) <= 100_000
        assert len(kept) > 5


async def test_keys_with_the_same_limits_share_them_in_memory(tmp_path: Path) -> None:
    async with opened(new_url("sqlite", tmp_path)) as (room, _):
        await imported(room, plain_file(tmp_path, 2))
        one, two = [await room.keys.cache.find(text(number), room.database.now_us()) for number in range(2)]
        assert one is not None
        assert two is not None
        assert one.subjects.compiled_limits is two.subjects.compiled_limits


async def test_opening_a_store_reads_no_keys(tmp_path: Path) -> None:
    """What is read at the start is the same for one key as for many."""
    url, reads = new_url("sqlite", tmp_path), []
    for keys in (1, 300):
        async with opened(url) as (room, _):
            await imported(room, plain_file(tmp_path, keys))
        async with opened(url) as (_, store):
            reads.append([read for read in store.reads if read[1] != "leases"])
    assert reads[0] == reads[1]
    assert not [read for read in reads[1] if read[1] in ("api_keys", "key_usage")]


def peak(file: Path) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        survey(file, NOW_US)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reading_a_file_needs_the_memory_of_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_file_chunks, "CHUNK_BYTES", 64 * 1024)
    small, large = (plain_file(tmp_path, keys, f"{keys}.json") for keys in (500, 5_000))
    assert peak(large) < 1.5 * peak(small) + 5_000 * 64


# --- Files in chunks --------------------------------------------------------------------------------------------

_values = st.none() | st.booleans() | st.integers(-1, 10**19) | st.text(max_size=9) | st.just("2027-02-30T00:00:00Z")
_plain_rows = st.lists(
    st.builds(
        lambda number, odd: row(number, **odd),
        st.integers(0, 12),
        st.dictionaries(st.sampled_from([*row(0), "plan"]), _values, max_size=2),
    ),
    max_size=12,
)


@example(rows=[row(1, plan="gold"), row(2), row(1)], indent=None, size=10_000)
@example(rows=[row(1), row(2), row(1, plan="gold")], indent=None, size=300)
@example(rows=[row(1, name=None), row(1), row(1)], indent=None, size=10_000)
@given(rows=_plain_rows, indent=st.sampled_from([None, 1]), size=st.integers(200, 3_000))
def test_a_file_read_in_chunks_equals_the_whole_file(
    tmp_path: Path, rows: list[dict[str, Any]], indent: int | None, size: int
) -> None:
    same(tmp_path, json.dumps({"keys": rows}, indent=indent).encode(), size)


@given(
    rows=st.dictionaries(
        st.integers(0, 9).map(lambda n: hashlib.sha256(b"%d" % n).hexdigest()) | st.text(max_size=4),
        st.dictionaries(st.sampled_from(["name", "created_at", "usage_count", "x"]), _values, max_size=2).map(
            lambda odd: {
                "name": "n", "user_id": "u", "created_at": "2026-01-01T00:00:00Z", "expires_at": None,
                "last_used": None, "usage_count": 3, **odd,
            }
        ),
        max_size=12,
    ),
    size=st.integers(200, 2_000),
)  # fmt: skip
def test_a_file_of_hashes_read_in_chunks_equals_the_whole_file(tmp_path: Path, rows: dict[str, Any], size: int) -> None:
    same(tmp_path, json.dumps({"keys": rows}).encode(), size)


def same(folder: Path, data: bytes, chunk_bytes: int) -> None:
    file = folder / "keys.json"
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(key_file_chunks, "CHUNK_BYTES", chunk_bytes)
        source = survey(file, NOW_US)
        whole = parse(data, NOW_US)
        assert [one for chunk in source.chunks for one in source.rows(chunk)] == whole.rows
    assert (source.count, source.accepted) == (whole.count, len(whole.rows))
    assert (source.file.refused, source.file.problems, source.file.notes) == (
        whole.refused, whole.problems, whole.notes,
    )  # fmt: skip


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = plain_file(tmp_path, 3)
    source = survey(file, NOW_US)
    file.write_text(file.read_text() + " ")
    with pytest.raises(Conflict, match="was changed while it was read"):
        source.rows(source.chunks[0])


# --- Loading ----------------------------------------------------------------------------------------------------


async def stored(room: Strongroom) -> tuple[list[Any], list[Any], list[Any]]:
    """Keys, usages and journal records, without what differs each time: seals, versions, ids and times of records."""
    keys, usages, cursor = {}, {}, None
    page = await room.database.select(SYSTEM, ApiKey, Query(limit=MAX_LIMIT))
    for key in page.items:
        found = await room.store.get("key_usage", None, key["id"])
        keys[key["id"]] = {n: v for n, v in key.items() if n not in ("sealed", "version", "updated_at", "hash")}
        assert found is not None
        assert found["created_at"] == found["updated_at"]
        usages[key["id"]] = {n: found[n] for n in ("count", "last_used_at", "active_at", "state")}
    records = []
    while (changes := await room.store.changes(cursor)).records:
        cursor = changes.cursor
        for record in changes.records:
            if record.collection == "api_keys":
                after = {n: v for n, v in (record.after or {}).items() if n != "hash"}
                records.append((record.entity_id, record.tenant, record.actor, record.action, record.before, after))
                assert record.version == next(k["version"] for k in page.items if k["id"] == record.entity_id)
    return sorted(keys.items()), sorted(usages.items()), sorted(records, key=lambda r: r[0])


async def test_bulk_loaded_keys_equal_keys_written_one_by_one(tmp_path: Path) -> None:
    file = plain_file(tmp_path, 30)
    async with Strongroom.open(new_url("sqlite", tmp_path, "loaded")) as one:
        assert one.database.loading is not None
        assert (await imported(one, file)).committed == 30
        rules_of_its_own = functools.partial(default_policy)
        async with opened(new_url("sqlite", tmp_path, "written"), policy=rules_of_its_own) as (two, _):
            assert two.database.loading is None, "each key is written by itself"
            await imported(two, file)
            assert await stored(one) == await stored(two)
        for number in range(30):
            assert (await one.keys.verify(text(number), cost={"tokens": 1})).valid


_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
_moments = st.integers(0, 4 * 10**15).map(utc_from_us)
_nested = st.dictionaries(_texts | st.just("$time"), _texts | st.integers(-9, 9) | st.none() | _moments, max_size=2)
_fields: dict[str, st.SearchStrategy[Any]] = {
    "name": _texts,
    "sealed": st.none() | st.binary(max_size=4),
    "user_id": st.none() | _texts,
    "metadata": _nested,
    "limits": st.lists(_nested, max_size=2),
    "expires_at": st.none() | _moments,
    "usage_count": st.integers(0, 2**63 - 1),
    "enabled": st.booleans(),
}
_VARYING = tuple(_fields)


@given(documents=st.lists(st.fixed_dictionaries(_fields), max_size=5), tenant=_texts, created=st.none() | _moments)
def test_documents_packed_together_give_the_same_rows_and_records_as_alone(
    documents: list[dict[str, Any]], tenant: str, created: datetime | None
) -> None:
    collection, context = ApiKey.__collection__, Context("t", "a'c", {}, "r")
    pattern = ApiKey.__codec__.encode(ApiKey(tenant=tenant, name="p", hash="p", display="p")) | {"sealed": b"p"}
    ids = [f"key_{number}" for number in range(len(documents))]
    rows, operations, records = [], list[Create | Append](), []
    for id, document in zip(ids, documents, strict=True):
        rows.append((id, created, *(document[name] for name in _VARYING), id))
        document = {**pattern, **document, "hash": id}
        record = change_record(context, "create", collection, id, None, document)
        records.append(record)
        operations += (Create("api_keys", id, document, created), Append(record, len(operations)))
    of_all = change_record(context, "create", collection, "", None, pattern)
    alike = Alike(
        "api_keys", pattern, (*_VARYING, "hash"), rows, of_all, [r.id for r in records], [r.salt for r in records]
    )
    packer = pickle.loads(pickle.dumps(SqlitePacker([collection])))  # noqa: S301 - our own
    one, other = packer.pack_alike([alike]), packer.pack(operations)
    assert rows_of(one) == rows_of(other)
    assert (one.documents, one.records) == (other.documents, other.records) == (len(rows), len(rows))


def rows_of(pack: Pack) -> list[dict[str, Any]]:
    """The rows that a pack stands for."""
    found = []
    for part in pack.parts:
        width = len(part.columns)
        for begin in range(0, len(part.values), width):
            varied = dict(zip(part.columns, part.values[begin : begin + width], strict=True))
            row = {"updated_at": None, **part.same, **varied} if part.table != "_journal" else {**part.same, **varied}
            after = row.get("after")
            found.append({**row, "after": after.decode() if isinstance(after, bytes) else after, "": part.table})
    return found


@given(st.data())
def test_an_imported_key_has_the_usage_of_its_row(data: st.DataObject) -> None:
    amounts, moments = st.integers(0, 2**40), st.integers(NOW_US - 8 * 3_600_000_000, NOW_US)
    windows = data.draw(st.lists(st.tuples(moments, amounts), max_size=4))
    used = data.draw(st.none() | moments)
    row = KeyRow("keys.0", b"", None, "n", None, None, 1, 0, None, used, 0, data.draw(amounts), tuple(sorted(windows)))
    for shape, one in (("plain", row), ("hashed", replace(row, uses=data.draw(amounts), tokens=0, windows=()))):
        made = usage_document(shape, one, UsageState(), NOW_US)  # type: ignore[arg-type]
        assert new_usage(shape, one, NOW_US) == (made["count"], made["last_used_at"], made["state"])  # type: ignore[arg-type]
        assert made["active_at"] is None


async def test_other_writers_continue_while_an_import_prepares_its_keys(tmp_path: Path) -> None:
    """The store is locked when all of a transaction's keys are there, not while they are awaited."""
    async with Strongroom.open(new_url("sqlite", tmp_path)) as room:
        await imported(room, plain_file(tmp_path, 3))
        store = room.database.loading
        assert store is not None

        async def packs() -> Any:
            await room.keys.create(name="meanwhile")
            yield store.packer().pack([])

        await asyncio.wait_for(store.load(packs(), NOW_US), PATIENCE_S)
        assert len((await room.keys.list()).items) == 4


async def test_a_bulk_load_leaves_the_indexes_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    def indexes() -> list[Any]:
        with closing(apsw.Connection(str(path))) as connection:
            return sorted(connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index'").fetchall())

    async with Strongroom.open(f"sqlite:///{path}") as room:
        before = indexes()
        await imported(room, plain_file(tmp_path, 20))
        assert indexes() == before
        key = (await room.keys.list(limit=1)).items[0]
        with pytest.raises(AlreadyExists):
            await room.database.create(SYSTEM, ApiKey(tenant="t", name="n", hash=key.hash, display="d"))


async def test_a_key_created_during_an_import_is_neither_lost_nor_written_twice(tmp_path: Path) -> None:
    """The load of its transaction is taken back whole; its keys are then written one by one."""
    async with Strongroom.open(new_url("sqlite", tmp_path)) as room:
        source = survey(plain_file(tmp_path, 50), NOW_US)
        job = KeyImport(room.database, room.keys.hasher, "plain", "default", SYSTEM)
        plan = await job.compare(source)
        assert plan.counts == {Standing.NEW: 50}
        (rival,) = [KeyImport(room.database, room.keys.hasher, "plain", "default", SYSTEM)]
        planned = await rival.plan(source.rows(source.chunks[0])[7:9])
        await rival.apply(planned, update=False)
        await job.carry_out(source, plan, update=False)
        assert job.committed == 48
        assert (await job.check(source, plan, NOW_US, updated=False)).equal
        assert len((await room.keys.list(limit=MAX_LIMIT)).items) == 50
        records = [r.entity_id for r in (await room.store.changes(None)).records if r.collection == "api_keys"]
        assert len(records) == len(set(records)) == 50


async def test_an_applications_own_rules_are_evaluated_for_every_key(tmp_path: Path) -> None:
    asked = []

    def policy(request: Any) -> Any:
        if request.collection.name == "api_keys" and request.operation == "create":
            asked.append(request.id)
        return default_policy(request)

    async with Strongroom.open(new_url("sqlite", tmp_path), policy=policy) as room:
        assert room.database.loading is None
        await imported(room, plain_file(tmp_path, 12))
    assert len(set(asked)) == 12


# --- Export -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [3, 1_000])
async def test_keys_of_one_timestamp_are_exported_in_the_order_of_their_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(keyexport, "MAX_HELD", held)
    file = tmp_path / "keys.json"
    rows = [row(number, created_at=f"2026-01-01T00:00:0{number % 3}Z") for number in range(40)]
    file.write_text(json.dumps({"keys": rows}))
    async with Strongroom.open(new_url("sqlite", tmp_path)) as room:
        await imported(room, file)
        found = Exported()
        lines = export_rows(found, room.database, room.keys.hasher, "plain", "default", SYSTEM, NOW_US)
        data = b"".join([part async for part in file_of("plain", lines)])
        whole = await keyexport.export_keys(room.database, room.keys.hasher, "plain", "default", SYSTEM, NOW_US)
    order = sorted(rows, key=lambda r: (r["created_at"], hashlib.sha256(r["key"].encode()).hexdigest()))
    assert [one["name"] for one in json.loads(data)["keys"]] == [one["name"] for one in order]
    assert data == b"".join(render_file("plain", whole.rows))
    assert found.count == 40


async def test_an_export_without_keys_writes_a_file(tmp_path: Path) -> None:
    async def nothing() -> Any:
        for part in list[bytes]():
            yield part

    for shape in ("plain", "hashed"):
        assert b"".join([part async for part in file_of(shape, nothing())]) == b"".join(render_file(shape, []))
