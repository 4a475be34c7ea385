"""Chooses the thread for each call into SQLite.

Each call into SQLite gives up the interpreter's lock. A second thread that wants the lock back from a busy event loop
waits for up to 5 ms each time. Therefore:

- The loop's thread reads single documents, and applies batches.
- One writer thread waits for the lock of another process.
- A few reader threads scan.
- A COMMIT, with its fsync, runs on the loop's thread while the disk is quick, else on the writer thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

MAX_READERS = 4
"""Scans that run at the same time, each on a thread and a connection of its own. More scans wait for a free thread."""

QUICK_COMMIT_S = 0.000_5
"""A commit runs on the loop's thread while the median commit takes no longer than this. On a quick disk, the way to a
thread and back costs more than the fsync. A larger value stalls the loop for longer; a smaller one makes commits on
quick disks slower."""
COMMITS_TIMED = 9
"""The median is of this many commits. One slow commit, which moves the write-ahead log into the database, must not send
the next hundreds to the thread, as it would with a mean."""
PROBE_EVERY = 100
"""While the disk is slow, one commit in this many still runs on the loop's thread, to find out whether the disk has
become quick."""

YIELD_S = 0.000_05
YIELD_EVERY_S = 0.001
"""While a thread has work, the loop sleeps YIELD_S once in YIELD_EVERY_S. A loop that polls its sockets all the time
takes the interpreter's lock back before the waiting thread has woken up: commits on the writer thread took seconds."""

_T = TypeVar("_T")


class Threads:
    """The writer thread and the reader threads of a store, and the choice of the thread for each commit."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, "strongroom-writer")
        self._readers = ThreadPoolExecutor(MAX_READERS, "strongroom-reader")
        self._working = 0
        self._timer: asyncio.TimerHandle | None = None
        self._commits = 0
        self._commit_s = deque([0.0] * COMMITS_TIMED, COMMITS_TIMED)

    def write(self, work: Callable[..., _T], *arguments: Any) -> asyncio.Future[_T]:
        """Run on the writer thread, one call after the other."""
        return self._run(self._writer, work, *arguments)

    def read(self, work: Callable[..., _T], *arguments: Any) -> asyncio.Future[_T]:
        """Run on one of the reader threads."""
        return self._run(self._readers, work, *arguments)

    async def commit(self, work: Callable[[], None]) -> None:
        """Run a COMMIT that syncs: here while the disk is quick, on the writer thread while it is slow."""
        self._commits += 1
        if self._commits % PROBE_EVERY and sorted(self._commit_s)[COMMITS_TIMED // 2] > QUICK_COMMIT_S:
            await self.write(work)
            return
        began = time.perf_counter()
        work()
        self._commit_s.append(time.perf_counter() - began)

    def stop(self) -> None:
        """End the threads once their work is done. Does not wait for them."""
        self._writer.shutdown(wait=False)
        self._readers.shutdown(wait=False)
        if self._timer is not None:
            self._timer.cancel()

    def _run(self, executor: Executor, work: Callable[..., _T], *arguments: Any) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(executor, work, *arguments)
        future.add_done_callback(self._done)
        self._working += 1
        if self._timer is None:
            self._timer = loop.call_later(YIELD_EVERY_S, self._yield_to_threads, loop)
        return future

    def _done(self, _: asyncio.Future[Any]) -> None:
        self._working -= 1

    def _yield_to_threads(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._working:
            time.sleep(YIELD_S)
            self._timer = loop.call_later(YIELD_EVERY_S, self._yield_to_threads, loop)
        else:
            self._timer = None
