"""Finds the stored key of a secret by one read, whichever hash it has, and renews hashes of other systems."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from ..access import ALL_TENANTS
from ..context import system_context
from ..cooperative import Slices
from ..database import Database
from ..entities import MAX_DISJUNCTIONS, Or, Query, Where
from ..errors import AlreadyExists, Conflict, NotFound, TenantSuspended, Unavailable
from .hasher import Hasher, hint_of_imported
from .model import ApiKey
from .slow_hash import SlowHashPool
from .token import masked

NAMES_A_READ = MAX_DISJUNCTIONS // 2
"""Hashes and hints that one read asks for, each as the current and as the previous one. A store with many peppers,
imported HMAC secrets and hint rules takes more reads."""
UPGRADE_ATTEMPTS = 3


class KeyLookup:
    """The keys of one store, by their secret."""

    def __init__(self, database: Database, hasher: Hasher) -> None:
        self._database = database
        self.hasher = hasher
        self.slow = SlowHashPool()

    async def find(self, secret: str, changed: set[str]) -> tuple[ApiKey, datetime | None] | None:
        """The key of a secret, a deleted key too, and until when a secret works that was rotated away; None if there is
        no such key.

        A hash that is not under the current pepper is renewed; the key's id is then taken out of `changed`. Raises
        TooManyRequests where a slow hash cannot be compared now, and the errors of the database.
        """
        hasher = self.hasher
        names = hasher.candidates(secret)
        if self._database.embedded:
            # Nearly every key has the first of these hashes. An embedded store finds it by one look into one index,
            # where all hashes take six looks into two indexes; and a second read costs no network trip.
            query = Query(Where("hash", "==", names[0]), limit=1)
            for key in (await self._database.find(system_context(), ApiKey, query)).items:
                if _is_one_of(key.hash, names):
                    return key, None
        hints = hasher.hints(secret)
        keys = await self._stored([*names, *hints])
        for key in keys:
            if _is_one_of(key.hash, names):
                return (key if hasher.is_current(key.hash) else await self._renew(key, "hash", secret, changed)), None
        for key in keys:
            if key.previous_hash is not None and _is_one_of(key.previous_hash, names):
                return (key, key.previous_until) if key.previous_until is not None else None
        for key in keys:
            if key.verifier is None:
                continue
            field = "hash" if key.hash in hints else "previous_hash"
            if field == "previous_hash" and key.previous_until is None:
                continue
            if await self.slow.matches(_hint(getattr(key, field)), secret, key.verifier):
                until = None if field == "hash" else key.previous_until
                return await self._renew(key, field, secret, changed), until
        return None

    async def unknown_among(self, secrets: Iterable[str]) -> set[str]:
        """Those of many secrets that no key has, now or before its last rotation. Each read asks for NAMES_A_READ
        hashes, where `find` takes one or two reads for each secret. `find` gives the keys of the others."""
        unknown: set[str] = set()
        slices = Slices()
        some: dict[str, list[str]] = {}
        size = 0
        for secret in secrets:
            await slices.pause()
            names = [*self.hasher.candidates(secret), *self.hasher.hints(secret)]
            if size + len(names) > NAMES_A_READ and some:
                unknown |= await self._without_key(some)
                some, size = {}, 0
            if len(names) <= NAMES_A_READ:  # else it is left to `find`
                some[secret] = names
                size += len(names)
        if some:
            unknown |= await self._without_key(some)
        return unknown

    async def _without_key(self, texts: Mapping[str, Sequence[str]]) -> set[str]:
        """Those of a few secrets, given with their stored names, that no key is stored under."""
        names = tuple(name for some in texts.values() for name in some)
        query = Query(Or(Where("hash", "in", names), Where("previous_hash", "in", names)), limit=2 * len(names))
        found = await self._database.select(system_context(), ApiKey, replace(query, fields=("hash", "previous_hash")))
        stored = {key[field] for key in found.items for field in ("hash", "previous_hash")}
        return {text for text, some in texts.items() if stored.isdisjoint(some)}

    async def _stored(self, names: Sequence[str]) -> list[ApiKey]:
        """The keys that are stored under one of these names, now or before their last rotation."""
        keys: list[ApiKey] = []
        for start in range(0, len(names), NAMES_A_READ):
            some = tuple(names[start : start + NAMES_A_READ])
            query = Query(Or(Where("hash", "in", some), Where("previous_hash", "in", some)), limit=2 * len(some))
            keys += (await self._database.find(system_context(), ApiKey, query)).items
            if any(_is_one_of(key.hash, some) and not key.hash.startswith("hint:") for key in keys):
                break  # no other key can match better
        return keys

    async def _renew(self, key: ApiKey, field: str, secret: str, changed: set[str]) -> ApiKey:
        """Bring an imported or older hash under the current pepper, now that the secret is known.

        Only if the key still has the hash that the secret was found by: a key that was rotated meanwhile keeps its own.
        """
        fields: dict[str, Any] = {field: self.hasher.hash(secret)}
        if getattr(key, field).startswith("hint:"):
            fields["verifier"] = None
        if field == "hash":
            fields["sealed"] = self.hasher.seal(hashlib.sha256(secret.encode()).digest())
            fields["display"] = masked(secret)
        context = system_context(None if key.tenant == ALL_TENANTS else key.tenant)
        found = key
        for _ in range(UPGRADE_ATTEMPTS):
            try:
                renewed = await self._database.update(context, ApiKey, key.id, fields, expected=found.version)
            except (AlreadyExists, NotFound, TenantSuspended, Unavailable):
                return key  # the old hash still works; the next use tries again
            except Conflict:
                now = await self._database.get_or_none(system_context(), ApiKey, key.id, fresh=True)
                if now is None or getattr(now, field) != getattr(key, field) or now.verifier != key.verifier:
                    return key
                found = now
            else:
                changed.discard(key.id)  # the renewed key includes earlier changes
                return renewed
        return key


def _is_one_of(stored: str, names: Sequence[str]) -> bool:
    """Whether a text is one of others, in constant time for each comparison."""
    return any(hmac.compare_digest(stored.encode(), name.encode()) for name in names)


def _hint(stored: str) -> str:
    found = hint_of_imported(stored)
    return f"{found[0].id}:{found[1]}" if found is not None else ""
