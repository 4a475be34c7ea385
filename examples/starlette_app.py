"""A Starlette application whose `request.user` is an API key.

python examples/starlette_app.py, then with the key that it prints:
curl -i -H "Authorization: Bearer $KEY" http://127.0.0.1:8000/notes/7
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from strongroom import Strongroom
from strongroom.integrations.starlette import ApiKeyBackend, StrongroomMiddleware, templates

STORE = os.environ.get("STORE", "sqlite:///example.db")
PORT = int(os.environ.get("PORT", "8000"))


@requires("notes:read")
async def note(request: Request) -> JSONResponse:
    return JSONResponse({"note": request.path_params["id"], "user": request.user.display_name})


async def healthz(request: Request) -> JSONResponse:
    return JSONResponse({"alive": True})


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Strongroom]]:
    """The application opens the room, and passes it to the middleware in its state."""
    async with Strongroom.open(STORE) as room:
        issued = await room.keys.create(
            name="demo",
            user_id="u1",
            permissions=["notes:*"],
            allowed_routes=["GET /notes/{id:int}"],
            limits=[{"resource": "requests", "limit": 3, "window": {"kind": "rolling", "seconds": 60}}],
        )
        print("key:", issued.text, flush=True)
        yield {"strongroom": room}


routes = [Route("/notes/{id:int}", note), Route("/healthz", healthz)]
app = Starlette(
    routes=routes,
    lifespan=lifespan,
    middleware=[
        Middleware(StrongroomMiddleware, exempt=["/healthz"], route=templates(routes)),
        Middleware(AuthenticationMiddleware, backend=ApiKeyBackend()),
    ],
)

if __name__ == "__main__":
    uvicorn.run(app, port=PORT, log_level="warning")
