"""Wakes the followers of the journal as soon as another process has appended to it (LISTEN and NOTIFY).

It only shortens the wait: followers poll as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import asyncpg

from ...errors import StrongroomError
from .errors import DRIVER_ERRORS
from .pool import MAX_PAUSE_S, Connector, close_politely

_log = logging.getLogger(__name__)


class Listener:
    """A connection that listens, made again when it is lost. `start` it once. Each reconnection wakes the followers
    once, in place of the notifications that were missed."""

    def __init__(self, connector: Connector, channel: str, wake: Callable[[], None]) -> None:
        self._connector = connector
        self._channel = channel
        self._wake = wake
        self._task: asyncio.Task[None] | None = None
        self.connection: asyncpg.Connection | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        while True:
            try:
                await self._listen()
            except Exception as error:  # without the listener every change would wait for the next poll
                foreseen = isinstance(error, (StrongroomError, *DRIVER_ERRORS))
                _log.warning(
                    "nothing is heard of other processes' changes until the next poll: %s",
                    type(error).__name__,
                    exc_info=not foreseen,
                )
                await asyncio.sleep(MAX_PAUSE_S)

    async def _listen(self) -> None:
        """Listen until the connection is lost."""
        connection = await self._connector.connect()
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        try:
            await connection.add_listener(self._channel, lambda *_: self._wake())
            self.connection = connection
            self._wake()
            await lost.wait()
        finally:
            self.connection = None
            if not connection.is_closed():
                await close_politely(connection)
