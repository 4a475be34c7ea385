"""The worker processes of an import: packs come in order, a worker that ends is reported, and none stays behind."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from typing import Any

import pytest

from strongroom.errors import Unavailable
from strongroom.keys.transfer.import_workers import Workers
from strongroom.keys.transfer.key_file_chunks import Chunk
from strongroom.storage.port import Pack
from tests.helpers.paths import ROOT
from tests.helpers.waiting import PATIENCE_S

CHUNKS = [Chunk(number, number + 1, number, 1) for number in range(20)]


class Numbering:
    """A task that tells which process packed a chunk. It ends its process at the chunk `last`."""

    def __init__(self, last: int = -1) -> None:
        self.last = last

    def pack(self, chunk: Chunk) -> Pack:
        if chunk.first == self.last:
            os._exit(1)
        if chunk.first == 100:
            raise ValueError("not a chunk")
        return Pack(1, 1, [chunk.first, os.getpid()])


async def packed(task: Any, count: int, chunks: list[Chunk]) -> list[tuple[int, int]]:
    async with Workers(task, count) as workers:
        return [pack.parts[:2] async for _, pack in workers.packs(chunks)]  # type: ignore[misc]


@pytest.mark.parametrize("count", [0, 2])
async def test_packs_come_in_the_order_of_their_chunks(count: int) -> None:
    found = await packed(Numbering(), count, CHUNKS)
    assert [first for first, _ in found] == [chunk.first for chunk in CHUNKS]
    assert (os.getpid() in {process for _, process in found}) == (count == 0)
    assert multiprocessing.active_children() == []


async def test_a_worker_process_that_ends_is_reported_and_none_stays_behind() -> None:
    with pytest.raises(Unavailable, match="a worker process ended: run the import again"):
        await packed(Numbering(last=7), 2, CHUNKS)
    assert multiprocessing.active_children() == []


async def test_an_error_in_a_worker_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="not a chunk"):
        await packed(Numbering(), 1, [*CHUNKS[:3], Chunk(100, 101, 100, 1)])


KILLED = """
import asyncio, os, signal
from tests.keys.transfer.test_import_workers import CHUNKS, Numbering, Workers

async def main():
    async with Workers(Numbering(), 1) as workers:
        async for _, pack in workers.packs(CHUNKS):
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_the_workers_of_a_killed_import_end_with_it() -> None:
    """A worker holds the standard output open, so reading to its end waits for the worker, too."""
    command = [sys.executable, "-c", KILLED]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=PATIENCE_S, check=False)
    assert ran.returncode == -9
