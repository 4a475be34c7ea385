"""`limits`: keys and limits in process, by leases and durable, beside a floor, a naive UPDATE and other libraries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from itertools import repeat
from time import perf_counter, process_time
from typing import Literal

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

from strongroom import Strongroom
from strongroom.integrations.fastapi import ApiKeyAuth, install

from . import floor, limiters
from .harness import (
    Benchmark,
    BenchmarkError,
    Group,
    Job,
    Plan,
    Role,
    Round,
    Sample,
    Target,
    closed_loop,
    side_by_side,
    start,
    warm_up_s,
)
from .postgres import server as postgres
from .redisserver import redis_server

VERIFY_OF_FLOOR, PAIR_OF_FLOOR, FASTAPI_OF_FLOOR = 0.08, 0.02, 0.8
BLOCK = 100
ON_POSTGRES = "strongroom, leased, on PostgreSQL"
LEASED, RESERVED = "strongroom, leased", "strongroom, reserve and settle, leased"
DURABLE_PAIR = "strongroom, reserve and settle, durable"
GUARDED = "strongroom's ApiKeyAuth, leased"
FLOOR = "SHA-256 and a dict lookup"
TOKENS = {"resource": "tokens", "limit": 1_000_000_000_000, "window": {"kind": "rolling", "seconds": 18_000}}


def run(plan: Plan) -> Benchmark:
    labels = (
        "In process, one caller but where it says otherwise, one key with a rolling limit of 5 hours that never "
        "denies; every answer is checked to be valid. Blocks of 100 calls are timed, so that the clock does not weigh.",
        "leased: room.keys.verify(key, cost={'tokens': 250}) from a share of the limit; what is spent is recorded in "
        "SQLite (WAL, synchronous=FULL) each second, and survives kill -9 of the process exactly.",
        "floor: SHA-256 of the key and a dict lookup; nothing counted.",
        "naive: one conditional UPDATE a request, its own transaction (SQLite, WAL, synchronous=FULL), no window.",
        "djangorestframework-api-key 3: APIKey.objects.is_valid, its default hash, SQLite; it counts nothing.",
        "limits 5: MovingWindowRateLimiter.hit, in memory and on a Redis on this machine; it knows no keys, and what "
        "it counted in memory dies with the process.",
        "FastAPI: a GET through the application in process; slowapi's decorator in memory, our ApiKeyAuth leased. "
        "What FastAPI itself takes for a dependency shows in the last line.",
    )
    with ExitStack() as stack:
        us = start(stack, plan, LEASED, ours, f"{plan.folder}/ours", "leased")
        durable = start(stack, plan, "strongroom, durable", ours, f"{plan.folder}/durable", "durable")
        bare = start(stack, plan, FLOOR, floor.hashing, ["sr_" + "0" * 48])
        naive = start(stack, plan, "a conditional UPDATE", limiters.conditional_update, f"{plan.folder}/naive")
        django = start(stack, plan, "djangorestframework-api-key", limiters.django_api_key, f"{plan.folder}/django")
        memory = start(stack, plan, "limits in memory", limiters.moving_window, "memory://")
        try:
            url = stack.enter_context(redis_server(f"{plan.folder}/redis"))
        except BenchmarkError as error:
            why: str | None = str(error)
            url = ""
        else:
            why = None
        redis = start(stack, plan, f"limits on Redis{'' if why is None else ': ' + why}", limiters.moving_window, url)
        fastapi = start(stack, plan, "FastAPI with ApiKeyAuth", guarded_fastapi, f"{plan.folder}/fastapi")
        slow = start(stack, plan, "FastAPI with slowapi", limiters.slow_api)
        plain = start(stack, plan, "FastAPI", limiters.bare_fastapi)
        nothing = start(stack, plan, "FastAPI with a dependency", limiters.dependent_fastapi)
        try:
            engine = stack.enter_context(postgres())
        except BenchmarkError as error:
            engine = ""
            plan.progress(str(error))
        elsewhere = start(stack, plan, ON_POSTGRES, ours, engine, "leased")
        groups: list[Group] = [
            side_by_side(
                plan,
                "verify",
                (
                    us.contender(LEASED, Role.OURS, "verify"),
                    bare.contender(FLOOR, Role.FLOOR, "look up"),
                    memory.contender("limits, moving window, memory", Role.PEER, "hit"),
                    redis.contender("limits, moving window, Redis", Role.PEER, "hit"),
                    django.contender("djangorestframework-api-key", Role.PEER, "check"),
                    naive.contender("naive: a conditional UPDATE", Role.PEER, "debit"),
                ),
                [Target(LEASED, of_floor=VERIFY_OF_FLOOR)],
            ),
            side_by_side(
                plan,
                "verify, leased, on two stores",
                (
                    elsewhere.contender(ON_POSTGRES, Role.OURS, "verify"),
                    us.contender(f"{LEASED}, on SQLite", Role.FLOOR, "verify"),
                ),
                [Target(ON_POSTGRES, of_floor=0.95)],
            ),
            side_by_side(
                plan,
                "reserve and settle (pairs)",
                (
                    us.contender(RESERVED, Role.OURS, "reserve"),
                    durable.contender(f"{DURABLE_PAIR}, 64 callers", Role.OURS, "reserve", 64),
                    bare.contender(FLOOR, Role.FLOOR, "look up"),
                ),
                [Target(RESERVED, of_floor=PAIR_OF_FLOOR)],
            ),
            side_by_side(
                plan,
                "a FastAPI request",
                (
                    fastapi.contender(GUARDED, Role.OURS, "ask"),
                    plain.contender("FastAPI alone", Role.FLOOR, "ask"),
                    slow.contender("slowapi, memory", Role.PEER, "ask"),
                    nothing.contender("FastAPI, a dependency that does nothing", Role.PEER, "ask"),
                ),
                [Target(GUARDED, of_floor=FASTAPI_OF_FLOOR)],
            ),
        ]
    return Benchmark("limits", "operations/s", labels, tuple(groups))


@asynccontextmanager
async def ours(folder: str, limits: Literal["durable", "leased"]) -> AsyncIterator[Round]:
    """For a `Worker`. Jobs: `verify`; `reserve` (and settle)."""
    url = folder if "://" in folder else f"sqlite:///{folder}.db"
    async with Strongroom.open(url, limits=limits) as room:
        key = (await room.keys.create(name="bench", limits=[TOKENS])).text
        keys = room.keys
        cost, used = {"tokens": 250}, {"tokens": 200}

        async def verify() -> None:
            assert (await keys.verify(key, cost=cost)).valid

        async def reserve() -> None:
            held = await keys.reserve(key, cost=cost)
            assert held.valid
            assert held.reservation_id is not None
            await keys.settle(held.reservation_id, used)

        async def measure(job: Job) -> Sample:
            operation = verify if job.what == "verify" else reserve
            if job.callers > 1:
                return await closed_loop(operation, job.seconds, job.callers)
            return await in_blocks(operation, job.seconds)

        yield measure


@asynccontextmanager
async def guarded_fastapi(folder: str) -> AsyncIterator[Round]:
    """For a `Worker`: a FastAPI application whose one route depends on ApiKeyAuth."""
    limit = {"resource": "requests", "limit": 1_000_000_000, "window": {"kind": "rolling", "seconds": 18_000}}
    async with Strongroom.open(f"sqlite:///{folder}.db", limits="leased") as room:
        key = (await room.keys.create(name="bench", limits=[limit])).text
        app = FastAPI()
        install(app, room=room)

        @app.get("/", dependencies=[Depends(ApiKeyAuth())])
        async def index(request: Request) -> Response:
            return Response(b"ok")

        yield limiters.through(app, f"Bearer {key}".encode())


async def in_blocks(operation: Callable[[], Awaitable[None]], seconds: float) -> Sample:
    """Run `operation` over and over, one after the other; blocks are timed, and their mean stands for each call."""
    end = perf_counter() + warm_up_s(seconds)
    while perf_counter() < end:
        await operation()
    calls = 0
    begin_cpu, begin = process_time(), perf_counter()
    deadline = begin + seconds

    while perf_counter() < deadline:
        for _ in repeat(None, BLOCK):
            await operation()
        calls += BLOCK
        await asyncio.sleep(0)  # renewals get their turn, as they do in a server
    elapsed, cpu = perf_counter() - begin, process_time() - begin_cpu
    return Sample(calls, elapsed, cores=cpu / elapsed)
