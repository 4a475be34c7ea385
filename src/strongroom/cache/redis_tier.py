"""The Redis tier: entries that every node may read, and why none of them is ever older than its reader knows.

What a node is sure of. Let F be the node's change feed and C a commit that F has told it of. Whatever the node then
reads from Redis for a key that C changed was read from the store after C. This is so because

1. *A lease comes before each read of the store.* Who misses takes a lease on the key (a random token as its value)
   and only then reads the store; the fill is refused unless the very lease is still there. So an entry's content is
   not older than its lease.
2. *Each node removes what it hears of, itself.* For every journal record, and for its own commits at once, it sends
   `forget`, which removes the entry or the lease. Its own reads follow on the same connection, and Redis executes the
   commands of a connection in order: what it reads afterwards was leased after the `forget`, so after C, or carries
   C's own version (which `forget` leaves in place: no id ever has one version twice).
3. *A connection begins with a ticket.* Each lease and each new connection draws a greater number from one counter in
   Redis, and an entry carries its lease's. A node uses only entries with a greater ticket than its connection's, so
   those leased after it connected, which was after F had told it of everything up to then. Whatever happened to
   Redis or to the node before (commands that were lost, a restart from an old snapshot, a crash between a commit and
   its `forget`, a store restored from a backup) does not matter. The counter is never less than Redis' clock in
   microseconds, so that it grows past what was flushed.
4. *A refused `forget` ends the connection*, and so does an answer that does not come (rule 3 then applies).

It needs no other node to do its part, and no clock. Late commands of a connection that was given up do no harm: a
`forget` removes, a fill finds its lease gone or still sound (and has its ticket), and a lease that nobody fills ends
by itself.

It rests on one Redis server for the whole connection: a proxy that changes the server behind an open connection to a
replica that lags could give back what was removed, until its lifetime is over. Redis Cluster is not supported.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha1
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from .entry import (
    LEASE,
    MAX_ENTRY_BYTES,
    Entry,
    is_lease,
    seal,
    unseal,
    version_bytes,
)
from .redis_connection import ANSWER_TIMEOUT_S, Link, RedisGone

if TYPE_CHECKING:
    from .read_through import Counters

LEASE_S = 2.0
"""How long a key is kept for one that reads it from the store; a fill after that is refused."""
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
class Lease:
    """The right to fill a key, void after an invalidation and after LEASE_S."""

    key: str
    token: bytes
    ticket: int


class RedisTier:
    """Entries in Redis, below `strongroom:{namespace}:`. What Redis does not answer in time counts as
    not there, and nothing that goes wrong with it is raised."""

    def __init__(
        self,
        url: str,
        namespace: str,
        counters: Counters,
        changed: Callable[[str], None],
        *,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """`changed` is told the keys that other nodes fill or remove, of those that this one has read."""
        self._prefix = f"strongroom:{namespace}:"
        self._counter = f"strongroom:{namespace}"
        self._counters = counters
        self._changed = changed
        self._floor = 0
        self._joined_at = 0.0
        self._link = Link(url, self._join, self._pushed, answer_timeout_s=answer_timeout_s)

    def start(self) -> None:
        """Begin to connect, in the background. The change feed must have begun before."""
        self._link.start()

    async def close(self) -> None:
        await self._link.close()

    @property
    def usable(self) -> bool:
        return self._link.ready and not self._link.stalled

    @property
    def state(self) -> str:
        """`closed`: in use; `stalled`: an answer is overdue; `open`: there is no connection, one is tried for."""
        return ("stalled" if self._link.stalled else "closed") if self._link.ready else "open"

    # --- Reading and filling ----------------------------------------------------------------------------------

    async def get(self, key: str, shape: int) -> Entry | bytes | None:
        """The entry of a key, or what is there instead of a usable one (b"": nothing); None if Redis does not say."""
        try:
            found: bytes | None = await self._link.get(self._prefix + key)
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
            self._counters.unusable += 1
        return None

    async def claim(self, key: str, shape: int, instead_of: bytes) -> Lease | Entry | None:
        """The lease to fill a key, or what another node has filled it with meanwhile.

        `instead_of`: what `get` found there and cannot be used. While another holds the lease, its fill is waited for,
        OTHERS_FILL_S at most. None: it is somebody's again after that, or Redis does not say.
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
                return Lease(key, token, found)
            entry = self._usable(key, shape, found)
            if entry is not None or late:
                return entry
            if not is_lease(found):
                instead_of = found
                continue
            await asyncio.sleep(OTHERS_POLL_S)
            if time.monotonic() >= give_up:
                instead_of = found  # its holder is slow or dead: one more try, to take it over

    def fill(self, lease: Lease, shape: int, entry: Entry, seconds: float) -> None:
        """Put an entry where the lease is, if it still is, without waiting for it."""
        if len(entry.body) > MAX_ENTRY_BYTES or seconds <= 0:
            self.give_back(lease)
            return
        envelope = seal(lease.key, shape, Entry(entry.body, entry.version, lease.ticket))
        milliseconds = max(1, int(seconds * 1_000))
        answer = self._call("fill", 1, self._prefix + lease.key, lease.token, envelope, milliseconds)
        answer.add_done_callback(self._filled)

    def give_back(self, lease: Lease) -> None:
        """Let others take the lease at once."""
        answer = self._call("fill", 1, self._prefix + lease.key, lease.token, b"", 1)
        answer.add_done_callback(_seen)

    def _filled(self, answer: asyncio.Future[Any]) -> None:
        if answer.cancelled():
            return
        error = answer.exception()
        if error is not None:
            self._counters.redis_errors += 1
        elif answer.result() == 1:
            self._counters.fills += 1
        else:
            self._counters.fills_refused += 1

    def forget(self, key: str, version: int) -> None:
        """Remove an entry or a lease, in any case before this node's next read; one of this very version may stay."""
        self._link.tell("EVALSHA", SCRIPTS["forget"], 1, self._prefix + key, version_bytes(version))

    def distrust(self, reason: str) -> None:
        """Use nothing any more that is there now."""
        self._link.drop(reason)

    def age_s(self, entry: Entry) -> float:
        """How long ago, by Redis' clock, the entry's lease was taken."""
        now_us = self._floor + (time.monotonic() - self._joined_at) * 1e6
        return max(0.0, (now_us - entry.ticket) / 1e6)

    # --- The connection ---------------------------------------------------------------------------------------

    def _call(self, script: str, *arguments: Any) -> asyncio.Future[Any]:
        return self._link.call("EVALSHA", SCRIPTS[script], *arguments)

    def _failed(self, error: Exception) -> None:
        self._counters.redis_errors += 1
        if isinstance(error, ResponseError):
            _log.debug("Redis refused a command of the cache: %s", error)
            if str(error).startswith("NOSCRIPT"):
                self._link.drop("its scripts were flushed")

    async def _join(self) -> None:
        call = self._link.call
        for text in (JOIN, CLAIM, FILL, FORGET):
            await call("SCRIPT", "LOAD", text)
        await call("CLIENT", "TRACKING", "ON", "NOLOOP")
        self._floor = await self._call("join", 1, self._counter)
        self._joined_at = time.monotonic()
        self._counters.connections += 1

    def _pushed(self, keys: list[bytes] | None) -> None:
        for key in keys or ():  # None: Redis was flushed, which says nothing of the store
            self._changed(key.decode("utf-8", "replace").removeprefix(self._prefix))


def _seen(answer: asyncio.Future[Any]) -> None:
    if not answer.cancelled():
        answer.exception()  # a lease that could not be given back ends by itself
