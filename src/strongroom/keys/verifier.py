"""The verification trip: a key's text → who it is → may it be used now → its limits charged → the answer.

What happens to keys otherwise (made, changed, rotated, removed) is in `keys.py`, which extends this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ..clock import Clock, MachineClock
from ..context import Context, system_context
from ..cooperative import Slices
from ..database import Database, Once
from ..journal import ChangeFeed
from ..limits import Amount, KeyChanged, Ledger, Outcome, Part, Patience
from ..quotas import Quota, is_quota
from .cache import KeyCache
from .cached_key import KnownKey, metered, quota_part
from .model import ApiKey
from .token import Hasher
from .verification import (
    NOT_FOUND,
    ONE_REQUEST,
    Verification,
    admitted,
    admitted_from,
    check_address,
    cost_units,
    exceeded,
    refused,
)


class Begun(NamedTuple):
    """A verification whose charge is being decided."""

    key: KnownKey
    units: dict[str, int]
    outcome: asyncio.Future[Outcome]


class Verifier:
    """Verifies the keys of one store, and charges their limits."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        hasher: Hasher,
        clock: Clock | None = None,
        feed: ChangeFeed | None = None,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self.hasher = hasher
        self._clock = clock if clock is not None else MachineClock()
        self.cache = KeyCache(database, hasher, feed)

    @property
    def clock(self) -> Clock:
        """The clock that keys expire by."""
        return self._clock

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
        """Decide whether a key may be used now for this `cost` (default: one request); debit all its limits, or none:
        its own, and those it shares with others of its groups, its user and its tenant.

        The answer comes once the debit is durable, or was made from a share of the limits that is (a lease). `model`
        and `route` are what the call is for: some limits are for some of them only. `tenant` restricts to that tenant's
        keys (others are NOT_FOUND). Of one actor's calls with one idempotency key (within a day), at most one debits.
        `peek`: a dry run, which gives the same answer and counts nothing.

        Raises InvalidInput for a cost or address that is none; never for a key.
        """
        units = ONE_REQUEST if cost is None else cost_units(cost)
        if ip is not None:
            check_address(ip)
        if peek:
            return await self._peek(text, units, permission, ip, model, route, tenant)
        if idempotency_key is None:
            begun = self._begin(text, units, permission, ip, model, route, tenant)
            if isinstance(begun, Verification):
                return begun
            if begun is not None:
                with suppress(KeyChanged):
                    await begun.outcome
                answer = self.conclude(begun)
                if answer is not None:
                    return answer
        now_us = self._clock.now_us()
        lending = self._ledger.lending
        patience = Patience("the key is being changed too quickly to verify it")
        while await patience.another():
            key = await self.cache.find(text, now_us)
            if key is None or (tenant is not None and key.tenant != tenant):
                return NOT_FOUND
            refusal = key.refusal(now_us, permission, ip, model, route)
            if refusal is not None:
                return refused(key, *refusal)
            if not key.metered.limited and idempotency_key is None:
                if await self.cache.is_current(key):
                    self._ledger.tally(key.metered, units)
                    return admitted(key, (), units)
            elif lending is None or await self.cache.is_current(key):
                if lending is not None and idempotency_key is None:
                    entries = lending.admit(key.metered, units, now_us, model, route)
                    if entries is not None:
                        return admitted_from(key, entries, units)
                once = None
                if idempotency_key is not None:
                    asked = (units, permission, ip, model, route, tenant)
                    once = self._charged_once("verify", key, idempotency_key, actor, asked)
                try:
                    outcome = await self._ledger.charge(key.metered, units, once=once, model=model, route=route)
                except KeyChanged:
                    self.cache.outdated(key)
                else:
                    return admitted(key, outcome.statuses, units) if outcome.allowed else exceeded(key, outcome, units)
            now_us = self._clock.now_us()
        raise patience.over()

    async def _peek(
        self,
        text: str,
        units: dict[str, int],
        permission: str | None,
        ip: str | None,
        model: str | None,
        route: str | None,
        tenant: str | None,
    ) -> Verification:
        """The answer that `verify` would give."""
        patience = Patience("the key is being changed too quickly to verify it")
        while await patience.another():
            now_us = self._clock.now_us()
            key = await self.cache.find(text, now_us)
            if key is None or (tenant is not None and key.tenant != tenant):
                return NOT_FOUND
            refusal = key.refusal(now_us, permission, ip, model, route)
            if refusal is not None:
                return refused(key, *refusal)
            if not await self.cache.is_current(key):
                continue
            if not key.metered.limited:
                return admitted(key, (), units)
            outcome = await self._ledger.peek(key.metered, units, model, route)
            return admitted(key, outcome.statuses, units) if outcome.allowed else exceeded(key, outcome, units)
        raise patience.over()

    async def verify_many(self, asks: Sequence[Mapping[str, Any]]) -> list[Verification]:
        """Decide several verifications in the order given, as one commit where that is possible; each is what `verify`
        takes, its key under `text`. Raises as `verify` does; then some may have been debited."""
        costs = [ONE_REQUEST if ask.get("cost") is None else cost_units(ask["cost"]) for ask in asks]
        for ask in asks:
            if ask.get("ip") is not None:
                check_address(ask["ip"])
        unknown = await self.cache.unknown((ask["text"] for ask in asks), self._clock.now_us())
        slices = Slices()
        if self._ledger.lending is not None:  # what is not decided from memory must not be overtaken by what is
            answers = []
            for ask in asks:
                await slices.pause()
                answers.append(NOT_FOUND if ask["text"] in unknown else await self.verify(**ask))
            return answers
        now_us = self._clock.now_us()
        known: dict[str, KnownKey | None] = {}
        for text in dict.fromkeys(ask["text"] for ask in asks):
            await slices.pause()
            known[text] = None if text in unknown else await self.cache.find(text, now_us)
        # From here to the last charge nothing is waited for, so that they are decided in this order.
        decided = [self._decide(known[ask["text"]], units, ask, now_us) for ask, units in zip(asks, costs, strict=True)]
        futures = [one for one in decided if isinstance(one, asyncio.Future)]
        await asyncio.gather(*futures, return_exceptions=True)
        answers = []
        for ask, units, one in zip(asks, costs, decided, strict=True):
            key = known[ask["text"]]
            if isinstance(one, asyncio.Future) and key is not None:
                try:
                    outcome = one.result()
                except KeyChanged:
                    self.cache.outdated(key)
                else:
                    allowed = outcome.allowed
                    answers.append(admitted(key, outcome.statuses, units) if allowed else exceeded(key, outcome, units))
                    continue
            answers.append(one if isinstance(one, Verification) else await self.verify(**ask))
        return answers

    def _decide(
        self, key: KnownKey | None, units: dict[str, int], ask: Mapping[str, Any], now_us: int
    ) -> Verification | asyncio.Future[Outcome] | None:
        """The answer, or what it waits for; None where no limit is asked, and so nothing depends on the order."""
        tenant, once = ask.get("tenant"), ask.get("idempotency_key")
        if key is None or (tenant is not None and key.tenant != tenant):
            return NOT_FOUND
        model, route = ask.get("model"), ask.get("route")
        refusal = key.refusal(now_us, ask.get("permission"), ask.get("ip"), model, route)
        if refusal is not None:
            return refused(key, *refusal)
        if not key.metered.limited and once is None:
            return None
        asked = (units, ask.get("permission"), ask.get("ip"), model, route, tenant)
        made = self._charged_once("verify", key, once, ask.get("actor", "system"), asked)
        return self._ledger.charge(key.metered, units, once=made, model=model, route=route)

    def begin(
        self,
        text: str,
        *,
        cost: Mapping[str, Amount] | None = None,
        permission: str | None = None,
        ip: str | None = None,
        model: str | None = None,
        route: str | None = None,
        tenant: str | None = None,
    ) -> Verification | Begun | None:
        """What `verify` does for most calls, without waiting for anything: the answer, or a charge that is under way;
        None where it takes more, and nothing was done. Raises InvalidInput as `verify` does."""
        units = ONE_REQUEST if cost is None else cost_units(cost)
        if ip is not None:
            check_address(ip)
        return self._begin(text, units, permission, ip, model, route, tenant)

    def _begin(
        self,
        text: str,
        units: dict[str, int],
        permission: str | None,
        ip: str | None,
        model: str | None,
        route: str | None,
        tenant: str | None,
    ) -> Verification | Begun | None:
        now_us = self._clock.now_us()
        key = self.cache.peek(text, now_us)
        if key is None:
            return None
        if tenant is not None and key.tenant != tenant:
            return NOT_FOUND
        refusal = key.refusal(now_us, permission, ip, model, route)
        if refusal is not None:
            return refused(key, *refusal)
        lending = self._ledger.lending
        if lending is not None:
            entries = lending.admit(key.metered, units, now_us, model, route)
            if entries is not None:
                return admitted_from(key, entries, units)
        if not key.metered.limited:
            self._ledger.tally(key.metered, units)
            return admitted(key, (), units)
        return Begun(key, units, self._ledger.charge(key.metered, units, model=model, route=route))

    def conclude(self, begun: Begun) -> Verification | None:
        """The answer to a verification whose charge was decided; None if the key was changed meanwhile, so that nothing
        was charged and it has to be asked for again. Raises TooManyRequests, Unavailable."""
        try:
            outcome = begun.outcome.result()
        except KeyChanged:
            self.cache.outdated(begun.key)
            return None
        if outcome.allowed:
            return admitted(begun.key, outcome.statuses, begun.units)
        return exceeded(begun.key, outcome, begun.units)

    def _charged_once(
        self, what: str, key: KnownKey, idempotency_key: str | None, actor: str, request: object
    ) -> Once | None:
        """What lets this happen once for an actor's idempotency key, whichever key it is asked for."""
        if idempotency_key is None:
            return None
        return self._database.once(what, actor, idempotency_key, (what, key.id, request))

    async def authenticate(self, text: str, *, any_address: bool = False) -> KnownKey | None:
        """The key that a bearer token is, if it may be used now; nothing is debited. For authenticating a caller.
        `any_address`: a key that may be used from some addresses only is found too, and `KnownKey.allows` tells which.
        """
        patience = Patience("the key is being changed too quickly to authenticate with it")
        while await patience.another():
            now_us = self._clock.now_us()
            key = await self.cache.find(text, now_us)
            refusal = key.refusal(now_us, None, None) if key is not None else None
            if key is None or (refusal is not None and not (any_address and refusal[0] == "FORBIDDEN")):
                return None
            if await self.cache.is_current(key):
                return key
        raise patience.over()

    def works_until_us(self, text: str) -> int | None:
        """When a text that was just authenticated stops working because it was rotated away; None if it was not."""
        return self.cache.works_until_us(text)

    async def identify(self, text: str) -> KnownKey | None:
        """The key that a text is, whether or not it may be used; nothing is debited. None if there is none."""
        return await self.cache.find(text, self._clock.now_us())

    async def part_of(self, id: str) -> Part | None:
        """The limits of an account, by its id: a key's or a quota's; None if it is there no longer."""
        if is_quota(id):
            quota = await self._database.get_or_none(system_context(), Quota, id)
            return None if quota is None else quota_part(quota)
        key = await self._database.get_or_none(system_context(), ApiKey, id)
        return None if key is None else metered(key).parts[0]

    # --- What is known of keys --------------------------------------------------------------------------------

    async def _known_for(self, text: str | None, id: str | None) -> KnownKey | None:
        if text is not None:
            return await self.cache.find(text, self._clock.now_us())
        return await self.cache.by_id(id or "")

    def changed(self, id: str) -> None:
        """A key was changed, here or on another node: read it, and what it has used, again at its next use."""
        self.cache.changed(id)
        self._ledger.forget(id)

    def quota_changed(self, id: str) -> None:
        """A quota was changed, here or on another node: so were the limits of the keys that share it. Its usage is read
        again: it may have been removed and made anew, and a denial, which commits nothing, would never notice."""
        self.cache.quota_changed(id)
        self._ledger.forget(id)

    def forget_all(self) -> None:
        """Nothing that is known of keys, quotas and what they have used can be believed: read it again."""
        self.cache.forget_all()
        self._ledger.forget_all()

    def use(self, hasher: Hasher) -> None:
        """Make and find hashes with other peppers from now on; what was unknown may be known to them."""
        self.hasher = hasher
        self.cache.use(hasher)


def may_see(context: Context | None, tenant: str) -> bool:
    """Whether a caller sees the keys of a tenant."""
    own = bound_to(context)
    return own is None or own == tenant


def bound_to(context: Context | None) -> str | None:
    """The tenant whose keys alone a caller sees: the one it belongs to, else the one it acts for; None for all."""
    if context is None:
        return None
    own: str | None = context.claims.get("tenant")
    return own if own is not None else context.tenant
