"""Concurrent reads of one document are one read; a document that keeps changing is retried for a bounded time."""

from __future__ import annotations

import asyncio

import pytest

from strongroom.cache.single_flight import SingleFlight
from strongroom.errors import Unavailable
from strongroom.limits import backoff
from strongroom.limits.backoff import Backoff


class Source:
    """Something to be read: each read waits for `gate`."""

    def __init__(self) -> None:
        self.reads = 0
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def read(self) -> int:
        self.reads += 1
        number = self.reads
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return number


async def test_concurrent_callers_share_one_read() -> None:
    flight: SingleFlight[int] = SingleFlight()
    source = Source()
    calls = [asyncio.create_task(flight.get("k", 1, source.read)) for _ in range(5)]
    other = asyncio.create_task(flight.get("other", 1, source.read))
    await asyncio.sleep(0)
    source.gate.set()
    assert await asyncio.gather(*calls, other) == [1, 1, 1, 1, 1, 2]
    assert await flight.get("k", 1, source.read) == 3


async def test_a_caller_after_a_change_does_not_join_an_earlier_read() -> None:
    flight: SingleFlight[int] = SingleFlight()
    source = Source()
    before = asyncio.create_task(flight.get("k", 1, source.read))
    await asyncio.sleep(0)
    after = [asyncio.create_task(flight.get("k", 2, source.read)) for _ in range(2)]
    await asyncio.sleep(0)
    source.gate.set()
    assert [await before, *await asyncio.gather(*after)] == [1, 2, 2]


async def test_an_error_reaches_every_caller_and_a_cancellation_only_its_own() -> None:
    flight: SingleFlight[int] = SingleFlight()
    source = Source()
    calls = [asyncio.create_task(flight.get("k", 1, source.read)) for _ in range(3)]
    await asyncio.sleep(0)
    calls[0].cancel()  # it is the one that reads
    await asyncio.wait([calls[0]])
    source.gate.set()
    assert await asyncio.gather(*calls[1:]) == [2, 2]
    source.error = Unavailable("gone")
    found = await asyncio.gather(*(flight.get("k", 1, source.read) for _ in range(3)), return_exceptions=True)
    assert found == [source.error] * 3


async def test_a_read_that_keeps_changing_is_retried_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "RETRY_FOR_S", 0.05)
    tries, attempts = Backoff("it is being changed too quickly"), 0
    while await tries.attempt():
        attempts += 1
    assert attempts > backoff.AT_ONCE
    assert str(tries.exhausted()) == "it is being changed too quickly: tried for 0.05 s, try again"
