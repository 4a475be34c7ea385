"""Shared by both clients: paths, query strings, bodies, and the decision to retry. Pure."""

from __future__ import annotations

import base64
import dataclasses
import random
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from ..errors import InvalidInput, Problem, StrongroomError
from .errors import NoAnswer, UnexpectedAnswer
from .models import ApiKey, IssuedKey, IssuedWebhook, Page, Webhook

T = TypeVar("T")
MAX_RETRIES = 20
READ_ONLY = ("version", "created_at", "updated_at")
"""Fields that the store sets: a write leaves them out."""
RESERVED = frozenset({"order_by", "limit", "cursor", "where"})
_PARAMETER = re.compile(r"\{([a-z_]+)\}")
_KEY = re.compile(r"[\x21-\x7e]+")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
_REPEATABLE_STATUS = frozenset({429, 502, 503, 504})
_encode = msgspec.json.Encoder(decimal_format="number").encode
_encode_document = msgspec.json.Encoder().encode
Query = list[tuple[str, str]]


class Unset:
    """Marks a missing parameter where None has a meaning."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET = Unset()


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values without missing parameters."""
    return {name: value for name, value in fields.items() if not isinstance(value, Unset)}


def listed(items: Iterable[Any] | Unset) -> Any:
    """Items as a list. Raises InvalidInput for a str, whose letters are not items."""
    if isinstance(items, (str, bytes)):
        raise InvalidInput(f"found the text {items[:64]!r}, expected a list")
    return items if isinstance(items, Unset) else list(items)


def without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


# --- Addresses ------------------------------------------------------------------------------------------------


def base_url(url: str) -> str:
    """The server's address without a slash at its end. Raises InvalidInput; the message never shows a password in
    it."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InvalidInput([Problem("url", "cannot be parsed, expected such as https://keys.example.com")]) from None
    if parts.username is not None or parts.password is not None:
        raise InvalidInput([Problem("url", "has a user or a password in it: give the management key as `key`")])
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidInput([Problem("url", f"found {url[:64]!r}, expected such as https://keys.example.com")])
    return url.rstrip("/")


def checked_timeout_s(timeout_s: float) -> float:
    """A finite time-out. Raises InvalidInput."""
    if not 0 < timeout_s < float("inf"):
        raise InvalidInput([Problem("timeout_s", f"found {timeout_s!r}, expected a number of seconds above 0")])
    return timeout_s


def bearer(key: str | None) -> dict[str, str]:
    """The Authorization header of a key, none without one. Raises InvalidInput, which does not show the key."""
    if key is None:
        return {}
    if not _KEY.fullmatch(key):
        raise InvalidInput([Problem("key", "expected printable ASCII characters without spaces")])
    return {"Authorization": f"Bearer {key}"}


def path(template: str, segments: Mapping[str, Any]) -> str:
    """A path with its segments encoded: a tenant or an id may have slashes. Raises InvalidInput for an empty one."""

    def segment(match: re.Match[str]) -> str:
        value = segments[match[1]]
        if not isinstance(value, str) or not value:
            raise InvalidInput([Problem(match[1], f"found {value!r}, expected text that is not empty")])
        # Proxies and HTTP libraries resolve "." and ".." as folders: the request would get another path.
        return quote(value, safe="") if value.strip(".") else "%2E" * len(value)

    return _PARAMETER.sub(segment, template)


# --- JSON -----------------------------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """JSON with every digit of Decimals. Raises InvalidInput for other values than JSON's."""
    return _encoded(_encode, value)


def _encoded(encoder: Any, value: Any) -> bytes:
    try:
        body: bytes = encoder(value)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidInput(f"cannot be written as JSON: {error}") from None
    return body


@lru_cache(256)
def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


def decode(type_: type[T], body: bytes | msgspec.Raw) -> T:
    """An answer as a value. Raises UnexpectedAnswer."""
    wanted: Any = type_
    try:
        value: T = _decoder(wanted).decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UnexpectedAnswer(f"the answer has an unexpected form: {error}") from None
    return value


class _Text(msgspec.Struct):
    """The secret in the answer to a creation or rotation of a key."""

    key: str | None = None


class _Secret(msgspec.Struct):
    """The secret in the answer to a creation of a webhook or a rotation of its secret."""

    secret: str


def issued(body: bytes) -> IssuedKey:
    """A key and its secret, from one answer. Raises UnexpectedAnswer."""
    return IssuedKey(key=decode(ApiKey, body), text=decode(_Text, body).key or "")


def issued_webhook(body: bytes) -> IssuedWebhook:
    """A webhook and its secret, from one answer. Raises UnexpectedAnswer."""
    return IssuedWebhook(webhook=decode(Webhook, body), secret=decode(_Secret, body).secret)


def decode_page(type_: type[T], body: bytes) -> Page[T]:
    """A page of items of this type. Raises UnexpectedAnswer."""
    page: Page[T] = decode(Page[type_], body)  # type: ignore[valid-type]
    return page


def decode_document(type_: type[T], body: bytes | msgspec.Raw) -> T:
    """A document as a value of a type that msgspec reads, or of a pydantic model. Raises UnexpectedAnswer."""
    read: Any = getattr(type_, "model_validate_json", None)
    if read is None:
        return decode(type_, body)
    try:
        document: T = read(bytes(body))
    except ValueError as error:
        raise UnexpectedAnswer(f"the document is not a valid {type_.__name__}: {error}") from None
    return document


def fields_of(document: object) -> dict[str, Any]:
    """The fields of a document (a mapping, a dataclass, a msgspec Struct, a pydantic model), without the fields that
    the store sets. Raises InvalidInput."""
    if isinstance(document, Mapping):
        fields = dict(document)
    elif hasattr(document, "model_dump"):
        fields = document.model_dump(mode="json")
    elif isinstance(document, msgspec.Struct) or (
        dataclasses.is_dataclass(document) and not isinstance(document, type)
    ):
        fields = msgspec.to_builtins(document, builtin_types=(bytes, Decimal, datetime))
    else:
        raise InvalidInput([Problem("document", f"found {type(document).__name__}, expected fields")])
    # An empty id means that the store makes one.
    return {name: value for name, value in fields.items() if name not in READ_ONLY and (value or name != "id")}


def encode_document(fields: Mapping[str, Any]) -> bytes:
    """A document's fields as JSON: Decimals as text, bytes as base64."""
    return _encoded(_encode_document, fields)


# --- Query strings --------------------------------------------------------------------------------------------


def text_of(value: object) -> str:
    """A value in the form of a query string."""
    match value:
        case bool():
            return "true" if value else "false"
        case bytes():
            return base64.b64encode(value).decode()
        case datetime():
            return value.isoformat()
        case _:
            return str(value)


def query(parameters: Mapping[str, object]) -> Query:
    """The given parameters; a list becomes one parameter for each item."""
    found: Query = []
    for name, value in parameters.items():
        if isinstance(value, (list, tuple, set, frozenset)):
            found += [(name, text_of(item)) for item in value]
        elif value is not None:
            found.append((name, text_of(value)))
    return found


def filters(
    fields: Mapping[str, object], where: Mapping[str, Any] | None, order_by: str | Iterable[str] | None
) -> Query:
    """A list's filters: `field=value`, `field__op=value`, None for "is null"; `where` is sent as JSON."""
    found: Query = []
    for name, value in fields.items():
        if value is None:
            field, negated = (name[:-4], True) if name.endswith("__ne") else (name.removesuffix("__eq"), False)
            found.append((f"{field}__null", "false" if negated else "true"))
        else:
            found += query({f"{name}__eq" if name in RESERVED else name: value})
    if where is not None:
        found.append(("where", encode_document(where).decode()))
    if order_by:
        found.append(("order_by", order_by if isinstance(order_by, str) else ",".join(order_by)))
    return found


# --- Headers --------------------------------------------------------------------------------------------------


def new_idempotency_key() -> str:
    """An Idempotency-Key: the server executes one of the calls with this key."""
    return secrets.token_hex(16)


def once_of(idempotency_key: str | None) -> str:
    """The Idempotency-Key of a write: the caller's, or a new one. Raises InvalidInput for a value that no header can
    have."""
    if idempotency_key is None:
        return new_idempotency_key()
    if not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise InvalidInput(
            [
                Problem(
                    "idempotency_key", f"found {idempotency_key[:64]!r}, expected 1 to 255 printable ASCII characters"
                )
            ]
        )
    return idempotency_key


def if_match(expected: int | None) -> dict[str, str]:
    """The header that requires a version; 0: the document must not exist."""
    if expected is None:
        return {}
    return {"If-None-Match": "*"} if expected == 0 else {"If-Match": f'"{expected}"'}


# --- Retries --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Retries:
    """Retries of a failed call: at most `times`, within `budget_s` seconds.

    Before each, the client waits for the answer's Retry-After, or a random time of up to `base_s`, doubled each time,
    up to `most_s`. If Retry-After exceeds the budget, the error is raised at once, with `retry_after_s` in its details.
    """

    times: int = 3
    base_s: float = 0.1
    most_s: float = 5.0
    budget_s: float = 30.0

    def __post_init__(self) -> None:
        problems = [
            Problem(name, f"found {getattr(self, name)!r}, expected a number of at least 0")
            for name in ("base_s", "most_s", "budget_s")
            if not getattr(self, name) >= 0
        ]
        if not 0 <= self.times <= MAX_RETRIES:
            problems.append(Problem("times", f"found {self.times!r}, expected 0 to {MAX_RETRIES}"))
        if problems:
            raise InvalidInput(problems)

    def wait_s(self, error: StrongroomError, *, repeatable: bool, tried: int, elapsed_s: float) -> float | None:
        """Seconds to wait before the next try; None: no more tries.

        `repeatable`: repeating the call has no further effect. `tried`: the number of retries so far.
        """
        if tried >= self.times or not _may_repeat(error, repeatable):
            return None
        wait_s = self.backoff_s(tried)
        told_s = error.details.get("retry_after_s")
        if told_s is not None:
            wait_s += told_s  # with the jitter, so that clients that were refused together do not retry together
        return wait_s if elapsed_s + wait_s <= self.budget_s else None

    def backoff_s(self, tried: int) -> float:
        """A random time, longer with each try."""
        return random.uniform(0, min(self.most_s, self.base_s * 2 ** min(tried, 30)))  # noqa: S311


def _may_repeat(error: StrongroomError, repeatable: bool) -> bool:
    """Whether the call may be retried after this error."""
    if isinstance(error, NoAnswer):
        return repeatable or error.details.get("outcome") == "not_done"
    status = error.details.get("status")
    return status == 429 or (repeatable and status in _REPEATABLE_STATUS)


def no_answer(error: httpx.RequestError, method: str, template: str, timeout_s: float) -> StrongroomError:
    """The error of a call without an answer. Its cause is the HTTP library's error."""
    what = f"{method} {template}"
    match error:
        case httpx.ConnectError() | httpx.ProxyError():
            return NoAnswer(f"{what}: the server cannot be reached: {error}", outcome="not_done")
        case httpx.ConnectTimeout():
            return NoAnswer(f"{what}: the server did not accept the connection in time", outcome="not_done")
        case httpx.PoolTimeout():
            return NoAnswer(f"{what}: every connection of this client was in use for too long", outcome="not_done")
        case httpx.TimeoutException():
            return NoAnswer(f"{what}: no answer within {timeout_s:g} s", outcome="unknown")
        case httpx.UnsupportedProtocol() | httpx.LocalProtocolError():
            return InvalidInput(f"{what}: the request cannot be sent: {error}")
        case httpx.DecodingError():
            return UnexpectedAnswer(f"{what}: the answer cannot be decoded: {error}")
        case _:
            return NoAnswer(f"{what}: the connection broke before the answer: {error}", outcome="unknown")


def may_resume(error: StrongroomError) -> bool:
    """Whether a stream that ended with this error may be reopened: not after a refusal of the server."""
    status = error.details.get("status", 0)
    return isinstance(error, NoAnswer) or status == 429 or status >= 500
