"""Index advice: queries that no index serves, and indexes that serve no query."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.database import index_advice as advice
from strongroom.database.index_advice import (
    QueryShape,
    Seen,
    Shape,
    Shapes,
    compare,
    counted,
    forget,
    helps,
    persist,
    serves,
)
from strongroom.entities.entity import Collection, FieldSpec, FieldType, Index
from strongroom.entities.query import And, Or, Query, Where
from strongroom.errors import Unavailable
from strongroom.storage.port import Advice, Batch, Committed, Operation, Store
from strongroom.testing.storage import Backend

FIELDS = MappingProxyType(
    {name: FieldSpec(name, FieldType.TEXT) for name in ("status", "kind", "owner")}
    | {"tags": FieldSpec("tags", FieldType.LIST), "due": FieldSpec("due", FieldType.TIMESTAMP)}
)


def things(*indexes: Index, ttl: str | None = None) -> Collection:
    return Collection("things", True, FIELDS, indexes, ttl)


def told(collection: Collection, query: Query, times: int = 1_000) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, fields) of the advice after a query was seen so often."""
    shapes = Shapes()
    for _ in range(times):
        shapes.seen(collection, query.check(collection))
    return [(item.kind, item.fields) for item in compare([collection], shapes.snapshot())]


STATUS = Where("status", "==", "new")
KIND = Where("kind", "==", "x")


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (Query(STATUS), ("status",)),
        (Query(Where("status", "in", ["a", "b"])), ("status",)),
        (Query(Where("status", "==", None)), ("status",)),
        (Query(Where("status", ">", "a")), ("status",)),
        (Query(And(STATUS, KIND)), ("kind", "status")),
        (Query(STATUS, order_by=("-due",)), ("status", "-due")),
        (Query(And(STATUS, Where("due", "<", datetime(2026, 1, 1, tzinfo=UTC)))), ("status", "due")),
        (Query(And(STATUS, Where("due", "<", datetime(2026, 1, 1, tzinfo=UTC))), ("due",)), ("status", "due")),
        (Query(order_by=("-due", "kind")), ("-due", "kind")),
        (Query(order_by=("-due", "id")), ("-due", "id")),
        (Query(order_by=("created_at",)), ("created_at",)),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else None,
)
def test_advice_for_a_query_without_an_index_names_one_that_serves_it(query: Query, index: tuple[str, ...]) -> None:
    assert told(things(), query) == [("missing index", index)]
    assert told(things(Index(*index)), query) == []


@pytest.mark.parametrize(
    "query", [Query(), Query(order_by=("-id",)), Query(Where("id", "==", "x")), Query(Where("id", ">", "x"), ("id",))]
)
def test_the_primary_key_needs_no_index_beside_it(query: Query) -> None:
    assert told(things(), query) == []


def test_an_index_serves_only_a_left_prefix_of_its_fields_in_either_direction() -> None:
    index = Index("status", "-due")
    assert told(things(index), Query(order_by=("-due",))) == [
        ("unused index", ("status", "-due")),
        ("missing index", ("-due",)),
    ]
    assert told(things(index), Query(STATUS, ("due",))) == [], "read backwards"
    assert told(things(Index("status", "due", "-kind")), Query(STATUS, ("due", "kind"))) == [
        ("missing index", ("status", "due", "kind"))
    ]


def test_each_branch_of_an_or_needs_its_own_index() -> None:
    assert told(things(Index("status")), Query(Or(STATUS, KIND))) == [("missing index", ("kind",))]


def test_no_index_is_advised_on_fields_that_cannot_be_indexed() -> None:
    assert told(things(), Query(Where("tags", "array-contains", "a"))) == []
    assert told(things(Index("tags")), Query(Where("tags", "array-contains", "a"))) == []
    assert told(things(Index("status")), Query(And(STATUS, Where("tags", "array-contains", "a")))) == []


def test_unique_and_expiry_indexes_are_never_reported_as_unused() -> None:
    collection = things(Index("owner", unique=True), Index("due"), Index("kind"), ttl="due")
    assert told(collection, Query()) == [("unused index", ("kind",))]


def test_no_index_is_reported_as_unused_before_enough_queries_were_seen() -> None:
    assert told(things(Index("kind")), Query(STATUS), times=9) == []
    assert told(things(Index("kind")), Query(STATUS), times=99) == [("missing index", ("status",))]


def test_advice_says_how_often_and_since_when_and_its_fix_can_be_pasted() -> None:
    seen = [Seen("things", (Shape(frozenset({"status"}), frozenset(), (("due", True), ("id", True))),), 123)]
    since = datetime(2026, 11, 1, 8, 30, tzinfo=UTC)
    (item,) = compare([things()], seen, since)
    assert str(item) == (
        "missing index things (status, -due): asked for 123 times since 2026-11-01 08:30 UTC, and no index helps; "
        'declare Index("status", "-due")'
    )
    (item,) = compare([things(Index("status"))], seen, since)
    assert "an index helps, but much is read only to be filtered or sorted" in item.reason


# --- Laws -----------------------------------------------------------------------------------------------------

NAMES = ["status", "kind", "owner", "due", "id", "created_at"]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    equal = draw(st.frozensets(st.sampled_from(NAMES), max_size=3))
    ranged = draw(st.frozensets(st.sampled_from(NAMES), max_size=2)) - equal
    order_by = draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
    downs = [draw(st.booleans()) for _ in order_by]
    query = Query(order_by=tuple("-" * down + name for name, down in zip(order_by, downs, strict=True)))
    return Shape(equal, ranged, tuple(pair for pair in query.order if pair[0] not in equal))


def columns_of(fields: tuple[str, ...]) -> tuple[tuple[str, bool], ...]:
    return Index(*fields).columns if fields else (("id", False),)


@given(shapes())
def test_the_advised_index_of_a_query_shape_serves_it(shape: Shape) -> None:
    assert serves(columns_of(shape.sought), shape)


@given(shapes(), st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
def test_a_reversed_index_serves_the_same_queries(shape: Shape, names: list[str]) -> None:
    for downs in (0, 1, 2, 5):
        columns = tuple((name, bool(downs >> place & 1)) for place, name in enumerate(names))
        turned = tuple((name, not down) for name, down in columns)
        if serves(columns, shape):
            assert helps(columns, shape)
        assert serves(columns, shape) == serves(turned, shape)


@given(st.lists(shapes(), min_size=1, max_size=5), st.integers(10, 1_000))
def test_declaring_the_advised_indexes_leaves_no_advice(asked: list[Shape], count: int) -> None:
    seen = [Seen("things", tuple(asked), count)]
    missing = [item.fields for item in compare([things()], seen)]
    better = things(*(Index(*fields) for fields in missing))
    assert compare([better], seen) == []


# --- Counting -------------------------------------------------------------------------------------------------


def test_queries_of_one_shape_share_a_count_whatever_their_values() -> None:
    shapes, collection = Shapes(), things()
    for value in ("a", "b", "c"):
        shapes.seen(collection, Query(Where("status", "==", value), limit=len(value)))
    (seen,) = shapes.snapshot()
    assert (seen.count, seen.ways) == (3, (Shape(frozenset({"status"}), frozenset(), (("id", False),)),))


def test_the_number_of_counted_query_shapes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "MAX_SHAPES", 2)
    shapes, collection = Shapes(), things()
    for name in ("status", "kind", "owner", "owner", "status"):
        shapes.seen(collection, Query(Where(name, "==", "x")))
    assert {item.count for item in shapes.snapshot()} == {2, 1}
    assert shapes.overlooked == 2


async def kept(store: Store, shapes: Shapes) -> None:
    def commit(operations: Sequence[Operation], now_us: int) -> Awaitable[Committed]:
        return store.commit(Batch(None, tuple(operations), now_us))

    await persist(commit, await store.now_us(), shapes)


async def test_the_counts_of_all_processes_add_up_and_outlive_them(backend: Backend) -> None:
    store = await backend.open(backend.new_url())
    await store.prepare([QueryShape.__collection__])
    processes = [Shapes(), Shapes()]
    queries = [Query(), Query(Or(And(STATUS, KIND), Where("due", "!=", None)), ("-due",)), Query(STATUS)]
    for times, shapes in enumerate(processes, 1):
        for query in queries * times:
            shapes.seen(things(), query)
        await kept(store, shapes)
        assert shapes.snapshot() == []
        await kept(store, shapes)
    found, since = await counted(store)
    assert since is not None
    here = Shapes()
    for query in queries * 3:
        here.seen(things(), query)
    assert sorted(found, key=repr) == sorted(here.snapshot(), key=repr)
    assert {(i.kind, i.fields) for i in await advice.advise(store, [things(Index("owner"))])} == set()
    await forget(store)
    assert await counted(store) == ([], None)
    await store.close()


async def test_counts_that_could_not_be_stored_are_stored_the_next_time(tmp_path: Any) -> None:
    store = await _opened(tmp_path)
    shapes = Shapes()
    for name in ("status", "kind", "owner"):
        shapes.seen(things(), Query(Where(name, "==", "x")))
    before = shapes.snapshot()
    commit = store.commit
    left = iter([True, True, False])

    def failing(batch: Batch) -> Any:
        if next(left, False):
            return commit(batch)
        raise Unavailable("gone")

    store.commit = failing  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await kept(store, shapes)
    assert len(shapes.snapshot()) == 2
    store.commit = commit  # type: ignore[method-assign]
    await kept(store, shapes)
    assert sorted((await counted(store))[0], key=repr) == sorted(before, key=repr)
    await store.close()


async def test_an_engines_own_advice_joins_what_was_counted_once(tmp_path: Any) -> None:
    store = await _opened(tmp_path)
    shapes, collection = Shapes(), things(Index("kind"))
    for _ in range(200):
        shapes.seen(collection, Query(STATUS))
    await kept(store, shapes)
    own = [Advice("things", "unused index", ("kind",), "x", "y"), Advice("things", "missing index", (), "x", "y")]

    async def advise() -> list[Advice]:
        return own

    store.advise = advise  # type: ignore[attr-defined]
    found = await advice.advise(store, [collection, QueryShape.__collection__])
    assert [(item.kind, item.fields) for item in found] == [
        ("unused index", ("kind",)),
        ("missing index", ("status",)),
        ("missing index", ()),
    ]
    await store.close()


async def _opened(folder: Any) -> Store:
    from strongroom.storage import open_store

    store = await open_store(f"sqlite:///{folder}/advice.db")
    await store.prepare([QueryShape.__collection__])
    return store
