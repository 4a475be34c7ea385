"""The journal in PostgreSQL: appended last in a transaction, so that its order is the order of commits.

The head is one row that every append updates. It is locked from there to the commit, which serialises the appends: a
record with a lower sequence is never seen after one with a higher. So a reader needs no horizon. Beside it the head
keeps the floor: the greatest sequence that was dropped. The floors of tenants are in a table of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg

from ..port import JournalFilter
from ..sql import JOURNAL_COLUMNS, Line, listed, quoted
from .partitions import journal_time

_TYPES = {"at_us": "bigint", "version": "bigint", "salt": "bytea"}
_OF_TENANT = "(SELECT set_config('app.current_tenant', $3, true) AS tenant OFFSET 0) AS t CROSS JOIN "
_SMALLEST, _GREATEST = -(2**63), 2**63 - 1
_CONDITIONS = {
    "actor": "actor = {}",
    "action": "action = {}",
    "collection": "collection = {}",
    "entity_id": "entity_id = {}",
    "request_id": "request_id = {}",
    "since_us": "at_us >= {}",
    "until_us": "at_us < {}",
    "after_sequence": "sequence > {}",
    "through_sequence": "sequence <= {}",
}


class Journal:
    """The SQL of the journal in `schema`."""

    def __init__(self, schema: str) -> None:
        name = quoted(schema)
        self.channel = f"strongroom_{schema}"[:63]  # two stores that share a channel only wake each other
        self.head = f"SELECT sequence FROM {name}.strongroom_journal_head"
        journal = f"{name}.strongroom_journal"
        columns = listed(JOURNAL_COLUMNS)
        # Each page comes with the head and the floor at the same moment: the last record, and the last dropped one.
        self._page = (
            f"SELECT head.sequence, {{}}, {', '.join(f'n.{quoted(c)}' for c in JOURNAL_COLUMNS)} "
            f"FROM {{}}{name}.strongroom_journal_head AS head LEFT JOIN LATERAL (SELECT {columns} FROM {journal} "
            "WHERE {}sequence > $1{} ORDER BY sequence LIMIT $2) AS n ON true"
        )
        floor = f"coalesce((SELECT sequence FROM {name}.strongroom_journal_floors WHERE tenant_id = t.tenant), 0)"
        self.page = self._page.format("head.floor", "", "", "")
        self.page_of_tenant = self._page.format(floor, _OF_TENANT, "tenant_id = t.tenant AND ", "")
        self.recorded = f"SELECT 1 FROM {journal} WHERE sequence = $1 AND id = $2"
        given = JOURNAL_COLUMNS[1:]
        arrays = ", ".join(f"${n}::{_TYPES.get(column, 'text')}[]" for n, column in enumerate(given, 4))
        # The tenant is set for each record as it is added, since the policy compares it with the record's.
        cells = {c: f"u.{quoted(c)}" for c in given}
        cells["tenant_id"] = "nullif(set_config('app.current_tenant', coalesce(u.tenant_id, ''), true), '')"
        self._append = (
            f"WITH head AS (UPDATE {name}.strongroom_journal_head SET sequence = sequence + $1 RETURNING sequence), "
            f"added AS (INSERT INTO {journal} (at, {columns}) "
            f"SELECT u.at, head.sequence - $1 + u.number, {', '.join(cells.values())} "
            f"FROM head, unnest($3::timestamptz[], {arrays}) WITH ORDINALITY AS u(at, {listed(given)}, number)) "
            "SELECT sequence, pg_current_xact_id()::text, pg_notify($2, '') FROM head"
        )

    def rows(self, where: JournalFilter, position: int, limit: int) -> tuple[str, list[Any]]:
        """The statement that returns a page of the rows of a filter, as `page` and `page_of_tenant` do but for the
        floor, and its values. A filter with a tenant needs no other right than the tenant's."""
        values: list[Any] = [position, limit]
        conditions = [] if not where.platform else ["tenant_id IS NULL"]

        def placed(value: Any) -> str:
            values.append(value)
            return f"${len(values)}"

        if where.tenant is not None:
            placed(where.tenant)
        for name, condition in _CONDITIONS.items():
            value = getattr(where, name)
            if isinstance(value, int):
                value = min(max(value, _SMALLEST), _GREATEST)
            if value is not None:
                conditions.append(condition.format(placed(value)))
        # Partitions outside the period are not read.
        if where.since_us is not None:
            conditions.append(f"at >= {placed(journal_time(where.since_us))}")
        if where.until_us is not None:
            conditions.append(f"at <= {placed(journal_time(where.until_us))}")
        more = "".join(f" AND {condition}" for condition in conditions)
        if where.tenant is None:
            return self._page.format("0", "", "", more), values
        return self._page.format("0", _OF_TENANT, "tenant_id = t.tenant AND ", more), values

    async def append(self, connection: asyncpg.Connection, lines: Sequence[Line]) -> tuple[int, str]:
        """Append the records in their order. Returns the last one's sequence, and the transaction's id."""
        times = [journal_time(line[2]) for line in lines]
        ((sequence, xid, _),) = await connection.fetch(
            self._append, len(lines), self.channel, times, *zip(*lines, strict=True)
        )
        return sequence, xid
