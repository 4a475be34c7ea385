"""Refunds: a verification that is taken back, for a request that was charged at its arrival and refused later."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from ..clock import Clock
from ..limits import Amount, Backoff, KeyChanged, Ledger, Subject, Subjects
from .cache import KeyCache
from .verification import NOT_FOUND, Verification, key_use
from .verifier import Verifier


class Charged(NamedTuple):
    """The answer to a verification, and what a refund needs: the units, the moment, the model and the route."""

    answer: Verification
    units: Mapping[str, int]
    moment_us: int
    model: str | None = None
    route: str | None = None


class Refunds:
    """Verifies keys so that the charge can be refunded, and refunds it."""

    def __init__(self, verifier: Verifier, cache: KeyCache, ledger: Ledger, clock: Clock) -> None:
        self._verifier = verifier
        self._cache = cache
        self._ledger = ledger
        self._clock = clock

    async def verify_charged(
        self,
        text: str,
        *,
        cost: Mapping[str, Amount] | None = None,
        permission: str | None = None,
        ip: str | None = None,
        model: str | None = None,
        route: str | None = None,
    ) -> Charged:
        """As `verify`. `undo` takes the result."""
        use = key_use(cost, permission, ip, model, route)
        backoff = Backoff("the key is being changed too quickly to verify it")
        while await backoff.attempt():
            now_us = self._clock.now_us()
            started = self._verifier.start_use(text, use)
            if isinstance(started, Verification):
                return Charged(started, use.units, now_us, model, route)
            if started is None:
                key = await self._cache.find(text, now_us)
                if key is None:
                    return Charged(NOT_FOUND, use.units, now_us)
                await self._cache.is_current(key)  # now it is in memory, and trusted
                continue
            with suppress(KeyChanged):
                await started.outcome
            answer = self._verifier.finish(started)
            if answer is not None:
                return Charged(answer, use.units, started.outcome.result().now_us, model, route)
        raise backoff.exhausted()

    async def undo(self, charged: Charged) -> None:
        """Refund a verification: its use, and its cost where a window still counts it. Call it once, and soon. After
        Unavailable the refund may have happened."""
        id = charged.answer.key_id
        if id is None or not charged.answer.valid:
            return
        backoff = Backoff("the key is being changed too quickly to take back what it was charged")
        while await backoff.attempt():
            key = await self._cache.by_id(id)
            if key is None:
                return  # its usage was removed with the key
            asked = {subject.id: subject.asked(charged.model, charged.route) for subject in key.subjects.all}
            limited = [subject for subject in key.subjects.all if asked[subject.id]]
            if limited:
                try:
                    await self._ledger.take_back(
                        _subjects(*limited), charged.units, charged.moment_us, charged.model, charged.route
                    )
                except KeyChanged:
                    self._cache.outdated(key)
                    continue
            for subject in key.subjects.all:
                if not asked[subject.id]:  # nothing limits this use: it is only counted, and perhaps not written yet
                    self._ledger.aggregate(
                        _subjects(subject), {name: -units for name, units in charged.units.items()}, -1
                    )
            return
        raise backoff.exhausted()


def _subjects(first: Subject, *others: Subject) -> Subjects:
    return Subjects(first.id, first.guard, first.compiled_limits, others, first.tenant)


__all__ = ["Charged", "Refunds"]
