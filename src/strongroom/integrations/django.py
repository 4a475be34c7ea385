"""Django: a middleware that verifies the API key of each request, and a decorator for single views.

    # settings.py
    MIDDLEWARE = ["strongroom.integrations.django.StrongroomMiddleware", …]
    STRONGROOM = {"url": "sqlite:///app.db", "exempt": ["/healthz"]}

    # views.py
    @api_key(permission="chat:write")
    async def chat(request): ...

WSGI and ASGI alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from inspect import iscoroutinefunction as is_async
from typing import Any, TypeVar, cast

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpResponse

from ..blocking import BlockingStrongroom
from ..keys import Charged, Verification
from ._core import (
    AUTHORIZATION,
    Cost,
    KeyRefused,
    Paths,
    Presented,
    Requirements,
    rate_limit_headers,
)
from ._hold import TTL_S
from ._threads import BlockingHold, Desk

View = TypeVar("View", bound=Callable[..., Any])
# Django has no types: requests and responses are `Any` in this module only.
Request = Any
Answer = Any

SETTINGS = frozenset(
    (
        "url",
        "room",
        "header",
        "trusted_proxies",
        "exempt",
        "everywhere",
        "permission",
        "cost",
        "model",
        "rate_limit_headers",
        "options",
    )
)
_MARK = "__strongroom_own__"
_GUARD = "_strongroom"


class _Guard:
    """One request's room, its verification and its reservations."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.presented: Presented | None = None
        self.answer: Verification | None = None
        self.holds: list[BlockingHold] = []
        self.charges: list[Charged] = []

    def verify(self, request: Request, asks: Requirements) -> None:
        presented = self._present(request, asks)
        self.let_in(request, presented, self.desk.verify(presented))

    async def averify(self, request: Request, asks: Requirements) -> None:
        presented = self._present(request, asks)
        self.let_in(request, presented, await self.desk.averify(presented))

    def _present(self, request: Request, asks: Requirements) -> Presented:
        return self.desk.presented(request.META, _route(request), **asks.of(request))

    def let_in(self, request: Request, presented: Presented, charged: Charged) -> None:
        self.presented, self.answer = presented, charged.answer
        self.charges.append(charged)
        request.strongroom_key = charged.answer

    def close(self) -> None:
        for hold in self.holds:
            hold.close()


class StrongroomMiddleware:
    """Verifies the key of each request before its view, or answers with a problem document.

    The dict `STRONGROOM` has the settings:

        url                  the store, opened by the first request with `options` of Strongroom.open
        room                 or an open BlockingStrongroom
        header               `authorization` (Bearer) or a header of your own
        trusted_proxies      networks whose X-Forwarded-For is trusted
        exempt               paths that need no key (`*` at the end matches any rest)
        permission, cost, model    values, or functions of the request
        everywhere           true: every view needs a key except @public; false: only views with @api_key
        rate_limit_headers   true by default

    The Verification is `request.strongroom_key`. Raises ImproperlyConfigured, ConfigError, InvalidInput.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[Request], Any]) -> None:
        found = getattr(settings, "STRONGROOM", None)
        if not isinstance(found, Mapping):
            raise ImproperlyConfigured("the setting STRONGROOM is missing: expected a dict with a url")
        unknown = sorted(set(found) - SETTINGS)
        if unknown:
            raise ImproperlyConfigured(
                f"STRONGROOM: found {', '.join(unknown)}, expected {', '.join(sorted(SETTINGS))}"
            )
        self._get_response = get_response
        self._desk = Desk(
            url=found.get("url"),
            room=found.get("room"),
            header=found.get("header", AUTHORIZATION),
            trusted_proxies=found.get("trusted_proxies", ()),
            options=found.get("options", {}),
        )
        self._asks = Requirements(permission=found.get("permission"), cost=found.get("cost"), model=found.get("model"))
        self._exempt = Paths(found.get("exempt", ()))
        self._everywhere = bool(found.get("everywhere", True))
        self._with_headers = bool(found.get("rate_limit_headers", True))
        self._is_async = bool(iscoroutinefunction(get_response))
        if self._is_async:
            markcoroutinefunction(self)

    @property
    def room(self) -> BlockingStrongroom:
        """The store, for the application's other work."""
        return self._desk.room

    def __call__(self, request: Request) -> Any:
        guard = _Guard(self._desk)
        setattr(request, _GUARD, guard)
        if self._is_async:
            return self._acall(request, guard)
        try:
            response = self._get_response(request)
        except BaseException:
            guard.close()
            raise
        return self._finished(response, guard)

    async def _acall(self, request: Request, guard: _Guard) -> Answer:
        try:
            response = await self._get_response(request)
        except BaseException:  # a disconnected client cancels the request
            for hold in guard.holds:
                await hold.aclose()
            raise
        return self._finished(response, guard)

    @property
    def process_view(self) -> Callable[..., Any]:
        """Called by Django with the view that it found, in the handler's mode (sync or async)."""
        return self._aprocess_view if self._is_async else self._process_view

    def _process_view(self, request: Request, view: Any, args: Any, kwargs: Any) -> Answer:
        if self._concerns(request, view):
            try:
                _guard_of(request).verify(request, self._asks)
            except KeyRefused as refused:
                return _answer(refused)
        return None

    async def _aprocess_view(self, request: Request, view: Any, args: Any, kwargs: Any) -> Answer:
        if self._concerns(request, view):
            try:
                await _guard_of(request).averify(request, self._asks)
            except KeyRefused as refused:
                return _answer(refused)
        return None

    def process_exception(self, request: Request, error: Exception) -> Answer:
        """Answer a refusal that a view's decorator or reservation raised, and charge the request nothing."""
        if not isinstance(error, KeyRefused):
            return None
        guard = _guard_of(request)
        guard.desk.give_back(guard.charges)
        return _answer(error)

    def _concerns(self, request: Request, view: Any) -> bool:
        return self._everywhere and not hasattr(view, _MARK) and request.path not in self._exempt

    def _finished(self, response: Answer, guard: _Guard) -> Answer:
        if self._with_headers and guard.answer is not None and "RateLimit" not in response:
            for name, value in rate_limit_headers(guard.answer.limits):
                response[name] = value
        if guard.holds:
            close = response.close

            def close_all() -> None:
                try:
                    close()
                finally:
                    guard.close()

            # The server closes an answer once it is sent, and also when its client disconnected.
            response.close = close_all
        return response


def api_key(
    *,
    permission: str | Callable[[Request], str | None] | None = None,
    cost: Cost | Callable[[Request], Cost | None] | None = None,
    model: str | Callable[[Request], str | None] | None = None,
) -> Callable[[View], View]:
    """A decorator for a view, sync or async: its requirements replace the middleware's for this view.

    `cost` defaults to one request. Raises ImproperlyConfigured if the middleware is not in MIDDLEWARE.
    """
    asks = Requirements(permission=permission, cost=cost, model=model)

    def decorate(view: View) -> View:
        wrapper: Any
        if is_async(view):

            @functools.wraps(view)
            async def awaiting(request: Request, *args: Any, **kwargs: Any) -> Answer:
                await _guard_of(request).averify(request, asks)
                return await view(request, *args, **kwargs)

            wrapper = awaiting
        else:

            @functools.wraps(view)
            def waiting(request: Request, *args: Any, **kwargs: Any) -> Answer:
                _guard_of(request).verify(request, asks)
                return view(request, *args, **kwargs)

            wrapper = waiting
        setattr(wrapper, _MARK, True)
        return cast(View, wrapper)

    return decorate


def public(view: View) -> View:
    """A decorator for a view that needs no key even if `everywhere` is true."""
    setattr(view, _MARK, True)
    return view


def verification_of(request: Request) -> Verification:
    """The verification of a request's key. Raises LookupError if the key was not verified."""
    answer = getattr(request, "strongroom_key", None)
    if not isinstance(answer, Verification):
        raise LookupError("this request's key was not verified: its path or view needs none")
    return answer


def reserve(
    request: Request, *, cost: Cost, ttl_s: int = TTL_S, permission: str | None = None, model: str | None = None
) -> BlockingHold:
    """Reserve an estimate before work whose cost is known only as it runs:

        hold = reserve(request, cost={"tokens": 1_000}).open()      # in an async view: await ….aopen()

        def parts() -> Iterator[str]:
            for part in answer:
                hold.use(tokens=part.tokens)
                yield part.text

        return StreamingHttpResponse(parts())

    or `with reserve(…) as hold:` (`async with`) around work that ends before its answer. The end of the block or of the
    answer charges the used amount, also if the client disconnected or the usage exceeds the reservation. Opening raises
    KeyRefused, which the middleware answers, if the limits do not allow `cost`.
    """
    guard = _guard_of(request)
    if guard.presented is None:
        raise LookupError("this request's key was not verified: its path or view needs none")
    return guard.desk.hold(guard.presented, cost, ttl_s, permission, model, guard.holds)


def _guard_of(request: Request) -> _Guard:
    guard = getattr(request, _GUARD, None)
    if not isinstance(guard, _Guard):
        raise ImproperlyConfigured("strongroom.integrations.django.StrongroomMiddleware is not in MIDDLEWARE")
    return guard


def _route(request: Request) -> str:
    """`GET /items/<int:id>` if Django found the pattern, else the method and the path."""
    match = request.resolver_match
    return f"{request.method} /{match.route}" if match is not None else f"{request.method} {request.path}"


def _answer(refused: KeyRefused) -> Answer:
    refusal = refused.refusal
    response = HttpResponse(refusal.body, status=refusal.status)
    for name, value in refusal.headers:
        response[name] = value
    return response


__all__ = [
    "BlockingHold",
    "KeyRefused",
    "StrongroomMiddleware",
    "Verification",
    "api_key",
    "public",
    "reserve",
    "verification_of",
]
