"""HTTP parsing: where requests begin and end, and the order of answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from strongroom.server.arrival import MAX_HEAD_BYTES
from tests.helpers.server_app import ADMIN
from tests.helpers.waiting import wait_until
from tests.server.test_direct import Connection, connected, in_memory, request, warm

GET = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
ONE_CHUNK = b"2\r\n{}\r\n"


class App:
    """An application that remembers what it was asked, and answers when it is let."""

    def __init__(self, answer: bytes = b"ok", *, reads: bool = True) -> None:
        self.asked: list[Any] = []
        self.bodies: list[bytes] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.answer = answer
        self.reads = reads

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope)
        body, more = b"", self.reads
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        await self.may_answer.wait()
        size = b"%d" % len(self.answer)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", size)]})
        await send({"type": "http.response.body", "body": self.answer})


def refused(connection: Connection, status: int = 400, code: str = "malformed_request") -> None:
    """The last answer is this problem, with which the connection ends."""
    found, headers, body = connection.answers()[-1]
    assert (found, headers["content-type"]) == (status, "application/problem+json"), body
    assert (headers["connection"], json.loads(body)["code"]) == ("close", code)
    assert connection.wire.ended


def ended(connection: Connection) -> Callable[[], bool]:
    return lambda: connection.wire.ended


async def test_the_body_of_an_upgrade_is_not_parsed_as_a_request() -> None:
    app = App()
    for more in (b"Content-Length: %d\r\n\r\n" % len(GET % 9), b"Transfer-Encoding: chunked\r\n\r\n"):
        connection = Connection(app)
        head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: foo\r\n"
        connection.send(head + more)
        connection.send(GET % 9)
        await asyncio.sleep(0)
        refused(connection)
        assert len(connection.answers()) == 1
        connection.close()
    assert not app.asked


async def test_a_refused_upgrade_closes_the_connection() -> None:
    app = App()
    connection = Connection(app)
    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    connection.send(head + GET % 9)
    connection.send(GET % 9)
    await wait_until(lambda: connection.wire.ended)
    ((status, headers, _),) = connection.answers()
    assert (status, headers["connection"], len(app.asked)) == (200, "close", 1)
    connection.close()


async def test_no_request_is_read_after_connection_close() -> None:
    app = App()
    connection = Connection(app)
    connection.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + GET % 9)
    await wait_until(lambda: connection.wire.closed)
    assert len(app.asked) == len(connection.answers()) == 1
    connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x/..\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/0.9\r\nHost: x\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n",
        b"GET x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2, 2\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +2\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -2\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999999\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\rb: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
        CHUNKED + ONE_CHUNK + b"0\r\nAuthorization: Bearer x\r\n\r\n",
        CHUNKED + ONE_CHUNK + b"0\r\nX: y\r\nIdempotency-Key: x\r\n\r\n",
        CHUNKED + ONE_CHUNK + b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_a_malformed_request_is_refused_and_closes_the_connection(sent: bytes) -> None:
    app = App()
    connection = Connection(app)
    connection.send(sent + GET % 9)
    connection.send(GET % 9)
    await wait_until(lambda: connection.wire.ended)
    refused(connection)
    assert len(connection.answers()) == 1
    assert not app.bodies, "it was answered"
    connection.close()


async def test_an_http_1_0_request_needs_no_host_and_is_the_last() -> None:
    connection = Connection(App())
    connection.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    await wait_until(lambda: connection.wire.closed)
    ((status, headers, _),) = connection.answers()
    assert (status, headers["connection"]) == (200, "close")
    connection.close()


async def test_an_error_waits_until_the_requests_before_it_are_answered() -> None:
    app = App()
    app.may_answer.clear()
    broken = (b"nonsense\r\n\r\n", CHUNKED + b"no size\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 2 * MAX_HEAD_BYTES)
    connections = [Connection(app) for _ in broken]
    for connection, sent in zip(connections, broken, strict=True):
        connection.send(GET % 1 + GET % 2 + sent)
    await wait_until(lambda: len(app.asked) == 3)
    assert not any(connection.wire.sent for connection in connections)
    app.may_answer.set()
    for connection, status in zip(connections, (400, 400, 431), strict=True):
        await wait_until(ended(connection))
        assert [answer[0] for answer in connection.answers()] == [200, 200, status]
        connection.close()
    assert {scope["path"] for scope in app.asked} == {"/1", "/2"}


async def test_an_error_waits_for_the_answer_of_an_earlier_verification() -> None:
    async with connected() as (served, _):
        data = await warm(served)
        other = Connection(served.app)
        other.send(data + b"nonsense\r\n\r\n")
        assert other.wire.sent == b""
        await wait_until(lambda: other.wire.ended)
        assert [answer[0] for answer in other.answers()] == [200, 400]
        other.close()


async def test_a_body_after_a_refused_expect_continue_is_not_parsed_as_a_request() -> None:
    """Whether such a client sends its body after the refusal cannot be known: what follows might be anything."""
    app = App(reads=False)
    connection = Connection(app)
    connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    await wait_until(lambda: connection.wire.ended)
    ((status, headers, _),) = connection.answers()
    assert (status, headers["connection"]) == (200, "close")
    connection.send(GET % 9)
    assert len(app.asked) == 1
    connection.close()
    reading, other = App(), b"POST / HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}"
    old = Connection(reading)
    old.send(other)
    await wait_until(old.answers)
    assert not old.wire.sent.startswith(b"HTTP/1.1 100"), "HTTP/1.0 knows no such answer"
    old.close()


@pytest.mark.parametrize("name", ["Authorization", "Idempotency-Key"])
async def test_duplicate_critical_headers_are_refused(name: str) -> None:
    async with connected() as (served, connection):
        key = await served.make_key()
        await in_memory(served, key["key"])
        value = f"Bearer {ADMIN}" if name == "Authorization" else "same"
        for method, path, body in (
            ("POST", "/v1/keys/verify", {"key": key["key"]}), ("POST", "/v1/keys", {"name": "n"}),
            ("GET", "/v1/keys", b""), ("GET", "/stats", b""), ("GET", "/healthz", b""), ("GET", "/nothing", b""),
            ("POST", "/v1/keys/leaked", []),
        ):  # fmt: skip
            twice = (f"{name}: {value}",) if name == "Authorization" else (f"{name}: {value}",) * 2
            ((status, _, answer),) = await connection.ask(request(body, *twice, path=path, method=method))
            assert (status, json.loads(answer)["code"]) == (400, "malformed_request"), path
            headers = [("Authorization", f"Bearer {ADMIN}"), *((name, line.partition(": ")[2]) for line in twice)]
            content = None if method == "GET" else json.dumps(body)
            other = await served.client.request(method, path, headers=headers, content=content)
            assert (other.status_code, other.json()["code"]) == (400, "malformed_request"), path
        assert (await served.get("/v1/keys")).json["items"][0]["id"] == key["id"], "it was done all the same"
