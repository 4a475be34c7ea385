"""Connections to PostgreSQL: made one at a time when the server is in doubt, lent last in, first out, never cleaned.

Nothing needs cleaning: what a transaction sets ends with it (`set_config(…, true)`), and a connection on which anything
went wrong in an unforeseen way is thrown away. So a read costs one round trip. How long it may take is watched for all
of them together: a timer of its own for each would cost a third of a point read.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from ...errors import ConfigError, StoreError, StrongroomError, Unavailable
from .errors import DRIVER_ERRORS, is_connection_lost, translated
from .settings import Settings

OLDEST_SERVER = 15
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0
"""After a connection could not be made, the next is tried after a pause that doubles from the first to the last of
these, with jitter. Until then calls fail at once instead of each waiting for the time-out."""
MAX_PREPARED = 500
"""Statements kept ready on each connection."""


class Connector:
    """Makes connections, and is the breaker in front of a server that is gone."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._failures = 0
        self._not_before = 0.0
        self._probing = False
        self._last_error: StrongroomError | None = None

    async def connect(self, *, timed: bool = True) -> asyncpg.Connection:
        """A new connection, on which no command may take longer than the settings say if `timed`. Unavailable,
        ConfigError or StoreError if there is none to be had."""
        if self._failures and (self._probing or time.monotonic() < self._not_before):
            raise self._refusal()
        probing = self._probing = self._failures > 0
        try:
            connection = await self._connected(timed)
        except DRIVER_ERRORS as error:
            # Not as the cause: what the driver says of a URL may show the password.
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
        return Unavailable(f"{last}; it is tried again soon", retry_after_s=round(max(wait_s, FIRST_PAUSE_S), 3))

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


class Pool:
    """At most `size` connections, for reads. One that is lent for longer than a command may take is ended."""

    def __init__(self, connector: Connector, size: int) -> None:
        self._connector = connector
        self._size = size
        self._idle: list[asyncpg.Connection] = []
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._lent: dict[asyncpg.Connection, float] = {}
        self._prepared: dict[asyncpg.Connection, dict[str, Any]] = {}
        self._expired: set[asyncpg.Connection] = set()
        self._count = 0
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._longest_s = connector.settings.command_timeout_s
        self._timer = self._loop.call_later(self._longest_s / 4, self._sweep)

    @property
    def in_use(self) -> int:
        return self._count - len(self._idle)

    def _sweep(self) -> None:
        latest = self._loop.time() - self._longest_s
        for connection, since in self._lent.items():
            if since < latest and connection not in self._expired:
                self._expired.add(connection)
                connection.terminate()
        self._timer = self._loop.call_later(min(1.0, self._longest_s / 4), self._sweep)

    def expired(self, connection: asyncpg.Connection) -> bool:
        """Whether a lent connection was ended because its command took too long."""
        return connection in self._expired

    def take(self) -> asyncpg.Connection | None:
        """An idle connection, or None. Give it to `give_back` or `drop`."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                self._lent[connection] = self._loop.time()
                return connection
            self._forget(connection)
        return None

    def _forget(self, connection: asyncpg.Connection) -> None:
        self._count -= 1
        self._expired.discard(connection)
        self._prepared.pop(connection, None)

    def prepared(self, connection: asyncpg.Connection, sql: str) -> Any:
        """The statement as it is kept ready on a lent connection, or None. The driver keeps statements too, but takes
        longer to find one than this does."""
        statements = self._prepared.get(connection)
        return None if statements is None else statements.get(sql)

    async def prepare(self, connection: asyncpg.Connection, sql: str) -> Any:
        """The statement, ready on a lent connection from now on."""
        statements = self._prepared.setdefault(connection, {})
        if len(statements) >= MAX_PREPARED:
            statements.clear()
        statement = statements[sql] = await connection.prepare(sql)
        return statement

    async def acquire(self) -> asyncpg.Connection:
        """A connection, idle or new. Unavailable if all are in use for longer than a connection may take."""
        deadline = time.monotonic() + self._connector.settings.connect_timeout_s
        while True:
            if self._closed:
                raise Unavailable(f"{self._connector.settings.place}: the store is not open")
            connection = self.take()
            if connection is not None:
                return connection
            if self._count < self._size:
                return await self._grow()
            await self._wait(deadline)

    async def _grow(self) -> asyncpg.Connection:
        self._count += 1
        try:
            connection = await self._connector.connect(timed=False)
        except BaseException:
            self._count -= 1
            self._wake()
            raise
        if self._closed:
            connection.terminate()
            raise Unavailable(f"{self._connector.settings.place}: the store is not open")
        self._lent[connection] = self._loop.time()
        return connection

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

    def give_back(self, connection: asyncpg.Connection) -> None:
        if self._closed or connection.is_closed():
            self.drop(connection)
            return
        del self._lent[connection]
        self._idle.append(connection)
        if self._waiting:
            self._wake()

    def drop(self, connection: asyncpg.Connection) -> None:
        """Give back a connection that is not to be used again."""
        del self._lent[connection]
        self._forget(connection)
        connection.terminate()
        self._wake()

    def failed(self, connection: asyncpg.Connection, error: BaseException) -> None:
        """Give back a connection on which a statement of its own failed."""
        self._prepared.pop(connection, None)  # the tables may have changed
        if isinstance(error, asyncpg.PostgresError) and not is_connection_lost(error):
            self.give_back(connection)
        else:
            self.drop(connection)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection for some statements, each a transaction of its own."""
        connection = self.take() or await self.acquire()
        try:
            yield connection
        except BaseException as error:
            self.failed(connection, error)
            raise
        self.give_back(connection)

    async def close(self) -> None:
        self._closed = True
        self._timer.cancel()
        idle, self._idle = self._idle, []
        self._count -= len(idle)
        while self._waiting:
            self._wake()
        await asyncio.gather(*(close_politely(connection) for connection in idle))


async def close_politely(connection: asyncpg.Connection, timeout_s: float = 1.0) -> None:
    """Say goodbye, so that the server logs no lost client; not for long."""
    try:
        await connection.close(timeout=timeout_s)
    except DRIVER_ERRORS:
        connection.terminate()
