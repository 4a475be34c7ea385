"""The journal in PostgreSQL: appended last in a transaction, so that its order is the order of commits.

The head is one row that every append updates. It is locked from there to the commit, which serialises the appends: a
record with a lower sequence is never seen after one with a higher. So a reader needs no horizon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg

from ._postgres_partitions import journal_time
from ._sql import json_text, json_value, listed, quoted
from .port import Record

COLUMNS = (
    "sequence", "id", "tenant_id", "at_us", "actor", "request_id", "action", "collection", "entity_id", "version",
    "before", "after",
)  # fmt: skip
_TYPES = {"at_us": "bigint", "version": "bigint"}

Line = tuple[Any, ...]
"""A record's values in the order of COLUMNS, without the sequence."""


class Journal:
    """Texts for the journal in `schema`."""

    def __init__(self, schema: str) -> None:
        name = quoted(schema)
        self.channel = f"strongroom_{schema}"[:63]  # as long as a name may be; who shares it is only woken in vain
        self.head = f"SELECT sequence FROM {name}.strongroom_journal_head"
        journal = f"{name}.strongroom_journal"
        page = f"SELECT {listed(COLUMNS)} FROM {journal} WHERE sequence > $1"
        self.page = f"{page} ORDER BY sequence LIMIT $2"
        self.page_of_tenant = f"{page} AND tenant_id = $3 ORDER BY sequence LIMIT $2"
        self.recorded = f"SELECT 1 FROM {journal} WHERE sequence = $1 AND id = $2"
        arrays = ", ".join(f"${n}::{_TYPES.get(column, 'text')}[]" for n, column in enumerate(COLUMNS[1:], 4))
        self._append = (
            f"WITH head AS (UPDATE {name}.strongroom_journal_head SET sequence = sequence + $1 RETURNING sequence), "
            f"added AS (INSERT INTO {journal} (at, {listed(COLUMNS)}) "
            f"SELECT u.at, head.sequence - $1 + u.number, {', '.join(f'u.{quoted(c)}' for c in COLUMNS[1:])} "
            f"FROM head, unnest($3::timestamptz[], {arrays}) WITH ORDINALITY AS u(at, {listed(COLUMNS[1:])}, number)) "
            "SELECT sequence, pg_current_xact_id()::text, pg_notify($2, '') FROM head"
        )

    async def append(self, connection: asyncpg.Connection, lines: Sequence[Line]) -> tuple[int, str]:
        """Append the lines in their order: the last one's sequence, and the transaction's id."""
        times = [journal_time(line[2]) for line in lines]
        columns = list(zip(*lines, strict=True))
        ((sequence, xid, _),) = await connection.fetch(self._append, len(lines), self.channel, times, *columns)
        return sequence, xid


def line(record: Record, version: int | None) -> Line:
    return (
        record.id,
        record.tenant,
        record.at_us,
        record.actor,
        record.request_id,
        record.action,
        record.collection,
        record.entity_id,
        version,
        None if record.before is None else json_text(record.before),
        None if record.after is None else json_text(record.after),
    )


def record_of(row: Sequence[Any]) -> Record:
    sequence, id, tenant, at_us, actor, request_id, action, collection, entity_id, version, before, after = row
    return Record(
        id=id,
        tenant=tenant,
        at_us=at_us,
        actor=actor,
        request_id=request_id,
        action=action,
        collection=collection,
        entity_id=entity_id,
        before=None if before is None else json_value(before),
        after=None if after is None else json_value(after),
        version=version,
        sequence=sequence,
    )
