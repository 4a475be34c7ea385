"""Four worker processes over one SQLite file keep one limit exactly."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import httpx
import pytest

from strongroom import Strongroom
from tests.helpers.asgi_calls import REQUESTS, bearer
from tests.helpers.paths import ROOT
from tests.helpers.server_process import free_port
from tests.helpers.waiting import PATIENCE_S, wait_until

WORKERS, LIMIT, EACH = 4, 200, 100
START_TIMEOUT_S = 60.0


@pytest.mark.server
@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_four_worker_processes_admit_exactly_the_limit(limits: str, tmp_path: Path) -> None:
    """Together they let in what the limit allows and not one more; durable debits deny nobody early."""
    store = f"sqlite:///{tmp_path}/a.db"
    async with Strongroom.open(store) as room:
        issued = await room.keys.create(name="k", limits=[{**REQUESTS, "limit": LIMIT}])
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.helpers.asgi_worker_app:app"]
    options = ["--workers", str(WORKERS), "--port", str(port), "--log-level", "warning", "--timeout-keep-alive", "600"]
    environment = {
        "PATH": os.environ["PATH"],
        "STORE": store,
        "LIMITS": limits,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
    }
    process = subprocess.Popen(  # noqa: ASYNC220 - it is started, and nothing else waits
        [*command, *options], cwd=ROOT, env=environment
    )
    served: Counter[str] = Counter()

    async def ask(http: httpx.AsyncClient) -> None:
        for _ in range(EACH):
            answer = await http.get("/", headers=bearer(issued.text))
            assert answer.status_code in (200, 429), answer.text
            served[answer.text if answer.status_code == 200 else "denied"] += 1

    async with AsyncExitStack() as connections:
        connections.push_async_callback(_end, process)
        held: dict[str, httpx.AsyncClient] = {}
        """A connection to each worker: which of them takes a new one is the system's to say."""

        async def all_are_held() -> bool:
            assert process.poll() is None
            http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)
            try:
                worker = (await http.get("/alive")).text
            except httpx.TransportError:
                worker = ""
            if worker and worker not in held:
                held[worker] = http
                connections.push_async_callback(http.aclose)
            else:
                await http.aclose()
            return len(held) == WORKERS

        await wait_until(all_are_held, START_TIMEOUT_S)
        await asyncio.gather(*map(ask, held.values()))
    admitted = served.total() - served["denied"]
    assert len(served) > 2, served  # more than one worker let somebody in
    assert admitted <= LIMIT
    if limits == "durable":
        assert admitted == LIMIT
    async with Strongroom.open(store) as room:
        assert (await room.keys.stats(issued.key.id)).totals == {"requests": admitted}
        # What was lent and not spent came back when the workers stopped: the whole limit can be used.
        while (await room.keys.verify(issued.text)).valid:
            admitted += 1
    assert admitted == LIMIT


async def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(process.wait, PATIENCE_S)
    process.kill()
    process.wait()
