"""The calendar of a time zone: its minutes, hours, days, weeks and months, numbered, and the moment each begins. Pure.

Times are microseconds since the epoch. The units of one kind follow each other without a gap and without an overlap,
whatever the zone's clocks do:

- A day, week or month begins when its date is first reached: at local midnight, or where clocks skip midnight at the
  moment they do. Where clocks go back from after midnight to before it, the day that has begun goes on.
- Minutes and hours are real ones, aligned to the local clock: an hour that the clock repeats is two hours. Where clocks
  move by a part of an hour (Lord Howe: half an hour) the hour at hand is that much longer or shorter.
- A day that a zone left out (Apia: 30 December 2011) never began, and is not counted.

That holds from 1970 on for every zone; `tests/limits/test_calendar.py` tries them all.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

from ..context import us_from_utc, utc_from_us

CalendarUnit = Literal["minute", "hour", "day", "week", "month"]
UNITS: tuple[CalendarUnit, ...] = ("minute", "hour", "day", "week", "month")
LAST_YEAR = 9000
"""What would come later than this is as good as never; well before the last date that Python can say."""
LAST_US = us_from_utc(datetime.fromisoformat(f"{LAST_YEAR}-01-01T00:00:00+00:00"))
_SECOND = 1_000_000
_CLOCK_US = {"minute": 60 * _SECOND, "hour": 3_600 * _SECOND}
_SKIPPED_DAY = timedelta(hours=12)
"""A zone that moves by more than this crossed the date line and left out a day; no zone drifts so far otherwise."""


def calendar_span(unit: str, zone: ZoneInfo, now_us: int) -> tuple[int, int]:
    """Start and end of the calendar unit that a moment lies in, on the wall clock of `zone`."""
    number, end_us = _number_and_end(unit, zone, now_us)
    return _start(unit, zone, number), end_us


def begun(unit: str, zone: ZoneInfo, from_us: int, to_us: int) -> int:
    """How many units began after `from_us`, up to and including `to_us` (which is not earlier). In constant time."""
    count = _number_and_end(unit, zone, to_us)[0] - _number_and_end(unit, zone, from_us)[0]
    if unit == "day" and count and _offset(zone, to_us) - _offset(zone, from_us) > _SKIPPED_DAY:
        count -= 1
    return count


def beginning(unit: str, zone: ZoneInfo, now_us: int, count: int) -> int | None:
    """When the `count`-th unit (from 1) after `now_us` begins; None if later than LAST_YEAR. In constant time."""
    number = _number_and_end(unit, zone, now_us)[0] + count
    if number > _LAST[unit]:
        return None
    start_us = _start(unit, zone, number)
    missing = count - begun(unit, zone, now_us, start_us)
    return start_us if not missing else _start(unit, zone, number + missing)


# --- Numbers: that of a day is its date's; they grow by one from each unit to the next, but for a skipped day -------


def _number_and_end(unit: str, zone: ZoneInfo, us: int) -> tuple[int, int]:
    number = _shown(unit, zone, us)
    while (end_us := _start(unit, zone, number + 1)) <= us:  # clocks were put back: what has begun goes on
        number += 1
    return number, end_us


def _shown(unit: str, zone: ZoneInfo, us: int) -> int:
    """The number of the unit that the wall clock shows."""
    if unit in _CLOCK_US:
        return (us + _phase(unit, zone, us)) // _CLOCK_US[unit]
    local = utc_from_us(us).astimezone(zone)
    if unit == "month":
        return local.year * 12 + local.month - 1
    ordinal = local.toordinal()
    return ordinal if unit == "day" else (ordinal - 1) // 7  # the calendar's first day was a Monday


def _start(unit: str, zone: ZoneInfo, number: int) -> int:
    """The first moment at which the wall clock shows the unit of this number, or a later one."""
    if unit in _CLOCK_US:
        us = number * _CLOCK_US[unit]
        return us - _phase(unit, zone, us)
    if unit == "month":
        first = date(number // 12, number % 12 + 1, 1)
    else:
        first = date.fromordinal(number if unit == "day" else number * 7 + 1)
    midnight = datetime(first.year, first.month, first.day, tzinfo=zone)  # of two midnights the first (fold=0)
    us = us_from_utc(midnight)
    if _wall(zone, us) == midnight.replace(tzinfo=None):
        return us
    # Clocks skip this midnight, somewhere between it by the clock after (fold=1) and by the clock before.
    return _first(zone, us_from_utc(midnight.replace(fold=1)), us, midnight.replace(tzinfo=None))


def _first(zone: ZoneInfo, low: int, high: int, wall: datetime) -> int:
    """The first whole second after `low` whose local time is at least `wall`, which `high`'s is."""
    while high - low > _SECOND:
        middle = (low + high) // 2 // _SECOND * _SECOND
        low, high = (low, middle) if _wall(zone, middle) >= wall else (middle, high)
    return high


def _phase(unit: str, zone: ZoneInfo, us: int) -> int:
    """How far the local clock's full units lie after real ones: more than minus one unit, at most 0.

    Rounding up makes the hour at hand the one that absorbs a move of half an hour, as the wall clock shows it: 1:59,
    2:30 begins an hour; 1:59, 1:30 goes on with one.
    """
    return -(-_offset(zone, us) // timedelta(microseconds=1) % _CLOCK_US[unit])


def _offset(zone: ZoneInfo, us: int) -> timedelta:
    return utc_from_us(us).astimezone(zone).utcoffset() or timedelta()


def _wall(zone: ZoneInfo, us: int) -> datetime:
    return utc_from_us(us).astimezone(zone).replace(tzinfo=None)


_LAST: dict[str, int] = {unit: _shown(unit, ZoneInfo("UTC"), LAST_US) for unit in UNITS}
