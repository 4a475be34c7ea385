"""Reservations: hold a part of the limits before a piece of work, then settle what it used.

A *durable* reservation is stored: any process can settle it, and it survives every process. A *local* reservation is
covered by this process's leases and kept in its memory: it costs no commit, only this process can settle it, and it
ends with the process. Both end when their time is over, and give back what they hold; what was reported as used until
then stays charged.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..clock import Clock
from ..context import Context
from ..database import Database
from ..limits import Amount, Backoff, Ledger
from ..limits.lease_manager import LOCAL
from .cache import KeyCache
from .cached_key import CachedKey
from .durable_reservations import DurableReservations
from .local_reservations import LocalReservations
from .reservation import DEFAULT_TTL_S, as_reservation, reserved_units, with_uncounted
from .verification import KeyUse, Reservation, Verification, cost_units, usable


class Reservations:
    """The reservations of one store, durable and local."""

    def __init__(self, database: Database, cache: KeyCache, ledger: Ledger, clock: Clock) -> None:
        self._database = database
        self._cache = cache
        self._clock = clock
        self._local = LocalReservations(database, cache, ledger, clock)
        self._durable = DurableReservations(database, cache, ledger, clock)

    async def reserve(
        self,
        text: str,
        *,
        cost: Mapping[str, Amount] | None = None,
        ttl_s: int = DEFAULT_TTL_S,
        permission: str | None = None,
        ip: str | None = None,
        model: str | None = None,
        route: str | None = None,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        actor: str = "system",
        durable: bool = False,
    ) -> Reservation:
        """Hold `cost` (default: one request) of all limits of a key, and one of its `concurrency`, for `ttl_s` seconds.
        The checks are those of `verify`. A valid answer has a `reservation_id`.

        `durable`: any process can settle the reservation, and it survives this process. Without it, the reservation is
        local if this process's leases cover it. All calls with one idempotency key (within a day) make one durable
        reservation. Raises InvalidInput with every problem, WritesOff while usage is turned off; never for
        a key.
        """
        use = KeyUse(reserved_units(cost, ttl_s, ip), permission, ip, model, route, tenant)
        may_be_local = not durable and idempotency_key is None
        writes = self._database.writes
        if may_be_local and not writes.usage_closed:
            now_us = self._clock.now_us()
            known = usable(self._cache.peek(text, now_us), use, now_us)
            made = None if isinstance(known, Verification) else self._local.make(known, use, ttl_s, now_us)
            if made is not None and isinstance(known, CachedKey):
                return with_uncounted(made, known, cost)
        backoff = Backoff("the key is being changed too quickly to reserve its limits")
        while await backoff.attempt():
            now_us = self._clock.now_us()
            found = await self._cache.find(text, now_us)
            if writes.usage_closed:
                writes.check_usage(found.tenant if found is not None else None)
            key = usable(found, use, now_us)
            if isinstance(key, Verification):
                return as_reservation(key)
            if not await self._cache.is_current(key):
                continue
            made = self._local.make(key, use, ttl_s, now_us) if may_be_local else None
            if made is None:
                made = await self._durable.make(key, use, ttl_s, now_us, idempotency_key, actor)
            if made is not None:
                return with_uncounted(made, key, cost)
        raise backoff.exhausted()

    async def settle(
        self, reservation_id: str, cost: Mapping[str, Amount], *, context: Context | None = None
    ) -> Reservation:
        """End a reservation and charge all that was used, even if that is more than it held. A repeated call gives the
        same answer. Raises InvalidInput, NotFound (unknown, or another tenant's), Conflict (it has ended, or was
        settled with other amounts: record the use as usage)."""
        units = cost_units(cost)
        answer = await self._of(reservation_id).settle(reservation_id, units, context)
        return with_uncounted(answer, await self._cache.by_id(answer.key_id or ""), cost)

    async def release(self, reservation_id: str, *, context: Context | None = None) -> Reservation:
        """End a reservation and charge only what was reported as used. A repeated call gives the same answer. Raises
        NotFound, Conflict (it was settled)."""
        return await self._of(reservation_id).settle(reservation_id, None, context)

    async def extend(
        self,
        reservation_id: str,
        *,
        ttl_s: int = DEFAULT_TTL_S,
        cost: Mapping[str, Amount] | None = None,
        used: Mapping[str, Amount] | None = None,
        context: Context | None = None,
    ) -> Reservation:
        """Let a reservation go on for `ttl_s` seconds from now and hold `cost` in all (default: unchanged). `used`: all
        that was used of it so far. It is charged now, and stays charged if the reservation expires.

        The answer is not valid if the limits do not have that much; the reservation is then unchanged. Raises
        InvalidInput, NotFound, Conflict.
        """
        units = None if cost is None else reserved_units(cost, ttl_s, None)
        if cost is None:
            reserved_units({}, ttl_s, None)
        spent = {} if used is None else cost_units(used)
        answer = await self._of(reservation_id).extend(reservation_id, ttl_s, units, spent, context)
        asked = {**(cost or {}), **(used or {})}
        return with_uncounted(answer, await self._cache.by_id(answer.key_id or ""), asked)

    def _of(self, id: str) -> LocalReservations | DurableReservations:
        return self._local if id.startswith(LOCAL) else self._durable


__all__ = ["Reservations"]
