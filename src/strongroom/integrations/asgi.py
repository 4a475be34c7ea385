"""ASGI middleware that verifies the API key of each request in this process, before the application sees it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Unpack

from ..app import OpenOptions, Strongroom
from ..client_address import Network, client_address
from ..errors import ConfigError, StrongroomError
from ..keys import ONE_REQUEST, Charged, Verification
from ._core import (
    AUTHORIZATION,
    Cost,
    KeyRefused,
    Paths,
    Presented,
    Refusal,
    Requirements,
    checked_header,
    credential,
    leased,
    networks,
    rate_limit_headers,
    verified,
)
from ._hold import TTL_S, Hold, reserving, returned, settled

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)
KEY = "strongroom.key"
"""Where the Verification is found in a request's scope."""
STATE = "strongroom"
"""Where the Strongroom is found in the lifespan's state, and so in each request's."""
STATE_KEY = "strongroom_key"
"""Where the Verification is found in a request's state: `request.state.strongroom_key` in Starlette and FastAPI."""
_GUARDED = "strongroom.guarded"
_PROXIES = "strongroom.trusted_proxies"
_SHOWN = "strongroom.limits_shown"
"""Set once the RateLimit headers are on the answer: an application may be inside two of these middlewares."""
_OWN_STATE = "strongroom.state"
"""The request's own state, once it has one: the server's may be one dict for all requests."""
_KINDS = frozenset(("http", "websocket"))
_ACCEPTED = frozenset(("websocket.accept", "websocket.close", "websocket.http.response.start"))
POLICY_VIOLATION = 1008


class Guarded:
    """A request whose key is verified: what another question about the same key needs.

    `holds`: reservations made for this request, settled at its end if they are not before. `charges`: what it was
    charged already, taken back if it is refused after all.
    """

    __slots__ = ("charges", "holds", "presented", "room")

    def __init__(self, room: Strongroom, presented: Presented, *charges: Charged) -> None:
        self.room = room
        self.presented = presented
        self.holds: list[Hold] = []
        self.charges: list[Charged] = list(charges)


class Door:
    """Finds the key in an ASGI request."""

    __slots__ = ("_name", "header")

    def __init__(self, header: str = AUTHORIZATION) -> None:
        self.header = checked_header(header)
        self._name = self.header.encode()

    def key(self, scope: Scope) -> str:
        """The key's secret. Raises KeyRefused (401)."""
        name = self._name
        return credential(self.header, [value for found, value in scope["headers"] if found == name])

    def presented(self, scope: Scope, asked: Any, trusted: Sequence[Network] | None = None) -> Presented:
        """The request's key and what it asks: `asked`, from the client's address. Raises KeyRefused (401)."""
        secret = self.key(scope)
        ip = address_of(scope, trusted)
        if ip is not None:
            asked["ip"] = ip
        return Presented(secret, self.header, asked)


def address_of(scope: Scope, trusted: Sequence[Network] | None = None) -> str | None:
    """The client's address, where it is known; `trusted` proxies are those of RoomMiddleware if they are not given."""
    if trusted is None:
        trusted = scope.get(_PROXIES, ())
    client = scope.get("client")
    forwarded: Sequence[bytes] = ()
    if trusted:
        forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    return client_address(client[0] if client else None, forwarded, trusted)


def route_of(scope: Scope) -> str:
    """`GET /items/{id}` where the framework has found the route already, else the method and the path as it came."""
    method = scope.get("method", "WEBSOCKET")
    path: str = scope["path"]
    route = scope.get("route")
    if route is None:
        return f"{method} {path}"
    # FastAPI's included routers share their routes; with the prefix is the one that is in effect.
    effective = scope.get("fastapi", {}).get("effective_route_context")
    template = getattr(effective, "path", None) or getattr(route, "path", None)
    # Below a mount the template begins after it; what the server itself was told to put before is not a route's.
    root: str = scope.get("root_path", "")
    above: str = scope.get("app_root_path", root)
    mount = root[len(above) :] if root.startswith(above) else ""
    # A template that cannot be this path's would mix up two routes.
    if not isinstance(template, str) or not path.removeprefix(above).startswith(mount + template.partition("{")[0]):
        return f"{method} {path}"
    return f"{method} {mount}{template}"


class RoomMiddleware:
    """Gives an application its Strongroom, in `request.state.strongroom`; keys are verified further inside.

    `room` is an open Strongroom; with `url` (and `options` of Strongroom.open) one is opened at the server's start and
    closed at its end, its limits leased unless `limits="durable"` is given; with neither it is taken from the
    lifespan's state, under `strongroom`. X-Forwarded-For is believed from `trusted_proxies` (networks) alone. For what
    is verified inside (by FastAPI's dependency), refusals are answered, RateLimit headers are put on answers unless
    `rate_limit_headers` is false, and reservations are settled at the end of the request. Raises ConfigError,
    InvalidInput.
    """

    def __init__(
        self,
        app: ASGIApp,
        /,
        *,
        room: Strongroom | None = None,
        url: str | None = None,
        trusted_proxies: Iterable[str] = (),
        rate_limit_headers: bool = True,
        **options: Unpack[OpenOptions],
    ) -> None:
        if room is not None and url is not None:
            raise ConfigError("found both a room and a url, expected one of them")
        if options and url is None:
            raise ConfigError(f"found {', '.join(sorted(options))}, which need a url to be opened with")
        self.app = app
        self._room = room
        self._url = url
        self._options = leased(options)
        self._trusted = networks("trusted_proxies", trusted_proxies)
        self._with_headers = rate_limit_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(scope, receive, send)
        elif kind in _KINDS:
            scope["state"] = scope[_OWN_STATE] = {**scope.get("state", {}), STATE: self._opened(scope)}
            if self._trusted or _PROXIES not in scope:  # a mounted application's own middleware has none of its own
                scope[_PROXIES] = self._trusted
            await self._inside(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _opened(self, scope: Scope) -> Strongroom:
        if self._room is not None:
            return self._room
        room = scope.get("state", {}).get(STATE)
        if not isinstance(room, Strongroom):
            raise ConfigError(
                "there is no open Strongroom: the server sent no lifespan events. Run it with them, or open one and "
                "pass it as room="
            )
        return room

    async def _inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; answer what it refuses, and settle what it reserved."""
        started = connected = False

        async def sending(message: Message) -> None:
            nonlocal started
            kind = message["type"]
            if kind == "http.response.start":
                started = True
                if self._with_headers and (headers := _rate_limit_headers(scope)):
                    message = {**message, "headers": [*message.get("headers", ()), *headers]}
            elif kind in _ACCEPTED:
                started = True
            await send(message)

        async def receiving() -> Message:
            nonlocal connected
            connected = True
            return await receive()

        try:
            await self.app(scope, receiving if scope["type"] == "websocket" else receive, sending)
        except KeyRefused as refused:
            if started:
                raise
            await give_back(scope)
            await refuse(scope, None if connected else receive, send, refused.refusal)
        finally:
            guarded = scope.get(_GUARDED)
            if guarded is not None:
                for hold in guarded.holds:
                    await hold.close()

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Open before the application starts, and close after it has stopped."""
        if self._url is None:
            await self.app(scope, receive, send)
            return
        first = await receive()  # lifespan.startup
        async with AsyncExitStack() as stack:
            try:
                room = await stack.enter_async_context(Strongroom.open(self._url, **self._options))
            except StrongroomError as error:
                await send({"type": "lifespan.startup.failed", "message": f"{error.code}: {error}"})
                return
            stack.push_async_callback(settled)
            self._room = room
            stack.callback(self._forget)
            scope.setdefault("state", {})[STATE] = room
            last = await _forward_lifespan(self.app, scope, first, receive, send)
        if last is not None:
            await send(last)

    def _forget(self) -> None:
        self._room = None


class StrongroomMiddleware(RoomMiddleware):
    """Verifies the key of each HTTP request and WebSocket, then hands it to `app`; or answers with a problem document.

    `room`, `url` and `options` are RoomMiddleware's. `permission`, `cost`, `model` and `route` are values, or functions
    of the ASGI scope; a cost is one request unless it is given. `header` is `authorization` (Bearer) or one of your own
    such as `x-api-key`. `exempt` lists paths that need no key; one may end in `*`. X-Forwarded-For is believed from
    `trusted_proxies` (networks) alone. With `concurrency` a request holds one of the key's limit on concurrency until
    it is answered. `rate_limit_headers`: put RateLimit and RateLimit-Policy on answers.

    Raises ConfigError and InvalidInput for settings that cannot be.
    """

    def __init__(
        self,
        app: ASGIApp,
        /,
        *,
        room: Strongroom | None = None,
        url: str | None = None,
        permission: str | Callable[[Scope], str | None] | None = None,
        cost: Cost | Callable[[Scope], Cost | None] | None = None,
        model: str | Callable[[Scope], str | None] | None = None,
        route: str | Callable[[Scope], str | None] = route_of,
        header: str = AUTHORIZATION,
        exempt: Iterable[str] = (),
        trusted_proxies: Iterable[str] = (),
        concurrency: bool = False,
        rate_limit_headers: bool = True,
        **options: Unpack[OpenOptions],
    ) -> None:
        super().__init__(
            app,
            room=room,
            url=url,
            trusted_proxies=trusted_proxies,
            rate_limit_headers=rate_limit_headers,
            **options,
        )
        self._requirements = Requirements(permission=permission, cost=cost, model=model, route=route)
        self._exempt = Paths(exempt)
        self._door = Door(header)
        self._concurrency = concurrency

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in _KINDS or scope["path"] in self._exempt:
            await super().__call__(scope, receive, send)
            return
        room = self._opened(scope)
        try:
            guarded = self._guarded(scope, room)
            answer: Verification
            if self._concurrency:
                hold = await _concurrency(guarded)
                guarded.holds.append(hold)
                answer = hold.verification
            else:
                charged = await verified(room, guarded.presented)
                guarded.charges.append(charged)
                answer = charged.answer
        except KeyRefused as refused:
            await refuse(scope, receive, send, refused.refusal)
        else:
            remember(scope, guarded, answer)
            await self._inside(scope, receive, send)

    def _guarded(self, scope: Scope, room: Strongroom) -> Guarded:
        return Guarded(room, self._door.presented(scope, self._requirements.of(scope), self._trusted))


async def _concurrency(guarded: Guarded) -> Hold:
    """A request that counts among those in work until it ends; what it costs is charged in any case."""
    cost = guarded.presented.asked.get("cost") or ONE_REQUEST
    return await Hold(guarded.room, guarded.presented.asking(cost=cost), fixed=cost)


async def _forward_lifespan(app: ASGIApp, scope: Scope, first: Message, receive: Receive, send: Send) -> Message | None:
    """Run the application's lifespan, or stand in for one that has none. Gives the message that ends it unsent: a
    server may stop the loop once it has it."""
    answered = False
    last: Message | None = None
    waiting = [first]

    async def receiving() -> Message:
        return waiting.pop() if waiting else await receive()

    async def sending(message: Message) -> None:
        nonlocal answered, last
        if not message["type"].startswith("lifespan."):
            raise ValueError(f"found {message['type']!r}, expected an answer to a lifespan message")
        answered = True
        if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            last = message
        else:
            await send(message)

    try:
        await app(scope, receiving, sending)
    except Exception as error:
        if answered:
            raise
        # Most that raise here know no lifespan; one whose start has failed must not be mistaken for them in silence.
        _log.warning("the application's lifespan raised before it answered, so it is taken for one without: %r", error)
    if not answered:
        # An application that knows no lifespan raises, returns or answers as to HTTP: it is stood in for.
        await send({"type": "lifespan.startup.complete"})
        await receive()
        return {"type": "lifespan.shutdown.complete"}
    return last


def _rate_limit_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    answer = scope.get(KEY)
    if answer is None or not answer.limits or _SHOWN in scope:
        return []
    scope[_SHOWN] = True
    return [(name.encode(), value.encode("latin-1")) for name, value in rate_limit_headers(answer.limits)]


# --- For the integrations that are built on this ----------------------------------------------------------------


def remember(scope: Scope, guarded: Guarded, answer: Verification) -> None:
    """Put into the scope what the application may want to know."""
    before = scope.get(_GUARDED)
    if before is not None:  # verified by a middleware, and once more by a dependency
        guarded.holds.extend(before.holds)
        before.charges.extend(guarded.charges)  # one list, whichever of them takes the charges back
        guarded.charges = before.charges
    scope[KEY] = answer
    scope[_GUARDED] = guarded
    state = scope.get("state", {})
    if state is not scope.get(_OWN_STATE):  # not every server copies the lifespan's state for each request
        state = scope["state"] = scope[_OWN_STATE] = dict(state)
    state[STATE] = guarded.room
    state[STATE_KEY] = answer


async def give_back(scope: Mapping[str, Any]) -> None:
    """The request is refused after all: it is charged nothing, but for what its reservations were told to be used."""
    guarded = scope.get(_GUARDED)
    if isinstance(guarded, Guarded):
        for hold in guarded.holds:
            hold.forgive()
        await returned(guarded.room, guarded.charges)


async def refuse(scope: Scope, receive: Receive | None, send: Send, refusal: Refusal) -> None:
    """Answer instead of the application. `receive`: None where it has seen a WebSocket's first message."""
    kind = "http.response"
    if scope["type"] == "websocket":
        if receive is not None:
            await receive()  # websocket.connect
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            # Not accepted yet, so the server answers 403.
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": refusal.detail[:100]})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": refusal.status, "headers": refusal.raw_headers})
    await send({"type": f"{kind}.body", "body": refusal.body})


# --- For applications -------------------------------------------------------------------------------------------


def verification_of(request: Any) -> Verification:
    """The verification of a request that was let in: a Starlette or FastAPI request, or an ASGI scope. Raises
    LookupError where there was none (an exempt path)."""
    answer = _scope_of(request).get(KEY)
    if not isinstance(answer, Verification):
        raise LookupError(_NOT_VERIFIED)
    return answer


def reserve(
    request: Any, *, cost: Cost, ttl_s: int = TTL_S, permission: str | None = None, model: str | None = None
) -> Hold:
    """Reserve an estimate before work whose cost shows as it goes; what was used is charged:

        hold = await reserve(request, cost={"tokens": 1_000})

        async def parts() -> AsyncIterator[str]:
            async for part in answer:
                hold.use(tokens=part.tokens)
                yield part.text

        return StreamingResponse(parts())

    or `async with reserve(…) as hold:` around work that ends before its answer. `request` is one that the middleware
    (or FastAPI's dependency) has let in, or its scope. What was used is charged at the end of the block or of the
    request: also where the client went away, and also what exceeds the reservation. It is kept up meanwhile; it ends
    `ttl_s` seconds after the process, if that is killed.

    Entering raises KeyRefused, which the middleware answers, if the limits do not allow `cost`. Raises LookupError for
    a request that was not verified, InvalidInput.
    """
    guarded = _scope_of(request).get(_GUARDED)
    if not isinstance(guarded, Guarded):
        raise LookupError(_NOT_VERIFIED)
    presented = reserving(guarded.presented, cost, permission, model, first=not guarded.holds)
    return Hold(guarded.room, presented, ttl_s=ttl_s, opened=guarded.holds)


_NOT_VERIFIED = "this request's key was not verified: its path is exempt, or the middleware is not in place"


def _scope_of(request: Any) -> Mapping[str, Any]:
    # A Starlette request is itself a mapping, of its scope.
    scope: Mapping[str, Any] = request if isinstance(request, Mapping) else request.scope
    return scope


__all__ = [
    "KEY",
    "Hold",
    "KeyRefused",
    "RoomMiddleware",
    "StrongroomMiddleware",
    "reserve",
    "route_of",
    "settled",
    "verification_of",
]
