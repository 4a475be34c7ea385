"""The read-through cache: this process's memory first, then Redis, then the store, for entities that declare it.

Only `Database.get`, `get_or_none` and the declared lists of `find` read through it; reads inside a transaction never
do. The access rules and a document's own expiry apply to what the cache answers as to what the store answers.

A read through the cache returns a state that was true at most MAX_BEHIND_S ago. The change feed reports every commit,
and both tiers remove what the commit changed. While the feed is further behind, reads go to the store.

The local tier never keeps a value that was invalidated while it was being read. An invalidation that overtakes a read
of the store (a flight) detaches it: its present callers get the value, it is not kept, and no later caller joins it.
`redis_tier` proves the same for Redis, without relying on other nodes. Lifetimes only bound how long unused entries
take up memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..entities import DEFAULT_LIMIT, And, CachedList, Collection, Document, Filter, Op, Query, Where
from ..errors import ConfigError, SchemaError
from ..journal import ChangeFeed
from ..storage.port import Record, Store
from .entry import ABSENT, MAX_ENTRY_BYTES, Entry, decode_body, encode_body, key_of, shape_of
from .stats import CacheStats

if TYPE_CHECKING:
    from .redis_tier import RedisTier

MAX_BEHIND_S = 1.0
"""How far the change feed may be behind before reads go to the store. Normally it is at most POLL_S behind."""
MAX_LOCAL_ENTRIES = 10_000
MAX_LOCAL_BYTES = 67_108_864
MAX_LISTED = DEFAULT_LIMIT
MEMORY_URL = "memory://"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Target:
    """What one read looks for: its key, how long to keep the value, and the documents' shape."""

    key: str
    collection: Collection
    seconds: float
    absent_s: float
    shape: int


@dataclass(slots=True)
class _Local:
    body: bytes
    version: int
    until: float


class Cache:
    """The two tiers. Create it before the change feed starts, `start` it after that, and `close` it before the feed."""

    def __init__(
        self,
        store: Store,
        feed: ChangeFeed,
        collections: Sequence[Collection],
        url: str = MEMORY_URL,
        namespace: str = "",
        *,
        local_entries: int = MAX_LOCAL_ENTRIES,
    ) -> None:
        """`url`: `redis://…`, `rediss://…`, `unix://…`, or `memory://` for the local tier alone. `namespace` separates
        this store from others on the same Redis. Raises ConfigError, SchemaError."""
        self.stats = CacheStats()
        self._store = store
        self._feed = feed
        self.local_entries = local_entries
        """How many documents and lists this process keeps. With 0 every read asks Redis."""
        self._local: OrderedDict[str, _Local] = OrderedDict()
        self._local_bytes = 0
        self._heard = 0
        self._flights: dict[str, asyncio.Task[bytes]] = {}
        self._landing: set[asyncio.Task[bytes]] = set()
        self._cached = {c.name: (c, c.cached, shape_of(c)) for c in collections if c.cached is not None}
        _check_names(spec for _, spec, _ in self._cached.values())
        self._redis = self._open(url, namespace)
        feed.on_record(self._seen)
        feed.on_reset(lambda: self._distrust("the change feed may have missed records"))

    def _open(self, url: str, namespace: str) -> RedisTier | None:
        if url == MEMORY_URL:
            return None
        try:
            from .redis_tier import RedisTier
        except ImportError:
            raise ConfigError("cache: Redis needs its client: pip install 'strongroom[redis]'") from None
        return RedisTier(url, namespace, self.stats, self._forget_local)

    def start(self) -> None:
        """Begin to connect to Redis in the background: a start never waits for it. The change feed must run by now."""
        if self._redis is not None:
            self._redis.start()

    async def close(self) -> None:
        """Cancel the reads in flight and disconnect. Idempotent."""
        for flight in self._landing:
            flight.cancel()
        await asyncio.gather(*self._landing, return_exceptions=True)
        if self._redis is not None:
            await self._redis.close()

    @property
    def redis_state(self) -> str:
        """The circuit breaker of Redis: `closed` (in use), `stalled`, `open` (out of reach), `none` (not used)."""
        return self._redis.state if self._redis is not None else "none"

    # --- Reading ----------------------------------------------------------------------------------------------

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        """As Store.get, from the nearest tier that has the document. Every call gets objects of its own."""
        if collection not in self._cached:
            return await self._store.get(collection, tenant, id)
        declared, spec, shape = self._cached[collection]
        target = _Target(key_of(tenant, spec.name, id), declared, spec.seconds, spec.absent_s, shape)
        document: Document | None = await self._read(target, lambda: self._store.get(collection, tenant, id))
        return document

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        """As Store.find. The first page of a declared list (MAX_LISTED and one more) comes from the nearest tier."""
        found = self._list_of(collection, query)
        if found is None:
            return await self._store.find(collection, tenant, query)
        declared, spec, shape = self._cached[collection]
        listed, value = found
        target = _Target(_list_key(tenant, listed, value), declared, spec.seconds, spec.seconds, shape)
        whole = replace(query, limit=MAX_LISTED + 1)
        documents: list[Document] = await self._read(target, lambda: self._store.find(collection, tenant, whole))
        return documents[: query.limit]

    def _list_of(self, collection: str, query: Query) -> tuple[CachedList, Any] | None:
        """The declared list that answers this checked query, and its value; None if none does."""
        if collection not in self._cached or query.limit > MAX_LISTED + 1:
            return None
        equal = _equalities(query.where)
        if equal is None or query.fields is not None or query.start_after is not None:
            return None
        for listed in self._cached[collection][1].lists:
            value = equal.get(listed.by)
            if (
                listed.order_by == query.order_by
                and value is not None
                and equal == {**dict(listed.where), listed.by: value}
            ):
                return listed, value
        return None

    async def _read(self, target: _Target, load: Callable[[], Awaitable[Any]]) -> Any:
        if self._feed.behind_s > MAX_BEHIND_S:
            self.stats.bypassed += 1
            return await load()
        body = self._local_body(target.key)
        if body is None:
            body = await self._beyond_local(target, load)
        elif body == ABSENT:
            self.stats.absent_hits += 1
        try:
            return decode_body(body)
        except ValueError:  # the checksum is right, so another release wrote it
            self.stats.unusable += 1
            self._forget(target.key, 0)
            return await load()

    async def _beyond_local(self, target: _Target, load: Callable[[], Awaitable[Any]]) -> bytes:
        key = target.key
        unusable = b""
        if key not in self._flights and self._redis is not None and self._redis.usable:
            heard = self._heard
            found = await self._redis.get(key, target.shape)
            if isinstance(found, Entry):
                if heard == self._heard:  # else it may be the value that was just invalidated
                    self._keep_found(target, found, self._redis.age_s(found))
                self._count_redis_hit(found)
                return found.body
            unusable = found or b""
            body = self._local_body(key)  # another caller's flight may have ended while Redis was asked
            if body is not None:
                return body
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.get_running_loop().create_task(self._fly(target, load, unusable))
            self._flights[key] = flight
            self._landing.add(flight)
            flight.add_done_callback(self._landed)
        else:
            self.stats.shared += 1
        return await asyncio.shield(flight)  # other callers wait for it too: a cancelled caller must not end it

    def _landed(self, flight: asyncio.Task[bytes]) -> None:
        self._landing.discard(flight)
        if not flight.cancelled():
            flight.exception()  # its callers were told; all of them may have gone

    async def _fly(self, target: _Target, load: Callable[[], Awaitable[Any]], unusable: bytes) -> bytes:
        """One read of the store for all present callers of this key, or another node's fill."""
        key = target.key
        redis = self._redis if self._redis is not None and self._redis.usable else None
        try:
            lease = None
            if redis is not None:
                claimed = await redis.claim(key, target.shape, unusable)
                if isinstance(claimed, Entry):
                    if self._is_current(key):
                        self._keep_found(target, claimed, redis.age_s(claimed))
                    self._count_redis_hit(claimed)
                    return claimed.body
                lease = claimed
            self.stats.misses += 1
            try:
                value = await load()
            except BaseException:
                if redis is not None and lease is not None:
                    redis.give_back(lease)
                raise
            version = value["version"] if isinstance(value, dict) else 0
            entry = Entry(encode_body(value, target.collection), version)
            seconds = target.absent_s if value is None else target.seconds
            if redis is not None and lease is not None:
                redis.fill(lease, target.shape, entry, seconds)
            if self._is_current(key):
                self._keep(key, entry, seconds)
            return entry.body
        finally:
            if self._is_current(key):
                del self._flights[key]

    def _is_current(self, key: str) -> bool:
        """Whether this key was not invalidated since the present task began to read it."""
        return self._flights.get(key) is asyncio.current_task()

    def _count_redis_hit(self, entry: Entry) -> None:
        self.stats.redis_hits += 1
        self.stats.absent_hits += entry.body == ABSENT

    # --- The local tier ---------------------------------------------------------------------------------------

    def _local_body(self, key: str) -> bytes | None:
        found = self._local.get(key)
        if found is None:
            return None
        if found.until <= time.monotonic():
            self._forget_local(key)
            return None
        self._local.move_to_end(key)
        self.stats.local_hits += 1
        return found.body

    def _keep_found(self, target: _Target, entry: Entry, age_s: float) -> None:
        """Keep an entry of Redis for the rest of its lifetime."""
        seconds = target.absent_s if entry.body == ABSENT else target.seconds
        self._keep(target.key, entry, seconds - age_s)

    def _keep(self, key: str, entry: Entry, seconds: float) -> None:
        self._forget_local(key)
        if seconds <= 0 or len(entry.body) > MAX_ENTRY_BYTES or self.local_entries == 0:
            return
        self._local[key] = _Local(entry.body, entry.version, time.monotonic() + seconds)
        self._local_bytes += len(key) + len(entry.body)
        while len(self._local) > self.local_entries or self._local_bytes > MAX_LOCAL_BYTES:
            self._forget_local(next(iter(self._local)))

    def _forget_local(self, key: str) -> None:
        found = self._local.pop(key, None)
        if found is not None:
            self._local_bytes -= len(key) + len(found.body)

    # --- Forgetting -------------------------------------------------------------------------------------------

    def changed(
        self,
        collection: str,
        tenant: str | None,
        id: str,
        version: int,
        before: Mapping[str, Any] | None,
        after: Mapping[str, Any] | None,
    ) -> None:
        """A commit changed a document: remove the entries that it outdates from both tiers, before the next read here.

        `version`: the document's new version, whose entry may stay; 0 if it is unknown or the document was deleted.
        `before`, `after`: fields of the document, among them the fields that its lists are keyed by.
        """
        if collection not in self._cached:
            return
        self.stats.invalidations += 1
        self._heard += 1
        spec = self._cached[collection][1]
        self._forget(key_of(tenant, spec.name, id), version)
        for listed in spec.lists:
            values = {part.get(listed.by, _UNKNOWN) for part in (before, after) if part is not None}
            if _UNKNOWN in values or not values:  # a record of an older release: any list may be outdated
                self._distrust(f"a change of {collection} does not name its list {listed.name}")
            for value in values - {None, _UNKNOWN}:
                self._forget(_list_key(tenant, listed, value), 0)

    def _forget(self, key: str, version: int) -> None:
        kept = self._local.get(key)
        if kept is not None and (version == 0 or kept.version != version):
            self._forget_local(key)
        self._flights.pop(key, None)
        if self._redis is not None:
            self._redis.forget(key, version)

    def _distrust(self, reason: str) -> None:
        self._heard += 1
        self._local.clear()
        self._local_bytes = 0
        self._flights.clear()
        if self._redis is not None:
            self._redis.distrust(reason)

    def _seen(self, record: Record) -> None:
        """A journal record of any process."""
        if record.collection not in self._cached or record.action == "deny":
            return
        collection = self._cached[record.collection][0]
        tenant = record.tenant if collection.tenant_scoped else None
        try:
            self.changed(record.collection, tenant, record.entity_id, record.version or 0, record.before, record.after)
        except Exception:  # a record that cannot be decoded may have changed anything
            _log.exception("journal record %s cannot be decoded: the cache drops all entries", record.id)
            self._distrust("a journal record cannot be decoded")


_UNKNOWN = object()


def _list_key(tenant: str | None, listed: CachedList, value: Any) -> str:
    return key_of(tenant, listed.name, str(value))


def _equalities(where: Filter | None) -> dict[str, Any] | None:
    """Field and value of each comparison, if all are `==` and must hold together; else None."""
    parts = where.filters if isinstance(where, And) else (where,)
    equal: dict[str, Any] = {}
    for part in parts:
        if not isinstance(part, Where) or part.op is not Op.EQ or part.field in equal:
            return None
        equal[part.field] = part.value
    return equal


def _check_names(specs: Any) -> None:
    taken: set[str] = set()
    for spec in specs:
        for name in (spec.name, *(listed.name for listed in spec.lists)):
            if name in taken:
                raise SchemaError(f"two entities are cached under the name {name!r}: rename one")
            taken.add(name)
