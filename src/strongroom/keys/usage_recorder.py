"""Records usage of keys after it happened, over a limit too: one event, or many in one batch."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from ..access import may_see, unique_actor
from ..clock import Clock
from ..context import Context, system_context, us_from_utc, utc_from_us
from ..cooperative import Slices
from ..database import Database, IdempotentCall, IdempotentOperation
from ..database.canonical import canonical
from ..entities import is_expired
from ..errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    NotFound,
    Problem,
    StrongroomError,
    TooManyRequests,
    Unavailable,
)
from ..limits import AdmissionDecision, Amount, Backoff, KeyChanged, Ledger
from ..storage.port import Put
from .cache import KeyCache
from .cached_key import CachedKey
from .verification import Verification, admitted, cost_units

MAX_AHEAD_US = 60_000_000
"""A use may be this far ahead of this clock, since clocks differ; it counts as used now."""
NOW = 2**63


@dataclass(frozen=True, slots=True)
class Usage:
    """One use of a key, which is given by its secret or its id. `at`: when it was used (default: now)."""

    cost: Mapping[str, Amount]
    key: str | None = None
    key_id: str | None = None
    model: str | None = None
    route: str | None = None
    idempotency_key: str | None = None
    at: datetime | None = None


@dataclass(slots=True)
class Sum:
    """The sum of several events of one key. `event` is the first event, `items` are their numbers in the batch."""

    key: CachedKey
    units: dict[str, int]
    count: int
    event: Usage
    items: list[int] = field(default_factory=list)
    at_us: int | None = None


class UsageRecorder:
    """Records the usage of the keys of one store."""

    def __init__(self, database: Database, cache: KeyCache, ledger: Ledger, clock: Clock) -> None:
        self._database = database
        self._cache = cache
        self._ledger = ledger
        self._clock = clock

    async def record(
        self,
        *,
        key: str | None = None,
        key_id: str | None = None,
        cost: Mapping[str, Amount],
        model: str | None = None,
        route: str | None = None,
        idempotency_key: str | None = None,
        at: datetime | None = None,
        context: Context | None = None,
    ) -> Verification:
        """Count a use, over a limit too, on a key given by its secret or its id, also on a disabled or expired key. It
        is durable after the return, and counted once for one idempotency key (within a day).

        `at`: when it was used (default: now). It counts in the windows that still include that moment, and in the
        totals. Raises NotFound. Raises InvalidInput for a moment in the future, and for a use that limits concern where
        no window includes its moment any more.
        """
        if (key is None) == (key_id is None):
            raise InvalidInput([Problem("key", "expected exactly one of key and key_id")])
        units = cost_units(cost)
        at_us = self._moment_of(at, "at")
        backoff = Backoff("the key is being changed too quickly to record its usage")
        while await backoff.attempt():
            known = await self._key(key, key_id)
            if known is None or not may_see(context, known.tenant):
                raise NotFound("there is no such key")
            if self._database.writes.usage_closed:
                self._database.writes.check_usage(known.tenant)
            actor = unique_actor(context)
            once = self._once(known, idempotency_key, actor, _request(units, model, route, at_us))
            try:
                outcome = await self._ledger.admit(
                    known.subjects, units, force=True, once=once, model=model, route=route, at_us=at_us
                )
            except KeyChanged:
                self._cache.outdated(known)
                continue
            return admitted(known, outcome.statuses, units)
        raise backoff.exhausted()

    async def record_many(
        self, events: Sequence[Usage], *, idempotency_key: str | None = None, context: Context | None = None
    ) -> list[Verification]:
        """Count a batch of uses as `record` counts one: durable after the return, with one debit for each key instead
        of each event. One answer for each key, in the order of their first events. With an idempotency key, a repeated
        batch counts nothing twice (within a day).

        Raises InvalidInput with every problem of every event, unknown keys included, and Conflict if the idempotency
        key was used for other events: then nothing is counted. If single events cannot be counted (their idempotency
        key was used before, no window includes their moment, the store is out of reach), it raises their error. The
        error's `details` name the numbers of the events that were `counted` and that `failed`. An event that failed as
        `unavailable` may have been counted: send events with idempotency keys again.
        """
        with self._ledger.announced():
            sums = await self._sums(events, context)
        actor = unique_actor(context)
        if idempotency_key is not None:
            await self._claim(idempotency_key, actor, sums)
        answers: dict[str, Verification | None] = dict.fromkeys(one.key.id for one in sums)
        counted: list[int] = []
        failed: list[tuple[Sum, StrongroomError]] = []
        # Anchored windows begin with the earliest use.
        sums.sort(key=lambda one: NOW if one.at_us is None else one.at_us)
        backoff = Backoff("the keys are being changed too quickly to record their usage")
        while await backoff.attempt():
            # All are submitted before the first is awaited, without a task for each, so that they share a commit.
            charged: list[tuple[Sum, asyncio.Future[AdmissionDecision]]] = []
            changed = []
            slices = Slices()
            try:
                with self._ledger.announced():
                    for one in sums:
                        await slices.pause()
                        charged.append((one, self._charge_sum(one, actor, idempotency_key)))
                for one, future in charged:
                    try:
                        outcome = future.result() if future.done() else await future
                    except KeyChanged:
                        self._cache.outdated(one.key)
                        changed.append(one)
                    except StrongroomError as error:
                        failed.append((one, error))
                    else:
                        answers[one.key.id] = _joined(
                            answers[one.key.id], admitted(one.key, outcome.statuses, one.units)
                        )
                        counted += one.items
            except BaseException:
                for _, future in charged:
                    future.add_done_callback(_seen)
                raise
            if not changed:
                break
            sums = []
            for one in changed:
                again = await self._cache.by_id(one.key.id)
                if again is not None:  # else the key and its usage were removed meanwhile
                    one.key = again
                    sums.append(one)
        else:
            failed += [(one, backoff.exhausted()) for one in sums]
        if failed:
            raise _partly(counted, failed)
        return [answer for answer in answers.values() if answer is not None]

    async def _key(self, text: str | None, id: str | None) -> CachedKey | None:
        """The key with this secret or id; None for a deleted key."""
        if text is not None:
            key = await self._cache.find(text, self._clock.now_us())
        else:
            key = await self._cache.by_id(id or "")
        return None if key is None or key.deleted else key

    def _once(self, key: CachedKey, name: str | None, actor: str, request: object) -> IdempotentOperation | None:
        """Makes a use count once for an actor's idempotency key, for any API key."""
        return None if name is None else self._database.once("usage", actor, name, ("usage", key.id, request))

    async def _claim(self, name: str, actor: str, sums: Sequence[Sum]) -> None:
        """Bind an idempotency key to these events, before anything is counted. Raises Conflict if it is bound to other
        events, even if those were not counted."""
        said = sorted((one.key.id, sorted(one.units.items()), *_place(one.event), one.count) for one in sums)
        collection = IdempotentCall.__collection__
        backoff = Backoff("the idempotency key is being used too often at once")
        while await backoff.attempt():
            now_us = self._clock.now_us()
            once = self._database.once("usage:batch", actor, name, ("usage:batch", said))
            operation = once.operation
            stored = await self._database.load(system_context(), collection, once.id)
            if stored is not None and is_expired(collection, stored, utc_from_us(now_us)):
                operation = Put(collection.name, once.id, operation.document, stored["version"])
            elif stored is not None:
                if stored["fingerprint"] not in once.alike:
                    raise Conflict("the idempotency key was used for a different request: take a new one")
                return
            try:
                await self._database.commit_counters([operation], now_us)
            except (AlreadyExists, Conflict):
                continue  # the same batch was sent twice at once: compare with the other
            return
        raise backoff.exhausted()

    def _moment_of(self, at: datetime | None, path: str) -> int | None:
        """The moment of a use in microseconds. Raises InvalidInput."""
        if at is None:
            return None
        problem = None
        if at.utcoffset() is None:
            problem = "expected a time with its time zone, such as 2026-05-01T12:00:00Z"
        elif us_from_utc(at) > self._clock.now_us() + MAX_AHEAD_US:
            now = utc_from_us(self._clock.now_us()).isoformat()
            problem = f"found {at.isoformat()}, expected a time that is not ahead of now, which is {now}"
        if problem is not None:
            raise InvalidInput([Problem(path, problem)])
        return us_from_utc(at)

    async def _sums(self, events: Sequence[Usage], context: Context | None) -> list[Sum]:
        """The events added up by key, model and route. Events with an idempotency key stay apart."""
        problems: list[Problem] = []
        missing: list[Problem] = []
        known: dict[tuple[str | None, str | None], CachedKey | None] = {}
        sums: dict[tuple[str, ...], Sum] = {}
        named: dict[str, tuple[Any, ...]] = {}
        now_us = self._clock.now_us()
        texts = await self._cache.unknown((one.key for one in events if one.key is not None), now_us)
        ids = await self._cache.unknown_ids(one.key_id for one in events if one.key_id is not None)
        slices = Slices()
        for number, event in enumerate(events):
            await slices.pause()
            try:
                units = cost_units(event.cost)
            except InvalidInput as error:
                problems += [Problem(f"items.{number}.{one.path}", one.message) for one in error.problems]
                continue
            name = (event.key, event.key_id)
            if (event.key is None) == (event.key_id is None):
                problems.append(Problem(f"items.{number}.key", "expected exactly one of key and key_id"))
                continue
            if event.key in texts or event.key_id in ids:
                known[name] = None
            key = known[name] if name in known else self._cache.remembered(event.key, now_us)
            if (key is None or key.deleted) and name not in known:
                key = await self._key(*name)
            known[name] = key
            if key is None or not may_see(context, key.tenant):
                missing.append(Problem(f"items.{number}.key", "there is no such key"))
                continue
            if self._database.writes.usage_closed:
                self._database.writes.check_usage(key.tenant)
            try:
                at_us = self._moment_of(event.at, f"items.{number}.at")
            except InvalidInput as error:
                problems += error.problems
                continue
            place = (key.id, *_place(event))
            there = sums.get(place)
            if event.idempotency_key is not None:
                what = (key.id, event.model, event.route, units, at_us)
                if named.setdefault(event.idempotency_key, what) != what:
                    message = "is that of another record of this batch, which is another request"
                    problems.append(Problem(f"items.{number}.idempotency_key", message))
                    continue
            if there is None or event.idempotency_key is not None:
                sums[(*place, str(number)) if there is not None else place] = Sum(key, units, 1, event, [number], at_us)
                continue
            there.count += 1
            there.items.append(number)
            for resource, amount in units.items():
                there.units[resource] = there.units.get(resource, 0) + amount
        if problems or missing:
            raise InvalidInput(problems + missing)
        return list(sums.values())

    def _charge_sum(self, one: Sum, actor: str, batch: str | None) -> asyncio.Future[AdmissionDecision]:
        """Submit a sum to the ledger; `batch` is the idempotency key of the batch."""
        event, key = one.event, one.key
        name = event.idempotency_key
        if name is None and batch is not None:  # one key for each sum, independent of its number
            said = (batch, key.id, event.model, event.route, *(() if one.at_us is None else (one.at_us,)))
            name = hashlib.sha256(canonical(said)).hexdigest()
        once = None
        if name is not None:
            once = self._once(key, name, actor, _request(one.units, event.model, event.route, one.at_us))
        return self._ledger.admit(
            key.subjects,
            one.units,
            force=True,
            once=once,
            model=event.model,
            route=event.route,
            count=one.count,
            at_us=one.at_us,
        )


def _request(units: Mapping[str, int], model: str | None, route: str | None, at_us: int | None) -> object:
    """The request that the idempotency key of a record stands for."""
    return (units, model, route) if at_us is None else (units, model, route, at_us)


def _place(event: Usage) -> tuple[str, str, str, str]:
    """The fields that keep an event apart from other events of its key."""
    at = str(us_from_utc(event.at)) if event.at is not None else ""
    return event.model or "", event.route or "", event.idempotency_key or "", at


def _joined(before: Verification | None, answer: Verification) -> Verification:
    """The answer for a key after one more of its sums, with the uncounted resources of all sums."""
    if before is None or not before.uncounted:
        return answer
    return msgspec.structs.replace(answer, uncounted=list(dict.fromkeys((*before.uncounted, *answer.uncounted))))


def _partly(counted: Sequence[int], failed: Sequence[tuple[Sum, StrongroomError]]) -> StrongroomError:
    """The error of a batch of which some events could not be counted. If some events can be tried again, it has the
    class of their error."""
    groups: dict[tuple[str, str], list[int]] = {}
    for one, error in failed:
        groups.setdefault((error.code, error.message), []).extend(one.items)
    items = sum(len(numbers) for numbers in groups.values())
    first = next((error for _, error in failed if isinstance(error, Unavailable | TooManyRequests)), failed[0][1])
    details = {
        "counted": sorted(counted),
        "failed": [
            {"code": code, "message": message, "items": sorted(numbers)} for (code, message), numbers in groups.items()
        ],
    }
    message = f"{items} of {items + len(counted)} records were not counted: {first.message}"
    if isinstance(first, InvalidInput):
        problems = [
            Problem(f"items.{number}.{problem.path}", problem.message)
            for one, error in failed
            if isinstance(error, InvalidInput)
            for problem in error.problems
            for number in one.items
        ]
        first = InvalidInput(problems, message)
        first.details.update(details)
        return first
    return type(first)(message, **{**first.details, **details})


def _seen(future: asyncio.Future[AdmissionDecision]) -> None:
    """Look at the outcome of an abandoned charge: asyncio would log an error that nobody retrieved."""
    if not future.cancelled():
        future.exception()


__all__ = ["Sum", "Usage", "UsageRecorder"]
