"""`sealing_lag`: how long after a write begins its record is sealed, under the load of `sealing`."""

from __future__ import annotations

from contextlib import ExitStack

from . import postgres, sealing
from .harness import Benchmark, Plan, Role, Target, side_by_side

AT_MOST_MS = 1_000.0


def run(plan: Plan) -> Benchmark:
    many = sealing.QUICK_TENANTS if plan.quick else sealing.TENANTS
    labels = (
        "The 99th percentile of the time from the begin of a write to the end of the round that seals its record, in "
        "each round of the benchmark. Every record of a sealing round counts as old as the oldest one.",
        f"The writes of `sealing`: {sealing.WRITERS} writers on SQLite, {sealing.POSTGRES_WRITERS} on PostgreSQL.",
    )
    contenders = []
    with ExitStack() as stack:
        server = stack.enter_context(postgres.server())
        for backend, writers in (("SQLite", sealing.WRITERS), ("PostgreSQL", sealing.POSTGRES_WRITERS)):
            for tenants in (1, many):
                name = f"{backend}, {tenants:,} tenant{'s' if tenants > 1 else ''}"
                sealed = sealing.started(stack, plan, backend, server, tenants, sealed=True)
                contenders.append(sealed.contender(name, Role.OURS, "lag", writers))
        targets = [Target(contender.name, at_most=AT_MOST_MS) for contender in contenders]
        group = side_by_side(plan, "from the begin of a write to its seal", contenders, targets)
    return Benchmark("sealing_lag", "ms, 99th percentile", labels, (group,))
