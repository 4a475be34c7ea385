"""What is sent on one connection: in few calls to the system, and never waiting for a client longer than a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

WRITE_TIMEOUT_S = 30.0
"""A client has this long to read MIN_READ_BYTES of an answer that waits for it, or all of it; else it is cut off."""
MIN_READ_BYTES = 65_536
MIN_APART_BYTES = 16_384
"""What ends with a part as large as this is handed to the system in its parts."""


class Outgoing:
    """A transport that sends in one call to the system what is written in one turn of the loop.

    uvicorn writes the head of an answer and its body apart; each would be a call of its own, and the two were a third
    of what the server did for a verification.

    `linger` is asked at a close: it is true if the input is to be read on for a while, so that the answer is not lost
    with what the client still sends. `release` breaks the reference to it, once the connection is gone.
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
        """Send what is the whole of an answer, or its end."""
        if self._pending or self.half_closed:
            self.write(data)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            if len(pending[-1]) >= MIN_APART_BYTES:  # copied, each client that does not read would keep a copy
                self._transport.writelines(pending)
            else:
                self._transport.write(b"".join(pending))

    def is_closing(self) -> bool:
        return self.half_closed or self._transport.is_closing()

    # --- The end ---

    def half_close(self) -> None:
        """Nothing is sent after what was written so far, and the client is told; its own bytes still come in."""
        self.flush()
        self.half_closed = True
        if not self._transport.is_closing() and self._transport.can_write_eof():
            self._transport.write_eof()

    def close(self) -> None:
        self.flush()
        if self._linger is None or not self._linger():
            self.close_now()

    def close_now(self) -> None:
        """Close once what was written is read, and without that if it takes too long."""
        self.flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self.watch()

    def release(self) -> None:
        """The connection is gone."""
        self._linger = None
        self._pending.clear()
        self.unwatch()

    # --- Clients that do not read ---

    def watch(self) -> None:
        """Something waits for the client to read: cut it off if it does not."""
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
