"""Migrating between stores: everything arrives unchanged through any interruption, and differences are named."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from strongroom import migrate as library
from strongroom.entities.entity import Collection, Document
from strongroom.entities.query import Query
from strongroom.errors import Conflict, InvalidInput, NotFound, StoreError, Unavailable
from strongroom.migrate import Options, Phase, Report
from strongroom.migrate.checksum import Canonical, SetSum
from strongroom.migrate.state import NOT_MOVED, Part
from strongroom.migrate.streams import pages, parts
from strongroom.storage.port import (
    Append,
    Batch,
    Committed,
    Create,
    Delete,
    Operation,
    Put,
    Record,
    Store,
)
from strongroom.testing.storage import Backend
from strongroom.testing.storage.samples import (
    COLLECTIONS,
    HOSTILE_NAMES,
    ITEMS,
    NOW,
    SAMPLES,
    SHARED,
    documents,
    identical,
    item,
    moments,
    record,
    sample,
    shared,
)
from tests.conftest import backend_of
from tests.helpers.faulty_store import Fault, FaultyStore

KINDS = ["sqlite", "json", "postgres", "firestore"]
SMALL = Options(batch=5)
"""Batches so small that a few documents take several."""


@pytest.fixture
def backends(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Backend]:
    """Each kind of backend, once a test."""
    made: dict[str, Backend] = {}

    def of(kind: str) -> Backend:
        if kind not in made:
            made[kind] = backend_of(kind, tmp_path, request)
        return made[kind]

    return of


EVERY_PAIR = [f"{one}-{other}" for one in KINDS for other in KINDS]
EACH_ONCE = [f"{one}-{other}" for one, other in zip(KINDS, [*KINDS[1:], KINDS[0]], strict=True)]
"""Pairs in which each kind is the source once, and the target once."""


@pytest.fixture(params=EACH_ONCE)
def pair(request: pytest.FixtureRequest, backends: Callable[[str], Backend]) -> tuple[Backend, Backend]:
    """A source's and a target's backend."""
    one, other = request.param.split("-")
    return backends(one), backends(other)


@pytest.fixture
def simple(backends: Callable[[str], Backend]) -> tuple[Backend, Backend]:
    """The pair that is quick: for what does not depend on the engines."""
    return backends("sqlite"), backends("sqlite")


@asynccontextmanager
async def opened(
    *where: tuple[Backend, str], prepare: Sequence[Collection] | None = None
) -> AsyncIterator[list[Store]]:
    stores = []
    try:
        for backend, url in where:
            stores.append(await backend.open(url))
            if prepare is not None:
                await stores[-1].prepare(prepare)
        yield stores
    finally:
        for store in stores:
            await store.close()


# --- What a store holds -----------------------------------------------------------------------------------------


async def held(store: Store, collections: Sequence[Collection] = COLLECTIONS) -> dict[Any, dict[str, Document]]:
    """Every document without its version, by collection and tenant."""
    found: dict[Any, dict[str, Document]] = {}
    async for part in parts(collections, store):
        async for page in pages(store, part):
            for document in page:
                del document["version"]
                found.setdefault((part.collection.name, part.tenant), {})[document["id"]] = document
    return found


async def journal(store: Store) -> list[Record]:
    """The journal without what stores say of themselves, its sequences all 0."""
    cursor, records = None, []
    while (page := await store.changes(cursor)).records:
        cursor = page.cursor
        records += [structs.replace(one, sequence=0) for one in page.records if one.collection not in NOT_MOVED]
    return records


def of_tenants(records: Sequence[Record]) -> dict[str | None, list[Record]]:
    found: dict[str | None, list[Record]] = {}
    for one in records:
        found.setdefault(one.tenant, []).append(one)
    return found


async def assert_equal(source: Store, target: Store, *, with_journal: bool = True) -> None:
    wanted, found = await held(source), await held(target)
    assert identical(found, wanted)
    if with_journal:
        assert of_tenants(await journal(target)) == of_tenants(await journal(source))


async def add(store: Store, tenant: str | None, *operations: Operation) -> Committed:
    return await store.commit(Batch(tenant, operations, NOW))


async def filled(store: Store, count: int = 7, tenants: Sequence[str] = ("acme", "globex")) -> None:
    """A few documents and records of the platform and of two tenants."""
    await store.prepare(COLLECTIONS)
    for n in range(count):
        await add(store, None, Create("shared", f"s{n}", shared(f"label {n}", code=f"c{n}")))
        for tenant in tenants:
            made = Create("items", f"i{n}", item(f"{tenant} {n}", code=f"c{n}", used=n))
            await add(store, tenant, made, Append(record(f"i{n}", tenant, id=f"{tenant}-{n}"), 0))


# --- Everything arrives -----------------------------------------------------------------------------------------

ids = st.sampled_from(HOSTILE_NAMES) | st.text(
    st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=12
)
tenant_names = st.lists(ids.filter(lambda name: len(name.encode()) <= 128), min_size=1, max_size=3, unique=True)
stamped = st.tuples(documents, moments, moments)
contents = st.dictionaries(ids, stamped, max_size=9)


@st.composite
def whole_stores(draw: st.DrawFn) -> list[tuple[str, dict[str, tuple[Document, datetime, datetime]]]]:
    return [(tenant, draw(contents)) for tenant in draw(tenant_names)]


async def put_whole(store: Store, whole: list[tuple[str, dict[str, tuple[Document, datetime, datetime]]]]) -> None:
    for tenant, some in whole:
        for number, (id, (document, created, updated)) in enumerate(some.items()):
            made = Create("samples", id, document, created, updated)
            told = record(id, tenant, id=f"{number}", collection="samples", after=document, version=number or None)
            await add(store, tenant, made, Append(told))
        await add(store, None, Put("shared", tenant, shared(tenant)), Append(record(tenant, None, collection="shared")))


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=() if pair in EACH_ONCE else pytest.mark.soak) for pair in EVERY_PAIR],
    indirect=True,
)
async def test_a_migration_between_any_two_engines_moves_every_document_and_record(
    pair: tuple[Backend, Backend],
) -> None:
    source, target = pair
    runs = itertools.count()

    @settings(max_examples=3)
    @given(whole_stores(), st.integers(3, 20))
    def check(whole: Any, batch: int) -> None:
        next(runs)

        async def moved() -> None:
            async with opened((source, source.new_url()), (target, target.new_url())) as (one, other):
                await one.prepare(COLLECTIONS)
                await put_whole(one, whole)
                report = await library.migrate(one, other, COLLECTIONS, Options(batch=batch))
                assert (report.phase, report.equal) == (Phase.DONE, True)
                await assert_equal(one, other)
                assert report.documents == sum(len(some) for some in (await held(one)).values())

        asyncio.run(moved())

    await asyncio.to_thread(check)
    assert next(runs) >= 3


async def test_a_migration_keeps_times_and_types_exactly_and_only_reads_the_source(
    pair: tuple[Backend, Backend],
) -> None:
    source, target = pair
    url = source.new_url()
    async with opened((source, url), (target, target.new_url())) as (one, other):
        await filled(one)
        before, log = await held(one), await journal(one)
        end = (await one.changes("end")).cursor
        report = await library.migrate(one, other, COLLECTIONS, SMALL)
        assert report.is_done
        assert [(p.collection, p.tenant, p.documents, p.equal) for p in report.parts] == [
            ("items", "acme", 7, True), ("items", "globex", 7, True), ("shared", None, 7, True),
        ]  # fmt: skip
        assert (report.records, report.target_records) == (14, 14)
        assert identical(await held(other), before)
        assert (await held(one), await journal(one), (await one.changes("end")).cursor) == (before, log, end)


async def test_a_second_call_changes_nothing_and_versions_belong_to_the_target(simple: tuple[Backend, Backend]) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        await library.migrate(one, other, COLLECTIONS, SMALL)
        before = await other.get("shared", None, "s1")
        end = (await other.changes("end")).cursor
        report = await library.migrate(one, other, COLLECTIONS, SMALL)
        assert report.is_done
        assert "already" in report.notes[0]
        assert await other.get("shared", None, "s1") == before
        assert (await other.changes("end")).cursor == end
        assert before is not None
        assert (await add(other, None, Put("shared", "s1", shared(), before["version"]))).versions[0] > before[
            "version"
        ]


async def test_without_its_journal_only_the_documents_move(simple: tuple[Backend, Backend]) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        report = await library.migrate(one, other, COLLECTIONS, replace(SMALL, journal=False))
        assert (report.is_done, report.records) == (True, 0)
        await assert_equal(one, other, with_journal=False)
        assert await journal(other) == []


async def test_large_documents_and_records_are_cut_into_batches_that_fit(simple: tuple[Backend, Backend]) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await one.prepare(COLLECTIONS)
        for n in range(14):
            large = sample(note="x" * 880_000, blob=b"y" * 90_000)
            told = record(f"{n}", id=f"{n}", before=sample(name="b" * 700_000), after=sample(name="a" * 700_000))
            await add(one, "acme", Create("samples", f"{n}", large), Append(told))
        assert (await library.migrate(one, other, COLLECTIONS)).is_done
        await assert_equal(one, other)


async def test_a_source_without_a_collection_and_an_empty_source_are_moved_too(simple: tuple[Backend, Backend]) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await one.prepare([SHARED])
        report = await library.migrate(one, other, COLLECTIONS)
        assert (report.is_done, report.documents) == (True, 0)
        assert await held(other) == {}


# --- Whatever stops it ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What takes the process away in the middle: nothing catches it."""


class Stopping(FaultyStore):
    """A store that stops everything at its call number `at`: before it is made, or behind it, its answer lost."""

    def __init__(self, store: Store, counter: Callable[[], int], at: int, when: str) -> None:
        super().__init__(store)
        self._counter, self._at, self._when = counter, at, when

    async def _stop(self, answer: Callable[[], Awaitable[Any]]) -> Any:
        now = self._counter() == self._at
        if now and self._when == "before":
            raise Killed
        found = await answer()
        if now:
            raise Killed
        return found

    async def prepare(self, collections: Sequence[Collection], **options: Any) -> Any:
        return await self._stop(lambda: self.store.prepare(collections, **options))

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        return asyncio.ensure_future(self._stop(lambda: self.store.commit(batch)))


async def stopped_everywhere(
    simple: tuple[Backend, Backend],
    step: Callable[[Store, Store], Awaitable[Report]],
    begin: Callable[[Store, Store], Awaitable[None]],
    check: Callable[[Store, Store, Report], Awaitable[None]],
    every: int,
) -> int:
    """Run `step` on new stores, stopped at its first write, or one later; then again to its end each time."""
    for at in itertools.count(1, every):
        when = "before" if at % 2 else "after"
        where = [(backend, backend.new_url()) for backend in simple]
        async with opened(*where) as (one, other):
            await begin(one, other)
        stopped = True
        async with opened(*where) as (one, other):
            count = itertools.count(1).__next__
            try:
                await step(Stopping(one, count, at, when), Stopping(other, count, at, when))
                stopped = False
            except Killed:
                pass
            await asyncio.sleep(0)
        async with opened(*where) as (one, other):
            await check(one, other, await step(one, other))
        if not stopped:
            return at
    raise AssertionError("a count never ends")


EVERY = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
"""At how many of its writes a step is stopped: some (odd ones before they are made, even ones behind), or each."""


@EVERY
async def test_a_migration_stopped_at_any_write_resumes_and_moves_everything_once(
    simple: tuple[Backend, Backend], every: int
) -> None:
    async def begin(one: Store, other: Store) -> None:
        await filled(one, 4)

    async def check(one: Store, other: Store, report: Report) -> None:
        assert (report.is_done, report.equal) == (True, True)
        await assert_equal(one, other)

    writes = await stopped_everywhere(
        simple, lambda a, b: library.migrate(a, b, COLLECTIONS, SMALL), begin, check, every
    )
    assert writes > 15


@EVERY
async def test_a_rollback_stopped_at_any_write_resumes_and_restores_the_target(
    simple: tuple[Backend, Backend], tmp_path: Path, every: int
) -> None:
    numbers = itertools.count()
    before: dict[Any, Any] = {}

    async def begin(one: Store, other: Store) -> None:
        await filled(one, 4)
        await filled(other, 3, ["acme", "initech"])
        await add(other, None, Create("shared", "mine", shared("mine")))
        before.clear()
        before.update(await held(other))
        options = replace(SMALL, overwrite=True, backup=tmp_path / f"{next(numbers)}.gz")
        assert (await library.migrate(one, other, COLLECTIONS, options)).is_done
        await assert_equal(one, other, with_journal=False)

    async def check(one: Store, other: Store, report: Report) -> None:
        assert report.phase == Phase.ROLLED_BACK
        assert identical(await held(other), before)

    await stopped_everywhere(simple, lambda a, b: library.roll_back(a, b, COLLECTIONS, SMALL), begin, check, every)


@EVERY
async def test_a_migration_stopped_at_any_write_can_be_rolled_back_and_repeated(
    simple: tuple[Backend, Backend], tmp_path: Path, every: int
) -> None:
    numbers = itertools.count()
    before: dict[Any, Any] = {}

    async def begin(one: Store, other: Store) -> None:
        await filled(one, 3)
        await filled(other, 2, ["initech"])
        before.clear()
        before.update(await held(other))

    async def step(one: Store, other: Store) -> Report:
        if isinstance(other, Stopping):
            options = replace(SMALL, overwrite=True, backup=tmp_path / f"{next(numbers)}.gz")
            return await library.migrate(one, other, COLLECTIONS, options)
        try:
            return await library.roll_back(one, other, COLLECTIONS, SMALL)
        except NotFound:  # it was stopped before the target was touched
            return Report("", "", Phase.ROLLED_BACK)

    async def check(one: Store, other: Store, report: Report) -> None:
        assert report.phase == Phase.ROLLED_BACK
        await other.prepare(COLLECTIONS)
        assert identical(await held(other), before)
        options = replace(SMALL, overwrite=True, backup=tmp_path / f"{next(numbers)}.gz")
        assert (await library.migrate(one, other, COLLECTIONS, options)).equal
        assert identical(await held(other), await held(one))
        records = of_tenants(await journal(other))
        assert records["acme"] == of_tenants(await journal(one))["acme"], "records came twice, or not at all"

    await stopped_everywhere(simple, step, begin, check, every)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_commits_that_fail_or_lose_their_answer_are_applied_once(
    simple: tuple[Backend, Backend], when: Any
) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one, 9)
        faulty = FaultyStore(other)
        faulty.fault = lambda number, batch: (
            Fault(when, Unavailable("gone")) if number > 1 and number % 4 == 0 else None
        )
        try:
            report = await library.migrate(one, faulty, COLLECTIONS, SMALL)
        except Unavailable:  # a step that is not repeated by itself: the next call goes on
            faulty.fault = lambda number, batch: None
            report = await library.migrate(one, faulty, COLLECTIONS, SMALL)
        assert (report.is_done, report.equal) == (True, True)
        await assert_equal(one, other)


# --- What did not arrive is named -------------------------------------------------------------------------------


class Tampering(FaultyStore):
    """A store that keeps something else than it was given."""

    def __init__(self, store: Store, change: Callable[[Operation], Operation | None]) -> None:
        super().__init__(store)
        self._change = change

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        operations = (self._change(operation) for operation in batch.operations)
        return self.store.commit(structs.replace(batch, operations=tuple(o for o in operations if o is not None)))


def at_i3(change: Callable[[Create], Operation | None]) -> Callable[[Operation], Operation | None]:
    def changed(operation: Operation) -> Operation | None:
        hit = isinstance(operation, Create) and operation.id == "i3" and operation.document["label"] == "acme 3"
        return change(operation) if hit else operation  # type: ignore[arg-type]

    return changed


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda create: None, "missing in the target"),
        (lambda create: structs.replace(create, id="i3x"), "only in the target"),
        (lambda create: structs.replace(create, document={**create.document, "used": 4}), "different"),
        (lambda create: structs.replace(create, created_at=create.updated_at.replace(year=2000)), "different"),
    ],
    ids=["lost", "renamed", "changed", "time"],
)
async def test_a_target_document_that_differs_is_found_and_named(
    simple: tuple[Backend, Backend], change: Any, kind: str
) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        report = await library.migrate(one, Tampering(other, at_i3(change)), COLLECTIONS, SMALL)
        assert not report.equal
        assert not report.is_done
        (wrong,) = [part for part in report.parts if not part.equal]
        assert (wrong.collection, wrong.tenant) == ("items", "acme")
        assert kind in {str(one.kind) for one in wrong.differences}
        assert {one.id for one in wrong.differences} <= {"i3", "i3x"}


async def test_a_journal_record_that_differs_is_found(simple: tuple[Backend, Backend]) -> None:
    def change(operation: Operation) -> Operation:
        if isinstance(operation, Append) and operation.record.id == "acme-2":
            return Append(structs.replace(operation.record, actor="user:eve"))
        return operation

    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        report = await library.migrate(one, Tampering(other, change), COLLECTIONS, SMALL)
        assert not report.equal
        assert all(part.equal for part in report.parts)


@given(documents, documents, st.lists(st.integers(0, 2**256 - 1), max_size=8))
def test_checksums_distinguish_documents_and_ignore_their_order(one: Any, other: Any, digests: list[int]) -> None:
    canonical = Canonical(SAMPLES)
    system = {"id": "a", "version": 1, "created_at": moment(), "updated_at": moment()}
    equal = identical(one, other)
    assert (canonical.of({**system, **one}) == canonical.of({**system, "version": 2, **other})) == equal
    there, back = SetSum(), SetSum()
    for digest in digests:
        there.add(digest)
    for digest in reversed(digests):
        back.add(digest)
    assert there == back == SetSum.of(there.count, there.text)
    if digests:
        back.add(digests[0])
        back.add(digests[0])
        assert back != there, "twice is not nothing"


def moment() -> datetime:
    return datetime.fromisoformat("2025-06-15T12:30:00Z")


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), ("1", 1), (b"1", "1"), ({"a": {}}, {"a": []}), ({"a": None}, {}), ("1.5", "decimal")],
)
def test_equal_values_of_different_types_have_different_checksums(one: Any, other: Any) -> None:
    from decimal import Decimal

    other = Decimal("1.5") if other == "decimal" else other
    canonical = Canonical(SAMPLES)
    system = {"id": "a", "version": 1, "created_at": moment(), "updated_at": moment()}
    assert canonical.of({**system, **sample(tags=[one])}) != canonical.of({**system, **sample(tags=[other])})
    assert canonical.of({**system, **sample(extra={"x": one})}) != canonical.of(
        {**system, **sample(extra={"x": other})}
    )


# --- Obstacles ----------------------------------------------------------------------------------------------------


async def test_a_plan_counts_and_writes_nothing(pair: tuple[Backend, Backend]) -> None:
    source, target = pair
    async with opened((source, source.new_url()), (target, target.new_url())) as (one, other):
        await filled(one)
        end = (await one.changes("end")).cursor
        plan = await library.plan(one, other, COLLECTIONS)
        assert plan.problems == ()
        assert (plan.documents, plan.records) == (21, 14)
        assert {str(change) for change in plan.schema} >= {"create collection items", "create collection shared"}
        assert [(p.collection, p.tenant, p.documents) for p in plan.parts] == [
            ("items", "acme", 7), ("items", "globex", 7), ("shared", None, 7),
        ]  # fmt: skip
        assert (await one.changes("end")).cursor == end
        assert {c.collection for c in await other.prepare(COLLECTIONS, mode="plan")} == {"samples", "items", "shared"}


async def refused(one: Store, other: Store, options: Options = SMALL) -> list[tuple[str, str]]:
    """The problems that a plan and the migration itself name alike."""
    plan = await library.plan(one, other, COLLECTIONS, options)
    with pytest.raises(InvalidInput) as caught:
        await library.migrate(one, other, COLLECTIONS, options)
    assert {p.path for p in plan.problems} == {p.path for p in caught.value.problems}
    return [(p.path, p.message) for p in caught.value.problems]


async def test_a_target_that_is_not_empty_is_refused_and_left_unchanged(pair: tuple[Backend, Backend]) -> None:
    source, target = pair
    async with opened((source, source.new_url()), (target, target.new_url())) as (one, other):
        await filled(one)
        await filled(other, 2, ["initech"])
        before = await held(other)
        ((path, message),) = await refused(one, other)
        assert path == "--to"
        assert "2 in items" in message
        assert "2 in shared" in message
        assert "--overwrite" in message
        await other.prepare(COLLECTIONS)
        assert identical(await held(other), before)


async def test_a_target_with_journal_records_of_its_own_is_refused(simple: tuple[Backend, Backend]) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        await other.prepare(COLLECTIONS)
        await add(other, "acme", Append(record()))
        ((path, message),) = await refused(one, other)
        assert (path, "journal" in message) == ("--to", True)


async def test_a_source_with_another_schema_is_refused_and_left_unchanged(simple: tuple[Backend, Backend]) -> None:
    older = replace(ITEMS, fields={n: f for n, f in ITEMS.fields.items() if n != "place"}, indexes=())
    source, target = ((backend, backend.new_url()) for backend in simple)
    async with opened(source) as (one,):
        await one.prepare([older, SHARED])
        await add(one, "acme", Append(record()))
    async with opened(source, target) as (one, other):  # nothing was prepared here, as in a new process
        ((path, message),) = await refused(one, other)
        assert path == "--from"
        assert "add field items.place" in message
        assert [c.collection for c in await one.prepare([older, SHARED], mode="plan")] == []


async def test_undeclared_collections_are_refused_unless_ignored(simple: tuple[Backend, Backend]) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        declared = [SHARED]
        plan = await library.plan(one, other, declared)
        assert "items" in plan.problems[0].message
        with pytest.raises(InvalidInput, match="items, which no module declares"):
            await library.migrate(one, other, declared)
        report = await library.migrate(one, other, declared, Options(ignore=("items",)))
        assert [part.collection for part in report.parts] == ["shared"]
        assert of_tenants(await journal(other)) == of_tenants(await journal(one)), "what happened stays in the journal"


async def test_the_same_store_under_another_name_is_refused(backends: Callable[[str], Backend], tmp_path: Path) -> None:
    backend = backends("sqlite")
    url = backend.new_url()
    async with opened((backend, url), (backend, url)) as (one, other):
        await filled(one)
        before = await held(one)
        options = Options(overwrite=True, backup=tmp_path / "backup.gz")
        with pytest.raises(InvalidInput, match="is the source itself"):
            await library.migrate(one, other, COLLECTIONS, options)
        await one.prepare(COLLECTIONS)
        assert identical(await held(one), before)


async def test_an_unfinished_migration_from_elsewhere_is_refused(simple: tuple[Backend, Backend]) -> None:
    where = [(b, b.new_url()) for b in (*simple, simple[0])]
    async with opened(*where) as (one, other, third):
        await filled(one)
        await filled(third)
        count = itertools.count(1).__next__
        with pytest.raises(Killed):
            await library.migrate(one, Stopping(other, count, 6, "after"), COLLECTIONS, replace(SMALL, source="one"))
        problems = await refused(third, other, replace(SMALL, source="third"))
        assert "a migration from one into it is" in problems[0][1]


async def test_every_invalid_option_is_named_at_once(simple: tuple[Backend, Backend]) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, _):
        with pytest.raises(InvalidInput) as caught:
            await library.migrate(one, one, COLLECTIONS, Options(batch=1, switch=True, backup=Path("x")))
        assert [p.path for p in caught.value.problems] == ["--batch", "--switch", "--backup", "--to"]


# --- Backup and rollback ----------------------------------------------------------------------------------------


async def test_overwriting_backs_up_first_and_a_rollback_restores_exactly(
    pair: tuple[Backend, Backend], tmp_path: Path
) -> None:
    source, target = pair
    backup = tmp_path / "backup.gz"
    async with opened((source, source.new_url()), (target, target.new_url())) as (one, other):
        await filled(one)
        await other.prepare(COLLECTIONS)
        await put_whole(other, [(HOSTILE_NAMES[0], {"x": (sample(extra={"$": b"1"}), moment(), moment())})])
        before = await held(other)
        report = await library.migrate(one, other, COLLECTIONS, replace(SMALL, overwrite=True, backup=backup))
        assert (report.is_done, report.equal, report.backup) == (True, True, str(backup))
        assert backup.stat().st_mode & 0o077 == 0
        assert identical(await held(other), await held(one))
        undone = await library.roll_back(one, other, COLLECTIONS, SMALL)
        assert undone.phase == Phase.ROLLED_BACK
        assert identical(await held(other), before)
        again = await library.roll_back(one, other, COLLECTIONS, SMALL)
        assert "already" in again.notes[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "emptied"])
async def test_a_damaged_backup_is_named_and_nothing_is_removed(
    simple: tuple[Backend, Backend], tmp_path: Path, damage: str
) -> None:
    backup = tmp_path / "backup.gz"
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        await filled(other, 3, ["initech"])
        await library.migrate(one, other, COLLECTIONS, replace(SMALL, overwrite=True, backup=backup))
        data = bytearray(backup.read_bytes())
        if damage == "gone":
            backup.unlink()
        else:
            data[len(data) // 2] ^= 0x10
            backup.write_bytes(data if damage == "flipped" else data[:-9] if damage == "cut" else b"")
        with pytest.raises(StoreError, match=r"backup\.gz"):
            await library.roll_back(one, other, COLLECTIONS, SMALL)
        assert identical(await held(other), await held(one))


async def test_a_backup_is_never_overwritten(simple: tuple[Backend, Backend], tmp_path: Path) -> None:
    backup = tmp_path / "backup.gz"
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        await filled(other, 3, ["initech"])
        options = replace(SMALL, overwrite=True, backup=backup)
        await library.migrate(one, other, COLLECTIONS, options)
        kept = backup.read_bytes()
        with pytest.raises(Conflict, match="name a new file"):
            await library.migrate(one, other, COLLECTIONS, options)
        assert backup.read_bytes() == kept


async def test_a_target_that_was_written_to_is_not_rolled_back(simple: tuple[Backend, Backend]) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        await library.migrate(one, other, COLLECTIONS, SMALL)
        await add(other, "acme", Delete("items", "i1"))
        with pytest.raises(Conflict, match="the other way round"):
            await library.roll_back(one, other, COLLECTIONS, SMALL)
        assert len(await other.find("items", "acme", Query())) == 6
        with pytest.raises(InvalidInput, match="the migration into the target is from"):
            await library.roll_back(one, other, COLLECTIONS, replace(SMALL, source="elsewhere"))


async def test_migrating_there_and_back_gives_the_original_store(
    simple: tuple[Backend, Backend], tmp_path: Path
) -> None:
    async with opened(*((b, b.new_url()) for b in simple)) as (one, other):
        await filled(one)
        before = await held(one)
        await library.migrate(one, other, COLLECTIONS, Options(source="a", target="b"))
        await add(other, "acme", Create("items", "new", item("new")))
        options = Options(source="b", target="a", overwrite=True, backup=tmp_path / "backup.gz")
        assert (await library.migrate(other, one, COLLECTIONS, options)).equal
        before["items", "acme"]["new"] = (await held(other))["items", "acme"]["new"]
        assert identical(await held(one), before)


def test_parts_of_two_tenants_have_different_ids() -> None:
    parts = [
        *(Part(ITEMS, tenant) for tenant in {*HOSTILE_NAMES, "", "None", "True"}),
        Part(ITEMS, None),
        Part(SHARED, None),
    ]
    assert len({part.id for part in parts}) == len(parts)
