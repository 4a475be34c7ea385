"""A batch commits whole or not at all, an operation sees earlier operations, and batches of a group are independent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec import structs

from ...entities import Document, Query, Where
from ...errors import (
    AlreadyExists,
    BoundExceeded,
    Conflict,
    NotFound,
    StrongroomError,
    TooLarge,
)
from ...storage.port import (
    MAX_BATCH_BYTES,
    MAX_DOCUMENT_BYTES,
    MAX_OPERATIONS,
    Add,
    Append,
    Check,
    Create,
    Delete,
    Operation,
    Patch,
    Put,
    Store,
    document_size,
)
from .backend import StorageSuite
from .preconditions import refused
from .samples import NOW, batch, identical, item, record, sample, shared, stored

FAILING: list[tuple[Operation, type[StrongroomError]]] = [
    (Create("items", "there", item()), AlreadyExists),
    (Create("items", "clash", item(code="taken")), AlreadyExists),
    (Put("items", "there", item(), expected=1), Conflict),
    (Patch("items", "nowhere", {"label": "x"}), NotFound),
    (Delete("items", "there", expected=1), Conflict),
    (Add("items", "there", "used", 1, at_most=0), BoundExceeded),
    (Check("items", "there", 0), Conflict),
    (Create("samples", "huge", sample(note="x" * 600_000, blob=bytes(600_000))), TooLarge),
]


async def everything(store: Store) -> Any:
    """Everything in the store, to compare before and after."""
    return (
        await store.find("items", "acme", Query(limit=1000)),
        await store.find("samples", "acme", Query(limit=1000)),
        await store.find("shared", None, Query(limit=1000)),
        (await store.changes(None)).records,
    )


class TestAtomicBatches(StorageSuite):
    @pytest.mark.parametrize("at", ["first", "middle", "last"])
    @pytest.mark.parametrize(
        ("failing", "error"),
        FAILING,
        ids=lambda value: type(value).__name__ if not isinstance(value, type) else value.__name__,
    )
    async def test_one_failing_operation_leaves_nothing_of_its_batch(
        self, store: Store, failing: Operation, error: type[StrongroomError], at: str
    ) -> None:
        await store.commit(
            batch(
                "acme",
                Create("items", "there", item(code="taken")),
                Create("items", "doomed", item(code="doomed")),
                Create("shared", "there", shared()),
                Append(record("there"), 0),
            )
        )
        before = await everything(store)
        good: list[Operation] = [
            Create("items", "new", item(code="new")),
            Append(record("new"), 0),
            Patch("items", "there", {"label": "patched", "code": "moved"}),
            Put("shared", "there", shared("put", code="p")),
            Delete("items", "doomed"),
            Create("items", "heir", item(code="doomed")),
            Add("shared", "there", "used", 5),
            Append(record("there", None)),
        ]
        place = {"first": 0, "middle": 2, "last": len(good)}[at]
        operations = [*good[:place], failing, *good[place:]]
        if at == "first":
            operations[2] = Append(record("new"), 1)
        if failing == Create("items", "clash", item(code="taken")) and at == "last":
            operations[-1] = Create("items", "clash", item(code="moved"))
        await refused(store, error, *operations, at=place, now_us=NOW + 1)
        assert await everything(store) == before
        for operation in good:  # names, unique values and counters of a refused batch are free
            if isinstance(operation, Append):
                continue
            await store.commit(batch("acme", operation, now_us=NOW + 2))
        heirs = await store.find("items", "acme", Query(Where("code", "==", "doomed")))
        assert [d["id"] for d in heirs] == ["heir"]

    async def test_patches_of_many_documents_apply_whole_or_name_the_operation_in_the_way(self, store: Store) -> None:
        """Checks and patches of one collection with versions and the same fields, as usage is written."""
        numbers = range(12)
        checked = [Create("items", f"c{n}", item()) for n in numbers]
        written = [Create("shared", f"s{n}", shared(code=f"code {n}")) for n in numbers]
        made = await store.commit(batch("acme", *checked, *written))

        def operations(at: int | None = None, other: Operation | None = None) -> list[Operation]:
            found: list[Operation] = []
            for n in numbers:
                found.append(Check("items", f"c{n}", made.versions[n]))
                fields = {"label": "patched", "code": f"new {n}"}
                found.append(Patch("shared", f"s{n}", fields, made.versions[len(numbers) + n]))
            if at is not None and other is not None:
                found[at] = other
            return found

        before = await everything(store)
        wrong: list[tuple[int, Operation, type[StrongroomError]]] = [
            (10, Check("items", "c5", 1), Conflict),
            (11, Patch("shared", "s5", {"label": "patched", "code": "x"}, 1), Conflict),
            (11, Patch("shared", "none", {"label": "patched", "code": "x"}, 1), NotFound),
            (11, Patch("shared", "s5", {"label": "patched", "code": "new 4"}, made.versions[17]), AlreadyExists),
            (11, Patch("shared", "s5", {"label": "x" * MAX_DOCUMENT_BYTES, "code": "x"}, made.versions[17]), TooLarge),
        ]
        for at, other, error in wrong:
            await refused(store, error, *operations(at, other), at=at, now_us=NOW + 1)
            assert await everything(store) == before
        committed = await store.commit(batch("acme", *operations(), now_us=NOW + 1))
        for n in numbers:
            document = await store.get("shared", None, f"s{n}")
            assert document is not None
            assert (document["version"], document["label"], document["code"]) == (
                committed.versions[2 * n + 1],
                "patched",
                f"new {n}",
            )
            assert document["version"] > made.versions[len(numbers) + n]
            assert committed.versions[2 * n] == 0

    async def test_an_operation_sees_those_before_it(self, store: Store) -> None:
        committed = await store.commit(
            batch(
                "acme",
                Check("items", "x", 0),
                Create("items", "x", item("created", code="c", used=10)),
                Patch("items", "x", {"label": "patched"}),
                Add("items", "x", "used", 5, at_most=15),
                Add("items", "x", "used", -1),
                Put("items", "z", item("put"), expected=0),
                Delete("items", "x"),
                Check("items", "x", 0),
                Create("items", "y", item("heir", code="c")),
                Create("shared", "x", shared("beside")),
            )
        )
        assert [version > 0 for version in committed.versions] == [
            False, True, True, True, True, True, False, False, True, True,
        ]  # fmt: skip
        of_x = committed.versions[1:5]
        assert list(of_x) == sorted(of_x)
        assert dict(committed.values) == {3: 15, 4: 14}
        assert committed.sequence is None
        assert await store.get("items", "acme", "x") is None
        assert await store.get("items", "acme", "y") is not None
        assert await store.get("shared", None, "x") is not None

    async def test_expectations_in_a_batch_see_the_batchs_earlier_operations(self, store: Store) -> None:
        (old,) = (await store.commit(batch("acme", Create("items", "old", item())))).versions
        change = Patch("items", "old", {"label": "b"})
        for late in (
            Check("items", "old", old),
            Put("items", "old", item(), expected=old),
            structs.replace(change, expected=old),
        ):
            await refused(store, Conflict, change, late, at=1)
        await refused(store, Conflict, Delete("items", "old", expected=old), Check("items", "old", old), at=1)
        await refused(store, Conflict, Put("items", "x", item()), Put("items", "x", item(), expected=0), at=1)
        await store.commit(batch("acme", Check("items", "old", old), Delete("items", "old", expected=old)))
        await refused(store, AlreadyExists, Put("items", "x", item()), Create("items", "x", item()), at=1)
        await refused(store, NotFound, Create("items", "x", item()), Delete("items", "x"), Delete("items", "x"), at=2)
        assert await store.find("items", "acme", Query()) == []

    async def test_an_empty_batch_commits_nothing(self, store: Store) -> None:
        committed = await store.commit(batch("acme"))
        assert (committed.versions, dict(committed.values), committed.sequence) == ((), {}, None)


class TestLimits(StorageSuite):
    async def test_the_number_of_operations_in_a_batch_is_bounded(self, store: Store) -> None:
        operations = [Create("items", f"{n}", item()) for n in range(MAX_OPERATIONS)]
        with pytest.raises(TooLarge):
            await store.commit(batch("acme", *operations, Check("items", "other", 0)))
        assert await store.find("items", "acme", Query()) == []
        committed = await store.commit(batch("acme", *operations))
        assert len(committed.versions) == MAX_OPERATIONS
        assert min(committed.versions) > 0

    @pytest.mark.parametrize("how", ["create", "put", "patch"])
    async def test_the_size_of_a_document_is_bounded(self, store: Store, how: str) -> None:
        def document(size: int) -> Document:
            small = sample(note="x" * 400_000, blob=b"")
            return {**small, "blob": bytes(size - document_size(small))}

        def operation(given: Document) -> Operation:
            if how == "patch":  # the patched fields are small enough, the resulting document is not
                return Patch("samples", "x", {"blob": given["blob"]})
            return Create("samples", "x", given) if how == "create" else Put("samples", "x", given)

        assert document_size(document(MAX_DOCUMENT_BYTES)) == MAX_DOCUMENT_BYTES
        if how == "patch":
            await store.commit(batch("acme", Create("samples", "x", sample(note="x" * 400_000))))
        before = await store.get("samples", "acme", "x")
        with pytest.raises(TooLarge):
            await store.commit(batch("acme", operation(document(MAX_DOCUMENT_BYTES + 1))))
        assert await store.get("samples", "acme", "x") == before
        await store.commit(batch("acme", operation(document(MAX_DOCUMENT_BYTES))))
        got = await store.get("samples", "acme", "x")
        assert got is not None
        assert len(got["blob"]) == len(document(MAX_DOCUMENT_BYTES)["blob"])

    @pytest.mark.parametrize(
        ("how", "content"),
        [
            ("create", [1]),
            ("create", [True]),
            ("create", ["é" * 10_000]),
            ("create", [{"a": ""}]),
            ("put", [True]),
            ("patch", [1]),
        ],
        ids=["create-ints", "create-bools", "create-text", "create-maps", "put-bools", "patch-ints"],
    )
    async def test_the_size_of_a_document_is_document_size_on_every_engine(
        self, store: Store, how: str, content: list[Any]
    ) -> None:
        each = document_size(sample(tags=content)) - document_size(sample(tags=[]))
        fits = (MAX_DOCUMENT_BYTES - document_size(sample(tags=[]))) // each
        await store.commit(batch("acme", Create("samples", "patched", sample())))
        for number, error in ((fits, None), (fits + 1, TooLarge)):
            document = sample(tags=content * number)
            operation: Operation = Create("samples", f"{number}", document)
            if how != "create":
                put = how == "put"
                operation = (
                    Put("samples", "x", document) if put else Patch("samples", "patched", {"tags": document["tags"]})
                )
            if error is None:
                await store.commit(batch("acme", operation))
            else:
                with pytest.raises(error):
                    await store.commit(batch("acme", operation))

    async def test_the_size_of_a_batch_is_bounded(self, store: Store) -> None:
        each = sample(note="x" * 800_000)
        fits = MAX_BATCH_BYTES // document_size(each)
        operations = [Create("samples", f"{n}", each) for n in range(fits + 1)]
        with pytest.raises(TooLarge):
            await store.commit(batch("acme", *operations))
        assert await store.find("samples", "acme", Query()) == []
        await store.commit(batch("acme", *operations[:fits]))
        assert len(await store.find("samples", "acme", Query(fields=()))) == fits


class TestGroupCommit(StorageSuite):
    async def test_concurrent_batches_succeed_and_fail_independently(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "taken", item())))
        pending = []
        for n in range(150):
            id = "taken" if n % 3 == 1 else f"{n}"
            tenant = "acme" if n % 3 == 1 else f"tenant-{n % 2}"
            operations = (
                Create("items", f"{n}-first", item()),
                Create("items", id, item()),
                Append(record(f"{n}", tenant), 0),
            )
            pending.append(store.commit(batch(tenant, *operations)))
        outcomes = await asyncio.gather(*pending, return_exceptions=True)
        for n, outcome in enumerate(outcomes):
            if n % 3 == 1:
                assert isinstance(outcome, AlreadyExists), outcome
                assert outcome.details["operation"] == 1
            else:
                assert not isinstance(outcome, BaseException), outcome
        for n in range(150):
            tenant = "acme" if n % 3 == 1 else f"tenant-{n % 2}"
            assert (await store.get("items", tenant, f"{n}-first") is None) == (n % 3 == 1)
        for half in (0, 1):
            records = (await store.changes(None, tenant=f"tenant-{half}", limit=1000)).records
            assert [r.entity_id for r in records] == [f"{n}" for n in range(150) if n % 3 != 1 and n % 2 == half]

    async def test_batches_commit_in_the_order_given(self, store: Store) -> None:
        pending = [store.commit(batch("acme", Put("items", "x", item("0")), Append(record("0"), 0)))]
        for n in range(1, 60):
            pending.append(store.commit(batch("acme", Put("items", "x", item(f"{n}")), Append(record(f"{n}"), 0))))
        committed = await asyncio.gather(*pending)
        versions = [c.versions[0] for c in committed]
        assert versions == sorted(set(versions)), "each batch has a version of its own"
        sequences = [c.sequence for c in committed]
        assert sequences == sorted(sequences, key=lambda s: s or 0)
        assert identical(await store.get("items", "acme", "x"), stored("x", item("59"), version=versions[-1]))
        assert [r.entity_id for r in (await store.changes(None)).records] == [f"{n}" for n in range(60)]

    async def test_a_batch_sees_earlier_batches_except_failed_ones(self, store: Store) -> None:
        outcomes = await asyncio.gather(
            store.commit(batch("acme", Create("items", "x", item(code="c")))),
            store.commit(batch("acme", Create("items", "y", item(code="d")), Create("items", "x", item()))),
            store.commit(batch("acme", Patch("items", "x", {"label": "seen"}))),
            store.commit(batch("acme", Create("items", "z", item(code="d")))),
            store.commit(batch("acme", Check("items", "y", 0), Add("items", "z", "used", 1))),
            return_exceptions=True,
        )
        assert [type(o).__name__ for o in outcomes] == [
            "Committed",
            "AlreadyExists",
            "Committed",
            "Committed",
            "Committed",
        ]

    async def test_a_reader_never_sees_a_partial_batch(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "a", item("0")), Create("items", "b", item("0"))))
        written = asyncio.Event()

        async def write() -> None:
            for n in range(40):
                label = {"label": f"{n}"}
                await store.commit(batch("acme", Patch("items", "a", label), Patch("items", "b", label)))
            written.set()

        async def read() -> None:
            while not written.is_set():
                labels = [d["label"] for d in await store.find("items", "acme", Query())]
                assert labels[0] == labels[1]
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            for _ in range(3):
                tasks.create_task(read())

    async def test_a_cancelled_caller_does_not_affect_other_batches(self, store: Store) -> None:
        async def create(id: str) -> None:
            await store.commit(batch("acme", Create("items", id, item())))

        tasks = [asyncio.create_task(create(f"{n}")) for n in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::4]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for n, outcome in enumerate(outcomes):
            assert outcome is None or (n % 4 == 0 and isinstance(outcome, asyncio.CancelledError)), outcome
        there = {d["id"] for d in await store.find("items", "acme", Query())}
        assert there >= {f"{n}" for n in range(20) if n % 4}
        await create("after")
        assert await store.get("items", "acme", "after") is not None
