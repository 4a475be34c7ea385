"""The process that limits/test_kill kills: it verifies one key at full speed, and writes each request and answer.

    python limits_worker.py URL KEY MODE LEASE_S FOLDER BOOK COST…

The book is a file mapped into memory, so what is written in it survives `kill -9` without a system call for each line:
lines of four 8-byte integers, `units, asked, answered, verdict` (times in nanoseconds since the epoch). A line is begun
before the key is verified and ended after; its verdict is 0 until then. A call that was denied leaves a line only if it
was for one token: any other is made again for one.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import signal
import sys
import time
from typing import Any

from strongroom import Strongroom

CALLERS = 8
LINES = 1_000_000
CELLS = 4
ADMITTED, DENIED = 1, 2
PAUSE_S = 0.02
"""After a call that even one token was too much for."""


class Book:
    """The lines of one process."""

    def __init__(self, path: str) -> None:
        with open(path, "xb+") as file:
            os.ftruncate(file.fileno(), LINES * CELLS * 8)  # a sparse file: it takes what is written
            self._map = mmap.mmap(file.fileno(), 0)
        self._cells = memoryview(self._map).cast("q")
        self._next = 0

    def line(self) -> int:
        if self._next == LINES:
            raise RuntimeError("the book is full")
        self._next += 1
        return (self._next - 1) * CELLS

    def ask(self, line: int, units: int) -> None:
        self._cells[line] = units
        self._cells[line + 1] = time.time_ns()

    def answered(self, line: int, verdict: int) -> None:
        self._cells[line + 2] = time.time_ns()
        self._cells[line + 3] = verdict

    def forget(self, line: int) -> None:
        """The line is free for another call."""
        self._cells[line + 1] = 0


async def main(url: str, text: str, mode: Any, lease_s: float, folder: str, book: Book, costs: list[int]) -> None:
    chance = random.Random(os.getpid())
    async with Strongroom.open(url, limits=mode, lease_s=lease_s, lease_folder=folder) as room:
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)

        async def verify() -> None:
            line, units = book.line(), chance.choice(costs)
            while not stopping.is_set():
                book.ask(line, units)
                answer = await room.keys.verify(text, cost={"tokens": units})
                if answer.valid:
                    book.answered(line, ADMITTED)
                    line, units = book.line(), chance.choice(costs)
                    await asyncio.sleep(0)  # what is answered from memory would let nobody else have a turn
                elif units > 1:
                    book.forget(line)
                    units = 1
                else:
                    book.answered(line, DENIED)
                    line = book.line()
                    await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(verify() for _ in range(CALLERS)))


if __name__ == "__main__":
    _, url, text, mode, lease_s, folder, path, *costs = sys.argv
    asyncio.run(main(url, text, mode, float(lease_s), folder, Book(path), [int(cost) for cost in costs]))
