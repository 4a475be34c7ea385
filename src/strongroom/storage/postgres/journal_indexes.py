"""The journal's indexes on PostgreSQL: one for each field that a search may name, in the order of the sequence.

An index of a partitioned table cannot be built beside writers in one step. It is declared on the journal alone, so that
each new partition gets it; then it is built on each partition CONCURRENTLY, and attached.
"""

from __future__ import annotations

import asyncpg

from ..sql import quoted

JOURNAL = "strongroom_journal"
INDEXES = {
    "sequence": "(sequence)",
    "tenant_id.sequence": "(tenant_id, sequence)",
    "actor.sequence": "(actor, sequence)",
    "action.sequence": "(action, sequence)",
    "collection.sequence": "(collection, sequence)",
    "entity_id.sequence": "(entity_id, sequence)",
    "request_id.sequence": "(request_id, sequence)",
    # Records are added nearly in the order of their times: block ranges tell the period in a thousandth of the size.
    "at_us": "USING brin (at_us) WITH (autosummarize = on, pages_per_range = 32)",
}
"""What follows ON of each index, by the end of its name."""


def index_name(table: str, end: str) -> str:
    return f"{table}.index.{end}"


def create(schema: str) -> str:
    """The script that makes the indexes of a new journal."""
    return "\n".join(
        f"CREATE INDEX {quoted(index_name(JOURNAL, end))} ON {quoted(schema)}.{JOURNAL} {definition};"
        for end, definition in INDEXES.items()
    )


def declare(schema: str, end: str) -> str:
    """The statement that declares an index on the journal alone. It is valid once every partition has it."""
    name = quoted(index_name(JOURNAL, end))
    return f"CREATE INDEX IF NOT EXISTS {name} ON ONLY {quoted(schema)}.{JOURNAL} {INDEXES[end]}"


def build(schema: str, partition: str, end: str) -> str:
    name = quoted(index_name(partition, end))
    return f"CREATE INDEX CONCURRENTLY {name} ON {quoted(schema)}.{quoted(partition)} {INDEXES[end]}"


def attach(schema: str, partition: str, end: str) -> str:
    of_journal, of_partition = (f"{quoted(schema)}.{quoted(index_name(t, end))}" for t in (JOURNAL, partition))
    return f"ALTER INDEX {of_journal} ATTACH PARTITION {of_partition}"


NAMES = [index_name(JOURNAL, end) for end in INDEXES]

_PARTITIONS = """
SELECT part.relname::text AS partition, (SELECT indisvalid FROM pg_index WHERE indexrelid = own.oid) AS valid
FROM pg_inherits JOIN pg_class AS part ON part.oid = inhrelid
LEFT JOIN pg_class AS own ON own.relnamespace = part.relnamespace AND own.relname = part.relname || '.index.' || $2
WHERE inhparent = to_regclass(format('%I.strongroom_journal', $1::text)) AND NOT EXISTS (
    SELECT FROM pg_index JOIN pg_inherits AS attached ON attached.inhrelid = indexrelid
    WHERE indrelid = part.oid AND attached.inhparent = to_regclass(format('%I.%I', $1::text, $3::text)))
ORDER BY 1
"""


async def unattached(connection: asyncpg.Connection, schema: str, end: str) -> list[tuple[str, bool | None]]:
    """The partitions without a declared index; and of one that is built but not attached, whether it is valid."""
    rows = await connection.fetch(_PARTITIONS, schema, end, index_name(JOURNAL, end))
    return [(row["partition"], row["valid"]) for row in rows]
