"""One request of a connection while it is answered: by an ASGI application, or directly."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.server import ServerState

from ..context import next_id
from ..errors import StrongroomError
from . import errors
from .errors import Message
from .verify import Asgi

_NONE: list[tuple[bytes, bytes]] = []


class Connection(Protocol):
    """As much of a connection as a request that is answered directly needs."""

    transport: Any
    server_state: ServerState

    def on_response_complete(self) -> None:
        """The answer was given."""
        ...

    def start_whole(self, request: Direct, app: Asgi) -> None:
        """Let an ASGI application answer."""
        ...


class Flow(FlowControl):
    """Reading that stays paused while requests wait for their turn, whoever wants more of a body."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Cycle(RequestResponseCycle):
    """One request answered by an ASGI application."""

    async def send(self, message: Any) -> None:
        if self.waiting_for_100_continue and not self.response_started:
            # Whether the client sends its body all the same is its choice: what follows cannot be told apart.
            self.keep_alive = False
        await super().send(message)
        if self.response_complete:
            self.body = bytearray()

    async def send_500_response(self) -> None:
        status, headers, body = errors.response(StrongroomError(), next_id())
        self.keep_alive = False
        start: Message = {"type": "http.response.start", "status": status, "headers": headers}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})


class Direct:
    """The request of a connection that is being answered without ASGI, or was: to uvicorn it is a cycle like others,
    to the route it is where the answer goes. A connection has one, used again for each of them."""

    more_body = False
    response_started = False

    def __init__(self, protocol: Connection) -> None:
        self._protocol = protocol
        self._defaults: list[tuple[bytes, bytes]] | None = None
        self._head = b""
        self.message_event = asyncio.Event()
        self.headers = _NONE
        self.body = b""
        self.response_complete = True
        self.disconnected = False
        self.keep_alive = True

    def begin(self, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.headers = headers
        self.body = body
        self.response_complete = self.disconnected = False
        self.keep_alive = True  # until the server stops

    def answer(self, payload: bytes) -> None:
        self.response_complete = True
        self.headers, self.body = _NONE, b""
        protocol = self._protocol
        transport: Any = protocol.transport
        if self.disconnected or transport.is_closing():
            return
        defaults = protocol.server_state.default_headers  # a new list each second, for its date
        if defaults is not self._defaults:
            self._defaults = defaults
            lines = b"".join(b"%s: %s\r\n" % header for header in defaults)
            self._head = b"%s%scontent-type: application/json\r\n" % (STATUS_LINE[200], lines)
        end = b"" if self.keep_alive else b"connection: close\r\n"
        transport.write_all(b"%scontent-length: %d\r\n%s\r\n%s" % (self._head, len(payload), end, payload))
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()

    def take(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """The headers and the body, which are then kept elsewhere."""
        found = self.headers, self.body
        self.headers, self.body = _NONE, b""
        return found

    def hand_on(self, app: Asgi) -> None:
        self.response_complete = True
        self._protocol.start_whole(self, app)
