"""The bounds of one connection, on a protocol without a socket."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from strongroom.server import arrival
from strongroom.server.arrival import MAX_DISCARDED_BYTES
from strongroom.server.protocol import Protocol
from tests.helpers.waiting import PATIENCE_S, wait_until

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"


class Wire(asyncio.Transport):
    """A transport that remembers what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.calls = 0
        self.closed = self.aborted = self.ended = self.paused = False
        self.unread = 0

    def write(self, data: Any) -> None:
        assert not self.ended, "something was written after the end"
        self.sent += data
        self.calls += 1

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def get_write_buffer_size(self) -> int:
        return self.unread

    def abort(self) -> None:
        self.closed = self.aborted = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


async def _refusing(scope: Any, receive: Any, send: Any) -> None:
    """Answers before it has read the body."""
    await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


async def _waiting(scope: Any, receive: Any, send: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def configured(app: Any) -> uvicorn.Config:
    return uvicorn.Config(app, interface="asgi3", lifespan="off", ws="none", log_config=None, proxy_headers=False)


def connected(app: Any) -> tuple[Protocol, Wire]:
    made, wire = Protocol(configured(app), ServerState(), {}, asyncio.get_running_loop()), Wire()
    made.connection_made(wire)
    return made, wire


@pytest.mark.parametrize("sent", [b"", b"POST / HT", HEAD, HEAD + b"\r\n", HEAD + b"\r\n12"])
async def test_a_slow_request_times_out_however_it_trickles(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "ARRIVAL_TIMEOUT_S", 0.1)
    began = time.monotonic()
    connection, wire = connected(_waiting)
    for number in range(len(sent)):
        connection.data_received(sent[number : number + 1])
    while not wire.closed and time.monotonic() < began + PATIENCE_S:
        await asyncio.sleep(0.03)
        if not wire.is_closing() and (sent == HEAD or b"\r\n\r\n" in sent):
            connection.data_received(b"X: y\r\n" if sent == HEAD else b"1")  # a little more, and never all
    assert wire.closed
    assert time.monotonic() - began >= 0.1
    connection.connection_lost(None)


async def test_a_running_request_does_not_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "ARRIVAL_TIMEOUT_S", 0.02)
    connection, wire = connected(_waiting)
    connection.data_received(HEAD + b"\r\n1234567890")
    await asyncio.sleep(0.06)
    assert not wire.closed
    connection.connection_lost(None)


async def test_a_head_without_end_is_refused_once_and_then_nothing_more_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrival, "LINGER_S", 0.02)
    connection, wire = connected(_waiting)
    connection.data_received(b"GET / HTTP/1.1\r\n")
    for number in range(200):
        connection.data_received(b"X-%d: " % number + b"x" * 1_000 + b"\r\n")
    await wait_until(lambda: wire.closed)
    assert wire.sent.startswith(b"HTTP/1.1 431")
    assert wire.sent.count(b"HTTP/1.1") == 1
    assert wire.closed
    connection.connection_lost(None)


async def test_a_refused_body_is_discarded_for_a_bounded_time() -> None:
    connection, wire = connected(_refusing)
    connection.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    await wait_until(lambda: wire.sent)
    assert wire.sent.startswith(b"HTTP/1.1 413")
    assert not wire.is_closing()
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    for _ in range(MAX_DISCARDED_BYTES // len(chunk) + 2):
        connection.data_received(chunk)
    assert wire.closed
    assert len(connection.cycle.body) == 0, "what nobody reads was kept"
    connection.connection_lost(None)


async def test_an_answer_is_one_write() -> None:
    connection, wire = connected(_refusing)
    connection.data_received(HEAD + b"\r\n1234567890")
    await wait_until(lambda: wire.sent)
    assert wire.sent.endswith(b"\r\n\r\nno")
    assert wire.calls == 1
    connection.connection_lost(None)
