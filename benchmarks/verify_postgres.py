"""`verify_postgres`: as `verify`, with the counts durable in PostgreSQL."""

from __future__ import annotations

from .harness import Benchmark, Plan
from .postgres import server
from .verify import MANY_KEYS, measured

TARGETS = {("durable", 1, 32): 0.5, ("leased", 1, 32): 0.8, ("durable", MANY_KEYS, 32): 0.4}


def run(plan: Plan) -> Benchmark:
    with server() as url:
        engine = "a PostgreSQL on this machine, which shares its cores"
        return measured(plan, "verify_postgres", engine, f"{url}?schema=bench_verify", TARGETS)
