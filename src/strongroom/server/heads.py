"""What a request's head must be, beyond what the parser sees to. RFC 9112, sections 2.3, 3.2 and 6.1; RFC 9110,
sections 7.2 and 7.8."""

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
"""Headers that decide how a request is read."""
ALWAYS_ONCE = frozenset({b"host", b"transfer-encoding"})
"""Of these two, nothing can be told of the request. Others that are there twice are refused by the application."""
NEVER_TRAILERS = frozenset({b"host", b"authorization", b"idempotency-key", b"transfer-encoding", b"content-length"})
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")


def is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


def problem_of(version: str, method: bytes, noted: Mapping[bytes, bytes], *, upgrades: bool) -> str | None:
    """Why a request with this head is none; `noted` are its headers of `NOTED`."""
    host, coding = noted.get(b"host"), noted.get(b"transfer-encoding")
    if version not in ("1.0", "1.1"):
        return f"found HTTP/{version}, expected HTTP/1.1"
    if method == b"CONNECT":
        return "this server is no proxy: CONNECT is not for it"
    if host is None and version == "1.1":
        return "the header host is missing"
    if host is not None and not is_host(host):
        return "the header host names no host"
    if coding is not None and (coding.strip().lower() != b"chunked" or version == "1.0"):
        return "the header transfer-encoding may only be chunked, in HTTP/1.1"
    if coding is not None and b"content-length" in noted:
        return "found both content-length and transfer-encoding, expected one of them"
    if upgrades and (coding is not None or noted.get(b"content-length", b"0").strip(b"0 ")):
        # Its body would be taken for the next request: the parser does not read it.
        return "a request with an upgrade cannot have a body"
    return None


def asked_of(
    method: bytes, raw_path: bytes, query: bytes, headers: list[tuple[bytes, bytes]], version: str
) -> dict[str, Any]:
    """What a request asks for, as ASGI has it."""
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
