"""The owner of a database may change, remove, move or add records behind Strongroom: the verifier says where and what.

Each test is run on each store, with direct SQL, raw writes to Firestore, or an editor on the JSON file.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.audit.retention import journal_record
from strongroom.entities import Query, Registry
from strongroom.journal import TREE_ENTITIES, verify_parallel
from strongroom.journal.export import logged_tree
from strongroom.journal.findings import Report
from strongroom.journal.leaf import COMMITTED, redacted_salt
from strongroom.journal.merkle import Frontier
from strongroom.journal.signed_note import Checkpoint, SignedNote, VerifierKey
from strongroom.journal.trees import DROP, REDACT, round_leaf, tile_id, tree_id
from strongroom.journal.verify_store import Block, StoreVerification, blocks_of, verify_store
from strongroom.storage import open_store
from strongroom.storage.port import JOURNAL_ROW, Append, Batch, Delete, JournalFilter, Patch, Record, Store
from tests.conftest import backend_of
from tests.helpers.owner import Owner, Row, owner_of
from tests.journal.test_exports import Signer

NOW_US = 1_800_000_000_000_000
SIZE = 300
"""Of the tenant's tree: a complete tile, and records after it that were sealed in rounds of ROUND."""
ROUND = 11
SCHEMES = ["sqlite", "json", "postgres", "firestore"]
PERSISTENT = pytest.mark.parametrize("scheme", SCHEMES)


@dataclass
class Sealed:
    """A store with two tenants' trees, closed, and what its owner can do."""

    url: str
    owner: Owner
    signer: Signer
    saved: dict[str, Checkpoint]
    """A tenant's checkpoint and the platform's, kept elsewhere."""

    async def records(self, tenant: str | None = "acme") -> list[Row]:
        return await self.owner.records(tenant)

    async def verify(self, saved: str | None = None, *, keys: Sequence[VerifierKey] | None = None) -> Report:
        async with opened_for_trees(self.url) as store:
            given = [self.signer.key] if keys is None else keys
            return await verify_store(store, keys=given, saved=None if saved is None else self.saved[saved])


@asynccontextmanager
async def opened_for_trees(url: str) -> AsyncIterator[Store]:
    """The store as `audit verify` opens it."""
    store = await open_store(url)
    try:
        await store.prepare(Registry(TREE_ENTITIES).collections)
        yield store
    finally:
        await store.close()


def record(tenant: str | None, number: int) -> Append:
    return Append(
        Record(
            f"{tenant}-{number:04}", tenant, NOW_US + number, f"key:{number % 3}", "r", "update", "notes", f"n{number}",
            {"text": "a"}, {"text": f"b{number}"}, salt=number.to_bytes(16, "big"),
        )
    )  # fmt: skip


async def append(room: Strongroom, tenant: str | None, begin: int, end: int) -> None:
    await room.store.commit(Batch(tenant, tuple(record(tenant, number) for number in range(begin, end)), 1))


async def seal(url: str, signer: Signer, grow: int = 0) -> dict[str, Checkpoint]:
    """Append to a new store or an old one, seal it, and give the checkpoints."""
    async with Strongroom.open(url, sealing=False) as room:
        room.sealer.sealer.signer = signer
        if grow:
            await append(room, "acme", SIZE, SIZE + grow)
        else:
            for begin in range(0, 256, 64):
                await append(room, "acme", begin, begin + 64)
                await append(room, "gamma", begin // 64, begin // 64 + 1)
                await append(room, None, begin // 64, begin // 64 + 1)
            for begin in range(256, SIZE, ROUND):
                await room.sealer.seal_now()
                await append(room, "acme", begin, begin + ROUND)
        await room.sealer.seal_now()
        tree = await logged_tree(room.store, "acme")
        origin = f"{tree.log['origin']}/tenants/acme"
        return {
            "acme": Checkpoint(origin, tree.reader.size, await tree.reader.root(tree.reader.size)),
            "platform": Checkpoint.parse(SignedNote.parse(tree.log["checkpoint"]).text),
        }


@pytest.fixture
def new_url(scheme: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if scheme == "firestore":
        monkeypatch.setattr("strongroom.storage.firestore.journal.GAP_ATTEMPTS", 4)
    return backend_of(scheme, tmp_path, request).new_url()


@pytest.fixture
async def sealed(new_url: str) -> Sealed:
    url, signer = new_url, Signer()
    saved = await seal(url, signer)
    return Sealed(url, owner_of(url), signer, saved)


def told(report: Report) -> list[tuple[str | None, str, int | None]]:
    return [(one.tenant, one.kind, one.index) for one in report.findings]


# --- One record -----------------------------------------------------------------------------------------------

Tamper = Callable[[Sealed], Awaitable[None]]


def altered(index: int, column: str, value: Any) -> Tamper:
    async def tamper(sealed: Sealed) -> None:
        old = (await sealed.records())[index]
        assert column in old
        await sealed.owner.write(old, {**old, column: value})

    return tamper


def removed(begin: int, end: int) -> Tamper:
    async def tamper(sealed: Sealed) -> None:
        for old in (await sealed.records())[begin:end]:
            await sealed.owner.write(old, None)

    return tamper


def exchanged(one: int, other: int) -> Tamper:
    async def tamper(sealed: Sealed) -> None:
        records = await sealed.records()
        first, second = records[one], records[other]
        await sealed.owner.write(first, {**second, "sequence": first["sequence"]})
        await sealed.owner.write(second, {**first, "sequence": second["sequence"]})

    return tamper


async def put_in(sealed: Sealed) -> None:
    """A record that never was, among the others: at the sequence of another tenant's record."""
    like, place = (await sealed.records())[64], (await sealed.records("gamma"))[0]
    await sealed.owner.write(place, {**like, "id": "acme-new", "sequence": place["sequence"]})


@PERSISTENT
async def test_a_store_that_nobody_changed_is_whole(sealed: Sealed) -> None:
    for saved in (None, "acme", "platform"):
        report = await sealed.verify(saved)
        assert told(report) == []
        assert report.signers == [f"log.example (Ed25519, {sealed.signer.key.id.hex()})"]
        assert {tree.tenant: tree.end for tree in report.trees}["acme"] == SIZE
    assert [note for note in (await sealed.verify(keys=())).notes if "not checked" in note]


@PERSISTENT
@pytest.mark.parametrize(
    ("tamper", "kind", "index"),
    [
        (altered(10, "actor", "key:other"), "altered", 10),
        (altered(20, "at_us", 5), "altered", 20),
        (altered(255, "entity_id", "other"), "altered", 255),
        (altered(0, "id", "other"), "altered", 0),
        (altered(280, "request_id", "other"), "altered", range(278, 289)),
        (exchanged(10, 20), "swapped", 10),
        (exchanged(11, 12), "swapped", 11),
        (exchanged(279, 283), "swapped", 279),
        (removed(10, 11), "deleted", 10),
        (removed(10, 200), "deleted", 10),
        (removed(0, 1), "deleted", 0),
        (removed(280, 281), "deleted", range(278, 281)),
        (removed(SIZE - 5, SIZE), "truncated", SIZE - 5),
        (removed(100, SIZE), "truncated", 100),
        (put_in, "inserted", 64),
    ],
    ids=lambda value: value.__qualname__.partition(".")[0] if callable(value) else str(value),
)
async def test_the_first_bad_index_is_named_and_what_is_wrong_with_it(
    tamper: Tamper, kind: str, index: int | range, sealed: Sealed
) -> None:
    await tamper(sealed)
    (found, *more) = [one for one in (await sealed.verify()).findings if one.tenant == "acme"]
    assert (found.kind, more) == (kind, []), found
    assert found.index == index if isinstance(index, int) else found.index in index, found


# --- The stored trees, and a history that was written anew ----------------------------------------------------


async def rewritten(sealed: Sealed, *, signer: Signer) -> None:
    """The owner changes a record, throws the trees away, and seals everything again under the old name."""
    (log,) = await sealed.owner.documents("journal_log")
    for collection in ("journal_trees", "journal_tiles", "journal_rounds"):
        for document in await sealed.owner.documents(collection):
            await sealed.owner.write_document(collection, document["id"], None)
    new = {**log, "round": 0, "cursor": None, "checkpoint": "", "checkpoint_size": 0}
    await sealed.owner.write_document("journal_log", "log", new)
    await altered(10, "actor", "key:other")(sealed)
    async with Strongroom.open(sealed.url, sealing=False) as room:
        room.sealer.sealer.signer = signer
        await room.sealer.seal_now()


@PERSISTENT
async def test_a_history_that_was_sealed_anew_with_another_key_is_found_by_the_key(sealed: Sealed) -> None:
    await rewritten(sealed, signer=Signer())
    assert told(await sealed.verify()) == [(None, "signature", None)]


@PERSISTENT
async def test_a_history_that_was_sealed_anew_with_the_same_key_is_found_by_a_saved_checkpoint(sealed: Sealed) -> None:
    await rewritten(sealed, signer=sealed.signer)
    assert told(await sealed.verify()) == [], "who has database and key can sign everything again"
    assert told(await sealed.verify("acme")) == [("acme", "forked", None)]
    assert [kind for _, kind, _ in told(await sealed.verify("platform"))] in (["forked"], ["old_copy"])


COLLECTIONS = ("journal_trees", "journal_tiles", "journal_rounds", "journal_log")


@PERSISTENT
async def test_an_old_copy_that_was_put_back_is_found_by_a_saved_checkpoint(sealed: Sealed) -> None:
    owner = sealed.owner
    old = {name: {one["id"]: one for one in await owner.documents(name)} for name in COLLECTIONS}
    sealed.saved = await seal(sealed.url, sealed.signer, grow=3)
    assert told(await sealed.verify("acme")) == []
    await removed(SIZE, SIZE + 3)(sealed)
    for name in COLLECTIONS:
        for document in await owner.documents(name):
            await owner.write_document(name, document["id"], None)
        for id, document in old[name].items():
            await owner.write_document(name, id, document)
    assert told(await sealed.verify()) == []
    assert told(await sealed.verify("acme")) == [("acme", "old_copy", SIZE)]
    assert [kind for _, kind, _ in told(await sealed.verify("platform"))] == ["old_copy"]


@PERSISTENT
@pytest.mark.parametrize(
    ("collection", "field", "expected"),
    [
        ("journal_tiles", "hashes", ("acme", "damaged")),
        ("journal_tiles", "sequences", ("acme", "damaged")),
        ("journal_trees", "frontier", ("acme", "damaged")),
        ("journal_trees", "size", ("acme", "damaged")),
        ("journal_rounds", "entries", (None, "altered")),
        ("journal_log", "checkpoint", (None, "signature")),
        ("journal_tiles", None, ("acme", "damaged")),
        ("journal_trees", None, ("acme", "damaged")),
        ("journal_rounds", None, (None, "deleted")),
        ("journal_log", None, (None, "damaged")),
    ],
)
async def test_a_change_of_what_is_stored_of_the_trees_is_found(
    collection: str, field: str | None, expected: tuple[str | None, str], sealed: Sealed
) -> None:
    documents = await sealed.owner.documents(collection)
    old = documents[0] if collection in ("journal_rounds", "journal_log") else next(iter_of("acme", documents))
    new = None if field is None else {**old, field: spoiled(old[field], field)}
    await sealed.owner.write_document(collection, old["id"], new)
    found = told(await sealed.verify())
    assert expected in [(tenant, kind) for tenant, kind, _ in found], found


def iter_of(tenant: str, documents: list[Row]) -> Iterator[Row]:
    wanted = tree_id(tenant)
    return (one for one in documents if one["id"] == wanted or one["id"].startswith(f"{wanted}-0-"))


def spoiled(value: Any, field: str) -> Any:
    """A value of a document with one bit or character changed, in the form that the store has."""
    if isinstance(value, int):
        return value - 1
    if isinstance(value, bytes):
        return value[:-1] + bytes([value[-1] ^ 1])
    if isinstance(value, dict):
        return {"$bytes": base64.b64encode(spoiled(base64.b64decode(value["$bytes"]), field)).decode()}
    if field == "checkpoint":  # the size, so that it is still a note
        origin, _, rest = value.partition("\n")
        return f"{origin}\n1{rest}"
    return value.replace('"]', '0"]', 1) if field == "entries" else value[::-1]


# --- What proofs alone do not show: the verifier looks for it -------------------------------------------------


async def rewrite(sealed: Sealed, number: int, **cells: Any) -> None:
    """Let a record of acme (by its number) be redacted, and its cells be these."""
    async with opened_for_trees(sealed.url) as store:
        (row,) = [row for row in (await store.rows(None, JournalFilter(tenant="acme"))).rows if row[8] == f"n{number}"]
        salt = redacted_salt(row, frozenset(name for name in COMMITTED if name in cells))
        new: Any = tuple((dict(zip(JOURNAL_ROW, row, strict=True)) | cells | {"salt": salt}).values())
        assert await store.rewrite([new]) == 1


def mark(record: str, reason: str = "asked") -> str:
    return json.dumps({"redacted": {"by": "system", "reason": reason, "at": "2027-01-01", "record": record}})


BLANK = {"entity_id": "", "before": None}


@PERSISTENT
@pytest.mark.parametrize("number", [10, 290])
async def test_nothing_may_stand_in_the_place_of_what_was_redacted(number: int, sealed: Sealed) -> None:
    """The leaf of such a record does not tell: it has the commitments of what was there before."""
    await rewrite(sealed, number, actor="key:somebody else")
    ((tenant, kind, index),) = told(await sealed.verify())
    assert (tenant, kind) == ("acme", "altered")
    assert number - ROUND < (index or 0) <= number


@PERSISTENT
async def test_a_redaction_that_the_journal_does_not_tell_of_is_found(sealed: Sealed) -> None:
    await rewrite(sealed, 10, **BLANK, after=mark("no such record"))
    assert told(await sealed.verify()) == [("acme", "altered", 10)]


@pytest.mark.parametrize("scheme", ["sqlite"])
async def test_a_redaction_must_say_who_and_why_as_its_record_does_and_of_no_more_records(sealed: Sealed) -> None:
    note = journal_record(
        "acme", NOW_US, REDACT, "", {"of": "document", "reason": "asked", "records": 1, "archived": 0}
    )
    async with Strongroom.open(sealed.url, sealing=False) as room:
        room.sealer.sealer.signer = sealed.signer
        await room.store.commit(Batch(None, (Append(note),), 1))
        await room.sealer.seal_now()
    await rewrite(sealed, 10, **BLANK, after=mark(note.id))
    assert told(await sealed.verify()) == []
    await rewrite(sealed, 20, **BLANK, after=mark(note.id))
    assert told(await sealed.verify()) == [("acme", "altered", 10)], "two records, and one was to be redacted"
    (old,) = [one for one in await sealed.records() if one["sequence"] == (await sealed.records())[20]["sequence"]]
    await sealed.owner.write(old, {**old, "after": mark(note.id, "another reason")})
    assert told(await sealed.verify()) == [("acme", "altered", 20)]


@PERSISTENT
async def test_records_that_were_removed_as_if_by_retention_are_missed(sealed: Sealed) -> None:
    last = (await sealed.records())[255]["sequence"]
    async with opened_for_trees(sealed.url) as store:
        change = {"first_index": 256, "dropped_sequence": last}
        await store.commit(Batch(None, (Patch("journal_trees", tree_id("acme"), change),), 1))
        await store.drop("acme", last)
    ((tenant, kind, index),) = told(await sealed.verify())
    assert (tenant, kind, index) == ("acme", "deleted", 0)


@pytest.mark.parametrize("scheme", ["sqlite"])
async def test_a_record_among_those_that_retention_dropped_is_told(sealed: Sealed) -> None:
    old = await sealed.records()
    note = journal_record("acme", NOW_US, DROP, tree_id("acme"), {"first_index": 0, "end": 256, "archived": False})
    async with opened_for_trees(sealed.url) as store:
        change = {"first_index": 256, "dropped_sequence": old[255]["sequence"]}
        await store.commit(Batch(None, (Patch("journal_trees", tree_id("acme"), change), Append(note)), 1))
        await store.drop("acme", old[255]["sequence"])
    assert told(await sealed.verify()) == []
    await sealed.owner.write(None, {**old[9], "actor": "key:never was"})
    assert [note for note in (await sealed.verify()).notes if "stand before index 256" in note]


@pytest.mark.parametrize("scheme", ["sqlite"])
@pytest.mark.parametrize("first", [1, 255, 512, -256])
async def test_an_impossible_first_index_is_a_finding(first: int, sealed: Sealed) -> None:
    async with opened_for_trees(sealed.url) as store:
        await store.commit(Batch(None, (Patch("journal_trees", tree_id("acme"), {"first_index": first}),), 1))
    assert ("acme", "damaged", None) in told(await sealed.verify())


async def resealed(sealed: Sealed) -> Row:
    """The owner changes a record, seals its tree again, and keeps what the platform has signed: the tree's document."""
    other = f"sqlite:///{sealed.url.removeprefix('sqlite:///')}.other"
    shutil.copy(sealed.url.removeprefix("sqlite:///"), other.removeprefix("sqlite:///"))
    forged = Sealed(other, owner_of(other), Signer(), {})
    await rewritten(forged, signer=forged.signer)
    for collection in ("journal_trees", "journal_tiles"):
        for one in await forged.owner.documents(collection):
            if one["id"].startswith(tree_id("acme")):
                await sealed.owner.write_document(collection, one["id"], one)
    await altered(10, "actor", "key:other")(sealed)
    (tree,) = [one for one in await sealed.owner.documents("journal_trees") if one["id"] == tree_id("acme")]
    return tree


@pytest.mark.parametrize("scheme", ["sqlite"])
@pytest.mark.parametrize("trick", ["older round", "round to come", "no round", "log without rounds"])
async def test_a_tree_is_compared_with_the_rounds_that_were_signed(trick: str, sealed: Sealed) -> None:
    """Not with those that its own document names, or that somebody put behind them."""
    owner = sealed.owner
    tree = await resealed(sealed)
    (log,) = await owner.documents("journal_log")
    number = log["round"] + 1
    if trick == "older round":
        tree |= {"round": number, "previous_size": 0, "previous_round": 0}
    elif trick == "round to come":
        root = Frontier.of_bytes(tree["size"], tree["frontier"]).root().hex()
        entries = json.dumps([[tree["id"], tree["size"], root]], separators=(",", ":"))
        round_leaf(number, entries)
        (like, *_) = await owner.documents("journal_rounds")
        new = {**like, "id": f"{number:010}", "number": number, "index": 10**6, "entries": entries}
        await owner.write_document("journal_rounds", new["id"], new)
        tree |= {"round": number, "previous_size": tree["size"], "previous_round": number}
    elif trick == "no round":
        tree |= {"round": number + 5, "previous_size": 0, "previous_round": 0}
    else:
        tree |= {"round": 1, "previous_size": 0, "previous_round": 0}
        await owner.write_document("journal_log", "log", {**log, "round": 0})
    await owner.write_document("journal_trees", tree["id"], tree)
    found = [(tenant, kind) for tenant, kind, _ in told(await sealed.verify())]
    assert ("acme", "forked") in found, found


@pytest.mark.parametrize("scheme", ["sqlite"])
@pytest.mark.parametrize("cursor", [None, "100000000", "garbage", "-5"])
async def test_a_log_with_an_impossible_cursor_is_a_finding(cursor: str | None, sealed: Sealed) -> None:
    (log,) = await sealed.owner.documents("journal_log")
    await sealed.owner.write_document("journal_log", "log", {**log, "cursor": cursor})
    async with Strongroom.open(sealed.url, sealing=False) as room:
        await append(room, "new", 0, 1)
    assert told(await sealed.verify()) == [(None, "damaged", None)]


@pytest.mark.parametrize("scheme", ["sqlite"])
@pytest.mark.parametrize("entries", ["[" * 100_000, "[[1]]", '[["a","b","c"]]', '[[["a"],5,"00"]]', "{}", "x"])
async def test_impossible_entries_of_a_round_are_a_finding(entries: str, sealed: Sealed) -> None:
    last = (await sealed.owner.documents("journal_rounds"))[-1]
    await sealed.owner.write_document("journal_rounds", last["id"], {**last, "entries": entries})
    (found, *_) = (await sealed.verify()).findings
    assert (found.tenant, found.kind) == (None, "altered")
    assert (found.index or 0) <= last["index"]


@pytest.mark.parametrize("scheme", ["sqlite"])
async def test_a_tree_that_is_not_extended_any_more_is_told_of(sealed: Sealed) -> None:
    async with opened_for_trees(sealed.url) as store:
        await store.commit(Batch(None, (Patch("journal_trees", tree_id("acme"), {"broken": "a reason"}),), 1))
    assert [note for note in (await sealed.verify()).notes if "not sealed any more: a reason" in note]


@pytest.mark.parametrize("scheme", ["sqlite"])
async def test_an_older_checkpoint_does_not_cover_what_came_after_it(sealed: Sealed) -> None:
    (log,) = await sealed.owner.documents("journal_log")
    await seal(sealed.url, sealed.signer, grow=3)
    assert told(await sealed.verify()) == []
    (now,) = await sealed.owner.documents("journal_log")
    await sealed.owner.write_document("journal_log", "log", {**now, "checkpoint": log["checkpoint"]})
    assert told(await sealed.verify()) == [(None, "forked", log["checkpoint_size"])]


@pytest.mark.parametrize("scheme", ["sqlite"])
async def test_a_store_without_its_trees_is_not_whole_for_who_has_the_key(sealed: Sealed) -> None:
    for collection in COLLECTIONS:
        for document in await sealed.owner.documents(collection):
            await sealed.owner.write_document(collection, document["id"], None)
    assert told(await sealed.verify()) == [(None, "signature", None)]


@pytest.mark.parametrize("scheme", ["sqlite"])
async def test_a_record_that_was_put_in_far_behind_the_others_keeps_no_process_busy(
    sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes take ranges of sequences in turn: they must not count up to that of the last one."""
    (first, *_) = await sealed.records()
    await sealed.owner.write(None, {**first, "id": "far", "sequence": 10**17})
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    async with opened_for_trees(sealed.url) as store:
        blocks = await verify_parallel.parallel_blocks(store, sealed.url)
        assert blocks is not None
        report = await asyncio.wait_for(verify_store(store, keys=[sealed.signer.key], blocks=blocks), 60)
    assert told(report) == []
    assert {tree.tenant: tree.unsealed for tree in report.trees} == {None: 0, "acme": 1, "gamma": 0}


async def test_a_store_that_is_written_to_and_sealed_meanwhile_is_whole(tmp_path: Path) -> None:
    """Also when retention drops records that the verification has not reached."""
    url, signer = f"sqlite:///{tmp_path}/store.db", Signer()
    await seal(url, signer)
    async with Strongroom.open(url, sealing=False) as room:
        room.sealer.sealer.signer = signer
        verification = StoreVerification(room.store, [signer.key])
        await verification.begin()
        await append(room, "acme", SIZE, SIZE + 400)
        await append(room, None, 10, 12)
        await append(room, "new", 0, 2)
        await room.sealer.seal_now()
        await append(room, "acme", SIZE + 400, SIZE + 401)
        async for block in blocks_of(room.store, verification.legacy_secret):
            await verification.add(block)
        report = await verification.end()
        assert told(report) == []
        assert {tree.tenant: (tree.end, tree.unsealed) for tree in report.trees}["acme"] == (SIZE, 401)

        async def late(legacy_secret: bytes) -> AsyncIterator[Block]:
            (tree,) = [one for one in await room.store.find("journal_trees", None, Query()) if one["tenant"] == "acme"]
            if not tree["first_index"]:
                tile = await room.store.get("journal_tiles", None, tile_id(tree["id"], 0, 0))
                assert tile is not None
                patch = Patch("journal_trees", tree["id"], {"first_index": 256})
                note = Append(journal_record("acme", NOW_US, DROP, tree["id"], {"end": 256}))
                await room.store.commit(Batch(None, (patch, Delete("journal_tiles", tile["id"]), note), 1))
                await room.store.drop("acme", tile["last_sequence"])
            async for block in blocks_of(room.store, legacy_secret):
                yield block

        report = await verify_store(room.store, keys=[signer.key], blocks=late)
        assert told(report) == []
        assert {tree.tenant: tree.first for tree in report.trees}["acme"] == 256
