"""A tenant's keys and quotas, as a part of the tenant: for its export, its import and its deletion."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from ..clock import Clock
from ..context import Context, system_context
from ..database import Database, Transaction
from ..entities import MAX_IN, Entity, Query, Where
from ..errors import InvalidInput, Problem
from ..limits import KeyUsage, Ledger
from ..quotas import Quota
from ..tenants import Imported, Removed, remove_owned, tenants_of
from .durable_reservations import StoredReservation
from .hasher import Hasher
from .leaks import Leak, LeakPolicy
from .model import NAME, ApiKey
from .transfer import ExportedRecords, Record, RecordImport, RecordReader, export_records
from .transfer.import_plan import Standing
from .transfer.record_file import KeyRecord

_ORDERS: tuple[tuple[type[Entity], tuple[str, ...]], ...] = (
    (ApiKey, ("tenant", "deleted_at", "-created_at")),
    (Quota, ("tenant", "kind", "name")),
)
"""The collections that make a name a tenant, and the index that finds it."""
_HASHES = ("hash", "previous_hash", "previous_until", "prefix", "hint")
"""Fields of an exported key that an import needs and that others need not see: a hash that was imported may have no
pepper, so a weak secret could be guessed from it."""
NO_HASH = "keys without a hash: an export by the platform's administrator has it"


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

    def check(self, tenant: str, collection: str, record: bytes) -> None:
        self._record(tenant, record)

    async def take(self, tenant: str, records: Sequence[tuple[str, bytes]], context: Context, told: Imported) -> None:
        found = {index: self._record(tenant, record) for index, (_, record) in enumerate(records)}
        if without := sum(record is None for record in found.values()):
            told.left_out[NO_HASH] += without
        job = RecordImport(self._database, self._hasher(), Context(None, context.actor, system_context().claims))
        planned = await job.plan([record for record in found.values() if record is not None])
        for one in planned:
            if one.problem is not None:
                told.left_out[f"keys: {one.problem[1]}"] += 1
        await job.apply(planned, update=False)
        new = [one for one in planned if one.standing is Standing.NEW]
        told.written.update(NAME if isinstance(one.record, KeyRecord) else Quota.__collection__.name for one in new)

    def _record(self, tenant: str, record: bytes) -> Record | None:
        """An exported key or quota, None for a key without a hash. Raises InvalidInput with every problem."""
        fields = msgspec.json.decode(record, type=dict[str, msgspec.Raw])
        if "type" not in fields and "hash" not in fields:
            return None
        if msgspec.json.decode(fields.get("tenant", msgspec.Raw(b"null"))) != tenant:
            raise InvalidInput([Problem("record.tenant", "is another one than the file's")])
        ((read, findings),) = RecordReader(tenant, self._clock.now_us()).read([record])
        if read is None:
            wrong = [finding for finding in findings if finding.refused]
            raise InvalidInput(
                [Problem(f"record.{one.path.partition(', ')[2]}".rstrip("."), one.message) for one in wrong]
            )
        return read

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
