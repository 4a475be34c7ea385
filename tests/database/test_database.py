"""The write trip: validated, authorised, and committed with its journal records or not at all; and the reads."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import pytest
import time_machine
from pydantic import Field, model_validator

from strongroom import (
    Aggregate,
    Context,
    Counter,
    Database,
    Entity,
    Index,
    Indexed,
    Query,
    Registry,
    Secret,
    Where,
)
from strongroom.context import system_context
from strongroom.database.idempotency import Idempotency, IdempotentCall, Replayed
from strongroom.database.transaction import Transaction
from strongroom.errors import (
    AlreadyExists,
    BoundExceeded,
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    TooLarge,
    Unavailable,
)
from strongroom.rules import Decision, Request, default_policy
from strongroom.storage import open_store
from strongroom.storage.port import MAX_OPERATIONS, Record
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import STORES, new_url

MOMENT = datetime(2026, 5, 5, 12, tzinfo=UTC)


class Account(Entity, collection="accounts", indexes=[Index("owner")]):
    owner: str
    balance: int = 0
    token: Annotated[str | None, Secret()] = None
    code: Annotated[str | None, Indexed(unique=True)] = None
    used: Annotated[int, Counter()] = 0
    tags: list[str] = []


class Strict(Entity, collection="stricts"):
    low: int = Field(ge=0)
    high: int = Field(le=100)
    name: str = Field(min_length=2)

    @model_validator(mode="after")
    def _ordered(self) -> Strict:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Session(Entity, collection="sessions", ttl="until"):
    user: str
    until: datetime | None = None


class Setting(Entity, collection="settings", scope="global"):
    value: str


class Log(Entity, collection="logs"):
    items: list[int] = []


ENTITIES = (Account, Strict, Session, Setting, Log, IdempotentCall)
ACME = Context("acme", "user:ada", {}, "request-1", now_us=time.time_ns() // 1_000)
BETA = Context("beta", "user:bob", {})
ADMIN = system_context("acme")


@asynccontextmanager
async def opened_database(
    kind: str, folder: Path, policy: Any = default_policy
) -> AsyncIterator[tuple[Database, FaultyStore]]:
    store = FaultyStore(await open_store(new_url(kind, folder)))
    registry = Registry(ENTITIES)
    await store.prepare(registry.collections)
    try:
        yield Database(store, registry, policy), store
    finally:
        await store.close()


@pytest.fixture(params=STORES)
async def both(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Database, FaultyStore]]:
    async with opened_database(request.param, tmp_path) as both:
        yield both


@pytest.fixture
def database(both: tuple[Database, FaultyStore]) -> Database:
    return both[0]


@pytest.fixture
def store(both: tuple[Database, FaultyStore]) -> FaultyStore:
    return both[1]


async def journal(store: FaultyStore, tenant: str | None = None) -> list[Record]:
    return list((await store.changes(None, tenant=tenant)).records)


def failing_once(store: FaultyStore, when: Any, error: Exception) -> None:
    first = len(store.batches)
    store.fault = lambda number, batch: Fault(when, error) if number == first else None


# --- One change -----------------------------------------------------------------------------------------------


async def test_a_document_is_created_read_updated_replaced_and_deleted(database: Database) -> None:
    made = await database.create(ACME, Account(owner="ada", balance=5))
    assert made.id
    assert made.version > 0
    assert made.created_at == made.updated_at == ACME.now
    assert await database.get(ACME, Account, made.id) == made
    later = Context("acme", "user:ada", {}, now_us=ACME.now_us + 5_000_000)
    updated = await database.update(later, Account, made.id, {"balance": 6})
    assert (updated.owner, updated.balance) == ("ada", 6)
    assert updated.version > made.version
    assert (updated.created_at, updated.updated_at) == (made.created_at, later.now)
    assert await database.get(ACME, Account, made.id) == updated
    replaced = await database.replace(later, Account(id=made.id, owner="bob"))
    assert (replaced.balance, replaced.created_at) == (0, made.created_at)
    assert await database.get(ACME, Account, made.id) == replaced
    await database.delete(ACME, Account, made.id)
    assert await database.get_or_none(ACME, Account, made.id) is None
    with pytest.raises(NotFound):
        await database.get(ACME, Account, made.id)


async def test_every_validation_error_is_reported_at_once_and_nothing_is_written(
    database: Database, store: FaultyStore
) -> None:
    with pytest.raises(InvalidInput) as caught:
        Strict.parse({"low": -1, "high": 101, "name": "x", "other": 1})
    assert {problem.path for problem in caught.value.problems} == {"low", "high", "name", "other"}
    made = await database.create(ACME, Strict(low=1, high=50, name="ok"))
    before = len(store.batches)
    with pytest.raises(InvalidInput) as caught:
        await database.update(
            ACME, Strict, made.id, {"low": -1, "high": 101, "name": "x", "other": 1, "version": 7, "id": "new"}
        )
    assert {problem.path for problem in caught.value.problems} == {"low", "high", "name", "other", "version", "id"}
    with pytest.raises(InvalidInput, match="low is above high"):  # a rule across fields holds for a partial update
        await database.update(ACME, Strict, made.id, {"high": 0})
    with pytest.raises(InvalidInput) as caught:
        await database.create(ACME, Account(owner="a\x00", tags=["\ud800"], code="x" * 2_000_000))
    assert {problem.path for problem in caught.value.problems} == {"owner", "tags.0", "code"}
    assert len(store.batches) == before
    assert await database.get(ACME, Strict, made.id) == made


@pytest.mark.parametrize("id", ["\x00", "a\x00b", "\ud800", "x" * 513])
async def test_an_id_that_no_engine_can_hold_is_refused_everywhere(database: Database, id: str) -> None:
    with pytest.raises(InvalidInput):
        await database.get(ACME, Account, id)
    with pytest.raises(InvalidInput):
        await database.get_or_none(ACME, Account, id)
    with pytest.raises(InvalidInput):
        await database.update(ACME, Account, id, {"balance": 1})
    with pytest.raises(InvalidInput):
        await database.delete(ACME, Account, id)
    with pytest.raises(InvalidInput):
        await database.create(ACME, Account(id=id, owner="ada"))
    with pytest.raises(InvalidInput):
        await database.add(ACME, Account, id, "used", 1)


async def test_a_taken_id_and_a_taken_unique_value_are_refused(database: Database) -> None:
    await database.create(ACME, Account(id="a", owner="ada", code="c"))
    for other in (Account(id="a", owner="x"), Account(id="b", owner="x", code="c")):
        with pytest.raises(AlreadyExists):
            await database.create(ACME, other)
    await database.create(BETA, Account(id="a", owner="bob", code="c"))  # unique is per tenant
    with pytest.raises(AlreadyExists):
        await database.update(ACME, Account, (await database.create(ACME, Account(owner="y"))).id, {"code": "c"})


async def test_a_write_with_an_outdated_expected_version_is_refused(database: Database) -> None:
    made = await database.create(ACME, Account(id="a", owner="ada"))
    newer = await database.update(ACME, Account, "a", {"balance": 1}, expected=made.version)
    for call in (
        database.update(ACME, Account, "a", {"balance": 2}, expected=made.version),
        database.replace(ACME, Account(id="a", owner="x"), expected=made.version),
        database.replace(ACME, Account(id="a", owner="x"), expected=0),
        database.delete(ACME, Account, "a", expected=made.version),
        database.replace(ACME, Account(id="new", owner="x"), expected=5),
    ):
        with pytest.raises(Conflict):
            await call
    assert await database.get(ACME, Account, "a") == newer
    await database.replace(ACME, Account(id="new", owner="x"), expected=0)
    await database.delete(ACME, Account, "a", expected=newer.version)


async def test_an_expected_version_that_changes_before_the_commit_raises_conflict(
    database: Database, store: FaultyStore
) -> None:
    made = await database.create(ACME, Account(id="a", owner="ada"))

    async def overtake(method: str, collection: str) -> None:
        store.after_read = None
        await database.update(ACME, Account, "a", {"balance": 7})

    store.after_read = overtake
    with pytest.raises(Conflict):
        await database.update(ACME, Account, "a", {"balance": 1}, expected=made.version)
    assert (await database.get(ACME, Account, "a")).balance == 7


async def test_without_an_expected_version_an_update_applies_to_the_current_document(
    database: Database, store: FaultyStore
) -> None:
    await database.create(ACME, Account(id="a", owner="ada"))

    async def overtake(method: str, collection: str) -> None:
        store.after_read = None
        await database.update(ACME, Account, "a", {"owner": "bob"})

    store.after_read = overtake
    updated = await database.update(ACME, Account, "a", {"balance": 1})
    assert (updated.owner, updated.balance) == ("bob", 1)


async def test_parallel_updates_lose_no_update(database: Database) -> None:
    await database.create(ACME, Account(id="a", owner="ada"))

    async def increment(tx: Transaction) -> None:
        account = await tx.get(Account, "a")
        await tx.update(Account, "a", {"balance": account.balance + 1})

    await asyncio.gather(*(database.transaction(ACME, increment) for _ in range(8)))
    assert (await database.get(ACME, Account, "a")).balance == 8


async def test_a_conflict_that_persists_is_raised(database: Database, store: FaultyStore) -> None:
    await database.create(ACME, Account(id="a", owner="ada"))
    before = len(store.batches)
    store.fault = lambda number, batch: Fault("before", Conflict("always", operation=0))
    with pytest.raises(Conflict):
        await database.update(ACME, Account, "a", {"balance": 1})
    assert 5 <= len(store.batches) - before <= 20


# --- Counters -------------------------------------------------------------------------------------------------


async def test_counters_are_added_without_reading_and_within_bounds(database: Database, store: FaultyStore) -> None:
    await database.create(ACME, Account(id="a", owner="ada"))
    reads = len(store.reads)
    answers = await asyncio.gather(
        *(database.add(ACME, Account, "a", "used", 3, at_most=10) for _ in range(5)), return_exceptions=True
    )
    assert len(store.reads) == reads
    assert [type(a) for a in answers].count(BoundExceeded) == 2
    assert (await database.get(ACME, Account, "a")).used == 9
    await database.add(ACME, Account, "a", "used", -9, at_least=0)
    with pytest.raises(BoundExceeded):
        await database.add(ACME, Account, "a", "used", -1, at_least=0)
    with pytest.raises(NotFound):
        await database.add(ACME, Account, "none", "used", 1)
    for field_name, amount in (("balance", 1), ("none", 1), ("used", True), ("used", 2**63), ("used", 1.5)):
        with pytest.raises(InvalidInput):
            await database.add(ACME, Account, "a", field_name, amount)  # type: ignore[arg-type]


async def test_a_counter_that_was_read_is_checked_when_it_is_added_to(database: Database, store: FaultyStore) -> None:
    await database.create(ACME, Account(id="a", owner="ada", balance=10))
    runs = 0

    async def spend(tx: Transaction) -> None:
        nonlocal runs
        runs += 1
        account = await tx.get(Account, "a")
        if account.used < account.balance:
            tx.add(Account, "a", "used", account.balance)

    await asyncio.gather(*(database.transaction(ACME, spend) for _ in range(4)))
    assert (await database.get(ACME, Account, "a")).used == 10
    assert runs > 4


@pytest.mark.parametrize("first", ["add", "update"])
async def test_add_and_another_change_of_one_document_are_refused(database: Database, first: str) -> None:
    await database.create(ACME, Account(id="a", owner="ada"))

    async def body(tx: Transaction) -> None:
        if first == "add":
            tx.add(Account, "a", "used", 1)
        await tx.update(Account, "a", {"balance": 1})
        if first == "update":
            tx.add(Account, "a", "used", 1)

    with pytest.raises(InvalidInput, match="cannot share a transaction"):
        await database.transaction(ACME, body)


# --- Transactions ---------------------------------------------------------------------------------------------


async def test_a_transaction_reads_its_own_writes(database: Database) -> None:
    await database.create(ACME, Account(id="old", owner="ada"))

    async def body(tx: Transaction) -> Account:
        made = await tx.create(Account(id="new", owner="eve"))
        assert (await tx.get(Account, "new")).owner == "eve"
        await tx.update(Account, "new", {"balance": 3})
        updated = await tx.update(Account, "new", {"tags": ["x"]})
        assert (updated.balance, updated.owner) == (3, "eve")
        await tx.delete(Account, "old")
        assert await tx.get_or_none(Account, "old") is None
        with pytest.raises(NotFound):
            await tx.update(Account, "old", {"balance": 1})
        assert made.version == 0  # nothing is committed yet
        return updated

    answer = await database.transaction(ACME, body)
    stored = await database.get(ACME, Account, "new")
    assert (stored.balance, stored.tags) == (3, ["x"])
    assert answer == stored  # the times and the version of the commit included
    assert await database.get_or_none(ACME, Account, "old") is None


async def test_a_document_deleted_and_created_in_one_transaction_has_a_newer_version(database: Database) -> None:
    first = await database.create(ACME, Account(id="a", owner="ada"))

    async def body(tx: Transaction) -> Account:
        await tx.delete(Account, "a")
        return await tx.create(Account(id="a", owner="eve"))

    again = await database.transaction(ACME, body)
    assert again.version > first.version
    assert await database.get(ACME, Account, "a") == again


async def test_all_of_a_transaction_commits_or_nothing(database: Database, store: FaultyStore) -> None:
    await database.create(ACME, Account(id="a", owner="ada", used=5))
    records = len(await journal(store))

    async def body(tx: Transaction) -> None:
        await tx.create(Account(id="b", owner="bob"))
        await tx.update(Account, "a", {"balance": 1})
        tx.add(Account, "c", "used", 1)  # there is no c

    with pytest.raises(NotFound):
        await database.transaction(ACME, body)
    assert await database.get_or_none(ACME, Account, "b") is None
    assert (await database.get(ACME, Account, "a")).balance == 0
    assert len(await journal(store)) == records


async def test_an_exception_in_the_body_writes_nothing(database: Database, store: FaultyStore) -> None:
    before = len(store.batches)

    async def body(tx: Transaction) -> None:
        await tx.create(Account(owner="bob"))
        raise RuntimeError("changed my mind")

    with pytest.raises(RuntimeError, match="changed my mind"):
        await database.transaction(ACME, body)
    assert len(store.batches) == before


async def test_too_many_changes_are_refused_and_nothing_is_written(database: Database) -> None:
    async def body(tx: Transaction) -> None:
        for _ in range(MAX_OPERATIONS):
            await tx.create(Account(owner="bob"))

    with pytest.raises(TooLarge):
        await database.transaction(ACME, body)
    assert (await database.aggregate(ACME, Account, Aggregate("count")))["count"] == 0


async def test_documents_that_were_only_read_are_checked_so_write_skew_cannot_happen(database: Database) -> None:
    """Two doctors on call, each may leave if the other stays."""
    for id in ("ada", "bob"):
        await database.create(ACME, Account(id=id, owner=id, balance=1))

    def leave(me: str, other: str) -> Any:
        async def body(tx: Transaction) -> bool:
            if (await tx.get(Account, other)).balance == 0:
                return False
            await asyncio.sleep(0)
            await tx.update(Account, me, {"balance": 0})
            return True

        return database.transaction(ACME, body)

    assert sorted(await asyncio.gather(leave("ada", "bob"), leave("bob", "ada"))) == [False, True]


async def test_documents_that_find_returned_are_checked_at_the_commit(database: Database) -> None:
    for id in ("ada", "bob"):
        await database.create(ACME, Account(id=id, owner="team", balance=1))

    def leave(me: str) -> Any:
        async def body(tx: Transaction) -> bool:
            page = await tx.find(Account, Query(Where("owner", "==", "team")))
            if sum(account.balance for account in page.items) < 2:
                return False
            await tx.update(Account, me, {"balance": 0})
            return True

        return database.transaction(ACME, body)

    assert sorted(await asyncio.gather(leave("ada"), leave("bob"))) == [False, True]


async def test_a_document_that_was_read_as_missing_must_still_be_missing_at_the_commit(
    database: Database, store: FaultyStore
) -> None:
    async def body(tx: Transaction) -> str:
        if await tx.get_or_none(Account, "flag") is not None:
            return "found"
        if not runs:
            runs.append(1)
            await database.create(ACME, Account(id="flag", owner="x"))
        await tx.create(Account(id="other", owner="y"))
        return "made"

    runs: list[int] = []
    assert await database.transaction(ACME, body) == "found"
    assert await database.get_or_none(ACME, Account, "other") is None


async def test_concurrent_get_or_create_creates_one_document(database: Database) -> None:
    async def body(tx: Transaction) -> str:
        found = await tx.get_or_none(Account, "one")
        if found is None:
            return (await tx.create(Account(id="one", owner="x"))).id
        return found.id

    assert await asyncio.gather(*(database.transaction(ACME, body) for _ in range(10))) == ["one"] * 10


async def test_a_taken_unique_value_is_reported_without_retries(database: Database, store: FaultyStore) -> None:
    await database.create(ACME, Account(id="a", owner="ada", code="c"))
    runs = 0

    async def body(tx: Transaction) -> None:
        nonlocal runs
        runs += 1
        assert await tx.get_or_none(Account, "b") is None
        await tx.create(Account(id="b", owner="bob", code="c"))

    with pytest.raises(AlreadyExists):
        await database.transaction(ACME, body)
    assert runs == 1


async def test_a_read_only_transaction_retries_when_its_reads_changed(database: Database) -> None:
    await database.create(ACME, Account(id="a", owner="x", balance=1))
    await database.create(ACME, Account(id="b", owner="x", balance=1))
    runs = 0

    async def both(tx: Transaction) -> int:
        nonlocal runs
        runs += 1
        first = (await tx.get(Account, "a")).balance
        if runs == 1:
            for id in ("a", "b"):
                await database.update(ACME, Account, id, {"balance": 5})
        return first + (await tx.get(Account, "b")).balance

    assert await database.transaction(ACME, both) == 10
    assert runs == 2


@dataclass
class History:
    """What each committed transaction read and appended: the list-append check of isolation."""

    committed: list[tuple[int, dict[str, list[int]], list[str]]] = field(default_factory=list)


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("seed", range(3))
async def test_transactions_are_serializable_by_list_append(kind: str, seed: int, tmp_path: Path) -> None:
    """Each transaction reads some lists and appends its number to some; afterwards the final lists say the order.

    Every read must be a prefix of the final list, and the order that reads and appends imply (who came before whom)
    must have no circle.
    """
    chance = random.Random(seed)
    keys = [f"list{n}" for n in range(4)]
    history = History()
    async with opened_database(kind, tmp_path) as (database, _):
        for key in keys:
            await database.create(ACME, Log(id=key))

        async def run(number: int) -> None:
            reading = chance.sample(keys, chance.randint(1, 3))
            appending = chance.sample(reading, chance.randint(0, len(reading)))

            async def body(tx: Transaction) -> dict[str, list[int]]:
                seen = {}
                for key in reading:
                    seen[key] = list((await tx.get(Log, key)).items)
                    await asyncio.sleep(0)
                for key in appending:
                    await tx.update(Log, key, {"items": [*seen[key], number]})
                return seen

            try:
                history.committed.append((number, await database.transaction(ACME, body), appending))
            except Conflict:
                return  # it gave up: then nothing of it may be there

        for start in range(0, 60, 6):
            await asyncio.gather(*(run(number) for number in range(start, start + 6)))
        final = {key: (await database.get(ACME, Log, key)).items for key in keys}
    assert len(history.committed) > 40
    before: dict[int, set[int]] = {number: set() for number, _, _ in history.committed}
    for number, seen, appended in history.committed:
        for key, items in seen.items():
            assert final[key][: len(items)] == items, "a read that is no prefix"
            before[number].update(items)
            for later in final[key][len(items) :]:
                if later != number:
                    before[later].add(number)
        for key in keys:
            assert final[key].count(number) == (key in appended), "lost, or there twice"
    done: set[int] = set()
    while len(done) < len(before):
        ready = {number for number, needed in before.items() if number not in done and needed <= done}
        assert ready, "a circle: no serial order explains what was read"
        done |= ready


# --- Idempotency ----------------------------------------------------------------------------------------------


async def test_an_idempotent_retry_of_a_create_returns_the_first_answer(database: Database, store: FaultyStore) -> None:
    first = await database.create(ACME, Account(owner="ada"), idempotency_key="i")
    again = await database.create(ACME, Account(owner="ada"), idempotency_key="i")
    assert again == first
    assert len(await journal(store)) == 1
    with pytest.raises(Conflict, match="different request"):
        await database.create(ACME, Account(owner="eve"), idempotency_key="i")
    # The key is the caller's own: another actor's, another tenant's is another.
    for context in (Context("acme", "user:eve"), BETA):
        assert (await database.create(context, Account(owner="ada"), idempotency_key="i")).id != first.id


async def test_concurrent_idempotent_retries_create_one_document(database: Database) -> None:
    made = await asyncio.gather(*(database.create(ACME, Account(owner="ada"), idempotency_key="i") for _ in range(10)))
    assert len({account.id for account in made}) == 1
    made = await asyncio.gather(
        *(database.create(ACME, Account(id="chosen", owner="ada"), idempotency_key="j") for _ in range(10))
    )
    assert {account.id for account in made} == {"chosen"}
    assert (await database.aggregate(ACME, Account, Aggregate("count")))["count"] == 2


async def test_an_idempotent_retry_after_a_lost_answer_has_no_second_effect(
    database: Database, store: FaultyStore
) -> None:
    await database.create(ACME, Account(id="a", owner="ada"))
    failing_once(store, "after", Unavailable("the answer was lost"))
    with pytest.raises(Unavailable):
        await database.add(ACME, Account, "a", "used", 5, idempotency_key="i")
    await database.add(ACME, Account, "a", "used", 5, idempotency_key="i")
    assert (await database.get(ACME, Account, "a")).used == 5


async def test_every_idempotent_retry_answers_as_the_first_call_did(database: Database) -> None:
    made = await database.create(ACME, Account(id="a", owner="ada"))

    async def update() -> Account:
        return await database.update(ACME, Account, "a", {"balance": 2}, expected=made.version, idempotency_key="u")

    updated = await update()
    assert await update() == updated

    async def replace() -> Account:
        new = Account(id="a", owner="bob")
        return await database.replace(ACME, new, expected=updated.version, idempotency_key="r")

    replaced = await replace()
    assert await replace() == replaced
    for _ in range(2):
        await database.replace(ACME, Account(id="b", owner="new"), expected=0, idempotency_key="replace b")
    for _ in range(2):
        await database.create(ACME, Account(id="c", owner="new"), idempotency_key="create c")
    for _ in range(2):
        await database.delete(ACME, Account, "a", expected=replaced.version, idempotency_key="delete")
    assert await database.get_or_none(ACME, Account, "a") is None


async def test_a_failed_call_leaves_its_idempotency_key_unused(database: Database, store: FaultyStore) -> None:
    with pytest.raises(NotFound):
        await database.update(ACME, Account, "a", {"balance": 2}, idempotency_key="i")
    failing_once(store, "before", Unavailable("gone"))
    with pytest.raises(Unavailable):
        await database.create(ACME, Account(id="a", owner="ada"), idempotency_key="j")
    await database.create(ACME, Account(id="a", owner="ada"), idempotency_key="j")
    await database.update(ACME, Account, "a", {"balance": 2}, idempotency_key="i")


async def test_an_idempotency_key_is_forgotten_after_a_day(database: Database) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        await database.create(Context("acme"), Account(id="a", owner="ada"))
        for used, shift in ((1, 86_399), (1, 1), (2, 0), (2, 0)):
            await database.add(Context("acme"), Account, "a", "used", 1, idempotency_key="i")
            assert (await database.get(Context("acme"), Account, "a")).used == used
            clock.shift(shift)


@pytest.mark.parametrize("key", ["", "x" * 256, "a\x00", "\ud800"])
async def test_an_impossible_idempotency_key_is_refused(database: Database, key: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        await database.create(ACME, Account(owner="ada"), idempotency_key=key)
    assert caught.value.problems[0].path == "idempotency_key"


async def test_a_replayed_call_carries_its_ids_and_memo(database: Database) -> None:
    async def body(tx: Transaction) -> None:
        await tx.create(Account(id="a", owner="x"))
        await tx.create(Account(id="b", owner="x"))

    await database.transaction(ACME, body, idempotency=Idempotency("i", "both", b"memo"))
    with pytest.raises(Replayed) as caught:
        await database.transaction(ACME, body, idempotency=Idempotency("i", "both", b"other"))
    assert caught.value.written == ["a", "b"]
    assert caught.value.memo == b"memo"


# --- Time to live ---------------------------------------------------------------------------------------------


async def test_an_expired_document_is_hidden_at_once_and_purged_later(database: Database, store: FaultyStore) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        context = Context("acme")
        end = MOMENT + timedelta(seconds=10)
        for id, until in (("dies", end), ("lives", end + timedelta(microseconds=1)), ("stays", None)):
            await database.create(context, Session(id=id, user="u", until=until))
        clock.shift(10)
        context = Context("acme")
        found = await database.find(context, Session, Query(Where("user", "==", "u")))
        assert [session.id for session in found.items] == ["lives", "stays"]
        assert (await database.aggregate(context, Session, Aggregate("count")))["count"] == 2
        assert await database.get_or_none(context, Session, "dies") is None
        for call in (
            database.update(context, Session, "dies", {"user": "v"}),
            database.delete(context, Session, "dies"),
        ):
            with pytest.raises(NotFound):
                await call
        assert await database.purge_expired(context, Session) == 1
        assert await database.purge_expired(context, Session) == 0
        assert await database.purge_expired(context, Account) == 0
        assert await store.get("sessions", "acme", "dies") is None
        last = (await journal(store))[-1]
        assert (last.action, last.entity_id, last.before and last.before["user"]) == ("expire", "dies", "u")


@pytest.mark.parametrize("how", ["create", "replace", "replace as new"])
async def test_an_expired_id_can_be_taken_again(database: Database, store: FaultyStore, how: str) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        old = await database.create(Context("acme"), Session(id="s", user="u", until=MOMENT + timedelta(seconds=1)))
        clock.shift(2)
        new = Session(id="s", user="v")
        context = Context("acme")
        match how:
            case "create":
                made = await database.create(context, new)
            case "replace":
                made = await database.replace(context, new)
            case _:
                made = await database.replace(context, new, expected=0)
        assert made.version > old.version
        assert (await database.get(context, Session, "s")).user == "v"
        assert [r.action for r in await journal(store)] == ["create", "create"]


async def test_a_document_renewed_meanwhile_is_not_purged(database: Database, store: FaultyStore) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        await database.create(Context("acme"), Session(id="s", user="u", until=MOMENT + timedelta(seconds=1)))
        clock.shift(2)

        async def renew(method: str, collection: str) -> None:
            store.after_read = None
            await database.replace(Context("acme"), Session(id="s", user="u"))

        store.after_read = renew
        assert await database.purge_expired(Context("acme"), Session) == 0
        assert (await database.get(Context("acme"), Session, "s")).until is None


# --- The journal ----------------------------------------------------------------------------------------------


async def test_each_mutation_has_one_journal_record_with_before_after_and_request(
    database: Database, store: FaultyStore
) -> None:
    made = await database.create(ACME, Account(id="a", owner="ada", token="hunter2", balance=1))
    updated = await database.update(ACME, Account, "a", {"balance": 2, "token": "hunter3", "owner": "ada"})
    await database.add(ACME, Account, "a", "used", 4)
    replaced = await database.replace(ACME, Account(id="a", owner="bob", balance=2))
    await database.delete(ACME, Account, "a")
    records = await journal(store)
    assert [r.action for r in records] == ["create", "update", "add", "update", "delete"]
    assert [r.sequence for r in records] == sorted({r.sequence for r in records})
    assert len({r.id for r in records}) == 5
    for record in records:
        assert (record.tenant, record.actor, record.request_id) == ("acme", "user:ada", "request-1")
        assert (record.collection, record.entity_id, record.at_us) == ("accounts", "a", ACME.now_us)
    create, update, add, replace, delete = records
    assert create.before is None
    assert create.after == {
        "owner": "ada", "balance": 1, "token": "***", "code": None, "used": 0, "tags": [],
    }  # fmt: skip
    assert (update.before, update.after) == ({"balance": 1, "token": "***"}, {"balance": 2, "token": "***"})
    assert (add.before, add.after) == (None, {"used": 4})
    assert replace.before == {"owner": "ada", "token": "***", "used": 4}
    assert replace.after == {"owner": "bob", "token": None, "used": 0}
    assert delete.before == {**create.after, "owner": "bob", "balance": 2, "token": None}
    assert delete.after is None
    assert [create.version, update.version, replace.version] == [made.version, updated.version, replaced.version]
    assert "hunter" not in repr(records)
    assert "hunter" not in repr(made)


@pytest.mark.parametrize("idempotency_key", [None, "i"])
async def test_a_record_carries_the_version_of_its_own_change(
    database: Database, store: FaultyStore, idempotency_key: str | None
) -> None:
    await database.create(ACME, Account(id="old", owner="x"))

    async def body(tx: Transaction) -> list[Account]:
        return [
            await tx.update(Account, "old", {"balance": 1}),
            await tx.create(Account(id="b", owner="x")),
            await tx.create(Account(id="c", owner="x")),
        ]

    idempotency = Idempotency(idempotency_key, "r") if idempotency_key else None
    made = await database.transaction(ACME, body, idempotency=idempotency)
    records = (await journal(store))[-3:]
    assert [(r.entity_id, r.version) for r in records] == [(a.id, a.version) for a in made]
    assert all(account.version for account in made)


async def test_a_call_without_a_request_id_gets_one(database: Database, store: FaultyStore) -> None:
    async def body(tx: Transaction) -> None:
        await tx.create(Account(owner="x"))
        await tx.create(Account(owner="y"))

    await database.transaction(BETA, body)
    first, second = await journal(store)
    assert first.request_id == second.request_id != ""


async def test_a_tenants_journal_is_its_own(database: Database, store: FaultyStore) -> None:
    await database.create(ACME, Account(owner="x"))
    await database.create(BETA, Account(owner="y"))
    assert [r.actor for r in await journal(store, "acme")] == ["user:ada"]
    assert [r.actor for r in await journal(store, "beta")] == ["user:bob"]


async def test_listeners_run_only_after_the_commit(database: Database, store: FaultyStore) -> None:
    told: list[list[str]] = []
    database.after_commit(lambda tx: told.append([change.operation.id for change in tx.changes]))
    failing_once(store, "before", Unavailable("gone"))
    with pytest.raises(Unavailable):
        await database.create(ACME, Account(id="a", owner="x"))
    assert told == []
    await database.create(ACME, Account(id="a", owner="x"))
    assert told == [["a"]]


async def test_a_listener_of_a_collection_is_called_for_its_changes_only(database: Database) -> None:
    told: list[str] = []
    database.after_commit(lambda _: told.append("accounts"), "accounts", "others")
    database.after_commit(lambda _: told.append("others"), "others")
    await database.create(ACME, Account(id="a", owner="x"))
    assert told == ["accounts"]


# --- Who may ----------------------------------------------------------------------------------------------------


async def test_no_tenant_sees_or_changes_the_documents_of_another(database: Database) -> None:
    await database.create(ACME, Account(id="a", owner="ada", code="c"))
    assert await database.get_or_none(BETA, Account, "a") is None
    assert (await database.find(BETA, Account)).items == []
    assert (await database.aggregate(BETA, Account, Aggregate("count")))["count"] == 0
    for call in (
        database.update(BETA, Account, "a", {"balance": 1}),
        database.delete(BETA, Account, "a"),
        database.add(BETA, Account, "a", "used", 1),
    ):
        with pytest.raises(NotFound):
            await call
    await database.replace(BETA, Account(id="a", owner="bob"))
    assert (await database.get(ACME, Account, "a")).owner == "ada"


async def test_a_denial_is_journalled_and_then_raised(database: Database, store: FaultyStore) -> None:
    await database.create(BETA, Account(id="b", owner="bob"))
    written = len(await journal(store))
    bound = Context("beta", "user:eve", {"tenant": "acme"}, "request-9")
    calls: list[tuple[str, Any]] = [
        ("create", database.create(bound, Account(id="a", owner="x"))),
        ("get", database.get(bound, Account, "a")),
        ("list", database.find(bound, Account)),
        ("update", database.add(bound, Account, "a", "used", 1)),
    ]
    for operation, call in calls:
        with pytest.raises(Denied, match="belongs to tenant 'acme'"):
            await call
        last = (await journal(store))[-1]
        assert (last.action, last.actor, last.tenant, last.request_id) == ("deny", "user:eve", "beta", "request-9")
        assert last.collection == "accounts"
        assert last.after is not None
        assert last.after["operation"] == operation
    assert len(await journal(store)) == written + len(calls)
    with pytest.raises(Denied):  # a denial like one before is counted, and written later
        await database.aggregate(bound, Account, Aggregate("count"))
    assert len(await journal(store)) == written + len(calls)


async def test_one_denied_change_denies_the_whole_transaction(tmp_path: Path) -> None:
    def policy(request: Request) -> Decision:
        if request.operation == "create" and request.after and request.after["owner"] == "eve":
            return Decision(False, "not for eve")
        return default_policy(request)

    async with opened_database("json-memory", tmp_path, policy) as (database, store):

        async def body(tx: Transaction) -> None:
            await tx.create(Account(id="a", owner="ada"))
            await tx.create(Account(id="b", owner="eve"))

        with pytest.raises(Denied, match="not for eve"):
            await database.transaction(ACME, body)
        assert [r.action for r in await journal(store)] == ["deny"]
        assert (await database.find(ACME, Account)).items == []


async def test_the_policy_sees_the_document_before_and_after_the_change(tmp_path: Path) -> None:
    asked: list[tuple[str, Any, Any]] = []

    def policy(request: Request) -> Decision:
        asked.append(
            (
                request.operation,
                request.before and request.before["balance"],
                request.after and request.after["balance"],
            )
        )
        return Decision(True, "all")

    async with opened_database("json-memory", tmp_path, policy) as (database, _):
        await database.create(ACME, Account(id="a", owner="x", balance=1))
        await database.update(ACME, Account, "a", {"balance": 2})
        await database.get(ACME, Account, "a")
        await database.add(ACME, Account, "a", "used", 2)
        await database.delete(ACME, Account, "a")
    assert asked == [
        ("create", None, 1),
        ("update", 1, 2),
        ("get", 2, None),
        ("update", None, None),
        ("delete", 2, None),
    ]


async def test_global_collections_are_for_administrators(database: Database) -> None:
    with pytest.raises(Denied, match="only administrators"):
        await database.create(ACME, Setting(id="s", value="v"))
    await database.create(ADMIN, Setting(id="s", value="v"))
    assert (await database.get(system_context(), Setting, "s")).value == "v"
    with pytest.raises(Denied):
        await database.get(ACME, Setting, "s")
    with pytest.raises(Denied, match="names no tenant"):
        await database.find(system_context(), Account)


# --- Lists ------------------------------------------------------------------------------------------------------


async def test_pages_give_every_document_once_while_others_write(database: Database) -> None:
    for number in range(23):
        await database.create(ACME, Account(id=f"a{number:02}", owner="x", balance=number % 3))
    seen: list[str] = []
    cursor = None
    query = Query(Where("owner", "==", "x"), ("-balance",), limit=5)
    while True:
        page = await database.find(ACME, Account, query, cursor)
        seen += [account.id for account in page.items]
        assert len(page.items) <= 5
        cursor = page.next_cursor
        if cursor is None:
            break
        await database.create(ACME, Account(owner="x", balance=9))  # before where we stand: not seen
    assert len(seen) == len(set(seen)) == 23
    assert seen == sorted(seen, key=lambda id: (-(int(id[1:]) % 3), [-ord(c) for c in id]))


async def test_a_full_last_page_has_no_cursor(database: Database) -> None:
    for number in range(4):
        await database.create(ACME, Account(id=f"a{number}", owner="x"))
    page = await database.find(ACME, Account, Query(limit=2))
    assert page.next_cursor
    assert (await database.find(ACME, Account, Query(limit=2), page.next_cursor)).next_cursor is None
    assert (await database.find(ACME, Account, Query(limit=4))).next_cursor is None


async def test_a_cursor_serves_its_own_query_and_tenant_only(database: Database) -> None:
    for context in (ACME, BETA):
        for number in range(4):
            await database.create(context, Account(id=f"a{number}", owner="x"))
    cursor = (await database.find(ACME, Account, Query(limit=2))).next_cursor
    for context, query, text in (
        (BETA, Query(limit=2), cursor),
        (ACME, Query(Where("owner", "==", "x"), limit=2), cursor),
        (ACME, Query(order_by=("owner",), limit=2), cursor),
        (ACME, Query(limit=2), "nonsense"),
        (ACME, Query(limit=2), ""),
    ):
        with pytest.raises(InvalidInput, match="cursor"):
            await database.find(context, Account, query, text)


async def test_a_projection_gives_its_fields_and_pages_by_others(database: Database) -> None:
    for number in range(3):
        await database.create(ACME, Account(id=f"a{number}", owner="x", balance=-number))
    query = Query(order_by=("balance",), limit=2, fields=("owner",))
    page = await database.select(ACME, Account, query)
    assert page.items == [{"id": "a2", "owner": "x"}, {"id": "a1", "owner": "x"}]
    assert (await database.select(ACME, Account, query, page.next_cursor)).items == [{"id": "a0", "owner": "x"}]
    with pytest.raises(InvalidInput, match="select"):
        await database.find(ACME, Account, query)


async def test_a_secret_field_is_readable_but_cannot_be_filtered(database: Database) -> None:
    await database.create(ACME, Account(id="a", owner="x", token="hunter2"))
    assert (await database.get(ACME, Account, "a")).token == "hunter2"
    with pytest.raises(InvalidInput, match="secret"):
        await database.find(ACME, Account, Query(Where("token", "==", "hunter2")))
