"""`cache`: an entity read through Redis, the second cache tier, beside a bare GET of redis-py."""

from __future__ import annotations

from contextlib import ExitStack

from . import cached
from .harness import Benchmark, Plan, Role, Target, side_by_side, start
from .notes import DESCRIPTION
from .redisserver import redis_server

ROWS, QUICK_ROWS = 5_000, 300
CALLERS = (32, 1)
TARGET_OF_FLOOR = 0.7

OURS = "strongroom, await tenant.get(Note, id), from Redis"
FLOOR = "bare redis-py, await client.get(key)"


def run(plan: Plan) -> Benchmark:
    rows = QUICK_ROWS if plan.quick else ROWS
    labels = (
        f"Uniformly over {rows:,} entries in one Redis on the loopback address: {DESCRIPTION}.",
        "strongroom: the local tier is off; the rules are asked, a validated entity comes back. One connection; what",
        "waits in one turn of the event loop shares one MGET. floor: bytes come back; one connection a caller.",
    )
    with ExitStack() as stack:
        url = stack.enter_context(redis_server(f"{plan.folder}/redis"))
        us = start(stack, plan, OURS, cached.through_redis, f"{plan.folder}/ours", url, rows)
        bare = start(stack, plan, FLOOR, cached.bare_redis, url, rows)
        groups = []
        for callers in CALLERS:
            contenders = (
                us.contender(OURS, Role.OURS, "get", callers),
                bare.contender(FLOOR, Role.FLOOR, "get", callers),
            )
            targets = [Target(OURS, of_floor=TARGET_OF_FLOOR)]
            groups.append(side_by_side(plan, f"{callers} readers at a time", contenders, targets))
    return Benchmark("cache", "reads/s", labels, tuple(groups))
