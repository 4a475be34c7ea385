"""The verification trip: a key's text → who it is → may it be used now → its limits charged → the answer.

What happens to keys otherwise (made, changed, rotated, removed) is in `keys.py`, which extends this.
"""

from __future__ import annotations

from collections.abc import Mapping

from .changes import ChangeFeed
from .clock import Clock, MachineClock
from .context import Context
from .database import Database
from .errors import InvalidInput, NotFound, Problem, Unavailable
from .keycache import KeyCache
from .keytext import Hasher
from .knownkey import KnownKey
from .storage.port import Create
from .usage import KeyChanged, Ledger
from .verification import (
    NOT_FOUND,
    ONE_REQUEST,
    Verification,
    admitted,
    check_address,
    cost_units,
    exceeded,
    refused,
)
from .windows import Amount

MAX_KEY_ATTEMPTS = 20


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

    async def verify(
        self,
        text: str,
        *,
        cost: Mapping[str, Amount] | None = None,
        permission: str | None = None,
        ip: str | None = None,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        actor: str = "system",
    ) -> Verification:
        """Decide whether a key may be used now for this `cost` (default: one request); debit all its limits, or none.

        The answer comes once the debit is durable. `tenant` restricts to that tenant's keys (others are NOT_FOUND).
        Of one actor's calls with one idempotency key (within a day), at most one debits.
        Raises InvalidInput for a cost or address that is none; never for a key.
        """
        units = ONE_REQUEST if cost is None else cost_units(cost)
        if ip is not None:
            check_address(ip)
        for _ in range(MAX_KEY_ATTEMPTS):
            now_us = self._clock.now_us()
            key = await self.cache.find(text, now_us)
            if key is None or (tenant is not None and key.tenant != tenant):
                return NOT_FOUND
            refusal = key.refusal(now_us, permission, ip)
            if refusal is not None:
                return refused(key, *refusal)
            if not key.metered.allowances and idempotency_key is None:
                if not await self.cache.is_current(key):
                    continue
                self._ledger.tally(key.metered, units)
                return admitted(key, ())
            once = None
            if idempotency_key is not None:
                once = self._charged_once("verify", key, idempotency_key, actor, units)
            try:
                outcome = await self._ledger.charge(key.metered, units, once=once)
            except KeyChanged:
                self.cache.forget(key.id)
                continue
            return admitted(key, outcome.statuses) if outcome.allowed else exceeded(key, outcome, units)
        raise Unavailable("the key is being changed too quickly to verify it: try again")

    async def record(
        self,
        *,
        key: str | None = None,
        key_id: str | None = None,
        cost: Mapping[str, Amount],
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
            once = self._charged_once("usage", known, idempotency_key, actor, units)
            try:
                outcome = await self._ledger.charge(known.metered, units, force=True, once=once)
            except KeyChanged:
                self.cache.forget(known.id)
                continue
            return admitted(known, outcome.statuses)
        raise Unavailable("the key is being changed too quickly to record its usage: try again")

    def _charged_once(
        self, what: str, key: KnownKey, idempotency_key: str | None, actor: str, units: Mapping[str, int]
    ) -> tuple[str, Create] | None:
        if idempotency_key is None:
            return None
        return self._database.once_only(f"{what}\x00{key.id}\x00{actor}", idempotency_key, repr(sorted(units.items())))

    async def authenticate(self, text: str) -> KnownKey | None:
        """The key that a bearer token is, if it may be used now; nothing is debited. For authenticating a caller."""
        for _ in range(MAX_KEY_ATTEMPTS):
            now_us = self._clock.now_us()
            key = await self.cache.find(text, now_us)
            if key is None or key.refusal(now_us, None, None) is not None:
                return None
            if await self.cache.is_current(key):
                return key
        raise Unavailable("the key is being changed too quickly to authenticate with it: try again")

    def works_until_us(self, text: str) -> int | None:
        """When a text that was just authenticated stops working because it was rotated away; None if it was not."""
        return self.cache.works_until_us(text)

    async def identify(self, text: str) -> KnownKey | None:
        """The key that a text is, whether or not it may be used; nothing is debited. None if there is none."""
        return await self.cache.find(text, self._clock.now_us())

    # --- What is known of keys --------------------------------------------------------------------------------

    async def _known_for(self, text: str | None, id: str | None) -> KnownKey | None:
        if text is not None:
            return await self.cache.find(text, self._clock.now_us())
        return await self.cache.by_id(id or "")

    def changed(self, id: str) -> None:
        """A key was changed, here or on another node: read it again at its next use."""
        self.cache.changed(id)

    def quota_changed(self, id: str) -> None:
        """A quota was changed, here or on another node: so were the limits of the keys that share it."""
        self.cache.quota_changed(id)

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
