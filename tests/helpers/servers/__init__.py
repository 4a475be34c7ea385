"""Servers that tests share: each is started once a run, by whoever needs it first, and stopped when the run ends."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_TIMEOUT_S = 60
_SUPERVISOR = """
import os, signal, subprocess, sys, time
run, command = int(sys.argv[1]), sys.argv[2:]
child = subprocess.Popen(command, start_new_session=True)
def stop(*_):
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
while child.poll() is None:
    try:
        os.kill(run, 0)
    except ProcessLookupError:
        stop()
    time.sleep(0.25)
"""


@dataclass(frozen=True)
class Command:
    """How a server is started: what to run, in which folder it keeps its data, and what others must know of it."""

    arguments: list[str]
    facts: Mapping[str, Any]
    environment: Mapping[str, str] | None = None


def run_folder(request: pytest.FixtureRequest) -> Path:
    """A folder that all processes of this test run share."""
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def shared_server(
    request: pytest.FixtureRequest,
    name: str,
    prepare: Callable[[Path], Command],
    ready: Callable[[Mapping[str, Any]], bool],
) -> Mapping[str, Any]:
    """The facts of the server `name`, which runs. The first process that asks starts it: `prepare` gets an empty
    folder and says how, `ready` whether it answers. It ends with the test run, even if that is killed."""
    folder = run_folder(request) / f"server-{name}"
    folder.mkdir(exist_ok=True)
    facts_file = folder / "facts.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if facts_file.exists():
            facts: Mapping[str, Any] = json.loads(facts_file.read_text())
            return facts
        data = folder / "data"
        data.mkdir()
        command = prepare(data)
        run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        log_file = folder / "log"
        with log_file.open("wb") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-c", _SUPERVISOR, str(run), *command.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(command.environment or {})},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready(command.facts):
            if supervisor.poll() is not None or time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    os.kill(supervisor.pid, signal.SIGTERM)
                pytest.fail(f"{name} did not start: {log_file.read_text()[-2000:]}")
            time.sleep(0.02)
        supervisor.returncode = 0  # it is not waited for: it outlives this process and ends with the run
        facts_file.write_text(json.dumps(command.facts))
        return command.facts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(port: int) -> bool:
    """Whether something listens on this port of the loopback address."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
