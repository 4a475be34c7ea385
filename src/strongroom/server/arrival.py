"""The bounds of one connection: how large and how slow a request may be, and how long a closing connection is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .deadline import Deadline

MAX_HEAD_BYTES = 65_536
"""Request line and headers together (a little more may pass if it arrives in one piece). The same again for what a
chunked body has beside its content: extensions and trailers, beyond 16 bytes for each byte of content."""
MAX_DISCARDED_BYTES = 64 * 1_048_576
"""Of a body that was refused already, this much is read and dropped, so that its sender gets to read the answer."""
ARRIVAL_TIMEOUT_S = 60.0
"""A connection whose request has not arrived whole after this long is closed: it would hold a place for ever."""
LINGER_S = 2.0
"""A connection that was refused is closed once nothing has come for this long; what still comes is dropped."""
MAX_LINGER_S = 60.0
CHUNK_OVERHEAD = 16


class Arrival:
    """Counts what arrives of the present request, and watches the connection's next deadline.

    `late_at`: until when the present request must have arrived; None between requests. `lingering`: the answer is
    given, and the connection is only read so that a reset does not take the answer away.
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
        """Count so many bytes of a head; whether it is still small enough."""
        self._head_bytes += size
        return self._head_bytes <= MAX_HEAD_BYTES

    def content(self, size: int) -> None:
        """So many bytes of a body were content; negative to count them again later."""
        self._content_bytes += size

    def body_fits(self, size: int) -> bool:
        """So many bytes of a body arrived since the last call; whether what they have beside content is little."""
        content, self._content_bytes = self._content_bytes, 0
        self._overhead_bytes = max(0, self._overhead_bytes + size - (1 + CHUNK_OVERHEAD) * content)
        return self._overhead_bytes <= MAX_HEAD_BYTES

    def discard_fits(self, size: int) -> bool:
        """So many bytes are dropped; whether the sender is to be read any longer."""
        self._heard = True
        self.discarded_bytes += size
        return self.discarded_bytes <= MAX_DISCARDED_BYTES

    # --- Time -------------------------------------------------------------------------------------------------

    def await_rest(self) -> None:
        """A request has begun, or may: bound its arrival by a time that later pieces do not put off."""
        if self.late_at is None:
            self.late_at = self._loop.time() + ARRIVAL_TIMEOUT_S
            self._deadline.set(self.late_at)

    def complete(self) -> None:
        """The request has arrived whole."""
        self.late_at = None
        self._head_bytes = self._content_bytes = self._overhead_bytes = self.discarded_bytes = 0

    def look_again(self, in_s: float) -> None:
        """Call `overdue` so long from now, unless that is put off before."""
        self._deadline.set(self._loop.time() + in_s)

    def linger(self) -> None:
        """Read on for a while before the connection is closed."""
        self.lingering = True
        self._linger_until = self._loop.time() + MAX_LINGER_S
        self.look_again(LINGER_S)

    def lingers_on(self) -> bool:
        """At the deadline of a lingering connection: whether the client has sent more, and may send still more."""
        if not self._heard or self._loop.time() >= self._linger_until:
            return False
        self._heard = False
        self.look_again(LINGER_S)
        return True

    def end(self) -> None:
        """The connection is gone."""
        self._deadline.end()


__all__ = ["Arrival"]
