"""The keys that a process has in memory: found by their text, trusted for a while, forgotten when they are changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
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
from .lookup import KeyLookup
from .model import ApiKey
from .token import Hasher, is_possible

MAX_CACHED_KEYS = 30_000
"""A key in memory with its usage is about 5 kB, and a server is to stay below 300 MB whatever keys it is asked for. One
that had to go costs a read by its hash, a fraction of a millisecond."""
LARGE_BYTES = 1_000
MAX_LARGE_BYTES = 50_000_000
"""Keys whose metadata has more than LARGE_BYTES as JSON are kept until their metadata has so much together: 30,000 keys
with the most that metadata may have would take half a gigabyte."""
MANY = 8
"""So many texts or ids are looked up together; fewer one by one."""
MAX_UNKNOWN = 10_000
UNKNOWN_FOR_S = 1.0
"""An unknown key is remembered as unknown for this long, so that guessing costs no reads."""
TRUSTED_FOR_S = 0.75
"""A key in memory is believed for this long after it was last known to be as the store has it: the feed of changes
renews that many times a second. Where nothing else asks the store, a key is read again before it is believed further,
so that a revocation reaches every node within a second although a node's feed may be broken."""

_EVERY = ""
"""Among the keys that were changed it stands for all of them; no key has it as its id."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a text was found to be, and until when (a text that was rotated away works until its overlap ends)."""

    key: CachedKey
    until_us: int | None


class KeyCache:
    """What is known of the keys of one store. `feed` tells of changes made by others; without one they are not heard
    of (a store that no other process uses)."""

    def __init__(self, database: Database, hasher: Hasher, feed: ChangeFeed | None = None) -> None:
        self._database = database
        self._lookup = KeyLookup(database, hasher)
        self._feed = feed
        self.quotas = QuotaCache(database, feed)
        self._known: dict[bytes, _Found] = {}
        self._by_id: dict[str, CachedKey] = {}
        self._large: dict[str, int] = {}
        """The size of the metadata of keys that have much of it, by id, oldest first."""
        self._large_bytes = 0
        self._unknown: dict[bytes, float] = {}
        self._finds: SingleFlight[CachedKey | None] = SingleFlight()
        self._ids: SingleFlight[CachedKey | None] = SingleFlight()
        self._compares: SingleFlight[bool] = SingleFlight()
        self._changes = 0
        """How many changes were heard of."""
        self._reading: dict[object, set[str]] = {}
        """For each read that is under way, the keys that were changed since it began."""

    def peek(self, text: str, now_us: int) -> CachedKey | None:
        """The key behind a text if it is in memory and known to be as the store has it, to within TRUSTED_FOR_S; None
        if it takes more to tell."""
        found = self._known.get(blake2s(text.encode("utf-8", "surrogatepass")).digest())
        if found is None or found.key.stale or (found.until_us is not None and now_us >= found.until_us):
            return None
        key = found.key
        if self._feed is not None:
            now = time.monotonic()
            if now - self._feed.current_at > TRUSTED_FOR_S and now - key.checked_at > TRUSTED_FOR_S:
                return None
        return key

    def remembered(self, text: str | None, now_us: int) -> CachedKey | None:
        """The key behind a text as `find` gives it, if that takes no read; None if it does, or there is none."""
        if text is None:
            return None
        found = self._known.get(_digest(text))
        if found is None or found.key.stale or (found.until_us is not None and now_us >= found.until_us):
            return None
        return found.key

    async def find(self, text: str, now_us: int) -> CachedKey | None:
        """The key behind a text, from memory or by one read; None if there is none."""
        name = _digest(text)
        found = self._known.get(name)
        if found is not None and not found.key.stale:
            return found.key if found.until_us is None or now_us < found.until_us else None
        if not is_possible(text):
            return None
        until = self._unknown.get(name)
        if until is not None and time.monotonic() < until:
            return None
        return await self._finds.get(name, self._changes, lambda: self._find(text, name, now_us))

    async def _find(self, text: str, name: bytes, now_us: int) -> CachedKey | None:
        changed: set[str] = set()
        ticket = object()
        self._reading[ticket] = changed
        began = time.monotonic()
        try:
            found = await self._read(text, changed)
        finally:
            del self._reading[ticket]
        if found is not None and (found.key.id in changed or _EVERY in changed):
            # Read before the change, and told of it before there was anything to forget: true of the moment it was
            # read, not to be remembered.
            found.key.stale = True
            return found.key if found.until_us is None or now_us < found.until_us else None
        if found is None:
            if changed:
                return None  # it may have been made meanwhile
            if len(self._unknown) >= MAX_UNKNOWN:
                for oldest in list(self._unknown)[: MAX_UNKNOWN // 10]:
                    del self._unknown[oldest]
            self._unknown.pop(name, None)  # so that it goes to the end of the line
            self._unknown[name] = time.monotonic() + UNKNOWN_FOR_S
            return None
        found.key.checked_at = began
        if len(self._known) >= MAX_CACHED_KEYS:
            for oldest in list(self._known)[: MAX_CACHED_KEYS // 10]:
                del self._known[oldest]
        self._known.pop(name, None)
        self._known[name] = found
        return found.key if found.until_us is None or now_us < found.until_us else None

    async def unknown(self, texts: Iterable[str], now_us: int) -> set[str]:
        """Those of many texts that are no key's now, found by few reads. Of the others `find` tells which key they
        are. What is not worth a read here is left to `find` as well."""
        asked = {text for text in texts if self.remembered(text, now_us) is None and is_possible(text)}
        return await self._lookup.unknown_among(asked) if len(asked) >= MANY else set()

    async def unknown_ids(self, ids: Iterable[str]) -> set[str]:
        """Those of many ids that are no key's now, found by few reads; `by_id` gives the keys of the others."""
        asked = [id for id in set(ids) if (known := self._by_id.get(id)) is None or known.stale]
        if len(asked) < MANY:
            return set()
        found: set[str] = set()
        possible = [id for id in asked if text_problem(id, MAX_ID_BYTES) is None]
        for start in range(0, len(possible), MAX_IN):
            query = Query(Where("id", "in", possible[start : start + MAX_IN]), limit=MAX_IN, fields=())
            found.update(key["id"] for key in (await self._database.select(system_context(), ApiKey, query)).items)
            await asyncio.sleep(0)  # an embedded store answers without letting anything else run
        return set(possible) - found

    async def close(self) -> None:
        """Wait for the hashes that are being compared; keys that need that are not found any more."""
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

    def works_until_us(self, text: str) -> int | None:
        """When a text that was just found stops working because it was rotated away; None if it was not."""
        found = self._known.get(_digest(text))
        return found.until_us if found is not None else None

    async def subject_of(self, id: str) -> Subject | None:
        """The limits of an account, by its id: a key's or a quota's; None if it is there no longer."""
        if is_quota(id):
            quota = await self._database.get_or_none(system_context(), Quota, id)
            return None if quota is None else quota_subject(quota)
        key = await self._database.get_or_none(system_context(), ApiKey, id)
        return None if key is None else subjects_of(key).all[0]

    async def is_current(self, key: CachedKey) -> bool:
        """Whether a key is as the store has it, to within TRUSTED_FOR_S; if not, it is forgotten. Raises Unavailable if
        that can not be told."""
        now = time.monotonic()
        fresh = self._feed.current_at if self._feed is not None else now
        if now - max(fresh, key.checked_at) <= TRUSTED_FOR_S:
            return True
        return await self._compares.get(key, 0, lambda: self._compare(key, now))

    async def _compare(self, key: CachedKey, now: float) -> bool:
        """Whether the store has a key, and its quotas, as it is known here; if not, it is forgotten. What was found is
        true of the moment of the read, whatever has been heard since: a charge is checked again when it commits."""
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

    async def _read(self, text: str, changed: set[str]) -> _Found | None:
        found = await self._lookup.find(text, changed)
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
        if changes != self.quotas.changes:  # true of the moment it was read, not to be remembered
            known = CachedKey(key, quotas)
            known.stale = True
            return known
        if len(self._by_id) >= MAX_CACHED_KEYS:
            for oldest in list(self._by_id)[: MAX_CACHED_KEYS // 10]:
                self._by_id.pop(oldest).stale = True
        known = self._by_id[key.id] = CachedKey(key, quotas)
        if key.metadata and (size := len(msgspec.json.encode(key.metadata))) > LARGE_BYTES:
            self._make_room_for(key.id, size)
        return known

    def _make_room_for(self, id: str, size: int) -> None:
        """Count a large key, and forget the oldest ones of these if they have too much together."""
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

    # --- Forgetting what was changed --------------------------------------------------------------------------

    def changed(self, id: str) -> None:
        """A key was changed, here or on another node: read it again at its next use."""
        self._changes += 1
        self.forget(id)
        self._unknown.clear()
        for changed in self._reading.values():
            changed.add(id)

    def quota_changed(self, id: str) -> None:
        """A quota was made, changed or removed, here or on another node: so were the limits of the keys it is for."""
        self._changes += 1
        self.quotas.changed(id)
        for key in [known.id for known in self._by_id.values() if id in known.quota_ids]:
            self.forget(key)

    @property
    def hasher(self) -> Hasher:
        """Makes the hashes that keys are stored and found by."""
        return self._lookup.hasher

    def use(self, hasher: Hasher) -> None:
        """Make and find hashes with other peppers from now on; what was unknown may be known to them."""
        self._changes += 1
        self._lookup.hasher = hasher
        self._unknown.clear()

    def outdated(self, key: CachedKey) -> None:
        """The store has the key, or a quota of it, otherwise than it is known here, where nobody has heard of it yet:
        read all of it again."""
        if self._by_id.get(key.id) is key:  # else it was read again already
            self._changes += 1
            self.forget(key.id)
        key.stale = True
        if key.subjects.shared:
            self.quotas.forget(key.tenant)

    def forget_all(self) -> None:
        """Nothing that is known can be believed: read every key, and every quota, again at its next use."""
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
