"""A TCP proxy between a client and a server that fails as networks do: refuses, cuts, falls silent, drops answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

_CHUNK = 65_536


class _Link:
    """One client's connection and the server's behind it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server

    def cut(self) -> None:
        for writer in (self.client, self.server):
            if not writer.is_closing():
                writer.transport.abort()


class Proxy:
    """Forwards a port of the loopback address to `host:port`. Use it as an async context manager.

    Faults hold for the connections there are and for new ones, until `heal`:
    - `refuse()`: connections are cut, and new ones are cut as soon as they come.
    - `fall_silent()`: everything is accepted and nothing is forwarded either way (a black hole).
    - `drop_answer_to(matches)`: once the client has sent a chunk for which `matches` is true, it is forwarded, the
      server's next answer is awaited and thrown away, and the connection is cut: what was asked was done, and the
      client cannot know. It happens once.
    - `drop_request(matches)`: such a chunk is not forwarded, and the connection is cut. It happens once.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._target = host, port
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusing = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._matches: Callable[[bytes], bool] | None = None
        self._swallows = False
        self._doomed: set[_Link] = set()
        self.accepted = 0
        """Connections taken so far."""
        self.dropped = asyncio.Event()
        """Set when an answer or a request was dropped."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        self._cut_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def port(self) -> int:
        if self._server is None:
            raise RuntimeError("the proxy is not running")
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    # --- Faults ---

    def refuse(self) -> None:
        self._refusing = True
        self._cut_all()

    def fall_silent(self) -> None:
        self._flowing.clear()

    def drop_answer_to(self, matches: Callable[[bytes], bool]) -> None:
        self._matches, self._swallows = matches, False
        self.dropped.clear()

    def drop_request(self, matches: Callable[[bytes], bool]) -> None:
        self._matches, self._swallows = matches, True
        self.dropped.clear()

    def heal(self) -> None:
        self._refusing = False
        self._matches = None
        self._flowing.set()

    def _cut_all(self) -> None:
        for link in list(self._links):
            link.cut()

    # --- Forwarding ---

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._refusing:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError, asyncio.CancelledError):
            server_reader, server_writer = await asyncio.open_connection(*self._target)
            link = _Link(writer, server_writer)
            self._links.add(link)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._forward(link, reader, server_writer, self._asked))
                    group.create_task(self._forward(link, server_reader, writer, self._answered))
            finally:
                self._links.discard(link)
                self._doomed.discard(link)
                link.cut()

    async def _forward(
        self,
        link: _Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        passes: Callable[[_Link, bytes], bool],
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                await self._flowing.wait()
                if not passes(link, chunk):
                    break
                writer.write(chunk)
                await writer.drain()
        link.cut()

    def _asked(self, link: _Link, chunk: bytes) -> bool:
        if self._matches is not None and self._matches(chunk):
            self._matches = None
            if self._swallows:
                self.dropped.set()
                return False
            self._doomed.add(link)
        return True

    def _answered(self, link: _Link, chunk: bytes) -> bool:
        if link not in self._doomed:
            return True
        self.dropped.set()
        return False
