"""What the asynchronous client needs of asyncio; `_sio` has the same for threads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import httpx

sleep = asyncio.sleep


def new_http(timeout: httpx.Timeout, limits: httpx.Limits) -> httpx.AsyncClient:
    """Connections that are kept for the next call; redirects are not followed, which would take the key elsewhere."""
    return httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)


async def uninterrupted(action: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do it to the end, even if the task is cancelled meanwhile; then it is cancelled."""
    task = asyncio.ensure_future(action())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except Exception:
            break  # the action's own: raised below
    if cancelled is not None:
        raise cancelled from task.exception()  # if it failed, that is told with the cancellation
    task.result()


class Ticker:
    """Does something every `every_s` seconds until it is stopped, or until it says that there is nothing more to do."""

    def __init__(self, every_s: float, action: Callable[[], Awaitable[bool]]) -> None:
        self._every_s = every_s
        self._action = action
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            if not await self._action():
                return
