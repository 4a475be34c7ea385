"""Queries as parameterised SQL.

The statements are plain texts, compiled once for each shape (the query without its values), and given to the driver as
they are. A text is made of declared names and shapes only; a value is always bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ...entities import (
    AVERAGE_CONTEXT,
    SYSTEM_FIELDS,
    Aggregate,
    And,
    Document,
    FieldType,
    Filter,
    Op,
    Or,
    Query,
    Where,
    checked_sum,
    sort_key,
)
from .dialect import Dialect, Total, listed, quoted
from .rows import Codec
from .tables import index_columns

MAX_SHAPES = 500
"""Compiled texts kept for each collection. A new text evicts the oldest."""

Shape = tuple[Any, ...]
"""A filter without its values: (field, op, how many values, the tests of array-contains) or (And | Or, shapes)."""


@dataclass(frozen=True, slots=True)
class Select:
    """A page's text, and the function that makes documents of its rows."""

    sql: str
    decode: Callable[[Sequence[Any]], Document]


@dataclass(frozen=True, slots=True)
class Totals:
    """An aggregate's text; for each answer its name, its slice of the row, and the function that makes the answer."""

    sql: str
    answers: tuple[tuple[str, slice, Callable[[Sequence[Any]], Any]], ...]

    def read(self, row: Sequence[Any]) -> dict[str, Any]:
        return {name: finish(row[part]) for name, part, finish in self.answers}


class _Text:
    """Numbers the placeholders of one text in the order of its values, after those that are `bound` elsewhere."""

    def __init__(self, dialect: Dialect, bound: int) -> None:
        self._dialect = dialect
        self._count = bound

    def bind(self) -> str:
        self._count += 1
        return self._dialect.placeholder(self._count)


class Compiler:
    """Queries of one collection as SQL, compiled once a shape.

    `source` is the table or view to read, quoted, or (then `table` says what it stands for) its alias. `scope` is a
    condition on every row, with `bound` placeholders of its own, the first ones; `page` and `totals` are put around
    the text of a page and of an aggregate.
    """

    def __init__(
        self,
        codec: Codec,
        source: str,
        page: str = "{}",
        *,
        totals: str = "{}",
        table: str | None = None,
        scope: str | None = None,
        bound: int = 0,
    ) -> None:
        self._codec = codec
        self._collection = codec.collection
        self._dialect = codec.dialect
        self._source = source
        self._from = source if table is None else f"{table} AS {source}"
        self._page = page
        self._totals_page = totals
        self._scope = scope
        self._bound = bound
        self._texts: dict[Shape, Any] = {}

    def find(self, query: Query) -> tuple[Select, list[Any]]:
        """The text of a checked query, and its values."""
        values: list[Any] = []
        where = _narrowed(query)
        shape = self._shape(where, values) if where is not None else None
        order = query.order
        position = query.start_after
        nulls = None
        if position is not None:
            nulls = tuple(value is None for value in position)
            for (name, _), value in zip(order, position, strict=True):
                if value is not None:
                    values.append(self._dialect.encode(self._collection.type_of(name), value))
        values.append(query.limit)
        key = (shape, order, nulls, query.fields)
        found: Select | None = self._texts.get(key)
        return found or self._kept(key, self._select(shape, order, nulls, query.fields)), values

    def aggregate(self, aggregates: Sequence[Aggregate], where: Filter | None) -> tuple[Totals, list[Any]]:
        """The text of checked aggregates, and its values."""
        values: list[Any] = []
        shape = self._shape(where, values) if where is not None else None
        key = (shape, tuple(aggregates))
        found: Totals | None = self._texts.get(key)
        return found or self._kept(key, self._totals(aggregates, shape)), values

    def _kept(self, key: Shape, made: Any) -> Any:
        if len(self._texts) >= MAX_SHAPES:
            del self._texts[next(iter(self._texts))]
        self._texts[key] = made
        return made

    # --- From a filter to its shape and values ---

    def _shape(self, where: Filter, values: list[Any]) -> Shape:
        if not isinstance(where, Where):
            return (type(where), tuple(self._shape(part, values) for part in where.filters))
        name, op, value = where.field, where.op, where.value
        if op is Op.CONTAINS or op is Op.CONTAINS_ANY:
            tests = [self._dialect.element(item) for item in (value if op is Op.CONTAINS_ANY else (value,))]
            values.extend(bound for _, bound in tests if bound is not None)
            return (name, op, len(tests), tuple((kind, bound is not None) for kind, bound in tests))
        if value is None:
            return (name, op, 0)
        convert = self._dialect.encoders.get(self._collection.type_of(name))  # type: ignore[arg-type]
        items = value if op is Op.IN or op is Op.NOT_IN else (value,)
        values.extend(items if convert is None else map(convert, items))
        return (name, op, len(items))

    # --- From a shape to its text ---

    def _condition(self, shape: Shape, text: _Text) -> str:
        if shape[0] is And or shape[0] is Or:
            word = " AND " if shape[0] is And else " OR "
            return "(" + word.join(self._condition(part, text) for part in shape[1]) + ")"
        name, op, count = shape[:3]
        column = f"{self._source}.{quoted(name)}"
        if op is Op.CONTAINS or op is Op.CONTAINS_ANY:
            return self._dialect.contains(column, [(kind, text.bind() if bound else None) for kind, bound in shape[3]])
        if count == 0:
            return f"{column} IS NULL" if op is Op.EQ else f"{column} IS NOT NULL"
        if op is Op.IN or op is Op.NOT_IN:
            word = "IN" if op is Op.IN else "NOT IN"
            return f"{column} {word} ({', '.join(text.bind() for _ in range(count))})"
        return f"{column} {_SIGNS[op]} {text.bind()}"

    def _after(self, order: Sequence[tuple[str, bool]], nulls: Sequence[bool], text: _Text) -> str:
        """The condition for rows after a position: later in the first column, or equal there and later in the next,
        …"""
        columns = [f"{self._source}.{quoted(name)}" for name, _ in order]
        bounds = [None if null else text.bind() for null in nulls]
        optional = [name not in SYSTEM_FIELDS for name, _ in order]
        directions = {descending for _, descending in order}
        if len(order) > 1 and len(directions) == 1 and not any(nulls) and not any(optional):
            sign = "<" if order[0][1] else ">"
            return f"({', '.join(columns)}) {sign} ({', '.join(map(str, bounds))})"
        ways = []
        for number, (column, bound, (_, descending)) in enumerate(zip(columns, bounds, order, strict=True)):
            if bound is None and descending:
                continue  # null comes first, so in descending order nothing comes after it
            if bound is None:
                later = f"{column} IS NOT NULL"
            elif descending:
                later = f"({column} < {bound} OR {column} IS NULL)" if optional[number] else f"{column} < {bound}"
            else:
                later = f"{column} > {bound}"
            equal = [
                f"{c} IS NULL" if b is None else f"{c} = {b}"
                for c, b in zip(columns[:number], bounds[:number], strict=True)
            ]
            ways.append(" AND ".join([*equal, later]))
        behind = " OR ".join(f"({way})" for way in ways)
        if bounds[0] is not None and not order[0][1]:
            # The first bound is repeated outside the OR, so that an index can begin at the position.
            return f"{columns[0]} >= {bounds[0]} AND ({behind})"
        return f"({behind})"

    def _select(
        self,
        shape: Shape | None,
        order: Sequence[tuple[str, bool]],
        nulls: Sequence[bool] | None,
        fields: Sequence[str] | None,
    ) -> Select:
        text = _Text(self._dialect, self._bound)
        columns = self._codec.columns if fields is None else tuple(dict.fromkeys(("id", *fields)))
        decode = self._codec.decode if fields is None else self._codec.decoder(columns)
        conditions = [] if self._scope is None else [self._scope]
        if shape is not None:
            conditions.append(self._condition(shape, text))
        if nulls is not None:
            conditions.append(self._after(order, nulls, text))
        where = _where(conditions)
        terms = order if self._dialect.null_is_constant else (*self._leading_nulls(shape, order), *order)
        by = ", ".join(self._dialect.order(f"{self._source}.{quoted(name)}", name, down) for name, down in terms)
        sql = f"SELECT {listed(columns)} FROM {self._from}{where} ORDER BY {by} LIMIT {text.bind()}"
        return Select(self._page.format(sql), decode)

    def _leading_nulls(self, shape: Shape | None, order: Sequence[tuple[str, bool]]) -> Sequence[tuple[str, bool]]:
        """The fields that are null in every found document and that an index has before the order. Naming them first
        does not change the order, and shows the planner that the index has it."""
        parts = () if shape is None else shape[1] if shape[0] is And else (shape,)
        fixed = {part[0]: part[2] == 0 for part in parts if part[0] not in (And, Or) and part[1] is Op.EQ}
        if not any(fixed.values()):
            return ()
        best: list[tuple[str, bool]] = []
        for index in self._collection.indexes:
            columns = index_columns(self._collection, index)[self._collection.tenant_scoped :]
            first = next((n for n, (name, _) in enumerate(columns) if name not in fixed or name == order[0][0]), None)
            if first is None or [name for name, _ in columns[first:]][: len(order)] != [name for name, _ in order]:
                continue
            turned = {down != wanted for (_, down), (_, wanted) in zip(columns[first:], order, strict=False)}
            found = [(name, down is not (True in turned)) for name, down in columns[:first] if fixed[name]]
            if len(turned) == 1 and len(found) > len(best):
                best = found
        return best

    def _totals(self, aggregates: Sequence[Aggregate], shape: Shape | None) -> Totals:
        columns: list[str] = []
        answers = []
        for item in aggregates:
            kind = self._collection.type_of(item.field) if item.field is not None else None
            if item.field is None:
                parts: tuple[str, ...] = ("count(*)",)
                finish: Callable[[Sequence[Any]], Any] = _first
            else:
                column = f"{self._source}.{quoted(item.field)}"
                summed = self._dialect.total(column, kind)
                parts = (f"count({column})", *summed.columns)
                finish = _sum(summed, kind) if item.kind == "sum" else _average(summed, kind)
            answers.append((item.name, slice(len(columns), len(columns) + len(parts)), finish))
            columns += parts
        conditions = [] if self._scope is None else [self._scope]
        if shape is not None:
            conditions.append(self._condition(shape, _Text(self._dialect, self._bound)))
        sql = f"SELECT {', '.join(columns)} FROM {self._from}{_where(conditions)}"
        return Totals(self._totals_page.format(sql), tuple(answers))


def _narrowed(query: Query) -> Filter | None:
    """The filter with its bound on the first ordering field moved to the position, if it lies before the position. The
    same documents come after the position; but an engine that starts at the filter's bound would otherwise pass, on
    each page, every row between that bound and the position."""
    where, position = query.where, query.start_after
    if where is None or position is None or position[0] is None:
        return where
    (name, descending), at = query.order[0], position[0]
    wider = (Op.LT, Op.LE) if descending else (Op.GT, Op.GE)

    def narrowed(part: Filter) -> Filter:
        if not isinstance(part, Where) or part.field != name:
            return part
        if part.op in wider:
            before, after = (at, part.value) if descending else (part.value, at)
            narrower = sort_key(before) < sort_key(after)
        else:
            narrower = part.op is Op.NE and part.value is None
        return Where(name, Op.LE if descending else Op.GE, at) if narrower else part

    return And(*map(narrowed, where.filters)) if isinstance(where, And) else narrowed(where)


def _where(conditions: Sequence[str]) -> str:
    return f" WHERE {' AND '.join(conditions)}" if conditions else ""


_SIGNS = {Op.EQ: "=", Op.NE: "<>", Op.LT: "<", Op.LE: "<=", Op.GT: ">", Op.GE: ">="}


def _first(row: Sequence[Any]) -> Any:
    return row[0]


def _sum(summed: Total, kind: FieldType | None) -> Callable[[Sequence[Any]], Any]:
    def finish(row: Sequence[Any]) -> Any:
        value = summed.finish(row[1:])
        return checked_sum(value) if kind is FieldType.INT else value

    return finish


def _average(summed: Total, kind: FieldType | None) -> Callable[[Sequence[Any]], Any]:
    def finish(row: Sequence[Any]) -> Any:
        count = row[0]
        if count == 0:
            return None
        value = summed.finish(row[1:])
        return AVERAGE_CONTEXT.divide(value, Decimal(count)) if kind is FieldType.DECIMAL else value / count

    return finish
