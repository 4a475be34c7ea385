"""The reads of a database: the rules are asked, expired documents are left out, and caches are used where declared."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar, cast

from ..cache import Cache
from ..clock import Clock
from ..context import Context
from ..cooperative import in_slices, to_be_awaited
from ..entities import (
    Aggregate,
    And,
    Collection,
    Document,
    Entity,
    Filter,
    Or,
    Page,
    Query,
    Where,
    check_id,
    cursor_of,
    is_expired,
    project,
    with_cursor,
)
from ..errors import InvalidInput, NotFound, Problem
from ..rules import Request
from ..storage.port import Store
from .authorization import Authorization
from .index_advice import Shapes
from .pages import PageSizes, read_page

E = TypeVar("E", bound=Entity)


class Reads:
    """Reads documents for callers. Every method takes the caller's Context first."""

    def __init__(self, store: Store, rules: Authorization, clock: Clock) -> None:
        self._store = store
        self._rules = rules
        self._clock = clock
        self._page_sizes = PageSizes()
        self.cache: Cache | None = None
        """Where documents of the entities that declare a cache are read."""
        self.shapes = Shapes()
        """The queries that this process has asked, for advice on indexes."""

    async def load(self, context: Context, collection: Collection, id: str) -> Document | None:
        """A document as stored, also an expired one. The rules are not asked: this is for the write trip itself."""
        check_id(id)
        return await self._store.get(collection.name, scope_of(context, collection), id)

    @to_be_awaited
    def get(self, context: Context, cls: type[E], id: str, *, fresh: bool = False) -> Coroutine[Any, Any, E]:
        """A document. `fresh`: from the store, not from a cache. Raises NotFound, Denied."""
        return cast("Coroutine[Any, Any, E]", self._get(context, cls, id, fresh, required=True))

    @to_be_awaited
    def get_or_none(
        self, context: Context, cls: type[E], id: str, *, fresh: bool = False
    ) -> Coroutine[Any, Any, E | None]:
        """A document, or None. `fresh`: from the store, not from a cache. Raises Denied."""
        return self._get(context, cls, id, fresh, required=False)

    async def _get(self, context: Context, cls: type[E], id: str, fresh: bool, required: bool) -> E | None:
        # The hottest read: each further function that is called here shows in its figures.
        collection = cls.__collection__
        document = None
        if id:
            check_id(id)
            reader = self._store if collection.cached is None else self._reader(collection, fresh)
            document = await reader.get(collection.name, context.tenant if collection.tenant_scoped else None, id)
            if collection.ttl is not None and is_expired(collection, document, context.by(self._clock).now):
                document = None
        decision = self._rules.policy(Request(context, "get", collection, id, document))
        if not decision.allowed:
            await self._rules.refuse(context, "get", collection, id, decision)
        if document is not None:
            return cast(E, cls.__codec__.decode(document))
        if required:
            raise NotFound(f"{collection.name}/{id}: there is no such document")
        return None

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
        """One page of the documents that match. `fresh`: from the store, not from a cache. `max_bytes`: the page ends
        there too, and its cursor goes on. Raises InvalidInput (for `query.fields`: use `select`), Denied."""
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
        await self._rules.authorize(context, "list", collection)
        tenant = scope_of(context, collection)
        query = query.check(collection)
        self.shapes.seen(collection, query)
        scope = f"{tenant}/{collection.name}"
        kind = scope if query.fields is None else f"{scope}/{','.join(query.fields)}"
        if cursor is not None:
            query = with_cursor(query, collection, scope, cursor)
        visible = _unexpired(collection, query.where, context.by(self._clock).now)
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

    async def aggregate(
        self, context: Context, cls: type[Entity], *aggregates: Aggregate, where: Filter | None = None
    ) -> dict[str, Any]:
        """count, sum and average over the documents that match, by Aggregate.name. Raises InvalidInput, Denied."""
        collection = cls.__collection__
        await self._rules.authorize(context, "list", collection)
        for item in aggregates:
            item.check(collection)
        query = Query(where).check(collection)
        self.shapes.seen(collection, query)
        visible = _unexpired(collection, query.where, context.by(self._clock).now)
        return await self._store.aggregate(collection.name, scope_of(context, collection), aggregates, visible)

    async def expired(self, context: Context, cls: type[Entity], limit: int) -> Sequence[Document]:
        """At most `limit` documents whose time to live is over. The rules are not asked."""
        collection = cls.__collection__
        if collection.ttl is None:
            return ()
        query = Query(Where(collection.ttl, "<=", context.now), (collection.ttl,), limit).check(collection)
        return await self._store.find(collection.name, scope_of(context, collection), query)

    async def expired_holders(
        self, context: Context, collection: Collection, id: str, after: Document
    ) -> list[Document]:
        """The expired documents that hold a unique value of `after`, the document of this id that is to be written."""
        if collection.ttl is None:
            return []
        found: dict[str, Document] = {}
        for index in collection.indexes:
            values = [(name, after.get(name)) for name, _ in index.columns]
            if not index.unique or any(value is None for _, value in values):
                continue
            query = Query(And(*(Where(name, "==", value) for name, value in values)), limit=1)
            for document in await self._store.find(collection.name, scope_of(context, collection), query):
                if document["id"] != id and is_expired(collection, document, context.now):
                    found[document["id"]] = document
        return list(found.values())

    def _reader(self, collection: Collection, fresh: bool) -> Store | Cache:
        return self._store if self.cache is None or collection.cached is None or fresh else self.cache


def scope_of(context: Context, collection: Collection) -> str | None:
    """The tenant whose documents a call concerns; None for a global collection."""
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


__all__ = ["Reads", "scope_of"]
