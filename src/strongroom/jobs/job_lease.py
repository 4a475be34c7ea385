"""Leases with fencing: background work that one node at a time does, each time it is due, however many there are.

A lease is one document: who holds it, until when by the store's clock, and a fencing token that grows each time it
changes hands. It is taken, renewed and given back by conditional commits, so of two that take it one does. A lease
alone cannot keep a holder that was paused past its end from writing when it wakes up; so each batch of the work
carries a check of the lease document's version, and the store refuses it once the lease has changed hands.

The document also says when the work was done last and how far it has come: whoever is next goes on from there.
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
"""How long a lease lasts unless it is renewed: so much later another node takes over from one that died."""
FIRST_LOOK_S = 5.0
"""A node that has just started looks for work after this long: a process that lives shorter takes none up."""
RETRY_S = 5.0
"""Work that failed, or a store that cannot be asked, is tried again after this long."""
GIVE_BACK_TIMEOUT_S = 1.0
_SECOND = 1_000_000
_log = logging.getLogger(__name__)


class Lease(Entity, collection=NAME, scope="global", journalled=False):
    """The right to do one piece of background work; the id is its name. `holder` is empty while nobody has it."""

    holder: str = ""
    token: int = 0
    expires_at: datetime | None = None
    done_at: datetime | None = None
    position: str | None = None


class LeaseLost(StrongroomError):
    """The lease was taken over by another node: this one was too slow, and may write nothing more under it."""

    code = "unavailable"


@dataclass(slots=True)
class JobState:
    """What this node knows of a piece of work: who had the lease when it looked last, and when it was done last."""

    holder: str = ""
    token: int = 0
    done_us: int | None = None
    error: str | None = None
    """Why it failed here at the last attempt; None if it did not."""


class Turn:
    """A lease that is held, and the work's position. Handed to the work, which must put `guard` into each batch, and
    `save` at least each few seconds."""

    def __init__(self, leases: Leases, name: str, lease: Lease, version: int) -> None:
        self._leases = leases
        self._lease = lease
        self._version = version
        self.name = name

    @property
    def token(self) -> int:
        """The fencing token: greater than that of every holder before."""
        return self._lease.token

    @property
    def position(self) -> str | None:
        """How far the work has come, as it was saved last, by this holder or one before; None: from the beginning."""
        return self._lease.position

    @property
    def guard(self) -> Check:
        """Fails with Conflict, and its batch with it, once the lease has changed hands. It changes with `save`."""
        return Check(NAME, self.name, self._version)

    async def save(self, position: str | None) -> None:
        """Keep the position and the lease. Raises LeaseLost."""
        await self._write(position=position, expires_at=self._leases.end())

    async def give_back(self, *, done: bool) -> None:
        """Let the next one have it. `done`: the work is not due again before its period is over. Raises LeaseLost."""
        fields = {"done_at": utc_from_us(self._leases.now_us())} if done else {}
        await self._write(holder="", expires_at=None, **fields)

    async def _write(self, **fields: object) -> None:
        lease = self._lease.model_copy(update=fields)
        self._version = await self._leases.put(self.name, lease, self._version)
        self._lease = lease


class Leases:
    """The leases of one store, as one node takes them. `holder` names the node for people."""

    def __init__(
        self, database: Database, clock: Clock, *, holder: str | None = None, lease_s: float = LEASE_S
    ) -> None:
        self._database = database
        self._clock = clock
        # The name of a machine and a process may come again, after a restart: the random part does not.
        self.holder = holder if holder is not None else f"{socket.gethostname()[:64]}:{os.getpid()}:{new_id()[-8:]}"
        self._lease_us = round(lease_s * _SECOND)
        self.jobs: dict[str, JobState] = {}

    def now_us(self) -> int:
        return self._clock.now_us()

    def end(self) -> datetime:
        """When a lease ends that is taken or renewed now."""
        return utc_from_us(self._clock.now_us() + self._lease_us)

    async def put(self, name: str, lease: Lease, expected: int) -> int:
        """Write a lease under the version it had; returns the new one. Raises LeaseLost if it was changed."""
        document = Lease.__codec__.encode(lease)
        try:
            committed = await self._database.commit_counters([Put(NAME, name, document, expected)], self.now_us())
        except (Conflict, AlreadyExists):
            raise LeaseLost(f"the lease of {name!r} was taken over by another node") from None
        return committed.versions[0]

    async def acquire(self, name: str) -> Turn | None:
        """Take a lease that nobody holds, or whose time is over; None if someone does, or was faster."""
        return await self._take(name, await self._read(name))

    async def _take(self, name: str, found: Lease | None) -> Turn | None:
        lease = found if found is not None else Lease(id=name)
        # One that bears this node's own name is of a commit whose answer was lost: there is nobody behind it.
        if self._ends_us(lease) > self.now_us() and lease.holder != self.holder:
            return None
        taken = lease.model_copy(
            update={"holder": self.holder, "token": lease.token + 1, "expires_at": self.end()},
        )
        try:
            version = await self.put(name, taken, lease.version or 0)
        except LeaseLost:
            return None
        return Turn(self, name, taken, version)

    async def _read(self, name: str) -> Lease | None:
        return await self._database.get_or_none(system_context(), Lease, name)

    @staticmethod
    def _ends_us(lease: Lease) -> int:
        return us_from_utc(lease.expires_at) if lease.holder and lease.expires_at is not None else 0

    # --- Work that comes again --------------------------------------------------------------------------------

    async def run_once(self, name: str, every_s: float, work: Callable[[Turn], Awaitable[None]]) -> float:
        """Do the work if it is due and nobody else does it; returns in how many seconds to look again.

        Due is what was not done, by any node, for `every_s`. Work that raises is due again at once, for whoever comes.
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
        turn = await self._take(name, lease)
        if turn is None:
            return 0.0
        state.holder, state.token = self.holder, turn.token
        try:
            await work(turn)
        except BaseException:
            await self._abandon(turn)
            raise
        await turn.give_back(done=True)
        state.holder, state.done_us, state.error = "", self.now_us(), None
        return every_s

    async def _abandon(self, turn: Turn) -> None:
        """Give the lease back undone; if that is not possible it ends by itself."""
        try:
            async with asyncio.timeout(GIVE_BACK_TIMEOUT_S):
                await turn.give_back(done=False)
        except (StrongroomError, TimeoutError) as error:
            _log.info("the lease of %r could not be given back, it ends by itself: %s", turn.name, error)

    async def repeat(self, name: str, every_s: float, work: Callable[[Turn], Awaitable[None]]) -> None:
        """Do the work whenever it is due, without end; what goes wrong is logged, and tried again."""
        wait_s = FIRST_LOOK_S
        while True:
            # The jitter keeps nodes that wait for the same moment from all trying at it.
            await asyncio.sleep(wait_s + random.uniform(0.0, min(1.0, every_s / 10)))  # noqa: S311
            try:
                wait_s = await self.run_once(name, every_s, work)
            except Exception as error:
                # Whatever it is: work that is given up for a bug would be missed silently from then on.
                self.jobs.setdefault(name, JobState()).error = f"{type(error).__name__}: {error}"
                if isinstance(error, StrongroomError):
                    _log.warning("%s failed, trying again: %s", name, error)
                else:
                    _log.exception("%s failed, trying again", name)
                wait_s = min(RETRY_S, every_s)


__all__ = ["Lease", "LeaseLost", "Leases", "Turn"]
