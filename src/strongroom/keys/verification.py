"""What a caller asks of a key, the order of the checks, and the answer. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from ipaddress import ip_address
from typing import Any, Literal

import msgspec

from ..client_address import MAX_ADDRESS_CHARS
from ..context import utc_from_us
from ..entities import RESOURCE_PATTERN
from ..errors import InvalidInput, Problem
from ..limits import (
    MAX_AMOUNT,
    MONEY,
    AdmissionDecision,
    Amount,
    Entries,
    LimitStatus,
    Status,
    explain_denial,
    leased_status,
    limit_status,
    to_units,
)
from ..limits.usage_state import CONCURRENCY
from .cached_key import CachedKey, names

MAX_RESOURCES = 32
MAX_SHOWN = 100
"""Characters that a refusal shows of the model or route that was asked for."""
Code = Literal[
    "VALID",
    "NOT_FOUND",
    "DISABLED",
    "EXPIRED",
    "INSUFFICIENT_PERMISSIONS",
    "FORBIDDEN",
    "RATE_LIMITED",
    "USAGE_EXCEEDED",
]
_RESOURCE = re.compile(RESOURCE_PATTERN)


class Verification(msgspec.Struct, frozen=True):
    """The answer to a verification. Only VALID debits anything.

    `retry_after_s`: seconds until the same call would be admitted if nothing else is used; None if waiting does not
    help. `message` explains a refusal. `uncounted`: the resources of the cost that no limit of the key counts, for any
    model and route: perhaps their names are misspelled.
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
    """The answer to `reserve`, and to each later call on the reservation. `state`: `open`, `settled` or `released`;
    None if it was refused. `charged`: all that was used of it so far."""

    reservation_id: str | None = None
    state: str | None = None
    expires_at: datetime | None = None
    charged: dict[str, Amount] = {}


# --- Requests ---------------------------------------------------------------------------------------------------


ONE_REQUEST: dict[str, int] = {"requests": 1}


MAX_NAMES_KEPT = 1_000
_counted: set[str] = set()
"""Names of resources that were checked. Other names are not kept: a name may be as long as a request."""


def _is_counted(name: str) -> bool:
    """Whether a name is a resource that is used up in whole numbers."""
    if name in (MONEY, CONCURRENCY) or _RESOURCE.fullmatch(name) is None:
        return False
    if len(_counted) >= MAX_NAMES_KEPT:
        _counted.clear()
    _counted.add(name)
    return True


def cost_units(cost: Mapping[str, Any], *, reserving: bool = False) -> dict[str, int]:
    """A cost in units. Raises InvalidInput with every problem. `reserving`: the cost may name `concurrency`."""
    units: dict[str, int] = {}
    problems: list[Problem] = []
    if len(cost) > MAX_RESOURCES:
        raise InvalidInput([Problem("cost", f"found {len(cost)} resources, expected at most {MAX_RESOURCES}")])
    for name, amount in cost.items():
        if type(amount) is int and 0 <= amount <= MAX_AMOUNT and (name in _counted or _is_counted(name)):
            units[name] = amount
            continue
        if name == CONCURRENCY and not reserving:
            problems.append(Problem("cost.concurrency", "is held by reservations only: reserve it"))
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
        if len(ip) > MAX_ADDRESS_CHARS:  # not cached: an IPv6 zone may be as long as a request
            ip_address(ip)
        else:
            _check_address(ip)
    except ValueError:
        raise InvalidInput([Problem("ip", f"found {ip[:64]!r}, expected an IPv4 or IPv6 address")]) from None


@functools.lru_cache(maxsize=4_096)
def _check_address(ip: str) -> None:
    ip_address(ip)


class KeyUse(msgspec.Struct, frozen=True, gc=False):
    """One use of a key, as a caller asks for it: its cost, and what the key must allow. `tenant`: only a key of this
    tenant is found."""

    units: dict[str, int]
    permission: str | None = None
    address: str | None = None
    model: str | None = None
    route: str | None = None
    tenant: str | None = None


def key_use(
    cost: Mapping[str, Any] | None,
    permission: str | None,
    ip: str | None,
    model: str | None,
    route: str | None,
    tenant: str | None = None,
) -> KeyUse:
    """A use as callers describe it; without a cost it is one request. Raises InvalidInput."""
    units = ONE_REQUEST if cost is None else cost_units(cost)
    if ip is not None:
        check_address(ip)
    return KeyUse(units, permission, ip, model, route, tenant)


# --- The decision -----------------------------------------------------------------------------------------------

NOT_FOUND = Verification(False, "NOT_FOUND", message="there is no such key")


def usable(key: CachedKey | None, use: KeyUse, now_us: int) -> CachedKey | Verification:
    """The key, if it allows this use and only its limits are left to check; else the refusal.

    Every decision on a key goes through here, so all calls check in the same order. The limits come last: a refused use
    costs nothing.
    """
    if key is None or key.deleted or (use.tenant is not None and key.tenant != use.tenant):
        return NOT_FOUND
    if not key.enabled:
        return refused(key, "DISABLED", key.suspended or "the key is disabled")
    if key.expires_us is not None and now_us >= key.expires_us:
        return refused(key, "EXPIRED", f"the key expired at {utc_from_us(key.expires_us).isoformat()}")
    if use.permission is not None and not key.permits(use.permission):
        return refused(key, "INSUFFICIENT_PERMISSIONS", f"the key lacks the permission {use.permission!r}")
    if key.models and not names(key.models, use.model):
        return _outside(key, "model", use.model)
    if key.routes and not names(key.routes, use.route):
        return _outside(key, "route", use.route)
    if key.networks and not key.allows(use.address):
        return refused(key, "FORBIDDEN", "the key may not be used from this address")
    return key


def _outside(key: CachedKey, what: str, asked: str | None) -> Verification:
    found = f"not for {asked[:MAX_SHOWN]!r}" if asked is not None else "and none was named"
    return refused(key, "INSUFFICIENT_PERMISSIONS", f"the key is for certain {what}s, {found}")


def decided(key: CachedKey, outcome: AdmissionDecision, units: Mapping[str, int] = ONE_REQUEST) -> Verification:
    """The answer, from the decision of the limits."""
    return admitted(key, outcome.statuses, units) if outcome.allowed else exceeded(key, outcome, units)


# --- Answers ----------------------------------------------------------------------------------------------------


def _shown(statuses: Iterable[Status]) -> list[LimitStatus]:
    return [limit_status(status) for status in statuses]


def uncounted(key: CachedKey, cost: Iterable[str]) -> list[str]:
    """The resources of a cost that no limit of a key counts."""
    counted = key.subjects.counted
    return [name for name in cost if name not in counted]


def admitted(key: CachedKey, statuses: Sequence[Status], cost: Mapping[str, int] = ONE_REQUEST) -> Verification:
    """VALID, with the state of the limits after a commit."""
    return _valid(key, _shown(statuses), cost)


def admitted_from(key: CachedKey, entries: Entries, cost: Mapping[str, int] = ONE_REQUEST) -> Verification:
    """VALID, charged from this process's leases."""
    return _valid(key, [leased_status(leased_limit) for leased_limit, _ in entries], cost)


def _valid(key: CachedKey, limits: list[LimitStatus], cost: Mapping[str, int]) -> Verification:
    if cost is ONE_REQUEST or key.subjects.counted.issuperset(cost):
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


def refused(key: CachedKey, code: Code, message: str) -> Verification:
    """The refusal of a key for another reason than its limits."""
    return Verification(False, code, key.id, key.tenant, key.user_id, key.permissions, key.metadata, [], None, message)


def exceeded(key: CachedKey, outcome: AdmissionDecision, cost: Mapping[str, int]) -> Verification:
    """The refusal of a key by its limits."""
    denied = [status for status in outcome.statuses if status.exceeded]
    first = denied[0].compiled_limit.resource
    code: Code = "RATE_LIMITED" if first in ("requests", "concurrency") else "USAGE_EXCEEDED"
    frees = [status.frees_at_us for status in denied]
    retry_after_s = None
    if None not in frees:
        retry_after_s = max(0, max(f for f in frees if f is not None) - outcome.now_us) / 1_000_000
    message = "; ".join(explain_denial(status, cost) for status in denied)
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
