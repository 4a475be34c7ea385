"""The floors that need no server: bare apsw on SQLite, and bare hashing, with nothing of a product around them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from itertools import count, cycle
from pathlib import Path
from random import Random
from typing import Any

import apsw

from .harness import Job, Round, Sample, tight_loop
from .notes import FIELDS, TENANT, note

COLUMNS = ("tenant_id", "id", "version", "created_at", "updated_at", *FIELDS)
PLACES = ", ".join("?" * len(COLUMNS))
BATCH = 64

_SCHEMA = f"""
CREATE TABLE notes (
  {", ".join(COLUMNS)},
  PRIMARY KEY (tenant_id, id)
) WITHOUT ROWID;
CREATE INDEX notes_status ON notes (tenant_id, status, created_at DESC);
CREATE TABLE journal (
  sequence INTEGER PRIMARY KEY, tenant_id, at_us, actor, action, collection, entity_id, version, after
);
"""
_INSERT = f"INSERT INTO notes ({', '.join(COLUMNS)}) VALUES ({PLACES})"
_UPSERT = (
    f"INSERT INTO notes ({', '.join(COLUMNS)}) VALUES ({PLACES}) ON CONFLICT (tenant_id, id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in COLUMNS[2:])
)
_SELECT = f"SELECT {', '.join(COLUMNS)} FROM notes WHERE tenant_id = ? AND id = ?"
_JOURNAL = (
    "INSERT INTO journal (tenant_id, at_us, actor, action, collection, entity_id, version, after) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
Row = tuple[Any, ...]


def _open(folder: str) -> apsw.Connection:
    Path(folder).mkdir(parents=True, exist_ok=True)
    connection = apsw.Connection(str(Path(folder) / "floor.db"))
    connection.execute("PRAGMA journal_mode = wal").fetchall()
    connection.execute("PRAGMA synchronous = full").fetchall()
    connection.execute(_SCHEMA).fetchall()
    return connection


def _row(number: int) -> Row:
    fields = note(number)
    now_us = time.time_ns() // 1_000
    fields["due_at"] = int(fields["due_at"].timestamp() * 1_000_000)
    return (TENANT, f"{now_us:011x}{secrets.token_hex(10)}", now_us, now_us, now_us, *fields.values())


def _journal_row(row: Row) -> Row:
    after = json.dumps(dict(zip(FIELDS, row[5:], strict=True)), separators=(",", ":"))
    return (TENANT, row[2], "system", "create", "notes", row[1], row[2], after)


@asynccontextmanager
async def sqlite(folder: str, rows: int) -> AsyncIterator[Round]:
    """For a `Worker`. Jobs:

    `get`: SELECT of a row by primary key → dict, uniformly over `rows` rows.
    `create`: a transaction of BATCH new rows and BATCH journal rows. Each row counts as one.
    `put`: a transaction of BATCH times a check of the version and a write of a whole row. Each row counts as one.
    """
    connection = _open(folder)
    made = [_row(number) for number in range(rows)]
    with connection:
        connection.executemany(_INSERT, made)
    ids = [row[1] for row in made]
    Random(1).shuffle(ids)
    turn = cycle(ids)
    numbers = count(rows)

    def get() -> dict[str, Any]:
        found = connection.execute(_SELECT, (TENANT, next(turn))).fetchone()
        assert found is not None
        return dict(zip(COLUMNS, found, strict=True))

    def create() -> None:
        fresh = [_row(next(numbers)) for _ in range(BATCH)]
        with connection:
            connection.executemany(_INSERT, fresh)
            connection.executemany(_JOURNAL, [_journal_row(row) for row in fresh])

    def put() -> None:
        with connection:
            for _ in range(BATCH):
                row_id = next(turn)
                version = connection.execute(
                    "SELECT version FROM notes WHERE tenant_id = ? AND id = ?", (TENANT, row_id)
                ).fetchone()
                assert version is not None
                row = _row(next(numbers))
                connection.execute(_UPSERT, (TENANT, row_id, version[0] + 1, *row[3:]))

    async def measure(job: Job) -> Sample:
        if job.what == "get":
            return tight_loop(get, job.seconds)
        # A batch is one call here: its latency is not that of a single row, so none is reported.
        sample = tight_loop(create if job.what == "create" else put, job.seconds, each=BATCH)
        return Sample(sample.operations, sample.seconds, cores=sample.cores)

    try:
        yield measure
    finally:
        connection.close()


@asynccontextmanager
async def hashing(keys: Sequence[str]) -> AsyncIterator[Round]:
    """For a `Worker`: SHA-256 of a key and a dict lookup, whatever the job names."""
    known = {sha256(key.encode()).digest(): number for number, key in enumerate(keys)}
    turn = cycle(keys)

    def look_up() -> int:
        return known[sha256(next(turn).encode()).digest()]

    async def measure(job: Job) -> Sample:
        return tight_loop(look_up, job.seconds, block=200)

    yield measure
