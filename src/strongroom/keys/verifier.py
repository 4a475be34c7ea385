"""The verification trip: a key's secret → the key → may it be used now → its limits charged → the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ..clock import Clock
from ..cooperative import Slices
from ..database import Database, IdempotentOperation
from ..errors import TenantSuspended
from ..limits import AdmissionDecision, Amount, Backoff, KeyChanged, Ledger
from .cache import KeyCache
from .cached_key import CachedKey
from .verification import (
    NOT_FOUND,
    ONE_REQUEST,
    KeyUse,
    Verification,
    admitted,
    admitted_from,
    decided,
    key_use,
    usable,
)


class PendingVerification(NamedTuple):
    """A verification whose limits are being asked by a commit."""

    key: CachedKey
    units: dict[str, int]
    outcome: asyncio.Future[AdmissionDecision]


class Verifier:
    """Verifies the keys of one store, and charges their limits."""

    def __init__(self, database: Database, cache: KeyCache, ledger: Ledger, clock: Clock) -> None:
        self._database = database
        self._cache = cache
        self._ledger = ledger
        self._clock = clock
        self._writes = database.writes

    async def verify(
        self,
        text: str,
        *,
        cost: Mapping[str, Amount] | None = None,
        permission: str | None = None,
        ip: str | None = None,
        model: str | None = None,
        route: str | None = None,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        actor: str = "system",
        peek: bool = False,
    ) -> Verification:
        """Decide whether a key may be used now for this `cost` (default: one request). Debit all its limits or none:
        its own limits, and the quotas of its groups, its user and its tenant.

        The answer comes after the debit is durable, or was made from a limit lease, whose debit is durable. `model` and
        `route`: some limits count some models and routes only. `tenant`: keys of other tenants are NOT_FOUND. All calls
        of one actor with one idempotency key (within a day) debit once. `peek`: a dry run, which gives the same answer
        and counts nothing.

        Raises InvalidInput for an invalid cost or address, WritesOff while usage is turned off; never for a key.
        """
        use = key_use(cost, permission, ip, model, route, tenant)
        if peek:
            return await self._preview(text, use)
        if idempotency_key is None:
            started = self.start_use(text, use)
            if isinstance(started, Verification):
                return started
            if started is not None:
                answer = await self._finished(started)
                if answer is not None:
                    return answer
        backoff = Backoff("the key is being changed too quickly to verify it")
        while await backoff.attempt():
            now_us = self._clock.now_us()
            key = usable(self._allowed(await self._cache.find(text, now_us)), use, now_us)
            if isinstance(key, Verification):
                return key
            # A commit checks the key's version. A decision in memory has no such check.
            in_memory = self._ledger.lease_manager is not None or (not key.subjects.limited and idempotency_key is None)
            if in_memory and not await self._cache.is_current(key):
                continue
            started = self._ask_limits(key, use, now_us, self._once(key, use, idempotency_key, actor))
            if isinstance(started, Verification):
                return started
            answer = await self._finished(started)
            if answer is not None:
                return answer
        raise backoff.exhausted()

    async def _preview(self, text: str, use: KeyUse) -> Verification:
        """The answer that `verify` would give. Nothing is counted."""
        backoff = Backoff("the key is being changed too quickly to verify it")
        while await backoff.attempt():
            now_us = self._clock.now_us()
            key = usable(self._allowed(await self._cache.find(text, now_us)), use, now_us)
            if isinstance(key, Verification):
                return key
            if not await self._cache.is_current(key):
                continue
            if not key.subjects.limited:
                return admitted(key, (), use.units)
            return decided(key, await self._ledger.preview(key.subjects, use.units, use.model, use.route), use.units)
        raise backoff.exhausted()

    async def verify_many(self, asks: Sequence[Mapping[str, Any]]) -> list[Verification]:
        """Decide several verifications in this order, in one commit if possible. Each has the arguments of `verify`,
        the secret as `text`. Raises as `verify` does; then some may have been debited."""
        uses = [_use_of(ask) for ask in asks]
        unknown = await self._cache.unknown((ask["text"] for ask in asks), self._clock.now_us())
        slices = Slices()
        # One after the other: a decision in memory must not overtake a commit, and a dry run sees what came before it.
        if self._ledger.lease_manager is not None or any(ask.get("peek") for ask in asks):
            answers = []
            for ask, use in zip(asks, uses, strict=True):
                await slices.pause()
                answers.append(NOT_FOUND if ask["text"] in unknown else await self._verify_one(ask, use))
            return answers
        now_us = self._clock.now_us()
        known: dict[str, CachedKey | None] = {}
        for text in dict.fromkeys(ask["text"] for ask in asks):
            await slices.pause()
            known[text] = None if text in unknown else self._allowed(await self._cache.find(text, now_us))
        # Nothing is awaited from here to the last admission, so that they are decided in this order.
        both = zip(asks, uses, strict=True)
        started = [self._start_in_order(known[ask["text"]], use, ask, now_us) for ask, use in both]
        pending = [one.outcome for one in started if isinstance(one, PendingVerification)]
        await asyncio.gather(*pending, return_exceptions=True)
        answers = []
        for ask, one in zip(asks, started, strict=True):
            answer = self.finish(one) if isinstance(one, PendingVerification) else one
            answers.append(answer if answer is not None else await self.verify(**ask))
        return answers

    async def _verify_one(self, ask: Mapping[str, Any], use: KeyUse) -> Verification:
        """The answer to one of several verifications, whose use was checked."""
        if ask.get("idempotency_key") is None and not ask.get("peek"):
            started = self.start_use(ask["text"], use)
            answer = await self._finished(started) if isinstance(started, PendingVerification) else started
            if answer is not None:
                return answer
        return await self.verify(**ask)

    def _start_in_order(
        self, found: CachedKey | None, use: KeyUse, ask: Mapping[str, Any], now_us: int
    ) -> Verification | PendingVerification | None:
        """The answer, or the commit that decides it. None for a key without limits: it changes nothing for the
        others."""
        key = usable(found, use, now_us)
        if isinstance(key, Verification):
            return key
        idempotency_key = ask.get("idempotency_key")
        if not key.subjects.limited and idempotency_key is None:
            return None
        once = self._once(key, use, idempotency_key, ask.get("actor", "system"))
        return self._ask_limits(key, use, now_us, once)

    def start(
        self,
        text: str,
        *,
        cost: Mapping[str, Amount] | None = None,
        permission: str | None = None,
        ip: str | None = None,
        model: str | None = None,
        route: str | None = None,
        tenant: str | None = None,
    ) -> Verification | PendingVerification | None:
        """Verify without waiting, for a key that is in memory: the answer, or a pending verification for `finish`.
        None: nothing was done, call `verify`. Raises InvalidInput and WritesOff as `verify` does."""
        return self.start_use(text, key_use(cost, permission, ip, model, route, tenant))

    def start_use(self, text: str, use: KeyUse) -> Verification | PendingVerification | None:
        """As `start`, for a use that `key_use` has checked."""
        now_us = self._clock.now_us()
        found = self._cache.peek(text, now_us)
        if found is None:
            return None
        if self._writes.usage_closed:
            self._allowed(found)
        key = usable(found, use, now_us)
        if isinstance(key, Verification):
            return key
        return self._ask_limits(key, use, now_us)

    def _allowed(self, key: CachedKey | None) -> CachedKey | None:
        """The key. Raises WritesOff if the usage of its tenant's keys is turned off."""
        if self._writes.usage_closed:
            self._writes.check_usage(key.tenant if key is not None else None)
        return key

    def finish(self, pending: PendingVerification) -> Verification | None:
        """The answer to a pending verification whose commit is done. None: the key was changed meanwhile and nothing
        was charged, call `verify`. Raises TooManyRequests, Unavailable."""
        try:
            outcome = pending.outcome.result()
        except KeyChanged:
            self._cache.outdated(pending.key)
            return None
        return decided(pending.key, outcome, pending.units)

    async def _finished(self, pending: PendingVerification) -> Verification | None:
        """Wait for the commit, then `finish`."""
        with suppress(KeyChanged):
            await pending.outcome
        return self.finish(pending)

    def _ask_limits(
        self, key: CachedKey, use: KeyUse, now_us: int, once: IdempotentOperation | None = None
    ) -> Verification | PendingVerification:
        """Charge all limits of a key or none: from this process's leases where they cover the use, else by a commit.
        For a key without limits, only count the use."""
        units = use.units
        if once is None:
            lease_manager = self._ledger.lease_manager
            if lease_manager is not None:
                entries = lease_manager.admit(key.subjects, units, now_us, use.model, use.route)
                if entries is not None:
                    return admitted_from(key, entries, units)
            if not key.subjects.limited:
                self._ledger.aggregate(key.subjects, units)
                return admitted(key, (), units)
        outcome = self._ledger.admit(key.subjects, units, once=once, model=use.model, route=use.route)
        return PendingVerification(key, units, outcome)

    def _once(self, key: CachedKey, use: KeyUse, idempotency_key: str | None, actor: str) -> IdempotentOperation | None:
        """Makes this use charge once for an actor's idempotency key, for any API key."""
        if idempotency_key is None:
            return None
        asked = (use.units, use.permission, use.address, use.model, use.route, use.tenant)
        return self._database.once("verify", actor, idempotency_key, ("verify", key.id, asked))

    async def authenticate(self, text: str, *, any_address: bool = False) -> CachedKey | None:
        """The key of a bearer token, if it may be used now; nothing is debited. `any_address`: a key with `allowed_ips`
        is found too, and the caller checks the address by `CachedKey.allows`. Raises TenantSuspended."""
        backoff = Backoff("the key is being changed too quickly to authenticate with it")
        while await backoff.attempt():
            now_us = self._clock.now_us()
            key = await self._cache.find(text, now_us)
            found = usable(key, _ANY_USE, now_us)
            if key is not None and key.suspended is not None and not key.deleted:
                raise TenantSuspended(key.suspended)
            if key is None or (isinstance(found, Verification) and not (any_address and found.code == "FORBIDDEN")):
                return None
            if await self._cache.is_current(key):
                return key
        raise backoff.exhausted()

    async def identify(self, text: str) -> CachedKey | None:
        """The key of a secret, whether or not it may be used; nothing is debited. None if there is none."""
        return await self._cache.find(text, self._clock.now_us())


_ANY_USE = KeyUse(ONE_REQUEST)


def _use_of(ask: Mapping[str, Any]) -> KeyUse:
    get = ask.get
    return key_use(get("cost"), get("permission"), get("ip"), get("model"), get("route"), get("tenant"))


__all__ = ["PendingVerification", "Verifier"]
