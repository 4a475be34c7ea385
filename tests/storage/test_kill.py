"""kill -9 under load: nothing acknowledged is lost and no limit is exceeded, whenever it comes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from strongroom import Limit, Rolling, Strongroom, Total
from tests.helpers.paths import HELPERS
from tests.helpers.stores import new_url
from tests.helpers.waiting import wait_until

WORKER = HELPERS / "kill_worker.py"
ADMIN = "an administrator's key, 32 or more characters"
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


async def make_key(url: str) -> tuple[str, str]:
    limits = [
        Limit(resource="tokens", limit=LIMIT, window=Rolling(seconds=18_000)),
        Limit(resource="requests", limit=10**9, window=Total()),
    ]
    async with Strongroom.open(url) as room:
        issued = await room.keys.create(name="k", limits=limits)
    return issued.key.id, issued.text


async def rounds(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    url = new_url("sqlite", folder)
    id, text = await make_key(url)
    told = Acknowledged()
    for _ in range(2):
        await load(url, text, told, chance)
        await check(url, id, told)
    # Restarted once more and left alone, they use up exactly what is left, and repeat the recordings without effect.
    await load(url, text, told, None)
    await check(url, id, told)
    async with Strongroom.open(url) as room:
        stats = await room.keys.stats(id)
    assert told.full >= 2
    assert stats.totals["tokens"] == LIMIT
    assert stats.totals["images"] == 2 * RECORDINGS


@pytest.mark.parametrize("seed", [0])
async def test_killed_processes_lose_nothing_and_never_exceed_a_limit(seed: int, tmp_path: Path) -> None:
    await rounds(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 101))
async def test_processes_killed_a_hundred_times_lose_nothing(seed: int, tmp_path: Path) -> None:
    await rounds(tmp_path, seed)


# --- The server itself ----------------------------------------------------------------------------------------


@asynccontextmanager
async def server(url: str, log: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`strongroom serve` as a process of its own, once it answers; killed at the end if it still runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "STRONGROOM_ADMIN_KEY": ADMIN}
    command = [sys.executable, "-m", "strongroom.cli", "serve", "--store", url, "--port", str(port)]
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output, env=environment)
    address = f"http://127.0.0.1:{port}"

    async def answers() -> bool:
        assert process.returncode is None, f"the server ended; see {log}"
        with suppress(httpx.TransportError):
            async with httpx.AsyncClient() as client:
                return (await client.get(f"{address}/healthz")).is_success
        return False

    try:
        await wait_until(answers)
        yield process, address
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def call_until_gone(address: str, text: str, told: Acknowledged, seed: int) -> None:
    """Verify and record over one connection until the server is gone, or the limit is full."""
    chance = random.Random(seed)
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with suppress(httpx.TransportError):
        async with httpx.AsyncClient(base_url=address, headers=headers, timeout=30) as client:
            while True:
                number = chance.randrange(RECORDINGS)
                tokens = chance.choice([1, 2, 50])
                body = {"key": text, "cost": {"tokens": tokens, "requests": 1}}
                answer = await client.post("/v1/keys/verify", json=body)
                assert answer.status_code == 200, answer.text
                if answer.json()["valid"]:
                    told.add(f"v {tokens}")
                elif tokens == 1:
                    return
                body = {"key": text, "cost": {"images": 2}, "idempotency_key": f"i{number}"}
                recorded = await client.post("/v1/usage", json=body)
                assert recorded.status_code == 200, recorded.text
                told.add(f"r {number}")


async def server_round(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    url = new_url("sqlite", folder)
    id, text = await make_key(url)
    told = Acknowledged()
    for _ in range(2):
        async with server(url, folder / "one.log") as one, server(url, folder / "two.log") as two:
            calls = [
                asyncio.ensure_future(call_until_gone(address, text, told, chance.randrange(10**9)))
                for _, address in (one, two)
                for _ in range(6)
            ]
            before = told.requests
            await wait_until(lambda before=before: told.requests > before + 50)  # type: ignore[misc]
            for process, _ in chance.sample([one, two], 2):
                await asyncio.sleep(chance.uniform(0, 0.15))
                process.send_signal(signal.SIGKILL)
                await process.wait()
            await asyncio.gather(*calls)
        await check(url, id, told)


@pytest.mark.server
@pytest.mark.parametrize("seed", [0])
async def test_killed_servers_lose_nothing_and_never_exceed_a_limit(seed: int, tmp_path: Path) -> None:
    await server_round(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.server
@pytest.mark.parametrize("seed", range(1, 21))
async def test_servers_killed_many_times_lose_nothing(seed: int, tmp_path: Path) -> None:
    await server_round(tmp_path, seed)
