"""`revocation`: how long after a key was revoked another node still finds it valid, with its feed and without.

The node that verifies is a process of its own, and asks without a pause. Both read the machine's one clock.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from strongroom import Strongroom
from strongroom.errors import Unavailable
from strongroom.storage.port import ChangesPage

from . import postgres
from .harness import Benchmark, BenchmarkError, Plan, percentiles_us

REVOCATIONS, QUICK_REVOCATIONS = 200, 5
BROKEN_SHARE = 4
"""Of so many revocations one is measured at a node whose feed is broken: each takes the better part of a second."""
TARGET_S = 1.0


def run(plan: Plan) -> Benchmark:
    count = QUICK_REVOCATIONS if plan.quick else REVOCATIONS
    labels = [
        f"From the commit of `keys.disable` to the last verification by another process that was begun and still found "
        f"the key valid; a key without limits, since one with limits is checked by the store each time. Target: "
        f"{TARGET_S:g} s."
    ]
    with postgres.server() as server:
        urls = {"sqlite": f"sqlite:///{Path(plan.folder).absolute()}/revocation.db", "postgresql": server}
        for name, url in urls.items():
            for broken in (False, True):
                times = asyncio.run(_measure(url, max(2, count // BROKEN_SHARE) if broken else count, broken))
                p50, p99 = (us / 1e3 for us in percentiles_us(times) if us is not None)
                worst = max(times) * 1e3
                what = f"{name}, {'its feed of changes broken' if broken else 'by the feed of changes'}"
                plan.progress(what)
                verdict = "met" if worst <= TARGET_S * 1e3 else "MISSED"
                labels.append(
                    f"{what}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {worst:.1f} ms of {len(times)} "
                    f"(target {TARGET_S * 1e3:,.0f} ms: {verdict})"
                )
    return Benchmark("revocation", "seconds", tuple(labels))


async def _measure(url: str, count: int, broken: bool) -> list[float]:
    """The times of so many revocations, in seconds."""
    times: list[float] = []
    async with Strongroom.open(url) as room:
        with _verifier(url, broken) as node:
            for _ in range(count):
                issued = await room.keys.create(name="bench")
                await asyncio.to_thread(_say, node, issued.text)
                await asyncio.to_thread(_heard, node)  # it has found the key valid, and goes on asking
                await room.keys.disable(issued.key.id)
                revoked = time.monotonic()
                last_valid = (await asyncio.to_thread(_heard, node))["last_valid"]
                times.append(max(0.0, last_valid - revoked))
    return times


@contextmanager
def _verifier(url: str, broken: bool) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.revocation", url, str(int(broken))]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        _pipe(process.stdin).close()  # its sign to end
        try:
            process.wait(10)
        finally:
            process.kill()
            _pipe(process.stdout).close()


def _say(node: subprocess.Popen[str], line: str) -> None:
    pipe = _pipe(node.stdin)
    pipe.write(line + "\n")
    pipe.flush()


def _heard(node: subprocess.Popen[str]) -> dict[str, Any]:
    line = _pipe(node.stdout).readline()
    if not line:
        raise BenchmarkError("the node that verifies has ended")
    heard: dict[str, Any] = json.loads(line)
    return heard


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


# --- The node that verifies -----------------------------------------------------------------------------------


async def _verify(url: str, broken: bool) -> None:
    """Verify each key that is named on standard input, until it is refused; say when it was valid last."""
    async with Strongroom.open(url) as room:
        if broken:

            async def fail(after: str | None, **options: Any) -> ChangesPage:
                raise Unavailable("the journal cannot be read")

            room.store.changes = fail  # type: ignore[method-assign]
        while text := (await asyncio.to_thread(sys.stdin.readline)).strip():
            last_valid = 0.0
            while True:
                began = time.monotonic()
                if not (await room.keys.verify(text)).valid:
                    break
                if not last_valid:
                    print("{}", flush=True)
                last_valid = began
                await asyncio.sleep(0)  # as a server would: the feed has its turn
            print(json.dumps({"last_valid": last_valid}), flush=True)


if __name__ == "__main__":
    asyncio.run(_verify(sys.argv[1], sys.argv[2] == "1"))
