"""Copies documents and journal records in batches that carry their own progress: each is applied once, in its turn.

Each batch takes the part's progress from the one before it (`state.Baton`), and is refused unless it comes right
behind. So several can be in flight, a kill at any moment leaves a whole number of them applied, and what the part says
of itself (the last id, the sum) is true of exactly those.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing

from ..entities import And, Document, Query, Where
from ..errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    NotFound,
    Unavailable,
)
from ..storage.port import (
    Append,
    Batch,
    ChangesPage,
    Create,
    Delete,
    Operation,
    Record,
    document_size,
)
from .checksum import MODULUS, SetSum, encoded_record, record_digest
from .state import (
    BATCH_BYTES,
    NOT_MOVED,
    PARTS,
    Baton,
    MigrationPart,
    Part,
    Run,
    now_us,
    standing,
)
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
            if not isinstance(error, Unavailable | NotFound | AlreadyExists | Conflict):
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
        fresh = MigrationPart(part=part.id, of=part.collection.name, tenant=part.tenant)
        state = await standing(self._run.target, part.id) or fresh
        self._baton = Baton(state)
        self._sum = SetSum.of(state.count, state.checksum)
        self._counter.add(self._sum.count)
        if state.done:
            return
        self._last_id = state.position or ""
        room = self._run.options.batch - 2
        encoded, digest, name = self._canonical.encoded, self._canonical.digest, part.collection.name
        async with aclosing(pages(self._run.source, part, self._last_id)) as found:
            async for page in found:
                for document in page:
                    text = encoded(document)
                    size = self._fixed + BYTES_PER_ENCODED * len(text)
                    if len(self._operations) >= room or self._size + size > BATCH_BYTES:
                        await self._send(done=False)
                    self._sum.add(digest(text))
                    self._size += size
                    self._last_id = id = document.pop("id")
                    del document["version"]  # the target gives its own
                    created, updated = document.pop("created_at"), document.pop("updated_at")
                    self._operations.append(Create(name, id, document, created, updated))
        if self._operations or self._baton.state.number:
            await self._send(done=True)

    async def _send(self, *, done: bool) -> None:
        creates, self._operations, self._size = self._operations, [], 0
        if not creates and not done:
            return  # the first document is larger than a batch is estimated to take: it goes alone
        taken = self._baton.taken()
        left = self._baton.handed_on(position=self._last_id, count=self._sum.count, checksum=self._sum.text, done=done)
        operations = (*taken, *creates, left)
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
            cursor = run.journal.position
            following = asyncio.ensure_future(run.source.changes(cursor, limit=_room(run)))
            try:
                while True:
                    page, encoded = await bounded(run, cursor, await following)
                    if not encoded:
                        break
                    cursor = page.cursor
                    following = asyncio.ensure_future(run.source.changes(cursor, limit=_room(run)))
                    await pipeline.commit(*copy.batch(page, encoded))
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    await persistently(run, work)


class JournalCopy:
    """Makes the batches that append pages of records and move the cursor, each to follow the one before."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._baton = Baton(run.journal)

    def batch(self, page: ChangesPage, encoded: Sequence[bytes]) -> tuple[Batch, Callable[[], None]]:
        """The batch, and what to call once it is committed; `encoded` are the page's records."""
        run, before = self._run, self._baton.state
        taken_over(run, page.records)
        kept: list[Append] = []
        total = int(before.checksum, 16)
        if run.migration.journal:
            for record, text in zip(page.records, encoded, strict=True):
                if record.collection not in NOT_MOVED:
                    kept.append(Append(record))
                    total = (total + record_digest(text)) % MODULUS
        taken = self._baton.taken()
        left = self._baton.handed_on(position=page.cursor, count=before.count + len(kept), checksum=f"{total:064x}")
        operations: tuple[Operation, ...] = (*taken, *kept, left)
        after = self._baton.state

        def landed() -> None:
            run.journal = after
            run.committed += 1
            run.progress("copying the journal", after.count, None)

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


async def bounded(run: Run, cursor: str | None, page: ChangesPage) -> tuple[ChangesPage, list[bytes]]:
    """The page behind `cursor`, or so much of it as a batch can hold (a record may be nearly two megabytes), and its
    records encoded."""
    encoded = [encoded_record(record) for record in page.records]
    if BYTES_PER_ENCODED * sum(map(len, encoded)) <= BATCH_BYTES:
        return page, encoded
    size = 0
    for count, record in enumerate(page.records):
        size += sum(document_size(part) for part in (record.before, record.after) if part)
        if size > BATCH_BYTES and count:
            return await run.source.changes(cursor, limit=count), encoded[:count]
    return page, encoded
