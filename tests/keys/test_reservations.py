"""Reservations, durable and local: their holds, how they end, their charge; no limit is exceeded."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
import time_machine
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from strongroom import Context, IssuedKey, Limit, Rolling, Strongroom
from strongroom.context import us_from_utc
from strongroom.entities.query import Query
from strongroom.errors import Conflict, InvalidInput, NotFound, Unavailable
from strongroom.keys.durable_reservations import StoredReservation
from strongroom.keys.verification import Reservation
from strongroom.limits import tuning
from strongroom.limits.usage_state import compile_limits
from strongroom.limits.windows import Total
from strongroom.storage.port import Create
from tests.conftest import backend_of
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import new_url, opened, rolling, stored_usage
from tests.helpers.waiting import PATIENCE_S, wait_until

T = TypeVar("T")
MOMENT = datetime(2026, 5, 5, 12, tzinfo=UTC)
CONCURRENCY = {"resource": "concurrency", "limit": 3}


@dataclass
class Bench:
    """A Strongroom whose clock a test sets; `leased`: its reservations are in memory where they can be."""

    room: Strongroom
    store: FaultyStore
    clock: Any
    leased: bool

    async def key(self, *limits: Limit, **fields: Any) -> IssuedKey:
        """A new key. Where limits are leased it has a lease already, for as much as one gets; nothing is used of it."""
        issued = await self.room.keys.create(name="k", limits=list(limits), **fields)
        if self.leased and limits and limits[0].resource == "tokens":
            cost = {"tokens": int(limits[0].limit) // 60, "concurrency": 1}
            more: dict[str, Any] = {"cost": cost, "ttl_s": 1, "model": "big-0"}

            async def leased() -> bool:
                """The feed may tell of the new key after its first use: then the second one makes it known."""
                await self.room.keys.reserve(issued.text, **more, durable=True)
                self.clock.shift(timedelta(seconds=1))
                held = await self.room.keys.reserve(issued.text, **more)
                self.clock.shift(timedelta(seconds=1))
                return (held.reservation_id or "").startswith("rsl_")

            await wait_until(leased)
        return issued

    def now(self, seconds: float = 0) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=seconds)

    async def reserve(self, issued: IssuedKey, tokens: int, **more: Any) -> Reservation:
        return await self.room.keys.reserve(issued.text, cost={"tokens": tokens}, **more)

    async def used(self, issued: IssuedKey) -> tuple[Any, Any]:
        """What of the first limit is recorded and what is reserved."""
        status = (await self.room.keys.stats(issued.key.id)).limits[0]
        return status.recorded, status.reserved

    async def later(self, seconds: float) -> None:
        """Time goes by; leases are renewed meanwhile, as each second."""
        while seconds > 0:
            step = min(seconds, 2.0)
            self.clock.shift(timedelta(seconds=step))
            seconds -= step
            if seconds > 0:
                await self.renew()

    async def renew(self) -> None:
        if self.room.ledger.lease_manager is not None:
            self.room.ledger.lease_manager.renew_leases()
            await self.room.ledger.settled()


@pytest.fixture(
    params=["durable json-memory", "durable sqlite", "durable postgres", "leased json-memory", "leased sqlite"]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(how limits are paid for, the URL of a new store)"""
    limits, kind = request.param.split()
    return limits, backend_of(kind, tmp_path, request).new_url()


@pytest.fixture
async def bench(place: tuple[str, str], tmp_path: Path) -> AsyncIterator[Bench]:
    limits, url = place
    with time_machine.travel(MOMENT, tick=False) as clock:
        async with opened(url, limits=limits, lease_folder=str(tmp_path)) as (room, store):
            yield Bench(room, store, clock, limits == "leased")


# --- What is held -------------------------------------------------------------------------------------------------


async def test_a_hold_counts_until_it_is_settled(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    held = await bench.reserve(issued, 200)
    assert (held.valid, held.state, held.expires_at) == (True, "open", bench.now(60))
    assert held.reservation_id is not None
    assert held.reservation_id.startswith("rsl_" if bench.leased else "rsv_")
    shown = held.limits[0]
    assert (shown.used, shown.recorded) == (shown.reserved, 0)
    assert shown.reserved == 200 or bench.leased  # there what others hold is as of the last commit
    assert await bench.used(issued) == (0, 200)
    denied = await bench.room.keys.verify(issued.text, cost={"tokens": 801})
    assert (denied.code, denied.limits[0].reserved) == ("USAGE_EXCEEDED", 200)
    assert "200 reserved" in (denied.message or "")

    settled = await bench.room.keys.settle(held.reservation_id, {"tokens": 150})
    assert (settled.state, settled.charged, settled.valid) == ("settled", {"tokens": 150}, True)
    assert await bench.used(issued) == (150, 0)
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 850})).valid
    assert (await bench.room.keys.stats(issued.key.id)).totals == {"tokens": 1_000}


async def test_a_released_reservation_charges_nothing(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    held = await bench.reserve(issued, 200)
    released = await bench.room.keys.release(held.reservation_id or "")
    assert (released.state, released.charged) == ("released", {})
    assert await bench.used(issued) == (0, 0)
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 1_000})).valid


async def test_a_reservation_expires_exactly_at_its_end(bench: Bench) -> None:
    issued = await bench.key(Limit(resource="tokens", limit=100, window=Total()))
    held = await bench.reserve(issued, 20, ttl_s=30)
    await bench.later(29.999)
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 81})).code == "USAGE_EXCEEDED"
    bench.clock.shift(timedelta(milliseconds=1))
    with pytest.raises((NotFound, Conflict), match="ended"):
        await bench.room.keys.settle(held.reservation_id or "", {"tokens": 5})
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 100})).valid
    assert await bench.used(issued) == (100, 0)


async def test_a_reservation_expires_without_a_background_job(bench: Bench) -> None:
    """What is over is free for the next call, even if no renewal and no settlement has come by."""
    issued = await bench.key(Limit(resource="tokens", limit=100, window=Total()))
    await bench.reserve(issued, 20, ttl_s=2)
    bench.clock.shift(timedelta(seconds=2))
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 100})).valid


async def test_a_denial_caused_by_holds_says_when_they_expire(bench: Bench) -> None:
    issued = await bench.key(Limit(resource="tokens", limit=100, window=Total()))
    await bench.reserve(issued, 20, ttl_s=40)
    await bench.later(10)
    denied = await bench.room.keys.verify(issued.text, cost={"tokens": 81})
    assert denied.retry_after_s is not None
    if not bench.leased:  # what is in memory comes back when it is given back, or with this node's lease
        assert denied.retry_after_s == 30


async def test_a_settlement_above_the_hold_is_charged_in_full_and_the_next_call_is_denied(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    held = await bench.reserve(issued, 10)
    settled = await bench.room.keys.settle(held.reservation_id or "", {"tokens": 1_700})
    assert (settled.valid, settled.charged) == (True, {"tokens": 1_700})
    assert await bench.used(issued) == (1_700, 0)
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 1})).code == "USAGE_EXCEEDED"


async def test_a_resource_that_was_not_reserved_can_be_settled(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    held = await bench.reserve(issued, 10)
    settled = await bench.room.keys.settle(held.reservation_id or "", {"pages": 3})
    assert settled.charged == {"pages": 3}
    assert await bench.used(issued) == (0, 0)
    assert (await bench.room.keys.stats(issued.key.id)).totals["pages"] == 3


async def test_a_key_without_limits_can_be_reserved_and_is_charged(bench: Bench) -> None:
    issued = await bench.key()
    held = await bench.reserve(issued, 10)
    assert held.valid
    await bench.room.keys.settle(held.reservation_id or "", {"tokens": 7})
    assert (await bench.room.keys.stats(issued.key.id)).totals["tokens"] == 7


async def test_a_refused_key_reserves_nothing(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000), permissions=["a"])
    for more, code in (
        ({"permission": "b"}, "INSUFFICIENT_PERMISSIONS"),
        ({"tenant": "other"}, "NOT_FOUND"),
    ):
        answer = await bench.reserve(issued, 10, **more)
        assert (answer.valid, answer.code, answer.reservation_id, answer.state) == (False, code, None, None)
    answer = await bench.reserve(issued, 1_001)
    assert (answer.code, answer.reservation_id) == ("USAGE_EXCEEDED", None)
    await bench.room.keys.disable(issued.key.id)
    assert (await bench.reserve(issued, 10)).code == "DISABLED"
    assert (await bench.room.keys.reserve("sr_nothing")).code == "NOT_FOUND"
    assert await bench.used(issued) == (0, 0)


async def test_a_scoped_limit_is_held_only_by_calls_in_its_scope(bench: Bench) -> None:
    scoped = Limit.model_validate({**rolling("tokens", 400).model_dump(), "models": ("big-*",)})
    issued = await bench.key(scoped, rolling("tokens", 4_000, 60))
    big = await bench.reserve(issued, 50, model="big-1")
    small = await bench.reserve(issued, 50, model="small")
    assert await bench.used(issued) == (0, 50)
    assert not (await bench.reserve(issued, 351, model="big-2")).valid
    await bench.room.keys.settle(small.reservation_id or "", {"tokens": 30})
    await bench.room.keys.settle(big.reservation_id or "", {"tokens": 20})
    assert [limit.recorded for limit in (await bench.room.keys.stats(issued.key.id)).limits] == [20, 50]


# --- The same again -----------------------------------------------------------------------------------------------


async def test_settling_again_answers_the_same_and_charges_once(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    held = await bench.reserve(issued, 20)
    id = held.reservation_id or ""
    answers = await asyncio.gather(*(bench.room.keys.settle(id, {"tokens": 5}) for _ in range(10)))
    answers += [await bench.room.keys.settle(id, {"tokens": 5})]
    assert {(answer.state, answer.charged["tokens"]) for answer in answers} == {("settled", 5)}
    with pytest.raises(Conflict, match="settled before"):
        await bench.room.keys.settle(id, {"tokens": 6})
    for call in (bench.room.keys.release(id), bench.room.keys.extend(id)):
        with pytest.raises((Conflict, NotFound)):
            await call
    assert await bench.used(issued) == (5, 0)
    assert (await bench.room.keys.stats(issued.key.id)).totals["tokens"] == 5


async def test_settling_again_with_other_amounts_is_a_conflict(bench: Bench) -> None:
    """Other ones are also fewer: what the first settlement named and the second does not."""
    issued = await bench.key(rolling("tokens", 1_000))
    for reported in ({}, {"tokens": 2, "pages": 1}):
        id = (await bench.reserve(issued, 20)).reservation_id or ""
        if reported:
            await bench.room.keys.extend(id, used=reported)
        first = await bench.room.keys.settle(id, {"tokens": 5, "pages": 3})
        assert (await bench.room.keys.settle(id, {"pages": 3, "tokens": 5, "images": 0})).charged == first.charged
        others: list[dict[str, int]] = [{"tokens": 5}, {"pages": 3}, {}, {"tokens": 5, "pages": 3, "images": 1}]
        for other in others:
            with pytest.raises(Conflict, match="settled before, with other amounts"):
                await bench.room.keys.settle(id, other)
    id = (await bench.reserve(issued, 20)).reservation_id or ""
    await bench.room.keys.extend(id, used={"pages": 1})
    await bench.room.keys.settle(id, {"tokens": 5})
    assert (await bench.room.keys.settle(id, {"tokens": 5})).charged == {"tokens": 5, "pages": 1}
    assert (await bench.room.keys.settle(id, {"tokens": 5, "pages": 1})).state == "settled"
    assert await bench.used(issued) == (15, 0)


async def test_a_concurrent_usage_report_and_settlement_are_charged_once(bench: Bench) -> None:
    """Where the lease has lapsed both are commits: the settlement must not be decided before the report is charged."""
    issued = await bench.key(rolling("tokens", 1_000))
    id = (await bench.reserve(issued, 30)).reservation_id or ""
    bench.store.gate = asyncio.Event()
    bench.clock.shift(timedelta(seconds=6))
    number = len(bench.store.batches)
    report = asyncio.create_task(bench.room.keys.extend(id, used={"tokens": 10}))
    await wait_until(lambda: len(bench.store.batches) > number)
    settlement = asyncio.create_task(bench.room.keys.settle(id, {"tokens": 20}))
    await asyncio.sleep(0)
    bench.store.gate.set()
    assert ((await report).charged, (await settlement).charged) == ({"tokens": 10}, {"tokens": 20})
    assert await bench.used(issued) == (20, 0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("then", ["report", "settle", "release"])
async def test_a_usage_report_whose_answer_was_lost_is_charged_once(bench: Bench, when: Any, then: str) -> None:
    """Whatever is done to the reservation next."""
    issued = await bench.key(rolling("tokens", 1_000))
    id = (await bench.reserve(issued, 30)).reservation_id or ""
    bench.clock.shift(timedelta(seconds=6))
    number = len(bench.store.batches)
    bench.store.fault = lambda n, batch: Fault(when, Unavailable("lost")) if n == number else None
    with pytest.raises(Unavailable):
        await bench.room.keys.extend(id, used={"tokens": 10})
    match then:
        case "report":
            await bench.room.keys.extend(id, used={"tokens": 15})
            used = (15, 15)
        case "settle":
            assert (await bench.room.keys.settle(id, {"tokens": 20})).charged == {"tokens": 20}
            used = (20, 0)
        case _:
            charged = (await bench.room.keys.release(id)).charged
            used = (10 if bench.leased or when == "after" else 0, 0)
            assert charged.get("tokens", 0) == used[0]
    assert await bench.used(issued) == used


async def test_releasing_again_answers_the_same_and_prevents_settling(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    held = await bench.reserve(issued, 20)
    id = held.reservation_id or ""
    assert {(await bench.room.keys.release(id)).state for _ in range(3)} == {"released"}
    with pytest.raises(Conflict, match="released before"):
        await bench.room.keys.settle(id, {"tokens": 6})
    assert await bench.used(issued) == (0, 0)


async def test_of_a_concurrent_settlement_and_release_one_applies(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 100_000))
    for _ in range(10):
        id = (await bench.reserve(issued, 5)).reservation_id or ""
        results = await asyncio.gather(
            bench.room.keys.settle(id, {"tokens": 5}), bench.room.keys.release(id), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["Conflict", "Reservation"]
    recorded, reserved = await bench.used(issued)
    assert recorded % 5 == 0
    assert reserved == 0


async def test_one_idempotency_key_creates_one_reservation(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    answers = await asyncio.gather(*(bench.reserve(issued, 200, idempotency_key="i") for _ in range(20)))
    assert {answer.valid for answer in answers} == {True}
    (id,) = {answer.reservation_id for answer in answers}
    assert await bench.used(issued) == (0, 200)
    with pytest.raises(Conflict, match="different request"):
        await bench.reserve(issued, 201, idempotency_key="i")
    other = await bench.key(rolling("tokens", 1_000))
    for another in ({"ttl_s": 61}, {"model": "m"}, {"route": "/r"}):
        with pytest.raises(Conflict, match="different request"):
            await bench.reserve(issued, 200, idempotency_key="i", **another)
    with pytest.raises(Conflict, match="different request"):
        await bench.reserve(other, 200, idempotency_key="i")
    assert (await bench.reserve(issued, 200, idempotency_key="j")).reservation_id != id
    assert (await bench.reserve(issued, 200, idempotency_key="i", actor="other")).reservation_id != id
    await bench.room.keys.settle(id or "", {"tokens": 3})
    again = await bench.reserve(issued, 200, idempotency_key="i")
    assert (again.reservation_id, again.state, again.charged) == (id, "settled", {"tokens": 3})
    with pytest.raises(Conflict, match="different request"):
        await bench.reserve(issued, 201, idempotency_key="i")


async def test_a_retry_is_answered_as_the_first_call_while_the_reservation_is_open(bench: Bench) -> None:
    await bench.room.quotas.put(kind="user", tenant="default", name="u", limits=[rolling("tokens", 2_000)])
    issued = await bench.key(rolling("tokens", 1_000), user_id="u")
    asked: dict[str, Any] = {"cost": {"tokens": 200, "words": 1}, "idempotency_key": "i"}
    first = await bench.room.keys.reserve(issued.text, **asked)
    assert ([limit.reserved for limit in first.limits], first.uncounted) == ([200, 200], ["words"])
    await bench.room.keys.record(key_id=issued.key.id, cost={"tokens": 50})
    assert await bench.room.keys.reserve(issued.text, **asked) == first
    await bench.room.keys.update(issued.key.id, limits=[])  # what is not there any more is not shown
    assert [limit.subject for limit in (await bench.room.keys.reserve(issued.text, **asked)).limits] == ["user:u"]


async def test_an_idempotency_key_matches_its_request_after_an_extension(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    first = await bench.reserve(issued, 200, idempotency_key="i")
    await bench.room.keys.extend(first.reservation_id or "", cost={"tokens": 300}, used={"tokens": 10})
    again = await bench.reserve(issued, 200, idempotency_key="i")
    assert (again.reservation_id, again.state, again.charged) == (first.reservation_id, "open", {"tokens": 10})
    assert await bench.used(issued) == (10, 290)


async def test_a_retry_after_the_reservation_ended_holds_nothing_and_says_so(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    await bench.reserve(issued, 200, ttl_s=10, idempotency_key="i")
    await bench.later(10)
    with pytest.raises(Conflict, match="ended"):
        await bench.reserve(issued, 200, ttl_s=10, idempotency_key="i")
    bench.clock.shift(timedelta(days=1, seconds=1))  # after a day it is forgotten, whether or not it was purged
    assert (await bench.reserve(issued, 200, ttl_s=10, idempotency_key="i")).valid
    assert await bench.used(issued) == (0, 200)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_reservation_whose_answer_was_lost_is_created_once(bench: Bench, when: Any) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    number = len(bench.store.batches)
    bench.store.fault = lambda n, batch: Fault(when, Unavailable("lost")) if n == number else None
    with pytest.raises(Unavailable):
        await bench.reserve(issued, 200, idempotency_key="i")
    assert (await bench.reserve(issued, 200, idempotency_key="i")).valid
    assert await bench.used(issued) == (0, 200)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("amount", [5, 1_500])
async def test_a_settlement_whose_answer_was_lost_is_charged_once(bench: Bench, when: Any, amount: int) -> None:
    """Above what a process holds in memory it is a commit as well."""
    issued = await bench.key(rolling("tokens", 1_000))
    id = (await bench.reserve(issued, 20)).reservation_id or ""
    number = len(bench.store.batches)
    bench.store.fault = lambda n, batch: Fault(when, Unavailable("lost")) if n == number else None
    if bench.leased and amount == 5:
        await bench.room.keys.settle(id, {"tokens": amount})
    else:
        with pytest.raises(Unavailable):
            await bench.room.keys.settle(id, {"tokens": amount})
    settled = await bench.room.keys.settle(id, {"tokens": amount})
    assert (settled.state, settled.charged) == ("settled", {"tokens": amount})
    assert await bench.used(issued) == (amount, 0)
    assert (await bench.room.keys.stats(issued.key.id)).totals["tokens"] == amount


@pytest.mark.parametrize("once", [None, "i"])
async def test_a_caller_cancelled_during_a_reservation_leaves_no_hold_unless_it_can_retry(
    bench: Bench, once: str | None
) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    bench.store.gate = asyncio.Event()
    number = len(bench.store.batches)
    task = asyncio.create_task(bench.reserve(issued, 200, durable=True, idempotency_key=once))
    await wait_until(lambda: len(bench.store.batches) > number)
    task.cancel()
    await asyncio.wait([task])
    bench.store.gate.set()
    if once is not None:
        assert (await bench.reserve(issued, 200, idempotency_key=once)).valid

    async def left() -> bool:
        return await bench.used(issued) == (0, 0 if once is None else 200)

    await bench.room.ledger.settled()
    await wait_until(left)
    assert await bench.store.store.find("reservations", None, Query())


# --- Longer, and more ---------------------------------------------------------------------------------------------


async def test_an_extension_prolongs_a_reservation_and_can_add_to_its_hold(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    id = (await bench.reserve(issued, 20, ttl_s=10)).reservation_id or ""
    await bench.later(9)
    extended = await bench.room.keys.extend(id, ttl_s=10, cost={"tokens": 120})
    assert (extended.valid, extended.state, extended.reservation_id) == (True, "open", id)
    assert extended.expires_at == bench.now(10)
    await bench.later(9)
    assert await bench.used(issued) == (0, 120)
    await bench.room.keys.extend(id, ttl_s=10)
    assert await bench.used(issued) == (0, 120)
    await bench.room.keys.extend(id, ttl_s=10, cost={"tokens": 7})
    assert await bench.used(issued) == (0, 7)
    await bench.later(10)
    assert await bench.used(issued) == (0, 0)


async def test_reported_usage_stays_charged_when_a_reservation_expires(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    id = (await bench.reserve(issued, 100, ttl_s=10)).reservation_id or ""
    extended = await bench.room.keys.extend(id, ttl_s=10, used={"tokens": 30})
    assert extended.charged == {"tokens": 30}
    assert await bench.used(issued) == (30, 70)
    extended = await bench.room.keys.extend(id, ttl_s=10, used={"tokens": 45})
    assert (await bench.used(issued), extended.charged) == ((45, 55), {"tokens": 45})
    await bench.room.keys.extend(id, ttl_s=10, used={"tokens": 45})
    assert await bench.used(issued) == (45, 55)
    with pytest.raises(InvalidInput) as caught:
        await bench.room.keys.extend(id, ttl_s=10, used={"tokens": 44})
    assert [problem.path for problem in caught.value.problems] == ["used.tokens"]
    with pytest.raises(InvalidInput) as caught:
        await bench.room.keys.settle(id, {"tokens": 44})
    assert [problem.path for problem in caught.value.problems] == ["cost.tokens"]
    await bench.later(10)
    assert await bench.used(issued) == (45, 0)


async def test_a_settlement_states_the_total_usage(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    id = (await bench.reserve(issued, 100)).reservation_id or ""
    await bench.room.keys.extend(id, used={"tokens": 30})
    settled = await bench.room.keys.settle(id, {"tokens": 80})
    assert settled.charged == {"tokens": 80}
    assert await bench.used(issued) == (80, 0)
    id = (await bench.reserve(issued, 100)).reservation_id or ""
    await bench.room.keys.extend(id, used={"tokens": 30})
    released = await bench.room.keys.release(id)
    assert released.charged == {"tokens": 30}
    assert await bench.used(issued) == (110, 0)


async def test_a_denied_extension_leaves_the_reservation_unchanged(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    id = (await bench.reserve(issued, 100, ttl_s=10)).reservation_id or ""
    await bench.later(5)
    denied = await bench.room.keys.extend(id, ttl_s=60, cost={"tokens": 1_001}, used={"tokens": 10})
    assert (denied.valid, denied.code, denied.state, denied.charged) == (False, "USAGE_EXCEEDED", "open", {})
    assert denied.message
    assert await bench.used(issued) == (0, 100)
    await bench.later(5)
    assert await bench.used(issued) == (0, 0)


# --- What cannot be -----------------------------------------------------------------------------------------------


async def test_another_tenants_reservation_answers_like_a_missing_one(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000), tenant="acme")
    id = (await bench.reserve(issued, 10)).reservation_id or ""
    stranger = Context("globex", "key:g", {"tenant": "globex", "admin": True})
    unknown = id[:-4] + "zzzz"

    async def messages(id: str) -> list[str]:
        found = []
        for call in (
            bench.room.keys.settle(id, {"tokens": 5}, context=stranger),
            bench.room.keys.extend(id, context=stranger),
            bench.room.keys.release(id, context=stranger),
        ):
            with pytest.raises(NotFound) as caught:
                await call
            found.append(str(caught.value).replace(id, "…"))
        return found

    assert await messages(id) == await messages(unknown)
    assert await bench.used(issued) == (0, 10)
    await bench.room.keys.settle(id, {"tokens": 5}, context=Context("acme", "key:a", {"tenant": "acme"}))
    assert await messages(id) == await messages(unknown)


@pytest.mark.parametrize("ttl_s", [0, -1, 86_401, 1.5, True, "60"])
async def test_an_invalid_time_is_refused(bench: Bench, ttl_s: Any) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    with pytest.raises(InvalidInput) as caught:
        await bench.reserve(issued, -5, ttl_s=ttl_s, ip="nowhere")
    assert [problem.path for problem in caught.value.problems] == ["ttl_s", "cost.tokens", "ip"]
    id = (await bench.reserve(issued, 10)).reservation_id or ""
    with pytest.raises(InvalidInput) as caught:
        await bench.room.keys.extend(id, ttl_s=ttl_s)
    assert [problem.path for problem in caught.value.problems] == ["ttl_s"]


# --- The key changes meanwhile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["disable", "delete", "rotate", "rename", "expire"])
async def test_a_changed_key_is_still_charged_for_its_reservation(bench: Bench, how: str) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    ids = [(await bench.reserve(issued, 100)).reservation_id or "" for _ in range(3)]
    keys = bench.room.keys
    match how:
        case "disable":
            await keys.disable(issued.key.id)
        case "delete":
            await keys.delete(issued.key.id)
        case "rotate":
            await keys.rotate(issued.key.id)
        case "rename":
            await keys.update(issued.key.id, name="other")
        case _:
            await keys.update(issued.key.id, expires_at=bench.now(1))
            await bench.later(2)
    assert (await keys.extend(ids[0], ttl_s=100)).valid
    assert (await keys.settle(ids[0], {"tokens": 60})).charged == {"tokens": 60}
    assert (await keys.settle(ids[1], {"tokens": 1_200})).charged == {"tokens": 1_200}
    assert (await keys.release(ids[2])).state == "released"
    if how == "delete":
        await keys.restore(issued.key.id)
    assert await bench.used(issued) == (1_260, 0)


async def test_a_reservation_of_a_purged_key_is_settled_on_its_quotas(bench: Bench) -> None:
    """Its own usage is gone with it; what its quotas hold for it is given back, and what was used is charged there."""
    await bench.room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("tokens", 2_000)])
    issued = await bench.key(rolling("tokens", 1_000), tenant="acme")
    ids = [(await bench.reserve(issued, 100)).reservation_id or "" for _ in range(3)]
    await bench.room.keys.delete(issued.key.id, purge=True)
    for _ in range(2):
        settled = await bench.room.keys.settle(ids[0], {"tokens": 80})
        assert (settled.state, settled.charged, settled.key_id) == ("settled", {"tokens": 80}, issued.key.id)
    assert (await bench.room.keys.release(ids[1])).state == "released"
    await bench.renew()
    of_tenant = (await bench.room.quotas.stats("tenant", "acme")).limits[0]
    assert (of_tenant.recorded, of_tenant.reserved) == (80, 100)
    await bench.room.quotas.delete("tenant", "acme")
    assert (await bench.room.keys.settle(ids[2], {"tokens": 5})).charged == {"tokens": 5}
    assert await bench.store.store.get("key_usage", None, issued.key.id) is None


@pytest.mark.parametrize("moves", ["group", "user"])
async def test_a_reservation_is_charged_to_its_original_quotas_when_its_key_moves(bench: Bench, moves: str) -> None:
    """The group that it was made in has it, the one that the key is in now is never over its limit by it."""
    for name in ("old", "new"):
        await bench.room.quotas.put(kind=moves, tenant="acme", name=name, limits=[rolling("tokens", 6_000)])  # type: ignore[arg-type]

    def belongs(name: str) -> dict[str, Any]:
        return {"groups": [name]} if moves == "group" else {"user_id": name}

    async def of(name: str) -> tuple[Any, Any]:
        status = (await bench.room.quotas.stats(moves, "acme", name)).limits[0]
        return status.recorded, status.reserved

    issued = await bench.key(rolling("tokens", 60_000), tenant="acme", **belongs("old"))
    id = (await bench.reserve(issued, 900)).reservation_id or ""
    assert await of("old") == (0, 900)
    await bench.room.keys.update(issued.key.id, **belongs("new"))
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 6_000})).valid
    settled = await bench.room.keys.settle(id, {"tokens": 850})
    assert settled.charged == {"tokens": 850}
    assert (await of("old"), await of("new")) == ((850, 0), (6_000, 0))
    assert await bench.used(issued) == (6_850, 0)


async def test_an_extension_moves_a_reservation_to_the_keys_current_quotas(tmp_path: Path) -> None:
    async with Strongroom.open("json://:memory:") as room:
        for name, most in (("old", 100), ("new", 100), ("small", 10)):
            await room.quotas.put(kind="group", tenant="acme", name=name, limits=[rolling("tokens", most)])

        async def of(name: str) -> tuple[Any, Any]:
            status = (await room.quotas.stats("group", "acme", name)).limits[0]
            return status.recorded, status.reserved

        issued = await room.keys.create(name="k", tenant="acme", groups=["old"])
        id = (await room.keys.reserve(issued.text, cost={"tokens": 90})).reservation_id or ""
        await room.keys.update(issued.key.id, groups=["small"])
        denied = await room.keys.extend(id)
        assert (denied.valid, denied.limits[-1].subject, denied.limits[-1].exceeded) == (False, "group:small", True)
        assert (await of("old"), await of("small")) == ((0, 90), (0, 0))
        await room.keys.update(issued.key.id, groups=["new"])
        assert (await room.keys.extend(id, used={"tokens": 30})).valid
        assert (await of("old"), await of("new")) == ((30, 0), (0, 60))
        await room.keys.settle(id, {"tokens": 50})
        assert (await of("old"), await of("new")) == ((30, 0), (20, 0))


@pytest.mark.parametrize("whose", ["key", "quota"])
async def test_a_hold_counts_in_a_limit_whose_window_changed(bench: Bench, whose: str) -> None:
    async def limit(seconds: int) -> None:
        limits = [rolling("tokens", 6_000, seconds)]
        if whose == "key":
            await bench.room.keys.update(issued.key.id, limits=limits)
        else:
            await bench.room.quotas.put(kind="tenant", tenant="acme", limits=limits)

    async def standing() -> tuple[Any, Any]:
        if whose == "key":
            return await bench.used(issued)
        status = (await bench.room.quotas.stats("tenant", "acme")).limits[0]
        return status.recorded, status.reserved

    if whose == "quota":
        await bench.room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("tokens", 6_000)])
    issued = await bench.key(rolling("tokens", 6_000), tenant="acme")
    held = await bench.reserve(issued, 90)
    for seconds in (7_200, 60):
        await limit(seconds)
        assert (await bench.reserve(issued, 5_911)).code == "USAGE_EXCEEDED"
        await bench.renew()
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 5_910})).valid
    assert await standing() == (5_910, 90)
    settled = await bench.room.keys.settle(held.reservation_id or "", {"tokens": 90})
    assert settled.charged == {"tokens": 90}
    assert await standing() == (6_000, 0)


async def test_a_hold_counts_in_an_added_limit(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 6_000))
    held = await bench.reserve(issued, 90)
    limits = [rolling("tokens", 6_000), rolling("tokens", 100, 60)]
    await bench.room.keys.update(issued.key.id, limits=limits)
    assert (await bench.reserve(issued, 11)).code == "USAGE_EXCEEDED"
    assert (await bench.reserve(issued, 10)).valid
    await bench.room.keys.settle(held.reservation_id or "", {"tokens": 70})
    stats = (await bench.room.keys.stats(issued.key.id)).limits
    assert [(one.recorded, one.reserved) for one in stats] == [(70, 10), (70, 10)]


async def test_a_recreated_quota_has_no_hold_of_the_previous_one(bench: Bench) -> None:
    issued = await bench.key(tenant="acme")

    async def put() -> None:
        await bench.room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("tokens", 100)])

    await put()
    first = (await bench.reserve(issued, 90, durable=True)).reservation_id or ""
    await bench.room.quotas.delete("tenant", "acme")
    await put()
    second = (await bench.reserve(issued, 90, durable=True)).reservation_id or ""
    await bench.room.keys.release(first)
    status = (await bench.room.quotas.stats("tenant", "acme")).limits[0]
    assert (status.recorded, status.reserved) == (0, 90)
    await bench.room.keys.settle(second, {"tokens": 80})
    status = (await bench.room.quotas.stats("tenant", "acme")).limits[0]
    assert (status.recorded, status.reserved) == (80, 0)


async def test_a_settlement_is_charged_to_the_changed_limits(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000))
    ids = [(await bench.reserve(issued, 100)).reservation_id or "" for _ in range(2)]
    await bench.room.keys.update(issued.key.id, limits=[rolling("tokens", 150)])
    denied = await bench.room.keys.verify(issued.text, cost={"tokens": 1})
    assert (denied.code, denied.limits[0].used) == ("USAGE_EXCEEDED", 200)
    await bench.room.keys.release(ids[0])
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 50})).valid
    await bench.room.keys.update(issued.key.id, limits=[rolling("tokens", 500, 60), rolling("pages", 5)])
    settled = await bench.room.keys.settle(ids[1], {"tokens": 80, "pages": 2})
    assert settled.charged == {"tokens": 80, "pages": 2}
    stats = await bench.room.keys.stats(issued.key.id)
    assert [(limit.resource, limit.recorded, limit.reserved) for limit in stats.limits] == [
        ("tokens", 80, 0), ("pages", 2, 0)
    ]  # fmt: skip


async def test_a_quota_created_during_a_reservation_is_charged_at_the_settlement(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000), tenant="acme")
    id = (await bench.reserve(issued, 100)).reservation_id or ""
    await bench.room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("tokens", 500)])
    await bench.room.keys.settle(id, {"tokens": 60})
    assert (await bench.room.quotas.stats("tenant", "acme")).limits[0].recorded == 60


# --- Concurrency --------------------------------------------------------------------------------------------------


async def test_concurrency_counts_open_reservations(bench: Bench) -> None:
    issued = await bench.key(Limit.model_validate(CONCURRENCY), rolling("tokens", 100_000))
    answers = await asyncio.gather(*(bench.reserve(issued, 1, ttl_s=20) for _ in range(30)))
    ids = [answer.reservation_id or "" for answer in answers if answer.valid]
    assert len(ids) == 3
    denied = next(answer for answer in answers if not answer.valid)
    assert (denied.code, denied.limits[0].exceeded) == ("RATE_LIMITED", True)
    assert "concurrency: 3 of 3 in use, 1 more asked" in (denied.message or "")
    await bench.room.keys.settle(ids[0], {"tokens": 1})
    assert [(await bench.reserve(issued, 1, ttl_s=20)).valid for _ in range(2)] == [True, False]
    await bench.room.keys.release(ids[1])
    assert [(await bench.reserve(issued, 1, ttl_s=20)).valid for _ in range(2)] == [True, False]
    await bench.later(20)
    assert [(await bench.reserve(issued, 1, ttl_s=20)).valid for _ in range(4)] == [True, True, True, False]
    assert (await bench.room.keys.verify(issued.text)).valid  # a verification holds nothing
    with pytest.raises(InvalidInput, match="concurrency"):
        await bench.room.keys.verify(issued.text, cost={"concurrency": 1})


async def test_a_reservation_can_hold_several_or_no_units_of_concurrency(bench: Bench) -> None:
    issued = await bench.key(Limit.model_validate(CONCURRENCY))
    two = await bench.room.keys.reserve(issued.text, cost={"concurrency": 2})
    assert not (await bench.room.keys.reserve(issued.text, cost={"concurrency": 2})).valid
    assert (await bench.room.keys.reserve(issued.text, cost={"concurrency": 0})).valid
    assert (await bench.room.keys.reserve(issued.text)).valid
    assert not (await bench.room.keys.reserve(issued.text)).valid
    await bench.room.keys.release(two.reservation_id or "")
    assert (await bench.room.keys.reserve(issued.text, cost={"concurrency": 2})).valid


@pytest.fixture(params=["durable sqlite", "leased sqlite", "durable postgres", "leased postgres"])
def shared_place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str]:
    """(how limits are paid for, the URL of a new store that several nodes can open)"""
    limits, kind = request.param.split()
    return limits, backend_of(kind, tmp_path, request).new_url()


async def test_concurrency_is_exact_for_many_callers_of_several_nodes(shared_place: tuple[Any, str]) -> None:
    mode, url = shared_place
    inside = most = done = 0
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(Strongroom.open(url, limits=mode)) for _ in range(3)]
        limit = Limit.model_validate({"resource": "concurrency", "limit": 7})
        issued = await nodes[0].keys.create(name="k", limits=[limit, rolling("tokens", 10**6)])

        async def call(number: int) -> None:
            nonlocal inside, most, done
            node = nodes[number % 3]
            for _ in range(6):
                held = await node.keys.reserve(issued.text, cost={"tokens": 2})
                if not held.valid:
                    continue
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1
                # It is free for others at some moment within the settlement, so it is over before that.
                await node.keys.settle(held.reservation_id or "", {"tokens": 1})
                done += 1

        await asyncio.gather(*(call(number) for number in range(30)))
        assert most <= 7
        assert done > 7
    async with Strongroom.open(url) as node:
        stats = await node.keys.stats(issued.key.id)
        assert [(limit.recorded, limit.reserved, limit.leased) for limit in stats.limits] == [(0, 0, 0), (done, 0, 0)]


# --- Memory and the store together --------------------------------------------------------------------------------


async def test_local_and_durable_reservations_together_never_exceed_the_limit(bench: Bench) -> None:
    issued = await bench.key(rolling("tokens", 1_000), Limit.model_validate({"resource": "concurrency", "limit": 60}))
    held = 0
    for number in range(150):
        answer = await bench.reserve(issued, 10, ttl_s=600, durable=number % 3 == 0)
        held += answer.valid
        if number % 10 == 0:
            await bench.renew()
    assert held == 60
    assert await bench.used(issued) == (0, 600)
    admitted = 0
    for _ in range(100):
        admitted += 10 * (await bench.room.keys.verify(issued.text, cost={"tokens": 10})).valid
    assert admitted == 400
    assert await bench.used(issued) == (400, 600)


async def test_an_idle_node_keeps_the_lease_of_its_local_reservations(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url, limits="leased") as here, Strongroom.open(url) as there:
        issued = await here.keys.create(name="k", limits=[rolling("tokens", 100)])
        while True:  # at the first one there is no lease yet
            held = await here.keys.reserve(issued.text, cost={"tokens": 9})
            id = held.reservation_id or ""
            if id.startswith("rsl_"):
                break
            await here.keys.release(id)
            await here.keys.verify(issued.text, cost={"tokens": 1})
        recorded = 100 - 9 - held.limits[0].remaining
        lease_manager = here.ledger.lease_manager
        assert lease_manager is not None
        for _ in range(3):  # it is idle from the second round on
            lease_manager.renew_leases()
            await here.ledger.settled()
            assert not (await there.keys.verify(issued.text, cost={"tokens": 92 - recorded})).valid
        settled = await here.keys.settle(id, {"tokens": 9})
        assert settled.limits[0].recorded == recorded + 9
    async with Strongroom.open(url) as room:
        assert (await room.keys.stats(issued.key.id)).limits[0].used == recorded + 9


_DIES = """
import asyncio, os, sys
from strongroom import Strongroom

async def main():
    async with Strongroom.open(sys.argv[1], limits="leased", lease_folder=sys.argv[3]) as room:
        await room.keys.verify(sys.argv[2], cost={"tokens": 3})
        held = 0
        while held < 5:
            one = await room.keys.reserve(sys.argv[2], cost={"tokens": 2}, ttl_s=3600)
            if one.reservation_id.startswith("rsl_"):
                held += 1
            else:
                await room.keys.release(one.reservation_id)
        print("held", flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_the_local_reservations_of_a_killed_process_are_released(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    limits = [rolling("tokens", 100), Limit.model_validate({"resource": "concurrency", "limit": 30})]
    async with Strongroom.open(url, limits="leased", lease_folder=str(tmp_path)) as room:
        issued = await room.keys.create(name="k", limits=limits)
        command = [sys.executable, "-c", _DIES, url, issued.text, str(tmp_path)]
        child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert await child.stdout.readline() == b"held\n"
        assert not (await room.keys.verify(issued.text, cost={"tokens": 97})).valid
        child.kill()
        await child.wait()

        async def back() -> bool:
            stats = await room.keys.stats(issued.key.id)
            return [(one.recorded, one.reserved, one.leased) for one in stats.limits] == [(3, 0, 0), (0, 0, 0)]

        await wait_until(back)
        assert (await room.keys.verify(issued.text, cost={"tokens": 97})).valid


# --- Bounds -------------------------------------------------------------------------------------------------------


async def test_the_cost_of_a_reservation_does_not_grow_with_open_ones(tmp_path: Path) -> None:
    """What is written for one does not grow with the number of those that are open, whenever they end."""
    async with opened("json://:memory:") as (room, store):
        limits = [rolling("tokens", 10**9, seconds) for seconds in range(60, 70)]
        issued = await room.keys.create(name="k", limits=limits)
        written: list[int] = []
        for number in range(260):
            before = len(store.batches)
            await room.keys.reserve(issued.text, cost={"tokens": 1}, ttl_s=60 + number % 40, durable=True)
            written.append(sum(len(repr(batch.operations)) for batch in store.batches[before:]))
        assert max(written[200:]) < 1.1 * max(written[60:100])
        state = await stored_usage(store.store, issued.key.id)
        assert state.standing(compile_limits([limits[0]])[0], state.at_us)[1] == 260
        assert state.reserved is not None
        assert state.reserved.ends < 100


async def test_a_thousand_concurrent_reservations_are_created_and_settled(bench: Bench) -> None:
    limits = [rolling("tokens", 10**9, seconds) for seconds in range(60, 70)]
    issued = await bench.key(*limits)
    made = await asyncio.gather(*(bench.reserve(issued, 1, durable=True) for _ in range(1_000)))
    assert all(one.valid for one in made)
    state = await stored_usage(bench.store.store, issued.key.id)
    assert state.size < 5_000
    assert state.standing(compile_limits(limits)[0], state.at_us)[1] == 1_000
    assert (await bench.room.keys.verify(issued.text, cost={"tokens": 1})).valid
    await asyncio.gather(*(bench.room.keys.settle(one.reservation_id or "", {"tokens": 1}) for one in made))
    assert await bench.used(issued) == (1_001, 0)


async def test_concurrent_reservations_succeed_with_a_late_change_feed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a slow machine, whose reads take their time: a busy process is slow, it does not refuse."""
    monkeypatch.setattr("strongroom.keys.cache.TRUSTED_FOR_S", -1.0)
    async with opened("json://:memory:") as (room, store):
        issued = await room.keys.create(name="k", limits=[rolling("tokens", 10**6)])

        async def slowly(method: str, collection: str) -> None:
            if collection == "api_keys":
                for _ in range(len(store.reads) % 11):
                    await asyncio.sleep(0)

        store.after_read = slowly
        makes = [asyncio.create_task(room.keys.reserve(issued.text, cost={"tokens": 1})) for _ in range(100)]
        for number in range(3):
            await asyncio.sleep(0.002)
            await room.keys.update(issued.key.id, name=f"k{number}")
        made = await asyncio.gather(*makes)
        assert all(one.valid for one in made)
        assert (await room.keys.stats(issued.key.id)).limits[0].reserved == 100
        assert sum(read == ("get", "api_keys") for read in store.reads) < 100


# --- Those of the first release -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["settle", "extend", "release", "end"])
async def test_a_reservation_of_the_first_release_stays_valid(bench: Bench, how: str) -> None:
    """Its document does not say what it holds where: its account has it by its id."""
    scoped = Limit.model_validate({**rolling("tokens", 900).model_dump(), "models": ("big-*",)})
    limits = [rolling("tokens", 1_000), scoped]
    issued = await bench.room.keys.create(name="k", limits=limits)
    ends = bench.now(30)
    ends_us = us_from_utc(ends)
    old = StoredReservation(
        id="rsv_old", key_id=issued.key.id, tenant="default", asked={"tokens": 100}, holds={"tokens": 100},
        model="big-1", expires_at=ends, forget_at=ends + timedelta(days=1),
    )  # fmt: skip
    document = StoredReservation.__codec__.encode(old)
    assert document["places"] is None
    state = {"totals": {}, "counters": {}, "at": ends_us - 30_000_000, "holds": {
        "rsv_old": [ends_us, {limit.id: 100 for limit in limits}]}}  # fmt: skip
    usage = {"count": 0, "last_used_at": None, "active_at": None, "state": json.dumps(state)}
    operations = [Create("key_usage", issued.key.id, usage), Create("reservations", "rsv_old", document)]
    await bench.room.database.commit_counters(operations, ends_us)

    async def standing() -> list[tuple[Any, Any]]:
        return [(one.recorded, one.reserved) for one in (await bench.room.keys.stats(issued.key.id)).limits]

    assert await standing() == [(0, 100), (0, 100)]
    assert (await bench.reserve(issued, 10, durable=True)).valid  # beside it, and of no model
    assert await standing() == [(0, 110), (0, 100)]
    match how:
        case "settle":
            assert (await bench.room.keys.settle("rsv_old", {"tokens": 60})).charged == {"tokens": 60}
            assert await standing() == [(60, 10), (60, 0)]
        case "extend":
            extended = await bench.room.keys.extend("rsv_old", ttl_s=50, used={"tokens": 20})
            assert (extended.valid, extended.expires_at) == (True, bench.now(50))
            assert await standing() == [(20, 90), (20, 80)]
            await bench.room.keys.settle("rsv_old", {"tokens": 30})
            assert await standing() == [(30, 10), (30, 0)]
        case "release":
            await bench.room.keys.release("rsv_old")
            assert await standing() == [(0, 10), (0, 0)]
        case _:
            await bench.later(30)
            with pytest.raises(Conflict, match="ended"):
                await bench.room.keys.settle("rsv_old", {"tokens": 60})
            assert await standing() == [(0, 10), (0, 0)]


# --- Clocks -------------------------------------------------------------------------------------------------------


async def test_reservations_survive_a_clock_that_was_set_back(bench: Bench) -> None:
    """Their end is decided by the account's time, which stands still until the clock has reached it."""
    issued = await bench.room.keys.create(name="k", limits=[Limit(resource="tokens", limit=100, window=Total())])
    await bench.room.keys.verify(issued.text, cost={"tokens": 0})
    bench.clock.shift(timedelta(hours=-1))
    held = await bench.reserve(issued, 60, durable=True)
    assert (held.valid, held.expires_at) == (True, bench.now(3_660))
    denied = await bench.reserve(issued, 60, durable=True)
    assert (denied.valid, denied.retry_after_s) == (False, 3_660)
    settled = await bench.room.keys.settle(held.reservation_id or "", {"tokens": 40})
    assert (settled.state, await bench.used(issued)) == ("settled", (40, 0))
    once = await bench.reserve(issued, 60, durable=True, idempotency_key="i")
    assert (await bench.reserve(issued, 60, durable=True, idempotency_key="i")).expires_at == once.expires_at
    bench.clock.shift(timedelta(seconds=3_659))
    assert not (await bench.reserve(issued, 1, durable=True)).valid
    bench.clock.shift(timedelta(seconds=1))
    with pytest.raises(Conflict, match="ended"):
        await bench.reserve(issued, 60, durable=True, idempotency_key="i")
    with pytest.raises(Conflict, match="ended"):
        await bench.room.keys.settle(once.reservation_id or "", {"tokens": 1})
    assert (await bench.reserve(issued, 60, durable=True)).valid


async def test_any_node_settles_what_another_has_just_reserved_or_extended(shared_place: tuple[Any, str]) -> None:
    """Though it has the account in memory as it was before."""
    _, url = shared_place
    async with Strongroom.open(url) as here, Strongroom.open(url) as there:
        issued = await here.keys.create(name="k", limits=[rolling("tokens", 1_000)])
        for _ in range(3):
            for one, other in ((here, there), (there, here)):
                await other.keys.verify(issued.text, cost={"tokens": 1})
                held = await one.keys.reserve(issued.text, cost={"tokens": 10})
                assert (await other.keys.settle(held.reservation_id or "", {"tokens": 1})).state == "settled"
        assert (await here.keys.stats(issued.key.id)).limits[0].used == 12


# --- Against a model ----------------------------------------------------------------------------------------------


@dataclass
class Open:
    """A reservation, as the model knows it."""

    holds: int
    used: int
    ends_us: int


class Machine(RuleBasedStateMachine):
    """Reservations of one limit and of how many at once, durable over two nodes or in the memory of one, against a
    model that adds up what is recorded and what is held. The limit's window is changed, which begins another counter
    and loses nothing that is held; where no reservation is in memory, the clock goes back, too."""

    WINDOWS = (Total(), Rolling(seconds=10**8))

    LIMIT = 400
    AT_ONCE = 9

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.traveller = time_machine.travel(MOMENT, tick=False)
        self.clock = self.traveller.start()
        self.stack = AsyncExitStack()
        self.believed = tuning.REREAD_AFTER_S
        tuning.REREAD_AFTER_S = -1.0  # the machine's time stands still
        self.clock_us = 0
        self.at_us = -(10**15)
        """When the usage state was charged last; long ago, since it is made by its first charge."""
        self.used = [0 for _ in self.WINDOWS]
        self.window = 0
        self.made: dict[str, Open] = {}

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 2 * PATIENCE_S))

    @initialize(leased=st.booleans())
    def begin(self, leased: bool) -> None:
        async def opened_() -> None:
            first = await self.stack.enter_async_context(
                opened("json://:memory:", limits="leased" if leased else "durable")
            )
            self.nodes = [first[0]]
            if not leased:
                self.nodes.append((await self.stack.enter_async_context(opened("json://:memory:", beside=first[1])))[0])
            for node in self.nodes:
                node.ledger.states.shared = True  # as a store is that several processes can open
            self.issued = await self.nodes[0].keys.create(name="k", limits=self.limits())

        self.leased = leased
        self.run(opened_())

    def limits(self) -> list[Limit]:
        return [
            Limit(resource="tokens", limit=self.LIMIT, window=self.WINDOWS[self.window]),
            Limit.model_validate({"resource": "concurrency", "limit": self.AT_ONCE}),
        ]

    @property
    def now_us(self) -> int:
        return max(self.clock_us, self.at_us)

    @property
    def open(self) -> dict[str, Open]:
        return {id: one for id, one in self.made.items() if self.now_us < one.ends_us}

    @property
    def recorded(self) -> int:
        return self.used[self.window]

    def held(self) -> int:
        return sum(one.holds for one in self.open.values())

    def record(self, tokens: int) -> None:
        self.used[self.window] += tokens
        if not self.leased:
            self.at_us = self.now_us

    @rule(node=st.integers(0, 1), tokens=st.integers(0, 90), ttl_s=st.integers(1, 9))
    def reserve(self, node: int, tokens: int, ttl_s: int) -> None:
        keys = self.nodes[node % len(self.nodes)].keys
        answer = self.run(keys.reserve(self.issued.text, cost={"tokens": tokens}, ttl_s=ttl_s))
        fits = self.recorded + self.held() + tokens <= self.LIMIT and len(self.open) < self.AT_ONCE
        assert answer.valid is fits
        if fits:
            self.record(0)
            self.made[answer.reservation_id or ""] = Open(tokens, 0, self.now_us + ttl_s * 1_000_000)

    @rule(node=st.integers(0, 1), tokens=st.integers(0, 60))
    def verify(self, node: int, tokens: int) -> None:
        keys = self.nodes[node % len(self.nodes)].keys
        valid = self.run(keys.verify(self.issued.text, cost={"tokens": tokens})).valid
        assert valid is (self.recorded + self.held() + tokens <= self.LIMIT)
        if valid:
            self.record(tokens)

    @precondition(lambda self: self.open)
    @rule(node=st.integers(0, 1), which=st.integers(0, 99), tokens=st.integers(0, 100), twice=st.booleans())
    def settle(self, node: int, which: int, tokens: int, twice: bool) -> None:
        id = list(self.open)[which % len(self.open)]
        one = self.made.pop(id)
        total = one.used + tokens
        for _ in range(1 + twice):
            settled = self.run(self.nodes[node % len(self.nodes)].keys.settle(id, {"tokens": total}))
            assert settled.charged == {"tokens": total}
        self.record(tokens)

    @precondition(lambda self: self.open)
    @rule(node=st.integers(0, 1), which=st.integers(0, 99))
    def release(self, node: int, which: int) -> None:
        id = list(self.open)[which % len(self.open)]
        self.run(self.nodes[node % len(self.nodes)].keys.release(id))
        self.record(0)
        del self.made[id]

    @precondition(lambda self: self.open)
    @rule(node=st.integers(0, 1), which=st.integers(0, 99), tokens=st.integers(0, 150), used=st.integers(0, 30),
          ttl_s=st.integers(1, 9))  # fmt: skip
    def extend(self, node: int, which: int, tokens: int, used: int, ttl_s: int) -> None:
        id = list(self.open)[which % len(self.open)]
        one = self.open[id]
        used = min(used, one.holds)  # what is more is refused where the limit has not so much
        total = one.used + used
        keys = self.nodes[node % len(self.nodes)].keys
        answer = self.run(keys.extend(id, ttl_s=ttl_s, cost={"tokens": tokens}, used={"tokens": total}))
        holds = max(0, tokens - total)
        others = self.held() - one.holds
        if not self.leased or holds + used <= one.holds:
            assert answer.valid is (holds + used <= one.holds or self.recorded + others + holds + used <= self.LIMIT)
        if answer.valid:
            assert self.recorded + others + holds + used <= self.LIMIT or holds + used <= one.holds
            self.record(used)
            self.made[id] = Open(holds, total, self.now_us + ttl_s * 1_000_000)

    @rule(ms=st.sampled_from([1, 500, 1_000, 3_000, 8_000]))
    def later(self, ms: int) -> None:
        self.clock.shift(timedelta(milliseconds=ms))
        self.clock_us += ms * 1_000
        lease_manager = self.nodes[0].ledger.lease_manager
        if lease_manager is not None:
            self.run(self.renew(lease_manager))

    @precondition(lambda self: not self.leased)
    @rule(ms=st.sampled_from([1, 700, 2_500, 60_000]))
    def back(self, ms: int) -> None:
        self.clock.shift(timedelta(milliseconds=-ms))
        self.clock_us -= ms * 1_000

    @rule(window=st.integers(0, 1))
    def change_the_window(self, window: int) -> None:
        self.window = window
        self.run(self.update_everywhere())

    async def update_everywhere(self) -> None:
        """Update the key, and wait until each node knows: until then a node denies by the limits that it knew."""
        updated = await self.nodes[0].keys.update(self.issued.key.id, limits=self.limits())
        for node in self.nodes:

            async def knows(node: Strongroom = node) -> bool:
                key = await node.keys.cache.by_id(updated.id)
                return key is not None and key.subjects.guard.expected == updated.version

            await wait_until(knows)

    async def renew(self, lease_manager: Any) -> None:
        lease_manager.renew_leases()
        await self.nodes[0].ledger.settled()

    @invariant()
    def the_statistics_are_the_models(self) -> None:
        if hasattr(self, "issued"):
            for node in self.nodes:
                tokens, at_once = self.run(node.keys.stats(self.issued.key.id)).limits
                assert (tokens.recorded, tokens.reserved) == (self.recorded, self.held())
                assert at_once.used == len(self.open)

    def teardown(self) -> None:
        tuning.REREAD_AFTER_S = self.believed
        self.run(self.stack.aclose())
        self.traveller.stop()
        self.loop.close()


Machine.TestCase.settings = settings(settings(), max_examples=max(60, settings().max_examples), stateful_step_count=40)
TestReservations = Machine.TestCase
