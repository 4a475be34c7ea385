"""The usage ledger: requests against limits, decided exactly and written durably before they are answered.

How it is exact. All that one key has used is one document (`KeyUsage`): its counters, its totals, when it was last
used; and so is all that the keys that share a quota have used together. A request is decided on the documents in
memory, and committed under the versions it was decided on, together with a check that neither the key nor a quota has
changed. If anyone else, another process or machine, changed one of them meanwhile, nothing is applied; the documents
are read again and the request is decided again. So of two nodes that would spend the same remainder, one commits and
the other learns of it: a limit cannot be over-admitted, and all limits are charged together or not at all.

A node that leases a part of the limits in such a commit may spend it without another one: `lease_manager.py`.

By which time. Each node has the store's clock (`clock.py`), and along the versions of a usage document time never goes
back (`UsageState` says why a limit therefore holds even if clocks differ).

A request passes through the group commit (`group_commit.py`), which pauses for other nodes where fairness says so
(`fairness.py`). The use of keys without limits is only added up (`aggregation.py`). `tuning.py` has the numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime

from ..clock import Clock, MachineClock
from ..context import utc_from_us
from ..database import Database, IdempotentOperation
from ..errors import Conflict, NotFound
from ..storage.port import Check, Store
from . import tuning
from .admission import AdmissionRequest, KeyChanged
from .aggregation import UsageAggregation
from .backoff import Backoff
from .corrections import Backdate, BeginRefills, Refund
from .decision import Watcher, usage_operation
from .group_commit import GroupCommit
from .lease_manager import LeaseManager
from .preview import previewed
from .reservation_change import HoldChange
from .usage_state import (
    NAME,
    AdmissionDecision,
    CompiledLimit,
    Cost,
    KeyUsage,
    Status,
    Subject,
    Subjects,
    UsageState,
)
from .usage_states import UsageStates


@dataclass(frozen=True, slots=True)
class ClockMended:
    """The time of a state that ran ahead of the store's clock, and the time from which it goes on."""

    before: datetime
    now: datetime


class Ledger:
    """Admits requests on keys, exactly and durably. One for a store and process, on one event loop."""

    def __init__(self, database: Database, store: Store, clock: Clock | None = None) -> None:
        self._database = database
        self._clock = clock if clock is not None else MachineClock()
        self.states = UsageStates(store)
        self.group_commit = GroupCommit(database, store, self._clock, self.states)
        self.aggregation = UsageAggregation(self._clock, self.group_commit.submit_all)
        self.submit = self.group_commit.submit
        """Let a request wait for its turn; its future, if it has one, fails if that cannot be."""
        self.aggregate = self.aggregation.add
        """Count the use of a key that has no limits: nothing is decided by it, so nobody waits for its write."""
        self._lease_manager: LeaseManager | None = None

    @property
    def lease_manager(self) -> LeaseManager | None:
        """This node's leases, if it has any; `LeaseManager` sets it."""
        return self._lease_manager

    @lease_manager.setter
    def lease_manager(self, lease_manager: LeaseManager | None) -> None:
        self._lease_manager = self.group_commit.leases = lease_manager

    @property
    def unreachable(self) -> bool:
        """Whether the last commit found the store out of reach."""
        return self.group_commit.unreachable

    @property
    def retries(self) -> int:
        """Requests decided again because another node was faster."""
        return self.group_commit.fairness.retries

    def watch(self, watcher: Watcher, on_crossed: Callable[[Sequence[str]], None]) -> None:
        """Tell `watcher` of crossed thresholds in the commit that crosses them, and call `on_crossed` after it."""
        self.group_commit.watcher, self.group_commit.on_crossed = watcher, on_crossed

    # --- Requests ---------------------------------------------------------------------------------------------

    def admit(
        self,
        subjects: Subjects,
        cost: Cost,
        *,
        force: bool = False,
        once: IdempotentOperation | None = None,
        model: str | None = None,
        route: str | None = None,
        hold: HoldChange | None = None,
        count: int = 1,
        at_us: int | None = None,
    ) -> asyncio.Future[AdmissionDecision]:
        """Decide a request. The decision comes once it is durable; a denial, which writes nothing, comes at once.

        `force`: record it over a limit too. `once` has an operation that fails with AlreadyExists if this request was
        admitted before. `hold` is the change of a reservation: its write commits with the request, and its error is the
        request's. `count` is the number of uses. `at_us`: the use was at that moment; it is recorded over a limit too,
        in the windows that still count it. The future raises KeyChanged, TooManyRequests, HoldEnded, InvalidInput (no
        limit that `at_us` concerns counts it), Unavailable.
        """
        future: asyncio.Future[AdmissionDecision] = asyncio.get_running_loop().create_future()
        request = AdmissionRequest(subjects, cost, force, once, future, count, None, 0, model, route, hold)
        if at_us is not None:
            request.special = Backdate(at_us)
        self.submit(request)
        return future

    def announced(self) -> AbstractContextManager[None]:
        """Within this, requests of one batch are prepared and made: the next commit waits a little for them."""
        return self.group_commit.announced()

    async def usage_state(self, id: str) -> UsageState:
        """A key's usage as the store has it now, with what is still to be written added: for statistics."""
        aggregation = self.aggregation
        flushes, state = -1, UsageState(None)
        looks = 0
        while flushes != aggregation.flushes and looks < tuning.MAX_LOOKS:  # none began meanwhile
            looks += 1
            await aggregation.written(id)
            flushes, state = aggregation.flushes, await self.states.read(id)
        if self._lease_manager is not None:
            self._lease_manager.show(id, state)
        aggregation.show(id, state)
        return state

    async def moments(self, ids: Iterable[str], now_us: int) -> dict[str, int]:
        """The moment of each of these states."""
        found = await self.states.stored([(NAME, id) for id in ids])
        return {id: UsageState(document).moment(now_us) for id, document in zip(ids, found, strict=True)}

    async def set_back(self, id: str) -> ClockMended | None:
        """Set the time of a state that ran ahead of the store's clock back to the clock. None if it is not ahead.
        Raises Unavailable."""
        backoff = Backoff("this usage state is being changed too quickly")
        while await backoff.attempt():
            state, now_us = await self.states.read(id), self._clock.now_us()
            before_us = state.at_us
            if before_us <= now_us:
                return None
            state.set_back(now_us)
            self.forget(id)
            try:
                await self._database.commit_counters([usage_operation(id, state)], now_us)
            except (Conflict, NotFound):
                continue
            self.forget(id)
            return ClockMended(utc_from_us(before_us), utc_from_us(now_us))
        raise backoff.exhausted()

    async def statuses(self, subjects: Subjects, now_us: int) -> tuple[Status, ...]:
        """Where all limits of a key stand, as the store has it now: its own, then those that it shares."""
        found: list[Status] = []
        for subject in subjects.all:
            if subject.compiled_limits:
                state = await self.states.read(subject.id)
                if self._lease_manager is not None:
                    self._lease_manager.show(subject.id, state, subject.compiled_limits)
                found += state.statuses(subject.compiled_limits, state.moment(now_us))
        return tuple(found)

    async def preview(self, subjects: Subjects, cost: Cost, model: str | None, route: str | None) -> AdmissionDecision:
        """The decision that `admit` would make now, by the store and what this node has spent. Nothing is counted."""
        now_us = self._clock.now_us()
        found = await self.states.stored([(NAME, subject.id) for subject in subjects.all])
        states = [UsageState(document) for document in found]
        if self._lease_manager is not None:
            for subject, state in zip(subjects.all, states, strict=True):
                self._lease_manager.show(subject.id, state, subject.compiled_limits)
        return previewed(subjects, states, cost, now_us, model, route)

    async def begin_refills(self, subject: Subject, limits: tuple[str, ...]) -> None:
        """Before totals get a refill: let it begin now, durably, even if they are used much later. Raises Unavailable,
        TooManyRequests."""
        own = Subjects(
            subject.id,
            Check(subject.guard.collection, subject.guard.id, 0),
            subject.compiled_limits,
            (),
            subject.tenant,
        )
        future: asyncio.Future[AdmissionDecision] = asyncio.get_running_loop().create_future()
        self.submit(AdmissionRequest(own, {}, True, None, future, special=BeginRefills(limits)))
        await future

    async def take_back(
        self, subjects: Subjects, cost: Cost, moment_us: int, model: str | None, route: str | None
    ) -> None:
        """Take back a use that was charged at a moment. Raises KeyChanged, TooManyRequests, Unavailable."""
        future: asyncio.Future[AdmissionDecision] = asyncio.get_running_loop().create_future()
        request = AdmissionRequest(
            subjects, cost, True, None, future, model=model, route=route, special=Refund(moment_us)
        )
        self.submit(request)
        await future

    async def settled(self) -> None:
        """Wait until no request waits that could be decided now."""
        await self.group_commit.settled()

    # --- Usage in memory ----------------------------------------------------------------------------------------

    def forget(self, id: str) -> None:
        """The key, or the quota, was changed or removed: read its usage again at the next request."""
        self.states.forget(id)

    def forget_all(self) -> None:
        """Read every usage state again at its next request."""
        for id in self.states.ids():
            self.states.forget(id)

    def removed(self, id: str) -> None:
        """The key, or the quota, was removed with its usage: what this node leased of it is gone as well."""
        self.states.forget(id)
        if self._lease_manager is not None:
            self._lease_manager.drop(id)

    def used(self) -> list[str]:
        """The ids of the usage states in memory: of keys that this process has charged, and of their quotas."""
        return self.states.ids()

    async def close(self) -> None:
        """Write everything that waits, and return what was leased. Afterwards nothing can be charged."""
        if self._lease_manager is not None:
            await self._lease_manager.close()
        self.group_commit.closed = True
        self.aggregation.close()
        for _ in range(tuning.CLOSING_FLUSHES):
            self.aggregation.flush()
            await self.group_commit.finish()
            if self.unreachable or self.aggregation.idle:
                break
        self.aggregation.warn_of_loss()


__all__ = [
    "AdmissionDecision",
    "ClockMended",
    "CompiledLimit",
    "Cost",
    "KeyChanged",
    "KeyUsage",
    "Ledger",
    "Status",
    "Subjects",
    "UsageState",
]
