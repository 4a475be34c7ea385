"""The journal in PostgreSQL: appended last in a transaction, so that its order is the order of commits.

The head is one row that every append updates. It is locked from there to the commit, which serialises the appends: a
record with a lower sequence is never seen after one with a higher. So a reader needs no horizon.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from ._postgres_partitions import journal_time
from ._sql import JOURNAL_COLUMNS, Line, listed, quoted

_TYPES = {"at_us": "bigint", "version": "bigint"}


class Journal:
    """Texts for the journal in `schema`."""

    def __init__(self, schema: str) -> None:
        name = quoted(schema)
        self.channel = f"strongroom_{schema}"[:63]  # as long as a name may be; who shares it is only woken in vain
        self.head = f"SELECT sequence FROM {name}.strongroom_journal_head"
        journal = f"{name}.strongroom_journal"
        page = f"SELECT {listed(JOURNAL_COLUMNS)} FROM {journal} WHERE sequence > $1"
        self.page = f"{page} ORDER BY sequence LIMIT $2"
        self.page_of_tenant = f"{page} AND tenant_id = $3 ORDER BY sequence LIMIT $2"
        self.recorded = f"SELECT 1 FROM {journal} WHERE sequence = $1 AND id = $2"
        given = JOURNAL_COLUMNS[1:]
        arrays = ", ".join(f"${n}::{_TYPES.get(column, 'text')}[]" for n, column in enumerate(given, 4))
        self._append = (
            f"WITH head AS (UPDATE {name}.strongroom_journal_head SET sequence = sequence + $1 RETURNING sequence), "
            f"added AS (INSERT INTO {journal} (at, {listed(JOURNAL_COLUMNS)}) "
            f"SELECT u.at, head.sequence - $1 + u.number, {', '.join(f'u.{quoted(c)}' for c in given)} "
            f"FROM head, unnest($3::timestamptz[], {arrays}) WITH ORDINALITY AS u(at, {listed(given)}, number)) "
            "SELECT sequence, pg_current_xact_id()::text, pg_notify($2, '') FROM head"
        )

    async def append(self, connection: asyncpg.Connection, lines: Sequence[Line]) -> tuple[int, str]:
        """Append the lines in their order: the last one's sequence, and the transaction's id."""
        times = [journal_time(line[2]) for line in lines]
        columns = list(zip(*lines, strict=True))
        ((sequence, xid, _),) = await connection.fetch(self._append, len(lines), self.channel, times, *columns)
        return sequence, xid
