"""The Firestore store beyond the suite: document names, the place of API keys, two nodes, limits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strongroom import Context, Limit, Rolling, Strongroom
from strongroom.context import utc_from_us
from strongroom.entities.entity import Document, Entity, Index, Indexed
from strongroom.entities.query import Query, Where
from strongroom.errors import (
    AlreadyExists,
    BoundExceeded,
    ConfigError,
    Conflict,
    InvalidInput,
    NotFound,
    TooLarge,
    Unavailable,
)
from strongroom.keys.model import ApiKey
from strongroom.storage import store_for
from strongroom.storage.firestore.client import CommitRequest
from strongroom.storage.firestore.journal import shard_of
from strongroom.storage.firestore.journal_documents import record_name
from strongroom.storage.firestore.paths import JOURNAL, MAX_SEGMENT_BYTES, decoded, encoded
from strongroom.storage.firestore.places import SHARDS
from strongroom.storage.firestore.store import FirestoreStore
from strongroom.storage.firestore.values import take
from strongroom.storage.port import Add, Append, Check, Create, Delete, Patch, Put
from strongroom.testing.storage.samples import (
    COLLECTIONS,
    HOSTILE_NAMES,
    NOW,
    batch,
    item,
    record,
    sample,
    shared,
)
from tests.helpers.servers import firestore
from tests.helpers.waiting import wait_until

Write: Any = type(CommitRequest().writes.add())
KEYS = ApiKey.__collection__
ADMIN = Context("acme", claims={"admin": True})


@pytest.fixture
def new_url(request: pytest.FixtureRequest) -> Callable[[], str]:
    return firestore.urls(firestore.start(request))


@asynccontextmanager
async def opened(url: str, *collections: Any) -> AsyncIterator[FirestoreStore]:
    store = FirestoreStore.from_url(url)
    await store.open()
    try:
        await store.prepare(collections or COLLECTIONS)
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(new_url: Callable[[], str]) -> AsyncIterator[FirestoreStore]:
    async with opened(new_url(), *COLLECTIONS, KEYS) as store:
        yield store


async def raw(store: FirestoreStore, path: str) -> Document | None:
    """What stands at a path, as any other reader of the database sees it."""
    found = await store.wire.get(f"{store.paths.documents}/{path}")
    return None if found is None else {name: take(value) for name, value in found.fields.items()}


# --- Names ----------------------------------------------------------------------------------------------------

_RESERVED = (
    ".",
    "..",
    "__x__",
    "____",
    ".\x01",
    "..\x01\x01",
    "__x__\x01",
    "__x__\x02",
    "__a/b__",
    ".\U0010ffff\x01",
    "./",
)
_names = (
    st.sampled_from(_RESERVED)
    | st.sampled_from(HOSTILE_NAMES)
    | st.text(
        st.sampled_from("/._\x01\x02\U0010ffff0a")
        | st.characters(exclude_characters="\x00", exclude_categories=["Cs"]),
        min_size=1,
        max_size=20,
    )
)


class TestNames:
    @settings(max_examples=300)
    @given(_names)
    def test_an_encoded_name_decodes_and_is_valid_in_firestore(self, text: str) -> None:
        name = encoded(text)
        assert decoded(name) == text
        assert "/" not in name
        assert name not in (".", "..")
        assert not (name.startswith("__") and name.endswith("__") and len(name) >= 4)

    @settings(max_examples=1_000)
    @given(_names, _names)
    def test_names_keep_the_order_of_the_ids(self, first: str, second: str) -> None:
        assert (encoded(first).encode() < encoded(second).encode()) == (first.encode() < second.encode())

    @pytest.mark.parametrize("text", ["a", "key-1", "a.b", "user@example.com", "%2F", "é", "_x_", "...", "a\x01"])
    def test_plain_ids_stay_themselves(self, text: str) -> None:
        assert encoded(text) == text

    def test_a_name_that_firestore_cannot_hold_is_refused(self) -> None:
        assert len(encoded("/" * 190).encode()) <= MAX_SEGMENT_BYTES
        with pytest.raises(InvalidInput, match="fewer slashes"):
            encoded("/" * 512)

    async def test_an_id_that_no_name_can_hold_is_refused_when_written_and_missing_when_read(
        self, store: FirestoreStore
    ) -> None:
        with pytest.raises(InvalidInput, match="fewer slashes"):
            await store.commit(batch("acme", Create("items", "/" * 512, item())))
        assert await store.get("items", "acme", "/" * 512) is None
        assert await store.find("items", "acme", Query(Where("id", "==", "/" * 512))) == []

    async def test_tenants_stand_below_tenants_and_global_documents_at_the_top(self, store: FirestoreStore) -> None:
        await store.commit(batch("acme", Create("items", "a/b", item("mine")), Create("shared", "x", shared("all"))))
        found = await raw(store, f"tenants/acme/items/{encoded('a/b')}")
        assert found is not None
        assert (found["id"], found["label"]) == ("a/b", "mine")
        assert ((await raw(store, "shared/x")) or {})["label"] == "all"
        assert await raw(store, "tenants/acme") == {"id": "acme"}


class TestUrl:
    def test_the_url_names_project_database_and_options(self) -> None:
        store = store_for("firestore://my-project/other?collection=my_keys&emulator=127.0.0.1:1")
        assert isinstance(store, FirestoreStore)
        assert (store.paths.project, store.paths.database) == ("my-project", "other")
        assert store.paths.keys_collection == "my_keys"
        assert store.wire.emulator == "127.0.0.1:1"
        plain = store_for("firestore://my-project")
        assert isinstance(plain, FirestoreStore)
        assert plain.paths.database == "(default)"

    @pytest.mark.parametrize(
        "url",
        ["firestore://", "firestore:///x", "firestore://p/d/e", "firestore://p/d?port=1", "firestore://p?collection=_a",
         "firestore://p?collection=tenants", "firestore://p?collection=a/b"],
    )  # fmt: skip
    def test_an_unknown_url_option_is_refused(self, url: str) -> None:
        with pytest.raises(ConfigError, match="store"):
            store_for(url)


# --- Where API keys stand -------------------------------------------------------------------------------------


def key(hash: str, **more: Any) -> Document:
    fields = ApiKey(tenant="acme", name="k", hash=hash, display="sr_…")
    return {**ApiKey.__codec__.encode(fields), **more}


class TestKeys:
    async def test_an_api_key_document_is_named_by_its_hash_with_seed_002s_field_names(
        self, store: FirestoreStore
    ) -> None:
        limits = [{"resource": "tokens", "limit": 9}, {"resource": "requests", "limit": 60}]
        document = key("h1", user_id="u1", limits=limits, permissions=["read"])
        await store.commit(batch("acme", Create("api_keys", "k1", document)))
        found = await raw(store, "api_keys/h1")
        assert found is not None
        seed = {
            "id": "k1", "name": "k", "key_hash": "h1", "permissions": ["read"], "rate_limit": 60, "user_id": "u1",
            "created_at": utc_from_us(NOW), "expires_at": None, "is_active": True, "last_used": None, "usage_count": 0,
        }  # fmt: skip
        assert {name: found[name] for name in seed} == seed
        await store.commit(batch("acme", Patch("api_keys", "k1", {"enabled": False})))
        assert ((await raw(store, "api_keys/h1")) or {})["is_active"] is False

    async def test_the_collection_of_api_keys_is_configurable(self, new_url: Callable[[], str]) -> None:
        async with opened(new_url() + "&collection=customer_keys", KEYS) as store:
            await store.commit(batch(None, Create("api_keys", "k1", key("h1"))))
            assert await raw(store, "customer_keys/h1") is not None
            assert (await store.get("api_keys", None, "k1") or {})["hash"] == "h1"
            assert [d["id"] for d in await store.find("api_keys", None, Query())] == ["k1"]

    async def test_a_lookup_by_hash_is_one_point_read(self, store: FirestoreStore) -> None:
        await store.commit(batch("acme", Create("api_keys", "k1", key("h1")), Create("api_keys", "k2", key("h2"))))
        before = dict(store.wire.requests)
        (found,) = await store.find("api_keys", None, Query(Where("hash", "==", "h2"), limit=1))
        assert found["id"] == "k2"
        assert await store.find("api_keys", None, Query(Where("hash", "==", "unknown"), limit=1)) == []
        assert store.wire.requests["batch_get"] - before.get("batch_get", 0) == 2
        assert store.wire.requests.get("query", 0) == before.get("query", 0)

    async def test_a_new_hash_moves_the_keys_document(self, store: FirestoreStore) -> None:
        await store.commit(batch("acme", Create("api_keys", "k1", key("h1"))))
        (old,) = [d["version"] for d in await store.find("api_keys", None, Query())]
        await store.commit(
            batch("acme", Patch("api_keys", "k1", {"hash": "h2", "previous_hash": "h1"}, expected=old), now_us=NOW + 5)
        )
        assert await raw(store, "api_keys/h1") is None
        moved = await store.get("api_keys", None, "k1")
        assert moved is not None
        assert (moved["hash"], moved["previous_hash"]) == ("h2", "h1")
        assert moved["created_at"] == utc_from_us(NOW)
        assert moved["updated_at"] == utc_from_us(NOW + 5)
        assert moved["version"] > old
        with pytest.raises(Conflict):
            await store.commit(batch("acme", Check("api_keys", "k1", old)))
        await store.commit(batch("acme", Delete("api_keys", "k1", moved["version"])))
        assert await raw(store, "api_keys/h2") is None
        await store.commit(batch("acme", Create("api_keys", "k1", key("h2", previous_hash="h1"))))

    async def test_a_node_that_knows_the_old_document_path_finds_the_new_one(self, new_url: Callable[[], str]) -> None:
        url = new_url()
        async with opened(url, KEYS) as first, opened(url, KEYS) as second:
            await first.commit(batch(None, Create("api_keys", "k1", key("h1"))))
            assert await second.get("api_keys", None, "k1") is not None  # from now on it knows where
            await first.commit(batch(None, Patch("api_keys", "k1", {"hash": "h2"})))
            assert (await second.get("api_keys", None, "k1") or {})["hash"] == "h2"
            await first.commit(batch(None, Patch("api_keys", "k1", {"hash": "h3"})))
            await second.commit(batch(None, Patch("api_keys", "k1", {"name": "renamed"})))
            found = await first.get("api_keys", None, "k1")
            assert found is not None
            assert (found["hash"], found["name"]) == ("h3", "renamed")

    async def test_neither_an_id_nor_a_hash_is_taken_twice(self, store: FirestoreStore) -> None:
        await store.commit(batch("acme", Create("api_keys", "k1", key("h1")), Create("api_keys", "k2", key("h2"))))
        for taken in (
            Create("api_keys", "k1", key("h9")),
            Create("api_keys", "k9", key("h1")),
            Patch("api_keys", "k2", {"hash": "h1"}),
            Put("api_keys", "k2", key("h1")),
        ):
            with pytest.raises(AlreadyExists):
                await store.commit(batch("acme", taken))
        with pytest.raises(NotFound):
            await store.commit(batch("acme", Patch("api_keys", "k9", {"name": "x"})))
        await store.commit(batch("acme", Check("api_keys", "k9", 0)))
        assert await raw(store, "api_keys/h9") is None

    def test_only_a_required_text_with_a_unique_index_of_its_own_places_documents(self) -> None:
        class Placed(Entity, collection="placed", placed_by="code"):
            code: Annotated[str, Indexed(unique=True)]

        assert Placed.__collection__.placed_by == "code"
        with pytest.raises(Exception, match="placed_by"):

            class Optional(Entity, collection="placed", placed_by="code", indexes=[Index("code", unique=True)]):
                code: str | None = None


# --- Two nodes ------------------------------------------------------------------------------------------------


class TestNodes:
    async def test_conditional_commits_of_two_nodes_lose_no_update(self, new_url: Callable[[], str]) -> None:
        url = new_url()
        async with opened(url) as first, opened(url) as second:
            await first.commit(batch("acme", Create("items", "x", item())))

            async def work(node: FirestoreStore) -> int:
                conflicts = 0
                for _ in range(15):
                    while True:
                        found = await node.get("items", "acme", "x")
                        assert found is not None
                        new = {**{name: found[name] for name in item()}, "used": found["used"] + 1}
                        try:
                            await node.commit(batch("acme", Put("items", "x", new, expected=found["version"])))
                        except Conflict:
                            conflicts += 1
                            continue
                        break
                return conflicts

            conflicts = await asyncio.gather(work(first), work(first), work(second), work(second))
            assert (await first.get("items", "acme", "x") or {})["used"] == 60
            assert sum(conflicts) > 0, "they did contend"

    async def test_a_bound_is_kept_by_two_nodes_together(self, new_url: Callable[[], str]) -> None:
        url = new_url()
        async with opened(url) as first, opened(url) as second:
            await first.commit(batch("acme", Create("items", "x", item())))
            adds = [
                node.commit(batch("acme", Add("items", "x", "used", 1, at_most=25), Append(record("x"), 0)))
                for _ in range(30)
                for node in (first, second)
            ]
            outcomes = await asyncio.gather(*adds, return_exceptions=True)
            admitted = [o.values[0] for o in outcomes if not isinstance(o, BaseException)]
            assert sorted(admitted) == list(range(1, 26))
            assert all(isinstance(o, BoundExceeded) for o in outcomes if isinstance(o, BaseException))
            assert len((await second.changes(None)).records) == 25

    async def test_unbounded_additions_need_no_read_and_merge_into_one_write(self, store: FirestoreStore) -> None:
        await store.commit(batch("acme", Create("items", "x", item())))
        before = dict(store.wire.requests)
        answers = await asyncio.gather(*(store.commit(batch("acme", Add("items", "x", "used", 2))) for _ in range(50)))
        assert [a.values[0] for a in answers] == [2 * n for n in range(1, 51)]
        versions = [a.versions[0] for a in answers]
        assert versions == sorted(set(versions)), "each addition has a version of its own"
        assert (await store.get("items", "acme", "x") or {})["version"] == versions[-1]
        assert store.wire.requests["commit"] - before["commit"] == 1
        assert store.wire.requests.get("batch_get") == before.get("batch_get")

    async def test_contending_commits_to_one_document_all_end(self, new_url: Callable[[], str]) -> None:
        """Two nodes, each with 40 batches that want the same document and the same unique value."""
        url = new_url()
        async with opened(url) as first, opened(url) as second:
            creates = [
                node.commit(batch("acme", Create("items", f"{n}-{m}", item(code="one")), Append(record("c"), 0)))
                for n in range(40)
                for m, node in enumerate((first, second))
            ]
            outcomes = await asyncio.gather(*creates, return_exceptions=True)
            assert [type(o).__name__ for o in outcomes].count("AlreadyExists") == 79
            puts = [
                node.commit(batch(f"t{n % 3}", Put("shared", "x", shared(f"{n}"))))
                for n in range(40)
                for node in (first, second)
            ]
            assert all(answer.versions[0] for answer in await asyncio.gather(*puts))
            assert len((await first.changes(None)).records) == 1

    async def test_a_limit_is_exact_and_a_revocation_seen_on_two_nodes(self, new_url: Callable[[], str]) -> None:
        url = new_url()
        limit = Limit(resource="requests", limit=20, window=Rolling(seconds=3600))
        async with Strongroom.open(url) as first, Strongroom.open(url) as second:
            issued = await first.keys.create(name="k", tenant="acme", limits=[limit], context=ADMIN)
            verifications = [room.keys.verify(issued.text) for _ in range(30) for room in (first, second)]
            codes = [one.code for one in await asyncio.gather(*verifications)]
            assert (codes.count("VALID"), codes.count("RATE_LIMITED")) == (20, 40)
            await first.keys.disable(issued.key.id, context=ADMIN)

            async def refused() -> bool:
                return (await second.keys.verify(issued.text)).code == "DISABLED"

            await wait_until(refused)

    async def test_each_tenants_journal_is_in_order_under_writers_of_two_nodes(
        self, new_url: Callable[[], str]
    ) -> None:
        url = new_url()
        tenants = ["a", "b", "c"]
        async with opened(url) as first, opened(url) as second:

            async def write(node: FirestoreStore, name: str) -> None:
                for n in range(20):
                    for tenant in tenants:
                        await node.commit(batch(tenant, Append(record(f"{name}-{n}", tenant))))

            seen: list[Any] = []

            async def follow() -> None:
                cursor = None
                while len(seen) < 2 * 20 * len(tenants):
                    page = await second.changes(cursor, limit=7)
                    seen.extend(page.records)
                    cursor = page.cursor

            await asyncio.wait_for(asyncio.gather(write(first, "x"), write(second, "y"), follow()), 60)
            for tenant in tenants:
                mine = [one for one in seen if one.tenant == tenant]
                assert [one.sequence for one in mine] == sorted({one.sequence for one in mine})
                for name in "xy":
                    own = [one.entity_id for one in mine if one.entity_id.startswith(name)]
                    assert own == [f"{name}-{n}" for n in range(20)]

    async def test_a_listener_wakes_the_other_node(self, new_url: Callable[[], str]) -> None:
        url = new_url()
        async with opened(url) as first, opened(url) as second:
            woken: list[int] = []
            second.on_change(lambda: woken.append(1))
            await wait_until(lambda: second._listener.is_live)
            woken.clear()
            reads = second.wire.requests.get("batch_get", 0)
            cursor = (await second.changes(None)).cursor
            await first.commit(batch("acme", Append(record("1"))))
            await wait_until(lambda: woken)

            async def arrived() -> bool:
                return [r.entity_id for r in (await second.changes(cursor)).records] == ["1"]

            await wait_until(arrived)
            assert second.wire.requests.get("batch_get", 0) == reads, "the heads come by themselves"

    async def test_a_record_is_found_although_the_listener_does_not_hear_of_it(
        self, new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = new_url()
        async with opened(url) as first, opened(url) as second:
            second.on_change(lambda: None)
            await wait_until(lambda: second._listener.is_live)
            cursor = (await second.changes(None)).cursor
            monkeypatch.setattr(second._listener, "_take", lambda answer: None)  # the stream is open, and silent
            await first.commit(batch("acme", Append(record("1"))))
            assert [one.entity_id for one in (await second.changes(cursor)).records] == ["1"]

    async def test_a_late_answer_about_the_heads_hides_no_later_record(
        self, store: FirestoreStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The change feed asks beside every commit: an answer from before the commit may arrive after it."""
        store.on_change(lambda: None)
        await wait_until(lambda: store._listener.is_live)
        await store.commit(batch("acme", Append(record("1"))))
        asked, answered, committed = store.wire._read, asyncio.Event(), asyncio.Event()

        async def late(what: str, once: Callable[[], Any]) -> Any:
            answer = await asked(what, once)
            if not committed.is_set():
                answered.set()
                await committed.wait()
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(store.wire, "_read", late)
            reading = asyncio.create_task(store.changes("end"))
            await answered.wait()
            patch.undo()
            await store.commit(batch("acme", Append(record("2"))))
            await asyncio.sleep(0.2)  # the listener has heard of it
            committed.set()
            await reading
        assert [one.entity_id for one in (await store.changes(None)).records] == ["1", "2"]

    async def test_a_tenants_records_are_queried_alone_where_queries_do_not_lag(self, store: FirestoreStore) -> None:
        assert shard_of("other") == shard_of(None), "they share a part of the journal"
        for n in range(12):
            await store.commit(batch(None, *(Append(record(f"{n}", name)) for name in ("other", None, None))))
        expected = [one for one in (await store.changes(None)).records if one.tenant == "other"]
        checked = await store.changes(None, tenant="other", limit=5)
        store.wire.emulator = None  # as against Firestore itself
        before = store.wire.billed["reads"]
        asked = await store.changes(None, tenant="other", limit=5)
        assert store.wire.billed["reads"] - before <= 8, "the other records are not paid for"
        assert asked.records == checked.records == tuple(expected[:5])
        assert (await store.changes(asked.cursor, tenant="other")).records == tuple(expected[5:])

    async def test_a_gap_in_the_journal_is_an_error(self, store: FirestoreStore) -> None:
        for n in range(5):
            await store.commit(batch("acme", Append(record(f"{n}", "acme"))))
        name = store.paths.internal(JOURNAL, record_name(shard_of("acme"), 3))
        document = await store.wire.get(name)
        await store.wire.commit([Write(delete=name)])
        for tenant in (None, "acme"):
            with pytest.raises(Unavailable, match=f"no record {name.rpartition('/')[2]}"):
                await store.changes(None, tenant=tenant)
        await store.wire.commit([Write(update=document)])
        assert len((await store.changes(None)).records) == 5

    async def test_a_stale_query_answer_of_the_emulator_is_queried_again(
        self, store: FirestoreStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Seen beside writers, about once in a thousand queries: one document of a commit as new, another as old."""
        await store.commit(batch("acme", Create("items", "a", item("0")), Create("items", "b", item("0"))))
        old = await store.wire.get(f"{store.paths.documents}/tenants/acme/items/b")
        await store.commit(batch("acme", Patch("items", "a", {"label": "1"}), Patch("items", "b", {"label": "1"})))
        read = store.wire._read
        asked: list[str] = []

        async def lagging(what: str, once: Callable[[], Any]) -> Any:
            answer = await read(what, once)
            asked.append(what)
            if asked == ["query"]:
                answer[0][1] = old
            return answer

        monkeypatch.setattr(store.wire, "_read", lagging)
        assert [one["label"] for one in await store.find("items", "acme", Query())] == ["1", "1"]
        assert asked == ["query", "batch get", "query", "batch get"]

    def test_a_tenants_shard_never_changes(self) -> None:
        assert [shard_of(t) for t in (None, "acme", "other", "default")] == [0, 13, 0, 1]
        assert {shard_of(f"t{n}") for n in range(500)} == set(range(SHARDS))


# --- Limits ---------------------------------------------------------------------------------------------------


_random = random.Random(1)
NUMBERS = [Decimal(_random.randrange(10**36, 10**37)) for _ in range(120_000)]
"""8 bytes each as the port counts them; 15 however well they are compressed."""


class TestLimits:
    async def test_a_document_that_firestore_finds_too_large_is_too_large(self, store: FirestoreStore) -> None:
        """Within the port's own count, past Firestore's: decimals in a list take more there than 8 bytes."""
        with pytest.raises(TooLarge):
            await store.commit(batch("acme", Create("samples", "x", sample(tags=NUMBERS))))
        assert await store.get("samples", "acme", "x") is None

    async def test_a_batch_that_firestore_refuses_fails_no_other(self, store: FirestoreStore) -> None:
        outcomes = await asyncio.gather(
            store.commit(batch("acme", Create("items", "a", item()))),
            store.commit(batch("other", Create("samples", "x", sample(tags=NUMBERS)))),
            store.commit(batch("third", Create("items", "b", item()))),
            return_exceptions=True,
        )
        assert [type(o).__name__ for o in outcomes] == ["Committed", "TooLarge", "Committed"]
