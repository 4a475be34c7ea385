"""The preview of a migration: whether the schemas fit, the obstacles, the amounts. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from ..database.write_state import WRITES
from ..entities import Aggregate
from ..errors import InvalidInput, Problem
from ..journal.trees import LOG, JournalLog
from ..storage.port import MAX_CHANGES_PAGE, ChangeKind, SchemaChange, SchemaRights, Store, unwrapped
from .copy import moved_records, records
from .state import (
    CURRENT,
    MIGRATIONS,
    NOT_MOVED,
    OWN,
    STORE_STATE,
    TREES,
    UNDOING,
    Part,
    Phase,
    Run,
)
from .streams import pages, parts

ALL_COUNTED = 2_000
"""With more parts than this the documents are not counted beforehand, because each count is a query."""
TYPICAL_WRITES_PER_S = {"sqlite": 35_000, "json": 2_000, "postgresql": 25_000, "firestore": 500}
"""Documents a second into each engine, measured by `python -m benchmarks.migrate`; only used for the estimate."""
_NAMED = 5
_COUNT = Aggregate("count")
LOG_COLLECTION = JournalLog.__collection__.name


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """The number of documents in one part of the source."""

    collection: str
    tenant: str | None
    documents: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The changes of the target's schema, the amounts, and in `problems` the reasons why a migration would be
    refused."""

    schema: tuple[SchemaChange, ...]
    parts: tuple[PlannedPart, ...]
    records: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    estimated_s: float

    @property
    def documents(self) -> int:
        return sum(part.documents for part in self.parts)


async def make_plan(run: Run) -> Plan:
    """Check both stores, and read the whole source: every document, and the journal."""
    refuse(wrong_options(run))
    schema = await run.target.prepare([*run.declared, *OWN], mode="plan")
    problems, notes = [*await open_target(run), *await open_source(run)], []
    if problems and not run.existing:
        return Plan(schema, (), 0, tuple(problems), (), 0)
    found: list[PlannedPart] = []
    records = 0
    began = time.perf_counter()
    async with aclosing(parts(run.existing, run.source)) as some:
        async for part in some:
            count = await _read_through(run, part, sum(one.documents for one in found))
            if count:
                found.append(PlannedPart(part.collection.name, part.tenant, count))
    if run.options.journal:
        try:
            records = await _read_journal(run)
        except InvalidInput as error:
            problems += error.problems
    else:
        notes.append("the journal is not moved: the history until now stays in the source only")
    if run.options.ignore:
        notes.append(f"not moved, because of --ignore: {', '.join(run.options.ignore)}")
    if run.options.overwrite:
        notes.append(
            "a journal of the target's own stays: the source's records are appended to it, and its log begins anew"
        )
    notes.append("the target assigns its own versions: a client's ETag will not match, and the client reads again")
    read_s = time.perf_counter() - began
    rate = TYPICAL_WRITES_PER_S.get(run.target.capabilities.name, min(TYPICAL_WRITES_PER_S.values()))
    written = sum(part.documents for part in found) + records
    return Plan(schema, tuple(found), records, tuple(problems), tuple(notes), read_s + written / rate)


async def _read_through(run: Run, part: Part, before: int) -> int:
    count = 0
    async with aclosing(pages(run.source, part)) as some:
        async for page in some:
            count += len(page)
            run.progress("reading the source", before + count, None)
    return count


async def _read_journal(run: Run) -> int:
    cursor, count = None, 0
    while (page := await records(run, cursor, MAX_CHANGES_PAGE)).cursor != cursor:
        cursor = page.cursor
        count += len(moved_records(run, page.records))
        run.progress("reading the source's journal", count, None)
    return count


async def count_documents(run: Run) -> int | None:
    """How many documents the source has, for the progress; None with too many parts to count each."""
    total = 0
    asked = 0
    async with aclosing(parts(run.existing, run.source)) as some:
        async for part in some:
            asked += 1
            if asked > ALL_COUNTED:
                return None
            total += await _count(run.source, part)
    return total


async def _count(store: Store, part: Part) -> int:
    answer = await store.aggregate(part.collection.name, part.tenant, [_COUNT], None)
    count: int = answer[_COUNT.name]
    return count


# --- Opening --------------------------------------------------------------------------------------------------


def wrong_options(run: Run) -> list[Problem]:
    options = run.options
    wrong = []
    if not 3 <= options.batch <= 500:
        wrong.append(Problem("--batch", f"found {options.batch}, expected 3 to 500"))
    if options.switch and not options.live:
        wrong.append(Problem("--switch", "switches a --live migration over: give both"))
    if options.backup is not None and not options.overwrite:
        wrong.append(Problem("--backup", "is of what --overwrite replaces: give both"))
    if run.source is run.target:
        wrong.append(Problem("--to", "is the source itself"))
    return wrong


async def open_source(run: Run) -> list[Problem]:
    """Open the source's collections without changing anything; returns the problems.

    A collection that the source never had is no problem: it has no documents to move.
    """
    absent, problems = await open_as_it_is(run.source, run, "--from")
    run.existing = () if problems else tuple(c for c in run.declared if c.name not in absent)
    run.source_is_sealed = not problems and absent.isdisjoint(collection.name for collection in TREES)
    if run.source_is_sealed and (log := await run.source.get(LOG_COLLECTION, None, LOG)) is not None:
        run.legacy_secret = log["legacy_secret"]
    if run.options.live and STORE_STATE.name in absent:
        problems.append(
            Problem(
                "--live",
                "the source was never opened by a version that supports a switch-over: restart its servers with this "
                "version first",
            )
        )
    elif run.options.live and not problems and not run.switching and (reason := await refusal(run.source)):
        other = await other_store(run.source)
        where = f" ({other})" if other else ""
        problems.append(Problem("--live", f"the writes of the source are already off: {reason}{where}"))
    return problems


async def open_as_it_is(store: Store, run: Run, path: str) -> tuple[set[str], list[Problem]]:
    """Prepare a store for the declared collections that it has, unless one differs from its declaration. Returns the
    names of absent collections, and the problems."""
    changes = await store.prepare([*run.declared, *OWN], mode="plan")
    dropped = {change.collection for change in changes if change.kind is ChangeKind.DROP_COLLECTION}
    absent = {c.collection for c in changes if c.kind is ChangeKind.CREATE_COLLECTION} - dropped
    misfits = [change for change in changes if change.collection not in absent]
    if not misfits:
        await store.prepare([collection for collection in (*run.declared, *OWN) if collection.name not in absent])
        return absent, []
    what = "; ".join(map(str, misfits[:_NAMED])) + (" …" if len(misfits) > _NAMED else "")
    sentence = f"its schema is not the declared one ({what}): run `strongroom schema apply` on it first"
    return absent, [Problem(path, sentence)]


async def open_target(run: Run) -> list[Problem]:
    """Open the target's collections without changing anything; returns the problems, existing documents included."""
    absent, problems = await open_as_it_is(run.target, run, "--to")
    if absent and (reason := await _unchangeable(run.target)):
        problems.append(Problem("--to", reason))
    if problems:
        return problems
    state = await run.load() if MIGRATIONS.name not in absent else None
    same = state is not None and state.source == run.options.source
    if state is not None and state.phase not in (Phase.DONE, Phase.ROLLED_BACK):
        what = f"a migration from {state.source} into it is {state.phase}"
        if state.phase in UNDOING:
            return [Problem("--to", f"{what}: finish that with --rollback")]
        return [] if same else [Problem("--to", f"{what}: finish it, or undo it with --rollback")]
    if run.options.overwrite or (same and state is not None and state.phase == Phase.DONE):
        return []
    existing = [f"{count} in {name}" for name, count in (await _existing_in(run, absent)).items()]
    if existing:
        what = ", ".join(existing[:_NAMED]) + (" …" if len(existing) > _NAMED else "")
        return [Problem("--to", f"is not empty ({what}): --overwrite replaces this, after a backup of it")]
    if not same and await has_journal(run.target):
        return [Problem("--to", "its journal has records of its own: take a new store, or --overwrite to append to it")]
    return []


async def _unchangeable(store: Store) -> str | None:
    """Why the store's user cannot create collections; None if it can. Only stores with user rights answer this."""
    backend = unwrapped(store)
    return await backend.unchangeable() if isinstance(backend, SchemaRights) else None


async def _existing_in(run: Run, absent: set[str]) -> dict[str, int]:
    """How many documents the target has in the collections that would be written, by collection."""
    counts: dict[str, int] = {}
    there = [collection for collection in run.declared if collection.name not in absent]
    async with aclosing(parts(there, run.target)) as some:
        async for part in some:
            count = await _count(run.target, part)
            if count:
                counts[part.collection.name] = counts.get(part.collection.name, 0) + count
    return counts


async def has_journal(store: Store) -> bool:
    """Whether the store's journal has records, but for those about the store itself."""
    cursor = None
    while (page := await store.rows(cursor)).cursor != cursor:
        cursor = page.cursor
        if any(row[7] not in NOT_MOVED for row in page.rows):
            return True
    return False


async def refusal(store: Store) -> str | None:
    """Why the store takes no writes now; None if it does. The store must be prepared for STORE_STATE."""
    document = await store.get(STORE_STATE.name, None, WRITES)
    return None if document is None or document["allowed"] else document["reason"] or "its writes are off"


async def other_store(store: Store) -> str:
    """The other store of the migration that turned this store's writes off."""
    document = await store.get(STORE_STATE.name, None, WRITES)
    return "" if document is None else str(document["other_store"])


async def same_store(run: Run) -> bool:
    """Whether source and target are the same store: then the source has the nonce that the start wrote into the
    target."""
    absent, _ = await open_as_it_is(run.source, run, "--from")
    if MIGRATIONS.name in absent:
        return False
    document = await run.source.get(MIGRATIONS.name, None, CURRENT)
    return document is not None and document["nonce"] == run.migration.nonce


def refuse(problems: Sequence[Problem]) -> None:
    """Raise InvalidInput with every problem, if there are any."""
    if problems:
        raise InvalidInput(problems)
