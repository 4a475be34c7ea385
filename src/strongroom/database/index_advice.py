"""Advice on indexes: declared indexes that serve no query, and queries that no index serves.

A query's shape is the query without its values. Each process counts shapes (`Shapes`), and adds its counts to those of
all processes in the store (`persist`). `advise` compares them with the declarations, by the rule that SQL and Firestore
share: an index is used from its left; fields compared for equality come first, in any order; then the ordering fields,
each in its direction (or all in the opposite one), a range among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any

from ..entities import (
    INT64_MAX,
    MAX_LIMIT,
    RANGE_OPS,
    And,
    Collection,
    Counter,
    Entity,
    Filter,
    Index,
    Op,
    Query,
    Where,
)
from ..errors import AlreadyExists, BoundExceeded, NotFound
from ..storage.port import (
    MAX_OPERATIONS,
    Add,
    Advice,
    Advising,
    Batch,
    Committed,
    Create,
    Delete,
    Operation,
    Store,
    unwrapped,
)

MAX_SHAPES = 1_000
"""Shapes that a process counts until it persists them. Of further shapes only the number is kept."""
LEAST_SEEN = 100
"""Queries of a collection that must have been seen before one of its indexes is reported as unused."""
LEAST_MISSED = 10
"""How often a query must have been seen before an index for it is reported as missing."""
MAX_WAYS = 30
NAME = "query_shapes"

_Key = tuple[Any, ...]


# --- Shapes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """One way of a query: fields compared for equality (`in` too), fields otherwise restricted, and the order.

    A query with `or` has several ways; each is served by an index of its own."""

    equal: frozenset[str]
    ranged: frozenset[str]
    order: tuple[tuple[str, bool], ...]

    @property
    def is_ordered(self) -> bool:
        """Whether the query has an order besides that of the ids, which every page has."""
        return any(name != "id" for name, _ in self.order)

    @property
    def sought(self) -> tuple[str, ...]:
        """The fields of the index that serves the whole shape; none if the primary key serves it."""
        if "id" in self.equal:
            return ()
        if not self.is_ordered:
            return (*sorted(self.equal), *sorted(self.ranged - {"id"}))
        order = list(self.order)
        if order[-1][0] == "id" and order[-1][1] == order[-2][1]:
            order.pop()  # every index ends with the id, in the direction of its last field
        return (*sorted(self.equal), *(f"-{name}" if down else name for name, down in order))


@dataclass(frozen=True, slots=True)
class Seen:
    """A query's shape and how often it was seen."""

    collection: str
    ways: tuple[Shape, ...]
    count: int


class Shapes:
    """Counts of the shapes of queries: a dictionary of at most MAX_SHAPES, and an addition for each query."""

    def __init__(self) -> None:
        self._counts: dict[_Key, int] = {}
        self.overlooked = 0
        """Queries whose shape was not kept, because MAX_SHAPES were kept already."""

    def seen(self, collection: Collection, query: Query) -> None:
        """Count a checked query."""
        where = query.where
        key = (collection.name, None if where is None else _key(where), query.order_by)
        counts = self._counts
        if key in counts:
            counts[key] += 1
        elif len(counts) < MAX_SHAPES:
            counts[key] = 1
        else:
            self.overlooked += 1

    def snapshot(self) -> list[Seen]:
        """The counts since the last `take`."""
        return [_seen(key, count) for key, count in self._counts.items()]

    def take(self) -> Mapping[_Key, int]:
        """The counts, which begin anew."""
        taken, self._counts = self._counts, {}
        return taken

    def put_back(self, counts: Mapping[_Key, int]) -> None:
        """Counts that were taken and could not be kept."""
        for key, count in counts.items():
            if key in self._counts or len(self._counts) < MAX_SHAPES:
                self._counts[key] = self._counts.get(key, 0) + count
            else:
                self.overlooked += count


def _key(where: Filter) -> _Key:
    if isinstance(where, Where):
        # == null is an equality like any other; != null restricts a range
        return (where.field, where.op.value)
    return ("and" if isinstance(where, And) else "or", *(_key(part) for part in where.filters))


def _seen(key: _Key, count: int) -> Seen:
    collection, where, order_by = key
    order = Query(order_by=tuple(order_by)).order
    ways = [[]] if where is None else _ways(where)
    shapes = []
    for way in ways:
        equal = frozenset(name for name, op in way if op not in _RANGED)
        ranged = frozenset(name for name, op in way if op in _RANGED) - equal
        shapes.append(Shape(equal, ranged, tuple(pair for pair in order if pair[0] not in equal)))
    return Seen(collection, tuple(dict.fromkeys(shapes)), count)


_RANGED = frozenset(op.value for op in (*RANGE_OPS, Op.NE, Op.NOT_IN))


def _ways(where: Sequence[Any]) -> list[list[tuple[str, str]]]:
    """A filter's key as the alternatives of an `or`, each a list of (field, operator)."""
    if where[0] == "or" and not isinstance(where[1], str):
        return [way for part in where[1:] for way in _ways(part)][:MAX_WAYS]
    if where[0] == "and" and not isinstance(where[1], str):
        ways: list[list[tuple[str, str]]] = [[]]
        for part in where[1:]:
            ways = [left + right for left in ways for right in _ways(part)][:MAX_WAYS]
        return ways
    return [[(where[0], where[1])]]


# --- What an index serves -------------------------------------------------------------------------------------


def helps(index: Sequence[tuple[str, bool]], shape: Shape) -> bool:
    """Whether an index, as (field, descending) pairs, narrows or orders the results of the shape."""
    first, _ = index[0]
    return first in shape.equal or first in shape.ranged or serves(index, shape)


def serves(index: Sequence[tuple[str, bool]], shape: Shape) -> bool:
    """Whether an index finds what the shape asks for without sorting, and without reading what it must leave out but
    by an equal field that is not in it, or by a range beside an order."""
    if "id" in shape.equal:
        return index[0][0] == "id"
    lead = 0
    while lead < len(index) and index[lead][0] in shape.equal:
        lead += 1
    rest = _with_id(index[lead:])
    if shape.equal and not lead:
        return False
    if shape.ranged and not shape.is_ordered:
        return bool(rest) and rest[0][0] in shape.ranged
    return _orders(rest, shape)


def _with_id(columns: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The columns and the id, which ends every index, in the direction of the last column."""
    named = any(name == "id" for name, _ in columns)
    return [*columns] if named else [*columns, ("id", columns[-1][1] if columns else False)]


def _orders(columns: Sequence[tuple[str, bool]], shape: Shape) -> bool:
    """Whether the columns are the shape's order, or its reverse."""
    if len(columns) < len(shape.order):
        return False
    pairs = list(zip(columns, shape.order, strict=False))
    return any(all(c[0] == w[0] and (c[1] ^ turned) == w[1] for c, w in pairs) for turned in (False, True))


_PRIMARY_KEY = (("id", False),)


# --- Advice ---------------------------------------------------------------------------------------------------


def compare(
    collections: Iterable[Collection],
    seen: Iterable[Seen],
    since: datetime | None = None,
    *,
    least_seen: int = LEAST_SEEN,
    least_missed: int = LEAST_MISSED,
) -> list[Advice]:
    """Which declared index serves none of what was seen, and which of that is served by none. Pure.

    Never called unused: a unique index, which keeps values apart, and the index of a time-to-live, which expiry uses.
    """
    by_name: dict[str, list[Seen]] = {}
    for item in seen:
        by_name.setdefault(item.collection, []).append(item)
    when = f" since {since:%Y-%m-%d %H:%M} UTC" if since is not None else ""
    found: list[Advice] = []
    for collection in collections:
        items = by_name.get(collection.name, [])
        total = sum(item.count for item in items)
        shapes = [(shape, item.count) for item in items for shape in item.ways]
        if total >= least_seen:
            found += [
                _unused(collection, index, f"none of {total} queries seen{when} could use it")
                for index in collection.indexes
                if _may_be_unused(collection, index) and not any(helps(index.columns, shape) for shape, _ in shapes)
            ]
        found += _missing(collection, shapes, when, least_missed)
    return found


def _may_be_unused(collection: Collection, index: Index) -> bool:
    return not index.unique and index.columns[0][0] != collection.ttl


def _unused(collection: Collection, index: Index, reason: str) -> Advice:
    fix = f"drop {_written(index.fields)} from the declaration: each write pays for it"
    return Advice(collection.name, "unused index", index.fields, reason, fix)


def _missing(collection: Collection, shapes: Sequence[tuple[Shape, int]], when: str, least_missed: int) -> list[Advice]:
    columns = [_PRIMARY_KEY, *(index.columns for index in collection.indexes)]
    counts: dict[tuple[str, ...], int] = {}
    helped: dict[tuple[str, ...], bool] = {}
    for asked, count in shapes:
        shape = _indexable(collection, asked)
        if shape.sought and not any(serves(index, shape) for index in columns):
            counts[shape.sought] = counts.get(shape.sought, 0) + count
            helped[shape.sought] = any(helps(index, shape) for index in columns)
    found = []
    for fields, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if count < least_missed:
            continue
        what = "an index helps, but much is read only to be filtered or sorted" if helped[fields] else "no index helps"
        reason = f"asked for {count} times{when}, and {what}"
        found.append(Advice(collection.name, "missing index", fields, reason, f"declare {_written(fields)}"))
    return found


def _indexable(collection: Collection, shape: Shape) -> Shape:
    """The shape without its lists and maps, which an index over several fields cannot contain."""
    fields = collection.fields
    kept = {name for name in shape.equal | shape.ranged if name not in fields or fields[name].type.is_scalar}
    return replace(shape, equal=shape.equal & kept, ranged=shape.ranged & kept)


def _written(fields: Sequence[str]) -> str:
    """An index as it is declared."""
    return f"Index({', '.join(json.dumps(name) for name in fields)})"


# --- Counted by all processes ---------------------------------------------------------------------------------


class QueryShape(Entity, collection=NAME, scope="global", journalled=False):
    """How often all processes have seen a query shape. The id is a hash of the shape."""

    of: str
    shape: str
    count: Annotated[int, Counter()] = 0


Commit = Callable[[Sequence[Operation], int], Awaitable[Committed]]
"""`Database.commit_counters`."""


async def persist(commit: Commit, now_us: int, shapes: Shapes) -> None:
    """Add a process's counts to those in the store, which is prepared for QueryShape. What cannot be kept is counted
    again the next time; raises what `commit` raises."""
    taken = dict(shapes.take())
    try:
        while taken:
            key, count = next(iter(taken.items()))
            await _add(commit, now_us, key, count)
            del taken[key]
    finally:
        shapes.put_back(taken)


async def _add(commit: Commit, now_us: int, key: _Key, count: int) -> None:
    text = json.dumps(key)
    id = hashlib.sha256(text.encode()).hexdigest()[:32]
    add = Add(NAME, id, "count", count, at_most=INT64_MAX)
    try:
        await commit([add], now_us)
    except BoundExceeded:
        return  # the count is at its maximum
    except NotFound:
        document = {"of": key[0], "shape": text, "count": count}
        try:
            await commit([Create(NAME, id, document)], now_us)
        except AlreadyExists:  # another process was faster
            await commit([add], now_us)


async def counted(store: Store) -> tuple[list[Seen], datetime | None]:
    """The counts of all processes, and the time when counting began."""
    found: list[Seen] = []
    since: datetime | None = None
    after: tuple[Any, ...] | None = None
    while True:
        page = await store.find(NAME, None, Query(limit=MAX_LIMIT, start_after=after))
        for document in page:
            collection, where, order_by = json.loads(document["shape"])
            found.append(_seen((collection, where, order_by), document["count"]))
            created: datetime = document["created_at"]
            since = created if since is None else min(since, created)
        if len(page) < MAX_LIMIT:
            return found, since
        after = (page[-1]["id"],)


async def forget(store: Store) -> None:
    """Start counting from zero: after the declarations or the queries have changed."""
    while page := await store.find(NAME, None, Query(limit=MAX_OPERATIONS, fields=())):
        operations = tuple(Delete(NAME, document["id"]) for document in page)
        await store.commit(Batch(None, operations, await store.now_us()))


async def advise(store: Store, collections: Sequence[Collection]) -> list[Advice]:
    """Advice from the counted queries and from the engine's own statistics. The store is prepared for `collections` and
    for QueryShape."""
    seen, since = await counted(store)
    found = compare((c for c in collections if c.name != NAME), seen, since)
    told = {(item.collection, item.kind, item.fields) for item in found}
    backend = unwrapped(store)
    if isinstance(backend, Advising):
        found += [item for item in await backend.advise() if (item.collection, item.kind, item.fields) not in told]
    return found
