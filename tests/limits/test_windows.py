"""Windows: every counter against a list of (time, units), exact to the microsecond; money to nine decimals."""

from __future__ import annotations

import decimal
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from strongroom.context import us_from_utc
from strongroom.limits.calendar import LAST_US, calendar_span
from strongroom.limits.counters import BUCKETS_PER_WINDOW, SATURATED, RollingCounter, counter_for
from strongroom.limits.windows import (
    MAX_AMOUNT,
    MAX_SCOPE_CHARS,
    MAX_SCOPE_NAMES,
    MONEY_SCALE,
    Anchored,
    Calendar,
    Limit,
    Refill,
    Rolling,
    Total,
    Window,
    from_units,
    to_units,
)
from tests.limits.test_calendar import places, transitions, units_of_time, us

SECOND = 1_000_000
START = us_from_utc(datetime(2026, 3, 1, tzinfo=UTC))

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
def test_a_rolling_window_never_over_admits_and_denies_at_most_one_bucket_early(
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
def test_a_rolling_window_is_exact_by_its_buckets(steps: list[tuple[int, int]], seconds: int, most: int) -> None:
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
def test_an_anchored_window_is_exact(steps: list[tuple[int, int]], seconds: int, most: int) -> None:
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


@given(places, units_of_time, steps, st.integers(-1, 300))
def test_a_calendar_window_is_exact_across_daylight_saving(
    place: tuple[str, int], unit: str, steps: list[tuple[int, int]], most: int
) -> None:
    name, now = place
    zone, events = ZoneInfo(name), Events()
    window = Calendar.model_validate({"unit": unit, "timezone": name})
    counter = counter_for(window)
    for step, units in steps:
        now += step
        counter.add(now, units)
        events.add(now, units)
        start, end = calendar_span(unit, zone, now)
        used = events.used(lambda moment: moment >= start)  # noqa: B023 - used at once
        assert counter.used(now) == used
        assert counter.resets_at_us(now) == counter.ends_us(now) == end
        assert counter.frees_at_us(now, most) == (now if used <= most else (end if most >= 0 else None))
        again = counter_for(window, counter.dump())
        assert again.used(end - 1) == used
        assert again.used(end) == 0


# --- Total, and what all have in common -----------------------------------------------------------------------


@given(steps, st.integers(-1, 300))
def test_a_total_never_decreases(steps: list[tuple[int, int]], most: int) -> None:
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
REFILLED: list[Window] = [
    Total(refill=Refill(amount=3, seconds=7)),
    Total(refill=Refill(amount=40, unit="hour", timezone="Australia/Lord_Howe")),
    Total(refill=Refill(amount=1, unit="minute")),
    Total(refill=Refill(amount=500, unit="month", timezone="Europe/Berlin")),
]


@given(st.sampled_from([*WINDOWS, *REFILLED]), steps, st.data())
def test_a_counter_continues_from_its_dump(window: Window, steps: list[tuple[int, int]], data: st.DataObject) -> None:
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


@given(st.sampled_from([*WINDOWS, *REFILLED]), steps, st.integers(0, 10**12))
def test_a_clock_set_back_frees_nothing(window: Window, steps: list[tuple[int, int]], back: int) -> None:
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


@pytest.mark.parametrize("window", [*WINDOWS, Total(refill=Refill(amount=1, unit="day"))], ids=lambda w: w.kind)
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


@given(st.sampled_from([*WINDOWS, *REFILLED]), steps)
def test_past_usage_counts_as_if_recorded_then(window: Window, steps: list[tuple[int, int]]) -> None:
    live, later, now = counter_for(window), counter_for(window), START
    for step, units in steps:
        now += step
        live.add(now, units)
        later.add_at(now, units)
    for ahead in (0, SECOND, 3600 * SECOND):
        assert later.used(now + ahead) == live.used(now + ahead)
        assert later.ends_us(now + ahead) == live.ends_us(now + ahead)
        assert later.frees_at_us(now + ahead, 3) == live.frees_at_us(now + ahead, 3)


@given(st.sampled_from(WINDOWS), steps, st.integers(0, 10**11), st.integers(1, 40))
def test_usage_before_the_current_window_does_not_count(
    window: Window, steps: list[tuple[int, int]], back: int, units: int
) -> None:
    counter, now = counter_for(window), START
    for step, more in steps:
        now += step
        counter.add(now, more)
    used, end = counter.used(now), counter.ends_us(now)
    moment = now - back
    counter.add_at(moment, units)
    match window:
        case Rolling(seconds=seconds):
            bucket = bucket_of(seconds)
            counts = now < (moment // bucket + 1) * bucket + seconds * SECOND
        case Anchored(seconds=seconds):
            # Without an open window it begins one, if that is still open now and no earlier one stood there.
            counts = moment >= end - seconds * SECOND if end is not None else now < moment + seconds * SECOND
            counts = counts and (end is not None or counter.ends_us(now) == moment + seconds * SECOND)
        case Calendar(unit=unit, timezone=zone):
            counts = moment >= calendar_span(unit, ZoneInfo(zone), now)[0]
        case _:
            counts = True
    assert counter.used(now) == used + (units if counts else 0)
    if end is not None:
        assert counter.ends_us(now) == end


def test_past_usage_starts_an_anchored_window() -> None:
    counter = counter_for(Anchored(seconds=100))
    counter.add_at(START - 30 * SECOND, 4)
    assert counter.used(START) == 4
    assert counter.ends_us(START) == START + 70 * SECOND
    counter.add_at(START - 31 * SECOND, 9)  # before the window that is open
    counter.add_at(START - 30 * SECOND, 1)
    assert counter.used(START) == 5
    assert counter.used(START + 70 * SECOND) == 0


@given(st.sampled_from([*WINDOWS, *REFILLED]), steps)
def test_a_window_ends_at_its_stated_end(window: Window, steps: list[tuple[int, int]]) -> None:
    counter, now = counter_for(window), START
    for step, units in steps:
        now += step
        counter.add(now, units)
        end = counter.ends_us(now)
        if not isinstance(window, Anchored | Calendar):  # of a total with refills the next one
            assert end is None or (isinstance(window, Total) and window.refill is not None and end > now)
        elif end is not None:
            assert end > now
            again = counter_for(window, counter.dump())
            assert again.ends_us(end - 1) == end
            assert again.used(end) == 0


def test_a_saturated_rolling_bucket_does_not_hide_the_next() -> None:
    counter = RollingCounter(Rolling(seconds=60))
    counter.add(START, SATURATED)
    counter.add(START + 30 * SECOND, 500)
    assert counter.used(START + 30 * SECOND) == SATURATED
    assert counter.used(START + 61 * SECOND) == 500


# --- Refills --------------------------------------------------------------------------------------------------


def beginnings(refill: Refill, after: int, until: int) -> list[int]:
    """The moments of the refills in (after, until], one by one."""
    if refill.seconds is not None:
        step = refill.seconds * SECOND
        return list(range((after // step + 1) * step, until + 1, step))
    found, zone = [], ZoneInfo(refill.timezone or "")
    end = calendar_span(refill.unit or "", zone, after)[1]
    while end <= until:
        found.append(end)
        end = calendar_span(refill.unit or "", zone, end)[1]
    return found


@dataclass
class Bucket:
    """A total with a refill, walked from refill to refill."""

    refill: Refill
    at: int
    used: int = 0

    def move(self, now: int) -> None:
        for _ in beginnings(self.refill, self.at, now):
            self.used = max(0, self.used - self.refill.units)
        self.at = now


refills = st.one_of(
    st.builds(lambda amount, step: Refill(amount=amount, seconds=step), st.integers(1, 90), st.integers(60, 9999)),
    st.builds(
        lambda amount, unit, place: Refill(amount=amount, unit=unit, timezone=place[0]),
        st.integers(1, 90),
        st.sampled_from(["hour", "day", "week", "month"]),
        places,
    ),
)


@given(refills, st.data(), steps, st.integers(-1, 300))
def test_a_refill_returns_its_amount_each_period_and_never_more_than_was_used(
    refill: Refill, data: st.DataObject, steps: list[tuple[int, int]], most: int
) -> None:
    near = transitions(refill.timezone) if refill.timezone is not None else ()
    now = data.draw(st.sampled_from(near)) if near else START
    window = Total(refill=refill)
    counter, bucket = counter_for(window), Bucket(refill, now)
    counter.add(now, 0)
    for step, units in steps:
        now += step
        bucket.move(now)
        bucket.used += units
        counter.add(now, units)
        assert counter.used(now) == bucket.used
        state = json.loads(json.dumps(counter.dump()))
        assert state == [bucket.used, now]
        following = counter.resets_at_us(now)
        assert (following is None) == (bucket.used == 0)
        if following is not None:
            assert counter_for(window, state).used(following - 1) == bucket.used
            assert counter_for(window, state).used(following) == max(0, bucket.used - refill.units)
        frees = counter.frees_at_us(now, most)
        if bucket.used <= most:
            assert frees == now
        elif most < 0:
            assert frees is None
        else:
            assert frees is not None
            assert counter_for(window, state).used(frees - 1) > most
            assert counter_for(window, state).used(frees) <= most


@given(st.decimals("0.000000001", 100, places=9), st.lists(st.tuples(st.integers(0, 5), st.decimals(0, 50, places=9))))
def test_a_budget_of_money_is_exact_through_use_and_refills(amount: Decimal, steps: list[tuple[int, Decimal]]) -> None:
    limit = Limit(resource="cost", limit=Decimal(1000), window=Total(refill=Refill(amount=amount, unit="day")))
    limit = Limit.model_validate(limit.model_dump())
    counter, used, now = counter_for(limit.window), Decimal(0), START
    for later, cost in steps:
        now += later * 86_400 * SECOND
        used = max(Decimal(0), used - later * amount) + cost
        counter.add(now, to_units("cost", cost))
        assert Decimal(from_units("cost", counter.used(now))) == used
        days = -(-to_units("cost", used) // to_units("cost", amount))
        frees = now + days * 86_400 * SECOND
        assert counter.frees_at_us(now, 0) == (frees if frees <= LAST_US else None)


def test_a_whole_amount_of_money_is_not_read_as_billionths() -> None:
    limit = Limit.model_validate(
        {"resource": "cost", "limit": 9, "window": {"kind": "total", "refill": {"amount": 2, "seconds": 60}}}
    )
    again = Limit.model_validate(limit.model_dump())
    for one in (limit, again):
        counter = counter_for(one.window)
        counter.add(START, to_units("cost", 5))
        assert from_units("cost", counter.used(START + 60 * SECOND)) == 3


def test_a_century_of_minute_refills_is_applied_at_once() -> None:
    counter = counter_for(Total(refill=Refill(amount=1, unit="minute", timezone="Europe/Berlin")))
    counter.add(START, 10**15)
    century = 100 * 365 * 86_400
    assert counter.used(START + century * SECOND) == 10**15 - century // 60


def test_usage_from_before_a_refill_is_refilled_from_its_start_on() -> None:
    counter = counter_for(Total(refill=Refill(amount=10, unit="day")), [25])
    assert counter.dump() == [25]
    assert counter.used(START + 3600 * SECOND) == 25
    assert counter.used(START + 86_400 * SECOND) == 15
    assert counter.dump() == [15, START + 86_400 * SECOND]


def test_changing_or_removing_a_refill_does_not_affect_the_past() -> None:
    daily = counter_for(Total(refill=Refill(amount=10, unit="day")))
    daily.add(START + 3 * 3600 * SECOND, 100)
    hourly = counter_for(Total(refill=Refill(amount=1, unit="hour")), daily.dump())
    assert hourly.used(START + 5 * 3600 * SECOND) == 98
    fixed = counter_for(Total(), hourly.dump())
    assert fixed.used(START + 10**13) == 98
    assert fixed.dump() == [98]


def test_a_clock_set_back_applies_no_refill_twice() -> None:
    counter = counter_for(Total(refill=Refill(amount=10, unit="day")))
    day = 86_400 * SECOND
    counter.add(START + 3 * day, 100)
    assert counter.used(START + 1 * day) == 100
    assert counter.frees_at_us(START + 1 * day, 90) == START + 4 * day
    assert counter.used(START + 3 * day) == 100
    assert counter.used(START + 4 * day) == 90


def test_a_limit_that_never_resets_in_time_gives_no_retry_time() -> None:
    counter = counter_for(Total(refill=Refill(amount=1, unit="month")))
    counter.add(START, MAX_AMOUNT)
    assert counter.frees_at_us(START, 0) is None
    assert counter.frees_at_us(START, MAX_AMOUNT - 1) == us("2026-04-01T00:00+00:00")
    seconds = counter_for(Total(refill=Refill(amount=1, seconds=86_400)))
    seconds.add(START, MAX_AMOUNT)
    assert seconds.frees_at_us(START, 0) is None


# --- Amounts --------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**18))
def test_money_is_exact_to_nine_decimals(units: int) -> None:
    amount = from_units("cost", units)
    assert Decimal(amount) == Decimal(units).scaleb(-9)
    assert isinstance(amount, int) == (units % MONEY_SCALE == 0)
    assert to_units("cost", amount) == units


@given(st.decimals(0, 10**6, places=9))
def test_money_is_exact_in_any_decimal_context(amount: Decimal) -> None:
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
def test_an_inexact_or_impossible_amount_is_refused(resource: str, amount: object) -> None:
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
def test_amounts_convert_to_units_exactly(resource: str, amount: Any, units: int) -> None:
    assert to_units(resource, amount) == units


# --- Declaring limits -----------------------------------------------------------------------------------------


def test_a_limit_keeps_its_counter_when_its_maximum_changes() -> None:
    window = Rolling(seconds=60)
    assert Limit(resource="tokens", limit=1, window=window).id == Limit(resource="tokens", limit=9, window=window).id
    limits = [Limit(resource="tokens", limit=1, window=w) for w in [*WINDOWS, Calendar(unit="day")]]
    assert len({limit.id for limit in limits}) == len(limits)
    refilled = Limit(resource="tokens", limit=1, window=Total(refill=Refill(amount=1, unit="day")))
    assert refilled.id == Limit(resource="tokens", limit=1, window=Total()).id == "tokens|total"


def test_scoped_limits_have_their_own_counter_whatever_the_order_of_names() -> None:
    def id(**scope: tuple[str, ...]) -> str:
        return Limit(resource="tokens", limit=1, window=Rolling(seconds=60), **scope).id

    assert id() == "tokens|rolling|60"  # as ever: the counters of stored keys go on
    assert id(models=("a", "b")) == id(models=("b", "a")) == id(models=("b", "a", "b"))
    different = [
        id(), id(models=("a",)), id(routes=("a",)), id(models=("a", "b")), id(models=("a,b",)), id(models=("a|b",)),
        id(models=("a",), routes=("b",)), id(models=("b",), routes=("a",)), id(models=('a", "b',)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert len(id(models=tuple(f"{n:0200}" for n in range(32)))) < 100


def test_a_limit_on_concurrency_needs_no_window() -> None:
    limit = Limit.model_validate({"resource": "concurrency", "limit": 3})
    assert limit.window == Total()
    assert limit.id == "concurrency|total"
    assert Limit.model_validate({"resource": "concurrency", "limit": 3, "window": {"kind": "total"}}) == limit


@pytest.mark.parametrize("window", WINDOWS + REFILLED, ids=lambda window: window.kind)
def test_a_limit_is_read_back_unchanged(window: Window) -> None:
    limit = Limit(resource="tokens", limit=5, window=window, models=("gpt-*",), routes=("/v1/chat",))
    assert Limit.model_validate(limit.model_dump()) == limit
    assert Limit.model_validate_json(limit.model_dump_json()) == limit


MESSAGES = [
    (
        {"window": {"kind": "sliding"}},
        "window.kind",
        "found 'sliding', expected one of rolling, anchored, ",
    ),
    ({"window": {"seconds": 5}}, "window.kind", "is required: one of rolling, anchored, calendar or total"),
    ({"window": 5}, "window", "found a number, expected an object with a kind: rolling, anchored, calendar or total"),
    ({"window": None}, "window", "is required, with a kind: rolling, anchored, calendar or total"),
    (
        {"window": {"kind": "calendar", "unit": "year"}},
        "window.calendar.unit",
        "found 'year', expected one of minute, hour, day, week or month",
    ),
    (
        {"window": {"kind": "calendar", "unit": "day", "timezone": "Mars"}},
        "window.calendar.timezone",
        "found 'Mars', expected an IANA time zone such as UTC or Europe/Berlin",
    ),
    (
        {"window": {"kind": "rolling", "seconds": 5, "refill": {"amount": 1, "unit": "day"}}},
        "window.rolling.refill",
        "a refill needs a window of kind total",
    ),
    (
        {"refill": {"amount": 1}},
        "window.total.refill.seconds",
        "found neither, expected exactly one of unit and seconds",
    ),
    (
        {"refill": {"amount": 1, "unit": "day", "seconds": 5}},
        "window.total.refill.seconds",
        "found both, expected exactly one of unit and seconds",
    ),
    ({"refill": {"amount": 1, "unit": "year"}}, "window.total.refill.unit", "found 'year', expected one of minute, "),
    (
        {"refill": {"amount": 1, "unit": "day", "timezone": []}},
        "window.total.refill.timezone",
        "found a list, ",
    ),
    (
        {"refill": {"amount": 1, "seconds": 5, "timezone": "UTC"}},
        "window.total.refill.timezone",
        "a refill has a timezone only with a unit",
    ),
    ({"refill": {"amount": 0, "unit": "day"}}, "window.total.refill.amount", "found 0, expected more than 0"),
    ({"refill": {"amount": -0.5, "unit": "day"}}, "window.total.refill.amount", "found -0.5, expected more than 0"),
    ({"refill": {"amount": "9", "unit": "day"}}, "window.total.refill.amount", "found text, expected a number"),
    ({"refill": {"amount": 1.5, "unit": "day"}}, "window.refill.amount", "found 1.5, expected a whole number"),
    (
        {"refill": {"amount": MAX_AMOUNT + 1, "unit": "day"}},
        "window.refill.amount",
        f"found {MAX_AMOUNT + 1}",
    ),
    (
        {"resource": "cost", "refill": {"amount": Decimal("1E-10"), "unit": "day"}},
        "window.refill.amount",
        "found 1E-10, expected at most 9 decimals",
    ),
    (
        {"resource": "concurrency", "window": {"kind": "rolling", "seconds": 5}},
        "window",
        "concurrency counts open reservations: expected no window, or total without a refill",
    ),
    (
        {"resource": "concurrency", "refill": {"amount": 1, "seconds": 5}},
        "window",
        "concurrency counts open reservations: expected no window, or total without a refill",
    ),
    ({"models": ["a*b"]}, "models", "found 'a*b', expected * only at the end"),
    ({"models": [""]}, "models", f"found '', expected 1 to {MAX_SCOPE_CHARS} printable characters"),
    ({"routes": ["x" * 201]}, "routes", f"found {'x' * 64!r}, expected 1 to {MAX_SCOPE_CHARS} printable"),
    ({"routes": ["a\nb"]}, "routes", "found 'a\\nb', expected 1 to 200 printable characters"),
    ({"routes": ["a"] * 33}, "routes", f"found 33 names, expected at most {MAX_SCOPE_NAMES}"),
]


@pytest.mark.parametrize(("wrong", "path", "message"), MESSAGES)
def test_an_invalid_limit_names_the_field_and_the_expectation(wrong: dict[str, Any], path: str, message: str) -> None:
    fields = {"resource": "tokens", "limit": 5, "window": {"kind": "total"}, **wrong}
    if "refill" in fields:
        fields["window"] = {"kind": "total", "refill": fields.pop("refill")}
    with pytest.raises(ValidationError) as caught:
        Limit.model_validate(fields)
    found = [
        (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")) for item in caught.value.errors()
    ]
    assert len(found) == 1
    assert found[0][0] == path
    assert found[0][1].startswith(message)


def test_every_problem_of_a_refill_is_reported_at_once() -> None:
    refill = {"amount": 0, "unit": "year", "timezone": "Mars", "seconds": 0, "more": 1}
    with pytest.raises(ValidationError) as caught:
        Limit.model_validate({"resource": "T", "limit": -1, "window": {"kind": "total", "refill": refill}})
    assert {item["loc"][-1] for item in caught.value.errors()} == {
        "resource", "limit", "amount", "unit", "timezone", "seconds", "more"
    }  # fmt: skip


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
def test_an_invalid_limit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limit.model_validate({"resource": "tokens", "limit": 5, "window": {"kind": "total"}, **wrong})
