"""Shared by every integration: the request's key, the caller's address, refusals, RateLimit headers.

It depends on no framework: headers come in as bytes, and an answer is a status, headers and a body.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from ipaddress import ip_network
from typing import Any, TypedDict
from urllib.parse import quote

import msgspec

from ..app import OpenOptions, Strongroom
from ..client_address import Network
from ..errors import InvalidInput, Problem, StrongroomError
from ..keys import Charged, Verification, cost_units
from ..limits import MONEY, Amount, LimitStatus

Cost = Mapping[str, Amount]

AUTHORIZATION = "authorization"
MEDIA_TYPE = "application/problem+json"
REALM = "api"
RETRY_AFTER_S = 1
"""Retry-After when the store cannot be reached and its error has no time of its own."""
QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
_log = logging.getLogger(__name__)
_HEADER_NAME = re.compile(r"^[a-z0-9!#$%&'*+.^_`|~-]{1,64}$")
_SECONDS = {"minute": 60, "hour": 3600}  # days, weeks and months have no fixed length
_QUOTED = str.maketrans({"\\": "\\\\", '"': '\\"'})
_encode = msgspec.json.Encoder(decimal_format="number").encode


def leased(options: OpenOptions) -> OpenOptions:
    """Options for a room that is opened by its URL: leased limits unless `options` say otherwise. Leased limits are
    exact and need no commit for each request (docs/limits.md)."""
    merged: OpenOptions = {"limits": "leased"}
    merged.update(options)
    return merged


class Asked(TypedDict, total=False):
    """The arguments of a verification beside the key's secret, as `keys.verify` takes them."""

    cost: Cost | None
    permission: str | None
    ip: str | None
    model: str | None
    route: str | None


class Presented:
    """A key as a request presented it, and the arguments of its verification."""

    __slots__ = ("asked", "header", "secret")

    def __init__(self, secret: str, header: str, asked: Asked) -> None:
        self.secret = secret
        self.header = header
        self.asked = asked

    @classmethod
    def of(cls, secret: str, header: str, **asked: Any) -> Presented:
        """The arguments without the values that are None."""
        said: Any = {name: value for name, value in asked.items() if value is not None}
        return cls(secret, header, said)

    def asking(self, **more: Any) -> Presented:
        """The same key with more arguments."""
        return Presented.of(self.secret, self.header, **{**self.asked, **more})


class Requirements:
    """The requirements for each request's key: `permission`, `cost`, `model` and others, each a value or a function of
    the request. Values are checked once, at the start. Raises InvalidInput for an invalid cost."""

    __slots__ = ("_functions", "_values")

    def __init__(self, **settings: Any) -> None:
        cost = settings.get("cost")
        if cost is not None and not callable(cost):
            cost_units(cost)  # an invalid cost fails at the start, not at each request
        self._values: dict[str, Any] = {
            name: value for name, value in settings.items() if value is not None and not callable(value)
        }
        self._functions = tuple((name, value) for name, value in settings.items() if callable(value))

    def of(self, request: Any) -> dict[str, Any]:
        """The arguments for this request, in a new dict."""
        asked = self._values.copy()
        for name, function in self._functions:
            value = function(request)
            if value is not None:
                asked[name] = value
        return asked


async def verified(room: Strongroom, presented: Presented) -> Charged:
    """Verify the key and return the answer; `returned` refunds it. Raises KeyRefused if the key may not be used."""
    try:
        charged = await room.keys.verify_charged(presented.secret, **presented.asked)
    except StrongroomError as error:
        raise KeyRefused(refusal_of_error(error)) from error
    if not charged.answer.valid:
        raise KeyRefused(refusal_of(charged.answer, presented.header))
    return charged


# --- Answers that refuse ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP answer that refuses a request: a problem document (RFC 9457). Header names are in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    detail: str
    verification: Verification | None = None

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers as ASGI takes them."""
        return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in self.headers]


class KeyRefused(Exception):
    """The key may not be used for this request. `refusal` is the HTTP answer."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.detail)

    @property
    def verification(self) -> Verification | None:
        """The verification that refused; None without a key, or if the store could not be reached."""
        return self.refusal.verification


STATUS: dict[str, int] = {
    "NOT_FOUND": 401,
    "DISABLED": 403,
    "EXPIRED": 403,
    "INSUFFICIENT_PERMISSIONS": 403,
    "FORBIDDEN": 403,
    "RATE_LIMITED": 429,
    "USAGE_EXCEEDED": 429,
}
_TITLES = {
    "NOT_FOUND": "The API key is not known",
    "DISABLED": "The API key is disabled",
    "EXPIRED": "The API key has expired",
    "INSUFFICIENT_PERMISSIONS": "The API key lacks a permission",
    "FORBIDDEN": "The API key may not be used for this",
    "RATE_LIMITED": "Too many requests for this API key",
    "USAGE_EXCEEDED": "A usage limit of this API key is exceeded",
}
_STORE_STATUS = {"unavailable": 503, "storage_full": 503, "too_many_requests": 429}


def refusal_of(answer: Verification, header: str = AUTHORIZATION) -> Refusal:
    """The HTTP answer to a verification that is not valid: 401 for an unknown key, 429 for a limit, else 403."""
    code: str = answer.code
    status = STATUS.get(code, 403)
    title = _TITLES.get(code, _TITLES["FORBIDDEN"])
    members: dict[str, Any] = {}
    headers: list[tuple[str, str]] = []
    if status == 401:
        headers.append(_challenge(header, 'error="invalid_token"'))
    elif status == 429:
        denying = [limit for limit in answer.limits if limit.exceeded]
        members["limits"] = answer.limits
        members["violated-policies"] = [_policy(limit)[0] for limit in denying]
        members["retry_after_s"] = answer.retry_after_s
        headers += rate_limit_headers(answer.limits)
        if answer.retry_after_s is not None:
            headers.append(("retry-after", str(max(1, math.ceil(answer.retry_after_s)))))
    kind = QUOTA_EXCEEDED if status == 429 else "about:blank"
    refusal = _problem(status, kind, title, answer.message or title, code.lower(), members, headers)
    return replace(refusal, verification=answer)


def missing(header: str, detail: str) -> Refusal:
    """The HTTP answer to a request without a key, or with a malformed one."""
    return _problem(
        401, "about:blank", "An API key is needed", detail, "unauthenticated", {}, [_challenge(header, None)]
    )


def refusal_of_error(error: StrongroomError) -> Refusal:
    """The HTTP answer when the store cannot be reached: no request passes unverified. Other errors (an invalid cost, a
    damaged store) are raised."""
    status = _STORE_STATUS.get(error.code)
    if status is None:
        raise error
    _log.warning("a key could not be verified: %s", error)  # the reason may name the store: it stays out of the answer
    title = "API keys cannot be verified at the moment"
    wait_s = error.details.get("retry_after_s", RETRY_AFTER_S)
    retry = ("retry-after", str(max(1, math.ceil(wait_s))))
    return _problem(status, "about:blank", title, "try again in a moment", error.code, {}, [retry])


def _problem(
    status: int,
    kind: str,
    title: str,
    detail: str,
    code: str,
    members: Mapping[str, Any],
    headers: Sequence[tuple[str, str]],
) -> Refusal:
    if kind == "about:blank":  # the title must be the status's phrase (RFC 9457, section 4.2.1)
        detail = f"{title}: {detail}" if detail != title else title
        title = HTTPStatus(status).phrase
    body = _encode({"type": kind, "title": title, "status": status, "detail": detail, "code": code, **members})
    own = (("content-type", MEDIA_TYPE), ("content-length", str(len(body))), ("cache-control", "no-store"))
    return Refusal(status, (*own, *headers), body, detail)


def _challenge(header: str, error: str | None) -> tuple[str, str]:
    """The WWW-Authenticate header, which a 401 must have. No scheme is registered for custom headers."""
    if header == AUTHORIZATION:
        return "www-authenticate", f'Bearer realm="{REALM}"' + (f", {error}" if error else "")
    return "www-authenticate", f'ApiKey realm="{REALM}", header="{header}"'


# --- RateLimit headers (draft-ietf-httpapi-ratelimit-headers) ---------------------------------------------------


def rate_limit_headers(limits: Sequence[LimitStatus]) -> list[tuple[str, str]]:
    """`RateLimit-Policy` and `RateLimit`, one item a limit. Money is left out: these headers have no unit for it."""
    policies: list[str] = []
    states: list[str] = []
    now_s = time.time()
    for limit in limits:
        if limit.resource != MONEY:
            name, policy = _policy(limit)
            policies.append(policy)
            if limit.resets_at is None:
                states.append(f'"{name}";r={limit.remaining}')
            else:
                left_s = limit.resets_at.timestamp() - now_s
                states.append(f'"{name}";r={limit.remaining};t={math.ceil(left_s) if left_s > 0 else 0}')
    if not policies:
        return []
    return [("ratelimit-policy", ", ".join(policies)), ("ratelimit", ", ".join(states))]


def _policy(limit: LimitStatus) -> tuple[str, str]:
    """The name of a limit's policy, and the policy."""
    window = limit.window.get
    return _policy_of(
        limit.subject,
        limit.resource,
        int(limit.limit),
        (window("kind"), window("seconds"), window("unit"), window("timezone")),
        limit.models,
        limit.routes,
    )


@functools.lru_cache(maxsize=4_096)
def _policy_of(
    subject: str, resource: str, most: int, window: tuple[Any, ...], models: tuple[str, ...], routes: tuple[str, ...]
) -> tuple[str, str]:
    """A name that is unique among the limits of a key: subject (unless it is the key), resource, window, models,
    routes."""
    parts = [resource, *(str(part) for part in window if part is not None), *models, *routes]
    name = "-".join(parts if subject == "key" else [subject, *parts])
    # A String holds printable ASCII only (RFC 9651, section 3.3.3); names of users and models may have more.
    name = "".join(c if " " <= c <= "~" else quote(c) for c in name).translate(_QUOTED)
    unit = "concurrent-requests" if resource == "concurrency" else resource
    policy = f'"{name}";q={most}'
    if unit != "requests":
        policy += f';qu="{unit}"'
    _, seconds, calendar, _ = window
    seconds = seconds or _SECONDS.get(calendar)
    return name, f"{policy};w={seconds}" if seconds else policy


# --- The key in a request ---------------------------------------------------------------------------------------


def checked_header(name: str) -> str:
    """The name of the header that carries keys, in lower case. Raises InvalidInput."""
    lowered = name.lower()
    if not _HEADER_NAME.fullmatch(lowered):
        raise InvalidInput([Problem("header", f"found {name[:64]!r}, expected the name of a header such as x-api-key")])
    return lowered


def credential(header: str, values: Sequence[bytes]) -> str:
    """The key's secret in the values of the header that carries it. Raises KeyRefused (401)."""
    if len(values) != 1:
        found = "is missing" if not values else f"was sent {len(values)} times, expected once"
        raise KeyRefused(missing(header, f"the header {header} {found}"))
    value = values[0]
    if header == AUTHORIZATION:
        if value[:7].lower() != b"bearer ":
            raise KeyRefused(missing(header, "the header authorization must have the form `Bearer <key>`"))
        value = value[7:]
    try:
        text = value.strip().decode()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise KeyRefused(missing(header, f"the header {header} holds no key"))
    return text


# --- The caller's address ---------------------------------------------------------------------------------------


def networks(field: str, items: Iterable[str]) -> tuple[Network, ...]:
    """Parsed networks. Raises InvalidInput."""
    found: list[Network] = []
    for item in items:
        try:
            found.append(ip_network(item, strict=False))
        except ValueError:
            message = f"found {item[:64]!r}, expected an address or a range such as 10.0.0.0/8"
            raise InvalidInput([Problem(field, message)]) from None
    return tuple(found)


# --- Common settings --------------------------------------------------------------------------------------------


class Paths:
    """Paths that need no key: exact paths, and prefixes written with a `*` at the end."""

    __slots__ = ("_beginnings", "_exact")

    def __init__(self, items: Iterable[str]) -> None:
        items = tuple(items)
        for item in items:
            if not item.startswith("/") or "*" in item[:-1]:
                message = f"found {item[:64]!r}, expected a path such as /healthz, or a prefix such as /docs/*"
                raise InvalidInput([Problem("exempt", message)])
        self._exact = frozenset(item for item in items if not item.endswith("*"))
        self._beginnings = tuple(item[:-1] for item in items if item.endswith("*"))

    def __contains__(self, path: str) -> bool:
        return path in self._exact or (bool(self._beginnings) and path.startswith(self._beginnings))
