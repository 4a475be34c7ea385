"""The JSON store: everything in memory and in one readable file, for development and tests.

The file is `{"strongroom": 1, "schema": …, "global": {collection: {id: document}}, "tenants": {tenant: {collection:
{id: document}}}, "journal": […]}`, a document or record a line. Each group of commits writes it anew beside itself and
renames it into place, so a crash leaves the old or the new file, never a torn one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, TypeVar

from ..context import utc_from_us
from ..entity import INT64_MAX, INT64_MIN, Collection, Document, FieldSpec, Index
from ..errors import (
    AlreadyExists,
    BoundExceeded,
    Conflict,
    InvalidInput,
    NotFound,
    Problem,
    SchemaError,
    StorageFull,
    StoreError,
    StrongroomError,
    TooLarge,
    Unavailable,
)
from ..query import Aggregate, Filter, Query, aggregate, evaluate
from . import _values
from .port import (
    MAX_BATCH_BYTES,
    MAX_CHANGES_PAGE,
    MAX_DOCUMENT_BYTES,
    MAX_OPERATIONS,
    Add,
    Append,
    Batch,
    Capabilities,
    ChangeKind,
    ChangesPage,
    Check,
    Committed,
    Create,
    Delete,
    Health,
    Operation,
    Patch,
    Put,
    Record,
    SchemaChange,
    document_size,
)

FORMAT = 1
_CURSOR = re.compile(r"[0-9]{1,18}")
_T = TypeVar("_T")


# --- What is in memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stored:
    """A document, and its JSON, which is made once so that a write only joins texts."""

    document: Document
    text: str

    @classmethod
    def of(cls, document: Document) -> _Stored:
        return cls(document, _values.dumps(document))


@dataclass(frozen=True, slots=True)
class _Change:
    """One document's step: its values in unique indexes and itself, before and after."""

    values_before: list[tuple[Any, ...]]
    values_after: list[tuple[Any, ...]]
    before: _Stored | None
    after: _Stored | None

    def reversed(self) -> _Change:
        return _Change(self.values_after, self.values_before, self.after, self.before)


@dataclass(slots=True)
class _Section:
    """One tenant's documents of one collection, and who holds each value of its unique indexes."""

    stored: dict[str, _Stored] = field(default_factory=dict)
    holders: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def copy(self) -> _Section:
        return _Section(dict(self.stored), dict(self.holders))

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


_Key = tuple[str | None, str]  # tenant (None: global), collection


@dataclass(slots=True)
class _State:
    """What is committed. The journal only grows, and drafts share it."""

    schema: dict[str, dict[str, Any]] = field(default_factory=dict)
    sections: dict[_Key, _Section] = field(default_factory=dict)
    journal: list[Record] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    deleted_version: int = 0
    """The greatest version that a deleted document had. New documents get a greater one, so that an id that is used
    again never repeats a version, even if the clock stands still or goes back."""


class _Draft:
    """The next state: what a group of jobs makes of the committed one, which stays as it is for readers.

    A section is copied when the group first touches it; a job that fails is undone step by step.
    """

    def __init__(self, state: _State, declared: Mapping[str, Collection]) -> None:
        self.state = state
        self.declared = declared
        self.schema = state.schema
        self.sections = dict(state.sections)
        self.deleted_version = state.deleted_version
        self.records: list[Record] = []
        self.lines: list[str] = []
        self.changed = False
        self._own: set[_Key] = set()
        self._undo: list[Callable[[], object]] = []

    def attempt(self, job: Callable[[_Draft], _T]) -> _T | Exception:
        """The job's answer, or its error, and then nothing of it has happened."""
        self._undo.clear()
        records, deleted_version, changed = len(self.records), self.deleted_version, self.changed
        try:
            return job(self)
        except Exception as error:
            for step in reversed(self._undo):
                step()
            del self.records[records:], self.lines[records:]
            self.deleted_version, self.changed = deleted_version, changed
            return error

    def section(self, key: _Key) -> _Section:
        """The section, to be changed."""
        if key not in self._own:
            self._own.add(key)
            self.sections[key] = self.sections[key].copy() if key in self.sections else _Section()
        return self.sections[key]

    def find(self, key: _Key, id: str) -> Document | None:
        section = self.sections.get(key)
        entry = section.stored.get(id) if section else None
        return entry.document if entry else None

    def store(self, key: _Key, id: str, document: Document) -> None:
        """Add or replace a document. AlreadyExists if another one holds a value of a unique index."""
        section = self.section(key)
        old = section.stored.get(id)
        mine = list(_unique_values(self.declared[key[1]], document))
        for index, values in mine:
            if section.holders.get(values, id) != id:
                raise AlreadyExists(f"{key[1]}/{id}: another document has this {' and '.join(_columns(index))}")
        before = [values for _, values in _unique_values(self.declared[key[1]], old.document)] if old else []
        self._move(section, id, _Change(before, [values for _, values in mine], old, _Stored.of(document)))

    def remove(self, key: _Key, id: str) -> None:
        section = self.section(key)
        old = section.stored[id]
        before = [values for _, values in _unique_values(self.declared[key[1]], old.document)]
        self._move(section, id, _Change(before, [], old, None))

    def _move(self, section: _Section, id: str, change: _Change) -> None:
        section.apply(id, change)
        self.changed = True
        self._undo.append(lambda: section.apply(id, change.reversed()))

    def append(self, record: Record, version: int | None) -> int:
        """Put a record at the journal's end; gives its sequence."""
        sequence = len(self.state.journal) + len(self.records) + 1
        record = replace(
            record, before=_copied(record.before), after=_copied(record.after), version=version, sequence=sequence
        )
        self.records.append(record)
        self.lines.append(_values.dumps(asdict(record)))
        self.changed = True
        return sequence

    def adopted(self) -> _State:
        """The draft as the committed state."""
        journal, lines = self.state.journal, self.state.lines
        journal.extend(self.records)
        lines.extend(self.lines)
        return _State(self.schema, self.sections, journal, lines, self.deleted_version)

    def rendered(self) -> str:
        """The draft as the text of its file."""
        tenants: dict[str, dict[str, str]] = {}
        shared: dict[str, str] = {}
        for (tenant, collection), section in self.sections.items():
            if section.stored:
                text = _braced((id, entry.text) for id, entry in section.stored.items())
                (shared if tenant is None else tenants.setdefault(tenant, {}))[collection] = text
        journal = ",\n".join([*self.state.lines, *self.lines])
        return (
            f'{{"strongroom": {FORMAT},\n'
            f'"schema": {_braced((name, json.dumps(one)) for name, one in self.schema.items())},\n'
            f'"deleted_version": {self.deleted_version},\n'
            f'"global": {_braced(shared.items())},\n'
            f'"tenants": {_braced((tenant, _braced(parts.items())) for tenant, parts in tenants.items())},\n'
            f'"journal": [\n{journal}\n]}}\n'
        )


def _braced(members: Iterable[tuple[str, str]]) -> str:
    body = ",\n".join(f"{json.dumps(name, ensure_ascii=False)}: {text}" for name, text in members)
    return f"{{\n{body}\n}}" if body else "{}"


def _copied(value: Any) -> Any:
    """A copy that shares nothing that can be changed: callers may alter what they gave or were given."""
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _columns(index: Index) -> list[str]:
    return [name for name, _ in index.columns]


def _unique_values(collection: Collection, document: Document) -> Iterable[tuple[Index, tuple[Any, ...]]]:
    """Each unique index, with what the document has there; an index with a null in it is not compared."""
    for index in collection.indexes:
        if index.unique:
            values = tuple(document[name] for name in _columns(index))
            if None not in values:
                yield index, (index.name, *values)


# --- Commit ---------------------------------------------------------------------------------------------------


def _check_limits(batch: Batch) -> None:
    if len(batch.operations) > MAX_OPERATIONS:
        raise TooLarge(f"found {len(batch.operations)} operations in a batch, expected at most {MAX_OPERATIONS}")
    size = 0
    for operation in batch.operations:
        match operation:
            case Create() | Put():
                size += document_size(operation.document)
            case Patch():
                size += document_size(operation.fields)
            case Append():
                size += sum(document_size(part) for part in (operation.record.before, operation.record.after) if part)
            case _:
                pass
    if size > MAX_BATCH_BYTES:
        raise TooLarge(f"found {size} bytes in a batch, expected at most {MAX_BATCH_BYTES}")


def _apply(draft: _Draft, batch: Batch) -> Committed:
    """Apply a batch to a draft, or raise what the port says, with the number of the operation that failed."""
    _check_limits(batch)
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
    draft: _Draft, batch: Batch, operation: Create | Put | Patch | Delete | Add | Check
) -> tuple[int, int | None]:
    """The new version of the operation's document (0 if it has none), and what an Add came to."""
    key = _key(draft.declared, operation.collection, batch.tenant)
    id = operation.id
    old = draft.find(key, id)
    found: int = old["version"] if old else 0
    name = f"{operation.collection}/{id}"
    _check_expectation(operation, name, found)
    value, created_at = None, None
    match operation:
        case Check():
            return 0, None
        case Delete():
            draft.remove(key, id)
            draft.deleted_version = max(draft.deleted_version, found)
            return 0, None
        case Create():
            given, created_at = operation.document, operation.created_at
        case Put():
            given = operation.document
        case Patch():
            given = {**(old or {}), **operation.fields}
        case _:
            value = _added(operation, name, (old or {})[operation.field])
            given = {**(old or {}), operation.field: value}
    declared = {field_name: _copied(given[field_name]) for field_name in draft.declared[operation.collection].fields}
    if (size := document_size(declared)) > MAX_DOCUMENT_BYTES:
        raise TooLarge(f"{name}: found {size} bytes in a document, expected at most {MAX_DOCUMENT_BYTES}")
    now = utc_from_us(batch.now_us)
    version = max(batch.now_us, (found or draft.deleted_version) + 1)
    system = {
        "id": id,
        "version": version,
        "created_at": old["created_at"] if old else created_at or now,
        "updated_at": now,
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


def _key(declared: Mapping[str, Collection], name: str, tenant: str | None) -> _Key:
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
    """What the file says of a declaration."""
    return {
        "scope": "tenant" if collection.tenant_scoped else "global",
        "fields": {spec.name: str(spec.type) for spec in collection.fields.values()},
        "indexes": [{"fields": list(index.fields), "unique": index.unique} for index in collection.indexes],
    }


def _differences(draft: _Draft, collection: Collection) -> list[SchemaChange]:
    """What would have to change for the store to fit one declaration."""
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


def _addition(draft: _Draft, name: str, spec: FieldSpec) -> SchemaChange:
    has_documents = any(section.stored for (_, other), section in draft.sections.items() if other == name)
    if has_documents and not spec.optional and not spec.has_default:
        detail = "it is required and has no default, and there are documents"
        return SchemaChange(ChangeKind.ADD_FIELD, name, spec.name, destructive=True, detail=detail)
    return SchemaChange(ChangeKind.ADD_FIELD, name, spec.name)


def _prepare(
    draft: _Draft, collections: Sequence[Collection], plan_only: bool, allow_destructive: bool
) -> tuple[SchemaChange, ...]:
    changes = {c.name: _differences(draft, c) for c in collections}
    planned = tuple(change for some in changes.values() for change in some)
    if plan_only:
        return planned
    refused = [change for change in planned if change.destructive]
    if refused and not allow_destructive:
        raise SchemaError(
            f"the declarations would lose or misfit what is stored: {'; '.join(map(str, refused))}; "
            "allow_destructive permits it"
        )
    sections = dict(draft.sections)
    for (tenant, name), section in draft.sections.items():
        collection = next((c for c in collections if c.name == name), None)
        if collection is not None:
            fitted = _Section(_fitted(section, collection, changes[name]))
            fitted.index_again(collection)
            sections[tenant, name] = fitted
    # From here on nothing fails: a prepare is applied whole or not at all.
    draft.sections = sections
    draft.schema = {**draft.schema, **{c.name: _described(c) for c in collections}}
    draft.declared = {c.name: c for c in collections}
    draft.changed = draft.changed or bool(planned)
    return planned


def _fitted(section: _Section, collection: Collection, changes: list[SchemaChange]) -> dict[str, _Stored]:
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
        given = {name: _copied(spec.default) for name, spec in collection.fields.items() if name in reset}
        fitted[id] = _Stored.of({**kept, **given})
    return fitted


# --- The file -------------------------------------------------------------------------------------------------


def _read(path: str) -> _State:
    """What the file holds; nothing, if there is none. StoreError if it is damaged, foreign or of a later format."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return _State()
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror}") from None
    try:
        data = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: damaged at byte {error.start}: not UTF-8; it was left as it is") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise StoreError(f"{path}: damaged at {where}: {error.msg}; it was left as it is") from None
    except (RecursionError, ValueError):
        raise StoreError(f"{path}: damaged: nested too deeply, or a number too long; it was left as it is") from None
    if not isinstance(data, dict) or type(data.get("strongroom")) is not int:
        raise StoreError(f"{path}: is JSON, but not a Strongroom store; it was left as it is")
    if data["strongroom"] != FORMAT:
        raise StoreError(f"{path}: has format {data['strongroom']}, this version of Strongroom reads format {FORMAT}")
    return _Reader(path).state(data)


class _Reader:
    """Reads the parsed file, and remembers where it is, to name the place of a damage."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.at = "the top level"

    def state(self, data: dict[str, Any]) -> _State:
        try:
            state = _State(data["schema"], {}, [], [], int(data["deleted_version"]))
            self._sections(state, None, data["global"], "global")
            self.at = "tenants"
            for tenant, collections in data["tenants"].items():
                self._sections(state, tenant, collections, f"tenants/{tenant}")
            for number, line in enumerate(data["journal"], 1):
                self.at = f"journal record {number}"
                record = Record(**_values.untag(line))
                if record.sequence != number:
                    raise ValueError(f"found sequence {record.sequence}")
                state.journal.append(record)
                state.lines.append(_values.dumps(asdict(record)))
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = f"{type(error).__name__}: {error}"
            raise StoreError(f"{self.path}: damaged at {self.at}: {what}; it was left as it is") from None
        return state

    def _sections(self, state: _State, tenant: str | None, collections: dict[str, Any], at: str) -> None:
        self.at = at
        for name, documents in collections.items():
            self.at = f"{at}/{name}"
            kinds = {**_SYSTEM_KINDS, **state.schema[name]["fields"]}
            section = state.sections[tenant, name] = _Section()
            for id, tagged in documents.items():
                self.at = f"{at}/{name}/{id}"
                section.stored[id] = _Stored.of(_fitting(_values.untag(tagged), id, kinds))


# By names as the file has them. People edit these files, and a text among numbers would break each comparison later.
_SYSTEM_KINDS = {"id": "text", "version": "int", "created_at": "timestamp", "updated_at": "timestamp"}
_TYPES: dict[str, type] = {
    "bool": bool,
    "int": int,
    "float": float,
    "decimal": Decimal,
    "text": str,
    "bytes": bytes,
    "timestamp": datetime,
    "list": list,
    "map": dict,
}


def _fitting(document: Document, id: str, kinds: Mapping[str, str]) -> Document:
    """The document, or ValueError if its fields are not those of the schema."""
    if document.keys() != kinds.keys():
        raise ValueError(f"its fields differ from the schema's in {', '.join(sorted(document.keys() ^ kinds.keys()))}")
    for name, kind in kinds.items():
        value = document[name]
        if type(value) is not _TYPES[kind] and (value is not None or name in _SYSTEM_KINDS):
            raise ValueError(f"{name}: found {type(value).__name__}, expected {kind}")
    if document["id"] != id:
        raise ValueError("its id is another")
    return document


def _write_new(path: str, text: str) -> None:
    """Write the text beside the file, durably, with the file's own permissions; the file itself stays as it is."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        mode = 0o600
    with open(os.open(_new(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _new(path: str) -> str:
    return path + ".new"


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: str) -> int:
    """A descriptor that holds the lock of the file at `path`. Unavailable if another one holds it."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Unavailable(f"{path}: its lock file cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise Unavailable(
            f"{path} is in use: a JSON store serves one process at a time; close the other, or use SQLite or PostgreSQL"
        ) from None
    return descriptor


# --- The store ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Job:
    """What waits for the next write: a step of the state, and who waits for its answer."""

    step: Callable[[_Draft], Any]
    future: asyncio.Future[Any]


def _answer(job: _Job, answer: Any) -> None:
    if job.future.done():  # its caller was cancelled
        return
    if isinstance(answer, Exception):
        job.future.set_exception(answer)
    else:
        job.future.set_result(answer)


class JsonStore:
    """The storage port over one JSON file, or with None over memory alone."""

    def __init__(self, path: str | None) -> None:
        self._path = os.path.realpath(path) if path is not None else None
        self._state = _State()
        self._declared: Mapping[str, Collection] = {}
        self._jobs: list[_Job] = []
        self._writer: asyncio.Task[None] | None = None
        self._lock: int | None = None
        self._closed: str | None = "the store is not open"  # why nothing can be done with it, if so
        self._broken: str | None = None  # why nothing can be written any more, if so

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("json", multi_process=False, persistent=self._path is not None)

    async def open(self) -> None:
        if self._path is not None:
            self._lock = _lock(self._path)
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_new(self._path))  # a process was killed while it wrote this
                self._state = await asyncio.to_thread(_read, self._path)
            except BaseException:
                self._unlock()
                raise
        self._closed = None

    async def close(self) -> None:
        if self._closed is None:
            self._closed = "the store is closed"
        if self._writer is not None:
            await asyncio.wait([self._writer])
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a forked child may still hold a copy of the descriptor
            os.close(self._lock)
            self._lock = None

    async def prepare(
        self,
        collections: Sequence[Collection],
        *,
        mode: Literal["apply", "plan"] = "apply",
        allow_destructive: bool = False,
    ) -> tuple[SchemaChange, ...]:
        changes: tuple[SchemaChange, ...] = await self._do(
            lambda draft: _prepare(draft, collections, mode == "plan", allow_destructive)
        )
        return changes

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        entry = self._section(collection, tenant).stored.get(id)
        return _copied(entry.document) if entry else None

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        return [_copied(document) for document in evaluate(query, self._section(collection, tenant).documents())]

    async def aggregate(
        self, collection: str, tenant: str | None, aggregates: Sequence[Aggregate], where: Filter | None
    ) -> dict[str, Any]:
        section = self._section(collection, tenant)
        return aggregate(aggregates, where, self._declared[collection], section.documents())

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        return self._do(lambda draft: _apply(draft, batch))

    async def changes(
        self, after: str | None, *, tenant: str | None = None, limit: int = MAX_CHANGES_PAGE
    ) -> ChangesPage:
        self._check_open()
        journal = self._state.journal
        if after == "end":
            return ChangesPage((), str(len(journal)))
        if after is not None and (not _CURSOR.fullmatch(after) or int(after) > len(journal)):
            raise InvalidInput([Problem("after", "is not a cursor of this journal")])
        position = int(after or 0)
        found: list[Record] = []
        while position < len(journal) and len(found) < limit:
            record = journal[position]
            position += 1
            if tenant is None or record.tenant == tenant:
                found.append(replace(record, before=_copied(record.before), after=_copied(record.after)))
        return ChangesPage(tuple(found), str(position))

    async def check(self) -> Health:
        began = time.perf_counter()
        documents = sum(len(section.stored) for section in self._state.sections.values())
        problem = self._closed or self._broken
        details = {"path": self._path or ":memory:", "documents": documents, "journal": len(self._state.journal)}
        return Health(
            problem is None, time.perf_counter() - began, {**details, "problem": problem} if problem else details
        )

    # --- Reading and writing ---

    def _check_open(self) -> None:
        if self._closed is not None:
            raise Unavailable(self._closed)

    def _section(self, collection: str, tenant: str | None) -> _Section:
        self._check_open()
        return self._state.sections.get(_key(self._declared, collection, tenant)) or _Section()

    def _do(self, step: Callable[[_Draft], _T]) -> asyncio.Future[_T]:
        """Queue a step for the next write; the future has its answer once that is durable."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        problem = self._closed or self._broken
        if problem is not None:
            future.set_exception(Unavailable(problem))
            return future
        self._jobs.append(_Job(step, future))
        if self._writer is None:
            self._writer = loop.create_task(self._write_all())
        return future

    async def _write_all(self) -> None:
        """Write group after group until nothing waits. What arrives during a write joins the next one."""
        group: list[_Job] = []
        try:
            while self._jobs:
                group, self._jobs = self._jobs, []
                await self._write_group(group)
        except BaseException as error:
            # The loop is being torn down, or memory ran out: whether the file was written is not known.
            self._broken = f"writing ended with {type(error).__name__}; open the store again"
            for job in (*group, *self._jobs):
                _answer(job, Unavailable(self._broken))
            raise
        finally:
            self._writer = None

    async def _write_group(self, jobs: list[_Job]) -> None:
        draft = _Draft(self._state, self._declared)
        answers = [draft.attempt(job.step) for job in jobs]
        try:
            if draft.changed:
                await self._write(draft)
            self._state, self._declared = draft.adopted(), draft.declared
        except Unavailable as error:
            # All of them: a failed precondition too was judged by a state that never came to be.
            answers = [type(error)(error.message) for _ in jobs]
        for job, answer in zip(jobs, answers, strict=True):
            _answer(job, answer)

    async def _write(self, draft: _Draft) -> None:
        """Make the draft the file's content, durably. Unavailable or StorageFull if it cannot be."""
        if self._broken is not None:
            raise Unavailable(self._broken)
        if self._path is not None:
            await asyncio.to_thread(self._write_file, self._path, draft)

    def _write_file(self, path: str, draft: _Draft) -> None:
        try:
            _write_new(path, draft.rendered())
            os.replace(_new(path), path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(_new(path))
            kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else Unavailable
            raise kind(f"{path}: cannot be written: {error.strerror}; nothing was changed") from None
        try:
            _sync_folder(path)
        except OSError as error:
            # The new file is in place, but a power loss could bring the old one back, and a second fsync would not
            # tell: what memory says and what the disk holds may differ until the store is opened again.
            self._broken = f"{path}: its folder cannot be synced: {error.strerror}; open the store again to write"
            raise Unavailable(self._broken) from None
