"""Windows: every counter against a list of (time, units); exact to the microsecond, and money to 9 decimals."""

from __future__ import annotations

import decimal
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from strongroom.context import us_from_utc, utc_from_us
from strongroom.windows import (
    BUCKETS_PER_WINDOW,
    MAX_AMOUNT,
    MONEY_SCALE,
    SATURATED,
    Anchored,
    Calendar,
    Limit,
    Rolling,
    RollingCounter,
    Total,
    Window,
    calendar_span,
    counter_for,
    from_units,
    to_units,
)

SECOND = 1_000_000
START = us_from_utc(datetime(2026, 3, 1, tzinfo=UTC))

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
]


def us(text: str) -> int:
    return us_from_utc(datetime.fromisoformat(text))


# --- The brute force ------------------------------------------------------------------------------------------


@dataclass
class Events:
    """All that was used, as a list; the counters keep far less."""

    events: list[tuple[int, int]] = field(default_factory=list)

    def add(self, moment: int, units: int) -> None:
        if units:
            self.events.append((moment, units))

    def used(self, counts: Callable[[int], bool]) -> int:
        return sum(units for moment, units in self.events if counts(moment))

    def after(self, moment: int) -> int:
        return self.used(lambda event: event > moment)


def bucket_of(seconds: int) -> int:
    """The width that the module states: a 300th of the window, in whole microseconds, rounded up."""
    return -(-seconds * SECOND // BUCKETS_PER_WINDOW)


def rolling_used(events: Events, seconds: int, now: int) -> int:
    """An event counts until its whole bucket has left the window."""
    bucket = bucket_of(seconds)
    return events.used(lambda moment: now < (moment // bucket + 1) * bucket + seconds * SECOND)


def anchored_span(events: Events, seconds: int, now: int) -> int | None:
    """The start of the window that is open now, from the first event on."""
    start: int | None = None
    for moment, _ in events.events:
        if start is None or moment >= start + seconds * SECOND:
            start = moment
    return start if start is not None and now < start + seconds * SECOND else None


def label(unit: str, zone: ZoneInfo, moment: int) -> object:
    """What two moments have in common that lie in one calendar unit."""
    local = utc_from_us(moment).astimezone(zone)
    offset = local.utcoffset() or timedelta()
    seconds = moment // SECOND + int(offset.total_seconds())
    labels: dict[str, Callable[[], object]] = {
        "minute": lambda: seconds // 60 * 60 - int(offset.total_seconds()),
        "hour": lambda: seconds // 3600 * 3600 - int(offset.total_seconds()),
        "day": local.date,
        "week": lambda: local.isocalendar()[:2],
        "month": lambda: (local.year, local.month),
    }
    return labels[unit]()


def first_fall(used_at: Callable[[int], int], most: int, candidates: list[int]) -> int | None:
    """The first of the moments at which something can leave when at most `most` counts."""
    return next((moment for moment in sorted(candidates) if used_at(moment) <= most), None)


# --- Rolling --------------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 20_000),  # within a bucket or two of the smallest window
            st.integers(0, 3 * SECOND),
            st.integers(0, 40 * 60 * SECOND),
            st.sampled_from([0, 1, SECOND, 60 * SECOND, 3600 * SECOND, 18_000 * SECOND, 18_060 * SECOND]),
        ),
        st.integers(0, 50),
    ),
    min_size=1,
    max_size=60,
)
seconds = st.sampled_from([1, 2, 7, 60, 3600, 18_000, 86_400])


@given(steps, seconds, st.integers(1, 120))
def test_rolling_never_over_admits_and_denies_at_most_one_bucket_early(
    steps: list[tuple[int, int]], seconds: int, limit: int
) -> None:
    counter, admitted, now = counter_for(Rolling(seconds=seconds)), Events(), START
    width = bucket_of(seconds)
    for step, units in steps:
        now += step
        used = counter.used(now)
        exact = admitted.after(now - seconds * SECOND)
        widened = admitted.after(now - seconds * SECOND - width)
        assert exact <= used <= widened
        if used + units <= limit:
            counter.add(now, units)
            admitted.add(now, units)
            assert exact + units <= limit
        else:
            assert widened + units > limit


@given(steps, seconds, st.integers(-1, 300))
def test_rolling_is_exact_by_its_buckets(steps: list[tuple[int, int]], seconds: int, most: int) -> None:
    counter, events, now = counter_for(Rolling(seconds=seconds)), Events(), START
    bucket = bucket_of(seconds)
    for step, units in steps:
        now += step
        counter.add(now, units)
        events.add(now, units)
        used = rolling_used(events, seconds, now)
        assert counter.used(now) == used

        def used_at(moment: int) -> int:
            return rolling_used(events, seconds, moment)

        leaving = [(m // bucket + 1) * bucket + seconds * SECOND for m, _ in events.events]
        leaving = [moment for moment in leaving if moment > now]
        assert counter.resets_at_us(now) == (min(leaving) if used else None)
        expected = now if used <= most else (first_fall(used_at, most, leaving) if most >= 0 else None)
        assert counter.frees_at_us(now, most) == expected
        if expected is not None and expected > now:
            assert used_at(expected - 1) > most
            again = counter_for(Rolling(seconds=seconds), json.loads(json.dumps(counter.dump())))
            assert again.used(expected - 1) > most
            assert again.used(expected) <= most


@given(steps, seconds)
def test_a_rolling_window_never_counts_a_second_more_than_its_bucket_and_frees_in_the_end(
    steps: list[tuple[int, int]], seconds: int
) -> None:
    counter, now = counter_for(Rolling(seconds=seconds)), START
    for step, units in steps:
        now += step
        counter.add(now, units)
    assert counter.used(now + seconds * SECOND + bucket_of(seconds)) == 0
    assert counter.dump() == [[], []]


@given(st.lists(st.tuples(st.integers(-4_000, 0), st.integers(0, 40)), max_size=60), st.randoms(use_true_random=False))
def test_an_import_of_past_usage_counts_alike_in_any_order(past: list[tuple[int, int]], random: Any) -> None:
    window = Rolling(seconds=1800)
    now = START
    events = Events()
    for offset, units in past:
        events.add(now + offset * SECOND, units)
    shuffled = list(past)
    random.shuffle(shuffled)
    counters = []
    for order in (past, shuffled):
        counter = RollingCounter(window)
        for offset, units in order:
            counter.add_at(now + offset * SECOND, units)
        counters.append(counter)
    for later in (0, 300, 1800, 1806, 4000):
        expected = rolling_used(events, 1800, now + later * SECOND)
        assert [c.used(now + later * SECOND) for c in counters] == [expected, expected]
        assert [c.resets_at_us(now + later * SECOND) is None for c in counters] == [not expected] * 2
    counters[0].add(now + 5000 * SECOND, 3)
    assert counters[0].used(now + 5000 * SECOND) == 3


def test_add_at_after_add_counts_both_and_past_usage_leaves_first() -> None:
    counter = RollingCounter(Rolling(seconds=300))
    counter.add(START, 5)
    counter.add_at(START - 100 * SECOND, 7)
    counter.add_at(START - 100 * SECOND, 0)
    counter.add_at(START - 200 * SECOND, 0)
    assert counter.buckets(START) == [(START - 100 * SECOND, 7), (START, 5)]
    assert counter.resets_at_us(START) == START + 201 * SECOND
    assert counter.used(START + 201 * SECOND) == 5
    assert counter.used(START + 201 * SECOND - 1) == 5  # what has left does not come back


# --- Anchored -------------------------------------------------------------------------------------------------


@given(steps, seconds, st.integers(-1, 300))
def test_anchored_is_exact(steps: list[tuple[int, int]], seconds: int, most: int) -> None:
    counter, events, now = counter_for(Anchored(seconds=seconds)), Events(), START
    for step, units in steps:
        now += step
        if step % 2:  # looking never starts a window
            counter.used(now)
        counter.add(now, units)
        events.add(now, units)
        start = anchored_span(events, seconds, now)
        used = 0 if start is None else events.used(lambda moment: moment >= start)  # noqa: B023 - used at once
        end = None if start is None else start + seconds * SECOND
        assert counter.used(now) == used
        assert counter.resets_at_us(now) == end
        expected = now if used <= most else (end if most >= 0 else None)
        assert counter.frees_at_us(now, most) == expected
        if expected is not None and expected > now:
            again = counter_for(Anchored(seconds=seconds), counter.dump())
            assert again.used(expected - 1) > most
            assert again.used(expected) == 0


# --- Calendar -------------------------------------------------------------------------------------------------


def transitions(zone: ZoneInfo, years: range) -> list[int]:
    """When the zone's offset changes, to the second."""

    def offset(moment: int) -> timedelta | None:
        return utc_from_us(moment * SECOND).astimezone(zone).utcoffset()

    found = []
    at = int(datetime(years.start, 1, 1, tzinfo=UTC).timestamp())
    end = int(datetime(years.stop, 1, 1, tzinfo=UTC).timestamp())
    while at < end:
        after = at + 14 * 86_400
        if offset(at) != offset(after):
            low, high = at, after
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if offset(middle) == offset(at) else (low, middle)
            found.append(high * SECOND)
        at = after
    return found


MOMENTS = {
    name: [
        *transitions(ZoneInfo(name), range(2025, 2028)),
        *transitions(ZoneInfo(name), range(2011, 2013)),
        *transitions(ZoneInfo(name), range(2017, 2019)),
        us("2026-12-31T23:59:59+00:00"),
        us("2024-02-29T12:00:00+00:00"),
    ]
    for name in ZONES
}
units_of_time = st.sampled_from(["minute", "hour", "day", "week", "month"])
moments = st.sampled_from(ZONES).flatmap(lambda zone: st.tuples(st.just(zone), st.sampled_from(MOMENTS[zone])))


@given(moments, units_of_time, st.integers(-3 * 86_400, 86_400), steps, st.integers(-1, 300))
def test_calendar_is_exact_across_daylight_saving(
    moment: tuple[str, int], unit: str, offset: int, steps: list[tuple[int, int]], most: int
) -> None:
    name, near = moment
    zone, events, now = ZoneInfo(name), Events(), near + offset * SECOND
    window = Calendar.model_validate({"unit": unit, "timezone": name})
    counter = counter_for(window)
    for step, units in steps:
        now += step
        counter.add(now, units)
        events.add(now, units)
        mine = label(unit, zone, now)
        used = events.used(lambda moment: label(unit, zone, moment) == mine)  # noqa: B023 - used at once
        assert counter.used(now) == used
        end = counter.resets_at_us(now)
        assert end is not None
        assert end > now
        assert label(unit, zone, end) != mine
        assert label(unit, zone, end - 1) == mine
        assert counter.frees_at_us(now, most) == (now if used <= most else (end if most >= 0 else None))
        again = counter_for(window, counter.dump())
        assert again.used(end - 1) == used
        assert again.used(end) == 0


# Their clocks were put back from just after midnight to before it, so that a day's last hour came after its end.
BACK_ACROSS_MIDNIGHT = {"America/St_Johns": (2005, 2007), "Antarctica/Casey": (2009, 2011)}


@pytest.mark.parametrize("name", [*ZONES, *BACK_ACROSS_MIDNIGHT])
def test_a_calendar_window_always_contains_the_moment_it_was_asked_for(name: str) -> None:
    # Otherwise it would end before it began, and every charge would begin another: a limit that limits nothing.
    zone = ZoneInfo(name)
    longest = {"minute": 60, "hour": 5400, "day": 28 * 3600, "week": 8 * 86_400, "month": 32 * 86_400}
    for near in transitions(zone, range(*BACK_ACROSS_MIDNIGHT.get(name, (2025, 2030)))):
        for offset in range(-7200, 7200, 613):
            now = near + offset * SECOND + 1
            for unit, most in longest.items():
                start, end = calendar_span(unit, zone, now)
                assert start <= now < end, (unit, utc_from_us(now))
                assert end - start <= most * SECOND


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
        # A day that was left out.
        ("day", "Pacific/Apia", "2011-12-29T12:00-10:00", "2011-12-29T00:00-10:00", "2011-12-31T00:00+14:00"),
        ("hour", "Asia/Kolkata", "2026-05-05T10:10+05:30", "2026-05-05T10:00+05:30", "2026-05-05T11:00+05:30"),
        ("week", "America/New_York", "2026-03-08T23:00-04:00", "2026-03-02T00:00-05:00", "2026-03-09T00:00-04:00"),
        ("month", "Asia/Kathmandu", "2024-02-29T23:59:59+05:45", "2024-02-01T00:00+05:45", "2024-03-01T00:00+05:45"),
        ("month", "UTC", "2026-12-31T23:59:59+00:00", "2026-12-01T00:00+00:00", "2027-01-01T00:00+00:00"),
        ("minute", "UTC", "2026-01-01T00:00:59+00:00", "2026-01-01T00:00+00:00", "2026-01-01T00:01+00:00"),
    ],
)  # fmt: skip
def test_calendar_spans_known_by_hand(unit: str, zone: str, now: str, start: str, end: str) -> None:
    assert calendar_span(unit, ZoneInfo(zone), us(now)) == (us(start), us(end))


# --- Total, and what all have in common -----------------------------------------------------------------------


@given(steps, st.integers(-1, 300))
def test_a_total_never_falls(steps: list[tuple[int, int]], most: int) -> None:
    counter, now, used = counter_for(Total()), START, 0
    for step, units in steps:
        now += step
        counter.add(now, units)
        used += units
        assert counter.used(now + 10**15) == used
        assert counter.resets_at_us(now) is None
        assert counter.frees_at_us(now, most) == (now if used <= most else None)


WINDOWS: list[Window] = [
    Rolling(seconds=60),
    Rolling(seconds=18_000),
    Anchored(seconds=60),
    Calendar(unit="minute"),
    Calendar(unit="day", timezone="Europe/Berlin"),
    Total(),
]


@given(st.sampled_from(WINDOWS), steps, st.data())
def test_a_counter_goes_on_from_its_dump_at_any_moment(
    window: Window, steps: list[tuple[int, int]], data: st.DataObject
) -> None:
    counter = other = counter_for(window)
    now = START
    for step, units in steps:
        now += step
        if data.draw(st.booleans()):
            other = counter_for(window, json.loads(json.dumps(other.dump())))
        counter.add(now, units)
        other.add(now, units)
        assert other.used(now) == counter.used(now)
        assert other.resets_at_us(now) == counter.resets_at_us(now)
        assert other.frees_at_us(now, 10) == counter.frees_at_us(now, 10)


@given(st.sampled_from(WINDOWS), steps, st.integers(0, 10**12))
def test_a_clock_that_goes_back_frees_nothing(window: Window, steps: list[tuple[int, int]], back: int) -> None:
    counter, now = counter_for(window), START
    for step, units in steps:
        now += step
        counter.add(now, units)
    used = counter.used(now)
    resets = counter.resets_at_us(now)
    assert counter.used(now - back) == used
    counter.add(now - back, 3)
    assert counter.used(now - back) == used + 3
    if used:  # else it was used in the past, and is past again at `now`
        assert counter.used(now) == used + 3
    if resets is not None and used:
        assert counter.used(resets - 1) == used + 3  # what was added in the past counts at least as long
    counter.add(now, 2)
    frees = counter.frees_at_us(now - back, 2)
    if frees is not None and frees > now:
        assert counter_for(window, counter.dump()).used(frees - 1) > 2
        assert counter_for(window, counter.dump()).used(frees) <= 2


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.kind)
def test_counters_stop_at_int64_and_still_deny(window: Window) -> None:
    counter = counter_for(window)
    for _ in range(25):
        counter.add(START, MONEY_SCALE * 10**9)
    assert counter.used(START) == SATURATED
    for _ in range(25):
        counter.add(START + SECOND, MONEY_SCALE * 10**9)
    assert counter.used(START + SECOND) == SATURATED
    again = counter_for(window, json.loads(json.dumps(counter.dump())))
    assert again.used(START + SECOND) == SATURATED
    assert all(
        number <= SATURATED for part in counter.dump() for number in (part if isinstance(part, list) else [part])
    )


def test_what_saturates_one_rolling_bucket_does_not_hide_the_next() -> None:
    counter = RollingCounter(Rolling(seconds=60))
    counter.add(START, SATURATED)
    counter.add(START + 30 * SECOND, 500)
    assert counter.used(START + 30 * SECOND) == SATURATED
    assert counter.used(START + 61 * SECOND) == 500


# --- Amounts --------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**18))
def test_money_is_exact_to_nine_decimals(units: int) -> None:
    amount = from_units("cost", units)
    assert Decimal(amount) == Decimal(units).scaleb(-9)
    assert isinstance(amount, int) == (units % MONEY_SCALE == 0)
    assert to_units("cost", amount) == units


@given(st.decimals(0, 10**6, places=9))
def test_money_comes_back_as_it_was_whatever_the_callers_decimal_context(amount: Decimal) -> None:
    with decimal.localcontext() as context:
        context.prec = 5
        units = to_units("cost", amount)
        back = from_units("cost", units)
    assert Decimal(back) == amount


@pytest.mark.parametrize(
    ("resource", "amount"),
    [
        ("cost", Decimal("0.0000000001")),
        ("cost", Decimal("999999999.9999999990000000000000000001")),  # 28 digits would round it to exact
        ("cost", Decimal("1E-999999")),
        ("cost", 10**9 + 1),
        ("cost", Decimal(10**9) + Decimal("0.1")),
        ("cost", -1),
        ("cost", Decimal("-0.5")),
        ("tokens", 1.5),
        ("tokens", Decimal("1.0000000000000000000000000000000000001")),
        ("tokens", MAX_AMOUNT + 1),
        ("tokens", 1e300),
        ("tokens", float("nan")),
        ("tokens", float("inf")),
        ("tokens", Decimal("sNaN")),
        ("tokens", True),
        ("tokens", "5"),
        ("tokens", None),
    ],
)
def test_an_amount_that_is_not_exact_or_not_possible_is_refused(resource: str, amount: object) -> None:
    with pytest.raises(ValueError, match=r"found .*, expected"):
        to_units(resource, amount)


@pytest.mark.parametrize(
    ("resource", "amount", "units"),
    [
        ("cost", 0.1, 100_000_000),
        ("cost", 1e-9, 1),
        ("cost", 10**9, 10**18),
        ("cost", Decimal("1E+3"), 1000 * MONEY_SCALE),
        ("tokens", 5.0, 5),
        ("tokens", 1e15, MAX_AMOUNT),
        ("tokens", Decimal("7.000"), 7),
    ],
)
def test_amounts_as_units(resource: str, amount: Any, units: int) -> None:
    assert to_units(resource, amount) == units


# --- Declaring limits -----------------------------------------------------------------------------------------


def test_a_limit_is_the_same_counter_whatever_its_height() -> None:
    window = Rolling(seconds=60)
    assert Limit(resource="tokens", limit=1, window=window).id == Limit(resource="tokens", limit=9, window=window).id
    limits = [Limit(resource="tokens", limit=1, window=w) for w in [*WINDOWS, Calendar(unit="day")]]
    assert len({limit.id for limit in limits}) == len(limits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": -1},
        {"limit": True},
        {"limit": "5"},
        {"limit": 1.5},
        {"limit": MAX_AMOUNT + 1},
        {"limit": float("nan")},
        {"resource": "Tokens"},
        {"resource": "tokens\n"},
        {"resource": "concurrency", "window": {"kind": "rolling", "seconds": 60}},
        {"resource": ""},
        {"window": {"kind": "rolling", "seconds": 0}},
        {"window": {"kind": "rolling", "seconds": 1.5}},
        {"window": {"kind": "rolling", "seconds": "60"}},
        {"window": {"kind": "rolling", "seconds": 60, "minutes": 1}},
        {"window": {"kind": "calendar", "unit": "year"}},
        {"window": {"kind": "calendar", "unit": "day", "timezone": "Mars/Olympus"}},
        {"window": {"kind": "calendar", "unit": "day", "timezone": "../../etc/passwd"}},
        {"window": {"kind": "sliding", "seconds": 5}},
        {"resource": "cost", "limit": Decimal("0.0000000001")},
    ],
)
def test_a_wrong_limit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limit.model_validate({"resource": "tokens", "limit": 5, "window": {"kind": "total"}, **wrong})
