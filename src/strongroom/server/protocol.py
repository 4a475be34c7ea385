"""uvicorn's HTTP protocol with the bounds that it lacks: the size of a request's head, and the time it may take."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ..context import next_id
from . import errors
from .errors import HeadersTooLarge, MalformedRequest

MAX_HEAD_BYTES = 65_536
"""Request line and headers together (a little more may pass if it arrives in one piece)."""
MAX_DISCARDED_BYTES = 64 * 1_048_576
"""Of a body that was refused already, this much is read and dropped, so that its sender gets to read the answer."""
ARRIVAL_TIMEOUT_S = 60.0
"""A connection whose request has not arrived whole after this long is closed: it would hold a place for ever."""

LINGER_S = 1.0
"""A connection that was refused is closed after this long; what still comes is dropped."""


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


class Protocol(HttpToolsProtocol):
    """One connection."""

    _refused = False
    _head_bytes = 0
    _discarded_bytes = 0
    _late_at: float | None = None

    def connection_made(self, transport) -> None:  # type: ignore[no-untyped-def]
        super().connection_made(_Coalesced(transport, self.loop))  # type: ignore[arg-type]  # as much as is used of one
        self._await_the_rest()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.scope is not self.scope:  # the next request has begun, and its head has no end yet
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
