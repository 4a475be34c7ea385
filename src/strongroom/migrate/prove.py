"""Verifies that source and target are equal, by counts and checksums of every part and of the journal; the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from ..storage.journal_rows import record_of
from .checksum import MODULUS, SetSum, encoded_record, record_digest
from .compare import Comparison, Difference, set_sum
from .state import NOT_MOVED, Part, Phase, Run, committed_progress
from .streams import parts
from .trees import TreesReport, carry_trees

MAX_DIFFERENCES = 10
"""Differing documents that a report names for each part."""


@dataclass(frozen=True, slots=True)
class PartReport:
    """The counts and checksums of one collection of one tenant in both stores."""

    collection: str
    tenant: str | None
    documents: int
    checksum: str
    target_documents: int
    target_checksum: str
    differences: tuple[Difference, ...] = ()

    @property
    def equal(self) -> bool:
        return (self.documents, self.checksum) == (self.target_documents, self.target_checksum)


@dataclass(slots=True)
class Report:
    """The result of a call. `trees`: those of the journal, once they were compared. `phase`: the migration's phase.
    `late`: journal records that came after every process should have known that writes are off. `pause_s`: how long
    writes were off before the migration was done."""

    source: str
    target: str
    phase: str
    parts: list[PartReport] = field(default_factory=list)
    trees: TreesReport | None = None
    records: int = 0
    target_records: int | None = None
    followed: int = 0
    late: int = 0
    pause_s: float | None = None
    backup: str | None = None
    seconds: float = 0.0
    copied_s: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return sum(part.documents for part in self.parts)

    @property
    def equal(self) -> bool:
        """Whether everything that was compared is equal."""
        documents = all(part.equal for part in self.parts)
        return documents and self.target_records in (None, self.records) and (self.trees is None or self.trees.equal)

    @property
    def is_done(self) -> bool:
        return self.phase == Phase.DONE


async def prove(run: Run, report: Report, *, again: bool) -> None:
    """Read the target and compare counts and checksums with the source's: those of the copy, or (`again`) of a new
    read, if the source may have changed since. A part that differs is compared document by document."""
    report.parts = []
    done = 0
    async with aclosing(parts(run.existing, run.source, run.target)) as found:
        async for part in found:
            one = await (_compared(run, part) if again else _summed(run, part))
            done += max(one.documents, one.target_documents)
            run.progress("comparing source and target", done, None)
            if one.documents or one.target_documents:
                report.parts.append(one)
    if run.migration.journal:
        report.records, report.target_records = run.journal.count, await count_journal(run)


async def prove_trees(run: Run, report: Report) -> None:
    """Compare the root of each of the journal's trees with the one that the target's records lead to. Nobody may seal
    either journal meanwhile."""
    report.trees = TreesReport()
    if run.migration.journal:
        await carry_trees(run, report.trees)
        # Less than before, if retention has removed records from both.
        report.records = report.target_records = run.journal.count


async def _summed(run: Run, part: Part) -> PartReport:
    state = await committed_progress(run.target, part.id)
    source = SetSum.of(state.count, state.checksum) if state is not None else SetSum()
    target = await set_sum(run.target, part, run.canonical[part.collection.name])
    if source == target:
        return _part_report(part, source, target)
    return await _compared(run, part)


async def _compared(run: Run, part: Part) -> PartReport:
    comparison = Comparison(run.source, run.target, part, run.canonical[part.collection.name])
    named: list[Difference] = []
    async with aclosing(comparison.differences()) as some:
        async for differences in some:
            named += differences[: MAX_DIFFERENCES - len(named)]
    return _part_report(part, comparison.source, comparison.target, named)


def _part_report(part: Part, source: SetSum, target: SetSum, named: Sequence[Difference] = ()) -> PartReport:
    return PartReport(
        part.collection.name, part.tenant, source.count, source.text, target.count, target.text, tuple(named)
    )


async def count_journal(run: Run) -> int:
    """The number of copied records in the target's journal, and of later ones that are not about the store itself; -1
    if the number is right but the checksum is not."""
    cursor, count, total = run.migration.target_cursor, 0, 0
    carried, copied = run.migration.carried, run.journal.count
    while (page := await run.target.rows(cursor)).cursor != cursor:
        cursor = page.cursor
        for row in page.rows:
            if (carried and count < copied) or row[7] not in NOT_MOVED:
                count += 1
                total = (total + record_digest(encoded_record(record_of(row)))) % MODULUS
        run.progress("comparing the journal", count, copied)
    return -1 if count == copied and f"{total:064x}" != run.journal.checksum else count


def fill(run: Run, report: Report) -> None:
    """Copy the state into the report."""
    state = run.migration
    report.phase = state.phase
    report.records = run.journal.count
    report.followed, report.late, report.backup = state.followed, state.late, state.backup
    report.pause_s = None if state.pause_ms is None else state.pause_ms / 1000
