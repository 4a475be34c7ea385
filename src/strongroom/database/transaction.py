"""A transaction reads and collects changes; it knows what it read, so that the commit can demand it is still so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from pydantic import ValidationError

from ..context import Context, check_tenant_name, new_id, utc_from_us
from ..entities import (
    INT64_MAX,
    INT64_MIN,
    SYSTEM_FIELDS,
    UNKNOWN_FIELD,
    And,
    Collection,
    Document,
    Entity,
    NotStorable,
    Query,
    Where,
    check_id,
    encode_value,
    problems_of,
)
from ..errors import Conflict, InvalidInput, NotFound, Problem
from ..journal import change_record
from ..storage.port import (
    Add,
    Append,
    Batch,
    Check,
    Committed,
    Create,
    Delete,
    Operation,
    Patch,
    Put,
    Store,
)

if TYPE_CHECKING:
    from .database import Database, Page

E = TypeVar("E", bound=Entity)
Action = Literal["create", "update", "delete", "add", "expire"]


@dataclass(slots=True)
class Change:
    """One planned change: the store's operation, and what the rules and the journal need to know of it.

    `fixed`: its expectation is the caller's own word (or it has none), so a conflict is the caller's answer and not a
    reason to try again.
    """

    action: Action
    collection: Collection
    operation: Create | Put | Patch | Delete | Add
    before: Document | None
    after: Document | None
    entity: Entity | None
    fixed: bool


class Transaction:
    """What `Database.transaction` hands to its body. All its changes commit, or none, if nothing it read has changed.

    A document that was read is expected, at the commit, at the version it was read at; one read as missing must still
    be missing. `find` guards the documents it returned, not those that would newly match. `get` sees the changes made
    before it in the same transaction; `find` does not.
    """

    def __init__(self, database: Database, context: Context) -> None:
        self._database = database
        self.context = context
        self.changes: list[Change] = []
        self.guard: Check | None = None
        """What else must be so at the commit, beside what was read: a background worker's lease."""
        self._read: dict[tuple[str, str], Document | None] = {}  # as stored, expired ones too
        self._pending: dict[tuple[str, str], Document | None] = {}
        self._added: set[tuple[str, str]] = set()
        self.expired: list[tuple[Collection, Document]] = []
        """Documents whose time to live is over, and that hold a unique value which this transaction needs."""

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
        await self._database.authorize(self.context, "get", cls.__collection__, id, document)
        return cast(E, cls.__codec__.decode(document)) if document is not None else None

    async def find(self, cls: type[E], query: Query = Query(), cursor: str | None = None) -> Page[E]:
        """As `Database.find`; every document it returns is guarded until the commit."""
        page = await self._database.find(self.context, cls, query, cursor, fresh=True)  # never a cache
        for entity in page.items:
            key = (cls.__collection__.name, entity.id)
            self._read.setdefault(key, {**cls.__codec__.encode(entity), **_system_fields(entity)})
        return page

    async def _stored(self, cls: type[Entity], id: str) -> Document | None:
        key = (cls.__collection__.name, id)
        if key not in self._read:
            self._read[key] = await self._database.load(self.context, cls.__collection__, id)
        return self._read[key]

    async def _visible(self, cls: type[Entity], id: str) -> Document | None:
        key = (cls.__collection__.name, id)
        if key in self._pending:
            return self._pending[key]
        document = await self._stored(cls, id)
        return None if is_expired(cls.__collection__, document, self.context.now) else document

    # --- Changing ---------------------------------------------------------------------------------------------

    async def create(self, entity: E) -> E:
        """Add an entity; without an id it gets a new one. Returns the entity as it will be.

        The commit raises AlreadyExists if the id, or a value of a unique index, is taken.
        """
        cls = type(entity)
        collection = cls.__collection__
        chosen = entity.id
        if chosen:
            check_id(chosen)
        entity, document = _stored_form(with_fields(entity, id=chosen or new_id()))
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
        `exists`: whichever, but it must be there. Raises Conflict."""
        cls = type(entity)
        collection = cls.__collection__
        check_id(entity.id)
        before = await self._visible(cls, entity.id)
        _expect(cls, entity.id, before, expected)
        if exists and before is None:
            raise Conflict(
                f"{collection.name}/{entity.id}: found no document, expected one", found=0, expected="a document"
            )
        entity, document = _stored_form(entity)
        # One that is added is new, also where an expired one is still stored or this transaction has removed one.
        created_at = (_utc(entity.created_at) or self.context.now) if before is None else None
        expects = self._version_to_expect(collection, entity.id)
        operation = Put(collection.name, entity.id, document, expects, created_at)
        action: Action = "create" if before is None else "update"
        self._plan(action, collection, operation, before, document, entity, fixed=expected is not None)
        return entity

    async def update(self, cls: type[E], id: str, fields: Mapping[str, Any], *, expected: int | None = None) -> E:
        """Set some fields; the others stay. Raises NotFound, and InvalidInput that names every field that is wrong."""
        collection = cls.__collection__
        before = await self._visible(cls, id)
        if before is None:
            raise _missing(cls, id)
        _expect(cls, id, before, expected)
        entity, document = _stored_form(_merged(cls, before, fields))
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
        """Remove a document, if there is one, at whatever version it has when this commits: for one that others change
        all the time, whose version no commit would ever meet. One that is made before the commit is removed as well."""
        stored = await self._database.load(self.context, cls.__collection__, id)
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
        """Remove a document whose time to live is over, unless it has changed since it was found so."""
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
        if key in self._added if action != "add" else self._pending.get(key) is not None:
            raise InvalidInput([Problem("field", "add and another change of one document cannot share a transaction")])
        self.changes.append(Change(action, collection, operation, before, after, entity, fixed))
        if action == "add":
            self._added.add(key)
        elif after is None or entity is None:
            self._pending[key] = None
        else:
            created_at = self.created_at(self.changes[-1]) or self.context.now
            self._pending[key] = {**after, **_system_fields(entity), "created_at": created_at}

    @staticmethod
    def created_at(change: Change) -> datetime | None:
        """When the document of a change was made, as the store will have it; None: by this very commit."""
        if change.before is not None:
            return cast(datetime, change.before["created_at"])
        return change.operation.created_at if isinstance(change.operation, Create | Put) else None

    def _version_to_expect(self, collection: Collection, id: str) -> int | None:
        key = (collection.name, id)
        if key in self._pending:  # an earlier change of this transaction has made the demand already
            return None
        stored = self._read.get(key)
        return stored["version"] if stored is not None else 0

    # --- What the commit is made of ---------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether it changed and read nothing."""
        return not self.changes and not self._read

    def operations(self, first: Operation | None = None) -> list[Operation]:
        """`first`, checks of what was read and no change expects, then the changes, each followed by its record."""
        operations: list[Operation] = [] if first is None else [first]
        if self.guard is not None:
            operations.append(self.guard)
        # Before the changes, because a check sees what was changed before it. An addition and a creation expect no
        # version themselves; what was decided on the document as it was read must hold for them as well.
        expected = {
            (c.collection.name, c.operation.id)
            for c in self.changes
            if isinstance(c.operation, Put | Patch | Delete) and c.operation.expected is not None
        }
        for (name, id), document in self._read.items():
            if (name, id) not in expected:
                operations.append(Check(name, id, 0 if document is None else document["version"]))
        for collection, document in self.expired:  # before the changes, which need what these hold
            operations.append(Delete(collection.name, document["id"], document["version"]))
            if collection.journalled:
                by = Context(self.context.tenant, "system", {}, self.context.request_id, self.context.now_us)
                record = change_record(by, "expire", collection, document["id"], document, None)
                operations.append(Append(record, of=len(operations) - 1))
        for change in self.changes:
            operations.append(change.operation)
            if change.collection.journalled:
                record = change_record(
                    self.context, change.action, change.collection, change.operation.id, change.before, change.after
                )
                operations.append(Append(record, of=len(operations) - 1))
        return operations

    def may_retry(self, failed: Operation | None) -> bool:
        """Whether a conflict on this operation is nobody's answer, so that reading again and retrying is right."""
        if failed is self.guard and failed is not None:
            return False
        for change in self.changes:
            if change.operation is failed:
                return not change.fixed
        return True


# --- Around a commit ------------------------------------------------------------------------------------------


async def expired_in_the_way(
    store: Store, transaction: Transaction, failed: Operation | None
) -> list[tuple[Collection, Document]]:
    """The documents whose time to live is over that hold a unique value of the change that failed for one."""
    context = transaction.context
    change = next((change for change in transaction.changes if change.operation is failed), None)
    if change is None or change.after is None or change.collection.ttl is None:
        return []
    collection, after = change.collection, change.after
    tenant = context.tenant if collection.tenant_scoped else None
    found: dict[str, Document] = {}
    for index in collection.indexes:
        values = [(name, after.get(name)) for name, _ in index.columns]
        if not index.unique or any(value is None for _, value in values):
            continue
        query = Query(And(*(Where(name, "==", value) for name, value in values)), limit=1)
        for document in await store.find(collection.name, tenant, query):
            if document["id"] != change.operation.id and is_expired(collection, document, context.now):
                found[document["id"]] = document
    held = {document["id"] for _, document in transaction.expired}
    return [(collection, document) for id, document in found.items() if id not in held]


def answer_to_keep(result: object, transaction: Transaction) -> Document | None:
    """The document that a call answers with, to be kept for its repeat; its version is 0 where the commit gives it."""
    if not isinstance(result, Entity) or not hasattr(type(result), "__collection__"):
        return None
    now = transaction.context.now
    change = next((change for change in transaction.changes if change.entity is result), None)
    system = {name: getattr(result, name) for name in SYSTEM_FIELDS}
    if change is not None:
        system |= {"version": 0, "created_at": transaction.created_at(change) or now, "updated_at": now}
    return {**system, **result.__codec__.encode(result)}


def stamp(transaction: Transaction, batch: Batch, committed: Committed) -> None:
    """Give the entities that the body returned what the store decided: version and times."""
    versions = {id(op): version for op, version in zip(batch.operations, committed.versions, strict=True)}
    now = utc_from_us(batch.now_us)
    for change in transaction.changes:
        if change.entity is None:
            continue
        created = transaction.created_at(change) or now
        change.entity.__dict__.update(version=versions[id(change.operation)], created_at=created, updated_at=now)


# --- Helpers --------------------------------------------------------------------------------------------------


def is_expired(collection: Collection, document: Document | None, now: datetime) -> bool:
    """Whether a document's time to live is over; it is then as good as gone, whether or not it was removed yet."""
    if document is None or collection.ttl is None:
        return False
    end = document[collection.ttl]
    return end is not None and end <= now


def with_fields(entity: E, **fields: Any) -> E:
    """A shallow copy with some fields set, without validating again."""
    copy = entity.__class__.__new__(entity.__class__)
    object.__setattr__(copy, "__dict__", {**entity.__dict__, **fields})
    object.__setattr__(copy, "__pydantic_fields_set__", entity.__pydantic_fields_set__)
    object.__setattr__(copy, "__pydantic_extra__", entity.__pydantic_extra__)
    object.__setattr__(copy, "__pydantic_private__", entity.__pydantic_private__)
    return copy


def _stored_form(entity: E) -> tuple[E, Document]:
    """An entity as a read will give it, and its document: what the store has no form for (a UUID or a tuple in a free
    `dict`) is answered as what it became."""
    codec = entity.__codec__
    document = codec.encode(entity)
    return cast(E, codec.decode({**_system_fields(entity), **document})), document


def _system_fields(entity: Entity | None) -> Document:
    return {name: getattr(entity, name) for name in SYSTEM_FIELDS} if entity is not None else {}


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
    """The stored document with some fields set, validated as a whole, so that rules across fields hold."""
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
