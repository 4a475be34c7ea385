"""`strongroom bench`: measures the rates of reads, writes and verifications of a store on this machine."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .session import JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..context import Context

TENANT = "strongroom-bench"
KEYS = 200


@dataclass(frozen=True, slots=True)
class Measured:
    """One result: calls a second, and the duration of a call (median, 99th percentile)."""

    what: str
    per_second: float
    median_ms: float
    p99_ms: float
    count: int


def bench(
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds for each measurement.")] = 2,
    callers: Annotated[int, typer.Option(min=1, max=10_000, help="Concurrent callers.")] = 64,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Measure reads, writes and verifications a second on this machine.

    Without --store it measures a new SQLite store in the temporary folder. With --store it measures that store: it
    creates keys of the tenant "strongroom-bench" and removes them; their journal records stay. `make bench` in
    a checkout compares with other software.

    \b
    Example:
      strongroom bench --seconds 5
    """
    if store is not None:
        results = in_store(store, lambda room: _cleaned_up(room, seconds, callers), absent="made")
    else:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="strongroom-bench-") as folder:
            results = in_store(
                f"sqlite:///{folder}/bench.db", lambda room: _measure(room, seconds, callers, []), absent="own"
            )
    if json:
        output.print_json({"seconds": seconds, "callers": callers, "results": [asdict(r) for r in results]})
        return
    rows = [
        (r.what, f"{r.per_second:,.0f}", f"{r.median_ms:.2f} ms", f"{r.p99_ms:.2f} ms", f"{r.count:,}") for r in results
    ]
    output.print_table(("WHAT", "A SECOND", "MEDIAN", "P99", "DONE"), rows)
    output.print_note(f"{callers} callers at a time, {seconds:g} s each")


async def _cleaned_up(room: Strongroom, seconds: float, callers: int) -> list[Measured]:
    """Measure in the user's own store, and remove the created keys."""
    ids: list[str] = []
    try:
        return await _measure(room, seconds, callers, ids)
    finally:
        output.print_note(f"removing the {len(ids)} created keys")
        await _remove(room, operator(), ids)


async def _measure(room: Strongroom, seconds: float, callers: int, ids: list[str]) -> list[Measured]:
    """Measure each kind of work. `ids` receives the created keys, so that the caller removes them also after an
    error."""
    context = operator()
    limits = [{"resource": "requests", "limit": 10**15, "window": {"kind": "rolling", "seconds": 18_000}}]

    async def write(turn: int) -> None:
        issued = await room.keys.create(name=f"bench {turn}", tenant=TENANT, limits=limits, context=context)
        ids.append(issued.key.id)

    texts = []
    for turn in range(KEYS):
        issued = await room.keys.create(name=f"bench {turn}", tenant=TENANT, limits=limits, context=context)
        ids.append(issued.key.id)
        texts.append(issued.text)
    known = list(ids)

    async def read(turn: int) -> None:
        await room.keys.get(known[turn % KEYS])

    async def find(turn: int) -> None:
        await room.keys.list(tenant=TENANT, limit=20)

    async def verify(turn: int) -> None:
        await room.keys.verify(texts[turn % KEYS])

    async def verify_one(turn: int) -> None:
        await room.keys.verify(texts[0])

    work: Sequence[tuple[str, Callable[[int], Awaitable[None]]]] = (
        ("read a key", read),
        ("list 20 keys", find),
        ("verify, 200 keys with a limit", verify),
        ("verify, one key with a limit", verify_one),
        ("write a key", write),
    )
    return [await _timed(what, call, seconds, callers) for what, call in work]


async def _timed(what: str, call: Callable[[int], Awaitable[None]], seconds: float, callers: int) -> Measured:
    """Call in `callers` concurrent tasks for `seconds`, without a pause."""
    import asyncio

    took: list[float] = []
    turn = 0
    end = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal turn
        this = asyncio.current_task()
        # An answer from memory never suspends, so a cancellation would go unnoticed without this check.
        while (begun := time.perf_counter()) < end and this is not None and not this.cancelling():
            turn += 1
            await call(turn)
            took.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    elapsed = time.perf_counter() - begun
    took.sort()
    return Measured(
        what,
        per_second=len(took) / elapsed,
        median_ms=took[len(took) // 2] * 1_000,
        p99_ms=took[min(len(took) * 99 // 100, len(took) - 1)] * 1_000,
        count=len(took),
    )


async def _remove(room: Strongroom, context: Context, ids: list[str]) -> None:
    import asyncio

    for start in range(0, len(ids), 100):
        await asyncio.gather(*(room.keys.delete(id, purge=True, context=context) for id in ids[start : start + 100]))
