"""The limit leases that one node spends from. The store debits their units before the node spends them.

A *lease* is a node's entry in a usage document: units of each limit, until some moment. While it stands, all its units
count as used for every other node. So the node admits uses from it without a commit, and no limit is ever exceeded,
even if the node dies. From time to time the node records what it has spent, in the commit that leases the next units
(`record`, `grant`). The last such commit frees the rest.

Every amount here is a running total since the lease began, never a difference. So after a commit whose answer was lost,
or a killed process, it is still known what is recorded: the document has its total (`settled`), and the node its own
(`spent`). At every moment `spent <= cap` holds for the cap in the store. While a commit is under way, the cap is the
lower one of the two that may be durable.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from ..context import utc_from_us
from .counters import BUCKETS_PER_WINDOW
from .lease_log import LeaseLog
from .usage_state import CONCURRENCY, CompiledLimit, Lease, Subject, UsageState

LEAST_CALLS = 64
"""The first lease of a limit is for so many calls like the one that asked for it; later leases are for HORIZON_S."""
HORIZON_S = 4.0
"""A lease lasts for so long at the recent rate of use."""
PART_OF_FREE = 4
"""A lease is at most this part of what is free. So leases shrink near the limit, and other nodes get units too."""
RENEW_AT = 2
"""A lease is renewed when one part of so many is spent, so that no call has to wait for it."""
KEPT_AFTER_US = 3_600_000_000
"""For so long after its end, an unrecorded lease can be recovered by a process that finds the lease log. After that it
is recorded as spent at its end."""
MAX_ENDED = 32
"""Ended leases whose recorded totals a usage state still keeps."""
LEAST_ELAPSED_S = 0.001
_SECOND = 1_000_000


class Reservation(Protocol):
    """A reservation in memory: the amount that it holds of each resource, and on which leased limits."""

    cost: Mapping[str, int]
    model: str | None
    route: str | None
    more: list[tuple[LeasedLimit, str]]

    def holds(self, leased_limit: LeasedLimit) -> bool: ...


class LeasedLimit:
    """This node's lease of one limit. `held` is reserved by reservations in memory; `spent + held <= cap`."""

    __slots__ = (
        "cap",
        "compiled_limit",
        "ends_us",
        "granted_at",
        "granted_spent",
        "held",
        "leased",
        "low",
        "mark_ends_us",
        "marks",
        "next_cap",
        "next_ends_us",
        "recorded",
        "reserved",
        "resets_at",
        "settled",
        "slot",
        "spent",
        "usage_lease",
        "width_us",
    )

    def __init__(self, usage_lease: UsageLease, compiled_limit: CompiledLimit, slot: int) -> None:
        self.usage_lease = usage_lease
        self.compiled_limit = compiled_limit
        self.slot = slot
        self.spent = 0
        self.held = 0
        self.settled = 0
        self.cap = 0
        self.next_cap = 0
        self.next_ends_us = 0
        self.ends_us = 0
        self.low = 0
        """Once more than this is spent, the lease asks for a renewal."""
        self.granted_at = 0.0
        self.granted_spent = 0
        window = compiled_limit.limit.window
        seconds = window.seconds if window.kind == "rolling" else 1
        self.width_us = -(-seconds * _SECOND // BUCKETS_PER_WINDOW) if window.kind == "rolling" else _SECOND
        self.marks: list[tuple[int, int]] = []
        """(moment, `spent` before it): the units after this total were spent in that moment's bucket."""
        self.mark_ends_us = 0
        # For answers, as of the last commit: the use of other nodes, and the recorded use of this one.
        self.recorded = 0
        self.reserved = 0
        self.leased = 0
        self.resets_at: datetime | None = None

    def mark(self, now_us: int, before: int) -> None:
        """Begin a new bucket: units after the total `before` are spent in it."""
        now_us = max(now_us, self.usage_lease.from_us)
        self.marks.append((now_us, before))
        self.mark_ends_us = (now_us // self.width_us + 1) * self.width_us
        self.usage_lease.log.moment(self.slot, now_us)

    def unsettled(self) -> Iterable[tuple[int, int]]:
        """(moment, units) of the use that is spent and not recorded."""
        for number, (moment_us, start) in enumerate(self.marks):
            end = self.marks[number + 1][1] if number + 1 < len(self.marks) else self.spent
            units = end - max(start, self.settled)
            if units > 0:
                yield moment_us, units

    def settle(self, total: int) -> None:
        """The store's document has the use up to this total."""
        self.settled = max(self.settled, total)
        while len(self.marks) > 1 and self.marks[1][1] <= self.settled:
            del self.marks[0]
        if self.marks and self.settled >= self.spent:
            self.marks.clear()
            self.mark_ends_us = 0


class UsageLease:
    """This node's lease on the limits of one subject, and the use of it that is not recorded yet.

    `subject` has the limits. After a change of the key it is another one, and the next commit leases by its limits.
    """

    __slots__ = (
        "count",
        "from_us",
        "holds",
        "id",
        "keys",
        "known",
        "last_used_us",
        "lease",
        "leased_limits",
        "log",
        "noted",
        "renewing",
        "seen_count",
        "settled_count",
        "settled_totals",
        "subject",
        "totals",
        "until_us",
    )

    def __init__(self, subject: Subject, log: LeaseLog) -> None:
        self.id = subject.id
        self.subject = subject
        self.log = log
        self.lease = log.lease
        self.from_us = 0
        """The moment of the grant. Nothing is spent at an earlier one, whatever this node's clock says."""
        self.until_us = 0
        self.leased_limits: dict[str, LeasedLimit] = {}
        self.count = 0
        self.settled_count = 0
        self.seen_count = 0
        """`count` at the last renewal: a lease without use since then is returned."""
        self.totals: dict[str, int] = {}
        self.settled_totals: dict[str, int] = {}
        self.noted: tuple[int, dict[str, int]] | None = None
        """Uses and totals in a commit that is under way, or whose answer was lost."""
        self.last_used_us = 0
        self.renewing = False
        self.keys: set[str] = set()
        """The keys that are verified with it: see `lease_manager`."""
        self.holds: dict[str, Reservation] = {}
        """Reservations in memory that hold units of it."""
        self.known: Sequence[CompiledLimit] = subject.compiled_limits
        """The limits that these reservations hold units of."""

    def leased_limit(self, compiled_limit: CompiledLimit) -> LeasedLimit:
        """The lease of one limit; a new one has no units yet."""
        leased_limit = self.leased_limits.get(compiled_limit.id)
        if leased_limit is None:
            leased_limit = self.leased_limits[compiled_limit.id] = LeasedLimit(
                self, compiled_limit, self.log.slot(self.id, compiled_limit.id)
            )
        leased_limit.compiled_limit = compiled_limit
        return leased_limit

    @property
    def open(self) -> int:
        """The number of reservations in memory that hold units of it."""
        return len(self.holds)

    def kept(self, compiled_limits: Sequence[CompiledLimit] | None = None) -> dict[str, int]:
        """The units of each limit that reservations in memory hold; nobody else may have them. `compiled_limits`: the
        present limits; earlier reservations hold new ones too."""
        if not self.holds:
            self.known = compiled_limits if compiled_limits is not None else self.known
            return {}
        if compiled_limits is not None and compiled_limits is not self.known:
            self.known = compiled_limits
            for one in compiled_limits:
                self._carry(self.leased_limit(one), one)
        return {id: leased_limit.held for id, leased_limit in self.leased_limits.items() if leased_limit.held}

    def _carry(self, leased_limit: LeasedLimit, compiled_limit: CompiledLimit) -> None:
        """Let the open reservations hold a limit that their subject did not have when they were made."""
        for hold in self.holds.values():
            if not hold.holds(leased_limit) and compiled_limit.limit.applies(hold.model, hold.route):
                hold.more.append((leased_limit, compiled_limit.resource))
                leased_limit.held += hold.cost.get(compiled_limit.resource, 0)

    @property
    def dirty(self) -> bool:
        """Whether there is use that is not recorded."""
        return self.count != self.settled_count or self.totals != self.settled_totals

    # --- In a commit ------------------------------------------------------------------------------------------

    def record(self, state: UsageState, now_us: int) -> bool:
        """Count unrecorded use in the state, and take this node's lease out of it; whether that changed anything.

        `now_us` is the state's moment: use from later, before the clock was set back, counts as of now. If the state
        does not commit, it must be read again, and nothing is lost.
        """
        lease = state.leases.pop(self.lease, None)
        if lease is None:
            # The store has no lease of this node. Either its last lease was counted whole an hour after its end, or the
            # commit that returned it recorded its use.
            noted = self.noted if self.noted is not None else (self.settled_count, self.settled_totals)
            self.forget_spent()
            if not state.version:  # a lease needs a document: it was removed, with its use
                return False
            self.settled_count, self.settled_totals = noted
            return self._add_totals(state)
        self._reconcile(lease)
        for leased_limit in self.leased_limits.values():
            if leased_limit.compiled_limit.resource != CONCURRENCY:
                counter = state.counter(leased_limit.compiled_limit)
                for moment_us, units in leased_limit.unsettled():
                    counter.add_at(min(moment_us, now_us), units)
        self._add_totals(state)
        return True

    def _add_totals(self, state: UsageState) -> bool:
        """Add the uses and totals that are not recorded; whether there were any."""
        if not self.dirty:
            return False
        settled = self.settled_totals
        totals = {name: units - settled.get(name, 0) for name, units in self.totals.items()}
        state.add_totals(totals, self.count - self.settled_count, self.last_used_us)
        return True

    def _reconcile(self, lease: Lease) -> None:
        """Take over from the store which of this node's use is recorded."""
        if self.noted is not None and lease[1] == self.noted[0]:
            self.settled_count, self.settled_totals = self.noted
        self.noted = None
        for id, (units, settled, _) in lease[2].items():
            leased_limit = self.leased_limits.get(id)
            if leased_limit is not None:
                leased_limit.settle(settled)
                leased_limit.cap = min(leased_limit.cap, settled + units) if leased_limit.cap else settled + units

    def forget_spent(self) -> None:
        """The use is counted in the store already, or was removed with its key."""
        for leased_limit in self.leased_limits.values():
            leased_limit.settle(leased_limit.spent)
            leased_limit.cap = leased_limit.spent
        self.settled_count, self.settled_totals, self.noted = self.count, dict(self.totals), None

    def grant(
        self, state: UsageState, asked: Mapping[str, int], now_us: int, lease_us: int, *, only_held: bool = False
    ) -> None:
        """Lease the next units, after `record` and the decisions of the same commit. `asked` is what one call asks of
        each limit. `only_held`: no more than the reservations in memory hold."""
        until_us = now_us + lease_us
        moment = time.monotonic()
        plan = []
        for compiled_limit in self.subject.compiled_limits:
            leased_limit = self.leased_limit(compiled_limit)
            recorded, reserved, leased = state.standing(compiled_limit, now_us)
            free = compiled_limit.most - recorded - reserved - leased
            gone_us, ends_us = _ends(state, compiled_limit, until_us, now_us)
            wants = asked.get(compiled_limit.id, 0)
            units = 0 if gone_us < 0 else self._units(leased_limit, free, wants, moment)
            plan.append((leased_limit, units, max(gone_us, 0), ends_us if free >= 0 else 0, wants))
            leased_limit.recorded, leased_limit.reserved, leased_limit.leased = (
                recorded - leased_limit.spent,
                reserved,
                leased,
            )
            resets_us = state.counter(compiled_limit).resets_at_us(now_us)
            leased_limit.resets_at = None if resets_us is None else utc_from_us(resets_us)
        # If one limit has no units for a call, the units of the other limits could not be spent.
        useful = all(units or not wants for _, units, _, _, wants in plan)
        lent: dict[str, list[int]] = {}
        for leased_limit, units, gone_us, ends_us, _ in plan:
            if only_held or not useful:
                units = min(units, leased_limit.held)
            lent[leased_limit.compiled_limit.id] = [units, leased_limit.spent, gone_us]
            leased_limit.next_cap, leased_limit.next_ends_us = leased_limit.spent + units, ends_us
            # While the commit is under way either lease may be the durable one: spend only what both allow.
            leased_limit.cap, leased_limit.ends_us = (
                min(leased_limit.cap, leased_limit.next_cap),
                min(leased_limit.ends_us, ends_us),
            )
            leased_limit.granted_at, leased_limit.granted_spent = moment, leased_limit.spent
        for id, leased_limit in self.leased_limits.items():
            if id not in lent:  # the key no longer has this limit
                leased_limit.next_cap, leased_limit.next_ends_us = leased_limit.spent, 0
                leased_limit.cap, leased_limit.ends_us = min(leased_limit.cap, leased_limit.spent), 0
        self.from_us, self.until_us = now_us, until_us
        self.noted = (self.count, dict(self.totals))
        if any(units for units, _, _ in lent.values()):
            state.leases[self.lease] = [until_us, self.count, lent]
        else:
            for leased_limit in self.leased_limits.values():
                leased_limit.ends_us = leased_limit.next_ends_us = 0

    def _units(self, leased_limit: LeasedLimit, free: int, asked: int, moment: float) -> int:
        """The units to lease: enough for HORIZON_S at the recent rate, at most a part of what is free, and none if that
        is not enough for one call. What is reserved in memory stays leased."""
        if leased_limit.compiled_limit.resource == CONCURRENCY:
            wanted = max(2 * leased_limit.held, LEAST_CALLS)
        else:
            elapsed_s = max(moment - leased_limit.granted_at, LEAST_ELAPSED_S)
            spent = leased_limit.spent - leased_limit.granted_spent + leased_limit.held
            # With little use the rest shrinks by halves: a commit that asks for nothing does not end the lease.
            left = (leased_limit.cap - leased_limit.spent) // 2
            wanted = max(LEAST_CALLS * asked, round(spent * HORIZON_S / elapsed_s), 2 * leased_limit.held, left)
        units = min(wanted, free // PART_OF_FREE)
        if units < asked:
            units = 0
        return max(units, min(leased_limit.held, free), 0)

    def give_back(self) -> None:
        """Return the lease: the commit after `record` is the last."""
        for leased_limit in self.leased_limits.values():
            leased_limit.next_cap, leased_limit.next_ends_us = leased_limit.spent, 0
            leased_limit.cap, leased_limit.ends_us = min(leased_limit.cap, leased_limit.spent), 0
        self.noted = (self.count, dict(self.totals))

    def committed(self, spent: Sequence[tuple[LeasedLimit, int]]) -> None:
        """The commit is durable. `spent` is the total that it recorded for each leased limit."""
        if self.noted is not None:
            self.settled_count, self.settled_totals = self.noted
            self.noted = None
        for leased_limit, total in spent:
            leased_limit.settle(total)
            leased_limit.cap, leased_limit.ends_us = leased_limit.next_cap, leased_limit.next_ends_us
            leased_limit.low = leased_limit.spent + (leased_limit.cap - leased_limit.spent) // RENEW_AT
        self.renewing = False

    def totals_now(self) -> list[tuple[LeasedLimit, int]]:
        """The total that is spent of each leased limit now, for `committed`."""
        return [(leased_limit, leased_limit.spent) for leased_limit in self.leased_limits.values()]


def _ends(state: UsageState, compiled_limit: CompiledLimit, until_us: int, now_us: int) -> tuple[int, int]:
    """When a lease granted now stops counting (0: never; -1: none can be granted), and until when it may be spent."""
    window = compiled_limit.limit.window
    if compiled_limit.resource == CONCURRENCY:
        return until_us, until_us
    if window.kind == "rolling":
        window_us = window.seconds * _SECOND
        width_us = -(-window_us // BUCKETS_PER_WINDOW)
        return (until_us // width_us + 1) * width_us + window_us, until_us
    if window.kind == "total":
        return 0, until_us
    end_us = state.counter(compiled_limit).ends_us(now_us)
    if end_us is None:  # no anchored window is open: the first use opens one, so it has to be recorded
        return -1, until_us
    return end_us, min(until_us, end_us)


def fold(state: UsageState, compiled_limits: Iterable[CompiledLimit], now_us: int) -> None:
    """Record leases that can no longer be recovered as spent at their end, and drop those that no longer count."""
    if not state.leases:
        return
    by_id = {compiled_limit.id: compiled_limit for compiled_limit in compiled_limits}
    for lease_id, (until_us, _, leased_limits) in list(state.leases.items()):
        if now_us < until_us:
            continue
        for id, (units, _, gone_us) in list(leased_limits.items()):
            if gone_us and now_us >= gone_us:
                del leased_limits[id]
            elif now_us >= until_us + KEPT_AFTER_US and id in by_id:
                state.counter(by_id[id]).add_at(until_us, units)
                del leased_limits[id]
        # Its node may only be cut off. Its totals are kept here, so that no use is lost and none counts twice.
        if not leased_limits and now_us >= until_us + KEPT_AFTER_US:
            del state.leases[lease_id]
    over = [id for id, (_, _, leased_limits) in state.leases.items() if not leased_limits]
    for lease_id in over[:-MAX_ENDED]:
        del state.leases[lease_id]


def recover(
    state: UsageState, compiled_limits: Iterable[CompiledLimit], lease_id: str, found: Mapping[str, tuple[int, int]]
) -> bool:
    """Recover the lease of a dead process: record what it had spent and free the rest. `found` has, for each limit, the
    total that it had spent, and when it spent last. Returns whether there was such a lease."""
    lease = state.leases.get(lease_id)
    if lease is None:
        return False
    by_id = {compiled_limit.id: compiled_limit for compiled_limit in compiled_limits}
    until_us, _, leased_limits = lease
    used: dict[str, int] = {}
    for id, (units, settled, _) in list(leased_limits.items()):
        compiled_limit = by_id.get(id)
        if compiled_limit is None:
            continue  # the limit was removed, or is unknown here: it stays as it is
        if compiled_limit.resource != CONCURRENCY:
            total, moment_us = found.get(id, (settled + units, until_us))
            spent = min(max(total - settled, 0), units)
            state.counter(compiled_limit).add_at(min(moment_us or until_us, until_us), spent)
            used[compiled_limit.resource] = max(
                used.get(compiled_limit.resource, 0), spent
            )  # several limits count one use
        del leased_limits[id]
    # The log has the amounts, and not the number of uses.
    state.add_totals(used, 0, min(until_us, state.at_us) or until_us)
    if not leased_limits:
        del state.leases[lease_id]
    return True


__all__ = ["LeasedLimit", "UsageLease", "fold", "recover"]
