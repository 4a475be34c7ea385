"""Bulk changes of keys: selection, counts, single failures, resumption; filtered lists and their indexes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from strongroom import ApiKey, Context, Strongroom
from strongroom.context import system_context
from strongroom.entities.query import MAX_LIMIT
from strongroom.errors import Denied, InvalidInput, StrongroomError, Unavailable
from strongroom.keys.bulk import Bulk, BulkStep
from strongroom.keys.filter import KeyFilter, after_prefix
from strongroom.keys.model import KeyChanges
from strongroom.storage.sqlite.session import Session
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import new_url, opened, rolling

MOMENT = datetime(2026, 5, 5, 12, tzinfo=UTC)
ACME = Context("acme", "key:acme", {"admin": True, "tenant": "acme"})
SYSTEM = system_context()


async def fill(room: Strongroom, count: int = 12) -> list[ApiKey]:
    """Keys of two tenants in turn, two users, owners and environments, a second apart."""
    made = []
    with time_machine.travel(MOMENT, tick=False) as clock:
        for n in range(count):
            clock.shift(1)
            issued = await room.keys.create(
                name=f"{'ab'[n % 2]}-{n:02}",
                tenant=("acme", "beta")[n % 2],
                user_id=f"u{n % 3}",
                owner=f"team{n % 4}",
                environment=("live", "test")[n % 5 == 0],
            )
            made.append(issued.key)
    return made


async def total(room: Strongroom, bulk: Bulk, **options: Any) -> tuple[int, int, int, list[str]]:
    """Looked at, changed, unchanged, and the ids that failed."""
    steps = [step async for step in room.keys.bulk(bulk, **options)]
    return (
        sum(step.looked_at for step in steps),
        sum(step.changed for step in steps),
        sum(step.unchanged for step in steps),
        [failure.id for step in steps for failure in step.failed],
    )


# --- Which keys -----------------------------------------------------------------------------------------------


async def test_a_list_has_the_keys_that_match_all_filters(room: Strongroom) -> None:
    made = await fill(room)
    at = [key.created_at for key in made]
    filters: list[tuple[dict[str, Any], set[int]]] = [
        ({}, set(range(12))),
        ({"tenant": "acme"}, {0, 2, 4, 6, 8, 10}),
        ({"user_id": "u1"}, {1, 4, 7, 10}),
        ({"owner": "team2"}, {2, 6, 10}),
        ({"owner": "team2", "tenant": "beta"}, set()),
        ({"environment": "test"}, {0, 5, 10}),
        ({"environment": "test", "tenant": "beta"}, {5}),
        ({"created_after": at[8]}, {9, 10, 11}),
        ({"created_before": at[2]}, {0, 1}),
        ({"created_after": at[2], "created_before": at[5], "tenant": "acme"}, {4}),
        ({"tenant": "none"}, set()),
    ]
    for fields, expected in filters:
        found = (await room.keys.list(**fields)).items
        assert [key.id for key in found] == [made[n].id for n in sorted(expected, reverse=True)], fields
        assert await room.keys.count(KeyFilter(**fields)) == len(expected)
    found = (await room.keys.list(name_prefix="b-0")).items
    assert [key.name for key in found] == ["b-01", "b-03", "b-05", "b-07", "b-09"]
    found = (await room.keys.list(name_prefix="a-", tenant="acme", created_after=at[5])).items
    assert [key.name for key in found] == ["a-06", "a-08", "a-10"]
    assert (await room.keys.list(owner="team1", context=ACME)).items == []
    assert [key.tenant for key in (await room.keys.list(owner="team2", context=ACME)).items] == ["acme"] * 3
    with pytest.raises(InvalidInput, match="created_after: found a time without a zone"):
        await room.keys.list(created_after=datetime(2026, 1, 1))  # noqa: DTZ001 - that is what is wrong with it


@pytest.mark.parametrize("fields", [{"tenant": "acme"}, {"name_prefix": "a"}, {"deleted": True}, {"owner": "team0"}])
async def test_pages_of_every_filtered_list_continue_with_their_cursor(
    room: Strongroom, fields: dict[str, Any]
) -> None:
    made = await fill(room)
    if "deleted" in fields:
        for key in made:
            await room.keys.delete(key.id)
    whole = (await room.keys.list(**fields)).items
    assert len(whole) >= 3
    found: list[ApiKey] = []
    cursor: str | None = None
    while True:
        page = await room.keys.list(**fields, limit=2, cursor=cursor)
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == whole


NAMES = st.text(st.sampled_from("ab\x7f\u0080é\ud7ff\ue000\uffff\U00010000\U0010ffff"), min_size=1, max_size=4)


@given(names=st.lists(NAMES, min_size=1, max_size=6), prefix=NAMES)
async def test_a_name_prefix_finds_the_names_that_start_with_it(names: list[str], prefix: str) -> None:
    async with Strongroom.open("json://:memory:") as room:
        for name in names:
            await room.keys.create(name=name)
        found = [key.name for key in (await room.keys.list(name_prefix=prefix)).items]
        assert found == sorted((name for name in names if name.startswith(prefix)), key=str.encode)


@given(prefix=NAMES)
def test_the_upper_bound_of_a_prefix_is_valid_text(prefix: str) -> None:
    end = after_prefix(prefix)
    assert end is None or end.encode() > prefix.encode()
    assert (end is None) == (set(prefix) == {"\U0010ffff"})


PLANS: list[tuple[dict[str, Any], str]] = [
    ({}, "deleted_at"),
    ({"tenant": "acme"}, "tenant.deleted_at.-created_at"),
    ({"user_id": "u1"}, "user_id"),
    ({"tenant": "acme", "user_id": "u1"}, "tenant.user_id.deleted_at"),
    ({"owner": "team1"}, "owner.deleted_at"),
    ({"environment": "test"}, "environment.deleted_at"),
    ({"tenant": "acme", "environment": "test"}, "tenant.environment.deleted_at"),
    ({"name_prefix": "a"}, "deleted_at.name"),
    ({"tenant": "acme", "name_prefix": "a"}, "tenant.deleted_at.name"),
    ({"created_after": MOMENT}, "deleted_at.-created_at"),
    ({"tenant": "acme", "created_before": MOMENT}, "tenant.deleted_at.-created_at"),
    ({"deleted": True}, "deleted_at.-created_at"),
    ({"tenant": "acme", "deleted": True}, "tenant.deleted_at.-created_at"),
]


@pytest.mark.parametrize(
    ("fields", "index"), PLANS, ids=lambda value: "+".join(value) if isinstance(value, dict) else ""
)
async def test_every_list_is_one_index_search_in_order(fields: dict[str, Any], index: str, tmp_path: Path) -> None:
    """Neither table nor index is walked, and nothing is sorted: so a page costs the same among 1,000,000 keys."""
    async with opened(new_url("sqlite", tmp_path)) as (room, store):
        await fill(room)
        session: Session = store.store._session  # type: ignore[attr-defined]
        query = KeyFilter(**fields).query(100).check(ApiKey.__collection__)
        page = (await room.keys.list(**fields, limit=1)).items
        last = query.order if page else ()
        deep = [getattr(page[0], name) for name, _ in last] if page else None
        for start in (None, deep):
            if start is not None:
                query = type(query)(query.where, query.order_by, query.limit, None, tuple(start)).check(
                    ApiKey.__collection__
                )
            statement, values = session.tables["api_keys"].pages.find(query)
            rows = session.points.execute(f"EXPLAIN QUERY PLAN {statement.sql}", values).fetchall()
            plan = "; ".join(str(detail) for *_, detail in rows)
            assert "SEARCH" in plan, plan
            assert "SCAN" not in plan.replace("SCAN page", ""), (
                plan
            )  # the page itself is read from its start to its end
            assert "TEMP B-TREE" not in plan, plan
            assert f"api_keys.index.{index}" in plan, plan


# --- What becomes of them -------------------------------------------------------------------------------------


async def test_a_bulk_change_disables_and_enables_filtered_keys_and_reports_them(room: Strongroom) -> None:
    made = await fill(room)
    await room.keys.disable(made[0].id)
    mine = Bulk("disable", KeyFilter(tenant="acme"))
    assert await total(room, mine, limit=2) == (6, 5, 1, [])
    assert {key.id for key in made[::2]} == {key.id for key in (await room.keys.list()).items if not key.enabled}
    assert await total(room, mine, limit=2) == (6, 0, 6, [])
    assert await total(room, Bulk("enable", KeyFilter()), limit=5) == (12, 6, 6, [])


async def test_keys_are_deleted_restored_and_purged(room: Strongroom, store: FaultyStore) -> None:
    made = await fill(room)
    test_keys = KeyFilter(environment="test")
    assert await total(room, Bulk("delete", test_keys), limit=2) == (3, 3, 0, [])
    assert len((await room.keys.list()).items) == 9
    assert await total(room, Bulk("restore", test_keys), limit=2) == (3, 3, 0, [])
    assert [key.id for key in (await room.keys.list()).items] == [key.id for key in reversed(made)]
    await total(room, Bulk("delete", KeyFilter(tenant="beta")))
    ids = [made[1].id, made[0].id]
    assert await total(room, Bulk("purge", ids=ids)) == (2, 2, 0, [])
    assert await store.get("api_keys", None, made[1].id) is None
    assert await store.get("api_keys", None, made[0].id) is None
    assert await total(room, Bulk("purge", KeyFilter(deleted=True)), limit=2) == (5, 5, 0, [])
    assert len((await room.keys.list()).items) == 5


async def test_many_keys_are_given_new_limits_groups_and_metadata(room: Strongroom) -> None:
    made = await fill(room)
    changes = KeyChanges(metadata={"plan": "pro"}, groups=["trial"], limits=[rolling("tokens", 5)])
    assert await total(room, Bulk("update", KeyFilter(user_id="u1"), changes=changes)) == (4, 4, 0, [])
    for n, key in enumerate((await room.keys.list()).items[::-1]):
        given = (key.metadata, key.groups, len(key.limits))
        assert given == (({"plan": "pro"}, ["trial"], 1) if n % 3 == 1 else ({}, [], 0))
        assert key.name == made[n].name
    assert await total(room, Bulk("update", KeyFilter(user_id="u1"), changes=changes)) == (4, 0, 4, [])


async def test_a_dry_run_counts_and_changes_nothing(room: Strongroom, store: FaultyStore) -> None:
    made = await fill(room)
    await room.keys.disable(made[0].id)
    batches = len(store.batches)
    acme = KeyFilter(tenant="acme")
    assert await total(room, Bulk("disable", acme, dry_run=True), limit=4) == (6, 5, 1, [])
    assert await total(room, Bulk("delete", acme, dry_run=True)) == (6, 6, 0, [])
    assert await total(room, Bulk("purge", ids=[made[0].id, "none"], dry_run=True)) == (2, 1, 0, ["none"])
    assert len(store.batches) == batches


async def test_a_bulk_change_reports_a_key_that_fails_and_changes_the_others(
    room: Strongroom, store: FaultyStore
) -> None:
    made = await fill(room, 6)
    await room.keys.delete(made[3].id)
    theirs = made[1].id

    def refuse(key: ApiKey) -> StrongroomError | None:
        return Denied("not yours") if key.id == made[2].id else None

    ids = [made[0].id, theirs, made[2].id, made[3].id, "none", "\ud800", made[4].id]
    bulk = Bulk("disable", ids=ids, refuse=refuse)
    steps = [step async for step in room.keys.bulk(bulk, limit=3, context=ACME)]
    failed = {failure.id: failure.code for step in steps for failure in step.failed}
    assert failed == {
        theirs: "not_found",
        made[2].id: "denied",
        made[3].id: "not_found",
        "none": "not_found",
        "\ud800": "invalid_input",
    }
    assert [(step.looked_at, step.changed) for step in steps] == [(3, 1), (3, 0), (1, 1)]
    disabled = {key.id for key in (await room.keys.list()).items if not key.enabled}
    assert disabled == {made[0].id, made[4].id}
    assert (await store.changes(None)).records[-1].actor == "key:acme"


async def test_a_caller_bound_to_a_tenant_changes_only_its_keys(room: Strongroom) -> None:
    await fill(room)
    assert (await total(room, Bulk("disable", KeyFilter()), context=ACME))[:2] == (6, 6)
    assert await total(room, Bulk("disable", KeyFilter(tenant="beta")), context=ACME) == (0, 0, 0, [])
    assert {key.tenant for key in (await room.keys.list()).items if not key.enabled} == {"acme"}


async def test_an_interrupted_bulk_change_continues_after_its_last_step(room: Strongroom, store: FaultyStore) -> None:
    await fill(room)
    broken = len(store.batches) + 5
    store.fault = lambda n, batch: Fault("before", Unavailable("gone")) if n == broken else None
    steps: list[BulkStep] = []

    async def work() -> None:
        async for step in room.keys.bulk(Bulk("delete", KeyFilter()), limit=3):
            steps.append(step)

    with pytest.raises(Unavailable):
        await work()
    assert [step.changed for step in steps] == [3]
    rest = await total(room, Bulk("delete", KeyFilter()), limit=3, cursor=steps[-1].cursor)
    left = (await room.keys.list()).items
    assert (left, rest[3]) == ([], [])
    assert rest[1] >= 7  # of the 9 others at most two were deleted before the store was gone


async def test_a_cancelled_bulk_change_can_be_repeated_from_the_start(room: Strongroom) -> None:
    await fill(room)

    async def some() -> None:
        async for _ in room.keys.bulk(Bulk("disable", KeyFilter()), limit=2):
            await asyncio.sleep(0)

    task = asyncio.create_task(some())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    looked_at, changed, unchanged, failed = await total(room, Bulk("disable", KeyFilter()))
    assert (looked_at, changed + unchanged, failed) == (12, 12, [])
    assert not [key for key in (await room.keys.list(limit=MAX_LIMIT)).items if key.enabled]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "filter"),
    ({"where": KeyFilter(), "ids": ["a"]}, "filter"),
    ({"ids": []}, "ids"),
    ({"ids": ["a"] * 10_001}, "ids"),
    ({"action": "update", "ids": ["a"]}, "changes"),
    ({"action": "update", "ids": ["a"], "changes": KeyChanges(permissions=["x"])}, "changes.permissions"),
    ({"action": "update", "ids": ["a"], "changes": KeyChanges(name="x", rotate_every_s=3600)}, "changes.name"),
    ({"ids": ["a"], "changes": KeyChanges(metadata={})}, "changes"),
]


@pytest.mark.parametrize(("fields", "path"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
async def test_an_invalid_bulk_change_is_refused_before_any_key_changes(fields: dict[str, Any], path: str) -> None:
    async with Strongroom.open("json://:memory:") as room:
        with pytest.raises(InvalidInput) as caught:
            await total(room, Bulk(**{"action": "disable", **fields}))
        assert path in [problem.path for problem in caught.value.problems]


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": 501}, {"cursor": "x"}, {"cursor": "9"}, {"cursor": "٣"}])
async def test_an_invalid_page_size_or_cursor_is_refused(options: dict[str, Any]) -> None:
    async with Strongroom.open("json://:memory:") as room:
        with pytest.raises(InvalidInput):
            await total(room, Bulk("disable", ids=["a", "b"]), **options)
        with pytest.raises(InvalidInput):
            await total(room, Bulk("disable", KeyFilter()), **{"cursor": "x", **options})


async def test_a_key_has_the_same_life_cycle_on_every_backend(url: str) -> None:
    async with Strongroom.open(url) as room:
        made = [
            await room.keys.create(
                name=f"{'ab'[n % 2]}{n}", tenant="acme", owner=f"team{n % 2}", environment=("live", "test")[n % 2]
            )
            for n in range(4)
        ]
        ids = [issued.key.id for issued in made]
        since = made[0].key.created_at

        async def found(**fields: Any) -> list[int]:
            return [ids.index(key.id) for key in (await room.keys.list(**fields)).items]

        assert await found() == [3, 2, 1, 0]
        assert await found(tenant="acme", owner="team1") == [3, 1]
        assert await found(tenant="acme", environment="live", created_after=since) == [2]
        assert await found(tenant="acme", name_prefix="b", created_after=since) == [1, 3]
        await room.keys.rotate(ids[0], overlap_s=60, hold=True)
        claimed = await room.keys.claim(ids[0])
        for text in (made[0].text, claimed.text):
            assert (await room.keys.verify(text)).valid
        assert await total(room, Bulk("delete", KeyFilter(tenant="acme", owner="team1")), limit=1) == (2, 2, 0, [])
        assert (await room.keys.verify(made[1].text)).code == "NOT_FOUND"
        assert await found() == [2, 0]
        assert await found(tenant="acme", deleted=True) == [3, 1]  # in the order of their deletion
        assert await total(room, Bulk("restore", KeyFilter(owner="team1")), limit=1) == (2, 2, 0, [])
        await room.keys.delete(ids[2], purge=True)
        assert await found() == [3, 1, 0]
        assert (await room.keys.verify(made[3].text)).valid
        assert await room.keys.count(KeyFilter(environment="test")) == 2
