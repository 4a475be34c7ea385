"""Takes a migration back: the switch-over alone (`abort`), or all of it (`roll_back`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

from ..entities import Collection, Document
from ..errors import Conflict, NotFound, Problem, StoreError
from ..storage.port import Batch, Create, Operation, Store, document_size
from . import backup
from .compare import set_sum
from .copy import clear, persistently
from .plan import open_as_it_is, open_source, refusal, refuse
from .prove import Report, count_journal, fill, prove
from .state import (
    BATCH_BYTES,
    MIGRATIONS,
    OWN,
    RESTORED_PART,
    UNDOING,
    Baton,
    Migration,
    MigrationPart,
    Options,
    Part,
    Phase,
    Progress,
    Run,
    fence,
    no_progress,
    now_us,
    standing,
)
from .streams import Pipeline


async def abort(
    source: Store, target: Store, collections: Sequence[Collection], options: Options = Options()
) -> Report:
    """Take a switch-over back before it is complete: the source takes writes again, and the migration can go on later.

    Raises NotFound if no migration is under way, Conflict if it is done (`roll_back` is for that).
    """
    run = Run(source, target, collections, options)
    state = await _standing(run)
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
    """Remove what the migration wrote, put the backup of the target back, and let the source take writes again.

    The same call again goes on where it was stopped, and does nothing once it is done. The records that were appended
    to the target's journal stay there: a journal is only ever added to. Raises NotFound if there is no migration,
    Conflict if the target was written to since it was done, StoreError if the backup is damaged.
    """
    began = time.perf_counter()
    run = Run(source, target, collections, options, progress)
    state = await _standing(run)
    report = Report(state.source, state.target, Phase.ROLLED_BACK)
    if state.phase == Phase.ROLLED_BACK:
        report.notes.append("was rolled back already: nothing was changed")
        return report
    whole = await asyncio.to_thread(backup.proved, Path(state.backup)) if state.backup else None
    if state.phase == Phase.DONE:
        await _check_unused(run)
    if state.phase not in UNDOING:
        fenced = fence(False, "a migration into this store is being rolled back", state.source, at=1)
        cursor = run.journal.position or state.cursor
        await run.save(*fenced, phase=Phase.REMOVING, cursor=cursor)
    if run.migration.switched:
        await _lift(run)
        await run.save(switched=False)
        report.notes.append("the source takes writes again")
    if run.migration.phase == Phase.REMOVING:
        await clear(run, "removing what was written")
        await run.save(phase=Phase.RESTORING)
    if whole is not None:
        await persistently(run, lambda: _restore(run, whole.path, whole.documents))
        await _check_restored(run, whole)
        report.notes.append(f"{whole.documents} documents were put back from {whole.path}")
    before = run.migration.fence
    await run.save(*fence(before is None, before or "", at=1), phase=Phase.ROLLED_BACK, ended_at=datetime.now(UTC))
    report.seconds = time.perf_counter() - began
    return report


async def _standing(run: Run) -> Migration:
    """The state of the migration into the target; both stores are made readable as they are."""
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
        await run.source.commit(Batch(None, fence(True), now_us()))


async def _check_unused(run: Run) -> None:
    """Raise Conflict if the target was written to since the migration was done."""
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
    """Put the backup's documents into the target, each batch counted as it is committed."""
    baton = Baton(await standing(run.target, RESTORED_PART) or MigrationPart(part=RESTORED_PART, of=RESTORED_PART))
    waiting: list[Create] = []
    tenant: str | None = None
    size = 0

    async with Pipeline(run.target) as pipeline:

        async def send() -> None:
            nonlocal size
            if not waiting:
                return
            taken, count = baton.taken(), baton.state.count + len(waiting)
            operations: tuple[Operation, ...] = (*taken, *waiting, baton.handed_on(count=count))
            waiting.clear()
            size = 0

            def landed() -> None:
                run.committed += 1
                run.progress("restoring the backup", count, total)

            await pipeline.commit(Batch(tenant, operations, now_us()), landed)

        async with aclosing(backup.documents(path, baton.state.count)) as some:
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
            raise StoreError(f"{part}: what was put back from {whole.path} is not what the backup has")
