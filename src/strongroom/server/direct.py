"""The direct path of verifications: from the bytes of a request to the bytes of its answer, without ASGI.

ASGI's task, events and messages took twice the time of the verification itself. And a client repeats the head of its
requests, so a head that the parser has read once is recognised by its bytes, which takes less than reading it again.
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
    """The head of a verification, as the parser has read it."""

    authorization: bytes
    headers: Headers
    content_length: int


def is_plain_verification(url: bytes, noted: Mapping[bytes, bytes], parser: Any) -> bool:
    """Whether the parser has just read the head of a verification that may take the direct path: one with Host,
    Authorization and Content-Length, and nothing else that decides how a request is read (`heads.NOTED`)."""
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

    The same bytes at the beginning of a request mean the same again: whether a request may take the direct path
    depends on nothing of it but its head. Only whether a caller is known is asked at each request.
    """

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}

    def __len__(self) -> int:
        return len(self._heads)

    def learn(self, data: bytes, headers: Headers, noted: Mapping[bytes, bytes], body: bytes) -> None:
        """`data` was parsed, and is one verification with these headers and this body."""
        head, _, rest = data.partition(END_OF_HEAD)
        # Where the parser has seen the end of the head elsewhere, its body is another one.
        if rest != body or len(body) != int(noted[b"content-length"]):
            return
        if len(head) > MAX_KNOWN_HEAD_BYTES or len(headers) > MAX_KNOWN_HEADERS:
            return
        if len(self._heads) >= MAX_KNOWN_HEADS:
            self._heads.clear()
        self._heads[head] = Head(noted[b"authorization"], headers, len(body))

    def find(self, data: bytes) -> tuple[Head, bytes] | None:
        """The head and the body of a verification, if `data` is exactly one whose head is known."""
        head, _, body = data.partition(END_OF_HEAD)
        known = self._heads.get(head)
        return (known, body) if known is not None and known.content_length == len(body) else None


class Connection(Protocol):
    """As much of a connection as a request that is answered directly needs."""

    transport: Any
    server_state: ServerState

    def on_response_complete(self) -> None:
        """The answer was given."""
        ...

    def start_whole(self, request: Direct, app: Asgi) -> None:
        """Let an ASGI application answer."""
        ...


class Direct:
    """The request of a connection that is being answered without ASGI, or was: to uvicorn it is a cycle like others,
    to the route it is where the answer goes. A connection has one, used again for each of them."""

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
        """A request has arrived."""
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
        defaults = protocol.server_state.default_headers  # a new list each second, for its date
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
        """The headers and the body, which are then kept elsewhere."""
        found = list(self.headers), self.body  # the list may be that of a known head
        self.headers, self.body = _NONE, b""
        return found

    def hand_on(self, app: Asgi) -> None:
        self.response_complete = True
        self._protocol.start_whole(self, app)


__all__ = ["VERIFY", "Direct", "KnownHeads", "is_plain_verification"]
