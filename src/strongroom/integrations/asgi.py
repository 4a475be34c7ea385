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
"""The name of the Verification in a request's scope."""
STATE = "strongroom"
"""The name of the Strongroom in the lifespan's state, and so in each request's state."""
STATE_KEY = "strongroom_key"
"""The name of the Verification in a request's state: `request.state.strongroom_key` in Starlette and FastAPI."""
_GUARDED = "strongroom.guarded"
_PROXIES = "strongroom.trusted_proxies"
_SHOWN = "strongroom.limits_shown"
"""Set once the answer has RateLimit headers: two nested middlewares would add them twice."""
_OWN_STATE = "strongroom.state"
"""The request's own state dict. The server's dict may be shared by all requests."""
_KINDS = frozenset(("http", "websocket"))
_ACCEPTED = frozenset(("websocket.accept", "websocket.close", "websocket.http.response.start"))
POLICY_VIOLATION = 1008


class Guarded:
    """A request with a verified key, for later calls about the same key.

    `holds`: reservations of this request, settled at its end if they are still open. `charges`: what the verifications
    charged, refunded if the request is refused after all.
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
        """The request's key, with the arguments `asked` and the client's address. Raises KeyRefused (401)."""
        secret = self.key(scope)
        ip = address_of(scope, trusted)
        if ip is not None:
            asked["ip"] = ip
        return Presented(secret, self.header, asked)


def address_of(scope: Scope, trusted: Sequence[Network] | None = None) -> str | None:
    """The client's address if it is known. `trusted` proxies default to those of RoomMiddleware."""
    if trusted is None:
        trusted = scope.get(_PROXIES, ())
    client = scope.get("client")
    forwarded: Sequence[bytes] = ()
    if trusted:
        forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    return client_address(client[0] if client else None, forwarded, trusted)


def route_of(scope: Scope) -> str:
    """`GET /items/{id}` if the framework has found the route already, else the method and the received path."""
    method = scope.get("method", "WEBSOCKET")
    path: str = scope["path"]
    route = scope.get("route")
    if route is None:
        return f"{method} {path}"
    # FastAPI's included routers share their routes; only the effective route has the prefix.
    effective = scope.get("fastapi", {}).get("effective_route_context")
    template = getattr(effective, "path", None) or getattr(route, "path", None)
    # Below a mount the template begins after the mount's path. The server's own root path belongs to no route.
    root: str = scope.get("root_path", "")
    above: str = scope.get("app_root_path", root)
    mount = root[len(above) :] if root.startswith(above) else ""
    # A template that does not match this path would charge the limit of another route.
    if not isinstance(template, str) or not path.removeprefix(above).startswith(mount + template.partition("{")[0]):
        return f"{method} {path}"
    return f"{method} {mount}{template}"


class RoomMiddleware:
    """Gives an application its Strongroom, as `request.state.strongroom`; inner code verifies the keys.

    `room` is an open Strongroom. With `url` (and `options` of Strongroom.open) one is opened at the server's start and
    closed at its end, with leased limits unless `limits="durable"` is given. With neither, the lifespan's state has it
    as `strongroom`. X-Forwarded-For is trusted only from `trusted_proxies` (networks).

    For keys that inner code verifies (FastAPI's dependency), this middleware answers refusals, adds RateLimit headers
    unless `rate_limit_headers` is false, and settles reservations at the end of the request. Raises ConfigError,
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
            if (
                self._trusted or _PROXIES not in scope
            ):  # the middleware of a mounted application inherits the outer proxies
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
        """Run the application, answer its refusals, and settle its reservations."""
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
        """Open the store before the application starts, and close it after the application has stopped."""
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
    """Verifies the key of each HTTP request and WebSocket before `app`, or answers with a problem document.

    `room`, `url` and `options` are RoomMiddleware's. `permission`, `cost`, `model` and `route` are values, or functions
    of the ASGI scope; `cost` defaults to one request. `header` is `authorization` (Bearer) or a header of your own such
    as `x-api-key`. `exempt` lists paths that need no key (`*` at the end matches any rest). X-Forwarded-For is trusted
    only from `trusted_proxies` (networks).

    With `concurrency` a request holds one of the key's concurrency limit until it is answered. `rate_limit_headers`:
    add RateLimit and RateLimit-Policy to answers. Raises ConfigError and InvalidInput for invalid settings.
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
    """A hold for the whole request: it counts as concurrent until its end, and its cost is charged in any case."""
    cost = guarded.presented.asked.get("cost") or ONE_REQUEST
    return await Hold(guarded.room, guarded.presented.asking(cost=cost), fixed=cost)


async def _forward_lifespan(app: ASGIApp, scope: Scope, first: Message, receive: Receive, send: Send) -> Message | None:
    """Run the application's lifespan, or replace it if the application has none. Returns the last message unsent,
    because a server may stop the loop as soon as it has this message."""
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
        # Most applications that raise here have no lifespan. A failed start looks the same, so it is logged.
        _log.warning(
            "the application's lifespan raised before it answered, so it counts as an application without one: %r",
            error,
        )
    if not answered:
        # An application without a lifespan raises, returns or sends HTTP messages: this answers for it.
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


# --- For the other integrations ---------------------------------------------------------------------------------


def remember(scope: Scope, guarded: Guarded, answer: Verification) -> None:
    """Put the verification into the scope, for the application."""
    before = scope.get(_GUARDED)
    if before is not None:  # the middleware verified it, and a dependency verifies again
        guarded.holds.extend(before.holds)
        before.charges.extend(guarded.charges)  # one shared list, so that the charges are refunded once
        guarded.charges = before.charges
    scope[KEY] = answer
    scope[_GUARDED] = guarded
    state = scope.get("state", {})
    if state is not scope.get(_OWN_STATE):  # some servers share the lifespan's state between requests
        state = scope["state"] = scope[_OWN_STATE] = dict(state)
    state[STATE] = guarded.room
    state[STATE_KEY] = answer


async def give_back(scope: Mapping[str, Any]) -> None:
    """Refund a request that is refused after all, except the usage that its reservations reported already."""
    guarded = scope.get(_GUARDED)
    if isinstance(guarded, Guarded):
        for hold in guarded.holds:
            hold.forgive()
        await returned(guarded.room, guarded.charges)


async def refuse(scope: Scope, receive: Receive | None, send: Send, refusal: Refusal) -> None:
    """Answer instead of the application. `receive`: None if it has read a WebSocket's first message already."""
    kind = "http.response"
    if scope["type"] == "websocket":
        if receive is not None:
            await receive()  # websocket.connect
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            # A close before the accept makes the server answer 403.
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": refusal.detail[:100]})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": refusal.status, "headers": refusal.raw_headers})
    await send({"type": f"{kind}.body", "body": refusal.body})


# --- For applications -------------------------------------------------------------------------------------------


def verification_of(request: Any) -> Verification:
    """The verification of a request: a Starlette or FastAPI request, or an ASGI scope. Raises LookupError if the
    request was not verified (an exempt path)."""
    answer = _scope_of(request).get(KEY)
    if not isinstance(answer, Verification):
        raise LookupError(_NOT_VERIFIED)
    return answer


def reserve(
    request: Any, *, cost: Cost, ttl_s: int = TTL_S, permission: str | None = None, model: str | None = None
) -> Hold:
    """Reserve an estimate before work whose cost is known only as it runs:

        hold = await reserve(request, cost={"tokens": 1_000})

        async def parts() -> AsyncIterator[str]:
            async for part in answer:
                hold.use(tokens=part.tokens)
                yield part.text

        return StreamingResponse(parts())

    or `async with reserve(…) as hold:` around work that ends before its answer. `request` is a verified request, or its
    scope. The end of the block or of the request charges the used amount, also if the client disconnected or the usage
    exceeds the reservation. The reservation is extended while the work runs, and ends `ttl_s` seconds after a kill of
    the process.

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
