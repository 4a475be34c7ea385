"""`zipf`: how many reads of the store the cache spares under a Zipf load, on each backend that can be had."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from . import cached
from .harness import Benchmark, Group, Plan, Role, Target, side_by_side, start
from .redisserver import redis_server

ROWS, QUICK_ROWS = 10_000, 500
CALLERS = 32
TARGET_PERCENT = 85
# Two empty stores each, apart by a space: one for the nodes with the cache, one for the node without.
SERVERS = {"postgresql": "BENCH_ZIPF_POSTGRESQL", "firestore": "BENCH_ZIPF_FIRESTORE"}


def _stores(folder: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """By backend, the URLs of two new stores; and what is missing."""
    stores = {}
    for scheme in ("sqlite", "json"):
        place = Path(folder) / scheme
        place.mkdir(parents=True)
        stores[scheme] = (f"{scheme}:///{place.absolute()}/cached", f"{scheme}:///{place.absolute()}/plain")
    absent = []
    for scheme, variable in SERVERS.items():
        urls = os.environ.get(variable, "").split()
        if len(urls) == 2:
            stores[scheme] = (urls[0], urls[1])
        else:
            absent.append(f"{scheme} is not measured: {variable} names two empty stores, apart by a space.")
    return stores, absent


def run(plan: Plan) -> Benchmark:
    rows = QUICK_ROWS if plan.quick else ROWS
    groups: list[Group] = []
    with ExitStack() as stack:
        redis_url = stack.enter_context(redis_server(f"{plan.folder}/redis"))
        stores, absent = _stores(plan.folder)
        for scheme, urls in stores.items():
            nodes = 1 if scheme == "json" else 2
            name = f"{scheme}, {nodes} node{'s' if nodes > 1 else ''} with the cache"
            with ExitStack() as inner:
                us = start(inner, plan, name, cached.zipf, urls, redis_url, rows, nodes)
                contenders = (us.contender(name, Role.OURS, "spared", CALLERS),)
                groups.append(side_by_side(plan, scheme, contenders, [Target(name, TARGET_PERCENT)]))
    labels = (
        "Of 100 reads that reach the store without a cache, how many do not with it, by operation.",
        f"{rows:,} documents, Zipf with s = {cached.ZIPF_S}, {cached.READS_SHARE:.0%} reads, {CALLERS} callers; warm.",
        "Counted at the store is everything that reads it: misses, what was invalidated, and the reads that updates",
        "make, which no cache spares.",
        *absent,
    )
    return Benchmark("zipf", "% of store reads spared", labels, tuple(groups))
