"""A key in memory, with what a verification needs: its identity, what it may do, and its limits. Pure."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from ..context import us_from_utc
from ..limits import CompiledLimit, Limit, Subjects, compile_limits
from ..quotas import Quota, quota_id, quota_subject
from ..storage.port import Check
from .model import NAME, ApiKey

Network = IPv4Network | IPv6Network


class CachedKey:
    """A key in memory. `stale`: the key was changed since, so this object must not decide anything any more.
    `suspended`: why its tenant is suspended; the key is then not `enabled`."""

    __slots__ = (
        "checked_at",
        "deleted",
        "enabled",
        "expires_us",
        "granted",
        "id",
        "metadata",
        "models",
        "networks",
        "permissions",
        "quota_ids",
        "routes",
        "stale",
        "subjects",
        "suspended",
        "tenant",
        "user_id",
    )

    def __init__(self, key: ApiKey, quotas: Sequence[Quota] = (), suspended: str | None = None) -> None:
        self.id = key.id
        self.tenant = key.tenant
        self.user_id = key.user_id
        self.permissions = key.permissions
        self.granted = tuple(
            key.permissions
        )  # answers contain `permissions`, and a caller that changes that list must gain nothing
        self.metadata = key.metadata
        self.networks: list[Network] = [_network(item) for item in key.allowed_ips]
        self.models = tuple(key.allowed_models)
        self.routes = tuple(key.allowed_routes)
        self.deleted = key.deleted_at is not None
        self.suspended = suspended
        self.enabled = key.enabled and suspended is None
        self.expires_us = us_from_utc(key.expires_at) if key.expires_at is not None else None
        self.subjects = subjects_of(key, quotas)
        self.quota_ids = quota_ids(key)
        self.stale = False
        self.checked_at = 0.0  # by time.monotonic, the last comparison with the store

    def permits(self, permission: str) -> bool:
        """Whether the key has a permission: by name, or by one that ends in `*`."""
        return names(self.granted, permission)

    def allows(self, address: str | None) -> bool:
        """Whether the key may be used from an address (None: it is not known)."""
        return not self.networks or _allowed(self.networks, address)


def names(patterns: Sequence[str], name: str | None) -> bool:
    """Whether one of the patterns is this name, or ends in `*` and begins it."""
    return name is not None and any(
        pattern == name or (pattern.endswith("*") and name.startswith(pattern[:-1])) for pattern in patterns
    )


def subjects_of(key: ApiKey, quotas: Sequence[Quota] = ()) -> Subjects:
    """A key as the ledger needs it, with the quotas that it shares with other keys."""
    shared = tuple(quota_subject(quota) for quota in quotas if quota.limits)
    return Subjects(key.id, Check(NAME, key.id, key.version), _interned(tuple(key.limits)), shared, key.tenant)


@functools.lru_cache(maxsize=4_096)
def _interned(limits: tuple[Limit, ...]) -> tuple[CompiledLimit, ...]:
    """The compiled limits, the same objects for all keys with equal limits: they take most of a cached key's memory."""
    return compile_limits(limits)


def quota_ids(key: ApiKey) -> tuple[str, ...]:
    """The ids of all quotas that a key is counted against, if they exist: of its groups, its user, its tenant."""
    groups = tuple(quota_id("group", key.tenant, name) for name in key.groups)
    user = () if key.user_id is None else (quota_id("user", key.tenant, key.user_id),)
    return (*groups, *user, quota_id("tenant", key.tenant))


def _network(text: str) -> Network:
    """A range of addresses. An IPv4 range written as IPv6 (::ffff:10.0.0.0/104) becomes IPv4, as addresses do."""
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
