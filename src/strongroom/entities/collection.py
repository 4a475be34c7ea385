"""A collection: the declaration of an entity class as backends see it, with names, field types and indexes."""

from __future__ import annotations

import enum
import functools
import inspect
import re
import types
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AwareDatetime, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..errors import SchemaError
from .cache_policy import Cached, problems_of_cache
from .values import Document, NotStorable, encoder_for

MAX_INDEXES = 40
MAX_FIELDS = 200
SYSTEM_FIELDS = ("id", "version", "created_at", "updated_at")
RESERVED_NAMES = frozenset({*SYSTEM_FIELDS, "tenant_id"})
_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")


class FieldType(enum.StrEnum):
    """What a column can hold. UUIDs and enumerations are TEXT; nested models are MAP."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"
    DECIMAL = "decimal"
    TEXT = "text"
    BYTES = "bytes"
    TIMESTAMP = "timestamp"
    LIST = "list"
    MAP = "map"

    @property
    def is_scalar(self) -> bool:
        return self not in (FieldType.LIST, FieldType.MAP)

    @property
    def is_number(self) -> bool:
        return self in (FieldType.INT, FieldType.FLOAT, FieldType.DECIMAL)


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One declared field as a backend sees it. `default` is the value for documents written before the field
    existed."""

    name: str
    type: FieldType
    optional: bool = False
    secret: bool = False
    counter: bool = False
    has_default: bool = False
    default: Any = None
    doc: str = field(default="", compare=False)
    """A description for people who look at the store itself."""


@dataclass(frozen=True, slots=True, init=False)
class Index:
    """An index over fields, in order; `-name` is descending. `unique` is per tenant (global entities: per store).

    Several documents may be null in a unique index.
    """

    fields: tuple[str, ...]
    unique: bool = False

    def __init__(self, *fields: str, unique: bool = False) -> None:
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "unique", unique)

    @property
    def columns(self) -> tuple[tuple[str, bool], ...]:
        """(field, descending) pairs."""
        return tuple((f.removeprefix("-"), f.startswith("-")) for f in self.fields)

    @property
    def name(self) -> str:
        columns = "__".join(n + ("_desc" if d else "") for n, d in self.columns)
        return f"{columns}_{'unique' if self.unique else 'index'}"


@dataclass(frozen=True)
class Collection:
    """A declaration as backends see it: pure data, no class."""

    name: str
    tenant_scoped: bool
    fields: Mapping[str, FieldSpec]
    indexes: tuple[Index, ...] = ()
    ttl: str | None = None
    journalled: bool = True
    cached: Cached | None = None
    placed_by: str | None = None
    """The field whose value, instead of the id, names the document in Firestore."""
    doc: str = field(default="", compare=False)
    """A description: the first paragraph of the entity's docstring."""

    @functools.cached_property  # asked for with each journal record
    def secrets(self) -> frozenset[str]:
        return frozenset(f.name for f in self.fields.values() if f.secret)

    @property
    def unique_fields(self) -> frozenset[str]:
        """The fields that find one document, because a unique index has this field alone."""
        return frozenset(i.columns[0][0] for i in self.indexes if i.unique and len(i.columns) == 1)

    def type_of(self, name: str) -> FieldType | None:
        """The type of a declared or system field, or None if there is no such field."""
        if name in self.fields:
            return self.fields[name].type
        return _SYSTEM_TYPES.get(name)


def is_expired(collection: Collection, document: Document | None, now: datetime) -> bool:
    """Whether a document's time to live is over. It then counts as deleted, even before it is removed."""
    if document is None or collection.ttl is None:
        return False
    end: datetime | None = document[collection.ttl]
    return end is not None and end <= now


_SYSTEM_TYPES = {
    "id": FieldType.TEXT,
    "version": FieldType.INT,
    "created_at": FieldType.TIMESTAMP,
    "updated_at": FieldType.TIMESTAMP,
}


@dataclass(frozen=True, slots=True)
class Secret:
    """Marks a field that never enters the journal, a log or an error in clear: `Annotated[str, Secret()]`."""


@dataclass(frozen=True, slots=True)
class Counter:
    """Marks an int field that may be added to without reading it: `Annotated[int, Counter()]`."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """Marks a field that has an index of its own: `Annotated[str, Indexed(unique=True)]`."""

    unique: bool = False


_Mark = TypeVar("_Mark", Secret, Counter, Indexed)


# --- Reading ----------------------------------------------------------------------------------------------------


def declare(
    cls: type[BaseModel],
    base: type[BaseModel],
    name: str,
    *,
    scope: str = "tenant",
    indexes: Iterable[Index] = (),
    ttl: str | None = None,
    journalled: bool = True,
    cache: Cached | None = None,
    placed_by: str | None = None,
) -> Collection:
    """The declaration of a class; `base` has the fields that the store sets. SchemaError names every mistake."""
    wrong: list[str] = []
    if not _NAME.fullmatch(name):
        wrong.append(f"collection {name!r}: expected lower-case letters, digits and _, at most 60 characters")
    if scope not in ("tenant", "global"):
        wrong.append(f"scope {scope!r}: expected 'tenant' or 'global'")
    fields: dict[str, FieldSpec] = {}
    own_indexes: list[Index] = []
    for field_name, info in cls.model_fields.items():
        if field_name in SYSTEM_FIELDS:
            if info != base.model_fields[field_name] and info.annotation != base.model_fields[field_name].annotation:
                wrong.append(f"field {field_name!r} is reserved: the store sets it")
            continue
        if field_name in RESERVED_NAMES or not _NAME.fullmatch(field_name):
            wrong.append(f"field {field_name!r}: the name is reserved or not lower_case")
            continue
        try:
            spec = _field_spec(field_name, info)
        except TypeError as error:
            wrong.append(f"field {field_name!r}: {error}")
            continue
        except NotStorable as bad:
            wrong.append(f"field {field_name!r}: its default: {bad.problem.path}: {bad.problem.message}")
            continue
        fields[field_name] = spec
        own_indexes += [Index(field_name, unique=mark.unique) for mark in _marks(info, Indexed)]
    all_indexes = tuple(dict.fromkeys((*own_indexes, *indexes)))
    for index in all_indexes:
        for column, _ in index.columns:
            kind = fields[column].type if column in fields else _SYSTEM_TYPES.get(column)
            if kind is None:
                wrong.append(f"index {index.fields}: there is no field {column!r}")
            elif column == "version":
                wrong.append(f"index {index.fields}: a version is opaque, so nothing is found by it")
            elif kind is FieldType.MAP or (kind is FieldType.LIST and (index.unique or len(index.columns) > 1)):
                wrong.append(f"index {index.fields}: a {kind} field cannot be part of it")
            elif column in fields and fields[column].secret:
                wrong.append(f"index {index.fields}: {column!r} is secret, so it cannot be found by value")
    if ttl is not None and (ttl not in fields or fields[ttl].type is not FieldType.TIMESTAMP):
        wrong.append(f"ttl {ttl!r}: expected the name of a datetime field")
    if placed_by is not None and not (
        placed_by in fields
        and fields[placed_by].type is FieldType.TEXT
        and not fields[placed_by].optional
        and Index(placed_by, unique=True) in all_indexes
    ):
        wrong.append(f"placed_by {placed_by!r}: expected a required text field with a unique index of its own")
    if len({index.name for index in all_indexes}) < len(all_indexes):
        wrong.append("two indexes have one name: rename a field")
    if len(all_indexes) > MAX_INDEXES or len(fields) > MAX_FIELDS:
        wrong.append(f"at most {MAX_INDEXES} indexes and {MAX_FIELDS} fields")
    if cache is not None:
        cache = cache.named(name)
        wrong += problems_of_cache(
            cache,
            fields={f.name: f.type in (FieldType.TEXT, FieldType.INT, FieldType.BOOL) for f in fields.values()},
            hidden=(f.name for f in fields.values() if f.secret),
            counters=(f.name for f in fields.values() if f.counter),
            ttl=ttl,
            journalled=journalled,
        )
    if wrong:
        raise SchemaError(f"{cls.__name__}: " + "; ".join(wrong))
    frozen = types.MappingProxyType(fields)
    return Collection(name, scope == "tenant", frozen, all_indexes, ttl, journalled, cache, placed_by, _doc(cls))


def _doc(cls: type) -> str:
    """The first paragraph of a class's own docstring, on one line."""
    paragraph, _, _ = inspect.cleandoc(vars(cls).get("__doc__") or "").partition("\n\n")
    return " ".join(paragraph.split())


def unwrapped(annotation: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """The type inside `Annotated` and `… | None`, whether it is optional, and its annotations."""
    optional, marks = False, []
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation, *more = get_args(annotation)
            marks += more
        elif origin in (Union, types.UnionType) and type(None) in get_args(annotation):
            inner = [a for a in get_args(annotation) if a is not type(None)]
            annotation = inner[0] if len(inner) == 1 else Union[tuple(inner)]  # noqa: UP007
            optional = True
        else:
            return annotation, optional, tuple(marks)


def _marks(info: FieldInfo, kind: type[_Mark]) -> list[_Mark]:
    """The marks of one kind on a field, at any place: `Annotated[str | None, Secret()]`,
    `Annotated[str, Secret()] | None`, also the class alone, without ()."""
    found = (*info.metadata, *unwrapped(info.annotation)[2])
    marks = (kind() if mark is kind else mark for mark in found)
    return [mark for mark in marks if isinstance(mark, kind)]


def _hides_secret(annotation: Any, seen: frozenset[type] = frozenset()) -> bool:
    """Whether a part of the type is marked secret: an element of a list, a field of a nested model."""
    if any(mark is Secret or isinstance(mark, Secret) for mark in getattr(annotation, "__metadata__", ())):
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
        seen |= {annotation}
        return any(
            _marks(info, Secret) or _hides_secret(info.annotation, seen) for info in annotation.model_fields.values()
        )
    return any(_hides_secret(argument, seen) for argument in get_args(annotation))


def _field_spec(name: str, info: FieldInfo) -> FieldSpec:
    inner, optional, _ = unwrapped(info.annotation)
    kind = _kind(inner)
    is_secret, is_counter = bool(_marks(info, Secret)), bool(_marks(info, Counter))
    if is_counter and (kind is not FieldType.INT or optional):
        raise TypeError("a counter is an int that is not optional")
    if not is_secret and _hides_secret(inner):
        raise TypeError("a part of it is marked secret, which would not keep it so: mark the whole field")
    has_default, default = False, None
    if not info.is_required() and not info.default_factory_takes_validated_data:
        value = info.get_default(call_default_factory=True)
        if value is not PydanticUndefined:
            has_default, default = True, encoder_for(inner)(value, name) if value is not None else None
    return FieldSpec(name, kind, optional, is_secret, is_counter, has_default, default, info.description or "")


_SCALARS: dict[Any, FieldType] = {
    bool: FieldType.BOOL,
    int: FieldType.INT,
    float: FieldType.FLOAT,
    str: FieldType.TEXT,
    bytes: FieldType.BYTES,
    Decimal: FieldType.DECIMAL,
    datetime: FieldType.TIMESTAMP,
    AwareDatetime: FieldType.TIMESTAMP,
    uuid.UUID: FieldType.TEXT,
}


def _kind(annotation: Any) -> FieldType:
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin = get_origin(annotation)
    if origin is Literal:
        kinds = {type(a) for a in get_args(annotation)}
        if kinds == {str}:
            return FieldType.TEXT
        if kinds == {int}:
            return FieldType.INT
        raise TypeError("a Literal must be all text or all int")
    if origin in (list, set, frozenset, tuple) or annotation in (list, tuple):
        return FieldType.LIST
    if origin is dict or annotation is dict or origin is Mapping:
        return FieldType.MAP
    if isinstance(annotation, type):
        if issubclass(annotation, enum.Enum):
            values = {type(m.value) for m in annotation}
            if values == {str}:
                return FieldType.TEXT
            if values == {int}:
                return FieldType.INT
            raise TypeError("an enumeration's values must be all text or all int")
        if issubclass(annotation, BaseModel):
            return FieldType.MAP
        for base, kind in _SCALARS.items():
            if issubclass(annotation, base):
                return kind
    if origin in (Union, types.UnionType):
        kinds_ = {_kind(a) for a in get_args(annotation)}
        if kinds_ == {FieldType.MAP}:
            return FieldType.MAP
    raise TypeError(
        f"{annotation!r} cannot be stored; expected str, bool, int, float, Decimal, bytes, datetime, UUID, an "
        "enumeration, a list, a dict, a nested model, or an optional one of these"
    )
