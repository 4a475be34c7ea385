"""Copies documents and journal records in batches that carry their own progress: each is applied once and in order.

Each batch replaces the progress of the batch before it (`state.ProgressChain`), and the store refuses it out of order.
So several batches can be in flight, a kill leaves a prefix of them applied, and the stored progress (the last id, the
checksum) describes exactly this prefix.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing

from msgspec import structs

from ..entities import And, Document, Query, Where
from ..errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    NotFound,
    Unavailable,
)
from ..journal.trees import JOURNAL, legacy_salt
from ..storage.journal_rows import record_of
from ..storage.port import (
    Append,
    Batch,
    ChangesPage,
    Create,
    Delete,
    JournalRow,
    Operation,
    Record,
    document_size,
)
from .checksum import MODULUS, SetSum, encoded_record, record_digest
from .state import (
    BATCH_BYTES,
    NOT_MOVED,
    PARTS,
    STORE_STATE,
    MigrationPart,
    Part,
    ProgressChain,
    Run,
    committed_progress,
    now_us,
)
from .streams import Pipeline, Refused, pages, parts

MAX_ATTEMPTS = 6
MAX_BACKOFF_S = 2.0
BYTES_PER_ENCODED = 8
"""The most that `document_size` counts for one byte of canonical encoding: a small number is 1 byte encoded, 8 here."""


# --- Retries --------------------------------------------------------------------------------------------------


async def with_retries(run: Run, work: Callable[[], Awaitable[None]]) -> None:
    """Do the work. When the store is unavailable or an answer was lost, resume from the committed progress.

    Raises the error after MAX_ATTEMPTS without a committed batch between them.
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
                await _free_for(run, failure.batch, error)
        await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF_S, 0.02 * 4**attempts)))  # noqa: S311 - jitter
        await run.load()


async def _free_for(run: Run, batch: Batch, error: AlreadyExists) -> None:
    index = error.details.get("operation")
    operation = batch.operations[index] if isinstance(index, int) else None
    if isinstance(operation, Create) and operation.collection in run.collections:
        part = Part(run.collections[operation.collection], batch.tenant)
        await free_unique_values(run, part, operation.id, operation.document)


async def free_unique_values(run: Run, part: Part, id: str, document: Document) -> None:
    """Remove target documents that have a unique value which a source document has now.

    In the source the other document gave the value up after it was copied. Its journal record follows, or the last
    comparison finds it; either restores the removed document as it is then.
    """
    for index in part.collection.indexes:
        values = [(name, document[name]) for name, _ in index.columns]
        if not index.unique or any(value is None for _, value in values):
            continue
        where = And(*(Where(name, "==", value) for name, value in values))
        query = Query(where, limit=2).check(part.collection)
        for other in await run.target.find(part.collection.name, part.tenant, query):
            if other["id"] != id:
                await run.target.commit(Batch(part.tenant, (Delete(part.collection.name, other["id"]),), now_us()))


# --- Removing -------------------------------------------------------------------------------------------------


async def clear(run: Run, what: str) -> None:
    """Remove every document of the collections from the target, and the progress of earlier copies."""

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

    await with_retries(run, work)


def _deletions(part: Part, ids: list[str], size: int) -> Iterable[Batch]:
    for begin in range(0, len(ids), size):
        operations = tuple(Delete(part.collection.name, id) for id in ids[begin : begin + size])
        yield Batch(part.tenant, operations, now_us())


# --- Documents ------------------------------------------------------------------------------------------------


async def copy_documents(run: Run, total: int | None) -> None:
    """Copy every document of the source that is not copied yet. A resumed copy reads no copied document again."""

    async def work() -> None:
        counter = _Counter(run, total)
        async with Pipeline(run.target) as pipeline, aclosing(parts(run.existing, run.source)) as found:
            async for part in found:
                await _PartCopy(run, pipeline, part, counter).copy()

    await with_retries(run, work)


class _Counter:
    """Reports how many documents of all parts are committed."""

    def __init__(self, run: Run, total: int | None) -> None:
        self._run = run
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        self._run.progress("copying documents", self._done, self._total)


class _PartCopy:
    """Copies one part, from its committed progress."""

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
        state = await committed_progress(self._run.target, part.id) or fresh
        self._chain = ProgressChain(state)
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
                    del document["version"]  # the target assigns its own
                    created, updated = document.pop("created_at"), document.pop("updated_at")
                    self._operations.append(Create(name, id, document, created, updated))
        if self._operations or self._chain.state.number:
            await self._send(done=True)

    async def _send(self, *, done: bool) -> None:
        creates, self._operations, self._size = self._operations, [], 0
        if not creates and not done:
            return  # the first document exceeds the estimated room of a batch: it is sent alone
        previous = self._chain.previous()
        progress = self._chain.advance(
            position=self._last_id, count=self._sum.count, checksum=self._sum.text, done=done
        )
        operations = (*previous, *creates, progress)
        count = len(creates)
        await self._pipeline.commit(Batch(self._part.tenant, operations, now_us()), lambda: self._committed(count))

    def _committed(self, count: int) -> None:
        self._run.committed += 1
        self._counter.add(count)


# --- The journal ----------------------------------------------------------------------------------------------


async def copy_journal(run: Run) -> None:
    """Append the source's journal records to the target's journal, up to the current end."""

    async def work() -> None:
        async with Pipeline(run.target) as pipeline:
            copy = JournalCopy(run)
            cursor = run.journal.position
            following = asyncio.ensure_future(records(run, cursor, _room(run)))
            try:
                while (whole := await following).cursor != cursor:
                    page, encoded = await bounded(run, cursor, whole)
                    cursor = page.cursor
                    following = asyncio.ensure_future(records(run, cursor, _room(run)))
                    await pipeline.commit(*copy.batch(page, encoded))
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    await with_retries(run, work)


class JournalCopy:
    """Builds the batches that append pages of records and advance the cursor, each following the batch before."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._chain = ProgressChain(run.journal)

    def batch(self, page: ChangesPage, encoded: Sequence[bytes]) -> tuple[Batch, Callable[[], None]]:
        """The batch, and the callback for its commit; `encoded` are the page's records."""
        run, before = self._run, self._chain.state
        moved_records(run, page.records)
        kept: list[Append] = []
        total = int(before.checksum, 16)
        if run.migration.journal:
            for record, text in zip(page.records, encoded, strict=True):
                if run.migration.carried or record.collection not in NOT_MOVED:
                    kept.append(Append(record))
                    total = (total + record_digest(text)) % MODULUS
        previous = self._chain.previous()
        progress = self._chain.advance(position=page.cursor, count=before.count + len(kept), checksum=f"{total:064x}")
        operations: tuple[Operation, ...] = (*previous, *kept, progress)
        after = self._chain.state

        def committed() -> None:
            run.journal = after
            run.committed += 1
            run.progress("copying the journal", after.count, None)

        return Batch(None, operations, now_us()), committed


def moved_records(run: Run, records: Iterable[Record]) -> list[Record]:
    """The records without those about the stores themselves. Raises InvalidInput for an undeclared collection."""
    moved = [record for record in records if record.collection not in NOT_MOVED]
    unknown = {r.collection for r in moved} - run.collections.keys() - {JOURNAL, *run.options.ignore}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise InvalidInput(
            f"{run.options.source} has documents of {names}, which no module declares: name their module in "
            f"STRONGROOM_ENTITIES, or skip them with --ignore {' --ignore '.join(sorted(unknown))}"
        )
    return moved


async def records(run: Run, cursor: str | None, limit: int) -> ChangesPage:
    """The source's records after a cursor, as the target's journal gets them. An equal cursor says that it was the end.

    Not by `changes`, which refuses to read behind records that retention has dropped.
    """
    page = await run.source.rows(cursor, limit=limit)
    return ChangesPage(tuple(moved_record(run, row) for row in page.rows), page.cursor)


def moved_record(run: Run, row: JournalRow) -> Record:
    """A record of the source as the target's journal gets it."""
    record = record_of(row)
    if not record.salt and run.legacy_secret:
        record = structs.replace(record, salt=legacy_salt(run.legacy_secret, record.id))
    if record.collection == STORE_STATE.name:
        # A process on the target takes a record of a greater version for news about its own store.
        record = structs.replace(record, version=1)
    return record


def _room(run: Run) -> int:
    return max(1, run.options.batch - 2)


async def bounded(run: Run, cursor: str | None, page: ChangesPage) -> tuple[ChangesPage, list[bytes]]:
    """The page after `cursor`, cut to the size of a batch (a record may have nearly two megabytes), and its encoded
    records."""
    encoded = [encoded_record(record) for record in page.records]
    if BYTES_PER_ENCODED * sum(map(len, encoded)) <= BATCH_BYTES:
        return page, encoded
    size = 0
    for count, record in enumerate(page.records):
        size += sum(document_size(part) for part in (record.before, record.after) if part)
        if size > BATCH_BYTES and count:
            return await records(run, cursor, count), encoded[:count]
    return page, encoded
