"""The texts of keys: replaced, held until they are claimed, and given again to who repeats a call.

A rotation gives a key a new text. The text before works on for the overlap, so that who holds it can change over
without a gap: both texts are the same key, with one id and one set of counters.
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
from .model import (
    MAX_OVERLAP_S,
    TEST_PREFIX,
    ApiKey,
    IssuedKey,
    due_at,
    no_key,
)
from .queries import KeyQueries
from .token import (
    DEFAULT_PREFIX,
    PREFIX_PATTERN,
    Hasher,
    generate,
    hint_of_imported,
    masked,
)

MAX_CLAIM_ATTEMPTS = 5
"""A text that another rotation replaces while it is being claimed is looked for again this often."""


class _ReplacedError(Conflict):
    """Another rotation has replaced the text since it was read. Never leaves this file."""


class Rotation:
    """Replaces the secrets of keys, and gives out the secrets that are held. `hasher` gives the present hasher."""

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
        """Give a key a new text; the old one works for `overlap_s` seconds more. Id, limits and usage stay.

        The old text is the one that was handed out last: one that is held and was never claimed is replaced as if it
        had not been. A text that an earlier rotation left in its overlap stops working. `hold`: nobody is here to be
        shown the new text; it is kept, encrypted, until `claim` gives it out, and the answer's text is empty. The same
        call again with the same idempotency key gives the same text (within a day). Raises InvalidInput, NotFound,
        Conflict.
        """
        if type(overlap_s) is not int or not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidInput([Problem("overlap_s", f"found {overlap_s!r}, expected 0 to {MAX_OVERLAP_S} seconds")])
        once = Idempotency.by(context, idempotency_key, "rotate key", id, overlap_s, hold, expected)
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self._queries.issued_before(replayed, context=context)
        key = await self._queries.get(id, context=context)
        by = writer(context, key.tenant)
        text = new_text(key)

        async def body(tx: Transaction) -> ApiKey:
            now = await tx.get(ApiKey, id)
            if now.deleted_at is not None:
                raise no_key(id)
            return await tx.update(ApiKey, id, self.replaced(now, text, overlap_s, hold), expected=expected)

        shown = "" if hold else text
        try:
            made = await self._database.transaction(by, body, idempotency=telling(once, shown))
        except Replayed as done:
            return await self._queries.issued_before(done, context=context)
        return IssuedKey(made, shown)

    async def rotate_due(self, id: str, guard: Check) -> bool:
        """Do the scheduled rotation of a key if it is due, under the lease `guard`; whether there is a new text now.

        A key that is disabled or expired keeps its text, and so does one whose last text nobody has claimed: that
        would be replaced unseen. Its next rotation comes when the period is over again. Raises Conflict if the lease is
        lost, NotFound.
        """
        key = await self._queries.get(id)
        text = new_text(key)

        async def body(tx: Transaction) -> bool:
            tx.guard = guard
            now = await tx.get(ApiKey, id)
            moment = self._now()
            every_s, due = now.rotate_every_s, now.next_rotation_at
            if every_s is None or due is None or due > moment or now.deleted_at is not None:
                return False  # it was changed since it was found to be due
            if not now.enabled or now.is_expired(moment) or now.unclaimed is not None:
                later = moment + timedelta(seconds=every_s)
                await tx.update(ApiKey, id, {"next_rotation_at": later, "due_at": later})
                return False
            await tx.update(ApiKey, id, self.replaced(now, text, now.scheduled_overlap_s, True))
            return True

        return await self._database.transaction(writer(None, key.tenant), body)

    async def claim(
        self,
        id: str,
        *,
        context: Context | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedKey:
        """The text of a rotation that was held, once: it is forgotten with this answer.

        The same call again with the same idempotency key gives the same text (within a day), so that an answer that
        was lost is not a text lost. Raises NotFound, and Conflict if there is nothing to claim.
        """
        once = Idempotency.by(context, idempotency_key, "claim key", id)
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self._queries.issued_before(replayed, context=context)
        for _ in range(MAX_CLAIM_ATTEMPTS):
            key = await self._queries.get(id, context=context)
            by = writer(context, key.tenant)
            held = key.unclaimed
            text = reveal(self._hasher(), id, held) if held is not None else ""

            async def body(tx: Transaction, held: bytes | None = held) -> ApiKey:
                now = await tx.get(ApiKey, id)
                if now.deleted_at is not None:
                    raise no_key(id)
                if now.unclaimed is None:
                    raise Conflict("there is no text to claim: it was claimed, or no rotation has held one")
                if now.unclaimed != held:
                    raise _ReplacedError
                return await tx.update(ApiKey, id, {"unclaimed": None})

            try:
                made = await self._database.transaction(by, body, idempotency=telling(once, text))
            except Replayed as done:
                return await self._queries.issued_before(done, context=context)
            except _ReplacedError:
                continue
            return IssuedKey(made, text)
        raise Conflict("the key is being rotated too quickly to claim its text: try again")

    def _now(self) -> datetime:
        return utc_from_us(self._clock.now_us())

    def replaced(self, now: ApiKey, text: str, overlap_s: int, hold: bool) -> dict[str, Any]:
        """The fields of a key that change with this new text, for a transaction that does more than rotate."""
        moment = self._now()
        old: str | None = now.hash
        old_sealed = now.sealed
        if now.unclaimed is not None:  # nobody has ever had the current text: who holds the key has the one before
            in_overlap = now.previous_until is not None and moment < now.previous_until
            old, old_sealed = (now.previous_hash, now.previous_sealed) if in_overlap else (None, None)
        if not overlap_s:
            old = old_sealed = None
        later = moment + timedelta(seconds=now.rotate_every_s) if now.rotate_every_s is not None else None
        return {
            "hash": self._hasher().hash(text),
            "sealed": self._hasher().seal(hashlib.sha256(text.encode()).digest()),
            "display": masked(text),
            "previous_hash": old,
            "previous_sealed": old_sealed,
            "previous_until": moment + timedelta(seconds=overlap_s) if old is not None else None,
            # What an old text of another system is compared with, as long as it works.
            "verifier": now.verifier if old is not None and hint_of_imported(old) is not None else None,
            "unclaimed": conceal(self._hasher(), now.id, text) if hold else None,
            "next_rotation_at": later,
            "due_at": due_at(later, now.deleted_at),
        }


def telling(once: Idempotency | None, text: str) -> Idempotency | None:
    """The same call, whose repeat is given this text as well."""
    return None if once is None else replace(once, memo=text.encode())


# --- Texts that are held --------------------------------------------------------------------------------------


def conceal(hasher: Hasher, id: str, secret: str) -> bytes:
    """The secret of a key, encrypted for this key until it is claimed."""
    return hasher.conceal(secret.encode(), f"\x00unclaimed\x00{id}")


def reveal(hasher: Hasher, id: str, concealed: bytes) -> str:
    """The secret that `conceal` encrypted. Raises Conflict if its pepper is not configured any more."""
    secret = hasher.reveal(concealed, f"\x00unclaimed\x00{id}")
    if secret is None:
        raise Conflict("the text is held under a pepper that is not configured any more: rotate the key again")
    return secret.decode()


def new_text(key: ApiKey) -> str:
    """A new text that begins as the key's last one; one of another system begins as ours."""
    prefix = key.display.rpartition("_")[0]
    if re.fullmatch(PREFIX_PATTERN, prefix):
        return generate(prefix)
    return generate(TEST_PREFIX if key.environment == "test" else DEFAULT_PREFIX)
