"""Declare once: an entity is one Pydantic class; read here into a `Collection`; and its documents, encoded and decoded.

What backends see is the `Collection` (names, field types, indexes) and documents: plain dicts of a closed set of
values. What users see is their class.
"""

from __future__ import annotations

import enum
import functools
import re
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .cached import Cached, problems_of_cache
from .context import text_problem
from .errors import InvalidInput, Problem, SchemaError
from .values import INT64_MAX, INT64_MIN, MAX_ID_BYTES, Document, NotStorable, Value, encode_value, encoder_for

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
    """One declared field as a backend sees it. `default` is what documents written before the field existed get."""

    name: str
    type: FieldType
    optional: bool = False
    secret: bool = False
    counter: bool = False
    has_default: bool = False
    default: Any = None


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
    """The field by whose value, instead of the id, a document is named where documents have names (Firestore)."""

    @functools.cached_property  # asked for with each journal record
    def secrets(self) -> frozenset[str]:
        return frozenset(f.name for f in self.fields.values() if f.secret)

    @property
    def unique_fields(self) -> frozenset[str]:
        """Fields that a single-field unique index makes a way to find one document."""
        return frozenset(i.columns[0][0] for i in self.indexes if i.unique and len(i.columns) == 1)

    def type_of(self, name: str) -> FieldType | None:
        """The type of a declared or system field, or None if there is no such field."""
        if name in self.fields:
            return self.fields[name].type
        return _SYSTEM_TYPES.get(name)


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


class Entity(BaseModel):
    """Base class of everything stored.

        class Note(Entity, collection="notes", indexes=[Index("status", "-created_at")]):
            text: str
            status: Literal["draft", "done"] = "draft"

    Class arguments: `collection` (lower-case name), `scope` ("tenant" or "global"), `indexes`, `ttl` (the name of a
    timestamp field; a document is gone once that time has come), `journalled`, `cache` (a Cached), `placed_by` (a
    required text field with a unique index of its own, by which Firestore names the documents). The store sets
    `version`: it grows with each change and is never used twice for one id, so it is safe to compare after a
    deletion; it is opaque otherwise. `created_at` and `updated_at` are aware UTC times.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        hide_input_in_errors=True,
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )

    __collection__: ClassVar[Collection]
    __codec__: ClassVar[_Codec]

    id: str = ""
    version: int = 0
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def __init_subclass__(
        cls,
        *,
        collection: str | None = None,
        scope: Literal["tenant", "global"] = "tenant",
        indexes: Iterable[Index] = (),
        ttl: str | None = None,
        journalled: bool = True,
        cache: Cached | None = None,
        placed_by: str | None = None,
    ) -> None:
        # Only for type checkers and for Python, which calls this first; the work is done below, once Pydantic
        # knows the fields.
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(cls, *, collection: str | None = None, **declared: Any) -> None:
        super().__pydantic_init_subclass__()
        if collection is not None:  # None: an abstract base of the user's own
            cls.__collection__ = _declare(cls, collection, **declared)
            cls.__codec__ = _Codec(cls, cls.__collection__)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        secret = self.__collection__.secrets if hasattr(type(self), "__collection__") else frozenset()
        for name, value in super().__repr_args__():
            yield name, ("***" if name in secret and value is not None else value)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """Validate outside input (JSON values are fine). Raises InvalidInput with every error and its path."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InvalidInput(problems_of(error)) from None

    @classmethod
    def parse_json(cls, data: str | bytes) -> Self:
        """As `parse`, from JSON text; bytes fields are base64 there."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidInput(problems_of(error)) from None


def problems_of(error: ValidationError, prefix: str = "") -> list[Problem]:
    """Pydantic's errors as Problems: every one, with its path; never with the value of a secret."""
    found = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")  # Pydantic's, before what a validator of ours says
        if item["type"] == "extra_forbidden":
            message = "is not a known field"
        elif item["type"] == "missing":
            message = "is required"
        elif item["type"] in ("model_type", "model_attributes_type", "dict_type"):
            message = "expected an object"  # Pydantic names a class of Python, which callers over HTTP do not have
        found.append(Problem(f"{prefix}{path}", message))
    return found


# --- Reading the declaration ---------------------------------------------------------------------------------


def _declare(
    cls: type[Entity],
    name: str,
    *,
    scope: str = "tenant",
    indexes: Iterable[Index] = (),
    ttl: str | None = None,
    journalled: bool = True,
    cache: Cached | None = None,
    placed_by: str | None = None,
) -> Collection:
    wrong: list[str] = []
    if not _NAME.fullmatch(name):
        wrong.append(f"collection {name!r}: expected lower-case letters, digits and _, at most 60 characters")
    if scope not in ("tenant", "global"):
        wrong.append(f"scope {scope!r}: expected 'tenant' or 'global'")
    fields: dict[str, FieldSpec] = {}
    own_indexes: list[Index] = []
    for field_name, info in cls.model_fields.items():
        if field_name in SYSTEM_FIELDS:
            if (
                info != Entity.model_fields[field_name]
                and info.annotation != Entity.model_fields[field_name].annotation
            ):
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
    return Collection(name, scope == "tenant", frozen, all_indexes, ttl, journalled, cache, placed_by)


def _unwrapped(annotation: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """The type inside `Annotated` and `… | None`, whether it is optional, and what it was annotated with on the way."""
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
    """The marks of one kind on a field, wherever they stand: `Annotated[str | None, Secret()]`,
    `Annotated[str, Secret()] | None`, and the class alone, without (), too."""
    found = (*info.metadata, *_unwrapped(info.annotation)[2])
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
    inner, optional, _ = _unwrapped(info.annotation)
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
    return FieldSpec(name, kind, optional, is_secret, is_counter, has_default, default)


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


MAX_INDEXED_BYTES = 1_500
"""Of the texts and bytes of one index, in UTF-8: what Firestore indexes of a value, and with the longest tenant and id
what fits into an index of PostgreSQL."""
_BYTES_PER_CHARACTER = 4


# --- Codec ----------------------------------------------------------------------------------------------------


class _Codec:
    """Between one entity class and its documents."""

    __slots__ = ("_encoders", "_indexed", "_validate", "cls", "collection")

    def __init__(self, cls: type[Entity], collection: Collection) -> None:
        self.cls = cls
        self.collection = collection
        self._encoders = tuple(
            (name, encoder_for(_unwrapped(cls.model_fields[name].annotation)[0])) for name in collection.fields
        )
        self._validate = cls.__pydantic_validator__.validate_python
        texts = (
            tuple(name for name, _ in index.columns if _is_text(collection.fields.get(name)))
            for index in collection.indexes
        )
        self._indexed = tuple(dict.fromkeys(names for names in texts if names))

    def encode(self, entity: Entity) -> Document:
        """The declared fields as a document; raises InvalidInput with every field that cannot be stored."""
        document: Document = {}
        problems: list[Problem] = []
        values = entity.__dict__
        for name, encoder in self._encoders:
            value = values[name]
            if value is None:
                document[name] = None
                continue
            try:
                document[name] = encoder(value, name)
            except NotStorable as bad:
                problems.append(bad.problem)
        for names in self._indexed:
            size = 0
            for name in names:
                size += len(document.get(name) or "")
            if size * _BYTES_PER_CHARACTER > MAX_INDEXED_BYTES:
                problems += _too_long_for_an_index(names, document)
        if problems:
            raise InvalidInput(problems)
        return document

    def decode(self, document: Document) -> Entity:
        """A stored document as an entity. Raises SchemaError if it no longer fits the class."""
        try:
            return self._validate(document)  # type: ignore[no-any-return]
        except ValidationError as error:
            name = self.collection.name
            what = "; ".join(f"{p.path}: {p.message}" for p in problems_of(error))
            raise SchemaError(
                f"{name}/{document.get('id')}: the stored document does not fit {self.cls.__name__}: {what}"
            ) from None


def _is_text(spec: FieldSpec | None) -> bool:
    return spec is not None and spec.type in (FieldType.TEXT, FieldType.BYTES)


def _too_long_for_an_index(names: tuple[str, ...], document: Document) -> list[Problem]:
    values = [document.get(name) or b"" for name in names]
    size = sum(len(value.encode() if isinstance(value, str) else value) for value in values)
    if size <= MAX_INDEXED_BYTES:
        return []
    together = " together" if len(names) > 1 else ""
    message = f"found {size} bytes{together}, expected at most {MAX_INDEXED_BYTES} in an index"
    return [Problem(" + ".join(names), message)]


def check_id(value: object, path: str = "id") -> None:
    """Raise InvalidInput unless `value` can be an id on every engine: text of 1 to MAX_ID_BYTES UTF-8 bytes."""
    if problem := text_problem(value, MAX_ID_BYTES):
        raise InvalidInput([Problem(path, problem)])


# --- Registry -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registry:
    """The entities of one store, by collection name. Two classes with one name are refused."""

    entities: tuple[type[Entity], ...]
    by_name: Mapping[str, type[Entity]] = field(init=False)

    def __post_init__(self) -> None:
        by_name: dict[str, type[Entity]] = {}
        for cls in self.entities:
            if not hasattr(cls, "__collection__"):
                raise SchemaError(f"{cls.__name__} declares no collection: class {cls.__name__}(Entity, collection=…)")
            name = cls.__collection__.name
            if by_name.setdefault(name, cls) is not cls:
                raise SchemaError(f"{cls.__name__} and {by_name[name].__name__} both declare the collection {name!r}")
        object.__setattr__(self, "by_name", types.MappingProxyType(by_name))

    @property
    def collections(self) -> tuple[Collection, ...]:
        return tuple(cls.__collection__ for cls in self.by_name.values())

    def json_schema(self) -> dict[str, Any]:
        """JSON Schema 2020-12 of every entity, by collection name, the declaration under `x-strongroom`."""
        return {name: json_schema(cls) for name, cls in sorted(self.by_name.items())}


def json_schema(cls: type[Entity]) -> dict[str, Any]:
    """One entity's JSON Schema; `x-strongroom` names its scope, indexes, time-to-live, secrets and counters."""
    collection = cls.__collection__
    schema = cls.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["x-strongroom"] = {
        "collection": collection.name,
        "scope": "tenant" if collection.tenant_scoped else "global",
        "indexes": [{"fields": list(i.fields), "unique": i.unique} for i in collection.indexes],
        "ttl": collection.ttl,
        "secrets": sorted(collection.secrets),
        "counters": sorted(f.name for f in collection.fields.values() if f.counter),
        "journalled": collection.journalled,
    }
    return schema


__all__ = [
    "INT64_MAX", "INT64_MIN", "MAX_ID_BYTES", "Collection", "Counter", "Document", "Entity", "Field", "FieldSpec",
    "FieldType", "Index", "Indexed", "Registry", "Secret", "Value", "check_id", "encode_value", "json_schema",
    "problems_of",
]  # fmt: skip
