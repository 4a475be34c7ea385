"""A store's keys and quotas as the lines of a record file."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ...access import ALL_TENANTS
from ...context import Context, check_tenant, us_from_utc
from ...database import Database
from ...entities import MAX_LIMIT, Entity, Query, Where
from ...errors import (
    InvalidInput,
    Problem,
    StoreError,
)
from ...limits import KeyUsage, UsageState, compile_limits
from ...limits.usage_state import CONCURRENCY
from ...quotas import Quota
from ..hasher import Hasher, hint_of_imported, imported_sha256
from ..model import ApiKey

_COPIED = (
    "name", "user_id", "permissions", "metadata", "allowed_ips", "limits", "enabled", "expires_at", "description",
    "owner", "environment", "groups", "allowed_models", "allowed_routes", "rotate_every_s", "rotation_overlap_s",
    "next_rotation_at", "leaked_at", "deleted_at", "display",
)  # fmt: skip
"""Fields of a key that a record copies unchanged."""


@dataclass(slots=True)
class ExportedRecords:
    """Counts of written records, and of keys (by reason) that lost a part or need more at an import."""

    keys: int = 0
    quotas: int = 0
    lost: Counter[str] = field(default_factory=Counter)


async def export_records(
    database: Database,
    hasher: Hasher,
    tenant: str | None,
    context: Context,
    told: ExportedRecords,
    now_us: int,
) -> AsyncIterator[bytes]:
    """Yield the quotas and keys of a tenant, or of all (None), as lines of a file, without management keys. A change
    meanwhile may or may not be included. StoreError if a key's SHA-256 cannot be decrypted."""
    if tenant is not None:
        check_tenant(tenant)
        if tenant == ALL_TENANTS:
            raise InvalidInput([Problem("tenant", "keys for all tenants are management keys: they are not exported")])
    where = None if tenant is None else Where("tenant", "==", tenant)
    async for quotas in _pages(database, context, Quota, Query(where, ("-created_at",), MAX_LIMIT)):
        for quota, usage in zip(quotas, await _usages(database, context, quotas), strict=True):
            told.quotas += 1
            yield rendered(_quota_said(quota, usage, now_us))
    async for keys in _pages(database, context, ApiKey, Query(where, ("-created_at",), MAX_LIMIT)):
        for key, usage in zip(keys, await _usages(database, context, keys), strict=True):
            if key.tenant == ALL_TENANTS:
                continue
            told.keys += 1
            yield rendered(_key_said(key, usage, hasher, now_us, told.lost))


async def _pages(database: Database, context: Context, cls: type[Any], query: Query) -> AsyncIterator[list[Any]]:
    cursor = None
    while True:
        page = await database.find(context, cls, query, cursor)
        yield page.items
        cursor = page.next_cursor
        if cursor is None:
            return


async def _usages(database: Database, context: Context, entities: Sequence[Entity]) -> list[KeyUsage | None]:
    return await asyncio.gather(*(database.get_or_none(context, KeyUsage, entity.id) for entity in entities))


def _quota_said(quota: Quota, usage: KeyUsage | None, now_us: int) -> dict[str, Any]:
    said: dict[str, Any] = {"type": "quota", "kind": quota.kind, "tenant": quota.tenant, "name": quota.name or None}
    said |= {"limits": [limit.model_dump() for limit in quota.limits], "description": quota.description}
    said["created_at"] = quota.created_at
    if usage is not None and _is_used(usage):
        said["usage"] = _usage_said(usage, quota.limits, now_us)
    return {name: value for name, value in said.items() if value is not None}


def _key_said(key: ApiKey, usage: KeyUsage | None, hasher: Hasher, now_us: int, lost: Counter[str]) -> dict[str, Any]:
    said: dict[str, Any] = {"id": key.id, "hash": _hash_said(key, hasher, lost), "tenant": key.tenant}
    if (hint := hint_of_imported(key.hash) or hint_of_imported(key.previous_hash or "")) is not None and key.verifier:
        said["prefix" if hint[0].chars is None else "hint"] = hint[1]
    said |= {name: getattr(key, name) for name in _COPIED}
    said["limits"] = [limit.model_dump() for limit in key.limits]
    said["created_at"] = key.created_at
    if key.previous_hash is not None and key.previous_until is not None and us_from_utc(key.previous_until) > now_us:
        said |= _previous_said(key, hasher, lost)
    if key.unclaimed is not None:
        lost["a text that nobody has claimed yet: claim it before, or rotate the key there"] += 1
    if usage is not None and _is_used(usage):
        said["usage"] = _usage_said(usage, key.limits, now_us)
    return {name: value for name, value in said.items() if value not in (None, [], {})}


def _hash_said(key: ApiKey, hasher: Hasher, lost: Counter[str]) -> str:
    if key.hash.startswith("hint:"):
        if key.verifier is None:
            raise StoreError(f"the key {key.id} has a hint and no hash")
        return key.verifier
    if key.hash.startswith("hmac:"):
        lost["a hash under another system's secret: the import needs that secret again"] += 1
        return f"hmac-sha256:{key.hash.rpartition(':')[2]}"
    if key.hash.startswith(("sha256:", "sha512:")):
        return key.hash
    if key.sealed is None:
        raise StoreError(f"the key {key.id} has no sealed hash")
    return imported_sha256(hasher.unseal(key.sealed).hex())


def _previous_said(key: ApiKey, hasher: Hasher, lost: Counter[str]) -> dict[str, Any]:
    """The old secret that still works after a rotation."""
    stored = key.previous_hash or ""
    until = {"previous_until": key.previous_until}
    if stored.startswith("hint:"):
        return {"previous_hash": key.verifier, **until} if key.verifier is not None else {}
    if stored.startswith("hmac:"):
        return {"previous_hash": f"hmac-sha256:{stored.rpartition(':')[2]}", **until}
    if stored.startswith(("sha256:", "sha512:")):
        return {"previous_hash": stored, **until}
    if key.previous_sealed is not None:
        return {"previous_hash": imported_sha256(hasher.unseal(key.previous_sealed).hex()), **until}
    lost["an old secret that still works"] += 1
    return {}


def _is_used(usage: KeyUsage) -> bool:
    return usage.count > 0 or usage.active_at is not None or usage.last_used_at is not None


def _usage_said(usage: KeyUsage, limits: Iterable[Any], now_us: int) -> dict[str, Any]:
    """The usage for another store. Reserved and leased amounts become used amounts, since no process can settle them
    there. Limits on concurrency start at zero there."""
    state = UsageState({**KeyUsage.__codec__.encode(usage), "version": usage.version})
    moment_us = state.moment(now_us)
    for compiled_limit in compile_limits(limits):
        held = state.reserved is not None or state.leases
        _, reserved, leased = state.standing(compiled_limit, moment_us) if held else (0, 0, 0)
        if reserved + leased and compiled_limit.resource != CONCURRENCY:
            state.counter(compiled_limit).add(moment_us, reserved + leased)
            state.at_us = moment_us
    state.reserved, state.leases = None, {}
    document = state.document()
    state = msgspec.json.decode(document["state"])
    return {"count": document["count"], "last_used_at": document["last_used_at"], **state}


_encoder = msgspec.json.Encoder(decimal_format="number")


def rendered(fields: Mapping[str, Any]) -> bytes:
    """One line of JSON: times in UTC, money with every digit."""
    return _encoder.encode(fields) + b"\n"
