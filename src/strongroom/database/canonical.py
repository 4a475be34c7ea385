"""The canonical bytes of a request: equal requests have equal bytes. Names are sorted, numbers are written by value,
times in UTC. Pure.

Every value carries its type and its length, so two different requests never have the same bytes.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import Context as DecimalContext
from decimal import Decimal

from pydantic import BaseModel

from ..errors import InvalidInput, Problem

_MANY_DIGITS = DecimalContext(prec=100_000, Emax=999_999_999, Emin=-999_999_999)


def canonical(value: object) -> bytes:
    """The bytes of a request. Of a model only the given fields count: a default is the server's choice, and a
    `default_factory` makes another value each time. Raises InvalidInput for a value that no request can have."""
    parts: list[bytes] = []
    _write(value, parts)
    return b"".join(parts)


def _write(value: object, parts: list[bytes]) -> None:
    if value is None or isinstance(value, bool):
        parts.append({None: b"z", True: b"+", False: b"-"}[value])
    elif isinstance(value, enum.Enum):
        _write(value.value, parts)
    elif isinstance(value, str):
        _sized(b"s", value.encode("utf-8", "backslashreplace"), parts)
    elif isinstance(value, int | float | Decimal):
        _sized(b"n", _number(value), parts)
    elif isinstance(value, bytes | bytearray):
        _sized(b"b", bytes(value), parts)
    elif isinstance(value, datetime):
        moment = value if value.utcoffset() is None else value.astimezone(UTC)
        _sized(b"t", moment.isoformat().encode(), parts)
    elif isinstance(value, uuid.UUID):
        _write(str(value), parts)
    elif isinstance(value, BaseModel):
        _mapping({name: getattr(value, name) for name in value.model_fields_set}, parts)
    elif isinstance(value, Mapping):
        _mapping(value, parts)
    elif isinstance(value, set | frozenset):
        _items(sorted(canonical(item) for item in value), parts)
    elif isinstance(value, list | tuple):
        _items((canonical(item) for item in value), parts)
    else:
        raise InvalidInput([Problem("", f"found {type(value).__name__}, which cannot be stored")])


def _sized(kind: bytes, content: bytes, parts: list[bytes]) -> None:
    parts.append(b"%b%d:%b" % (kind, len(content), content))


def _number(value: float | Decimal) -> bytes:
    exact = value if isinstance(value, Decimal) else Decimal(repr(value))
    if not exact:
        return b"0"
    if exact.is_finite() and len(exact.as_tuple().digits) < _MANY_DIGITS.prec:
        exact = exact.normalize(_MANY_DIGITS)
    return str(exact).encode()


def _mapping(value: Mapping[object, object], parts: list[bytes]) -> None:
    _items((name + item for name, item in sorted((canonical(n), canonical(i)) for n, i in value.items())), parts, b"{")


def _items(items: Iterable[bytes], parts: list[bytes], begin: bytes = b"[") -> None:
    parts += (begin, *items, b"]")
