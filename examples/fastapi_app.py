"""A FastAPI application with keys, permissions and limits; http://127.0.0.1:8000/docs shows them.

python examples/fastapi_app.py, then with the key that it prints:
curl -i -X POST -H "Authorization: Bearer $KEY" 'http://127.0.0.1:8000/chat?prompt=hello+there'
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse

from strongroom import Strongroom
from strongroom.integrations.fastapi import RESPONSES, ApiKeyAuth, Verification, install, reserve

STORE = os.environ.get("STORE", "sqlite:///example.db")
PORT = int(os.environ.get("PORT", "8000"))

app = FastAPI(title="Chat", responses=RESPONSES)
install(app, url=STORE)

Reader = Annotated[Verification, Depends(ApiKeyAuth(permission="chat:read"))]
Writer = Annotated[Verification, Depends(ApiKeyAuth(permission="chat:write", cost={"requests": 1}))]


@app.get("/me")
async def me(key: Reader) -> dict[str, str | None]:
    return {"key": key.key_id, "tenant": key.tenant, "user": key.user_id}


@app.post("/chat")
async def chat(prompt: str, key: Writer, request: Request) -> StreamingResponse:
    """Streams an answer, and charges the sent tokens."""
    hold = await reserve(request, cost={"tokens": 100})

    async def words() -> AsyncIterator[str]:
        for word in reversed(prompt.split()):
            hold.use(tokens=1)
            yield f"{word} "

    return StreamingResponse(words(), media_type="text/plain")


async def make_key() -> str:
    async with Strongroom.open(STORE) as room:
        issued = await room.keys.create(
            name="demo",
            user_id="u1",
            permissions=["chat:*"],
            limits=[
                {"resource": "requests", "limit": 3, "window": {"kind": "rolling", "seconds": 60}},
                {"resource": "tokens", "limit": 1_000, "window": {"kind": "calendar", "unit": "day"}},
            ],
        )
        return issued.text


if __name__ == "__main__":
    print("key:", asyncio.run(make_key()), flush=True)
    uvicorn.run(app, port=PORT, log_level="warning")
