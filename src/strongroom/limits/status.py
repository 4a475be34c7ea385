"""Where a limit stands, as callers are shown it, and why it denied. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from ..context import utc_from_us
from .lease import LeasedLimit
from .usage_state import CONCURRENCY, CompiledLimit, Status
from .windows import MONEY, Amount, Window, from_units


class LimitStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one limit stands. `used` is what was `recorded`, is `reserved` (held by reservations that are open), and is
    `leased` (to other nodes, which have not returned it yet). `resets_at`: when what was recorded next falls.
    `subject`: whose limit it is, `key` or a quota. `exceeded`: this limit denied the call."""

    resource: str
    limit: Amount
    used: Amount
    remaining: Amount
    recorded: Amount
    reserved: Amount
    leased: Amount
    window: dict[str, Any]
    resets_at: datetime | None
    subject: str = "key"
    exceeded: bool = False
    models: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()


def limit_status(status: Status) -> LimitStatus:
    """Where a limit stands, as it is shown."""
    resets_at = None if status.resets_at_us is None else utc_from_us(status.resets_at_us)
    return _status(
        status.compiled_limit, status.recorded, status.reserved, status.leased, resets_at, exceeded=status.exceeded
    )


def leased_status(leased_limit: LeasedLimit) -> LimitStatus:
    """Where a limit stands that was charged from memory."""
    recorded, reserved = leased_limit.recorded + leased_limit.spent, leased_limit.reserved + leased_limit.held
    return _status(leased_limit.compiled_limit, recorded, reserved, leased_limit.leased, leased_limit.resets_at)


def _status(
    compiled_limit: CompiledLimit,
    recorded: int,
    reserved: int,
    leased: int,
    resets_at: datetime | None,
    exceeded: bool = False,
) -> LimitStatus:
    limit, most = compiled_limit.limit, compiled_limit.most
    used = recorded + reserved + leased
    remaining = most - used if used < most else 0
    if compiled_limit.resource != MONEY:
        return LimitStatus(
            compiled_limit.resource,
            most,
            used,
            remaining,
            recorded,
            reserved,
            leased,
            compiled_limit.window,
            resets_at,
            compiled_limit.subject,
            exceeded,
            limit.models,
            limit.routes,
        )
    return LimitStatus(
        MONEY,
        from_units(MONEY, most),
        from_units(MONEY, used),
        from_units(MONEY, remaining),
        from_units(MONEY, recorded),
        from_units(MONEY, reserved),
        from_units(MONEY, leased),
        compiled_limit.window,
        resets_at,
        compiled_limit.subject,
        exceeded,
        limit.models,
        limit.routes,
    )


def explain_denial(status: Status, cost: Mapping[str, int]) -> str:
    """Why a limit denied a call of this cost, and when it frees."""
    compiled_limit = status.compiled_limit
    resource = compiled_limit.resource
    used, most = from_units(resource, status.used), from_units(resource, compiled_limit.most)
    asked = from_units(resource, cost.get(resource, 0))
    when = (
        f"frees at {utc_from_us(status.frees_at_us).isoformat()}" if status.frees_at_us else "waiting does not free it"
    )
    whose = "" if compiled_limit.subject == "key" else f" of {compiled_limit.subject}"
    if resource == CONCURRENCY:
        return f"concurrency{whose}: {used} of {most} in use, {asked} more asked; {when}"
    subjects = f"{used} of {most} used in {describe(compiled_limit.limit.window)}, {asked} more asked; {when}"
    if status.reserved or status.leased:
        held = f"{from_units(resource, status.reserved)} reserved, {from_units(resource, status.leased)} leased"
        subjects += f" ({held})"
    return f"{resource}{whose}: {subjects}"


def describe(window: Window) -> str:
    """A window in words."""
    match window.kind:
        case "rolling":
            return f"the last {window.seconds} s (rolling window)"
        case "anchored":
            return f"{window.seconds} s from the first use (anchored window)"
        case "calendar":
            return f"this calendar {window.unit} ({window.timezone})"
        case _:
            return "total (no window)"


__all__ = ["LimitStatus", "describe", "explain_denial", "leased_status", "limit_status"]
