"""One connection to Redis: commands in order and pipelined, a bounded wait for each answer, reconnection with back-off.

Commands of one turn of the event loop leave in one write, followed by the point reads among them as one MGET. So a read
never overtakes an invalidation that was sent before it: rule 2 in `redis_tier` needs this order.

Why not redis-py's own client (8.1). It uses this module's transport and parser (`Connection`, RESP3), but its asyncio
client has no client-side caching. Its pool sends each command on any free connection, so a read could overtake an
invalidation. With one connection (`single_connection_client`) it waits for each answer before it sends the next
command: measured side by side with 32 callers, it took 31 to 50 µs of processor time a read, this takes 2 µs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from ..errors import ConfigError

ANSWER_TIMEOUT_S = 0.05
"""How long a caller waits for Redis: a hundred times the usual time on a local network, and less than a slow read of
the store. Then the caller goes on without Redis; the connection stays."""
DEAD_AFTER_S = 1.0
"""The connection is closed when the oldest answer is overdue for this long."""
CONNECT_TIMEOUT_S = 2.0
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 5.0
MAX_QUEUED = 10_000
MAX_KEYS_A_READ = 200
_PUSH = object()
NOT_IN_TIME = "no answer in time"
_log = logging.getLogger(__name__)


class RedisGone(Exception):
    """Redis does not answer, or not in time. It never leaves the cache."""


class _Command:
    """A command without an answer yet. `waiting`: the futures of its answer, for an MGET those of each key in order."""

    __slots__ = ("arguments", "at", "needed", "waiting")

    def __init__(
        self, arguments: tuple[Any, ...], waiting: list[list[asyncio.Future[Any]]], at: float, needed: bool = False
    ) -> None:
        self.arguments = arguments
        self.waiting = waiting
        self.at = at
        self.needed = needed

    def deliver(self, answer: Any) -> None:
        answers = answer if self.arguments[0] == "MGET" else [answer]
        for futures, one in zip(self.waiting, answers, strict=True):
            for future in futures:
                if not future.done():
                    future.set_result(one)

    def fail(self, error: Exception) -> None:
        for futures in self.waiting:
            for future in futures:
                if not future.done():
                    future.set_exception(error)


class RedisConnection:
    """A connection that is made again whenever it is lost.

    `greet` runs on each new connection before it may be used; an error of it ends the attempt. `pushed` is called with
    the keys that Redis reports as changed (None: all of them).
    """

    def __init__(
        self,
        url: str,
        greet: Callable[[], Coroutine[Any, Any, None]],
        pushed: Callable[[list[bytes] | None], None],
        *,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        try:
            options: dict[str, Any] = dict(parse_url(url))
        except ValueError:
            raise ConfigError("cache: expected redis://, rediss:// or unix://, with a valid host and port") from None
        options.pop("max_connections", None)
        self._class: type[AbstractConnection] = options.pop("connection_class", Connection)
        self._options = options | {"protocol": 3, "socket_timeout": None, "retry": Retry(NoBackoff(), 0)}
        self._options["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
        self._greet = greet
        self._pushed = pushed
        self._answer_timeout_s = answer_timeout_s
        self._queue: deque[_Command] = deque()
        self._reads: dict[str, list[asyncio.Future[Any]]] = {}
        self._sent: deque[_Command] = deque()
        self._wake = asyncio.Event()
        self._connected = False
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._end: asyncio.Future[None] | None = None
        self._used = False
        self.ready = False
        """There is a connection, and `greet` has finished on it."""
        self.stalled = False
        """An answer is overdue: until one comes, no other caller waits."""

    def start(self) -> None:
        """Begin to connect in the background, for as long as it takes."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    # --- Asking -----------------------------------------------------------------------------------------------

    def call(self, *arguments: Any) -> asyncio.Future[Any]:
        """The answer to one command, later. It raises RedisGone or redis.exceptions.ResponseError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self._connected or self.stalled or len(self._queue) >= MAX_QUEUED:
            future.set_exception(RedisGone(NOT_IN_TIME))
            return future
        self._queue.append(_Command(arguments, [[future]], self._now()))
        self._expect()
        return future

    def tell(self, *arguments: Any) -> None:
        """Send a command that must be executed on this connection, if there is one. If Redis refuses it, or it cannot
        be sent, the connection is closed."""
        if not self._connected:
            return
        if len(self._queue) >= MAX_QUEUED:
            self.drop(f"{MAX_QUEUED} commands wait to be sent")
            return
        self._queue.append(_Command(arguments, [[]], self._now(), needed=True))
        self._expect()

    def get(self, key: str) -> asyncio.Future[Any]:
        """The value of a key (None: there is none, or one of another type), later. It raises RedisGone."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self.ready or self.stalled:
            future.set_exception(RedisGone(NOT_IN_TIME))
            return future
        self._reads.setdefault(key, []).append(future)
        self._expect()
        return future

    def drop(self, reason: str) -> None:
        """Close this connection and make a new one, on which `greet` runs again."""
        self.ready = False
        if self._end is not None and not self._end.done():
            self._end.set_exception(RedisGone(reason))

    # --- The connection ---------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _expect(self) -> None:
        self._wake.set()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._answer_timeout_s, self._check_answers)

    def _check_answers(self) -> None:
        """Fail the callers that have waited long enough; close a connection from which no answer comes."""
        self._timer = None
        now = self._now()
        oldest = self._sent[0].at if self._sent else self._queue[0].at if self._queue else None
        if oldest is None:
            return
        if now - oldest >= DEAD_AFTER_S:
            self.drop(f"no answer for {DEAD_AFTER_S:g} s")
            return
        if now - oldest >= self._answer_timeout_s:
            self.stalled = True
            overdue = RedisGone(NOT_IN_TIME)
            for command in (*self._sent, *self._queue):
                if now - command.at >= self._answer_timeout_s:
                    command.fail(overdue)
            self._forget_reads()
        wait_s = max(oldest + self._answer_timeout_s - now, self._answer_timeout_s / 5)
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._check_answers)

    def _forget_reads(self) -> None:
        reads, self._reads = self._reads, {}
        gone = RedisGone(NOT_IN_TIME)
        for futures in reads.values():
            for future in futures:
                if not future.done():
                    future.set_exception(gone)

    async def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        told = False
        while True:
            self._used = False
            try:
                await self._serve()
            except (RedisError, RedisGone, OSError, TimeoutError) as error:
                if self._used:
                    backoff_s, told = FIRST_BACKOFF_S, False
                if not told:
                    reason = str(error) or type(error).__name__
                    _log.warning("the cache goes on without Redis until it answers again: %s", reason)
                    told = True
            except Exception:  # a new connection may be free of the fault, and the cache must not stay broken
                _log.exception("the connection to Redis failed")
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1))  # noqa: S311 - jitter, not a secret
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def _serve(self) -> None:
        """One connection, from its opening until it fails. Raises the error that ended it."""
        connection = self._class(**self._options)
        end = self._end = asyncio.get_running_loop().create_future()
        tasks: list[asyncio.Task[None]] = []
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await connection.connect()  # type: ignore[no-untyped-call]
                parser = connection._get_push_notifications_parser()
                parser.set_invalidation_push_handler(self._on_invalidation)  # type: ignore[no-untyped-call]
                parser.set_pubsub_push_handler(self._on_push)  # type: ignore[no-untyped-call]
                self._connected = True
                tasks = [asyncio.create_task(self._write(connection)), asyncio.create_task(self._read(connection))]
                await _first([*tasks, end, asyncio.ensure_future(self._greet())])
            self.ready = self._used = True
            await _first([*tasks, end])
        finally:
            self.ready = self.stalled = self._connected = False
            end.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._fail_all()
            with suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)

    def _fail_all(self) -> None:
        gone = RedisGone(NOT_IN_TIME)
        for command in (*self._sent, *self._queue):
            command.fail(gone)
        self._sent.clear()
        self._queue.clear()
        self._forget_reads()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _write(self, connection: AbstractConnection) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            now = self._now()
            batch = list(self._queue)
            reads, self._reads = self._reads, {}
            keys = list(reads)
            for begin in range(0, len(keys), MAX_KEYS_A_READ):
                some = keys[begin : begin + MAX_KEYS_A_READ]
                batch.append(_Command(("MGET", *some), [reads[key] for key in some], now))
            if not batch:
                continue
            self._queue.clear()
            self._sent.extend(batch)
            packed = connection.pack_commands(command.arguments for command in batch)
            await connection.send_packed_command(packed, check_health=False)

    async def _read(self, connection: AbstractConnection) -> None:
        while True:
            try:
                # Take pushes as answers too: otherwise the client recurses once for each of them.
                answer = await connection.read_response(timeout=math.inf, disconnect_on_error=False, push_request=True)
            except ResponseError as refused:
                command = self._sent.popleft()
                command.fail(refused)
                if command.needed:  # later commands were executed without it: none of their answers may be used
                    raise RedisGone(f"{command.arguments[0]} was refused: {refused}") from None
            else:
                if answer is _PUSH:
                    continue
                self._sent.popleft().deliver(answer)
            self.stalled = False

    async def _on_invalidation(self, message: list[Any]) -> object:
        self._pushed(message[1])
        return _PUSH

    async def _on_push(self, message: list[Any]) -> object:
        return _PUSH


async def _first(awaited: list[asyncio.Future[None]]) -> None:
    """Wait until one of them is done; raise its error if it has one. The last one is cancelled unless it is done, so
    that `greet` does not outlive its connection."""
    try:
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        last = awaited[-1]
        last.cancel()
    for one in awaited:
        if one.done() and not one.cancelled():
            one.result()
