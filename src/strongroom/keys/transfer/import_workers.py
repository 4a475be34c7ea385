"""Key files read by processes of their own, which make each piece ready for the store while it writes another.

Reading, checking, hashing and encoding a key costs as much as writing it. A worker is told which piece of the file to
do next by a pipe, and answers with what is to be stored; it ends when the pipe is closed, so also when this process is
killed.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import multiprocessing.connection
import signal
from collections import deque
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from ...context import Context, next_id
from ...errors import Unavailable
from ...storage.port import Pack, Packer
from .key_file_chunks import KeyPieces, Piece
from .key_file_rows import Maker

AHEAD = 2
"""Pieces that each worker is given before the first is taken from it."""
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker does with every piece: read it, make its keys, pack them."""

    source: KeyPieces
    maker: Maker
    packer: Packer
    actor: str
    tenant: str

    def pack(self, piece: Piece) -> Pack:
        """The piece's keys, made ready."""
        context = Context(self.tenant, self.actor, {}, next_id())
        return self.packer.pack_alike(self.maker.alike(self.source.rows(piece), context))


class Portion:
    """The next packs, as many as come to `room` rows: one transaction. Afterwards it says which pieces these were, and
    how many keys."""

    def __init__(self, packs: AsyncIterator[tuple[Piece, Pack]], room: int) -> None:
        self._packs = packs
        self._room = room
        self.pieces: list[Piece] = []
        self.keys = 0

    async def __aiter__(self) -> AsyncIterator[Pack]:
        while self._room > 0:
            try:
                piece, pack = await anext(self._packs)
            except StopAsyncIteration:
                return
            self.pieces.append(piece)
            self.keys += pack.records
            self._room -= piece.count
            yield pack


class Workers:
    """Some worker processes (none: the work is done here). `async with`, then `packs`."""

    def __init__(self, task: Task, count: int) -> None:
        self._task = task
        self._count = count
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection[Any, Any]] = []
        self._threads: list[ThreadPoolExecutor] = []
        self._waiting: deque[tuple[Piece, asyncio.Future[Pack]]] = deque()

    async def packs(self, pieces: Iterable[Piece]) -> AsyncIterator[tuple[Piece, Pack]]:
        """Each piece with what is to be stored of it, in turn."""
        if not self._count:
            for piece in pieces:
                yield piece, self._task.pack(piece)
            return
        loop = asyncio.get_running_loop()
        waiting = self._waiting
        remaining, turn = iter(pieces), 0
        while True:
            while len(waiting) < AHEAD * self._count and (following := next(remaining, None)) is not None:
                worker = turn % self._count
                self._pipes[worker].send(following)
                waiting.append((following, loop.run_in_executor(self._threads[worker], self._receive, worker)))
                turn += 1
            if not waiting:
                return
            piece, future = waiting.popleft()
            yield piece, await future

    def _receive(self, worker: int) -> Pack:
        try:
            answer = self._pipes[worker].recv()
        except (EOFError, OSError):
            raise Unavailable("a process that reads the file ended: begin again, what is imported stays") from None
        if isinstance(answer, Exception):
            raise answer
        return cast(Pack, answer)

    async def __aenter__(self) -> Self:
        processes = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=_work, args=(theirs, self._task), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            self._threads.append(ThreadPoolExecutor(1, "strongroom-import"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            await asyncio.to_thread(process.join, STOP_TIMEOUT_S)
        for pipe in self._pipes:
            pipe.close()
        for threads in self._threads:
            threads.shutdown()
        await asyncio.gather(*(future for _, future in self._waiting), return_exceptions=True)  # nobody wants them now


def _work(pipe: multiprocessing.connection.Connection[Any, Any], task: Task) -> None:
    """The worker: a piece in, a pack out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the import stops in order
    gc.freeze()  # a piece is many small objects and hardly a cycle: looking for some between two pieces is enough
    gc.disable()
    with suppress(EOFError, OSError):
        while True:
            gc.collect()
            piece = pipe.recv()
            try:
                answer: Pack | Exception = task.pack(piece)
            except Exception as error:
                answer = error
            pipe.send(answer)
            del answer
