"""What a decision makes of a reservation: whether it has ended, what more it asks, what it holds afterwards. Pure."""

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

    It goes on for `ttl_us` from the moment of each account on, and holds `cost` there: in all accounts of the charge
    but those that it `leaves`. What was used is charged to all but those that it is `not_counted_on`. `before`: what it
    has held where until now. `write` gives the operation that stores what it holds where from now on, and its end.
    """

    id: str
    ttl_us: int | None
    cost: Cost
    write: Callable[[Mapping[str, ReservedPlace], int], Operation]
    before: Mapping[str, ReservedPlace] | None = None
    leaves: frozenset[str] = frozenset()
    not_counted_on: frozenset[str] = frozenset()
    old_ends_us: int | None = None
    """When a reservation of the first release ends: its accounts know it by its id, `before` is empty."""
    remembers: bool = False
    """Whether the document that `write` stores keeps where the limits stood, in `memo`, for a repeat of the call."""

    def ended_us(self, moments: Mapping[str, int]) -> int | None:
        """When it ended, by the moments of the accounts that are decided on; None if it is open."""
        if self.old_ends_us is not None:
            return self.old_ends_us if max(moments.values()) >= self.old_ends_us else None
        ended = [
            place.ends_us for id, place in (self.before or {}).items() if id in moments and moments[id] >= place.ends_us
        ]
        return min(ended, default=None)

    def held(self, id: str, state: UsageState, now_us: int) -> Cost:
        """What it holds of an account now, by `Allowance.held_as`."""
        if self.old_ends_us is not None:
            old = state.reserved.old(self.id, now_us) if state.reserved is not None else None
            return old if old is not None else {}
        place = self.before.get(id) if self.before is not None else None
        return state.held(place, now_us) if place is not None else {}

    def is_known(self, id: str, state: UsageState, now_us: int) -> bool:
        """Whether the account has what this holds of it: if not, another node has changed it since it was read."""
        if self.old_ends_us is not None:
            return state.reserved is not None and state.reserved.old(self.id, now_us) is not None
        place = self.before.get(id) if self.before is not None else None
        return place is None or state.knows(place, now_us)

    def give_back(self, id: str, state: UsageState, now_us: int) -> None:
        """Hold nothing of an account any more."""
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
        """How much more of each limit is asked for, `cost` being charged."""
        before = self.held(id, state, now_us)
        holds = self.cost if id not in self.leaves else {}
        used = cost if id not in self.not_counted_on else {}
        wanted = []
        for one in compiled_limits:
            more = holds.get(one.resource, 0) + used.get(one.resource, 0) - before.get(one.held_as, 0)
            if more > 0 or self.before is None:  # an extension that holds no more of a limit is not refused by it
                wanted.append((one, more))
        return wanted


__all__ = ["HoldChange", "HoldEnded"]
