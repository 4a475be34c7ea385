"""Starts without the database: answers what needs no store, and opens the store once it is reachable."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from ..errors import Unavailable
from ..retry_log import RetryLog
from .app import Application
from .errors import Message, Send, send_problem
from .verify import Receive
from .wire import request_id_of

FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 5.0
SENTENCE = "the store cannot be reached; it is tried again until it can"
_JSON = (b"content-type", b"application/json")
_ALIVE = msgspec.json.encode({"status": "ok"})
_log = logging.getLogger("strongroom.server")


class Late:
    """The ASGI application while the store is unreachable: alive, not ready, and 503 for everything else. Connections
    from this time keep using it after the switch."""

    def __init__(self, kind: str) -> None:
        self.application: Application | None = None
        self._not_ready = msgspec.json.encode(
            {
                "status": "unavailable",
                "ready": False,
                "message": SENTENCE,
                "dependencies": {"store": {"status": "unavailable", "kind": kind, "latency_ms": 0.0}},
            }
        )

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if self.application is not None:
            await self.application(scope, receive, send)
        elif scope["type"] == "websocket":  # not supported
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        elif scope["path"] == "/healthz":
            await _answer(scope, send, 200, _ALIVE)
        elif scope["path"] == "/readyz":
            await _answer(scope, send, 503, self._not_ready)
        else:
            await send_problem(send, Unavailable(SENTENCE), request_id_of(scope["headers"]))

    def close(self) -> None:
        """End the streams, because the server stops."""
        if self.application is not None:
            self.application.close()


async def _answer(scope: dict[str, Any], send: Send, status: int, body: bytes) -> None:
    start: Message = {
        "type": "http.response.start",
        "status": status,
        "headers": [_JSON, (b"content-length", b"%d" % len(body))],
    }
    await send(start)
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


async def until_open(attempt: Callable[[], Awaitable[Application]]) -> Application:
    """Retry until the store opens, with pauses that double up to MAX_PAUSE_S. The jitter prevents that many nodes
    connect at once to a database that has just come back. Permanent errors (a wrong password) are raised."""
    pause_s = FIRST_PAUSE_S
    told = RetryLog(_log, "the store still cannot be reached")
    while True:
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
        try:
            opened = await attempt()
        except Unavailable as error:
            told.failed(error)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
        else:
            told.succeeded()
            return opened


__all__ = ["Late", "until_open"]
