"""What is written to an account beside uses: refills that begin, charges taken back, uses of before. Pure.

Each is decided and committed by the ledger as any charge is (`Charge.special`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..context import utc_from_us
from .counters import TotalCounter
from .usage_state import CONCURRENCY, Account, Allowance, Cost
from .windows import Limit, Total

MAX_WRITERS = 64
"""Processes that an account remembers the last tally of."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the log of a dead process says of its lease on one account: of each limit, the total that it had spent, and
    when last."""

    lease: str
    spent: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Tally:
    """Uses that nobody waits for, the so many-th that their writer (a process) writes. They count once, however often
    they are written: the account remembers the last number of each writer."""

    writer: str
    number: int


@dataclass(frozen=True, slots=True)
class Begin:
    """The totals of these ids are about to have a refill, which gives back from now on. It is committed before the
    limits are changed, so that no crash between the two lets the refill begin later."""

    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TakeBack:
    """The charge that was decided at this moment is taken back: what it was made for was refused after all."""

    moment_us: int


@dataclass(frozen=True, slots=True)
class Backdate:
    """The use was at this moment, and counts in the windows that still count it."""

    moment_us: int


Special = Found | Tally | Begin | TakeBack | Backdate


def tally_once(account: Account, tally: Tally, cost: Cost, count: int, used_at_us: int) -> bool:
    """Count uses, unless they are counted already; whether they were not."""
    if tally.number <= account.tallied.get(tally.writer, 0):
        return False
    account.tallied.pop(tally.writer, None)  # so that it goes to the end of the line
    while len(account.tallied) >= MAX_WRITERS:  # those that wrote longest ago
        del account.tallied[next(iter(account.tallied))]
    account.tallied[tally.writer] = tally.number
    if count < 0 or any(units < 0 for units in cost.values()):  # more was taken back than was used meanwhile
        _untally(account, {name: -units for name, units in cost.items() if units < 0}, max(0, -count))
        cost, count = {name: units for name, units in cost.items() if units > 0}, max(0, count)
    account.tally(cost, count, used_at_us)
    return True


def refills_that_begin(before: Iterable[Limit], after: Iterable[Limit]) -> tuple[str, ...]:
    """The ids of the totals that have a refill after a change of limits, and had none before it."""
    had = {limit.id for limit in before if isinstance(limit.window, Total) and limit.window.refill is not None}
    have = [limit.id for limit in after if isinstance(limit.window, Total) and limit.window.refill is not None]
    return tuple(id for id in have if id not in had)


def begin_refills(account: Account, limits: Sequence[str], now_us: int) -> bool:
    """Let the refills of these totals begin now; whether that changed anything: of what was never used none comes."""
    used = False
    for id in limits:
        counter = account.counters.pop(id, None)
        state = counter.dump() if counter is not None else account.unknown.pop(id, None)
        if state:
            account.unknown[id] = TotalCounter.without_refill(state, now_us)
            used = True
    return used and account.version > 0


def refill_started(account: Account, allowances: Sequence[Allowance]) -> bool:
    """Whether a refill began at this look, so that its beginning is to be stored although nothing was used. Once."""
    found = False
    for one in allowances:
        counter = account.counter(one)
        if isinstance(counter, TotalCounter) and counter.started:
            counter.started, found = False, True
    return found


def take_back(account: Account, allowances: Sequence[Allowance], cost: Cost, moment_us: int, now_us: int) -> bool:
    """Take back what was charged to an account at a moment; whether there was anything."""
    if not account.version:
        return False
    for allowance in allowances:
        units = cost.get(allowance.resource, 0)
        if units and allowance.resource != CONCURRENCY:
            account.counter(allowance).take_back(moment_us, now_us, units)
    _untally(account, cost, 1)
    return True


def _untally(account: Account, cost: Cost, count: int) -> None:
    """Take uses and what they cost out of what is added up for ever."""
    account.count = max(0, account.count - count)
    for name, units in cost.items():
        if name in account.totals:
            account.totals[name] = max(0, account.totals[name] - units)


def counting(
    accounts: Sequence[tuple[Account, Sequence[Allowance], int]], cost: Cost, moment_us: int
) -> tuple[list[tuple[Account, Allowance]], str | None]:
    """Which limits still count a use of before, and where none of those that it concerns does, why not. `accounts`:
    each with its limits and its moment."""
    concerned = [
        (account, one, now_us)
        for account, allowances, now_us in accounts
        for one in allowances
        if cost.get(one.resource) and one.resource != CONCURRENCY
    ]
    found, firsts = [], []
    for account, one, now_us in concerned:
        first_us = account.counter(one).counts_from_us(now_us)
        if moment_us >= first_us:
            found.append((account, one))
        firsts.append(first_us)
    if found or not concerned:
        return found, None
    since = utc_from_us(min(firsts)).isoformat()
    found_at = utc_from_us(moment_us).isoformat()
    return [], f"found {found_at}, expected {since} or later: no limit still counts what was used before"
