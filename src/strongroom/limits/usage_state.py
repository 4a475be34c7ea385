"""The usage of one subject (a key, or a quota that keys share): its document, and its counters in memory. Pure.

Three amounts count against each limit: the *recorded* use, the units *reserved* by open reservations, and the units
*leased* to nodes, which spend them from memory and record the use later (`lease.py`). A request is admitted if these
three and its own units are together at most the limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from ..context import us_from_utc, utc_from_us
from ..entities import Document, Entity, Index
from ..storage.port import Check
from . import tuning
from .calendar import calendar_span
from .counters import SATURATED, Counter, TotalCounter, counter_for, stored_counter
from .reserved_amounts import ReservedAmounts, ReservedPlace, name_of
from .windows import Limit, Total, to_units

MAX_TOTALS = 100
"""Resources with a lifetime total of their own. Use of further resources is added up under OTHER_RESOURCES."""
OTHER_RESOURCES = "other"
MAX_IDLE_COUNTERS = 64
"""Counters kept of removed limits, so that a limit that comes back finds its counter."""
ACTIVE_US = 60_000_000
"""`active_at` is rounded down to this, so that its index changes at most once a minute however often a key is used."""

MAX_AHEAD_US = 86_400_000_000
"""A state whose time is ahead of the store's clock by more than this follows the clock, see `UsageState.moment`."""
CREDIBLE_FROM_US = 1_767_225_600_000_000
"""2026-01-01. A clock with an earlier time was never set, and sets no state back."""
MONTHS_KEPT = 2
"""Months, by the calendar in UTC, whose totals a state keeps."""
_UTC = ZoneInfo("UTC")
CONCURRENCY = "concurrency"
"""A resource without recorded use: it counts the open reservations."""
IMPLIED = frozenset(("requests", CONCURRENCY))
NAME = "key_usage"
Cost = Mapping[str, int]


class KeyUsage(Entity, collection=NAME, scope="global", journalled=False, indexes=[Index("active_at")]):
    """The usage of one subject; the id is the key's, or the quota's.

    `state` is a JSON object; times are microseconds. `active_at` is "at" rounded down to ACTIVE_US, to find changes.

    - "totals": {resource: units}, and "months": {"2026-11": {resource: units}}
    - "counters": {limit id: the dump of its counter}
    - "at": the moment of the last decision
    - "reserved": units held by reservations (`ReservedAmounts.dump`); "holds": the same for reservations of the first
      release ({reservation id: [its end, {limit id: units}]})
    - "leases": {lease id: [its end, uses recorded, {limit id: [units, units recorded, when it stops counting]}]}
    - "told": {limit id: the thresholds told of (`thresholds.untold`)}, "due": crossings whose events are still to be
      written
    - "tallied": {writer: the number of its last aggregated use}
    """

    count: int = 0
    last_used_at: datetime | None = None
    active_at: datetime | None = None
    state: str = "{}"


@dataclass(frozen=True, slots=True)
class CompiledLimit:
    """One limit, prepared for counting: the id of its counter, its resource, the most units that may count, its window
    as it is shown, and the owner of the limit (`key`, or the kind and name of a quota)."""

    limit: Limit
    id: str
    resource: str
    most: int
    window: dict[str, Any]
    subject: str = "key"
    held_as: str = ""
    """The name under which reservations hold its units; it does not depend on the window."""


def compile_limits(limits: Iterable[Limit], subject: str = "key") -> tuple[CompiledLimit, ...]:
    """Limits, prepared for counting."""
    return tuple(
        CompiledLimit(
            limit,
            limit.id,
            limit.resource,
            to_units(limit.resource, limit.limit),
            limit.window.model_dump(),
            subject,
            name_of(limit.id),
        )
        for limit in limits
    )


@dataclass(frozen=True, slots=True)
class Subject:
    """A key or a quota that requests are charged to: the id of its usage document, the version that a commit checks
    (`guard`), and its limits."""

    id: str
    guard: Check
    compiled_limits: tuple[CompiledLimit, ...]
    scoped: bool
    """Whether any of the limits is only for some models or routes."""
    tenant: str = ""
    """The tenant, for events of crossed thresholds."""
    refills: bool = False
    """Whether any of the limits has a refill."""

    def asked(self, model: str | None, route: str | None) -> tuple[CompiledLimit, ...]:
        """The limits that count a call with this model and route."""
        if not self.scoped:
            return self.compiled_limits
        return tuple(one for one in self.compiled_limits if one.limit.applies(model, route))


class Subjects:
    """The subjects of a request: the key itself (`id`, `guard`, `compiled_limits`), and the quotas it shares with other
    keys. A request is charged to all of them or to none."""

    __slots__ = ("all", "compiled_limits", "counted", "guard", "id", "limited", "shared")

    def __init__(
        self,
        id: str,
        guard: Check,
        compiled_limits: tuple[CompiledLimit, ...],
        shared: tuple[Subject, ...] = (),
        tenant: str = "",
    ) -> None:
        self.id = id
        self.guard = guard
        self.compiled_limits = compiled_limits
        self.shared = shared
        self.all = (subject_for(id, guard, compiled_limits, tenant), *shared)
        self.limited = any(subject.compiled_limits for subject in self.all)
        """Whether there is any limit at all."""
        self.counted = IMPLIED.union(one.resource for subject in self.all for one in subject.compiled_limits)
        """The resources that any limit counts, for any model and route, and those that every call implies."""


def subject_for(id: str, guard: Check, compiled_limits: tuple[CompiledLimit, ...], tenant: str = "") -> Subject:
    """A subject with these limits."""
    scoped = any(one.limit.models or one.limit.routes for one in compiled_limits)
    refills = any(
        isinstance(one.limit.window, Total) and one.limit.window.refill is not None for one in compiled_limits
    )
    return Subject(id, guard, compiled_limits, scoped, tenant, refills)


class Status(msgspec.Struct, frozen=True, gc=False):
    """One limit after a decision. `used` is the sum of recorded, reserved and leased. If this limit denied,
    `frees_at_us` is when it would admit (None: never)."""

    compiled_limit: CompiledLimit
    used: int
    resets_at_us: int | None
    recorded: int
    reserved: int = 0
    leased: int = 0
    exceeded: bool = False
    frees_at_us: int | None = None


class AdmissionDecision(msgspec.Struct, frozen=True, gc=False):
    """The decision on a request: `statuses` in the order of the limits. If it is admitted, `now_us` is the moment of
    the key's own state. If it is denied, `now_us` is the store's clock, by which the caller waits."""

    allowed: bool
    statuses: tuple[Status, ...]
    now_us: int
    repeated: bool = False


Lease = list[Any]
"""[end in microseconds, uses recorded, {limit id: [units, units recorded, when it counts no longer (0: never)]}]"""


class UsageState:
    """One usage document in memory, and the version it has in the store (0: it is not there yet).

    Along the versions of a document time never goes back, even if the clocks of its nodes differ. Each request is
    decided at `moment(clock)`, and that moment is stored (`at_us`). So the requests of one subject have one order: that
    of their commits and of their moments. Use within the window before a request was committed before it, and was in
    the counters that the request was decided on. So in no window, measured in these moments, is more admitted than the
    limit, by any number of nodes with any clocks. Clocks that differ can only shift the moments; one store's clocks
    differ by at most `uncertainty_us`.

    A clock that is set back therefore frees nothing: the state's time stands still until the clock has reached it. If
    the clock is more than MAX_AHEAD_US behind, the state follows the clock, and all it has recorded or held counts as
    of that moment (`set_back`). So one request at a time that was wrong by years does not stop the subject for years.

    The use from a lease has a moment too, not before the moment of the lease. Until it is recorded the whole lease
    counts, up to its end and for one window after it. So the same holds for leases.
    """

    __slots__ = (
        "_month",
        "_month_us",
        "aggregated",
        "at_us",
        "count",
        "counters",
        "due",
        "kept",
        "last_used_us",
        "leases",
        "months",
        "read_at",
        "reserved",
        "seen_us",
        "size",
        "stored_active_at",
        "told",
        "totals",
        "turn_commits",
        "turns",
        "unknown",
        "version",
    )

    def __init__(self, document: Document | None = None, read_at: float = 0.0) -> None:
        self.version: int = 0
        self.stored_active_at: datetime | None = None
        self.read_at = read_at
        """By time.monotonic: when it last equalled the store's document."""
        self.size = 0
        self.turns = 0
        """Commits since the last pause; after `turn_commits` the next one comes: see `fairness`."""
        self.turn_commits = tuning.FIRST_TURN_COMMITS
        self.at_us: int = 0
        self.seen_us = 0
        """The latest moment that anything was decided at, denials included. Counters forget what has left a window by
        then, so an earlier moment cannot be decided on this state: read it again."""
        self.count: int = 0
        self.last_used_us: int | None = None
        self.totals: dict[str, int] = {}
        self.months: dict[str, dict[str, int]] = {}
        """Totals of the latest MONTHS_KEPT months in which anything was used, by the calendar in UTC."""
        self._month: dict[str, int] = {}
        self._month_us = (0, 0)
        self.counters: dict[str, Counter] = {}
        self.unknown: dict[str, Any] = {}  # counters of limits that were not asked for yet, or were removed
        self.reserved: ReservedAmounts | None = None
        self.leases: dict[str, Lease] = {}
        self.kept: dict[str, int] = {}
        """Units of each limit that reservations in memory hold from this node's lease, while a decision has taken that
        lease out of `leases`. Not in the document."""
        self.told: dict[str, Any] = {}
        self.aggregated: dict[str, int] = {}
        """For each process that writes aggregated use, the last number that is counted here. So a write whose answer
        was lost is repeated, and counts once."""
        self.due: list[list[Any]] = []
        """[limit id, threshold, units used, most, end of the window, moment] of crossed thresholds whose events did not
        fit into their commit. The next commit writes them."""
        if document is not None:
            self.size = len(document["state"])
            state = msgspec.json.decode(document["state"])
            self.version = document["version"]
            self.stored_active_at = document["active_at"]
            self.count = document["count"]
            last = document["last_used_at"]
            self.last_used_us = None if last is None else us_from_utc(last)
            self.at_us = state.get("at", 0)
            self.totals = state.get("totals", {})
            self.months = state.get("months", {})
            self.unknown = state.get("counters", {})
            if "reserved" in state or "holds" in state:
                self.reserved = ReservedAmounts(state.get("reserved"), state.get("holds"))
            self.leases = state.get("leases", {})
            self.told = state.get("told", {})
            self.due = state.get("due", [])
            self.aggregated = state.get("tallied", {})

    def moment(self, now_us: int) -> int:
        """The moment at which a request at `now_us` of the store's clock is decided: not before earlier decisions,
        unless these lie more than MAX_AHEAD_US ahead."""
        if now_us >= self.at_us:
            return now_us
        if self.at_us - now_us > MAX_AHEAD_US and now_us >= CREDIBLE_FROM_US:
            self.set_back(now_us)
        return self.at_us

    def set_back(self, now_us: int) -> None:
        """Set the state's time back to `now_us`. That frees nothing: use recorded at a later time counts as of now, and
        reservations and leases keep the time that they had left."""
        delta_us = self.at_us - now_us
        for counter in self.counters.values():
            counter.not_after(now_us)
        for id, state in self.unknown.items():
            idle = stored_counter(id, state)
            idle.not_after(now_us)
            self.unknown[id] = idle.dump()
        if self.reserved is not None:
            self.reserved.move(delta_us)
        for lease in self.leases.values():
            if lease[0] > self.at_us:  # it was granted at the later time
                lease[0] -= delta_us
                for leased_limit in lease[2].values():
                    leased_limit[2] -= delta_us if leased_limit[2] else 0
        self.told = {}
        self.last_used_us = None if self.last_used_us is None else min(self.last_used_us, now_us)
        self.at_us = now_us

    def counter(self, compiled_limit: CompiledLimit) -> Counter:
        counter = self.counters.get(compiled_limit.id)
        if counter is None:
            counter = counter_for(compiled_limit.limit.window, self.unknown.pop(compiled_limit.id, None))
            self.counters[compiled_limit.id] = counter
        elif isinstance(counter, TotalCounter):  # the same limit with another refill keeps its use
            window = compiled_limit.limit.window
            if isinstance(window, Total) and counter.refill is not window.refill and counter.refill != window.refill:
                counter = self.counters[compiled_limit.id] = counter_for(window, counter.dump())
        return counter

    # --- What counts ------------------------------------------------------------------------------------------

    def standing(self, compiled_limit: CompiledLimit, now_us: int) -> tuple[int, int, int]:
        """Units that are recorded, reserved and leased now."""
        recorded = self.counter(compiled_limit).used(now_us)
        reserved = leased = 0
        if self.reserved is not None:
            reserved = self.reserved.units(compiled_limit.held_as, now_us)
        if self.kept:
            reserved += self.kept.get(compiled_limit.id, 0)
        if self.leases:
            leased = self.leased(compiled_limit.id, now_us)
        return recorded, reserved, leased

    def leased(self, id: str, now_us: int) -> int:
        """Units of a limit that are leased to nodes. A lease that ended unrecorded counts as spent at its end."""
        units = 0
        for _, _, leased_limits in self.leases.values():
            leased_limit = leased_limits.get(id)
            if leased_limit is not None and (not leased_limit[2] or now_us < leased_limit[2]):
                units += leased_limit[0]
        return units

    def fits(self, asked: Iterable[tuple[CompiledLimit, int]], now_us: int) -> bool:
        """Whether each limit admits so many more units."""
        return all(
            sum(self.standing(compiled_limit, now_us)) + units <= compiled_limit.most for compiled_limit, units in asked
        )

    def use(self, compiled_limits: Iterable[CompiledLimit], cost: Cost, now_us: int) -> None:
        """Record a use of each limit now."""
        for compiled_limit in compiled_limits:
            units = cost.get(compiled_limit.resource, 0)
            if units and compiled_limit.resource != CONCURRENCY:
                self.counter(compiled_limit).add(now_us, units)

    def add_totals(self, cost: Cost, count: int, now_us: int) -> None:
        """Count uses, lifetime totals and the time of the last use, which need no limit."""
        self.count += count
        totals = self.totals
        begin_us, end_us = self._month_us
        month = self._month if begin_us <= now_us < end_us else self._turned(now_us)
        for resource, units in cost.items():
            before = totals.get(resource)
            if before is None and len(totals) >= MAX_TOTALS:
                resource, before = OTHER_RESOURCES, totals.get(OTHER_RESOURCES)
            after, in_month = (before or 0) + units, month.get(resource, 0) + units
            totals[resource] = after if after < SATURATED else SATURATED
            month[resource] = in_month if in_month < SATURATED else SATURATED
        if self.last_used_us is None or now_us > self.last_used_us:
            self.last_used_us = now_us

    def _turned(self, now_us: int) -> dict[str, int]:
        """The totals of the month of this moment, which are counted in from now on."""
        self._month_us = calendar_span("month", _UTC, now_us)
        name = f"{utc_from_us(self._month_us[0]):%Y-%m}"
        month = self._month = self.months.setdefault(name, {})
        for oldest in sorted(self.months)[:-MONTHS_KEPT]:
            del self.months[oldest]
        return month

    def statuses(self, compiled_limits: Iterable[CompiledLimit], now_us: int) -> tuple[Status, ...]:
        """Where each limit stands."""
        return tuple([self._status(compiled_limit, now_us) for compiled_limit in compiled_limits])

    def denials(self, asked: Iterable[tuple[CompiledLimit, int]], now_us: int) -> tuple[Status, ...]:
        """Where each limit stands; which of them so many more units would exceed, and until when."""
        found = []
        for compiled_limit, units in asked:
            status = self._status(compiled_limit, now_us)
            if status.used + units > compiled_limit.most:
                frees_at_us = self._frees_at_us(compiled_limit, units, now_us)
                status = msgspec.structs.replace(status, exceeded=True, frees_at_us=frees_at_us)
            found.append(status)
        return tuple(found)

    def _status(self, compiled_limit: CompiledLimit, now_us: int) -> Status:
        recorded, reserved, leased = self.standing(compiled_limit, now_us)
        resets_at_us = self.counter(compiled_limit).resets_at_us(now_us)
        return Status(compiled_limit, recorded + reserved + leased, resets_at_us, recorded, reserved, leased)

    def _frees_at_us(self, compiled_limit: CompiledLimit, units: int, now_us: int) -> int | None:
        """When so many more units would be admitted without other use. Reserved and leased units return at their
        end."""
        most = compiled_limit.most - units
        free_at_us = self.counter(compiled_limit).frees_at_us(now_us, most)
        if free_at_us is None:
            return None
        ends = [] if self.reserved is None else list(self.reserved.coming_back(compiled_limit.held_as))
        for until_us, _, leased_limits in self.leases.values():
            units_lent, _, gone_us = leased_limits.get(compiled_limit.id, (0, 0, 0))
            if now_us < until_us:
                ends.append((until_us, units_lent))
            elif gone_us:  # it ended unrecorded: so it counts as spent at its end
                ends.append((gone_us, units_lent))
        left = sum(self.standing(compiled_limit, now_us))
        for end_us, back in sorted(ends):
            if left <= most:
                break
            left -= back
            free_at_us = max(free_at_us, end_us)
        return free_at_us

    # --- Reservations -----------------------------------------------------------------------------------------

    def hold(
        self, subject: Subject, compiled_limits: Iterable[CompiledLimit], cost: Cost, now_us: int, ttl_us: int
    ) -> ReservedPlace:
        """Reserve `cost` for so long, for a call that these limits of the subject count."""
        if self.reserved is None:
            self.reserved = ReservedAmounts()
        units = {resource: amount for resource, amount in cost.items() if amount}
        for one in compiled_limits:
            if one.resource in units:
                units[one.held_as] = cost[one.resource]
        return self.reserved.add(units, [one.held_as for one in subject.compiled_limits], now_us, ttl_us)

    def held(self, place: ReservedPlace, now_us: int) -> Cost:
        """The units that a place still holds here, by `CompiledLimit.held_as`."""
        return {} if self.reserved is None else self.reserved.held(place, now_us)

    def knows(self, place: ReservedPlace, now_us: int) -> bool:
        """Whether a place is held here. It is, unless the state is older than the place, or its time was set back."""
        if not place.units or now_us >= place.until_us:
            return True
        return self.reserved is not None and self.reserved.has(place)

    def give_back(self, place: ReservedPlace, now_us: int) -> None:
        """Release the units that a place holds here."""
        if self.reserved is not None:
            self.reserved.give_back(place, now_us)
            self._tidy()

    def _tidy(self) -> None:
        if not self.reserved:
            self.reserved = None

    # --- The document -----------------------------------------------------------------------------------------

    def document(self) -> Document:
        counters = {id: counter.dump() for id, counter in self.counters.items()}
        if self.unknown:
            kept = list(self.unknown)[-MAX_IDLE_COUNTERS:]  # the latest of the removed limits
            counters = {**{id: self.unknown[id] for id in kept}, **counters}
        state: dict[str, Any] = {"totals": self.totals, "counters": counters, "at": self.at_us}
        if self.months:
            state["months"] = self.months
        if self.reserved is not None:
            if rows := self.reserved.dump():
                state["reserved"] = rows
            if old := self.reserved.dump_old():
                state["holds"] = old
        if self.leases:
            state["leases"] = self.leases
        if self.told:
            state["told"] = self.told
        if self.due:
            state["due"] = self.due
        if self.aggregated:
            state["tallied"] = self.aggregated
        encoded = _encode(state).decode()
        self.size = len(encoded)
        return {
            "count": min(self.count, SATURATED),
            "last_used_at": None if self.last_used_us is None else utc_from_us(self.last_used_us),
            "active_at": utc_from_us(self.at_us - self.at_us % ACTIVE_US) if self.at_us else None,
            "state": encoded,
        }


_encode = msgspec.json.Encoder().encode
