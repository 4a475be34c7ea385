"""The one map from error codes to HTTP statuses, and the one error shape: problem details (RFC 9457)."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

import msgspec

from ..errors import InvalidInput, StrongroomError

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
MAX_PROBLEMS = 100
"""Problems that an answer names; further ones are left out."""
MAX_DETAIL_CHARS = 2_000


class MalformedRequest(StrongroomError):
    """The request is not well-formed: the body is not JSON, or a header cannot be read."""

    code = "malformed_request"


class MethodNotAllowed(StrongroomError):
    """This path does not take this method: the header Allow names those it takes."""

    code = "method_not_allowed"


class PreconditionFailed(StrongroomError):
    """The document does not have the version that If-Match or If-None-Match demands: read it again."""

    code = "precondition_failed"


class HeadersTooLarge(StrongroomError):
    """The request's headers are larger than the server takes."""

    code = "headers_too_large"


class ShuttingDown(StrongroomError):
    """The server is stopping: send the request to another, or again in a moment."""

    code = "unavailable"


STATUS: dict[str, int] = {
    "malformed_request": 400,
    "unauthenticated": 401,
    "denied": 403,
    "tenant_suspended": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "already_exists": 409,
    "conflict": 409,
    "bound_exceeded": 409,
    "gone": 410,
    "precondition_failed": 412,
    "too_large": 413,
    "invalid_input": 422,
    "too_many_requests": 429,
    "headers_too_large": 431,
    "internal": 500,
    "store_error": 500,
    "schema_error": 500,
    "config_error": 500,
    "unavailable": 503,
    "writes_off": 503,
    "storage_full": 507,
}
_OF_THE_STORE = frozenset({"store_error", "schema_error", "config_error", "unavailable", "storage_full"})
_PLACE = re.compile(r"^(?:(?!: ).)*/(?:(?!: ).)*: ")
"""The beginning of a store's message: its file, or its host and database."""
_RETRY = frozenset({"too_many_requests", "unavailable", "writes_off", "storage_full"})
_encode = msgspec.json.Encoder().encode


def status_of(error: StrongroomError) -> int:
    return STATUS.get(error.code, 500)


def document(error: StrongroomError, request_id: str) -> dict[str, Any]:
    """The error as problem details. The details of an internal error are logged and not sent."""
    status = status_of(error)
    title = (type(error).__doc__ or HTTPStatus(status).phrase).strip().split("\n")[0]
    body: dict[str, Any] = {
        "type": f"/docs#error-{error.code}",
        "title": title,
        "status": status,
        "detail": _detail(error)[:MAX_DETAIL_CHARS] if error.code != "internal" else title,
        "code": error.code,
        "request_id": request_id,
    }
    if error.details.get("outcome") == "unknown":
        body["outcome"] = "unknown"
    for name in ("counted", "failed"):  # members of a usage batch's error
        if name in error.details:
            body[name] = error.details[name]
    if isinstance(error, InvalidInput):
        body["errors"] = [{"path": p.path, "message": p.message} for p in error.problems[:MAX_PROBLEMS]]
    return body


def _detail(error: StrongroomError) -> str:
    """The message; for a store's errors without the store's place, which callers must not learn."""
    return _PLACE.sub("", error.message, count=1) if error.code in _OF_THE_STORE else error.message


def response(error: StrongroomError, request_id: str) -> tuple[int, Headers, bytes]:
    """Status, headers and body of the answer to an error."""
    status = status_of(error)
    body = _encode(document(error, request_id))
    headers = [
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
    ]
    if error.code in _RETRY:
        wait_s = error.details.get("retry_after_s", RETRY_AFTER_S)
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(wait_s))))
    if status == 401:
        token = b', error="invalid_token"' if error.details.get("token") else b""
        headers.append((b"www-authenticate", b'Bearer realm="strongroom"' + token))
    if "allow" in error.details:
        headers.append((b"allow", str(error.details["allow"]).encode()))
    return status, headers, body


async def send_problem(send: Send, error: StrongroomError, request_id: str) -> int:
    """Answer with the error; returns the status."""
    status, headers, body = response(error, request_id)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    return status
