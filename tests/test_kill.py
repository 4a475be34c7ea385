"""kill -9 under load: nothing acknowledged is lost, no limit is over-admitted, whatever moment it hits."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from strongroom import Limit, Rolling, Strongroom, Total

from .support import new_url

WORKER = Path(__file__).parent / "kill_worker.py"
LIMIT = 12_000
RECORDINGS = 1_200


@dataclass
class Acknowledged:
    tokens: int = 0
    requests: int = 0
    recordings: set[int] = field(default_factory=set)
    full: int = 0

    def add(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        match word:
            case "v":
                self.tokens += int(rest)
                self.requests += 1
            case "r":
                self.recordings.add(int(rest))
            case "full":
                self.full += 1


async def start(url: str, text: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return await asyncio.create_subprocess_exec(
        sys.executable, str(WORKER), url, text, "0", str(RECORDINGS), stdout=asyncio.subprocess.PIPE, env=environment
    )


async def listen(process: asyncio.subprocess.Process, told: Acknowledged, working: asyncio.Event) -> None:
    assert process.stdout
    async for line in process.stdout:
        if line.endswith(b"\n"):
            told.add(line.decode().strip())
        if line.startswith((b"v", b"full")):
            working.set()
    working.set()


async def load(url: str, text: str, told: Acknowledged, chance: random.Random | None) -> None:
    """Two processes at full speed on one file; each is killed at a moment of its own, or (None) both finish."""
    processes = [await start(url, text) for _ in range(2)]
    try:
        started = [asyncio.Event() for _ in processes]
        heard = [asyncio.ensure_future(listen(p, told, e)) for p, e in zip(processes, started, strict=True)]
        if chance is not None:
            await asyncio.gather(*(event.wait() for event in started))
            for process in chance.sample(processes, 2):
                await asyncio.sleep(chance.uniform(0, 0.15))
                if process.returncode is None:
                    process.send_signal(signal.SIGKILL)
        await asyncio.gather(*heard)
        codes = [await process.wait() for process in processes]
        assert set(codes) <= ({0} if chance is None else {0, -signal.SIGKILL})
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def check(url: str, id: str, told: Acknowledged) -> None:
    async with Strongroom.open(url) as room:
        stats = await room.keys.stats(id)
        health = await room.store.check()
    assert health.ok
    used = {limit.resource: limit.used for limit in stats.limits}
    assert told.tokens <= used["tokens"] <= LIMIT
    assert told.requests <= used["requests"]
    assert used == {name: stats.totals.get(name, 0) for name in used}, "one limit was charged and another not"
    assert 2 * len(told.recordings) <= stats.totals.get("images", 0) <= 2 * RECORDINGS
    assert stats.count == stats.totals.get("requests", 0) + stats.totals.get("images", 0) // 2


async def rounds(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    url = new_url("sqlite", folder)
    async with Strongroom.open(url) as room:
        limits = [
            Limit(resource="tokens", limit=LIMIT, window=Rolling(seconds=18_000)),
            Limit(resource="requests", limit=10**9, window=Total()),
        ]
        issued = await room.keys.create(name="k", limits=limits)
    told = Acknowledged()
    for _ in range(2):
        await load(url, issued.text, told, chance)
        await check(url, issued.key.id, told)
    # Restarted once more and left alone, they use up exactly what is left, and repeat the recordings without effect.
    await load(url, issued.text, told, None)
    await check(url, issued.key.id, told)
    async with Strongroom.open(url) as room:
        stats = await room.keys.stats(issued.key.id)
    assert told.full >= 2
    assert stats.totals["tokens"] == LIMIT
    assert stats.totals["images"] == 2 * RECORDINGS


@pytest.mark.parametrize("seed", range(3))
async def test_killed_processes_lose_nothing_and_admit_no_more(seed: int, tmp_path: Path) -> None:
    await rounds(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3, 103))
async def test_killed_a_hundred_times_they_lose_nothing(seed: int, tmp_path: Path) -> None:
    await rounds(tmp_path, seed)
