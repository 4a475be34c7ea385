"""FastAPI: a dependency that verifies the request's API key and gives the Verification, shown in OpenAPI.

    app = FastAPI()
    install(app, url="sqlite:///app.db")

    @app.post("/chat")
    async def chat(key: Annotated[Verification, Depends(ApiKeyAuth(permission="chat:write"))]) -> Answer: ...

RoomMiddleware, which `install` adds, answers refusals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from fastapi import FastAPI
from fastapi.openapi.models import APIKey, APIKeyIn, HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.requests import HTTPConnection

from ..app import OpenOptions, Strongroom
from ..errors import ConfigError
from ..keys import Verification
from ._core import (
    AUTHORIZATION,
    MEDIA_TYPE,
    Cost,
    KeyRefused,
    Requirements,
    networks,
    verified,
)
from .asgi import (
    STATE,
    Door,
    Guarded,
    Hold,
    RoomMiddleware,
    remember,
    reserve,
    route_of,
    verification_of,
)

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {MEDIA_TYPE: {}}}
    for status, text in {
        401: "The API key is missing or unknown",
        403: "The API key may not be used for this",
        429: "A limit of the API key is exceeded",
    }.items()
}
"""For a route's or router's `responses`, so that OpenAPI shows the refusals."""


def install(
    app: FastAPI,
    *,
    url: str | None = None,
    room: Strongroom | None = None,
    trusted_proxies: Iterable[str] = (),
    rate_limit_headers: bool = True,
    **options: Unpack[OpenOptions],
) -> None:
    """Give an application its Strongroom: opened at the start from `url` (with `options` of Strongroom.open), or an
    open `room`. With neither it uses the room of the outer application, or of its own lifespan's state. X-Forwarded-For
    is trusted only from `trusted_proxies` (networks). The room is `request.state.strongroom`. Raises ConfigError,
    InvalidInput."""
    app.state.strongroom_installed = True
    proxies = tuple(trusted_proxies)
    networks("trusted_proxies", proxies)  # checked now, because FastAPI builds its middleware only at the start
    app.add_middleware(
        RoomMiddleware,
        room=room,
        url=url,
        trusted_proxies=proxies,
        rate_limit_headers=rate_limit_headers,
        **options,
    )


class ApiKeyAuth(SecurityBase):
    """`Depends(ApiKeyAuth(permission="chat:write", cost={"requests": 1}))`: the Verification of the request's key.

    `cost` (default: one request), `permission` and `model` are values, or functions of the connection. `header` is
    `authorization` (Bearer) or a header of your own. A refused key is answered with a problem document. One object that
    several dependencies share verifies and charges once in a request. Raises InvalidInput.
    """

    def __init__(
        self,
        *,
        permission: str | Callable[[HTTPConnection], str | None] | None = None,
        cost: Cost | Callable[[HTTPConnection], Cost | None] | None = None,
        model: str | Callable[[HTTPConnection], str | None] | None = None,
        header: str = AUTHORIZATION,
        scheme_name: str = "ApiKey",
        description: str | None = None,
    ) -> None:
        self._requirements = Requirements(permission=permission, cost=cost, model=model)
        self._door = Door(header)
        self.scheme_name = scheme_name
        if self._door.header == AUTHORIZATION:
            self.model = HTTPBearer(bearerFormat="API key", description=description)
        else:
            self.model = APIKey.model_validate({"in": APIKeyIn.header, "name": header, "description": description})

    async def __call__(self, connection: HTTPConnection) -> Verification:
        """The verification of a valid key. Raises KeyRefused."""
        scope = connection.scope
        room = scope.get("state", {}).get(STATE)
        if not isinstance(room, Strongroom) or not hasattr(connection.app.state, "strongroom_installed"):
            raise ConfigError(
                "call strongroom.integrations.fastapi.install(app, url=…) first; install(app) for one that is mounted"
            )
        asked = self._requirements.of(connection)
        asked["route"] = route_of(scope)
        presented = self._door.presented(scope, asked)
        charged = await verified(room, presented)
        remember(scope, Guarded(room, presented, charged), charged.answer)
        return charged.answer


__all__ = [
    "RESPONSES",
    "ApiKeyAuth",
    "Hold",
    "KeyRefused",
    "Verification",
    "install",
    "reserve",
    "verification_of",
]
