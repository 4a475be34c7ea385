"""`usage`: a key's check and debit in process, without HTTP, beside hashing and a lookup alone."""

from __future__ import annotations

from contextlib import ExitStack

from . import floor, ours
from .harness import Benchmark, Plan, Role, side_by_side, start

CONCURRENCIES = (1, 32, 128)
MANY_KEYS = 1_000
TOKENS = 250

FLOOR = "SHA-256 and a dict lookup"


def run(plan: Plan) -> Benchmark:
    many = 20 if plan.quick else MANY_KEYS
    labels = (
        f"room.keys.verify(key, cost={{'tokens': {TOKENS}}}) against one rolling limit of 5 hours that never denies; "
        "every answer is checked to be valid.",
        "strongroom: counts durable in SQLite (WAL, synchronous=FULL); one process, N concurrent callers.",
        "floor: SHA-256 of the key and a dict lookup, nothing counted, nothing written, no event loop. It bounds what "
        "any verify in Python can do; no product reaches it.",
        "There is no peer: we know of no Python library that answers only after the count is durable.",
    )
    with ExitStack() as stack:
        us = start(stack, plan, "strongroom", ours.verifying, f"{plan.folder}/ours", many, TOKENS)
        bare = start(stack, plan, FLOOR, floor.hashing, [f"sr_{n:048x}" for n in range(many)])
        groups = []
        for callers in CONCURRENCIES:
            contenders = (
                us.contender("strongroom, 1 key", Role.OURS, "one", callers),
                bare.contender(FLOOR, Role.FLOOR, "look up"),
                us.contender(f"strongroom, {many:,} keys", Role.OURS, "many", callers),
            )
            groups.append(side_by_side(plan, f"{callers} callers" if callers > 1 else "1 caller", contenders))
    return Benchmark("usage", "verifications/s", labels, tuple(groups))
