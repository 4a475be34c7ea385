"""`zipf`: how many reads of the store the cache spares under a Zipf load, on each backend that can be had."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from . import cached, postgres
from .harness import Benchmark, Group, Plan, Role, Target, side_by_side, start
from .redisserver import redis_server

ROWS, QUICK_ROWS = 10_000, 500
CALLERS = 32
TARGET_PERCENT = 85
FIRESTORE_VARIABLE = "BENCH_ZIPF_FIRESTORE"


def _stores(folder: str, postgresql: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """By backend, the URLs of two new stores, for the nodes with the cache and for the one without; what is missing."""
    stores = {"postgresql": (f"{postgresql}?schema=zipf_cached", f"{postgresql}?schema=zipf_plain")}
    for scheme in ("sqlite", "json"):
        place = Path(folder) / scheme
        place.mkdir(parents=True)
        stores[scheme] = (f"{scheme}:///{place.absolute()}/cached", f"{scheme}:///{place.absolute()}/plain")
    firestore = os.environ.get(FIRESTORE_VARIABLE, "").split()
    if len(firestore) != 2:
        return stores, [f"Firestore is not measured: {FIRESTORE_VARIABLE} names two empty stores, apart by a space."]
    return {**stores, "firestore": (firestore[0], firestore[1])}, []


def run(plan: Plan) -> Benchmark:
    rows = QUICK_ROWS if plan.quick else ROWS
    groups: list[Group] = []
    with ExitStack() as stack:
        redis_url = stack.enter_context(redis_server(f"{plan.folder}/redis"))
        stores, absent = _stores(plan.folder, stack.enter_context(postgres.server()))
        for scheme, urls in stores.items():
            nodes = 1 if scheme == "json" else 2
            name = f"{scheme}, {nodes} node{'s' if nodes > 1 else ''} with the cache"
            with ExitStack() as inner:
                us = start(inner, plan, name, cached.zipf, urls, redis_url, rows, nodes)
                contenders = (us.contender(name, Role.OURS, "spared", CALLERS),)
                groups.append(side_by_side(plan, scheme, contenders, [Target(name, percent=TARGET_PERCENT)]))
    labels = (
        "Of 100 reads that reach the store without a cache, how many do not with it, by operation.",
        f"{rows:,} documents, Zipf with s = {cached.ZIPF_S}, {cached.READS_SHARE:.0%} reads, {CALLERS} callers; warm.",
        "Counted at the store is everything that reads it: misses, what was invalidated, and the reads that updates",
        "make, which no cache spares.",
        *absent,
    )
    return Benchmark("zipf", "% of store reads spared", labels, tuple(groups))
