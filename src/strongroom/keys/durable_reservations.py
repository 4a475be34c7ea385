"""Durable reservations: each is a document, and the usage of each subject contains its hold.

Any node can settle a durable reservation, and it survives every process.
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

from ..access import may_see
from ..clock import Clock
from ..context import Context, new_id, system_context, us_from_utc, utc_from_us
from ..database import Database
from ..entities import Document, Entity, Index, is_expired
from ..errors import AlreadyExists, Conflict, NotFound, StrongroomError
from ..limits import (
    AdmissionDecision,
    Backoff,
    HoldChange,
    HoldEnded,
    KeyChanged,
    Ledger,
    LimitStatus,
    Status,
    Subjects,
    limit_status,
    statuses_kept,
)
from ..limits.reserved_amounts import ReservedPlace
from ..storage.port import Create, Operation, Put
from .cache import KeyCache
from .cached_key import CachedKey
from .reservation import (
    State,
    Turns,
    amounts,
    as_reservation,
    ended_otherwise,
    minus,
    open_answer,
    plus,
    same_amounts,
    subjects_of_ids,
    together,
    used_since,
    with_changes,
)
from .verification import KeyUse, Reservation, Verification, admitted, exceeded

NAME = "reservations"
REMEMBERED_US = 86_400_000_000
"""How long an ended reservation is kept, so that a repeated call on it happens once."""
_SECOND = 1_000_000
_encode = msgspec.json.Encoder().encode
_decode_places = msgspec.json.Decoder(tuple[dict[str, ReservedPlace], list[str]]).decode
NOWHERE = _encode(({}, [])).decode()
"""The `places` of a reservation that has ended."""
_log = logging.getLogger(__name__)


class StoredReservation(
    Entity, collection=NAME, scope="global", journalled=False, indexes=[Index("forget_at")], ttl="forget_at"
):
    """One durable reservation; amounts are in units. `request`: the fingerprint of the request that made it, if that
    had an idempotency key; `memo` is then the state of the limits after it. `asked`: the amounts that it was made for;
    `holds`: the amounts that it holds; `used`: all that was used so far; `reported`: the part of `used` that was
    reported before it was settled. `places`: where it holds them, as JSON: {subject id: a `Place` as a list}, and the
    ids of quotas that did not exist: of its key's groups, user and tenant. (None: it was made by the first release, and
    its subjects know its id.)"""

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

    def until(self, places: Mapping[str, ReservedPlace], subjects: Sequence[str], ends_us: int) -> Document:
        """The document of this reservation when it holds these places until then; `quota_ids` are those of its key."""
        changes = {
            "places": _encode((places, [id for id in subjects if id not in places])).decode(),
            "expires_at": utc_from_us(ends_us),
            "forget_at": utc_from_us(ends_us + REMEMBERED_US),
        }
        return self.__codec__.encode(self.model_copy(update=changes))

    def held_where(self) -> tuple[dict[str, ReservedPlace], list[str]]:
        """What it holds of each subject, and the ids of the quotas that did not exist."""
        return ({}, []) if self.places is None else _decode_places(self.places)

    @property
    def old_ends_us(self) -> int | None:
        """When it ends, for a reservation of the first release."""
        return us_from_utc(self.expires_at) if self.places is None else None


class DurableReservations:
    """The stored reservations: any process can change and end them."""

    def __init__(self, database: Database, cache: KeyCache, ledger: Ledger, clock: Clock) -> None:
        self._database = database
        self._cache = cache
        self._ledger = ledger
        self._clock = clock
        self._turns = Turns()
        self._releasing: set[asyncio.Task[None]] = set()

    async def make(
        self, key: CachedKey, use: KeyUse, ttl_s: int, now_us: int, idempotency_key: str | None, actor: str
    ) -> Reservation | None:
        """A reservation of a key that may be used, or the refusal of its limits. None: the key was changed meanwhile,
        or another node made the same reservation. Try again."""
        request = None
        if idempotency_key is not None:
            asked = (use.permission, use.address, use.model, use.route, use.tenant)
            request = ("reserve", key.id, use.units, ttl_s, *asked)
        ends_at = utc_from_us(now_us + ttl_s * _SECOND)  # until it is decided, by the moments of its subjects
        stored = StoredReservation(
            id=new_id("rsv_") if idempotency_key is None else _derived(actor, idempotency_key),
            key_id=key.id,
            tenant=key.tenant,
            request=None if request is None else self._database.calls.fingerprint(request),
            asked=use.units,
            holds=use.units,
            model=use.model,
            route=use.route,
            expires_at=ends_at,
            forget_at=ends_at,
        )
        async with self._turns.of(stored.id):
            return await self._make(key, stored, ttl_s * _SECOND, now_us, request)

    async def _make(
        self,
        key: CachedKey,
        stored: StoredReservation,
        ttl_us: int,
        now_us: int,
        request: tuple[object, ...] | None,
    ) -> Reservation | None:
        """Commit a reservation, or answer from the reservation that the same call made before. `request`: what the call
        asks for, if it has an idempotency key."""
        version: int | None = None
        if request is not None:
            collection = StoredReservation.__collection__
            before = await self._database.load(system_context(), collection, stored.id)
            if before is not None and not is_expired(collection, before, utc_from_us(now_us)):
                made = cast(StoredReservation, StoredReservation.__codec__.decode(before))
                return await self._again(key, made, stored, now_us, request)
            version = before["version"] if before is not None else None
        decided_us = 0

        def write(places: Mapping[str, ReservedPlace], ends_us: int) -> Operation:
            nonlocal decided_us
            decided_us = ends_us
            document = stored.until(places, key.quota_ids, ends_us)
            return Create(NAME, stored.id, document) if version is None else Put(NAME, stored.id, document, version)

        future = self._ledger.admit(
            key.subjects,
            {},
            model=stored.model,
            route=stored.route,
            hold=HoldChange(stored.id, ttl_us, stored.holds, write, remembers=request is not None),
        )
        try:
            outcome = await asyncio.shield(future)
        except asyncio.CancelledError:
            if request is None:  # nobody got its id, and without an idempotency key nobody can ask again
                future.add_done_callback(functools.partial(self._unheard, stored.id))
            raise
        except KeyChanged:
            self._cache.outdated(key)
            return None
        except (AlreadyExists, Conflict):
            return None  # another node made it: the next attempt reads it
        if outcome.allowed:
            return open_answer(key, stored.id, admitted(key, outcome.statuses).limits, decided_us)
        return as_reservation(exceeded(key, outcome, stored.holds))

    def _unheard(self, id: str, future: asyncio.Future[AdmissionDecision]) -> None:
        """Release a reservation whose caller was cancelled while it was made, instead of holding it until it
        expires."""
        if not future.cancelled() and future.exception() is None and future.result().allowed:
            task = asyncio.get_running_loop().create_task(self._release_unheard(id))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _release_unheard(self, id: str) -> None:
        try:
            await self.settle(id, None, None)
        except StrongroomError as error:
            _log.info("a reservation whose caller was cancelled could not be released, it will expire: %s", error)

    async def _again(
        self, key: CachedKey, before: StoredReservation, asked: StoredReservation, now_us: int, request: object
    ) -> Reservation:
        """The answer to a call that made this reservation before: the first answer, with the current state of the
        reservation."""
        if before.request is not None:
            self._database.calls.compare(before.request, request)
        elif (before.asked, before.model, before.route) != (asked.asked, asked.model, asked.route):
            raise Conflict("the idempotency key was used for a different request: take a new one")
        limits: list[LimitStatus] = []
        if before.state == "open":
            limits = admitted(key, statuses_kept(key.subjects, before.memo) or ()).limits
            places, _ = before.held_where()
            change = HoldChange(before.id, None, {}, _nothing, places, old_ends_us=before.old_ends_us)
            moments = await self._ledger.moments(list(places) or [before.key_id], now_us)
            ended_us = change.ended_us(moments)
            if ended_us is not None:
                raise HoldEnded(ended_us)
        answer = open_answer(key, before.id, limits, us_from_utc(before.expires_at))
        return with_changes(answer, state=before.state, charged=amounts(before.used))

    async def settle(self, id: str, units: dict[str, int] | None, context: Context | None) -> Reservation:
        """End a reservation and charge these units in all; None: release it."""
        async with self._turns.of(id):
            return await self._end(id, units, "released" if units is None else "settled", context)

    async def extend(
        self, id: str, ttl_s: int, units: dict[str, int] | None, used: dict[str, int], context: Context | None
    ) -> Reservation:
        """Let a reservation go on for `ttl_s` from now and hold these units in all (None: unchanged). `used`: all that
        was used of it so far."""
        async with self._turns.of(id):
            return await self._extend(id, ttl_s, units, used, context)

    async def _extend(
        self,
        reservation_id: str,
        ttl_s: int,
        units: dict[str, int] | None,
        spent: dict[str, int],
        context: Context | None,
    ) -> Reservation:
        backoff = Backoff("the reservation is being changed too quickly")
        while await backoff.attempt():
            stored = await self._stored(reservation_id, context)
            if stored.state != "open":
                raise Conflict(f"the reservation was {stored.state} before")
            key = await self._cache.by_id(stored.key_id)
            if key is None:
                raise NotFound("the key of this reservation was removed")
            more = used_since(stored.used, spent, "used")
            wanted = units if units is not None else plus(stored.holds, stored.used)
            after = stored.model_copy(update={"holds": minus(wanted, spent), "used": {**stored.used, **spent}})
            decided_us = 0

            def write(
                places: Mapping[str, ReservedPlace],
                ends_us: int,
                after: StoredReservation = after,
                key: CachedKey = key,
            ) -> Operation:
                nonlocal decided_us
                decided_us = ends_us
                return Put(NAME, after.id, after.until(places, key.quota_ids, ends_us), after.version)

            # It moves with its key: from now on it is held where the key is counted.
            (before, missing), now = stored.held_where(), {subject.id for subject in key.subjects.all}
            left = await subjects_of_ids(self._cache, [id for id in before if id not in now], (), None)
            entered = frozenset(now.difference(before, missing)) if before else frozenset[str]()
            change = HoldChange(
                stored.id, ttl_s * _SECOND, after.holds, write, before, frozenset(subject.id for subject in left),
                entered, stored.old_ends_us,
            )  # fmt: skip
            outcome = await self._change_hold(stored, key, together([*key.subjects.all, *left], key), change, more)
            if outcome is None:
                continue
            if not outcome.allowed:
                denied = exceeded(key, outcome, wanted)
                return as_reservation(denied, reservation_id, "open", charged=amounts(stored.used))
            answer = open_answer(key, reservation_id, admitted(key, outcome.statuses).limits, decided_us)
            return with_changes(answer, charged=amounts(after.used))
        raise backoff.exhausted()

    async def _end(self, id: str, units: dict[str, int] | None, state: State, context: Context | None) -> Reservation:
        backoff = Backoff("the reservation is being changed too quickly")
        while await backoff.attempt():
            stored = await self._stored(id, context)
            key = await self._cache.by_id(stored.key_id)
            if stored.state != "open":
                reported = stored.reported if stored.reported is not None else stored.used
                if stored.state == state and (units is None or same_amounts({**reported, **units}, stored.used)):
                    statuses = (
                        await self._ledger.statuses(key.subjects, self._clock.now_us()) if key is not None else ()
                    )
                    return self._ended(stored, key, statuses)
                raise Conflict(ended_otherwise(stored.state, state))
            total = dict(stored.used) if units is None else {**stored.used, **units}
            more = {} if units is None else used_since(stored.used, units)
            changes = {"used": total, "reported": stored.used, "state": state, "holds": {}, "places": NOWHERE}
            after = stored.model_copy(update=changes)

            def write(places: Mapping[str, ReservedPlace], ends_us: int, after: StoredReservation = after) -> Operation:
                return Put(NAME, after.id, StoredReservation.__codec__.encode(after), after.version)

            # It is charged where it is held, even if the key is counted elsewhere now.
            places, missing = stored.held_where()
            if stored.places is None and key is not None:
                subjects = list(key.subjects.all)
            else:
                subjects = await subjects_of_ids(self._cache, places, missing, key)
            if not subjects:
                try:
                    await self._database.commit_counters([write({}, 0)], self._clock.now_us())
                except (Conflict, NotFound):
                    continue
                return self._ended(after, key, ())
            change = HoldChange(id, None, {}, write, places, old_ends_us=stored.old_ends_us)
            settled = 1 if units is not None else 0
            outcome = await self._change_hold(stored, key, together(subjects, key), change, more, settled)
            if outcome is not None:
                return self._ended(after, key, outcome.statuses)
        raise backoff.exhausted()

    async def _change_hold(
        self,
        stored: StoredReservation,
        key: CachedKey | None,
        subjects: Subjects,
        hold: HoldChange,
        more: dict[str, int],
        count: int = 0,
    ) -> AdmissionDecision | None:
        """Commit a change of a reservation and what it charges. None: it, or the key, was changed meanwhile."""
        ends = hold.ttl_us is None
        try:
            return await self._ledger.admit(
                subjects,
                more,
                force=ends,
                model=stored.model,
                route=stored.route,
                hold=hold,
                count=count,
            )
        except KeyChanged:
            if key is not None:
                self._cache.outdated(key)
        except HoldEnded:  # or another node has extended or ended it
            if (await self._stored(stored.id, None)).version == stored.version:
                raise
        except (Conflict, AlreadyExists, NotFound):
            pass  # another call changed the reservation: read it again
        return None

    async def _stored(self, id: str, context: Context | None) -> StoredReservation:
        stored = await self._database.get_or_none(system_context(), StoredReservation, id)
        if stored is None or not may_see(context, stored.tenant):
            raise NotFound(f"there is no reservation {id[:64]!r}")
        if self._database.writes.usage_closed:
            self._database.writes.check_usage(stored.tenant)
        return stored

    @staticmethod
    def _ended(stored: StoredReservation, key: CachedKey | None, statuses: Sequence[Status]) -> Reservation:
        if key is not None:
            answer = admitted(key, statuses)
        else:  # the key was removed for good
            limits = [limit_status(status) for status in statuses]
            answer = Verification(True, "VALID", stored.key_id, stored.tenant, limits=limits)
        return as_reservation(answer, stored.id, stored.state, charged=amounts(stored.used))


def _nothing(places: Mapping[str, ReservedPlace], ends_us: int) -> Operation:
    raise AssertionError("nothing is decided")


def _derived(actor: str, idempotency_key: str) -> str:
    """The id of the one reservation for an actor's idempotency key, of any API key."""
    text = f"{actor}\x00\x00{idempotency_key}"
    return "rsv_" + hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:40]


__all__ = ["DurableReservations", "StoredReservation"]
