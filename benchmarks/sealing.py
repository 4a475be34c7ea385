"""`sealing`: entity writes that are journalled and sealed, beside the same writes unsealed and beside bare drivers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

from strongroom import Strongroom

from . import floor, ours, postgres
from .harness import Benchmark, Job, Plan, Role, Round, Sample, Started, Target, closed_loop, side_by_side, start
from .notes import DESCRIPTION, note

TENANTS, QUICK_TENANTS = 1_000, 20
ROWS, QUICK_ROWS = 1_000, 100
WRITERS, POSTGRES_WRITERS = 64, 32
OF_SQLITE, OF_POSTGRES = 0.2, 1.0
OF_UNSEALED = 0.9

SEALED, UNSEALED = "strongroom, written and sealed", "strongroom, the same writes, sealing off"
BARE_SQLITE = f"bare apsw, transactions of {floor.BATCH} rows and {floor.BATCH} journal rows"
BARE_POSTGRES = "bare asyncpg, a transaction of two rows"


def run(plan: Plan) -> Benchmark:
    rows, many = (QUICK_ROWS, QUICK_TENANTS) if plan.quick else (ROWS, TENANTS)
    labels = (
        f"Every row is {DESCRIPTION}, written by `tenant.create` with its journal record; durable. Tenants take turns.",
        "written and sealed: the same process adds each record to its tenant's Merkle tree, and signs the platform's, "
        "all the time; what is not sealed when a round of the benchmark ends was not sealed when it began, either: at "
        "most what is written in a second (`sealing_lag`).",
        f"SQLite: {WRITERS} writers; WAL, synchronous=FULL. PostgreSQL: {POSTGRES_WRITERS} writers; fsync and "
        "synchronous_commit are on; the server shares the cores with who measures.",
        "The bare drivers write two rows, of one tenant: no validation, no rules, no isolation, no trees.",
    )
    groups = []
    with ExitStack() as stack:
        server = stack.enter_context(postgres.server())
        bare_sqlite = start(stack, plan, BARE_SQLITE, floor.sqlite, f"{plan.folder}/floor", rows)
        bare_postgres = start(stack, plan, BARE_POSTGRES, postgres.bare_entities, server, rows)
        for backend, bare, name, writers, of_floor in (
            ("SQLite", bare_sqlite, BARE_SQLITE, WRITERS, OF_SQLITE),
            ("PostgreSQL", bare_postgres, BARE_POSTGRES, POSTGRES_WRITERS, OF_POSTGRES),
        ):
            for tenants in (1, many):
                sealed, unsealed = (
                    started(stack, plan, backend, server, tenants, sealed=sealing) for sealing in (True, False)
                )
                title = f"{backend}, {writers} writers, {tenants:,} tenant{'s' if tenants > 1 else ''}"
                writing = sealed.contender(SEALED, Role.OURS, "create", writers)
                contenders = [writing, bare.contender(name, Role.FLOOR, "create", writers)]
                groups.append(side_by_side(plan, title, contenders, [Target(SEALED, of_floor=of_floor)]))
                contenders = [writing, unsealed.contender(UNSEALED, Role.FLOOR, "create", writers)]
                title += ": the cost of sealing"
                groups.append(side_by_side(plan, title, contenders, [Target(SEALED, of_floor=OF_UNSEALED)]))
    return Benchmark("sealing", "rows/s", labels, tuple(groups))


def started(stack: ExitStack, plan: Plan, backend: str, server: str, tenants: int, *, sealed: bool) -> Started:
    """A worker with a store of its own, of `writes`."""
    place = f"{backend.lower()}_{'sealed' if sealed else 'unsealed'}_{tenants}"
    folder = Path(plan.folder) / place
    folder.mkdir()
    url = f"sqlite:///{folder.absolute()}/strongroom.db"
    if backend == "PostgreSQL":
        url = f"{server}?schema=bench_{place}"
    return start(stack, plan, place, writes, url, tenants, sealed)


@asynccontextmanager
async def writes(url: str, tenants: int, sealing: bool) -> AsyncIterator[Round]:
    """For a `Worker`: `tenant.create(Note(…))`, of each tenant in turn. Jobs:

    `create`: the rate while sealing goes on; the last records are sealed after the round.
    `lag`: the 99th percentile of the time from a write's begin to the end of the round that seals it. The sample's rate
    is this time in milliseconds. Every record of a round counts as old as the round's oldest one.
    """
    async with Strongroom.open(url, entities=[ours.Note], sealing=sealing) as room:
        rooms = [room.tenant(f"tenant-{number}") for number in range(tenants)]
        numbers = count()
        lags: list[tuple[float, int]] = []
        sealer = room.sealer.sealer
        seal = sealer.round

        async def noted(lease: Any) -> Any:
            sealed = await seal(lease)
            if sealed.oldest_us is not None:
                lags.append(((time.time_ns() // 1_000 - sealed.oldest_us) / 1_000, sealed.records))
            return sealed

        sealer.round = noted  # type: ignore[method-assign]

        async def create() -> None:
            number = next(numbers)
            await rooms[number % tenants].create(ours.Note(**note(number)))

        for _ in range(0, tenants, ours.AT_ONCE):
            await asyncio.gather(*(create() for _ in range(ours.AT_ONCE)))
        if sealing:
            await room.sealer.seal_now()

        async def measure(job: Job) -> Sample:
            lags.clear()
            sample = await closed_loop(create, job.seconds, job.callers)
            if job.what == "lag":
                await room.sealer.seal_now()
                return Sample(round(_percentile(lags, 0.99) * 1_000), 1_000.0)
            if sealing:
                await room.sealer.seal_now()
            return sample

        yield measure


def _percentile(lags: list[tuple[float, int]], share: float) -> float:
    """The lag that this share of the records does not exceed."""
    left = sum(records for _, records in lags) * share
    for lag, records in sorted(lags):
        left -= records
        if left <= 0:
            return lag
    raise ValueError("nothing was sealed")
