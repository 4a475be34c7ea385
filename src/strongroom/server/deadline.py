"""One timer for many deadlines, most of which are put off before they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls `due` at the moment that was set last. To put it off costs no timer: the one that is there looks anew."""

    __slots__ = ("_due", "_loop", "_timer", "_timer_at", "moment")

    def __init__(self, loop: asyncio.AbstractEventLoop, due: Callable[[], None]) -> None:
        self._loop = loop
        self._due: Callable[[], None] | None = due
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.moment = 0.0

    def set(self, moment: float) -> None:
        """By the loop's clock."""
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
        """It is set no more, and nothing is referred to any longer."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
