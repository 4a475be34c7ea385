"""The write trip and the reads: context → validate → rules → batch (change + journal record) → commit → notify.

Nothing reaches a backend by another way. `Database.transaction` is the trip; create, replace, update, delete and add
are transactions of one change.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Generic, TypeVar, cast

from ..cache import Cache
from ..clock import Clock, MachineClock
from ..context import Context, next_id
from ..cooperative import in_slices
from ..entities import (
    Aggregate,
    And,
    Collection,
    Document,
    Entity,
    Filter,
    Or,
    Query,
    Registry,
    Where,
    check_id,
    cursor_of,
    project,
    with_cursor,
)
from ..errors import (
    AlreadyExists,
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    Problem,
    StrongroomError,
    Unavailable,
)
from ..journal import Denials
from ..rules import Decision, Policy, Request, default_policy
from ..rules import Operation as RuleOperation
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
    Store,
)
from .idempotency import Calls, Idempotency, Once, Replayed, RequestKey
from .index_advice import Shapes
from .pages import PageSizes, read_page
from .transaction import (
    Transaction,
    answer_to_keep,
    expired_in_the_way,
    is_expired,
    stamp,
    with_fields,
)
from .write_state import WriteState

MAX_ATTEMPTS = 12
FIRST_BACKOFF_S = 0.002
MAX_BACKOFF_S = 0.25

E = TypeVar("E", bound=Entity)
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, and the cursor of the next (None: this was the last)."""

    items: list[T]
    next_cursor: str | None


class Database:
    """One store with its entities and rules. Every method takes the caller's Context first."""

    def __init__(
        self, store: Store, registry: Registry, policy: Policy = default_policy, clock: Clock | None = None
    ) -> None:
        self._store = store
        self._clock = clock if clock is not None else MachineClock()
        self.calls = Calls(store)
        """What is remembered of calls with an idempotency key."""
        self.registry = registry
        self._policy = policy
        self._listeners: list[Callable[[Transaction], None]] = []
        self.shapes = Shapes()
        """What this process has asked for, for advice on indexes."""
        self.retries: dict[str, int] = {}
        """Transactions that ran again because something they read had changed, by the collection of what had."""
        self._page_sizes = PageSizes()
        self.denials = Denials(store, self._commit)
        self._cache: Cache | None = None
        self.writes = WriteState(store)
        """Whether the store takes writes."""

    @property
    def embedded(self) -> bool:
        """Whether the store is in this very process: a read more costs no trip."""
        return self._store.capabilities.embedded

    def use(self, cache: Cache) -> None:
        """Read through this cache from now on, for the entities that declare it."""
        self._cache = cache

    # --- Committing -------------------------------------------------------------------------------------------

    def _commit(self, batch: Batch) -> Awaitable[Committed]:
        """As `Store.commit`; Unavailable while the store takes no writes."""
        if self.writes.refusal is not None:
            refused: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
            refused.set_exception(Unavailable(self.writes.refusal))
            return refused
        return self._store.commit(batch)

    def after_commit(self, listener: Callable[[Transaction], None]) -> None:
        """Call `listener` with each transaction once it is durably committed, and never before."""
        self._listeners.append(listener)

    def now_us(self) -> int:
        """The moment by the store's clock, in microseconds since the epoch."""
        return self._clock.now_us()

    def at_now(self, context: Context) -> Context:
        """The same call by the store's clock, unless its moment was chosen: the machine's own may be hours off."""
        return context.by(self._clock)

    # --- THE write trip ---------------------------------------------------------------------------------------

    async def transaction(
        self,
        context: Context,
        body: Callable[[Transaction], Awaitable[T]],
        *,
        idempotency: Idempotency | None = None,
    ) -> T:
        """Run `body`, which reads and changes, and commit all its changes and their journal records, or nothing.

        When something it read was changed by someone else meanwhile, `body` runs again on what is there now (at most
        MAX_ATTEMPTS times, with jitter): it must have no other effect than through its Transaction. Raises what `body`
        raises, Denied (journalled), Conflict, AlreadyExists, NotFound, BoundExceeded, TooLarge, Unavailable.
        """
        context = self.at_now(context)
        if not context.request_id:
            context = Context(context.tenant, context.actor, context.claims, next_id(), context.now_us)
        expired: list[tuple[Collection, Document]] = []
        for attempt in range(MAX_ATTEMPTS):
            transaction = Transaction(self, context)
            transaction.expired = expired
            try:
                result = await body(transaction)
            except StrongroomError:
                if idempotency is not None:  # what the body found missing or changed may be this very call's doing
                    await self.calls.before(context, idempotency)
                raise
            for change in transaction.changes:
                after = None if change.action == "add" else change.after
                rule = _RULE_OF[change.action]
                await self.authorize(context, rule, change.collection, change.operation.id, change.before, after)
            if transaction.is_empty and idempotency is None:
                return result
            once = None
            if idempotency is not None:
                before = await self.calls.before(context, idempotency)
                written = [change.operation.id for change in transaction.changes]
                if not written and isinstance(result, Entity):
                    written = [result.id]
                once = self.calls.operation(context, idempotency, written, answer_to_keep(result, transaction), before)
            operations = transaction.operations(once)
            batch = Batch(context.tenant, tuple(operations), context.now_us)
            try:
                committed = await self._commit(batch)
            except (Conflict, AlreadyExists, NotFound) as error:
                failed = _operation_of(error, batch)
                retry = idempotency is not None and failed is batch.operations[0]
                if isinstance(failed, Delete) and any(failed.id == document["id"] for _, document in expired):
                    expired, retry = [], True  # what was expired is gone, or was renewed
                elif isinstance(error, AlreadyExists) and not retry and attempt + 1 < MAX_ATTEMPTS:
                    found = await expired_in_the_way(self._store, transaction, failed)
                    expired, retry = expired + found, bool(found)
                again = retry or (not isinstance(error, NotFound) and transaction.may_retry(failed))
                if attempt + 1 == MAX_ATTEMPTS or not again:
                    raise
                name = failed.collection if isinstance(failed, Create | Put | Patch | Delete | Add | Check) else "other"
                self.retries[name] = self.retries.get(name, 0) + 1
                await asyncio.sleep(_backoff_s(attempt))
                context = self.at_now(context.at_now())
                continue
            stamp(transaction, batch, committed)
            self._forget_cached(transaction)
            for listener in self._listeners:
                listener(transaction)
            return result
        raise AssertionError("the last attempt returns or raises")

    async def repeated(self, context: Context, idempotency: Idempotency | None) -> Replayed | None:
        """What this very call came to if it was committed before: to be asked where a call begins by reading what it
        may have removed itself. None if it was not, or has no idempotency key. Raises Conflict."""
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
        """The entity that a repeated call was answered with. Where that was too long to be kept: as it is now."""
        document = replayed.answer
        if document is None:
            return await self.get(context, cls, replayed.written[0], fresh=True)
        collection, id = cls.__collection__, document["id"]
        context = self.at_now(context)
        await self.authorize(context, "get", collection, id, document)
        if not document["version"]:  # one that the commit gave
            now = await self.load(context, collection, id)
            same = now is not None and all(now[name] == document[name] for name in ("updated_at", *collection.fields))
            document["version"] = now["version"] if same and now is not None else replayed.version
        return cast(E, cls.__codec__.decode(document))

    def once(self, scope: str, actor: str, key: str, request: object, *, kept_until: datetime | None = None) -> Once:
        """For `commit_counters`: what commits once for one idempotency key of an actor; `request` tells another request
        with the same key apart."""
        call = Idempotency(key, request, scope=scope)
        context = self.at_now(Context(None, actor))
        operation = self.calls.operation(context, call, [], None, kept_until=kept_until)
        return Once(operation.id, operation, self.calls.alike(request))

    async def authorize(
        self,
        context: Context,
        operation: RuleOperation,
        collection: Collection,
        id: str | None = None,
        before: Document | None = None,
        after: Document | None = None,
    ) -> None:
        """Ask the rules. A denial is journalled first, then raised; of many alike, the first and how many followed."""
        decision = self.decide(context, operation, collection, id, before, after)
        if decision.allowed:
            return
        await self.denials.note(self.at_now(context), operation, collection.name, id or "", decision.reason)
        raise Denied(f"{operation} {collection.name}: {decision.reason}", reason=decision.reason)

    def decide(
        self,
        context: Context,
        operation: RuleOperation,
        collection: Collection,
        id: str | None = None,
        before: Document | None = None,
        after: Document | None = None,
    ) -> Decision:
        """What the rules say, journalling nothing: for each delivery of a stream, whose journal it would feed."""
        return self._policy(Request(context, operation, collection, id, before, after))

    @property
    def rules_read_documents(self) -> bool:
        """Whether the rules may look at what a document says. The default ones ask who the caller is only."""
        return self._policy is not default_policy

    async def changes(self, after: str, tenant: str | None, limit: int) -> ChangesPage:
        """A tenant's journal records, unauthorised: for a stream that asks the rules itself. As `Store.changes`."""
        return await self._store.changes(after, tenant=tenant, limit=limit)

    @property
    def loading(self) -> Loading | None:
        """The store, if it can load and `load_packs` may be used: the rules are the default ones, which ask who the
        caller is and never what the document says, so that one answer holds for all that is loaded."""
        return self._store if isinstance(self._store, Loading) and not self.rules_read_documents else None

    async def load_packs(
        self, context: Context, cls: type[Entity], packs: AsyncIterable[Pack], *, rebuild: bool = False
    ) -> float:
        """The trip for a great many new documents of one global entity, with the journal records and what belongs to
        them. As `Loading.load`; Denied, Unavailable while the store takes no writes."""
        if self.loading is None:
            raise TypeError("this database cannot load")
        await self.authorize(context, "create", cls.__collection__)
        if self.writes.refusal is not None:
            raise Unavailable(self.writes.refusal)
        locked_s = await self.loading.load(packs, self.at_now(context).now_us, rebuild=rebuild)
        for listener in self._listeners:
            listener(Transaction(self, context))  # of no change: the journal tells what was loaded
        return locked_s

    def commit_counters(self, operations: Sequence[Operation], now_us: int) -> Awaitable[Committed]:
        """The trip's short form for Strongroom's own counters and leases: global collections (or fields of one) that
        are not journalled and no caller's rules concern, changed under the versions they were decided on. As
        `Store.commit`."""
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
        """Replace the entity of this id, or add it. `expected`: the version it must have now (0: must not exist);
        `exists`: whichever, but it must be there."""
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

    # --- Reading ----------------------------------------------------------------------------------------------

    async def load(self, context: Context, collection: Collection, id: str) -> Document | None:
        """A document as stored, expired or not, unauthorised: for the trip itself."""
        check_id(id)
        return await self._store.get(collection.name, _scope(context, collection), id)

    async def get(self, context: Context, cls: type[E], id: str, *, fresh: bool = False) -> E:
        """A document. `fresh`: from the store, not from a cache. Raises NotFound, Denied."""
        found = await self.get_or_none(context, cls, id, fresh=fresh)
        if found is None:
            raise NotFound(f"{cls.__collection__.name}/{id}: there is no such document")
        return found

    async def get_or_none(self, context: Context, cls: type[E], id: str, *, fresh: bool = False) -> E | None:
        """A document, or None. `fresh`: from the store, not from a cache. Raises Denied."""
        collection = cls.__collection__
        if id:
            check_id(id)
        reader = self._reader(collection, fresh)
        document = await reader.get(collection.name, _scope(context, collection), id) if id else None
        if collection.ttl is not None and is_expired(collection, document, self.at_now(context).now):
            document = None
        decision = self._policy(Request(context, "get", collection, id, document))
        if not decision.allowed:
            await self.authorize(context, "get", collection, id, document)
        return cast(E, cls.__codec__.decode(document)) if document is not None else None

    async def find(
        self,
        context: Context,
        cls: type[E],
        query: Query = Query(),
        cursor: str | None = None,
        *,
        fresh: bool = False,
        max_bytes: int | None = None,
    ) -> Page[E]:
        """One page of the documents that match. `query.fields` is for `select`. `fresh`: from the store, not from a
        cache. `max_bytes`: the page ends there too, and its cursor goes on. Raises InvalidInput, Denied."""
        if query.fields is not None:
            raise InvalidInput([Problem("fields", "a projection gives dicts: use select")])
        page = await self.select(context, cls, query, cursor, fresh=fresh, max_bytes=max_bytes)
        return Page(cast(list[E], await in_slices(cls.__codec__.decode, page.items)), page.next_cursor)

    async def select(
        self,
        context: Context,
        cls: type[Entity],
        query: Query,
        cursor: str | None = None,
        *,
        fresh: bool = False,
        max_bytes: int | None = None,
    ) -> Page[Document]:
        """One page of documents as dicts, with only `query.fields` (and the id) where that is given. `fresh` and
        `max_bytes`: as `find`."""
        collection = cls.__collection__
        await self.authorize(context, "list", collection)
        tenant = _scope(context, collection)
        query = query.check(collection)
        self.shapes.seen(collection, query)
        scope = f"{tenant}/{collection.name}"
        kind = scope if query.fields is None else f"{scope}/{','.join(query.fields)}"
        if cursor is not None:
            query = with_cursor(query, collection, scope, cursor)
        visible = _unexpired(collection, query.where, self.at_now(context).now)
        wider = replace(query, where=visible, fields=_with_order(query))
        reader = self._reader(collection, fresh)
        if max_bytes is None:
            documents = await reader.find(collection.name, tenant, replace(wider, limit=query.limit + 1))
            page, more = documents[: query.limit], len(documents) > query.limit
        else:
            if self._page_sizes.are_large(kind, max_bytes):
                reader = self._store  # the cache would read a whole list of them at once
            page, more = await read_page(reader, collection.name, tenant, wider, self._page_sizes, kind, max_bytes)
        next_cursor = cursor_of(query, scope, page[-1]) if more else None
        return Page([project(query.fields, document) for document in page], next_cursor)

    def _reader(self, collection: Collection, fresh: bool) -> Store | Cache:
        return self._store if self._cache is None or collection.cached is None or fresh else self._cache

    def _forget_cached(self, transaction: Transaction) -> None:
        """Before the next read here: the journal tells the other processes, and this one again."""
        if self._cache is None:
            return
        for change in transaction.changes:
            tenant = _scope(transaction.context, change.collection)
            version = change.entity.version if change.entity is not None else 0
            id = change.operation.id
            self._cache.changed(change.collection.name, tenant, id, version, change.before, change.after)

    async def aggregate(
        self, context: Context, cls: type[Entity], *aggregates: Aggregate, where: Filter | None = None
    ) -> dict[str, Any]:
        """count, sum and average over the documents that match, by Aggregate.name. Raises InvalidInput, Denied."""
        collection = cls.__collection__
        await self.authorize(context, "list", collection)
        for item in aggregates:
            item.check(collection)
        query = Query(where).check(collection)
        self.shapes.seen(collection, query)
        where = query.where
        visible = _unexpired(collection, where, self.at_now(context).now)
        return await self._store.aggregate(collection.name, _scope(context, collection), aggregates, visible)

    async def purge_expired(
        self, context: Context, cls: type[Entity], limit: int = 200, *, guard: Check | None = None
    ) -> int:
        """Remove at most `limit` documents whose time to live is over (invisible already); returns how many. Nothing is
        removed any more once `guard`, the lease of whoever does this, is not true."""
        collection = cls.__collection__
        if collection.ttl is None:
            return 0
        context = self.at_now(context)
        query = Query(Where(collection.ttl, "<=", context.now), (collection.ttl,), limit).check(collection)
        found = await self._store.find(collection.name, _scope(context, collection), query)
        removals = [self.transaction(context, _removal(cls, document, guard)) for document in found]
        results = await asyncio.gather(*removals, return_exceptions=True)
        for result in results:
            # A Conflict was renewed, a NotFound removed by another process: nothing is left to do.
            if isinstance(result, BaseException) and not isinstance(result, Conflict | NotFound):
                raise result
        return sum(result is None for result in results)


# --- Helpers --------------------------------------------------------------------------------------------------


_RULE_OF: dict[str, RuleOperation] = {
    "create": "create",
    "update": "update",
    "add": "update",
    "delete": "delete",
    "expire": "delete",
}


def _removal(cls: type[Entity], document: Document, guard: Check | None) -> Callable[[Transaction], Awaitable[None]]:
    async def body(transaction: Transaction) -> None:
        transaction.guard = guard
        await transaction.remove_expired(cls, document)

    return body


def _scope(context: Context, collection: Collection) -> str | None:
    return context.tenant if collection.tenant_scoped else None


def _unexpired(collection: Collection, where: Filter | None, now: datetime) -> Filter | None:
    ttl = collection.ttl
    if ttl is None:
        return where
    alive: Filter = Where(ttl, ">", now)
    if collection.fields[ttl].optional:
        alive = Or(Where(ttl, "==", None), alive)
    return alive if where is None else And(where, alive)


def _with_order(query: Query) -> tuple[str, ...] | None:
    """The projection, widened by the fields that the next cursor is made of."""
    if query.fields is None:
        return None
    return tuple(dict.fromkeys((*query.fields, *(name for name, _ in query.order))))


def _operation_of(error: StrongroomError, batch: Batch) -> Operation | None:
    index = error.details.get("operation")
    return batch.operations[index] if isinstance(index, int) else None


def _backoff_s(attempt: int) -> float:
    return random.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**attempt))  # noqa: S311 - jitter, not a secret


__all__ = ["Database", "Page", "Transaction", "with_fields"]
