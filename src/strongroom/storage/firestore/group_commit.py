"""Group commit on Firestore: batches that touch different documents commit side by side; those that wait share a call.

The shared `storage.group_commit` writes one group at a time. A call to Firestore takes tens of milliseconds, so here up
to MAX_IN_FLIGHT groups are under way, of different tenants and parts of the journal. A batch fails by itself.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import StrongroomError, TooLarge, Unavailable
from ..port import (
    MAX_BATCH_BYTES,
    MAX_OPERATIONS,
    Add,
    Append,
    Batch,
    Check,
    Committed,
    Create,
    Patch,
    Put,
    check_operations,
    document_size,
)
from .client import Wire
from .commit import Group, Job, Mode, Seen, fail
from .journal import Journal, shard_of
from .paths import HEADS, Paths, last_of
from .places import Plan, Raw
from .values import micros

COMMIT_TIMEOUT_S = 30.0
"""How long a batch is tried while others write the same documents, or while Firestore does not answer."""
MAX_IN_FLIGHT = 8
MAX_GROUP = 100
"""Batches in one commit. So many additions to one document may share it; each has a version of its own."""


class Writer:
    """Takes batches in order, and answers each."""

    def __init__(self, wire: Wire, paths: Paths, journal: Journal) -> None:
        self.wire = wire
        self.paths = paths
        self.journal = journal
        self.plans: Mapping[str, Plan] = {}
        self.seen = Seen()
        self.heads: dict[str, Raw] = {}
        self.tenants: set[str] = set()
        self._jobs: deque[Job] = deque()
        self._busy: set[object] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._identity = secrets.token_hex(8)
        self._commits = 0
        self.timeout_s = COMMIT_TIMEOUT_S
        self.counts = {"commits": 0, "conflicts": 0, "batches": 0}

    # --- Taking turns ---

    def commit(self, batch: Batch) -> asyncio.Future[Committed]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Committed] = loop.create_future()
        lanes: set[object] = {("tenant", batch.tenant)}
        documents: dict[object, Mode] = {}
        for operation in batch.operations:
            if isinstance(operation, Append):
                lanes.add(("shard", shard_of(operation.record.tenant)))
                continue
            plan = self.plans.get(operation.collection)
            scope = batch.tenant if plan is None or plan.collection.tenant_scoped else None
            key = (operation.collection, scope, operation.id)
            mode: Mode = "write"
            if isinstance(operation, Add | Check):
                mode = "add" if isinstance(operation, Add) else "read"
            documents[key] = mode if documents.get(key, mode) == mode else "write"
        try:
            size = _size(batch)
        except TooLarge as error:
            future.set_exception(error)
            return future
        self._jobs.append(Job(batch, future, frozenset(lanes), documents, size))
        self._schedule()
        return future

    async def drain(self) -> None:
        """Wait until no batch waits or commits."""
        while self._jobs or self._tasks:
            if self._tasks:
                await asyncio.wait(self._tasks)
            else:
                await asyncio.sleep(0)

    def _schedule(self) -> None:
        if not self._scheduled:
            # Not at once: all batches of one turn of the loop share a commit.
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        self._scheduled = False
        if len(self._tasks) >= MAX_IN_FLIGHT or not self._jobs:
            return
        group = self._next_group()
        if not group:
            return
        busy = {key for job in group for key in (*job.lanes, *job.documents)}
        self._busy |= busy
        if self._jobs:
            self._schedule()
        task = asyncio.get_running_loop().create_task(self._run(group, busy))
        task.add_done_callback(lambda _: self._never_began(group, busy))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _never_began(self, group: list[Job], busy: set[object]) -> None:
        """Answer the jobs of a task that was cancelled before its first step."""
        if any(not job.future.done() for job in group):
            self._busy -= busy
            fail(group, Unavailable("the commit ended before it began: try again"))
            self._schedule()

    def _next_group(self) -> list[Job]:
        """The waiting batches that can commit together now, in order; each tenant's keep theirs."""
        group: list[Job] = []
        later: deque[Job] = deque()
        blocked: set[object] = set()
        documents: dict[object, Mode] = {}
        operations = size = 0
        while self._jobs and len(group) < MAX_GROUP and len(later) < MAX_GROUP * 10:
            job = self._jobs.popleft()
            fits = operations + len(job.batch.operations) <= MAX_OPERATIONS and size + job.size <= MAX_BATCH_BYTES
            stopped = not (job.lanes.isdisjoint(self._busy) and job.lanes.isdisjoint(blocked))
            clash = any(
                key in self._busy
                or key in blocked
                or (key in documents and (documents[key] != mode or mode == "write"))
                for key, mode in job.documents.items()
            )
            if (group and not fits) or stopped or clash:
                blocked.update(job.lanes, job.documents)
                later.append(job)
                continue
            group.append(job)
            documents.update(job.documents)
            operations, size = operations + len(job.batch.operations), size + job.size
        later.extend(self._jobs)
        self._jobs = later
        return group

    async def _run(self, group: list[Job], busy: set[object]) -> None:
        try:
            await Group(self, group).commit()
        except Exception as error:
            ended = Unavailable(f"the commit ended: {error!r}", outcome="unknown")
            fail(group, error if isinstance(error, StrongroomError) else ended)
            if not isinstance(error, StrongroomError):
                raise
        except BaseException:
            fail(
                group, Unavailable("the commit was interrupted: whether it was applied is not known", outcome="unknown")
            )
            raise
        finally:
            self._busy -= busy
            self._schedule()

    # --- For groups ---

    def next_commit(self) -> str:
        self._commits += 1
        return f"{self._identity}-{self._commits:x}"

    def lookup(self, path: str) -> Raw | None:
        return self.heads.get(path) or self.seen.get(path)

    async def read(self, paths: Sequence[str] | set[str]) -> dict[str, Raw]:
        found, _ = await self.wire.batch_get(list(paths))
        return {path: self.keep(path, document) for path, document in found.items()}

    def keep(self, path: str, document: Any | None) -> Raw:
        if f"/{HEADS}/" not in path:
            return self.seen.keep(path, document)
        raw = Raw(0) if document is None else Raw(micros(document.update_time), document)
        self.heads[path] = raw
        if document is not None:
            self.journal.saw_head(int(last_of(path)), document)
        return raw


def _size(batch: Batch) -> int:
    """The bytes of a batch, as the port counts them. TooLarge past its limits."""
    check_operations(batch)
    size = 0
    for operation in batch.operations:
        if isinstance(operation, Create | Put):
            size += document_size(operation.document)
        elif isinstance(operation, Patch):
            size += document_size(operation.fields)
        elif isinstance(operation, Append):
            record = operation.record
            size += sum(document_size(part) for part in (record.before, record.after) if part)
    if size > MAX_BATCH_BYTES:
        raise TooLarge(f"found {size} bytes in a batch, expected at most {MAX_BATCH_BYTES}")
    return size
