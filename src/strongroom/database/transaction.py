"""A transaction reads and plans changes; the commit then requires that what it read has not changed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from ..context import Context, check_tenant_name, new_id
from ..entities import (
    INT64_MAX,
    INT64_MIN,
    SYSTEM_FIELDS,
    UNKNOWN_FIELD,
    Collection,
    Document,
    Entity,
    NotStorable,
    Page,
    Query,
    check_id,
    encode_value,
    is_expired,
    problems_of,
)
from ..errors import Conflict, InvalidInput, NotFound, Problem
from ..storage.port import Add, Check, Create, Delete, Operation, Patch, Put
from .authorization import Authorization
from .change import Action, Change, Found, operations_of, system_fields
from .reads import Reads

E = TypeVar("E", bound=Entity)


class Transaction:
    """What `Database.transaction` hands to its body. All its changes commit or none, and only if no document that it
    read has changed.

    The commit expects each document at the version that was read; a document that was read as missing must still be
    missing. `find` guards the documents that it returned, not documents that would newly match. `get` sees earlier
    changes of the same transaction; `find` does not.
    """

    def __init__(self, reads: Reads, rules: Authorization, context: Context) -> None:
        self._reads = reads
        self._rules = rules
        self.context = context
        self.changes: list[Change] = []
        self.guard: Check | None = None
        """A further condition of the commit: that a background worker still holds its lease."""
        self._read: dict[tuple[str, str], Document | None] = {}  # as stored, expired ones too
        self._planned: dict[tuple[str, str], Change] = {}  # the last change of each document, additions left out
        self._added: set[tuple[str, str]] = set()
        self.expired: list[Found] = []
        """Expired documents that hold a unique value which this transaction needs."""

    # --- Reading ----------------------------------------------------------------------------------------------

    async def get(self, cls: type[E], id: str) -> E:
        """The document. Raises NotFound."""
        found = await self.get_or_none(cls, id)
        if found is None:
            raise _missing(cls, id)
        return found

    async def get_or_none(self, cls: type[E], id: str) -> E | None:
        """The document, or None."""
        document = await self._visible(cls, id)
        await self._rules.authorize(self.context, "get", cls.__collection__, id, document)
        return cast(E, cls.__codec__.decode(document)) if document is not None else None

    async def find(self, cls: type[E], query: Query = Query(), cursor: str | None = None) -> Page[E]:
        """As `Database.find`; the commit expects every document that it returns unchanged."""
        page = await self._reads.find(self.context, cls, query, cursor, fresh=True)  # never a cache
        for entity in page.items:
            key = (cls.__collection__.name, entity.id)
            self._read.setdefault(key, {**cls.__codec__.encode(entity), **system_fields(entity)})
        return page

    async def _stored(self, cls: type[Entity], id: str) -> Document | None:
        key = (cls.__collection__.name, id)
        if key not in self._read:
            self._read[key] = await self._reads.load(self.context, cls.__collection__, id)
        return self._read[key]

    async def _visible(self, cls: type[Entity], id: str) -> Document | None:
        planned = self._planned.get((cls.__collection__.name, id))
        if planned is not None:
            return planned.planned(self.context.now)
        document = await self._stored(cls, id)
        return None if is_expired(cls.__collection__, document, self.context.now) else document

    # --- Changing ---------------------------------------------------------------------------------------------

    async def create(self, entity: E) -> E:
        """Add an entity; without an id it gets a new one. Returns the entity as it will be stored.

        The commit raises AlreadyExists if the id, or a value of a unique index, is taken.
        """
        cls = type(entity)
        collection = cls.__collection__
        chosen = entity.id
        if chosen:
            check_id(chosen)
        entity, document = _stored_form(entity, chosen or new_id())
        operation: Create | Put = Create(collection.name, entity.id, document, _utc(entity.created_at))
        if chosen and collection.ttl is not None:
            stored = await self._stored(cls, chosen)
            if stored is not None and is_expired(collection, stored, self.context.now):
                created_at = operation.created_at or self.context.now  # not that of the one before
                operation = Put(collection.name, entity.id, document, stored["version"], created_at)
        self._plan("create", collection, operation, None, document, entity, fixed=True)
        return entity

    async def replace(self, entity: E, *, expected: int | None = None, exists: bool = False) -> E:
        """Replace the entity of this id, or add it. `expected`: the version it must have now (0: it must not exist);
        `exists`: it must exist, at any version. Raises Conflict."""
        cls = type(entity)
        collection = cls.__collection__
        check_id(entity.id)
        before = await self._visible(cls, entity.id)
        _expect(cls, entity.id, before, expected)
        if exists and before is None:
            raise Conflict(
                f"{collection.name}/{entity.id}: found no document, expected one", found=0, expected="a document"
            )
        entity, document = _stored_form(entity, entity.id)
        # An added document is new, even if an expired one is still stored or this transaction has removed one.
        created_at = (_utc(entity.created_at) or self.context.now) if before is None else None
        expects = self._version_to_expect(collection, entity.id)
        operation = Put(collection.name, entity.id, document, expects, created_at)
        action: Action = "create" if before is None else "update"
        self._plan(action, collection, operation, before, document, entity, fixed=expected is not None)
        return entity

    async def update(self, cls: type[E], id: str, fields: Mapping[str, Any], *, expected: int | None = None) -> E:
        """Set some fields; the others stay. Raises NotFound, and InvalidInput that names every wrong field."""
        collection = cls.__collection__
        before = await self._visible(cls, id)
        if before is None:
            raise _missing(cls, id)
        _expect(cls, id, before, expected)
        entity, document = _stored_form(_merged(cls, before, fields), id)
        changed = {name: document[name] for name in fields}
        operation = Patch(collection.name, id, changed, self._version_to_expect(collection, id))
        self._plan("update", collection, operation, before, document, entity, fixed=expected is not None)
        return entity

    async def delete(self, cls: type[Entity], id: str, *, expected: int | None = None) -> None:
        """Remove a document. Raises NotFound if there is none."""
        collection = cls.__collection__
        before = await self._visible(cls, id)
        if before is None:
            raise _missing(cls, id)
        _expect(cls, id, before, expected)
        operation = Delete(collection.name, id, self._version_to_expect(collection, id))
        self._plan("delete", collection, operation, before, None, None, fixed=expected is not None)

    async def drop(self, cls: type[Entity], id: str) -> None:
        """Remove a document, if there is one, at the version that it has at the commit. This is for documents that
        change all the time, so that no commit would meet their version. A document made before the commit is removed as
        well."""
        stored = await self._reads.load(self.context, cls.__collection__, id)
        if stored is None:
            self._read.setdefault((cls.__collection__.name, id), None)  # must still be missing, or this runs again
            return
        self._plan("delete", cls.__collection__, Delete(cls.__collection__.name, id), stored, None, None, fixed=False)

    def add(
        self,
        cls: type[Entity],
        id: str,
        field: str,
        amount: int,
        *,
        at_most: int | None = None,
        at_least: int | None = None,
    ) -> None:
        """Add to a counter field without reading it.

        The commit raises NotFound, or BoundExceeded if the counter would go above `at_most` or below `at_least`.
        """
        collection = cls.__collection__
        check_id(id)
        counters = sorted(f.name for f in collection.fields.values() if f.counter)
        problems = []
        if field not in counters:
            problems.append(Problem("field", f"found {field!r}, expected a counter of {collection.name}: {counters}"))
        if type(amount) is not int or not INT64_MIN <= amount <= INT64_MAX:
            problems.append(Problem("amount", f"found {amount!r}, expected an int64"))
        if problems:
            raise InvalidInput(problems)
        operation = Add(collection.name, id, field, amount, at_most, at_least)
        self._plan("add", collection, operation, None, {field: amount}, None, fixed=True)

    async def remove_expired(self, cls: type[Entity], document: Document) -> None:
        """Remove an expired document, unless it has changed since it was found."""
        collection = cls.__collection__
        operation = Delete(collection.name, document["id"], document["version"])
        self._plan("expire", collection, operation, document, None, None, fixed=True)

    def _plan(
        self,
        action: Action,
        collection: Collection,
        operation: Create | Put | Patch | Delete | Add,
        before: Document | None,
        after: Document | None,
        entity: Entity | None,
        *,
        fixed: bool,
    ) -> None:
        if action == "create" and collection.tenant_scoped and self.context.tenant is not None:
            check_tenant_name(self.context.tenant)
        key = (collection.name, operation.id)
        if key in self._added if action != "add" else self._has_document(key):
            raise InvalidInput([Problem("field", "add and another change of one document cannot share a transaction")])
        change = Change(action, collection, operation, before, after, entity, fixed)
        self.changes.append(change)
        if action == "add":
            self._added.add(key)
        else:
            self._planned[key] = change

    def _has_document(self, key: tuple[str, str]) -> bool:
        """Whether an earlier change of this transaction writes the document."""
        planned = self._planned.get(key)
        return planned is not None and planned.entity is not None

    def _version_to_expect(self, collection: Collection, id: str) -> int | None:
        key = (collection.name, id)
        if key in self._planned:  # an earlier change of this transaction expects it already
            return None
        stored = self._read.get(key)
        return stored["version"] if stored is not None else 0

    # --- What the commit is made of ---------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether the transaction read and changed nothing."""
        return not self.changes and not self._read

    def operations(self, first: Operation | None = None) -> tuple[Operation, ...]:
        """What the commit consists of, `first` before everything else."""
        before = [operation for operation in (first, self.guard) if operation is not None]
        return operations_of(self.context, self.changes, self._read, self.expired, before)

    def may_retry(self, failed: Operation | None) -> bool:
        """Whether the transaction runs again after a conflict on this operation; else the conflict is the caller's
        answer."""
        if failed is self.guard and failed is not None:
            return False
        for change in self.changes:
            if change.operation is failed:
                return not change.fixed
        return True


# --- Helpers --------------------------------------------------------------------------------------------------


def _stored_form(entity: E, id: str) -> tuple[E, Document]:
    """An entity as a read will give it, under this id, and its document. What the store has no form for (a UUID or a
    tuple in a free `dict`) is answered as the store will have it."""
    codec = entity.__codec__
    document = codec.encode(entity)
    stored = {
        "id": id,
        "version": entity.version,
        "created_at": entity.created_at,
        "updated_at": entity.updated_at,
        **document,
    }
    return cast(E, codec.decode(stored)), document


def _utc(moment: datetime | None) -> datetime | None:
    try:
        return cast("datetime | None", encode_value(moment, "created_at"))
    except NotStorable as bad:
        raise InvalidInput([bad.problem]) from None


def _missing(cls: type[Entity], id: str) -> NotFound:
    return NotFound(f"{cls.__collection__.name}/{id}: there is no such document")


def _expect(cls: type[Entity], id: str, before: Document | None, expected: int | None) -> None:
    found = 0 if before is None else before["version"]
    if expected is not None and expected != found:
        raise Conflict(
            f"{cls.__collection__.name}/{id}: found version {found}, expected {expected}",
            found=found,
            expected=expected,
        )


def _merged(cls: type[E], before: Document, fields: Mapping[str, Any]) -> E:
    """The stored document with some fields set. It is validated as a whole, so that rules across fields hold."""
    collection = cls.__collection__
    problems = [
        Problem(name, "cannot be changed: it is set by the store" if name in SYSTEM_FIELDS else UNKNOWN_FIELD)
        for name in fields
        if name not in collection.fields
    ]
    known = {name: value for name, value in fields.items() if name in collection.fields}
    try:
        entity = cls.model_validate({**before, **known})
    except ValidationError as error:
        raise InvalidInput([*problems, *problems_of(error, secrets=collection.secrets)]) from None
    if problems:
        raise InvalidInput(problems)
    return entity
