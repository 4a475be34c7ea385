"""What one key has used: its document, its counters in memory, and the decision on a charge. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from .context import us_from_utc, utc_from_us
from .entity import Document, Entity, Index
from .storage.port import Check
from .windows import SATURATED, Counter, Limit, counter_for

MAX_TOTALS = 100
"""Resources whose lifetime totals a key keeps; what is used of further ones is added up under OTHER_RESOURCES."""
OTHER_RESOURCES = "other"
MAX_IDLE_COUNTERS = 64
"""Counters kept of limits that a key no longer has, so that one that comes back finds its own."""
ACTIVE_US = 60_000_000
"""`active_at` is rounded down to this, so that its index changes at most once a minute however often a key is used."""

FIRST_PATIENCE = 16

NAME = "key_usage"
Cost = Mapping[str, int]


class KeyUsage(Entity, collection=NAME, scope="global", journalled=False, indexes=[Index("active_at")]):
    """What one key has used; the id is the key's.

    `state` is JSON: {"totals": {resource: units}, "counters": {limit id: what its counter dumped}, "at": when the last
    charge was decided}. `active_at` is that moment too, rounded down to ACTIVE_US: for finding what has changed.
    """

    count: int = 0
    last_used_at: datetime | None = None
    active_at: datetime | None = None
    state: str = "{}"


@dataclass(frozen=True, slots=True)
class Allowance:
    """One limit, ready to be counted: its counter's id, its resource, and the most units that may count."""

    limit: Limit
    id: str
    resource: str
    most: int


@dataclass(frozen=True, slots=True)
class Metered:
    """Whose usage it is: the usage document's id, what must still be true when it commits, and the limits."""

    id: str
    guard: Check
    allowances: tuple[Allowance, ...]


class Status(msgspec.Struct, frozen=True, gc=False):
    """One limit after a charge. `frees_at_us` is set where this limit denied: when it would admit (None: never)."""

    allowance: Allowance
    used: int
    resets_at_us: int | None
    exceeded: bool = False
    frees_at_us: int | None = None


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """The decision on a charge: `statuses` in the order of the limits; `now_us` is when it was decided."""

    allowed: bool
    statuses: tuple[Status, ...]
    now_us: int
    repeated: bool = False


class Account:
    """One usage document in memory, and the version it has in the store (0: it is not there yet).

    Its time never goes back along the document's versions, whatever the clocks of the nodes that write them say: each
    charge is decided at `moment(clock)`, and that moment is stored with it (`at_us`). So the charges of one key are in
    one order, that of their commits, which is the order of their moments as well. Whatever was charged within a window
    before the moment of a charge was thus committed before it, and was in the counters that it was decided on: in no
    window, measured in these moments, is more admitted than the limit, by any number of nodes with any clocks. What
    clocks that differ can do is to shift the moments: those of one store's clock, known to within `uncertainty_us`.
    """

    __slots__ = (
        "at_us",
        "count",
        "counters",
        "last_used_us",
        "patience",
        "stored_active_at",
        "totals",
        "turns",
        "unknown",
        "version",
    )

    def __init__(self, document: Document | None = None) -> None:
        self.version: int = 0
        self.stored_active_at: datetime | None = None
        self.turns = 0
        """Commits since the last pause, and after how many the next one comes: see `usage`."""
        self.patience = FIRST_PATIENCE
        self.at_us: int = 0
        self.count: int = 0
        self.last_used_us: int | None = None
        self.totals: dict[str, int] = {}
        self.counters: dict[str, Counter] = {}
        self.unknown: dict[str, Any] = {}  # states of limits nobody asked for yet, or that a key no longer has
        if document is not None:
            state = msgspec.json.decode(document["state"])
            self.version = document["version"]
            self.stored_active_at = document["active_at"]
            self.count = document["count"]
            last = document["last_used_at"]
            self.last_used_us = None if last is None else us_from_utc(last)
            self.at_us = state.get("at", 0)
            self.totals = state.get("totals", {})
            self.unknown = state.get("counters", {})

    def moment(self, now_us: int) -> int:
        """When a charge that comes at `now_us` is decided: not before what was decided already."""
        return now_us if now_us > self.at_us else self.at_us

    def counter(self, allowance: Allowance) -> Counter:
        counter = self.counters.get(allowance.id)
        if counter is None:
            counter = counter_for(allowance.limit.window, self.unknown.pop(allowance.id, None))
            self.counters[allowance.id] = counter
        return counter

    def decide(self, allowances: Sequence[Allowance], cost: Cost, now_us: int, *, force: bool) -> Outcome:
        """Charge all limits or none. `force` charges what has happened already, over a limit too."""
        # Plain loops, no generators: this runs once for every verification.
        counters = [(allowance, self.counter(allowance)) for allowance in allowances]
        if not force:
            for allowance, counter in counters:
                if counter.used(now_us) + cost.get(allowance.resource, 0) > allowance.most:
                    return Outcome(False, tuple(_denied(a, c, cost, now_us) for a, c in counters), now_us)
        for allowance, counter in counters:
            counter.add(now_us, cost.get(allowance.resource, 0))
        self.tally(cost, 1, now_us)
        return Outcome(True, tuple([Status(a, c.used(now_us), c.resets_at_us(now_us)) for a, c in counters]), now_us)

    def tally(self, cost: Cost, count: int, now_us: int) -> None:
        """What is counted whether or not there are limits: uses, lifetime totals, the time of the last use."""
        self.count += count
        totals = self.totals
        for resource, units in cost.items():
            before = totals.get(resource)
            if before is None and len(totals) >= MAX_TOTALS:
                resource, before = OTHER_RESOURCES, totals.get(OTHER_RESOURCES)
            totals[resource] = min((before or 0) + units, SATURATED)
        if self.last_used_us is None or now_us > self.last_used_us:
            self.last_used_us = now_us

    def statuses(self, allowances: Iterable[Allowance], now_us: int) -> tuple[Status, ...]:
        """Where each limit stands, charging nothing."""
        return tuple(Status(a, (c := self.counter(a)).used(now_us), c.resets_at_us(now_us)) for a in allowances)

    def document(self) -> Document:
        counters = {id: counter.dump() for id, counter in self.counters.items()}
        if self.unknown:
            kept = list(self.unknown)[-MAX_IDLE_COUNTERS:]  # those of the latest limits that the key no longer has
            counters = {**{id: self.unknown[id] for id in kept}, **counters}
        return {
            "count": min(self.count, SATURATED),
            "last_used_at": None if self.last_used_us is None else utc_from_us(self.last_used_us),
            "active_at": utc_from_us(self.at_us - self.at_us % ACTIVE_US) if self.at_us else None,
            "state": _encode({"totals": self.totals, "counters": counters, "at": self.at_us}).decode(),
        }


_encode = msgspec.json.Encoder().encode


def _denied(allowance: Allowance, counter: Counter, cost: Cost, now_us: int) -> Status:
    asked = cost.get(allowance.resource, 0)
    used = counter.used(now_us)
    exceeded = used + asked > allowance.most
    frees = counter.frees_at_us(now_us, allowance.most - asked) if exceeded else None
    return Status(allowance, used, counter.resets_at_us(now_us), exceeded, frees)
