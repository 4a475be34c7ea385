"""Retention, redaction and legal holds: what goes, what stays, and that everything left can still be verified."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom import Strongroom
from strongroom.audit import Archive, Retention, Subject
from strongroom.audit.model import POLICY, LegalHold
from strongroom.audit.retention import JOB, MAX_SEGMENT_TILES
from strongroom.context import Context
from strongroom.errors import Conflict, Denied, Gone, InvalidInput, NotFound, StoreError, WritesOff
from strongroom.journal.leaf import opening_of
from strongroom.journal.trees import TILE, JournalTile, tree_id
from strongroom.journal.verify_store import verify_store
from strongroom.storage.port import Append, Batch, JournalFilter, JournalRow, Record, Store
from strongroom.tenants import User, WritesChange
from strongroom.testing.storage.backend import examples
from tests.helpers.stores import opened

DAY_US = 86_400_000_000
TREE = tree_id("acme")


async def append(
    room: Strongroom,
    count: int,
    *,
    tenant: str | None = "acme",
    days_ago: float = 0,
    actor: str = "user:ada",
    begin: int = 0,
) -> None:
    """Add records of so long ago: the first is about the document n0, and so on."""
    at_us = room.clock.now_us() - round(days_ago * DAY_US)
    records = [
        Record(
            f"{tenant}-{number}-{at_us}", tenant, at_us + number, actor, "r", "update", "notes", f"n{number}",
            {"text": "before"}, {"text": f"secret {number}"}, salt=os.urandom(16), claims={"sub": actor},
        )
        for number in range(begin, begin + count)
    ]  # fmt: skip
    for at in range(0, count, 500):
        await room.store.commit(Batch(tenant, tuple(map(Append, records[at : at + 500])), at_us))


def job_of(room: Strongroom) -> Retention:
    (job,) = (job for job in room.background.jobs if job.name == JOB)
    found: Retention = job.run.__self__  # type: ignore[attr-defined]
    return found


async def retain(room: Strongroom) -> None:
    """Run the job once, as a node does."""
    lease = await room.background.leases.acquire(JOB)
    assert lease is not None
    try:
        await job_of(room).run(lease)
    finally:
        await lease.release(done=True)


async def rows(store: Store, tenant: str | None = "acme") -> list[JournalRow]:
    found: list[JournalRow] = []
    cursor = None
    while True:
        page = await store.rows(cursor, JournalFilter(tenant=tenant, platform=tenant is None))
        found += page.rows
        if page.cursor == cursor:
            return found
        cursor = page.cursor


async def whole(room: Strongroom) -> None:
    """Everything that is left verifies, in the store and in the archive."""
    await room.sealer.seal_now()
    report = await verify_store(room.store)
    assert report.findings == []
    archive = job_of(room)._archive
    if archive is not None:
        for tree in {one["tree"] for one in await tiles(room)} | {TREE}:
            end = 0
            for first, after, file in archive.segments(tree):
                assert first == end, "no gap between segments"
                assert (await archive.verify(file)).findings == []
                end = after


async def tiles(room: Strongroom) -> list[dict[str, Any]]:
    from strongroom.entities import Query

    return [dict(one) for one in await room.store.find(JournalTile.__collection__.name, None, Query(limit=1000))]


@pytest.fixture
async def room(url_of_any: str, tmp_path: Path) -> AsyncIterator[Strongroom]:
    async with opened(url_of_any, archive=tmp_path / "archive") as (room, _):
        yield room


@pytest.fixture
async def memory(tmp_path: Path) -> AsyncIterator[Strongroom]:
    async with opened("json://:memory:", archive=tmp_path / "archive") as (room, _):
        yield room


# --- Retention ------------------------------------------------------------------------------------------------


async def test_old_tiles_are_archived_and_dropped_whole_and_what_is_left_verifies(room: Strongroom) -> None:
    await append(room, TILE + 100, days_ago=200)
    await append(room, TILE, days_ago=100)
    await append(room, 50, days_ago=1)
    await append(room, 10, tenant="beta", days_ago=200)
    await room.sealer.seal_now()
    before = await rows(room.store)
    await retain(room)
    left = [row for row in await rows(room.store) if row[7] == "notes"]
    assert [row[1] for row in left] == [row[1] for row in before[2 * TILE :]], "a tile with one younger record stays"
    assert len(await rows(room.store, "beta")) == 10, "an incomplete tile stays"
    await whole(room)
    archive = job_of(room)._archive
    assert archive is not None
    ((first, end, file),) = archive.segments(TREE)
    assert (first, end) == (0, 2 * TILE)
    assert [record.id async for record in archive.records(file)] == [row[1] for row in before[: 2 * TILE]]
    (note,) = [row for row in await rows(room.store) if row[7] == "journal"]
    assert note[6] == "drop"
    with pytest.raises(Gone):
        await room.proofs.inclusion("acme", 0)
    assert (await room.proofs.inclusion("acme", 2 * TILE)).index == 2 * TILE
    await append(room, 2 * TILE, begin=1_000)
    await whole(room)


@pytest.mark.parametrize("tenant", [None, "acme"])
async def test_nothing_is_dropped_or_redacted_while_writes_are_off(memory: Strongroom, tenant: str | None) -> None:
    await append(memory, 2 * TILE, days_ago=200)
    await memory.tenant("acme").create(User(email="ann@example.com"))
    await memory.sealer.seal_now()
    await memory.writes.set(WritesChange(allowed=False, tenant=tenant, reason="a rollback"))
    before = len(await rows(memory.store))
    await retain(memory)
    with pytest.raises(WritesOff, match="a rollback"):
        await memory.redactions.redact(Subject("acme", user="user:ada"), "asked", context=ADMIN)
    assert len(await rows(memory.store)) >= before
    assert [row for row in await rows(memory.store) if row[4] == "user:ada"]
    await memory.writes.set(WritesChange(allowed=True, tenant=tenant))
    await retain(memory)
    assert len(await rows(memory.store)) < before
    await whole(memory)


async def test_more_tiles_than_a_segment_has_are_dropped_in_several(memory: Strongroom, monkeypatch: Any) -> None:
    monkeypatch.setattr("strongroom.audit.retention.MAX_SEGMENT_TILES", 1)
    assert MAX_SEGMENT_TILES > 1
    await append(memory, 2 * TILE + 1, days_ago=100)
    await memory.sealer.seal_now()
    await retain(memory)
    archive = job_of(memory)._archive
    assert archive is not None
    assert [one[:2] for one in archive.segments(TREE)] == [(0, TILE), (TILE, 2 * TILE)]
    await whole(memory)


async def test_the_platforms_rounds_go_with_their_leaves_and_tenants_still_verify(memory: Strongroom) -> None:
    await append(memory, 3, tenant="quiet", days_ago=100)
    await memory.sealer.seal_now()
    await append(memory, 2 * TILE, tenant=None, days_ago=100)
    await memory.sealer.seal_now()
    job = job_of(memory)
    job._clock = Later(memory.clock, days=200)  # also for the round's own time
    await append(memory, TILE, tenant=None, days_ago=1)
    await retain(memory)
    tree = await memory.store.get("journal_trees", None, tree_id(None))
    assert tree is not None
    assert tree["first_index"] >= 2 * TILE
    await whole(memory)
    await append(memory, 5, tenant="quiet")
    await whole(memory)


class Later:
    """A clock that is some days ahead of another."""

    def __init__(self, clock: Any, days: int) -> None:
        self._clock = clock
        self._days = days

    def now_us(self) -> int:
        now: int = self._clock.now_us()
        return now + self._days * DAY_US


async def test_a_run_that_was_killed_is_continued_at_each_of_its_steps(memory: Strongroom) -> None:
    """Before the archive's file had its name, after it, and after the tiles were removed but not the records."""
    await append(memory, 2 * TILE, days_ago=100)
    await memory.sealer.seal_now()
    job, store = job_of(memory), memory.store

    class Killed(Exception):
        pass

    async def die(*_: Any) -> Any:
        raise Killed

    archive = job._archive
    assert archive is not None
    for owner, name in ((archive, "write_segment"), (store, "commit"), (store, "drop")):
        original = getattr(owner, name)
        lease = await memory.background.leases.acquire(JOB)
        assert lease is not None
        if name == "commit":  # that of the tiles, not of the lease

            async def some(batch: Batch, original: Any = original) -> Any:
                if any(isinstance(one, Append) for one in batch.operations):
                    raise Killed
                return await original(batch)

            setattr(owner, name, some)
        else:
            setattr(owner, name, die)
        with pytest.raises(Killed):
            await job.run(lease)
        delattr(owner, name)
        await lease.release(done=False)
        assert len([row for row in await rows(store) if row[7] == "notes"]) == 2 * TILE, name
        assert (await verify_store(store)).findings == [], name
    await retain(memory)
    assert [row for row in await rows(store) if row[7] == "notes"] == []
    assert [one[:2] for one in archive.segments(TREE)] == [(0, 2 * TILE)]
    await whole(memory)


async def test_nothing_is_dropped_that_the_archive_did_not_take(memory: Strongroom, tmp_path: Path) -> None:
    await append(memory, TILE, days_ago=100)
    await memory.sealer.seal_now()
    (tmp_path / "archive").write_text("a file stands in the way")
    with pytest.raises(StoreError, match="cannot be used"):
        await retain(memory)
    assert len(await rows(memory.store)) == TILE


async def test_a_new_store_keeps_90_days_an_older_one_all_and_a_floor_is_never_lowered(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    async with Strongroom.open(url, sealing=False) as room:
        assert (await room.retention.of("acme")).days == 90
        await room.keys.create(name="k")
        await room.store.commit(
            Batch(None, (_delete_policy(),), 1)  # as a store is that was made before this version
        )
    async with Strongroom.open(url, sealing=False) as room:
        policies = room.retention
        assert (await policies.of("acme")).days is None
        assert (await policies.set("acme", days=30, floor_days=10)).days == 30
        assert (await policies.set("acme", floor_days=183)).days == 183
        for days, floor_days in ((None, 182), (182, None), (36_501, None), (0, None)):
            with pytest.raises(InvalidInput):
                await policies.set("acme", days=days, floor_days=floor_days)
        assert (await policies.set(None, everyone=True, floor_days=2_557)).days is None
        assert (await policies.of("acme")).days == 2_557
        for context in (Context("acme", "key:a", {"admin": True, "tenant": "acme"}), Context(None, "key:a", {})):
            with pytest.raises(Denied):
                await policies.set("acme", days=3_000, context=context)
    async with Strongroom.open(url, sealing=False, journal_days=400) as room:
        assert (await room.retention.of("beta")).days == 2_557, "a setting does not go below the floor"


def _delete_policy() -> Any:
    from strongroom.storage.port import Delete

    return Delete("retention_policies", POLICY)


# --- Legal holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hold", "left"),
    [
        ({"tenant": "acme"}, 3 * TILE),
        ({}, 3 * TILE),
        ({"tenant": "other"}, 0),
        ({"tenant": "acme", "collection": "notes", "entity_id": f"n{TILE}"}, 2 * TILE),
        ({"user": "user:eve"}, TILE),
        ({"user": "user:nobody"}, 0),
        ({"until": datetime.now(UTC) - timedelta(days=150)}, 3 * TILE),
        ({"since": datetime.now(UTC) - timedelta(days=50)}, 0),
    ],
)
async def test_a_legal_hold_keeps_its_records_until_it_is_lifted(
    memory: Strongroom, hold: dict[str, Any], left: int
) -> None:
    await append(memory, 2 * TILE, days_ago=200)
    await append(memory, TILE, days_ago=100, actor="user:eve", begin=1_000)
    await memory.sealer.seal_now()
    placed = await memory.legal_holds.place("case 7", **hold)
    await retain(memory)
    assert len([row for row in await rows(memory.store) if row[7] == "notes"]) == left
    await whole(memory)
    lifted = await memory.legal_holds.lift(placed.id, "closed")
    assert not lifted.active
    await retain(memory)
    assert [row for row in await rows(memory.store) if row[7] == "notes"] == []
    await whole(memory)
    with pytest.raises(Conflict, match="lifted already"):
        await memory.legal_holds.lift(placed.id, "again")
    about = [row[6] for row in await rows(memory.store, None) if row[7] == "legal_holds"]
    assert about == ["create", "update"], "both are journalled"


async def test_a_hold_that_comes_between_the_look_and_the_drop_still_counts(
    memory: Strongroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    await append(memory, TILE, days_ago=100)
    await memory.sealer.seal_now()
    archive = job_of(memory)._archive
    assert archive is not None
    original = archive.write_segment

    async def slow(*given: Any) -> Path:
        file = await original(*given)
        if not await memory.legal_holds.active():
            await memory.legal_holds.place("now", tenant="acme")
        return file

    monkeypatch.setattr(archive, "write_segment", slow)
    await retain(memory)
    assert len(await rows(memory.store)) == TILE


async def test_a_hold_blocks_redaction_and_the_tenants_deletion(memory: Strongroom) -> None:
    await append(memory, 3)
    hold = await memory.legal_holds.place("case 7", tenant="acme", user="user:ada")
    for subject in (Subject("acme", user="user:ada"), Subject("acme", collection="notes", entity_id="n1")):
        with pytest.raises(Conflict, match="case 7"):
            await memory.redactions.redact(subject, "asked")
    with pytest.raises(Conflict, match="legal hold"):
        await memory.tenants.delete("acme")
    blocking = await memory.legal_holds.blocking("acme")
    assert blocking is not None
    assert blocking.id == hold.id
    assert await memory.legal_holds.blocking("beta") is None
    assert [row for row in await rows(memory.store) if len(row[12]) != 16] == []


async def test_bad_holds_are_refused_with_every_problem(memory: Strongroom) -> None:
    moment = datetime.now(UTC)
    with pytest.raises(InvalidInput) as caught:
        await memory.legal_holds.place(" ", entity_id="x", user="", since=moment, until=moment)
    assert {problem.path for problem in caught.value.problems} == {"reason", "user", "collection", "until"}
    with pytest.raises(NotFound):
        await memory.legal_holds.lift("no such", "because")
    with pytest.raises(Denied):
        await memory.legal_holds.place("mine", context=Context("acme", "key:a", {"admin": True, "tenant": "acme"}))


# --- Redaction ------------------------------------------------------------------------------------------------


async def test_redacting_a_document_removes_what_was_said_of_it_and_every_proof_holds(room: Strongroom) -> None:
    await append(room, TILE, days_ago=200)
    await append(room, 20)
    await append(room, 3, tenant="beta")
    await room.sealer.seal_now()
    await retain(room)
    root = await room.proofs.inclusion("acme", TILE + 4)
    done = await room.redactions.redact(Subject("acme", collection="notes", entity_id="n4"), "erasure request 12")
    assert (done.records, done.archived) == (1, 1)
    assert (await room.redactions.redact(Subject("acme", collection="notes", entity_id="n4"), "again")).records == 0
    found = await rows(room.store)
    (row,) = [row for row in found if len(row[12]) != 16]
    assert (row[4], row[8], row[10]) == ("user:ada", "", None)
    assert opening_of(row[12]).redacted == ("entity_id", "before", "after")
    for part in ("erasure request 12", done.record, "system"):
        assert part in str(row[11])
    assert not [row for row in found if "secret 4" in str(row) or row[8] == "n4"]
    notes = [row for row in found if row[6] == "redact"]
    assert [(row[8], "n4" in str(row)) for row in notes] == [("", False)] * 2, "the note does not say whom it removed"
    assert len([row for row in await rows(room.store, "beta") if row[8]]) == 3, "another tenant's stay"
    again = await room.proofs.inclusion("acme", TILE + 4, root.size)
    assert (again.leaf, again.root) == (root.leaf, root.root)
    await whole(room)
    archive = job_of(room)._archive
    assert archive is not None
    ((_, _, file),) = archive.segments(TREE)
    assert "secret 4\\" not in file.read_text()
    assert "secret 5\\" in file.read_text()


async def test_redacting_a_user_removes_the_name_from_every_record_of_that_user(room: Strongroom) -> None:
    await append(room, TILE, days_ago=200)
    await append(room, 5)
    await append(room, 5, actor="user:eve")
    await room.sealer.seal_now()
    await retain(room)
    done = await room.redactions.redact(Subject("acme", user="user:ada"), "asked", context=ADMIN)
    assert (done.records, done.archived) == (5, TILE)
    found = await rows(room.store)
    assert not [row for row in found if "user:ada" in str(row)]
    assert len([row for row in found if row[4] == "user:eve"]) == 5
    await whole(room)
    archive = job_of(room)._archive
    assert archive is not None
    ((_, _, file),) = archive.segments(TREE)
    assert "user:ada" not in file.read_text()


ADMIN = Context(None, "key:admin", {"admin": True})


async def test_records_from_before_salts_are_redacted_too(memory: Strongroom) -> None:
    old = Record("old", "acme", 1, "user:ada", "r", "create", "notes", "n1", None, {"text": "secret"})
    await memory.store.commit(Batch("acme", (Append(old),), 1))
    with pytest.raises(Conflict, match="no salts yet"):
        await memory.redactions.redact(Subject("acme", user="user:ada"), "asked")
    await memory.sealer.seal_now()
    assert (await memory.redactions.redact(Subject("acme", user="user:ada"), "asked")).records == 1
    await whole(memory)


@pytest.mark.parametrize(
    "subject",
    [
        Subject("acme"),
        Subject("acme", user="u", collection="notes", entity_id="n"),
        Subject("acme", collection="notes"),
        Subject("acme", entity_id="n"),
        Subject("acme", user=""),
        Subject("acme", user="x" * 501),
        Subject("acme", collection="journal", entity_id="x"),
    ],
)
async def test_a_subject_that_is_not_one_user_or_one_document_is_refused(memory: Strongroom, subject: Subject) -> None:
    with pytest.raises(InvalidInput):
        await memory.redactions.redact(subject, "asked")


async def test_only_an_administrator_of_the_platform_redacts(memory: Strongroom) -> None:
    for context in (Context("acme", "key:a", {"admin": True, "tenant": "acme"}), Context(None, "key:b", {})):
        with pytest.raises(Denied):
            await memory.redactions.redact(Subject("acme", user="u"), "asked", context=context)
    with pytest.raises(InvalidInput):
        await memory.redactions.redact(Subject("acme", user="u"), "")


# --- All together ---------------------------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(1, 400), st.sampled_from([0, 30, 100, 200])),
    st.tuples(st.just("seal"), st.just(0), st.just(0)),
    st.tuples(st.just("retain"), st.just(0), st.just(0)),
    st.tuples(st.just("redact"), st.integers(0, 300), st.just(0)),
    st.tuples(st.just("erase"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("hold"), st.integers(0, 300), st.just(0)),
    st.tuples(st.just("lift"), st.just(0), st.just(0)),
)


@pytest.mark.parametrize("kind", ["json-memory", "sqlite"])
@examples(0.6)
@given(steps=st.lists(STEPS, min_size=3, max_size=14), archived=st.booleans())
async def test_after_any_sequence_of_writes_seals_redactions_and_retention_everything_verifies(
    kind: str, tmp_path: Path, steps: Sequence[tuple[str, int, int]], archived: bool
) -> None:
    folder = tmp_path / os.urandom(8).hex()
    folder.mkdir()
    url = "json://:memory:" if kind == "json-memory" else f"sqlite:///{folder}/a.db"
    async with opened(url, archive=folder / "archive" if archived else None) as (room, _):
        await run_steps(room, steps)
        await whole(room)
        tree = await room.store.get("journal_trees", None, TREE)
        for index in range(tree["first_index"], tree["size"], 97) if tree is not None else ():
            proof = await room.proofs.inclusion("acme", index)
            assert proof.index == index


async def run_steps(room: Strongroom, steps: Sequence[tuple[str, int, int]]) -> None:
    holds: list[LegalHold] = []
    for number, (step, value, days) in enumerate(steps):
        match step:
            case "write":
                await append(room, value, days_ago=days + number / 100, actor=f"user:{number % 4}")
            case "seal":
                await room.sealer.seal_now()
            case "retain":
                await retain(room)
            case "redact" | "erase":
                subject = Subject("acme", user=f"user:{value}")
                if step == "redact":
                    subject = Subject("acme", collection="notes", entity_id=f"n{value}")
                with suppress(Conflict) if holds else nullcontext():
                    await room.redactions.redact(subject, "asked")
            case "hold":
                holds.append(
                    await room.legal_holds.place("case", tenant="acme", collection="notes", entity_id=f"n{value}")
                )
            case _:
                if holds:
                    await room.legal_holds.lift(holds.pop().id, "closed")


@pytest.mark.server
async def test_each_store_keeps_redacts_and_drops_alike(url: str, tmp_path: Path) -> None:
    """One pass on each store, Firestore as well."""
    async with opened(url, archive=tmp_path / "archive") as (room, _):
        await append(room, TILE, days_ago=200)
        await append(room, 9, begin=500)
        await room.sealer.seal_now()
        await retain(room)
        done = await room.redactions.redact(Subject("acme", collection="notes", entity_id="n501"), "asked")
        assert done.records == 1
        assert len([row for row in await rows(room.store) if row[7] == "notes"]) == 9
        assert [row[3] for row in await rows(room.store)] == sorted(row[3] for row in await rows(room.store))
        await whole(room)


async def test_a_part_of_a_file_that_a_killed_process_left_is_not_taken_for_a_segment(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    (tmp_path / TREE).mkdir()
    for name in ("000000000000-000000000256.part", "x.jsonl", "0-256.jsonl"):
        (tmp_path / TREE / name).write_text("{}")
    assert archive.segments(TREE) == []
    assert archive.segments("no such tree") == []
