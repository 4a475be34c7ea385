"""The values that can be stored, and their form in engines without their type: laws on random values."""

from __future__ import annotations

import enum
import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel

from strongroom.entities.values import (
    INT64_MAX,
    INT64_MIN,
    MAX_DECIMAL_DIGITS,
    MAX_DECIMAL_EXPONENT,
    MAX_DEPTH,
    MAX_ID_BYTES,
    MAX_TEXT_BYTES,
    NotStorable,
    encode_value,
    encoder_for,
)
from strongroom.storage import tagged_json as _values
from strongroom.storage.port import document_size
from strongroom.testing.storage.samples import (
    BLOBS,
    DECIMALS,
    EDGES,
    MOMENTS,
    decimals,
    documents,
    floats,
    identical,
    ints,
    lists,
    maps,
    moments,
    texts,
)

# --- Decimals as text -----------------------------------------------------------------------------------------


@given(decimals, decimals)
def test_decimal_text_is_in_the_order_of_the_numbers(a: Decimal, b: Decimal) -> None:
    text_a, text_b = _values.decimal_to_text(a).encode(), _values.decimal_to_text(b).encode()
    assert (text_a < text_b) == (a < b)
    assert (text_a == text_b) == (a == b)


def test_decimal_text_is_in_order_for_every_pair_of_edge_values() -> None:
    ordered = sorted(set(DECIMALS))
    assert sorted(ordered, key=lambda d: _values.decimal_to_text(d).encode()) == ordered


@given(decimals)
def test_decimal_text_is_exact(value: Decimal) -> None:
    back = _values.text_to_decimal(_values.decimal_to_text(value))
    assert back.as_tuple() == value.as_tuple(), "the same number, and written the same way"


@given(decimals, st.integers(0, 5))
def test_decimal_text_is_the_same_for_equal_numbers(value: Decimal, zeros: int) -> None:
    sign, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    padded = Decimal((sign, digits + (0,) * zeros, exponent - zeros))
    assert _values.decimal_to_text(padded) == _values.decimal_to_text(value)


# --- Times as text --------------------------------------------------------------------------------------------


@given(moments, moments)
def test_time_text_is_in_the_order_of_time(a: datetime, b: datetime) -> None:
    text_a, text_b = _values.time_to_text(a), _values.time_to_text(b)
    assert (text_a < text_b) == (a < b)
    assert len(text_a) == len("2025-06-15T12:30:00.123456Z")


@given(moments | st.sampled_from(MOMENTS))
def test_time_text_is_exact(value: datetime) -> None:
    assert identical(_values.text_to_time(_values.time_to_text(value)), value)


# --- Nested values as JSON ------------------------------------------------------------------------------------


@given(maps | lists | documents)
def test_json_round_trips_values_and_types(value: Any) -> None:
    for text in (_values.dumps(value), _values.quick_dumps(value)):
        assert identical(_values.loads(text), value)
        assert identical(_values.loads(text.encode()), value)
        assert identical(_values.untag(json.loads(text)), value)


@pytest.mark.parametrize("field", EDGES)
def test_json_round_trips_every_edge_value(field: str) -> None:
    for value in EDGES[field]:
        document = {"a": value, "$a": [value]}
        assert identical(_values.loads(_values.dumps(document)), document)
        assert identical(_values.loads(_values.quick_dumps(document)), document)


@given(maps, maps)
def test_json_of_different_values_is_different(a: Any, b: Any) -> None:
    """What a user writes can never be taken for a tag of ours."""
    assert (_values.dumps(a) == _values.dumps(b)) <= identical(a, b)


def test_json_refuses_what_is_not_a_port_value() -> None:
    for dumps in (_values.dumps, _values.quick_dumps):
        with pytest.raises(TypeError):
            dumps({"a": object()})
        with pytest.raises(ValueError, match="not a port value"):
            dumps({"a": float("nan")})


# --- Encoding -------------------------------------------------------------------------------------------------


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Inner(BaseModel):
    colour: Colour
    at: datetime


@given(maps | lists | texts | ints | floats | decimals | moments)
def test_encoding_is_idempotent(value: Any) -> None:
    assert identical(encode_value(value), value)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=10) | st.decimals(-(10**20), 10**20))
def test_a_decimal_keeps_its_number_or_is_refused(value: Decimal) -> None:
    try:
        encoded = encode_value(value)
    except NotStorable:
        _, digits, _ = value.as_tuple()
        significant = "".join(map(str, digits)).strip("0")
        assert len(significant) > MAX_DECIMAL_DIGITS or abs(value.adjusted()) > MAX_DECIMAL_EXPONENT
    else:
        assert Fraction(encoded) == Fraction(value)


@given(st.datetimes(timezones=st.just(UTC)), st.integers(-23 * 60, 23 * 60))
def test_a_time_keeps_its_instant_in_utc(moment: datetime, minutes: int) -> None:
    assume(2 <= moment.year <= 9998)
    value = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    encoded = encode_value(value)
    assert encoded == value
    assert encoded.tzinfo is UTC


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.500"), Decimal("1.5")),
        (Decimal("100"), Decimal("1E+2")),
        (Decimal("-0.00"), Decimal(0)),
        (-0.0, 0.0),
        (bytearray(b"ab"), b"ab"),
        ((1, 2), [1, 2]),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({2, 1}), [1, 2]),
        ({Colour.RED: (1,)}, {"red": [1]}),
        (datetime(2025, 6, 15, 14, tzinfo=ZoneInfo("Europe/Berlin")), datetime(2025, 6, 15, 12, tzinfo=UTC)),
        (
            Inner(colour=Colour.RED, at=datetime(2025, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))),
            {"colour": "red", "at": datetime(2025, 1, 1, tzinfo=UTC)},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_python_values_become_port_values(value: Any, expected: Any) -> None:
    encoded = encode_value(value)
    assert identical(encoded, expected)
    if isinstance(expected, float | Decimal):
        assert str(encoded) == str(expected), "no sign on zero, no trailing zeros"


def nested(levels: int) -> Any:
    return {"a": nested(levels - 1)} if levels else 1


@pytest.mark.parametrize(
    ("value", "path", "says"),
    [
        (float("nan"), "x", "finite"),
        (float("-inf"), "x", "finite"),
        (Decimal("NaN"), "x", "finite"),
        (Decimal("sNaN"), "x", "finite"),
        (Decimal("Infinity"), "x", "finite"),
        (Decimal(10**38 + 1), "x", "38 digits"),
        (Decimal("1E+501"), "x", "exponent"),
        (Decimal("1E-501"), "x", "exponent"),
        (Decimal("1E+999999999999"), "x", ""),
        (Decimal("1E-999999999999"), "x", ""),
        (INT64_MAX + 1, "x", "int64"),
        (INT64_MIN - 1, "x", "int64"),
        ("a\x00b", "x", "U+0000"),
        ("\ud800", "x", "surrogate"),
        ("x" * (MAX_TEXT_BYTES + 1), "x", "900001 bytes"),
        ("é" * (MAX_TEXT_BYTES // 2 + 1), "x", "900002 bytes"),
        (bytes(MAX_TEXT_BYTES + 1), "x", "900001 bytes"),
        (datetime(2025, 1, 1), "x", "zone"),  # noqa: DTZ001  (that it has no zone is the point)
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))), "x", "years 1 to 9999"),
        (datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-2))), "x", "years 1 to 9999"),
        (object(), "x", "cannot be stored"),
        (1j, "x", "cannot be stored"),
        ([[1]], "x.0", "inside a list"),
        ({"a": [1, (2,)]}, "x.a.1", "inside a list"),
        ({"a": [{"b": float("nan")}]}, "x.a.0.b", "finite"),
        ({1: 2}, "x.1", "key"),
        ({"": 2}, "x.''", "key"),
        ({"a\x00": 2}, "x.'a\\x00'", "key"),
        ({"k" * (MAX_ID_BYTES + 1): 2}, f"x.{'k' * (MAX_ID_BYTES + 1)!r}", "key"),
        (nested(MAX_DEPTH + 1), "x" + ".a" * MAX_DEPTH, "levels"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_cannot_be_stored_is_refused_with_its_path(value: Any, path: str, says: str) -> None:
    with pytest.raises(NotStorable) as caught:
        encode_value(value, "x")
    assert caught.value.problem.path == path
    assert says in caught.value.problem.message


def test_values_at_the_limits_can_be_stored() -> None:
    for value in (INT64_MAX, INT64_MIN, "x" * MAX_TEXT_BYTES, "é" * (MAX_TEXT_BYTES // 2), bytes(MAX_TEXT_BYTES)):
        assert encode_value(value) == value
    assert encode_value(nested(MAX_DEPTH)) == nested(MAX_DEPTH)
    assert encode_value({"k" * MAX_ID_BYTES: 1}) == {"k" * MAX_ID_BYTES: 1}
    assert encode_value(Decimal("9" * 38 + "E+463")) == Decimal("9" * 38 + "E+463")


@pytest.mark.parametrize("kind", [bool, str, int, float, Decimal, bytes, datetime])
def test_the_encoder_for_a_type_does_what_encode_value_does(kind: type) -> None:
    strategies: dict[type, list[Any]] = {
        bool: [True, False],
        str: ["", "é", "a\x00", "\ud800"],
        int: [0, INT64_MAX, INT64_MAX + 1],
        float: [0.5, -0.0, float("inf")],
        Decimal: [Decimal("1.0"), Decimal("-0"), Decimal("NaN")],
        bytes: [*BLOBS, bytes(MAX_TEXT_BYTES + 1)],
        datetime: [*MOMENTS, datetime(2025, 1, 1), datetime(2025, 1, 1, tzinfo=ZoneInfo("Asia/Tokyo"))],  # noqa: DTZ001
    }

    def outcome(encode: Callable[[Any, str], Any], value: Any) -> Any:
        try:
            return encode(value, "x")
        except NotStorable as bad:
            return bad.problem

    for value in strategies[kind]:
        assert identical(outcome(encoder_for(kind), value), outcome(encode_value, value)), value


# --- Sizes ----------------------------------------------------------------------------------------------------


def test_the_size_of_a_document_is_counted_alike_for_every_engine() -> None:
    assert document_size({}) == 32
    assert document_size({"a": None}) == 32 + 2 + 1
    assert document_size({"flag": True, "n": 2**62, "r": 0.5}) == 32 + (5 + 1) + (2 + 8) + (2 + 8)
    assert document_size({"é": "é", "b": b"abc"}) == 32 + (3 + 3) + (2 + 4)
    assert document_size({"l": [1, "a", {"k": None}], "d": Decimal("1.5"), "t": MOMENTS[0]}) == (
        32 + (2 + 8 + 2 + 2 + 1) + (2 + 8) + (2 + 8)
    )
