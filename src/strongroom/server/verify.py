"""`POST /v1/keys/verify`: the hot route. It logs nothing and allocates little.

A request takes one of two paths, with the same answers:

- `VerifyRoute.answer_directly`: the server's own protocol calls it with the whole request. It needs no task and no
  ASGI messages, which cost more than the verification itself.
- `VerifyRoute.__call__` is bare ASGI. It takes every other request, and all requests under another server. For an
  invalid request, `problems_with` reads the body again, slowly, so that the answer names every problem.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from typing import Any, Protocol

import msgspec

from ..context import kind_of, repeated_name
from ..errors import (
    InvalidInput,
    Problem,
    StrongroomError,
    TooLarge,
    TooManyRequests,
)
from ..keys import Keys, PendingVerification, Verification, check_address, cost_units
from .auth import Authenticator, Caller, Scope, single
from .errors import MalformedRequest, Message, Send, send_problem
from .metrics import Metrics
from .wire import expect_object, parse_json, repeated, request_id_of

PATH = "/v1/keys/verify"
Receive = Callable[[], Awaitable[Message]]
Asgi = Callable[[Any, Any, Any], Awaitable[None]]
_log = logging.getLogger(__name__)


class Ask(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The body of a verification."""

    key: str
    cost: dict[str, Any] | None = None
    permission: str | None = None
    ip: str | None = None
    model: str | None = None
    route: str | None = None
    peek: bool = False


class Reply(Protocol):
    """The receiver of the answer to one request. The route calls one of the methods, once."""

    def answer(self, payload: bytes) -> None:
        """200, with this JSON."""
        ...

    def hand_on(self, app: Asgi) -> None:
        """Let an ASGI application answer."""
        ...


class Gate:
    """Counts the requests in work. Requests beyond `limit` are refused instead of piling up."""

    __slots__ = ("inside", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0


# Numbers with a point become Decimals: floats would lose digits of money.
_decode = msgspec.json.Decoder(Ask, float_hook=Decimal).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode
_CONTENT_TYPE = (b"content-type", b"application/json")


class VerifyRoute:
    """The ASGI application of this one route."""

    def __init__(
        self,
        keys: Keys,
        authenticator: Authenticator,
        metrics: Metrics,
        gate: Gate,
        max_body_bytes: int,
        record_denial: Callable[[StrongroomError, Caller | None, str, str], Awaitable[None]],
    ) -> None:
        self._keys = keys
        self._authenticator = authenticator
        self._metrics = metrics
        self._gate = gate
        self._max_body_bytes = max_body_bytes
        self._record_denial = record_denial
        self.direct = True
        """Whether `answer_directly` answers: it makes no spans, so not while requests are traced."""

    def answer_directly(self, authorization: bytes, body: bytes, reply: Reply) -> bool:
        """Answer a request with one Authorization header and no Idempotency-Key, now or when its admission is decided.
        False if the request needs `__call__`; then nothing was done."""
        gate = self._gate
        if gate.inside >= gate.limit or len(body) > self._max_body_bytes or not self.direct:
            return False
        started = time.perf_counter()
        caller = self._authenticator.known(authorization)
        if caller is None or caller.scope < Scope.WRITE:
            return False
        try:
            ask = _decode(body)
            if ask.peek:
                return False
            if body.count(b'"key"') > 1:  # a repeated name: `__call__` reports it
                return False
            pending = self._keys.verifier.start(
                ask.key,
                cost=ask.cost,
                permission=ask.permission,
                ip=ask.ip,
                model=ask.model,
                route=ask.route,
                tenant=caller.tenant,
            )
        except (InvalidInput, msgspec.MsgspecError, ValueError, RecursionError):
            return False  # `__call__` names the problems
        except Exception as error:  # the parser that calls this would report a malformed request
            reply.hand_on(_Failed(self, error, started))
            return True
        if pending is None:
            return False
        if isinstance(pending, Verification):
            reply.answer(_encode(pending))
            self._metrics.verification(pending.code, time.perf_counter() - started)
        else:
            gate.inside += 1
            pending.outcome.add_done_callback(lambda _: self._conclude(pending, reply, started))
        return True

    def _conclude(self, pending: PendingVerification, reply: Reply, started: float) -> None:
        self._gate.inside -= 1
        try:
            answer = self._keys.verifier.finish(pending)
            payload = _encode(answer) if answer is not None else b""
        except Exception as error:  # `refuse` logs and answers it
            reply.hand_on(_Failed(self, error, started))
            return
        if answer is None:
            reply.hand_on(self)
            return
        reply.answer(payload)
        self._metrics.verification(answer.code, time.perf_counter() - started)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        gate = self._gate
        gate.inside += 1
        try:
            if gate.inside > gate.limit:
                raise TooManyRequests
            headers = single(scope["headers"])
            authorization, once = headers.get(b"authorization"), headers.get(b"idempotency-key")
            idempotency_key = None if once is None else once.decode("latin-1")
            caller = self._authenticator.known(authorization)
            if caller is None:
                caller = await self._authenticator.caller(authorization, scope)
            if caller.scope < Scope.WRITE:
                try:
                    caller.needs(Scope.WRITE)
                except StrongroomError as denied:
                    await self._record_denial(denied, caller, "POST", PATH)
                    raise
            expect_at_most(headers.get(b"content-length"), self._max_body_bytes)
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has disconnected
            body: bytes = message["body"]
            if message.get("more_body"):
                body = await self._rest(body, receive)
            if len(body) > self._max_body_bytes:
                raise too_large(self._max_body_bytes)
            try:
                ask = _decode(body)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                raise problems_with(body) from None
            if (name := repeated_name(body, None)) is not None:
                raise InvalidInput([repeated(name)])
            try:
                answer = await self._keys.verify(
                    ask.key,
                    cost=ask.cost,
                    permission=ask.permission,
                    ip=ask.ip,
                    model=ask.model,
                    route=ask.route,
                    tenant=caller.tenant,
                    idempotency_key=idempotency_key,
                    actor=caller.unique_actor,
                    peek=ask.peek,
                )
            except InvalidInput as error:
                raise problems_with(body, error) from None
            payload = _encode(answer)
        except Exception as error:
            await self.refuse(scope, send, error, started)
        else:
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [_CONTENT_TYPE, (b"content-length", b"%d" % len(payload))],
                }
            )
            await send({"type": "http.response.body", "body": payload})
            self._metrics.verification(answer.code, time.perf_counter() - started)
        finally:
            gate.inside -= 1

    async def _rest(self, first: bytes, receive: Receive) -> bytes:
        parts, size = [first], len(first)
        more = True
        while more:
            if size > self._max_body_bytes:
                raise too_large(self._max_body_bytes)
            message = await receive()
            if message["type"] != "http.request":
                raise MalformedRequest("the connection ended before the body")
            part: bytes = message.get("body", b"")
            parts.append(part)
            size += len(part)
            more = bool(message.get("more_body"))
        return b"".join(parts)

    async def refuse(self, scope: Mapping[str, Any], send: Send, error: Exception, started: float) -> None:
        """Answer with an error. Unexpected errors are logged and answered with a generic 500."""
        if not isinstance(error, StrongroomError):
            _log.error("verify failed", exc_info=error, extra={"error": type(error).__name__})
            error = StrongroomError()
        status = await send_problem(send, error, request_id_of(scope["headers"]))
        self._metrics.request("POST", PATH, status, time.perf_counter() - started)


class _Failed:
    """An ASGI application that answers with an earlier error."""

    def __init__(self, route: VerifyRoute, error: Exception, started: float) -> None:
        self._route = route
        self._error = error
        self._started = started

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        await self._route.refuse(scope, send, self._error, self._started)


def too_large(most: int) -> TooLarge:
    return TooLarge(f"the body is larger than {most} bytes")


def expect_at_most(content_length: bytes | None, most: int) -> None:
    """Raise TooLarge for a body with a larger Content-Length, before any of it is read."""
    if content_length is not None and (not content_length.isdigit() or int(content_length[:20]) > most):
        raise too_large(most)


# --- The slow path --------------------------------------------------------------------------------------------


def problems_with(body: bytes, otherwise: InvalidInput | None = None) -> StrongroomError:
    """Every problem of a body that the fast path refused; `otherwise` if there is none."""
    try:
        value, problems = parse_json(body)
        fields = expect_object(value)
    except StrongroomError as found:
        return found
    found_paths = {problem.path for problem in problems}
    problems += [problem for problem in item_problems(fields, more=("peek",)) if problem.path not in found_paths]
    if type(fields.get("peek", False)) is not bool:
        problems.append(Problem("peek", f"found {kind_of(fields['peek'])}, expected true or false"))
    return InvalidInput(problems) if problems else otherwise or InvalidInput("the body cannot be read")


def item_problems(
    fields: dict[str, Any],
    prefix: str = "",
    *,
    more: tuple[str, ...] = (),
    costs: Callable[[Any], Any] = cost_units,
) -> list[Problem]:
    """The problems of one verification, field by field; `more` are other allowed fields."""
    known = (*(name for name in Ask.__struct_fields__ if name != "peek"), *more)
    problems = [Problem(f"{prefix}{name[:64]}", "is not a known field") for name in fields if name not in known]
    if "key" not in fields:
        problems.append(Problem(f"{prefix}key", "is required"))
    for name in ("key", "permission", "ip", "model", "route"):
        value = fields.get(name)
        if not isinstance(value, str) and (value is not None or (name == "key" and name in fields)):
            problems.append(Problem(f"{prefix}{name}", f"found {kind_of(value)}, expected text"))
    cost = fields.get("cost")
    if cost is not None:
        if isinstance(cost, dict):
            problems += _problems_of(costs, cost, prefix)
        else:
            problems.append(Problem(f"{prefix}cost", f"found {kind_of(cost)}, expected an object"))
    if isinstance(fields.get("ip"), str):
        problems += _problems_of(check_address, fields["ip"], prefix)
    return problems


def _problems_of(check: Callable[[Any], Any], value: Any, prefix: str) -> list[Problem]:
    try:
        check(value)
    except InvalidInput as error:
        return [Problem(f"{prefix}{problem.path}", problem.message) for problem in error.problems]
    return []


__all__ = ["Ask", "Gate", "Reply", "Verification", "VerifyRoute", "item_problems"]
