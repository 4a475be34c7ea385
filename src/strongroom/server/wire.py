"""JSON in and out, and the request headers that every route reads alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError

from ..context import Context, new_id, text_problem
from ..database import MAX_IDEMPOTENCY_KEY_BYTES
from ..entity import problems_of
from ..errors import Conflict, InvalidInput, Problem
from .auth import Caller
from .errors import MalformedRequest, PreconditionFailed

M = TypeVar("M", bound=BaseModel)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_ETAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
MAX_ETAGS = 20
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


# --- JSON in --------------------------------------------------------------------------------------------------


def parse_json(body: bytes) -> tuple[Any, list[Problem]]:
    """A body as Python values, and what is wrong with single values of it (NaN and its like, which are not JSON but
    which some clients send). Raises MalformedRequest if it cannot be read at all."""
    try:
        return _decode(body), []
    except (msgspec.MsgspecError, RecursionError) as error:
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


def expect_object(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a text", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
        raise InvalidInput([Problem(path, f"found {kind}, expected an object")])
    return value


async def body_fields(request: Request) -> dict[str, Any]:
    """The body as a dict. Raises MalformedRequest, InvalidInput."""
    value, problems = parse_json(await request.body())
    if problems:
        raise InvalidInput(problems)
    return expect_object(value)


async def read(request: Request, model: type[M]) -> M:
    """The body as a model, strictly: a number is no text. Raises MalformedRequest, InvalidInput (all problems)."""
    body = await request.body()
    _, problems = parse_json(body)
    if problems:
        raise InvalidInput(problems)
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise InvalidInput(problems_of(error)) from None


# --- JSON out -------------------------------------------------------------------------------------------------


class Json(Response):
    """A JSON answer. Decimals are numbers in it, with all their digits."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encode(content)


def etag(version: int) -> str:
    return f'"{version}"'


# --- Headers --------------------------------------------------------------------------------------------------


def request_id_of(headers: Any) -> str:
    """The X-Request-Id of an ASGI scope's headers if it is sane, else a new id."""
    for name, value in headers:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return text
            break
    return new_id()


def caller_of(request: Request) -> Caller:
    caller: Caller = request.scope["strongroom.caller"]
    return caller


def context_of(request: Request, tenant: str | None = None) -> Context:
    """The caller's context for one tenant (None: for its own, or for the platform)."""
    caller = caller_of(request)
    return caller.context(tenant if tenant is not None else caller.tenant, request.scope["strongroom.request_id"])


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key header. Raises InvalidInput if it is none."""
    value = request.headers.get("idempotency-key")
    if value is not None and (problem := text_problem(value, MAX_IDEMPOTENCY_KEY_BYTES)):
        raise InvalidInput([Problem("Idempotency-Key", problem)])
    return value


def _etags(value: str, header: str) -> list[str]:
    parts = [part.strip() for part in value.split(",")]
    matches = [_ETAG.fullmatch(part) for part in parts]
    if len(parts) > MAX_ETAGS or not all(matches):
        raise InvalidInput([Problem(header, f'found {value[:64]!r}, expected * or a quoted version such as "17"')])
    return [match[2] for match in matches if match is not None and not match[1]]  # a weak one never matches


class Preconditions:
    """If-Match and If-None-Match of a request, as versions."""

    def __init__(self, request: Request) -> None:
        match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
        if match is not None and none_match is not None:
            raise InvalidInput([Problem("If-None-Match", "cannot stand beside If-Match")])
        self.any = match is not None and match.strip() == "*"
        self.none = none_match is not None and none_match.strip() == "*"
        self.versions: frozenset[int] | None = None
        if match is not None and not self.any:
            texts = _etags(match, "If-Match")
            # Versions are positive; "0" would mean "must not exist" to the store.
            self.versions = frozenset(int(t) for t in texts if re.fullmatch(r"[1-9][0-9]{0,18}", t))
            if not self.versions:
                raise PreconditionFailed
        if none_match is not None and not self.none and request.method not in ("GET", "HEAD"):
            raise InvalidInput([Problem("If-None-Match", "expected * (the document must not exist yet)")])

    @property
    def given(self) -> bool:
        return self.any or self.none or self.versions is not None

    @property
    def one(self) -> int | None:
        """The only version that If-Match names; None if it names none or several."""
        return next(iter(self.versions)) if self.versions is not None and len(self.versions) == 1 else None

    def failed(self, error: Conflict) -> bool:
        """Whether a conflict is the answer to the precondition (and not, say, to a reused idempotency key)."""
        return self.given and ("expected" in error.details or "operation" in error.details)


def not_modified(request: Request, version: int) -> bool:
    """Whether If-None-Match of a GET names this version."""
    value = request.headers.get("if-none-match")
    if value is None:
        return False
    if value.strip() == "*":
        return True
    return str(version) in [part.strip().removeprefix("W/").strip('"') for part in value.split(",")]


def unknown(fields: Mapping[str, Any], known: Any) -> list[Problem]:
    return [Problem(name[:128], "is not a known field") for name in fields if name not in known]
