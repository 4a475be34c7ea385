"""Declare once: an entity is one Pydantic class; its documents are encoded and decoded here.

Users see their class. Backends see the `Collection` (`collection.py`) and documents: plain dicts of a closed set of
values.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..context import kind_of, text_problem
from ..errors import InvalidInput, Problem, SchemaError
from .cache_policy import Cached
from .collection import (
    SYSTEM_FIELDS,
    Collection,
    Counter,
    FieldSpec,
    FieldType,
    Index,
    Indexed,
    Secret,
    declare,
    unwrapped,
)
from .input_errors import problems_of
from .values import (
    INT64_MAX,
    INT64_MIN,
    MAX_ID_BYTES,
    Document,
    NotStorable,
    Value,
    encode_value,
    encoder_for,
)

E = TypeVar("E", bound="Entity")


class Entity(BaseModel):
    """The base class of everything that is stored.

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
        # For type checkers, and for Python, which calls this first. The work is done in
        # `__pydantic_init_subclass__`, once Pydantic knows the fields.
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(cls, *, collection: str | None = None, **declared: Any) -> None:
        super().__pydantic_init_subclass__()
        if collection is not None:  # None: an abstract base of the user's own
            cls.__collection__ = declare(cls, Entity, collection, **declared)
            cls.__codec__ = _Codec(cls, cls.__collection__)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        secret = self.__collection__.secrets if hasattr(type(self), "__collection__") else frozenset()
        for name, value in super().__repr_args__():
            yield name, ("***" if name in secret and value is not None else value)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """Validate outside input (JSON values are fine). Raises InvalidInput with every error and its path."""
        numbers = numbers_for_times(cls.__collection__, data)
        try:
            entity = cls.model_validate(data)
        except ValidationError as error:
            raise InvalidInput([*numbers, *problems_of(error, secrets=cls.__collection__.secrets)]) from None
        if numbers:
            raise InvalidInput(numbers)
        return entity

    @classmethod
    def parse_json(cls, data: str | bytes) -> Self:
        """As `parse`, from JSON text; bytes fields are base64 there."""
        try:
            entity = cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidInput(problems_of(error, secrets=cls.__collection__.secrets)) from None
        if numbers := numbers_for_times(cls.__collection__, json.loads(data)):
            raise InvalidInput(numbers)
        return entity


def with_fields(entity: E, **fields: Any) -> E:
    """A shallow copy with some fields set, without validating again."""
    copy = entity.__class__.__new__(entity.__class__)
    object.__setattr__(copy, "__dict__", {**entity.__dict__, **fields})
    object.__setattr__(copy, "__pydantic_fields_set__", entity.__pydantic_fields_set__)
    object.__setattr__(copy, "__pydantic_extra__", entity.__pydantic_extra__)
    object.__setattr__(copy, "__pydantic_private__", entity.__pydantic_private__)
    return copy


def no_number(value: Any) -> Any:
    """Refuse a number, or its text, where a caller gives a time. Pydantic would read it as seconds or as milliseconds
    since 1970, depending on its size."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        raise ValueError(f"found the number {value[:32]!r}, expected a time such as 2027-01-01T00:00:00Z")
    if not isinstance(value, str | date | None):
        raise ValueError(f"found {kind_of(value)}, expected a time such as 2027-01-01T00:00:00Z")
    return value


NO_NUMBER = BeforeValidator(no_number)
_NUMBER = re.compile(r"\s*[+-]?[0-9._]+\s*")


def numbers_for_times(collection: Collection, data: Any) -> list[Problem]:
    """The time fields of a caller's document that are given as numbers."""
    problems: list[Problem] = []
    if not isinstance(data, Mapping):
        return problems  # Pydantic reports it
    for spec in collection.fields.values():
        if spec.type is FieldType.TIMESTAMP:
            try:
                no_number(data.get(spec.name))
            except ValueError as error:
                problems.append(Problem(spec.name, str(error)))
    return problems


MAX_INDEXED_BYTES = 1_500
"""The texts and bytes of one index together, in UTF-8. Firestore indexes so much of a value; with the longest tenant
and id it also fits into an index of PostgreSQL."""
_BYTES_PER_CHARACTER = 4


# --- Codec ----------------------------------------------------------------------------------------------------


class _Codec:
    """Between one entity class and its documents."""

    __slots__ = ("_encode", "_encoders", "_indexed", "_validate", "cls", "collection")

    def __init__(self, cls: type[Entity], collection: Collection) -> None:
        self.cls = cls
        self.collection = collection
        self._encoders = {
            name: encoder_for(unwrapped(cls.model_fields[name].annotation)[0]) for name in collection.fields
        }
        self._encode = _compiled(self._encoders)
        self._validate = cls.__pydantic_validator__.validate_python
        texts = (
            tuple(name for name, _ in index.columns if _is_text(collection.fields.get(name)))
            for index in collection.indexes
        )
        self._indexed = tuple(dict.fromkeys(names for names in texts if names))

    def encode(self, entity: Entity) -> Document:
        """The declared fields as a document; raises InvalidInput with every field that cannot be stored."""
        problems: list[Problem] = []
        try:
            document = self._encode(entity.__dict__)
        except NotStorable:
            document = self._encode_each(entity, problems)
        for names in self._indexed:
            size = 0
            for name in names:
                size += len(document.get(name) or "")
            if size * _BYTES_PER_CHARACTER > MAX_INDEXED_BYTES:
                problems += _too_long_for_an_index(names, document)
        if problems:
            raise InvalidInput(problems)
        return document

    def _encode_each(self, entity: Entity, problems: list[Problem]) -> Document:
        """The fields that can be stored; the problems of the others are added to `problems`."""
        document: Document = {}
        for name, encode in self._encoders.items():
            value = entity.__dict__[name]
            try:
                document[name] = None if value is None else encode(value, name)
            except NotStorable as bad:
                problems.append(bad.problem)
        return document

    def decode(self, document: Document) -> Entity:
        """A stored document as an entity. Raises SchemaError if it no longer fits the class."""
        try:
            return self._validate(document)  # type: ignore[no-any-return]
        except ValidationError as error:
            name = self.collection.name
            what = "; ".join(f"{p.path}: {p.message}" for p in problems_of(error, secrets=self.collection.secrets))
            raise SchemaError(
                f"{name}/{document.get('id')}: the stored document does not fit {self.cls.__name__}: {what}"
            ) from None


def _compiled(encoders: Mapping[str, Callable[[Any, str], Any]]) -> Callable[[Mapping[str, Any]], Document]:
    """A function that encodes all the fields: written out, it takes two thirds of the time of a loop over them."""
    scope: dict[str, Any] = {}
    members = []
    for number, (name, encode) in enumerate(encoders.items()):
        scope[f"encode{number}"] = encode
        members.append(f"{name!r}: None if (value := values[{name!r}]) is None else encode{number}(value, {name!r})")
    exec(f"def encode(values):\n    return {{{', '.join(members)}}}\n", scope)  # noqa: S102  # checked field names
    made: Callable[[Mapping[str, Any]], Document] = scope["encode"]
    return made


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
    if type(value) is str and value.isascii() and 0 < len(value) <= MAX_ID_BYTES and "\0" not in value:
        return  # nearly every id
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
    "INT64_MAX", "INT64_MIN", "MAX_ID_BYTES", "NO_NUMBER", "SYSTEM_FIELDS", "Collection", "Counter", "Document",
    "Entity", "Field", "FieldSpec", "FieldType", "Index", "Indexed", "Registry", "Secret", "Value", "check_id",
    "encode_value", "json_schema", "no_number", "numbers_for_times", "problems_of", "with_fields",
]  # fmt: skip
