"""Queries return on every backend what `entities.evaluate` and `entities.aggregate` return."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from ...context import utc_from_us
from ...entities import (
    INT64_MAX,
    Aggregate,
    And,
    Document,
    Filter,
    Op,
    Or,
    Query,
    Where,
    aggregate,
    cursor_of,
    evaluate,
    with_cursor,
)
from ...errors import InvalidInput
from ...storage.port import Create, Put, Store
from .backend import StorageSuite, examples
from .samples import (
    BLOBS,
    DECIMALS,
    FLOATS,
    HOSTILE_NAMES,
    INTS,
    MOMENTS,
    NOW,
    SAMPLES,
    TEXTS,
    batch,
    identical,
    sample,
    stored,
    tenants,
)

_tenant = tenants("query")

# Small pools, so that random filters find something and random orders have ties.
_TEXTS = ["", "a", "A", "ab", "é", "e\u0301", "\uffff", "\U00010000", "%", "a_", *TEXTS[-3:]]
_POOLS: dict[str, st.SearchStrategy[Any]] = {
    "flag": st.booleans(),
    "rank": st.sampled_from([-1, 0, 1, 2, *INTS[-5:]]),
    "ratio": st.sampled_from(FLOATS),
    "price": st.sampled_from(DECIMALS),
    "name": st.sampled_from(_TEXTS),
    "blob": st.sampled_from(BLOBS),
    "moment": st.sampled_from(MOMENTS),
}
_VALUES: dict[str, tuple[Any, ...]] = {
    "flag": (False, True),
    "rank": INTS,
    "ratio": FLOATS,
    "price": DECIMALS,
    "name": TEXTS,
    "blob": BLOBS,
    "moment": MOMENTS,
}
_ELEMENTS = st.sampled_from(
    ["a", "b", "", 0, 1, 1.0, 2.5, True, False, Decimal(1), Decimal("2.5"), b"a", b"", MOMENTS[5], "1"]
)
document_lists = st.lists(
    st.fixed_dictionaries(
        {
            **{name: st.none() | pool for name, pool in _POOLS.items()},
            "tags": st.none() | st.lists(st.none() | _ELEMENTS | st.just({"a": 1}), max_size=3),
            "extra": st.none() | st.just({"a": 1}),
            "note": st.none(),
        }
    ),
    max_size=12,
)
_SYSTEM_POOLS: dict[str, st.SearchStrategy[Any]] = {
    "id": st.sampled_from(["d0", "d1", "d10", "d2", "x"]),
    "created_at": st.integers(NOW - 1, NOW + 3).map(utc_from_us),
    "updated_at": st.integers(NOW - 1, NOW + 3).map(utc_from_us),
}
_SCALARS = {**_POOLS, **_SYSTEM_POOLS}
_COMPARISONS = [Op.EQ, Op.NE, Op.LT, Op.LE, Op.GT, Op.GE]


@st.composite
def _comparisons(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Where:
    kind = draw(st.sampled_from(["compare"] * 5 + ["in", "in", "null", "contains"]))
    if kind == "contains":
        if draw(st.booleans()):
            return Where("tags", Op.CONTAINS, draw(_ELEMENTS))
        return Where("tags", Op.CONTAINS_ANY, draw(st.lists(_ELEMENTS, min_size=1, max_size=3)))
    if kind == "null":
        name = draw(st.sampled_from([*_SCALARS, "tags", "extra"]))
        return Where(name, draw(st.sampled_from([Op.EQ, Op.NE])), None)
    name = draw(st.sampled_from(list(_SCALARS)))
    if kind == "in":
        return Where(name, Op.IN, draw(st.lists(_SCALARS[name], min_size=1, max_size=4)))
    return Where(name, draw(st.sampled_from(_COMPARISONS)), draw(_SCALARS[name]))


@st.composite
def _not_in(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Filter:
    """`not-in` alone or beside plain comparisons: `Query.check` refuses other combinations."""
    name = draw(st.sampled_from(list(_SCALARS)))
    where = Where(name, Op.NOT_IN, draw(st.lists(_SCALARS[name], min_size=1, max_size=4)))
    other = draw(st.sampled_from(list(_SCALARS)))
    op = draw(st.sampled_from([Op.EQ, Op.LT, Op.GE]))
    return And(where, Where(other, op, draw(_SCALARS[other]))) if draw(st.booleans()) else where


def _combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    parts = st.lists(inner, min_size=1, max_size=3)
    return parts.map(lambda p: And(*p)) | parts.map(lambda p: Or(*p))


filters: st.SearchStrategy[Filter | None] = st.one_of(
    st.none(), _comparisons(), st.recursive(_comparisons(), _combined, max_leaves=5), _not_in()
)
orders = st.lists(
    st.tuples(st.sampled_from(list(_SCALARS)), st.booleans()), unique_by=lambda pair: pair[0], max_size=4
).map(lambda pairs: tuple("-" + name if descending else name for name, descending in pairs))


def checked(query: Query) -> Query:
    try:
        return query.check(SAMPLES)
    except InvalidInput:
        reject()


queries_of_samples = st.builds(Query, filters, orders, st.integers(1, 15)).map(checked)


async def fill(store: Store, tenant: str, documents: list[Document]) -> list[Document]:
    """Store the documents as d0, d1, …, in two batches at two times; returns the stored documents."""
    held = []
    for moment, half in ((NOW, slice(0, None, 2)), (NOW + 2, slice(1, None, 2))):
        some = [(f"d{number}", document) for number, document in enumerate(documents)][half]
        if some:
            creates = (Create("samples", id, d) for id, d in some)
            versions = (await store.commit(batch(tenant, *creates, now_us=moment))).versions
            times = {"created_us": moment, "updated_us": moment}
            held += [stored(id, d, version=v, **times) for (id, d), v in zip(some, versions, strict=True)]
    return held


def close(found: Any, expected: Any, scale: float) -> bool:
    """The same type, and equal; floats up to the rounding that the order of additions causes."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-9, abs_tol=scale * 1e-9)
    return bool(found == expected)


class TestQueries(StorageSuite):
    @examples(3)
    @given(documents=document_lists, queries=st.lists(queries_of_samples, min_size=1, max_size=6))
    async def test_find_returns_what_the_evaluator_returns(
        self, store: Store, documents: list[Document], queries: list[Query]
    ) -> None:
        tenant = next(_tenant)
        held = await fill(store, tenant, documents)
        for query in queries:
            expected = evaluate(query, held)
            found = await store.find("samples", tenant, query)
            ids = [d["id"] for d in found], [d["id"] for d in expected]
            assert identical(found, expected), f"{query}: found {ids[0]}, expected {ids[1]}"

    @examples(2)
    @given(documents=document_lists, where=filters, order=orders, size=st.integers(1, 4))
    async def test_pages_give_every_match_once_and_in_order(
        self, store: Store, documents: list[Document], where: Filter | None, order: tuple[str, ...], size: int
    ) -> None:
        query = checked(Query(where, order, size))
        tenant = next(_tenant)
        expected = evaluate(replace(query, limit=100), await fill(store, tenant, documents))
        found: list[Document] = []
        page = await store.find("samples", tenant, query)
        while page:
            found += page
            assert len(found) <= len(expected)
            cursor = cursor_of(query, "scope", page[-1])
            page = await store.find("samples", tenant, with_cursor(query, SAMPLES, "scope", cursor))
        assert [d["id"] for d in found] == [d["id"] for d in expected]

    @examples(2)
    @given(documents=document_lists, order=orders, position=st.integers(0, 11), where=filters)
    async def test_a_position_between_documents_is_a_start_too(
        self, store: Store, documents: list[Document], order: tuple[str, ...], position: int, where: Filter | None
    ) -> None:
        """The document at a cursor may be deleted before the next page is read."""
        query = checked(Query(where, order, 20))
        tenant = next(_tenant)
        held = await fill(store, tenant, documents)
        names = [name for name, _ in query.order]
        start = held[position % len(held)] if held else sample(id="d1")
        after = tuple("d1x" if name == "id" else start.get(name) for name in names)
        query = replace(query, start_after=after)
        found = await store.find("samples", tenant, query)
        assert [d["id"] for d in found] == [d["id"] for d in evaluate(query, held)]

    @examples(2)
    @given(
        documents=st.lists(
            st.fixed_dictionaries(
                {
                    "rank": st.none() | st.sampled_from([0, 1, -1, 10**6, INT64_MAX, INT64_MAX - 1]),
                    "ratio": st.none() | st.sampled_from([0.0, 0.1, 1 / 3, -2.5, 1e6, -1e6]),
                    "price": st.none()
                    | st.sampled_from(
                        [Decimal(t) for t in ("0", "0.1", "-0.1", "9.99", "1E+12", "-3.333333333333333333")]
                    ),
                    "flag": st.booleans(),
                }
            ).map(lambda given: sample(**given)),
            max_size=8,
        ),
        where=st.none() | st.just(Where("flag", "==", True)) | filters,
    )
    async def test_aggregates_equal_the_evaluators(
        self, store: Store, documents: list[Document], where: Filter | None
    ) -> None:
        where = checked(Query(where)).where
        tenant = next(_tenant)
        held = await fill(store, tenant, documents)
        for asked in (
            [Aggregate("count")],
            [Aggregate("sum", "rank")],
            [Aggregate(kind, name) for kind in ("sum", "average") for name in ("ratio", "price")]
            + [Aggregate("average", "rank"), Aggregate("count")],
        ):
            try:
                expected = aggregate(asked, where, SAMPLES, held)
            except InvalidInput:
                with pytest.raises(InvalidInput):
                    await store.aggregate("samples", tenant, asked, where)
                continue
            found = await store.aggregate("samples", tenant, asked, where)
            assert found.keys() == expected.keys()
            for one in asked:
                scale = max([abs(d[one.field]) for d in held if d[one.field] is not None] or [0]) if one.field else 0
                assert close(found[one.name], expected[one.name], float(scale)), (
                    f"{one.name}: found {found[one.name]!r}, expected {expected[one.name]!r}"
                )

    @pytest.mark.parametrize("op", ["<", "<=", ">", ">="])
    async def test_aggregates_over_a_range_of_ids_are_exact(self, store: Store, op: str) -> None:
        """Some stores keep ids as document names, with indexes of their own."""
        held = await fill(store, "acme", [sample(rank=number, ratio=number / 2) for number in range(5)])
        where = checked(Query(Where("id", op, "d2"))).where
        asked = [Aggregate("count"), *(Aggregate(kind, "rank") for kind in ("sum", "average"))]
        assert await store.aggregate("samples", "acme", asked, where) == aggregate(asked, where, SAMPLES, held)

    async def test_the_sum_of_no_documents_is_zero_of_the_fields_type_and_the_average_is_none(
        self, store: Store
    ) -> None:
        asked = [Aggregate(kind, name) for kind in ("sum", "average") for name in ("rank", "ratio", "price")]
        expected = {
            "sum_rank": 0, "sum_ratio": 0.0, "sum_price": Decimal(0),
            "average_rank": None, "average_ratio": None, "average_price": None, "count": 0,
        }  # fmt: skip
        for _ in ("an empty collection", "a collection of nulls"):
            found = await store.aggregate("samples", "acme", [*asked, Aggregate("count")], None)
            assert identical(found, expected), found
            await store.commit(batch("acme", Put("samples", "a", sample())))
            expected["count"] = 1

    async def test_decimals_are_added_exactly(self, store: Store) -> None:
        prices = [Decimal("0.1")] * 10 + [Decimal("99999999999999999999999999999999.99999"), Decimal("1E-30")]
        await store.commit(batch("acme", *(Create("samples", f"{n}", sample(price=p)) for n, p in enumerate(prices))))
        found = await store.aggregate("samples", "acme", [Aggregate("sum", "price")], None)
        assert found == {"sum_price": Decimal("100000000000000000000000000000000.999990000000000000000000000001")}

    @pytest.mark.parametrize("field", _POOLS)
    async def test_each_type_has_its_order_nulls_first(self, store: Store, field: str) -> None:
        """Numbers by size, text by its UTF-8 bytes (not UTF-16, not a locale), bytes bytewise, false before true."""
        distinct = dict.fromkeys(_VALUES[field])
        operations = [Create("samples", f"{n}", sample(**{field: v})) for n, v in enumerate((None, *distinct))]
        await store.commit(batch("acme", *operations))
        ordered: list[Any] = sorted(distinct, key=str.encode) if field == "name" else sorted(distinct)
        up = await store.find("samples", "acme", Query(order_by=(field,), limit=1000))
        assert [d[field] for d in up] == [None, *ordered]
        down = await store.find("samples", "acme", Query(order_by=("-" + field,), limit=1000))
        assert [d[field] for d in down] == [*reversed(ordered), None]
        for number, value in enumerate(ordered):
            above = await store.find("samples", "acme", Query(Where(field, ">", value), (field,), 1000))
            assert [d[field] for d in above] == ordered[number + 1 :], repr(value)
            equal = await store.find("samples", "acme", Query(Where(field, "==", value)))
            assert [d[field] for d in equal] == [value], repr(value)

    @pytest.mark.parametrize("op", [*_COMPARISONS, Op.IN, Op.NOT_IN])
    async def test_each_operator_compares_each_type(self, store: Store, op: Op) -> None:
        """Every pair of a stored value, null included, and a queried value."""
        rows = [sample(**{field: value}) for field, values in _VALUES.items() for value in (None, *values[:9])]
        held = await fill(store, "acme", rows)
        for field, values in _VALUES.items():
            for value in values[:9]:
                given = [value, values[0]] if op in (Op.IN, Op.NOT_IN) else value
                query = Query(Where(field, op, given), limit=1000).check(SAMPLES)
                found = await store.find("samples", "acme", query)
                assert [d["id"] for d in found] == [d["id"] for d in evaluate(query, held)], query.where

    async def test_an_element_is_found_by_its_value_and_kind(self, store: Store) -> None:
        """True is not 1, 1 is 1.0, a Decimal is not an int, text is not bytes, and null is never found."""
        elements: list[Any] = [
            True, False, 0, 1, 1.0, 1.5, 0.0, -1, INT64_MAX, "", "1", "true", "a", b"", b"a", b"1", "null", "{}",
            "$time", Decimal(0), Decimal(1), Decimal("1.5"), MOMENTS[5], MOMENTS[7], "é", "e\u0301", "\U00010000",
            "'", '"', "\\",
        ]  # fmt: skip
        rows = [[element] for element in elements]
        rows += [[], [None], [None, "a", 1], [{"a": 1}, {"b": [True]}], [{"$time": "x"}], ["a", "b", "a"]]
        held = await fill(store, "acme", [sample(tags=tags) for tags in rows] + [sample()])
        for number, element in enumerate(elements):
            pair = [element, elements[number - 1]]
            for where in (Where("tags", Op.CONTAINS, element), Where("tags", Op.CONTAINS_ANY, pair)):
                query = Query(where, limit=1000).check(SAMPLES)
                found = await store.find("samples", "acme", query)
                assert [d["id"] for d in found] == [d["id"] for d in evaluate(query, held)], where

    async def test_hostile_text_in_a_filter_is_only_text(self, store: Store) -> None:
        names = [name for name in HOSTILE_NAMES if name]
        await store.commit(batch("acme", *(Create("samples", f"{n}", sample(name=t)) for n, t in enumerate(names))))
        for name in names:
            found = await store.find("samples", "acme", Query(Where("name", "==", name)))
            assert [d["name"] for d in found] == [name]
            found = await store.find("samples", "acme", Query(Where("name", "!=", name), limit=1000))
            assert len(found) == len(names) - 1
            found = await store.find("samples", "acme", Query(Where("name", "in", [name, "nobody"])))
            assert [d["name"] for d in found] == [name]

    async def test_a_page_can_have_a_thousand_documents(self, store: Store) -> None:
        ids = [f"{number:04}" for number in range(1_100)]
        for start in range(0, len(ids), 275):
            await store.commit(batch("acme", *(Create("samples", id, sample()) for id in ids[start : start + 275])))
        assert [d["id"] for d in await store.find("samples", "acme", Query(limit=1_000))] == ids[:1_000]
        assert await store.aggregate("samples", "acme", [Aggregate("count")], None) == {"count": 1_100}

    async def test_a_query_sees_the_last_commit(self, store: Store) -> None:
        for rank in range(20):
            await store.commit(batch("acme", Create("samples", f"{rank:02}", sample(rank=rank))))
            (last,) = await store.find("samples", "acme", Query(order_by=("-rank",), limit=1))
            assert last["rank"] == rank

    async def test_an_id_is_compared_with_text_that_no_document_can_have(self, store: Store) -> None:
        for tenant in ("acme", "other"):
            await store.commit(batch(tenant, *(Create("samples", id, sample()) for id in ("a", "b"))))
        for where, expected in (
            (Where("id", ">", ""), ["a", "b"]),
            (Where("id", "<", ""), []),
            (Where("id", "<=", "a" + "/" * 1_000), ["a"]),
        ):
            assert [one["id"] for one in await store.find("samples", "acme", Query(where, ("id",)))] == expected
            count = await store.aggregate("samples", "acme", [Aggregate("count")], where)
            assert count == {"count": len(expected)}
