"""`write`: entities created through the whole write trip, beside the bare driver in batches and advanced-alchemy."""

from __future__ import annotations

from contextlib import ExitStack

from . import floor, ours, peer
from .harness import Benchmark, Plan, Role, Target, side_by_side, start
from .notes import DESCRIPTION

ROWS, QUICK_ROWS = 1_000, 100
WRITERS = 64
PEER_POOL = 5  # SQLAlchemy's own default; 1, 2 and 20 gave the peer no more
OF_FLOOR = 0.22

OURS = "strongroom, await tenant.create(Note(…))"
FLOOR = f"bare apsw, transactions of {floor.BATCH} rows and {floor.BATCH} journal rows"
PEER = "advanced-alchemy on aiosqlite, await repository.add(…)"


def run(plan: Plan) -> Benchmark:
    rows = QUICK_ROWS if plan.quick else ROWS
    labels = (
        f"{WRITERS} concurrent writers, each waiting until its row ({DESCRIPTION}) is durable; WAL, synchronous=FULL.",
        "One process each; `cores` says how much of the machine it used.",
        "strongroom: validated, allowed by the rules, written with its journal record in one commit.",
        "floor: one thread, ready-made batches, a journal row beside each row; no validation, no rules, no isolation.",
        f"peer: the same row in a commit of its own, pool of {PEER_POOL}; no journal, validation, rules or tenants.",
    )
    with ExitStack() as stack:
        us = start(stack, plan, OURS, ours.entities, f"{plan.folder}/ours", rows)
        bare = start(stack, plan, FLOOR, floor.sqlite, f"{plan.folder}/floor", rows)
        alchemy = start(stack, plan, PEER, peer.advanced_alchemy, f"{plan.folder}/peer", rows, PEER_POOL)
        contenders = (
            us.contender(OURS, Role.OURS, "create", WRITERS),
            bare.contender(FLOOR, Role.FLOOR, "create"),
            alchemy.contender(PEER, Role.PEER, "create", WRITERS),
        )
        group = side_by_side(plan, f"{WRITERS} writers", contenders, [Target(OURS, of_floor=OF_FLOOR)])
    return Benchmark("write", "rows/s", labels, (group,))
