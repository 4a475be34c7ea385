"""The journal's trees move with the journal: on every engine the same journal has the same roots."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from strongroom import Entity, Strongroom
from strongroom import migrate as library
from strongroom.database.write_state import STORE, WriteState, WriteSwitch
from strongroom.entities import Query
from strongroom.entities.entity import Document
from strongroom.errors import Conflict, Unavailable, WritesOff
from strongroom.jobs.sealing import SEALING
from strongroom.journal.leaf import redacted_salt
from strongroom.journal.merkle import Frontier, root_of
from strongroom.journal.sealer import Sealer
from strongroom.journal.trees import TILE, tile_id, tree_id
from strongroom.keys.model import ApiKey
from strongroom.migrate import Options, Phase, run
from strongroom.migrate.state import OWN
from strongroom.storage import open_store
from strongroom.storage.port import (
    Append,
    Batch,
    Check,
    Create,
    Delete,
    JournalFilter,
    JournalRow,
    Operation,
    Patch,
    Put,
    Record,
    Store,
)
from strongroom.testing.storage import Backend
from strongroom.testing.storage.samples import COLLECTIONS as SAMPLES
from strongroom.testing.storage.samples import ITEMS, NOW, item, record
from tests.conftest import backend_of
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.trees import all_rows, check_trees
from tests.helpers.waiting import wait_until

KINDS = ["sqlite", "json", "postgres", "firestore"]
EVERY_PAIR = [f"{one}-{other}" for one in KINDS for other in KINDS]
EACH_ONCE = [f"{one}-{other}" for one, other in zip(KINDS, [*KINDS[1:], KINDS[0]], strict=True)]
SMALL = Options(batch=50)
COLLECTIONS = (*SAMPLES, ApiKey.__collection__)
ALL = (*COLLECTIONS, *OWN)


class Note(Entity, collection="notes"):
    text: str


@pytest.fixture
def backends(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Backend]:
    made: dict[str, Backend] = {}

    def of(kind: str) -> Backend:
        if kind not in made:
            made[kind] = backend_of(kind, tmp_path, request)
        return made[kind]

    return of


@asynccontextmanager
async def opened(*backends: Backend) -> AsyncIterator[list[Store]]:
    """A new store on each backend."""
    stores: list[Store] = []
    try:
        for backend in backends:
            stores.append(await backend.open(backend.new_url()))
        yield stores
    finally:
        for store in stores:
            await store.close()


@pytest.fixture
def pair(request: pytest.FixtureRequest, backends: Callable[[str], Backend]) -> list[Backend]:
    """A source's and a target's backend."""
    return [backends(kind) for kind in request.param.split("-")]


@pytest.fixture
def each(backends: Callable[[str], Backend]) -> list[Backend]:
    """Each kind of backend, and the first again."""
    return [backends(kind) for kind in (*KINDS, KINDS[0])]


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process has these stores, so none needs time to notice, or for a last round of sealing."""
    monkeypatch.setattr(run, "NOTICE_S", 0.01)
    monkeypatch.setattr(run, "LAST_ROUND_S", 0.1)


@pytest.fixture
async def two(backends: Callable[[str], Backend]) -> AsyncIterator[list[Store]]:
    """Two stores, for what does not depend on the engines; the first has a sealed journal."""
    async with opened(backends("sqlite"), backends("sqlite")) as stores:
        await filled(stores[0])
        yield stores


# --- A sealed journal -------------------------------------------------------------------------------------------


class _Clock:
    def now_us(self) -> int:
        return NOW + 1


class _Lease:
    """The sealing lease, for one round after the other."""

    position = None

    def __init__(self, version: int) -> None:
        self.guard = Check("leases", SEALING, version)

    async def save(self, position: str | None) -> None:
        """Keep it."""


async def seal(store: Store) -> None:
    """Seal everything, as a node does. Conflict if a migration has the lease."""
    held = await store.get("leases", None, SEALING)
    if held is not None and held["holder"]:
        raise Conflict(f"the lease is {held['holder']}'s")
    free = {"holder": "", "token": 1, "expires_at": None, "done_at": None, "position": None}
    committed = await store.commit(Batch(None, (Put("leases", SEALING, free),), NOW))
    sealer, lease = Sealer(store, _Clock()), _Lease(committed.versions[0])
    while (await sealer.round(lease)).more:
        pass


_numbers = itertools.count()
CONTENTS: list[Document | None] = [
    None,
    {"text": 'é\n"', "n": 1, "half": 0.5, "big": 1e300},
    {"$": [b"x", None, {"$time": 1}], "at": None},
]


def records(tenant: str | None, count: int, **given: Any) -> list[Record]:
    """Records as callers make them: with a salt, claims, hidden fields, and a few of before there were salts."""
    found = []
    for _ in range(count):
        n = next(_numbers)
        defaults: Document = {
            "id": f"r-{n}",
            "salt": b"" if n % 7 == 0 else n.to_bytes(16, "big"),
            "claims": {"sub": f"u{n}", "roles": ["a"]} if n % 3 == 0 else None,
            "rules": "3" if n % 5 == 0 else None,
            "before": CONTENTS[n % 3],
            "after": {"hash": b"\1" * 32, "previous_hash": None} if n % 11 == 0 else CONTENTS[(n + 1) % 3],
            "collection": "api_keys" if n % 11 == 0 else "items",
            "actor": f"user:ädä-{n % 4}",
            "at_us": NOW + n,
        }
        found.append(record(f"e{n}", tenant, **{**defaults, **given}))
    return found


async def append(store: Store, tenant: str | None, count: int, **given: Any) -> None:
    operations = [Append(one) for one in records(tenant, count, **given)]
    for begin in range(0, count, 200):
        await store.commit(Batch(tenant, tuple(operations[begin : begin + 200]), NOW))


async def filled(store: Store, large: int = 2 * TILE + 40) -> None:
    """A journal of the platform and four tenants, one of them with complete tiles, sealed in several rounds."""
    await store.prepare(ALL)
    await store.commit(Batch("acme", (Create("items", "i1", item("one")), Append(records("acme", 1)[0], 0)), NOW))
    for _ in range(3):
        for tenant in ("acme", None, "ümläut/..", "one more"):
            await append(store, tenant, 3)
        await append(store, "large", large // 3)
        await seal(store)
    await append(store, None, 2)
    await seal(store)


async def documents(store: Store, collection: str, *, prepare: bool = True) -> dict[str, Document]:
    if prepare:
        await store.prepare(ALL)
    return {one["id"]: one for one in await store.find(collection, None, Query(limit=1000))}


_OF_THE_STORE = {"version", "created_at", "updated_at", "sequence", "first_sequence", "last_sequence", "sequences"}
_OF_THE_STORE |= {"cursor"}


async def proofs_of(store: Store, *, prepare: bool = True) -> dict[str, Document]:
    """What is stored of the trees, without what each store has of its own."""
    return {
        f"{name}/{id}": {field: value for field, value in document.items() if field not in _OF_THE_STORE}
        for name in ("journal_trees", "journal_tiles", "journal_rounds", "journal_log")
        for id, document in (await documents(store, name, prepare=prepare)).items()
    }


async def leaves_of(store: Store) -> dict[str | None, list[tuple[Any, ...]]]:
    """Each tenant's records in their order, without sequences, versions and salts."""
    found: dict[str | None, list[tuple[Any, ...]]] = {}
    for row in await all_rows(store):
        found.setdefault(row[2], []).append((*row[1:9], *row[10:12], *row[13:]))
    return found


# --- Every engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=() if pair in EACH_ONCE else pytest.mark.soak) for pair in EVERY_PAIR],
    indirect=True,
)
async def test_the_trees_move_between_any_two_engines_and_go_on_there(pair: list[Backend]) -> None:
    async with opened(*pair) as (one, other):
        await filled(one)
        await one.commit(Batch("acme", (Append(records("acme", 1)[0]),), NOW))  # not sealed
        before = await proofs_of(one)
        report = await library.migrate(one, other, COLLECTIONS, SMALL)
        assert (report.equal, report.phase) == (True, Phase.DONE)
        assert report.trees is not None
        assert (report.trees.trees, report.trees.unequal, report.trees.carried) == (5, 0, True)
        assert await proofs_of(one) == before, "the source is only read"
        assert await proofs_of(other) == before
        copied, original = await leaves_of(other), await leaves_of(one)
        assert {tenant: copied[tenant][: len(rows)] for tenant, rows in original.items()} == original
        await append(other, "acme", 2)
        await append(other, "new", 2)
        await seal(other)
        trees = await check_trees(other)
        assert trees.log["origin"] == before["journal_log/log"]["origin"]
        assert trees.log["round"] == before["journal_log/log"]["round"] + 1
        for id, tree in (await documents(one, "journal_trees")).items():
            root = Frontier.of_bytes(tree["size"], tree["frontier"]).root()
            assert root_of(trees.leaves[id][: tree["size"]]) == root


async def test_one_journal_has_the_same_roots_on_every_engine(each: list[Backend]) -> None:
    """Redacted records and a dropped beginning included, from store to store and back to the first engine."""
    async with opened(*each) as stores:
        await filled(stores[0])
        await redact(stores[0], "acme", 2)
        await drop_tiles(stores[0], "large", 1)
        expected = await proofs_of(stores[0])
        kept = await leaves_of(stores[0])
        for source, target in itertools.pairwise(stores):
            report = await library.migrate(source, target, COLLECTIONS, SMALL)
            assert report.equal
            assert report.trees is not None
            assert report.trees.trees == 5
            found = await proofs_of(target)
            log = found.pop("journal_log/log"), expected["journal_log/log"]
            assert log[0]["origin"] == log[1]["origin"]
            assert found == {name: one for name, one in expected.items() if name != "journal_log/log"}
            copied = await leaves_of(target)
            assert {tenant: copied[tenant][: len(rows)] for tenant, rows in kept.items()} == kept


async def redact(store: Store, tenant: str, count: int) -> list[JournalRow]:
    """Redact everything that a tenant's first records say."""
    page = await store.rows(None, JournalFilter(tenant=tenant), count)
    redacted: list[JournalRow] = []
    for row in page.rows:
        if not row[12]:
            continue
        salt = redacted_salt(row, frozenset({"actor", "entity_id", "before", "after"}))
        redacted.append((*row[:4], "", *row[5:8], "", row[9], None, '{"$$redacted":{"by":"ada"}}', salt, None, row[14]))
    assert redacted
    assert await store.rewrite(redacted) == len(redacted)
    return redacted


async def drop_tiles(store: Store, tenant: str, count: int) -> None:
    """What retention does: whole tiles go with their records."""
    tree = tree_id(tenant)
    last = await store.get("journal_tiles", None, tile_id(tree, 0, count - 1))
    assert last is not None
    assert await store.drop(tenant, last["last_sequence"]) == count * TILE
    gone = [Delete("journal_tiles", tile_id(tree, 0, number)) for number in range(count)]
    await store.commit(Batch(None, (*gone, Patch("journal_trees", tree, {"first_index": count * TILE})), NOW))


async def test_a_journal_without_its_beginning_moves_with_the_tiles_that_lead_to_it(
    two: list[Store],
) -> None:
    one, other = two
    await append(one, "large", 2 * TILE)
    await seal(one)
    await drop_tiles(one, "large", 2)
    report = await library.migrate(one, other, COLLECTIONS, SMALL)
    assert report.equal
    assert await proofs_of(other) == await proofs_of(one)
    tree = (await documents(other, "journal_trees"))[tree_id("large")]
    assert tree["first_index"] == 2 * TILE
    await append(other, "large", TILE)
    await seal(other)
    grown = (await documents(other, "journal_trees"))[tree_id("large")]
    assert (grown["size"], grown["broken"]) == (tree["size"] + TILE, "")


# --- Unequal roots ----------------------------------------------------------------------------------------------


class Tampering(FaultyStore):
    """A store that keeps another actor of one record than it was given."""

    def __init__(self, store: Store, tenant: str | None, number: int) -> None:
        super().__init__(store)
        self._tenant = tenant
        self._left = number

    def commit(self, batch: Batch) -> Any:
        def changed(operation: Operation) -> Operation:
            told = operation.record if isinstance(operation, Append) else None
            if told is not None and told.tenant == self._tenant and told.collection != "store_state":
                self._left -= 1
                if self._left == -1:
                    return Append(structs.replace(told, version=5, rules="another"))
            return operation

        return self.store.commit(structs.replace(batch, operations=tuple(map(changed, batch.operations))))


@pytest.mark.parametrize(("tenant", "number", "index"), [("large", 300, 300), ("acme", 4, 4), (None, 4, 5)])
async def test_a_record_that_differs_in_the_target_is_named_by_tenant_and_index(
    two: list[Store], monkeypatch: pytest.MonkeyPatch, tenant: str | None, number: int, index: int
) -> None:
    one, other = two
    monkeypatch.setattr("strongroom.migrate.prove.count_journal", _as_copied)
    report = await library.migrate(one, Tampering(other, tenant, number), COLLECTIONS, SMALL)
    assert not report.equal
    assert report.phase == Phase.FOLLOWING
    assert report.trees is not None
    (difference,) = report.trees.differences
    assert (difference.tenant, difference.index, difference.tile) == (tenant, index, index // TILE)
    assert "the target's record is another" in str(difference)
    assert await other.get("journal_log", None, "log") is None
    with pytest.raises(Conflict):
        await seal(other)


async def _as_copied(migration: Any) -> int:
    """The checksum of the records does not see it: the trees do."""
    return int(migration.journal.count)


async def test_a_source_that_was_changed_behind_strongroom_is_not_moved(two: list[Store]) -> None:
    one, other = two
    for tenant, number in (("large", 270), ("one more", 4)):
        page = await one.rows(None, JournalFilter(tenant=tenant), 300)
        row = page.rows[number]
        await one.rewrite([(*row[:11], '{"text":"forged"}', *row[12:])])
    report = await library.migrate(one, other, COLLECTIONS, SMALL)
    assert report.trees is not None
    assert report.trees.unequal == 2
    named = {difference.tenant: difference for difference in report.trees.differences}
    assert named["large"].index == 270
    assert "the source's record does not agree with its own tree" in str(named["large"])
    assert "after its last tile do not lead to its root" in str(named["one more"])
    assert "journal_log/log" not in await proofs_of(other)


# --- Undone, interrupted, live ----------------------------------------------------------------------------------


async def test_a_rollback_leaves_no_copied_record_and_a_repeated_migration_carries_the_trees_again(
    two: list[Store],
) -> None:
    one, other = two
    await library.migrate(one, other, COLLECTIONS, SMALL)
    for _ in range(2):
        undone = await library.roll_back(one, other, COLLECTIONS, SMALL)
        assert undone.phase == Phase.ROLLED_BACK
        assert {row[7] for row in await all_rows(other)} == {"store_state"}
        assert await proofs_of(other) == {}
        await append(one, "acme", 2)
        await seal(one)
        report = await library.migrate(one, other, COLLECTIONS, SMALL)
        assert report.equal
        assert await proofs_of(other) == await proofs_of(one)


async def test_a_target_with_a_journal_of_its_own_begins_a_log_of_its_own(two: list[Store], tmp_path: Path) -> None:
    one, other = two
    await other.prepare(ALL)
    await append(other, "acme", 5)
    await seal(other)
    origin = (await documents(other, "journal_log"))["log"]["origin"]
    options = replace(SMALL, overwrite=True, backup=tmp_path / "backup.gz")
    report = await library.migrate(one, other, COLLECTIONS, options)
    assert report.equal
    assert report.trees is not None
    assert (report.trees.carried, report.trees.trees) == (False, 4)
    await other.prepare(ALL)
    await seal(other)
    trees = await check_trees(other)
    assert trees.log["origin"] not in (origin, (await documents(one, "journal_log"))["log"]["origin"])
    assert len(trees.leaves[tree_id("acme")]) == 5 + 10


async def test_a_source_that_was_never_sealed_moves_without_trees(backends: Callable[[str], Backend]) -> None:
    async with opened(backends("sqlite"), backends("json")) as (one, other):
        await one.prepare(COLLECTIONS)
        await append(one, "acme", 5)
        report = await library.migrate(one, other, COLLECTIONS, SMALL)
        assert report.equal
        assert report.trees is not None
        assert report.trees.trees == 0
        await other.prepare(ALL)
        await seal(other)
        assert len((await check_trees(other)).leaves[tree_id("acme")]) == 5


async def test_what_is_redacted_or_dropped_while_the_source_is_copied_leaves_the_target_too(
    two: list[Store],
) -> None:
    """A live migration has copied the journal already when `audit redact` and retention change it."""
    one, other = two
    live = replace(SMALL, live=True)
    following = await library.migrate(one, other, COLLECTIONS, live)
    assert following.phase == Phase.FOLLOWING
    rows = await redact(one, "acme", 3)
    now_us = time.time_ns() // 1_000
    told = structs.replace(records(None, 1)[0], action="redact", collection="journal", at_us=now_us)
    await one.commit(Batch(None, (Append(told),), NOW))
    await drop_tiles(one, "large", 1)
    await seal(one)
    before = await proofs_of(one)
    report = await library.migrate(one, other, COLLECTIONS, replace(live, switch=True))
    assert (report.equal, report.phase) == (True, Phase.DONE)
    assert await proofs_of(one) == before
    assert await proofs_of(other) == before
    copied = {row[1]: row for row in await all_rows(other)}
    for row in rows:
        assert copied[row[1]][10:] == row[10:]
        assert (copied[row[1]][4], copied[row[1]][8]) == ("", "")
    assert len((await leaves_of(other))["large"]) == 2 * TILE + 40 - TILE
    with pytest.raises(Conflict, match="migrate"):
        await seal(one)
    await seal(other)


async def test_the_source_seals_again_after_an_abort_or_a_rollback(
    two: list[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    live = replace(SMALL, live=True)
    with monkeypatch.context() as patch:
        patch.setattr("strongroom.migrate.prove.count_journal", _as_copied)
        switched = replace(live, switch=True)
        stopped = await library.migrate(one, Tampering(other, "acme", 1), COLLECTIONS, switched)
    assert (stopped.equal, stopped.phase) == (False, Phase.SWITCHING)
    with pytest.raises(Conflict, match="migrate"):
        await seal(one)
    await library.abort(one, other, COLLECTIONS, SMALL)
    await append(one, "acme", 1)
    await seal(one)
    await library.roll_back(one, other, COLLECTIONS, SMALL)
    report = await library.migrate(one, other, COLLECTIONS, switched)
    assert report.is_done
    await library.roll_back(one, other, COLLECTIONS, SMALL)
    await append(one, "acme", 1)
    await seal(one)
    await check_trees(one)
    await append(other, None, 1)
    await seal(other)


async def test_a_process_that_serves_the_target_early_obeys_the_targets_own_switches_afterwards(
    two: list[Store],
) -> None:
    """Copied records have the versions of the source, which may be far greater."""
    one, other = two
    switches = WriteSwitch.__collection__
    declared = (*COLLECTIONS, switches)
    await one.prepare((*ALL, switches))
    for allowed in (False, True):
        switch = {"tenant": None, "allowed": allowed, "usage": True, "reason": None, "by": "ada"}
        told = record(STORE, None, id=f"s-{allowed}", collection=switches.name, action="create", after=switch)
        await one.commit(
            Batch(
                None, (Put(switches.name, STORE, switch), Append(structs.replace(told, version=2**60 + allowed))), NOW
            )
        )
    opened = {"allowed": True, "reason": "", "other_store": ""}
    told = record("writes", None, collection="store_state", action="update", after=opened, version=2**60)
    await one.commit(Batch(None, (Append(told),), NOW))
    await library.migrate(one, other, declared, replace(SMALL, live=True))
    await other.prepare((*ALL, switches))
    state = WriteState(other)
    await state.load()
    assert state.refusal is not None
    for one_record in (await other.changes(None)).records:
        state.seen(one_record)
    assert state.refusal is not None, "a copied record of the source's own state says nothing about the target"
    cursor = (await other.changes("end")).cursor
    report = await library.migrate(one, other, declared, replace(SMALL, live=True, switch=True))
    assert report.is_done
    await other.prepare((*ALL, switches))
    off = {"tenant": None, "allowed": False, "usage": True, "reason": "by hand", "by": "ada"}
    told = record(STORE, None, id="off", collection=switches.name, action="update", after=off)
    await other.commit(Batch(None, (Put(switches.name, STORE, off), Append(told, 0)), NOW))
    for one_record in (await other.changes(cursor)).records:
        state.seen(one_record)
    with pytest.raises(WritesOff):
        state.check("acme", [(ITEMS, None)])


async def test_the_sources_servers_seal_their_last_records_and_then_no_more(
    two: list[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = two
    url = two[0].path  # type: ignore[attr-defined]
    room_url = f"sqlite:///{url}-live"
    async with Strongroom.open(room_url, entities=[Note]) as room:
        for number in range(5):
            await room.tenant("acme").create(Note(id=f"n{number}", text="x"))
        await wait_until(lambda: room.sealer.rounds > 0)
        declared = room.database.registry.collections
        source = await open_store(room_url)
        try:
            await library.migrate(source, other, declared, Options(live=True))
            await room.tenant("acme").create(Note(id="last", text="x"))
            monkeypatch.setattr(run, "LAST_ROUND_S", 4.0)
            monkeypatch.setattr(run, "NOTICE_S", 0.5)
            report = await library.migrate(source, other, declared, Options(live=True, switch=True))
            assert report.is_done
            assert report.trees is not None
            assert report.trees.equal
            trees = await check_trees(source)
            assert len(trees.leaves[tree_id("acme")]) == 6, "the last record too, and the switch-over's own"
            assert (await proofs_of(other, prepare=False)) == (await proofs_of(source, prepare=False))
            rounds = room.sealer.rounds
            with pytest.raises(Unavailable):
                await room.tenant("acme").create(Note(id="late", text="x"))
            await asyncio.sleep(0.3)
            assert room.sealer.rounds == rounds
        finally:
            await source.close()
