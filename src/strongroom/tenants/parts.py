"""The parts of a tenant's data: each kind of data tells which tenants it knows, exports a tenant's, and removes it.

Packages above this one bring their own parts (keys and quotas, webhooks); `app.py` hands them in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import ValidationError

from ..access import ALL_TENANTS
from ..context import Context, system_context
from ..database import Database, Transaction
from ..entities import MAX_PAGE_BYTES, Entity, Query, Where, check_id, problems_of
from ..errors import InvalidInput, Problem
from ..journal import has_been_tenant
from ..storage.port import Store
from ..storage.tagged_json import loads, quick_dumps

ROWS = 128
"""Documents that are read at once to find the tenants of a global collection."""
Removed = Sequence[tuple[str, str]]
"""The documents that a step removed: their collections and ids."""


@dataclass(slots=True)
class Imported:
    """What an import wrote, by collection, and what it left out, by the reason."""

    tenant: str
    written: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


class TenantPart(Protocol):
    """One kind of data that tenants have."""

    @property
    def name(self) -> str:
        """The name of its lines in an export."""
        ...

    async def tenants(self, after: str | None, limit: int) -> list[str]:
        """At most `limit` tenants that have such data, in the order of their UTF-8 bytes, after `after`."""
        ...

    def export(self, tenant: str, *, whole: bool) -> AsyncIterator[tuple[str, bytes]]:
        """The tenant's data: of each document its collection, and a JSON object without any secret in clear. `whole`:
        with the hashes of secrets, which an import needs."""
        ...

    def check(self, tenant: str, collection: str, record: bytes) -> None:
        """Raise InvalidInput with every problem of an exported record."""
        ...

    async def take(self, tenant: str, records: Sequence[tuple[str, bytes]], context: Context, told: Imported) -> None:
        """Write exported records that `check` accepted, and count what was written and what was left out."""
        ...

    async def remove(self, tx: Transaction, tenant: str, limit: int) -> Removed:
        """Plan the removal of about `limit` documents of the tenant. Nothing is left once this returns nothing."""
        ...

    def removed(self, removed: Removed) -> None:
        """Forget what was removed, once that is committed."""
        ...


class Owned:
    """The documents of a global collection that have a field `tenant`. `order`: the fields of the index that begins
    with it, by which the tenants are found (none: this collection alone makes no name a tenant)."""

    def __init__(self, database: Database, cls: type[Entity], order: Sequence[str] = ()) -> None:
        self._database = database
        self._cls = cls
        self._order = tuple(order)
        self.name = cls.__collection__.name

    async def tenants(self, after: str | None, limit: int) -> list[str]:
        return await tenants_of(self._database, self._cls, self._order, after, limit) if self._order else []

    async def export(self, tenant: str, *, whole: bool) -> AsyncIterator[tuple[str, bytes]]:
        async for document in documents(self._database, self._cls, None, Where("tenant", "==", tenant)):
            yield self.name, document

    def check(self, tenant: str, collection: str, record: bytes) -> None:
        if collection != self.name:
            raise InvalidInput([Problem("collection", f"found {collection[:64]!r}, expected {self.name}")])

    async def take(self, tenant: str, records: Sequence[tuple[str, bytes]], context: Context, told: Imported) -> None:
        told.left_out[f"{self.name}: make them anew"] += len(records)

    async def remove(self, tx: Transaction, tenant: str, limit: int) -> Removed:
        return await remove_owned(tx, self._cls, tenant, limit)

    def removed(self, removed: Removed) -> None:
        """Nothing is kept in memory that the change feed does not correct."""


class Documents:
    """The documents of the collections that are kept by tenant."""

    name = "documents"

    def __init__(self, database: Database, store: Store) -> None:
        self._database = database
        self._store = store
        self._by_name = {n: cls for n, cls in database.registry.by_name.items() if cls.__collection__.tenant_scoped}

    async def tenants(self, after: str | None, limit: int) -> list[str]:
        return await self._store.tenants(after, limit)

    async def export(self, tenant: str, *, whole: bool) -> AsyncIterator[tuple[str, bytes]]:
        for cls in self._by_name.values():
            async for document in documents(self._database, cls, tenant, None):
                yield cls.__collection__.name, document

    def check(self, tenant: str, collection: str, record: bytes) -> None:
        self._entity(collection, record)

    async def take(self, tenant: str, records: Sequence[tuple[str, bytes]], context: Context, told: Imported) -> None:
        entities = [self._entity(collection, record) for collection, record in records]
        by = Context(tenant, context.actor, system_context().claims, context.request_id)

        async def body(tx: Transaction) -> None:
            for entity in entities:
                await tx.create(entity)

        await self._database.transaction(by, body)
        told.written.update(collection for collection, _ in records)

    def _entity(self, collection: str, record: bytes) -> Entity:
        """An exported document. Raises InvalidInput with every problem."""
        cls = self._by_name.get(collection)
        if cls is None:
            raise InvalidInput([Problem("collection", f"there is no collection {collection[:64]!r} of tenants")])
        try:
            document = loads(record)
            entity = cls.model_validate({**document, "version": 0})
        except ValidationError as error:
            raise InvalidInput(problems_of(error, "record.", secrets=cls.__collection__.secrets)) from None
        except (ValueError, TypeError, ArithmeticError) as error:
            raise InvalidInput([Problem("record", f"is not a document: {str(error)[:100]}")]) from None
        check_id(entity.id, "record.id")
        cls.__codec__.encode(entity)
        return entity

    async def remove(self, tx: Transaction, tenant: str, limit: int) -> Removed:
        for cls in self._by_name.values():
            expired = await self._database.reads.expired(tx.context, cls, limit)  # `find` does not show them
            for one in expired:
                await tx.remove_expired(cls, one)
            found = (await tx.find(cls, Query(limit=limit))).items if not expired else []
            for document in found:
                await tx.delete(cls, document.id)
            if expired or found:
                return [(cls.__collection__.name, id) for id in (*(d["id"] for d in expired), *(d.id for d in found))]
        return []

    def removed(self, removed: Removed) -> None:
        """Nothing is kept in memory that the change feed does not correct."""

    async def any(self, tenant: str) -> bool:
        """Whether the tenant has a document now."""
        if not await has_been_tenant(self._store, tenant):
            return False
        for cls in self._by_name.values():
            if await self._store.find(cls.__collection__.name, tenant, Query(limit=1, fields=("id",))):
                return True
        return False


async def tenants_of(
    database: Database, cls: type[Entity], order: Sequence[str], after: str | None, limit: int
) -> list[str]:
    """At most `limit` tenants of a global collection, after `after`: of each tenant's documents few are read."""
    found: list[str] = []
    while len(found) < limit:
        where = Where("tenant", ">", after) if after is not None else None
        query = Query(where, tuple(order), ROWS, fields=("tenant",))
        page = await database.select(system_context(), cls, query)
        for name in dict.fromkeys(document["tenant"] for document in page.items):
            after = name
            if name != ALL_TENANTS and len(found) < limit:
                found.append(name)
        if page.next_cursor is None:
            break
    return found


async def documents(
    database: Database, cls: type[Entity], tenant: str | None, where: Where | None
) -> AsyncIterator[bytes]:
    """Documents in the order of their ids, as JSON objects with tagged values; secrets are left out."""
    collection = cls.__collection__
    cursor = None
    while True:
        query = Query(where, ("id",), ROWS)
        page = await database.select(system_context(tenant), cls, query, cursor, max_bytes=MAX_PAGE_BYTES)
        for document in page.items:
            shown = {name: None if name in collection.secrets else value for name, value in document.items()}
            yield quick_dumps(shown).encode()
        cursor = page.next_cursor
        if cursor is None:
            return


async def remove_owned(tx: Transaction, cls: type[Entity], tenant: str, limit: int) -> list[tuple[str, str]]:
    """Plan the removal of at most `limit` documents whose field `tenant` names this tenant."""
    found = (await tx.find(cls, Query(Where("tenant", "==", tenant), limit=limit))).items
    for document in found:
        await tx.delete(cls, document.id)
    return [(cls.__collection__.name, document.id) for document in found]


__all__ = ["Documents", "Imported", "Owned", "Removed", "TenantPart", "documents", "remove_owned", "tenants_of"]
