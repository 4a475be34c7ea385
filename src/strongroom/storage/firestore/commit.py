"""One commit: drafted, sent, drafted again after a conflict, and looked up if its answer was lost."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ...errors import StrongroomError, TooLarge, Unavailable
from ..port import Batch, Committed
from .client import PRECONDITION, UNCERTAIN, Code, Rejected, Wire, pause, translated
from .draft import Draft, needs_content, places_of
from .journal import Journal, shard_of
from .journal_documents import record_documents
from .paths import Paths
from .places import ANY, HINT, Line, Outcome, Pending, Plan, Raw, Written
from .values import COMMIT_FIELD, MAX_STORED_BYTES, WritePb, micros, stored_size, timestamp
from .writes import write_of

MAX_SEEN = 4_096
MAX_SEEN_BYTES = 16_384
"""Documents larger than this are not remembered, and at most MAX_SEEN are."""
MAX_ROUNDS = 10
Mode = Literal["add", "read", "write"]


class Seen:
    """What this process saw last at some places: an assumption that saves a read, and that each commit checks."""

    def __init__(self) -> None:
        self._raws: OrderedDict[str, Raw] = OrderedDict()

    def get(self, path: str) -> Raw | None:
        raw = self._raws.get(path)
        if raw is not None:
            self._raws.move_to_end(path)
        return raw

    def keep(self, path: str, found: Any | None) -> Raw:
        """Remember a stored document, or its absence. Returns it in the draft's form."""
        raw = Raw(0) if found is None else Raw(micros(found.update_time), found)
        self.put(path, raw)
        return raw

    def put(self, path: str, raw: Raw) -> None:
        if raw.found is not None and raw.found.ByteSize() <= MAX_SEEN_BYTES:
            self._raws[path] = raw
            self._raws.move_to_end(path)
            if len(self._raws) > MAX_SEEN:
                self._raws.popitem(last=False)
        else:
            self._raws.pop(path, None)

    def forget(self, path: str) -> None:
        self._raws.pop(path, None)

    def clear(self) -> None:
        self._raws.clear()


@dataclass(slots=True)
class Job:
    """A waiting batch. While it commits, no other batch touches its `lanes`, and others touch its documents only as
    the modes allow."""

    batch: Batch
    future: asyncio.Future[Committed]
    lanes: frozenset[object]
    documents: Mapping[object, Mode]
    size: int


@dataclass(slots=True)
class _Prepared:
    """A commit that is ready to be sent."""

    writes: list[Any]
    places: list[Pending | None]
    """The place of each write; None for records and tenants."""
    lines: list[Line] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)


class Sender(Protocol):
    """The parts of the writer that a group uses."""

    wire: Wire
    paths: Paths
    journal: Journal
    plans: Mapping[str, Plan]
    seen: Seen
    heads: dict[str, Raw]
    tenants: set[str]
    counts: dict[str, int]
    timeout_s: float

    def next_commit(self) -> str: ...

    def lookup(self, path: str) -> Raw | None: ...

    async def read(self, paths: Sequence[str] | set[str]) -> dict[str, Raw]: ...

    def keep(self, path: str, document: Any | None) -> Raw: ...


def fail(group: list[Job], error: StrongroomError) -> None:
    for job in group:
        if not job.future.done():
            job.future.set_exception(copy.copy(error))


class Group:
    """Batches under way: drafted, sent, and drafted again until they are committed or refused."""

    def __init__(self, writer: Sender, jobs: list[Job]) -> None:
        self._writer = writer
        self._wire = writer.wire
        self._paths = writer.paths
        self._jobs = jobs
        self._deadline = time.monotonic() + writer.timeout_s

    async def commit(self) -> None:
        read: dict[str, Raw] | None = None  # None: optimistic
        attempt = 0
        while True:
            draft, outcomes = await self._decided(read)
            if read is None and any(outcome.error for outcome in outcomes):
                read = await self._truth(draft)
                continue
            prepared, commit = self._prepared(draft, outcomes)
            if not prepared.writes:
                self._answer(outcomes, prepared, [], 0)
                return
            try:
                moment, results = await self._sent(prepared, commit)
            except Rejected as rejected:
                if rejected.code not in PRECONDITION:
                    if len(self._jobs) > 1:
                        await self._apart()
                        return
                    raise self._refused(rejected, prepared, outcomes[0]) from None
                self._writer.counts["conflicts"] += 1
                if time.monotonic() > self._deadline:
                    raise Unavailable(
                        "commit: conflicts on these documents continue; nothing was changed", retry_after_s=1.0
                    ) from None
                if read is not None or rejected.code is Code.ABORTED:
                    await pause(attempt)
                    attempt += 1
                read = await self._truth(draft)
                continue
            self._answer(outcomes, prepared, results, moment)
            return

    @staticmethod
    def _refused(rejected: Rejected, prepared: _Prepared, outcome: Outcome) -> StrongroomError:
        """The error of a batch that Firestore refuses."""
        if rejected.code is Code.INVALID_ARGUMENT:
            for write, place in zip(prepared.writes, prepared.places, strict=True):
                size = stored_size(write.update) if write.HasField("update") else 0
                if place is not None and size > MAX_STORED_BYTES:
                    paths = [made.path if made is not None else None for made in outcome.made]
                    number = paths.index(place.path) if place.path in paths else None
                    found = f"found {size} bytes in a document as Firestore counts them, expected at most 1 MiB"
                    return TooLarge(f"operation {number}: {place.id}: {found}", operation=number)
        return translated(rejected.code, rejected.text, "commit")

    async def _apart(self) -> None:
        """Commit each batch alone: Firestore refuses one of them, or it is too large."""
        for job in self._jobs:
            try:
                await Group(self._writer, [job]).commit()
            except StrongroomError as error:
                fail([job], error)

    # --- Deciding ---

    async def _decided(self, known: dict[str, Raw] | None) -> tuple[Draft, list[Outcome]]:
        read = dict(known or {})
        lookup = self._writer.lookup if known is None else None
        wanted: set[str] = set()
        if known is None:
            for job in self._jobs:
                if any(needs_content(self._writer.plans, operation) for operation in job.batch.operations):
                    wanted |= self._unknown(job.batch)
        for _ in range(MAX_ROUNDS):
            if wanted:
                read |= await self._writer.read(wanted)
            draft = Draft(self._writer.plans, self._paths, read, lookup, shard_of)
            outcomes = [draft.run(job.batch) for job in self._jobs]
            if not draft.need:
                return draft, outcomes
            wanted = set(draft.need)
        raise AssertionError("each round reads what the one before missed")

    def _unknown(self, batch: Batch) -> set[str]:
        """The places of operations that need the document's contents and that this process does not know."""
        found: set[str] = set()
        for operation in batch.operations:
            if needs_content(self._writer.plans, operation):
                found |= places_of(self._writer.plans, self._paths, Batch(batch.tenant, (operation,), 0))
        return {path for path in found if self._writer.lookup(path) is None}

    async def _truth(self, draft: Draft) -> dict[str, Raw]:
        """The present contents of all places that the batches touch."""
        paths = set(draft.pending) | set(draft._own)
        for job in self._jobs:
            paths |= places_of(self._writer.plans, self._paths, job.batch)
        return await self._writer.read(paths)

    # --- Sending ---

    def _prepared(self, draft: Draft, outcomes: Sequence[Outcome]) -> tuple[_Prepared, str]:
        commit = self._writer.next_commit()
        prepared = _Prepared([], [])
        for place in draft.pending.values():
            if (write := write_of(place, commit)) is not None:
                prepared.writes.append(write)
                prepared.places.append(place)
        for number, line in enumerate(draft.lines):
            back = None
            if line.of is not None:
                made = outcomes[self._index(outcomes, line.batch)].made[line.of]
                back = 0 if made is None else _back(draft.pending[made.path], line.batch)
            for document in record_documents(self._paths, line, commit, number, back):
                write = WritePb(update=document)
                write.current_document.exists = False
                prepared.writes.append(write)
                prepared.places.append(None)
        prepared.lines = draft.lines
        prepared.tenants = self._new_tenants(outcomes)
        for tenant in prepared.tenants:
            write = WritePb()
            write.update.name = self._paths.tenant(tenant)
            write.update.fields["id"].string_value = tenant
            prepared.writes.append(write)
            prepared.places.append(None)
        return prepared, commit

    @staticmethod
    def _index(outcomes: Sequence[Outcome], number: int) -> int:
        """Which batch of the group the draft's `number`th successful one is."""
        return [index for index, outcome in enumerate(outcomes) if outcome.error is None][number]

    def _new_tenants(self, outcomes: Sequence[Outcome]) -> list[str]:
        found: dict[str, None] = {}
        for job, outcome in zip(self._jobs, outcomes, strict=True):
            tenant = job.batch.tenant
            if outcome.error is None and tenant is not None and tenant not in self._writer.tenants:
                plans = (self._writer.plans.get(getattr(o, "collection", "")) for o in job.batch.operations)
                if any(plan is not None and plan.collection.tenant_scoped for plan in plans):
                    found[tenant] = None
        return list(found)

    async def _sent(self, prepared: _Prepared, commit: str) -> tuple[int, list[Any]]:
        """Commit, and look the outcome up if the answer was lost. Returns the commit's time, and the sums of each
        write's increments."""
        attempt = 0
        uncertain = False
        while True:
            self._writer.counts["commits"] += 1
            try:
                answer = await self._wire.commit(prepared.writes)
                return micros(answer.commit_time), [result.transform_results for result in answer.write_results]
            except Rejected as rejected:
                if rejected.code not in UNCERTAIN and not (uncertain and rejected.code in PRECONDITION):
                    raise
                uncertain = True
                answer = await self._found_out(prepared, commit, rejected)
                if answer is not None:
                    return answer
                if rejected.code in PRECONDITION:
                    raise
            await pause(attempt)
            attempt += 1

    async def _found_out(self, prepared: _Prepared, commit: str, rejected: Rejected) -> tuple[int, list[Any]] | None:
        """The lost answer of a commit; None if it was not applied. Raises Unavailable if that cannot be found out."""
        unknown = Unavailable(
            f"commit: Firestore's answer was lost ({rejected}): whether it was applied is not known",
            outcome="unknown",
            retry_after_s=1.0,
        )
        written = {write.update.name: place for write, place in zip(prepared.writes, prepared.places, strict=True)
                   if write.HasField("update") and (write.update.fields or write.update_transforms)}  # fmt: skip
        if not written:
            raise unknown
        found = await self._looked(list(written), unknown)
        ours = {name: document for name, document in found.items() if document is not None
                and document.fields[COMMIT_FIELD].string_value == commit}  # fmt: skip
        if ours:
            if any(place is not None and place.increments and name not in ours for name, place in written.items()):
                raise unknown  # it was applied, but other nodes have added to the counter since
            moment = micros(next(iter(ours.values())).update_time)
            return moment, [
                [ours[place.path].fields[name] for name in place.increments] if place is not None else []
                for place in prepared.places
            ]
        if time.monotonic() > self._deadline:
            raise unknown
        if prepared.lines:
            # The record is absent. Sending again is safe: of two commits with the same record, one is refused.
            return None
        for write, place in zip(prepared.writes, prepared.places, strict=True):
            if place is not None and place.path in found:
                document = found[place.path]
                version = 0 if document is None else micros(document.update_time)
                if _version_before(place) not in (version, ANY):
                    raise unknown
                if place.increments:
                    # If the first try arrives after all, this one is refused instead of adding twice.
                    write.current_document.update_time.CopyFrom(timestamp(version))
        return None

    async def _looked(self, names: list[str], unknown: Unavailable) -> dict[str, Any | None]:
        """The present documents, as soon as Firestore answers again. Raises `unknown` if it does not in time."""
        attempt = 0
        while time.monotonic() < self._deadline:
            try:
                return (await self._wire.batch_get(names))[0]
            except Unavailable:
                await pause(attempt)
                attempt += 1
        raise unknown

    # --- Answering ---

    def _answer(self, outcomes: Sequence[Outcome], prepared: _Prepared, results: Sequence[Any], moment: int) -> None:
        writer = self._writer
        writer.counts["batches"] += len(self._jobs)
        sums: dict[tuple[str, str], int] = {}
        places: dict[str, Pending] = {}
        for number, (write, place) in enumerate(zip(prepared.writes, prepared.places, strict=True)):
            if place is None:
                continue
            places[place.path] = place
            if place.increments:
                for name, value in zip(place.increments, results[number], strict=True):
                    sums[place.path, name] = value.integer_value
            self._remember(place, write, moment, sums)
        writer.tenants.update(prepared.tenants)
        number = 0
        for job, outcome in zip(self._jobs, outcomes, strict=True):
            if job.future.done():  # its caller was cancelled
                number += outcome.error is None
                continue
            if outcome.error is not None:
                job.future.set_exception(outcome.error)
                continue
            values = dict(outcome.values)
            versions = []
            for index, made in enumerate(outcome.made):
                versions.append(self._version(made, places, number, moment))
                if made is not None and made.field is not None:
                    values[index] = _sum_of(made, places[made.path], sums)
            sequence = outcome.lines[-1].sequence if outcome.lines else None
            job.future.set_result(Committed(tuple(versions), values, sequence))
            number += 1

    @staticmethod
    def _version(made: Written | None, places: Mapping[str, Pending], number: int, moment: int) -> int:
        if made is None:
            return 0
        place = places.get(made.path)
        return moment if place is None else moment - _back(place, number)

    def _remember(self, place: Pending, write: Any, moment: int, sums: Mapping[tuple[str, str], int]) -> None:
        """Remember the state of a place after the commit."""
        if not place.touched:
            return
        writer = self._writer
        if not place.exists:
            writer.seen.forget(place.path)
            writer.heads.pop(place.path, None)
            return
        if place.whole:
            found = type(write.update)()
            found.CopyFrom(write.update)
        elif place.base.found is not None:
            found = type(write.update)()
            found.CopyFrom(place.base.found)
            for name, value in write.update.fields.items():
                found.fields[name].CopyFrom(value)
            for name in place.increments:
                found.fields[name].integer_value = sums[place.path, name]
        else:
            writer.seen.forget(place.path)
            return
        found.name = place.path
        found.update_time.CopyFrom(timestamp(moment))
        if place.increments:
            # Other nodes may have changed other fields since this process read it: only the counter is known.
            writer.seen.put(place.path, Raw(HINT, found))
        else:
            writer.keep(place.path, found)


def _version_before(place: Pending) -> int:
    """The version that a place had before the commit, as far as this process knows."""
    if place.base.version == HINT and place.base.found is not None:
        return micros(place.base.found.update_time)
    return place.base.version


def _sum_of(made: Written, place: Pending, sums: Mapping[tuple[str, str], int]) -> int:
    """A counter's value after one of several additions that were sent as one."""
    if made.field in place.increments:
        return sums[place.path, made.field] - (place.increments[made.field] - made.so_far)
    before: Any = place.base.found
    value: int = before.fields[made.field].integer_value  # a bounded one came after it, so it was read
    return value + made.so_far


def _back(place: Pending, number: int) -> int:
    """How many microseconds the version of the group's `number`th batch is before its commit. Additions that share a
    commit have different versions, the last one the document's. Two commits on one document are further apart."""
    later = {adder for adder in place.adders if adder > number}
    return len(later)
