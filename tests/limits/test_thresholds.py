"""Threshold alerts: each threshold once a window, one event however often its batch is retried, exact money."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom import Limit, Strongroom
from strongroom.entities.query import Query
from strongroom.errors import NotFound, Unavailable
from strongroom.events.outbox import NAME as EVENTS
from strongroom.limits.counters import TotalCounter
from strongroom.limits.thresholds import (
    Crossing,
    Told,
    crossed,
    length_s,
    operations,
    subject_of,
    untold,
)
from strongroom.limits.windows import Anchored, Calendar, Refill, Total
from strongroom.quotas.model import quota_id
from strongroom.storage.port import MAX_OPERATIONS, Batch, Patch, Put
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import STORES, new_url, opened, rolling, stored_usage
from tests.helpers.waiting import wait_until
from tests.helpers.webhook_receiver import FAST, Receiver, delivering, receiving

SECOND = 1_000_000
T0 = 1_800_000_000 * SECOND
ROLLING = rolling("tokens", 1_000, 100)
ANCHORED = Limit(resource="tokens", limit=1_000, window=Anchored(seconds=100))
CALENDAR = Limit(resource="tokens", limit=1_000, window=Calendar(unit="day"))
TOTAL = Limit(resource="tokens", limit=1_000, window=Total())
THRESHOLDS = (50, 80, 100)


class Watch:
    """A ledger in small: what it remembers of one counter, and what it told."""

    def __init__(self, limit: Limit, most: int = 1_000, thresholds: Sequence[int] = THRESHOLDS) -> None:
        self.limit, self.most, self.thresholds = limit, most, thresholds
        self.told: Told | None = None
        self.used = 0
        self.events: list[tuple[int, int]] = []

    def use(self, used: int, now_us: int, ends_us: int | None = None) -> list[int]:
        """Usage is now `used`; the thresholds that are told of."""
        reached = crossed(self.used, used, self.most, self.thresholds)
        self.used = used
        if not reached:
            return []
        new, told = untold(self.told, reached, self.limit, self.most, ends_us, now_us)
        self.told = json.loads(json.dumps(told))
        self.events += [(threshold, now_us) for threshold in new]
        return new


# --- Which are crossed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "most", "expected"),
    [
        (0, 499, 1_000, []),
        (499, 500, 1_000, [50]),
        (500, 501, 1_000, []),
        (0, 1_000, 1_000, [50, 80, 100]),
        (999, 2_000, 1_000, [100]),
        (1_000, 2_000, 1_000, []),
        (800, 100, 1_000, []),
        (0, 5, 0, []),
        (0, 1, 3, []),
        (0, 2, 3, [50]),
        (2, 3, 3, [80, 100]),
    ],
)
def test_a_threshold_is_crossed_when_usage_reaches_it_from_below(
    before: int, after: int, most: int, expected: list[int]
) -> None:
    assert crossed(before, after, most, (100, 50, 80)) == expected


@given(
    st.integers(1, 10**15),
    st.lists(st.integers(0, 10**15), min_size=2, max_size=20),
    st.sets(st.integers(1, 1_000), max_size=20),
)
def test_however_usage_grows_in_steps_the_same_thresholds_are_crossed_once(
    most: int, points: list[int], thresholds: set[int]
) -> None:
    steps = sorted(points)
    wanted = sorted(thresholds)
    one_by_one = [t for a, b in itertools.pairwise(steps) for t in crossed(a, b, most, wanted)]
    assert one_by_one == crossed(steps[0], steps[-1], most, wanted)
    assert len(one_by_one) == len(set(one_by_one))


# --- Once a window --------------------------------------------------------------------------------------------


def test_each_threshold_fires_once_in_each_calendar_or_anchored_window() -> None:
    for limit in (ANCHORED, CALENDAR):
        watch = Watch(limit)
        end = T0 + 100 * SECOND
        assert watch.use(600, T0, end) == [50]
        assert watch.use(400, T0 + 1, end) == []  # a reservation was released
        assert watch.use(900, T0 + 2, end) == [80]
        assert watch.use(0, T0 + 3, end) == []
        assert watch.use(1_000, T0 + 4, end) == [100]
        assert watch.use(0, end, end + 100 * SECOND) == []
        assert watch.use(1_000, end + 1, end + 100 * SECOND) == [50, 80, 100]


def test_a_threshold_of_a_total_limit_fires_once() -> None:
    watch = Watch(TOTAL)
    assert watch.use(1_000, T0) == [50, 80, 100]
    watch.use(0, T0 + 1)
    assert watch.use(1_000, T0 + 10**15) == []


def test_a_threshold_of_a_total_with_refills_fires_once_in_each_refill_period() -> None:
    window = Total(refill=Refill(amount=500, seconds=100))
    watch, counter = Watch(Limit(resource="tokens", limit=1_000, window=window)), TotalCounter(window)
    for period in range(3):
        for second in (10, 20, 30):
            now_us = T0 + (100 * period + second) * SECOND
            watch.used = counter.used(now_us)
            counter.add(now_us, 300 if period == 0 else 170)
            watch.use(counter.used(now_us), now_us, counter.ends_us(now_us))
    assert [(threshold, (moment - T0) // SECOND) for threshold, moment in watch.events] == [
        (50, 20), (80, 30), (50, 110), (80, 130), (50, 210), (80, 230),
    ]  # fmt: skip


def test_two_refill_periods_give_two_events() -> None:
    limit = Limit(resource="tokens", limit=1_000, window=Total(refill=Refill(amount=500, unit="day")))
    ids = {event_of(crossing(limit=limit, window_ends_us=T0 + day * 86_400 * SECOND)).id for day in (1, 2)}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Total(), math.inf),
        (Total(refill=Refill(amount=1, seconds=30)), 30),
        (Total(refill=Refill(amount=1, unit="day")), 82_800),
        (Calendar(unit="minute"), 60),
        (Anchored(seconds=7), 7),
    ],
)
def test_min_window_s_compares_with_the_shortest_length_of_a_window(window: Any, expected: float) -> None:
    """An endpoint's `min_window_s` is what keeps a refill each second from telling each second."""
    assert length_s(window.model_dump()) == expected


def test_a_rolling_window_that_oscillates_around_a_threshold_does_not_flood() -> None:
    watch = Watch(ROLLING)
    for second in range(1_000):
        watch.use(510 if second % 2 == 0 else 490, T0 + second * SECOND)
    assert [(t, (at - T0) // SECOND) for t, at in watch.events] == [(50, s) for s in range(0, 1_000, 100)]


@given(
    st.lists(st.tuples(st.integers(0, 1_500), st.integers(0, 60)), max_size=60),
    st.sampled_from([ROLLING, ANCHORED, TOTAL]),
)
def test_a_threshold_fires_once_a_window_and_is_never_missed_in_a_new_one(
    steps: list[tuple[int, int]], limit: Limit
) -> None:
    watch = Watch(limit)
    now = T0
    told: dict[object, set[int]] = {}
    at: dict[int, int] = {}
    for used, seconds in steps:
        now += seconds * SECOND
        window = now // (100 * SECOND)
        ends = (window + 1) * 100 * SECOND if limit is ANCHORED else None
        key = window if limit is ANCHORED else "all"
        if key not in told:
            told[key] = set()
            watch.used = 0
        reached = crossed(watch.used, used, 1_000, THRESHOLDS)
        new = watch.use(used, now, ends)
        if limit is ROLLING:
            expected = [t for t in reached if t not in at or now - at[t] >= 100 * SECOND]
            at.update(dict.fromkeys(new, now))
        else:
            expected = [t for t in reached if t not in told[key]]
            told[key].update(new)
        assert new == expected


def test_thresholds_of_a_changed_limit_fire_again() -> None:
    watch = Watch(ANCHORED)
    end = T0 + 100 * SECOND
    assert watch.use(900, T0, end) == [50, 80]
    watch.most = 2_000
    assert watch.use(1_100, T0 + 1, end) == [50]


def test_the_stored_state_of_thresholds_is_small() -> None:
    watch = Watch(ROLLING, thresholds=range(1, 101, 5))
    watch.use(1_000, T0)
    assert len(json.dumps(watch.told)) < 700


# --- Events ---------------------------------------------------------------------------------------------------


def crossing(**more: Any) -> Crossing:
    fields: dict[str, Any] = {
        "subject_id": "key_1", "tenant": "acme", "key_id": "key_1", "limit": ROLLING, "threshold": 80, "used": 812,
        "most": 1_000, "window_ends_us": None, "now_us": T0,
    }  # fmt: skip
    return Crossing(**{**fields, **more})


def event_of(one: Crossing) -> Put:
    (operation,) = operations(one)
    assert isinstance(operation, Put)
    return operation


def test_a_threshold_event_names_the_subject_the_limit_and_the_usage() -> None:
    made = event_of(crossing(window_ends_us=T0 + SECOND, limit=ANCHORED))
    assert made.collection == EVENTS
    assert json.loads(made.document["body"]) == {
        "type": "limit.threshold",
        "timestamp": "2027-01-15T08:00:00Z",
        "tenant": "acme",
        "data": {
            "subject": {"kind": "key", "id": "key_1"},
            "key_id": "key_1",
            "resource": "tokens",
            "threshold": 80,
            "limit": 1_000,
            "used": 812,
            "window": {"kind": "anchored", "seconds": 100},
            "window_ends_at": "2027-01-15T08:00:01Z",
        },
    }


def test_money_in_a_threshold_event_is_exact() -> None:
    money = Limit(resource="cost", limit=Decimal("0.3"), window=Total())
    body = event_of(crossing(limit=money, most=300_000_000, used=240_000_001)).document["body"]
    assert '"limit":0.3,"used":0.240000001,' in body


def test_a_threshold_event_of_a_scoped_limit_names_its_models() -> None:
    limit = ROLLING.model_copy(update={"models": ("m-*",), "routes": ("/chat",)})
    data = json.loads(event_of(crossing(limit=limit)).document["body"])["data"]
    assert (data["models"], data["routes"]) == (["m-*"], ["/chat"])


def test_the_event_id_identifies_the_crossing() -> None:
    again = event_of(crossing(now_us=T0 + SECOND, used=900))  # another node, a moment later, in the same window
    assert again.id == event_of(crossing()).id
    others = [
        crossing(subject_id="key_2"), crossing(threshold=50), crossing(most=2_000), crossing(now_us=T0 + 100 * SECOND),
        crossing(limit=rolling("tokens", 1_000, 101)), crossing(limit=rolling("images", 1_000, 100)),
        crossing(limit=ANCHORED, window_ends_us=T0), crossing(limit=ANCHORED, window_ends_us=T0 + 1),
        crossing(limit=ROLLING.model_copy(update={"models": ("m",)})),
        crossing(limit=ROLLING.model_copy(update={"routes": ("m",)})),
    ]  # fmt: skip
    ids = {event_of(one).id for one in (crossing(), *others)}
    assert len(ids) == 1 + len(others)


@pytest.mark.parametrize("tenant", ["acme", "a/b", "1:2", "tenant:4:x"])
@pytest.mark.parametrize("name", ["u1", "a/b:c", "12:x"])
def test_a_threshold_event_of_a_quota_names_its_subject(tenant: str, name: str) -> None:
    assert subject_of(quota_id("user", tenant, name)) == {"kind": "user", "id": name}
    assert subject_of(quota_id("group", tenant, name)) == {"kind": "group", "id": name}
    assert subject_of(quota_id("tenant", tenant)) == {"kind": "tenant", "id": tenant}


# --- With a store, and a receiver -----------------------------------------------------------------------------


async def test_a_crossing_that_is_committed_twice_is_delivered_once(url_of_any: str) -> None:
    async with receiving() as receiver, delivering(url_of_any, timing=FAST) as (room, _):
        for tenant, thresholds in (("acme", [80]), ("*", [80, 100]), ("acme", [50]), ("globex", [80])):
            await room.webhooks.create(
                url=f"{receiver.url}/{tenant}/{thresholds[0]}", tenant=tenant, thresholds=thresholds, allow_private=True
            )
        for _ in range(2):
            await room.database.commit_counters(operations(crossing(now_us=room.clock.now_us())), T0)
            room.deliveries.wake([event_of(crossing(now_us=room.clock.now_us())).id])
            await wait_until(lambda: all_taken_up(room))
        await wait_until(lambda: room.deliveries.attempts.counts["delivered"] == 2)
        assert sorted(one.path for one in receiver.arrived) == ["/hook/*/80", "/hook/acme/80"]
        assert len(set(receiver.ids)) == 1


async def all_taken_up(room: Strongroom) -> bool:
    found = await room.store.find(EVENTS, None, Query(limit=1_000))
    return bool(found) and all(event["due_at"] is None for event in found)


async def test_a_batch_that_fails_leaves_no_event(room: Strongroom, store: FaultyStore) -> None:
    with pytest.raises(NotFound):
        await room.database.commit_counters([*operations(crossing()), Patch("key_usage", "none", {"count": 1})], T0)
    assert await store.get(EVENTS, None, event_of(crossing()).id) is None
    await room.database.commit_counters(operations(crossing()), T0)
    assert (await store.get(EVENTS, None, event_of(crossing()).id) or {})["type"] == "limit.threshold"


# --- The ledger's own crossings ---------------------------------------------------------------------------------


def percents(receiver: Receiver) -> list[tuple[str, int, int]]:
    """What arrived: whose limit, which threshold, how much was used then."""
    told = [json.loads(one.body)["data"] for one in receiver.arrived]
    return sorted((data["subject"]["kind"], data["threshold"], data["used"]) for data in told)


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_a_verification_that_crosses_a_threshold_sends_an_event(url_of_any: str, limits: str) -> None:
    async with receiving() as receiver, delivering(url_of_any, timing=FAST, limits=limits) as (room, _):
        await room.webhooks.create(url=receiver.url, tenant="acme", allow_private=True)
        key = await room.keys.create(name="worker", tenant="acme", limits=[rolling("tokens", 100)])
        other = await room.keys.create(name="worker", tenant="globex", limits=[rolling("tokens", 100)])
        for _ in range(12):
            for issued in (key, other):
                await room.keys.verify(issued.text, cost={"tokens": 10})
        await wait_until(lambda: len(receiver.arrived) >= 3)
        await wait_until(lambda: room.deliveries.attempts.counts["delivered"] == 3)
        assert [(kind, threshold) for kind, threshold, _ in percents(receiver)] == [
            ("key", 50),
            ("key", 80),
            ("key", 100),
        ]
        for one in receiver.arrived:
            data = json.loads(one.body)["data"]
            assert data["key_id"] == key.key.id
            assert data["used"] >= data["threshold"]


async def test_recorded_usage_that_crosses_a_threshold_sends_an_event_with_exact_money(tmp_path: Path) -> None:
    async with receiving() as receiver, delivering(new_url("sqlite", tmp_path), timing=FAST) as (room, _):
        await room.webhooks.create(url=receiver.url, tenant="acme", allow_private=True, thresholds=[90, 150])
        budget = Limit(resource="cost", limit=Decimal("1.5"), window=Calendar(unit="month"))
        key = await room.keys.create(name="worker", tenant="acme", limits=[budget])
        await room.keys.record(key_id=key.key.id, cost={"cost": Decimal("2.250000001")})
        await wait_until(lambda: room.deliveries.attempts.counts["delivered"] == 2)
        assert {"90", "150"} == {str(json.loads(one.body)["data"]["threshold"]) for one in receiver.arrived}
        assert all(b'"limit":1.5,"used":2.250000001,' in one.body for one in receiver.arrived)


class Asking:
    """Everyone wants to be told of the same thresholds."""

    def __init__(self, *thresholds: int) -> None:
        self._thresholds = thresholds

    def thresholds(self, tenant: str, limit: Limit) -> tuple[int, ...]:
        return self._thresholds

    def on_crossing(self, crossing: Crossing) -> Sequence[Put]:
        return operations(crossing)


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize(("keys", "thresholds"), [(100, (50, 80, 100)), (1, tuple(range(5, 101, 5)))])
async def test_more_crossings_than_one_commit_holds_all_send_events(
    kind: str, keys: int, thresholds: tuple[int, ...], tmp_path: Path
) -> None:
    """A hundred keys of one quota, or one key with as many limits as there may be, cross all thresholds at once."""
    limits = [rolling("tokens", 10)] if keys > 1 else [rolling("tokens", 10, 100 + number) for number in range(32)]
    async with opened(new_url(kind, tmp_path)) as (room, store):
        told = list[str]()
        room.ledger.watch(Asking(*thresholds), told.extend)
        await room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("tokens", 10 * keys)])
        made = [await room.keys.create(name=f"key {n}", tenant="acme", limits=limits) for n in range(keys)]
        for one in made:
            await room.keys.verify(one.text, cost={"tokens": 0})  # known, so that all below share one commit
        before = len(store.batches)
        answers = await asyncio.gather(*(room.keys.verify(one.text, cost={"tokens": 10}) for one in made))
        assert all(answer.valid for answer in answers)
        expected = len(thresholds) * (keys * len(limits) + 1)
        await wait_until(lambda: len(told) == expected)
        assert len(set(told)) == expected
        found = [operation for batch in store.batches[before:] for operation in batch.operations]
        assert {one.id for one in found if isinstance(one, Put) and one.collection == EVENTS} == set(told)
        assert max(len(batch.operations) for batch in store.batches[before:]) <= MAX_OPERATIONS
        usages = [await stored_usage(store, one.key.id) for one in made]
        assert not any(usage.due for usage in usages)


async def test_deferred_crossings_are_sent_with_the_next_commit_of_any_process(tmp_path: Path) -> None:
    """The process is gone after the commit that could not take them all."""
    limits = [rolling("tokens", 10, 100 + number) for number in range(32)]
    url, thresholds = new_url("sqlite", tmp_path), tuple(range(5, 101, 5))
    async with opened(url) as (room, store):
        room.ledger.watch(Asking(*thresholds), lambda events: None)
        key = await room.keys.create(name="key", tenant="acme", limits=limits)
        fail = Fault("before", Unavailable("the process is gone"))
        commits = 0

        def only_the_first(number: int, batch: Batch) -> Fault | None:
            nonlocal commits
            commits += any(one.collection == "key_usage" for one in batch.operations if isinstance(one, Put | Patch))
            return fail if commits > 1 else None

        store.fault = only_the_first
        assert (await room.keys.verify(key.text, cost={"tokens": 10})).valid
        await room.ledger.settled()
        assert (await stored_usage(store, key.key.id)).due
    async with opened(url) as (room, store):
        room.ledger.watch(Asking(*thresholds), lambda events: None)
        await room.keys.record(key_id=key.key.id, cost={"requests": 1})
        await room.ledger.settled()
        assert not (await stored_usage(store, key.key.id)).due
        assert len(await store.find(EVENTS, None, Query(limit=1_000))) == len(thresholds) * len(limits)
