"""A lane of commits on PostgreSQL: batches that arrive while a group is written are committed together as the next."""

from __future__ import annotations

from collections import deque

from ..group_commit import GroupCommit, Waiting
from ..port import Batch, Committed
from .commits import Commits

MAX_GROUP = 512
"""Batches in one transaction."""
MAX_GROUP_OPERATIONS = 2_000

_Batch = Waiting[Batch, Committed]


class Lane:
    """Commits batches on one connection, one group at a time. `writing` is held while a group is written; hold it to
    keep writes away."""

    def __init__(self, place: str, commits: Commits) -> None:
        self.commits = commits
        self._as_sets = True
        self._group_commit: GroupCommit[Batch, Committed] = GroupCommit(
            place,
            self._next_group,
            self._write_group,
            lambda error: f"{place}: writing ended with {type(error).__name__}: try again",
        )
        self.writing = self._group_commit.writing
        self.submit = self._group_commit.submit

    @property
    def queued(self) -> int:
        """The batches that wait for the next group."""
        return self._group_commit.queued

    async def close(self) -> None:
        """Write the queued batches, then close the connection."""
        await self._group_commit.drain()
        async with self.writing:
            await self.commits.close()

    def _next_group(self, queue: deque[_Batch]) -> list[_Batch]:
        """The batches that can be written as sets together. A batch that touches a document of the group stays in the
        queue, and so do later batches of its tenant: a tenant's batches keep their order."""
        footprint = self.commits.footprint()
        group: list[_Batch] = []
        left: list[_Batch] = []
        held: set[str | None] = set()
        operations = 0
        self._as_sets = True
        while queue and len(group) < MAX_GROUP and operations < MAX_GROUP_OPERATIONS and len(left) < MAX_GROUP:
            waiting = queue.popleft()
            tenant = waiting.request.tenant
            if tenant in held:
                left.append(waiting)
            elif footprint.admits(waiting.request):
                group.append(waiting)
                operations += len(waiting.request.operations)
            elif not group:
                # It touches one document twice: it is written alone, one operation after the other.
                group.append(waiting)
                self._as_sets = False
                break
            else:
                held.add(tenant)
                left.append(waiting)
        queue.extendleft(reversed(left))
        return group

    async def _write_group(self, group: list[_Batch]) -> list[_Batch]:
        answers = await self.commits.write([waiting.request for waiting in group], as_sets=self._as_sets)
        for waiting, answer in zip(group, answers, strict=True):
            waiting.answer(answer)
        return []
