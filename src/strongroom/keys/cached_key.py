"""A key in memory, as a verification needs it: who it is, what it may do, and what its limits are. Pure."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal

from ..context import us_from_utc, utc_from_us
from ..limits import Allowance, Limit, Metered, Part, allowances, part
from ..quotas import Quota, quota_id
from ..quotas.model import NAME as QUOTAS
from ..storage.port import Check
from .model import NAME, ApiKey

MAX_SHOWN = 100
"""Characters shown of a model or route that was asked for."""
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


class KnownKey:
    """A key as verification needs it, kept in memory until it is changed (`stale`)."""

    __slots__ = (
        "checked_at",
        "deleted",
        "enabled",
        "expires_us",
        "held",
        "id",
        "metadata",
        "metered",
        "models",
        "networks",
        "permissions",
        "routes",
        "stale",
        "subjects",
        "tenant",
        "user_id",
    )

    def __init__(self, key: ApiKey, quotas: Sequence[Quota] = ()) -> None:
        self.id = key.id
        self.tenant = key.tenant
        self.user_id = key.user_id
        self.permissions = key.permissions
        self.held = tuple(key.permissions)  # answers hand `permissions` out; what a caller does to it grants nothing
        self.metadata = key.metadata
        self.networks: list[Network] = [_network(item) for item in key.allowed_ips]
        self.models = tuple(key.allowed_models)
        self.routes = tuple(key.allowed_routes)
        self.deleted = key.deleted_at is not None
        self.enabled = key.enabled
        self.expires_us = us_from_utc(key.expires_at) if key.expires_at is not None else None
        self.metered = metered(key, quotas)
        self.subjects = subjects(key)
        self.stale = False
        self.checked_at = 0.0  # by time.monotonic: when it was last compared with the store, beside the feed of changes

    def permits(self, permission: str) -> bool:
        """Whether the key has a permission: by name, or by one that ends in `*`."""
        return names(self.held, permission)

    def allows(self, address: str | None) -> bool:
        """Whether the key may be used from an address (None: it is not known)."""
        return not self.networks or _allowed(self.networks, address)

    def refusal(
        self,
        now_us: int,
        permission: str | None,
        address: str | None,
        model: str | None = None,
        route: str | None = None,
    ) -> tuple[Code, str] | None:
        """Why the key may not be used at all, before any limit is asked; None if it may."""
        if self.deleted:
            return "NOT_FOUND", "there is no such key"
        if not self.enabled:
            return "DISABLED", "the key is disabled"
        if self.expires_us is not None and now_us >= self.expires_us:
            return "EXPIRED", f"the key expired at {utc_from_us(self.expires_us).isoformat()}"
        if permission is not None and not self.permits(permission):
            return "INSUFFICIENT_PERMISSIONS", f"the key lacks the permission {permission!r}"
        for what, allowed, asked in (("model", self.models, model), ("route", self.routes, route)):
            if allowed and not names(allowed, asked):
                found = f"not for {asked[:MAX_SHOWN]!r}" if asked is not None else "and none was named"
                return "INSUFFICIENT_PERMISSIONS", f"the key is for certain {what}s, {found}"
        if self.networks and not _allowed(self.networks, address):
            return "FORBIDDEN", "the key may not be used from this address"
        return None


def names(patterns: Sequence[str], name: str | None) -> bool:
    """Whether one of the patterns is this name, or ends in `*` and begins it."""
    return name is not None and any(
        pattern == name or (pattern.endswith("*") and name.startswith(pattern[:-1])) for pattern in patterns
    )


def metered(key: ApiKey, quotas: Sequence[Quota] = ()) -> Metered:
    """A key as the ledger needs it, with the quotas that it shares with others."""
    shared = tuple(quota_part(quota) for quota in quotas if quota.limits)
    return Metered(key.id, Check(NAME, key.id, key.version), _interned(tuple(key.limits)), shared, key.tenant)


@functools.lru_cache(maxsize=4_096)
def _interned(limits: tuple[Limit, ...]) -> tuple[Allowance, ...]:
    """Their allowances, the same objects for every key with the same limits: these are most of what a cached key is."""
    return allowances(limits)


def quota_part(quota: Quota) -> Part:
    """A quota as the ledger needs it."""
    return part(quota.id, Check(QUOTAS, quota.id, quota.version), allowances(quota.limits, quota.subject), quota.tenant)


def subjects(key: ApiKey) -> tuple[str, ...]:
    """The ids of all quotas that a key is counted against, where there are such."""
    groups = tuple(quota_id("group", key.tenant, name) for name in key.groups)
    user = () if key.user_id is None else (quota_id("user", key.tenant, key.user_id),)
    return (*groups, *user, quota_id("tenant", key.tenant))


def _network(text: str) -> Network:
    """A range; an IPv4 range written as IPv6 (::ffff:10.0.0.0/104) as what it is, since addresses are compared so."""
    network = ip_network(text, strict=False)
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return IPv4Network((mapped, network.prefixlen - 96))
    return network


def is_allowed(allowed_ips: Sequence[str], address: str | None) -> bool:
    """Whether a key with these `allowed_ips` may be used from an address (None: it is not known)."""
    return not allowed_ips or _allowed([_network(item) for item in allowed_ips], address)


def _allowed(networks: Sequence[Network], address: str | None) -> bool:
    if address is None:
        return False
    found = ip_address(address)
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found.version == network.version and found in network for network in networks)
