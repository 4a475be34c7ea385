"""The thread parts of the synchronous client; `_aio` has the same for asyncio."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import httpx

sleep = time.sleep


def new_http(timeout: httpx.Timeout, limits: httpx.Limits) -> httpx.Client:
    """A client with kept connections. It follows no redirect, which would send the key to another server."""
    return httpx.Client(timeout=timeout, limits=limits, follow_redirects=False)


def uninterrupted(action: Callable[[], None]) -> None:
    """Do the work; a thread cannot be cancelled."""
    action()


class Ticker:
    """Calls a function every `every_s` seconds until `stop`, or until the function returns False."""

    def __init__(self, every_s: float, action: Callable[[], bool]) -> None:
        self._every_s = every_s
        self._action = action
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="strongroom-hold", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            if not self._action():
                return
