"""Where a limit stands, as callers are shown it, and why it denied. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from ..context import utc_from_us
from .lease import Share
from .usage_state import CONCURRENCY, Allowance, Status
from .windows import MONEY, Amount, Window, from_units


class LimitStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one limit stands. `used` is what was `recorded`, is `reserved` (held by reservations that are open), and is
    `leased` (lent to other nodes, which have not given it back yet). `resets_at`: when what was recorded next falls.
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
        status.allowance, status.recorded, status.reserved, status.leased, resets_at, exceeded=status.exceeded
    )


def share_status(share: Share) -> LimitStatus:
    """Where a limit stands that was charged from memory."""
    recorded, reserved = share.recorded + share.spent, share.reserved + share.held
    return _status(share.allowance, recorded, reserved, share.leased, share.resets_at)


def _status(
    allowance: Allowance,
    recorded: int,
    reserved: int,
    leased: int,
    resets_at: datetime | None,
    exceeded: bool = False,
) -> LimitStatus:
    limit, most = allowance.limit, allowance.most
    used = recorded + reserved + leased
    remaining = most - used if used < most else 0
    if allowance.resource != MONEY:
        return LimitStatus(
            allowance.resource,
            most,
            used,
            remaining,
            recorded,
            reserved,
            leased,
            allowance.window,
            resets_at,
            allowance.subject,
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
        allowance.window,
        resets_at,
        allowance.subject,
        exceeded,
        limit.models,
        limit.routes,
    )


def explain_denial(status: Status, cost: Mapping[str, int]) -> str:
    """Why a limit denied a call of this cost, and when it frees."""
    allowance = status.allowance
    resource = allowance.resource
    used, most = from_units(resource, status.used), from_units(resource, allowance.most)
    asked = from_units(resource, cost.get(resource, 0))
    when = (
        f"frees at {utc_from_us(status.frees_at_us).isoformat()}" if status.frees_at_us else "waiting does not free it"
    )
    whose = "" if allowance.subject == "key" else f" of {allowance.subject}"
    if resource == CONCURRENCY:
        return f"concurrency{whose}: {used} of {most} in use, {asked} more asked; {when}"
    parts = f"{used} of {most} used in {describe(allowance.limit.window)}, {asked} more asked; {when}"
    if status.reserved or status.leased:
        held = f"{from_units(resource, status.reserved)} reserved, {from_units(resource, status.leased)} leased"
        parts += f" ({held})"
    return f"{resource}{whose}: {parts}"


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


__all__ = ["LimitStatus", "describe", "explain_denial", "limit_status", "share_status"]
