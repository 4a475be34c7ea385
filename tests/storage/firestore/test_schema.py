"""Firestore's schema: later fields, the files for Firestore's tools, and the cost of each operation."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from strongroom import Limit, Rolling, Strongroom
from strongroom.cli import main
from strongroom.cli.estimate import OPERATIONS, PRICES, Load, estimate, load_of
from strongroom.context import Context
from strongroom.database.idempotency import IdempotentCall
from strongroom.entities.entity import FieldSpec, FieldType, Index
from strongroom.entities.query import Aggregate, Or, Query, Where
from strongroom.errors import InvalidInput, StoreError
from strongroom.keys.model import ApiKey
from strongroom.state.model import Action, Policy, Signal
from strongroom.storage.firestore.schema import FIRESTORE_RULES, firestore_indexes
from strongroom.storage.firestore.store import FirestoreStore
from strongroom.storage.port import Append, Create, Patch
from strongroom.testing.storage.samples import COLLECTIONS, batch, item, record
from strongroom.testing.storage.schema import declare
from tests.helpers.servers import firestore


@pytest.fixture
def new_url(request: pytest.FixtureRequest) -> Callable[[], str]:
    return firestore.urls(firestore.start(request))


@pytest.fixture
async def store(new_url: Callable[[], str]) -> AsyncIterator[FirestoreStore]:
    store = FirestoreStore.from_url(new_url())
    await store.open()
    yield store
    await store.close()


# --- Fields that came later -----------------------------------------------------------------------------------


async def test_documents_from_before_a_field_are_found_and_ordered_by_its_default_without_being_rewritten(
    store: FirestoreStore,
) -> None:
    await store.prepare([declare()])
    (old,) = (await store.commit(batch("acme", Create("things", "old", {"name": "o"})))).versions
    rank = FieldSpec("rank", FieldType.INT, has_default=True, default=5)
    until = FieldSpec("until", FieldType.TIMESTAMP, optional=True)
    await store.prepare([declare(rank, until)])
    for id, value in (("low", 1), ("high", 9)):
        await store.commit(batch("acme", Create("things", id, {"name": id, "rank": value, "until": None})))

    async def ids(query: Query) -> list[str]:
        return [d["id"] for d in await store.find("things", "acme", query)]

    assert await ids(Query(order_by=("rank",))) == ["low", "old", "high"]
    assert await ids(Query(order_by=("-rank",), limit=2, start_after=(9, "high"))) == ["old", "low"]
    assert await ids(Query(Where("rank", ">=", 5), ("rank",))) == ["old", "high"]
    assert await ids(Query(Where("rank", "not-in", [1, 9]))) == ["old"]
    assert await ids(Query(Or(Where("until", "==", None), Where("rank", "==", 9)))) == ["high", "low", "old"]
    assert await store.aggregate("things", "acme", [Aggregate("sum", "rank")], None) == {"sum_rank": 15}
    assert (await store.get("things", "acme", "old") or {})["version"] == old, "it was not rewritten"
    await store.commit(batch("acme", Patch("things", "old", {"rank": 10})))
    assert await ids(Query(order_by=("rank",))) == ["low", "high", "old"]


async def test_a_dropped_field_is_removed_from_the_documents(store: FirestoreStore) -> None:
    secret = FieldSpec("secret", FieldType.TEXT, optional=True)
    await store.prepare([declare(secret)])
    await store.commit(batch("acme", Create("things", "a", {"name": "a", "secret": "s"})))
    await store.prepare([declare()], allow_destructive=True)
    found = await store.wire.get(f"{store.paths.documents}/tenants/acme/things/a")
    assert found is not None
    assert "secret" not in found.fields
    await store.prepare([declare(secret)])
    assert (await store.get("things", "acme", "a") or {})["secret"] is None


async def test_unique_values_of_a_dropped_index_can_be_taken_again(store: FirestoreStore) -> None:
    unique = (Index("name", unique=True),)
    await store.prepare([declare(indexes=unique)])
    await store.commit(batch("acme", *(Create("things", f"{n}", {"name": f"{n}"}) for n in range(5))))
    await store.prepare([declare()])
    await store.commit(batch("acme", Patch("things", "1", {"name": "x"})))
    await store.prepare([declare(indexes=unique)])
    await store.commit(batch("acme", Create("things", "new", {"name": "1"})))


async def test_a_database_of_another_format_is_refused(new_url: Callable[[], str]) -> None:
    url = new_url()
    store = FirestoreStore.from_url(url)
    await store.open()
    name = store.paths.internal("_strongroom_schema", "_config")
    found = await store.wire.get(name)
    assert found is not None
    write: Any = store._schema._document("_config", {"format": 99, "shards": 16}, 0)
    write.current_document.exists = True
    await store.wire.commit([write])
    await store.close()
    with pytest.raises(StoreError, match="format"):
        await FirestoreStore.from_url(url).open()


# --- What Firestore's own tools deploy ------------------------------------------------------------------------


def fields_of(indexes: dict[str, Any], group: str) -> list[list[str]]:
    return [
        [f"{f['fieldPath']} {f.get('order') or f.get('arrayConfig')}" for f in entry["fields"]]
        for entry in indexes["indexes"]
        if entry["collectionGroup"] == group
    ]


class TestDeployment:
    indexes = firestore_indexes([c.__collection__ for c in (ApiKey, Action, Signal, Policy, IdempotentCall)])

    def test_keys_are_found_by_user_and_creation_time(self) -> None:
        assert ["user_id ASCENDING", "created_at DESCENDING"] in fields_of(self.indexes, "api_keys")
        assert ["user_id ASCENDING", "created_at DESCENDING", "id DESCENDING"] in fields_of(self.indexes, "api_keys")
        mine = firestore_indexes([ApiKey.__collection__], "customer_keys")
        assert ["user_id ASCENDING", "created_at DESCENDING"] in fields_of(mine, "customer_keys")

    def test_signals_are_found_by_status_and_creation_time(self) -> None:
        name = Signal.__collection__.name
        assert ["status ASCENDING", "created_at ASCENDING"] in fields_of(self.indexes, name)

    def test_a_time_to_live_becomes_a_policy(self) -> None:
        policies = [(o["collectionGroup"], o["fieldPath"]) for o in self.indexes["fieldOverrides"] if o["ttl"]]
        ttl = IdempotentCall.__collection__
        assert (ttl.name, ttl.ttl) in policies

    def test_secrets_and_large_fields_are_not_indexed(self) -> None:
        exempt = {(o["collectionGroup"], o["fieldPath"]) for o in self.indexes["fieldOverrides"] if not o["indexes"]}
        assert {("api_keys", "sealed"), ("api_keys", "metadata"), ("_strongroom_journal", "after")} <= exempt

    def test_the_index_file_is_json_and_names_each_index_once(self) -> None:
        entries = [json.dumps(entry) for entry in self.indexes["indexes"]]
        assert len(entries) == len(set(entries))
        overrides = [(o["collectionGroup"], o["fieldPath"]) for o in self.indexes["fieldOverrides"]]
        assert len(overrides) == len(set(overrides))

    def test_the_rules_let_no_client_in(self) -> None:
        assert FIRESTORE_RULES.count("allow") == FIRESTORE_RULES.count("allow read, write: if false;") == 2
        assert "match /tenants/{tenant}/{document=**}" in FIRESTORE_RULES


# --- What it costs --------------------------------------------------------------------------------------------


class TestCosts:
    async def measured(self, store: FirestoreStore, doing: Callable[[], Any]) -> Load:
        before = dict(store.wire.billed)
        await doing()
        return Load(**{name: count - before[name] for name, count in store.wire.billed.items()})

    async def test_the_store_reads_and_writes_what_the_table_says(self, store: FirestoreStore) -> None:
        await store.prepare([*COLLECTIONS, ApiKey.__collection__])
        warm = batch("acme", Create("items", "0", item()), Append(record("0"), 0))
        await store.commit(warm)  # the tenant's first, and the process's first record
        created = batch("acme", Create("items", "x", item()), Append(record("x"), 0))
        assert await self.measured(store, lambda: store.commit(created)) == OPERATIONS["create"][1]
        unique = batch("acme", Create("items", "y", item(code="c")), Append(record("y"), 0))
        expected = OPERATIONS["create"][1] + OPERATIONS["unique"][1]
        assert await self.measured(store, lambda: store.commit(unique)) == expected
        assert await self.measured(store, lambda: store.get("items", "acme", "x")) == OPERATIONS["get"][1]
        assert await self.measured(store, lambda: store.changes("end")) == OPERATIONS["poll"][1]
        await store.commit(batch("acme", *(Create("items", f"n{n:02}", item()) for n in range(40))))
        assert (
            await self.measured(store, lambda: store.find("items", "acme", Query(limit=20))) == OPERATIONS["list-20"][1]
        )

    async def test_each_operation_of_strongroom_costs_what_the_table_says(self, new_url: Callable[[], str]) -> None:
        context = Context("acme", claims={"admin": True})
        limit = Limit(resource="requests", limit=1_000, window=Rolling(seconds=3600))
        async with Strongroom.open(new_url()) as room:
            store = room.store.store
            assert isinstance(store, FirestoreStore)
            await room.keys.create(name="first", tenant="acme", context=context)
            issued: list[Any] = []

            async def create() -> None:
                issued.append(await room.keys.create(name="k", tenant="acme", limits=[limit], context=context))

            assert (await self.measured(store, create)).writes == OPERATIONS["create-key"][1].writes
            text = issued[0].text
            await room.keys.verify(text)
            # Reads are left out: the node follows its own journal meanwhile.
            assert (await self.measured(store, lambda: room.keys.verify(text))).writes == OPERATIONS["verify"][1].writes

    def test_the_prices_are_those_of_seed_000(self) -> None:
        by_name = {price.backend: price for price in PRICES}
        assert [by_name["GCS"].gb, by_name["GCS"].reads, by_name["GCS"].writes] == [0.02, 0.40, 5.00]
        firestore_prices = by_name["Firestore"]
        assert [firestore_prices.gb, firestore_prices.reads, firestore_prices.writes] == [0.15, 0.30, 0.90]
        assert (by_name["Cloud SQL"].gb, by_name["Cloud SQL"].base) == (0.24, (30, 50))

    def test_an_estimate_adds_up(self) -> None:
        load = load_of({"create": 1_000_000, "verify-cold": 2_000_000}) + Load(gb=10)
        assert load == Load(2_000_000, 3_000_000, 0, 10)
        found = {one.backend: one for one in estimate(load)}
        assert found["Firestore"].least == pytest.approx(10 * 0.15 + 2 * 0.30 + 3 * 0.90)
        assert (found["Cloud SQL"].least, found["Cloud SQL"].most) == pytest.approx((32.4, 52.4))
        with pytest.raises(InvalidInput, match="expected one of"):
            load_of({"nonsense": 1})


def test_the_command_line_estimates_what_a_store_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = f"sqlite:///{tmp_path}/store.db"
    for name in ("a", "b"):
        assert main(["keys", "create", "--name", name, "--store", store, "--json"]) == 0
    capsys.readouterr()
    assert main(["estimate", "--do", "verify=1000000", "--store", store, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["load"]["writes"] == 2_000_000
    assert 2 * 300 / 1e9 < found["load"]["gb"] < 2 * 6_000 / 1e9  # with the journal's tree and its signed checkpoint
    assert main(["estimate", "--do", "verify", "--json"]) == 2
