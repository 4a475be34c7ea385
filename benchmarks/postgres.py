"""`postgres`: entities and usage on PostgreSQL, beside bare asyncpg on the same server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from itertools import count, cycle
from pathlib import Path
from random import Random
from typing import Any

import asyncpg

from strongroom import Strongroom
from strongroom.storage.port import Batch, Create
from strongroom.storage.postgres.store import PostgresStore

from . import ours
from .harness import Benchmark, Job, Plan, Role, Round, Sample, Target, closed_loop, side_by_side, start
from .notes import DESCRIPTION, FIELDS, TENANT, note

ROWS, QUICK_ROWS = 20_000, 500
KEYS, QUICK_KEYS = 1_000, 20
FEW_KEYS = 100
WRITERS = 32
RECORDERS = 4_096
BARE_POOL = 32
START_TIMEOUT_S = 60

READ, BARE_READ = "strongroom, await tenant.get(Note, id)", "bare asyncpg, fetchrow by primary key to dict"
WRITE, BARE_WRITE = "strongroom, await tenant.create(Note(…))", "bare asyncpg, a transaction of two rows"
RECORD, BARE_RECORD = "strongroom, await room.keys.record(…)", "bare asyncpg, a conditional UPDATE"
RECORD_OF_FLOOR = 6
STORE = "strongroom's store, await store.get(…)"
POLICIES, NO_POLICIES = "the store's own read, row-level security", "the same statement, a table without"


def run(plan: Plan) -> Benchmark:
    rows, keys = (QUICK_ROWS, QUICK_KEYS) if plan.quick else (ROWS, KEYS)
    labels = (
        f"Every row is {DESCRIPTION}; all fit in shared buffers. fsync and synchronous_commit are on; the server is on "
        "this machine and shares its cores with who measures.",
        "strongroom: row-level security, the rules asked, a validated entity back; a write with its journal record.",
        "bare asyncpg: no isolation, no types, no rules; each transaction of two rows is a commit of its own, on a "
        f"pool of {BARE_POOL} connections.",
        f"Usage: {RECORDERS:,} callers record events on {FEW_KEYS} or {keys:,} keys, each with one rolling limit; an "
        "event counts once it is durable. Group commit writes a key once for all its events of a commit; the bare one "
        "writes each.",
    )
    with ExitStack() as stack:
        url = stack.enter_context(server())
        us = start(stack, plan, "strongroom", ours.entities, f"{url}?schema=bench_entities", rows)
        store = start(stack, plan, "the store", reading, f"{url}?schema=bench_store", rows)
        bare = start(stack, plan, "bare asyncpg", bare_entities, url, rows)
        recorder = start(stack, plan, "strongroom's ledger", recording, f"{url}?schema=bench_usage", keys)
        updates = start(stack, plan, "bare updates", bare_usage, url, keys)
        read = (
            us.contender(READ, Role.OURS, "get"),
            bare.contender(BARE_READ, Role.FLOOR, "get"),
            store.contender(STORE, Role.OURS, "with"),
        )
        security = (store.contender(POLICIES, Role.OURS, "with"), store.contender(NO_POLICIES, Role.FLOOR, "without"))
        write = (
            us.contender(WRITE, Role.OURS, "create", WRITERS),
            bare.contender(BARE_WRITE, Role.FLOOR, "create", WRITERS),
        )
        usage = (
            recorder.contender(f"{RECORD}, {FEW_KEYS} keys", Role.OURS, "few", RECORDERS),
            updates.contender(BARE_RECORD, Role.FLOOR, "update", BARE_POOL),
            recorder.contender(f"{RECORD}, {keys:,} keys", Role.OURS, "record", RECORDERS),
        )
        aims = [Target(f"{RECORD}, {count:,} keys", of_floor=RECORD_OF_FLOOR) for count in (FEW_KEYS, keys)]
        groups = (
            side_by_side(plan, "point reads, 1 reader", read, [Target(READ, of_floor=0.75)]),
            side_by_side(plan, "row-level security", security, [Target(POLICIES, of_floor=0.9)]),
            side_by_side(plan, f"writes, {WRITERS} writers", write, [Target(WRITE, of_floor=0.5)]),
            side_by_side(plan, f"usage events, {RECORDERS:,} callers", usage, aims),
        )
    return Benchmark("postgres", "operations/s", labels, groups)


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database: BENCH_POSTGRES, whose role owns it, or that of a server started for this."""
    if given := os.environ.get("BENCH_POSTGRES"):
        yield given
        return
    from tests.helpers.servers import free_port, postgres

    with tempfile.TemporaryDirectory(prefix="strongroom-bench-") as folder:
        binaries, port = postgres.bundled(), free_port()
        data = postgres.make_cluster(binaries, Path(folder))
        wrapper = [sys.executable, "-c", postgres.REMOVED_AT_THE_END, str(data.parent)]
        process = subprocess.Popen(
            [*wrapper, *postgres.server_command(binaries, data, port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not postgres.accepts(port):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError("PostgreSQL did not start")
                time.sleep(0.05)
            postgres.Server(port, binaries).execute(*postgres.APP_ROLE)
            yield f"postgresql://app:app@127.0.0.1:{port}/postgres"
        finally:
            process.terminate()
            process.wait()


# --- Bare asyncpg -------------------------------------------------------------------------------------------------

_COLUMNS = ("tenant_id", "id", "version", "created_at", "updated_at", *FIELDS)
_TABLES = """
CREATE SCHEMA bench_bare;
CREATE TABLE bench_bare.notes (
  tenant_id text COLLATE "C", id text COLLATE "C", version bigint, created_at timestamptz, updated_at timestamptz,
  title text, body text, status text, author text, priority bigint, due_at timestamptz, PRIMARY KEY (tenant_id, id)
);
CREATE INDEX ON bench_bare.notes (tenant_id, status, created_at DESC);
CREATE TABLE bench_bare.journal (
  sequence bigserial PRIMARY KEY, tenant_id text, at timestamptz, actor text, action text, entity_id text, after text
);
"""
_GET = f"SELECT {', '.join(_COLUMNS)} FROM bench_bare.notes WHERE tenant_id = $1 AND id = $2"
_INSERT = (
    f"INSERT INTO bench_bare.notes ({', '.join(_COLUMNS)}) VALUES ($1, $2, 1, now(), now(), $3, $4, $5, $6, $7, $8)"
)
_JOURNAL = (
    "INSERT INTO bench_bare.journal (tenant_id, at, actor, action, entity_id, after) "
    "VALUES ($1, now(), 'system', 'create', $2, $3)"
)


@asynccontextmanager
async def bare_entities(url: str, rows: int) -> AsyncIterator[Round]:
    """For a `Worker`. Jobs: `get` (a row by its key to a dict), `create` (a transaction of a row and a journal row)."""
    async with asyncpg.create_pool(url, min_size=BARE_POOL, max_size=BARE_POOL) as pool:
        await pool.execute(_TABLES)
        await pool.executemany(_INSERT, [(TENANT, str(number), *note(number).values()) for number in range(rows)])
        await pool.execute("ANALYZE bench_bare.notes")
        ids = [str(number) for number in range(rows)]
        Random(1).shuffle(ids)
        turn, numbers = cycle(ids), count(rows)

        async def create() -> None:
            number = next(numbers)
            fields = note(number)
            after = json.dumps({**fields, "due_at": str(fields["due_at"])})
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute(_INSERT, TENANT, str(number), *fields.values())
                await connection.execute(_JOURNAL, TENANT, str(number), after)

        async with pool.acquire() as reader:

            async def get() -> None:
                dict(await reader.fetchrow(_GET, TENANT, next(turn)))

            async def measure(job: Job) -> Sample:
                return await closed_loop(get if job.what == "get" else create, job.seconds, job.callers)

            yield measure


@asynccontextmanager
async def bare_usage(url: str, keys: int) -> AsyncIterator[Round]:
    """For a `Worker`: an UPDATE of a counter that has room, a commit each, whatever the job names."""
    async with asyncpg.create_pool(url, min_size=BARE_POOL, max_size=BARE_POOL) as pool:
        await pool.execute(
            "CREATE SCHEMA bench_counters; CREATE TABLE bench_counters.c (id text PRIMARY KEY, used bigint)"
        )
        await pool.executemany(
            "INSERT INTO bench_counters.c VALUES ($1, 0)", [(str(number),) for number in range(keys)]
        )
        turn = cycle([str(number) for number in range(keys)])
        update = "UPDATE bench_counters.c SET used = used + 250 WHERE id = $1 AND used + 250 <= 1000000000000"

        async def change() -> None:
            assert await pool.execute(update, next(turn)) == "UPDATE 1"

        async def measure(job: Job) -> Sample:
            return await closed_loop(change, job.seconds, job.callers)

        yield measure


# --- Ours ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def reading(url: str, rows: int) -> AsyncIterator[Round]:
    """For a `Worker`. Jobs: `with` (the store's read of one document), `without` (its statement on a copy of the table
    that has no row-level security, decoded alike)."""
    store = PostgresStore(url)
    await store.open()
    try:
        await store.prepare([ours.Note.__collection__])
        ids = await _filled(store, rows)
        schema = store.settings.schema
        connection = await asyncpg.connect(store.settings.dsn)
        await connection.execute(f"SELECT set_config('app.current_tenant', '{TENANT}', false)")
        await connection.execute(
            f"CREATE TABLE {schema}.copied (LIKE {schema}.notes INCLUDING ALL); "
            f"INSERT INTO {schema}.copied SELECT * FROM {schema}.notes; ANALYZE {schema}.copied; ANALYZE {schema}.notes"
        )
        await connection.close()
        table = store._tables["notes"]
        without = table.by_id.replace('"notes"', '"copied"')
        turn = cycle(ids)

        async def get() -> None:
            assert await store.get("notes", TENANT, next(turn)) is not None

        async def get_without() -> None:
            table.decode((await store._rows(without, (TENANT, next(turn))))[0])

        async def measure(job: Job) -> Sample:
            return await closed_loop(get if job.what == "with" else get_without, job.seconds, job.callers)

        yield measure
    finally:
        await store.close()


async def _filled(store: PostgresStore, rows: int) -> list[str]:
    encode = ours.Note.__codec__.encode
    ids = [f"n{number:07}" for number in range(rows)]
    for begin in range(0, rows, 250):
        part = range(begin, min(begin + 250, rows))
        operations = tuple(Create("notes", ids[n], encode(ours.Note(**note(n)))) for n in part)
        await store.commit(Batch(TENANT, operations, time.time_ns() // 1_000))
    Random(1).shuffle(ids)
    return ids


@asynccontextmanager
async def recording(url: str, keys: int) -> AsyncIterator[Round]:
    """For a `Worker`: `room.keys.record(…)` of what has happened, on each key in turn, whatever the job names."""
    limit: dict[str, Any] = {
        "resource": "tokens",
        "limit": 1_000_000_000_000,
        "window": {"kind": "rolling", "seconds": 18_000},
    }
    async with Strongroom.open(url) as room:
        ids: list[str] = []
        for begin in range(0, keys, ours.AT_ONCE):
            numbers = range(begin, min(begin + ours.AT_ONCE, keys))
            fresh = (room.keys.create(name=f"bench {n}", tenant=TENANT, limits=[limit]) for n in numbers)
            ids += [issued.text for issued in await asyncio.gather(*fresh)]
        turns = {"record": cycle(ids), "few": cycle(ids[:FEW_KEYS])}

        async def measure(job: Job) -> Sample:
            turn = turns[job.what]

            async def record() -> None:
                await room.keys.record(key=next(turn), cost={"tokens": 250})

            return await closed_loop(record, job.seconds, job.callers)

        yield measure
