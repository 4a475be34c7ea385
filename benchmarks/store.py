"""`store`: the storage port alone on SQLite, beside the same statements on the bare driver."""

from __future__ import annotations

from contextlib import ExitStack

from . import floor, ours
from .harness import Benchmark, Plan, Role, side_by_side, start
from .notes import DESCRIPTION

ROWS, QUICK_ROWS = 5_000, 200
QUEUED = 64


def run(plan: Plan) -> Benchmark:
    rows = QUICK_ROWS if plan.quick else ROWS
    labels = (
        f"Over {rows:,} rows ({DESCRIPTION}); all fit in the page cache. WAL, synchronous=FULL.",
        f"Batches are queued by {QUEUED} callers, each waiting until its own is durable; the store groups them.",
        f"floor: the same statements on one thread, {floor.BATCH} batches a transaction, without isolation, types or "
        "savepoints.",
        "There is no peer: this is an inner boundary, measured so that a slow layer can be told from a slow store.",
    )
    kinds = (
        ("get", "get, one after the other", "store.get", "bare apsw, SELECT by primary key to dict", 1),
        ("put", f"[Check, Put], {QUEUED} queued", "store.commit", "bare apsw, SELECT version and upsert", QUEUED),
        ("create", f"[Create, Append], {QUEUED} queued", "store.commit", "bare apsw, two INSERTs", QUEUED),
    )
    with ExitStack() as stack:
        us = start(stack, plan, "strongroom's store", ours.store, f"{plan.folder}/ours", rows)
        bare = start(stack, plan, "bare apsw", floor.sqlite, f"{plan.folder}/floor", rows)
        groups = []
        for kind, title, our_name, floor_name, callers in kinds:
            contenders = (
                us.contender(our_name, Role.OURS, kind, callers),
                bare.contender(floor_name, Role.FLOOR, kind),
            )
            groups.append(side_by_side(plan, title, contenders))
    return Benchmark("store", "operations/s", labels, tuple(groups))
