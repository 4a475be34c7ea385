"""Calendar units: in every time zone they partition time and begin at local midnight, whatever its clocks do."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.context import us_from_utc, utc_from_us
from strongroom.limits import calendar as calendars
from strongroom.limits.calendar import LAST_US, UNITS, beginning, begun, calendar_span

SECOND = 1_000_000
HOUR = 3_600 * SECOND

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Asia/Kolkata",  # half an hour
    "Asia/Kathmandu",  # three quarters
    "Australia/Lord_Howe",  # daylight saving of half an hour
    "America/Sao_Paulo",  # midnight skipped
    "America/Havana",  # midnight repeated
    "Asia/Beirut",  # midnight skipped; the last hour of a day repeated
    "Africa/Casablanca",
    "Pacific/Chatham",
    "Pacific/Apia",  # left out 30 December 2011
    "Antarctica/Troll",  # two hours at once
    "Antarctica/Casey",  # three hours at once, and back across midnight
    "America/St_Johns",  # back across midnight, by an hour, each year until 2011
    "Asia/Pyongyang",  # half an hour back from midnight, and forward to it
    "America/Caracas",  # half an hour at three o'clock
    "Pacific/Kiritimati",  # left out 31 December 1994
    "Pacific/Kwajalein",  # left out 21 August 1993
    "Africa/Monrovia",  # 44 minutes and 30 seconds, in 1972
    "America/Montevideo",  # an hour and a half
]

WEEKS = [datetime(1970, 1, 1, tzinfo=UTC) + timedelta(weeks=number) for number in range(75 * 365 // 7 + 4)]
"""From 1970 to 2045."""


def us(text: str) -> int:
    return us_from_utc(datetime.fromisoformat(text))


@functools.cache
def transitions(name: str) -> tuple[int, ...]:
    """When the zone's offset changes from 1970 to 2045, to the second. (Two changes within a week may hide a third.)"""
    zone = ZoneInfo(name)

    def offset(moment: datetime) -> timedelta | None:
        return moment.astimezone(zone).utcoffset()

    found = []
    offsets = [offset(week) for week in WEEKS]
    for (begin, before), (end, after) in pairwise(zip(WEEKS, offsets, strict=True)):
        while before != after:
            low, high = begin, end
            while high - low > timedelta(seconds=1):
                middle = low + (high - low) // timedelta(seconds=2) * timedelta(seconds=1)
                low, high = (middle, high) if offset(middle) == before else (low, middle)
            found.append(us_from_utc(high))
            begin, before = high, offset(high)
    return tuple(found)


def moments_in(name: str) -> st.SearchStrategy[int]:
    """Any moment of the zone, more often one near a change of its clocks."""
    anywhere = st.integers(0, us("2100-01-01T00:00+00:00"))
    if not transitions(name):
        return anywhere
    near = st.builds(
        lambda moment, days, rest: max(0, moment + days * 86_400 * SECOND + rest),
        st.sampled_from(transitions(name)),
        st.sampled_from([-31, -8, -2, -1, 0, 1]),
        st.one_of(st.integers(-2 * HOUR, 2 * HOUR), st.sampled_from([-1, 0, 1])),
    )
    return st.one_of(near, near, anywhere)


places = st.one_of(st.sampled_from(ZONES), st.sampled_from(sorted(available_timezones()))).flatmap(
    lambda name: st.tuples(st.just(name), moments_in(name))
)
"""A zone, and a moment in it."""
units_of_time = st.sampled_from(UNITS)


@given(places, units_of_time, st.integers(1, 60))
def test_the_units_of_a_zone_partition_time(place: tuple[str, int], unit: str, steps: int) -> None:
    name, now = place
    zone = ZoneInfo(name)
    start, end = calendar_span(unit, zone, now)
    assert start <= now < end
    first = start
    for number in range(1, steps + 1):
        middle = (start + end) // 2
        for moment in (start, middle, end - 1):
            assert calendar_span(unit, zone, moment) == (start, end)
        assert begun(unit, zone, first, start) == number - 1
        assert begun(unit, zone, now, end) == number
        assert begun(unit, zone, now, max(now, end - 1)) == number - 1
        assert beginning(unit, zone, now, number) == end
        after, end_after = calendar_span(unit, zone, end)
        assert after == end
        assert end_after > end
        start, end = after, end_after


def test_units_partition_time_around_every_unusual_change_of_clocks_since_1970() -> None:
    seen = set()
    for name in sorted(available_timezones()):
        zone = ZoneInfo(name)
        for moment in transitions(name):
            before, after = (utc_from_us(us).astimezone(zone).replace(tzinfo=None) for us in (moment - SECOND, moment))
            shift = after - before - timedelta(seconds=1)
            usual = (
                shift % timedelta(hours=1) == timedelta() and abs(shift) < timedelta(hours=2) and 0 < after.hour < 23
            )
            if usual or (moment, shift, after) in seen:
                continue
            seen.add((moment, shift, after))
            for unit, around in (("minute", 180), ("hour", 4 * 3600), ("day", 2 * 86_400)):
                until, (start, end) = moment + around * SECOND, calendar_span(unit, zone, moment - around * SECOND)
                first, count = start, 0
                while start < until:
                    assert start < end, (name, unit, utc_from_us(start))
                    assert calendar_span(unit, zone, end - 1) == (start, end), (name, unit, utc_from_us(start))
                    assert begun(unit, zone, first, start) == count, (name, unit, utc_from_us(start))
                    following, end_after = calendar_span(unit, zone, end)
                    assert following == end, (name, unit, utc_from_us(end))
                    start, end, count = following, end_after, count + 1
    assert len(seen) > 300


@given(places, st.sampled_from(["day", "week", "month"]))
def test_days_weeks_and_months_begin_when_their_date_is_first_reached(place: tuple[str, int], unit: str) -> None:
    name, now = place
    zone = ZoneInfo(name)
    start, _ = calendar_span(unit, zone, now)
    local = utc_from_us(start).astimezone(zone).replace(tzinfo=None)
    before = utc_from_us(start - 1).astimezone(zone).replace(tzinfo=None)
    assert before.date() < local.date()
    if local.time() != datetime.min.time():  # only where clocks skip midnight, or the whole day
        assert local - before > timedelta(minutes=10)
    elif unit == "week":
        assert local.weekday() == 0
    elif unit == "month":
        assert local.day == 1


@given(places, st.sampled_from(["minute", "hour"]))
def test_minutes_and_hours_are_real_ones_on_the_local_clock(place: tuple[str, int], unit: str) -> None:
    name, now = place
    zone = ZoneInfo(name)
    length = 60 * SECOND if unit == "minute" else HOUR

    def phase(moment: int) -> int:
        offset = utc_from_us(moment).astimezone(zone).utcoffset() or timedelta()
        return offset // timedelta(microseconds=1) % length

    start, end = calendar_span(unit, zone, now)
    if len({phase(moment) for moment in (start - 1, start, end - 1, end)}) == 1:  # else clocks moved by a part of it
        assert end - start == length
        assert (start + phase(start)) % length == 0
    assert end - start < 2 * length


@given(places, units_of_time, st.integers(1, 10**6))
def test_distant_calendar_units_are_found_without_walking(place: tuple[str, int], unit: str, count: int) -> None:
    name, now = place
    zone = ZoneInfo(name)
    moment = beginning(unit, zone, now, count)
    if moment is None:
        assert now + count * 30 * 86_400 * SECOND > LAST_US * 9 // 10  # weeks or months, far too many of them
        return
    assert begun(unit, zone, now, moment) == count
    assert begun(unit, zone, now, moment - 1) == count - 1


def test_a_century_of_minutes_is_counted_without_walking(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def counted(us: int) -> datetime:
        nonlocal asked
        asked += 1
        return utc_from_us(us)

    monkeypatch.setattr(calendars, "utc_from_us", counted)
    now, later = us("2000-01-01T00:00:30+00:00"), us("2100-01-01T00:00:30+00:00")
    minutes = (later - now) // (60 * SECOND)
    assert begun("minute", ZoneInfo("Europe/Berlin"), now, later) == minutes
    assert beginning("minute", ZoneInfo("Europe/Berlin"), now, minutes) == us("2100-01-01T00:00+00:00")
    assert asked < 60


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_beyond_the_last_year_never_ends(unit: str) -> None:
    assert beginning(unit, ZoneInfo("Asia/Tokyo"), us("2026-01-01T00:00+00:00"), 10**15) is None
    assert beginning(unit, ZoneInfo("Asia/Tokyo"), LAST_US, 60 * 24 * 400) is None


def test_a_skipped_date_is_not_counted() -> None:
    apia = ZoneInfo("Pacific/Apia")
    before, after = us("2011-12-29T12:00-10:00"), us("2011-12-31T12:00+14:00")
    assert begun("day", apia, before, after) == 1
    assert beginning("day", apia, before, 2) == us("2012-01-01T00:00+14:00")
    assert begun("day", apia, us("2001-01-01T12:00-11:00"), us("2021-01-01T12:00+14:00")) == 7304  # of 7305 dates


@pytest.mark.parametrize(
    ("unit", "zone", "now", "start", "end"),
    [
        # The short and the long day of a zone with daylight saving.
        ("day", "Europe/Berlin", "2026-03-29T12:00+02:00", "2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00"),
        ("day", "Europe/Berlin", "2026-10-25T02:30+01:00", "2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00"),
        # A repeated hour is two hours.
        ("hour", "Europe/Berlin", "2026-10-25T02:30+02:00", "2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00"),
        ("hour", "Europe/Berlin", "2026-10-25T02:30+01:00", "2026-10-25T02:00+01:00", "2026-10-25T03:00+01:00"),
        # Midnight does not exist: the day begins at one o'clock.
        ("day", "Asia/Beirut", "2026-03-29T00:30+02:00", "2026-03-29T01:00+03:00", "2026-03-30T00:00+03:00"),
        # Midnight comes twice: the first one counts.
        ("day", "America/Havana", "2026-11-01T00:30-05:00", "2026-11-01T00:00-04:00", "2026-11-02T00:00-05:00"),
        # Midnight lies within the gap: half past eleven was followed by half past midnight.
        ("day", "America/Toronto", "1919-03-31T12:00-04:00", "1919-03-31T00:30-04:00", "1919-04-01T00:00-04:00"),
        # A day that was left out.
        ("day", "Pacific/Apia", "2011-12-29T12:00-10:00", "2011-12-29T00:00-10:00", "2011-12-31T00:00+14:00"),
        # Midnight comes again from the day after: the day that began at the first one goes on.
        ("day", "America/St_Johns", "2006-10-29T00:00:30-02:30", "2006-10-29T00:00-02:30", "2006-10-30T00:00-03:30"),
        ("day", "America/St_Johns", "2006-10-28T23:30-03:30", "2006-10-29T00:00-02:30", "2006-10-30T00:00-03:30"),
        ("day", "Asia/Pyongyang", "2015-08-14T23:45+08:30", "2015-08-14T00:00+09:00", "2015-08-15T00:00+08:30"),
        # Half an hour forward: another hour begins. Half an hour back: the hour goes on.
        ("hour", "Australia/Lord_Howe", "2026-10-04T01:59+10:30", "2026-10-04T01:00+10:30", "2026-10-04T02:30+11:00"),
        ("hour", "Australia/Lord_Howe", "2026-10-04T02:45+11:00", "2026-10-04T02:30+11:00", "2026-10-04T03:00+11:00"),
        ("hour", "Australia/Lord_Howe", "2026-04-05T01:45+11:00", "2026-04-05T01:00+11:00", "2026-04-05T02:00+10:30"),
        ("hour", "Australia/Lord_Howe", "2026-04-05T01:45+10:30", "2026-04-05T01:00+11:00", "2026-04-05T02:00+10:30"),
        # Chatham's clocks change at a quarter to three, by an hour.
        ("hour", "Pacific/Chatham", "2026-09-27T03:50+13:45", "2026-09-27T02:00+12:45", "2026-09-27T04:00+13:45"),
        # Morocco puts its clocks back for Ramadan.
        ("day", "Africa/Casablanca", "2026-02-15T12:00+00:00", "2026-02-15T00:00+01:00", "2026-02-16T00:00+00:00"),
        ("hour", "Asia/Kolkata", "2026-05-05T10:10+05:30", "2026-05-05T10:00+05:30", "2026-05-05T11:00+05:30"),
        ("week", "America/New_York", "2026-03-08T23:00-04:00", "2026-03-02T00:00-05:00", "2026-03-09T00:00-04:00"),
        ("month", "Asia/Kathmandu", "2024-02-29T23:59:59+05:45", "2024-02-01T00:00+05:45", "2024-03-01T00:00+05:45"),
        ("month", "UTC", "2026-12-31T23:59:59+00:00", "2026-12-01T00:00+00:00", "2027-01-01T00:00+00:00"),
        ("minute", "UTC", "2026-01-01T00:00:59+00:00", "2026-01-01T00:00+00:00", "2026-01-01T00:01+00:00"),
    ],
)  # fmt: skip
def test_calendar_units_match_known_dates(unit: str, zone: str, now: str, start: str, end: str) -> None:
    assert calendar_span(unit, ZoneInfo(zone), us(now)) == (us(start), us(end))
