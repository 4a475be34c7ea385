"""Computes the leaves of a large journal in further processes, each with the store open on its own: hashing in threads
would share one core. For stores whose cursors are the sequences of their records."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor

from ..storage import open_store
from ..storage.port import MAX_CHANGES_PAGE, Store
from .verify_store import Block, block_of

RANGE = 20_000
"""Sequences that a process reads for one answer."""
FROM_RECORDS = 100_000
"""A smaller journal is verified in one process: starting others takes longer."""
MAX_WORKERS = 8


async def parallel_blocks(store: Store, url: str) -> Callable[[bytes], AsyncIterator[Block]] | None:
    """What computes the blocks of an open store's journal in several processes; None if one process is as good."""
    able = store.capabilities
    if not (able.ordered_journal and able.multi_process and able.embedded):
        return None
    end = (await store.changes("end")).cursor
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    if workers < 2 or not end.isdecimal() or int(end) < FROM_RECORDS:
        return None
    last = int(end)

    async def blocks(legacy_secret: bytes) -> AsyncIterator[Block]:
        loop = asyncio.get_running_loop()
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            waiting: deque[asyncio.Future[Block]] = deque()
            try:
                begin = 0
                while begin < last:
                    through = min(begin + RANGE, last)
                    waiting.append(loop.run_in_executor(pool, block_of_range, url, begin, through, legacy_secret))
                    begin = through
                    if len(waiting) > 2 * workers:
                        block = await waiting.popleft()
                        if not block.rows:  # a gap, which may be huge: somebody may have put a record in far behind
                            rows = (await store.rows(str(begin), limit=1)).rows
                            begin = max(begin, rows[0][0] - 1) if rows else last
                        yield block
                while waiting:
                    yield await waiting.popleft()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return blocks


_opened: dict[str, tuple[asyncio.Runner, Store]] = {}
"""The store of this process, open until it ends."""


def block_of_range(url: str, after: int, through: int, legacy_secret: bytes) -> Block:
    """The block of the records with sequences greater than `after`, up to and with `through`."""
    if url not in _opened:
        runner = asyncio.Runner()
        _opened[url] = (runner, runner.run(open_store(url)))
    runner, store = _opened[url]
    return runner.run(_block(store, after, through, legacy_secret))


async def _block(store: Store, after: int, through: int, legacy_secret: bytes) -> Block:
    parts, rows, cursor = [], 0, str(after)
    while True:
        page = await store.rows(cursor, limit=MAX_CHANGES_PAGE)
        inside = [row for row in page.rows if row[0] <= through]
        block = block_of(inside, legacy_secret)
        parts += block.parts
        rows += block.rows
        if len(inside) < len(page.rows) or page.cursor == cursor or int(page.cursor) >= through:
            return Block(parts, rows)
        cursor = page.cursor


__all__ = ["block_of_range", "parallel_blocks"]
