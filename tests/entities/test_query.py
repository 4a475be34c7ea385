"""Queries: refused ones, the evaluator as laws on random values, and cursors from outside."""

from __future__ import annotations

import base64
import itertools
import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from strongroom.entities.cursor import cursor_of, with_cursor
from strongroom.entities.entity import Document, Entity, Secret
from strongroom.entities.evaluation import aggregate, evaluate, matches, project, sort_key
from strongroom.entities.query import (
    MAX_CURSOR_BYTES,
    MAX_DISJUNCTIONS,
    MAX_FILTERS,
    MAX_IN,
    MAX_LIMIT,
    MAX_NOT_IN,
    MAX_ORDER,
    Aggregate,
    And,
    Filter,
    Op,
    Or,
    Query,
    Where,
    disjunctions,
    leaves,
)
from strongroom.entities.values import INT64_MAX
from strongroom.errors import InvalidInput, TooLarge
from strongroom.testing.storage.queries import document_lists, orders, queries_of_samples
from strongroom.testing.storage.samples import EDGES, NOW, SAMPLES, VALUES, identical, sample, stored


class Vault(Entity, collection="vaults"):
    name: str
    code: Annotated[str, Secret()] = ""
    pin: Annotated[int, Secret()] = 0


SCALARS = ["flag", "rank", "ratio", "price", "name", "blob", "moment"]
held = document_lists.map(
    lambda given: [stored(f"d{n}", document, version=NOW + n % 3) for n, document in enumerate(given)]
)
scalar = st.sampled_from(SCALARS)
pairs = scalar.flatmap(lambda name: st.tuples(st.just(name), VALUES[name], VALUES[name]))


def problems(query: Query) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as caught:
        query.check(SAMPLES)
    return [(problem.path, problem.message) for problem in caught.value.problems]


# --- What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "path", "says"),
    [
        (Where("nothing", "==", 1), "nothing", "no such field"),
        (Where("tenant_id", "==", "other"), "tenant_id", "no such field"),
        (Where("rank", "==", "1"), "rank", "found str, expected int"),
        (Where("rank", "==", True), "rank", "found bool, expected int"),
        (Where("rank", "==", 1.0), "rank", "found float, expected int"),
        (Where("flag", "==", 1), "flag", "found int, expected bool"),
        (Where("ratio", "<", Decimal(1)), "ratio", "found Decimal, expected float"),
        (Where("ratio", "<", float("nan")), "ratio", "finite"),
        (Where("price", "<", 1.5), "price", "found float, expected decimal"),
        (Where("name", "==", b"a"), "name", "found bytes, expected text"),
        (Where("name", "==", "a\x00"), "name", "U+0000"),
        (Where("blob", "==", "a"), "blob", "found str, expected bytes"),
        (Where("moment", ">", "2025-01-01"), "moment", "found str, expected timestamp"),
        (Where("moment", ">", datetime(2025, 1, 1)), "moment", "zone"),  # noqa: DTZ001  (its lack is the point)
        (Where("rank", "<", None), "rank", "only == and != take null"),
        (Where("rank", "in", [1, None]), "rank", "only == and != take null"),
        (Where("rank", "in", []), "rank", f"1 to {MAX_IN}"),
        (Where("rank", "in", 1), "rank", f"1 to {MAX_IN}"),
        (Where("rank", "in", range(MAX_IN + 1)), "rank", f"1 to {MAX_IN}"),
        (Where("rank", "in", list(range(MAX_IN + 1))), "rank", f"1 to {MAX_IN}"),
        (Where("rank", "not-in", list(range(MAX_NOT_IN + 1))), "rank", f"1 to {MAX_NOT_IN}"),
        (Where("rank", "==", [1]), "rank", "found list"),
        (Where("rank", "==", INT64_MAX + 1), "rank", "int64"),
        (Where("tags", "==", ["a"]), "tags", "array-contains"),
        (Where("tags", "<", "a"), "tags", "array-contains"),
        (Where("extra", "==", {"a": 1}), "extra", "array-contains"),
        (Where("tags", "array-contains", None), "tags", "scalar"),
        (Where("tags", "array-contains", {"a": 1}), "tags", "scalar"),
        (Where("tags", "array-contains", ["a"]), "tags", "scalar"),
        (Where("tags", "array-contains-any", []), "tags", f"1 to {MAX_IN}"),
        (Where("tags", "array-contains-any", ["a", ["b"]]), "tags", "scalar"),
        (Where("name", "array-contains", "a"), "name", "needs a list field"),
        (And(), "where", "at least one"),
        (Or(), "where", "at least one"),
        ("rank == 1", "where", "expected Where, And or Or"),
    ],
    ids=repr,
)
def test_a_meaningless_filter_is_refused(where: Any, path: str, says: str) -> None:
    assert [(p, says in m) for p, m in problems(Query(where))] == [(path, True)], problems(Query(where))


def test_an_unknown_operator_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(InvalidInput, match="expected one of == != <"):
        Where("rank", "=", 1)


def test_every_problem_is_named_at_once() -> None:
    query = Query(
        And(Where("nothing", "==", 1), Or(Where("rank", "==", "x"), Where("flag", "<", None))),
        order_by=("nowhere", "tags", "-rank", "rank"),
        limit=0,
        fields=("id", "neither"),
    )
    assert [path for path, _ in problems(query)] == [
        "nothing", "rank", "flag", "order_by", "order_by", "order_by", "limit", "fields"
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [0, -1, MAX_LIMIT + 1, True, 1.0, "5", None])
def test_a_limit_is_a_number_from_1_to_the_largest_page(limit: Any) -> None:
    assert [path for path, _ in problems(Query(limit=limit))] == ["limit"]
    Query(limit=1).check(SAMPLES)
    Query(limit=MAX_LIMIT).check(SAMPLES)


def test_too_many_filters_branches_or_orders_are_refused() -> None:
    leaf = Where("rank", "==", 1)
    Query(And(*[leaf] * MAX_FILTERS)).check(SAMPLES)
    assert problems(Query(And(*[leaf] * (MAX_FILTERS + 1))))
    Query(Or(*[leaf] * MAX_DISJUNCTIONS)).check(SAMPLES)
    assert problems(Query(Or(*[leaf] * (MAX_DISJUNCTIONS + 1))))
    six = Where("rank", "in", list(range(6)))
    Query(And(six, Where("name", "in", list("abcde")))).check(SAMPLES)
    assert problems(Query(And(six, Where("name", "in", list("abcdef")))))
    deep: Filter = leaf
    for _ in range(MAX_ORDER + 2):
        deep = And(deep)
    assert problems(Query(deep))
    assert problems(Query(order_by=("rank",) * (MAX_ORDER + 1)))


@pytest.mark.parametrize(
    "other",
    [
        Where("rank", "!=", 1),
        Where("rank", "in", [1]),
        Where("rank", "not-in", [1]),
        Where("tags", "array-contains-any", ["a"]),
    ],
    ids=repr,
)
def test_not_in_stands_apart_from_what_firestore_refuses_beside_it(other: Where) -> None:
    not_in = Where("name", "not-in", ["a"])
    Query(And(not_in, Where("rank", "<", 1), Where("tags", "array-contains", "a"))).check(SAMPLES)
    assert problems(Query(And(not_in, other)))
    assert problems(Query(Or(not_in, Where("rank", "==", 1))))


def test_each_branch_has_at_most_one_array_contains() -> None:
    contains = Where("tags", "array-contains", "a")
    any_of = Where("tags", "array-contains-any", ["a", "b"])
    Query(Or(contains, any_of)).check(SAMPLES)
    assert problems(Query(And(contains, contains)))
    assert problems(Query(And(contains, Or(Where("rank", "==", 1), any_of))))


def test_a_secret_cannot_be_filtered_by_any_operator() -> None:
    """Not by a filter, an order or a sum: each would tell something of it."""
    collection = Vault.__collection__
    for query in (
        Query(Where("code", "==", "x")),
        Query(Where("code", ">", "a")),
        Query(Where("code", "!=", None)),
        Query(And(Where("name", "==", "x"), Where("pin", "in", [1, 2]))),
        Query(order_by=("code",)),
        Query(order_by=("name", "-pin")),
    ):
        with pytest.raises(InvalidInput):
            query.check(collection)
    for kind in ("sum", "average"):
        with pytest.raises(InvalidInput):
            Aggregate(kind, "pin").check(collection)


@given(queries_of_samples)
def test_checking_a_query_is_idempotent(query: Query) -> None:
    assert query.check(SAMPLES) == query


def test_values_are_encoded_as_documents_are() -> None:
    query = Query(And(Where("price", "==", Decimal("1.50")), Where("ratio", "<", 2), Where("price", "in", [1, 2])))
    operands = [leaf.value for leaf in leaves(query.check(SAMPLES).where or And())]
    assert identical(list(operands[:2]), [Decimal("1.5"), 2.0])
    assert identical(list(operands[2]), [Decimal(1), Decimal(2)])


@given(queries_of_samples)
def test_disjunctions_are_counted_in_disjunctive_normal_form(query: Query) -> None:
    def ways(where: Filter) -> list[list[Where]]:
        if isinstance(where, Where):
            many = len(where.value) if where.op in (Op.IN, Op.CONTAINS_ANY) else 1
            return [[where]] * many
        if isinstance(where, Or):
            return [way for part in where.filters for way in ways(part)]
        combined: list[list[Where]] = [[]]
        for part in where.filters:
            combined = [a + b for a in combined for b in ways(part)]
        return combined

    assume(query.where is not None)
    assert query.where is not None
    assert disjunctions(query.where) == len(ways(query.where))


# --- What the evaluator means ---------------------------------------------------------------------------------


@given(pairs)
def test_comparisons_of_non_null_values_are_consistent(pair: tuple[str, Any, Any]) -> None:
    field, value, operand = pair
    document = stored("d", sample(**{field: value}))

    def holds(op: Op, other: Any = operand) -> bool:
        return matches(Where(field, op, other), document)

    assert [holds(Op.LT), holds(Op.EQ), holds(Op.GT)].count(True) == 1
    assert holds(Op.LE) == (holds(Op.LT) or holds(Op.EQ))
    assert holds(Op.GE) == (holds(Op.GT) or holds(Op.EQ))
    assert holds(Op.NE) != holds(Op.EQ)
    assert holds(Op.IN, (operand,)) == holds(Op.EQ)
    assert holds(Op.NOT_IN, (operand,)) == holds(Op.NE)
    assert holds(Op.LT) == (sort_key(value) < sort_key(operand))
    assert not holds(Op.EQ, None)
    assert holds(Op.NE, None)


@given(pairs, st.sampled_from(Op))
def test_only_equals_null_finds_null(pair: tuple[str, Any, Any], op: Op) -> None:
    field, operand, _ = pair
    document = stored("d", sample())
    value = (operand,) if op in (Op.IN, Op.NOT_IN, Op.CONTAINS_ANY) else operand
    assert not matches(Where(field, op, value), document)
    assert matches(Where(field, Op.EQ, None), document)
    assert not matches(Where(field, Op.NE, None), document)


@given(held, queries_of_samples, queries_of_samples)
def test_and_or_and_in_follow_logic(documents: list[Document], a: Query, b: Query) -> None:
    assume(a.where is not None and b.where is not None)
    assert a.where is not None
    assert b.where is not None
    for document in documents:
        first, second = matches(a.where, document), matches(b.where, document)
        assert matches(And(a.where, b.where), document) == (first and second)
        assert matches(Or(a.where, b.where), document) == (first or second)
        for leaf in leaves(a.where):
            if leaf.op in (Op.IN, Op.CONTAINS_ANY):
                one = Op.EQ if leaf.op is Op.IN else Op.CONTAINS
                each = Or(*(Where(leaf.field, one, value) for value in leaf.value))
                assert matches(leaf, document) == matches(each, document)


@given(held, queries_of_samples)
def test_a_page_is_the_start_of_the_matches_in_their_total_order(documents: list[Document], query: Query) -> None:
    page = evaluate(query, documents)
    matching = [d for d in documents if matches(query.where, d)]
    assert len(page) == min(query.limit, len(matching))
    assert evaluate(query, documents[::-1]) == page, "whatever order the documents come in"
    for earlier, later in itertools.pairwise(page):
        for name, descending in query.order:
            a, b = sort_key(earlier[name]), sort_key(later[name])
            if a != b:
                assert (a > b) == descending
                break
        else:
            pytest.fail("the order is not total")
    if page and len(page) < len(matching):
        rest = evaluate(replace(query, limit=100, start_after=tuple(page[-1][n] for n, _ in query.order)), documents)
        assert len(rest) == len(matching) - len(page)
        assert not {d["id"] for d in rest} & {d["id"] for d in page}


def test_the_id_is_ordered_in_the_direction_of_the_last_field() -> None:
    assert Query().order == (("id", False),)
    assert Query(order_by=("-rank",)).order == (("rank", True), ("id", True))
    assert Query(order_by=("-rank", "name")).order == (("rank", True), ("name", False), ("id", False))
    assert Query(order_by=("-id", "rank")).order == (("id", True), ("rank", False))


def test_text_is_ordered_by_its_utf8_bytes() -> None:
    """UTF-16, as JavaScript and some databases have it, puts U+10000 before U+FFFF; a locale puts é before z."""
    texts = ["Z", "a", "z", "é", "\uffff", "\U00010000"]
    documents = [stored(f"{n}", sample(name=text)) for n, text in enumerate(reversed(texts))]
    assert [d["name"] for d in evaluate(Query(order_by=("name",)), documents)] == texts


def test_null_sorts_first() -> None:
    values = [None, -1, 0]
    documents = [stored(f"{n}", sample(rank=rank, flag=None)) for n, rank in enumerate(reversed(values))]
    assert [d["rank"] for d in evaluate(Query(order_by=("rank",)), documents)] == values
    assert [d["rank"] for d in evaluate(Query(order_by=("-rank",)), documents)] == values[::-1]


@pytest.mark.parametrize(
    ("wanted", "found_in"),
    [
        (True, [True]),
        (False, [False]),
        (1, [1, 1.0]),
        (1.0, [1, 1.0]),
        (0, [0]),
        (Decimal(1), [Decimal(1)]),
        ("1", ["1"]),
        (b"1", [b"1"]),
        ("", []),
    ],
    ids=repr,
)
def test_array_contains_compares_value_and_type(wanted: Any, found_in: list[Any]) -> None:
    elements = [True, False, 1, 1.0, 0, Decimal(1), "1", b"1", None, {"1": 1}]
    found = [e for e in elements if matches(Where("tags", "array-contains", wanted), sample(tags=["x", e]))]
    assert identical(found, found_in)


def test_a_projection_keeps_the_id_and_the_requested_fields_only() -> None:
    document = stored("d", sample(rank=1))
    assert project(None, document) == document
    assert project(("rank",), document) == {"id": "d", "rank": 1}
    assert project((), document) == {"id": "d"}


@given(held)
def test_sums_and_averages_ignore_nulls(documents: list[Document]) -> None:
    asked = [Aggregate("count"), Aggregate("sum", "price"), Aggregate("average", "ratio")]
    found = aggregate(asked, None, SAMPLES, documents)
    prices = [d["price"] for d in documents if d["price"] is not None]
    ratios = [d["ratio"] for d in documents if d["ratio"] is not None]
    assert found["count"] == len(documents)
    assert isinstance(found["sum_price"], Decimal)
    if not prices:
        assert found["sum_price"] == 0
    assert found["average_ratio"] is None if not ratios else isinstance(found["average_ratio"], float)


def test_sums_are_exact_and_averages_have_38_digits() -> None:
    documents = [stored(f"{n}", sample(price=Decimal(t))) for n, t in enumerate(("0.1", "0.2", "1E+30"))]
    found = aggregate([Aggregate("sum", "price"), Aggregate("average", "price")], None, SAMPLES, documents)
    assert found["sum_price"] == Decimal("1000000000000000000000000000000.3")
    assert found["average_price"] == Decimal("333333333333333333333333333333.43333333")


def test_an_integer_sum_beyond_int64_is_refused() -> None:
    documents = [stored(f"{n}", sample(rank=INT64_MAX)) for n in range(2)]
    with pytest.raises(InvalidInput, match="int64"):
        aggregate([Aggregate("sum", "rank")], None, SAMPLES, documents)
    assert aggregate([Aggregate("average", "rank")], None, SAMPLES, documents)["average_rank"] == float(INT64_MAX)


@pytest.mark.parametrize(
    "wrong",
    [
        Aggregate("max", "rank"),  # type: ignore[arg-type]  # wrong on purpose
        Aggregate("count", "rank"),
        Aggregate("sum"),
        Aggregate("sum", "name"),
        Aggregate("sum", "x"),
        Aggregate("average", "flag"),
        Aggregate("sum", "created_at"),
        Aggregate("sum", "version"),
    ],
    ids=lambda a: a.name,
)
def test_a_meaningless_aggregate_is_refused(wrong: Aggregate) -> None:
    with pytest.raises(InvalidInput):
        wrong.check(SAMPLES)
    for right in (Aggregate("count"), Aggregate("sum", "price"), Aggregate("average", "rank")):
        right.check(SAMPLES)


# --- Cursors --------------------------------------------------------------------------------------------------

SCOPE = "acme/samples"


@given(held, queries_of_samples)
def test_a_cursor_decodes_to_its_exact_position(documents: list[Document], query: Query) -> None:
    for document in documents:
        cursor = cursor_of(query, SCOPE, document)
        position = with_cursor(query, SAMPLES, SCOPE, cursor).start_after
        assert position is not None
        assert identical(list(position), [document[name] for name, _ in query.order])


@pytest.mark.parametrize("field", SCALARS)
def test_a_cursor_can_hold_every_edge_value(field: str) -> None:
    query = Query(order_by=(field,))
    for value in (None, *EDGES[field]):
        document = stored("é'\"\\", sample(**{field: value}))
        position = with_cursor(query, SAMPLES, SCOPE, cursor_of(query, SCOPE, document)).start_after
        assert identical(list(position or ()), [value, document["id"]])


@given(queries_of_samples, queries_of_samples)
def test_a_cursor_of_another_query_tenant_or_collection_is_refused(query: Query, other: Query) -> None:
    document = stored("d", sample())
    cursor = cursor_of(query, SCOPE, document)
    with_cursor(replace(query, limit=7, fields=("rank",)), SAMPLES, SCOPE, cursor)  # the page may change its size
    for scope in ("other/samples", "acme/items", "", "acme"):
        with pytest.raises(InvalidInput):
            with_cursor(query, SAMPLES, scope, cursor)
    for order in (("-id",), ("-id", "rank"), ("name", "-id"), ("-name", "id")):
        if replace(query, order_by=order).order != query.order:
            with pytest.raises(InvalidInput):
                with_cursor(replace(query, order_by=order), SAMPLES, SCOPE, cursor)
    if (query.where, query.order) != (other.where, other.order):
        with pytest.raises(InvalidInput):
            with_cursor(other, SAMPLES, SCOPE, cursor)


def forged(query: Query, position: Any) -> str:
    """A cursor with the right fingerprint, as anyone who has seen one can make it."""
    real = cursor_of(query, SCOPE, stored("d", sample()))
    fingerprint, _ = json.loads(base64.urlsafe_b64decode(real + "=" * (-len(real) % 4)))
    text = position if isinstance(position, str) else json.dumps([fingerprint, position])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "position",
    [
        [], ["d"], [1], [None, None, None], "not json", "[", "[" * 5000, "{}", "1", "null",
        ["a", "d"], [True, "d"], [1.5, "d"], [2**70, "d"],
        [{"d": "1"}, "d"], [{"t": "2025-01-01"}, "d"], [{"b": "!"}, "d"], [{}, "d"], [{"x": "1"}, "d"],
        [{"d": "NaN"}, "d"], [{"d": 1}, "d"], [[1], "d"], [1, 2], [1, {"b": "YQ"}], [1, "a\x00"], [math.inf, "d"],
    ],
    ids=lambda p: repr(p)[:20],
)  # fmt: skip
def test_a_forged_cursor_is_refused_and_never_reaches_an_engine(position: Any) -> None:
    query = Query(order_by=("rank",))
    assert with_cursor(query, SAMPLES, SCOPE, forged(query, [1, "d"])).start_after == (1, "d")
    with pytest.raises(InvalidInput):
        with_cursor(query, SAMPLES, SCOPE, forged(query, position))


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: base64.urlsafe_b64encode(b).decode()))
def test_any_invalid_cursor_text_raises_invalid_input(text: str) -> None:
    with pytest.raises(InvalidInput):
        with_cursor(Query(), SAMPLES, SCOPE, text)


def test_the_size_of_a_cursor_is_bounded_when_made_and_when_read() -> None:
    query = Query(order_by=("name",))
    with pytest.raises(InvalidInput):
        with_cursor(query, SAMPLES, SCOPE, "A" * (MAX_CURSOR_BYTES + 1))
    with pytest.raises(TooLarge, match="order by others"):
        cursor_of(query, SCOPE, stored("d", sample(name="x" * MAX_CURSOR_BYTES)))
    longest = stored("é" * 256, sample(name="é" * 2_000))
    assert with_cursor(query, SAMPLES, SCOPE, cursor_of(query, SCOPE, longest)).start_after is not None


def test_a_time_in_a_cursor_keeps_its_zone() -> None:
    query = Query(order_by=("moment",))
    moment = datetime(2025, 6, 15, 12, 30, 0, 123_456, tzinfo=UTC)
    position = with_cursor(query, SAMPLES, SCOPE, cursor_of(query, SCOPE, stored("d", sample(moment=moment))))
    assert identical(list(position.start_after or ()), [moment, "d"])


@given(orders)
def test_an_order_and_its_reverse_are_mirror_images(order: tuple[str, ...]) -> None:
    documents = [stored(f"d{n}", sample(rank=n % 3, name="ab"[n % 2])) for n in range(9)]
    mirrored = tuple(name.removeprefix("-") if name.startswith("-") else f"-{name}" for name in order) or ("-id",)
    there, back = evaluate(Query(order_by=order), documents), evaluate(Query(order_by=mirrored), documents)
    assert there == back[::-1]
