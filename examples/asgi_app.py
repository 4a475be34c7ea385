"""A plain ASGI application whose requests need an API key, and whose streams are charged by the token.

python examples/asgi_app.py, then with the key that it prints:
curl -i -H "Authorization: Bearer $KEY" http://127.0.0.1:8000/stream
"""

from __future__ import annotations

import asyncio
import os

import uvicorn

from strongroom import Strongroom
from strongroom.integrations.asgi import Receive, Scope, Send, StrongroomMiddleware, reserve

STORE = os.environ.get("STORE", "sqlite:///example.db")
PORT = int(os.environ.get("PORT", "8000"))
WORDS = ["an", "answer", "comes", "one", "word", "at", "a", "time"]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Streams words. A client that disconnects is charged for the words that it received."""
    if scope["type"] != "http":  # lifespan events: nothing to do
        return
    hold = await reserve(scope, cost={"tokens": 100})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    for word in WORDS:
        hold.use(tokens=1)
        await send({"type": "http.response.body", "body": f"{word} ".encode(), "more_body": True})
    await send({"type": "http.response.body"})


guarded = StrongroomMiddleware(app, url=STORE, permission="chat:read")


async def make_key() -> str:
    async with Strongroom.open(STORE) as room:
        issued = await room.keys.create(
            name="demo",
            permissions=["chat:*"],
            limits=[
                {"resource": "requests", "limit": 3, "window": {"kind": "rolling", "seconds": 60}},
                {"resource": "tokens", "limit": 1_000, "window": {"kind": "calendar", "unit": "day"}},
            ],
        )
        return issued.text


if __name__ == "__main__":
    print("key:", asyncio.run(make_key()), flush=True)
    uvicorn.run(guarded, port=PORT, log_level="warning")
