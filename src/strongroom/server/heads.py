"""Checks a request's head beyond the parser's checks. RFC 9112, sections 2.3, 3.2 and 6.1; RFC 9110, sections 7.2 and
7.8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

NOTED = frozenset(
    {
        b"host",
        b"authorization",
        b"idempotency-key",
        b"transfer-encoding",
        b"content-length",
        b"expect",
        b"upgrade",
    }
)
"""Headers that change how a request is read."""
ALWAYS_ONCE = frozenset({b"host", b"transfer-encoding"})
"""With two of one of these, the request is ambiguous. The application refuses other repeated headers."""
NEVER_TRAILERS = frozenset({b"host", b"authorization", b"idempotency-key", b"transfer-encoding", b"content-length"})
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")


def is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


def problem_of(version: str, method: bytes, noted: Mapping[bytes, bytes], *, upgrades: bool) -> str | None:
    """Why this head is not valid; None if it is. `noted` has the headers of `NOTED`."""
    host, coding = noted.get(b"host"), noted.get(b"transfer-encoding")
    if version not in ("1.0", "1.1"):
        return f"found HTTP/{version}, expected HTTP/1.1"
    if method == b"CONNECT":
        return "CONNECT is not supported: this server is no proxy"
    if host is None and version == "1.1":
        return "the header host is missing"
    if host is not None and not is_host(host):
        return "the header host is not a valid host"
    if coding is not None and (coding.strip().lower() != b"chunked" or version == "1.0"):
        return "the header transfer-encoding may only be chunked, in HTTP/1.1"
    if coding is not None and b"content-length" in noted:
        return "found both content-length and transfer-encoding, expected one of them"
    if upgrades and (coding is not None or noted.get(b"content-length", b"0").strip(b"0 ")):
        # The parser does not read this body, and would take it for the next request.
        return "a request with an upgrade cannot have a body"
    return None


def asked_of(
    method: bytes, raw_path: bytes, query: bytes, headers: list[tuple[bytes, bytes]], version: str
) -> dict[str, Any]:
    """The method, the path and the headers as ASGI has them."""
    path = raw_path.decode("ascii")
    return {
        "type": "http",
        "http_version": version,
        "method": method.decode("ascii"),
        "path": unquote(path) if "%" in path else path,
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": headers,
    }
