"""The change of a reservation in a decision: whether it has ended, what more it asks, what it then holds. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..context import utc_from_us
from ..errors import Conflict
from ..storage.port import Operation
from .reserved_amounts import ReservedPlace
from .usage_state import CompiledLimit, Cost, UsageState


class HoldEnded(Conflict):
    """The reservation's time is over."""

    def __init__(self, ended_us: int) -> None:
        ended = utc_from_us(ended_us).isoformat()
        super().__init__(f"the reservation ended at {ended}: record what was used as usage")


@dataclass(frozen=True, slots=True)
class HoldChange:
    """A reservation that is made (`before` is None), or changed, or ended (`ttl_us` is None).

    It lasts for `ttl_us` from the moment of each state, and holds `cost` on all subjects of the request, except those
    that it `leaves`. Use is charged to all subjects except `not_counted_on`. `before` has what it held until now, by
    subject. `write` gives the operation that stores what it holds from now on, by subject, and its end.
    """

    id: str
    ttl_us: int | None
    cost: Cost
    write: Callable[[Mapping[str, ReservedPlace], int], Operation]
    before: Mapping[str, ReservedPlace] | None = None
    leaves: frozenset[str] = frozenset()
    not_counted_on: frozenset[str] = frozenset()
    old_ends_us: int | None = None
    """The end of a reservation of the first release: its subjects know it by its id, and `before` is empty."""
    remembers: bool = False
    """Whether the document that `write` stores keeps the statuses of the limits in `memo`, for an idempotent retry."""

    def ended_us(self, moments: Mapping[str, int]) -> int | None:
        """When it ended, by the moments of the subjects; None if it is open."""
        if self.old_ends_us is not None:
            return self.old_ends_us if max(moments.values()) >= self.old_ends_us else None
        ended = [
            place.ends_us for id, place in (self.before or {}).items() if id in moments and moments[id] >= place.ends_us
        ]
        return min(ended, default=None)

    def held(self, id: str, state: UsageState, now_us: int) -> Cost:
        """The units that it holds of a subject now, by `CompiledLimit.held_as`."""
        if self.old_ends_us is not None:
            old = state.reserved.old(self.id, now_us) if state.reserved is not None else None
            return old if old is not None else {}
        place = self.before.get(id) if self.before is not None else None
        return state.held(place, now_us) if place is not None else {}

    def is_known(self, id: str, state: UsageState, now_us: int) -> bool:
        """Whether the state knows this reservation. If not, another node has changed it since the state was read."""
        if self.old_ends_us is not None:
            return state.reserved is not None and state.reserved.old(self.id, now_us) is not None
        place = self.before.get(id) if self.before is not None else None
        return place is None or state.knows(place, now_us)

    def give_back(self, id: str, state: UsageState, now_us: int) -> None:
        """Release all that it holds of a subject."""
        if self.old_ends_us is not None:
            if state.reserved is not None:
                state.reserved.give_back_old(self.id)
            return
        place = self.before.get(id) if self.before is not None else None
        if place is not None:
            state.give_back(place, now_us)

    def wanted(
        self, id: str, state: UsageState, compiled_limits: Iterable[CompiledLimit], cost: Cost, now_us: int
    ) -> list[tuple[CompiledLimit, int]]:
        """How many more units of each limit it asks for, if `cost` is charged."""
        before = self.held(id, state, now_us)
        holds = self.cost if id not in self.leaves else {}
        used = cost if id not in self.not_counted_on else {}
        wanted = []
        for one in compiled_limits:
            more = holds.get(one.resource, 0) + used.get(one.resource, 0) - before.get(one.held_as, 0)
            if more > 0 or self.before is None:  # an extension that asks no more of a limit is not refused by it
                wanted.append((one, more))
        return wanted


__all__ = ["HoldChange", "HoldEnded"]
