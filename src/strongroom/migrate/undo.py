"""Undoes a migration: only the switch-over (`abort`), or all of it (`roll_back`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

from ..entities import INT64_MAX, Collection, Document
from ..errors import Conflict, NotFound, Problem, StoreError
from ..storage.port import Batch, Create, Operation, Store, document_size
from . import backup
from .compare import set_sum
from .copy import clear, with_retries
from .plan import open_as_it_is, open_source, refusal, refuse
from .prove import Report, count_journal, fill, prove
from .state import (
    BATCH_BYTES,
    MIGRATIONS,
    OWN,
    RESTORED_PART,
    UNDOING,
    Migration,
    MigrationPart,
    Options,
    Part,
    Phase,
    Progress,
    ProgressChain,
    Run,
    committed_progress,
    fence,
    no_progress,
    now_us,
    sealing_allowed,
)
from .streams import Pipeline
from .trees import remove_trees


async def abort(
    source: Store, target: Store, collections: Sequence[Collection], options: Options = Options()
) -> Report:
    """Undo a switch-over before it is complete: the source takes writes again, and the migration can resume later.

    Raises NotFound without a migration, and Conflict if it is done: use `roll_back` then.
    """
    run = Run(source, target, collections, options)
    state = await _loaded(run)
    if state.phase in (Phase.DONE, Phase.ROLLED_BACK) or state.phase in UNDOING:
        raise Conflict(
            f"the migration is {state.phase}: there is no switch-over to abort (--rollback undoes the migration)"
        )
    report = Report(options.source, options.target, state.phase)
    if state.switched:
        await _lift(run)
        await run.save(switched=False, phase=Phase.FOLLOWING)
        report.notes.append("the source takes writes again")
    fill(run, report)
    return report


async def roll_back(
    source: Store,
    target: Store,
    collections: Sequence[Collection],
    options: Options = Options(),
    progress: Progress = no_progress,
) -> Report:
    """Remove the migrated documents, restore the target's backup, and let the source take writes again.

    The same call resumes after an interruption, and does nothing once it is done. The copied records leave the target's
    journal too, unless it has records of its own: then they stay, because they are between these. Raises NotFound
    without a migration, Conflict if the target was written to after the migration was done, StoreError if the backup is
    damaged.
    """
    began = time.perf_counter()
    run = Run(source, target, collections, options, progress)
    state = await _loaded(run)
    report = Report(state.source, state.target, Phase.ROLLED_BACK)
    if state.phase == Phase.ROLLED_BACK:
        report.notes.append("was rolled back already: nothing was changed")
        return report
    whole = await asyncio.to_thread(backup.verified, Path(state.backup)) if state.backup else None
    if state.phase == Phase.DONE:
        await _check_unused(run)
    if state.phase not in UNDOING:
        fenced = fence(False, "a migration into this store is being rolled back", state.source, at=1)
        cursor = None if state.carried else run.journal.position or state.cursor
        await run.save(*fenced, phase=Phase.REMOVING, cursor=cursor)
    if run.migration.switched:
        await _lift(run)
        await run.save(switched=False)
        report.notes.append("the source takes writes again")
    if run.migration.phase == Phase.REMOVING:
        await clear(run, "removing the migrated documents")
        await remove_trees(run)
        if run.migration.carried:
            await _drop_journal(run)
        await run.save(phase=Phase.RESTORING)
    if whole is not None:
        await with_retries(run, lambda: _restore(run, whole.path, whole.documents))
        await _check_restored(run, whole)
        report.notes.append(f"{whole.documents} documents were restored from {whole.path}")
    before = run.migration.fence
    lifted = fence(before is None, before or "", at=1)
    await run.save(*lifted, *await sealing_allowed(run.target), phase=Phase.ROLLED_BACK, ended_at=datetime.now(UTC))
    report.seconds = time.perf_counter() - began
    return report


async def _loaded(run: Run) -> Migration:
    """The state of the migration into the target. Opens both stores without changing them."""
    absent, problems = await open_as_it_is(run.target, run, "--to")
    refuse(problems)
    state = await run.load() if MIGRATIONS.name not in absent else None
    if state is None:
        raise NotFound("there is no migration into this target")
    if state.source != run.options.source:
        refuse([Problem("--from", f"the migration into the target is from {state.source}: name that")])
    await run.target.prepare([*run.declared, *OWN])
    refuse(await open_source(run))
    return state


async def _lift(run: Run) -> None:
    if await refusal(run.source) is not None:
        await run.source.commit(Batch(None, (*fence(True), *await sealing_allowed(run.source)), now_us()))


async def _drop_journal(run: Run) -> None:
    """Remove every record of the target's journal: all of them are copies, or about the migration."""
    count, cursor = 0, None
    while True:
        page = await run.target.rows(None, limit=1)
        if page.rows:
            count += await run.target.drop(page.rows[0][2], INT64_MAX)
            run.progress("removing the copied journal", count, None)
        elif page.cursor == cursor:
            return
        cursor = page.cursor


async def _check_unused(run: Run) -> None:
    """Raise Conflict if the target was written to after the migration was done."""
    known = run.journal.count if run.migration.journal else 0
    if await count_journal(run) == known:
        report = Report("", "", "")
        await prove(run, report, again=True)
        if report.equal:
            return
    raise Conflict(
        f"{run.options.target} was written to since the migration was done, which a rollback would lose: migrate back, "
        "with --from and --to the other way round"
    )


async def _restore(run: Run, path: Path, total: int) -> None:
    """Write the backup's documents into the target; each batch commits its progress."""
    fresh = MigrationPart(part=RESTORED_PART, of=RESTORED_PART)
    chain = ProgressChain(await committed_progress(run.target, RESTORED_PART) or fresh)
    waiting: list[Create] = []
    tenant: str | None = None
    size = 0

    async with Pipeline(run.target) as pipeline:

        async def send() -> None:
            nonlocal size
            if not waiting:
                return
            previous, count = chain.previous(), chain.state.count + len(waiting)
            operations: tuple[Operation, ...] = (*previous, *waiting, chain.advance(count=count))
            waiting.clear()
            size = 0

            def committed() -> None:
                run.committed += 1
                run.progress("restoring the backup", count, total)

            await pipeline.commit(Batch(tenant, operations, now_us()), committed)

        async with aclosing(backup.documents(path, chain.state.count)) as some:
            async for page in some:
                for collection, owner, document in page:
                    more = document_size(document)
                    is_full = len(waiting) >= run.options.batch - 2 or size + more > BATCH_BYTES
                    if is_full or owner != tenant:
                        await send()
                        tenant = owner
                    size += more
                    waiting.append(_creation(run, collection, document))
        await send()


def _creation(run: Run, collection: str, document: Document) -> Create:
    fields = {name: document[name] for name in run.collections[collection].fields}
    return Create(collection, document["id"], fields, document["created_at"], document["updated_at"])


async def _check_restored(run: Run, whole: backup.Backup) -> None:
    for (name, tenant), wanted in whole.sums.items():
        part = Part(run.collections[name], tenant)
        if await set_sum(run.target, part, run.canonical[name]) != wanted:
            raise StoreError(f"{part}: the restored documents differ from the backup {whole.path}")
