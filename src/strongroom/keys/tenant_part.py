"""A tenant's keys and quotas, as a part of the tenant: for its export, its import and its deletion."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from ..clock import Clock
from ..context import system_context
from ..database import Database, Transaction
from ..entities import MAX_IN, Entity, Query, Where
from ..limits import KeyUsage, Ledger
from ..quotas import Quota
from ..tenants import Removed, remove_owned, tenants_of
from .durable_reservations import StoredReservation
from .hasher import Hasher
from .leaks import Leak, LeakPolicy
from .model import NAME, ApiKey
from .transfer import ExportedRecords, export_records

_ORDERS: tuple[tuple[type[Entity], tuple[str, ...]], ...] = (
    (ApiKey, ("tenant", "deleted_at", "-created_at")),
    (Quota, ("tenant", "kind", "name")),
)
"""The collections that make a name a tenant, and the index that finds it."""
_HASHES = ("hash", "previous_hash", "previous_until", "prefix", "hint")
"""Fields of an exported key that an import needs and that others need not see: a hash that was imported may have no
pepper, so a weak secret could be guessed from it."""


class KeysOfTenants:
    """Keys with their usage, reservations and leaks, and quotas with their usage."""

    name = "keys"

    def __init__(self, database: Database, ledger: Ledger, hasher: Callable[[], Hasher], clock: Clock) -> None:
        self._database = database
        self._ledger = ledger
        self._hasher = hasher
        self._clock = clock

    async def tenants(self, after: str | None, limit: int) -> list[str]:
        found = await asyncio.gather(*(tenants_of(self._database, cls, order, after, limit) for cls, order in _ORDERS))
        return sorted({name for names in found for name in names})[:limit]

    async def export(self, tenant: str, *, whole: bool) -> AsyncIterator[tuple[str, bytes]]:
        """The records that `strongroom import` reads."""
        told, now_us = ExportedRecords(), self._clock.now_us()
        async for line in export_records(self._database, self._hasher(), tenant, system_context(), told, now_us):
            record = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
            if record.get("type") == msgspec.Raw(b'"quota"'):
                yield Quota.__collection__.name, line
            else:
                kept = {name: value for name, value in record.items() if whole or name not in _HASHES}
                yield NAME, msgspec.json.encode(kept)

    async def remove(self, tx: Transaction, tenant: str, limit: int) -> Removed:
        for cls in (ApiKey, Quota):
            removed = await remove_owned(tx, cls, tenant, limit)
            if removed:
                return [*removed, *await self._remove_usage(tx, [id for _, id in removed])]
        for other in (StoredReservation, LeakPolicy, Leak):
            if removed := await remove_owned(tx, other, tenant, limit):
                return removed
        return []

    async def _remove_usage(self, tx: Transaction, ids: Sequence[str]) -> list[tuple[str, str]]:
        removed = []
        for start in range(0, len(ids), MAX_IN):
            query = Query(Where("id", "in", list(ids[start : start + MAX_IN])), limit=MAX_IN)
            for usage in (await tx.find(KeyUsage, query)).items:
                await tx.delete(KeyUsage, usage.id)
                removed.append((KeyUsage.__collection__.name, usage.id))
        return removed

    def removed(self, removed: Removed) -> None:
        for collection, id in removed:
            if collection in (NAME, Quota.__collection__.name):
                self._ledger.removed(id)


__all__ = ["KeysOfTenants"]
