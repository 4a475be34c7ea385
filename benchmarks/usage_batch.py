"""`usage_batch`: usage recorded durably through `POST /v1/usage:batch`, beside batches of bare SQLite."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from itertools import count
from pathlib import Path

import apsw

from .harness import (
    Benchmark,
    BenchmarkError,
    Contender,
    Job,
    Plan,
    Role,
    Round,
    Sample,
    Target,
    Worker,
    side_by_side,
    start,
    tight_loop,
)
from .load import Load, load_generator, post
from .servers import HOST, create_keys, strongroom_server

ITEMS = 1_000
CONNECTIONS = 4
OF_FLOOR = 0.15
KEYS = (100, 1_000)
LIMIT = {"resource": "tokens", "limit": 1_000_000_000_000, "window": {"kind": "rolling", "seconds": 18_000}}
FLOOR = "bare SQLite: an UPDATE an event, 1,000 a transaction"


def run(plan: Plan) -> Benchmark:
    labels = (
        f"POST /v1/usage:batch with {ITEMS:,} events a request, {CONNECTIONS} connections; each event is 250 tokens of "
        "one of the keys, which have a rolling limit of 5 hours. An answer comes when all of them are durable.",
        "strongroom: `strongroom serve`, one worker, durable in SQLite (WAL, synchronous=FULL); events of one key are "
        "added up before they are charged. The load generator is a process of its own.",
        "floor: apsw, an UPDATE of a counter by primary key an event, the same durability; no HTTP, no JSON, no "
        "windows.",
    )
    admin_key = secrets.token_hex(24)
    with ExitStack() as stack:
        generator = stack.enter_context(Worker(load_generator))
        bare = start(stack, plan, FLOOR, updates, f"{plan.folder}/bare")
        groups = []
        server = stack.enter_context(strongroom_server(Path(plan.folder) / "strongroom", admin_key))
        for keys in (10, 20) if plan.quick else KEYS:
            name = f"strongroom, {keys:,} keys"
            try:
                texts = create_keys(server, admin_key, [{"name": f"bench {n}", "limits": [LIMIT]} for n in range(keys)])
                measure: Callable[[float], Sample] | None = _batches(
                    generator, server.port, server.pid, admin_key, texts
                )
                why = ""
            except BenchmarkError as error:
                measure, why = None, str(error)
            contenders = (
                Contender(name, Role.OURS, measure, why),
                bare.contender(FLOOR, Role.FLOOR, f"{keys}"),
            )
            groups.append(side_by_side(plan, f"{keys:,} keys", contenders, [Target(name, of_floor=OF_FLOOR)]))
    return Benchmark("usage_batch", "events/s", labels, tuple(groups))


def _batches(generator: Worker, port: int, pid: int, admin_key: str, texts: list[str]) -> Callable[[float], Sample]:
    numbers = count()
    requests = tuple(
        post(
            "/v1/usage:batch",
            {"items": [{"key": texts[next(numbers) % len(texts)], "cost": {"tokens": 250}} for _ in range(ITEMS)]},
            host=f"{HOST}:{port}",
            bearer=admin_key,
        )
        for _ in range(16)
    )

    def measure(seconds: float) -> Sample:
        sample = generator(Load(HOST, port, requests, CONNECTIONS, seconds, pid, mark=b'"recorded":1000'))
        return Sample(sample.operations * ITEMS, sample.seconds, cores=sample.cores, client_cores=sample.client_cores)

    return measure


@asynccontextmanager
async def updates(folder: str) -> AsyncIterator[Round]:
    """For a `Worker`: jobs are numbers of keys; a transaction of ITEMS updates, each counts as one."""
    os.makedirs(folder, exist_ok=True)
    connection = apsw.Connection(f"{folder}/floor.db")
    connection.execute("PRAGMA journal_mode = wal").fetchall()
    connection.execute("PRAGMA synchronous = full").fetchall()
    connection.execute("CREATE TABLE usage (key TEXT PRIMARY KEY, used INTEGER) WITHOUT ROWID").fetchall()
    with connection:
        connection.executemany("INSERT INTO usage VALUES (?, 0)", [(f"key_{n:032x}",) for n in range(max(KEYS))])
    numbers = count()

    async def measure(job: Job) -> Sample:
        keys = int(job.what)

        def batch() -> None:
            rows = [(250, f"key_{next(numbers) % keys:032x}") for _ in range(ITEMS)]
            with connection:
                connection.executemany("UPDATE usage SET used = used + ? WHERE key = ?", rows)

        sample = tight_loop(batch, job.seconds, each=ITEMS)
        return Sample(sample.operations, sample.seconds, cores=sample.cores)

    try:
        yield measure
    finally:
        connection.close()
