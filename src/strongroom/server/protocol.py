"""uvicorn's HTTP protocol with the bounds that it lacks (the size of a request's head, and the time it may take), and
with a direct way for verifications.

A verification that arrives in one piece, as they do, is given to `VerifyRoute.begin` as it is, and its answer written
as it comes: without the task, the events and the messages of ASGI, which took twice the time of the verification. What
is not answered so goes on as any other request does.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ..context import next_id
from . import errors
from .errors import HeadersTooLarge, MalformedRequest
from .verify import PATH, Asgi, VerifyRoute

MAX_HEAD_BYTES = 65_536
"""Request line and headers together (a little more may pass if it arrives in one piece)."""
MAX_DISCARDED_BYTES = 64 * 1_048_576
"""Of a body that was refused already, this much is read and dropped, so that its sender gets to read the answer."""
ARRIVAL_TIMEOUT_S = 60.0
"""A connection whose request has not arrived whole after this long is closed: it would hold a place for ever."""

LINGER_S = 1.0
"""A connection that was refused is closed after this long; what still comes is dropped."""


_VERIFY = PATH.encode()


class _Coalesced:
    """A transport that sends in one call to the system what is written in one turn of the loop.

    uvicorn writes the head of an answer and its body apart; each would be a call of its own, and the two were a third
    of what the server did for a verification.
    """

    __slots__ = ("_loop", "_pending", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pending: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._pending:
            self._loop.call_soon(self.flush)
        self._pending.append(data)

    def write_all(self, data: bytes) -> None:
        """Send what is the whole of an answer, or its end."""
        if self._pending:
            self._pending.append(data)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        if self._pending:
            data = b"".join(self._pending)
            self._pending.clear()
            self._transport.write(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Direct:
    """The request of a connection that is being answered without ASGI, or was: to uvicorn it is a cycle like others,
    to the route it is where the answer goes. A connection has one, used again for each of them."""

    more_body = False

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._defaults: list[tuple[bytes, bytes]] | None = None
        self._head = b""
        self.message_event = asyncio.Event()
        self.scope: Any = None
        self.body = b""
        self.response_complete = True
        self.disconnected = False
        self.keep_alive = True

    def begin(self, scope: Any, body: bytes) -> None:
        self.scope = scope
        self.body = body
        self.response_complete = self.disconnected = False
        self.keep_alive = True  # until the server stops

    def answer(self, payload: bytes) -> None:
        self.response_complete = True
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

    def hand_on(self, app: Asgi) -> None:
        self.response_complete = True
        self._protocol.start_whole(self, app)


class Protocol(HttpToolsProtocol):
    """One connection."""

    _refused = False
    _head_bytes = 0
    _discarded_bytes = 0
    _late_at: float | None = None
    _whole: bytes | None = None
    """As much as has come of the body of a verification that may be answered directly."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._verify: VerifyRoute | None = getattr(self.app, "verify", None)
        self._direct = _Direct(self)

    def connection_made(self, transport) -> None:  # type: ignore[no-untyped-def]
        super().connection_made(_Coalesced(transport, self.loop))  # type: ignore[arg-type]  # as much as is used of one
        self._await_the_rest()

    # --- Verifications ---

    def on_headers_complete(self) -> None:
        if self.url == _VERIFY and self._verify is not None and self._may_be_direct():
            self._whole = b""
        else:
            super().on_headers_complete()

    def _may_be_direct(self) -> bool:
        parser: Any = self.parser
        cycle: Any = self.cycle  # None at first
        return (
            parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
            and not self.flow.write_paused
            and (cycle is None or cycle.response_complete)  # else it waits its turn
        )

    def on_body(self, body: bytes) -> None:
        if self._whole is None:
            super().on_body(body)
        else:
            self._whole += body

    def on_message_complete(self) -> None:
        body, self._whole = self._whole, None
        if body is None or self._verify is None:
            super().on_message_complete()
            return
        direct = self._direct
        direct.begin(self.scope, body)
        self.cycle = cast("Any", direct)  # as much as is used of one
        if not self._verify.begin(self.headers, body, direct):
            direct.hand_on(self.app)

    def _in_pieces(self, body: bytes) -> None:
        """Go on with a request as with any other: its body is not all there yet."""
        self._whole = None
        super().on_headers_complete()
        if body:
            super().on_body(body)

    def start_whole(self, request: _Direct, app: Asgi) -> None:
        """Let an ASGI application answer a verification that has arrived whole."""
        scope = request.scope
        scope.update(method="POST", path=PATH, raw_path=_VERIFY, query_string=b"")
        cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=request.keep_alive,
            on_response=self.on_response_complete,
        )
        cycle.body += request.body
        cycle.more_body = False
        cycle.message_event.set()
        cycle.disconnected = request.disconnected
        if cast("Any", self.cycle) is request:  # else the next request waits behind it already
            self.cycle = cycle
        self._start_asgi_task(cycle, app)

    # --- Bounds ---

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._whole is not None and not self._refused:
            self._in_pieces(self._whole)
        cycle: Any = self.cycle
        if cycle is self._direct and cycle.scope is self.scope and cycle.response_complete:  # answered already
            self._head_bytes = self._discarded_bytes = 0
            self._late_at = None
        elif cycle is None or cycle.scope is not self.scope:  # the next request has begun, and its head has no end yet
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadersTooLarge())
            else:
                self._await_the_rest()
        elif not cycle.response_complete:
            self._head_bytes = self._discarded_bytes = 0
            if cycle.more_body:
                self._await_the_rest()
            else:
                self._late_at = None
        else:  # what is left of a body that was refused
            self._discarded_bytes += len(data)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.close()
            else:
                self._await_the_rest()

    def _await_the_rest(self) -> None:
        """Close the connection if the request has not arrived by a time that later pieces do not put off."""
        if self._refused or self.transport.is_closing():
            return
        if self._late_at is None:
            self._late_at = self.loop.time() + ARRIVAL_TIMEOUT_S
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_at(self._late_at, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedRequest("the request is not valid HTTP"))

    def _refuse(self, error: HeadersTooLarge | MalformedRequest) -> None:
        if self._refused or self.transport.is_closing():
            return
        status, headers, body = errors.response(error, next_id())
        lines = [
            STATUS_LINE[status],
            *(b"%s: %s\r\n" % header for header in headers),
            b"connection: close\r\n\r\n",
            body,
        ]
        self._refused = True
        self._unset_keepalive_if_required()
        self.transport.write(b"".join(lines))
        # Closing at once, with bytes still unread, would reset the connection, and the answer might never be read.
        self.timeout_keep_alive_task = self.loop.call_later(LINGER_S, self.timeout_keep_alive_handler)
