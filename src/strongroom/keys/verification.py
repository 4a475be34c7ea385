"""The answer to "may this key be used now?", and what a caller says when asking. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from ipaddress import ip_address
from typing import Any

import msgspec

from ..client_address import MAX_ADDRESS_CHARS
from ..context import utc_from_us
from ..entities import RESOURCE_PATTERN
from ..errors import InvalidInput, Problem
from ..limits import (
    MAX_AMOUNT,
    MONEY,
    Allowance,
    Amount,
    Outcome,
    Share,
    Status,
    Window,
    from_units,
    to_units,
)
from ..limits.lease_manager import Entries
from ..limits.usage_state import CONCURRENCY
from .cached_key import Code, KnownKey

MAX_RESOURCES = 32
_RESOURCE = re.compile(RESOURCE_PATTERN)


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


class Verification(msgspec.Struct, frozen=True):
    """The answer to a verification. Only VALID debits anything.

    `retry_after_s`: seconds until the same call would be admitted if nothing else is used; None if waiting does not
    help. `message` explains a refusal. `uncounted`: the resources of the cost that no limit of the key counts, whatever
    the model and route: perhaps their names are written wrongly.
    """

    valid: bool
    code: Code
    key_id: str | None = None
    tenant: str | None = None
    user_id: str | None = None
    permissions: list[str] = []
    metadata: dict[str, Any] = {}
    limits: list[LimitStatus] = []
    retry_after_s: float | None = None
    message: str | None = None
    uncounted: list[str] = []


class Reservation(Verification, frozen=True, kw_only=True):
    """The answer to a reservation, and to what is done to it. `state`: `open`, `settled` or `released`; None if it was
    refused. `charged`: what was used of it in all so far."""

    reservation_id: str | None = None
    state: str | None = None
    expires_at: datetime | None = None
    charged: dict[str, Amount] = {}


# --- What callers say ------------------------------------------------------------------------------------------


ONE_REQUEST: dict[str, int] = {"requests": 1}


MAX_NAMES_KEPT = 1_000
_counted: set[str] = set()
"""Names that are known to be counted. None that is not is kept: it might be as long as a request."""


def _is_counted(name: str) -> bool:
    """Whether a name is a resource of whole numbers that can be used up."""
    if name in (MONEY, CONCURRENCY) or _RESOURCE.fullmatch(name) is None:
        return False
    if len(_counted) >= MAX_NAMES_KEPT:
        _counted.clear()
    _counted.add(name)
    return True


def cost_units(cost: Mapping[str, Any], *, reserving: bool = False) -> dict[str, int]:
    """A cost as units. InvalidInput names every amount that is wrong. `reserving`: `concurrency` may be among them."""
    units: dict[str, int] = {}
    problems: list[Problem] = []
    if len(cost) > MAX_RESOURCES:
        raise InvalidInput([Problem("cost", f"found {len(cost)} resources, expected at most {MAX_RESOURCES}")])
    for name, amount in cost.items():
        if type(amount) is int and 0 <= amount <= MAX_AMOUNT and (name in _counted or _is_counted(name)):
            units[name] = amount
            continue
        if name == CONCURRENCY and not reserving:
            problems.append(Problem("cost.concurrency", "is held by reservations, and not used up: reserve it"))
            continue
        if not _RESOURCE.fullmatch(name):
            problems.append(
                Problem(f"cost.{name[:64]}", "is not a resource: expected lower-case letters, digits and _ . : -")
            )
            continue
        try:
            units[name] = to_units(name, amount)
        except ValueError as error:
            problems.append(Problem(f"cost.{name}", str(error)))
    if problems:
        raise InvalidInput(problems)
    return units


def check_address(ip: str) -> None:
    """Raises InvalidInput for a text that is no address."""
    try:
        if len(ip) > MAX_ADDRESS_CHARS:  # not kept: an IPv6 zone may be as long as a request
            ip_address(ip)
        else:
            _check_address(ip)
    except ValueError:
        raise InvalidInput([Problem("ip", f"found {ip[:64]!r}, expected an IPv4 or IPv6 address")]) from None


@functools.lru_cache(maxsize=4_096)
def _check_address(ip: str) -> None:
    ip_address(ip)


# --- Answers ---------------------------------------------------------------------------------------------------

NOT_FOUND = Verification(False, "NOT_FOUND", message="there is no such key")


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


def _shown(statuses: Iterable[Status]) -> list[LimitStatus]:
    return [limit_status(status) for status in statuses]


def uncounted(key: KnownKey, cost: Iterable[str]) -> list[str]:
    """The resources of a cost that no limit of a key counts."""
    counted = key.metered.counted
    return [name for name in cost if name not in counted]


def admitted(key: KnownKey, statuses: Sequence[Status], cost: Mapping[str, int] = ONE_REQUEST) -> Verification:
    return _valid(key, _shown(statuses), cost)


def admitted_from(key: KnownKey, entries: Entries, cost: Mapping[str, int] = ONE_REQUEST) -> Verification:
    """VALID, charged from memory."""
    return _valid(key, [share_status(share) for share, _ in entries], cost)


def _valid(key: KnownKey, limits: list[LimitStatus], cost: Mapping[str, int]) -> Verification:
    if cost is ONE_REQUEST or key.metered.counted.issuperset(cost):
        return Verification(True, "VALID", key.id, key.tenant, key.user_id, key.permissions, key.metadata, limits)
    return Verification(
        True,
        "VALID",
        key.id,
        key.tenant,
        key.user_id,
        key.permissions,
        key.metadata,
        limits,
        None,
        None,
        uncounted(key, cost),
    )


def refused(key: KnownKey, code: Code, message: str) -> Verification:
    if code == "NOT_FOUND":  # it was deleted: nothing is told of it
        return NOT_FOUND
    return Verification(False, code, key.id, key.tenant, key.user_id, key.permissions, key.metadata, [], None, message)


def exceeded(key: KnownKey, outcome: Outcome, cost: Mapping[str, int]) -> Verification:
    denied = [status for status in outcome.statuses if status.exceeded]
    first = denied[0].allowance.resource
    code: Code = "RATE_LIMITED" if first in ("requests", "concurrency") else "USAGE_EXCEEDED"
    frees = [status.frees_at_us for status in denied]
    retry_after_s = None
    if None not in frees:
        retry_after_s = max(0, max(f for f in frees if f is not None) - outcome.now_us) / 1_000_000
    message = "; ".join(_explained(status, cost) for status in denied)
    return Verification(
        False,
        code,
        key.id,
        key.tenant,
        key.user_id,
        key.permissions,
        key.metadata,
        _shown(outcome.statuses),
        retry_after_s,
        message,
        [] if cost is ONE_REQUEST else uncounted(key, cost),
    )


def _explained(status: Status, cost: Mapping[str, int]) -> str:
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
