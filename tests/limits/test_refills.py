"""Refills that are added to used totals: when they begin, across restarts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import time_machine

from strongroom import ApiKey, Limit, Refill, Strongroom, Total
from strongroom.context import system_context
from strongroom.limits.corrections import refills_that_begin
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import new_url, opened, rolling, stored_usage

NOON = datetime(2026, 5, 5, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def budget(refill: int | None = None, limit: int = 10) -> Limit:
    return Limit(
        resource="tokens",
        limit=limit,
        window=Total(refill=None if refill is None else Refill(amount=refill, unit="day")),
    )


async def exhausted(room: Strongroom, of: str, limit: Limit | None = None) -> tuple[str, str]:
    """A key whose own total, or its tenant's, is used up: its text and its id."""
    limits = [limit if limit is not None else budget()]
    if of == "quota":
        await room.quotas.put(kind="tenant", tenant="acme", limits=limits)
    made = await room.keys.create(name="a key", tenant="acme", limits=limits if of == "key" else [])
    assert (await room.keys.verify(made.text, cost={"tokens": 10})).valid
    return made.text, made.key.id


async def change(room: Strongroom, of: str, id: str, limits: list[Limit]) -> None:
    if of == "key":
        await room.keys.update(id, limits=limits)
    elif of == "quota":
        await room.quotas.update("tenant", "acme", limits=limits)
    else:
        await room.quotas.put(kind="tenant", tenant="acme", limits=limits)


@pytest.mark.parametrize("of", ["key", "quota", "quota put"])
@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_an_added_refill_begins_with_the_change_even_across_restarts(
    of: str, limits: str, tmp_path: Path
) -> None:
    url = new_url("sqlite", tmp_path)
    with time_machine.travel(NOON, tick=False) as clock:
        async with opened(url, limits=limits) as (room, _):
            text, id = await exhausted(room, of.split(maxsplit=1)[0])
            await change(room, of, id, [budget(refill=4)])
        clock.shift(DAY)
        async with opened(url, limits=limits) as (room, _):
            assert (await room.keys.verify(text, cost={"tokens": 8})).code == "USAGE_EXCEEDED"
        clock.shift(DAY)
        async with opened(url, limits=limits) as (room, _):
            answer = await room.keys.verify(text, cost={"tokens": 8})  # two refills of four
            assert answer.valid, answer.message
            assert (await room.keys.verify(text, cost={"tokens": 1})).code == "USAGE_EXCEEDED"


async def test_a_crash_around_the_change_does_not_move_the_start_of_a_refill(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    with time_machine.travel(NOON, tick=False) as clock:
        async with opened(url) as (room, store):
            text, id = await exhausted(room, "key")
            commits = len(store.batches)
            gone = Fault("before", RuntimeError("the process is gone"))
            # Dies after its first commit: what was prepared is there, the change is not.
            store.fault = lambda number, batch: gone if number > commits else None
            with pytest.raises(RuntimeError):
                await room.keys.update(id, limits=[budget(refill=4)])
            store.fault = lambda number, batch: None
        clock.shift(2 * DAY)
        async with opened(url) as (room, _):
            assert (await room.keys.verify(text, cost={"tokens": 1})).code == "USAGE_EXCEEDED"
            await room.keys.update(id, limits=[budget(refill=4)])
            assert (await room.keys.verify(text, cost={"tokens": 1})).code == "USAGE_EXCEEDED", "not from before"
        clock.shift(DAY)
        async with opened(url) as (room, _):
            assert (await room.keys.verify(text, cost={"tokens": 4})).valid


async def test_the_first_denial_after_a_refill_was_added_starts_it_durably_with_one_commit(tmp_path: Path) -> None:
    """However the refill came to the key: by an import, or by a version that told nobody."""
    url = new_url("sqlite", tmp_path)
    with time_machine.travel(NOON, tick=False) as clock:
        async with opened(url) as (room, store):
            text, id = await exhausted(room, "key")
            await room.database.update(system_context(), ApiKey, id, {"limits": [budget(refill=4)]})
            assert (await room.keys.verify(text, cost={"tokens": 1})).code == "USAGE_EXCEEDED"
            commits = len(store.batches)
            assert (await room.keys.verify(text, cost={"tokens": 1})).code == "USAGE_EXCEEDED"
            assert len(store.batches) == commits
        clock.shift(DAY)
        async with opened(url) as (room, _):
            assert (await room.keys.verify(text, cost={"tokens": 4})).valid


@pytest.mark.parametrize("between", [[], [budget()], [rolling("requests", 1)]], ids=["none", "without", "another"])
async def test_a_refill_that_was_removed_and_added_again_refills_nothing_for_the_gap(
    between: list[Limit], tmp_path: Path
) -> None:
    url = new_url("sqlite", tmp_path)
    with time_machine.travel(NOON, tick=False) as clock:
        async with opened(url) as (room, _):
            text, id = await exhausted(room, "key", budget(refill=4))
            await room.keys.update(id, limits=between)
        clock.shift(5 * DAY)
        async with opened(url) as (room, _):
            await room.keys.update(id, limits=[budget(refill=4)])
            assert (await room.keys.verify(text, cost={"tokens": 1})).code == "USAGE_EXCEEDED"
        clock.shift(DAY)
        async with opened(url) as (room, _):
            assert (await room.keys.verify(text, cost={"tokens": 4})).valid


async def test_a_changed_refill_continues_from_the_previous_one(tmp_path: Path) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        async with opened(new_url("sqlite", tmp_path)) as (room, _):
            text, id = await exhausted(room, "key", budget(refill=1))
            clock.shift(timedelta(hours=6))
            await room.keys.update(id, limits=[budget(refill=4)])
            clock.shift(timedelta(hours=8))  # past midnight, which is a refill of both
            assert (await room.keys.verify(text, cost={"tokens": 4})).valid


@pytest.mark.parametrize("usable", [True, False])
async def test_an_unused_limit_needs_no_preparation_for_a_refill(usable: bool, tmp_path: Path) -> None:
    async with opened(new_url("json-memory", tmp_path)) as (room, store):
        made = await room.keys.create(name="a key", tenant="acme", limits=[budget()])
        if usable:
            await room.keys.verify(made.text, cost={"requests": 1})
        await room.keys.update(made.key.id, limits=[budget(refill=4)])
        assert (await room.keys.verify(made.text, cost={"tokens": 10})).valid
        assert (await usage_of(store, made.key.id))("tokens") == 10


async def usage_of(store: FaultyStore, id: str) -> Callable[[str], int]:
    totals = (await stored_usage(store, id)).totals
    return lambda resource: totals.get(resource, 0)


def test_only_added_refills_begin_with_a_change() -> None:
    plain, refilled, other = budget(), budget(refill=4), rolling("tokens", 5)
    assert refills_that_begin([plain], [refilled]) == (refilled.id,)
    assert refills_that_begin([], [other, refilled]) == (refilled.id,)
    assert refills_that_begin([refilled], [budget(refill=9)]) == ()
    assert refills_that_begin([refilled], [plain]) == ()
    assert refills_that_begin([plain], [budget(limit=99), other]) == ()
