"""Whether the store takes writes: what turned them off, for all tenants or for one, as one process knows it.

Three things turn writes off: a migration at its source (StoreState), an operator (WriteSwitch), and the suspension of a
tenant, which `tenants/state.py` reports here. In normal operation a write asks one flag, `closed`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from ..entities import MAX_LIMIT, Collection, Document, Entity, Index, Query
from ..errors import TenantSuspended, WritesOff
from ..journal import CHANGES, document_after
from ..storage.port import Record, Store

WRITES = "writes"
STORE = "store"
"""The id of the switch for all tenants."""
_OF_TENANT = "tenant:"
_OF_THE_PLATFORM = frozenset({"tenant_deletions", "leaks"})
"""Collections of which a change in a batch says that the platform itself changes what belongs to a tenant: it deletes
the tenant, or disables a key that leaked."""
_log = logging.getLogger(__name__)


class StoreState(Entity, collection="store_state", scope="global"):
    """Whether the store takes writes, and if not, why: a migration turns them off at its source when it switches over.

    The one document is called WRITES; without it writes are allowed. Every process learns of a change by the journal.
    `reason` is what callers are told; `other_store`, the URL of the store at the other end, is for operators alone.
    """

    allowed: bool = True
    reason: str = ""
    other_store: str = ""


class WriteSwitch(Entity, collection="write_switches", scope="global", indexes=[Index("allowed", "tenant")]):
    """An operator's switch: whether writes of one tenant, or of all (`tenant` None), are allowed. `usage`: whether
    verification, usage and reservations go on while they are not. `by` turned it last."""

    tenant: str | None = None
    allowed: bool = True
    usage: bool = True
    reason: str | None = None
    by: str = "system"


def switch_id(tenant: str | None) -> str:
    """The id of the switch for a tenant, or for all (None)."""
    return STORE if tenant is None else _OF_TENANT + tenant


class WriteState:
    """Whether writes are allowed, as one process knows it. `refusal`: why a migration lets nothing be written; None if
    it does."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._version = 0
        self._versions: dict[str, int] = {}
        self._documents: dict[str, Document] = {}
        """The switches that were ever turned, by id, each of the version in `_versions`."""
        self._switches: dict[str | None, Document] = {}
        """The switches that are off, by their tenant."""
        self._suspended: Mapping[str, str] = {}
        self.owned: frozenset[str] = frozenset()
        """The global collections whose documents belong to the tenant in their field `tenant`."""
        self.applications: frozenset[str] = frozenset()
        """The application's collections: none of them is Strongroom's bookkeeping, also without a journal."""
        self.refusal: str | None = None
        self.closed = False
        """Whether `check` may refuse a write."""
        self.usage_closed = False
        """Whether `check_usage` may refuse a use."""

    # --- Following the store ----------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the state: once before the first write, once more when the change feed has begun to call `seen`, and
        while the feed is behind."""
        document = await self._store.get(StoreState.__collection__.name, None, WRITES)
        if document is not None:
            self._use(document["version"], document)
        await self.load_switches()

    async def load_switches(self) -> None:
        """Read the operators' switches."""
        after: tuple[object, ...] | None = None
        while True:
            query = Query(limit=MAX_LIMIT, start_after=after)
            page = await self._store.find(WriteSwitch.__collection__.name, None, query)
            for document in page:
                self._use_switch(document["id"], document["version"], document)
            if len(page) < MAX_LIMIT:
                return
            after = (page[-1]["id"],)

    async def reload(self) -> None:
        """Read the state again, even if the store is an older copy, whose versions are smaller."""
        self._version = 0
        self.refusal = None
        self._versions.clear()
        self._documents.clear()
        self._switches.clear()
        self._consider()
        await self.load()

    def seen(self, record: Record) -> None:
        """A journal record of any process: it may turn writes off, or on again."""
        if record.action not in CHANGES:  # a denial, say, turned nothing
            return
        if record.collection == WriteSwitch.__collection__.name:
            version = record.version or self._versions.get(record.entity_id, 0) + 1
            after = document_after(record, self._documents.get(record.entity_id))
            self._use_switch(record.entity_id, version, after or {})
        elif record.collection == StoreState.__collection__.name and record.entity_id == WRITES:
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
                self._versions.clear()  # a migration has copied records that have the versions of another store
                _log.info("writes are on again")

    def _use_switch(self, id: str, version: int, switch: Document) -> None:
        if version <= self._versions.get(id, 0):
            return
        self._versions[id] = version
        self._documents[id] = switch
        tenant = None if id == STORE else id.removeprefix(_OF_TENANT)
        before = self._switches.pop(tenant, None)
        if not switch.get("allowed", True):
            self._switches[tenant] = switch
            _log.warning("%s%s", _sentence(tenant, switch), "" if switch.get("usage", True) else "; usage is off too")
        elif before is not None:
            _log.info("writes of %s are on again", _whose(tenant))
        self._consider()

    def switched(self, switch: WriteSwitch) -> None:
        """This process has just committed a switch."""
        fields = ("tenant", "allowed", "usage", "reason")
        self._use_switch(switch.id, switch.version, {name: getattr(switch, name) for name in fields})

    def suspend(self, tenants: Mapping[str, str]) -> None:
        """Refuse the writes of these tenants, each with its sentence, from now on. The mapping stays the caller's."""
        self._suspended = tenants
        self._consider()

    def _consider(self) -> None:
        self.closed = bool(self._switches or self._suspended)
        self.usage_closed = any(not switch.get("usage", True) for switch in self._switches.values())

    # --- Asking -----------------------------------------------------------------------------------------------

    @property
    def tenants_off(self) -> int:
        """The number of tenants whose own switch is off."""
        return len(self._switches) - (None in self._switches)

    @property
    def usage_of_all(self) -> bool:
        """Whether verification, usage and reservations go on, as far as the switch for all tenants says."""
        switch = self._switches.get(None)
        return self.refusal is None and (switch is None or bool(switch.get("usage", True)))

    def why_off(self, tenant: str | None = None) -> str | None:
        """Why an operator lets nothing of a tenant be written (None: of no tenant); None if writes are allowed."""
        for whose in (None, tenant):
            if (switch := self._switches.get(whose)) is not None:
                return _sentence(whose, switch)
        return None

    def why_refused(self, tenant: str | None) -> str | None:
        """Why nothing of a tenant may be written, for any reason; None if it may."""
        suspended = self._suspended.get(tenant) if tenant is not None else None
        return self.refusal or self.why_off(tenant) or suspended

    def expect_on(self, tenant: str | None) -> None:
        """Raise WritesOff if writes of a tenant are off, for work that is no write of documents: to redact or to drop
        records. A suspension does not stop it."""
        reason = self.refusal or self.why_off(tenant)
        if reason is not None:
            raise WritesOff(reason)

    def check(self, tenant: str | None, changed: Iterable[tuple[Collection, Document | None]]) -> None:
        """Raise WritesOff or TenantSuspended if a batch of a tenant may not change these documents now.

        Strongroom's own bookkeeping, which is not journalled, and the switches themselves can always be written; what
        an application keeps without a journal cannot. A suspended tenant can be resumed and deleted, and what the
        platform keeps about it can be changed.
        """
        tenants, journalled, owned, platform = {tenant}, False, False, False
        for collection, document in changed:
            if collection.name == WriteSwitch.__collection__.name:
                return
            journalled = journalled or collection.journalled or collection.name in self.applications
            owned = owned or collection.tenant_scoped or collection.name in self.owned
            platform = platform or collection.name in _OF_THE_PLATFORM
            if collection.name in self.owned and document is not None:
                tenants.add(document.get("tenant"))  # a key, say, in a batch of all tenants
        if not journalled:
            return
        for one in tenants:
            if (reason := self.why_off(one)) is not None:
                raise WritesOff(reason)
            if one is not None and owned and not platform and (reason := self._suspended.get(one)) is not None:
                raise TenantSuspended(reason)

    def check_usage(self, tenant: str | None) -> None:
        """Raise WritesOff if the keys of a tenant may not be used now."""
        for whose in (None, tenant):
            switch = self._switches.get(whose)
            if switch is not None and not switch.get("usage", True):
                raise WritesOff(_sentence(whose, switch))


def _whose(tenant: str | None) -> str:
    return "all tenants" if tenant is None else f"the tenant {tenant[:64]!r}"


def _sentence(tenant: str | None, switch: Mapping[str, object]) -> str:
    reason = switch.get("reason")
    return f"writes of {_whose(tenant)} are off" + (f": {reason}" if reason else "")


__all__ = ["STORE", "WRITES", "StoreState", "WriteState", "WriteSwitch", "switch_id"]
