"""API keys: issue, verify, change, rotate, revoke. The text is shown once; the store holds a hash of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from cryptography.exceptions import InvalidTag

from .apikey import ALL_TENANTS, NAME, ApiKey, KeyChanges, NewKey, parse
from .changes import ChangeFeed
from .clock import Clock
from .context import Context, new_id, system_context, utc_from_us
from .database import Database, Idempotency, Page, Replayed
from .errors import Conflict, InvalidInput, NotFound, Problem
from .keytext import DEFAULT_PREFIX, PREFIX_PATTERN, Hasher, generate, masked
from .knownkey import metered
from .query import And, Filter, Query, Where
from .transaction import Transaction
from .usage import Account, KeyUsage, Ledger
from .verification import LimitStatus, Verification, limit_status
from .verifier import Verifier, bound_to, may_see
from .windows import Amount, from_units

_ANY_TENANT = "\x00keys"  # no tenant is called so
MAX_OVERLAP_S = 30 * 86_400


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key with its text. The text is not stored: this is the one time it is there."""

    key: ApiKey
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyStats:
    """A key's statistics: expired or not, usage of each limit's window, lifetime totals, number and time of uses."""

    key: ApiKey
    expired: bool
    count: int
    last_used_at: datetime | None
    totals: dict[str, Amount]
    limits: list[LimitStatus]
    account: Account


class Keys(Verifier):
    """The keys of one store."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        hasher: Hasher,
        clock: Clock | None = None,
        feed: ChangeFeed | None = None,
    ) -> None:
        super().__init__(database, ledger, hasher, clock, feed)
        database.after_commit(self._committed)

    # --- Making and changing ----------------------------------------------------------------------------------

    async def create(
        self,
        new: NewKey | None = None,
        /,
        *,
        context: Context | None = None,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> IssuedKey:
        """Make a key: `create(name="billing worker", limits=[…])`, or from a NewKey.

        The same call again with the same idempotency key gives back the same key and text (within a day).
        Raises InvalidInput with every problem.
        """
        new = new if new is not None else parse(NewKey, fields)
        context = _writer(context, new.tenant)
        text = generate(new.prefix)
        key = ApiKey(
            id=new_id("key_"),
            hash=self.hasher.hash(text),
            sealed=self.hasher.seal(hashlib.sha256(text.encode()).digest()),
            display=masked(text),
            **new.model_dump(exclude={"prefix"}),
        )
        once = self._once(context, idempotency_key, f"create key {new!r}", text)
        try:
            return IssuedKey(
                await self._database.transaction(context, lambda tx: tx.create(key), idempotency=once), text
            )
        except Replayed as replayed:
            return await self._replay(context, idempotency_key or "", replayed)

    async def get(self, id: str, *, context: Context | None = None) -> ApiKey:
        """A key by its id. NotFound for another tenant's too."""
        key = await self._database.get_or_none(_reader(context), ApiKey, id)
        if key is None or not may_see(context, key.tenant):
            raise NotFound(f"there is no key {id!r}")
        return key

    async def list(
        self,
        *,
        tenant: str | None = None,
        user_id: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
        context: Context | None = None,
    ) -> Page[ApiKey]:
        """One page of keys, newest first; of one tenant where the caller is bound to one."""
        own = bound_to(context)
        filters: list[Filter] = []
        if own is not None or tenant is not None:
            if own is not None and tenant is not None and own != tenant:
                return Page([], None)
            filters.append(Where("tenant", "==", own or tenant))
        if user_id is not None:
            filters.append(Where("user_id", "==", user_id))
        query = Query(And(*filters) if filters else None, ("-created_at",), limit)
        return await self._database.find(_reader(context), ApiKey, query, cursor)

    async def update(
        self,
        id: str,
        changes: KeyChanges | None = None,
        /,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> ApiKey:
        """Change some fields. Usage already counted stays counted where resource and window stay the same."""
        changes = changes if changes is not None else parse(KeyChanges, fields)
        values = {name: getattr(changes, name) for name in changes.model_fields_set}
        return await self._change(id, values, context, expected, idempotency_key)

    async def disable(self, id: str, *, context: Context | None = None) -> ApiKey:
        """Refuse the key from now on. Idempotent."""
        return await self._change(id, {"enabled": False}, context)

    async def enable(self, id: str, *, context: Context | None = None) -> ApiKey:
        """Accept the key again. Idempotent."""
        return await self._change(id, {"enabled": True}, context)

    async def _change(
        self,
        id: str,
        values: Mapping[str, Any],
        context: Context | None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> ApiKey:
        key = await self.get(id, context=context)
        writer = _writer(context, key.tenant)
        if expected is None and all(getattr(key, name) == value for name, value in values.items()):
            return key
        return await self._database.update(
            writer, ApiKey, id, values, expected=expected, idempotency_key=idempotency_key
        )

    async def delete(
        self,
        id: str,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Remove a key and its usage; its text is unknown from then on."""
        once = None
        if idempotency_key is not None:
            once = Idempotency(idempotency_key, f"delete key {id} {expected}", scope=_ANY_TENANT)
        try:
            key = await self.get(id, context=context)
        except NotFound:
            if once is not None and await self._database.was_done(context or system_context(), once):
                return
            raise

        async def body(tx: Transaction) -> None:
            await tx.delete(ApiKey, id, expected=expected)

        try:
            await self._database.transaction(_writer(context, key.tenant), body, idempotency=once)
        except Replayed:
            return
        # Only now: while the key was there, its counters were being written; no charge can commit without the key.
        self._ledger.forget(id)
        try:
            await self._database.delete(system_context(), KeyUsage, id)
        except NotFound:
            return  # it was never used

    async def rotate(
        self,
        id: str,
        *,
        overlap_s: int = 0,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedKey:
        """Give a key a new text; the old one works for `overlap_s` seconds more. Id, limits and usage stay.

        A text that an earlier rotation left in its overlap stops working.
        """
        if type(overlap_s) is not int or not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidInput([Problem("overlap_s", f"found {overlap_s!r}, expected 0 to {MAX_OVERLAP_S} seconds")])
        key = await self.get(id, context=context)
        writer = _writer(context, key.tenant)
        prefix = key.display.rpartition("_")[0]
        text = generate(prefix if re.fullmatch(PREFIX_PATTERN, prefix) else DEFAULT_PREFIX)

        async def body(tx: Transaction) -> ApiKey:
            now = await tx.get(ApiKey, id)
            now_utc = utc_from_us(self._clock.now_us())
            fields = {
                "hash": self.hasher.hash(text),
                "sealed": self.hasher.seal(hashlib.sha256(text.encode()).digest()),
                "display": masked(text),
                "previous_hash": now.hash if overlap_s else None,
                "previous_until": now_utc + timedelta(seconds=overlap_s) if overlap_s else None,
            }
            return await tx.update(ApiKey, id, fields, expected=expected)

        once = self._once(writer, idempotency_key, f"rotate key {id} {overlap_s} {expected}", text)
        try:
            return IssuedKey(await self._database.transaction(writer, body, idempotency=once), text)
        except Replayed as replayed:
            return await self._replay(writer, idempotency_key or "", replayed)

    def _once(self, context: Context, key: str | None, request: str, text: str) -> Idempotency | None:
        """The text is kept for the repeat of this very call, encrypted under the pepper and the caller's own key."""
        if key is None:
            return None
        nonce = hashlib.sha256(text.encode()).digest()[:12]  # a text is random and used once
        memo = self.hasher.memo_boxes(f"{context.actor}\x00{key}")[0].encrypt(nonce, text.encode(), None)
        return Idempotency(key, request, nonce + memo)

    async def _replay(self, context: Context, key: str, replayed: Replayed) -> IssuedKey:
        memo = replayed.memo or b""
        for box in self.hasher.memo_boxes(f"{context.actor}\x00{key}"):
            try:
                text = box.decrypt(memo[:12], memo[12:], None).decode()
            except InvalidTag:
                continue  # the pepper was rotated since
            return IssuedKey(await self.get(replayed.written[0], context=context), text)
        raise Conflict("this was done before, under a pepper that is not configured any more: the text is lost")

    async def stats(self, id: str, *, context: Context | None = None) -> KeyStats:
        """A key's statistics, as of now."""
        key = await self.get(id, context=context)
        now_us = self._clock.now_us()
        account = await self._ledger.account(id)
        statuses = account.statuses(metered(key).allowances, account.moment(now_us))
        return KeyStats(
            key=key,
            expired=key.is_expired(utc_from_us(now_us)),
            count=account.count,
            last_used_at=utc_from_us(account.last_used_us) if account.last_used_us is not None else None,
            totals={name: from_units(name, units) for name, units in sorted(account.totals.items())},
            limits=[limit_status(s, limit.window.model_dump()) for s, limit in zip(statuses, key.limits, strict=True)],
            account=account,
        )

    def _committed(self, transaction: Transaction) -> None:
        for change in transaction.changes:
            if change.collection.name == NAME:
                self.changed(change.operation.id)


# --- Helpers ---------------------------------------------------------------------------------------------------


def _reader(context: Context | None) -> Context:
    """Keys are found by the system on the caller's behalf; whom the caller may see is checked on what was found."""
    return system_context() if context is None else system_context(actor=context.actor)


def _writer(context: Context | None, tenant: str) -> Context:
    """The caller's context, on behalf of the key's tenant: the rules see both, the journal record is that tenant's."""
    scoped = None if tenant == ALL_TENANTS else tenant
    if context is None:
        return system_context(scoped)
    return Context(scoped, context.actor, context.claims, context.request_id)


__all__ = ["ApiKey", "IssuedKey", "KeyChanges", "KeyStats", "Keys", "LimitStatus", "NewKey", "Verification"]
