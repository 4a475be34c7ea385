"""Logs a failure that repeats: at once, then less and less often, and once more when it is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

FIRST_S = 1.0
LONGEST_S = 60.0


class RetryLog:
    """What one loop that is tried again and again has to say. A loop that polls several times a second would fill the
    log while a database is away for an hour; this takes about one line a minute, and says for how long it has failed.

    `what` says what fails, such as "the journal cannot be read".
    """

    def __init__(self, log: logging.Logger, what: str, now: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._what = what
        self._now = now
        self._began: float | None = None
        self._next = 0.0
        self._pause_s = FIRST_S
        self.failures = 0

    def failed(self, error: object) -> None:
        """It failed once more: a line, unless there was one a short while ago."""
        now = self._now()
        self.failures += 1
        if self._began is None:
            self._began, self._next, self._pause_s = now, now, FIRST_S
        if now < self._next:
            return
        self._next = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_S)
        since = f" (for {now - self._began:.0f} s, {self.failures} times)" if self.failures > 1 else ""
        self._log.warning("%s: %s%s; trying again", self._what, error, since)

    def succeeded(self) -> None:
        """It did not fail. A line if it had."""
        if self._began is not None:
            seconds = self._now() - self._began
            self._log.info("%s: over, after %.1f s and %d failures", self._what, seconds, self.failures)
            self._began = None
            self.failures = 0


__all__ = ["RetryLog"]
