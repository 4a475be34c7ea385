"""The answer to "may this key be used now?": a key in memory as that question needs it, and the answers. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Literal

import msgspec

from .apikey import NAME, ApiKey
from .context import us_from_utc, utc_from_us
from .errors import InvalidInput, Problem
from .storage.port import Check
from .usage import Allowance, Metered, Outcome, Status
from .windows import MAX_AMOUNT, MONEY, RESOURCE_PATTERN, Amount, Window, from_units, to_units

MAX_RESOURCES = 32
_RESOURCE = re.compile(RESOURCE_PATTERN)

Network = IPv4Network | IPv6Network
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


class LimitStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one limit stands. `resets_at`: when `used` next falls. `exceeded`: this limit denied the call."""

    resource: str
    limit: Amount
    used: Amount
    remaining: Amount
    window: dict[str, Any]
    resets_at: datetime | None
    exceeded: bool = False


class Verification(msgspec.Struct, frozen=True):
    """The answer to a verification. Only VALID debits anything.

    `retry_after_s`: seconds until the same call would be admitted if nothing else is used; None if waiting does not
    help. `message` explains a refusal.
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


class KnownKey:
    """A key as verification needs it, kept in memory until it is changed (`stale`)."""

    __slots__ = (
        "checked_at",
        "enabled",
        "expires_us",
        "held",
        "id",
        "metadata",
        "metered",
        "networks",
        "permissions",
        "stale",
        "tenant",
        "user_id",
        "windows",
    )

    def __init__(self, key: ApiKey) -> None:
        self.id = key.id
        self.tenant = key.tenant
        self.user_id = key.user_id
        self.permissions = key.permissions
        self.held = tuple(key.permissions)  # answers hand `permissions` out; what a caller does to it grants nothing
        self.metadata = key.metadata
        self.networks: list[Network] = [_network(item) for item in key.allowed_ips]
        self.enabled = key.enabled
        self.expires_us = us_from_utc(key.expires_at) if key.expires_at is not None else None
        self.metered = metered(key)
        self.windows = [limit.window.model_dump() for limit in key.limits]
        self.stale = False
        self.checked_at = 0.0  # by time.monotonic: when it was last compared with the store, beside the feed of changes

    def permits(self, permission: str) -> bool:
        """Whether the key has a permission: by name, or by one that ends in `*`."""
        return any(
            held == permission or (held.endswith("*") and permission.startswith(held[:-1])) for held in self.held
        )

    def refusal(self, now_us: int, permission: str | None, address: str | None) -> tuple[Code, str] | None:
        """Why the key may not be used at all, before any limit is asked; None if it may."""
        if not self.enabled:
            return "DISABLED", "the key is disabled"
        if self.expires_us is not None and now_us >= self.expires_us:
            return "EXPIRED", f"the key expired at {utc_from_us(self.expires_us).isoformat()}"
        if permission is not None and not self.permits(permission):
            return "INSUFFICIENT_PERMISSIONS", f"the key lacks the permission {permission!r}"
        if self.networks and not _allowed(self.networks, address):
            return "FORBIDDEN", "the key may not be used from this address"
        return None


def metered(key: ApiKey) -> Metered:
    """A key as the ledger needs it."""
    allowances = tuple(
        Allowance(limit, limit.id, limit.resource, to_units(limit.resource, limit.limit)) for limit in key.limits
    )
    return Metered(key.id, Check(NAME, key.id, key.version), allowances)


def _network(text: str) -> Network:
    """A range; an IPv4 range written as IPv6 (::ffff:10.0.0.0/104) as what it is, since addresses are compared so."""
    network = ip_network(text, strict=False)
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return IPv4Network((mapped, network.prefixlen - 96))
    return network


def _allowed(networks: Sequence[Network], address: str | None) -> bool:
    if address is None:
        return False
    found = ip_address(address)
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found.version == network.version and found in network for network in networks)


# --- What callers say ------------------------------------------------------------------------------------------


ONE_REQUEST: dict[str, int] = {"requests": 1}


def cost_units(cost: Mapping[str, Any]) -> dict[str, int]:
    """A cost as units. InvalidInput names every amount that is wrong."""
    units: dict[str, int] = {}
    problems: list[Problem] = []
    if len(cost) > MAX_RESOURCES:
        raise InvalidInput([Problem("cost", f"found {len(cost)} resources, expected at most {MAX_RESOURCES}")])
    for name, amount in cost.items():
        if type(amount) is int and 0 <= amount <= MAX_AMOUNT and name != MONEY and _RESOURCE.fullmatch(name):
            units[name] = amount
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
    try:
        ip_address(ip)
    except ValueError:
        raise InvalidInput([Problem("ip", f"found {ip[:64]!r}, expected an IPv4 or IPv6 address")]) from None


# --- Answers ---------------------------------------------------------------------------------------------------

NOT_FOUND = Verification(False, "NOT_FOUND", message="there is no such key")


def limit_status(status: Status, window: dict[str, Any]) -> LimitStatus:
    allowance = status.allowance
    resource = allowance.resource
    most, used = allowance.most, status.used
    remaining = most - used if used < most else 0
    resets = status.resets_at_us
    if resource == MONEY:
        return LimitStatus(
            resource,
            from_units(resource, most),
            from_units(resource, used),
            from_units(resource, remaining),
            window,
            None if resets is None else utc_from_us(resets),
            status.exceeded,
        )
    return LimitStatus(
        resource, most, used, remaining, window, None if resets is None else utc_from_us(resets), status.exceeded
    )


def _statuses(key: KnownKey, statuses: Sequence[Status]) -> list[LimitStatus]:
    return [limit_status(status, window) for status, window in zip(statuses, key.windows, strict=True)]


def admitted(key: KnownKey, statuses: Sequence[Status]) -> Verification:
    return Verification(
        True, "VALID", key.id, key.tenant, key.user_id, key.permissions, key.metadata, _statuses(key, statuses)
    )


def refused(key: KnownKey, code: Code, message: str) -> Verification:
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
        _statuses(key, outcome.statuses),
        retry_after_s,
        message,
    )


def _explained(status: Status, cost: Mapping[str, int]) -> str:
    allowance = status.allowance
    resource = allowance.resource
    used, most = from_units(resource, status.used), from_units(resource, allowance.most)
    asked = from_units(resource, cost.get(resource, 0))
    when = (
        f"frees at {utc_from_us(status.frees_at_us).isoformat()}" if status.frees_at_us else "waiting does not free it"
    )
    return f"{resource}: {used} of {most} used in {describe(allowance.limit.window)}, {asked} more asked; {when}"


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
