"""The values that can be stored, a closed set for every engine, and the encoding of Python's values to them."""

from __future__ import annotations

import enum
import math
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Context as DecimalContext
from decimal import Decimal, Inexact
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from ..context import text_problem
from ..errors import Problem

MAX_ID_BYTES = 512
MAX_TEXT_BYTES = 900_000
MAX_DEPTH = 20
MAX_DECIMAL_DIGITS = 38
MAX_DECIMAL_EXPONENT = 500
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
_DECIMAL = DecimalContext(prec=MAX_DECIMAL_DIGITS, Emax=999_999, Emin=-999_999, traps=[Inexact])

Scalar = None | bool | int | float | str | bytes | Decimal | datetime
Value = Union[Scalar, "list[Value]", "dict[str, Value]"]
Document = dict[str, Any]  # str → Value; Any, because mypy cannot narrow a recursive union usefully


class NotStorable(Exception):
    """A value that cannot be stored, with its path. Callers collect these into one InvalidInput."""

    def __init__(self, path: str, message: str) -> None:
        self.problem = Problem(path, message)


def _encode_text(value: str, path: str) -> str:
    if "\x00" in value:
        raise NotStorable(path, "found U+0000, which not every engine can store")
    if not value.isascii() or len(value) > MAX_TEXT_BYTES:
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise NotStorable(path, "found a lone surrogate, expected valid Unicode") from None
        if size > MAX_TEXT_BYTES:
            raise NotStorable(path, f"found {size} bytes of text, expected at most {MAX_TEXT_BYTES}")
    return value


def _encode_int(value: int, path: str) -> int:
    if not INT64_MIN <= value <= INT64_MAX:
        raise NotStorable(path, "found a number outside int64")
    return int(value)


def _encode_float(value: float, path: str) -> float:
    if not math.isfinite(value):
        raise NotStorable(path, f"found {value}, expected a finite number")
    return float(value) + 0.0  # -0.0 becomes 0.0: not every engine keeps the sign


def _encode_decimal(value: Decimal, path: str) -> Decimal:
    if not value.is_finite():
        raise NotStorable(path, f"found {value}, expected a finite number")
    try:
        value = _DECIMAL.normalize(value)
    except Inexact:
        raise NotStorable(path, f"found more than {MAX_DECIMAL_DIGITS} digits") from None
    if value and abs(value.adjusted()) > MAX_DECIMAL_EXPONENT:
        raise NotStorable(path, f"found an exponent beyond {MAX_DECIMAL_EXPONENT}")
    return value if value else Decimal(0)


def _encode_time(value: datetime, path: str) -> datetime:
    if value.tzinfo is UTC:
        return value
    if value.utcoffset() is None:
        raise NotStorable(path, "found a time without a zone, expected one with (for example …Z)")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise NotStorable(path, "found a time outside the years 1 to 9999 in UTC") from None


def _encode_bytes(value: bytes, path: str) -> bytes:
    if len(value) > MAX_TEXT_BYTES:
        raise NotStorable(path, f"found {len(value)} bytes, expected at most {MAX_TEXT_BYTES}")
    return bytes(value)


def encode_value(value: Any, path: str = "", depth: int = 0) -> Any:
    """Any value as a port value: nested models to dicts, UUIDs and enumerations to text, times to UTC."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return encode_value(value.value, path, depth)
    if isinstance(value, str):
        return _encode_text(value, path)
    if isinstance(value, int):
        return _encode_int(value, path)
    if isinstance(value, float):
        return _encode_float(value, path)
    if isinstance(value, Decimal):
        return _encode_decimal(value, path)
    if isinstance(value, bytes | bytearray):
        return _encode_bytes(bytes(value), path)
    if isinstance(value, datetime):
        return _encode_time(value, path)
    if isinstance(value, uuid.UUID):
        return str(value)
    if depth >= MAX_DEPTH:
        raise NotStorable(path, f"found more than {MAX_DEPTH} levels")
    if isinstance(value, BaseModel):
        return {
            name: encode_value(getattr(value, name), f"{path}.{name}", depth + 1) for name in type(value).model_fields
        }
    if isinstance(value, Mapping):
        return _encode_map(value, path, depth)
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        encoded = [encode_value(v, f"{path}.{i}", depth + 1) for i, v in enumerate(items)]
        for i, item in enumerate(encoded):
            if isinstance(item, list):
                raise NotStorable(
                    f"{path}.{i}", "found a list directly inside a list, which not every engine can store"
                )
        return encoded
    raise NotStorable(path, f"found {type(value).__name__}, which cannot be stored")


def _encode_map(value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
    encoded = {}
    for key, item in value.items():
        key = str(key.value) if isinstance(key, enum.Enum) else key
        if problem := text_problem(key, MAX_ID_BYTES):
            raise NotStorable(f"{path}.{key!r}", f"as a key: {problem}")
        encoded[key] = encode_value(item, f"{path}.{key}", depth + 1)
    return encoded


def encoder_for(annotation: Any) -> Callable[[Any, str], Any]:
    """The fastest encoder that is correct for a field of this type."""
    if get_origin(annotation) is Literal:
        kinds = {type(value) for value in get_args(annotation)}
        if kinds == {str}:
            return _encode_text
    try:
        return _PLAIN_ENCODERS.get(annotation, encode_value)
    except TypeError:  # an annotation that cannot be hashed
        return encode_value


def _encode_bool(value: bool, path: str) -> bool:
    return value


_PLAIN_ENCODERS: dict[Any, Callable[[Any, str], Any]] = {
    bool: _encode_bool,
    str: _encode_text,
    int: _encode_int,
    float: _encode_float,
    Decimal: _encode_decimal,
    bytes: _encode_bytes,
    datetime: _encode_time,
}
