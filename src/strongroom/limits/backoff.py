"""How long something is tried again that others keep changing: a time, not a count, since a process may be slow."""

from __future__ import annotations

import asyncio
import random
import time

from ..errors import Unavailable

PATIENCE_S = 10.0
"""So long it is tried again."""
AT_ONCE = 4
"""So many attempts are made without a pause: mostly the first one after a change succeeds."""
MAX_PAUSE_S = 0.1


class Patience:
    """`while await patience.another(): …; raise patience.over()`. `message` says what was in the way."""

    __slots__ = ("_attempts", "_message", "_until")

    def __init__(self, message: str) -> None:
        self._message = message
        self._attempts = 0
        self._until = 0.0

    async def another(self) -> bool:
        """Whether to try (again): at once at first, then after a pause in which others get done what they are doing."""
        attempts = self._attempts
        self._attempts += 1
        if attempts == 0:
            return True
        now = time.monotonic()
        if attempts == 1:
            self._until = now + PATIENCE_S
        elif now > self._until:
            return False
        if attempts >= AT_ONCE:
            pause_s = min(0.001 * 2 ** (attempts - AT_ONCE), MAX_PAUSE_S)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - jitter, not a secret
        return True

    def over(self) -> Unavailable:
        """The error, once there is no other attempt."""
        return Unavailable(f"{self._message}: tried for {PATIENCE_S:g} s, try again")


__all__ = ["Patience"]
