"""Local reservations: covered by this process's leases, and settled, extended and released without a commit.

A use of more than this process holds is charged by a commit, in full: it has happened.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from ..access import may_see
from ..clock import Clock
from ..context import Context, utc_from_us
from ..database import Database
from ..errors import Conflict, NotFound
from ..limits import Backoff, KeyChanged, LeaseManager, Ledger, LimitStatus, LocalReservation
from .cache import KeyCache
from .cached_key import CachedKey
from .reservation import (
    State,
    Turns,
    amounts,
    as_reservation,
    ended_otherwise,
    held_answer,
    minus,
    not_covered,
    plus,
    same_amounts,
    subjects_of_ids,
    together,
    used_since,
)
from .verification import KeyUse, Reservation, Verification, admitted

MAX_SETTLED = 10_000
"""Settled reservations that are kept in memory, for repeated calls."""
_SECOND = 1_000_000


class LocalReservations:
    """The reservations that only this process knows."""

    def __init__(self, database: Database, cache: KeyCache, ledger: Ledger, clock: Clock) -> None:
        self._database = database
        self._cache = cache
        self._ledger = ledger
        self._clock = clock
        self._turns = Turns()
        self._settled: OrderedDict[str, tuple[dict[str, int], dict[str, int], Reservation]] = OrderedDict()
        """The amounts reported before the settlement, the totals after it, and the answer."""

    def make(self, key: CachedKey, use: KeyUse, ttl_s: int, now_us: int) -> Reservation | None:
        """A reservation of a key that may be used; None if this process's leases do not cover it."""
        lease_manager = self._ledger.lease_manager
        if lease_manager is None:
            return None
        ends_us = now_us + ttl_s * _SECOND
        held = lease_manager.hold(key.subjects, use.units, now_us, ends_us, key, use.model, use.route)
        return None if held is None else held_answer(key, *held, "open", expires_at=utc_from_us(ends_us))

    async def settle(self, id: str, units: dict[str, int] | None, context: Context | None) -> Reservation:
        """End a reservation and charge these units in all; None: release it."""
        # Mostly no other call changes it, and it needs no commit: then it takes no turn, and awaits nothing.
        answer = self._settle_at_once(id, units, context) if not self._turns.taken(id) else None
        if answer is not None:
            return answer
        async with self._turns.of(id):
            answer = self._settle_at_once(id, units, context)
            if answer is not None:
                return answer
            lease_manager, hold = self._local(id, context)
            await self._resolve(hold)
            answer = self._settle_at_once(id, units, context)
            if answer is not None:
                return answer
            if units is None:
                raise AssertionError("a release takes no commit")
            # It used more than this process holds, the lease has ended, or the limits were changed: record it in full.
            limits = await self._record_whole(lease_manager, id, hold, used_since(hold.used, units))
            return self._settled_as(id, hold, "settled", {**hold.used, **units}, limits)

    def _settle_at_once(self, id: str, units: dict[str, int] | None, context: Context | None) -> Reservation | None:
        """Settle or release in memory; None if that takes a commit. Awaits nothing."""
        state: State = "released" if units is None else "settled"
        done = self._settled.get(id)
        if done is not None and may_see(context, done[2].tenant or ""):
            reported, total, answer = done
            if answer.state == state and (units is None or same_amounts({**reported, **units}, total)):
                return answer
            raise Conflict(ended_otherwise(answer.state, state))
        lease_manager, hold = self._local(id, context)
        if hold.reporting is not None:
            return None
        if units is None:
            if hold.recording:
                raise Conflict("the reservation is being settled")
            lease_manager.end(id)
            return self._settled_as(id, hold, state, hold.used, None)
        more = units if not hold.used else used_since(hold.used, units)
        if hold.recording or hold.key.stale or not lease_manager.settle(id, more, self._clock.now_us()):
            return None
        return self._settled_as(id, hold, state, {**hold.used, **units} if hold.used else units, None)

    def _settled_as(
        self, id: str, hold: LocalReservation, state: State, total: dict[str, int], limits: list[LimitStatus] | None
    ) -> Reservation:
        """The answer, which is kept for repeated calls."""
        settled = held_answer(hold.key, id, hold.entries, state, limits=limits, charged=amounts(total))
        self._settled[id] = hold.used, total, settled
        if len(self._settled) > MAX_SETTLED:
            self._settled.popitem(last=False)
        return settled

    async def _record_whole(
        self, lease_manager: LeaseManager, id: str, hold: LocalReservation, more: dict[str, int]
    ) -> list[LimitStatus]:
        """Settle by a commit of the use. If that fails, or its answer is lost, the reservation stays open, and a
        repeated settlement is charged once."""
        hold.recording = True
        answer = await self._record_hold(hold, more, f"{id} settled", 1)
        lease_manager.end(id)
        return answer.limits

    async def _report(self, id: str, hold: LocalReservation, used: Mapping[str, int]) -> None:
        """Commit what was used so far of an open reservation. If that fails, or its answer is lost, the next call on
        the reservation repeats this commit first: it is charged once."""
        once = f"{id} used {sorted(used.items())}"
        hold.reporting = once, dict(used)
        await self._resolve(hold)

    async def _resolve(self, hold: LocalReservation) -> None:
        """Repeat a report whose answer was lost, so that it is charged."""
        if hold.reporting is not None:
            once, used = hold.reporting
            await self._record_hold(hold, used_since(hold.used, used, "used"), once, 0)
            hold.used = {**hold.used, **used}
            hold.reporting = None

    async def _record_hold(self, hold: LocalReservation, units: dict[str, int], once: str, count: int) -> Verification:
        """Charge the use of a local reservation by a commit, where it was held: also if its key was removed meanwhile,
        or belongs to other groups now."""
        backoff = Backoff("the key is being changed too quickly to settle its reservation")
        while await backoff.attempt():
            key = await self._cache.by_id(hold.key.id)
            subjects = await subjects_of_ids(
                self._cache, [subject.id for subject in hold.key.subjects.all], hold.key.quota_ids, key
            )
            if not subjects:  # everything that held it was removed
                return admitted(hold.key, ())
            try:
                outcome = await self._ledger.admit(
                    together(subjects, key),
                    units,
                    force=True,
                    once=self._database.once("usage", "system", once, ("usage", hold.key.id, units)),
                    model=hold.model,
                    route=hold.route,
                    count=count,
                )
            except KeyChanged:
                if key is not None:
                    self._cache.outdated(key)
            else:
                return admitted(hold.key, outcome.statuses)
        raise backoff.exhausted()

    async def extend(
        self, id: str, ttl_s: int, units: dict[str, int] | None, used: dict[str, int], context: Context | None
    ) -> Reservation:
        """Let a reservation go on for `ttl_s` from now and hold these units in all (None: unchanged). `used`: all that
        was used of it so far."""
        async with self._turns.of(id):
            return await self._extend(id, ttl_s, units, used, context)

    async def _extend(
        self, id: str, ttl_s: int, units: dict[str, int] | None, used: dict[str, int], context: Context | None
    ) -> Reservation:
        lease_manager, hold = self._local(id, context)
        if hold.recording:
            raise Conflict("the reservation is being settled")
        await self._resolve(hold)
        key = hold.key
        now_us = self._clock.now_us()
        more = used_since(hold.used, used, "used")
        wanted = units if units is not None else plus(dict(hold.cost), hold.used)
        ends_us = now_us + ttl_s * _SECOND
        if not lease_manager.change(id, plus(minus(wanted, used), more), ends_us, now_us):
            denied = not_covered(key, hold.entries, wanted)
            return as_reservation(denied, id, "open", charged=amounts(hold.used))
        if more:
            lease_manager.change(id, minus(wanted, used), ends_us, now_us)
            if lease_manager.settle(id, more, now_us, last=False):
                hold.used = {**hold.used, **used}
            else:
                await self._report(id, hold, used)
        charged, expires_at = amounts(hold.used), utc_from_us(ends_us)
        return held_answer(key, id, hold.entries, "open", charged=charged, expires_at=expires_at)

    def _local(self, id: str, context: Context | None) -> tuple[LeaseManager, LocalReservation]:
        lease_manager = self._ledger.lease_manager
        hold = lease_manager.held(id, self._clock.now_us()) if lease_manager is not None else None
        if lease_manager is None or hold is None or not may_see(context, hold.key.tenant):
            raise NotFound(f"there is no reservation {id[:64]!r} in this process, or it has ended")
        if self._database.writes.usage_closed:
            self._database.writes.check_usage(hold.key.tenant)
        return lease_manager, hold


__all__ = ["LocalReservations"]
