"""The asyncio parts of the asynchronous client; `_sio` has the same for threads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import httpx

sleep = asyncio.sleep


def new_http(timeout: httpx.Timeout, limits: httpx.Limits) -> httpx.AsyncClient:
    """A client with kept connections. It follows no redirect, which would send the key to another server."""
    return httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)


async def uninterrupted(action: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Complete the work even if the task is cancelled, then cancel the task."""
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
            break  # the action was cancelled itself: raised below
    if cancelled is not None:
        raise cancelled from task.exception()  # the cancellation carries the failure
    task.result()


class Ticker:
    """Calls a function every `every_s` seconds until `stop`, or until the function returns False."""

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
