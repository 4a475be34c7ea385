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
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import cast

import msgspec

from ..clock import Clock
from ..context import Context, new_id, system_context, us_from_utc, utc_from_us
from ..database import Database, is_expired
from ..entities import Document, Entity, Index
from ..errors import AlreadyExists, Conflict, NotFound, StrongroomError
from ..journal import ChangeFeed
from ..limits import (
    Amount,
    HoldChange,
    HoldEnded,
    KeyChanged,
    Ledger,
    Metered,
    Outcome,
    Patience,
    Status,
    statuses_kept,
)
from ..limits.lease_manager import LOCAL
from ..limits.reserved_amounts import Place
from ..storage.port import Create, Operation, Put
from .cached_key import KnownKey
from .local_reservations import HeldReservations, together
from .reservation import (
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
from .token import Hasher
from .verification import (
    NOT_FOUND,
    LimitStatus,
    Reservation,
    Verification,
    admitted,
    cost_units,
    exceeded,
    limit_status,
    refused,
)
from .verifier import may_see

NAME = "reservations"
REMEMBERED_US = 86_400_000_000
"""How long after its end a reservation is remembered, so that what is done to it twice is done once."""
_SECOND = 1_000_000
_encode = msgspec.json.Encoder().encode
_decode_places = msgspec.json.Decoder(tuple[dict[str, Place], list[str]]).decode
NOWHERE = _encode(({}, [])).decode()
"""The `places` of a reservation that has ended."""
_log = logging.getLogger(__name__)


class StoredReservation(
    Entity, collection=NAME, scope="global", journalled=False, indexes=[Index("forget_at")], ttl="forget_at"
):
    """One durable reservation; amounts are in units. `request`: the fingerprint of the request that made it, where that
    had an idempotency key; then `memo` is where the limits stood once it was made. `asked` is what it was made for,
    `holds` what it holds, `used` what was used of it so far, `reported` what of that was told before it was settled.
    `places` says where it holds it, as JSON: {account id: a `Place` as a list}, and the ids of the quotas that would
    hold it, if there were such: of its key's groups, user and tenant. (None: it was made by the first release, and its
    accounts know its id.)"""

    key_id: str
    tenant: str
    request: str | None = None
    memo: bytes | None = None
    asked: dict[str, int] = {}
    holds: dict[str, int]
    used: dict[str, int] = {}
    reported: dict[str, int] | None = None
    places: str | None = None
    model: str | None = None
    route: str | None = None
    state: State = "open"
    expires_at: datetime
    forget_at: datetime

    def until(self, places: Mapping[str, Place], subjects: Sequence[str], ends_us: int) -> Document:
        """The document of this reservation once it holds these places until then, for a key of these subjects."""
        changes = {
            "places": _encode((places, [id for id in subjects if id not in places])).decode(),
            "expires_at": utc_from_us(ends_us),
            "forget_at": utc_from_us(ends_us + REMEMBERED_US),
        }
        return self.__codec__.encode(self.model_copy(update=changes))

    def held_where(self) -> tuple[dict[str, Place], list[str]]:
        """What it holds in each account; and the quotas that would hold it, if there were such."""
        return ({}, []) if self.places is None else _decode_places(self.places)

    @property
    def old_ends_us(self) -> int | None:
        """When it ends, if it was made by the first release."""
        return us_from_utc(self.expires_at) if self.places is None else None


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
        patience = Patience("the key is being changed too quickly to reserve its limits")
        while await patience.another():
            now_us = self._clock.now_us()
            key = await self.cache.find(text, now_us)
            if key is None or (tenant is not None and key.tenant != tenant):
                return as_reservation(NOT_FOUND)
            refusal = key.refusal(now_us, permission, ip, model, route)
            if refusal is not None:
                return as_reservation(refused(key, *refusal))
            if not await self.cache.is_current(key):
                continue
            if lending is not None and in_memory:
                ends_us = now_us + ttl_s * _SECOND
                held = lending.hold(key.metered, units, now_us, ends_us, key, model, route)
                if held is not None:
                    answer = held_answer(key, *held, "open", expires_at=utc_from_us(ends_us))
                    return with_uncounted(answer, key, cost)
            request = ("reserve", key.id, units, ttl_s, permission, ip, model, route, tenant)
            ends_at = utc_from_us(now_us + ttl_s * _SECOND)  # until it is decided, by the moments of its accounts
            stored = StoredReservation(
                id=new_id("rsv_") if idempotency_key is None else _derived(actor, idempotency_key),
                key_id=key.id,
                tenant=key.tenant,
                request=None if idempotency_key is None else calls.fingerprint(request),
                asked=units,
                holds=units,
                model=model,
                route=route,
                expires_at=ends_at,
                forget_at=ends_at,
            )
            async with self._turn(stored.id):
                once = None if idempotency_key is None else request
                made = await self._make(key, stored, ttl_s * _SECOND, now_us, once)
            if made is not None:
                return with_uncounted(made, key, cost)
        raise patience.over()

    async def _make(
        self,
        key: KnownKey,
        stored: StoredReservation,
        ttl_us: int,
        now_us: int,
        request: tuple[object, ...] | None,
    ) -> Reservation | None:
        """Commit a durable reservation, or answer what is known of the same one; None if the key, or another node's
        call for the same one, was faster. `request`: what is asked for, if that is to happen once."""
        version: int | None = None
        if request is not None:
            collection = StoredReservation.__collection__
            before = await self._database.load(system_context(), collection, stored.id)
            if before is not None and not is_expired(collection, before, utc_from_us(now_us)):
                made = cast(StoredReservation, StoredReservation.__codec__.decode(before))
                return await self._again(key, made, stored, now_us, request)
            version = before["version"] if before is not None else None
        decided_us = 0

        def write(places: Mapping[str, Place], ends_us: int) -> Operation:
            nonlocal decided_us
            decided_us = ends_us
            document = stored.until(places, key.subjects, ends_us)
            return Create(NAME, stored.id, document) if version is None else Put(NAME, stored.id, document, version)

        future = self._ledger.charge(
            key.metered,
            {},
            model=stored.model,
            route=stored.route,
            hold=HoldChange(stored.id, ttl_us, stored.holds, write, remembers=request is not None),
        )
        try:
            outcome = await asyncio.shield(future)
        except asyncio.CancelledError:
            if request is None:  # nobody will ever hear its id; one with an idempotency key can be asked for again
                future.add_done_callback(functools.partial(self._unheard, stored.id))
            raise
        except KeyChanged:
            self.cache.outdated(key)
            return None
        except (AlreadyExists, Conflict):
            return None  # another node's: it is read at the next attempt
        if outcome.allowed:
            return open_answer(key, stored.id, admitted(key, outcome.statuses).limits, decided_us)
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

    async def _again(
        self, key: KnownKey, before: StoredReservation, asked: StoredReservation, now_us: int, request: object
    ) -> Reservation:
        """The answer to a call that made this reservation before: the first answer, but with the state of the
        reservation now, since one that has ended holds nothing any more."""
        if before.request is not None:
            self._database.calls.compare(before.request, request)
        elif (before.asked, before.model, before.route) != (asked.asked, asked.model, asked.route):
            raise Conflict("the idempotency key was used for a different request: take a new one")
        limits: list[LimitStatus] = []
        if before.state == "open":
            limits = admitted(key, statuses_kept(key.metered, before.memo) or ()).limits
            places, _ = before.held_where()
            change = HoldChange(before.id, None, {}, _nothing, places, old_ends_us=before.old_ends_us)
            moments = await self._ledger.moments(list(places) or [before.key_id], now_us)
            ended_us = change.ended_us(moments)
            if ended_us is not None:
                raise HoldEnded(ended_us)
        answer = open_answer(key, before.id, limits, us_from_utc(before.expires_at))
        return with_changes(answer, state=before.state, charged=amounts(before.used))

    async def settle(
        self, reservation_id: str, cost: Mapping[str, Amount], *, context: Context | None = None
    ) -> Reservation:
        """End a reservation and charge what was used in all, whole, even if that is more than it held. The same again
        answers the same. Raises InvalidInput, NotFound (unknown, or another tenant's), Conflict (ended, or settled with
        other amounts: record what was used as usage)."""
        units = cost_units(cost)
        if reservation_id.startswith(LOCAL):
            answer = await self._settle_local(reservation_id, units, context)
        else:
            async with self._turn(reservation_id):
                answer = await self._end(reservation_id, units, "settled", context)
        return with_uncounted(answer, await self.cache.by_id(answer.key_id or ""), cost)

    async def release(self, reservation_id: str, *, context: Context | None = None) -> Reservation:
        """End a reservation and charge nothing but what was reported as used. The same again answers the same. Raises
        NotFound, Conflict (it was settled)."""
        if reservation_id.startswith(LOCAL):
            return await self._settle_local(reservation_id, None, context)
        async with self._turn(reservation_id):
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
        patience = Patience("the reservation is being changed too quickly")
        while await patience.another():
            stored = await self._stored(reservation_id, context)
            if stored.state != "open":
                raise Conflict(f"the reservation was {stored.state} before")
            key = await self._key_of(stored.key_id)
            more = used_since(stored.used, spent, "used")
            wanted = units if units is not None else plus(stored.holds, stored.used)
            after = stored.model_copy(update={"holds": minus(wanted, spent), "used": {**stored.used, **spent}})
            decided_us = 0

            def write(
                places: Mapping[str, Place], ends_us: int, after: StoredReservation = after, key: KnownKey = key
            ) -> Operation:
                nonlocal decided_us
                decided_us = ends_us
                return Put(NAME, after.id, after.until(places, key.subjects, ends_us), after.version)

            # It moves with its key: from now on it is held where the key is counted now.
            (before, missing), now = stored.held_where(), {part.id for part in key.metered.parts}
            left = await self._parts_of([id for id in before if id not in now], (), None)
            entered = frozenset(now.difference(before, missing)) if before else frozenset[str]()
            change = HoldChange(
                stored.id, ttl_s * _SECOND, after.holds, write, before, frozenset(part.id for part in left), entered,
                stored.old_ends_us,
            )  # fmt: skip
            outcome = await self._change_hold(stored, key, together([*key.metered.parts, *left], key), change, more)
            if outcome is None:
                continue
            if not outcome.allowed:
                denied = exceeded(key, outcome, wanted)
                return as_reservation(denied, reservation_id, "open", charged=amounts(stored.used))
            answer = open_answer(key, reservation_id, admitted(key, outcome.statuses).limits, decided_us)
            return with_changes(answer, charged=amounts(after.used))
        raise patience.over()

    async def _end(self, id: str, units: dict[str, int] | None, state: State, context: Context | None) -> Reservation:
        patience = Patience("the reservation is being changed too quickly")
        while await patience.another():
            stored = await self._stored(id, context)
            key = await self.cache.by_id(stored.key_id)
            if stored.state != "open":
                reported = stored.reported if stored.reported is not None else stored.used
                if stored.state == state and (units is None or same_amounts({**reported, **units}, stored.used)):
                    statuses = await self._ledger.statuses(key.metered, self._clock.now_us()) if key is not None else ()
                    return self._ended(stored, key, statuses)
                raise Conflict(ended_otherwise(stored.state, state))
            total = dict(stored.used) if units is None else {**stored.used, **units}
            more = {} if units is None else used_since(stored.used, units)
            changes = {"used": total, "reported": stored.used, "state": state, "holds": {}, "places": NOWHERE}
            after = stored.model_copy(update=changes)

            def write(places: Mapping[str, Place], ends_us: int, after: StoredReservation = after) -> Operation:
                return Put(NAME, after.id, StoredReservation.__codec__.encode(after), after.version)

            # It is charged where it is held, whatever the key is counted on now.
            places, missing = stored.held_where()
            if stored.places is None and key is not None:
                parts = list(key.metered.parts)
            else:
                parts = await self._parts_of(places, missing, key)
            if not parts:
                try:
                    await self._database.commit_counters([write({}, 0)], self._clock.now_us())
                except (Conflict, NotFound):
                    continue
                return self._ended(after, key, ())
            change = HoldChange(id, None, {}, write, places, old_ends_us=stored.old_ends_us)
            settled = 1 if units is not None else 0
            outcome = await self._change_hold(stored, key, together(parts, key), change, more, settled)
            if outcome is not None:
                return self._ended(after, key, outcome.statuses)
        raise patience.over()

    async def _change_hold(
        self,
        stored: StoredReservation,
        key: KnownKey | None,
        metered: Metered,
        hold: HoldChange,
        more: dict[str, int],
        count: int = 0,
    ) -> Outcome | None:
        """Commit a change of a reservation with what it charges; None if it, or the key, was changed meanwhile."""
        ends = hold.ttl_us is None
        try:
            return await self._ledger.charge(
                metered,
                more,
                force=ends,
                model=stored.model,
                route=stored.route,
                hold=hold,
                count=count,
            )
        except KeyChanged:
            if key is not None:
                self.cache.outdated(key)
        except HoldEnded:  # or another node has extended or ended it
            if (await self._stored(stored.id, None)).version == stored.version:
                raise
        except (Conflict, AlreadyExists, NotFound):
            pass  # someone else changed the reservation: it is read again, and says what happened
        return None

    async def _stored(self, id: str, context: Context | None) -> StoredReservation:
        stored = await self._database.get_or_none(system_context(), StoredReservation, id)
        if stored is None or not may_see(context, stored.tenant):
            raise NotFound(f"there is no reservation {id[:64]!r}")
        return stored

    @staticmethod
    def _ended(stored: StoredReservation, key: KnownKey | None, statuses: Sequence[Status]) -> Reservation:
        if key is not None:
            answer = admitted(key, statuses)
        else:  # it was removed for good
            limits = [limit_status(status) for status in statuses]
            answer = Verification(True, "VALID", stored.key_id, stored.tenant, limits=limits)
        return as_reservation(answer, stored.id, stored.state, charged=amounts(stored.used))


def _nothing(places: Mapping[str, Place], ends_us: int) -> Operation:
    raise AssertionError("nothing is decided")


def _derived(actor: str, idempotency_key: str) -> str:
    """The id of a reservation that is made once for an actor's idempotency key, whichever key it is asked of."""
    text = f"{actor}\x00\x00{idempotency_key}"
    return "rsv_" + hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:40]


__all__ = ["DEFAULT_TTL_S", "MAX_TTL_S", "Reservations", "StoredReservation"]
