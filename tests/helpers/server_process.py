"""A server process of its own: started, waited for until it is ready, and stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.helpers.openapi_contract import (
    checked_by_port,
    forget_process,
    watch_process,
)
from tests.helpers.server_app import ADMIN
from tests.helpers.waiting import PATIENCE_S


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen[str]
    port: int

    def client(self, key: str | None = ADMIN, **more: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        more.setdefault("event_hooks", {"response": [checked_by_port]})
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=PATIENCE_S, **more)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=2 * PATIENCE_S)
        return self.process.returncode, out, err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """`python -m strongroom.server.run` with nothing of this process's settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-m", "strongroom.server.run"],
        cwd=folder,
        env={**kept, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running(folder: Path, **environment: str) -> Iterator[Running]:
    """A server process on SQLite in `folder`, ready; killed at the end if it has not ended."""
    port = int(environment.get("STRONGROOM_PORT") or free_port())
    settings: Mapping[str, str] = {"STRONGROOM_PORT": str(port), "STRONGROOM_ADMIN_KEY": ADMIN, **environment}
    process = start(folder, **settings)
    try:
        deadline = time.monotonic() + 2 * PATIENCE_S
        while True:
            assert process.poll() is None, process.communicate()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=PATIENCE_S).status_code == 200:
                    break
            except httpx.TransportError:
                assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.02)
        watch_process(port)
        yield Running(process, port)
    finally:
        forget_process(port)
        if process.poll() is None:
            process.kill()
        process.communicate()
