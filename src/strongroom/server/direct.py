"""The direct path of verifications: from the bytes of a request to the bytes of its answer, without ASGI.

ASGI's task, events and messages took twice the time of the verification itself. A client repeats the head of its
requests, so a parsed head is recognised by its bytes. This is faster than parsing it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from .heads import is_host
from .verify import PATH, Asgi

VERIFY = PATH.encode()
MAX_KNOWN_HEADS = 1_000
MAX_KNOWN_HEAD_BYTES = 1_024
MAX_KNOWN_HEADERS = 32
"""A head of many small headers would take far more memory than its bytes."""
END_OF_HEAD = b"\r\n\r\n"

Headers = list[tuple[bytes, bytes]]
_NONE: Headers = []


class Head(NamedTuple):
    """The parsed head of a verification."""

    authorization: bytes
    headers: Headers
    content_length: int


def is_plain_verification(url: bytes, noted: Mapping[bytes, bytes], parser: Any) -> bool:
    """Whether the parser has read the head of a verification for the direct path. It has Host, Authorization and
    Content-Length, and no other header that changes how a request is read (`heads.NOTED`)."""
    return (
        url == VERIFY
        and len(noted) == 3
        and b"host" in noted
        and b"authorization" in noted
        and b"content-length" in noted
        and parser.get_method() == b"POST"
        and parser.get_http_version() == "1.1"
        and parser.should_keep_alive()
        and is_host(noted[b"host"])
    )


class KnownHeads:
    """Heads of verifications that took the direct path, by their bytes.

    Equal bytes at the beginning of a request have equal meaning, because only the head decides about the direct path.
    Whether the caller is known is checked at each request.
    """

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}

    def __len__(self) -> int:
        return len(self._heads)

    def learn(self, data: bytes, headers: Headers, noted: Mapping[bytes, bytes], body: bytes) -> None:
        """Remember the head in `data`, which was parsed as one verification with these headers and this body."""
        head, _, rest = data.partition(END_OF_HEAD)
        # Else the parser found the end of the head elsewhere, and the split would give another body.
        if rest != body or len(body) != int(noted[b"content-length"]):
            return
        if len(head) > MAX_KNOWN_HEAD_BYTES or len(headers) > MAX_KNOWN_HEADERS:
            return
        if len(self._heads) >= MAX_KNOWN_HEADS:
            self._heads.clear()
        self._heads[head] = Head(noted[b"authorization"], headers, len(body))

    def find(self, data: bytes) -> tuple[Head, bytes] | None:
        """The head and the body, if `data` is exactly one verification with a known head."""
        head, _, body = data.partition(END_OF_HEAD)
        known = self._heads.get(head)
        return (known, body) if known is not None and known.content_length == len(body) else None


class Connection(Protocol):
    """The part of a connection that the direct path needs."""

    transport: Any
    server_state: ServerState

    def on_response_complete(self) -> None:
        """Called once the answer is written."""
        ...

    def start_whole(self, request: Direct, app: Asgi) -> None:
        """Let an ASGI application answer the whole request."""
        ...


class Direct:
    """The request of a connection on the direct path. For uvicorn it is a cycle, for the route it is the reply. Each
    connection has one and reuses it."""

    more_body = False
    response_started = False

    def __init__(self, protocol: Connection) -> None:
        self._protocol = protocol
        self._defaults: Headers | None = None
        self._head = b""
        self.message_event = asyncio.Event()
        self.headers = _NONE
        self.body = b""
        self.response_complete = True
        self.disconnected = False
        self.keep_alive = True

    def receive(self, headers: Headers, body: bytes) -> None:
        """Start with a new request."""
        self.headers = headers
        self.body = body
        self.response_complete = self.disconnected = False
        self.keep_alive = True  # until the server stops

    def answer(self, payload: bytes) -> None:
        self.response_complete = True
        self.headers, self.body = _NONE, b""
        protocol = self._protocol
        transport: Any = protocol.transport
        if self.disconnected or transport.is_closing():
            return
        defaults = protocol.server_state.default_headers  # uvicorn makes a new list each second, for the date
        if defaults is not self._defaults:
            self._defaults = defaults
            lines = b"".join(b"%s: %s\r\n" % header for header in defaults)
            self._head = b"%s%scontent-type: application/json\r\n" % (STATUS_LINE[200], lines)
        end = b"" if self.keep_alive else b"connection: close\r\n"
        transport.write_all(b"%scontent-length: %d\r\n%s\r\n%s" % (self._head, len(payload), end, payload))
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()

    def take(self) -> tuple[Headers, bytes]:
        """The headers and the body; the caller keeps them."""
        found = list(self.headers), self.body  # a copy, because the list may belong to a known head
        self.headers, self.body = _NONE, b""
        return found

    def hand_on(self, app: Asgi) -> None:
        self.response_complete = True
        self._protocol.start_whole(self, app)


__all__ = ["VERIFY", "Direct", "KnownHeads", "is_plain_verification"]
