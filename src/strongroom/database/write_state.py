"""Whether the store takes writes: a migration turns them off at its source when it switches over."""

from __future__ import annotations

import logging

from ..entities import Document, Entity
from ..storage.port import Record, Store

WRITES = "writes"
_log = logging.getLogger(__name__)


class StoreState(Entity, collection="store_state", scope="global"):
    """Whether the store takes writes, and if not, why: a migration turns them off at its source when it switches over.

    The one document is called WRITES; without it writes are allowed. Every process learns of a change by the journal.
    `reason` is what callers are told; `other_store`, the URL of the store at the other end, is for operators alone.
    """

    allowed: bool = True
    reason: str = ""
    other_store: str = ""


class WriteState:
    """Whether writes are allowed, as one process knows it. `refusal`: why nothing may be written; None if writes are
    allowed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._version = 0
        self.refusal: str | None = None

    async def load(self) -> None:
        """Read the state: once before the first write, and once more when the change feed has begun to call `seen`."""
        document = await self._store.get(StoreState.__collection__.name, None, WRITES)
        if document is not None:
            self._use(document["version"], document)

    async def reload(self) -> None:
        """Read the state again, even if the store is an older copy, whose versions are smaller."""
        self._version = 0
        self.refusal = None
        await self.load()

    def seen(self, record: Record) -> None:
        """A journal record of any process: it may turn writes off, or on again."""
        if record.collection == StoreState.__collection__.name and record.entity_id == WRITES:
            self._use(record.version or self._version + 1, record.after or {})

    def _use(self, version: int, state: Document) -> None:
        if version > self._version:  # a read may be older than a journal record that came meanwhile
            self._version = version
            before, self.refusal = self.refusal, None
            if not state.get("allowed", True):
                self.refusal = state.get("reason") or "the store takes no writes"
                other = state.get("other_store")
                _log.warning("%s%s", self.refusal, f"; the other store is {other}" if other else "")
            elif before is not None:
                _log.info("writes are on again")


__all__ = ["WRITES", "StoreState", "WriteState"]
