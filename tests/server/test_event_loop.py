"""No request blocks the event loop: pages are bounded in bytes, and long work yields."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from strongroom import (
    Entity,
    Index,
    Query,
    Strongroom,
    Where,
)
from strongroom import (
    cooperative as fairness,
)
from strongroom.context import system_context
from strongroom.database.pages import MAX_ROWS
from strongroom.entities.query import MAX_PAGE_BYTES
from strongroom.errors import InvalidInput
from strongroom.keys.usage_recorder import Usage
from strongroom.keys.verification import Verification
from strongroom.server import watch
from strongroom.storage.port import document_size
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.server_app import ADMIN, Stream, serving
from tests.helpers.stores import new_url, opened

CONTEXT = system_context("acme")
POLICY = {"policy_type": "t", "policy_name": "n"}


class Paper(Entity, collection="papers", indexes=[Index("shelf")]):
    shelf: int = 0
    text: str = ""


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Paper]


@asynccontextmanager
async def counting(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[int]]:
    """Counts the turns that others of the loop get, where a slice of work is one step long."""
    monkeypatch.setattr(fairness, "SLICE_S", 0.0)
    turns = [0]

    async def count() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    try:
        yield turns
    finally:
        counter.cancel()


async def turns_of(work: Awaitable[Any], turns: list[int]) -> int:
    before = turns[0]
    with suppress(InvalidInput):
        await work
    return turns[0] - before


# --- Pages ----------------------------------------------------------------------------------------------------


async def test_a_page_is_bounded_in_bytes_and_its_cursor_continues(url: str) -> None:
    async with Strongroom.open(url, entities=[Paper]) as room:
        papers = [Paper(id=f"{n:03}", shelf=n % 3, text="x" * (100 * (n % 7))) for n in range(24)]
        papers[11].text = "x" * 5_000

        async def write(tx: Any) -> None:
            for paper in papers:
                await tx.create(paper)

        await room.database.transaction(CONTEXT, write)
        for query in (Query(limit=1_000), Query(order_by=("-shelf",), limit=7), Query(Where("shelf", "==", 1))):
            whole = [page.id for page in (await room.database.find(CONTEXT, Paper, query_of(query, 1_000))).items]
            seen: list[str] = []
            cursor = None
            while True:
                page = await room.database.find(CONTEXT, Paper, query, cursor, max_bytes=1_000)
                sizes = [document_size(Paper.__codec__.encode(item)) for item in page.items]
                assert 1 <= len(page.items) <= query.limit
                assert sum(sizes) <= 1_000 or len(sizes) == 1
                seen += [item.id for item in page.items]
                cursor = page.next_cursor
                if cursor is None:
                    break
            assert seen == whole


def query_of(query: Query, limit: int) -> Query:
    return Query(query.where, query.order_by, limit)


async def test_a_page_of_small_documents_has_the_requested_length(room: Strongroom) -> None:
    async def write(tx: Any) -> None:
        for number in range(MAX_ROWS + 20):
            await tx.create(Paper(id=f"{number:04}"))

    await room.database.transaction(CONTEXT, write)
    acme = room.tenant("acme")
    for limit, expected in ((MAX_ROWS + 1, MAX_ROWS + 1), (1_000, MAX_ROWS + 20), (MAX_ROWS + 20, MAX_ROWS + 20)):
        page = await acme.find(Paper, Query(limit=limit))
        assert [paper.id for paper in page.items] == [f"{number:04}" for number in range(expected)]
        assert (page.next_cursor is None) == (expected == MAX_ROWS + 20)


async def test_a_page_reads_about_as_many_documents_as_fit(room: Strongroom, store: FaultyStore) -> None:
    acme = room.tenant("acme")
    for number in range(14):
        await acme.create(Paper(id=f"{number:02}", text="x" * 900_000))
    limits = []
    find = store.store.find

    async def noted(collection: str, tenant: str | None, query: Query) -> Any:
        limits.append(query.limit)
        return await find(collection, tenant, query)

    store.store.find = noted  # type: ignore[method-assign]
    page = await acme.find(Paper, Query(limit=1_000))
    assert len(page.items) == MAX_PAGE_BYTES // 900_000
    limits.clear()
    await acme.find(Paper, Query(limit=1_000), page.next_cursor)
    assert sum(limits) <= 6


async def test_a_page_over_http_is_at_most_about_four_megabytes() -> None:
    async with serving() as served:
        path = "/v1/tenants/acme/policies"
        for number in range(7):
            made = await served.post(path, {**POLICY, "id": f"p{number}", "rules": {"text": "x" * 900_000}})
            assert made.status == 201
        first = await served.get(f"{path}?limit=1000")
        assert [item["id"] for item in first.json["items"]] == ["p0", "p1", "p2", "p3"]
        second = await served.get(f"{path}?limit=1000&cursor={first.json['next_cursor']}")
        assert [item["id"] for item in second.json["items"]] == ["p4", "p5", "p6"]
        assert second.json["next_cursor"] is None


# --- Turns ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["durable", "leased"])
async def limited(request: pytest.FixtureRequest, tmp_path: Any) -> AsyncIterator[tuple[Strongroom, FaultyStore]]:
    """On SQLite, which answers reads of single documents without letting anything else run."""
    async with opened(new_url("sqlite", tmp_path), limits=request.param) as both:
        yield both


async def test_many_unknown_keys_are_looked_up_together_without_blocking_the_loop(
    limited: tuple[Strongroom, FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    room, store = limited
    known = await room.keys.create(name="k")
    count = 300
    texts = [f"unknown-{n}" for n in range(count)]
    async with counting(monkeypatch) as turns:
        store.reads.clear()
        events = [Usage({"tokens": 1}, text) for text in texts]
        assert await turns_of(room.keys.record_many(events), turns) >= count
        assert len(store.reads) <= count // 3
        store.reads.clear()
        events = [Usage({"tokens": 1}, key_id=f"unknown-{n}") for n in range(count)]
        assert await turns_of(room.keys.record_many(events), turns) >= count
        assert len(store.reads) <= count // 20
        store.reads.clear()
        answers: list[Verification] = []

        async def verify() -> None:
            asks = [{"text": text} for text in [*texts, known.text]]
            answers.extend(await room.keys.verify_many(asks))

        assert await turns_of(verify(), turns) >= count
        assert len(store.reads) <= count // 3 + 10
    assert [answer.code for answer in answers] == ["NOT_FOUND"] * count + ["VALID"]


async def test_unknown_keys_of_a_batch_are_named_and_known_ones_found(
    limited: tuple[Strongroom, FaultyStore],
) -> None:
    room, _ = limited
    made = [await room.keys.create(name=f"k{n}") for n in range(10)]
    rotated = await room.keys.rotate(made[0].key.id, overlap_s=600)
    room.keys.cache.forget(made[0].key.id)
    texts = [made[0].text, rotated.text, *(one.text for one in made[1:])]
    events = [Usage({"tokens": 1}, text) for text in texts]
    answers = await room.keys.record_many(events + [Usage({"tokens": 1}, key_id=one.key.id) for one in made])
    assert {answer.key_id for answer in answers} == {one.key.id for one in made}
    wrong = [*events[:3], Usage({"tokens": 1}, "unknown"), Usage({"tokens": 1}, key_id="unknown"), *events[3:]]
    with pytest.raises(InvalidInput) as caught:
        await room.keys.record_many(wrong)
    assert [problem.path for problem in caught.value.problems] == ["items.3.key", "items.4.key"]


async def test_verifications_of_unknown_keys_are_validated_like_others(
    limited: tuple[Strongroom, FaultyStore],
) -> None:
    room, _ = limited
    asks = [{"text": f"unknown-{n}"} for n in range(20)]
    for wrong in ({"cost": {"tokens": -1}}, {"ip": "nowhere"}):
        with pytest.raises(InvalidInput):
            await room.keys.verify_many([*asks, {"text": "another", **wrong}])


async def test_a_large_page_and_a_stream_do_not_block_the_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = "/v1/tenants/acme/policies"
    async with serving(new_url("sqlite", tmp_path)) as served:
        async with Stream(served.app, f"{path}:watch") as stream:
            ready = await stream.event()
            assert ready is not None
        for number in range(40):
            await served.call("PUT", f"{path}/p{number}", POLICY)
        async with counting(monkeypatch) as turns:
            assert await turns_of(served.get(f"{path}?limit=100"), turns) >= 3 * 40
            monkeypatch.setattr(watch, "HEARTBEAT_S", 0.05)
            before = turns[0]
            async with Stream(served.app, f"{path}:watch", ADMIN, Last_Event_ID=ready["id"]) as again:
                seen = 0
                while seen < 40:
                    event = await again.event()
                    assert event is not None
                    seen += "data" in event and event["event"] != "ready"
            assert turns[0] - before >= 40
