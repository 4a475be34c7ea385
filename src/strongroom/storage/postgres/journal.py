"""The journal in PostgreSQL: appended last in a transaction, so that its order is the order of commits.

The head is one row that every append updates. It is locked from there to the commit, which serialises the appends: a
record with a lower sequence is never seen after one with a higher. So a reader needs no horizon. Beside it the head
keeps the floor: the greatest sequence that retention has dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from ..sql import JOURNAL_COLUMNS, Line, listed, quoted
from .partitions import journal_time

_COLUMNS = JOURNAL_COLUMNS[: JOURNAL_COLUMNS.index("salt")]
_TYPES = {"at_us": "bigint", "version": "bigint"}


class Journal:
    """The SQL of the journal in `schema`."""

    def __init__(self, schema: str) -> None:
        name = quoted(schema)
        self.channel = f"strongroom_{schema}"[:63]  # two stores that share a channel only wake each other
        self.head = f"SELECT sequence FROM {name}.strongroom_journal_head"
        journal = f"{name}.strongroom_journal"
        columns = listed(_COLUMNS)
        # Each page comes with the head and the floor at the same moment: the last record, and the last dropped one.
        page = (
            f"SELECT head.sequence, head.floor, {', '.join(f'n.{quoted(c)}' for c in _COLUMNS)} "
            f"FROM {{}}{name}.strongroom_journal_head AS head LEFT JOIN LATERAL (SELECT {columns} FROM {journal} "
            "WHERE {}sequence > $1 ORDER BY sequence LIMIT $2) AS n ON true"
        )
        tenant = "(SELECT set_config('app.current_tenant', $3, true) AS tenant OFFSET 0) AS t CROSS JOIN "
        self.page = page.format("", "")
        self.page_of_tenant = page.format(tenant, "tenant_id = t.tenant AND ")
        self.recorded = f"SELECT 1 FROM {journal} WHERE sequence = $1 AND id = $2"
        given = _COLUMNS[1:]
        arrays = ", ".join(f"${n}::{_TYPES.get(column, 'text')}[]" for n, column in enumerate(given, 4))
        # The tenant is set for each record as it is added, since the policy compares it with the record's.
        cells = {c: f"u.{quoted(c)}" for c in given}
        cells["tenant_id"] = "nullif(set_config('app.current_tenant', coalesce(u.tenant_id, ''), true), '')"
        self._append = (
            f"WITH head AS (UPDATE {name}.strongroom_journal_head SET sequence = sequence + $1 RETURNING sequence), "
            f"added AS (INSERT INTO {journal} (at, {listed(_COLUMNS)}) "
            f"SELECT u.at, head.sequence - $1 + u.number, {', '.join(cells.values())} "
            f"FROM head, unnest($3::timestamptz[], {arrays}) WITH ORDINALITY AS u(at, {listed(given)}, number)) "
            "SELECT sequence, pg_current_xact_id()::text, pg_notify($2, '') FROM head"
        )

    async def append(self, connection: asyncpg.Connection, lines: Sequence[Line]) -> tuple[int, str]:
        """Append the records in their order. Returns the last one's sequence, and the transaction's id."""
        times = [journal_time(line[2]) for line in lines]
        columns = list(zip(*lines, strict=True))[: len(_COLUMNS) - 1]
        ((sequence, xid, _),) = await connection.fetch(self._append, len(lines), self.channel, times, *columns)
        return sequence, xid
