"""Redacts in the target's journal what was redacted in the source's after it was copied."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..context import us_from_utc
from ..journal.leaf import REDACTED_BYTES
from ..journal.trees import REDACT
from ..storage.journal_rows import record_of
from ..storage.port import MAX_CHANGES_PAGE, Batch, JournalFilter, JournalRow
from .checksum import MODULUS, encoded_record, record_digest
from .copy import moved_record
from .state import NOT_MOVED, ProgressChain, Run, now_us

AT_ONCE = 50
"""Rows that are redacted in one transaction: Firestore takes 500 writes, and a large record has several."""
EARLIER_US = 3_600_000_000
"""A redaction may have the time of a process whose clock is behind by so much."""


async def copy_redactions(run: Run) -> int:
    """Returns how many records of the target were redacted. Call it when the source takes no writes, or its writers
    have stopped. Reads both journals whole, if anything was redacted since the migration began."""
    if not run.migration.journal or not await _redacted_since(run):
        return 0
    pairs = _Pairs(run)
    waiting: list[JournalRow] = []
    count = 0
    async with aclosing(pairs.matched()) as matched:
        async for original, copied in matched:
            if _is_redacted_since(original, copied):
                waiting.append((copied[0], *original[1:9], copied[9], *original[10:]))
                count += 1
            if len(waiting) >= AT_ONCE:
                await run.target.rewrite(waiting)
                waiting = []
            run.progress("copying redactions", count, None)
    await run.target.rewrite(waiting)
    if pairs.equal and (checksum := f"{pairs.total:064x}") != run.journal.checksum:
        chain = ProgressChain(run.journal)
        await run.target.commit(Batch(None, (*chain.previous(), chain.advance(checksum=checksum)), now_us()))
        run.journal = chain.state
        run.committed += 1
    return count


async def _redacted_since(run: Run) -> bool:
    where = JournalFilter(action=REDACT, since_us=us_from_utc(run.migration.begun_at) - EARLIER_US)
    cursor = None
    while (page := await run.source.rows(cursor, where, 1)).cursor != cursor:
        if page.rows:
            return True
        cursor = page.cursor
    return False


class _Pairs:
    """The copied records of both stores, matched by their ids: the order may differ between tenants.

    `total` is the checksum of the copied records as the source has them now, `equal` whether they differ at most by a
    redaction.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.total = 0
        self.equal = True
        self._waiting: tuple[dict[str, JournalRow], dict[str, JournalRow]] = ({}, {})

    async def matched(self) -> AsyncGenerator[tuple[JournalRow, JournalRow], None]:
        """Each copied record, as the source and as the target has it."""
        run = self._run
        start = None if run.migration.carried else run.migration.target_cursor
        cursors: list[str | None] = [run.migration.cursor, start]
        ended = [False, False]
        while not all(ended):
            for side, store in enumerate((run.source, run.target)):
                ahead = len(self._waiting[side]) > len(self._waiting[1 - side]) + MAX_CHANGES_PAGE
                if ended[side] or (ahead and not ended[1 - side]):
                    continue
                page = await store.rows(cursors[side])
                ended[side] = page.cursor == cursors[side]
                cursors[side] = page.cursor
                for row in page.rows:
                    if not run.migration.carried and row[7] in NOT_MOVED:
                        continue
                    other = self._waiting[1 - side].pop(row[1], None)
                    if other is None:
                        self._waiting[side][row[1]] = row
                    else:
                        pair = (row, other) if side == 0 else (other, row)
                        self._compare(*pair)
                        yield pair
        for row in self._waiting[1].values():  # retention has removed them in the source
            self._add(encoded_record(record_of(row)))

    def _compare(self, original: JournalRow, copied: JournalRow) -> None:
        wanted = encoded_record(moved_record(self._run, original))
        self._add(wanted)
        if not _is_redacted_since(original, copied) and encoded_record(record_of(copied)) != wanted:
            self.equal = False

    def _add(self, encoded: bytes) -> None:
        self.total = (self.total + record_digest(encoded)) % MODULUS


def _is_redacted_since(original: JournalRow, copied: JournalRow) -> bool:
    return len(original[12]) == REDACTED_BYTES and original[12] != copied[12]
