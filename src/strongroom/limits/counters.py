"""Counters: what is used of one limit, one kind for each kind of window. Pure, exact, integers.

Amounts are units (whole numbers, see `windows`), times are microseconds since the epoch. A clock that goes backwards
never frees anything: what was counted at a later time counts until that time has passed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any, Protocol
from zoneinfo import ZoneInfo

from .calendar import LAST_US, beginning, begun, calendar_span
from .windows import Anchored, Calendar, Refill, Rolling, Total, Window

BUCKETS_PER_WINDOW = 300
SATURATED = 2**63 - 1
"""Counters stop here instead of leaving int64."""
_SECOND = 1_000_000


class Counter(Protocol):
    """What is used of one limit. Every method first moves to `now_us`."""

    def used(self, now_us: int) -> int:
        """Units that count now."""
        ...

    def add(self, now_us: int, units: int) -> None:
        """Count `units` as used now."""
        ...

    def add_at(self, moment_us: int, units: int) -> None:
        """Count `units` as used at a moment in the past (not after now), where that moment still counts."""
        ...

    def take_back(self, moment_us: int, now_us: int, units: int) -> None:
        """Count `units` less, that were counted as used at a moment: as far as that moment still counts."""
        ...

    def counts_from_us(self, now_us: int) -> int:
        """The earliest moment whose use counts now."""
        ...

    def not_after(self, now_us: int) -> None:
        """Let what was counted at a later time count as used now: the clock was set back to now."""
        ...

    def ends_us(self, now_us: int) -> int | None:
        """When the span that now lies in ends: of a calendar window, and of an anchored one that is open (and with it
        all that is used); of a total with refills when the next one comes; None for what has no such span."""
        ...

    def resets_at_us(self, now_us: int) -> int | None:
        """When `used` next falls (rolling: the oldest bucket leaves; anchored and calendar: the window ends; total: the
        next refill); None if nothing is to fall."""
        ...

    def frees_at_us(self, now_us: int, most: int) -> int | None:
        """The earliest time at which `used` is at most `most` if nothing more is added; None if that is never (or
        later than the year 9000)."""
        ...

    def dump(self) -> list[Any]:
        """The state as JSON values, to be given to the constructor again."""
        ...


class RollingCounter:
    """Pairs of bucket number and units, oldest first, and their sum."""

    __slots__ = ("_bucket_us", "_numbers", "_sum", "_units", "_window_us")

    def __init__(self, window: Rolling, state: list[Any] | None = None) -> None:
        self._window_us = window.seconds * _SECOND
        self._bucket_us = -(-self._window_us // BUCKETS_PER_WINDOW)
        self._numbers: list[int] = list(state[0]) if state else []
        self._units: list[int] = list(state[1]) if state else []
        self._sum = sum(self._units)

    @property
    def bucket_us(self) -> int:
        return self._bucket_us

    def used(self, now_us: int) -> int:
        numbers = self._numbers
        if numbers:
            oldest = (now_us - self._window_us) // self._bucket_us
            if numbers[0] < oldest:
                gone = bisect_left(numbers, oldest)
                self._sum -= sum(self._units[:gone])
                del numbers[:gone], self._units[:gone]
        return self._sum if self._sum < SATURATED else SATURATED

    def add(self, now_us: int, units: int) -> None:
        self.used(now_us)
        if not units:
            return
        number = now_us // self._bucket_us
        if self._numbers and number <= self._numbers[-1]:  # if the clock went back too: count it later, not earlier
            before = self._units[-1]
            if before + units > SATURATED:
                units = SATURATED - before
            self._units[-1] = before + units
        else:
            self._numbers.append(number)
            self._units.append(units)
        self._sum += units

    def add_at(self, moment_us: int, units: int) -> None:
        if not units:
            return
        number = moment_us // self._bucket_us
        position = bisect_left(self._numbers, number)
        if position < len(self._numbers) and self._numbers[position] == number:
            units = min(units, SATURATED - self._units[position])
            self._units[position] += units
        else:
            self._numbers.insert(position, number)
            self._units.insert(position, units)
        self._sum += units

    def take_back(self, moment_us: int, now_us: int, units: int) -> None:
        self.used(now_us)
        # From that moment's bucket, or the next one: it may have been counted a hair later than it was decided. Never
        # from another, whose use would then leave the window too early.
        number = moment_us // self._bucket_us
        position = bisect_left(self._numbers, number)
        while units and position < len(self._numbers) and self._numbers[position] <= number + 1:
            part = min(units, self._units[position])
            self._units[position] -= part
            self._sum -= part
            units -= part
            if self._units[position]:
                break
            del self._numbers[position], self._units[position]

    def counts_from_us(self, now_us: int) -> int:
        return (now_us - self._window_us) // self._bucket_us * self._bucket_us

    def not_after(self, now_us: int) -> None:
        number = now_us // self._bucket_us
        first = bisect_right(self._numbers, number)
        later = sum(self._units[first:])
        if later:
            del self._numbers[first:], self._units[first:]
            self._sum -= later
            self.add_at(now_us, min(later, SATURATED))

    def ends_us(self, now_us: int) -> int | None:
        return None

    def resets_at_us(self, now_us: int) -> int | None:
        return (self._numbers[0] + 1) * self._bucket_us + self._window_us if self.used(now_us) else None

    def frees_at_us(self, now_us: int, most: int) -> int | None:
        if self.used(now_us) <= most:
            return now_us
        if most < 0:
            return None
        left = self._sum
        for number, units in zip(self._numbers, self._units, strict=True):
            left -= units
            if left <= most:
                return (number + 1) * self._bucket_us + self._window_us
        return None

    def buckets(self, now_us: int) -> list[tuple[int, int]]:
        """(start of the bucket in microseconds, units) of what counts now: for exports."""
        self.used(now_us)
        return [(n * self._bucket_us, u) for n, u in zip(self._numbers, self._units, strict=True)]

    def dump(self) -> list[Any]:
        return [self._numbers, self._units]


class _SpanCounter(ABC):
    """A window with a start and an end: what anchored and calendar windows share."""

    __slots__ = ("_end_us", "_start_us", "_used")

    def __init__(self, state: list[Any] | None) -> None:
        self._start_us: int = state[0] if state else 0
        self._end_us: int = state[1] if state else 0
        self._used: int = state[2] if state else 0

    def used(self, now_us: int) -> int:
        if now_us >= self._end_us:
            self._used = 0
        return self._used

    def frees_at_us(self, now_us: int, most: int) -> int | None:
        if self.used(now_us) <= most:
            return now_us
        return self._end_us if most >= 0 else None

    @abstractmethod
    def add(self, now_us: int, units: int) -> None: ...

    @abstractmethod
    def ends_us(self, now_us: int) -> int | None: ...

    def add_at(self, moment_us: int, units: int) -> None:
        if moment_us >= self._start_us:  # what was used before the present window began does not count any more
            self.add(moment_us, units)

    def take_back(self, moment_us: int, now_us: int, units: int) -> None:
        if moment_us >= self._start_us:
            self._used = max(0, self.used(now_us) - units)

    @abstractmethod
    def counts_from_us(self, now_us: int) -> int: ...

    def not_after(self, now_us: int) -> None:
        if self._start_us > now_us:
            used, self._start_us, self._end_us, self._used = self._used, 0, 0, 0
            self.add(now_us, used)

    def resets_at_us(self, now_us: int) -> int | None:
        return self.ends_us(now_us)

    def dump(self) -> list[Any]:
        return [self._start_us, self._end_us, self._used]


class AnchoredCounter(_SpanCounter):
    __slots__ = ("_window_us",)

    def __init__(self, window: Anchored, state: list[Any] | None = None) -> None:
        super().__init__(state)
        self._window_us = window.seconds * _SECOND

    def add(self, now_us: int, units: int) -> None:
        if not units:
            return
        if now_us >= self._end_us:
            self._start_us, self._end_us, self._used = now_us, now_us + self._window_us, 0
        self._used = min(self._used + units, SATURATED)

    def counts_from_us(self, now_us: int) -> int:
        # Where none is open, a use of before would have opened one, which may still be open.
        return self._start_us if now_us < self._end_us else now_us - self._window_us + 1

    def ends_us(self, now_us: int) -> int | None:
        return self._end_us if now_us < self._end_us else None


class CalendarCounter(_SpanCounter):
    __slots__ = ("_unit", "_zone")

    def __init__(self, window: Calendar, state: list[Any] | None = None) -> None:
        super().__init__(state)
        self._unit = window.unit
        self._zone = ZoneInfo(window.timezone)

    def _move(self, now_us: int) -> None:
        if now_us >= self._end_us:
            self._start_us, self._end_us = calendar_span(self._unit, self._zone, now_us)
            self._used = 0

    def add(self, now_us: int, units: int) -> None:
        self._move(now_us)
        self._used = min(self._used + units, SATURATED)

    def counts_from_us(self, now_us: int) -> int:
        self._move(now_us)
        return self._start_us

    def ends_us(self, now_us: int) -> int | None:
        self._move(now_us)
        return self._end_us


class _Seconds:
    """The moments that are whole multiples of so many seconds since the epoch."""

    __slots__ = ("_step_us",)

    def __init__(self, seconds: int) -> None:
        self._step_us = seconds * _SECOND

    def passed(self, from_us: int, to_us: int) -> int:
        return to_us // self._step_us - from_us // self._step_us

    def coming(self, now_us: int, count: int) -> int | None:
        moment_us = (now_us // self._step_us + count) * self._step_us
        return moment_us if moment_us <= LAST_US else None


class _Beginnings:
    """The moments at which a unit of a zone's calendar begins."""

    __slots__ = ("_unit", "_zone")

    def __init__(self, unit: str, zone: ZoneInfo) -> None:
        self._unit = unit
        self._zone = zone

    def passed(self, from_us: int, to_us: int) -> int:
        return begun(self._unit, self._zone, from_us, to_us)

    def coming(self, now_us: int, count: int) -> int | None:
        return beginning(self._unit, self._zone, now_us, count)


class _Schedule(Protocol):
    """When refills come. In constant time, however many lie between: a year of minutes costs nothing."""

    def passed(self, from_us: int, to_us: int) -> int:
        """How many came after `from_us`, up to and including `to_us`."""
        ...

    def coming(self, now_us: int, count: int) -> int | None:
        """When the `count`-th after `now_us` comes; None if that is too far away."""
        ...


def _schedule(refill: Refill) -> _Schedule:
    if refill.seconds is not None:
        return _Seconds(refill.seconds)
    return _Beginnings(refill.unit or "", ZoneInfo(refill.timezone or ""))  # it has both: Refill checks that


class TotalCounter:
    """What was used in all, less what refills gave back: `[used]`, or with a refill `[used, moment]`, up to which it
    has given back. That is a moment, not the number of a refill, so that it stays true when the refill is changed.
    `[used, 0, moment]`: there is no refill yet, and one that is added now gives back from that moment on.

    `started`: the refills began here, with the first look, and nothing has been stored of that yet."""

    __slots__ = ("_amount", "_at_us", "_from_us", "_next_us", "_refills", "_used", "refill", "started")

    def __init__(self, window: Total, state: list[Any] | None = None) -> None:
        self._used: int = state[0] if state else 0
        self._at_us: int | None = (state[1] or None) if state and len(state) > 1 else None
        self._from_us: int | None = state[2] if state and len(state) > 2 else None
        self.started = False
        self._next_us = 0  # the next refill, once it is known
        self.refill = refill = window.refill
        self._refills = None if refill is None else _schedule(refill)
        self._amount = 0 if refill is None else refill.units

    def used(self, now_us: int) -> int:
        if self._refills is None:
            return self._used
        if self._at_us is None:  # what was counted before there was a refill: from then on it comes back
            self._at_us, self.started = now_us if self._from_us is None else self._from_us, True
        if now_us < self._at_us:
            return self._used
        if now_us >= self._next_us:
            self._used -= min(self._used, self._refills.passed(self._at_us, now_us) * self._amount)
            self._next_us = self._refills.coming(now_us, 1) or SATURATED
        self._at_us = now_us
        return self._used

    def add(self, now_us: int, units: int) -> None:
        self._used = min(self.used(now_us) + units, SATURATED)

    def add_at(self, moment_us: int, units: int) -> None:
        self.add(moment_us, units)

    def take_back(self, moment_us: int, now_us: int, units: int) -> None:
        self._used = max(0, self.used(now_us) - units)

    def counts_from_us(self, now_us: int) -> int:
        return 0

    @staticmethod
    def without_refill(state: list[Any], now_us: int) -> list[Any]:
        """A counter's state, of which a refill that is added gives back from now on."""
        return [state[0], 0, now_us]

    def not_after(self, now_us: int) -> None:
        if self._at_us is not None and self._at_us > now_us:
            self._at_us, self._next_us = now_us, 0

    def ends_us(self, now_us: int) -> int | None:
        return self._coming(now_us, 1)

    def resets_at_us(self, now_us: int) -> int | None:
        used = self.used(now_us)  # first, as it moves to now
        return self._coming(now_us, 1) if used else None

    def frees_at_us(self, now_us: int, most: int) -> int | None:
        over = self.used(now_us) - most
        if over <= 0:
            return now_us
        if most < 0 or self._refills is None:
            return None
        return self._coming(now_us, -(-over // self._amount))

    def _coming(self, now_us: int, count: int) -> int | None:
        if self._refills is None:
            return None
        # Where the clock went back, what is counted at a later time is given back after that time.
        return self._refills.coming(max(now_us, self._at_us or 0), count)

    def dump(self) -> list[Any]:
        if self._refills is None:
            return [self._used] if self._from_us is None else [self._used, 0, self._from_us]
        at_us = self._at_us if self._at_us is not None else self._from_us
        return [self._used] if at_us is None else [self._used, at_us]


_COUNTERS: dict[str, Callable[[Any, list[Any] | None], Counter]] = {
    "rolling": RollingCounter,
    "anchored": AnchoredCounter,
    "calendar": CalendarCounter,
    "total": TotalCounter,
}


def counter_for(window: Window, state: list[Any] | None = None) -> Counter:
    """A counter for a window, from nothing or from what `dump` gave."""
    return _COUNTERS[window.kind](window, state)


def stored_counter(limit_id: str, state: list[Any]) -> Counter:
    """The counter of a limit that is known by its id alone: without its refill, nothing comes back."""
    _, kind, *rest = limit_id.partition("|for|")[0].split("|")
    match kind:
        case "rolling":
            return counter_for(Rolling(seconds=int(rest[0])), state)
        case "anchored":
            return counter_for(Anchored(seconds=int(rest[0])), state)
        case "calendar":
            return counter_for(Calendar.model_validate({"unit": rest[0], "timezone": rest[1]}), state)
        case _:
            return counter_for(Total(), state)
