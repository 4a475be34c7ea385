"""Writes to a usage state other than uses: refills that begin, refunds, earlier uses, aggregated use. Pure.

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
"""Processes whose last number of aggregated use a state remembers."""


@dataclass(frozen=True, slots=True)
class DeadLease:
    """The lease of a dead process on one subject, from its lease log: for each limit the total that it had spent, and
    when it spent last."""

    lease: str
    spent: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class AggregatedUse:
    """Use that was added up, with its number among those of its writer (a process). It counts once, even if it is
    written twice: the state remembers the last number of each writer."""

    writer: str
    number: int


@dataclass(frozen=True, slots=True)
class BeginRefills:
    """These totals are about to get a refill, which begins now. This commits before the limits change, so that a crash
    between the two does not let the refill begin later."""

    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refund:
    """The use that was admitted at this moment is taken back, because its request was refused after all."""

    moment_us: int


@dataclass(frozen=True, slots=True)
class Backdate:
    """The use was at this moment. It counts in the windows that still count it."""

    moment_us: int


Special = DeadLease | AggregatedUse | BeginRefills | Refund | Backdate


def add_once(state: UsageState, aggregated: AggregatedUse, cost: Cost, count: int, used_at_us: int) -> bool:
    """Count aggregated use, unless it is counted already; whether it was not."""
    if aggregated.number <= state.aggregated.get(aggregated.writer, 0):
        return False
    state.aggregated.pop(aggregated.writer, None)  # so that it becomes the newest
    while len(state.aggregated) >= MAX_WRITERS:  # the oldest writers go
        del state.aggregated[next(iter(state.aggregated))]
    state.aggregated[aggregated.writer] = aggregated.number
    if count < 0 or any(units < 0 for units in cost.values()):  # more was refunded than was used meanwhile
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
    """Let the refills of these totals begin now; whether that changed anything (a total without use gets none)."""
    used = False
    for id in limits:
        counter = state.counters.pop(id, None)
        dumped = counter.dump() if counter is not None else state.unknown.pop(id, None)
        if dumped:
            state.unknown[id] = TotalCounter.without_refill(dumped, now_us)
            used = True
    return used and state.version > 0


def refill_started(state: UsageState, compiled_limits: Sequence[CompiledLimit]) -> bool:
    """Whether a refill began with this decision, so that its beginning must be stored without a use. True once."""
    found = False
    for one in compiled_limits:
        counter = state.counter(one)
        if isinstance(counter, TotalCounter) and counter.started:
            counter.started, found = False, True
    return found


def take_back(
    state: UsageState, compiled_limits: Sequence[CompiledLimit], cost: Cost, moment_us: int, now_us: int
) -> bool:
    """Take back the use that was charged to a state at a moment; whether there was any."""
    if not state.version:
        return False
    for compiled_limit in compiled_limits:
        units = cost.get(compiled_limit.resource, 0)
        if units and compiled_limit.resource != CONCURRENCY:
            state.counter(compiled_limit).take_back(moment_us, now_us, units)
    _subtract(state, cost, 1)
    return True


def _subtract(state: UsageState, cost: Cost, count: int) -> None:
    """Subtract uses and their cost from the lifetime totals."""
    state.count = max(0, state.count - count)
    for name, units in cost.items():
        if name in state.totals:
            state.totals[name] = max(0, state.totals[name] - units)


def counting(
    states: Sequence[tuple[UsageState, Sequence[CompiledLimit], int]], cost: Cost, moment_us: int
) -> tuple[list[tuple[UsageState, CompiledLimit]], str | None]:
    """The limits that still count an earlier use; or why none of the limits that it concerns does. `states`: each with
    its limits and its moment."""
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
