"""Runs a migration and resumes it after any interruption: start, copy, follow, switch over, verify."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

from ..context import new_id
from ..entities import INT64_MAX, Collection
from ..errors import InvalidInput, Problem, Unavailable
from ..journal import POLL_S
from ..storage.port import Batch, Put, Store
from . import backup
from .compare import Comparison
from .copy import clear, copy_documents, copy_journal, with_retries
from .follow import equalise, follow, reconcile
from .plan import (
    Plan,
    count_documents,
    has_journal,
    make_plan,
    open_source,
    open_target,
    refusal,
    refuse,
    same_store,
    wrong_options,
)
from .prove import PartReport, Report, fill, prove, prove_trees
from .redactions import copy_redactions
from .state import (
    CURRENT,
    MIGRATIONS,
    OWN,
    Migration,
    Options,
    Part,
    Phase,
    Progress,
    Run,
    fence,
    no_progress,
    now_us,
    sealing_allowed,
    sealing_stopped,
)
from .trees import remove_trees, source_log

NOTICE_S = 4 * POLL_S
"""The longest time until every process of the source has read in the journal that writes are off."""
MAX_NOTICE_S = 30.0
"""How long the source's journal may keep growing after that before the switch-over fails."""
LAST_ROUND_S = 4.0
"""How long the switch-over waits for the source's processes to seal what they wrote last."""
MAX_ROUNDS = 4
"""How often late writes are copied and everything is compared again."""


# --- The calls ------------------------------------------------------------------------------------------------


async def plan(
    source: Store,
    target: Store,
    collections: Sequence[Collection],
    options: Options = Options(),
    progress: Progress = no_progress,
) -> Plan:
    """A preview of `migrate`. Writes nothing to either store. Raises InvalidInput for wrong options."""
    return await make_plan(Run(source, target, collections, options, progress))


async def migrate(
    source: Store,
    target: Store,
    collections: Sequence[Collection],
    options: Options = Options(),
    progress: Progress = no_progress,
) -> Report:
    """Move everything from the source into the target. The same call resumes after an interruption.

    Both stores are open, and afterwards prepared for the moved collections. With `options.live` the source may be
    written to meanwhile; without `options.switch` the call then stops before the switch-over (phase "following"). The
    caller checks whether the report says that both stores are equal. Raises InvalidInput (with every problem),
    Conflict, StoreError, and Unavailable after several retries: the same call resumes later.
    """
    began = time.perf_counter()
    run = Run(source, target, collections, options, progress)
    refuse(wrong_options(run))
    refuse([*await open_target(run), *await open_source(run)])
    report = Report(options.source, options.target, Phase.DONE)
    state = run.state
    if state is not None and state.phase == Phase.DONE and not options.overwrite:
        report.notes.append(f"was done already, at {state.ended_at:%Y-%m-%d %H:%M:%S}Z: nothing was changed")
        fill(run, report)
        report.seconds = time.perf_counter() - began
        return report
    if state is None or state.phase in (Phase.DONE, Phase.ROLLED_BACK):
        await _start(run)
    else:
        await target.prepare([*run.declared, *OWN])
        if state.live != options.live:
            await run.save(live=options.live)
    await _advance(run, report)
    fill(run, report)
    report.seconds = time.perf_counter() - began
    return report


# --- The start ------------------------------------------------------------------------------------------------


async def _start(run: Run) -> None:
    """Back up the target's documents if they are overwritten, then write the migration's state into the target."""
    options, before = run.options, run.state
    kept = None
    if options.overwrite:
        path = (options.backup or Path(f"strongroom-backup-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.jsonl.gz")).absolute()
        existing = [c for c in run.declared if await _readable(run.target, c)]
        made = await backup.write(
            run.target, options.target, existing, path, lambda n: run.progress("backing up the target", n, None)
        )
        kept = str(made.path)
    await run.target.prepare([*run.declared, *OWN])
    end = (await run.target.changes("end")).cursor
    same = before is not None and before.source == options.source
    cursor = (run.journal.position or before.cursor) if same and before is not None else None
    carried = options.journal and cursor is None and not await has_journal(run.target)
    if not options.journal and cursor is None:
        cursor = (await run.source.changes("end")).cursor
    state = Migration(
        source=options.source,
        target=options.target,
        phase=Phase.CLEARING,
        nonce=new_id(),
        live=options.live,
        journal=options.journal,
        carried=carried,
        cursor=cursor,
        target_cursor=end,
        backup=kept,
        fence=await refusal(run.target),
        begun_at=datetime.now(UTC),
    )
    document = Migration.__codec__.encode(state)
    first = Put(MIGRATIONS.name, CURRENT, document)
    fenced = fence(False, "a migration into this store is under way", options.source, at=1)
    await run.target.commit(Batch(None, (first, *fenced, await sealing_stopped(run.target)), now_us()))
    await run.load()
    if await same_store(run):
        lifted = fence(state.fence is None, state.fence or "")
        await run.target.commit(Batch(None, (*lifted, *await sealing_allowed(run.target)), now_us()))
        await run.save(phase=Phase.ROLLED_BACK)
        refuse([Problem("--to", "is the source itself, under another name")])


async def _readable(store: Store, collection: Collection) -> bool:
    """Whether the store is prepared for the collection, which it is if it has the collection."""
    try:
        await store.get(collection.name, "any" if collection.tenant_scoped else None, "any")
    except InvalidInput:
        return False
    return True


# --- The steps ------------------------------------------------------------------------------------------------


async def _advance(run: Run, report: Report) -> None:
    """Continue from the current phase to the end, or up to the switch-over."""
    state = run.migration
    if state.phase == Phase.CLEARING:
        await clear(run, "clearing the target")
        await remove_trees(run)
        if run.migration.carried:
            await run.target.drop(None, INT64_MAX)  # the fence's record: the source's records come first
        await run.save(run.journal_progress(), phase=Phase.JOURNAL)
    if run.migration.phase == Phase.JOURNAL:
        await copy_journal(run)
        await run.save(phase=Phase.COPYING)
    if run.migration.phase == Phase.COPYING:
        began = time.perf_counter()
        await copy_documents(run, await count_documents(run))
        report.copied_s = time.perf_counter() - began
        await run.save(phase=Phase.FOLLOWING)
    if run.migration.phase == Phase.FOLLOWING:
        found = await follow(run, closely=run.options.live)
        if found:
            await run.save(followed=run.migration.followed + found)
            if not run.options.live:
                report.notes.append(
                    f"the source was written to meanwhile: {found} records of its journal were followed, but later "
                    "writes are not in the target; --live is for sources that are in use"
                )
        if not run.options.live:
            await copy_redactions(run)
            await prove(run, report, again=run.migration.followed > 0)
            if report.equal:
                await prove_trees(run, report)
            if report.equal:
                await _finish(run)
            return
        if not run.options.switch:
            report.notes.append("ready to switch over: the same call with --switch does it")
            return
    await _switch_over(run, report)


async def _switch_over(run: Run, report: Report) -> None:
    """Turn the source's writes off, wait until every process knows, copy the rest, verify, and open the target."""
    began = time.perf_counter()
    await run.save(phase=Phase.SWITCHING, switched=True)
    if await refusal(run.source) is None:
        fenced = fence(False, "the data moves to another store: writes are off here", run.options.target)
        await run.source.commit(Batch(None, fenced, now_us()))
    await _until_quiet(run)
    copied = 0

    async def work() -> None:
        nonlocal copied
        copied += await reconcile(run)

    await with_retries(run, work)
    for number in range(MAX_ROUNDS):
        late = await follow(run)
        await copy_redactions(run)
        await prove(run, report, again=True)
        if report.equal or number + 1 == MAX_ROUNDS:
            break
        for part in report.parts:
            await _repair(run, part)
            late += len(part.differences)
        await run.save(late=run.migration.late + late)
    if report.equal:
        await _stop_sealing(run)
        await prove_trees(run, report)
    if report.equal:
        await _finish(run, pause_ms=round((time.perf_counter() - began) * 1000))


async def _stop_sealing(run: Run) -> None:
    """Let the source's processes seal what they have acknowledged, in a last round; then keep them from sealing more.

    Two stores that both continue one log would be a fork of it. What is not sealed then, the target seals.
    """
    if not run.source_is_sealed:
        return
    deadline = time.monotonic() + LAST_ROUND_S
    while time.monotonic() < deadline and await _unsealed(run):
        run.progress("waiting for the last round of sealing", 0, None)
        await asyncio.sleep(POLL_S)
    await run.source.commit(Batch(None, (await sealing_stopped(run.source),), now_us()))


async def _unsealed(run: Run) -> bool:
    """Whether the source has records that its log does not cover."""
    log = await source_log(run)
    if log is None:
        return False
    cursor: str | None = log["cursor"]
    while (page := await run.source.rows(cursor, limit=1)).cursor != cursor:
        if page.rows:
            return True
        cursor = page.cursor
    return False


async def _until_quiet(run: Run) -> None:
    """Return once nothing was journalled for NOTICE_S. Records after the first NOTICE_S count as late."""
    deadline = time.monotonic() + MAX_NOTICE_S
    await asyncio.sleep(NOTICE_S)  # every process polls the journal four times meanwhile
    found = await follow(run)
    await run.save(followed=run.migration.followed + found)
    while True:
        run.progress("waiting until nothing is written any more", run.migration.late, None)
        await asyncio.sleep(NOTICE_S)
        late = await follow(run)
        if not late:
            return
        await run.save(late=run.migration.late + late)
        if time.monotonic() > deadline:
            raise Unavailable(
                f"{run.options.source} is still written to, {MAX_NOTICE_S:.0f} s after its writes were turned off: by "
                "a process that does not see its journal, or an old version. Stop it, then give the same call again; "
                "or take the switch-over back with --abort"
            )


async def _repair(run: Run, part: PartReport) -> None:
    """Copy differing documents of a part: a process wrote after the others had stopped."""
    if part.equal:
        return
    which = Part(run.collections[part.collection], part.tenant)
    comparison = Comparison(run.source, run.target, which, run.canonical[part.collection])
    async with aclosing(comparison.differences()) as some:
        async for differences in some:
            if differences:
                await equalise(run, which, [difference.id for difference in differences])


async def _finish(run: Run, **fields: object) -> None:
    """Let the target take writes, and seal its journal."""
    lifted = fence(True, at=1)
    sealing = await sealing_allowed(run.target)
    await run.save(*lifted, *sealing, phase=Phase.DONE, ended_at=datetime.now(UTC), **fields)
