"""Both clients behind one asynchronous interface, and a scripted server, for the tests of the client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from strongroom.client import AsyncClient, Client, Retries
from tests.helpers.openapi_contract import checked_if_ours
from tests.helpers.server_process import Running, running

AT_ONCE = frozenset(
    {"tenant", "collection", "watch", "hold", "list", "find", "deliveries", "bulk", "use", "export", "legal_holds"}
)
"""Methods of both clients that are not awaited: they only make something."""
OBJECTS = ("strongroom.client._sync.",)
_END = object()


class Threaded:
    """A synchronous client, or a part of it, that is awaited as the asynchronous one is: each call runs in a thread."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, "close" if name == "aclose" else name)
        if type(value).__module__.startswith(OBJECTS):
            return Threaded(value)
        if not callable(value):
            return value
        if name in AT_ONCE:
            return lambda *args, **named: _wrapped(value(*args, **named))

        async def call(*args: Any, **named: Any) -> Any:
            return await asyncio.to_thread(value, *args, **named)

        return call

    def __repr__(self) -> str:
        return repr(self._target)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        value = await asyncio.to_thread(next, self._target, _END)
        if value is _END:
            raise StopAsyncIteration
        return value

    async def __aenter__(self) -> Any:
        return _wrapped(await asyncio.to_thread(self._target.__enter__))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._target.__exit__, kind, error, trace)


def _wrapped(value: Any) -> Any:
    known = type(value).__module__.startswith(OBJECTS) or hasattr(value, "__next__")
    return Threaded(value) if known else value


QUICK = Retries(base_s=0.01, most_s=0.05)
"""Retries as by default, but that the tests need not wait."""


@dataclass
class Connector:
    """Makes clients of one kind, and closes them."""

    kind: str
    opened: list[Any] = field(default_factory=list)

    def __call__(self, url: str, key: str | None = None, **options: Any) -> Any:
        options.setdefault("retries", QUICK)
        client: Any = (
            AsyncClient(url, key, **options) if self.kind == "async" else Threaded(Client(url, key, **options))
        )
        transport = client._http if self.kind == "async" else client._target._http
        checked_if_ours(transport._http, httpx.URL(url).port)
        self.opened.append(client)
        return client

    async def close(self) -> None:
        for client in self.opened:
            await client.aclose()


# --- Servers ------------------------------------------------------------------------------------------------------

SHOP = """
from datetime import datetime
from decimal import Decimal
from typing import Annotated
from strongroom import Entity, Secret

class Order(Entity, collection="orders"):
    owner: str
    token: Annotated[str | None, Secret()] = None
    price: Decimal = Decimal(0)
    photo: bytes = b""
    seats: int = 1
    tags: list[str] = []
    limit: int = 0
    due: datetime | None = None
"""


@contextmanager
def shop(folder: Path) -> Iterator[Running]:
    """A server process with a collection that has every kind of field."""
    (folder / "shop.py").write_text(SHOP)
    with running(folder, STRONGROOM_ENTITIES="shop") as process:
        yield process


# --- A server that answers as it is told -------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Told:
    """One answer: a status with a body, or (status 0) none: `hangs` says nothing at all, else the connection is cut."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    hangs: bool = False


@dataclass
class Scripted:
    """A server with its answers in order, the last again and again; and what it was asked."""

    answers: list[Told]
    asked: list[Asked] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request, answered; whether the connection stays."""
        self.asked.append(await _request(reader))
        told = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if told.hangs:
            await reader.read()  # until the client goes
        if told.hangs or told.status == 0:
            return False
        writer.write(_answer(told))
        await writer.drain()
        return True


async def _request(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, path, headers, body)


def _answer(told: Told) -> bytes:
    body = told.body if isinstance(told.body, bytes) else json.dumps(told.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **told.headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {told.status} Told\r\n{lines}\r\n".encode() + body


@asynccontextmanager
async def scripted(*answers: Told) -> AsyncIterator[Scripted]:
    """A server on a free port of the loopback address."""
    script = Scripted(list(answers))
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(script.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    script.port = server.sockets[0].getsockname()[1]
    try:
        yield script
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def problem(status: int, code: str, **more: Any) -> Told:
    """An error as the server tells it."""
    headers = more.pop("headers", {})
    body = {"type": f"/docs#error-{code}", "title": "Title", "status": status, "detail": "Detail", "code": code}
    return Told(status, {**body, "request_id": "r1", **more}, {"content-type": "application/problem+json", **headers})


Matches = Callable[[bytes], bool]


def request_to(line: str) -> Matches:
    """Whether a chunk begins the request with this beginning of its first line."""
    return lambda chunk: chunk.startswith(line.encode())
