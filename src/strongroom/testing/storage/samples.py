"""The sample collections, values and names of the storage suite, and the comparison of returned values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

from hypothesis import strategies as st

from ...context import utc_from_us
from ...entities import INT64_MAX, INT64_MIN, Collection, Counter, Document, Entity, Index, encode_value
from ...storage.port import Batch, Operation, Record

NOW = 1_750_000_000_123_456  # microseconds since the epoch: a moment in 2025


class Sample(Entity, collection="samples", indexes=[Index("name", "-rank"), Index("moment"), Index("tags")]):
    """A field of every type, each of which may be null; `note` is a text without an index, so it may be long."""

    flag: bool | None = None
    rank: int | None = None
    ratio: float | None = None
    price: Decimal | None = None
    name: str | None = None
    blob: bytes | None = None
    moment: datetime | None = None
    tags: list[Any] | None = None
    extra: dict[str, Any] | None = None
    note: str | None = None


class Item(Entity, collection="items", indexes=[Index("code", unique=True), Index("shelf", "place", unique=True)]):
    """A tenant's document with unique indexes and a counter."""

    label: str = ""
    code: str | None = None
    shelf: str | None = None
    place: int | None = None
    used: Annotated[int, Counter()] = 0


class Shared(Entity, collection="shared", scope="global", indexes=[Index("code", unique=True)]):
    """A document of the platform itself."""

    label: str = ""
    code: str | None = None
    used: Annotated[int, Counter()] = 0


SAMPLES, ITEMS, SHARED = (cls.__collection__ for cls in (Sample, Item, Shared))
COLLECTIONS: tuple[Collection, ...] = (SAMPLES, ITEMS, SHARED)


# --- Documents, batches, records ------------------------------------------------------------------------------


def sample(**given: Any) -> Document:
    return {name: given.get(name) for name in SAMPLES.fields}


def item(label: str = "", **given: Any) -> Document:
    return {"label": label, "code": None, "shelf": None, "place": None, "used": 0, **given}


def shared(label: str = "", **given: Any) -> Document:
    return {"label": label, "code": None, "used": 0, **given}


def batch(tenant: str | None, *operations: Operation, now_us: int = NOW) -> Batch:
    return Batch(tenant, operations, now_us)


def record(entity_id: str = "a", tenant: str | None = "acme", **given: Any) -> Record:
    defaults: dict[str, Any] = {
        "id": f"r-{entity_id}",
        "at_us": NOW,
        "actor": "user:ada",
        "request_id": "request-1",
        "action": "create",
        "collection": "items",
    }
    return Record(tenant=tenant, entity_id=entity_id, **{**defaults, **given})


def tenants(prefix: str = "tenant") -> Iterator[str]:
    """Unique tenant names, so that many examples can share a store."""
    return (f"{prefix}-{number}" for number in itertools.count())


# --- Comparing ------------------------------------------------------------------------------------------------


def identical(found: Any, expected: Any) -> bool:
    """Equal and of the same types, all the way down: 1, 1.0, True and Decimal(1) are four values."""
    if expected is ANY_VERSION:
        return type(found) is int and found > 0
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(identical(found[k], expected[k]) for k in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(identical, found, expected))
    if isinstance(expected, datetime):
        return bool(found == expected) and found.utcoffset() == timedelta(0)
    return bool(found == expected)


class AnyVersion:
    """Equals any version, because stores assign their own."""

    def __repr__(self) -> str:
        return "ANY_VERSION"


ANY_VERSION: Any = AnyVersion()


def stored(
    id: str, document: Document, *, version: int = ANY_VERSION, created_us: int = NOW, updated_us: int = NOW
) -> Document:
    """The document that a store should return; compare it with `identical`."""
    times = {"created_at": utc_from_us(created_us), "updated_at": utc_from_us(updated_us)}
    return {"id": id, "version": version, **times, **document}


# --- Values ---------------------------------------------------------------------------------------------------

FLAGS: tuple[bool, ...] = (False, True)
INTS: tuple[int, ...] = (0, 1, -1, 7, 2**31, -(2**31) - 1, 2**53 + 1, -(2**53) - 1, INT64_MAX, INT64_MIN, INT64_MAX - 1)
FLOATS: tuple[float, ...] = (
    0.0, 1.0, -1.0, 0.1, 1 / 3, -2.5, 1e15, 123456789.123456789, 5e-324, 2.2250738585072014e-308,
    1.7976931348623157e308, -1.7976931348623157e308,
)  # fmt: skip
DECIMALS: tuple[Decimal, ...] = tuple(
    encode_value(Decimal(sign + text))
    for text in (
        "0", "1", "0.1", "0.10", "5", "10", "50", "100", "0.5", "9.99", "9.999", "9.9899", "10.01", "1E-37",
        "1E+500", "9E-500",
        "12345678901234567890.123456789012345678", "12345678901234567890.12345678901234567",
        "99999999999999999999999999999999999999", "0.00000000000000000000000000000000000001",
    )
    for sign in ("", "-")
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    "", " ", "a", "A", "ab", "a b", "b", "Z", "z", "é", "e\u0301", "ß", "ss", "İ", "i", "\u0131", "中文", "\u202eabc",
    "\ufffd", "\uffff", "\U00010000", "👩\u200d🚀", "\U0010ffff", "\x01", "\x7f", "\n", "a\tb", "'", '"', "\\", "%",
    "_", "a%", "a_", "$", "$bytes", "null", "NULL", "0", "10", "9", "true", "1e3", "2025-01-01T00:00:00Z", "x" * 1000,
)  # fmt: skip
BLOBS: tuple[bytes, ...] = (
    b"",
    b"\x00",
    b"\x00\x00",
    b"a",
    b"ab",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff\xfe",
    bytes(range(256)),
)
MOMENTS: tuple[datetime, ...] = (
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(1, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
    datetime(999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(1582, 10, 10, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(1970, 1, 1, tzinfo=UTC),
    datetime(2000, 2, 29, 12, tzinfo=UTC),
    datetime(2025, 6, 15, 12, 30, 0, 123_456, tzinfo=UTC),
    datetime(2025, 6, 15, 12, 30, 0, 123_457, tzinfo=UTC),
    datetime(2262, 4, 12, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
)


def _deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"bottom": [1, "x", None]}
    for _ in range(levels):
        value = {"in": value}
    return value


LISTS: tuple[list[Any], ...] = (
    [],
    [None],
    ["a", "b", "a"],
    [True, 1, 1.0, Decimal(1), "1", b"1"],
    [0, False, "", b"", None, 0.0],
    [{"a": 1}, {"a": [1, {"b": []}]}, {}],
    [MOMENTS[7], DECIMALS[-1], INT64_MAX, INT64_MIN],
)
MAPS: tuple[dict[str, Any], ...] = (
    {},
    {"a": None},
    {"b": 1, "a": 2},
    {"$": 1, "$$": 2, "$bytes": "aGk=", "$decimal": "1", "$time": "2025-01-01T00:00:00Z"},
    {"$bytes": "aGk="},
    {"$$bytes": {"$bytes": b"hi"}},
    {"$decimal": Decimal("1.5")},
    {"a.b": 1, "a": {"b": 2}, "a/b": 3, "a`b": 4, "a\\b": 5, "*": 6, "[0]": 7, "a b": 8, "'": 9, '"': 10},
    {"__x__": 1, "__name__": 2, ".": 3, "..": 4, "id": "x", "version": -1, "0": 0, "é": 1, "e\u0301": 2, "\n": 3},
    {"list": [{"list": [{"list": []}]}], "mixed": [1, 1.0, True, None, "1"]},
    {"decimal": Decimal("0.1"), "float": 0.1, "int": 1, "whole": 1.0, "bytes": b"\x00\xff", "time": MOMENTS[0]},
    {"k" * 512: "the longest key"},
    _deep(16),
)
EDGES: dict[str, tuple[Any, ...]] = {
    "flag": FLAGS,
    "rank": INTS,
    "ratio": FLOATS,
    "price": DECIMALS,
    "name": TEXTS,
    "blob": BLOBS,
    "moment": MOMENTS,
    "tags": LISTS,
    "extra": MAPS,
}

# Names that have broken other stores: quotes, paths, patterns, SQL, reserved names, look-alikes, case, white space.
HOSTILE_NAMES: tuple[str, ...] = (
    "'", '"', "`", "''", "\\", "\\'", "'; DROP TABLE items; --", "' OR '1'='1", "x' UNION SELECT * FROM items --",
    "/", "//", "a/b", "../../etc/passwd", ".", "..", "...", "__x__", "__id7__", "__", "%", "_", "%2F", "%00", "a%",
    "é", "e\u0301", "K", "\u212a", "ﬁ", "fi", "ß", "ẞ", "ss", "I", "i", "\u0131", "İ", "a", "A", "a ", " a", " ",
    "\n", "a\nb", "\r\n", "\t", "\x01", "\x7f", "\u200b", "a\u200b", "\ufeff", "\u202e", "\uffff", "\U00010000",
    "👩\u200d🚀", "NULL", "null", "None", "true", "0", "00", "-1", "1e3", "[]", "{}", "$", "$bytes", "${x}", "{{x}}",
    "*", "?", "#", ":", ";", "~", "tenant_id", "global", "tenants", "CON", "x" * 128, "x" * 127 + "y", "é" * 64,
)  # fmt: skip

_key = st.sampled_from(["a", "b", "$", "$bytes", "$time", "a.b", "a/b", "__x__", "é", "0", "\U00010000"]) | st.text(
    st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=8
)
texts = st.sampled_from(TEXTS) | st.text(
    st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20
)
ints = st.sampled_from(INTS) | st.integers(INT64_MIN, INT64_MAX)
floats = (st.sampled_from(FLOATS) | st.floats(allow_nan=False, allow_infinity=False)).map(encode_value)
decimals = st.sampled_from(DECIMALS) | st.builds(
    lambda digits, exponent: encode_value(Decimal(digits).scaleb(exponent)),
    st.integers(-(10**30), 10**30),
    st.integers(-400, 400),
)
blobs = st.sampled_from(BLOBS) | st.binary(max_size=20)
# no hour repeats in UTC, so `fold` has no meaning there and a store need not keep it
moments = st.sampled_from(MOMENTS) | st.datetimes(timezones=st.just(UTC)).map(lambda moment: moment.replace(fold=0))
_scalars = st.none() | st.booleans() | ints | floats | decimals | texts | blobs | moments


def _maps(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    elements = inner.filter(lambda value: not isinstance(value, list))  # a list is never directly inside a list
    return st.dictionaries(_key, inner | st.lists(elements, max_size=3), max_size=3)


maps = st.recursive(st.dictionaries(_key, _scalars, max_size=3), _maps, max_leaves=8)
lists = st.lists(_scalars | maps, max_size=4)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "flag": st.booleans(),
    "rank": ints,
    "ratio": floats,
    "price": decimals,
    "name": texts,
    "blob": blobs,
    "moment": moments,
    "tags": lists,
    "extra": maps,
}
documents: st.SearchStrategy[Document] = st.fixed_dictionaries(
    {name: st.none() | values for name, values in {**VALUES, "note": VALUES["name"]}.items()}
)
