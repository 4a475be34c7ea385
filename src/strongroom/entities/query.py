"""A query is a closed value: filters, order, position, projection, aggregates. It is checked here.

Its meaning, the same on every engine (`evaluation.py` defines it):

- `==` and `!=` compare values of one type; `field == None` and `field != None` find null and not-null.
- Any other comparison with a null field is false, `!=` and `not-in` included (as in SQL and Firestore).
- A version is opaque, so no filter, order or sum names it; a projection may.
- Text is ordered by its UTF-8 bytes, bytes bytewise, false before true, null before everything else.
- A page is ordered by the named fields, then by id, so that the order is total; the id goes the way of the last field.
- What Firestore cannot run is refused for all: see the MAX_ constants and `Query.check`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Literal

from ..errors import InvalidInput, Problem
from .collection import Collection, FieldType
from .values import (
    NotStorable,
    encode_value,
)

MAX_LIMIT = 1_000
DEFAULT_LIMIT = 100
MAX_IN = 30
MAX_NOT_IN = 10
MAX_DISJUNCTIONS = 30
MAX_FILTERS = 100
MAX_ORDER = 10
MAX_CURSOR_BYTES = 8_192
MAX_PAGE_BYTES = 4_000_000
"""A page of a list ends when its documents hold this many bytes (`storage.port.document_size`). It has at least one
document, and a cursor if there are more."""


class Op(StrEnum):
    EQ = "=="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    IN = "in"
    NOT_IN = "not-in"
    CONTAINS = "array-contains"
    CONTAINS_ANY = "array-contains-any"


RANGE_OPS = frozenset({Op.LT, Op.LE, Op.GT, Op.GE})
LIST_OPS = frozenset({Op.IN, Op.NOT_IN, Op.CONTAINS_ANY})


@dataclass(frozen=True, slots=True)
class Where:
    """One comparison: `Where("status", "==", "pending")`. For in, not-in and array-contains-any the value is a list."""

    field: str
    op: Op
    value: Any

    def __init__(self, field: str, op: Op | str, value: Any) -> None:
        object.__setattr__(self, "field", field)
        try:
            object.__setattr__(self, "op", Op(op))
        except ValueError:
            expected = " ".join(o.value for o in Op)
            raise InvalidInput([Problem(field, f"found operator {op!r}, expected one of {expected}")]) from None
        if isinstance(value, list | tuple | set | frozenset):
            value = tuple(value)
        object.__setattr__(self, "value", value)


@dataclass(frozen=True, slots=True, init=False)
class And:
    """All of these hold."""

    filters: tuple[Filter, ...]

    def __init__(self, *filters: Filter) -> None:
        object.__setattr__(self, "filters", filters)


@dataclass(frozen=True, slots=True, init=False)
class Or:
    """At least one of these holds."""

    filters: tuple[Filter, ...]

    def __init__(self, *filters: Filter) -> None:
        object.__setattr__(self, "filters", filters)


Filter = Where | And | Or


@dataclass(frozen=True, slots=True)
class Query:
    """A filter, an order and a limit. `order_by` names fields, `-name` for descending. `fields` is a projection; the id
    is always included.

    `start_after` is the position of the last document of the previous page: the values of `order` in turn. Callers use
    the opaque cursor of a page instead (`cursor_of`, `with_cursor`).
    """

    where: Filter | None = None
    order_by: tuple[str, ...] = ()
    limit: int = DEFAULT_LIMIT
    fields: tuple[str, ...] | None = None
    start_after: tuple[Any, ...] | None = field(default=None, repr=False)

    @property
    def order(self) -> tuple[tuple[str, bool], ...]:
        """(field, descending) pairs, made total by the id."""
        pairs = [(f.removeprefix("-"), f.startswith("-")) for f in self.order_by]
        if not any(name == "id" for name, _ in pairs):
            pairs.append(("id", pairs[-1][1] if pairs else False))
        return tuple(pairs)

    def check(self, collection: Collection) -> Query:
        """The query with its values encoded for `collection`; raises InvalidInput with every problem."""
        problems: list[Problem] = []
        where = _check_filter(self.where, collection, problems) if self.where is not None else None
        names = [f.removeprefix("-") for f in self.order_by]
        for name in names:
            kind = collection.type_of(name)
            if kind is None:
                problems.append(Problem("order_by", f"there is no field {name!r} in {collection.name}"))
            elif not kind.is_scalar or name in collection.secrets or name == "version":
                problems.append(Problem("order_by", f"{name!r} cannot be ordered by"))
        if len(set(names)) != len(names) or len(names) > MAX_ORDER:
            problems.append(Problem("order_by", f"found {len(names)}, expected at most {MAX_ORDER} different fields"))
        if type(self.limit) is not int or not 1 <= self.limit <= MAX_LIMIT:
            problems.append(Problem("limit", f"found {self.limit!r}, expected 1 to {MAX_LIMIT}"))
        for name in self.fields or ():
            if collection.type_of(name) is None:
                problems.append(Problem("fields", f"there is no field {name!r} in {collection.name}"))
        if where is not None:
            _check_combination(where, problems)
        if problems:
            raise InvalidInput(problems)
        return replace(self, where=where)


# --- Checking -------------------------------------------------------------------------------------------------


def leaves(where: Filter) -> Iterable[Where]:
    """Every comparison in a filter, in order."""
    if isinstance(where, Where):
        yield where
    else:
        for part in where.filters:
            yield from leaves(part)


def disjunctions(where: Filter) -> int:
    """The number of `and`s when the filter is written as an `or` of `and`s, as Firestore counts them."""
    if isinstance(where, Where):
        return len(where.value) if where.op in (Op.IN, Op.CONTAINS_ANY) else 1
    if isinstance(where, Or):
        return sum(disjunctions(part) for part in where.filters)
    ways = 1
    for part in where.filters:
        ways *= disjunctions(part)
    return ways


def _check_filter(where: Any, collection: Collection, problems: list[Problem], depth: int = 0) -> Any:
    if isinstance(where, Where):
        return _check_where(where, collection, problems)
    if not isinstance(where, And | Or):
        problems.append(Problem("where", f"found {type(where).__name__}, expected Where, And or Or"))
        return where
    if not where.filters or depth > MAX_ORDER:
        problems.append(Problem("where", f"and/or needs at least one filter, and at most {MAX_ORDER} levels"))
        return where
    return type(where)(*(_check_filter(part, collection, problems, depth + 1) for part in where.filters))


def _check_where(where: Where, collection: Collection, problems: list[Problem]) -> Where:
    name, op, value = where.field, where.op, where.value
    if name == "version":
        problems.append(Problem(name, "is opaque and cannot be filtered by"))
        return where
    kind = collection.type_of(name)
    if kind is None:
        problems.append(Problem(name, f"there is no such field in {collection.name}"))
        return where
    if name in collection.secrets:
        problems.append(Problem(name, "is secret and cannot be filtered by"))
        return where
    before = len(problems)
    if op in LIST_OPS:
        most = MAX_NOT_IN if op is Op.NOT_IN else MAX_IN
        if not isinstance(value, tuple) or not 1 <= len(value) <= most:
            problems.append(Problem(name, f"{op} takes a list of 1 to {most} values"))
            return where
    if op in (Op.CONTAINS, Op.CONTAINS_ANY):
        if kind is not FieldType.LIST:
            problems.append(Problem(name, f"{op} needs a list field, {name!r} is {kind}"))
        items = value if op is Op.CONTAINS_ANY else (value,)
        encoded = tuple(_encoded_element(name, item, problems) for item in items)
        return where if len(problems) > before else Where(name, op, encoded if op is Op.CONTAINS_ANY else encoded[0])
    if not kind.is_scalar and not (value is None and op in (Op.EQ, Op.NE)):
        problems.append(Problem(name, f"a {kind} field can only be compared with null, or by array-contains"))
        return where
    if value is None and op in (Op.EQ, Op.NE):
        return where
    items = value if op in LIST_OPS else (value,)
    encoded = tuple(encoded_scalar(name, kind, item, problems) for item in items)
    return where if len(problems) > before else Where(name, op, encoded if op in LIST_OPS else encoded[0])


def _encoded_element(name: str, value: Any, problems: list[Problem]) -> Any:
    if value is None or isinstance(value, list | tuple | dict):
        problems.append(Problem(name, "only a scalar can be looked for in a list"))
        return value
    return _encoded(name, value, problems)


def _encoded(name: str, value: Any, problems: list[Problem]) -> Any:
    try:
        return encode_value(value, name)
    except NotStorable as bad:
        problems.append(bad.problem)
        return value


_PYTHON_TYPES: dict[FieldType, tuple[type, ...]] = {
    FieldType.BOOL: (bool,),
    FieldType.INT: (int,),
    FieldType.FLOAT: (float, int),
    FieldType.DECIMAL: (Decimal, int),
    FieldType.TEXT: (str,),
    FieldType.BYTES: (bytes,),
    FieldType.TIMESTAMP: (datetime,),
}


def encoded_scalar(name: str, kind: FieldType, given: Any, problems: list[Problem]) -> Any:
    if given is None:
        problems.append(Problem(name, "found null; only == and != take null"))
        return given
    value = _encoded(name, given, problems)
    if isinstance(value, bool) != (kind is FieldType.BOOL) or not isinstance(value, _PYTHON_TYPES[kind]):
        problems.append(Problem(name, f"found {type(value).__name__}, expected {kind}"))
        return given
    if kind is FieldType.FLOAT and isinstance(value, int):
        return float(value)
    return Decimal(value) if kind is FieldType.DECIMAL and isinstance(value, int) else value


def _check_combination(where: Filter, problems: list[Problem]) -> None:
    """Refuse, for every engine, the combinations that Firestore refuses, so that a query works after a migration."""
    if problems:
        return
    found = list(leaves(where))
    ops = [leaf.op for leaf in found]
    if len(found) > MAX_FILTERS or disjunctions(where) > MAX_DISJUNCTIONS:
        problems.append(Problem("where", f"at most {MAX_FILTERS} filters and {MAX_DISJUNCTIONS} ways (or, in)"))
    if Op.NOT_IN in ops:
        others = {Op.NE, Op.IN, Op.CONTAINS_ANY}
        if ops.count(Op.NOT_IN) > 1 or others & set(ops) or _has_or(where):
            problems.append(Problem("where", "not-in cannot be combined with another not-in, !=, in, or"))
    for way in _ways(where):
        if sum(leaf.op in (Op.CONTAINS, Op.CONTAINS_ANY) for leaf in way) > 1:
            problems.append(Problem("where", "at most one array-contains or array-contains-any in each way of an or"))
            break


def _has_or(where: Filter) -> bool:
    return isinstance(where, Or) or (isinstance(where, And) and any(_has_or(p) for p in where.filters))


def _ways(where: Filter) -> list[list[Where]]:
    if isinstance(where, Where):
        return [[where]]
    if isinstance(where, Or):
        return [way for part in where.filters for way in _ways(part)][: MAX_DISJUNCTIONS + 1]
    ways: list[list[Where]] = [[]]
    for part in where.filters:
        ways = [a + b for a in ways for b in _ways(part)][: MAX_DISJUNCTIONS + 1]
    return ways


# --- Aggregates -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Aggregate:
    """`count`, or `sum` or `average` of a number field. Nulls are left out; the sum of nothing is 0, its average None.

    A sum of ints is an int and must stay in int64 (InvalidInput otherwise); of Decimals, an exact Decimal; of floats,
    a float. An average is a float, of Decimals a Decimal of 38 digits.
    """

    kind: Literal["count", "sum", "average"]
    field: str | None = None

    @property
    def name(self) -> str:
        return self.kind if self.field is None else f"{self.kind}_{self.field}"

    def check(self, collection: Collection) -> None:
        if self.kind not in ("count", "sum", "average"):
            raise InvalidInput([Problem("aggregate", f"found {self.kind!r}, expected count, sum or average")])
        if self.kind == "count":
            if self.field is not None:
                raise InvalidInput([Problem("aggregate", "count takes no field")])
            return
        kind = collection.type_of(self.field or "")
        if kind is None or not kind.is_number or self.field in collection.secrets or self.field == "version":
            raise InvalidInput([Problem("aggregate", f"{self.kind} needs a number field, found {self.field!r}")])
