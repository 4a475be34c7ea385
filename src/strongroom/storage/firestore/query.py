"""Queries on Firestore: it answers the parts that it can, and this module applies the rest exactly to its answer.

A page is read in the query's own order, so no more is read than the page and what the filters left out cost. Filters
that would change the order (a range over a field that the page is not ordered by first), that Firestore cannot combine
(not-in beside an or, several of them), or whose meaning is not Firestore's are applied here.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.cloud.firestore_v1.types import query as _query

from ...cooperative import Slices
from ...entities import (
    Aggregate,
    And,
    Collection,
    Document,
    FieldType,
    Filter,
    Op,
    Query,
    Where,
    aggregate,
    evaluate,
    leaves,
    matches,
    project,
    sort_key,
)
from ...errors import InvalidInput, Problem, SchemaError
from .client import AggregationRequest, MissingIndex, RunQueryRequest, Wire
from .paths import Paths
from .places import Plan
from .values import PACKED_LIST, default_of, value_of

MAX_INDEXED_BYTES = 1_500
"""Firestore's indexes hold this much of a text; longer texts are compared here."""
MAX_WAYS = 30
"""How many ways (or, in) Firestore takes in one query."""
MIN_PAGE = 50
MAX_PAGE = 1_000
_Filter: Any = _query.StructuredQuery.Filter.pb()
_F: Any = _query.StructuredQuery.FieldFilter.Operator
_U: Any = _query.StructuredQuery.UnaryFilter.Operator
_C: Any = _query.StructuredQuery.CompositeFilter.Operator
_D: Any = _query.StructuredQuery.Direction
_RANGES = {
    Op.LT: _F.LESS_THAN,
    Op.LE: _F.LESS_THAN_OR_EQUAL,
    Op.GT: _F.GREATER_THAN,
    Op.GE: _F.GREATER_THAN_OR_EQUAL,
}


@dataclass(frozen=True, slots=True)
class Pushed:
    """A filter for Firestore: every match of the original matches it, and if it is `exact`, nothing else does."""

    filter: Any
    exact: bool
    ways: int = 1
    arrays: int = 0


class Search:
    """One query of a tenant's collection. `lazy` are the fields that documents may have been written without."""

    def __init__(self, wire: Wire, paths: Paths, plan: Plan, tenant: str | None, lazy: frozenset[str]) -> None:
        self._wire = wire
        self._paths = paths
        self._plan = plan
        self._collection = plan.collection
        self._tenant = tenant
        self._lazy = lazy
        self._by_name = plan.placed_by is None
        """Ids are queried as document names, which needs no index, unless another field places the documents."""
        self._parent = paths.parent(plan.collection, tenant)
        self._listed = {name for index in plan.collection.indexes for name, _ in index.columns}

    # --- The two questions ---

    async def find(self, query: Query) -> list[Document]:
        names = self._names(query.where)
        if names is not None:
            found, _ = await self._wire.batch_get(names) if names else ({}, None)
            return evaluate(query, [self._plan.codec.document(d) for d in found.values() if d is not None])
        if any(name in self._lazy for name, _ in query.order):
            return evaluate(query, [document async for document in self._all(query.where, None)])
        page: list[Document] = []
        slices = Slices()
        async for document in self._ordered(query):
            await slices.pause()
            page.append(project(query.fields, document))
            if len(page) == query.limit:
                break
        return page

    async def aggregate(self, aggregates: Sequence[Aggregate], where: Filter | None) -> dict[str, Any]:
        pushed = self._push(where, None) if where is not None else None
        exact = where is None or (pushed is not None and pushed.exact)
        if exact and all(map(self._is_native, aggregates)) and not self._is_beyond_indexes(aggregates, where):
            found = await self._aggregated(aggregates, pushed)
            if found is not None:
                return found
        fields = {item.field for item in aggregates if item.field is not None}
        fields |= {leaf.field for leaf in leaves(where)} if where is not None else set()
        documents = [document async for document in self._all(where, fields)]
        return aggregate(aggregates, where, self._collection, documents)

    # --- Documents by name ---

    def _names(self, where: Filter | None) -> list[str] | None:
        """The only documents that can match, if the filter names them; else None."""
        placed_by = self._plan.placed_by or "id"
        for part in _conjuncts(where):
            if isinstance(part, Where) and part.field == placed_by and part.op in (Op.EQ, Op.IN):
                names = []
                for value in part.value if part.op is Op.IN else (part.value,):
                    try:
                        if value:
                            names.append(self._paths.document(self._collection, self._tenant, value))
                    except InvalidInput:
                        continue  # no document has an id that no name can hold
                return names
        return None

    # --- Filters ---

    def _push(self, where: Filter, ranged: str | None) -> Pushed | None:
        """The filter for Firestore, or None. `ranged` is the one field that a range may be asked over: None for any."""
        if isinstance(where, Where):
            return self._push_where(where, ranged)
        parts = [self._push(part, ranged) for part in where.filters]
        if isinstance(where, And):
            return self._all_of(parts)
        some = [part for part in parts if part is not None]
        ways = sum(part.ways for part in some)
        if len(some) < len(parts) or ways > MAX_WAYS:
            return None
        if len(some) == 1:
            return some[0]
        return Pushed(
            _composite(_C.OR, some), all(part.exact for part in some), ways, max(part.arrays for part in some)
        )

    @staticmethod
    def _all_of(parts: Sequence[Pushed | None]) -> Pushed | None:
        chosen: list[Pushed] = []
        ways, arrays, exact = 1, 0, True
        for part in parts:
            if part is None or ways * part.ways > MAX_WAYS or arrays + part.arrays > 1:
                exact = False
                continue
            chosen.append(part)
            ways, arrays, exact = ways * part.ways, arrays + part.arrays, exact and part.exact
        if not chosen:
            return None
        if len(chosen) == 1:
            return replace(chosen[0], exact=exact)
        return Pushed(_composite(_C.AND, chosen), exact, ways, arrays)

    def _push_where(self, where: Where, ranged: str | None) -> Pushed | None:
        name, op, value = where.field, where.op, where.value
        kind = self._collection.type_of(name)
        spec = self._collection.fields.get(name)
        if name in self._lazy and spec is not None and matches(where, {name: default_of(spec)}):
            return None  # Firestore would leave out the documents that were written before the field
        if kind in (FieldType.MAP, FieldType.LIST) and name not in self._listed:
            return None  # exempt from Firestore's indexes
        if op in (Op.CONTAINS, Op.CONTAINS_ANY):
            return self._push_contains(name, value if op is Op.CONTAINS_ANY else (value,))
        if value is None:
            if op is not Op.EQ or name == "id":
                return None
            unary = _Filter()
            unary.unary_filter.op = _U.IS_NULL
            unary.unary_filter.field.field_path = name
            return Pushed(unary, exact=True)
        values = value if op in (Op.IN, Op.NOT_IN) else (value,)
        if any(_is_long(one) for one in values):
            return None
        if op is Op.EQ:
            return self._leaf(name, _F.EQUAL, value_of(value, kind))
        if op is Op.IN:
            different = [value_of(one, kind) for one in dict.fromkeys(values)]
            return self._leaf(name, _F.IN, _array(different), ways=len(different))
        if op in _RANGES and ranged in (None, name):
            try:
                compared = self._value(name, kind, value)
            except InvalidInput:  # an id that no name can hold
                return None
            return self._leaf(self._path_of(name), _RANGES[op], compared)
        return None

    def _push_contains(self, name: str, values: Sequence[Any]) -> Pushed | None:
        forms: dict[Any, Any] = {}
        for value in values:
            if _is_long(value):
                return None
            forms[type(value), value] = value
            # 1 is 1.0 in a list: both are looked for, and what comes back is compared here.
            if type(value) is int and abs(value) <= 2**53:
                forms[float, value] = float(value)
            elif type(value) is float and value.is_integer() and abs(value) <= 2**63:
                forms[int, value] = min(int(value), 2**63 - 1)
        if len(forms) >= MAX_WAYS:
            return None
        found = [*map(value_of, forms.values()), PACKED_LIST]
        return self._leaf(name, _F.ARRAY_CONTAINS_ANY, _array(found), exact=False, ways=len(found), arrays=1)

    def _leaf(self, name: str, op: Any, value: Any, *, exact: bool = True, ways: int = 1, arrays: int = 0) -> Pushed:
        leaf = _Filter()
        leaf.field_filter.field.field_path = name
        leaf.field_filter.op = op
        leaf.field_filter.value.CopyFrom(value)
        return Pushed(leaf, exact, ways, arrays)

    def _path_of(self, name: str) -> str:
        return "__name__" if name == "id" and self._by_name else name

    def _value(self, name: str, kind: FieldType | None, value: Any) -> Any:
        if self._path_of(name) != "__name__":
            return value_of(value, kind)
        if not value:
            raise InvalidInput([Problem(name, "is empty, and no document has such a name")])
        reference = value_of(None)
        reference.reference_value = self._paths.document(self._collection, self._tenant, value)
        return reference

    # --- Pages in order ---

    async def _ordered(self, query: Query) -> AsyncIterator[Document]:
        """The documents that match, in order, behind `start_after`."""
        pinned = {
            part.field: part.value
            for part in _conjuncts(query.where)
            if isinstance(part, Where) and part.op is Op.EQ and not _is_long(part.value)
        }
        order = []
        for name, descending in query.order:
            order.append((name, descending))
            if name == "id":
                break  # nothing behind it can matter
        listed = [(name, descending) for name, descending in order if name not in pinned]
        ranged = listed[0][0] if listed else "id"
        if listed == [("id", True)]:
            self._by_name = False  # Firestore reads names forwards only; the field `id` holds the same
        pushed = self._push(query.where, ranged) if query.where is not None else None
        start = self._start(order, pinned, query.start_after)
        if start is _NOTHING:
            return
        request = self._request(pushed, query)
        for name, descending in listed:
            by = request.structured_query.order_by.add()
            by.field.field_path = self._path_of(name)
            by.direction = _D.DESCENDING if descending else _D.ASCENDING
        if start is not None:
            self._set_start(request, *start)
        complete = query.where is None or (pushed is not None and pushed.exact)
        size = query.limit if complete else min(MAX_PAGE, max(MIN_PAGE, query.limit))
        names = [self._path_of(name) for name, _ in listed]
        async for document in self._pages(request, names, size):
            if matches(query.where, document):
                yield document

    async def _pages(self, request: Any, order: list[str], size: int) -> AsyncIterator[Document]:
        """All documents that a request finds, page after page, at the time of the first page."""
        query = request.structured_query
        while True:
            query.limit.value = size
            try:
                found, moment = await self._wire.query(request)
            except MissingIndex as error:
                raise self._missing(query, error) from None
            for document in found:
                yield self._plan.codec.document(document)
            if len(found) < size:
                return
            last = found[-1]
            values = [_reference(last.name) if name == "__name__" else last.fields[name] for name in order]
            query.start_at.before = False
            del query.start_at.values[:]
            query.start_at.values.extend(values)
            if not request.HasField("read_time"):
                request.read_time.CopyFrom(moment)
            size = min(MAX_PAGE, size * 2)

    def _start(self, order: list[tuple[str, bool]], pinned: dict[str, Any], after: tuple[Any, ...] | None) -> Any:
        """(values, before) for the fields that Firestore orders by; None for the beginning, or _NOTHING.

        A field that the filter pins to one value is left out of the order, so the position is cut where it names
        another value: all of that pinned value lies behind it, or nothing does.
        """
        if after is None:
            return None
        values: list[Any] = []
        for (name, descending), value in zip(order, after, strict=False):
            if name in pinned:
                mine, theirs = sort_key(pinned[name]), sort_key(value)
                if mine == theirs:
                    continue
                behind = (mine > theirs) != descending
            elif value or self._path_of(name) != "__name__":
                values.append(self._value(name, self._collection.type_of(name), value))
                continue
            else:
                behind = not descending  # every name comes after the empty one, which Firestore does not take
            if values:
                return values, behind
            return None if behind else _NOTHING
        return values, False

    def _set_start(self, request: Any, values: list[Any], before: bool) -> None:
        request.structured_query.start_at.before = before
        request.structured_query.start_at.values.extend(values)

    def _request(self, pushed: Pushed | None, query: Query | None) -> Any:
        request = RunQueryRequest(parent=self._parent)
        structured = request.structured_query
        structured.from_.add().collection_id = self._paths.collection_id(self._collection)
        if pushed is not None:
            structured.where.CopyFrom(pushed.filter)
        if query is not None and query.fields is not None:
            wanted = {"id", *query.fields, *(name for name, _ in query.order)} - {"version"}
            wanted |= {leaf.field for leaf in leaves(query.where)} if query.where is not None else set()
            for name in sorted(wanted):
                structured.select.fields.add(field_path=name)
        return request

    # --- Everything that matches, in no order of the query's ---

    async def _all(self, where: Filter | None, fields: set[str] | None) -> AsyncIterator[Document]:
        pushed = self._push(where, "id") if where is not None else None
        query = None if fields is None else Query(fields=tuple(sorted(fields)))
        request = self._request(pushed, query)
        request.structured_query.order_by.add(direction=_D.ASCENDING).field.field_path = "__name__"
        async for document in self._pages(request, ["__name__"], MAX_PAGE):
            if matches(where, document):
                yield document

    # --- Aggregates ---

    def _is_native(self, item: Aggregate) -> bool:
        """Whether Firestore's own arithmetic is exact enough: not for decimals, which it does not know."""
        if item.field is None:
            return True
        kind = self._collection.type_of(item.field)
        return item.field not in self._lazy and kind in (FieldType.INT, FieldType.FLOAT)

    def _is_beyond_indexes(self, aggregates: Sequence[Aggregate], where: Filter | None) -> bool:
        """Whether a field is summed up over a range of names: behind the name no index of Firestore's has a field."""
        return any(item.field is not None for item in aggregates) and any(
            leaf.op in _RANGES and self._path_of(leaf.field) == "__name__"
            for leaf in (leaves(where) if where is not None else ())
        )

    async def _aggregated(self, aggregates: Sequence[Aggregate], pushed: Pushed | None) -> dict[str, Any] | None:
        """Firestore's own answer; None where it left int64, which it answers with a float."""
        request = AggregationRequest(parent=self._parent)
        asked = request.structured_aggregation_query
        asked.structured_query.CopyFrom(self._request(pushed, None).structured_query)
        for item in aggregates:
            one = asked.aggregations.add(alias=item.name)
            if item.field is None:
                one.count.SetInParent()
            else:
                target = one.sum if item.kind == "sum" else one.avg
                target.field.field_path = item.field
        try:
            found = await self._wire.aggregate(request)
        except MissingIndex as error:
            fields = [item.field for item in aggregates if item.field is not None]
            raise self._missing(asked.structured_query, error, fields) from None
        answer: dict[str, Any] = {}
        for item in aggregates:
            value = found[item.name]
            kind = self._collection.type_of(item.field) if item.field is not None else FieldType.INT
            if item.kind == "average":
                answer[item.name] = value.double_value if value.HasField("double_value") else None
            elif kind is FieldType.FLOAT:
                answer[item.name] = float(value.double_value if value.HasField("double_value") else value.integer_value)
            elif value.HasField("integer_value"):
                answer[item.name] = value.integer_value
            else:
                return None
        return answer

    def _missing(self, query: Any, error: MissingIndex, summed: Sequence[str] = ()) -> SchemaError:
        """The error for a query that Firestore has no index for, with the entry of firestore.indexes.json to add."""
        equal: list[str] = []
        ranges: list[str] = []
        contains: list[str] = []
        for one in _leaves_of(query.where) if query.HasField("where") else ():
            path = one.field.field_path
            kind = {_F.EQUAL: equal, _F.IN: equal, _F.ARRAY_CONTAINS: contains, _F.ARRAY_CONTAINS_ANY: contains}
            kind.get(getattr(one, "op", None) if _is_field(one) else _F.EQUAL, ranges).append(path)
        order = [(by.field.field_path, by.direction == _D.DESCENDING) for by in query.order_by]
        ordered = {name for name, _ in order}
        columns = [(name, False) for name in (*contains, *equal)]
        columns += [(name, False) for name in (*ranges, *summed) if name not in ordered]
        columns += [one for one in order if one[0] != "__name__"]
        entry = composite_index(self._paths.collection_id(self._collection), list(dict.fromkeys(columns)), contains)
        return SchemaError(
            f"{self._collection.name}: Firestore has no index for this query: add to the indexes of "
            f"firestore.indexes.json, deploy it and wait until it is built: {json.dumps(entry)} ({error.message})",
            index=entry,
        )


def _is_field(one: Any) -> bool:
    return str(one.DESCRIPTOR.name) == "FieldFilter"


def _leaves_of(where: Any) -> list[Any]:
    """Every comparison in a filter for Firestore."""
    kind = where.WhichOneof("filter_type")
    if kind == "composite_filter":
        return [leaf for part in where.composite_filter.filters for leaf in _leaves_of(part)]
    return [getattr(where, kind)]


def composite_index(group: str, columns: Sequence[tuple[str, bool]], contains: Iterable[str] = ()) -> dict[str, Any]:
    """One entry of `firestore.indexes.json`: (field, descending) pairs, and which of them are looked into."""
    held = set(contains)
    return {
        "collectionGroup": group,
        "queryScope": "COLLECTION",
        "fields": [
            {"fieldPath": name, "arrayConfig": "CONTAINS"}
            if name in held
            else {"fieldPath": name, "order": "DESCENDING" if descending else "ASCENDING"}
            for name, descending in columns
        ],
    }


_NOTHING: Any = object()


def _conjuncts(where: Filter | None) -> list[Filter]:
    """The filters that must hold in any case."""
    if where is None:
        return []
    if isinstance(where, And):
        return [inner for part in where.filters for inner in _conjuncts(part)]
    return [where]


def _is_long(value: Any) -> bool:
    if isinstance(value, str):
        return len(value.encode()) > MAX_INDEXED_BYTES
    return isinstance(value, bytes) and len(value) > MAX_INDEXED_BYTES


def _composite(op: Any, parts: Sequence[Pushed]) -> Any:
    whole = _Filter()
    whole.composite_filter.op = op
    whole.composite_filter.filters.extend(part.filter for part in parts)
    return whole


def _array(values: Sequence[Any]) -> Any:
    whole = value_of([])
    whole.array_value.values.extend(values)
    return whole


def _reference(name: str) -> Any:
    reference = value_of(None)
    reference.reference_value = name
    return reference


def collection_documents(paths: Paths, collection: Collection, select: Sequence[str]) -> Any:
    """A request for all documents of a collection, of all tenants, by name."""
    request = RunQueryRequest(parent=paths.documents)
    structured = request.structured_query
    source = structured.from_.add()
    source.collection_id = paths.collection_id(collection)
    source.all_descendants = True
    structured.order_by.add(direction=_D.ASCENDING).field.field_path = "__name__"
    for name in select:
        structured.select.fields.add(field_path=name)
    return request
