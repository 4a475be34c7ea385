"""Finds the stored key of a text by one read, whichever hash that has, and renews hashes that are not ours."""

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
from ..errors import AlreadyExists, Conflict, NotFound, Unavailable
from .model import ApiKey
from .slow_hash import SlowHashPool
from .token import Hasher, hint_of_imported, masked

NAMES_A_READ = MAX_DISJUNCTIONS // 2
"""Hashes and hints that one read asks for, each as the present and as the previous one. More take more reads: that is
so with more than a few peppers, imported secrets and kinds of hints."""
UPGRADE_ATTEMPTS = 3


class KeyLookup:
    """The keys of one store, by their text."""

    def __init__(self, database: Database, hasher: Hasher) -> None:
        self._database = database
        self.hasher = hasher
        self.slow = SlowHashPool()

    async def find(self, text: str, changed: set[str]) -> tuple[ApiKey, datetime | None] | None:
        """The key of a text, a deleted one too, and until when the text is the key's if it was rotated away; None if
        there is none.

        A key whose hash is not the current pepper's is renewed; its id is then taken out of `changed`. Raises
        TooManyRequests where a slow hash cannot be compared now, and what the database raises.
        """
        hasher = self.hasher
        names = hasher.candidates(text)
        if self._database.embedded:
            # Nearly every key has the first of these hashes: an embedded store finds that by one look into one index,
            # where all of them are six looks into two; and if it is not there, the second read costs no trip.
            query = Query(Where("hash", "==", names[0]), limit=1)
            for key in (await self._database.find(system_context(), ApiKey, query)).items:
                if _is_one_of(key.hash, names):
                    return key, None
        hints = hasher.hints(text)
        keys = await self._stored([*names, *hints])
        for key in keys:
            if _is_one_of(key.hash, names):
                return (key if hasher.is_current(key.hash) else await self._renew(key, "hash", text, changed)), None
        for key in keys:
            if key.previous_hash is not None and _is_one_of(key.previous_hash, names):
                return (key, key.previous_until) if key.previous_until is not None else None
        for key in keys:
            if key.verifier is None:
                continue
            field = "hash" if key.hash in hints else "previous_hash"
            if field == "previous_hash" and key.previous_until is None:
                continue
            if await self.slow.matches(_hint(getattr(key, field)), text, key.verifier):
                until = None if field == "hash" else key.previous_until
                return await self._renew(key, field, text, changed), until
        return None

    async def unknown_among(self, texts: Iterable[str]) -> set[str]:
        """Those of many texts that no key has, now or before its last rotation: by a read of NAMES_A_READ hashes at a
        time, where `find` takes one or two reads for each text. Of the others `find` tells which key they are."""
        unknown: set[str] = set()
        slices = Slices()
        some: dict[str, list[str]] = {}
        size = 0
        for text in texts:
            await slices.pause()
            names = [*self.hasher.candidates(text), *self.hasher.hints(text)]
            if size + len(names) > NAMES_A_READ and some:
                unknown |= await self._without_key(some)
                some, size = {}, 0
            if len(names) <= NAMES_A_READ:  # else `find` asks for them in turn
                some[text] = names
                size += len(names)
        if some:
            unknown |= await self._without_key(some)
        return unknown

    async def _without_key(self, texts: Mapping[str, Sequence[str]]) -> set[str]:
        """Those of a few texts, given with their names, under none of whose names a key is stored."""
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
                break  # the others cannot be found under a better name
        return keys

    async def _renew(self, key: ApiKey, field: str, text: str, changed: set[str]) -> ApiKey:
        """Bring an imported or older hash under the current pepper, now that the text is known.

        Only if the key still has the hash that the text was found by: one that was rotated meanwhile keeps its own.
        """
        fields: dict[str, Any] = {field: self.hasher.hash(text)}
        if getattr(key, field).startswith("hint:"):
            fields["verifier"] = None
        if field == "hash":
            fields["sealed"] = self.hasher.seal(hashlib.sha256(text.encode()).digest())
            fields["display"] = masked(text)
        context = system_context(None if key.tenant == ALL_TENANTS else key.tenant)
        found = key
        for _ in range(UPGRADE_ATTEMPTS):
            try:
                renewed = await self._database.update(context, ApiKey, key.id, fields, expected=found.version)
            except (AlreadyExists, NotFound, Unavailable):
                return key  # the old hash is as good; the next use tries again
            except Conflict:
                now = await self._database.get_or_none(system_context(), ApiKey, key.id, fresh=True)
                if now is None or getattr(now, field) != getattr(key, field) or now.verifier != key.verifier:
                    return key
                found = now
            else:
                changed.discard(key.id)  # what was changed before is in it
                return renewed
        return key


def _is_one_of(stored: str, names: Sequence[str]) -> bool:
    """Whether a text is among others; how long it takes says nothing of how far any two are the same."""
    return any(hmac.compare_digest(stored.encode(), name.encode()) for name in names)


def _hint(stored: str) -> str:
    found = hint_of_imported(stored)
    return f"{found[0].id}:{found[1]}" if found is not None else ""
