"""Reservations: hold a part of the limits before something is done, settle what it came to.

A reservation that is `durable` is a document, and its hold stands in the accounts that it concerns: any node can settle
it, and it survives every process. One that this process's leases cover is kept in its memory: it costs no commit, only
this process can settle it, and it ends with it. Both end by themselves when their time is over, and give back what
they hold; what was reported as used until then stays charged.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast

from .accounts import Outcome
from .changes import ChangeFeed
from .charges import HoldChange
from .clock import Clock
from .context import Context, new_id, system_context, us_from_utc, utc_from_us
from .database import Database
from .entity import Entity, Index
from .errors import AlreadyExists, Conflict, NotFound, StrongroomError, Unavailable
from .heldreservations import HeldReservations
from .keytext import Hasher
from .knownkey import KnownKey
from .lending import LOCAL
from .reserving import (
    DEFAULT_TTL_S,
    MAX_TTL_S,
    State,
    amounts,
    as_reservation,
    ended_otherwise,
    held_answer,
    minus,
    open_answer,
    plus,
    reserved_units,
    same_amounts,
    used_since,
    with_changes,
    with_uncounted,
)
from .storage.port import Create, Put
from .transaction import is_expired
from .usage import KeyChanged, Ledger
from .verification import (
    NOT_FOUND,
    Reservation,
    admitted,
    cost_units,
    exceeded,
    refused,
)
from .verifier import MAX_KEY_ATTEMPTS, may_see
from .windows import Amount

NAME = "reservations"
REMEMBERED_US = 86_400_000_000
"""How long after its end a reservation is remembered, so that what is done to it twice is done once."""
_SECOND = 1_000_000
_log = logging.getLogger(__name__)


class StoredReservation(
    Entity, collection=NAME, scope="global", journalled=False, indexes=[Index("forget_at")], ttl="forget_at"
):
    """One durable reservation; amounts are in units. `request`: the fingerprint of the request that made it, where that
    had an idempotency key. `asked` is what it was made for, `holds` what it holds, `used`
    what was used of it so far."""

    key_id: str
    tenant: str
    request: str | None = None
    asked: dict[str, int] = {}
    holds: dict[str, int]
    used: dict[str, int] = {}
    reported: dict[str, int] | None = None
    """What was reported as used before it was settled: with it, a second settlement is known to be the same."""
    model: str | None = None
    route: str | None = None
    state: State = "open"
    expires_at: datetime
    forget_at: datetime


class Reservations(HeldReservations):
    """Verifies keys, and reserves their limits."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        hasher: Hasher,
        clock: Clock | None = None,
        feed: ChangeFeed | None = None,
    ) -> None:
        super().__init__(database, ledger, hasher, clock, feed)
        self._releasing: set[asyncio.Task[None]] = set()

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
        """Hold `cost` (default: one request) of all the limits of a key, and one of its `concurrency`, for `ttl_s`
        seconds; decided as `verify` decides. The answer has a `reservation_id` if it is valid.

        `durable`: any process can settle it, whatever becomes of this one; without it, it is kept in memory where this
        process's leases cover it. The same call with the same idempotency key (within a day) is one reservation, a
        durable one. Raises InvalidInput with every problem; never for a key.
        """
        units = reserved_units(cost, ttl_s, ip)
        calls = self._database.calls
        lending = self._ledger.lending
        in_memory = lending is not None and not durable and idempotency_key is None
        if lending is not None and in_memory:
            now_us = self._clock.now_us()
            known = self.cache.peek(text, now_us)
            mine = known is not None and (tenant is None or known.tenant == tenant)
            if known is not None and mine and known.refusal(now_us, permission, ip, model, route) is None:
                ends_us = now_us + ttl_s * _SECOND
                held = lending.hold(known.metered, units, now_us, ends_us, known, model, route)
                if held is not None:
                    answer = held_answer(known, *held, "open", expires_at=utc_from_us(ends_us))
                    return with_uncounted(answer, known, cost)
        for _ in range(MAX_KEY_ATTEMPTS):
            now_us = self._clock.now_us()
            key = await self.cache.find(text, now_us)
            if key is None or (tenant is not None and key.tenant != tenant):
                return as_reservation(NOT_FOUND)
            refusal = key.refusal(now_us, permission, ip, model, route)
            if refusal is not None:
                return as_reservation(refused(key, *refusal))
            if not await self.cache.is_current(key):
                continue
            ends_us = now_us + ttl_s * _SECOND
            if lending is not None and in_memory:
                held = lending.hold(key.metered, units, now_us, ends_us, key, model, route)
                if held is not None:
                    answer = held_answer(key, *held, "open", expires_at=utc_from_us(ends_us))
                    return with_uncounted(answer, key, cost)
            request = ("reserve", key.id, units, ttl_s, permission, ip, model, route, tenant)
            stored = StoredReservation(
                id=new_id("rsv_") if idempotency_key is None else _derived(actor, idempotency_key),
                key_id=key.id,
                tenant=key.tenant,
                request=None if idempotency_key is None else calls.fingerprint(request),
                asked=units,
                holds=units,
                model=model,
                route=route,
                expires_at=utc_from_us(ends_us),
                forget_at=utc_from_us(ends_us + REMEMBERED_US),
            )
            async with self._turn(stored.id or ""):
                made = await self._make(key, stored, now_us, None if idempotency_key is None else request)
            if made is not None:
                return with_uncounted(made, key, cost)
        raise Unavailable("the key is being changed too quickly to reserve its limits: try again")

    async def _make(
        self, key: KnownKey, stored: StoredReservation, now_us: int, request: tuple[object, ...] | None
    ) -> Reservation | None:
        """Commit a durable reservation, or answer what is known of the same one; None if the key, or another node's
        call for the same one, was faster. `request`: what is asked for, if that is to happen once."""
        id, document = stored.id or "", StoredReservation.__codec__.encode(stored)
        operation: Create | Put = Create(NAME, id, document)
        if request is not None:
            collection = StoredReservation.__collection__
            before = await self._database.load(system_context(), collection, id)
            if before is not None and not is_expired(collection, before, utc_from_us(now_us)):
                made = cast(StoredReservation, StoredReservation.__codec__.decode(before))
                return self._again(key, made, stored, now_us, request)
            if before is not None:
                operation = Put(NAME, id, document, before["version"])
        ends_us = us_from_utc(stored.expires_at)
        future = self._ledger.charge(
            key.metered,
            {},
            model=stored.model,
            route=stored.route,
            hold=HoldChange(id, ends_us, stored.holds, open=False),
            also=operation,
        )
        try:
            outcome = await asyncio.shield(future)
        except asyncio.CancelledError:
            if request is None:  # nobody will ever hear its id; one with an idempotency key can be asked for again
                future.add_done_callback(functools.partial(self._unheard, id))
            raise
        except KeyChanged:
            self.cache.outdated(key)
            return None
        except (AlreadyExists, Conflict):
            return None  # another node's: it is read at the next attempt
        if outcome.allowed:
            return open_answer(key, id, admitted(key, outcome.statuses).limits, ends_us)
        return as_reservation(exceeded(key, outcome, stored.holds))

    def _unheard(self, id: str, future: asyncio.Future[Outcome]) -> None:
        """Release a reservation whose caller went away while it was made, instead of holding it to its end."""
        if not future.cancelled() and future.exception() is None and future.result().allowed:
            task = asyncio.get_running_loop().create_task(self._release_unheard(id))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _release_unheard(self, id: str) -> None:
        try:
            await self.release(id)
        except StrongroomError as error:
            _log.info("a reservation whose caller went away could not be released, it ends by itself: %s", error)

    def _again(
        self, key: KnownKey, before: StoredReservation, asked: StoredReservation, now_us: int, request: object
    ) -> Reservation:
        """The answer to a call that made this reservation before: the reservation as it is now, since one that has
        ended holds nothing any more."""
        if before.request is not None:
            self._database.calls.compare(before.request, request)
        elif (before.asked, before.model, before.route) != (asked.asked, asked.model, asked.route):
            raise Conflict("the idempotency key was used for a different request: take a new one")
        if before.state == "open":
            self._must_be_open(before, now_us)
        answer = open_answer(key, before.id or "", [], us_from_utc(before.expires_at))
        return with_changes(answer, state=before.state, charged=amounts(before.used))

    async def settle(
        self, reservation_id: str, cost: Mapping[str, Amount], *, context: Context | None = None
    ) -> Reservation:
        """End a reservation and charge what was used in all, whole, even if that is more than it held. The same again
        answers the same. Raises InvalidInput, NotFound (unknown, or another tenant's), Conflict (ended, or settled with
        other amounts: record what was used as usage)."""
        units = cost_units(cost)
        async with self._turn(reservation_id):
            if reservation_id.startswith(LOCAL):
                answer = await self._settle_local(reservation_id, units, context)
            else:
                answer = await self._end(reservation_id, units, "settled", context)
        return with_uncounted(answer, await self.cache.by_id(answer.key_id or ""), cost)

    async def release(self, reservation_id: str, *, context: Context | None = None) -> Reservation:
        """End a reservation and charge nothing but what was reported as used. The same again answers the same. Raises
        NotFound, Conflict (it was settled)."""
        async with self._turn(reservation_id):
            if reservation_id.startswith(LOCAL):
                return await self._settle_local(reservation_id, None, context)
            return await self._end(reservation_id, None, "released", context)

    async def extend(
        self,
        reservation_id: str,
        *,
        ttl_s: int = DEFAULT_TTL_S,
        cost: Mapping[str, Amount] | None = None,
        used: Mapping[str, Amount] | None = None,
        context: Context | None = None,
    ) -> Reservation:
        """Let a reservation go on for `ttl_s` seconds from now, holding `cost` in all (default: as it is). `used` is
        what was used of it in all so far: it is charged now, and stays charged if the reservation ends by itself.

        The answer is not valid if more is asked than the limits have; the reservation is then as it was. Raises
        InvalidInput, NotFound, Conflict.
        """
        units = None if cost is None else reserved_units(cost, ttl_s, None)
        if cost is None:
            reserved_units({}, ttl_s, None)
        spent = {} if used is None else cost_units(used)
        async with self._turn(reservation_id):
            if reservation_id.startswith(LOCAL):
                answer = await self._extend_local(reservation_id, ttl_s, units, spent, context)
            else:
                answer = await self._extend(reservation_id, ttl_s, units, spent, context)
        asked = {**(cost or {}), **(used or {})}
        return with_uncounted(answer, await self.cache.by_id(answer.key_id or ""), asked)

    async def _extend(
        self,
        reservation_id: str,
        ttl_s: int,
        units: dict[str, int] | None,
        spent: dict[str, int],
        context: Context | None,
    ) -> Reservation:
        for _ in range(MAX_KEY_ATTEMPTS):
            stored = await self._stored(reservation_id, context)
            key = await self._key_of(stored.key_id)
            now_us = self._clock.now_us()
            self._must_be_open(stored, now_us)
            more = used_since(stored.used, spent, "used")
            wanted = units if units is not None else plus(stored.holds, stored.used)
            holds = minus(wanted, spent)
            ends_us = now_us + ttl_s * _SECOND
            changes = {
                "holds": holds,
                "used": {**stored.used, **spent},
                "expires_at": utc_from_us(ends_us),
                "forget_at": utc_from_us(ends_us + REMEMBERED_US),
            }
            outcome = await self._change_hold(
                stored, key, HoldChange(stored.id or "", ends_us, holds, open=True), more, changes
            )
            if outcome is None:
                continue
            if not outcome.allowed:
                denied = exceeded(key, outcome, wanted)
                return as_reservation(denied, reservation_id, "open", charged=amounts(stored.used))
            answer = open_answer(key, reservation_id, admitted(key, outcome.statuses).limits, ends_us)
            return with_changes(answer, charged=amounts({**stored.used, **spent}))
        raise Unavailable("the reservation is being changed too quickly: try again")

    async def _end(self, id: str, units: dict[str, int] | None, state: State, context: Context | None) -> Reservation:
        for _ in range(MAX_KEY_ATTEMPTS):
            stored = await self._stored(id, context)
            if stored.state != "open":
                reported = stored.reported if stored.reported is not None else stored.used
                if stored.state == state and (units is None or same_amounts({**reported, **units}, stored.used)):
                    return await self._ended(stored)
                raise Conflict(ended_otherwise(stored.state, state))
            total = dict(stored.used) if units is None else {**stored.used, **units}
            self._must_be_open(stored, self._clock.now_us())
            key = await self._key_of(stored.key_id)
            more = {} if units is None else used_since(stored.used, units)
            outcome = await self._change_hold(
                stored,
                key,
                HoldChange(id, None, {}, open=True),
                more,
                {"used": total, "reported": stored.used, "state": state, "holds": {}},
            )
            if outcome is not None:
                answer = admitted(key, outcome.statuses)
                return as_reservation(answer, id, state, charged=amounts(total))
        raise Unavailable("the reservation is being changed too quickly: try again")

    async def _change_hold(
        self, stored: StoredReservation, key: KnownKey, hold: HoldChange, more: dict[str, int], changes: dict[str, Any]
    ) -> Outcome | None:
        """Commit a change of a reservation with what it charges; None if it, or the key, was changed meanwhile."""
        after = StoredReservation.__codec__.encode(stored.model_copy(update=changes))
        try:
            return await self._ledger.charge(
                key.metered,
                more,
                force=hold.ends_us is None,
                model=stored.model,
                route=stored.route,
                hold=hold,
                also=Put(NAME, stored.id or "", after, stored.version),
                count=1 if changes.get("state") == "settled" else 0,
            )
        except KeyChanged:
            self.cache.outdated(key)
        except (Conflict, AlreadyExists):
            pass  # someone else changed the reservation: it is read again, and says what happened
        except NotFound:
            # Another node has ended it, or its time is over by the account's clock, which may be ahead of this node's.
            if (await self._stored(stored.id or "", None)).version == stored.version:
                raise
        return None

    async def _stored(self, id: str, context: Context | None) -> StoredReservation:
        stored = await self._database.get_or_none(system_context(), StoredReservation, id)
        if stored is None or not may_see(context, stored.tenant):
            raise NotFound(f"there is no reservation {id[:64]!r}")
        return stored

    @staticmethod
    def _must_be_open(stored: StoredReservation, now_us: int) -> None:
        if stored.state != "open":
            raise Conflict(f"the reservation was {stored.state} before")
        if now_us >= us_from_utc(stored.expires_at):
            raise Conflict(f"the reservation ended at {stored.expires_at.isoformat()}: record what was used as usage")

    async def _ended(self, stored: StoredReservation) -> Reservation:
        key = await self._key_of(stored.key_id)
        statuses = await self._ledger.statuses(key.metered, self._clock.now_us())
        return as_reservation(admitted(key, statuses), stored.id, stored.state, charged=amounts(stored.used))


def _derived(actor: str, idempotency_key: str) -> str:
    """The id of a reservation that is made once for an actor's idempotency key, whichever key it is asked of."""
    text = f"{actor}\x00\x00{idempotency_key}"
    return "rsv_" + hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:40]


__all__ = ["DEFAULT_TTL_S", "MAX_TTL_S", "Reservations", "StoredReservation"]
