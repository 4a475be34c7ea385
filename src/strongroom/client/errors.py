"""Inverts the server's map from errors to answers: an answer becomes the error that the server raised."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec

from .. import errors
from ..errors import (
    Conflict,
    Denied,
    Gone,
    InvalidInput,
    NotFound,
    Problem,
    StrongroomError,
    TooLarge,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)
from .models import Verification

MAX_TEXT_CHARS = 500
"""Characters of a foreign answer that the error shows."""
MAX_UNKNOWN_CODES = 64


class MalformedRequest(StrongroomError):
    """The request is malformed: the body is not JSON, or a header is malformed."""

    code = "malformed_request"


class MethodNotAllowed(StrongroomError):
    """The server does not have this method: it may be older than this client."""

    code = "method_not_allowed"


class PreconditionFailed(Conflict):
    """The document does not have the version that was expected: read it again."""

    code = "precondition_failed"


class HeadersTooLarge(StrongroomError):
    """The request's headers are larger than the server takes."""

    code = "headers_too_large"


class NoAnswer(Unavailable):
    """The server did not answer. `details["outcome"]` is `not_done` if the request cannot have reached the server,
    `unknown` if it may have been executed."""


class UnexpectedAnswer(StrongroomError):
    """The answer is not Strongroom's: check the address, and a proxy in front of the server."""

    code = "unexpected_answer"


class Refused(StrongroomError):
    """The key may not be used for this now: `verification` says why."""

    code = "refused"

    def __init__(self, verification: Verification) -> None:
        message = verification.message or self.__doc__ or ""
        super().__init__(f"{verification.code}: {message}", retry_after_s=verification.retry_after_s)
        self.verification = verification


class ProblemItem(msgspec.Struct, frozen=True):
    path: str = ""
    message: str = ""


class ProblemDetails(msgspec.Struct, frozen=True):
    """A problem document (RFC 9457) with the server's own members."""

    code: str
    title: str = ""
    detail: str = ""
    request_id: str | None = None
    errors: list[ProblemItem] = []
    outcome: str | None = None
    counted: list[int] | None = None
    failed: list[dict[str, Any]] | None = None


def _below(cls: type[StrongroomError]) -> Iterator[type[StrongroomError]]:
    for one in cls.__subclasses__():
        if one.__module__ in (errors.__name__, __name__) and one not in (NoAnswer, Refused, UnexpectedAnswer):
            yield one
        yield from _below(one)


BY_CODE: dict[str, type[StrongroomError]] = {
    StrongroomError.code: StrongroomError,
    **{cls.code: cls for cls in _below(StrongroomError)},
}
"""The error class of each of the server's codes."""
_BY_STATUS: dict[int, type[StrongroomError]] = {
    400: MalformedRequest,
    401: Unauthenticated,
    403: Denied,
    404: NotFound,
    405: MethodNotAllowed,
    409: Conflict,
    410: Gone,
    412: PreconditionFailed,
    413: TooLarge,
    429: TooManyRequests,
    431: HeadersTooLarge,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}
_decode = msgspec.json.Decoder(ProblemDetails).decode


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> StrongroomError:
    """The error of an answer. Its details have `status`, and `request_id`, `retry_after_s` and `outcome` if the answer
    has them.

    An unknown code, of a newer server, is kept in `code`; the error's base is the class of the status.
    """
    details: dict[str, Any] = {"status": status}
    request_id = headers.get("x-request-id")
    if request_id is not None:
        details["request_id"] = request_id
    wait_s = retry_after_s(headers.get("retry-after"))
    if wait_s is not None:
        details["retry_after_s"] = wait_s
    try:
        problem = _decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _foreign(status, headers, body, details)
    if problem.request_id is not None:
        details["request_id"] = problem.request_id
    if problem.outcome is not None:
        details["outcome"] = problem.outcome
    if problem.counted is not None:
        details["counted"] = problem.counted
    if problem.failed is not None:
        details["failed"] = problem.failed
    base: Any = InvalidInput if status == 422 else _BY_STATUS.get(status, StrongroomError)
    cls = BY_CODE.get(problem.code) or _unknown(base, problem.code)
    message = problem.detail or problem.title
    if issubclass(cls, InvalidInput):
        error: StrongroomError = cls([Problem(item.path, item.message) for item in problem.errors], message)
        error.details.update(details)
        return error
    return cls(message, **details)


def _foreign(status: int, headers: Mapping[str, str], body: bytes, details: dict[str, Any]) -> StrongroomError:
    """An error from a proxy in front of the server, or from another server."""
    cls = _BY_STATUS.get(status, UnexpectedAnswer)
    kind = headers.get("content-type", "no content type")
    text = body[: MAX_TEXT_CHARS * 4].decode("utf-8", "replace")[:MAX_TEXT_CHARS]
    return cls(f"status {status} with an answer that is not Strongroom's ({kind}): {text!r}", **details)


@lru_cache(MAX_UNKNOWN_CODES)
def _unknown(base: Any, code: str) -> type[StrongroomError]:
    return type(base.__name__, (base,), {"code": code, "__doc__": base.__doc__, "__module__": __name__})


def retry_after_s(value: str | None) -> float | None:
    """A Retry-After header, seconds or a date, as seconds from now; None if it is missing or malformed."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - time.time())
