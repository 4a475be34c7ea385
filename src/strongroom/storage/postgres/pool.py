"""Connections to PostgreSQL: the pool of the reads, and the breaker in front of a server that is gone.

Why not `asyncpg.create_pool`. Measured side by side (a point read, 1 and 32 readers, µs of this process's processor
time a read; without a pool, on one prepared statement: 18):

| | 1 reader | 32 readers |
|---|---|---|
| this pool | 19 | 22 |
| asyncpg's, without its reset query, without a time-out | 39 | 35 |
| asyncpg's, without its reset query, with `command_timeout` | 41 | 36 |
| asyncpg's as it is | 68 | 60 |

asyncpg's pool wraps each connection in a proxy, looks the prepared statement up by its text, and sets a timer for each
command. Here one timer watches all lent connections. No reset query is needed: settings of a transaction end with it
(`set_config(…, true)`), and a connection whose command was interrupted is closed. With asyncpg's pool each caller would
also try to reach a server that is gone. Here one caller tries, and the others fail at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from ...errors import ConfigError, StoreError, StrongroomError, Unavailable
from .errors import DRIVER_ERRORS, is_connection_lost, translated
from .settings import Settings

OLDEST_SERVER = 15
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0
"""After a failed attempt to connect the next one waits: FIRST_PAUSE_S at first, twice as long each time, up to
MAX_PAUSE_S, with jitter. Until then calls fail at once instead of each waiting for the time-out."""
MAX_PREPARED = 500
"""Prepared statements kept on each connection."""


class Connector:
    """Makes connections, and is the circuit breaker in front of a server that is gone."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._failures = 0
        self._not_before = 0.0
        self._probing = False
        self._last_error: StrongroomError | None = None

    async def connect(self, *, timed: bool = True) -> asyncpg.Connection:
        """A new connection. If `timed`, the driver ends commands that take longer than the settings allow. Raises
        Unavailable, ConfigError, StoreError."""
        if self._failures and (self._probing or time.monotonic() < self._not_before):
            raise self._refusal()
        probing = self._probing = self._failures > 0
        try:
            connection = await self._connected(timed)
        except DRIVER_ERRORS as error:
            # Not as the cause: the driver's message about a URL may show the password.
            self._failed(translated(error, self.settings.place))
            raise self._last_error or translated(error, self.settings.place) from None
        finally:
            if probing:
                self._probing = False
        self._failures = 0
        return connection

    def _failed(self, error: StrongroomError) -> None:
        self._last_error = error
        self._failures += 1
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures - 1, 10))
        self._not_before = time.monotonic() + pause_s * random.uniform(0.5, 1)  # noqa: S311  # jitter, no secret

    def _refusal(self) -> Unavailable:
        wait_s = max(0.0, self._not_before - time.monotonic())
        last = self._last_error.message if self._last_error is not None else f"{self.settings.place}: cannot be reached"
        return Unavailable(f"{last}; the next attempt follows soon", retry_after_s=round(max(wait_s, FIRST_PAUSE_S), 3))

    async def _connected(self, timed: bool) -> asyncpg.Connection:
        arguments = self.settings.connect_arguments()
        try:
            connection = await asyncpg.connect(
                **arguments, command_timeout=self.settings.command_timeout_s if timed else None
            )
        except (asyncpg.exceptions.ClientConfigurationError, ValueError) as error:
            raise ConfigError(
                f"{self.settings.place}: the driver does not understand the store's URL ({type(error).__name__}): "
                "check its options"
            ) from None
        problem = _unsuited(connection)
        if problem is not None:
            connection.terminate()
            raise StoreError(f"{self.settings.place}: {problem}")
        return connection


def _unsuited(connection: asyncpg.Connection) -> str | None:
    """Why this server or database cannot be used, or None."""
    version = connection.get_server_version()
    settings = connection.get_settings()
    if version.major < OLDEST_SERVER:
        return f"found PostgreSQL {version.major}, expected {OLDEST_SERVER} or later: upgrade the server"
    if settings.server_encoding != "UTF8":
        return f"found a database in {settings.server_encoding}, expected UTF8: run createdb --encoding=UTF8"
    if settings.standard_conforming_strings != "on":
        return "found standard_conforming_strings off, expected on"
    return None


@dataclass(slots=True, eq=False)
class Pooled:
    """A connection of the pool, with the statements that are prepared on it."""

    connection: asyncpg.Connection
    statements: dict[str, Any] = field(default_factory=dict)
    lent_at: float = 0.0
    expired: bool = False
    """The pool closed the connection because its command took too long."""

    async def prepared(self, sql: str) -> Any:
        """The statement, prepared now if it was not before."""
        statement = self.statements.get(sql)
        if statement is None:
            if len(self.statements) >= MAX_PREPARED:
                self.statements.clear()
            statement = self.statements[sql] = await self.connection.prepare(sql)
        return statement


class Pool:
    """At most `size` connections, for reads. A connection that is lent for longer than a command may take is closed."""

    def __init__(self, connector: Connector, size: int) -> None:
        self._connector = connector
        self._size = size
        self._idle: list[Pooled] = []
        self._lent: set[Pooled] = set()
        self._connecting = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._longest_s = connector.settings.command_timeout_s
        self._timer = self._loop.call_later(self._longest_s / 4, self._close_expired)

    @property
    def in_use(self) -> int:
        return len(self._lent) + self._connecting

    def _close_expired(self) -> None:
        latest = self._loop.time() - self._longest_s
        for lent in self._lent:
            if lent.lent_at < latest and not lent.expired:
                lent.expired = True
                lent.connection.terminate()
        self._timer = self._loop.call_later(min(1.0, self._longest_s / 4), self._close_expired)

    def take(self) -> Pooled | None:
        """The connection that was used last of those that are idle, or None. Give it to `give_back` or `failed`."""
        while self._idle:
            lent = self._idle.pop()
            if not lent.connection.is_closed():
                return self._lend(lent)
        return None

    def _lend(self, lent: Pooled) -> Pooled:
        lent.lent_at = self._loop.time()
        self._lent.add(lent)
        return lent

    async def acquire(self) -> Pooled:
        """A connection, idle or new. Unavailable if all are in use for longer than connecting may take."""
        deadline = time.monotonic() + self._connector.settings.connect_timeout_s
        while True:
            if self._closed:
                raise self._not_open()
            lent = self.take()
            if lent is not None:
                return lent
            if self.in_use < self._size:
                return await self._connect()
            await self._wait(deadline)

    async def _connect(self) -> Pooled:
        self._connecting += 1
        try:
            connection = await self._connector.connect(timed=False)
        except BaseException:
            self._wake()
            raise
        finally:
            self._connecting -= 1
        if self._closed:
            connection.terminate()
            raise self._not_open()
        return self._lend(Pooled(connection))

    def _not_open(self) -> Unavailable:
        return Unavailable(f"{self._connector.settings.place}: the store is not open")

    async def _wait(self, deadline: float) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await turn
        except TimeoutError:
            raise Unavailable(
                f"{self._connector.settings.place}: all {self._size} connections are in use: try again, or raise "
                "max_connections"
            ) from None
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.cancelled():
                self._wake()

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def give_back(self, lent: Pooled) -> None:
        """Return a connection whose command is over."""
        self._lent.discard(lent)
        if self._closed or lent.connection.is_closed():
            lent.connection.terminate()
        else:
            self._idle.append(lent)
        if self._waiting:
            self._wake()

    def failed(self, lent: Pooled, error: BaseException) -> None:
        """Return a connection whose command failed. Unless the server answered with an error it is closed: the answer
        of a cancelled command is still to come."""
        lent.statements.clear()  # the tables may have changed
        if not isinstance(error, asyncpg.PostgresError) or is_connection_lost(error):
            lent.connection.terminate()
        self.give_back(lent)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection for several statements, each a transaction of its own."""
        lent = self.take() or await self.acquire()
        try:
            yield lent.connection
        except BaseException as error:
            self.failed(lent, error)
            raise
        self.give_back(lent)

    async def close(self) -> None:
        self._closed = True
        self._timer.cancel()
        idle, self._idle = self._idle, []
        while self._waiting:
            self._wake()
        await asyncio.gather(*(close_politely(pooled.connection) for pooled in idle))


async def close_politely(connection: asyncpg.Connection, timeout_s: float = 1.0) -> None:
    """Close with a farewell, so that the server logs no lost client; at most `timeout_s` long."""
    try:
        await connection.close(timeout=timeout_s)
    except DRIVER_ERRORS:
        connection.terminate()
