"""The slow-hash pool: compares secrets with slow hashes (bcrypt, Argon2, PBKDF2) in a bounded number of threads.

The event loop never waits for a hash. Results are remembered, so that a secret is hashed once, and several callers with
one secret wait for one hash. A new secret each time is a guess: guesses are limited for each hint, and the threads and
the length of the queue limit the work of all guesses.
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
"""At most half of the cores compare hashes."""
MAX_WAITING = 64
"""Comparisons that may wait for a thread."""
MAX_REMEMBERED = 10_000
MAX_HINTS = 10_000
GUESSES = 10
"""Wrong secrets that one hint admits at once, …"""
GUESSES_PER_S = 0.5
"""… and how many more a second."""


class SlowHashPool:
    """Compares secrets with stored verifiers, on one event loop. `close` ends its threads."""

    def __init__(self, compare: Callable[[str, str], bool] = matches) -> None:
        self._compare = compare
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._outcomes: dict[bytes, bool] = {}
        self._running: dict[bytes, asyncio.Task[bool]] = {}
        self._left: dict[str, tuple[float, float]] = {}
        """For each hint, the guesses that were left, and when."""
        self.hashed = 0
        """The number of slow comparisons."""

    async def matches(self, hint: str, secret: str, verifier: str) -> bool:
        """Whether a verifier was made of this secret. Raises TooManyRequests if the hint or the pool has too many
        comparisons, ConfigError if a package is missing."""
        if not is_slow(verifier):
            return self._compare(verifier, secret)
        name = hashlib.sha256(verifier.encode() + b"\0" + secret.encode("utf-8", "surrogatepass")).digest()
        known = self._outcomes.get(name)
        if known is not None:
            return known
        task = self._running.get(name)
        if task is None:
            self._admit(hint)
            task = self._running[name] = asyncio.get_running_loop().create_task(self._run(name, hint, secret, verifier))
        # A caller that is cancelled does not cancel the comparison for the others that wait for it.
        return await asyncio.shield(task)

    def _admit(self, hint: str) -> None:
        if self._closed or len(self._running) >= MAX_WAITING + THREADS:
            raise TooManyRequests("too many keys are being used for the first time at once: try again in a moment")
        now = time.monotonic()
        left, at = self._left.get(hint, (float(GUESSES), now))
        left = min(float(GUESSES), left + (now - at) * GUESSES_PER_S)
        if left < 1:
            raise TooManyRequests("too many wrong secrets have this hint: try again later")
        self._left.pop(hint, None)
        if len(self._left) >= MAX_HINTS:
            for oldest in list(self._left)[: MAX_HINTS // 10]:
                del self._left[oldest]
        self._left[hint] = left - 1, now

    async def _run(self, name: bytes, hint: str, secret: str, verifier: str) -> bool:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="strongroom-hash")
        try:
            same = await asyncio.get_running_loop().run_in_executor(self._pool, self._compare, verifier, secret)
        finally:
            del self._running[name]
        self.hashed += 1
        if len(self._outcomes) >= MAX_REMEMBERED:
            for oldest in list(self._outcomes)[: MAX_REMEMBERED // 10]:
                del self._outcomes[oldest]
        self._outcomes[name] = same
        if same and hint in self._left:  # the caller knew the secret: it was no guess
            left, at = self._left[hint]
            self._left[hint] = left + 1, at
        return same

    async def close(self) -> None:
        """Wait for the comparisons under way. Later ones are refused."""
        self._closed = True
        if self._running:
            await asyncio.wait(list(self._running.values()))
        if self._pool is not None:
            self._pool.shutdown()
