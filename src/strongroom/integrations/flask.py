"""Flask: an extension whose decorator verifies the request's API key before the view.

    keys = ApiKeys(app, url="sqlite:///app.db")

    @app.post("/chat")
    @keys.required(permission="chat:write")
    def chat() -> ResponseReturnValue:
        return {"hello": keys.verification.user_id}

Views may be sync or async.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, Unpack

from flask import Blueprint, Flask, Response, current_app, g, request

from ..app import OpenOptions
from ..blocking import BlockingStrongroom
from ..keys import Verification
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

P = ParamSpec("P")
R = TypeVar("R")
_MARK = "__strongroom_required__"
_ANSWER, _PRESENTED, _HOLDS = "strongroom_key", "strongroom_presented", "strongroom_holds"
_CHARGES = "strongroom_charges"


class ApiKeys:
    """The extension: `ApiKeys(app, url=…)`, or `ApiKeys(url=…)` and `init_app(app)`.

    The first request opens the store at `url` with `options` of Strongroom.open; the end of the process closes it. So
    each worker of a forking server has its own. Or give an open `room`. `header` is `authorization` (Bearer) or a
    header of your own. X-Forwarded-For is trusted only from `trusted_proxies` (networks). A refused key is answered
    with a problem document. Raises ConfigError, InvalidInput.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        url: str | None = None,
        room: BlockingStrongroom | None = None,
        header: str = AUTHORIZATION,
        trusted_proxies: Iterable[str] = (),
        rate_limit_headers: bool = True,
        **options: Unpack[OpenOptions],
    ) -> None:
        self._desk = Desk(url=url, room=room, header=header, trusted_proxies=trusted_proxies, options=options)
        self._with_headers = rate_limit_headers
        if app is not None:
            self.init_app(app)

    @property
    def room(self) -> BlockingStrongroom:
        """The store, for the application's other work."""
        return self._desk.room

    @property
    def verification(self) -> Verification:
        """The verification of this request's key. Raises LookupError if the key was not verified."""
        answer = g.get(_ANSWER)
        if not isinstance(answer, Verification):
            raise LookupError("this request's key was not verified: its view has no @keys.required")
        return answer

    def init_app(self, app: Flask) -> None:
        """Register the handler that answers refusals, and the RateLimit headers."""
        app.extensions["strongroom"] = self
        app.register_error_handler(KeyRefused, self._refused)
        app.after_request(self._finish)

    def required(
        self,
        *,
        permission: str | Callable[[], str | None] | None = None,
        cost: Cost | Callable[[], Cost | None] | None = None,
        model: str | Callable[[], str | None] | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """A decorator for views, placed below the route's decorator: verifies and charges the key before each call.

        `permission`, `cost` (default: one request) and `model` are values, or functions that read `flask.request`.
        Raises InvalidInput for an invalid cost.
        """
        verify = self._verifying(permission, cost, model)

        def decorate(view: Callable[P, R]) -> Callable[P, R]:
            @functools.wraps(view)
            def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
                verify()
                answer: R = current_app.ensure_sync(view)(*args, **kwargs)
                return answer

            setattr(wrapper, _MARK, True)
            return wrapper

        return decorate

    def protect(
        self,
        app: Flask | Blueprint,
        *,
        permission: str | Callable[[], str | None] | None = None,
        cost: Cost | Callable[[], Cost | None] | None = None,
        model: str | Callable[[], str | None] | None = None,
        exempt: Iterable[str] = (),
    ) -> None:
        """Verify the key of every request to an application or a blueprint. Exceptions are the `exempt` paths (`*` at
        the end matches any rest) and views with their own @required."""
        verify = self._verifying(permission, cost, model)
        paths = Paths(exempt)

        def before() -> None:
            view = current_app.view_functions.get(request.endpoint or "")
            if request.path not in paths and not hasattr(view, _MARK):
                verify()

        app.before_request(before)

    def reserve(
        self, *, cost: Cost, ttl_s: int = TTL_S, permission: str | None = None, model: str | None = None
    ) -> BlockingHold:
        """Reserve an estimate before work whose cost is known only as it runs:

            hold = keys.reserve(cost={"tokens": 1_000}).open()

            def parts() -> Iterator[str]:
                for part in answer:
                    hold.use(tokens=part.tokens)
                    yield part.text

            return Response(parts())

        or `with keys.reserve(…) as hold:` around work that ends before its answer. The end of the block or of the
        answer charges the used amount, also if the client disconnected or the usage exceeds the reservation. Opening
        raises KeyRefused, which is answered, if the limits do not allow `cost`.
        """
        presented = g.get(_PRESENTED)
        if not isinstance(presented, Presented):
            raise LookupError("this request's key was not verified: its view has no @keys.required")
        if _HOLDS not in g:
            setattr(g, _HOLDS, [])
        return self._desk.hold(presented, cost, ttl_s, permission, model, g.get(_HOLDS))

    def _verifying(
        self,
        permission: str | Callable[[], str | None] | None,
        cost: Cost | Callable[[], Cost | None] | None,
        model: str | Callable[[], str | None] | None,
    ) -> Callable[[], None]:
        asks = Requirements(permission=_called(permission), cost=_called(cost), model=_called(model))

        def verify() -> None:
            presented = self._desk.presented(request.environ, _route(), **asks.of(None))
            charged = self._desk.verify(presented)
            setattr(g, _PRESENTED, presented)
            setattr(g, _ANSWER, charged.answer)
            setattr(g, _CHARGES, [*g.get(_CHARGES, ()), charged])

        return verify

    def _refused(self, error: KeyRefused) -> Response:
        self._desk.give_back(g.get(_CHARGES, []))
        refusal = error.refusal
        return Response(refusal.body, refusal.status, list(refusal.headers))

    def _finish(self, response: Response) -> Response:
        holds: list[BlockingHold] = g.get(_HOLDS, [])
        for hold in holds:
            response.call_on_close(hold.close)
        answer = g.get(_ANSWER)
        if self._with_headers and isinstance(answer, Verification) and "RateLimit" not in response.headers:
            for name, value in rate_limit_headers(answer.limits):
                response.headers[name] = value
        return response


def _called(value: Any) -> Any:
    """A setting in the form that Requirements takes: Flask's functions have no argument, because the request is in the
    context."""
    return (lambda _: value()) if callable(value) else value


def _route() -> str:
    """`GET /items/<int:id>` if Flask found the rule, else the method and the path."""
    return f"{request.method} {request.url_rule.rule if request.url_rule is not None else request.path}"


__all__ = ["ApiKeys", "BlockingHold", "KeyRefused", "Verification"]
