"""Windows and limits: how much may be used in what span of time. Pure, exact.

Amounts are counted in *units*, whole numbers: of a resource's own (requests, tokens, …), and for `cost` (money) in
billionths, so that money is exact. Times are microseconds since the epoch.

Four windows:

- `rolling`: the last `seconds`. Kept in buckets of a 300th of the window (5 h: one minute); the oldest bucket counts
  whole until all of it has left, so a limit is never over-admitted, and may deny up to one bucket early.
- `anchored`: starts with the first use, lasts `seconds`, then the next use starts another.
- `calendar`: the present minute, hour, day, week (from Monday) or month in a time zone.
- `total`: no window; what is used stays used, but for what a refill gives back.

What is used of a limit is kept by its counter: see `counters`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from decimal import Context as DecimalContext
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal
from zoneinfo import available_timezones

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from ..context import kind_of, name_problem
from ..entities import MAX_ID_BYTES, RESOURCE_PATTERN
from .calendar import UNITS, CalendarUnit

MAX_WINDOW_S = 366 * 86_400 * 10
MAX_LIMITS = 32
MAX_AMOUNT = 10**15
"""The most of a resource that one limit may allow, or one call may cost (cost: 10**9 of the currency)."""
MONEY = "cost"
MONEY_SCALE = 10**9
MAX_RESOURCE_CHARS = 64
CONCURRENCY = "concurrency"
MAX_SCOPE_NAMES = 32
MAX_SCOPE_CHARS = 200
KINDS = ("rolling", "anchored", "calendar", "total")
_EXACT = DecimalContext(prec=40)
"""Enough digits for every amount, whatever the caller's own context is set to."""

Amount = int | Decimal


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    told: ClassVar[tuple[str, ...]] = ()
    """Fields with a default that are in every answer."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The fields, in answers as in requests: of what a serializer returns Pydantic knows only that it is a dict.
        A field that is null by default is described as one that may be left out, as it is in answers."""
        plain: Any = {name: value for name, value in core.items() if name != "serialization"}
        schema = handler(plain)
        fields = handler.resolve_ref_schema(schema)
        for shape in fields["properties"].values():
            if shape.get("default", ...) in (None, (), []):
                del shape["default"]
            options = [option for option in shape.get("anyOf", ()) if option != {"type": "null"}]
            if len(options) == 1:
                del shape["anyOf"]
                shape.update(options[0])
        always = {"kind", *(cls.told if handler.mode == "serialization" else ())}
        required = [name for name in fields["properties"] if name in always or name in fields.get("required", ())]
        fields["required"] = required
        return schema

    @model_serializer(mode="wrap")
    def _lean(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What nobody asked for is not shown: no models, no routes, no refill."""
        fields: dict[str, Any] = dump(self)
        return {name: value for name, value in fields.items() if value not in (None, (), [])}


def _known_unit(value: Any) -> Any:
    if value is not None and value not in UNITS:
        raise ValueError(f"found {_short(value)}, expected one of {_listed(UNITS)}")
    return value


def _known_zone(value: Any) -> Any:
    if value is not None and not (isinstance(value, str) and value in _zones()):
        raise ValueError(f"found {_short(value)}, expected an IANA time zone such as UTC or Europe/Berlin")
    return value


def _no_refill(value: Any) -> None:
    if value is not None:
        raise ValueError("a refill needs a window of kind total")


def _exact_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"found {kind_of(value)}, expected a number")
    return Decimal(repr(value)) if isinstance(value, float) else value


Unit = Annotated[CalendarUnit, BeforeValidator(_known_unit)]
Zone = Annotated[
    str,
    BeforeValidator(_known_zone),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": "^[A-Za-z][A-Za-z0-9_+/-]*$",
            "description": "A name of the IANA time zone database, such as Europe/Berlin.",
        }
    ),
]
ScopeName = Annotated[
    str,
    WithJsonSchema(
        {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_SCOPE_CHARS,
            "pattern": "^[^*\\u0000-\\u001f\\u007f]*\\*?$",
        }
    ),
]
"""A model or a route, in printable characters; `*` may be its last."""
NoRefill = SkipJsonSchema[Annotated[None, BeforeValidator(_no_refill)]]
"""Said on the windows that have none, so that a refill there is told to be out of place, not to be unknown."""
Seconds = Annotated[int, Field(ge=1, le=MAX_WINDOW_S, strict=True)]
ExactAmount = Annotated[
    int | Decimal,
    BeforeValidator(_exact_number),
    WithJsonSchema({"type": "number", "minimum": 0, "maximum": MAX_AMOUNT}),
]


class Rolling(_Model):
    """The last `seconds`."""

    kind: Literal["rolling"] = "rolling"
    seconds: Seconds
    refill: NoRefill = None


class Anchored(_Model):
    """`seconds` from the first use; the first use after that starts a new window."""

    kind: Literal["anchored"] = "anchored"
    seconds: Seconds
    refill: NoRefill = None


class Calendar(_Model):
    """The current minute, hour, day, week (from Monday) or month in `timezone` (an IANA name)."""

    told = ("timezone",)

    kind: Literal["calendar"] = "calendar"
    unit: Unit
    timezone: Zone = "UTC"
    refill: NoRefill = None


class Refill(_Model):
    """`amount` of a total comes back at each new `unit` of the calendar in `timezone`, or every `seconds` (at whole
    multiples since the epoch); never more than was used.

    In a limit on `cost` the amount is money, and a Decimal; in every other an int.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["unit"]}, {"required": ["seconds"]}],
            "dependentRequired": {"timezone": ["unit"]},
        }
    )

    amount: ExactAmount
    unit: Unit | None = None
    seconds: Seconds | None = Field(None, validate_default=True)
    timezone: Zone | None = Field(None, validate_default=True)

    @property
    def units(self) -> int:
        """The amount as its counter counts it."""
        return to_units(MONEY, self.amount) if isinstance(self.amount, Decimal) else self.amount

    @field_validator("amount")
    @classmethod
    def _positive(cls, value: int | Decimal) -> int | Decimal:
        if not value > 0:  # neither is NaN
            raise ValueError(f"found {value}, expected more than 0")
        return value

    @field_validator("seconds")
    @classmethod
    def _one_schedule(cls, value: int | None, info: ValidationInfo) -> int | None:
        if "unit" in info.data and (value is None) == (info.data["unit"] is None):
            found = "neither" if value is None else "both"
            raise ValueError(f"found {found}, expected exactly one of unit and seconds")
        return value

    @field_validator("timezone")
    @classmethod
    def _zone_of_unit(cls, value: str | None, info: ValidationInfo) -> str | None:
        if "unit" not in info.data:
            return value
        if value is not None and info.data["unit"] is None:
            raise ValueError("a refill has a timezone only with a unit")
        return value or ("UTC" if info.data["unit"] is not None else None)


class Total(_Model):
    """No window: usage stays, except for amounts that `refill` gives back."""

    kind: Literal["total"] = "total"
    refill: Refill | None = None


def _known_kind(value: Any) -> Any:
    if isinstance(value, _Model):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"found {_short(value)}, expected an object with a kind: {_listed(KINDS)}")
    if "kind" not in value:
        raise _at(("kind",), f"is required: one of {_listed(KINDS)}")
    if value["kind"] not in KINDS:
        raise _at(("kind",), f"found {_short(value['kind'])}, expected one of {_listed(KINDS)}")
    return value


Window = Annotated[
    Annotated[Rolling | Anchored | Calendar | Total, Field(discriminator="kind")], BeforeValidator(_known_kind)
]


def _at(location: tuple[str | int, ...], message: str) -> ValidationError:
    """A problem of a part of what a validator looks at: Pydantic puts the path of the whole before it."""
    problem = PydanticCustomError("value_error", "{message}", {"message": message})
    return ValidationError.from_exception_data("limit", [InitErrorDetails(type=problem, loc=location, input=None)])


def _short(value: Any) -> str:
    return repr(value[:64]) if isinstance(value, str) else kind_of(value)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


@functools.cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


def _amounts(schema: dict[str, Any]) -> dict[str, Any]:
    """What holds of a limit's amount and of its refill's alike, as JSON Schema has it."""
    return {"limit": schema, "window": {"properties": {"refill": {"properties": {"amount": schema}}}}}


class Limit(_Model):
    """At most `limit` of `resource` in each `window`. For the resource `cost` the limit is money, with up to 9
    decimals.

    `concurrency` counts open reservations and needs no window (`total` is accepted). `models` and `routes` restrict the
    limit; none means all, and a name may end in `*`.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"resource": {"const": MONEY}}},
            "then": {"properties": _amounts({"maximum": MAX_AMOUNT // 10**6})},
            "else": {"properties": _amounts({"type": "integer"})},
            "anyOf": [{"required": ["window"]}, {"properties": {"resource": {"const": CONCURRENCY}}}],
        }
    )
    told = ("window",)

    resource: str = Field(pattern=RESOURCE_PATTERN)
    limit: ExactAmount
    window: Window = Field(default=None, validate_default=True)
    models: tuple[ScopeName, ...] = Field((), json_schema_extra={"maxItems": MAX_SCOPE_NAMES})
    routes: tuple[ScopeName, ...] = Field((), json_schema_extra={"maxItems": MAX_SCOPE_NAMES})

    def applies(self, model: str | None, route: str | None) -> bool:
        """Whether a call that names this model and this route is counted. A limit with models counts no call that names
        none, and so with routes. A name in the list may end in `*`."""
        return (not self.models or _named(self.models, model)) and (not self.routes or _named(self.routes, route))

    @field_validator("limit")
    @classmethod
    def _amount(cls, value: int | Decimal, info: ValidationInfo) -> int | Decimal:
        to_units(info.data.get("resource", ""), value)  # without one, that is another problem, and told as well
        return value

    @field_validator("window", mode="before")
    @classmethod
    def _has_window(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        if info.data.get("resource") == CONCURRENCY:
            return Total()
        raise ValueError(f"is required, with a kind: {_listed(KINDS)}")

    @field_validator("window")
    @classmethod
    def _fits_resource(cls, value: Window, info: ValidationInfo) -> Window:
        resource = info.data.get("resource")
        if resource == CONCURRENCY and value != Total():
            raise ValueError("concurrency counts open reservations: expected no window, or total without a refill")
        if resource is None or not isinstance(value, Total) or value.refill is None:
            return value
        try:
            units = to_units(resource, value.refill.amount)
        except ValueError as error:
            raise _at(("refill", "amount"), str(error)) from None
        amount = Decimal(from_units(resource, units)) if resource == MONEY else units
        return Total(refill=value.refill.model_copy(update={"amount": amount}))

    @field_validator("models", "routes")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > MAX_SCOPE_NAMES:
            raise ValueError(f"found {len(value)} names, expected at most {MAX_SCOPE_NAMES}")
        for name in value:
            if not 1 <= len(name) <= MAX_SCOPE_CHARS or not name.isprintable():
                raise ValueError(f"found {_short(name)}, expected 1 to {MAX_SCOPE_CHARS} printable characters")
            if "*" in name[:-1]:
                raise ValueError(f"found {_short(name)}, expected * only at the end")
        return tuple(dict.fromkeys(value))

    @property
    def id(self) -> str:
        """Names the counter: the same resource and window, of the same models and routes, is the same counter, whatever
        its limit and its refill are changed to."""
        window = self.window
        match window:
            case Rolling() | Anchored():
                base = f"{self.resource}|{window.kind}|{window.seconds}"
            case Calendar():
                base = f"{self.resource}|calendar|{window.unit}|{window.timezone}"
            case _:
                base = f"{self.resource}|total"
        if not self.models and not self.routes:
            return base
        scope = json.dumps([sorted(self.models), sorted(self.routes)])
        return f"{base}|for|{hashlib.sha256(scope.encode()).hexdigest()[:32]}"  # short: the names may be thousands


LimitLike = Limit | Mapping[str, Any]
"""A limit as callers of the library give it: as an object, or as its fields."""


def distinct(limits: list[Limit]) -> list[Limit]:
    """The limits of one key or quota. ValueError for names that cannot be stored, and for two limits that would share
    one counter."""
    seen: set[str] = set()
    for limit in limits:
        for name in (*limit.models, *limit.routes):
            if problem := name_problem(name, MAX_ID_BYTES):
                raise ValueError(problem)
        if limit.id in seen:
            raise ValueError(f"found two limits on {limit.resource} with the same window")
        seen.add(limit.id)
    return limits


def _named(names: tuple[str, ...], name: str | None) -> bool:
    if name is None:
        return False
    return any(name == one or (one.endswith("*") and name.startswith(one[:-1])) for one in names)


def to_units(resource: str, amount: object) -> int:
    """An amount as units. ValueError, with what was found and expected, for what is not exact or not possible."""
    if isinstance(amount, bool) or not isinstance(amount, int | float | Decimal):
        raise ValueError(f"found {kind_of(amount)}, expected a number")
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
