"""Advice from PostgreSQL's statistics: indexes that were never used, and tables that are read whole."""

from __future__ import annotations

from collections.abc import Iterable

import asyncpg

from ...entities import Collection
from ..port import Advice
from .schema_tables import physical_indexes

LEAST_READS = 1_000
"""Reads of a table that must have been counted before an index of it is called unused."""
LEAST_WHOLE_READS = 100
"""How often a table must have been read whole before an index is called missing."""
LARGE_ROWS = 10_000
"""A table with fewer rows is read whole as fast as through an index."""

_INDEXES = """
SELECT i.relname::text AS collection, indexrelname::text AS name, i.idx_scan AS scans,
    t.seq_scan + coalesce(t.idx_scan, 0) AS reads
FROM pg_stat_user_indexes AS i JOIN pg_stat_user_tables AS t USING (relid) WHERE i.schemaname = $1
"""
_TABLES = """
SELECT relname::text AS collection, seq_scan AS scans, seq_tup_read AS rows_read, n_live_tup AS rows
FROM pg_stat_user_tables WHERE schemaname = $1 AND seq_scan >= $2 AND n_live_tup >= $3 AND seq_tup_read >= seq_scan * $3
ORDER BY seq_tup_read DESC
"""
_SINCE = "SELECT to_char(stats_reset, 'YYYY-MM-DD HH24:MI TZ') FROM pg_stat_database WHERE datname = current_database()"


async def advise(connection: asyncpg.Connection, schema: str, collections: Iterable[Collection]) -> list[Advice]:
    """As `Advising.advise`. The counts are those of this server: reads on a standby are not among them."""
    reset = await connection.fetchval(_SINCE)
    since = f"since the statistics' reset at {reset}" if reset else "since the server's statistics began"
    declared = {collection.name: collection for collection in collections}
    found = []
    for row in await connection.fetch(_INDEXES, schema):
        collection = declared.get(row["collection"])
        index = physical_indexes(collection).get(row["name"]) if collection is not None else None
        if index is None or index.unique or row["scans"] or row["reads"] < LEAST_READS:
            continue
        reason = f"PostgreSQL has not used it once {since}, in {row['reads']} reads of the table"
        fix = "drop it from the declaration, unless a standby or a rare report needs it: each write pays for it"
        found.append(Advice(row["collection"], "unused index", index.fields, reason, fix))
    for row in await connection.fetch(_TABLES, schema, LEAST_WHOLE_READS, LARGE_ROWS):
        if row["collection"] in declared:
            reason = (
                f"PostgreSQL has read the table whole {row['scans']} times {since}, {row['rows_read']} rows in all; "
                f"it has about {row['rows']}"
            )
            fix = "declare an index for what is asked of it (pg_stat_statements shows the statements)"
            found.append(Advice(row["collection"], "missing index", (), reason, fix))
    return found
