"""What a type checker knows of the integrations: `make lint` reads this file, and nothing runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, assert_type

from fastapi import Depends, FastAPI
from flask import Flask
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request

from strongroom import ApiKey, Strongroom, Verification
from strongroom.blocking import BlockingStrongroom
from strongroom.integrations.asgi import Hold, StrongroomMiddleware, reserve, verification_of
from strongroom.integrations.fastapi import ApiKeyAuth, install
from strongroom.integrations.flask import ApiKeys, BlockingHold
from strongroom.keys.verification import Reservation

auth = ApiKeyAuth(permission="chat:write", cost={"requests": 1})
Writer = Annotated[Verification, Depends(auth)]
app = FastAPI()
install(app, url="sqlite:///app.db", limits="leased")
Starlette(middleware=[Middleware(StrongroomMiddleware, url="sqlite:///app.db", exempt=["/healthz"])])


@app.post("/chat")
async def chat(key: Writer, request: Request) -> None:
    assert_type(key, Verification)
    assert_type(key.tenant, str | None)
    assert_type(await auth(request), Verification)
    assert_type(verification_of(request), Verification)
    async with reserve(request, cost={"tokens": 1_000}) as hold:
        _ = assert_type(hold, Hold)
        assert_type(hold.verification, Reservation)
    _ = assert_type(await reserve(request, cost={"tokens": 1}), Hold)


keys = ApiKeys(Flask(__name__), url="sqlite:///app.db")


@keys.required(permission="chat:write")
def view(id: int) -> str:
    assert_type(keys.verification, Verification)
    with keys.reserve(cost={"tokens": 1}) as hold:
        assert_type(hold, BlockingHold)
    return ""


assert_type(view(3), str)
typed: Callable[[int], str] = view


async def _get(room: Strongroom) -> ApiKey:
    return await room.keys.get("key_1")


with BlockingStrongroom() as room:
    assert_type(room.call(_get), ApiKey)
    assert_type(room.verify("text"), Verification)
    assert_type(room.call(lambda inner: inner.keys.verify("text")), Verification)
