"""Group commit: batches wait in a lane while its last group is being written, and then go together."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

from ...errors import Unavailable
from ..port import Batch, Committed
from .commits import Answer, Commits

MAX_GROUP = 512
"""Batches in one transaction."""
MAX_GROUP_OPERATIONS = 2_000


class _Job(NamedTuple):
    batch: Batch
    future: asyncio.Future[Committed]


class Lane:
    """Batches in the order they came. `writing` is held while a group is written, and by who must keep it from that."""

    def __init__(self, place: str, commits: Commits) -> None:
        self.commits = commits
        self.writing = asyncio.Lock()
        self._place = place
        self._jobs: deque[_Job] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def submit(self, batch: Batch) -> asyncio.Future[Committed]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Committed] = loop.create_future()
        self._jobs.append(_Job(batch, future))
        if self._task is None:
            # It starts in the loop's next turn, so that all that arrives in this one goes together.
            self._task = loop.create_task(self._write_all())
            self._task.add_done_callback(self._never_began)
        return future

    def _never_began(self, task: asyncio.Task[None]) -> None:
        """A task that was cancelled before its first step leaves its jobs to nobody."""
        if self._task is task:
            self._task, jobs, self._jobs = None, self._jobs, deque()
            for job in jobs:
                _answer(job, Unavailable(f"{self._place}: writing ended before it began: try again"))

    async def close(self) -> None:
        """Write what waits, then let go of the connection."""
        if self._task is not None:
            await asyncio.wait([self._task])
        async with self.writing:
            await self.commits.close()

    async def _write_all(self) -> None:
        group: list[_Job] = []
        try:
            while self._jobs:
                async with self.writing:
                    group, as_sets = self._next_group()
                    answers = await self.commits.write([job.batch for job in group], as_sets=as_sets)
                for job, answer in zip(group, answers, strict=True):
                    _answer(job, answer)
                group = []
                await asyncio.sleep(0)  # who was answered may have more to write, which then joins the next group
        except BaseException as error:  # nobody may wait for ever, whatever went wrong
            jobs, self._jobs = self._jobs, deque()
            ended = f"{self._place}: writing ended with {type(error).__name__}: try again"
            for job in group:  # it may have been at its commit
                _answer(job, Unavailable(ended, outcome="unknown"))
            for job in jobs:
                _answer(job, Unavailable(ended))
            raise
        finally:
            self._task = None

    def _next_group(self) -> tuple[list[_Job], bool]:
        """What goes next, and whether as sets. A batch that touches what the group touches already waits for the next
        one, and so do those of its tenant behind it: they keep their order."""
        footprint = self.commits.footprint()
        group: list[_Job] = []
        left: list[_Job] = []
        held: set[str | None] = set()
        operations = 0
        while self._jobs and len(group) < MAX_GROUP and operations < MAX_GROUP_OPERATIONS and len(left) < MAX_GROUP:
            job = self._jobs.popleft()
            tenant = job.batch.tenant
            if tenant in held:
                left.append(job)
            elif footprint.admits(job.batch):
                group.append(job)
                operations += len(job.batch.operations)
            elif not group:
                # Nothing is in its way but itself.
                self._jobs.extendleft(reversed(left))
                return [job], False
            else:
                held.add(tenant)
                left.append(job)
        self._jobs.extendleft(reversed(left))
        return group, True


def _answer(job: _Job, answer: Answer) -> None:
    if job.future.done():  # its caller was cancelled
        return
    if isinstance(answer, Exception):
        job.future.set_exception(answer)
    else:
        job.future.set_result(answer)
