"""The output of one connection: few system calls, and a bounded wait for slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

WRITE_TIMEOUT_S = 30.0
"""A client must read MIN_READ_BYTES of a waiting answer, or all of it, in this time; else the connection is closed."""
MIN_READ_BYTES = 65_536
MIN_APART_BYTES = 16_384
"""Output whose last part is this large is not joined into one buffer."""


class Outgoing:
    """A transport that sends everything written in one turn of the loop with one system call.

    uvicorn writes the head and the body of an answer separately. Two system calls took a third of the server's time for
    a verification.

    `linger` is called at a close; it returns true if the input must be read for a while, so that a reset does not
    destroy the answer. `release` breaks this reference cycle after the close.
    """

    __slots__ = ("_cut", "_linger", "_loop", "_pending", "_transport", "_watched_bytes", "half_closed")

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, linger: Callable[[], bool]
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._linger: Callable[[], bool] | None = linger
        self._pending: list[bytes] = []
        self._cut: asyncio.TimerHandle | None = None
        self._watched_bytes = 0
        self.half_closed = False

    def write(self, data: bytes) -> None:
        if self.half_closed:
            return
        if not self._pending:
            self._loop.call_soon(self.flush)
        self._pending.append(data)

    def write_all(self, data: bytes) -> None:
        """Send a whole answer, or its end, without waiting for the end of the turn."""
        if self._pending or self.half_closed:
            self.write(data)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            if len(pending[-1]) >= MIN_APART_BYTES:  # joining would copy it, and each slow client would keep a copy
                self._transport.writelines(pending)
            else:
                self._transport.write(b"".join(pending))

    def is_closing(self) -> bool:
        return self.half_closed or self._transport.is_closing()

    # --- The end ---

    def half_close(self) -> None:
        """Send the pending output and end the output; the client's input still arrives."""
        self.flush()
        self.half_closed = True
        if not self._transport.is_closing() and self._transport.can_write_eof():
            self._transport.write_eof()

    def close(self) -> None:
        self.flush()
        if self._linger is None or not self._linger():
            self.close_now()

    def close_now(self) -> None:
        """Close after the client has read the output, or without that after a time-out."""
        self.flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self.watch()

    def release(self) -> None:
        """Drop all references, because the connection is closed."""
        self._linger = None
        self._pending.clear()
        self.unwatch()

    # --- Clients that do not read ---

    def watch(self) -> None:
        """Start the time-out for a client that does not read its output."""
        if self._cut is None and self._linger is not None:
            self._watched_bytes = self._transport.get_write_buffer_size()
            self._cut = self._loop.call_later(WRITE_TIMEOUT_S, self._look)

    def unwatch(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None

    def _look(self) -> None:
        self._cut = None
        if self._watched_bytes - self._transport.get_write_buffer_size() >= MIN_READ_BYTES:
            self.watch()
        else:
            self._transport.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
