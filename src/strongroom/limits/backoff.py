"""Retries of work that others keep changing, for a time and not for a number of attempts: a process may be slow."""

from __future__ import annotations

import asyncio
import random
import time

from ..errors import Unavailable

RETRY_FOR_S = 10.0
"""Retries end after this time."""
AT_ONCE = 4
"""Attempts without a pause. Most work succeeds at the first attempt after a change."""
MAX_PAUSE_S = 0.1


class Backoff:
    """`while await backoff.attempt(): …; raise backoff.exhausted()`. `message` says what prevented it."""

    __slots__ = ("_attempts", "_message", "_until")

    def __init__(self, message: str) -> None:
        self._message = message
        self._attempts = 0
        self._until = 0.0

    async def attempt(self) -> bool:
        """Whether to try: True at once at first, then after a pause in which others can finish."""
        attempts = self._attempts
        self._attempts += 1
        if attempts == 0:
            return True
        now = time.monotonic()
        if attempts == 1:
            self._until = now + RETRY_FOR_S
        elif now > self._until:
            return False
        if attempts >= AT_ONCE:
            pause_s = min(0.001 * 2 ** (attempts - AT_ONCE), MAX_PAUSE_S)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - jitter, not a secret
        return True

    def exhausted(self) -> Unavailable:
        """The error to raise after the last attempt."""
        return Unavailable(f"{self._message}: tried for {RETRY_FOR_S:g} s, try again")


__all__ = ["Backoff"]
