"""Windows and limits: how much may be used in what span of time, and what is used now. Pure, exact, integers.

Amounts are counted in *units*, whole numbers: of a resource's own (requests, tokens, …), and for `cost` (money) in
billionths, so that money is exact. Times are microseconds since the epoch.

Four windows:

- `rolling`: the last `seconds`. Kept in buckets of a 300th of the window (5 h: one minute); the oldest bucket counts
  whole until all of it has left, so a limit is never over-admitted, and may deny up to one bucket early.
- `anchored`: starts with the first use, lasts `seconds`, then the next use starts another.
- `calendar`: the present minute, hour, day, week (from Monday) or month in a time zone.
- `total`: no window; what is used stays used.

A clock that goes backwards never frees anything: what was counted at a later time counts until that time has passed.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Context as DecimalContext
from decimal import Decimal
from typing import Annotated, Any, Literal, Protocol
from zoneinfo import ZoneInfo, available_timezones

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from .context import us_from_utc, utc_from_us

BUCKETS_PER_WINDOW = 300
MAX_WINDOW_S = 366 * 86_400 * 10
MAX_LIMITS = 32
MAX_AMOUNT = 10**15
"""The most of a resource that one limit may allow, or one call may cost (cost: 10**9 of the currency)."""
SATURATED = 2**63 - 1
"""Counters stop here instead of leaving int64."""
MONEY = "cost"
MONEY_SCALE = 10**9
MAX_RESOURCE_CHARS = 64
RESOURCE_PATTERN = r"^[a-z][a-z0-9_.:-]{0,63}$"
_SECOND = 1_000_000
_EXACT = DecimalContext(prec=40)
"""Enough digits for every amount, whatever the caller's own context is set to."""

Amount = int | Decimal


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_serializer(mode="wrap")
    def _lean(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What nobody asked for is not shown: no models, no routes, no refill."""
        fields: dict[str, Any] = dump(self)
        return {name: value for name, value in fields.items() if value not in (None, (), [])}


class Rolling(_Model):
    """The last `seconds`."""

    kind: Literal["rolling"] = "rolling"
    seconds: int = Field(ge=1, le=MAX_WINDOW_S, strict=True)


class Anchored(_Model):
    """`seconds` from the first use on; the first use after that starts another."""

    kind: Literal["anchored"] = "anchored"
    seconds: int = Field(ge=1, le=MAX_WINDOW_S, strict=True)


class Calendar(_Model):
    """The present minute, hour, day, week (from Monday) or month in `timezone` (an IANA name)."""

    kind: Literal["calendar"] = "calendar"
    unit: Literal["minute", "hour", "day", "week", "month"]
    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in _zones():
            raise ValueError(f"found {value[:64]!r}, expected an IANA time zone such as Europe/Berlin")
        return value


class Refill(_Model):
    """`amount` of a total comes back with each new `unit` of the calendar in `timezone`, or every `seconds`."""

    amount: Annotated[int, Field(strict=True, ge=1, le=MAX_AMOUNT)] | Decimal
    unit: Literal["minute", "hour", "day", "week", "month"] | None = None
    timezone: str = "UTC"
    seconds: int | None = Field(None, ge=1, le=MAX_WINDOW_S, strict=True)


class Total(_Model):
    """No window: what is used stays used, but for what `refill` gives back."""

    kind: Literal["total"] = "total"
    refill: Refill | None = None


Window = Annotated[Rolling | Anchored | Calendar | Total, Field(discriminator="kind")]


@functools.cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


class Limit(_Model):
    """At most `limit` of `resource` in each `window`. For the resource `cost` it is money, with up to 9 decimals."""

    resource: str = Field(pattern=RESOURCE_PATTERN)
    limit: Annotated[int, Field(strict=True, ge=0, le=MAX_AMOUNT)] | Decimal
    window: Window
    models: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()

    def applies(self, model: str | None, route: str | None) -> bool:
        """Whether a call that names this model and this route is counted: one that names none is, where it is not asked
        for. A name in the list may end in `*`."""
        return (not self.models or _named(self.models, model)) and (not self.routes or _named(self.routes, route))

    @field_validator("resource")
    @classmethod
    def _not_concurrency(cls, value: str) -> str:
        if value == "concurrency":
            raise ValueError("limits on concurrency need reservations, which this version does not have yet")
        return value

    @field_validator("limit", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise ValueError(f"found {type(value).__name__}, expected a number")
        return Decimal(repr(value)) if isinstance(value, float) else value

    @field_validator("limit")
    @classmethod
    def _amount(cls, value: int | Decimal, info: ValidationInfo) -> int | Decimal:
        to_units(info.data.get("resource", ""), value)  # without one, that is another problem, and told as well
        return value

    @property
    def id(self) -> str:
        """Names the counter: the same resource and window is the same counter, whatever its limit is changed to."""
        window = self.window
        match window:
            case Rolling() | Anchored():
                return f"{self.resource}|{window.kind}|{window.seconds}"
            case Calendar():
                return f"{self.resource}|calendar|{window.unit}|{window.timezone}"
            case _:
                return f"{self.resource}|total"


def _named(names: tuple[str, ...], name: str | None) -> bool:
    if name is None:
        return False
    return any(name == one or (one.endswith("*") and name.startswith(one[:-1])) for one in names)


def to_units(resource: str, amount: object) -> int:
    """An amount as units. ValueError, with what was found and expected, for what is not exact or not possible."""
    if isinstance(amount, bool) or not isinstance(amount, int | float | Decimal):
        raise ValueError(f"found {type(amount).__name__}, expected a number")
    if isinstance(amount, int):
        if not 0 <= amount <= (MAX_AMOUNT if resource != MONEY else MAX_AMOUNT // 10**6):
            raise ValueError(_out_of_range(resource, amount))
        return amount * MONEY_SCALE if resource == MONEY else amount
    number = Decimal(repr(amount)) if isinstance(amount, float) else amount
    if not number.is_finite():
        raise ValueError(f"found {number}, expected a finite number")
    most = MAX_AMOUNT if resource != MONEY else MAX_AMOUNT // 10**6
    if not 0 <= number <= most:
        raise ValueError(_out_of_range(resource, number))
    decimals = 9 if resource == MONEY else 0
    # Comparing is exact where arithmetic would round to the context's digits, and so take 0.…01 for nothing.
    rounded = _EXACT.quantize(number, Decimal(1).scaleb(-decimals))
    if rounded != number:
        what = "at most 9 decimals" if resource == MONEY else "a whole number"
        raise ValueError(f"found {number}, expected {what}")
    return int(_EXACT.scaleb(rounded, decimals))


def _out_of_range(resource: str, amount: object) -> str:
    most = MAX_AMOUNT if resource != MONEY else MAX_AMOUNT // 10**6
    return f"found {amount}, expected 0 to {most}"


def from_units(resource: str, units: int) -> Amount:
    """Units as the amount a user sees: an int, or for money that is not whole a Decimal without superfluous zeros."""
    if resource != MONEY:
        return units
    whole, rest = divmod(units, MONEY_SCALE)
    return whole if not rest else _EXACT.normalize(_EXACT.scaleb(Decimal(units), -9))


# --- What is used: one counter for each window kind -----------------------------------------------------------


class Counter(Protocol):
    """What is used of one limit. Every method first moves to `now_us`."""

    def used(self, now_us: int) -> int:
        """Units that count now."""
        ...

    def add(self, now_us: int, units: int) -> None:
        """Count `units` as used now."""
        ...

    def resets_at_us(self, now_us: int) -> int | None:
        """When `used` next falls (rolling: the oldest bucket leaves; anchored and calendar: the window ends); None if
        nothing is to fall."""
        ...

    def frees_at_us(self, now_us: int, most: int) -> int | None:
        """The earliest time at which `used` is at most `most` if nothing more is added; None if that is never."""
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
        if (
            self._numbers and number <= self._numbers[-1]
        ):  # also when the clock went backwards: count it later, not earlier
            units = min(units, SATURATED - self._units[-1])
            self._units[-1] += units
        else:
            self._numbers.append(number)
            self._units.append(units)
        self._sum += units

    def add_at(self, moment_us: int, units: int) -> None:
        """Count `units` as used at a moment in the past: for imports."""
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


class _SpanCounter:
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

    def span(self, now_us: int) -> tuple[int, int] | None:
        """Start and end of the present window in microseconds, None if there is none."""
        return (self._start_us, self._end_us) if now_us < self._end_us else None

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

    def resets_at_us(self, now_us: int) -> int | None:
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

    def resets_at_us(self, now_us: int) -> int | None:
        self._move(now_us)
        return self._end_us


class TotalCounter:
    __slots__ = ("_used",)

    def __init__(self, window: Total, state: list[Any] | None = None) -> None:
        self._used: int = state[0] if state else 0

    def used(self, now_us: int) -> int:
        return self._used

    def add(self, now_us: int, units: int) -> None:
        self._used = min(self._used + units, SATURATED)

    def resets_at_us(self, now_us: int) -> int | None:
        return None

    def frees_at_us(self, now_us: int, most: int) -> int | None:
        return now_us if self._used <= most else None

    def dump(self) -> list[Any]:
        return [self._used]


_COUNTERS: dict[str, Callable[[Any, list[Any] | None], Counter]] = {
    "rolling": RollingCounter,
    "anchored": AnchoredCounter,
    "calendar": CalendarCounter,
    "total": TotalCounter,
}


def counter_for(window: Window, state: list[Any] | None = None) -> Counter:
    """A counter for a window, from nothing or from what `dump` gave."""
    return _COUNTERS[window.kind](window, state)


def calendar_span(unit: str, zone: ZoneInfo, now_us: int) -> tuple[int, int]:
    """Start and end, in microseconds, of the calendar unit that `now_us` lies in, on the wall clock of `zone`.

    Days, weeks and months begin at local midnight, however long daylight saving makes them. Minutes and hours are
    real ones (an hour that the clock repeats is two hours), aligned to the local clock.
    """
    now = utc_from_us(now_us)
    local = now.astimezone(zone)
    if unit in ("minute", "hour"):
        within = timedelta(seconds=local.second, microseconds=local.microsecond)
        length = timedelta(minutes=1)
        if unit == "hour":
            within += timedelta(minutes=local.minute)
            length = timedelta(hours=1)
        start = now - within
        return us_from_utc(start), us_from_utc(start + length)
    day = datetime(local.year, local.month, local.day)  # noqa: DTZ001 - a wall-clock date; the zone comes below
    if unit == "day":
        end = day + timedelta(days=1)
    elif unit == "week":
        day -= timedelta(days=day.weekday())
        end = day + timedelta(days=7)
    else:
        day = day.replace(day=1)
        end = (day + timedelta(days=32)).replace(day=1)
    start_us, end_us = _at(day, zone), _at(end, zone)
    if end_us <= now_us:  # the clock was put back from after midnight to before it: the second midnight ends the day
        end_us = _at(end.replace(fold=1), zone)
    return start_us, end_us


def _at(wall: datetime, zone: ZoneInfo) -> int:
    return us_from_utc(wall.replace(tzinfo=zone).astimezone(UTC))
