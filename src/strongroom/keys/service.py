"""The keys of one store: the parts that verify, reserve, record, read, change and rotate keys, under one name."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ..clock import Clock, MachineClock
from ..context import Context
from ..database import Database, Transaction
from ..journal import ChangeFeed
from ..limits import Ledger, LimitStatus
from ..quotas.model import NAME as QUOTAS
from .bulk import PAGE, Bulk, BulkStep, steps
from .cache import KeyCache
from .delegate import Delegate
from .editor import KeyEditor
from .filter import KeyFilter
from .hasher import Hasher
from .model import NAME, ApiKey, IssuedKey, KeyChanges, NewKey
from .queries import KeyQueries, KeyStats
from .refund import Refunds
from .reservations import Reservations
from .rotation import Rotation
from .usage_recorder import UsageRecorder
from .verification import Verification
from .verifier import Verifier


class Keys:
    """The keys of one store.

    Each call is a method of one part, which has its signature and description. Other code of Strongroom may use the
    parts themselves.
    """

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        hasher: Hasher,
        clock: Clock | None = None,
        feed: ChangeFeed | None = None,
    ) -> None:
        self.clock = clock if clock is not None else MachineClock()
        """The clock that keys expire by."""
        self.cache = KeyCache(database, hasher, feed)
        self.verifier = Verifier(database, self.cache, ledger, self.clock)
        self.refunds = Refunds(self.verifier, self.cache, ledger, self.clock)
        self.reservations = Reservations(database, self.cache, ledger, self.clock)
        self.recorder = UsageRecorder(database, self.cache, ledger, self.clock)
        self.queries = KeyQueries(database, self.cache, ledger, self.clock)
        self.rotation = Rotation(database, self.queries, lambda: self.hasher, self.clock)
        self.editor = KeyEditor(database, self.queries, ledger, lambda: self.hasher, self.clock)
        self._ledger = ledger
        database.after_commit(self._committed, NAME, QUOTAS)

    verify = Delegate("verifier", Verifier.verify)
    verify_many = Delegate("verifier", Verifier.verify_many)
    authenticate = Delegate("verifier", Verifier.authenticate)
    identify = Delegate("verifier", Verifier.identify)

    verify_charged = Delegate("refunds", Refunds.verify_charged)
    undo = Delegate("refunds", Refunds.undo)

    reserve = Delegate("reservations", Reservations.reserve)
    settle = Delegate("reservations", Reservations.settle)
    extend = Delegate("reservations", Reservations.extend)
    release = Delegate("reservations", Reservations.release)

    record = Delegate("recorder", UsageRecorder.record)
    record_many = Delegate("recorder", UsageRecorder.record_many)

    get = Delegate("queries", KeyQueries.get)
    list = Delegate("queries", KeyQueries.list)
    page = Delegate("queries", KeyQueries.page)
    count = Delegate("queries", KeyQueries.count)
    stats = Delegate("queries", KeyQueries.stats)

    create = Delegate("editor", KeyEditor.create)
    update = Delegate("editor", KeyEditor.update)
    disable = Delegate("editor", KeyEditor.disable)
    enable = Delegate("editor", KeyEditor.enable)
    delete = Delegate("editor", KeyEditor.delete)
    restore = Delegate("editor", KeyEditor.restore)
    mend_clock = Delegate("editor", KeyEditor.mend_clock)

    rotate = Delegate("rotation", Rotation.rotate)
    claim = Delegate("rotation", Rotation.claim)

    def bulk(
        self, bulk: Bulk, *, cursor: str | None = None, limit: int = PAGE, context: Context | None = None
    ) -> AsyncGenerator[BulkStep, None]:
        """Change many keys, at most `limit` (1 to 500) a step: `async for step in keys.bulk(Bulk("disable", …))`.

        Each key is changed whole or not at all. A step reports each key that could not be changed. Work that was broken
        off goes on from the `cursor` of its last step. Raises InvalidInput, Unavailable.
        """
        return steps(self, bulk, cursor=cursor, limit=limit, context=context)

    # --- Invalidation -----------------------------------------------------------------------------------------

    def changed(self, id: str) -> None:
        """A key was changed, here or on another node: read the key and its usage again at its next use."""
        self.cache.changed(id)
        self._ledger.forget(id)

    def quota_changed(self, id: str) -> None:
        """A quota was changed, here or on another node: read the keys that share it, and its usage, again. The quota
        may have been removed and created again, and a denial, which commits nothing, would never notice."""
        self.cache.quota_changed(id)
        self._ledger.forget(id)

    def tenant_changed(self, tenant: str) -> None:
        """A tenant was suspended or resumed, here or on another node: read its keys again at their next use."""
        self.cache.tenant_changed(tenant)

    def forget_all(self) -> None:
        """Changes were missed: read all keys, quotas and usage again at their next use."""
        self.cache.forget_all()
        self._ledger.forget_all()

    @property
    def hasher(self) -> Hasher:
        """Makes the hashes that keys are stored and found by."""
        return self.cache.hasher

    def use(self, hasher: Hasher) -> None:
        """Make and find hashes with other peppers from now on; they may find secrets that were unknown."""
        self.cache.use(hasher)

    def _committed(self, transaction: Transaction) -> None:
        for change in transaction.changes:
            if change.collection.name == NAME:
                self.changed(change.operation.id)
            elif change.collection.name == QUOTAS:
                self.quota_changed(change.operation.id)


__all__ = [
    "ApiKey", "IssuedKey", "KeyChanges", "KeyFilter", "KeyStats", "Keys", "LimitStatus", "NewKey", "Verification",
]  # fmt: skip
