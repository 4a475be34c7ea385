"""One timer for many deadlines, most of which are postponed before they expire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls `due` at the last set time. Postponing creates no timer: the existing timer checks the time again."""

    __slots__ = ("_due", "_loop", "_timer", "_timer_at", "moment")

    def __init__(self, loop: asyncio.AbstractEventLoop, due: Callable[[], None]) -> None:
        self._loop = loop
        self._due: Callable[[], None] | None = due
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.moment = 0.0

    def set(self, moment: float) -> None:
        """Set the deadline, in the loop's time."""
        self.moment = moment
        if self._timer is None or self._timer_at > moment:
            self._begin()

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self.moment
        self._timer = self._loop.call_at(self.moment, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._loop.time() < self.moment:
            self._begin()
        elif self._due is not None:
            self._due()

    def end(self) -> None:
        """Cancel the timer and drop its references."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
