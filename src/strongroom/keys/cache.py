"""The keys in a process's memory: found by their secret, trusted for a short time, forgotten when they are changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2s

import msgspec

from ..cache import SingleFlight
from ..context import system_context, text_problem, us_from_utc
from ..database import Database
from ..entities import MAX_ID_BYTES, MAX_IN, Query, Where
from ..journal import ChangeFeed
from ..limits import Subject
from ..quotas import Quota, is_quota, quota_subject
from ..quotas.cache import QuotaCache
from .cached_key import CachedKey, quota_ids, subjects_of
from .hasher import Hasher
from .lookup import KeyLookup
from .model import ApiKey
from .token import is_possible

MAX_CACHED_KEYS = 30_000
"""A key in memory with its usage takes about 5 kB, and a server must stay below 300 MB. A key that was evicted costs a
read by its hash, a fraction of a millisecond."""
LARGE_BYTES = 1_000
MAX_LARGE_BYTES = 50_000_000
"""The most that the metadata of all large keys together may take, as JSON. A key is large if its metadata has more than
LARGE_BYTES: 30,000 keys with the largest metadata would take half a gigabyte."""
MANY = 8
"""From this number on, secrets or ids are looked up together; fewer are looked up one by one."""
MAX_UNKNOWN = 10_000
UNKNOWN_FOR_S = 1.0
"""An unknown secret is remembered as unknown for this time, so that guesses cost no reads."""
TRUSTED_FOR_S = 0.75
"""A key in memory is trusted for this time after the store was last known to have the same. The change feed renews that
several times a second. If the feed is broken, a key is read again before it is trusted further, so that a revocation
reaches every node within a second."""

_EVERY = ""
"""Stands for all keys among the ids of changed keys; no key has this id."""


@dataclass(frozen=True, slots=True)
class _Found:
    """The key of a secret, and until when (a secret that was rotated away works until its overlap ends)."""

    key: CachedKey
    until_us: int | None


class KeyCache:
    """The keys of one store that this process has in memory. `feed` reports changes by other processes; None: no other
    process uses the store."""

    def __init__(self, database: Database, hasher: Hasher, feed: ChangeFeed | None = None) -> None:
        self._database = database
        self._lookup = KeyLookup(database, hasher)
        self._feed = feed
        self.quotas = QuotaCache(database, feed)
        self.suspended: Mapping[str, str] = {}
        """The suspended tenants, and why: their keys are not enabled."""
        self._known: dict[bytes, _Found] = {}
        self._by_id: dict[str, CachedKey] = {}
        self._large: dict[str, int] = {}
        """The metadata size of large keys, by id, oldest first."""
        self._large_bytes = 0
        self._unknown: dict[bytes, float] = {}
        self._finds: SingleFlight[CachedKey | None] = SingleFlight()
        self._ids: SingleFlight[CachedKey | None] = SingleFlight()
        self._compares: SingleFlight[bool] = SingleFlight()
        self._changes = 0
        """The number of changes that were reported."""
        self._reading: dict[object, set[str]] = {}
        """For each read under way, the keys that were changed since it began."""

    def peek(self, secret: str, now_us: int) -> CachedKey | None:
        """The key of a secret if it is in memory and was the same in the store within TRUSTED_FOR_S; None if that takes
        a read to tell."""
        found = self._known.get(blake2s(secret.encode("utf-8", "surrogatepass")).digest())
        if found is None or found.key.stale or (found.until_us is not None and now_us >= found.until_us):
            return None
        key = found.key
        if self._feed is not None:
            now = time.monotonic()
            if now - self._feed.current_at > TRUSTED_FOR_S and now - key.checked_at > TRUSTED_FOR_S:
                return None
        return key

    def remembered(self, secret: str | None, now_us: int) -> CachedKey | None:
        """The key of a secret as `find` gives it, if it is in memory; else None."""
        if secret is None:
            return None
        found = self._known.get(_digest(secret))
        if found is None or found.key.stale or (found.until_us is not None and now_us >= found.until_us):
            return None
        return found.key

    async def find(self, secret: str, now_us: int) -> CachedKey | None:
        """The key of a secret, from memory or by one read; None if there is none."""
        name = _digest(secret)
        found = self._known.get(name)
        if found is not None and not found.key.stale:
            return found.key if found.until_us is None or now_us < found.until_us else None
        if not is_possible(secret):
            return None
        until = self._unknown.get(name)
        if until is not None and time.monotonic() < until:
            return None
        return await self._finds.get(name, self._changes, lambda: self._find(secret, name, now_us))

    async def _find(self, secret: str, name: bytes, now_us: int) -> CachedKey | None:
        changed: set[str] = set()
        ticket = object()
        self._reading[ticket] = changed
        began = time.monotonic()
        try:
            found = await self._read(secret, changed)
        finally:
            del self._reading[ticket]
        if found is not None and (found.key.id in changed or _EVERY in changed):
            # The key was read before the change, and the change was reported before the key was in memory: it is true
            # of the moment of the read, and must not be kept.
            found.key.stale = True
            return found.key if found.until_us is None or now_us < found.until_us else None
        if found is None:
            if changed:
                return None  # the key may have been created meanwhile
            if len(self._unknown) >= MAX_UNKNOWN:
                for oldest in list(self._unknown)[: MAX_UNKNOWN // 10]:
                    del self._unknown[oldest]
            self._unknown.pop(name, None)  # so that it becomes the newest
            self._unknown[name] = time.monotonic() + UNKNOWN_FOR_S
            return None
        found.key.checked_at = began
        if len(self._known) >= MAX_CACHED_KEYS:
            for oldest in list(self._known)[: MAX_CACHED_KEYS // 10]:
                del self._known[oldest]
        self._known.pop(name, None)
        self._known[name] = found
        return found.key if found.until_us is None or now_us < found.until_us else None

    async def unknown(self, secrets: Iterable[str], now_us: int) -> set[str]:
        """Those of many secrets that belong to no key, found by few reads. `find` gives the keys of the others. Fewer
        than MANY secrets are left to `find` too."""
        asked = {one for one in secrets if self.remembered(one, now_us) is None and is_possible(one)}
        return await self._lookup.unknown_among(asked) if len(asked) >= MANY else set()

    async def unknown_ids(self, ids: Iterable[str]) -> set[str]:
        """Those of many ids that belong to no key, found by few reads. `by_id` gives the keys of the others."""
        asked = [id for id in set(ids) if (known := self._by_id.get(id)) is None or known.stale]
        if len(asked) < MANY:
            return set()
        found: set[str] = set()
        possible = [id for id in asked if text_problem(id, MAX_ID_BYTES) is None]
        for start in range(0, len(possible), MAX_IN):
            query = Query(Where("id", "in", possible[start : start + MAX_IN]), limit=MAX_IN, fields=())
            found.update(key["id"] for key in (await self._database.select(system_context(), ApiKey, query)).items)
            await asyncio.sleep(0)  # an embedded store answers without giving up the event loop
        return set(possible) - found

    async def close(self) -> None:
        """Wait for the slow hashes that are being compared. Keys with a slow hash are not found any more."""
        await self._lookup.slow.close()

    async def by_id(self, id: str) -> CachedKey | None:
        """The key of an id, from memory or by one read; None if there is none."""
        known = self._by_id.get(id)
        if known is None or known.stale:
            return await self._ids.get(id, self._changes, lambda: self._by_its_id(id))
        return known

    async def _by_its_id(self, id: str) -> CachedKey | None:
        key = await self._database.get_or_none(system_context(), ApiKey, id)
        return await self._remember(key) if key is not None else None

    def works_until_us(self, secret: str) -> int | None:
        """When a secret that was just found stops working because it was rotated away; None if it was not."""
        found = self._known.get(_digest(secret))
        return found.until_us if found is not None else None

    async def subject_of(self, id: str) -> Subject | None:
        """The limits of a key or a quota, by its id, as stored; None if it does not exist any more."""
        if is_quota(id):
            quota = await self._database.get_or_none(system_context(), Quota, id)
            return None if quota is None else quota_subject(quota)
        key = await self._database.get_or_none(system_context(), ApiKey, id)
        return None if key is None else subjects_of(key).all[0]

    async def is_current(self, key: CachedKey) -> bool:
        """Whether the store had the same key within TRUSTED_FOR_S; if not, the key is forgotten. Raises Unavailable if
        the store is out of reach."""
        now = time.monotonic()
        fresh = self._feed.current_at if self._feed is not None else now
        if now - max(fresh, key.checked_at) <= TRUSTED_FOR_S:
            return True
        return await self._compares.get(key, 0, lambda: self._compare(key, now))

    async def _compare(self, key: CachedKey, now: float) -> bool:
        """Whether the store has the same key and quotas; if not, the key is forgotten. The result is true of the moment
        of the read: a commit checks the key again."""
        stored = await self._database.get_or_none(system_context(), ApiKey, key.id)
        same = stored is not None and stored.version == key.subjects.guard.expected
        if stored is not None and same:
            shared = {subject.guard.id: subject.guard.expected for subject in key.subjects.shared}
            quotas = await self.quotas.of(stored.tenant, quota_ids(stored))
            same = shared == {quota.id: quota.version for quota in quotas if quota.limits}
        if not same:
            if self._by_id.get(key.id) is key:
                self.forget(key.id)
            key.stale = True
            self._unknown.clear()
            return False
        key.checked_at = now
        return True

    async def _read(self, secret: str, changed: set[str]) -> _Found | None:
        found = await self._lookup.find(secret, changed)
        if found is None:
            return None
        key, until = found
        return _Found(await self._remember(key), None if until is None else us_from_utc(until))

    async def _remember(self, key: ApiKey) -> CachedKey:
        known = self._by_id.get(key.id)
        if known is not None and not known.stale and known.subjects.guard.expected == key.version:
            return known
        changes = self.quotas.changes
        quotas = await self.quotas.of(key.tenant, quota_ids(key))
        known = self._by_id.pop(key.id, None)
        if known is not None:
            known.stale = True
        if changes != self.quotas.changes:  # true of the moment of the read, and must not be kept
            known = CachedKey(key, quotas, self.suspended.get(key.tenant))
            known.stale = True
            return known
        if len(self._by_id) >= MAX_CACHED_KEYS:
            for oldest in list(self._by_id)[: MAX_CACHED_KEYS // 10]:
                self._by_id.pop(oldest).stale = True
        known = self._by_id[key.id] = CachedKey(key, quotas, self.suspended.get(key.tenant))
        if key.metadata and (size := len(msgspec.json.encode(key.metadata))) > LARGE_BYTES:
            self._make_room_for(key.id, size)
        return known

    def _make_room_for(self, id: str, size: int) -> None:
        """Count a large key, and forget the oldest large keys if they take too much together."""
        self._large_bytes += size - self._large.pop(id, 0)
        self._large[id] = size
        if self._large_bytes <= MAX_LARGE_BYTES:
            return
        for oldest in list(self._large)[:-1]:
            if self._large_bytes <= MAX_LARGE_BYTES * 0.9:
                break
            self._large_bytes -= self._large.pop(oldest)
            if (known := self._by_id.pop(oldest, None)) is not None:
                known.stale = True
        self._known = {name: found for name, found in self._known.items() if not found.key.stale}

    # --- Invalidation -----------------------------------------------------------------------------------------

    def changed(self, id: str) -> None:
        """A key was changed, here or on another node: read it again at its next use."""
        self._changes += 1
        self.forget(id)
        self._unknown.clear()
        for changed in self._reading.values():
            changed.add(id)

    def quota_changed(self, id: str) -> None:
        """A quota was created, changed or removed, here or on another node: forget the keys that share it."""
        self._changes += 1
        self.quotas.changed(id)
        for key in [known.id for known in self._by_id.values() if id in known.quota_ids]:
            self.forget(key)

    def tenant_changed(self, tenant: str) -> None:
        """A tenant was suspended or resumed: read its keys again at their next use."""
        for known in [known for known in self._by_id.values() if known.tenant == tenant]:
            self.forget(known.id)

    @property
    def hasher(self) -> Hasher:
        """Makes the hashes that keys are stored and found by."""
        return self._lookup.hasher

    def use(self, hasher: Hasher) -> None:
        """Make and find hashes with other peppers from now on. They may find secrets that were unknown."""
        self._changes += 1
        self._lookup.hasher = hasher
        self._unknown.clear()

    def outdated(self, key: CachedKey) -> None:
        """A commit found that the store has another version of the key or of a quota of it, before the change feed
        reported that: read them again."""
        if self._by_id.get(key.id) is key:  # else it was read again meanwhile
            self._changes += 1
            self.forget(key.id)
        key.stale = True
        if key.subjects.shared:
            self.quotas.forget(key.tenant)

    def forget_all(self) -> None:
        """Changes were missed: read every key and every quota again at its next use."""
        for known in self._by_id.values():
            known.stale = True
        self._by_id.clear()
        self._known.clear()
        self._unknown.clear()
        self.quotas.forget_all()
        for changed in self._reading.values():
            changed.add(_EVERY)

    def forget(self, id: str) -> None:
        """Read a key again at its next use."""
        known = self._by_id.pop(id, None)
        if known is not None:
            known.stale = True


def _digest(secret: str) -> bytes:
    """The name of a secret in this process's memory, which keeps no secret in clear. It is stored nowhere: BLAKE2s is
    the fastest of the strong hashes on so short a text."""
    return blake2s(secret.encode("utf-8", "surrogatepass")).digest()
