"""The Redis tier: entries that every node may read, and why none of them is older than what its reader knows.

What a node relies on. Let F be the node's change feed and C a commit that F has reported to it. Whatever the node then
reads from Redis for a key that C changed was read from the store after C. Four rules ensure this:

1. *A fill lease comes before each read of the store.* A node that misses takes a lease on the key (a random token as
   its value), and only then reads the store. The fill is refused unless the same lease is still there. So an entry's
   content is not older than its lease.
2. *Each node removes what its own feed reports.* For every journal record, and for its own commits at once, it sends
   `forget`, which removes the entry or the lease. Its own reads follow on the same connection, and Redis executes the
   commands of a connection in order. So an entry that it reads afterwards was leased after the `forget`, hence after
   C, or has C's own version. `forget` leaves that version in place: no id ever has one version twice.
3. *A connection begins with a ticket.* Each lease and each new connection draws a greater number from one counter in
   Redis, and an entry carries the ticket of its lease. A node uses only entries whose ticket is greater than its
   connection's. They were leased after it connected, and by then F had reported everything to it. So it does not
   matter what happened before: lost commands, a restart from an old snapshot, a crash between a commit and its
   `forget`, a store restored from a backup. The counter is never less than Redis' clock in microseconds, so that it
   grows past what was flushed.
4. *A refused `forget` ends the connection*, and so does an answer that does not come. Rule 3 then applies.

The rules need no other node to do its part, and no clock. Late commands of an abandoned connection do no harm: a
`forget` removes, a fill finds its lease gone or still valid (and has its ticket), and an unfilled lease expires.

The rules rest on one Redis server for the whole connection. A proxy that switches an open connection to a replica that
lags could bring removed entries back, until their lifetime ends. Redis Cluster is not supported.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha1
from typing import Any

from redis.exceptions import ResponseError

from .entry import LEASE, MAX_ENTRY_BYTES, Entry, is_lease, seal, unseal, version_bytes
from .redis_connection import ANSWER_TIMEOUT_S, RedisConnection, RedisGone
from .stats import CacheStats

LEASE_S = 2.0
"""How long a fill lease lasts: its holder reads the store meanwhile. A fill after that is refused."""
OTHERS_FILL_S = 0.1
"""How long a reader waits for another node's fill before it takes the lease over."""
OTHERS_POLL_S = 0.005
_log = logging.getLogger(__name__)

_TICKET = """
local last = redis.pcall('GET', COUNTER)
last = type(last) == 'string' and tonumber(last) or 0
local time = redis.call('TIME')
local ticket = math.max(last + 1, time[1] * 1000000 + time[2])
redis.call('SET', COUNTER, string.format('%.0f', ticket))
"""
JOIN = f"""
local COUNTER = KEYS[1]
{_TICKET}
return ticket
"""
CLAIM = f"""
local found = redis.pcall('GET', KEYS[1])
if type(found) == 'string' and found ~= ARGV[3] then return found end
local COUNTER = KEYS[2]
{_TICKET}
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ticket
"""
FILL = """
if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('EXISTS', KEYS[1])  -- a read, so that Redis tells the filler too when another node removes it
return 1
"""
FORGET = """
if ARGV[1] ~= '' then
  local found = redis.pcall('GET', KEYS[1])
  if type(found) == 'string' and string.sub(found, 1, 2) == 'E1' and string.sub(found, 11, 18) == ARGV[1] then
    return 0
  end
end
return redis.call('DEL', KEYS[1])
"""
SCRIPTS = {
    name: sha1(text.encode(), usedforsecurity=False).hexdigest()
    for name, text in (("join", JOIN), ("claim", CLAIM), ("fill", FILL), ("forget", FORGET))
}


@dataclass(frozen=True, slots=True)
class FillLease:
    """The right to fill a key. It ends with an invalidation, and after LEASE_S."""

    key: str
    token: bytes
    ticket: int


class RedisTier:
    """Entries in Redis, below `strongroom:{namespace}:`. An entry that Redis does not return in time counts as
    absent, and no error of Redis is raised."""

    def __init__(
        self,
        url: str,
        namespace: str,
        stats: CacheStats,
        changed: Callable[[str], None],
        *,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """`changed` is called with each key that this node has read and another node fills or removes."""
        self._prefix = f"strongroom:{namespace}:"
        self._counter = f"strongroom:{namespace}"
        self._stats = stats
        self._changed = changed
        self._floor = 0
        self._joined_at = 0.0
        self._connection = RedisConnection(url, self._join, self._pushed, answer_timeout_s=answer_timeout_s)

    def start(self) -> None:
        """Begin to connect, in the background. The change feed must have begun before."""
        self._connection.start()

    async def close(self) -> None:
        await self._connection.close()

    @property
    def usable(self) -> bool:
        return self._connection.ready and not self._connection.stalled

    @property
    def state(self) -> str:
        """`closed`: in use; `stalled`: an answer is overdue; `open`: no connection, the next attempt is under way."""
        return ("stalled" if self._connection.stalled else "closed") if self._connection.ready else "open"

    # --- Reading and filling ----------------------------------------------------------------------------------

    async def get(self, key: str, shape: int) -> Entry | bytes | None:
        """The entry of a key, or the bytes there that are no usable entry (b"": nothing); None without an answer."""
        try:
            found: bytes | None = await self._connection.get(self._prefix + key)
        except (RedisGone, ResponseError) as error:
            self._failed(error)
            return None
        if found is None:
            return b""
        return self._usable(key, shape, found) or found

    def _usable(self, key: str, shape: int, found: bytes) -> Entry | None:
        entry = unseal(key, shape, found)
        if entry is not None and entry.ticket > self._floor:
            return entry
        if not is_lease(found):
            self._stats.unusable += 1
        return None

    async def claim(self, key: str, shape: int, instead_of: bytes) -> FillLease | Entry | None:
        """The lease to fill a key, or the entry that another node has filled it with meanwhile.

        `instead_of`: the unusable bytes that `get` found there. While another node holds the lease, this waits for its
        fill, at most OTHERS_FILL_S. None: another node has taken the lease again by then, or Redis does not answer.
        """
        give_up = time.monotonic() + OTHERS_FILL_S
        if is_lease(instead_of):
            instead_of = b""
        while True:
            late = time.monotonic() >= give_up
            token = LEASE + secrets.token_bytes(16)
            try:
                found: int | bytes = await self._call(
                    "claim", 2, self._prefix + key, self._counter, token, int(LEASE_S * 1_000), instead_of
                )
            except (RedisGone, ResponseError) as error:
                self._failed(error)
                return None
            if isinstance(found, int):
                return FillLease(key, token, found)
            entry = self._usable(key, shape, found)
            if entry is not None or late:
                return entry
            if not is_lease(found):
                instead_of = found
                continue
            await asyncio.sleep(OTHERS_POLL_S)
            if time.monotonic() >= give_up:
                instead_of = found  # its holder is slow or dead: try once to take it over

    def fill(self, lease: FillLease, shape: int, entry: Entry, seconds: float) -> None:
        """Replace the lease by an entry, if the lease is still there. Does not wait for the answer."""
        if len(entry.body) > MAX_ENTRY_BYTES or seconds <= 0:
            self.give_back(lease)
            return
        envelope = seal(lease.key, shape, Entry(entry.body, entry.version, lease.ticket))
        milliseconds = max(1, int(seconds * 1_000))
        answer = self._call("fill", 1, self._prefix + lease.key, lease.token, envelope, milliseconds)
        answer.add_done_callback(self._filled)

    def give_back(self, lease: FillLease) -> None:
        """End the lease, so that others can take it at once."""
        answer = self._call("fill", 1, self._prefix + lease.key, lease.token, b"", 1)
        answer.add_done_callback(_seen)

    def _filled(self, answer: asyncio.Future[Any]) -> None:
        if answer.cancelled():
            return
        error = answer.exception()
        if error is not None:
            self._stats.redis_errors += 1
        elif answer.result() == 1:
            self._stats.fills += 1
        else:
            self._stats.fills_refused += 1

    def forget(self, key: str, version: int) -> None:
        """Remove an entry or a lease before this node's next read. An entry of this version may stay."""
        self._connection.tell("EVALSHA", SCRIPTS["forget"], 1, self._prefix + key, version_bytes(version))

    def distrust(self, reason: str) -> None:
        """Use none of the entries that are there now."""
        self._connection.drop(reason)

    def age_s(self, entry: Entry) -> float:
        """How long ago, by Redis' clock, the entry's lease was taken."""
        now_us = self._floor + (time.monotonic() - self._joined_at) * 1e6
        return max(0.0, (now_us - entry.ticket) / 1e6)

    # --- The connection ---------------------------------------------------------------------------------------

    def _call(self, script: str, *arguments: Any) -> asyncio.Future[Any]:
        return self._connection.call("EVALSHA", SCRIPTS[script], *arguments)

    def _failed(self, error: Exception) -> None:
        self._stats.redis_errors += 1
        if isinstance(error, ResponseError):
            _log.debug("Redis refused a command of the cache: %s", error)
            if str(error).startswith("NOSCRIPT"):
                self._connection.drop("its scripts were flushed")

    async def _join(self) -> None:
        call = self._connection.call
        for text in (JOIN, CLAIM, FILL, FORGET):
            await call("SCRIPT", "LOAD", text)
        await call("CLIENT", "TRACKING", "ON", "NOLOOP")
        self._floor = await self._call("join", 1, self._counter)
        self._joined_at = time.monotonic()
        self._stats.connections += 1

    def _pushed(self, keys: list[bytes] | None) -> None:
        for key in keys or ():  # None: Redis was flushed, which says nothing about the store
            self._changed(key.decode("utf-8", "replace").removeprefix(self._prefix))


def _seen(answer: asyncio.Future[Any]) -> None:
    if not answer.cancelled():
        answer.exception()  # a lease that could not be ended expires
