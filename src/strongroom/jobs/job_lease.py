"""Job leases with fencing: of all nodes one at a time runs a background job, each time the job is due.

A job lease is one document: its holder, its expiry by the store's clock, and a fencing token that grows with each new
holder. Nodes acquire, renew and release it by conditional commits, so of two nodes that acquire it at once one
succeeds. The expiry alone does not stop a holder that was paused past it and then writes. So each batch of the job
carries a check of the lease document's version, and the store refuses the batch once another node acquired the lease.

The document also stores when the job finished last, and its position: the next holder continues from there.

(A *limit lease* is something else: a node's share of a usage limit.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from ..clock import Clock
from ..context import new_id, system_context, us_from_utc, utc_from_us
from ..database import Database
from ..entities import Entity
from ..errors import AlreadyExists, Conflict, StrongroomError
from ..storage.port import Check, Put

NAME = "leases"
LEASE_S = 15.0
"""How long a lease lasts unless it is renewed. After a crash another node takes over after this time."""
FIRST_LOOK_S = 5.0
"""A node looks for due jobs this long after its start: a process that ends before runs none."""
RETRY_S = 5.0
"""The wait before the next try after a job failed, or the store did not answer."""
RELEASE_TIMEOUT_S = 1.0
_SECOND = 1_000_000
_log = logging.getLogger(__name__)


class JobLease(Entity, collection=NAME, scope="global", journalled=False):
    """The right to run one background job; the id is the job's name. `holder` is empty while no node has the lease."""

    holder: str = ""
    token: int = 0
    expires_at: datetime | None = None
    done_at: datetime | None = None
    position: str | None = None


class JobLeaseLost(StrongroomError):
    """Another node acquired the lease: this node was too slow, and must not write under it any more."""

    code = "unavailable"


@dataclass(slots=True)
class JobState:
    """What this node knows of a job: the lease's holder at its last look, and when the job finished last."""

    holder: str = ""
    token: int = 0
    done_us: int | None = None
    error: str | None = None
    """The error of the last run on this node; None if that run succeeded."""


class AcquiredLease:
    """A job lease that this node has acquired, and the job's position. A job puts `guard` into each of its batches,
    and calls `save` at least every few seconds."""

    def __init__(self, leases: JobLeases, name: str, lease: JobLease, version: int) -> None:
        self._leases = leases
        self._lease = lease
        self._version = version
        self.name = name

    @property
    def token(self) -> int:
        """The fencing token: greater than the token of every earlier holder."""
        return self._lease.token

    @property
    def position(self) -> str | None:
        """The position that this or an earlier holder saved last; None: start from the beginning."""
        return self._lease.position

    @property
    def guard(self) -> Check:
        """A check that fails its batch with Conflict once another node acquired the lease. It changes with `save`."""
        return Check(NAME, self.name, self._version)

    async def save(self, position: str | None) -> None:
        """Store the position, and renew the lease. Raises JobLeaseLost."""
        await self._write(position=position, expires_at=self._leases.end())

    async def release(self, *, done: bool) -> None:
        """Release the lease. `done`: the job is next due after its period; else it is due now. Raises JobLeaseLost."""
        fields = {"done_at": utc_from_us(self._leases.now_us())} if done else {}
        await self._write(holder="", expires_at=None, **fields)

    async def _write(self, **fields: object) -> None:
        lease = self._lease.model_copy(update=fields)
        self._version = await self._leases.put(self.name, lease, self._version)
        self._lease = lease


class JobLeases:
    """The job leases of one store, as one node acquires them. `holder` names the node, for operators."""

    def __init__(
        self, database: Database, clock: Clock, *, holder: str | None = None, lease_s: float = LEASE_S
    ) -> None:
        self._database = database
        self._clock = clock
        # After a restart the name of the machine and the process id may be the same: the random part is not.
        self.holder = holder if holder is not None else f"{socket.gethostname()[:64]}:{os.getpid()}:{new_id()[-8:]}"
        self._lease_us = round(lease_s * _SECOND)
        self.jobs: dict[str, JobState] = {}

    def now_us(self) -> int:
        return self._clock.now_us()

    def end(self) -> datetime:
        """The expiry of a lease that is acquired or renewed now."""
        return utc_from_us(self._clock.now_us() + self._lease_us)

    async def put(self, name: str, lease: JobLease, expected: int) -> int:
        """Write a lease if it still has the expected version; returns the new version. Raises JobLeaseLost."""
        document = JobLease.__codec__.encode(lease)
        try:
            committed = await self._database.commit_counters([Put(NAME, name, document, expected)], self.now_us())
        except (Conflict, AlreadyExists):
            raise JobLeaseLost(f"another node acquired the lease of the job {name!r}") from None
        return committed.versions[0]

    async def acquire(self, name: str) -> AcquiredLease | None:
        """Acquire a lease that is free or has expired; None if another node has it, or was faster."""
        return await self._acquire(name, await self._read(name))

    async def _acquire(self, name: str, found: JobLease | None) -> AcquiredLease | None:
        lease = found if found is not None else JobLease(id=name)
        # A lease with this node's own name comes from a commit whose answer was lost: no job runs under it.
        if self._ends_us(lease) > self.now_us() and lease.holder != self.holder:
            return None
        acquired = lease.model_copy(
            update={"holder": self.holder, "token": lease.token + 1, "expires_at": self.end()},
        )
        try:
            version = await self.put(name, acquired, lease.version or 0)
        except JobLeaseLost:
            return None
        return AcquiredLease(self, name, acquired, version)

    async def _read(self, name: str) -> JobLease | None:
        return await self._database.get_or_none(system_context(), JobLease, name)

    @staticmethod
    def _ends_us(lease: JobLease) -> int:
        return us_from_utc(lease.expires_at) if lease.holder and lease.expires_at is not None else 0

    # --- Periodic jobs ----------------------------------------------------------------------------------------

    async def run_once(self, name: str, every_s: float, job: Callable[[AcquiredLease], Awaitable[None]]) -> float:
        """Run the job if it is due and no other node runs it; returns in how many seconds to look again.

        A job is due when no node has finished it for `every_s`. A job that raises is due again at once, on any node.
        """
        state = self.jobs.setdefault(name, JobState())
        lease = await self._read(name)
        now_us = self.now_us()
        if lease is not None:
            state.holder, state.token = lease.holder, lease.token
            state.done_us = us_from_utc(lease.done_at) if lease.done_at is not None else None
            if state.done_us is not None and (due_us := state.done_us + round(every_s * _SECOND)) > now_us:
                return min(every_s, (due_us - now_us) / _SECOND)
            if lease.holder != self.holder and (ends_us := self._ends_us(lease)) > now_us:
                return (ends_us - now_us) / _SECOND
        acquired = await self._acquire(name, lease)
        if acquired is None:
            return 0.0
        state.holder, state.token = self.holder, acquired.token
        try:
            await job(acquired)
        except BaseException:
            await self._release_undone(acquired)
            raise
        await acquired.release(done=True)
        state.holder, state.done_us, state.error = "", self.now_us(), None
        return every_s

    async def _release_undone(self, acquired: AcquiredLease) -> None:
        """Release the lease of a job that did not finish. If the store does not answer, the lease expires."""
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await acquired.release(done=False)
        except (StrongroomError, TimeoutError) as error:
            _log.info("the lease of the job %r could not be released and will expire: %s", acquired.name, error)

    async def repeat(self, name: str, every_s: float, job: Callable[[AcquiredLease], Awaitable[None]]) -> None:
        """Run the job whenever it is due, for ever. A failure is logged, and the job is tried again."""
        wait_s = FIRST_LOOK_S
        while True:
            # Jitter: nodes that wait for the same moment would all try at once.
            await asyncio.sleep(wait_s + random.uniform(0.0, min(1.0, every_s / 10)))  # noqa: S311
            try:
                wait_s = await self.run_once(name, every_s, job)
            except Exception as error:
                # Any error: a job that stopped for a bug would be missed silently from then on.
                self.jobs.setdefault(name, JobState()).error = f"{type(error).__name__}: {error}"
                if isinstance(error, StrongroomError):
                    _log.warning("%s failed, trying again: %s", name, error)
                else:
                    _log.exception("%s failed, trying again", name)
                wait_s = min(RETRY_S, every_s)


__all__ = ["AcquiredLease", "JobLease", "JobLeaseLost", "JobLeases"]
