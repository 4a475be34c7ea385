"""Verifications on the server's direct path: the same answers as on the ASGI path, and in order."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from strongroom.errors import Unavailable
from strongroom.limits.ledger import KeyChanged, Ledger
from strongroom.server.app import Application, Bounds
from strongroom.server.direct import KnownHeads
from strongroom.server.protocol import Protocol
from strongroom.server.verify import VerifyRoute
from tests.helpers.openapi_contract import contract_of
from tests.helpers.server_app import ADMIN, TOKENS, Served, serving
from tests.helpers.waiting import wait_until
from tests.server.test_protocol import Wire

JSON = dict[str, Any]
LIMIT = {**TOKENS, "limit": 1_000_000}


class Connection:
    """One connection to the application by way of the protocol, without a socket."""

    def __init__(self, app: Any, state: ServerState | None = None) -> None:
        options: Any = {
            "interface": "asgi3",
            "lifespan": "off",
            "ws": "none",
            "proxy_headers": False,
            "timeout_keep_alive": 600,
        }
        config = uvicorn.Config(app, log_config=None, **options)
        self.protocol = Protocol(config, state or ServerState(), {}, asyncio.get_running_loop())
        self.wire = Wire()
        self._app = app
        self.protocol.connection_made(self.wire)

    def send(self, data: bytes) -> None:
        self.protocol.data_received(data)

    def answers(self) -> list[tuple[int, JSON, bytes]]:
        """Status, headers and body of what has been answered in full."""
        found = []
        rest = self.wire.sent
        while b"\r\n\r\n" in rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            first, *lines = head.split(b"\r\n")
            headers = dict(line.decode().split(": ", 1) for line in lines)
            size = int(headers["content-length"])
            if len(rest) < size:
                break
            found.append((int(first.split()[1]), headers, rest[:size]))
            rest = rest[size:]
        return found

    async def ask(self, data: bytes, count: int = 1) -> list[tuple[int, JSON, bytes]]:
        before = len(self.answers())
        self.send(data)
        await wait_until(lambda: len(self.answers()) >= before + count)
        found = self.answers()[before:]
        if isinstance(self._app, Application):
            contract = contract_of(self._app.api, self._app.services.room.database.registry.entities)
            for status, headers, body in found:
                contract.check_direct(status, headers, body)
        return found

    def close(self) -> None:
        self.protocol.connection_lost(None)


def request(body: Any, *headers: str, path: str = "/v1/keys/verify", method: str = "POST", key: str = ADMIN) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


@asynccontextmanager
async def connected(**options: Any) -> AsyncIterator[tuple[Served, Connection]]:
    async with serving(**options) as served:
        connection = Connection(served.app)
        yield served, connection
        connection.close()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers and keys are looked up again, by way of ASGI, after a moment that a busy machine may exceed."""
    monkeypatch.setattr("strongroom.server.auth.TRUSTED_FOR_S", 3_600)
    monkeypatch.setattr("strongroom.keys.cache.TRUSTED_FOR_S", 3_600)


@pytest.fixture
def by_asgi(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was answered by way of ASGI."""
    calls: list[str] = []
    call = VerifyRoute.__call__

    async def spied(self: VerifyRoute, scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope["path"])
        await call(self, scope, receive, send)

    monkeypatch.setattr(VerifyRoute, "__call__", spied)
    return calls


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_the_direct_path_answers_a_cached_keys_verification_exactly_like_asgi(
    limits: str, by_asgi: list[str]
) -> None:
    async with connected(limits=limits) as (served, connection):
        key = await served.make_key(limits=[LIMIT], metadata={"plan": "pro"})
        free = await served.make_key()
        for text in (key["key"], free["key"]):
            await in_memory(served, text)
        by_asgi.clear()
        for text in (key["key"], free["key"]):
            ((status, headers, body),) = await connection.ask(request({"key": text, "cost": {"tokens": 5}}))
            direct = json.loads(body, parse_float=Decimal)
            assert (status, headers["content-type"], direct["code"]) == (200, "application/json", "VALID")
            assert not by_asgi, "it went the long way"
            other = (await served.verify(text, cost={"tokens": 5})).json
            by_asgi.clear()
            for one, before in zip(other["limits"], direct["limits"], strict=True):
                assert (before["used"], one["used"]) == (5, 10)
                for name in ("used", "remaining", "recorded", "leased", "resets_at"):
                    before.pop(name), one.pop(name)
            assert direct == other
        assert await used(served, key) == 10


async def test_unusual_requests_take_the_asgi_path(by_asgi: list[str]) -> None:
    async with connected() as (served, connection):
        key = await served.make_key(limits=[LIMIT])
        ask = {"key": key["key"]}
        reader, stranger = await served.manager("read"), await served.manager("write", tenant="other")
        await in_memory(served, key["key"])
        for manager in (reader, stranger):
            await served.verify(key["key"], key=manager)
        unusual = [
            (request(ask, "Idempotency-Key: once"), 200),
            (request(ask, key="sr_nobody"), 401),
            (request(ask, key=reader), 403),
            (request(b"{"), 400),
            (request({"key": 1, "cost": {"tokens": -1}, "more": 2}), 422),
            (request({**ask, "ip": "no address"}), 422),
            (request({"key": "never heard of"}), 200),
            (request({"key": key["key"], "cost": {"tokens": 1}}, "Connection: close"), 200),
        ]
        for data, expected in unusual:
            by_asgi.clear()
            other = Connection(served.app)
            ((status, _, body),) = await other.ask(data)
            assert status == expected, body
            assert len(by_asgi) == 1
            other.close()
        old = request({**ask, "cost": {"tokens": 1}}, "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
        other = Connection(served.app)
        ((status, headers, _),) = await other.ask(old)
        assert (status, headers["connection"]) == (200, "close")
        by_asgi.clear()
        ((status, _, body),) = await connection.ask(request(ask, key=stranger))
        assert json.loads(body)["code"] == "NOT_FOUND"
        assert not by_asgi
        ((status, _, body),) = await connection.ask(request({"key": 1, "more": 2}))
        assert [error["path"] for error in json.loads(body)["errors"]] == ["more", "key"]


async def test_head_and_body_may_arrive_in_any_chunks() -> None:
    async with connected() as (served, connection):
        key = await served.make_key(limits=[LIMIT])
        data = request({"key": key["key"], "cost": {"tokens": 1}})
        for number in range(len(data) - 1):
            connection.send(data[number : number + 1])
        (answer,) = await connection.ask(data[-1:])
        assert answer[0] == 200
        for cut in range(1, len(data), 7):
            connection.send(data[:cut])
            (answer,) = await connection.ask(data[cut:])
            assert answer[0] == 200
        assert await used(served, key) == 1 + len(range(1, len(data), 7))


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
async def test_answers_come_in_request_order_however_requests_are_split(data: st.DataObject) -> None:
    async with connected(limits=data.draw(st.sampled_from(["durable", "leased"]))) as (served, connection):
        key = await served.make_key(limits=[LIMIT])
        off = await disabled(served)
        if data.draw(st.booleans()):
            await in_memory(served, key["key"])
        kinds: dict[str, tuple[bytes, Callable[[int, JSON], bool]]] = {
            "charged": (request({"key": key["key"], "cost": {"tokens": 1}}), lambda s, a: a["code"] == "VALID"),
            "off": (request({"key": off["key"]}), lambda s, a: a["code"] == "DISABLED"),
            "once": (
                request({"key": key["key"], "cost": {"tokens": 1}}, "Idempotency-Key: k"),
                lambda s, a: a["code"] == "VALID",
            ),
            "malformed": (request(b"[1"), lambda s, a: s == 400),
            "other": (request(b"", path="/healthz", method="GET"), lambda s, a: a["status"] == "ok"),
            "denied": (request({"key": key["key"]}, key="sr_x"), lambda s, a: s == 401),
        }
        sent = data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=12))
        stream = b"".join(kinds[kind][0] for kind in sent)
        cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            connection.send(stream[begin:end])
            for _ in range(data.draw(st.sampled_from([0, 0, 1, 3]))):
                await asyncio.sleep(0)
        await wait_until(lambda: len(connection.answers()) == len(sent))
        last = 0
        for kind, (status, _, body) in zip(sent, connection.answers(), strict=True):
            answer = json.loads(body)
            assert kinds[kind][1](status, answer), (kind, status, answer)
            if kind == "charged":
                assert answer["limits"][0]["used"] > last, "answers changed places"
                last = answer["limits"][0]["used"]
        expected = sent.count("charged") + ("once" in sent)
        assert await used(served, key) == expected
        assert served.app.services.verify_gate.inside == 0


async def disabled(served: Served) -> JSON:
    made = await served.make_key()
    assert (await served.post(f"/v1/keys/{made['id']}/disable")).status == 200
    return made


async def used(served: Served, key: JSON) -> Any:
    """What is recorded of a key's first limit."""
    return (await served.get(f"/v1/keys/{key['id']}/stats")).json["limits"][0]["used"]


async def in_memory(served: Served, text: str) -> None:
    """Use a key, for nothing, until this node knows it, after it has heard that the key was made."""
    began = time.monotonic()
    served.room.feed.wake()
    await wait_until(lambda: served.room.feed.current_at > began)

    async def known() -> bool:
        await served.verify(text, cost={"tokens": 0})
        return served.room.keys.cache.peek(text, time.time_ns() // 1_000) is not None

    await wait_until(known)


async def warm(served: Served) -> bytes:
    """A request that will be answered directly, with a durable charge."""
    key = await served.make_key(limits=[LIMIT])
    await in_memory(served, key["key"])
    return request({"key": key["key"], "cost": {"tokens": 1}}, "X-Request-Id: mine")


async def test_an_error_of_the_ledger_is_a_problem_document_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as (served, connection):
        data = await warm(served)

        charges = []

        def failing(error: Exception) -> Callable[..., asyncio.Future[Any]]:
            def charge(*_: Any, **__: Any) -> asyncio.Future[Any]:
                charges.append(error)
                future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                future.set_exception(error)
                return future

            return charge

        for error, expected in ((Unavailable("the disk is away"), 503), (RuntimeError("a secret"), 500)):
            with monkeypatch.context() as patch:
                patch.setattr(Ledger, "admit", failing(error))
                ((status, headers, body),) = await connection.ask(data)
            assert (status, headers["x-request-id"]) == (expected, "mine")
            assert headers["content-type"] == "application/problem+json"
            assert b"a secret" not in body
            assert len(charges) == 1, "what failed was tried again, and may have been charged"
            charges.clear()
        ((status, _, _),) = await connection.ask(data)
        assert status == 200
        assert served.app.services.verify_gate.inside == 0


async def test_an_unexpected_error_is_a_500_and_not_a_400(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The parser, in whose call a request is begun, takes any exception for one of the request's."""
    async with connected() as (served, connection):
        data = await warm(served)

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("a secret")

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "admit", broken)
            ((status, headers, body),) = await connection.ask(data)
        assert (status, headers["x-request-id"]) == (500, "mine")
        assert b"a secret" not in body
        assert "verify failed" in caplog.text
        ((status, _, _),) = await connection.ask(data)
        assert status == 200


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Future[Any]]:
    """The first charge waits here, until it is told that its key was changed; those after it are real."""
    charge = Ledger.admit
    first: list[asyncio.Future[Any]] = []

    def waiting(self: Ledger, *positional: Any, **named: Any) -> asyncio.Future[Any]:
        if first:
            return charge(self, *positional, **named)
        first.append(asyncio.get_running_loop().create_future())
        return first[0]

    monkeypatch.setattr(Ledger, "admit", waiting)
    return first


async def test_a_key_changed_during_its_verification_is_verified_again(
    changed: list[asyncio.Future[Any]], by_asgi: list[str]
) -> None:
    async with connected() as (served, connection):
        changed.append(asyncio.get_running_loop().create_future())
        data = await warm(served)
        changed.clear()
        by_asgi.clear()
        second = data.replace(b"mine", b"next")
        head, gap, body = second.partition(b"\r\n\r\n")
        connection.send(data + head + gap)  # the next request waits behind it, and its body is still to come
        changed[0].set_exception(KeyChanged())
        await wait_until(connection.answers)
        connection.send(body)
        await wait_until(lambda: len(connection.answers()) == 2)
        assert [json.loads(body)["limits"][0]["used"] for _, _, body in connection.answers()] == [1, 2]
        assert len(by_asgi) == 2


@pytest.mark.parametrize("gone", [True, False])
async def test_a_connection_that_closes_during_the_verification_of_a_changed_key_ends_cleanly(
    changed: list[asyncio.Future[Any]], gone: bool
) -> None:
    async with connected() as (served, _):
        changed.append(asyncio.get_running_loop().create_future())
        data = await warm(served)
        changed.clear()
        other = Connection(served.app)
        other.send(data)
        if gone:
            other.close()
        else:
            other.protocol.shutdown()
        changed[0].set_exception(KeyChanged())
        await asyncio.sleep(0)  # its future's callback
        await wait_until(lambda: not other.protocol.tasks)
        assert served.app.services.verify_gate.inside == 0
        if gone:
            assert other.wire.sent == b""
        else:
            await wait_until(lambda: other.wire.closed)
            assert other.answers()[0][1]["connection"] == "close"


async def test_a_disconnected_client_is_charged_and_leaves_nothing_behind() -> None:
    async with connected() as (served, connection):
        data = await warm(served)
        other = Connection(served.app)
        other.send(data)
        assert served.app.services.verify_gate.inside == 1
        other.close()
        await wait_until(lambda: served.app.services.verify_gate.inside == 0)
        assert other.wire.sent == b""
        ((_, _, body),) = await connection.ask(data)
        assert json.loads(body)["limits"][0]["used"] == 2


async def test_a_stopping_server_answers_running_requests_and_then_closes() -> None:
    async with connected() as (served, connection):
        data = await warm(served)
        connection.send(data)
        connection.protocol.shutdown()
        assert not connection.wire.closed, "its answer would be lost"
        await wait_until(lambda: connection.wire.closed)
        ((status, headers, _),) = connection.answers()
        assert (status, headers["connection"]) == (200, "close")
        idle = Connection(served.app)
        await idle.ask(data)
        idle.protocol.shutdown()
        assert idle.wire.closed


async def test_concurrent_verifications_over_the_bound_get_429() -> None:
    async with connected(bounds=Bounds(max_concurrency=2)) as (served, _):
        data = await warm(served)
        several = [Connection(served.app) for _ in range(5)]
        for one in several:
            one.send(data)
        await wait_until(lambda: all(one.answers() for one in several))
        assert sorted(one.answers()[0][0] for one in several) == [200, 200, 429, 429, 429]
        for one in several:
            one.close()
        assert served.app.services.verify_gate.inside == 0


async def test_a_connection_may_verify_any_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bounds count of a connection begins anew with each request, answered at once or later."""
    monkeypatch.setattr("strongroom.server.arrival.MAX_HEAD_BYTES", 1_000)
    monkeypatch.setattr("strongroom.server.arrival.MAX_DISCARDED_BYTES", 1_000)
    async with connected() as (served, connection):
        data = await warm(served)
        off = await disabled(served)
        await in_memory(served, off["key"])
        for body in (data, request({"key": off["key"]})):
            for _ in range(30):
                connection.send(body[:40])
                ((status, _, _),) = await connection.ask(body[40:])
                assert status == 200
        assert not connection.wire.closed


async def test_a_body_is_accepted_up_to_the_bound() -> None:
    async with connected(bounds=Bounds(max_body_bytes=300_000)) as (served, connection):
        body = (await warm(served)).partition(b"\r\n\r\n")[2]
        for size, expected in ((200_000, 200), (300_000, 200), (300_001, 413)):
            data = request(body + b" " * (size - len(body)))
            for begin in range(0, len(data), 50_000):
                connection.send(data[begin : begin + 50_000])
            await wait_until(connection.answers)
            assert connection.answers().pop()[0] == expected
            connection.wire.sent = b""
            ((status, _, _),) = await connection.ask(request(body))
            assert status == 200
            connection.wire.sent = b""


# --- Heads that are recognised by their bytes ---------------------------------------------------------------------


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was given to the parser."""
    pieces: list[bytes] = []
    parse = Protocol._parse

    def spied(self: Protocol, data: bytes | memoryview) -> None:
        pieces.append(bytes(data))
        parse(self, data)

    monkeypatch.setattr(Protocol, "_parse", spied)
    return pieces


async def test_a_head_that_was_parsed_once_is_recognised_on_every_connection(parsed: list[bytes]) -> None:
    async with connected() as (served, connection):
        key = await served.make_key(limits=[LIMIT])
        await in_memory(served, key["key"])
        other = Connection(served.app)
        for count, each in enumerate((connection, other, connection, other), start=1):
            ((status, _, body),) = await each.ask(request({"key": key["key"], "cost": {"tokens": count}}))
            assert (status, json.loads(body)["code"]) == (200, "VALID")
        assert len(parsed) == 1
        assert await used(served, key) == 1 + 2 + 3 + 4
        other.close()


async def test_a_caller_whose_key_is_revoked_is_refused_though_its_head_is_known(by_asgi: list[str]) -> None:
    async with connected() as (served, connection):
        key = await served.make_key(limits=[LIMIT])
        await in_memory(served, key["key"])
        manager = await served.manager("write")
        await served.verify(key["key"], key=manager)
        sent = request({"key": key["key"]}, key=manager)
        for _ in range(2):
            ((status, _, _),) = await connection.ask(sent)
            assert status == 200
        found = await served.room.keys.identify(manager)
        assert found is not None
        await served.room.keys.disable(found.id)
        by_asgi.clear()
        ((status, _, _),) = await connection.ask(sent)
        assert status == 401
        assert by_asgi == ["/v1/keys/verify"]


async def test_what_follows_a_known_head_must_be_its_body_exactly(parsed: list[bytes]) -> None:
    async with connected() as (served, connection):
        key = await served.make_key(limits=[LIMIT])
        await in_memory(served, key["key"])
        sent = request({"key": key["key"], "cost": {"tokens": 1}})
        await connection.ask(sent)
        parsed.clear()
        await connection.ask(sent + sent, 2)  # a pipelined request
        connection.send(sent[:-5])
        assert len(parsed) == 2
        ((status, _, _),) = await connection.ask(sent[-5:])
        assert status == 200
        assert len(parsed) == 3
        await connection.ask(sent)
        assert len(parsed) == 3
        assert await used(served, key) == 5


async def test_a_request_while_another_is_answered_waits_though_its_head_is_known() -> None:
    async with connected(limits="durable") as (served, connection):
        key = await served.make_key(limits=[LIMIT])
        await in_memory(served, key["key"])
        sent = [request({"key": key["key"], "cost": {"tokens": 1 + number}}) for number in range(4)]
        await connection.ask(sent[0])
        before = len(connection.answers())
        for one in sent[1:]:
            connection.send(one)
        await wait_until(lambda: len(connection.answers()) == before + 3)
        found = connection.answers()[before:]
        assert [json.loads(body)["limits"][0]["used"] for _, _, body in found] == [3, 6, 10]


@pytest.mark.parametrize("framing", [b"\n\n", b"\r\n\n", b"\n\r\n"])
def test_a_head_that_ends_in_another_way_is_not_kept(framing: bytes) -> None:
    """A parser that were lenient about line ends would see another body than the bytes that are compared."""
    heads = KnownHeads()
    head = b"POST /v1/keys/verify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer b\r\nContent-Length: 6"
    noted = {b"host": b"x", b"authorization": b"Bearer b", b"content-length": b"6"}
    heads.learn(head + framing + b"{}\r\n\r\n", [], noted, b"{}\r\n\r\n")
    assert heads.find(head + framing + b"{}\r\n\r\n") is None
    heads.learn(head + b"\r\n\r\n" + b"{    }", [], noted, b"{    }")
    assert heads.find(head + b"\r\n\r\n" + b"{  1 }") is not None
    assert heads.find(head + b"\r\n\r\n" + b"{  12 }") is None


def test_no_more_heads_are_kept_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strongroom.server.direct.MAX_KNOWN_HEADS", 10)
    heads = KnownHeads()
    for number in range(35):
        head = b"POST / HTTP/1.1\r\nX: %d\r\nContent-Length: 2" % number
        heads.learn(head + b"\r\n\r\n{}", [], {b"authorization": b"", b"content-length": b"2"}, b"{}")
    assert len(heads) <= 10
    long = b"X: " + b"x" * 2_000
    heads.learn(long + b"\r\n\r\n{}", [], {b"authorization": b"", b"content-length": b"2"}, b"{}")
    assert heads.find(long + b"\r\n\r\n{}") is None
    many = [(b"x", b"")] * 100
    heads.learn(b"X:\r\n" * 100 + b"\r\n\r\n{}", many, {b"authorization": b"", b"content-length": b"2"}, b"{}")
    assert heads.find(b"X:\r\n" * 100 + b"\r\n\r\n{}") is None
