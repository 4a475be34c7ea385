"""The quotas in a process's memory: those of a tenant are read together, and forgotten when one of them is changed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..cache import SingleFlight
from ..context import system_context
from ..database import Database
from ..entities import MAX_IN, Query, Where
from ..journal import ChangeFeed
from .model import Quota, tenant_of

MAX_TENANTS = 10_000
MAX_QUOTAS_A_TENANT = 200
"""The quotas of a tenant with more than this are not kept: those of a key are read for that key."""
TRUSTED_FOR_S = 0.75
"""Quotas are trusted for this time after they were read, or after the change feed was last current."""


class QuotaCache:
    """The quotas of one store."""

    def __init__(self, database: Database, feed: ChangeFeed | None = None) -> None:
        self._database = database
        self._feed = feed
        self._tenants: dict[str, tuple[float, dict[str, Quota] | None]] = {}
        self._reads: SingleFlight[dict[str, Quota] | None] = SingleFlight()
        self.changes = 0
        """The number of reported changes. A read during which it grew may be older than the change."""

    async def of(self, tenant: str, ids: Sequence[str]) -> tuple[Quota, ...]:
        """The quotas of a tenant with these ids that exist, in this order."""
        now = time.monotonic()
        read_at, known = self._tenants.get(tenant, (0.0, {}))
        heard_at = self._feed.current_at if self._feed is not None else now
        if not read_at or now - max(read_at, heard_at) > TRUSTED_FOR_S:
            known = await self._reads.get(tenant, self.changes, lambda: self._read(tenant))
        if known is None:
            return await self._some(ids)
        return tuple(known[id] for id in ids if id in known)

    async def _read(self, tenant: str) -> dict[str, Quota] | None:
        changes, began = self.changes, time.monotonic()
        query = Query(Where("tenant", "==", tenant), limit=MAX_QUOTAS_A_TENANT + 1)
        found = (await self._database.find(system_context(), Quota, query)).items
        known = {quota.id: quota for quota in found} if len(found) <= MAX_QUOTAS_A_TENANT else None
        if changes == self.changes:
            if len(self._tenants) >= MAX_TENANTS:
                for oldest in list(self._tenants)[: MAX_TENANTS // 10]:
                    del self._tenants[oldest]
            self._tenants[tenant] = (began, known)
        return known

    async def _some(self, ids: Sequence[str]) -> tuple[Quota, ...]:
        found: dict[str, Quota] = {}
        for start in range(0, len(ids), MAX_IN):
            query = Query(Where("id", "in", list(ids[start : start + MAX_IN])), limit=MAX_IN)
            found.update(
                {quota.id: quota for quota in (await self._database.find(system_context(), Quota, query)).items}
            )
        return tuple(found[id] for id in ids if id in found)

    def changed(self, id: str) -> None:
        """A quota was created, changed or removed, here or on another node."""
        self.forget(tenant_of(id))

    def forget(self, tenant: str) -> None:
        """Read the quotas of a tenant again at their next use."""
        self.changes += 1
        self._tenants.pop(tenant, None)

    def forget_all(self) -> None:
        """Read the quotas of every tenant again at their next use."""
        self.changes += 1
        self._tenants.clear()
