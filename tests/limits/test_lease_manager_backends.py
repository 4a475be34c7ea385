"""Limit leases on backends that several processes share: two nodes at full speed on one limit, and the state after both
have stopped."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from strongroom import Anchored, Calendar, Limit, Rolling, Strongroom, Total
from tests.conftest import backend_of
from tests.helpers.waiting import wait_until

HOUR = 3_600
WINDOWS: list[Any] = [Rolling(seconds=HOUR), Anchored(seconds=HOUR), Calendar(unit="month"), Total()]
SHARED = ["sqlite", "postgres", "firestore"]


@pytest.fixture(params=SHARED)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return backend_of(request.param, tmp_path, request).new_url()


async def use(room: Strongroom, text: str, most: int) -> int:
    """How many calls, of eight callers at once, are admitted until one token is too much."""
    admitted = 0

    async def caller() -> None:
        nonlocal admitted
        while admitted < most and (await room.keys.verify(text, cost={"tokens": 1, "requests": 1})).valid:
            admitted += 1
            if admitted % 50 == 0:
                await asyncio.sleep(0)  # what is answered from memory would let nobody else have a turn

    await asyncio.gather(*(caller() for _ in range(8)))
    return admitted


async def test_two_nodes_at_full_speed_admit_the_limit_and_record_it_exactly(url: str) -> None:
    async with Strongroom.open(url) as judge:
        limits = [Limit(resource="tokens", limit=3_000, window=window) for window in WINDOWS]
        keys = [await judge.keys.create(name="k", limits=[limit]) for limit in limits]
        async with Strongroom.open(url, limits="leased") as one, Strongroom.open(url, limits="leased") as two:
            admitted = {
                key.key.id: sum(await asyncio.gather(*(use(room, key.text, 10_000) for room in (one, two))))
                for key in keys
            }
            seen = [(await one.keys.stats(key.key.id)).limits[0] for key in keys]
            assert all(status.used == status.recorded + status.reserved + status.leased for status in seen)
        for key in keys:
            stats = await judge.keys.stats(key.key.id)
            (status,) = stats.limits
            total = admitted[key.key.id]
            assert total <= 3_000, "over-admitted"
            assert (status.recorded, status.reserved, status.leased) == (total, 0, 0)
            assert (stats.count, stats.totals) == (total, {"requests": total, "tokens": total})
            rest = 3_000 - total
            assert not (await judge.keys.verify(key.text, cost={"tokens": rest + 1})).valid
            assert (await judge.keys.verify(key.text, cost={"tokens": rest})).valid


async def test_a_change_of_a_leased_key_applies_on_every_node(url: str) -> None:
    async with Strongroom.open(url) as judge, Strongroom.open(url, limits="leased") as room:
        limit = Limit(resource="tokens", limit=1_000, window=Total())
        key = await judge.keys.create(name="k", limits=[limit])
        assert await use(room, key.text, 100) >= 100
        await judge.keys.disable(key.key.id)

        async def says(code: str, most: int) -> bool:
            answer = await room.keys.verify(key.text)
            return answer.code == code and (code != "VALID" or answer.limits[0].limit == most)

        await wait_until(lambda: says("DISABLED", 1_000))
        used = int((await room.keys.stats(key.key.id)).limits[0].recorded)
        await judge.keys.enable(key.key.id)
        await judge.keys.update(key.key.id, limits=[limit.model_copy(update={"limit": used + 50})])
        await wait_until(lambda: says("VALID", used + 50))
        assert await use(room, key.text, 10_000) == 50
        assert int((await room.keys.stats(key.key.id)).limits[0].recorded) == used + 50
