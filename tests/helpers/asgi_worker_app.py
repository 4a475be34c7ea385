"""An ASGI application that says which process answered: `integrations/test_workers.py` serves it in several."""

from __future__ import annotations

import os
from typing import cast

from strongroom.app import LimitMode
from strongroom.integrations.asgi import Receive, Scope, Send, StrongroomMiddleware


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    body = str(os.getpid()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


app = StrongroomMiddleware(
    _answer, url=os.environ["STORE"], limits=cast(LimitMode, os.environ["LIMITS"]), exempt=["/alive"]
)
