"""What every process keeps in memory of all webhook endpoints, so that the ledger asks without a read.

The ledger asks at each decision which thresholds of a limit an endpoint subscribes to. `Subscriptions` answers from
memory, and follows the journal for the changes of other processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..access import ALL_TENANTS
from ..context import system_context
from ..database import Database, Transaction
from ..entities import MAX_LIMIT, Query
from ..events import LIMIT_THRESHOLD
from ..journal import ChangeFeed
from ..limits import Crossing, Limit
from ..limits import thresholds as alerts
from ..storage.port import Put, Record
from .model import ALL_EVENTS, NAME, Webhook


@dataclass(frozen=True, slots=True)
class Subscription:
    """The fields of an endpoint that decide which events are created for it."""

    tenant: str
    enabled: bool
    events: tuple[str, ...]
    thresholds: tuple[int, ...]
    min_window_s: int

    @property
    def has_thresholds(self) -> bool:
        """Whether the endpoint receives `limit.threshold` at all."""
        subscribed = ALL_EVENTS in self.events or LIMIT_THRESHOLD in self.events
        return self.enabled and subscribed and bool(self.thresholds)


class Subscriptions:
    """The subscriptions of every endpoint of one store (about 1 KB each)."""

    def __init__(self, database: Database, feed: ChangeFeed) -> None:
        self._database = database
        self._by_id: dict[str, Subscription] = {}
        self._to_thresholds: dict[str, dict[str, Subscription]] = {}
        """The subscriptions to thresholds, by tenant and endpoint."""
        database.after_commit(self._committed, NAME)
        feed.on_record(self._recorded)

    def __len__(self) -> int:
        """How many endpoints there are, as far as this process knows."""
        return len(self._by_id)

    # --- What the ledger asks ---------------------------------------------------------------------------------

    def thresholds(self, tenant: str, limit: Limit) -> tuple[int, ...]:
        """The thresholds (percent) of a tenant's limit that any endpoint subscribes to, ascending. Reads nothing."""
        if not self._to_thresholds:
            return ()
        found: set[int] = set()
        for of in (tenant, ALL_TENANTS):
            for subscription in self._to_thresholds.get(of, {}).values():
                shortest_s = subscription.min_window_s
                if not shortest_s or shortest_s <= alerts.length_s(limit.window.model_dump()):
                    found.update(subscription.thresholds)
        return tuple(sorted(found))

    @staticmethod
    def on_crossing(crossing: Crossing) -> Sequence[Put]:
        """The operations that a batch carries when it makes a limit cross a threshold."""
        return alerts.operations(crossing)

    # --- How they stay current --------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read every endpoint. Start the change feed first: it delivers the changes that are made meanwhile."""
        cursor = None
        while True:
            page = await self._database.find(system_context(), Webhook, Query(limit=MAX_LIMIT), cursor)
            for webhook in page.items:
                self._set(webhook.id, _subscription(webhook))
            cursor = page.next_cursor
            if cursor is None:
                return

    async def reload(self) -> None:
        """Read every endpoint again after journal records were missed, and forget removed endpoints."""
        for id in list(self._by_id):
            self._set(id, None)
        await self.load()

    def _committed(self, transaction: Transaction) -> None:
        for change in transaction.changes:
            if change.collection.name == NAME:
                entity = change.entity
                self._set(change.operation.id, _subscription(entity) if isinstance(entity, Webhook) else None)

    def _recorded(self, record: Record) -> None:
        """Apply a journal record of any process. The record of an update has the changed fields only."""
        if record.collection != NAME or record.action not in ("create", "update", "delete"):
            return
        after = record.after or {}
        before = self._by_id.get(record.entity_id)
        names = Subscription.__slots__
        if record.action == "delete":
            self._set(record.entity_id, None)
        elif record.action == "create":
            self._set(record.entity_id, Subscription(**{name: _frozen(after[name]) for name in names}))
        elif before is not None:
            merged = {name: _frozen(after.get(name, getattr(before, name))) for name in names}
            self._set(record.entity_id, Subscription(**merged))

    def _set(self, id: str, new: Subscription | None) -> None:
        old = self._by_id.pop(id, None)
        if old is not None and old.has_thresholds:
            of_tenant = self._to_thresholds[old.tenant]
            del of_tenant[id]
            if not of_tenant:
                del self._to_thresholds[old.tenant]
        if new is not None:
            self._by_id[id] = new
            if new.has_thresholds:
                self._to_thresholds.setdefault(new.tenant, {})[id] = new


def _subscription(webhook: Webhook) -> Subscription:
    return Subscription(**{name: _frozen(getattr(webhook, name)) for name in Subscription.__slots__})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
