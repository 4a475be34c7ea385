"""Follows the source's journal, and makes given documents of the target equal to the source's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing

from ..errors import AlreadyExists, Conflict, NotFound
from ..storage.port import (
    MAX_BATCH_BYTES,
    Batch,
    ChangesPage,
    Delete,
    Put,
    document_size,
)
from .compare import Comparison
from .copy import (
    MAX_ATTEMPTS,
    JournalCopy,
    bounded,
    free_unique_values,
    moved_records,
    records,
    with_retries,
)
from .state import Part, Run, now_us
from .streams import parts

CHANGED_IN_SILENCE = ("api_keys",)
"""Journalled collections with some changes that have no record: usage is rolled up into keys without one."""
PAGE = 400
"""Records that are followed at once. Their documents are read again, so a document that changed often is written
once."""


async def follow(run: Run, *, closely: bool = False) -> int:
    """Apply the source's journal to the target, up to its end; returns the number of records.

    `closely`: stop within a page of the end, for a source that is written to all the time.
    """
    found = 0
    limit = min(PAGE, run.options.batch - 2)

    async def work() -> None:
        nonlocal found
        while True:
            page = await records(run, run.journal.position, limit)
            if page.cursor == run.journal.position:
                return
            at_end = len(page.records) < limit
            changed = await _apply(run, *await bounded(run, run.journal.position, page))
            found += changed
            if changed:
                run.progress("following the journal", run.migration.followed + found, None)
            if closely and at_end:
                return

    await with_retries(run, work)
    return found


async def _apply(run: Run, page: ChangesPage, encoded: Sequence[bytes]) -> int:
    """Write the documents first, then the records with the cursor. After a kill between the two the documents are
    written again, with the same result."""
    moved = moved_records(run, page.records)
    ids: dict[tuple[str, str | None], dict[str, None]] = {}
    for record in moved:
        collection = run.collections.get(record.collection)
        if collection is not None and record.entity_id and (record.tenant is not None or not collection.tenant_scoped):
            key = collection.name, record.tenant if collection.tenant_scoped else None
            ids.setdefault(key, {})[record.entity_id] = None
    for (name, tenant), some in ids.items():
        await equalise(run, Part(run.collections[name], tenant), list(some))
    batch, committed = JournalCopy(run).batch(page, encoded)
    await run.target.commit(batch)
    committed()
    return len(moved)


async def equalise(run: Run, part: Part, ids: Sequence[str]) -> None:
    """Make these target documents equal to the source's present documents, or remove them."""
    for attempt in range(MAX_ATTEMPTS):
        operations = await _operations(run, part, ids)
        try:
            for some in _bounded(operations):
                await run.target.commit(Batch(part.tenant, tuple(some), now_us()))
            return
        except NotFound:
            if attempt + 1 == MAX_ATTEMPTS:  # another process removes documents of the target
                raise
        except AlreadyExists as error:
            if attempt + 1 == MAX_ATTEMPTS:
                raise Conflict(f"{part}: {error.message}: the source is written faster than it can be copied") from None
            for operation in operations:
                if isinstance(operation, Put):
                    await free_unique_values(run, part, operation.id, operation.document)


async def _operations(run: Run, part: Part, ids: Sequence[str]) -> list[Delete | Put]:
    """The operations on the target, removals first, because they may free a unique value."""
    name, tenant, canonical = part.collection.name, part.tenant, run.canonical[part.collection.name]
    wanted, existing = await asyncio.gather(
        asyncio.gather(*(run.source.get(name, tenant, id) for id in ids)),
        asyncio.gather(*(run.target.get(name, tenant, id) for id in ids)),
    )
    operations: list[Delete | Put] = []
    for id, document, present in zip(ids, wanted, existing, strict=True):
        if document is None:
            if present is not None:
                operations.insert(0, Delete(name, id))
        elif present is None or canonical.of(document) != canonical.of(present):
            fields = {field: document[field] for field in part.collection.fields}
            operations.append(Put(name, id, fields, None, document["created_at"], document["updated_at"]))
    return operations


def _bounded(operations: Sequence[Delete | Put]) -> Iterable[list[Delete | Put]]:
    """The operations in batches within the limits of a batch."""
    batch: list[Delete | Put] = []
    size = 0
    for operation in operations:
        more = document_size(operation.document) if isinstance(operation, Put) else 0
        if batch and size + more > MAX_BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(operation)
        size += more
    if batch:
        yield batch


async def reconcile(run: Run) -> int:
    """Compare every document whose changes may have no journal record, and copy the differing ones; returns their
    number.

    Call it when the source takes no writes any more. Its duration grows with the documents of such collections.
    """
    silent = [c for c in run.existing if not c.journalled or c.name in CHANGED_IN_SILENCE]
    copied = done = 0
    async with aclosing(parts(silent, run.source, run.target)) as found:
        async for part in found:
            comparison = Comparison(run.source, run.target, part, run.canonical[part.collection.name])
            async with aclosing(comparison.differences()) as some:
                async for differences in some:
                    for begin in range(0, len(differences), PAGE):
                        await equalise(run, part, [d.id for d in differences[begin : begin + PAGE]])
                    copied += len(differences)
                    run.progress("comparing documents without journal records", done + comparison.source.count, None)
            done += comparison.source.count
    return copied
