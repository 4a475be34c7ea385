"""Recording what has happened: usage of keys after the fact, over a limit too, one event or many at once."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .canonical import canonical
from .context import Context
from .errors import InvalidInput, NotFound, Problem, Unavailable
from .fairness import Slices
from .knownkey import KnownKey
from .usage import KeyChanged, Outcome
from .verification import Verification, admitted, cost_units
from .verifier import MAX_KEY_ATTEMPTS, Verifier, may_see
from .windows import Amount


@dataclass(frozen=True, slots=True)
class Usage:
    """Something that a key was used for, given by its text or its id. `cost` is what was used."""

    cost: Mapping[str, Amount]
    key: str | None = None
    key_id: str | None = None
    model: str | None = None
    route: str | None = None
    idempotency_key: str | None = None


@dataclass(slots=True)
class Sum:
    """What several events of one key come to; `event` is the first of them."""

    key: KnownKey
    units: dict[str, int]
    count: int
    event: Usage


class Recorder(Verifier):
    """Verifies keys, and records what they were used for."""

    async def record(
        self,
        *,
        key: str | None = None,
        key_id: str | None = None,
        cost: Mapping[str, Amount],
        model: str | None = None,
        route: str | None = None,
        idempotency_key: str | None = None,
        context: Context | None = None,
    ) -> Verification:
        """Count what has happened, over a limit too, on a key given by its text or its id, disabled and expired ones as
        well. Durable once it returns; counted once for one idempotency key (within a day). Raises NotFound."""
        if (key is None) == (key_id is None):
            raise InvalidInput([Problem("key", "expected exactly one of key and key_id")])
        units = cost_units(cost)
        for _ in range(MAX_KEY_ATTEMPTS):
            known = await self._known_for(key, key_id)
            if known is None or not may_see(context, known.tenant):
                raise NotFound("there is no such key")
            actor = context.actor if context is not None else "system"
            once = self._charged_once("usage", known, idempotency_key, actor, (units, model, route))
            try:
                outcome = await self._ledger.charge(
                    known.metered, units, force=True, once=once, model=model, route=route
                )
            except KeyChanged:
                self.cache.outdated(known)
                continue
            return admitted(known, outcome.statuses)
        raise Unavailable("the key is being changed too quickly to record its usage: try again")

    async def record_many(
        self, events: Sequence[Usage], *, idempotency_key: str | None = None, context: Context | None = None
    ) -> list[Verification]:
        """Count much that has happened, as `record` does it for one: durable once it returns, in one debit for each key
        and not for each event. The answers are one for each key, in the order in which the keys come first. With an
        idempotency key the same events again count nothing twice (within a day).

        Raises InvalidInput with every problem of every event, unknown keys included: then nothing is counted. If it
        raises Unavailable some may be counted: events with idempotency keys can be sent again.
        """
        sums = await self._sums(events, context)
        actor = context.actor if context is not None else "system"
        answers: dict[str, Verification | None] = dict.fromkeys(one.key.id for one in sums)
        for _ in range(MAX_KEY_ATTEMPTS):
            # All are charged before any is waited for, without a task for each: so they share a commit.
            charged: list[tuple[Sum, asyncio.Future[Outcome]]] = []
            changed = []
            slices = Slices()
            try:
                for one in sums:
                    await slices.pause()
                    charged.append((one, self._charge_sum(one, actor, idempotency_key)))
                for one, future in charged:
                    try:
                        outcome = future.result() if future.done() else await future
                    except KeyChanged:
                        self.cache.outdated(one.key)
                        changed.append(one)
                    else:
                        answers[one.key.id] = admitted(one.key, outcome.statuses)
            except BaseException:
                for _, future in charged:
                    future.add_done_callback(_seen)
                raise
            if not changed:
                return [answer for answer in answers.values() if answer is not None]
            sums = []
            for one in changed:
                again = await self.cache.by_id(one.key.id)
                if again is not None:  # else it was removed meanwhile, and its usage with it
                    one.key = again
                    sums.append(one)
        raise Unavailable("the keys are being changed too quickly to record their usage: try again")

    async def _sums(self, events: Sequence[Usage], context: Context | None) -> list[Sum]:
        """The events added up by key, model and route; those that may be counted only once stay apart."""
        problems: list[Problem] = []
        missing: list[Problem] = []
        known: dict[tuple[str | None, str | None], KnownKey | None] = {}
        sums: dict[tuple[str, ...], Sum] = {}
        named: dict[str, tuple[Any, ...]] = {}
        now_us = self._clock.now_us()
        texts = await self.cache.unknown((one.key for one in events if one.key is not None), now_us)
        ids = await self.cache.unknown_ids(one.key_id for one in events if one.key_id is not None)
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
            key = known[name] if name in known else self.cache.remembered(event.key, now_us)
            if (key is None or key.deleted) and name not in known:
                key = await self._known_for(*name)
            known[name] = key
            if key is None or not may_see(context, key.tenant):
                missing.append(Problem(f"items.{number}.key", "there is no such key"))
                continue
            place = (key.id, event.model or "", event.route or "", event.idempotency_key or "")
            there = sums.get(place)
            if event.idempotency_key is not None:
                what = (key.id, event.model, event.route, units)
                if named.setdefault(event.idempotency_key, what) != what:
                    message = "is that of another record of this batch, which is another request"
                    problems.append(Problem(f"items.{number}.idempotency_key", message))
                    continue
            if there is None or event.idempotency_key is not None:
                sums[(*place, str(number)) if there is not None else place] = Sum(key, units, 1, event)
                continue
            there.count += 1
            for resource, amount in units.items():
                there.units[resource] = there.units.get(resource, 0) + amount
        if problems or missing:
            raise InvalidInput(problems + missing)
        return list(sums.values())

    def _charge_sum(self, one: Sum, actor: str, batch: str | None) -> asyncio.Future[Outcome]:
        """Have a sum charged; `batch` is the idempotency key of all of them."""
        event, key = one.event, one.key
        name = event.idempotency_key
        if name is None and batch is not None:  # one for each sum, whatever its number
            name = hashlib.sha256(canonical((batch, key.id, event.model, event.route))).hexdigest()
        once = self._charged_once("usage", key, name, actor, (one.units, event.model, event.route))
        return self._ledger.charge(
            key.metered, one.units, force=True, once=once, model=event.model, route=event.route, count=one.count
        )


def _seen(future: asyncio.Future[Outcome]) -> None:
    """What became of a charge that nobody waits for any more: asyncio complains of errors that nobody looks at."""
    if not future.cancelled():
        future.exception()


__all__ = ["Recorder", "Sum", "Usage"]
