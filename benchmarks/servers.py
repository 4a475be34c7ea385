"""Starts the servers that `verify` measures, each a process of its own in a folder of its own, and always ends them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from . import bare
from .harness import BenchmarkError

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
# One worker process, and nothing of the caller's own settings.
UVICORN = ("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    port: int
    pid: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _running(command: Sequence[str], folder: Path, port: int, environment: Mapping[str, str]) -> Iterator[Server]:
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**kept, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C ends the rounds first, and workers of its own end with it
        )
        try:
            _wait_until_open(process, port, log)
            yield Server(port, process.pid)
        finally:
            _end(process)


def _wait_until_open(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = monotonic() + START_TIMEOUT_S
    while monotonic() < end:
        if process.poll() is not None:
            break
        with suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        sleep(0.05)
    tail = " / ".join(log.read_text(errors="replace").strip().splitlines()[-4:])
    what = "did not open its port" if process.poll() is None else f"ended with status {process.returncode}"
    raise BenchmarkError(f"the server {what}: {tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to stop, then end it and whatever is left of its group."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def bare_server(folder: Path, keys: Sequence[str]) -> Iterator[Server]:
    """The floor: `bare.Bare` on uvicorn, knowing `keys`."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "keys.json"
    listed.write_text(json.dumps(list(keys)))
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "benchmarks.bare:create", "--factory", "--lifespan", "off"]
    command += ["--host", HOST, "--port", str(port), *UVICORN]
    here = str(Path(__file__).resolve().parent.parent)
    environment = {"PYTHONPATH": here, bare.KEYS_VARIABLE: str(listed)}
    with _running(command, folder, port, environment) as server:
        yield server


@contextmanager
def strongroom_server(
    folder: Path, admin_key: str, store: str | None = None, *, limits: str = "durable"
) -> Iterator[Server]:
    """Ours: `strongroom serve`, one worker process, as a user would start it; on SQLite in `folder`, or on `store`."""
    beside = Path(sys.executable).parent / "strongroom"
    program = str(beside) if beside.exists() else shutil.which("strongroom")
    if program is None:
        raise BenchmarkError("the command `strongroom` is not installed in this environment")
    port = free_port()
    environment = {
        "STRONGROOM_STORE": store or f"sqlite:///{(folder / 'strongroom.db').absolute()}",
        "STRONGROOM_HOST": HOST,
        "STRONGROOM_PORT": str(port),
        "STRONGROOM_WORKERS": "1",
        "STRONGROOM_ADMIN_KEY": admin_key,
        "STRONGROOM_LIMITS": limits,
    }
    with _running([program, "serve"], folder, port, environment) as server:
        yield server


def create_keys(server: Server, admin_key: str, bodies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Issue keys through `POST /v1/keys`, one after the other, and give back their texts."""
    connection = HTTPConnection(HOST, server.port, timeout=30)
    headers = {"Authorization": f"Bearer {admin_key}", "Content-Type": "application/json"}
    keys = []
    try:
        for body in bodies:
            connection.request("POST", "/v1/keys", json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 201:
                raise BenchmarkError(f"POST /v1/keys answered {answer.status}: {text[:300]!r}")
            keys.append(str(json.loads(text)["key"]))
    except (OSError, HTTPException) as error:
        raise BenchmarkError(f"POST /v1/keys: {type(error).__name__}: {error}") from None
    finally:
        connection.close()
    return keys
