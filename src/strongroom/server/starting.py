"""A start without the database: the server answers what it can, and begins its work once the database is there."""

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
    """What uvicorn calls while there is no store yet: alive, not ready, and 503 for everything else. Connections that
    were made in that time go on through this one afterwards."""

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
        elif scope["type"] == "websocket":  # there is none here
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        elif scope["path"] == "/healthz":
            await _answer(scope, send, 200, _ALIVE)
        elif scope["path"] == "/readyz":
            await _answer(scope, send, 503, self._not_ready)
        else:
            await send_problem(send, Unavailable(SENTENCE), request_id_of(scope["headers"]))

    def close(self) -> None:
        """The server is to stop."""
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
    """Try until it succeeds, with pauses that double up to MAX_PAUSE_S, and jitter, so that many nodes do not fall upon
    a database that has just come back. What is not for want of the database (a wrong password) is raised."""
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
