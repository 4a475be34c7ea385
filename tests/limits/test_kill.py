"""Limits through kill -9: four processes at full speed on one limit, one of them killed and started again each second.

What holds, with durable limits and with leased ones, on SQLite and on PostgreSQL: never is more admitted than the
limit; and once the last process that was killed is started again, the whole limit is usable within the time of a lease.
What a process had asked when it was killed, and not been answered, may have been admitted or not: it is counted.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from strongroom import Limit, Rolling, Strongroom, Total
from tests.conftest import backend_of
from tests.helpers.limits_worker import ADMITTED, CELLS, DENIED
from tests.helpers.paths import HELPERS
from tests.helpers.waiting import PATIENCE_S, wait_until

WORKER = HELPERS / "limits_worker.py"
PROCESSES = 4
LIMIT = 100_000
Mode = Literal["durable", "leased"]
MANY_KILLS_LIMIT: dict[Mode, int] = {"durable": 8 * LIMIT, "leased": 12 * LIMIT}
"""What is left for a process to be at work when the last of many is killed."""
LEASE_S = 2.0
KILL_EVERY_S = 1.0
SLACK_S = 2.0
"""For the renewals beside a lease, and for a machine that has other things to do."""
CLOCK_SLACK_NS = 20_000_000
"""How far a process may be from the store's clock, on one machine."""
USABLE = 0.95
"""How much of a rolling limit was used when a token is denied: processes that live hold a little of it."""
COSTS: dict[Mode, list[int]] = {"durable": [1, 20, 50, 100], "leased": [1, 1, 2, 5]}
"""Such that some seconds pass until the limit is used up; a call that is denied is made again for one token."""


class Call(NamedTuple):
    """One call, and when it was asked and answered, in nanoseconds. `verdict` is 0 if it was not answered when its
    process was killed."""

    units: int
    asked: int
    answered: int
    verdict: int


@dataclass
class Fleet:
    """The processes, and what they have left on file."""

    url: str
    text: str
    mode: Mode
    folder: Path
    costs: list[int]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    books: list[Path] = field(default_factory=list)
    book_of: dict[int, Path] = field(default_factory=dict)

    def start(self) -> None:
        book = self.folder / f"book-{len(self.books)}"
        given = [self.url, self.text, self.mode, str(LEASE_S), str(self.folder / "leases"), str(book)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, str(WORKER), *given, *map(str, self.costs)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
        self.processes.append(process)
        self.books.append(book)
        self.book_of[process.pid] = book

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL, "it had ended before"
        self.processes.remove(process)

    def at_work(self) -> list[subprocess.Popen[bytes]]:
        """Those that had something admitted."""
        return [process for process in self.processes if any(admitted(calls_in(self.book_of[process.pid])))]

    def calls(self) -> list[Call]:
        return [call for book in self.books for call in calls_in(book)]

    async def stop(self) -> None:
        """Let those that run give back what they have."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        statuses = [await asyncio.to_thread(process.wait, 30) for process in self.processes]
        assert set(statuses) <= {0, -signal.SIGTERM}, statuses  # one that is still starting just ends
        self.processes.clear()


def calls_in(book: Path) -> Iterator[Call]:
    """The calls in a book that were begun, in the order of their lines."""
    if not book.exists():
        return
    size = struct.calcsize(f"{CELLS}q")
    with book.open("rb") as file:
        while line := file.read(size):
            units, asked, answered, verdict = struct.unpack(f"{CELLS}q", line)
            if units == 0:
                return  # no line after this one was begun
            if asked:
                yield Call(units, asked, answered, verdict)


def admitted(calls: Iterable[Call]) -> Iterator[Call]:
    return (call for call in calls if call.verdict == ADMITTED)


@asynccontextmanager
async def fleet_on(
    url: str, limit: Limit, mode: Mode, folder: Path, costs: list[int]
) -> AsyncIterator[tuple[Fleet, Strongroom, str]]:
    """The processes at work on a new key's limit; a Strongroom beside them to ask; the key's id."""
    async with Strongroom.open(url) as room:
        issued = await room.keys.create(name="k", limits=[limit])
        fleet = Fleet(url, issued.text, mode, folder, costs)
        try:
            for _ in range(PROCESSES):
                fleet.start()
            await wait_until(fleet.at_work, 60)
            yield fleet, room, issued.key.id
        finally:
            for process in fleet.processes:
                process.kill()
                process.wait(PATIENCE_S)


async def kill_in_turn(fleet: Fleet, kills: int, seed: int) -> float:
    """Each second one that is at work is killed, and started again; when the last one was, by time.time."""
    chance = random.Random(seed)
    for _ in range(kills):
        await asyncio.sleep(KILL_EVERY_S * chance.uniform(0.5, 1))
        workers = await wait_until(fleet.at_work, 60)
        fleet.kill(chance.choice(workers))
        fleet.start()
    return time.time()


async def recorded(room: Strongroom, id: str) -> int:
    """What the store says was used of the limit, and nobody holds."""
    return int((await room.keys.stats(id)).limits[0].recorded)


# --- A limit that is used up once -----------------------------------------------------------------------------


async def use_up(url: str, mode: Mode, folder: Path, *, kills: int, seed: int, most: int = LIMIT) -> None:
    """A limit for ever: all of it is admitted, but for what was in flight at a kill, and never more."""
    limit = Limit(resource="tokens", limit=most, window=Total())
    async with fleet_on(url, limit, mode, folder, COSTS[mode]) as (fleet, room, id):
        restarted_at = await kill_in_turn(fleet, kills, seed)

        async def used_up() -> bool:
            return await recorded(room, id) >= most

        await wait_until(used_up, 90)
        await fleet.stop()
        calls = fleet.calls()
        known = sum(call.units for call in admitted(calls))
        in_flight = sum(call.units for call in calls if not call.verdict)
        stats = await room.keys.stats(id)
        print(f"{mode}: {known} admitted, {in_flight} in flight at {kills} kills, {len(calls)} calls")
        assert known <= most, "over-admitted"
        assert known + in_flight >= most, "a part of the limit was lost with a process"
        assert (stats.limits[0].recorded, stats.limits[0].leased, stats.limits[0].remaining) == (most, 0, 0)
        if mode == "durable":  # the log of a process that was killed tells of its limits, not of its lifetime totals
            assert stats.totals["tokens"] == most
        # What is left when nobody has been answered for long is what a dead process holds: see that it came back.
        answered = sorted(call.answered / 1e9 for call in admitted(calls) if call.answered > restarted_at * 1e9)
        gaps = [later - sooner for sooner, later in itertools.pairwise([restarted_at, *answered])]
        assert max(gaps, default=0) <= LEASE_S + SLACK_S


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return backend_of(request.param, tmp_path, request).new_url()


@pytest.mark.server
@pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)
async def test_killed_processes_admit_exactly_a_leased_limit(url: str, tmp_path: Path) -> None:
    await use_up(url, "leased", tmp_path, kills=2, seed=1)


@pytest.mark.soak
@pytest.mark.server
@pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("mode", ["leased", "durable"])
@pytest.mark.parametrize("seed", range(2, 12))
async def test_processes_killed_many_times_admit_exactly_the_limit(
    url: str, mode: Mode, seed: int, tmp_path: Path
) -> None:
    await use_up(url, mode, tmp_path, kills=6, seed=seed, most=MANY_KILLS_LIMIT[mode])


# --- A limit that frees again ---------------------------------------------------------------------------------

WINDOW_S = 3
NS = 1_000_000_000
BUCKET_NS = WINDOW_S * NS // 300
"""The oldest bucket of a rolling window counts whole."""


class Timeline:
    """How much was admitted by calls that were asked from one moment on and answered by another."""

    def __init__(self, calls: Iterable[Call]) -> None:
        known = list(admitted(calls))
        self.asked, self._asked_sum = _summed((call.asked, call.units) for call in known)
        self._answered, self._answered_sum = _summed((call.answered, call.units) for call in known)
        self.longest = max((call.answered - call.asked for call in known), default=0)

    def surely(self, start: int, end: int) -> int:
        """By calls that lie wholly within: no more may be. `end - start` is no less than the longest call."""
        assert end - start >= self.longest
        # What was asked before the start was answered before the end, since no call takes so long.
        return self._answered_sum[bisect_right(self._answered, end)] - self._asked_sum[bisect_left(self.asked, start)]

    def possibly(self, start: int, end: int) -> int:
        """By calls a part of which lies within."""
        return self._asked_sum[bisect_right(self.asked, end)] - self._answered_sum[bisect_left(self._answered, start)]


def _summed(items: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The moments in order, and for each number of them what the first so many come to."""
    ordered = sorted(items)
    return [moment for moment, _ in ordered], [0, *itertools.accumulate(units for _, units in ordered)]


async def use_on(url: str, mode: Mode, folder: Path, *, kills: int, seed: int) -> None:
    """A rolling limit: in no window is more admitted; and from the time of a lease after the last restart on, nobody is
    denied a token unless the limit is used."""
    limit = Limit(resource="tokens", limit=LIMIT, window=Rolling(seconds=WINDOW_S))
    async with fleet_on(url, limit, mode, folder, [5, 10, 50, 100]) as (fleet, _, _):
        usable_at = await kill_in_turn(fleet, kills, seed) + LEASE_S + SLACK_S
        await wait_until(lambda: len(fleet.at_work()) == PROCESSES, 60)
        usable_at = max(usable_at, time.time())
        await wait_until(lambda: time.time() >= usable_at + 2 * WINDOW_S, 60)
        await fleet.stop()
        calls = fleet.calls()
        line = Timeline(calls)
        window = WINDOW_S * NS
        most = max(line.surely(start, start + window - CLOCK_SLACK_NS) for start in line.asked)
        denied = [call for call in calls if call.verdict == DENIED and call.asked > usable_at * NS]
        assert denied, "the limit was not hit"
        least = min(line.possibly(c.asked - window - BUCKET_NS - CLOCK_SLACK_NS, c.answered) for c in denied)
        print(f"{mode}: at most {most} in a window, at least {least} before each of {len(denied)} denials")
        assert most <= LIMIT, "over-admitted"
        assert least >= USABLE * LIMIT, "a part of the limit is held by processes that are dead"


def test_the_timeline_sums_usage_within_a_window() -> None:
    chance = random.Random(0)
    for _ in range(200):
        asked = [chance.randrange(100) for _ in range(20)]
        calls = [Call(chance.randrange(1, 9), at, at + chance.randrange(10), ADMITTED) for at in asked]
        line = Timeline([*calls, Call(9, 1, 2, DENIED), Call(9, 1, 0, 0)])
        for start in range(100):
            end = start + 12
            assert line.surely(start, end) == sum(c.units for c in calls if start <= c.asked and c.answered <= end)
            assert line.possibly(start, end) == sum(c.units for c in calls if c.asked <= end and c.answered >= start)


@pytest.mark.soak
@pytest.mark.server
@pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("mode", ["leased", "durable"])
@pytest.mark.parametrize("seed", range(3))
async def test_killed_processes_never_exceed_a_limit_in_any_window(
    url: str, mode: Mode, seed: int, tmp_path: Path
) -> None:
    await use_on(url, mode, tmp_path, kills=6, seed=seed)
