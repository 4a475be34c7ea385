"""Each operation on missing and present documents: its result, its error, and the version that it makes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec import structs

from ...context import utc_from_us
from ...entities import INT64_MAX, INT64_MIN, Query
from ...errors import (
    AlreadyExists,
    BoundExceeded,
    Conflict,
    NotFound,
    StrongroomError,
)
from ...storage.port import Add, Check, Create, Delete, Operation, Patch, Put, Store
from .backend import StorageSuite
from .samples import NOW, batch, identical, item, shared, stored

# The result of each operation when the document is missing, and when it is present with version CURRENT.
CURRENT, OLDER, NEWER = -1, -2, -3
MISSING: list[tuple[Operation, type[StrongroomError] | None]] = [
    (Create("items", "x", item("new")), None),
    (Put("items", "x", item("new")), None),
    (Put("items", "x", item("new"), expected=0), None),
    (Put("items", "x", item("new"), expected=5), Conflict),
    (Patch("items", "x", {"label": "new"}), NotFound),
    (Patch("items", "x", {"label": "new"}, expected=5), NotFound),
    (Delete("items", "x"), NotFound),
    (Delete("items", "x", expected=5), NotFound),
    (Add("items", "x", "used", 1), NotFound),
    (Add("items", "x", "used", 1, at_most=5, at_least=0), NotFound),
    (Check("items", "x", 0), None),
    (Check("items", "x", 5), Conflict),
]
PRESENT: list[tuple[Operation, type[StrongroomError] | None]] = [
    (Create("items", "x", item("new")), AlreadyExists),
    (Put("items", "x", item("new")), None),
    (Put("items", "x", item("new"), expected=CURRENT), None),
    (Put("items", "x", item("new"), expected=0), Conflict),
    (Put("items", "x", item("new"), expected=OLDER), Conflict),
    (Put("items", "x", item("new"), expected=NEWER), Conflict),
    (Patch("items", "x", {"label": "new"}), None),
    (Patch("items", "x", {"label": "new"}, expected=CURRENT), None),
    (Patch("items", "x", {"label": "new"}, expected=OLDER), Conflict),
    (Patch("items", "x", {"label": "new"}, expected=INT64_MAX), Conflict),
    (Delete("items", "x"), None),
    (Delete("items", "x", expected=CURRENT), None),
    (Delete("items", "x", expected=NEWER), Conflict),
    (Add("items", "x", "used", 2), None),
    (Add("items", "x", "used", 2, at_most=4), BoundExceeded),
    (Add("items", "x", "used", -2, at_least=2), BoundExceeded),
    (Add("items", "x", "used", 2, at_most=5, at_least=0), None),
    (Check("items", "x", CURRENT), None),
    (Check("items", "x", 0), Conflict),
    (Check("items", "x", OLDER), Conflict),
]


def _expecting(operation: Operation, current: int) -> Operation:
    """The operation with an expected version relative to the current one."""
    expected = getattr(operation, "expected", None)
    if expected not in (CURRENT, OLDER, NEWER):
        return operation
    return structs.replace(operation, expected=current + {CURRENT: 0, OLDER: -1, NEWER: 1}[expected])


def _label(value: object) -> str:
    return str(value).replace("label='new', ", "") if not isinstance(value, type) else value.__name__


async def refused(store: Store, error: type[StrongroomError], *operations: Operation, at: int = 0, **more: Any) -> None:
    """The batch is refused with `error`, which names the operation that failed."""
    with pytest.raises(error) as caught:
        await store.commit(batch(more.pop("tenant", "acme"), *operations, **more))
    assert type(caught.value) is error
    assert caught.value.details["operation"] == at
    assert caught.value.message != error("").message, "the message says what failed"


class TestPreconditions(StorageSuite):
    @pytest.mark.parametrize(("operation", "error"), MISSING, ids=_label)
    async def test_each_operation_on_a_missing_document_behaves_as_specified(
        self, store: Store, operation: Operation, error: type[StrongroomError] | None
    ) -> None:
        if error is not None:
            await refused(store, error, operation)
            assert await store.get("items", "acme", "x") is None
            return
        committed = await store.commit(batch("acme", operation))
        if isinstance(operation, Check):
            assert committed.versions == (0,)
        else:
            (version,) = committed.versions
            assert identical(await store.get("items", "acme", "x"), stored("x", item("new"), version=version))

    @pytest.mark.parametrize(("operation", "error"), PRESENT, ids=_label)
    async def test_each_operation_on_a_present_document_behaves_as_specified(
        self, store: Store, operation: Operation, error: type[StrongroomError] | None
    ) -> None:
        before = item("old", code="c", used=3)
        (version,) = (await store.commit(batch("acme", Create("items", "x", before)))).versions
        operation = _expecting(operation, version)
        later = NOW + 5
        if error is not None:
            await refused(store, error, operation, now_us=later)
            assert identical(await store.get("items", "acme", "x"), stored("x", before, version=version))
            return
        committed = await store.commit(batch("acme", operation, now_us=later))
        changed = {
            Put: item("new"),
            Patch: {**before, "label": "new"},
            Add: {**before, "used": 5},
            Check: before,
        }.get(type(operation))
        is_change = not isinstance(operation, Check)
        (made,) = committed.versions
        assert (made > version) if is_change and changed else made == 0
        assert dict(committed.values) == ({0: 5} if isinstance(operation, Add) else {})
        got = await store.get("items", "acme", "x")
        moment = later if is_change else NOW
        there = stored("x", changed, version=made or version, updated_us=moment) if changed else None
        assert identical(got, there), got

    async def test_a_value_of_a_unique_index_is_taken(self, store: Store) -> None:
        taken = item(code="c", shelf="s", place=1)
        await store.commit(batch("acme", Create("items", "x", taken), Create("items", "y", item("y"))))
        for clash in ({"code": "c"}, {"shelf": "s", "place": 1}):
            await refused(store, AlreadyExists, Create("items", "z", item(**clash)))
            await refused(store, AlreadyExists, Put("items", "z", item(**clash)))
            await refused(store, AlreadyExists, Put("items", "y", item(**clash)))
            await refused(store, AlreadyExists, Patch("items", "y", clash))
        await refused(
            store, AlreadyExists, Create("items", "p", item(code="d")), Create("items", "q", item(code="d")), at=1
        )
        assert await store.get("items", "acme", "z") is None
        assert identical(await store.get("items", "acme", "y"), stored("y", item("y")))
        assert identical(await store.get("items", "acme", "x"), stored("x", taken))

    async def test_a_document_may_keep_its_own_unique_value(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "x", item(code="c"))))
        await store.commit(batch("acme", Put("items", "x", item("put", code="c"))))
        await store.commit(batch("acme", Patch("items", "x", {"code": "c", "label": "patched"})))
        document = await store.get("items", "acme", "x")
        assert document is not None
        assert document["label"] == "patched"

    async def test_a_unique_value_is_free_again_once_it_is_given_up(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "x", item(code="c")), Create("items", "y", item(code="d"))))
        await store.commit(batch("acme", Patch("items", "x", {"code": "e"}), Create("items", "z", item(code="c"))))
        await store.commit(batch("acme", Delete("items", "y"), Patch("items", "x", {"code": "d"})))
        codes = {d["id"]: d["code"] for d in await store.find("items", "acme", Query())}
        assert codes == {"x": "d", "z": "c"}

    async def test_several_documents_may_be_null_in_a_unique_index(self, store: Store) -> None:
        rows = [item(), item(), item(shelf="s"), item(shelf="s"), item(place=1), item(place=1), item(code="")]
        await store.commit(batch("acme", *(Create("items", f"{n}", row) for n, row in enumerate(rows))))
        await refused(store, AlreadyExists, Create("items", "again", item(code="")))
        assert len(await store.find("items", "acme", Query())) == len(rows)

    async def test_unique_values_differ_by_case_and_composition(self, store: Store) -> None:
        codes = ["a", "A", "a ", "é", "e\u0301", "ß", "ss", "\u0131", "i"]
        await store.commit(batch("acme", *(Create("items", f"{n}", item(code=c)) for n, c in enumerate(codes))))
        assert len(await store.find("items", "acme", Query())) == len(codes)


class TestVersions(StorageSuite):
    async def test_each_change_gives_a_greater_version_even_if_the_clock_stands_still_or_goes_back(
        self, store: Store
    ) -> None:
        changes: list[Operation] = [
            Create("items", "x", item()),
            Put("items", "x", item("put")),
            Patch("items", "x", {"label": "patched"}),
            Add("items", "x", "used", 1),
            Add("items", "x", "used", 0),
            Patch("items", "x", {"label": "patched"}),
            Put("items", "x", item("put")),
        ]
        clock = [NOW, NOW, NOW - 1_000_000, NOW + 10, NOW + 10, 1, NOW + 11]
        last = 0
        for change, now_us in zip(changes, clock, strict=True):
            (version,) = (await store.commit(batch("acme", change, now_us=now_us))).versions
            assert version > last
            last = version
            document = await store.get("items", "acme", "x")
            assert document is not None
            assert document["version"] == version
            assert document["updated_at"] == utc_from_us(now_us)
            assert document["created_at"] == utc_from_us(NOW)

    @pytest.mark.parametrize(
        "recreate", [Create("items", "x", item()), Put("items", "x", item(), expected=0)], ids=_label
    )
    @pytest.mark.parametrize("now_us", [NOW + 20, NOW, NOW - 1_000_000])
    async def test_an_id_that_is_used_again_never_repeats_a_version(
        self, store: Store, recreate: Operation, now_us: int
    ) -> None:
        seen: list[int] = []
        for _ in range(3):
            committed = await store.commit(batch("acme", recreate, now_us=now_us))
            seen += committed.versions
            for n in range(3):
                seen += (
                    await store.commit(batch("acme", Patch("items", "x", {"label": str(n)}), now_us=now_us))
                ).versions
            await store.commit(batch("acme", Delete("items", "x"), now_us=now_us))
        in_one = batch("acme", recreate, Delete("items", "x"), recreate, Delete("items", "x"), recreate, now_us=now_us)
        seen.append((await store.commit(in_one)).versions[-1])
        assert seen == sorted(set(seen)), "a version came twice, or went back"
        document = await store.get("items", "acme", "x")
        assert document is not None
        assert document["version"] == seen[-1]

    async def test_a_stale_version_is_refused_after_the_id_was_used_again(self, store: Store) -> None:
        (old,) = (await store.commit(batch("acme", Create("items", "x", item())))).versions
        await store.commit(batch("acme", Delete("items", "x"), Create("items", "x", item("second"))))
        await refused(store, Conflict, Patch("items", "x", {"label": "lost update"}, expected=old))
        await refused(store, Conflict, Delete("items", "x", expected=old))
        await refused(store, Conflict, Check("items", "x", old))

    async def test_a_create_can_set_both_times(self, store: Store) -> None:
        created, updated = datetime(2001, 2, 3, 4, 5, 6, 789, tzinfo=UTC), datetime(2002, 2, 3, tzinfo=UTC)
        times: dict[str, Any] = {"created_at": created, "updated_at": updated}
        await store.commit(
            batch(
                "acme",
                Create("items", "created", item(), **times),
                Put("items", "put", item(), **times),
                Create("items", "replaced", item()),
                Create("items", "expected", item(), created_at=created),
            )
        )
        version = (await store.get("items", "acme", "expected") or {})["version"]
        await store.commit(
            batch(
                "acme",
                Put("items", "replaced", item("put"), **times),
                Put("items", "expected", item("put"), expected=version, updated_at=updated),
                Put("items", "new", item("put"), expected=0, **times),
            )
        )
        found = await store.find("items", "acme", Query())
        assert {d["id"]: (d["created_at"], d["updated_at"]) for d in found} == dict.fromkeys(
            ("created", "expected", "new", "put", "replaced"), (created, updated)
        )

    async def test_a_create_can_set_its_creation_time(self, store: Store) -> None:
        long_ago = datetime(2001, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
        await store.commit(batch("acme", Create("items", "x", item(), created_at=long_ago)))
        document = await store.get("items", "acme", "x")
        assert document is not None
        assert (document["created_at"], document["updated_at"]) == (long_ago, utc_from_us(NOW))
        await store.commit(batch("acme", Put("items", "x", item("put")), now_us=NOW + 1))
        document = await store.get("items", "acme", "x")
        assert document is not None
        assert (document["created_at"], document["updated_at"]) == (long_ago, utc_from_us(NOW + 1))

    async def test_global_documents_have_preconditions_too(self, store: Store) -> None:
        await store.commit(batch(None, Create("shared", "x", shared(code="c"))))
        await refused(store, AlreadyExists, Create("shared", "x", shared()), tenant=None)
        await refused(store, AlreadyExists, Create("shared", "y", shared(code="c")), tenant=None)
        await refused(store, Conflict, Patch("shared", "x", {"label": "b"}, expected=1), tenant=None)
        await refused(store, NotFound, Delete("shared", "y"), tenant=None)
        committed = await store.commit(batch(None, Add("shared", "x", "used", INT64_MIN), now_us=NOW))
        assert dict(committed.values) == {0: INT64_MIN}
        found = await store.get("shared", None, "x")
        assert found is not None
        assert committed.versions == (found["version"],)
