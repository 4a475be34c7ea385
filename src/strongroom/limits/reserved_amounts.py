"""The units that the reservations of one subject hold together, and when they come back. Pure.

A usage state does not know its reservations. The document of each reservation has what it holds on each subject (a
`ReservedPlace`). The usage state has only the sums, by the moment at which they come back. So the cost of a reservation
does not grow with the number of open ones. The document's version is checked in the same commit, so that the units come
back once.

Held units are named by resource (`name_of`), not by limit: a limit that gets another window counts them too.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

EXACT_ENDS = 32
"""So many different ends are kept to the microsecond. A further one is rounded up, never down: to a GRID-th of the
time that the reservation lasts, at most. So there are at most about 330 different ends, however many are open."""
GRID = 16
MAX_NAMES = 100
"""Resources that a subject keeps sums of. Of further resources only those that it limits."""
_FOR = "|for|"


class ReservedPlace(NamedTuple):
    """The units that a reservation holds of one subject, by name. `era` names the sums that they are part of, `ends_us`
    is the end of the reservation, and at `until_us`, not before that end, the units come back by themselves."""

    era: int
    ends_us: int
    until_us: int
    units: Mapping[str, int]


def name_of(limit_id: str) -> str:
    """The name of what a limit counts, without its window: its resource, and its models and routes."""
    resource, _, rest = limit_id.partition("|")
    _, found, scope = f"|{rest}".rpartition(_FOR)
    return f"{resource}{_FOR}{scope}" if found else resource


class ReservedAmounts:
    """The sums of one subject. Each method that takes `now_us` first drops the units that have come back by then."""

    __slots__ = ("_by_end", "_first_us", "_old", "_sums", "era")

    def __init__(self, state: list[Any] | None = None, old: Mapping[str, list[Any]] | None = None) -> None:
        self.era = 0
        """Names these sums. A place of another era is not part of them; new sums get a new era."""
        self._by_end: dict[int, dict[str, int]] = {}
        self._old: dict[str, tuple[int, dict[str, int]]] = {}
        """Reservations of the first release, by id. Their documents do not have their places."""
        if state is not None:
            self.era, names, rows = state
            for end_us, *units in rows:
                self._by_end[end_us] = {name: n for name, n in zip(names, units, strict=True) if n}
        for id, (end_us, units) in (old or {}).items():
            self._old[id] = end_us, {name_of(limit): n for limit, n in units.items()}
        self._sums: dict[str, int] = {}
        self._first_us = 0
        self._sum()

    def __bool__(self) -> bool:
        return bool(self._by_end or self._old)

    @property
    def ends(self) -> int:
        """The number of different ends."""
        return len(self._by_end)

    def units(self, name: str, now_us: int) -> int:
        """Units of a name that are held now."""
        if now_us >= self._first_us:
            self._end(now_us)
        return self._sums.get(name, 0)

    def coming_back(self, name: str) -> Iterable[tuple[int, int]]:
        """(moment, units) of the units that come back by themselves."""
        for end_us, units in (*self._by_end.items(), *self._old.values()):
            if name in units:
                yield end_us, units[name]

    # --- Changing -----------------------------------------------------------------------------------------------

    def add(self, units: Mapping[str, int], limited: Iterable[str], now_us: int, ttl_us: int) -> ReservedPlace:
        """Hold units of these names for `ttl_us` from now. `limited`: the names that the subject limits."""
        self._end(now_us)
        if len(self._sums) + len(units) > MAX_NAMES:
            known = {*self._sums, *limited}
            units = {name: n for name, n in units.items() if name in known}
        else:
            units = dict(units)
        ends_us = until_us = now_us + ttl_us
        if not units:
            return ReservedPlace(0, ends_us, until_us, units)
        if until_us not in self._by_end and len(self._by_end) >= EXACT_ENDS:
            width_us = (1 << ttl_us.bit_length() - 1) // GRID or 1
            until_us = -(-ends_us // width_us) * width_us
        if not self:
            self.era = random.getrandbits(48)
        place = self._by_end.setdefault(until_us, {})
        for name, n in units.items():
            place[name] = place.get(name, 0) + n
            self._sums[name] = self._sums.get(name, 0) + n
        self._first_us = min(self._first_us or until_us, until_us)
        return ReservedPlace(self.era, ends_us, until_us, units)

    def held(self, place: ReservedPlace, now_us: int) -> Mapping[str, int]:
        """The units of a place that are still held."""
        return place.units if place.era == self.era and now_us < place.until_us and self.has(place) else {}

    def has(self, place: ReservedPlace) -> bool:
        """Whether a place is part of these sums. An empty place is not."""
        there = self._by_end.get(place.until_us)
        return (
            place.era == self.era
            and there is not None
            and all(there.get(name, 0) >= n for name, n in place.units.items())
        )

    def give_back(self, place: ReservedPlace, now_us: int) -> None:
        """Release the units of a place."""
        self._end(now_us)
        if not self.has(place):
            return
        there = self._by_end[place.until_us]
        for name, n in place.units.items():
            self._take(there, name, n)
            self._take(self._sums, name, n)
        if not there:
            del self._by_end[place.until_us]

    def give_back_old(self, id: str) -> None:
        """Release the units of a reservation of the first release."""
        if self._old.pop(id, None) is not None:
            self._sum()

    def old(self, id: str, now_us: int) -> Mapping[str, int] | None:
        """The units of a reservation of the first release; None if it has ended, or is not known here."""
        found = self._old.get(id)
        return found[1] if found is not None and now_us < found[0] else None

    def move(self, delta_us: int) -> None:
        """Let all units come back `delta_us` earlier, because the state's time is set back by so much. No place is part
        of these sums any more: the units come back by themselves."""
        self.era = random.getrandbits(48)
        self._by_end = {end_us - delta_us: units for end_us, units in self._by_end.items()}
        self._old = {id: (end_us - delta_us, units) for id, (end_us, units) in self._old.items()}
        self._sum()

    @staticmethod
    def _take(units: dict[str, int], name: str, n: int) -> None:
        left = units.get(name, 0) - n
        if left > 0:
            units[name] = left
        else:
            units.pop(name, None)

    def _end(self, now_us: int) -> None:
        """Drop the units that have come back."""
        if now_us < self._first_us:
            return
        self._by_end = {end_us: units for end_us, units in self._by_end.items() if now_us < end_us}
        self._old = {id: one for id, one in self._old.items() if now_us < one[0]}
        self._sum()

    def _sum(self) -> None:
        self._sums = {}
        for units in (*self._by_end.values(), *(units for _, units in self._old.values())):
            for name, n in units.items():
                self._sums[name] = self._sums.get(name, 0) + n
        self._first_us = min((*self._by_end, *(end_us for end_us, _ in self._old.values())), default=0)

    # --- The document -------------------------------------------------------------------------------------------

    def dump(self) -> list[Any] | None:
        """[era, names, [[end, units of each name], …]] for the constructor; None if nothing is held so."""
        if not self._by_end:
            return None
        names = sorted({name for units in self._by_end.values() for name in units})
        rows = [[end_us, *(units.get(name, 0) for name in names)] for end_us, units in sorted(self._by_end.items())]
        return [self.era, names, rows]

    def dump_old(self) -> dict[str, list[Any]]:
        """{id: [end, {name: units}]} of the reservations of the first release."""
        return {id: [end_us, units] for id, (end_us, units) in self._old.items()}


__all__ = ["EXACT_ENDS", "GRID", "MAX_NAMES", "ReservedAmounts", "ReservedPlace", "name_of"]
