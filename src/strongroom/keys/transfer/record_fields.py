"""The fields that a line of a record file may have, each with its bounds."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator

from ...access import ALL_TENANTS
from ...context import MAX_TENANT_BYTES, name_problem
from ...entities import no_number
from ...limits import MAX_LIMITS, SATURATED, Limit
from ...quotas import QuotaKind
from ..model import Environment, KeyFields
from .record_lines import TIMES

MAX_COUNTERS = 200
MAX_BUCKETS = 1_000
MAX_MONTHS = 120
_MONTH = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])")
MAX_DISPLAY_CHARS = 64


class _ToldLine(BaseModel):
    """The thresholds of a limit whose alerts were sent (`alerts.Told`)."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    most: int = Field(ge=0, le=SATURATED)
    ends: int | None = Field(ge=0, le=SATURATED)
    at: dict[str, int] = Field(max_length=MAX_COUNTERS)


class UsageLine(BaseModel):
    """The usage of a key or quota, as a store keeps it: amounts are units (billionths of money), `at` microseconds
    since the epoch, each counter's state in the form of `counters.py`."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    count: int = Field(default=0, ge=0, le=SATURATED)
    last_used_at: datetime | None = None
    totals: dict[str, int] = Field(default={}, max_length=MAX_COUNTERS)
    counters: dict[str, list[Any]] = Field(default={}, max_length=MAX_COUNTERS)
    at: int = Field(default=0, ge=0, le=SATURATED)
    told: dict[str, _ToldLine] = Field(default={}, max_length=MAX_COUNTERS)
    months: dict[str, dict[str, int]] = Field(default={}, max_length=MAX_MONTHS)

    @field_validator("last_used_at", mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        return no_number(value)

    @field_validator("last_used_at")
    @classmethod
    def _plausible(cls, value: datetime | None) -> datetime | None:
        return _moment(value)

    @field_validator("totals")
    @classmethod
    def _counted(cls, value: dict[str, int]) -> dict[str, int]:
        for name, units in value.items():
            if not 0 <= units <= SATURATED:
                raise ValueError(f"found {units} of {name[:64]!r}, expected 0 to {SATURATED}")
        return value

    @field_validator("months")
    @classmethod
    def _by_month(cls, value: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        for month, totals in value.items():
            if _MONTH.fullmatch(month) is None:
                raise ValueError(f"found {month[:16]!r}, expected a month such as 2026-11")
            cls._counted(totals)
        return value

    @field_validator("counters")
    @classmethod
    def _states(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for id, state in value.items():
            if problem := state_problem(state):
                raise ValueError(f"{id[:64]!r}: {problem}")
        return value


class KeyLine(KeyFields):
    """The fields of a key that a line may have, without the fields that identify it."""

    tenant: str | None = None
    enabled: StrictBool = True
    environment: Environment = "live"
    created_at: datetime | None = None
    last_used: datetime | None = None
    usage_count: int = Field(default=0, ge=0, le=SATURATED)
    previous_until: datetime | None = None
    next_rotation_at: datetime | None = None
    leaked_at: datetime | None = None
    deleted_at: datetime | None = None
    display: str | None = Field(default=None, min_length=1, max_length=MAX_DISPLAY_CHARS)
    usage: UsageLine | None = None

    @field_validator(
        "created_at", "last_used", "previous_until", "next_rotation_at", "leaked_at", "deleted_at", mode="before"
    )
    @classmethod
    def _no_numbers(cls, value: Any) -> Any:
        return no_number(value)

    @field_validator("tenant")
    @classmethod
    def _one_tenant(cls, value: str | None) -> str | None:
        return _tenant(value)

    @field_validator(*TIMES, check_fields=False)
    @classmethod
    def _plausible(cls, value: datetime | None) -> datetime | None:
        return _moment(value)


class QuotaLine(BaseModel):
    """The fields of a quota that a line may have."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    tenant: str | None = None
    kind: QuotaKind
    name: str = ""
    limits: list[Limit] = Field(default=[], max_length=MAX_LIMITS)
    description: str | None = Field(default=None, max_length=2_000)
    created_at: datetime | None = None
    usage: UsageLine | None = None

    @field_validator("tenant")
    @classmethod
    def _one_tenant(cls, value: str | None) -> str | None:
        if value == ALL_TENANTS:
            raise ValueError(f"found {value!r}, expected one tenant: a quota is of a tenant's own keys")
        return _tenant(value)

    @field_validator("created_at")
    @classmethod
    def _plausible(cls, value: datetime | None) -> datetime | None:
        return _moment(value)


def _tenant(value: str | None) -> str | None:
    if value is not None and (problem := name_problem(value, MAX_TENANT_BYTES)):
        raise ValueError(problem)
    if value == ALL_TENANTS:
        raise ValueError("keys for all tenants are management keys: they are not imported")
    return value


def _moment(value: datetime | None) -> datetime | None:
    if value is None:
        return None
    if value.utcoffset() is None:
        raise ValueError("found a time without a zone, expected one with (for example 2027-01-01T00:00:00Z)")
    if not 1971 <= value.year <= 9998:
        raise ValueError(f"found the year {value.year}, expected 1971 to 9998")
    return value.astimezone(UTC)


def state_problem(state: list[Any]) -> str | None:
    """Why a value is no counter's state. A state is whole numbers, or two lists of them, the first one rising."""
    parts = state if all(isinstance(part, list) for part in state) else [state]
    if len(state) > MAX_BUCKETS or any(len(part) > MAX_BUCKETS for part in parts):
        return f"expected at most {MAX_BUCKETS} numbers"
    if not all(type(number) is int and 0 <= number <= SATURATED for part in parts for number in part):
        return "expected whole numbers"
    if parts is state and state:
        if len(parts) != 2 or len(parts[0]) != len(parts[1]):
            return "expected two lists of one length"
        if any(a >= b for a, b in zip(parts[0], parts[0][1:], strict=False)):
            return "expected the buckets in order"
    return None
