"""The suspended tenants, in memory: what verifications and writes ask.

They are loaded at the start, follow the journal's records of any process, and are read again while the change feed is
behind. So a suspension is known on every node within a second, also while the feed cannot read the journal.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from ..context import system_context
from ..database import Database, Transaction
from ..entities import MAX_LIMIT, Document, Query, Where
from ..errors import StrongroomError, TenantSuspended
from ..journal import CHANGES, ChangeFeed, document_after
from ..retry_log import RetryLog
from ..storage.port import Record
from .model import Tenant

TRUSTED_FOR_S = 0.45
"""While the feed is further behind than this, the state is read from the store. The feed looks every 0.25 s."""
LOOK_EVERY_S = 0.1
READ_EVERY_S = 0.3
"""How often the state is read while the feed is behind."""
READ_TIMEOUT_S = 5.0
MAX_VERSIONS = 10_000
_STATUSES = ("suspended", "deleting")
_log = logging.getLogger(__name__)


class SuspendedTenants:
    """The tenants that are suspended or being deleted, each with the sentence that its callers are told.

    `changed` is called with a tenant that was suspended or resumed.
    """

    def __init__(self, database: Database, changed: Callable[[str], None]) -> None:
        self._database = database
        self._changed = changed
        self._reading = asyncio.Lock()
        self._touched: set[str] = set()
        """Tenants that a record or a commit told of while they were read: what was read may be older."""
        self._documents: dict[str, Mapping[str, object]] = {}
        """The status and the reason of the suspended tenants."""
        self._versions: dict[str, int] = {}
        """The versions of the tenants that were changed last, by this process or another."""
        self.sentences: dict[str, str] = {}
        database.writes.suspend(self.sentences)
        database.after_commit(self._committed, Tenant.__collection__.name)

    def check(self, tenant: str | None) -> None:
        """Raise TenantSuspended for a suspended tenant."""
        sentence = self.sentences.get(tenant) if tenant is not None else None
        if sentence is not None:
            raise TenantSuspended(sentence)

    async def load(self) -> None:
        """Read which tenants are suspended. Raises what the store raises."""
        async with self._reading:
            self._touched.clear()
            before = set(self.sentences)
            found: dict[str, Mapping[str, object]] = {}
            cursor: str | None = None
            query = Query(Where("status", "in", _STATUSES), ("id",), MAX_LIMIT, fields=("status", "reason"))
            while True:
                page = await self._database.select(system_context(), Tenant, query, cursor)
                found.update((document["id"], document) for document in page.items)
                cursor = page.next_cursor
                if cursor is None:
                    break
            for tenant in (before - set(found)) - self._touched:
                self._set(tenant, None)
            for tenant, document in found.items():
                if tenant not in self._touched:
                    self._set(tenant, document)

    def seen(self, record: Record) -> None:
        """A journal record of any process: it may suspend a tenant, or resume it."""
        if record.collection == Tenant.__collection__.name and record.action in CHANGES:
            after = document_after(record, self._documents.get(record.entity_id))
            self._use(record.entity_id, after, record.version or 0)

    def _committed(self, transaction: Transaction) -> None:
        """Follow this process's own changes at once."""
        for change in transaction.changes:
            if change.collection is Tenant.__collection__:
                version = change.entity.version if change.entity is not None else 0
                self._use(change.operation.id, change.after, version)

    def _use(self, tenant: str, document: Mapping[str, object] | None, version: int) -> None:
        if 0 < version <= self._versions.get(tenant, 0):
            return  # the feed's record of this process's own change, which may be followed by others already
        self._versions.pop(tenant, None)
        if document is not None and version:
            self._versions[tenant] = version
            if len(self._versions) > MAX_VERSIONS:
                del self._versions[next(iter(self._versions))]
        self._touched.add(tenant)
        self._set(tenant, document if document is not None and document.get("status") in _STATUSES else None)

    def _set(self, tenant: str, document: Mapping[str, object] | None) -> None:
        """Take the document of a suspended tenant, or None for an active one."""
        if document is None:
            self._documents.pop(tenant, None)
            sentence = None
        else:
            self._documents[tenant] = {"status": document.get("status"), "reason": document.get("reason")}
            sentence = _sentence(tenant, document)
        if self.sentences.get(tenant) == sentence:
            return
        if sentence is None:
            del self.sentences[tenant]
        else:
            self.sentences[tenant] = sentence
        self._database.writes.suspend(self.sentences)
        self._changed(tenant)


class StateReader:
    """Reads the switches and the suspended tenants from the store while the change feed is behind."""

    def __init__(self, database: Database, suspended: SuspendedTenants, feed: ChangeFeed) -> None:
        self._database = database
        self._suspended = suspended
        self._feed = feed
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        told = RetryLog(_log, "the suspended tenants cannot be read")
        read_at = 0.0
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            now = time.monotonic()
            if self._feed.behind_s <= TRUSTED_FOR_S or now - read_at < READ_EVERY_S:
                continue
            read_at = now
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    await self._database.writes.load()
                    await self._suspended.load()
                told.succeeded()
            except (StrongroomError, TimeoutError) as error:
                told.failed(str(error) or type(error).__name__)
            except Exception:  # any error: nothing would tell of later suspensions
                _log.exception("the suspended tenants cannot be read, because of an unexpected error")


def _sentence(tenant: str, document: Document | Mapping[str, object]) -> str:
    reason = document.get("reason")
    what = "is being deleted" if document.get("status") == "deleting" else "is suspended"
    return f"the tenant {tenant[:64]!r} {what}" + (f": {reason}" if reason else "")


__all__ = ["StateReader", "SuspendedTenants"]
