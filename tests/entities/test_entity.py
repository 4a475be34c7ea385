"""Declarations of entities: their schema for backends, refused declarations, validation and encoding."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any, Literal, Optional

import pydantic
import pytest
from hypothesis import given
from pydantic import BaseModel, Field, ValidationError, field_validator

from strongroom.entities.collection import MAX_FIELDS, MAX_INDEXES
from strongroom.entities.entity import (
    MAX_INDEXED_BYTES,
    Counter,
    Document,
    Entity,
    FieldType,
    Index,
    Indexed,
    Registry,
    Secret,
    check_id,
    json_schema,
)
from strongroom.errors import InvalidInput, SchemaError
from strongroom.testing.storage.samples import NOW, Sample, documents, identical, stored


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Address(BaseModel):
    street: str
    moved_in: datetime | None = None


class Note(
    Entity,
    collection="notes",
    indexes=[Index("status", "-created_at"), Index("author", "title", unique=True)],
    ttl="expires_at",
):
    """A note that somebody wrote."""

    title: str
    author: str = ""
    status: Literal["draft", "done"] = "draft"
    slug: Annotated[str | None, Indexed(unique=True)] = None
    password: Annotated[str | None, Secret()] = None
    reads: Annotated[int, Counter()] = 0
    expires_at: datetime | None = None
    tags: Annotated[list[str], Indexed()] = []


# --- What a declaration becomes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "kind", "optional"),
    [
        (bool, FieldType.BOOL, False),
        (int, FieldType.INT, False),
        (float, FieldType.FLOAT, False),
        (Decimal, FieldType.DECIMAL, False),
        (str, FieldType.TEXT, False),
        (bytes, FieldType.BYTES, False),
        (datetime, FieldType.TIMESTAMP, False),
        (pydantic.AwareDatetime, FieldType.TIMESTAMP, False),
        (uuid.UUID, FieldType.TEXT, False),
        (Colour, FieldType.TEXT, False),
        (Level, FieldType.INT, False),
        (Literal["a", "b"], FieldType.TEXT, False),
        (Literal[1, 2], FieldType.INT, False),
        (list[str], FieldType.LIST, False),
        (list, FieldType.LIST, False),
        (set[int], FieldType.LIST, False),
        (frozenset[int], FieldType.LIST, False),
        (tuple[int, ...], FieldType.LIST, False),
        (tuple[int, str], FieldType.LIST, False),
        (dict[str, Any], FieldType.MAP, False),
        (dict, FieldType.MAP, False),
        (Mapping[str, int], FieldType.MAP, False),
        (Address, FieldType.MAP, False),
        (Address | dict[str, Any], FieldType.MAP, False),
        (str | None, FieldType.TEXT, True),
        (Optional[Colour], FieldType.TEXT, True),  # noqa: UP045  (users write it this way too)
        (None | Literal["a"], FieldType.TEXT, True),
        (Annotated[int, Field(ge=0)], FieldType.INT, False),
        (Annotated[int, Field(ge=0)] | None, FieldType.INT, True),
        (Annotated[Annotated[str, Field(min_length=1)] | None, Field(description="x")], FieldType.TEXT, True),
        (pydantic.PositiveInt, FieldType.INT, False),
        (Address | None, FieldType.MAP, True),
    ],
    ids=str,
)
def test_a_python_type_becomes_a_column_type(annotation: Any, kind: FieldType, optional: bool) -> None:
    cls = pydantic.create_model("Made", __base__=Entity, __cls_kwargs__={"collection": "made"}, x=(annotation, ...))
    spec = cls.__collection__.fields["x"]
    assert (spec.type, spec.optional, spec.has_default) == (kind, optional, False)


def test_a_declaration_has_everything_a_backend_needs() -> None:
    collection = Note.__collection__
    assert (collection.name, collection.tenant_scoped, collection.ttl, collection.journalled) == (
        "notes", True, "expires_at", True
    )  # fmt: skip
    assert list(collection.fields) == [
        "title", "author", "status", "slug", "password", "reads", "expires_at", "tags"
    ]  # fmt: skip
    assert collection.secrets == {"password"}
    assert collection.unique_fields == {"slug"}
    assert {name for name, spec in collection.fields.items() if spec.counter} == {"reads"}
    assert set(collection.indexes) == {
        Index("slug", unique=True), Index("tags"), Index("status", "-created_at"), Index("author", "title", unique=True)
    }  # fmt: skip
    assert [collection.type_of(name) for name in ("id", "version", "created_at", "title", "nothing")] == [
        FieldType.TEXT, FieldType.INT, FieldType.TIMESTAMP, FieldType.TEXT, None
    ]  # fmt: skip
    with pytest.raises(TypeError):
        collection.fields["more"] = collection.fields["title"]  # type: ignore[index]  # that it cannot be changed


def test_older_documents_get_the_default_of_a_new_field() -> None:
    class Made(Entity, collection="made"):
        required: str
        nothing: str | None = None
        colour: Colour = Colour.RED
        price: Decimal = Decimal("1.50")
        moment: datetime = datetime(2025, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
        made: list[int] = Field(default_factory=lambda: [1])
        address: Address = Address(street="x")
        of_others: str = Field(default_factory=lambda data: data["required"])

    found = {name: (spec.has_default, spec.default) for name, spec in Made.__collection__.fields.items()}
    assert identical(
        found,
        {
            "required": (False, None),
            "nothing": (True, None),
            "colour": (True, "red"),
            "price": (True, Decimal("1.5")),
            "moment": (True, datetime(2025, 1, 1, tzinfo=UTC)),
            "made": (True, [1]),
            "address": (True, {"street": "x", "moved_in": None}),
            "of_others": (False, None),
        },
    ), found


def test_an_abstract_base_shares_its_fields_without_being_an_entity() -> None:
    class Owned(Entity):
        owner: Annotated[str, Indexed()] = "nobody"

    class House(Owned, collection="houses"):
        rooms: int = 1

    class Boat(Owned, collection="boats", scope="global", journalled=False):
        masts: int = 1

    assert not hasattr(Owned, "__collection__")
    assert set(House.__collection__.fields) == {"owner", "rooms"}
    assert [index.fields for index in Boat.__collection__.indexes] == [("owner",)]
    assert (Boat.__collection__.tenant_scoped, Boat.__collection__.journalled) == (False, False)
    with pytest.raises(SchemaError, match="Owned declares no collection"):
        Registry((Owned,))


def test_an_index_is_identified_by_its_fields_and_directions() -> None:
    assert Index("a", "-b").columns == (("a", False), ("b", True))
    assert Index("a", "-b") == Index("a", "-b")
    assert len({Index("a").name, Index("-a").name, Index("a", unique=True).name}) == 3

    class Made(Entity, collection="made", indexes=[Index("x"), Index("x")]):
        x: Annotated[int, Indexed()] = 0

    assert Made.__collection__.indexes == (Index("x"),)


# --- What is refused ------------------------------------------------------------------------------------------


def declare(fields: dict[str, Any] | None = None, **options: Any) -> type[Entity]:
    given = {"collection": "made", **options}
    made: type[Entity] = pydantic.create_model(
        "Made", __base__=Entity, __cls_kwargs__=given, **(fields or {"x": (int, 0)})
    )
    return made


@pytest.mark.parametrize(
    ("fields", "options", "says"),
    [
        ({}, {"collection": "Notes"}, "lower-case"),
        ({}, {"collection": ""}, "lower-case"),
        ({}, {"collection": "a" * 61}, "60"),
        ({}, {"collection": "a; DROP TABLE b"}, "lower-case"),
        ({}, {"collection": "é"}, "lower-case"),
        ({}, {"collection": "a\n"}, "lower-case"),
        ({}, {"scope": "planet"}, "expected 'tenant' or 'global'"),
        ({"Upper": (int, 0)}, {}, "not lower_case"),
        ({"tenant_id": (str, "")}, {}, "reserved"),
        ({"version": (str, "")}, {}, "reserved"),
        ({"id": (int, 0)}, {}, "reserved"),
        ({"x": (object, None)}, {}, "cannot be stored"),
        ({"x": (date, ...)}, {}, "cannot be stored"),
        ({"x": (complex, ...)}, {}, "cannot be stored"),
        ({"x": (int | str, ...)}, {}, "cannot be stored"),
        ({"x": (Any, ...)}, {}, "cannot be stored"),
        ({"x": (Literal["a", 1], ...)}, {}, "all text or all int"),
        ({"x": (enum.Enum("Mixed", {"A": 1, "B": "b"}), ...)}, {}, "all text or all int"),
        ({"x": (Annotated[str, Counter()], "")}, {}, "a counter is an int"),
        ({"x": (Annotated[int | None, Counter()], None)}, {}, "a counter is an int"),
        ({"x": (datetime, datetime(2025, 1, 1))}, {}, "without a zone"),  # noqa: DTZ001  (its lack is the point)
        ({"x": (float, float("inf"))}, {}, "finite"),
        ({"x": (list[Any], [[1]])}, {}, "inside a list"),
        ({}, {"indexes": [Index("nothing")]}, "no field 'nothing'"),
        ({}, {"indexes": [Index("tenant_id")]}, "no field 'tenant_id'"),
        ({"m": (dict[str, int], {})}, {"indexes": [Index("m")]}, "map field cannot"),
        ({"l": (list[int], [])}, {"indexes": [Index("l", unique=True)]}, "list field cannot"),
        ({"l": (list[int], []), "x": (int, 0)}, {"indexes": [Index("l", "x")]}, "list field cannot"),
        ({"s": (Annotated[str, Secret()], "")}, {"indexes": [Index("s")]}, "secret"),
        ({"s": (Annotated[str, Secret(), Indexed(unique=True)], "")}, {}, "secret"),
        ({}, {"ttl": "nothing"}, "expected the name of a datetime field"),
        ({}, {"ttl": "x"}, "expected the name of a datetime field"),
        ({f"f{n}": (int, 0) for n in range(MAX_FIELDS + 1)}, {}, f"{MAX_FIELDS} fields"),
        ({f"f{n}": (Annotated[int, Indexed()], 0) for n in range(MAX_INDEXES + 1)}, {}, f"{MAX_INDEXES} indexes"),
    ],
)  # fmt: skip
def test_an_impossible_declaration_is_refused(fields: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(SchemaError, match=f"Made: .*{says}"):
        declare(fields, **options)


def test_every_mistake_in_a_declaration_is_named_at_once() -> None:
    with pytest.raises(SchemaError) as caught:
        declare(
            {"x": (object, None), "y": (complex, ...)}, collection="Bad", scope="planet", ttl="z", indexes=[Index("q")]
        )
    for part in ("'Bad'", "'planet'", "'x'", "'y'", "'z'", "'q'"):
        assert part in caught.value.message


def test_an_unknown_class_argument_is_refused() -> None:
    with pytest.raises(TypeError):
        declare(tll="x")


def test_a_registry_has_one_class_for_each_name() -> None:
    first, second = declare(), declare()
    assert Registry((first, first)).collections == (first.__collection__,)
    with pytest.raises(SchemaError, match="both declare the collection 'made'"):
        Registry((first, second))
    with pytest.raises(SchemaError, match="declares no collection"):
        Registry((Entity,))


# --- What goes in and out -------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_every_problem_and_its_path() -> None:
    with pytest.raises(InvalidInput) as caught:
        Note.parse({"status": "lost", "tags": ["a", 1], "reads": "many", "colour": "red"})
    assert {problem.path for problem in caught.value.problems} == {"title", "status", "tags.1", "reads", "colour"}
    messages = {problem.path: problem.message for problem in caught.value.problems}
    assert messages["title"] == "is required"
    assert messages["colour"] == "is not a known field"


def test_json_input_is_parsed_or_refused_the_same_way() -> None:
    class Made(Entity, collection="made"):
        blob: bytes = b""
        price: Decimal = Decimal(0)
        moment: datetime | None = None

    made = Made.parse_json('{"blob": "AP8=", "price": "1.5", "moment": "2025-01-01T02:00:00+02:00"}')
    assert (made.blob, made.price, made.moment) == (b"\x00\xff", Decimal("1.5"), datetime(2025, 1, 1, tzinfo=UTC))
    for bad in ("{", '{"price": "x"}', b"\xff"):
        with pytest.raises(InvalidInput):
            Made.parse_json(bad)


@pytest.mark.parametrize("secret", ["hunter2-hunter2", 42_424_242])
def test_a_secret_is_in_no_representation_and_no_error(secret: Any) -> None:
    class Vault(Entity, collection="vaults"):
        name: str
        code: Annotated[str, Secret(), Field(min_length=100)]
        pin: Annotated[str | None, Secret()] = None

        @field_validator("pin")
        @classmethod
        def _refuse(cls, value: str | None) -> str | None:
            if value is not None and value.startswith("hunter"):
                raise ValueError("is too easy to guess")
            return value

    for data in ({"name": "a", "code": secret}, {"name": "a", "code": "x" * 100, "pin": secret}, {"code": [secret]}):
        with pytest.raises(InvalidInput) as caught:
            Vault.parse(data)
        shown = f"{caught.value} {caught.value!r} {caught.value.problems} {caught.value.details}"
        assert str(secret) not in shown
    vault = Vault(name="a", code=f"{secret}".ljust(100, "x"))
    assert str(secret) not in f"{vault!r} {vault!s} {vault}"
    assert "code='***'" in repr(vault)
    assert "pin=None" in repr(vault)
    with pytest.raises(ValidationError) as refused:
        vault.code = f"{secret}"
    assert str(secret) not in str(refused.value)


@pytest.mark.parametrize(
    "annotation",
    [
        Annotated[str | None, Secret()],
        Annotated[str, Secret()] | None,
        Optional[Annotated[str, Secret()]],  # noqa: UP045  (users write it this way too)
        Annotated[Annotated[str, Secret()] | None, Field(description="x")],
        Annotated[str | None, Secret],
    ],
    ids=str,
)
def test_a_field_is_secret_wherever_its_annotation_has_the_mark(annotation: Any) -> None:
    made = declare(
        {"s": (annotation, None), "c": (Annotated[int, Counter], 0), "i": (Annotated[int, Indexed] | None, 0)}
    )
    assert made.__collection__.secrets == {"s"}
    assert made.__collection__.fields["c"].counter
    assert made.__collection__.indexes == (Index("i"),)
    assert "hunter2" not in repr(made.model_validate({"s": "hunter2"}))


class Pocket(BaseModel):
    note: Annotated[str, Secret()]


class Coat(BaseModel):
    pockets: list[Pocket] = []
    lining: Coat | None = None


@pytest.mark.parametrize(
    "annotation", [list[Annotated[str, Secret()]], Pocket, Coat | None, dict[str, Pocket]], ids=str
)
def test_a_secret_inside_a_field_is_refused_unless_the_field_is_secret(annotation: Any) -> None:
    with pytest.raises(SchemaError, match="mark the whole field"):
        declare({"s": (annotation, None)})
    assert declare({"s": (Annotated[annotation, Secret()], None)}).__collection__.secrets == {"s"}


@given(documents)
def test_an_entity_decodes_to_what_was_encoded(document: Document) -> None:
    entity = Sample.__codec__.decode(stored("a", document, version=NOW))
    assert (entity.id, entity.version) == ("a", NOW)
    assert identical(Sample.__codec__.encode(entity), document)


def test_encoding_names_every_field_that_cannot_be_stored() -> None:
    sample = Sample(name="a\x00", extra={"a": {"b": [float("nan")]}}, price=Decimal("1E+600"), rank=1)
    with pytest.raises(InvalidInput) as caught:
        Sample.__codec__.encode(sample)
    assert {problem.path for problem in caught.value.problems} == {"name", "extra.a.b.0", "price"}


def test_a_document_that_no_longer_fits_is_named_and_not_quoted() -> None:
    document = stored("n1", {"title": "x", "password": ["hunter2"]}, version=NOW)
    with pytest.raises(SchemaError, match=r"notes/n1: .* does not fit Note: password") as caught:
        Note.__codec__.decode(document)
    assert "hunter2" not in str(caught.value)


def test_an_entity_can_be_constructed_and_changed() -> None:
    note = Note(title="a")
    assert (note.id, note.version, note.created_at) == ("", 0, None)
    note.status = "done"
    with pytest.raises(ValidationError):
        note.status = "lost"  # type: ignore[assignment]  # that it is refused
    with pytest.raises(ValidationError):
        Note(title="a", colour="red")  # type: ignore[call-arg]  # that it is refused


@pytest.mark.parametrize("id", ["", "a\x00", "\ud800", "x" * 513, "é" * 257, 1, None, b"a"])
def test_an_invalid_id_is_refused(id: object) -> None:
    with pytest.raises(InvalidInput, match="id: "):
        check_id(id)


@pytest.mark.parametrize("id", ["a", " ", "/", "..", "__x__", "x" * 512, "é" * 256, "\n", "\U0010ffff"])
def test_any_valid_text_can_be_an_id(id: str) -> None:
    check_id(id)


def test_the_json_schema_matches_the_declaration() -> None:
    schema = json_schema(Note)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["description"] == "A note that somebody wrote."
    assert schema["properties"]["status"]["enum"] == ["draft", "done"]
    assert schema["x-strongroom"] == {
        "collection": "notes",
        "scope": "tenant",
        "indexes": [
            {"fields": ["slug"], "unique": True},
            {"fields": ["tags"], "unique": False},
            {"fields": ["status", "-created_at"], "unique": False},
            {"fields": ["author", "title"], "unique": True},
        ],
        "ttl": "expires_at",
        "secrets": ["password"],
        "counters": ["reads"],
        "journalled": True,
    }
    assert Registry((Note, Sample)).json_schema().keys() == {"notes", "samples"}


def test_the_total_length_of_an_indexs_texts_is_bounded() -> None:
    class Place(Entity, collection="places", indexes=[Index("street", "town", "-number"), Index("code", unique=True)]):
        street: str
        town: str | None = None
        number: int = 0
        code: bytes = b""
        story: str = ""

    half = "é" * (MAX_INDEXED_BYTES // 4)
    for fits in (Place(street=half, town=half), Place(street=half * 2), Place(street="", story="x" * 100_000)):
        assert Place.__codec__.encode(fits)["street"] == fits.street
    with pytest.raises(InvalidInput) as caught:
        Place.__codec__.encode(Place(street=half, town=half + "x", code=b"x" * (MAX_INDEXED_BYTES + 1)))
    assert [(p.path, p.message) for p in caught.value.problems] == [
        ("street + town", "found 1501 bytes together, expected at most 1500 in an index"),
        ("code", "found 1501 bytes, expected at most 1500 in an index"),
    ]
