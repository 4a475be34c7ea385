"""Worker processes of an import: each reads a chunk of the key file and packs its keys while the store writes another.

Reading, checking, hashing and encoding a key costs as much as writing it.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Self

from ...context import Context, next_id
from ...errors import Unavailable
from ...storage.port import Pack, Packer
from .key_file_chunks import Chunk, ChunkedKeyFile
from .key_file_rows import Maker

AHEAD = 2
"""Chunks that each worker packs or queues. More chunks would only take memory."""


@dataclass(frozen=True, slots=True)
class Task:
    """A worker's task for every chunk: read it, make its keys, pack them."""

    source: ChunkedKeyFile
    maker: Maker
    packer: Packer
    actor: str
    tenant: str

    def pack(self, chunk: Chunk) -> Pack:
        """Read the chunk and pack its keys."""
        context = Context(self.tenant, self.actor, {}, next_id())
        return self.packer.pack_alike(self.maker.alike(self.source.rows(chunk), context))


class Portion:
    """The packs of one transaction, up to `room` rows. After iteration, `chunks` and `keys` count what it took."""

    def __init__(self, packs: AsyncIterator[tuple[Chunk, Pack]], room: int) -> None:
        self._packs = packs
        self._room = room
        self.chunks: list[Chunk] = []
        self.keys = 0

    async def __aiter__(self) -> AsyncIterator[Pack]:
        while self._room > 0:
            try:
                chunk, pack = await anext(self._packs)
            except StopAsyncIteration:
                return
            self.chunks.append(chunk)
            self.keys += pack.records
            self._room -= chunk.count
            yield pack


class Workers:
    """Worker processes that pack chunks. With a count of 0, this process packs them. `async with`, then `packs`."""

    def __init__(self, task: Task, count: int) -> None:
        self._task = task
        self._count = count
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: deque[tuple[Chunk, asyncio.Future[Pack]]] = deque()

    async def packs(self, chunks: Iterable[Chunk]) -> AsyncIterator[tuple[Chunk, Pack]]:
        """Each chunk with its pack, in the order of the chunks. Unavailable if a worker process ends."""
        if self._pool is None:
            for chunk in chunks:
                yield chunk, self._task.pack(chunk)
            return
        try:
            async for packed in self._packs_of_workers(self._pool, chunks):
                yield packed
        except BrokenExecutor:
            raise Unavailable("a worker process ended: run the import again; imported keys stay") from None

    async def _packs_of_workers(
        self, pool: ProcessPoolExecutor, chunks: Iterable[Chunk]
    ) -> AsyncIterator[tuple[Chunk, Pack]]:
        loop, waiting, remaining = asyncio.get_running_loop(), self._waiting, iter(chunks)
        while True:
            while len(waiting) < AHEAD * self._count and (following := next(remaining, None)) is not None:
                waiting.append((following, loop.run_in_executor(pool, _pack, following)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            yield chunk, await future

    async def __aenter__(self) -> Self:
        if self._count:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, context, _begin, (self._task,))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pool is not None:
            await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
            await asyncio.gather(
                *(future for _, future in self._waiting), return_exceptions=True
            )  # their results are not needed


# --- In a worker process --------------------------------------------------------------------------------------

_tasks: list[Task] = []
"""The task of this worker process. It is sent once, not with each chunk."""


def _begin(task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tasks.append(task)
    gc.freeze()  # chunks have many objects and few cycles: collecting between chunks is enough
    gc.disable()


def _end_with_parent() -> None:
    """Exit when the parent is gone: a killed parent cannot end its workers, which would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pack(chunk: Chunk) -> Pack:
    gc.collect()
    return _tasks[0].pack(chunk)
