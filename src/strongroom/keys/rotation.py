"""Rotation: gives a key a new secret, keeps a secret until it is claimed, and repeats it on an idempotent retry.

The old secret works until the overlap ends, so that its holder can change over without a gap. Both secrets are the
same key, with one id and one set of counters.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from ..access import acting, writer
from ..clock import Clock
from ..context import Context, utc_from_us
from ..database import Database, Idempotency, Replayed, Transaction
from ..errors import Conflict, InvalidInput, Problem
from ..storage.port import Check
from .hasher import Hasher, hint_of_imported
from .model import (
    MAX_OVERLAP_S,
    TEST_PREFIX,
    ApiKey,
    IssuedKey,
    due_at,
    no_key,
)
from .queries import KeyQueries
from .token import DEFAULT_PREFIX, PREFIX_PATTERN, generate, masked

MAX_CLAIM_ATTEMPTS = 5
"""Attempts to claim a secret while other rotations replace it."""


class _ReplacedError(Conflict):
    """Another rotation has replaced the secret since it was read. Never leaves this file."""


class Rotation:
    """Replaces the secrets of keys, and gives out the secrets that wait to be claimed. `hasher` gives the current
    hasher."""

    def __init__(self, database: Database, queries: KeyQueries, hasher: Callable[[], Hasher], clock: Clock) -> None:
        self._database = database
        self._queries = queries
        self._hasher = hasher
        self._clock = clock

    async def rotate(
        self,
        id: str,
        *,
        overlap_s: int = 0,
        hold: bool = False,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedKey:
        """Give a key a new secret. The old secret works for `overlap_s` seconds more. Id, limits and usage stay.

        The old secret is the last secret that was handed out: a secret that was never claimed is replaced and
        forgotten. A secret in the overlap of an earlier rotation stops working. `hold`: keep the new secret, encrypted,
        until `claim` gives it out; the answer's `text` is then empty. An idempotent retry (within a day) gives the same
        secret. Raises InvalidInput, NotFound, Conflict.
        """
        if type(overlap_s) is not int or not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidInput([Problem("overlap_s", f"found {overlap_s!r}, expected 0 to {MAX_OVERLAP_S} seconds")])
        once = Idempotency.by(context, idempotency_key, "rotate key", id, overlap_s, hold, expected)
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self._queries.issued_before(replayed, context=context)
        key = await self._queries.get(id, context=context)
        by = writer(context, key.tenant)
        secret = new_secret(key)

        async def body(tx: Transaction) -> ApiKey:
            now = await tx.get(ApiKey, id)
            if now.deleted_at is not None:
                raise no_key(id)
            return await tx.update(ApiKey, id, self.replaced(now, secret, overlap_s, hold), expected=expected)

        shown = "" if hold else secret
        try:
            made = await self._database.transaction(by, body, idempotency=with_secret(once, shown))
        except Replayed as done:
            return await self._queries.issued_before(done, context=context)
        return IssuedKey(made, shown)

    async def rotate_due(self, id: str, guard: Check) -> bool:
        """Do the scheduled rotation of a key if it is due, under the job lease `guard`. Returns whether the key has a
        new secret.

        A disabled or expired key keeps its secret, and so does a key whose last secret was not claimed yet: nobody
        would ever have seen it. The next rotation comes one period later. Raises Conflict if the lease is lost,
        NotFound.
        """
        key = await self._queries.get(id)
        secret = new_secret(key)

        async def body(tx: Transaction) -> bool:
            tx.guard = guard
            now = await tx.get(ApiKey, id)
            moment = self._now()
            every_s, due = now.rotate_every_s, now.next_rotation_at
            if every_s is None or due is None or due > moment or now.deleted_at is not None:
                return False  # the key was changed since the job found it due
            if not now.enabled or now.is_expired(moment) or now.unclaimed is not None:
                later = moment + timedelta(seconds=every_s)
                await tx.update(ApiKey, id, {"next_rotation_at": later, "due_at": later})
                return False
            await tx.update(ApiKey, id, self.replaced(now, secret, now.scheduled_overlap_s, True))
            return True

        return await self._database.transaction(writer(None, key.tenant), body)

    async def claim(
        self,
        id: str,
        *,
        context: Context | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedKey:
        """Give out the secret that a rotation kept, once: it is forgotten with this answer.

        An idempotent retry (within a day) gives the same secret, so that a lost answer loses nothing. Raises NotFound,
        and Conflict if there is nothing to claim.
        """
        once = Idempotency.by(context, idempotency_key, "claim key", id)
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self._queries.issued_before(replayed, context=context)
        for _ in range(MAX_CLAIM_ATTEMPTS):
            key = await self._queries.get(id, context=context)
            by = writer(context, key.tenant)
            held = key.unclaimed
            secret = reveal(self._hasher(), id, held) if held is not None else ""

            async def body(tx: Transaction, held: bytes | None = held) -> ApiKey:
                now = await tx.get(ApiKey, id)
                if now.deleted_at is not None:
                    raise no_key(id)
                if now.unclaimed is None:
                    raise Conflict("there is no secret to claim: it was claimed, or no rotation has kept one")
                if now.unclaimed != held:
                    raise _ReplacedError
                return await tx.update(ApiKey, id, {"unclaimed": None})

            try:
                made = await self._database.transaction(by, body, idempotency=with_secret(once, secret))
            except Replayed as done:
                return await self._queries.issued_before(done, context=context)
            except _ReplacedError:
                continue
            return IssuedKey(made, secret)
        raise Conflict("the key is being rotated too quickly to claim its secret: try again")

    def _now(self) -> datetime:
        return utc_from_us(self._clock.now_us())

    def replaced(self, now: ApiKey, secret: str, overlap_s: int, hold: bool) -> dict[str, Any]:
        """The fields of a key that change with a new secret, for a transaction that does more than rotate."""
        moment = self._now()
        old: str | None = now.hash
        old_sealed = now.sealed
        if now.unclaimed is not None:  # nobody has seen the current secret: users of the key have the one before
            in_overlap = now.previous_until is not None and moment < now.previous_until
            old, old_sealed = (now.previous_hash, now.previous_sealed) if in_overlap else (None, None)
        if not overlap_s:
            old = old_sealed = None
        later = moment + timedelta(seconds=now.rotate_every_s) if now.rotate_every_s is not None else None
        return {
            "hash": self._hasher().hash(secret),
            "sealed": self._hasher().seal(hashlib.sha256(secret.encode()).digest()),
            "display": masked(secret),
            "previous_hash": old,
            "previous_sealed": old_sealed,
            "previous_until": moment + timedelta(seconds=overlap_s) if old is not None else None,
            # An imported old secret is compared with this hash as long as it works.
            "verifier": now.verifier if old is not None and hint_of_imported(old) is not None else None,
            "unclaimed": conceal(self._hasher(), now.id, secret) if hold else None,
            "next_rotation_at": later,
            "due_at": due_at(later, now.deleted_at),
        }


def with_secret(once: Idempotency | None, secret: str) -> Idempotency | None:
    """The same call; an idempotent retry of it gets this secret too."""
    return None if once is None else replace(once, memo=secret.encode())


# --- Secrets that wait to be claimed --------------------------------------------------------------------------


def conceal(hasher: Hasher, id: str, secret: str) -> bytes:
    """The secret of a key, encrypted for this key until it is claimed."""
    return hasher.conceal(secret.encode(), f"\x00unclaimed\x00{id}")


def reveal(hasher: Hasher, id: str, concealed: bytes) -> str:
    """The secret that `conceal` encrypted. Raises Conflict if its pepper is not configured any more."""
    secret = hasher.reveal(concealed, f"\x00unclaimed\x00{id}")
    if secret is None:
        raise Conflict("the secret is kept under a pepper that is not configured any more: rotate the key again")
    return secret.decode()


def new_secret(key: ApiKey) -> str:
    """A new secret with the prefix of the key's last one. A key of another system gets the default prefix."""
    prefix = key.display.rpartition("_")[0]
    if re.fullmatch(PREFIX_PATTERN, prefix):
        return generate(prefix)
    return generate(TEST_PREFIX if key.environment == "test" else DEFAULT_PREFIX)
