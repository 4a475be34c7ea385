"""JSON in and out, and the request headers that all routes read in the same way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from decimal import Decimal
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from ..app import Strongroom
from ..context import Context, kind_of, new_id, repeated_name
from ..entities import problems_of
from ..errors import Conflict, InvalidInput, NotFound, Problem
from .auth import Caller
from .errors import MalformedRequest, PreconditionFailed

M = TypeVar("M", bound=BaseModel)

_VERSION = re.compile(r"[1-9][0-9]{0,18}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_ETAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
MAX_ETAGS = 20
_decode = msgspec.json.Decoder().decode
_decode_exactly = msgspec.json.Decoder(float_hook=Decimal).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


# --- JSON in --------------------------------------------------------------------------------------------------


def parse_json(body: bytes) -> tuple[Any, list[Problem]]:
    """A body as Python values, and the problems of single values: numbers such as NaN, which JSON does not have, and
    repeated names in an object. Raises MalformedRequest for an unreadable body."""
    try:
        value = _decode(body)
        name = repeated_name(body, value)
        return value, [] if name is None else [repeated(name)]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    value, problems = None, []
    try:
        value = json.loads(body)
        problems = list(_not_json(value, ""))
    except (ValueError, RecursionError):
        pass
    if not problems:
        raise MalformedRequest(f"the body is not JSON: {reason}" if body else "the body is empty, expected JSON")
    return value, problems


def repeated(name: str) -> Problem:
    return Problem(name[:64], "found this name more than once in one object, expected it once")


def _not_json(value: Any, path: str) -> Iterator[Problem]:
    if isinstance(value, float) and not math.isfinite(value):
        yield Problem(path, f"found {value}, expected a finite number")
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            yield Problem(path, "found a lone surrogate, expected valid Unicode")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _not_json(name, f"{path}.{name[:64]!r}" if not name.isascii() else path)
            yield from _not_json(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _not_json(item, f"{path}.{number}" if path else str(number))


def exactly(body: bytes) -> Any:
    """A body by its value, numbers with all digits. A body that is not JSON stays as it is; no body is None."""
    try:
        return _decode_exactly(body) if body else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return body


def expect_object(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInput([Problem(path, f"found {kind_of(value)}, expected an object")])
    return value


async def body_fields(request: Request, *, exact: Iterable[str] | None = ()) -> dict[str, Any]:
    """The body as a dict; in the fields named `exact` (None: all), numbers with a point are Decimals.

    Raises MalformedRequest, InvalidInput.
    """
    body = await request.body()
    value, problems = parse_json(body)
    if problems:
        raise InvalidInput(problems)
    fields = expect_object(value)
    wanted = list(fields) if exact is None else [name for name in exact if name in fields]
    if wanted:
        exactly = _decode_exactly(body)
        fields.update({name: exactly[name] for name in wanted})
    return fields


async def read(request: Request, model: type[M]) -> M:
    """The body as a model, strictly: a number is not accepted as text. Raises MalformedRequest, InvalidInput (all
    problems)."""
    body = await request.body()
    _, problems = parse_json(body)
    if problems:
        raise InvalidInput(problems)
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise InvalidInput(problems_of(error)) from None


# --- JSON out -------------------------------------------------------------------------------------------------


class Json(JSONResponse):
    """A JSON answer. Decimals are numbers with all their digits."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encode(content)


def etag(version: int) -> str:
    return f'"{version}"'


# --- Headers --------------------------------------------------------------------------------------------------


def request_id_of(headers: Any) -> str:
    """The X-Request-Id of an ASGI scope's headers if it is well-formed, else a new id."""
    for name, value in headers:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return text
            break
    return new_id()


def room_of(request: Request) -> Strongroom:
    """The opened store of the request's application."""
    room: Strongroom = request.app.state.room
    return room


def caller_of(request: Request) -> Caller:
    caller: Caller = request.scope["strongroom.caller"]
    return caller


def context_of(request: Request, tenant: str | None = None) -> Context:
    """The caller's context for one tenant (None: the caller's own, or the platform)."""
    caller = caller_of(request)
    return caller.context(tenant if tenant is not None else caller.tenant, request.scope["strongroom.request_id"])


def _etags(value: str, header: str) -> list[str]:
    parts = [part.strip() for part in value.split(",")]
    matches = [_ETAG.fullmatch(part) for part in parts]
    if len(parts) > MAX_ETAGS or not all(matches):
        raise InvalidInput([Problem(header, f'found {value[:64]!r}, expected * or a quoted version such as "17"')])
    return [match[2] for match in matches if match is not None and not match[1]]  # a weak ETag never matches


class Preconditions:
    """If-Match and If-None-Match of a write, as versions. As a context manager it turns the conflict of a failed
    precondition into PreconditionFailed.

    `any`: If-Match is `*`, the document must exist. `none`: If-None-Match is `*`, it must not exist.
    """

    def __init__(self, request: Request) -> None:
        match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
        if match is not None and none_match is not None:
            raise InvalidInput([Problem("If-None-Match", "cannot be combined with If-Match")])
        self.any = match is not None and match.strip() == "*"
        self.none = none_match is not None and none_match.strip() == "*"
        self.versions: tuple[int, ...] = ()
        if match is not None and not self.any:
            # Versions are positive; a 0 would mean "must not exist" to the store.
            self.versions = tuple(int(t) for t in _etags(match, "If-Match") if _VERSION.fullmatch(t))
            if not self.versions:
                raise PreconditionFailed
        if none_match is not None and not self.none:
            raise InvalidInput(
                [Problem("If-None-Match", f"found {none_match[:64]!r}, expected * (the document must not exist yet)")]
            )

    async def expected(self, version: Callable[[], Awaitable[int | None]]) -> int | None:
        """The expected version. `version` reads the current version if it is needed (None: there is no document).

        Raises PreconditionFailed.
        """
        if len(self.versions) == 1:
            return self.versions[0]
        if self.none:
            return 0
        if not self.versions:
            return None  # the write itself checks that the document exists: `any`
        found = await version()
        if found is None or found not in self.versions:
            raise PreconditionFailed
        return found

    def __enter__(self) -> Preconditions:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        demanded = self.any or self.none or self.versions
        # A conflict over a reused idempotency key names no version.
        broken = isinstance(error, Conflict) and ("expected" in error.details or "operation" in error.details)
        broken = broken or (self.any and isinstance(error, NotFound))
        if demanded and broken:
            raise PreconditionFailed from None


def not_modified(request: Request, version: int) -> bool:
    """Whether If-None-Match of a GET names this version."""
    value = request.headers.get("if-none-match")
    if value is None:
        return False
    if value.strip() == "*":
        return True
    return str(version) in [part.strip().removeprefix("W/").strip('"') for part in value.split(",")]
