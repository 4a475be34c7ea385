"""The ASGI application: bare routes for verifications, FastAPI for the rest, with bounds, metrics and one error
shape."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..app import Strongroom
from ..client_address import Network
from ..entities import message_of
from ..errors import (
    Denied,
    InvalidInput,
    NotFound,
    Problem,
    StrongroomError,
    TooManyRequests,
)
from ..keys import AUDITOR
from . import errors, openapi
from .auth import single
from .direct import KnownHeads
from .errors import (
    MalformedRequest,
    Message,
    MethodNotAllowed,
    Send,
    send_problem,
)
from .routes import (
    audit,
    audit_upkeep,
    entities,
    health,
    keys,
    keys_bulk,
    leaks,
    quotas,
    reservations,
    stats,
    tenants,
    usage,
    webhooks,
    writes,
)
from .services import Bounds, Services
from .signers import Signers
from .tracing import Tracing
from .verify import PATH as VERIFY
from .verify import Receive, VerifyRoute, expect_at_most, too_large
from .wire import request_id_of

_log = logging.getLogger(__name__)
_access = logging.getLogger("strongroom.access")
_OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/stats"})
"""Paths that need no management key; `/stats` takes the API key itself."""
_HEALTH = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths of monitoring, with a gate of their own: a full server must still answer them."""
_ENCODED_SLASH = re.compile(rb"%2f", re.IGNORECASE)
DEFAULT_BOUNDS = Bounds()
CLIENT_GONE = 499
"""The counted status of a request whose client disconnected before the answer."""
SLASH = "\x00"
"""Replaces an encoded slash inside a path's segment during routing; no id contains U+0000."""


class Application:
    """The ASGI application that uvicorn calls."""

    def __init__(self, services: Services, api: FastAPI, tracing: Tracing | None = None) -> None:
        self.services = services
        self.api = api
        self._tracing = tracing
        self.heads = KnownHeads()
        self.verify = VerifyRoute(
            services.room.keys,
            services.authenticator,
            services.metrics,
            services.verify_gate,
            services.bounds.max_body_bytes,
            services.record_denial,
        )
        self.verify.direct = tracing is None

    # A coroutine function, because servers recognise ASGI 3 by it.
    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if self._tracing is None:
                await self._answer(scope, receive, send)
            else:
                await self._tracing.request(self._answer, scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:  # a websocket: not supported
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["path"] == VERIFY and scope["method"] == "POST":
            await self.verify(scope, receive, send)
        else:
            await self._handle(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Answer the lifespan events. The builder of this application opens and closes the store."""
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        self.close()
        await send({"type": "lifespan.shutdown.complete"})

    def close(self) -> None:
        """End the streams, because the server stops."""
        self.services.close()

    async def _handle(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Handle every request except a verification: identify, authenticate, bound, pass on, count."""
        started = time.perf_counter()
        request_id = scope["strongroom.request_id"] = request_id_of(scope["headers"])
        method = scope["method"]
        streams = scope["path"].endswith(":watch")  # a stream counts as a watcher, not as a request
        if method == "HEAD" and not streams:  # as GET, without the body; a copy, because the server reads its own scope
            scope = {**scope, "method": "GET"}
        answer = _Answer(send, request_id, without_body=method == "HEAD")
        gate = self.services.health_gate if scope["path"] in _HEALTH else self.services.gate
        gate.inside += not streams
        who = None
        try:
            if gate.inside > gate.limit:
                raise TooManyRequests
            headers = single(scope["headers"])
            _route_encoded_slashes(scope)
            if scope["path"] not in _OPEN and scope["path"].startswith("/v1") and not leaks.is_report(scope):
                caller = await self.services.authenticator.caller(headers.get(b"authorization"), scope)
                scope["strongroom.caller"] = caller
                if caller.only_audits:
                    _expect_audit(scope)
                if not streams:
                    who = self.services.enter(caller)
            if scope["path"] == VERIFY:
                raise MethodNotAllowed(f"{method} is not for this path", allow="POST")
            expect_at_most(headers.get(b"content-length"), self.services.bounds.max_body_bytes)
            await self.api(scope, self._bounded(receive), answer)
        except StrongroomError as error:
            await self.services.record_denial(error, scope.get("strongroom.caller"), method, "other")
            if not answer.started:
                await send_problem(answer, error, request_id)
        except ClientDisconnect:
            answer.status = CLIENT_GONE  # FastAPI answered 500 to a closed connection: not a failure of the server
        except Exception as error:  # not handled below, or raised in the middle of an answer
            _log.exception("request failed", extra={"request_id": request_id, "error": type(error).__name__})
            if not answer.started:
                await send_problem(answer, StrongroomError(), request_id)
        finally:
            gate.inside -= not streams
            if who is not None:
                self.services.leave(who)
            self._count(scope, method, answer.status, time.perf_counter() - started, request_id)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, which raises TooLarge as soon as the body exceeds the bound."""
        most = self.services.bounds.max_body_bytes
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise too_large(most)
            return message

        return bounded

    def _count(self, scope: Mapping[str, Any], method: str, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        self.services.metrics.request(method, route, status, seconds)
        if self.services.access_log and scope["path"] not in _OPEN:
            caller = scope.get("strongroom.caller")
            _access.info(
                "request",
                extra={
                    "method": method,
                    "path": scope["path"],
                    "status": status,
                    "ms": round(seconds * 1_000, 2),
                    "request_id": request_id,
                    "actor": caller.actor if caller is not None else None,
                },
            )


class _Answer:
    """`send`, which remembers the answer's status and adds the request's id."""

    __slots__ = ("_request_id", "_send", "_without_body", "started", "status")

    def __init__(self, send: Send, request_id: str, *, without_body: bool = False) -> None:
        self._send = send
        self._without_body = without_body
        self._request_id = request_id.encode()
        self.started = False
        self.status = CLIENT_GONE

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            headers = message["headers"] = list(message.get("headers", ()))
            if not any(name == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self._request_id))
        elif self._without_body:
            message["body"] = b""
        await self._send(message)


def _expect_audit(scope: Mapping[str, Any]) -> None:
    """Raise Denied unless the request reads the audit trail. It is checked here for every route, so that a route which
    asks for no scope is still closed to auditors."""
    path = scope["path"]
    if scope["method"] != "GET" or not (path == audit.PATH or path.startswith(f"{audit.PATH}/")):
        raise Denied(f"this key has only the permission {AUDITOR}: it reads {audit.PATH} and nothing else")


def _route_encoded_slashes(scope: dict[str, Any]) -> None:
    """Keep a slash inside a tenant or an id, sent as %2F. The server has decoded it already, which would change the
    route."""
    raw: bytes = scope.get("raw_path") or b""
    if b"%00" in raw:
        raise InvalidInput([Problem("path", "found U+0000, which no name contains")])
    if _ENCODED_SLASH.search(raw):
        scope["path"] = unquote_to_bytes(_ENCODED_SLASH.sub(SLASH.encode(), raw)).decode("utf-8", "replace")


# --- Building -------------------------------------------------------------------------------------------------


def build(
    room: Strongroom,
    bounds: Bounds = DEFAULT_BOUNDS,
    *,
    access_log: bool = False,
    leak_keys: str | None = None,
    proxies: Sequence[Network] = (),
    tracing: Tracing | None = None,
) -> Application:
    """The application on an opened Strongroom, which the caller closes. `leak_keys`: the place of the public keys of
    scanners that sign their reports. `proxies`: networks whose X-Forwarded-For is trusted. `tracing` makes a span of
    each request. Raises ConfigError."""
    services = Services(room, bounds, access_log, Signers(leak_keys) if leak_keys is not None else None, proxies)
    api = FastAPI(
        title="Strongroom",
        version=openapi.version(),
        description="API keys with exact usage limits, and tenant-isolated state.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    _handle_errors(api)
    api.state.services, api.state.room = services, room
    for module in (
        health,
        stats,
        usage,
        reservations,
        leaks,
        quotas,
        keys,
        keys_bulk,
        audit_upkeep,
        audit,
        webhooks,
        tenants,
        writes,
    ):
        api.include_router(module.routes)
    api.include_router(entities.router(services))
    openapi.serve(api)
    return Application(services, api, tracing)


def _parameter_problem(item: Mapping[str, Any]) -> Problem:
    """A Problem from one of FastAPI's errors, which concern only query parameters and path segments here."""
    message = "is not a known parameter" if item["type"] == "extra_forbidden" else message_of(item)
    return Problem(".".join(str(part) for part in item["loc"][1:])[:128], message)


def _handle_errors(api: FastAPI) -> None:
    def problem(request: Request, error: StrongroomError) -> Response:
        status, headers, body = errors.response(error, request.scope["strongroom.request_id"])
        answer = Response(body, status)
        answer.raw_headers = headers
        return answer

    @api.exception_handler(StrongroomError)
    async def ours(request: Request, error: StrongroomError) -> Response:
        services, scope = request.app.state.services, request.scope
        route = getattr(scope.get("route"), "path", "other")
        await services.record_denial(error, scope.get("strongroom.caller"), request.method, route)
        if errors.status_of(error) == 500:
            _log.error("request failed: %s", error, extra={"request_id": request.scope["strongroom.request_id"]})
        return problem(request, error)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return problem(request, InvalidInput([_parameter_problem(item) for item in error.errors()]))

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return problem(request, StrongroomError())  # Starlette raises the error again, and `_handle` logs it

    @api.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return problem(request, NotFound(f"there is no {request.url.path}"))
        if error.status_code == 405:
            await openapi.made(api)
            allow = ", ".join(openapi.methods(api, request.url.path))
            return problem(request, MethodNotAllowed(f"{request.method} is not for this path", allow=allow))
        if error.status_code == 400:
            return problem(request, MalformedRequest(str(error.detail)))
        return problem(request, StrongroomError(str(error.detail)))


__all__ = ["Application", "Bounds", "build"]
