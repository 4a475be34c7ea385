"""What is written to an account beside uses: refills that begin, charges taken back, uses of before. Pure.

Each is decided and committed by the ledger as any charge is (`Charge.special`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..context import utc_from_us
from .counters import TotalCounter
from .usage_state import CONCURRENCY, CompiledLimit, Cost, UsageState
from .windows import Limit, Total

MAX_WRITERS = 64
"""Processes that an account remembers the last tally of."""


@dataclass(frozen=True, slots=True)
class DeadLease:
    """What the log of a dead process says of its lease on one account: of each limit, the total that it had spent, and
    when last."""

    lease: str
    spent: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class AggregatedUse:
    """Uses that nobody waits for, the so many-th that their writer (a process) writes. They count once, however often
    they are written: the account remembers the last number of each writer."""

    writer: str
    number: int


@dataclass(frozen=True, slots=True)
class BeginRefills:
    """The totals of these ids are about to have a refill, which gives back from now on. It is committed before the
    limits are changed, so that no crash between the two lets the refill begin later."""

    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refund:
    """The charge that was decided at this moment is taken back: what it was made for was refused after all."""

    moment_us: int


@dataclass(frozen=True, slots=True)
class Backdate:
    """The use was at this moment, and counts in the windows that still count it."""

    moment_us: int


Special = DeadLease | AggregatedUse | BeginRefills | Refund | Backdate


def add_once(state: UsageState, aggregated: AggregatedUse, cost: Cost, count: int, used_at_us: int) -> bool:
    """Count uses, unless they are counted already; whether they were not."""
    if aggregated.number <= state.aggregated.get(aggregated.writer, 0):
        return False
    state.aggregated.pop(aggregated.writer, None)  # so that it goes to the end of the line
    while len(state.aggregated) >= MAX_WRITERS:  # those that wrote longest ago
        del state.aggregated[next(iter(state.aggregated))]
    state.aggregated[aggregated.writer] = aggregated.number
    if count < 0 or any(units < 0 for units in cost.values()):  # more was taken back than was used meanwhile
        _subtract(state, {name: -units for name, units in cost.items() if units < 0}, max(0, -count))
        cost, count = {name: units for name, units in cost.items() if units > 0}, max(0, count)
    state.add_totals(cost, count, used_at_us)
    return True


def refills_that_begin(before: Iterable[Limit], after: Iterable[Limit]) -> tuple[str, ...]:
    """The ids of the totals that have a refill after a change of limits, and had none before it."""
    had = {limit.id for limit in before if isinstance(limit.window, Total) and limit.window.refill is not None}
    have = [limit.id for limit in after if isinstance(limit.window, Total) and limit.window.refill is not None]
    return tuple(id for id in have if id not in had)


def begin_refills(state: UsageState, limits: Sequence[str], now_us: int) -> bool:
    """Let the refills of these totals begin now; whether that changed anything: of what was never used none comes."""
    used = False
    for id in limits:
        counter = state.counters.pop(id, None)
        dumped = counter.dump() if counter is not None else state.unknown.pop(id, None)
        if dumped:
            state.unknown[id] = TotalCounter.without_refill(dumped, now_us)
            used = True
    return used and state.version > 0


def refill_started(state: UsageState, compiled_limits: Sequence[CompiledLimit]) -> bool:
    """Whether a refill began at this look, so that its beginning is to be stored although nothing was used. Once."""
    found = False
    for one in compiled_limits:
        counter = state.counter(one)
        if isinstance(counter, TotalCounter) and counter.started:
            counter.started, found = False, True
    return found


def take_back(
    state: UsageState, compiled_limits: Sequence[CompiledLimit], cost: Cost, moment_us: int, now_us: int
) -> bool:
    """Take back what was charged to an account at a moment; whether there was anything."""
    if not state.version:
        return False
    for compiled_limit in compiled_limits:
        units = cost.get(compiled_limit.resource, 0)
        if units and compiled_limit.resource != CONCURRENCY:
            state.counter(compiled_limit).take_back(moment_us, now_us, units)
    _subtract(state, cost, 1)
    return True


def _subtract(state: UsageState, cost: Cost, count: int) -> None:
    """Take uses and what they cost out of what is added up for ever."""
    state.count = max(0, state.count - count)
    for name, units in cost.items():
        if name in state.totals:
            state.totals[name] = max(0, state.totals[name] - units)


def counting(
    states: Sequence[tuple[UsageState, Sequence[CompiledLimit], int]], cost: Cost, moment_us: int
) -> tuple[list[tuple[UsageState, CompiledLimit]], str | None]:
    """Which limits still count a use of before, and where none of those that it concerns does, why not. `accounts`:
    each with its limits and its moment."""
    concerned = [
        (state, one, now_us)
        for state, compiled_limits, now_us in states
        for one in compiled_limits
        if cost.get(one.resource) and one.resource != CONCURRENCY
    ]
    found, firsts = [], []
    for state, one, now_us in concerned:
        first_us = state.counter(one).counts_from_us(now_us)
        if moment_us >= first_us:
            found.append((state, one))
        firsts.append(first_us)
    if found or not concerned:
        return found, None
    since = utc_from_us(min(firsts)).isoformat()
    found_at = utc_from_us(moment_us).isoformat()
    return [], f"found {found_at}, expected {since} or later: no limit still counts what was used before"
