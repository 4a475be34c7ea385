"""Opaque cursors: where the next page of a query begins."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from ..errors import InvalidInput, Problem, TooLarge
from .collection import Collection, FieldType
from .query import MAX_CURSOR_BYTES, Query, encoded_scalar
from .values import Document


def _fingerprint(query: Query, scope: str) -> str:
    text = f"{scope}|{query.where!r}|{query.order!r}"
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _tag(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b": base64.b64encode(value).decode()}
    if isinstance(value, Decimal):
        return {"d": str(value)}
    if isinstance(value, datetime):
        return {"t": value.isoformat()}
    return value


_UNTAG: dict[str, Callable[[str], Any]] = {"b": base64.b64decode, "d": Decimal, "t": datetime.fromisoformat}


def cursor_of(query: Query, scope: str, last: Document) -> str:
    """The opaque cursor that continues a checked query after `last`. `scope` binds it to a tenant and collection.

    Raises TooLarge if the values of the ordering fields do not fit into a cursor.
    """
    position = [_tag(last[name]) for name, _ in query.order]
    text = json.dumps([_fingerprint(query, scope), position], ensure_ascii=False, separators=(",", ":"))
    cursor = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
    if len(cursor) > MAX_CURSOR_BYTES:
        names = ", ".join(name for name, _ in query.order)
        raise TooLarge(f"the values of {names} are too long for a cursor of {MAX_CURSOR_BYTES} bytes: order by others")
    return cursor


def behind(query: Query, last: Document) -> Query:
    """The checked query, continued after `last`, which has the ordering fields."""
    return replace(query, start_after=tuple(last[name] for name, _ in query.order))


def with_cursor(query: Query, collection: Collection, scope: str, cursor: str) -> Query:
    """The query, continued at `cursor`. Raises InvalidInput if the cursor belongs to another query."""
    refused = InvalidInput([Problem("cursor", "is not a cursor of this query: start without a cursor")])
    problems: list[Problem] = []
    try:
        if len(cursor) > MAX_CURSOR_BYTES:
            raise ValueError("too long")
        fingerprint, position = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if fingerprint != _fingerprint(query, scope):
            raise ValueError("another query's")
        # A caller may have altered the cursor: a value of another type cannot be compared, on any engine.
        values = tuple(
            None if value is None else encoded_scalar(name, _scalar_type(collection, name), _untag(value), problems)
            for (name, _), value in zip(query.order, position, strict=True)
        )
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        raise refused from None
    if problems:
        raise refused
    return replace(query, start_after=values)


def _untag(value: Any) -> Any:
    if isinstance(value, dict):
        ((tag, text),) = value.items()
        return _UNTAG[tag](text)
    return value


def _scalar_type(collection: Collection, name: str) -> FieldType:
    kind = collection.type_of(name)
    if kind is None or not kind.is_scalar:
        raise ValueError(f"{name} is not ordered by")
    return kind
