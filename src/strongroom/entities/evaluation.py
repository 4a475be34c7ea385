"""The meaning of queries and aggregates, in plain Python: the definition that every backend is tested against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Context as DecimalContext
from decimal import Decimal
from typing import Any

from ..errors import InvalidInput, Problem
from .collection import Collection, FieldType
from .query import Aggregate, And, Filter, Op, Or, Query
from .values import INT64_MAX, INT64_MIN, MAX_DECIMAL_DIGITS, Document

SUM_CONTEXT = DecimalContext(prec=MAX_DECIMAL_DIGITS * 2)
AVERAGE_CONTEXT = DecimalContext(prec=MAX_DECIMAL_DIGITS)


def sort_key(value: Any) -> tuple[int, Any]:
    """A sort key in the order that every engine must have: null first, text by its UTF-8 bytes."""
    if value is None:
        return (0, 0)
    return (1, value.encode() if isinstance(value, str) else value)


def _same(a: Any, b: Any) -> bool:
    """Whether two elements of lists are equal: true is not 1, and 1 equals 1.0."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Decimal) != isinstance(b, Decimal):
        return False
    return bool(a == b)


def matches(where: Filter | None, document: Document) -> bool:
    """Whether a document satisfies a checked filter."""
    if where is None:
        return True
    if isinstance(where, And):
        return all(matches(part, document) for part in where.filters)
    if isinstance(where, Or):
        return any(matches(part, document) for part in where.filters)
    value, operand = document.get(where.field), where.value
    match where.op:
        case Op.EQ:
            return value is None if operand is None else value is not None and bool(value == operand)
        case Op.NE:
            return value is not None and (operand is None or bool(value != operand))
    if value is None:
        return False
    match where.op:
        case Op.LT:
            return sort_key(value) < sort_key(operand)
        case Op.LE:
            return sort_key(value) <= sort_key(operand)
        case Op.GT:
            return sort_key(value) > sort_key(operand)
        case Op.GE:
            return sort_key(value) >= sort_key(operand)
        case Op.IN:
            return value in operand
        case Op.NOT_IN:
            return value not in operand
        case Op.CONTAINS:
            return any(_same(item, operand) for item in value)
        case _:
            return any(_same(item, wanted) for item in value for wanted in operand)


class _Descending:
    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key = key

    def __lt__(self, other: _Descending) -> bool:
        return bool(other.key < self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and bool(other.key == self.key)

    __hash__ = None  # type: ignore[assignment]


def _position(query: Query, values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        _Descending(sort_key(value)) if descending else sort_key(value)
        for (_, descending), value in zip(query.order, values, strict=True)
    )


def evaluate(query: Query, documents: Iterable[Document]) -> list[Document]:
    """The documents of one page of a checked query, in order: at most `query.limit`, with the projection applied."""
    names = [name for name, _ in query.order]
    found = [(_position(query, [d[n] for n in names]), d) for d in documents if matches(query.where, d)]
    found.sort(key=lambda pair: pair[0])
    if query.start_after is not None:
        start = _position(query, query.start_after)
        found = [pair for pair in found if start < pair[0]]
    page = [document for _, document in found[: query.limit]]
    return [project(query.fields, document) for document in page]


def project(fields: tuple[str, ...] | None, document: Document) -> Document:
    if fields is None:
        return document
    return {"id": document["id"], **{name: document[name] for name in fields}}


# --- Aggregates -----------------------------------------------------------------------------------------------


def aggregate(
    aggregates: Sequence[Aggregate], where: Filter | None, collection: Collection, documents: Iterable[Document]
) -> dict[str, Any]:
    """Each aggregate's value by its name, over the documents that match."""
    found = [d for d in documents if matches(where, d)]
    answer: dict[str, Any] = {}
    for item in aggregates:
        if item.field is None:
            answer[item.name] = len(found)
            continue
        values = [v for d in found if (v := d[item.field]) is not None]
        kind = collection.type_of(item.field)
        answer[item.name] = total(values, kind) if item.kind == "sum" else average(values, kind)
    return answer


def total(values: Sequence[Any], kind: FieldType | None) -> Any:
    if kind is FieldType.DECIMAL:
        result = Decimal(0)
        for value in values:
            result = SUM_CONTEXT.add(result, value)
        return result
    if kind is FieldType.FLOAT:
        return float(sum(values))
    return checked_sum(sum(values))


def checked_sum(value: int) -> int:
    """An int sum, or InvalidInput if it leaves int64 (Firestore would turn it into a float silently)."""
    if not INT64_MIN <= value <= INT64_MAX:
        raise InvalidInput([Problem("aggregate", "the sum exceeds int64")])
    return value


def average(values: Sequence[Any], kind: FieldType | None) -> Any:
    if not values:
        return None
    if kind is FieldType.DECIMAL:
        return AVERAGE_CONTEXT.divide(total(values, kind), Decimal(len(values)))
    return sum(values) / len(values)
