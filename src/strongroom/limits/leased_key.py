"""The keys that one node verifies from memory: the leased limits of each, and the reservations held on them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .lease import LeasedLimit, UsageLease
from .usage_state import Cost, Subjects

MAX_SCOPES = 1_000
"""Pairs of model and route remembered for one key."""

Entries = Sequence[tuple[LeasedLimit, str]]
"""The leased limits of a call, each with its resource."""


class LeasedScope:
    """The leased limits that the calls of a key for one model and route are charged to, with their usage leases.
    `aggregated` are the subjects without a limit for such calls: their use is only added up, so they need no lease."""

    __slots__ = ("aggregated", "entries", "usage_leases")

    def __init__(
        self, subjects: Subjects, usage_leases: Mapping[str, UsageLease], model: str | None, route: str | None
    ) -> None:
        asked = [(subject, subject.asked(model, route)) for subject in subjects.all]
        self.usage_leases = tuple(usage_leases[subject.id] for subject, compiled_limits in asked if compiled_limits)
        self.entries: Entries = [
            (usage_leases[subject.id].leased_limit(one), one.resource)
            for subject, compiled_limits in asked
            for one in compiled_limits
        ]
        self.aggregated = tuple(
            Subjects(subject.id, subject.guard, subject.compiled_limits, (), subject.tenant)
            for subject, compiled_limits in asked
            if not compiled_limits
        )


class LeasedKey:
    """The leased limits that a key's uses are charged to. Valid while the key is unchanged (`subjects`)."""

    __slots__ = ("_by_scope", "plain", "scoped", "subjects", "usage_leases")

    def __init__(self, subjects: Subjects, usage_leases: Mapping[str, UsageLease]) -> None:
        self.subjects = subjects
        self.usage_leases = {
            subject.id: usage_leases[subject.id] for subject in subjects.all if subject.compiled_limits
        }
        self.scoped = any(subject.scoped for subject in subjects.all)
        self.plain = LeasedScope(subjects, self.usage_leases, None, None)
        self._by_scope: dict[tuple[str | None, str | None], LeasedScope] = {}

    def scope(self, model: str | None, route: str | None) -> LeasedScope:
        """The leased limits for a call with this model and route."""
        if not self.scoped:
            return self.plain
        found = self._by_scope.get((model, route))
        if found is None:
            if len(self._by_scope) >= MAX_SCOPES:
                self._by_scope.clear()
            found = self._by_scope[model, route] = LeasedScope(self.subjects, self.usage_leases, model, route)
        return found


@dataclass(slots=True)
class LocalReservation:
    """A reservation in memory, and the amount that it holds of each leased limit."""

    scope: LeasedScope
    cost: Cost
    ends_us: int
    key: Any
    """The key that was reserved for, as the caller knows it."""
    model: str | None
    route: str | None
    used: dict[str, int]
    """The use that was reported while it was open; it is charged already."""
    recording: bool = False
    """Its settlement went through the ledger, and it is not known yet whether it was charged."""
    reporting: tuple[str, dict[str, int]] | None = None
    """The idempotency key and the totals of a report of use that went through the ledger."""

    more: list[tuple[LeasedLimit, str]] = field(default_factory=list)
    """Leased limits that were added later, and hold it too."""

    @property
    def entries(self) -> Entries:
        return self.scope.entries

    @property
    def held_entries(self) -> Entries:
        """All leased limits that hold it."""
        return self.scope.entries if not self.more else [*self.scope.entries, *self.more]

    def holds(self, leased_limit: LeasedLimit) -> bool:
        return any(one is leased_limit for one, _ in self.held_entries)


__all__ = ["Entries", "LeasedKey", "LeasedScope", "LocalReservation"]
