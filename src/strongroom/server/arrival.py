"""The bounds of one connection: the size and the duration of a request, and the reading before a close."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .deadline import Deadline

MAX_HEAD_BYTES = 65_536
"""Request line and headers together; a little more passes if it arrives in one piece. The same bound applies to the
extensions and trailers of a chunked body, beyond 16 bytes for each byte of content."""
MAX_DISCARDED_BYTES = 64 * 1_048_576
"""Bytes of a refused body that are read and dropped: a reset could destroy the answer before the sender reads it."""
ARRIVAL_TIMEOUT_S = 60.0
"""The longest arrival of a request. Without it a slow sender could occupy a connection for ever."""
LINGER_S = 2.0
"""A refused connection is closed after this long without input; its input is dropped."""
MAX_LINGER_S = 60.0
CHUNK_OVERHEAD = 16


class Arrival:
    """Counts the bytes of the current request, and watches the connection's next deadline.

    `late_at`: the time by which the whole request must have arrived; None between requests. `lingering`: the answer is
    sent, and the connection is only read so that a reset does not destroy the answer.
    """

    __slots__ = (
        "_content_bytes",
        "_deadline",
        "_head_bytes",
        "_heard",
        "_linger_until",
        "_loop",
        "_overhead_bytes",
        "discarded_bytes",
        "late_at",
        "lingering",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, overdue: Callable[[], None]) -> None:
        self._loop = loop
        self._deadline = Deadline(loop, overdue)
        self._head_bytes = self._content_bytes = self._overhead_bytes = self.discarded_bytes = 0
        self.late_at: float | None = None
        self.lingering = self._heard = False
        self._linger_until = 0.0

    # --- Size -------------------------------------------------------------------------------------------------

    def head_fits(self, size: int) -> bool:
        """Count bytes of a head; returns whether the head is within its bound."""
        self._head_bytes += size
        return self._head_bytes <= MAX_HEAD_BYTES

    def content(self, size: int) -> None:
        """Count content bytes of a body; a negative size subtracts bytes that will be counted again."""
        self._content_bytes += size

    def body_fits(self, size: int) -> bool:
        """Count received bytes of a body; returns whether the bytes that are not content are within their bound."""
        content, self._content_bytes = self._content_bytes, 0
        self._overhead_bytes = max(0, self._overhead_bytes + size - (1 + CHUNK_OVERHEAD) * content)
        return self._overhead_bytes <= MAX_HEAD_BYTES

    def discard_fits(self, size: int) -> bool:
        """Count discarded bytes; returns whether to read more from the sender."""
        self._heard = True
        self.discarded_bytes += size
        return self.discarded_bytes <= MAX_DISCARDED_BYTES

    # --- Time -------------------------------------------------------------------------------------------------

    def await_rest(self) -> None:
        """Start the deadline of a request. Later pieces of the request do not extend it."""
        if self.late_at is None:
            self.late_at = self._loop.time() + ARRIVAL_TIMEOUT_S
            self._deadline.set(self.late_at)

    def complete(self) -> None:
        """End the deadline: the whole request has arrived."""
        self.late_at = None
        self._head_bytes = self._content_bytes = self._overhead_bytes = self.discarded_bytes = 0

    def look_again(self, in_s: float) -> None:
        """Call `overdue` after this time, unless the deadline is set again before."""
        self._deadline.set(self._loop.time() + in_s)

    def linger(self) -> None:
        """Read for a while before the connection is closed."""
        self.lingering = True
        self._linger_until = self._loop.time() + MAX_LINGER_S
        self.look_again(LINGER_S)

    def lingers_on(self) -> bool:
        """At the deadline of a lingering connection: whether the client has sent more and may still send more."""
        if not self._heard or self._loop.time() >= self._linger_until:
            return False
        self._heard = False
        self.look_again(LINGER_S)
        return True

    def end(self) -> None:
        """Stop the timer: the connection is closed."""
        self._deadline.end()


__all__ = ["Arrival"]
