"""The limit leases of one node: it verifies keys from memory, renews and returns leases, and recovers those of dead
processes.

`admit` charges a use to this node's leased limits, without a commit. Where it cannot, the use goes through the ledger,
whose commit leases units for the next uses. Each second the node records what it spent and renews its leases. It
returns a lease that nothing was spent from, and all leases when it stops. After its end nothing is spent from a lease.
(Verification stops earlier: without the store, nobody can tell whether the key was revoked.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..clock import Clock
from ..context import new_id
from ..errors import StrongroomError
from ..storage.port import Check
from .admission import AdmissionRequest, DecidedGroup, Group
from .corrections import DeadLease
from .lease import UsageLease
from .lease_log import DeadLeaseLog, LeaseLog, dead_logs
from .leased_key import Entries, LeasedKey, LeasedScope, LocalReservation
from .usage_state import (
    CONCURRENCY,
    MAX_TOTALS,
    OTHER_RESOURCES,
    AdmissionDecision,
    CompiledLimit,
    Cost,
    Subject,
    Subjects,
    UsageState,
)

LEASE_S = 5.0
"""How long a lease lasts unless it is renewed. When a node dies, others lose its leased units for at most so long."""
RENEW_EVERY_S = 1.0
"""How often the node records what it spent, and renews or returns its leases."""
SLICES = 10
"""The leases are renewed in so many slices, one after the other, so that no call waits for all of them."""
LOOK_FOR_DEAD_EVERY = 3
"""The node looks for logs of dead processes at its start, and once in so many renewals."""
MAX_USAGE_LEASES = 30_000
"""Subjects that a node has leases on: as many as it keeps keys in memory. Use of further ones is committed at once."""
MAX_LEASED_KEYS = 30_000
"""Keys that are verified from memory. Where many keys share one quota, the oldest make room."""
MAX_LOCAL_HOLDS = 100_000
CLOSE_TIMEOUT_S = 5.0
LOCAL = "rsl_"
"""The prefix of the id of a reservation that is in this process's memory only."""
NEVER = 2**62
_log = logging.getLogger(__name__)


class Ledger(Protocol):
    """The part of the ledger that the leases need."""

    lease_manager: LeaseManager | None

    @property
    def unreachable(self) -> bool: ...

    def submit(self, request: AdmissionRequest) -> None: ...

    def aggregate(self, subjects: Subjects, cost: Cost, count: int = 1) -> None: ...

    async def settled(self) -> None: ...


class LeaseManager:
    """The leases of one ledger. Call `start` before use. `folder` keeps the lease log, which survives the process
    (None: no log). `describe` gives a subject by its id, or None if its key or quota was removed."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Clock,
        *,
        lease_s: float = LEASE_S,
        folder: Path | None = None,
        describe: Callable[[str], Awaitable[Subject | None]] | None = None,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self.lease_us = round(lease_s * 1_000_000)
        self._every_s = min(RENEW_EVERY_S, lease_s / 4)
        self._folder = folder
        self._describe = describe
        self.log = LeaseLog(new_id("lse_"), folder)
        self._usage_leases: dict[str, UsageLease] = {}
        self._slices: list[dict[str, UsageLease]] = [{} for _ in range(SLICES)]
        self._leased_keys: dict[str, LeasedKey] = {}
        self._holds: dict[str, LocalReservation] = {}
        self._next_end_us = NEVER
        """No reservation in memory ends before this moment."""
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        ledger.lease_manager = self

    @property
    def lease_id(self) -> str:
        """The name of this process's leases in usage documents."""
        return self.log.lease

    @property
    def leases(self) -> int:
        """The number of subjects that this node has a lease on, or is about to have one."""
        return len(self._usage_leases)

    @property
    def keys(self) -> int:
        """How many keys, each with its quotas, this node admits from memory. At most MAX_LEASED_KEYS."""
        return len(self._leased_keys)

    def usage_lease(self, id: str) -> UsageLease | None:
        """This node's lease of a subject's limits; None without one."""
        return self._usage_leases.get(id)

    @property
    def holds(self) -> int:
        """The number of reservations that are open in memory."""
        return len(self._holds)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    # --- From memory ------------------------------------------------------------------------------------------

    def admit(
        self, subjects: Subjects, cost: Cost, now_us: int, model: str | None = None, route: str | None = None
    ) -> Entries | None:
        """Charge one use to the leased limits of this node; the answer is made from them. None if that is not possible
        from memory: then nothing was charged, and the ledger has to decide."""
        leased_key = self._leased_keys.get(subjects.id)
        if leased_key is None or leased_key.subjects is not subjects or self._closed:
            return None
        scope = leased_key.plain if not leased_key.scoped else leased_key.scope(model, route)
        entries = scope.entries
        for leased_limit, resource in entries:
            if (
                leased_limit.spent + leased_limit.held + cost.get(resource, 0) > leased_limit.cap
                or now_us >= leased_limit.ends_us
            ):
                return None
        self._spend(scope, cost, now_us)
        return entries

    def _spend(self, scope: LeasedScope, cost: Cost, now_us: int, count: int = 1) -> None:
        cells = self.log.cells
        for leased_limit, resource in scope.entries:
            units = cost.get(resource)
            if units:
                spent = leased_limit.spent
                if now_us >= leased_limit.mark_ends_us:
                    leased_limit.mark(now_us, spent)
                leased_limit.spent = spent = spent + units
                cells[leased_limit.slot] = spent  # before the answer: whatever happens now, it is spent
                if spent > leased_limit.low:
                    leased_limit.low = NEVER
                    self._renew(leased_limit.usage_lease)
        for usage_lease in scope.usage_leases:
            usage_lease.count += count
            usage_lease.last_used_us = now_us
            totals = usage_lease.totals
            for resource, units in cost.items():
                if resource in totals:
                    totals[resource] += units
                else:
                    name = resource if len(totals) < MAX_TOTALS else OTHER_RESOURCES
                    totals[name] = totals.get(name, 0) + units
        for subjects in scope.aggregated:
            self._ledger.aggregate(subjects, cost, count)

    # --- Reservations in memory -------------------------------------------------------------------------------

    def hold(
        self, subjects: Subjects, cost: Cost, now_us: int, ends_us: int, key: Any, model: str | None, route: str | None
    ) -> tuple[str, Entries] | None:
        """Reserve from the leased limits of this node; None if that is not possible from memory."""
        leased_key = self._leased_keys.get(subjects.id)
        if (
            leased_key is None
            or leased_key.subjects is not subjects
            or self._closed
            or len(self._holds) >= MAX_LOCAL_HOLDS
        ):
            return None
        scope = leased_key.scope(model, route)
        entries = scope.entries
        for leased_limit, resource in entries:
            if (
                leased_limit.spent + leased_limit.held + cost.get(resource, 0) > leased_limit.cap
                or now_us >= leased_limit.ends_us
            ):
                return None
        for leased_limit, resource in entries:
            leased_limit.held += cost.get(resource, 0)
        id = new_id(LOCAL)
        hold = self._holds[id] = LocalReservation(scope, cost, ends_us, key, model, route, {})
        for usage_lease in scope.usage_leases:
            usage_lease.holds[id] = hold
        self._next_end_us = min(self._next_end_us, ends_us)
        return id, entries

    def held(self, id: str, now_us: int) -> LocalReservation | None:
        """The open reservation with this id in memory; None if there is none."""
        hold = self._holds.get(id)
        if hold is not None and now_us >= hold.ends_us:
            self._release(id)
            return None
        return hold

    def change(self, id: str, cost: Cost, ends_us: int, now_us: int) -> bool:
        """Let a reservation hold this cost until `ends_us`; False if the leased limits do not have enough."""
        hold = self._holds[id]
        for leased_limit, resource in hold.held_entries:
            more = cost.get(resource, 0) - hold.cost.get(resource, 0)
            if more > 0 and (
                leased_limit.spent + leased_limit.held + more > leased_limit.cap or now_us >= leased_limit.ends_us
            ):
                return False
        for leased_limit, resource in hold.held_entries:
            leased_limit.held += cost.get(resource, 0) - hold.cost.get(resource, 0)
        hold.cost, hold.ends_us = cost, ends_us
        self._next_end_us = min(self._next_end_us, ends_us)
        return True

    def settle(self, id: str, cost: Cost, now_us: int, *, last: bool = True) -> bool:
        """Charge the use of a reservation and end it (not `last`: let it go on). False if the leased limits do not have
        enough: then nothing was charged, the reservation is unchanged, and the ledger has to charge it."""
        hold = self._holds[id]
        if hold.more:
            return False  # the limits have changed since it was made
        own = hold.cost if last else {}
        for leased_limit, resource in hold.entries:
            held = leased_limit.held - own.get(resource, 0)
            # Without a lease in the store nothing may be counted either: the uses are recorded relative to the lease.
            if leased_limit.spent + held + cost.get(resource, 0) > leased_limit.cap or now_us >= leased_limit.ends_us:
                return False
        if last:
            self._release(id)
        self._spend(hold.scope, cost, now_us, count=1 if last else 0)
        return True

    def end(self, id: str) -> None:
        """Release a reservation, if it is open."""
        if id in self._holds:
            self._release(id)

    def _end_holds(self, now_us: int) -> None:
        """Release the reservations that have expired."""
        if now_us < self._next_end_us:
            return
        for id in [id for id, hold in self._holds.items() if now_us >= hold.ends_us]:
            self._release(id)
        self._next_end_us = min((hold.ends_us for hold in self._holds.values()), default=NEVER)

    def _release(self, id: str) -> None:
        hold = self._holds.pop(id)
        for leased_limit, resource in hold.held_entries:
            leased_limit.held -= hold.cost.get(resource, 0)
        for usage_lease in hold.scope.usage_leases:
            usage_lease.holds.pop(id, None)

    # --- In the ledger's commits ------------------------------------------------------------------------------

    def usage_leases_for(self, groups: Iterable[Group]) -> Mapping[str, UsageLease]:
        """This node's leases, with a new one for each subject that is charged for the first time."""
        self._end_holds(self._clock.now_us())
        if not self._closed:
            for group in groups:
                for request in group.requests:
                    if request.force or request.future is None or request.special is not None:
                        continue
                    for subject in request.subjects.all:
                        if (
                            subject.compiled_limits
                            and subject.id not in self._usage_leases
                            and len(self._usage_leases) < MAX_USAGE_LEASES
                        ):
                            usage_lease = self._usage_leases[subject.id] = UsageLease(subject, self.log)
                            self._slices[hash(subject.id) % SLICES][subject.id] = usage_lease
        return self._usage_leases

    def committed(self, decided: DecidedGroup) -> None:
        """The decision is durable, and with it the granted leases."""
        for usage_lease, spent in decided.usage_leases:
            usage_lease.committed(spent)
        for usage_lease in decided.returned:
            if not usage_lease.dirty and not usage_lease.open and self._usage_leases.get(usage_lease.id) is usage_lease:
                self._drop(usage_lease)
        for request, outcome in decided.answers:
            if outcome.allowed and request.future is not None and not request.force and request.special is None:
                self._issue(request.subjects)

    def _issue(self, subjects: Subjects) -> None:
        leased_key = self._leased_keys.get(subjects.id)
        if leased_key is not None and leased_key.subjects is subjects:
            return
        if subjects.limited and all(
            subject.id in self._usage_leases for subject in subjects.all if subject.compiled_limits
        ):
            self._revoke(subjects.id)
            if len(self._leased_keys) >= MAX_LEASED_KEYS:
                for oldest in list(self._leased_keys)[: MAX_LEASED_KEYS // 10]:
                    self._revoke(oldest)
            leased_key = self._leased_keys[subjects.id] = LeasedKey(subjects, self._usage_leases)
            for usage_lease in leased_key.usage_leases.values():
                usage_lease.keys.add(subjects.id)

    def _revoke(self, id: str) -> None:
        """Send the next use of a key through the ledger."""
        leased_key = self._leased_keys.pop(id, None)
        if leased_key is not None:
            for usage_lease in leased_key.usage_leases.values():
                usage_lease.keys.discard(id)

    def not_committed(self, decided: DecidedGroup) -> None:
        """The commit failed, or its outcome is unknown. Until the next attempt this node may spend what the old and the
        new lease both allow."""
        for usage_lease, _ in decided.usage_leases:
            usage_lease.renewing = False

    def recorded(self, request: AdmissionRequest) -> None:
        """A renewal is durable; `committed` has updated the lease."""

    def failed(self, request: AdmissionRequest) -> None:
        """A renewal could not be decided, or not be committed."""
        usage_lease = self._usage_leases.get(request.subjects.id)
        if usage_lease is not None:
            usage_lease.renewing = False

    async def described(self, id: str) -> Subject | None:
        """The subject with its present limits; None if it is unknown here, or was removed."""
        return None if self._describe is None else await self._describe(id)

    def gone(self, request: AdmissionRequest) -> None:
        """The key, or the quota, of a renewal was removed."""
        self.drop(request.subjects.id)

    def drop(self, id: str) -> None:
        """The key, or the quota, was removed, and with it what was leased of it."""
        usage_lease = self._usage_leases.get(id)
        if usage_lease is not None:
            usage_lease.forget_spent()
            self._drop(usage_lease)

    def _drop(self, usage_lease: UsageLease) -> None:
        del self._usage_leases[usage_lease.id]
        del self._slices[hash(usage_lease.id) % SLICES][usage_lease.id]
        for leased_limit in usage_lease.leased_limits.values():
            leased_limit.cap = leased_limit.ends_us = 0
            self.log.free(leased_limit.slot)
        for id in list(usage_lease.keys):
            self._revoke(id)

    def show(self, id: str, state: UsageState, compiled_limits: Sequence[CompiledLimit] | None = None) -> None:
        """For statistics, add to a state what this node has spent and not recorded yet, and what reservations in memory
        hold of these limits."""
        lease = state.leases.pop(self.log.lease, None)
        usage_lease = self._usage_leases.get(id)
        if lease is None or usage_lease is None:
            return
        now_us = self._clock.now_us()
        self._end_holds(now_us)
        state.kept = usage_lease.kept(compiled_limits)
        for limit, (_, settled, _) in lease[2].items():
            leased_limit = usage_lease.leased_limits.get(limit)
            if leased_limit is not None and leased_limit.compiled_limit.resource != CONCURRENCY:
                state.counter(leased_limit.compiled_limit).add_at(now_us, max(0, leased_limit.spent - settled))
        noted = usage_lease.noted  # a commit may be durable before its answer arrives
        stored = noted[1] if noted is not None and noted[0] == lease[1] else usage_lease.settled_totals
        totals = {name: units - stored.get(name, 0) for name, units in usage_lease.totals.items()}
        if usage_lease.count:
            state.add_totals(totals, usage_lease.count - lease[1], usage_lease.last_used_us)

    # --- Renewing ---------------------------------------------------------------------------------------------

    def _renew(self, usage_lease: UsageLease, lease: str = "renew") -> None:
        if usage_lease.renewing:
            return
        usage_lease.renewing = True
        subject = usage_lease.subject
        request = AdmissionRequest(
            Subjects(subject.id, subject.guard, subject.compiled_limits, (), subject.tenant), {}, True, None, None
        )
        request.lease = "return" if lease == "return" else "renew"
        request.owner = self
        self._ledger.submit(request)

    async def _run(self) -> None:
        turn = 0
        while True:
            try:
                if turn % (LOOK_FOR_DEAD_EVERY * SLICES) == 0:
                    await self.reconcile_dead()
                turn += 1
                await asyncio.sleep(self._every_s / SLICES)
                self.renew_leases(turn % SLICES)
            except Exception:  # without renewals all leases would end, and each use would be a commit
                _log.exception("limit leases could not be renewed, trying again")
                await asyncio.sleep(self._every_s)

    def renew_leases(self, slice: int | None = None) -> None:
        """One round of renewals: record usage and renew; return leases that were not used since the round before.
        `slice`: only this part of the leases."""
        self._end_holds(self._clock.now_us())
        for usage_lease in list((self._usage_leases if slice is None else self._slices[slice]).values()):
            idle = usage_lease.count == usage_lease.seen_count and not usage_lease.open
            usage_lease.seen_count = usage_lease.count
            self._renew(usage_lease, "return" if idle else "renew")

    async def close(self) -> None:
        """Record what was spent and return all leases. A lease that cannot be returned ends by itself, or is recovered
        by a process that finds this one's log."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._leased_keys.clear()
        for id in list(self._holds):
            self._release(id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while self._usage_leases:
                    for usage_lease in list(self._usage_leases.values()):
                        self._renew(usage_lease, "return")
                    await self._ledger.settled()
                    await asyncio.sleep(0)  # so that the time-out can interrupt this loop
                    if self._ledger.unreachable:
                        break
        if self._usage_leases:
            _log.warning("%d limit leases could not be returned: they end by themselves", len(self._usage_leases))
            self.log.abandon()
        else:
            self.log.close()

    # --- Processes that were killed ---------------------------------------------------------------------------

    async def reconcile_dead(self) -> None:
        """Record the usage in the lease logs of dead processes on this machine, and return their leases."""
        describe = self._describe
        if self._folder is None or describe is None:
            return
        for dead in dead_logs(self._folder):
            try:
                await self._recover(dead, describe)
            except StrongroomError as error:
                dead.leave()
                _log.info("the limit leases of a dead process cannot be recovered yet: %s", error)
                return
            except BaseException:
                dead.leave()
                raise
            dead.remove()
            _log.info("recovered the limit leases of a killed process on %d keys and quotas", len(dead.found))

    async def _recover(self, dead: DeadLeaseLog, describe: Callable[[str], Awaitable[Subject | None]]) -> None:
        waiting: list[asyncio.Future[AdmissionDecision]] = []
        for id, spent in dead.found.items():
            subject = await describe(id)
            if subject is not None:
                future: asyncio.Future[AdmissionDecision] = asyncio.get_running_loop().create_future()
                guard = Check(subject.guard.collection, subject.guard.id, 0)
                subjects = Subjects(id, guard, subject.compiled_limits, (), subject.tenant)
                request = AdmissionRequest(subjects, {}, True, None, future)
                request.special = DeadLease(dead.lease, spent)
                self._ledger.submit(request)
                waiting.append(future)
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result


__all__ = ["LeaseManager"]
