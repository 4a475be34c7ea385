"""Redacts and removes journal records, for `JournalStore.rewrite` and `drop`. No other code changes the journal's rows.

Removed and replaced content is overwritten with zeros in the database file. The pages of removed rows are used again by
later writes; the file itself does not shrink.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from operator import itemgetter

from ..port import JournalRow
from ..sql import JOURNAL_COLUMNS, listed
from .isolation import REDACTABLE, Guarded

DROPPED_AT_ONCE = 500
"""Rows that one transaction removes. It blocks other writers for some milliseconds."""

_REDACTED = tuple(name for name in JOURNAL_COLUMNS if name in REDACTABLE)
_REWRITE = (
    f"UPDATE main._journal SET ({listed(_REDACTED)}) = ({', '.join('?' for _ in _REDACTED)}) "
    "WHERE sequence = ? AND id = ?"
)
_values = itemgetter(*map(JOURNAL_COLUMNS.index, (*_REDACTED, "sequence", "id")))
_DROP = (
    "DELETE FROM main._journal WHERE sequence IN (SELECT sequence FROM main._journal "
    "WHERE tenant_id IS ? AND sequence <= ? ORDER BY sequence LIMIT ?) RETURNING sequence"
)
_RAISE_FLOOR = "UPDATE main._floors SET sequence = max(sequence, ?) WHERE tenant_id IS ? RETURNING sequence"
_NEW_FLOOR = "INSERT INTO main._floors (sequence, tenant_id) VALUES (?, ?)"
_TEXTS = (_REWRITE, _DROP, _RAISE_FLOOR, _NEW_FLOOR)


def rewrite(path: str, busy_timeout_s: float, rows: Sequence[JournalRow]) -> int:
    """Replace what redaction changes, of all these rows or none. The number of rows found. Raises apsw.Error."""
    with _transaction(path, busy_timeout_s) as guarded:
        before = guarded.connection.total_changes()
        guarded.cursor.executemany(_REWRITE, map(_values, rows)).fetchall()
        return guarded.connection.total_changes() - before


def drop_some(path: str, busy_timeout_s: float, tenant: str | None, through_sequence: int) -> int:
    """Remove up to DROPPED_AT_ONCE of a tenant's (None: the platform's) oldest rows, and note the last one's sequence
    as the floor. The number of removed rows. Raises apsw.Error."""
    with _transaction(path, busy_timeout_s) as guarded:
        removed = guarded.execute(_DROP, (tenant, through_sequence, DROPPED_AT_ONCE)).fetchall()
        if removed:
            floor = (max(sequence for (sequence,) in removed), tenant)
            if not guarded.execute(_RAISE_FLOOR, floor).fetchall():
                guarded.execute(_NEW_FLOOR, floor).fetchall()
        return len(removed)


@contextmanager
def _transaction(path: str, busy_timeout_s: float) -> Iterator[Guarded]:
    """A connection that may redact and remove, in a transaction that commits unless an error is raised."""
    with closing(Guarded(path, (), busy_timeout_s, upkeep=True, own_texts=_TEXTS)) as guarded:
        guarded.execute("BEGIN IMMEDIATE").fetchall()
        yield guarded  # closing the connection rolls back
        guarded.execute("COMMIT").fetchall()
