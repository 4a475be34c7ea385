"""`read`: an entity by its id through the public API, beside the bare driver and beside advanced-alchemy."""

from __future__ import annotations

from contextlib import ExitStack

from . import floor, ours, peer
from .harness import Benchmark, Plan, Role, Target, side_by_side, start
from .notes import DESCRIPTION

ROWS, QUICK_ROWS = 20_000, 500
OF_FLOOR = 0.55

OURS = "strongroom, await tenant.get(Note, id)"
FLOOR = "bare apsw, SELECT by primary key to dict"
PEER = "advanced-alchemy on aiosqlite, await repository.get(id)"


def run(plan: Plan) -> Benchmark:
    rows = QUICK_ROWS if plan.quick else ROWS
    labels = (
        f"One point read after the other, uniformly over {rows:,} rows, all in the page cache: {DESCRIPTION}.",
        "One process each; `cores` says how much of the machine it used.",
        "strongroom: tenant isolation in the engine, the rules asked, a validated entity back.",
        "floor: rows as they are stored, as dicts; no tenant isolation, no types, no rules.",
        "peer: its fastest use: one session for all reads, each row forgotten after it was read. No tenants, no rules.",
    )
    with ExitStack() as stack:
        us = start(stack, plan, OURS, ours.entities, f"{plan.folder}/ours", rows)
        bare = start(stack, plan, FLOOR, floor.sqlite, f"{plan.folder}/floor", rows)
        alchemy = start(stack, plan, PEER, peer.advanced_alchemy, f"{plan.folder}/peer", rows, 1)
        contenders = (
            us.contender(OURS, Role.OURS, "get"),
            bare.contender(FLOOR, Role.FLOOR, "get"),
            alchemy.contender(PEER, Role.PEER, "get"),
        )
        group = side_by_side(plan, "1 reader", contenders, [Target(OURS, of_floor=OF_FLOOR)])
    return Benchmark("read", "reads/s", labels, (group,))
