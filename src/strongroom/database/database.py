"""The write trip: context → validate → rules → batch (change + journal record) → commit → notify.

Every write of documents goes this way. `Database.transaction` is the trip; create, replace, update, delete and add are
transactions of one change. The reads are in `reads.py`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar, cast

from ..cache import Cache
from ..clock import Clock, MachineClock
from ..context import Context, next_id
from ..entities import Document, Entity, Registry
from ..errors import (
    AlreadyExists,
    Conflict,
    NotFound,
    StrongroomError,
    WritesOff,
)
from ..journal import ChangeFeed, Denials
from ..rules import Policy, default_policy
from ..storage.port import (
    Add,
    Batch,
    ChangesPage,
    Check,
    Committed,
    Create,
    Delete,
    Loading,
    Operation,
    Pack,
    Patch,
    Put,
    Record,
    Store,
    unwrapped,
)
from .authorization import Authorization
from .change import RULE_OF, Found, answer_to_keep, records_of, stamp
from .idempotency import Calls, Idempotency, IdempotentOperation, Replayed, RequestKey
from .reads import Reads, scope_of
from .transaction import Transaction
from .write_state import WriteState

MAX_ATTEMPTS = 12
FIRST_BACKOFF_S = 0.002
MAX_BACKOFF_S = 0.25

E = TypeVar("E", bound=Entity)
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Database:
    """One store with its entities and rules. Every method takes the caller's Context first."""

    def __init__(
        self, store: Store, registry: Registry, policy: Policy = default_policy, clock: Clock | None = None
    ) -> None:
        self._store = store
        self._clock = clock if clock is not None else MachineClock()
        self.calls = Calls(store)
        """The calls that had an idempotency key."""
        self.registry = registry
        self._listeners: list[tuple[frozenset[str], Callable[[Transaction], None]]] = []
        self._on_records: Callable[[Sequence[Record]], None] | None = None
        self.retries: dict[str, int] = {}
        """How often a transaction ran again because a document that it had read was changed, by that collection."""
        self.writes = WriteState(store)
        """Whether the store takes writes."""
        self.denials = Denials(store, self._commit)
        self.rules = rules = Authorization(policy, self.denials, self._clock)
        self.decide, self.authorize = rules.decide, rules.authorize
        self.reads = reads = Reads(store, rules, self._clock)
        self.load, self.get, self.get_or_none = reads.load, reads.get, reads.get_or_none
        self.find, self.select, self.aggregate = reads.find, reads.select, reads.aggregate
        self.shapes = reads.shapes

    @property
    def embedded(self) -> bool:
        """Whether the store runs in this process, so that a read costs no round trip."""
        return self._store.capabilities.embedded

    def use(self, cache: Cache) -> None:
        """Read through this cache from now on, for the entities that declare it."""
        self.reads.cache = cache

    # --- Committing -------------------------------------------------------------------------------------------

    def _commit(self, batch: Batch) -> Awaitable[Committed]:
        """As `Store.commit`; WritesOff while a migration lets nothing be written."""
        if self.writes.refusal is not None:
            refused: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
            refused.set_exception(WritesOff(self.writes.refusal))
            return refused
        return self._store.commit(batch)

    def after_commit(self, listener: Callable[[Transaction], None], *collections: str) -> None:
        """Call `listener` with each transaction after its durable commit, never before. With `collections`, only
        where the transaction changed a document of one of these."""
        self._listeners.append((frozenset(collections), listener))

    def _notify(self, transaction: Transaction) -> None:
        changed = {change.collection.name for change in transaction.changes}
        for collections, listener in self._listeners:
            if not collections or not collections.isdisjoint(changed):
                listener(transaction)

    def hand_records_to(self, feed: ChangeFeed) -> None:
        """Hand the feed the records of each commit, where the journal's order lets it do without reading them."""
        if self._store.capabilities.ordered_journal:
            self._on_records = feed.committed
        self.after_commit(lambda _: feed.wake())

    def now_us(self) -> int:
        """The present time of the store's clock, in microseconds since the epoch."""
        return self._clock.now_us()

    def at_now(self, context: Context) -> Context:
        """The same call at the time of the store's clock, unless the caller chose a time: the machine's clock may be
        hours off."""
        return context.by(self._clock)

    # --- THE write trip ---------------------------------------------------------------------------------------

    async def transaction(
        self,
        context: Context,
        body: Callable[[Transaction], Awaitable[T]],
        *,
        idempotency: Idempotency | None = None,
    ) -> T:
        """Run `body`, which reads and plans changes, and commit all its changes and their journal records, or nothing.

        If a document that `body` read was changed meanwhile, `body` runs again on the present documents, at most
        MAX_ATTEMPTS times, with jitter. So `body` must have no effect but through its Transaction. Raises what `body`
        raises, Denied (journalled), Conflict, AlreadyExists, NotFound, BoundExceeded, TooLarge, Unavailable, WritesOff,
        TenantSuspended.
        """
        context = self.at_now(context)
        if not context.request_id:
            context = Context(context.tenant, context.actor, context.claims, next_id(), context.now_us)
        expired: list[Found] = []
        for attempt in range(MAX_ATTEMPTS):
            transaction = Transaction(self.reads, self.rules, context)
            transaction.expired = expired
            try:
                result = await body(transaction)
            except StrongroomError:
                if idempotency is not None:  # this very call, made before, may have caused what the body met
                    await self.calls.before(context, idempotency)
                raise
            for change in transaction.changes:
                after = None if change.action == "add" else change.after
                asked = RULE_OF[change.action], change.collection, change.operation.id
                decision = self.decide(context, *asked, change.before, after)
                if not decision.allowed:
                    await self.rules.refuse(context, *asked, decision, change.before, change.after)
            if transaction.is_empty and idempotency is None:
                return result
            record = None
            if idempotency is not None:
                former = await self.calls.before(context, idempotency)
                written = [change.operation.id for change in transaction.changes]
                if not written and isinstance(result, Entity):
                    written = [result.id]
                answer = answer_to_keep(result, transaction.changes, context.now)
                record = self.calls.operation(context, idempotency, written, answer, former)
            if self.writes.closed:
                self.writes.check(
                    context.tenant, [(one.collection, one.after or one.before) for one in transaction.changes]
                )
            batch = Batch(context.tenant, transaction.operations(record), context.now_us)
            try:
                committed = await self._commit(batch)
            except (Conflict, AlreadyExists, NotFound) as error:
                failed = _operation_of(error, batch)
                retry = record is not None and failed is record
                if isinstance(failed, Delete) and any(failed.id == document["id"] for _, document in expired):
                    expired, retry = [], True  # the expired document was removed, or renewed
                elif isinstance(error, AlreadyExists) and not retry and attempt + 1 < MAX_ATTEMPTS:
                    found = await self._expired_in_the_way(transaction, failed)
                    expired, retry = expired + found, bool(found)
                again = retry or (not isinstance(error, NotFound) and transaction.may_retry(failed))
                if attempt + 1 == MAX_ATTEMPTS or not again:
                    raise
                name = failed.collection if isinstance(failed, Create | Put | Patch | Delete | Add | Check) else "other"
                self.retries[name] = self.retries.get(name, 0) + 1
                await asyncio.sleep(_backoff_s(attempt))
                context = self.at_now(context.at_now())
                continue
            stamp(transaction.changes, committed, batch.now_us)
            self._forget_cached(transaction)
            if self._on_records is not None:
                self._on_records(records_of(batch, committed))
            self._notify(transaction)
            return result
        raise AssertionError("the last attempt returns or raises")

    async def _expired_in_the_way(self, transaction: Transaction, failed: Operation | None) -> list[Found]:
        """The expired documents that hold a unique value of the change that failed, and that are not removed yet."""
        change = next((change for change in transaction.changes if change.operation is failed), None)
        if change is None or change.after is None:
            return []
        collection, id = change.collection, change.operation.id
        holders = await self.reads.expired_holders(transaction.context, collection, id, change.after)
        removed = {document["id"] for _, document in transaction.expired}
        return [(collection, document) for document in holders if document["id"] not in removed]

    def _forget_cached(self, transaction: Transaction) -> None:
        """Forget, before the next read here, what the changes make untrue: the journal tells every process later."""
        cache = self.reads.cache
        if cache is None:
            return
        for change in transaction.changes:
            tenant = scope_of(transaction.context, change.collection)
            version = change.entity.version if change.entity is not None else 0
            cache.changed(change.collection.name, tenant, change.operation.id, version, change.before, change.after)

    async def repeated(self, context: Context, idempotency: Idempotency | None) -> Replayed | None:
        """The outcome of this very call, if it was committed before. A call asks at its beginning if it reads documents
        that it may have removed itself. None if it was not committed, or has no idempotency key. Raises Conflict."""
        if idempotency is None:
            return None
        if isinstance(idempotency.key, RequestKey) and idempotency.key.looked_up:
            return None
        try:
            await self.calls.before(self.at_now(context), idempotency)
        except Replayed as replayed:
            return replayed
        return None

    async def answer_of(self, context: Context, cls: type[E], replayed: Replayed) -> E:
        """The entity that the first call was answered with; if that was too long to be kept, the entity as it is
        now."""
        document = replayed.answer
        if document is None:
            return await self.get(context, cls, replayed.written[0], fresh=True)
        collection, id = cls.__collection__, document["id"]
        context = self.at_now(context)
        await self.authorize(context, "get", collection, id, document)
        if not document["version"]:  # the commit gave the version
            now = await self.load(context, collection, id)
            same = now is not None and all(now[name] == document[name] for name in ("updated_at", *collection.fields))
            document["version"] = now["version"] if same and now is not None else replayed.version
        return cast(E, cls.__codec__.decode(document))

    def once(
        self, scope: str, actor: str, key: str, request: object, *, kept_until: datetime | None = None
    ) -> IdempotentOperation:
        """For `commit_counters`: an operation that commits once for each idempotency key of an actor. `request` sets
        another request with the same key apart."""
        call = Idempotency(key, request, scope=scope)
        context = self.at_now(Context(None, actor))
        operation = self.calls.operation(context, call, [], None, kept_until=kept_until)
        return IdempotentOperation(operation.id, operation, self.calls.alike(request))

    @property
    def rules_read_documents(self) -> bool:
        """Whether the rules may depend on a document's fields."""
        return self.rules.reads_documents

    async def changes(self, after: str, tenant: str | None, limit: int) -> ChangesPage:
        """A tenant's journal records; the rules are not asked: for a stream that asks them itself. As
        `Store.changes`."""
        return await self._store.changes(after, tenant=tenant, limit=limit)

    @property
    def loading(self) -> Loading | None:
        """The store, if it can load and `load_packs` may be used: with the default rules, which depend on the caller
        alone, one decision holds for everything that is loaded."""
        backend = unwrapped(self._store)
        return backend if isinstance(backend, Loading) and not self.rules_read_documents else None

    async def load_packs(
        self,
        context: Context,
        cls: type[Entity],
        packs: AsyncIterable[Pack],
        *,
        rebuild: bool = False,
        tenants: Iterable[str] = (),
    ) -> float:
        """The write trip of many new documents of one global entity, with their journal records. As `Loading.load`;
        Denied; WritesOff or TenantSuspended as soon as the context's tenant, or one of `tenants`, may not write."""
        loading = self.loading
        if loading is None:
            raise TypeError("this database cannot load")
        await self.authorize(context, "create", cls.__collection__)
        allowed = self._while_allowed(packs, cls, {context.tenant, *tenants})
        locked_s = await loading.load(allowed, self.at_now(context).now_us, rebuild=rebuild)
        self._notify(Transaction(self.reads, self.rules, context))  # without changes: the journal has the documents
        return locked_s

    async def _while_allowed(
        self, packs: AsyncIterable[Pack], cls: type[Entity], tenants: Collection[str | None]
    ) -> AsyncGenerator[Pack, None]:
        """The packs, until writes are turned off: a load may take minutes."""

        def check() -> None:
            if self.writes.refusal is not None:
                raise WritesOff(self.writes.refusal)
            if self.writes.closed:
                for tenant in tenants:
                    self.writes.check(tenant, [(cls.__collection__, None)])

        async for pack in packs:
            check()
            yield pack
        check()

    def commit_counters(self, operations: Sequence[Operation], now_us: int) -> Awaitable[Committed]:
        """The short form of the trip for Strongroom's own counters and leases. Their global collections (or fields of
        one) are not journalled and no rules apply to them; the operations expect the versions that they were decided
        on. As `Store.commit`."""
        return self._commit(Batch(None, tuple(operations), now_us))

    # --- One change -------------------------------------------------------------------------------------------

    async def create(self, context: Context, entity: E, *, idempotency_key: str | None = None) -> E:
        """Add an entity; without an id it gets a new one. Raises AlreadyExists, InvalidInput, Denied.

        The same call again with the same idempotency key (within a day) adds nothing and returns what the first did.
        """
        cls = type(entity)
        once = Idempotency.of(idempotency_key, "create", cls.__collection__.name, entity)
        try:
            return await self.transaction(context, lambda tx: tx.create(entity), idempotency=once)
        except Replayed as replayed:
            return await self.answer_of(context, cls, replayed)

    async def replace(
        self,
        context: Context,
        entity: E,
        *,
        expected: int | None = None,
        exists: bool = False,
        idempotency_key: str | None = None,
    ) -> E:
        """Replace the entity of this id, or add it. `expected`: the version that it must have now (0: it must not
        exist); `exists`: it must exist, at any version."""
        cls = type(entity)
        once = Idempotency.of(idempotency_key, "replace", cls.__collection__.name, entity, expected, exists)

        async def body(tx: Transaction) -> E:
            return await tx.replace(entity, expected=expected, exists=exists)

        try:
            return await self.transaction(context, body, idempotency=once)
        except Replayed as replayed:
            return await self.answer_of(context, cls, replayed)

    async def update(
        self,
        context: Context,
        cls: type[E],
        id: str,
        fields: Mapping[str, Any],
        *,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> E:
        """Set some fields of a document. Raises NotFound, Conflict (if `expected` is not its version), InvalidInput."""
        once = Idempotency.of(idempotency_key, "update", cls.__collection__.name, id, fields, expected)
        try:
            return await self.transaction(
                context, lambda tx: tx.update(cls, id, fields, expected=expected), idempotency=once
            )
        except Replayed as replayed:
            return await self.answer_of(context, cls, replayed)

    async def delete(
        self,
        context: Context,
        cls: type[Entity],
        id: str,
        *,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Remove a document. Raises NotFound, Conflict."""
        once = Idempotency.of(idempotency_key, "delete", cls.__collection__.name, id, expected)
        try:
            await self.transaction(context, lambda tx: tx.delete(cls, id, expected=expected), idempotency=once)
        except Replayed:
            return

    async def add(
        self,
        context: Context,
        cls: type[Entity],
        id: str,
        field: str,
        amount: int,
        *,
        at_most: int | None = None,
        at_least: int | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Add to a counter without reading it, within bounds. Raises NotFound, BoundExceeded."""

        async def body(tx: Transaction) -> None:
            tx.add(cls, id, field, amount, at_most=at_most, at_least=at_least)

        request = ("add", cls.__collection__.name, id, field, amount, at_most, at_least)
        try:
            await self.transaction(context, body, idempotency=Idempotency.of(idempotency_key, *request))
        except Replayed:
            return

    async def purge_expired(
        self, context: Context, cls: type[Entity], limit: int = 200, *, guard: Check | None = None
    ) -> int:
        """Remove at most `limit` documents whose time to live is over (no read finds them any more); returns how many.
        Nothing is removed once `guard`, the worker's job lease, does not hold."""
        context = self.at_now(context)
        found = await self.reads.expired(context, cls, limit)
        removals = [self.transaction(context, _removal(cls, document, guard)) for document in found]
        results = await asyncio.gather(*removals, return_exceptions=True)
        for result in results:
            # On Conflict the document was renewed, on NotFound another process removed it: nothing is left to do.
            if isinstance(result, BaseException) and not isinstance(result, Conflict | NotFound):
                raise result
        return sum(result is None for result in results)


# --- Helpers --------------------------------------------------------------------------------------------------


def _removal(cls: type[Entity], document: Document, guard: Check | None) -> Callable[[Transaction], Awaitable[None]]:
    async def body(transaction: Transaction) -> None:
        transaction.guard = guard
        await transaction.remove_expired(cls, document)

    return body


def _operation_of(error: StrongroomError, batch: Batch) -> Operation | None:
    index = error.details.get("operation")
    return batch.operations[index] if isinstance(index, int) else None


def _backoff_s(attempt: int) -> float:
    return random.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**attempt))  # noqa: S311 - jitter, not a secret


__all__ = ["Database", "Transaction"]
