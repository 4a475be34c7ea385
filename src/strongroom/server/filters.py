"""A list's query string as a Query: `?status=pending&priority__ge=3&order_by=-created_at&limit=50`.

- `field=value` is equality. `field__op=value` compares: `ne lt le gt ge`, `contains` (a list field has the value),
  `null` (`true` or `false`). `in`, `not_in` and `contains_any` may be given several times, a value each.
- `order_by` names fields, separated by commas, `-` for descending. `limit` and `cursor` page.
- `where` is a JSON filter for what the others cannot say, `or` above all:
  `{"or": [{"field": "status", "op": "==", "value": "failed"}, {"and": […]}]}`, with the operators
  `== != < <= > >= in not-in array-contains array-contains-any`. All filters together must hold.
- Values are read as the field's type: times as ISO 8601 with a zone, bytes as base64, booleans as `true` or `false`.
- A field that is called like one of these parameters is compared with `field__eq`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from ..entities import (
    DEFAULT_LIMIT,
    INT64_MAX,
    INT64_MIN,
    LIST_OPS,
    MAX_LIMIT,
    And,
    Collection,
    FieldType,
    Filter,
    Op,
    Or,
    Query,
    Where,
    found_in,
)
from ..errors import InvalidInput, Problem

RESERVED = ("order_by", "limit", "cursor", "where")
MAX_PARAMETERS = 200
MAX_LEVELS = 10
SUFFIXES: dict[str, Op] = {
    "eq": Op.EQ,
    "ne": Op.NE,
    "lt": Op.LT,
    "le": Op.LE,
    "gt": Op.GT,
    "ge": Op.GE,
    "in": Op.IN,
    "not_in": Op.NOT_IN,
    "contains": Op.CONTAINS,
    "contains_any": Op.CONTAINS_ANY,
}
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")


def query_of(collection: Collection, parameters: Sequence[tuple[str, str]]) -> tuple[Query, str | None]:
    """The query and the cursor in a query string. Raises InvalidInput with every problem."""
    reader = _Reader(collection)
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidInput(f"found {len(parameters)} query parameters, expected at most {MAX_PARAMETERS}")
    given: dict[str, list[str]] = {}
    for name, value in parameters:
        given.setdefault(name, []).append(value)
    one = {name: reader.single(name, given.pop(name)) for name in RESERVED if name in given}
    filters = [f for name, values in given.items() if (f := reader.comparison(name, values)) is not None]
    if one.get("where"):
        tree = reader.tree(one["where"])
        filters += [tree] if tree is not None else []
    order_by = tuple(part.strip() for part in one.get("order_by", "").split(",") if part.strip())
    limit = reader.limit(one.get("limit"))
    query = Query(And(*filters) if len(filters) > 1 else filters[0] if filters else None, order_by, limit)
    try:
        query.check(collection)
    except InvalidInput as error:
        reader.problems += error.problems
    if reader.problems:
        raise InvalidInput(dict.fromkeys(reader.problems))
    return query, one.get("cursor") or None


class _Reader:
    """Reads values by the type of their field, and collects the problems."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.problems: list[Problem] = []

    def wrong(self, path: str, message: str) -> None:
        self.problems.append(Problem(path[:128], message))

    def single(self, name: str, values: list[str]) -> str:
        if len(values) > 1:
            self.wrong(name, f"is given {len(values)} times, expected once")
        return values[-1]

    def limit(self, text: str | None) -> int:
        if text is None:
            return DEFAULT_LIMIT
        if not _INTEGER.fullmatch(text) or not 1 <= int(text) <= MAX_LIMIT:
            self.wrong("limit", f"found {text[:64]!r}, expected 1 to {MAX_LIMIT}")
            return DEFAULT_LIMIT
        return int(text)

    # --- One parameter ----------------------------------------------------------------------------------------

    def comparison(self, name: str, values: list[str]) -> Filter | None:
        field, op, is_null = self.name(name)
        if field is None:
            return None
        if is_null:
            text = self.single(name, values)
            if text not in ("true", "false"):
                self.wrong(name, f"found {text[:64]!r}, expected true or false")
                return None
            return Where(field, Op.EQ if text == "true" else Op.NE, None)
        if op in LIST_OPS:
            found = [self.value(name, field, op, value) for value in values]
            return Where(field, op, tuple(found)) if not any(v is _WRONG for v in found) else None
        value = self.value(name, field, op, self.single(name, values))
        return Where(field, op, value) if value is not _WRONG else None

    def name(self, name: str) -> tuple[str | None, Op, bool]:
        """The field and the operator of a parameter. A field whose name looks like field and operator takes
        precedence."""
        if self.collection.type_of(name) is not None:
            return name, Op.EQ, False
        field, separator, suffix = name.rpartition("__")
        if separator and self.collection.type_of(field) is not None:
            if suffix == "null":
                return field, Op.EQ, True
            if suffix in SUFFIXES:
                return field, SUFFIXES[suffix], False
            self.wrong(name, f"found operator {suffix[:64]!r}, expected one of {' '.join(SUFFIXES)} null")
            return None, Op.EQ, False
        expected = f"a field of {self.collection.name}, or {', '.join(RESERVED)}"
        self.wrong(name, f"is not a known parameter; expected {expected}")
        return None, Op.EQ, False

    # --- Values -----------------------------------------------------------------------------------------------

    def value(self, path: str, field: str, op: Op, text: str) -> Any:
        """A value of the query string, by the type of its field."""
        kind = self.collection.type_of(field)
        if op in (Op.CONTAINS, Op.CONTAINS_ANY) or kind is None or not kind.is_scalar:
            return text  # elements of lists have no declared type here, so they are texts; `where` has other types
        try:
            return _FROM_TEXT[kind](text)
        except (ValueError, InvalidOperation, binascii.Error):
            self.wrong(path, f"found {text[:64]!r}, expected {_EXPECTED[kind]}")
            return _WRONG

    def json_value(self, path: str, field: str, op: Op, value: Any) -> Any:
        """A value of `where`. JSON has texts and numbers; times, bytes and Decimals are texts."""
        kind = self.collection.type_of(field)
        if isinstance(value, dict):
            self.wrong(path, "found an object, expected a value")
            return _WRONG
        if isinstance(value, str) and kind in _WRITTEN and op not in (Op.CONTAINS, Op.CONTAINS_ANY):
            return self.value(path, field, op, value)
        if isinstance(value, Decimal) and kind is not FieldType.DECIMAL:
            return float(value)
        return value

    # --- where ------------------------------------------------------------------------------------------------

    def tree(self, text: str) -> Filter | None:
        try:
            return self.node(json.loads(text, parse_float=Decimal, parse_constant=_no_constant), "where", 0)
        except (ValueError, RecursionError):
            self.wrong("where", 'is not JSON; expected such as {"field": "status", "op": "==", "value": "failed"}')
            return None

    def node(self, node: Any, path: str, level: int) -> Filter | None:
        if isinstance(node, dict) and len(node) == 1 and level < MAX_LEVELS:
            ((name, parts),) = node.items()
            if name in ("and", "or") and isinstance(parts, list) and parts:
                found = [self.node(part, f"{path}.{name}.{i}", level + 1) for i, part in enumerate(parts)]
                whole = [part for part in found if part is not None]
                if len(whole) < len(found):
                    return None
                return And(*whole) if name == "and" else Or(*whole)
        if not isinstance(node, dict) or set(node) != {"field", "op", "value"}:
            self.wrong(
                path,
                f"found {found_in(node)}, expected an object with field, op and value, or with a list under and or or",
            )
            return None
        return self.leaf(node, path)

    def leaf(self, node: dict[str, Any], path: str) -> Filter | None:
        field, value = node["field"], node["value"]
        if not isinstance(field, str):
            self.wrong(f"{path}.field", f"found {found_in(field)}, expected text")
            return None
        try:
            op = Op(node["op"])
        except ValueError:
            self.wrong(f"{path}.op", f"found {found_in(node['op'])}, expected one of {' '.join(o.value for o in Op)}")
            return None
        if op in LIST_OPS:
            if not isinstance(value, list):
                self.wrong(f"{path}.value", f"{op} takes a list")
                return None
            values = [self.json_value(f"{path}.value.{i}", field, op, item) for i, item in enumerate(value)]
            return Where(field, op, tuple(values)) if not any(v is _WRONG for v in values) else None
        if isinstance(value, list):
            self.wrong(f"{path}.value", f"{op} takes one value")
            return None
        value = self.json_value(f"{path}.value", field, op, value)
        return Where(field, op, value) if value is not _WRONG else None


class _Wrong:
    """Replaces a value whose problem was already reported."""


_WRONG: Any = _Wrong()


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _int(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(text)
    return int(text)


def _bytes(text: str) -> bytes:
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)


def _time(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace(" ", "+"))  # a + in a query string is decoded to a space
    if moment.utcoffset() is None:
        raise ValueError(text)
    return moment


_FROM_TEXT: dict[FieldType, Any] = {
    FieldType.BOOL: _bool,
    FieldType.INT: _int,
    FieldType.FLOAT: float,
    FieldType.DECIMAL: Decimal,
    FieldType.TEXT: str,
    FieldType.BYTES: _bytes,
    FieldType.TIMESTAMP: _time,
}
_EXPECTED: dict[FieldType, str] = {
    FieldType.BOOL: "true or false",
    FieldType.INT: "a whole number",
    FieldType.FLOAT: "a number",
    FieldType.DECIMAL: "a number",
    FieldType.TEXT: "text",
    FieldType.BYTES: "base64",
    FieldType.TIMESTAMP: "a time with a zone, such as 2027-01-01T00:00:00Z",
}
_WRITTEN = frozenset({FieldType.DECIMAL, FieldType.BYTES, FieldType.TIMESTAMP})


_SCHEMAS: dict[FieldType, dict[str, Any]] = {
    FieldType.BOOL: {"type": "boolean"},
    FieldType.INT: {"type": "integer", "minimum": INT64_MIN, "maximum": INT64_MAX},
    FieldType.FLOAT: {"type": "number"},
    FieldType.DECIMAL: {"type": "number"},
    FieldType.TEXT: {"type": "string", "pattern": "^[^\\u0000]*$"},
    FieldType.BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldType.TIMESTAMP: {"type": "string", "format": "date-time"},
}


def parameters_of(collection: Collection) -> Iterable[dict[str, Any]]:
    """The query parameters of a collection's list, for OpenAPI."""

    def parameter(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
        return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}

    fields = [f for f in collection.fields.values() if not f.secret]
    scalars = [*(f.name for f in fields if f.type.is_scalar), "id", "created_at", "updated_at"]
    one = f"-?({'|'.join(scalars)})"
    page = {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
    order = {"type": "string", "pattern": f"^{one}(,{one})*$"}
    where = {"type": "string", "contentMediaType": "application/json"}
    yield parameter("limit", page, "Documents in one page.")
    yield parameter("cursor", {"type": "string"}, "The `next_cursor` of the last page.")
    yield parameter("order_by", order, "Fields, separated by commas; `-` before one is descending.")
    yield parameter("where", where, _WHERE)
    for name, schema in _OF_THE_STORE.items():
        yield parameter(name, schema, f"Equals. Also `{name}__` with {_COMPARISONS}.")
    for field in fields:
        if field.type.is_scalar and field.name not in RESERVED:
            yield parameter(
                field.name, _SCHEMAS[field.type], f"Equals. Also `{field.name}__` with {_COMPARISONS} or `null`."
            )
        elif field.type.is_scalar:
            yield parameter(
                f"{field.name}__eq",
                _SCHEMAS[field.type],
                f"Equals. Also `{field.name}__` with {_COMPARISONS} or `null`.",
            )
        elif field.type is FieldType.LIST:
            about = f"The list has it. Also `{field.name}__contains_any`, a value each, and `{field.name}__null`."
            yield parameter(f"{field.name}__contains", {"type": "string"}, about)
        else:
            yield parameter(f"{field.name}__null", {"type": "boolean"}, "Whether there is none.")


_OF_THE_STORE: dict[str, dict[str, Any]] = {
    "id": {"type": "string", "pattern": "^[^\\u0000]*$"},
    "created_at": _SCHEMAS[FieldType.TIMESTAMP],
    "updated_at": _SCHEMAS[FieldType.TIMESTAMP],
}
_COMPARISONS = "`ne`, `lt`, `le`, `gt`, `ge`; `in` and `not_in`, which may be given several times, a value each"
_WHERE = (
    'A filter as JSON: `{"field": "…", "op": "==", "value": …}`, or several in a list under `and` or `or`. '
    f"Operators: {' '.join(f'`{op.value}`' for op in Op)}."
)
