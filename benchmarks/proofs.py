"""`proofs`: how long a proof of inclusion takes in a tree of a million, and of ten million leaves."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

from strongroom import Strongroom
from strongroom.journal.merkle import root_from_inclusion

from .big_tree import make
from .harness import Benchmark, BenchmarkError, Plan, percentiles_us

SIZES, QUICK_SIZES = (1_000_000, 10_000_000), (20_000,)
PROOFS, QUICK_PROOFS = 1_000, 20
TARGET_S = 0.005
TENANT = "acme"


def run(plan: Plan) -> Benchmark:
    labels = [
        "`proofs.inclusion` of a random leaf, in process, on SQLite; each proof is verified, which is not timed. One "
        f"in four is of a leaf whose tile is not complete, so its records are read. Target: p50 {TARGET_S * 1e3:g} ms."
    ]
    for size in QUICK_SIZES if plan.quick else SIZES:
        file = Path(plan.folder).absolute() / f"proofs-{size}.db"
        times = asyncio.run(_measure(f"sqlite:///{file}", size, QUICK_PROOFS if plan.quick else PROOFS))
        file.unlink()
        p50, p99 = (us / 1e3 for us in percentiles_us(times) if us is not None)
        verdict = "met" if p50 <= TARGET_S * 1e3 else "MISSED"
        plan.progress(f"{size:,} leaves")
        labels.append(
            f"{size:,} leaves: p50 {p50:.2f} ms, p99 {p99:.2f} ms of {len(times)} "
            f"(target {TARGET_S * 1e3:g} ms: {verdict})"
        )
    return Benchmark("proofs", "seconds", tuple(labels))


async def _measure(url: str, about: int, count: int) -> list[float]:
    """The times of so many proofs, in seconds."""
    size = await make(url, TENANT, about)
    times = []
    chosen = random.Random(1)
    async with Strongroom.open(url, sealing=False) as room:
        for number in range(count):
            index = chosen.randrange(size - 100, size) if number % 4 == 0 else chosen.randrange(size)
            began = time.perf_counter()
            found = await room.proofs.inclusion(TENANT, index)
            times.append(time.perf_counter() - began)
            if root_from_inclusion(index, size, found.leaf, found.proof) != found.root:
                raise BenchmarkError(f"the proof of the leaf {index} is wrong")
    return times
