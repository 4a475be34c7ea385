"""The job that seals the journal: of all nodes one at a time, woken by commits, at most every EVERY_S.

The node that has the lease keeps it while there are records to seal, and lets it expire when there are none: a store
that nobody writes to is not written to by this job either. The other nodes look again when the lease expires.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress

from ..errors import Conflict, StrongroomError, Unavailable
from ..journal.sealer import Sealed, Sealer
from ..retry_log import RetryLog
from ..storage.port import Record
from .job_lease import AcquiredLease, JobLeaseLost, JobLeases

SEALING = "journal-sealing"
LEASE_S = 3.0
EVERY_S = 0.5
"""A round begins so long after the one before, or (after a long one) later. A record is sealed within this and the time
of a round."""
LONGEST_S = 0.7
"""The interval and a round's time together, if the interval is longer than EVERY_S."""
ROUND_SHARE = 10
"""A round is to take at most one in so many parts of the time."""
GATHER_S = 0.05
"""The first round after a pause waits so long, because a commit seldom comes alone."""
REFUSED_S = 0.5
RETRY_S = 1.0
MAX_CONFLICTS = 3
"""Failures in a row that another node, or retention, may cause. More are reported."""
CLOSE_TIMEOUT_S = 2.0
NOW_TIMEOUT_S = 30.0
_log = logging.getLogger(__name__)


def interval_s(took_s: float) -> float:
    """The time from the begin of a round, which took `took_s`, to the begin of the next. A round costs something for
    each tree, however few records it adds: fewer rounds leave more of the processor to the writes."""
    return max(EVERY_S, min(ROUND_SHARE * took_s, LONGEST_S - took_s))


class Sealing:
    """Seals in the background. `start` it last; `close` it when nothing is written any more."""

    def __init__(self, sealer: Sealer, leases: JobLeases, refused: Callable[[], bool] = lambda: False) -> None:
        self.sealer = sealer
        self._leases = leases
        self._refused = refused
        """Whether the store takes no writes because it is moved elsewhere: then its journal must not change."""
        self._lease: AcquiredLease | None = None
        self._until = 0.0
        self._token = 0
        self._woken = asyncio.Event()
        self._woken_at = 0.0
        self._own = False
        """Whether this process has committed something since the last round."""
        self._one = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.error: str | None = None
        """Why the last round failed; None if it did not."""
        self.rounds = 0
        self.records = 0
        self.unsealed = 0
        """Records that wait for their round, as far as this node has seen them."""
        self.lag_s = 0.0
        """How old the oldest record of the last round was when it was sealed."""

    # --- Waking -----------------------------------------------------------------------------------------------

    def seen(self, record: Record) -> None:
        """A record of any process was committed."""
        self.unsealed += 1
        self._wake()

    def committed(self) -> None:
        """This process has committed something."""
        self._own = True
        self._wake()

    def reset(self) -> None:
        """Records may have been missed: an older copy of the store was put back."""
        self._token = 0
        self._wake()

    def _wake(self) -> None:
        if not self._woken.is_set():
            self._woken_at = time.monotonic()
            self._woken.set()

    def counts(self) -> dict[str, float]:
        """For metrics: what this node sealed."""
        return {"rounds": self.rounds, "records": self.records}

    @property
    def active(self) -> bool:
        """Whether this node seals, if no other node does."""
        return self._task is not None

    @property
    def behind_s(self) -> float:
        """For how long a record has been waiting for its round; 0 if none waits."""
        return time.monotonic() - self._woken_at if self._woken.is_set() else 0.0

    def start(self) -> None:
        """Begin: whatever is not sealed yet, from before this version too, is sealed now."""
        self._wake()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop, after a last round, of CLOSE_TIMEOUT_S at most, if this process has committed something that waits for
        one."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if self._own and self._woken.is_set() and not self._refused():
                    await self._catch_up()
                await self._release()
        except (StrongroomError, TimeoutError) as error:
            _log.info("the last records are sealed by the next process: %s", error or type(error).__name__)
        except Exception:  # any error: it must not keep the store from closing
            _log.exception("the last records are sealed by the next process, because of an unexpected error")

    # --- The loop ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        told = RetryLog(_log, "the journal cannot be sealed")
        began, took_s, conflicts = 0.0, 0.0, 0
        while True:
            await self._woken.wait()
            pause_s = max(GATHER_S, began + interval_s(took_s) - time.monotonic())
            await asyncio.sleep(pause_s)
            began, took_s = time.monotonic(), 0.0
            if self._refused():
                await self._last_round()
                await asyncio.sleep(REFUSED_S)
                continue
            try:
                wait_s = await self._step()
            except Exception as error:  # any error: a journal that is not sealed any more would not be noticed
                conflicts = conflicts + 1 if isinstance(error, Conflict | JobLeaseLost) else MAX_CONFLICTS
                if not isinstance(error, StrongroomError):  # its text may have anything, a secret too
                    self.error = type(error).__name__
                    _log.exception("the journal cannot be sealed, because of an unexpected error")
                elif conflicts >= MAX_CONFLICTS:
                    self.error = f"{type(error).__name__}: {error}"
                    told.failed(error)
                await asyncio.sleep(RETRY_S * random.uniform(0.5, 1))  # noqa: S311 - jitter
                continue
            took_s = time.monotonic() - began
            conflicts = 0
            told.succeeded()
            if wait_s:
                await asyncio.sleep(wait_s)

    async def _last_round(self) -> None:
        """Seal what was written before writes were turned off, as long as this node has the lease, which it cannot
        renew any more."""
        if self._lease is None or time.monotonic() >= self._until or not self._woken.is_set():
            return
        try:
            async with self._one:
                if (await self._round(self._lease)).more:
                    self._wake()
        except StrongroomError as error:
            _log.info("the last round of sealing is left to the next process: %s", error.message)

    async def _step(self) -> float:
        """One round, if this node has the lease or gets it. Returns for how long nothing is to be done."""
        async with self._one:
            if self._lease is None or time.monotonic() >= self._until:
                own, unsealed = self._idle()
                behind = True
                try:
                    behind = await self.sealer.behind()
                finally:
                    if behind:
                        self._again(own, unsealed)
                if not behind:
                    return 0.0
            lease = await self._acquire()
            if lease is None:  # another node seals; its lease ends unless it renews it
                return LEASE_S / 2 + random.uniform(0, LEASE_S / 4)  # noqa: S311 - jitter
            if (await self._round(lease)).more:
                self._wake()
        return 0.0

    def _idle(self) -> tuple[bool, int]:
        """Nothing waits, unless something is committed from now on. What waited until now is for `_again`."""
        waited = self._own, self.unsealed
        self._woken.clear()
        self._own, self.unsealed = False, 0
        return waited

    def _again(self, own: bool, unsealed: int) -> None:
        """What waited was not sealed."""
        self._own, self.unsealed = own or self._own, unsealed + self.unsealed
        self._wake()

    async def _round(self, lease: AcquiredLease) -> Sealed:
        waited = self._idle()
        try:
            sealed = await self.sealer.round(lease)
        except BaseException as error:
            if isinstance(error, Conflict | JobLeaseLost):
                self._lease = None
            self._again(*waited)
            raise
        self.error = None
        if sealed.records:
            self.rounds += 1
            self.records += sealed.records
            if sealed.oldest_us is not None:
                self.lag_s = max(0.0, (self._leases.now_us() - sealed.oldest_us) / 1_000_000)
        return sealed

    # --- The lease --------------------------------------------------------------------------------------------

    async def _acquire(self) -> AcquiredLease | None:
        """The lease, acquired or held; None if another node has it."""
        now = time.monotonic()
        if self._lease is not None and now < self._until - LEASE_S / 2:
            return self._lease
        if self._lease is not None and now < self._until:
            with suppress(JobLeaseLost):
                await self._lease.save(None)
                self._until = now + LEASE_S
                return self._lease
        self._lease = await self._leases.acquire(SEALING)
        if self._lease is None:
            return None
        if self._lease.token != self._token + 1:  # another node had it in between
            self.sealer.forget()
        self._token, self._until = self._lease.token, now + LEASE_S
        return self._lease

    async def _release(self) -> None:
        if self._lease is not None and time.monotonic() < self._until:
            with suppress(JobLeaseLost):
                await self._lease.release(done=True)
        self._lease = None

    # --- On demand --------------------------------------------------------------------------------------------

    async def seal_now(self) -> None:
        """Return once everything that was committed before this call is sealed, by this node or another one. Raises
        Unavailable after NOW_TIMEOUT_S, and what a round raises."""
        try:
            async with asyncio.timeout(NOW_TIMEOUT_S):
                await self._catch_up()
        except TimeoutError:
            raise Unavailable(f"the journal was not sealed within {NOW_TIMEOUT_S:.0f} s") from None

    async def _catch_up(self) -> None:
        while True:
            async with self._one:
                lease = await self._acquire()
                if lease is not None:
                    if not (await self._round(lease)).more:
                        return
                    continue
                if not await self.sealer.behind():
                    return
            await asyncio.sleep(GATHER_S)


__all__ = ["LEASE_S", "SEALING", "Sealing"]
