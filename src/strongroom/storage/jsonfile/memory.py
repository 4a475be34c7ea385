"""Documents and the journal in memory: the committed state, drafts of the next state, batches, schema changes.

Pure: `store` decides when a draft becomes the committed state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, TypeVar

from msgspec import structs

from ...context import utc_from_us
from ...entities import (
    INT64_MAX,
    INT64_MIN,
    Collection,
    Document,
    FieldSpec,
    Index,
)
from ...errors import (
    AlreadyExists,
    BoundExceeded,
    Conflict,
    InvalidInput,
    NotFound,
    Problem,
    SchemaError,
    StrongroomError,
    TooLarge,
)
from .. import tagged_json as _values
from ..port import (
    MAX_DOCUMENT_BYTES,
    Add,
    Append,
    Batch,
    ChangeKind,
    Check,
    Committed,
    Create,
    Delete,
    JournalRow,
    Operation,
    Patch,
    Put,
    Record,
    SchemaChange,
    check_batch_size,
    check_operations,
    document_size,
)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Stored:
    """A document, and its JSON, which is made once so that a write only joins texts."""

    document: Document
    text: str

    @classmethod
    def of(cls, document: Document) -> Stored:
        return cls(document, _values.dumps(document))


@dataclass(frozen=True, slots=True)
class _Change:
    """One change of a document: the document and its values in unique indexes, before and after."""

    values_before: list[tuple[Any, ...]]
    values_after: list[tuple[Any, ...]]
    before: Stored | None
    after: Stored | None

    def reversed(self) -> _Change:
        return _Change(self.values_after, self.values_before, self.after, self.before)


@dataclass(slots=True)
class Section:
    """One tenant's documents of one collection, and the document that holds each value of a unique index."""

    stored: dict[str, Stored] = field(default_factory=dict)
    holders: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def copy(self) -> Section:
        return Section(dict(self.stored), dict(self.holders))

    def documents(self) -> Iterable[Document]:
        return (entry.document for entry in self.stored.values())

    def apply(self, id: str, change: _Change) -> None:
        for values in change.values_before:
            del self.holders[values]
        for values in change.values_after:
            self.holders[values] = id
        if change.after is None:
            del self.stored[id]
        else:
            self.stored[id] = change.after

    def index_again(self, collection: Collection) -> None:
        """Fill `holders` from the documents. SchemaError if two of them have one value of a unique index."""
        self.holders = {}
        for id, entry in self.stored.items():
            for index, values in _unique_values(collection, entry.document):
                if (other := self.holders.setdefault(values, id)) != id:
                    columns = " and ".join(_columns(index))
                    raise SchemaError(
                        f"add index {collection.name}.{index.name}: {other!r} and {id!r} have the same {columns}"
                    )


Key = tuple[str | None, str]  # tenant (None: global), collection


@dataclass(slots=True)
class State:
    """The committed state. Drafts share the journal. It grows in place. To redact or drop, a draft copies it.

    `lines` has the JSON of each record. `floors` has of a tenant (None: the platform) the greatest dropped sequence.
    """

    schema: dict[str, dict[str, Any]] = field(default_factory=dict)
    sections: dict[Key, Section] = field(default_factory=dict)
    journal: list[Record] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    deleted_version: int = 0
    """The greatest version that a deleted document had. New documents get a greater one, so that an id that is used
    again never repeats a version, even if the clock stands still or goes back."""
    last_sequence: int = 0
    floors: dict[str | None, int] = field(default_factory=dict)


class Draft:
    """The next state, in which a group of jobs makes its changes. Readers still see the committed state.

    A section is copied when the group first touches it; a job that fails is undone step by step.
    """

    def __init__(self, state: State, declared: Mapping[str, Collection]) -> None:
        self.state = state
        self.declared = declared
        self.schema = state.schema
        self.sections = dict(state.sections)
        self.deleted_version = state.deleted_version
        self.last_sequence = state.last_sequence
        self.floors = state.floors
        self.journal, self.journal_lines = state.journal, state.lines
        self.records: list[Record] = []
        self.lines: list[str] = []
        self.changed = False
        self._own: set[Key] = set()
        self._undo: list[Callable[[], object]] = []

    def attempt(self, job: Callable[[Draft], _T]) -> _T | Exception:
        """Run the job. Returns its answer, or its error after undoing its steps."""
        self._undo.clear()
        records, changed = len(self.records), self.changed
        deleted_version, last_sequence = self.deleted_version, self.last_sequence
        try:
            return job(self)
        except Exception as error:
            for step in reversed(self._undo):
                step()
            del self.records[records:], self.lines[records:]
            self.deleted_version, self.last_sequence, self.changed = deleted_version, last_sequence, changed
            return error

    def section(self, key: Key) -> Section:
        """The draft's own copy of the section, for changes."""
        if key not in self._own:
            self._own.add(key)
            self.sections[key] = self.sections[key].copy() if key in self.sections else Section()
        return self.sections[key]

    def find(self, key: Key, id: str) -> Document | None:
        section = self.sections.get(key)
        entry = section.stored.get(id) if section else None
        return entry.document if entry else None

    def store(self, key: Key, id: str, document: Document) -> None:
        """Add or replace a document. AlreadyExists if another one holds a value of a unique index."""
        section = self.section(key)
        old = section.stored.get(id)
        mine = list(_unique_values(self.declared[key[1]], document))
        for index, values in mine:
            if section.holders.get(values, id) != id:
                raise AlreadyExists(f"{key[1]}/{id}: another document has this {' and '.join(_columns(index))}")
        before = [values for _, values in _unique_values(self.declared[key[1]], old.document)] if old else []
        self._move(section, id, _Change(before, [values for _, values in mine], old, Stored.of(document)))

    def remove(self, key: Key, id: str) -> None:
        section = self.section(key)
        old = section.stored[id]
        before = [values for _, values in _unique_values(self.declared[key[1]], old.document)]
        self._move(section, id, _Change(before, [], old, None))

    def _move(self, section: Section, id: str, change: _Change) -> None:
        section.apply(id, change)
        self.changed = True
        self._undo.append(lambda: section.apply(id, change.reversed()))

    def append(self, record: Record, version: int | None) -> int:
        """Append a record to the journal. Returns its sequence."""
        self.last_sequence = sequence = self.last_sequence + 1
        record = structs.replace(
            record,
            before=copied(record.before),
            after=copied(record.after),
            claims=copied(record.claims),
            version=version,
            sequence=sequence,
        )
        self.records.append(record)
        self.lines.append(line_of(record))
        self.changed = True
        return sequence

    def rewrite(self, rows: Sequence[JournalRow]) -> int:
        """Redact records. The number of those found."""
        wanted = {row[:2]: row for row in rows}
        found = 0
        journal, lines = [*self.journal, *self.records], [*self.journal_lines, *self.lines]
        for at, record in enumerate(journal):
            row = wanted.get((record.sequence, record.id))
            if row is not None:
                journal[at] = _redacted(record, row)
                lines[at] = line_of(journal[at])
                found += 1
        self._replace_journal(journal, lines)
        return found

    def drop(self, tenant: str | None, through_sequence: int) -> int:
        """Remove a tenant's (None: the platform's) records up to and with a sequence. The number of those removed."""
        journal, lines = [*self.journal, *self.records], [*self.journal_lines, *self.lines]
        gone = [record.tenant == tenant and record.sequence <= through_sequence for record in journal]
        if not any(gone):
            return 0
        floor = max(record.sequence for record, away in zip(journal, gone, strict=True) if away)
        self.floors = {**self.floors, tenant: max(floor, self.floors.get(tenant, 0))}
        kept = [not away for away in gone]
        self._replace_journal(list(compress(journal, kept)), list(compress(lines, kept)))
        return sum(gone)

    def _replace_journal(self, journal: list[Record], lines: list[str]) -> None:
        """Take another journal, in which the group's own records are now."""
        self.journal, self.journal_lines, self.records, self.lines = journal, lines, [], []
        self.changed = True

    def adopted(self) -> State:
        """The draft as the committed state."""
        self.journal.extend(self.records)
        self.journal_lines.extend(self.lines)
        return State(
            self.schema,
            self.sections,
            self.journal,
            self.journal_lines,
            self.deleted_version,
            self.last_sequence,
            self.floors,
        )


def line_of(record: Record) -> str:
    """A record in the form of the file."""
    return _values.dumps(structs.asdict(record))


def _redacted(record: Record, row: JournalRow) -> Record:
    _, _, _, _, actor, _, _, _, entity_id, _, *texts = row
    before, after, salt, claims, _ = texts
    return structs.replace(
        record,
        actor=actor,
        entity_id=entity_id,
        before=None if before is None else _values.loads(before),
        after=None if after is None else _values.loads(after),
        salt=salt,
        claims=None if claims is None else _values.loads(claims),
    )


def copied(value: Any) -> Any:
    """A deep copy, so that a caller's later changes of its own value do not reach the store."""
    if isinstance(value, dict):
        return {name: copied(inner) for name, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def _columns(index: Index) -> list[str]:
    return [name for name, _ in index.columns]


def _unique_values(collection: Collection, document: Document) -> Iterable[tuple[Index, tuple[Any, ...]]]:
    """Each unique index with the document's values. Skips an index with a null value, which is not compared."""
    for index in collection.indexes:
        if index.unique:
            values = tuple(document[name] for name in _columns(index))
            if None not in values:
                yield index, (index.name, *values)


# --- Commit ---------------------------------------------------------------------------------------------------


def apply(draft: Draft, batch: Batch) -> Committed:
    """Apply a batch to a draft. Raises the port's errors, with the number of the failed operation."""
    check_operations(batch)
    check_batch_size(batch)
    versions: list[int] = []
    values: dict[int, int] = {}
    sequence = None
    for number, operation in enumerate(batch.operations):
        try:
            if isinstance(operation, Append):
                record = operation.record
                sequence = draft.append(record, record.version if operation.of is None else versions[operation.of])
                versions.append(0)
                continue
            version, value = _apply_one(draft, batch, operation)
        except StrongroomError as error:
            error.message = f"operation {number}: {error.message}"
            error.args = (error.message,)
            error.details["operation"] = number
            raise
        versions.append(version)
        if value is not None:
            values[number] = value
    return Committed(tuple(versions), values, sequence)


def _apply_one(
    draft: Draft, batch: Batch, operation: Create | Put | Patch | Delete | Add | Check
) -> tuple[int, int | None]:
    """The new version of the operation's document (0 if it has none), and the new value of an Add."""
    key = key_of(draft.declared, operation.collection, batch.tenant)
    id = operation.id
    old = draft.find(key, id)
    found: int = old["version"] if old else 0
    name = f"{operation.collection}/{id}"
    _check_expectation(operation, name, found)
    value, created_at, updated_at = None, None, None
    match operation:
        case Check():
            return 0, None
        case Delete():
            draft.remove(key, id)
            draft.deleted_version = max(draft.deleted_version, found)
            return 0, None
        case Create():
            given = operation.document
            created_at, updated_at = operation.created_at, operation.updated_at
        case Put():
            given = operation.document
            created_at, updated_at = operation.created_at, operation.updated_at
        case Patch():
            given = {**(old or {}), **operation.fields}
        case _:
            value = _added(operation, name, (old or {})[operation.field])
            given = {**(old or {}), operation.field: value}
    declared = {field_name: copied(given[field_name]) for field_name in draft.declared[operation.collection].fields}
    if (size := document_size(declared)) > MAX_DOCUMENT_BYTES:
        raise TooLarge(f"{name}: found {size} bytes in a document, expected at most {MAX_DOCUMENT_BYTES}")
    now = utc_from_us(batch.now_us)
    version = max(batch.now_us, (found or draft.deleted_version) + 1)
    system = {
        "id": id,
        "version": version,
        "created_at": created_at or (old["created_at"] if old else now),
        "updated_at": updated_at or now,
    }
    draft.store(key, id, {**system, **declared})
    return version, value


def _check_expectation(operation: Operation, name: str, found: int) -> None:
    match operation:
        case Create() if found:
            raise AlreadyExists(f"{name}: a document with this id exists already")
        case Patch() | Delete() | Add() if not found:
            raise NotFound(f"{name}: there is no such document")
        case Put(expected=expected) | Patch(expected=expected) | Delete(expected=expected) | Check(expected=expected):
            if expected is not None and expected != found:
                raise Conflict(f"{name}: found version {found}, expected {expected}")
        case _:
            pass


def _added(operation: Add, name: str, value: int) -> int:
    value += operation.amount
    least = INT64_MIN if operation.at_least is None else operation.at_least
    most = INT64_MAX if operation.at_most is None else operation.at_most
    if not least <= value <= most:
        raise BoundExceeded(f"{name}: adding {operation.amount} to {operation.field} would leave {least} to {most}")
    return value


def key_of(declared: Mapping[str, Collection], name: str, tenant: str | None) -> Key:
    """Where a tenant's documents of a collection are: no other tenant's key is ever made from the same two."""
    collection = declared.get(name)
    if collection is None:
        raise InvalidInput(f"{name}: the store was not prepared for this collection")
    if not collection.tenant_scoped:
        return None, name
    if tenant is None:
        raise InvalidInput([Problem("tenant", f"is needed: {name} belongs to tenants")])
    return tenant, name


# --- Schema ---------------------------------------------------------------------------------------------------


def _described(collection: Collection) -> dict[str, Any]:
    """A declaration in the form of the file."""
    return {
        "scope": "tenant" if collection.tenant_scoped else "global",
        "fields": {spec.name: str(spec.type) for spec in collection.fields.values()},
        "indexes": [{"fields": list(index.fields), "unique": index.unique} for index in collection.indexes],
    }


def _differences(draft: Draft, collection: Collection) -> list[SchemaChange]:
    """The changes that make the store fit one declaration."""
    name = collection.name
    there, wanted = draft.schema.get(name), _described(collection)
    if there is None:
        return [SchemaChange(ChangeKind.CREATE_COLLECTION, name)]
    if there["scope"] != wanted["scope"]:
        detail = f"it is {there['scope']} in the store, {wanted['scope']} in the declaration"
        dropped = SchemaChange(ChangeKind.DROP_COLLECTION, name, destructive=True, detail=detail)
        return [dropped, SchemaChange(ChangeKind.CREATE_COLLECTION, name)]
    changes = []
    for spec in collection.fields.values():
        kind = there["fields"].get(spec.name)
        if kind is None:
            changes.append(_addition(draft, name, spec))
        elif kind != spec.type:
            detail = f"from {kind} to {spec.type}"
            changes.append(SchemaChange(ChangeKind.CHANGE_FIELD, name, spec.name, destructive=True, detail=detail))
    for field_name in there["fields"].keys() - collection.fields.keys():
        changes.append(SchemaChange(ChangeKind.DROP_FIELD, name, field_name, destructive=True))
    for index in wanted["indexes"]:
        if index not in there["indexes"]:
            changes.append(SchemaChange(ChangeKind.ADD_INDEX, name, _index_name(index)))
    for index in there["indexes"]:
        if index not in wanted["indexes"]:
            changes.append(SchemaChange(ChangeKind.DROP_INDEX, name, _index_name(index)))
    return changes


def _index_name(described: dict[str, Any]) -> str:
    return Index(*described["fields"], unique=described["unique"]).name


def _addition(draft: Draft, name: str, spec: FieldSpec) -> SchemaChange:
    has_documents = any(section.stored for (_, other), section in draft.sections.items() if other == name)
    if has_documents and not spec.optional and not spec.has_default:
        detail = "it is required and has no default, and there are documents"
        return SchemaChange(ChangeKind.ADD_FIELD, name, spec.name, destructive=True, detail=detail)
    return SchemaChange(ChangeKind.ADD_FIELD, name, spec.name)


def prepare(
    draft: Draft, collections: Sequence[Collection], plan_only: bool, allow_destructive: bool
) -> tuple[SchemaChange, ...]:
    changes = {c.name: _differences(draft, c) for c in collections}
    planned = tuple(change for some in changes.values() for change in some)
    if plan_only:
        return planned
    refused = [change for change in planned if change.destructive]
    if refused and not allow_destructive:
        raise SchemaError(
            f"the declarations would lose stored data or not match it: {'; '.join(map(str, refused))}; "
            "allow_destructive permits it"
        )
    sections = dict(draft.sections)
    for (tenant, name), section in draft.sections.items():
        collection = next((c for c in collections if c.name == name), None)
        if collection is not None:
            fitted = Section(_fitted(section, collection, changes[name]))
            fitted.index_again(collection)
            sections[tenant, name] = fitted
    # Nothing may fail from here on, so that a prepare is applied whole or not at all.
    draft.sections = sections
    draft.schema = {**draft.schema, **{c.name: _described(c) for c in collections}}
    draft.declared = {c.name: c for c in collections}
    draft.changed = draft.changed or bool(planned)
    return planned


def _fitted(section: Section, collection: Collection, changes: list[SchemaChange]) -> dict[str, Stored]:
    """The section's documents with exactly the declared fields."""
    if any(change.kind is ChangeKind.DROP_COLLECTION for change in changes):
        return {}
    reset = {c.name for c in changes if c.kind in (ChangeKind.ADD_FIELD, ChangeKind.CHANGE_FIELD)}
    dropped = {c.name for c in changes if c.kind is ChangeKind.DROP_FIELD}
    if not reset and not dropped:
        return section.stored
    fitted = {}
    for id, entry in section.stored.items():
        kept = {name: value for name, value in entry.document.items() if name not in reset | dropped}
        given = {name: copied(spec.default) for name, spec in collection.fields.items() if name in reset}
        fitted[id] = Stored.of({**kept, **given})
    return fitted
