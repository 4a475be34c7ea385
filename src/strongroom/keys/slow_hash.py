"""Compares texts with slow hashes (bcrypt, Argon2, PBKDF2) in threads, and never more of it than a service can bear.

The event loop never waits for a hash. Each outcome is remembered, so that one text is hashed once however often it
comes, and several callers with one text wait for one hash. What differs each time is someone guessing: guesses are
limited for each hint, and what all of them together may take is limited by the threads and by the length of the queue.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..errors import TooManyRequests
from .foreign_hash import is_slow, matches

THREADS = max(1, (os.cpu_count() or 1) // 2)
"""At most half of the machine compares hashes."""
MAX_WAITING = 64
"""Comparisons that may wait for a thread."""
MAX_REMEMBERED = 10_000
MAX_HINTS = 10_000
GUESSES = 10
"""Wrong texts that one hint admits at once, …"""
GUESSES_PER_S = 0.5
"""… and how many more a second."""


class SlowHashPool:
    """Comparisons with verifiers. It belongs to the event loop it is used on; `close` ends its threads."""

    def __init__(self, compare: Callable[[str, str], bool] = matches) -> None:
        self._compare = compare
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._outcomes: dict[bytes, bool] = {}
        self._running: dict[bytes, asyncio.Task[bool]] = {}
        self._left: dict[str, tuple[float, float]] = {}
        """For each hint, how many guesses were left and when that was so."""
        self.hashed = 0
        """Slow comparisons made."""

    async def matches(self, hint: str, text: str, verifier: str) -> bool:
        """Whether a text is what a verifier was made of. TooManyRequests if the hint, or the service, has seen too many
        comparisons; ConfigError if a package is missing."""
        if not is_slow(verifier):
            return self._compare(verifier, text)
        name = hashlib.sha256(verifier.encode() + b"\0" + text.encode("utf-8", "surrogatepass")).digest()
        known = self._outcomes.get(name)
        if known is not None:
            return known
        task = self._running.get(name)
        if task is None:
            self._admit(hint)
            task = self._running[name] = asyncio.get_running_loop().create_task(self._run(name, hint, text, verifier))
        # A caller that goes away takes nothing from the others that wait for the same text.
        return await asyncio.shield(task)

    def _admit(self, hint: str) -> None:
        if self._closed or len(self._running) >= MAX_WAITING + THREADS:
            raise TooManyRequests("too many keys are being used for the first time at once: try again in a moment")
        now = time.monotonic()
        left, at = self._left.get(hint, (float(GUESSES), now))
        left = min(float(GUESSES), left + (now - at) * GUESSES_PER_S)
        if left < 1:
            raise TooManyRequests("too many wrong keys begin like this one: try again in a moment")
        self._left.pop(hint, None)
        if len(self._left) >= MAX_HINTS:
            for oldest in list(self._left)[: MAX_HINTS // 10]:
                del self._left[oldest]
        self._left[hint] = left - 1, now

    async def _run(self, name: bytes, hint: str, text: str, verifier: str) -> bool:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="strongroom-hash")
        try:
            same = await asyncio.get_running_loop().run_in_executor(self._pool, self._compare, verifier, text)
        finally:
            del self._running[name]
        self.hashed += 1
        if len(self._outcomes) >= MAX_REMEMBERED:
            for oldest in list(self._outcomes)[: MAX_REMEMBERED // 10]:
                del self._outcomes[oldest]
        self._outcomes[name] = same
        if same and hint in self._left:  # it was no guess
            left, at = self._left[hint]
            self._left[hint] = left + 1, at
        return same

    async def close(self) -> None:
        """Wait for what is being compared; nothing is compared any more."""
        self._closed = True
        if self._running:
            await asyncio.wait(list(self._running.values()))
        if self._pool is not None:
            self._pool.shutdown()
