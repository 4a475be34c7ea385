"""Copies documents and journal records in batches that carry their own progress: each is applied once, in its turn.

A batch counts its part's `batches` from n to n + 1 before anything else, and is refused if that is not what it finds.
So several can be in flight, a kill at any moment leaves a whole number of them applied, and what the part says of
itself (the last id, the sum) is true of exactly those.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing

from ..entity import Document
from ..errors import AlreadyExists, BoundExceeded, Conflict, InvalidInput, Unavailable
from ..query import And, Query, Where
from ..storage.port import (
    MAX_BATCH_BYTES,
    Add,
    Append,
    Batch,
    ChangesPage,
    Create,
    Delete,
    Operation,
    Patch,
    Record,
    document_size,
)
from .checksum import MODULUS, SetSum, encoded_record, record_digest
from .state import NOT_MOVED, PARTS, Part, Run, now_us
from .streams import Pipeline, Refused, pages, parts

MAX_ATTEMPTS = 6
MAX_BACKOFF_S = 2.0
BYTES_PER_ENCODED = 8
"""At most what a byte of canonical encoding counts for in `document_size`: a small number is one here, eight there."""


# --- Trying again ---------------------------------------------------------------------------------------------


async def persistently(run: Run, work: Callable[[], Awaitable[None]]) -> None:
    """Do the work; when the store is away for a moment, or an answer was lost, go on from what was committed.

    It is given up after MAX_ATTEMPTS without a batch committed between them.
    """
    attempts = 0
    while True:
        before = run.committed
        try:
            await work()
            return
        except (Refused, Unavailable) as failure:
            error = failure.error if isinstance(failure, Refused) else failure
            if not isinstance(error, Unavailable | BoundExceeded | AlreadyExists | Conflict):
                raise error from None
            attempts = 1 if run.committed > before else attempts + 1
            if attempts >= MAX_ATTEMPTS:
                raise error from None
            if isinstance(failure, Refused) and isinstance(error, AlreadyExists):
                await _make_way(run, failure.batch, error)
        await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF_S, 0.02 * 4**attempts)))  # noqa: S311 - jitter
        await run.load()


async def _make_way(run: Run, batch: Batch, error: AlreadyExists) -> None:
    index = error.details.get("operation")
    operation = batch.operations[index] if isinstance(index, int) else None
    if isinstance(operation, Create) and operation.collection in run.collections:
        part = Part(run.collections[operation.collection], batch.tenant)
        await make_way(run, part, operation.id, operation.document)


async def make_way(run: Run, part: Part, id: str, document: Document) -> None:
    """Remove from the target what holds a unique value that a document of the source has now.

    In the source the holder has let go of it since it was copied: the record of that is still to come, or the last
    comparison finds it, and puts the holder back as it is then.
    """
    for index in part.collection.indexes:
        values = [(name, document[name]) for name, _ in index.columns]
        if not index.unique or any(value is None for _, value in values):
            continue
        where = And(*(Where(name, "==", value) for name, value in values))
        query = Query(where, limit=2).check(part.collection)
        for holder in await run.target.find(part.collection.name, part.tenant, query):
            if holder["id"] != id:
                await run.target.commit(Batch(part.tenant, (Delete(part.collection.name, holder["id"]),), now_us()))


# --- Removing -------------------------------------------------------------------------------------------------


async def clear(run: Run, what: str) -> None:
    """Remove every document of the collections from the target, and what earlier copies said of themselves."""

    async def work() -> None:
        done = 0
        everything = parts((PARTS, *run.declared), run.target)
        async with Pipeline(run.target) as pipeline, aclosing(everything) as found:
            async for part in found:
                async with aclosing(pages(run.target, part)) as some:
                    async for page in some:
                        for batch in _deletions(part, [document["id"] for document in page], run.options.batch):
                            await pipeline.commit(batch, lambda: None)
                        done += len(page)
                        run.progress(what, done, None)

    await persistently(run, work)


def _deletions(part: Part, ids: list[str], size: int) -> Iterable[Batch]:
    for begin in range(0, len(ids), size):
        operations = tuple(Delete(part.collection.name, id) for id in ids[begin : begin + size])
        yield Batch(part.tenant, operations, now_us())


# --- Documents ------------------------------------------------------------------------------------------------


async def copy_documents(run: Run, total: int | None) -> None:
    """Copy every document of the source that is not there yet. What was copied before a kill is not read again."""

    async def work() -> None:
        counter = _Counter(run, total)
        async with Pipeline(run.target) as pipeline, aclosing(parts(run.held, run.source)) as found:
            async for part in found:
                await _PartCopy(run, pipeline, part, counter).copy()

    await persistently(run, work)


class _Counter:
    """Tells how many documents are committed, of all parts."""

    def __init__(self, run: Run, total: int | None) -> None:
        self._run = run
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        self._run.progress("copying documents", self._done, self._total)


class _PartCopy:
    """Copies one part, from where it stands."""

    def __init__(self, run: Run, pipeline: Pipeline, part: Part, counter: _Counter) -> None:
        self._run = run
        self._pipeline = pipeline
        self._part = part
        self._counter = counter
        self._canonical = run.canonical[part.collection.name]
        self._fixed = document_size(dict.fromkeys(part.collection.fields))
        self._operations: list[Operation] = []
        self._size = 0
        self._last_id = ""

    async def copy(self) -> None:
        part = self._part
        stored = await self._run.target.get(PARTS.name, None, part.id)
        self._there = stored is not None
        self._batches = stored["batches"] if stored is not None else 0
        self._sum = SetSum.of(stored["documents"], stored["checksum"]) if stored is not None else SetSum()
        self._counter.add(self._sum.count)
        if stored is not None and stored["done"]:
            return
        self._last_id = stored["last_id"] if stored is not None else ""
        room = self._run.options.batch - 2
        encoded, digest, name = self._canonical.encoded, self._canonical.digest, part.collection.name
        async with aclosing(pages(self._run.source, part, self._last_id)) as found:
            async for page in found:
                for document in page:
                    text = encoded(document)
                    size = self._fixed + BYTES_PER_ENCODED * len(text)
                    if len(self._operations) >= room or self._size + size > MAX_BATCH_BYTES:
                        await self._send(done=False)
                    self._sum.add(digest(text))
                    self._size += size
                    self._last_id = id = document.pop("id")
                    del document["version"]  # the target gives its own
                    created, updated = document.pop("created_at"), document.pop("updated_at")
                    self._operations.append(Create(name, id, document, created, updated))
        if self._operations or self._there:
            await self._send(done=True)

    async def _send(self, *, done: bool) -> None:
        creates, self._operations, self._size = self._operations, [], 0
        if not creates and not done:
            return  # the first document is larger than a batch is estimated to take: it goes alone
        id = self._part.id
        state: Document = {
            "last_id": self._last_id,
            "documents": self._sum.count,
            "checksum": self._sum.text,
            "done": done,
        }
        self._batches += 1
        operations: tuple[Operation, ...]
        if self._there:
            step = Add(PARTS.name, id, "batches", 1, at_most=self._batches, at_least=self._batches)
            operations = (step, *creates, Patch(PARTS.name, id, state))
        else:
            whole = {"of": self._part.collection.name, "tenant": self._part.tenant, "batches": self._batches, **state}
            operations = (Create(PARTS.name, id, whole), *creates)
            self._there = True
        count = len(creates)
        await self._pipeline.commit(Batch(self._part.tenant, operations, now_us()), lambda: self._landed(count))

    def _landed(self, count: int) -> None:
        self._run.committed += 1
        self._counter.add(count)


# --- The journal ----------------------------------------------------------------------------------------------


async def copy_journal(run: Run) -> None:
    """Append the source's journal records to the target's journal, up to the end that it has by then."""

    async def work() -> None:
        async with Pipeline(run.target) as pipeline:
            copy = JournalCopy(run)
            cursor = run.migration.cursor
            following = asyncio.ensure_future(run.source.changes(cursor, limit=_room(run)))
            try:
                while (page := await _fitting(run, cursor, await following)).records:
                    cursor = page.cursor
                    following = asyncio.ensure_future(run.source.changes(cursor, limit=_room(run)))
                    await pipeline.commit(*copy.batch(page))
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    await persistently(run, work)


class JournalCopy:
    """Makes the batches that append pages of records and move the cursor, each to follow the one before."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._step = run.migration.step
        self._records = run.migration.records
        self._sum = int(run.migration.record_sum, 16)

    def batch(self, page: ChangesPage) -> tuple[Batch, Callable[[], None]]:
        """The batch, and what to call once it is committed."""
        taken = taken_over(self._run, page.records)
        appended: list[Append] = []
        if self._run.migration.journal:
            for record in taken:
                self._sum = (self._sum + record_digest(encoded_record(record))) % MODULUS
                appended.append(Append(record))
        self._records += len(appended)
        self._step += 1
        step = self._step
        fields = {"cursor": page.cursor, "records": self._records, "record_sum": f"{self._sum:064x}"}
        operations: tuple[Operation, ...] = (self._run.guard(step), *appended, self._run.patch(**fields))

        def landed() -> None:
            self._run.note(**fields, step=step)
            self._run.progress("copying the journal", fields["records"], None)  # type: ignore[arg-type]

        return Batch(None, operations, now_us()), landed


def taken_over(run: Run, records: Iterable[Record]) -> list[Record]:
    """The records without those about the stores themselves. InvalidInput for a collection that nobody declared."""
    taken = [record for record in records if record.collection not in NOT_MOVED]
    unknown = {r.collection for r in taken} - run.collections.keys() - set(run.options.ignore)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise InvalidInput(
            f"{run.options.source} has documents of {names}, which nobody declared: name the modules that do in "
            f"STRONGROOM_ENTITIES, or leave them behind with --ignore {' --ignore '.join(sorted(unknown))}"
        )
    return taken


def _room(run: Run) -> int:
    return max(1, run.options.batch - 2)


async def _fitting(run: Run, cursor: str | None, page: ChangesPage) -> ChangesPage:
    """The page, or so much of it as a batch can hold: a record may be nearly two megabytes."""
    if sum(map(_rough_size, page.records)) <= MAX_BATCH_BYTES:
        return page
    size = 0
    for count, record in enumerate(page.records):
        size += sum(document_size(part) for part in (record.before, record.after) if part)
        if size > MAX_BATCH_BYTES and count:
            return await run.source.changes(cursor, limit=count)
    return page


def _rough_size(record: Record) -> int:
    """At least the size of what the record holds."""
    return 128 + BYTES_PER_ENCODED * len(encoded_record(record))
