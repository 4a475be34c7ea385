"""Starlette: its own `request.user` and `requires(…)` over what StrongroomMiddleware has verified.

    app = Starlette(
        routes=[…],
        middleware=[
            Middleware(StrongroomMiddleware, url="sqlite:///app.db", exempt=["/healthz"]),
            Middleware(AuthenticationMiddleware, backend=ApiKeyBackend()),
        ],
    )

Nothing is verified, or charged, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount

from ..keys import Verification
from ._core import KeyRefused
from .asgi import (
    KEY,
    Hold,
    Scope,
    StrongroomMiddleware,
    give_back,
    reserve,
    route_of,
    verification_of,
)


class ApiKeyUser(BaseUser):
    """`request.user`: the request's key, and its owner."""

    def __init__(self, verification: Verification) -> None:
        self.verification = verification

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def display_name(self) -> str:
        return self.verification.user_id or self.identity

    @property
    def identity(self) -> str:
        """The key's id."""
        return self.verification.key_id or ""

    @property
    def tenant(self) -> str:
        """The tenant that the key belongs to."""
        return self.verification.tenant or ""


class _Permissions(list[str]):
    """Permissions in the form that Starlette's `requires` reads; `chat:*` includes every permission with this
    prefix."""

    def __contains__(self, wanted: object) -> bool:
        return isinstance(wanted, str) and any(
            held == wanted or (held.endswith("*") and wanted.startswith(held[:-1])) for held in self
        )


class ApiKeyBackend(AuthenticationBackend):
    """For Starlette's AuthenticationMiddleware, inside StrongroomMiddleware: it reads the finished verification, so no
    key is charged twice. A request on an exempt path is not authenticated."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, ApiKeyUser] | None:
        answer = conn.scope.get(KEY)
        if not isinstance(answer, Verification):
            return None
        credentials = AuthCredentials()
        credentials.scopes = _Permissions(answer.permissions)
        return credentials, ApiKeyUser(answer)


def templates(routes: Sequence[BaseRoute]) -> Callable[[Scope], str]:
    """`route=templates(routes)`: names a request by the template of its route (`GET /items/{id}`). Middleware runs
    before the router and does not know the route, so this tries the routes in the router's order."""

    def find(scope: Scope) -> str:
        return _template(routes, scope) or route_of(scope)

    return find


def _template(routes: Sequence[BaseRoute], scope: Scope) -> str | None:
    for route in routes:
        match, child = route.matches(scope)
        if match is Match.FULL:
            inside: Scope = {**scope, **child}
            if isinstance(route, Mount):
                return _template(route.routes, inside)
            return route_of({**inside, "route": route})
    return None


async def refused(request: HTTPConnection, error: Exception) -> Response:
    """An exception handler for KeyRefused, where StrongroomMiddleware stands outside the application:
    `Starlette(exception_handlers={KeyRefused: refused})`."""
    if not isinstance(error, KeyRefused):
        raise error
    await give_back(request.scope)
    refusal = error.refusal
    return Response(refusal.body, refusal.status, dict(refusal.headers))


__all__ = [
    "ApiKeyBackend",
    "ApiKeyUser",
    "Hold",
    "KeyRefused",
    "StrongroomMiddleware",
    "refused",
    "reserve",
    "templates",
    "verification_of",
]
