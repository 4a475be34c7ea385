"""A client that abuses one connection does not affect other connections."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import urllib.error
import urllib.request
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_network
from typing import Any

import pytest
from uvicorn.server import ServerState

from strongroom import config
from strongroom.errors import TooManyRequests, Unavailable
from strongroom.server import arrival, outgoing, protocol
from strongroom.server.app import Bounds
from strongroom.server.arrival import MAX_HEAD_BYTES
from strongroom.server.connections import Connections, descriptors
from strongroom.server.metrics import Metrics
from strongroom.server.protocol import PIECE_BYTES, Protocol
from strongroom.server.run import _connections
from tests.helpers.server_app import ADMIN, serving
from tests.helpers.waiting import PATIENCE_S, wait_until
from tests.server.test_direct import Connection, connected, request, warm
from tests.server.test_http import CHUNKED, GET, ONE_CHUNK, App, refused
from tests.server.test_protocol import Wire, configured


@asynccontextmanager
async def listening(app: Any, connections: Connections | None = None) -> AsyncIterator[int]:
    """The protocol on a socket of this machine; gives its port."""
    loop, state, config = asyncio.get_running_loop(), ServerState(), configured(app)
    server = await loop.create_server(
        lambda: Protocol(config, state, {}, loop, connections=connections), "127.0.0.1", 0
    )
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for open_ in list(state.connections):
            open_.transport.abort()
        await wait_until(lambda: not state.connections and not state.tasks)


# --- Trailers, and what else a body may have beside its content -------------------------------------------------


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"0\r\n", lambda number: b"X-%d: " % number + b"x" * 900 + b"\r\n"),
        (b"0\r\nX: ", lambda number: b"x" * 1_000),
        (b"0\r\n", lambda number: b"x" * 1_000),
        (b"2;", lambda number: b"x" * 1_000),
    ],
    ids=["trailers", "trailer", "name", "extension"],
)
async def test_the_overhead_of_a_chunked_body_is_bounded(
    begin: bytes, more: Callable[[int], bytes], answered: bool
) -> None:
    app = App(reads=not answered)
    connection = Connection(app)
    connection.send(CHUNKED + ONE_CHUNK)
    await wait_until(lambda: connection.answers() if answered else app.asked)
    connection.send(begin)
    sent = 0
    while not connection.wire.ended and sent < 2 * MAX_HEAD_BYTES:
        sent += len(more(sent))
        connection.send(more(sent))
    assert connection.wire.ended, f"{sent} bytes were taken"
    if not answered:
        refused(connection)
    assert sum(len(name) + len(value) for name, value in app.asked[0]["headers"]) < 100
    connection.close()


async def test_trailers_are_dropped() -> None:
    app = App()
    connection = Connection(app)
    connection.send(CHUNKED + ONE_CHUNK + b"0\r\nX-Last: 1\r\nCookie: 2\r\n\r\n" + GET % 2)
    await wait_until(lambda: len(connection.answers()) == 2)
    assert [[name for name, _ in scope["headers"]] for scope in app.asked] == [
        [b"host", b"transfer-encoding"],
        [b"host"],
    ]
    assert app.bodies == [b"{}", b""]
    connection.close()


async def test_a_body_in_chunks_of_one_byte_is_a_body() -> None:
    app = App()
    connection = Connection(app)
    connection.send(CHUNKED)
    for _ in range(200):
        connection.send(b"1\r\nx\r\n" * 100)
    connection.send(b"0\r\n\r\n")
    await wait_until(connection.answers)
    assert app.bodies == [b"x" * 20_000]
    connection.close()


def _connections_of_every_kind() -> dict[str, bytes]:
    return {
        "new": b"",
        "head": b"POST / HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 10_000,
        "body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 50_000,
        "trailers": CHUNKED + ONE_CHUNK + b"0\r\nX: " + b"x" * 10_000,
        "answered": GET % 1,
        "ahead": GET % 1 + b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n12" + GET % 3,
        "many ahead": b"".join(GET % number for number in range(1_000)),
        "refused": b"nonsense\r\n\r\n",
        "upgraded": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: foo\r\n\r\nmore",
        "verification": request({"key": "k"}),
    }


@pytest.mark.parametrize("in_work", [False, True])
@pytest.mark.parametrize("kind", _connections_of_every_kind())
@pytest.mark.parametrize("error", [None, ConnectionResetError()], ids=["closed", "reset"])
async def test_a_closed_connection_leaves_no_garbage(kind: str, in_work: bool, error: Exception | None) -> None:
    app = App()
    if in_work:
        app.may_answer.clear()
    gc.disable()
    try:
        connection = Connection(app)
        state = connection.protocol.server_state
        connection.send(_connections_of_every_kind()[kind])
        for _ in range(5):
            await asyncio.sleep(0)
        kept = connection.protocol, connection.protocol._running, connection.protocol.flow
        gone = [weakref.ref(one) for one in kept if one is not None]
        del kept
        connection.protocol.connection_lost(error)
        del connection
        app.may_answer.set()
        await wait_until(lambda: not state.tasks)
        await asyncio.sleep(0)
        assert not [found() for found in gone if found() is not None]
    finally:
        gc.enable()


# --- Clients that send ahead, and that do not read ---------------------------------------------------------------


async def test_pipelined_requests_are_bounded_and_answered_in_order() -> None:
    app = App()
    app.may_answer.clear()
    connection = Connection(app)
    connection.send(b"".join(GET % number for number in range(500)))
    await wait_until(lambda: app.asked)
    assert connection.wire.paused, "it is read on"
    assert len(connection.protocol.pipeline) <= PIECE_BYTES // len(GET)
    assert len(app.asked) == 1
    app.may_answer.set()
    await wait_until(lambda: len(connection.answers()) == 500)
    assert [scope["path"] for scope in app.asked] == [f"/{number}" for number in range(500)]
    assert [connection.wire.paused] == [False]
    connection.close()


async def test_reading_stays_paused_while_a_request_waits() -> None:
    """uvicorn reads on as soon as any application wants more of its own request."""
    app = App()
    app.may_answer.clear()
    connection = Connection(app)
    connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" + GET % 2)
    await wait_until(lambda: app.bodies)
    assert connection.wire.paused
    connection.close()


async def test_a_client_that_does_not_read_gets_no_request_slot_and_is_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outgoing, "WRITE_TIMEOUT_S", 0.05)
    app = App()
    connection = Connection(app)
    wire = connection.wire
    wire.unread = 100_000
    connection.protocol.pause_writing()
    connection.send(GET % 1)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not app.asked, "a request was begun whose answer cannot be sent"
    wire.unread = 30_000
    await asyncio.sleep(0.06)
    assert not wire.closed, "it reads, slowly"
    await wait_until(lambda: wire.closed)
    connection.close()
    other = Connection(app)
    other.protocol.pause_writing()
    other.send(GET % 1)
    other.protocol.resume_writing()
    await wait_until(other.answers)
    await asyncio.sleep(0.06)
    assert not other.wire.closed
    other.close()


async def test_a_connection_whose_last_answer_is_not_read_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "WRITE_TIMEOUT_S", 0.02)
    connection = Connection(App())
    connection.wire.unread = 10_000
    connection.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    await wait_until(lambda: connection.wire.aborted)
    connection.close()


async def test_clients_that_do_not_read_leave_request_slots_to_others() -> None:
    bounds = Bounds(max_concurrency=3)
    async with serving(bounds=bounds) as served, listening(served.app) as port, AsyncExitStack() as idle:
        await served.get("/docs")  # made now: while it is made, what is sent ahead would be answered with 429
        sent = b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n" * 200
        for _ in range(12):
            one = idle.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            one.connect(("127.0.0.1", port))
            one.sendall(sent)
        services = served.app.services
        await wait_until(lambda: services.metrics.requests.get(("GET", "/docs", 200), 0) >= 24)
        for path in ("/healthz", "/v1/keys"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            async def status(reader: Any = reader, writer: Any = writer, path: str = path) -> bool:
                writer.write(request(b"", path=path, method="GET"))
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await reader.readexactly(size)
                return bool(head.startswith(b"HTTP/1.1 200"))

            await wait_until(status)
            writer.close()
        await wait_until(lambda: services.gate.inside == 0, outgoing.WRITE_TIMEOUT_S / 2)


async def test_verifications_and_health_have_their_own_request_slots() -> None:
    async with connected(bounds=Bounds(max_concurrency=1)) as (served, connection):
        data = await warm(served)
        served.app.services.gate.inside = 1
        assert (await served.get("/v1/keys")).status == 429
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await served.get(path)).status == 200, path
        ((status, _, _),) = await connection.ask(data)
        assert status == 200
        served.app.services.gate.inside = 0


# --- How many connections ---------------------------------------------------------------------------------------


def test_connections_are_bounded_by_peer_and_in_total() -> None:
    connections = Connections(5, 2, [ip_network("10.0.0.0/8"), ip_network("fd00::/8")])
    for one, same, other in (
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"),
    ):
        held = [connections.enter(one), connections.enter(same)]
        with pytest.raises(TooManyRequests, match="the most for one address"):
            connections.enter(one)
        connections.leave(connections.enter(other))
        connections.leave(held.pop())
        held.append(connections.enter(one))
        for peer in held:
            connections.leave(peer)
    assert connections.open == 0
    assert not connections._peers
    proxied = [connections.enter(address) for address in ("10.1.1.1",) * 3 + ("fd00::1", "::ffff:10.1.1.1")]
    with pytest.raises(Unavailable, match="the most that this server accepts"):
        connections.enter("192.0.2.9")
    for peer in proxied:
        connections.leave(peer)
    assert connections.open == 0
    assert connections.refused == {"peer": 2, "all": 1}


async def test_requests_refused_by_the_protocol_are_counted_in_the_metrics() -> None:
    metrics, connections = Metrics(), Connections(1, 1)
    connections.measured(metrics)
    made = [
        Protocol(configured(App()), ServerState(), {}, asyncio.get_running_loop(), connections=connections)
        for _ in range(2)
    ]
    for one in made:
        one.connection_made(Wire())
    made[0].data_received(b"nonsense\r\n\r\n")
    assert metrics.requests == {("other", "unmatched", 503): 1, ("other", "unmatched", 400): 1}
    assert b'strongroom_requests_total{method="other",route="unmatched",status="400"} 1.0' in metrics.text()
    assert b'strongroom_connections_refused_total{bound="all"} 1.0' in metrics.text()
    for one in made:
        one.connection_lost(None)


async def test_only_a_bounded_number_of_refused_connections_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_TURNED_AWAY", 2)
    connections, config, loop = Connections(0, 1), configured(App()), asyncio.get_running_loop()
    made = [Protocol(config, ServerState(), {}, loop, connections=connections) for _ in range(3)]
    wires = [Wire() for _ in made]
    for one, wire in zip(made, wires, strict=True):
        one.connection_made(wire)
    await wait_until(lambda: all(wire.sent.startswith(b"HTTP/1.1 503") for wire in wires))
    assert [(wire.ended, wire.closed) for wire in wires] == [(True, False), (True, False), (False, True)]
    assert connections.turned_away == 2
    for one in made:
        one.connection_lost(None)
    assert (connections.open, connections.turned_away) == (0, 0)


async def test_large_answers_are_not_copied_for_each_client() -> None:
    """Each copy would stay for as long as its client does not read."""
    parts: list[bytes] = []

    class Sending(Wire):
        def writelines(self, list_of_data: Any) -> None:
            parts.extend(list_of_data)

    app, wire = App(b"x" * 100_000), Sending()
    made = Protocol(configured(app), ServerState(), {}, asyncio.get_running_loop())
    made.connection_made(wire)
    made.data_received(GET % 1)
    await wait_until(lambda: parts)
    assert any(part is app.answer for part in parts)
    made.connection_lost(None)


def test_connections_leave_file_descriptors_for_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[int] = []
    monkeypatch.setattr("strongroom.server.run.descriptors", lambda wanted: min(wanted, *allowed))
    cases: tuple[tuple[int, dict[str, Any], int, int], ...] = (
        (100_000, {}, 10_000, 2_000),
        (4_096, {}, 3_820, 2_000),
        (1_024, {}, 748, 561),
        (300, {}, 75, 56),
        (1_024, {"max_connections": 500, "max_peer_connections": 500}, 500, 500),
        (1_024, {"max_connections": 500, "max_peer_connections": 499}, 500, 375),
    )
    for limit, given, most, per_peer in cases:
        allowed[:] = [limit]
        made = _connections(config.load(store="json://:memory:", **given))
        assert (made.most, made.most_per_peer) == (most, per_peer), limit


def test_the_limit_of_open_files_is_raised_as_far_as_the_system_lets() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] - 1, before[1]))
        assert descriptors(before[0]) == min(before[0], before[1] if before[1] > 0 else before[0])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
        assert descriptors(10) == 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_connection_over_the_bound_gets_429_and_is_closed() -> None:
    connections = Connections(10, 1)
    async with listening(App(), connections) as port:
        first, keep = await asyncio.open_connection("127.0.0.1", port)
        keep.write(GET % 1)
        await first.readuntil(b"ok")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET % 1)
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert answer.startswith(b"HTTP/1.1 429"), answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "too_many_requests"
        writer.close()
        keep.write(GET % 1)
        await first.readuntil(b"ok")
        keep.close()
        await wait_until(lambda: connections.open == connections.turned_away == 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET % 1)
        await reader.readuntil(b"ok")
        writer.close()


# --- Bodies that are refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "expected"), [(ADMIN, 413), ("sr_nobody", 401)])
async def test_a_refused_body_of_twelve_megabytes_is_answered_though_the_client_closes(key: str, expected: int) -> None:
    """urllib sends `Connection: close`, and all of its body before it looks for an answer."""
    async with serving() as served, listening(served.app) as port:
        for path in ("/v1/keys", "/v1/keys/verify"):
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", b" " * 12_000_000, {"Authorization": f"Bearer {key}"}
            )
            with pytest.raises(urllib.error.HTTPError) as caught:
                await asyncio.to_thread(urllib.request.urlopen, asked, timeout=PATIENCE_S)
            assert caught.value.code == expected
            assert json.loads(caught.value.read())["status"] == expected
            caught.value.close()


async def test_a_refused_connection_is_dropped_once_it_is_silent_or_has_sent_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrival, "LINGER_S", 0.02)
    monkeypatch.setattr(arrival, "MAX_DISCARDED_BYTES", 100_000)
    silent, loud = Connection(App()), Connection(App())
    for connection in (silent, loud):
        connection.send(b"nonsense\r\n\r\n")
        assert connection.wire.ended
        assert not connection.wire.closed
    while not loud.wire.closed:
        loud.send(b"x" * 10_000)
    await wait_until(lambda: silent.wire.closed)
    for connection in (silent, loud):
        connection.close()


# --- What is kept -----------------------------------------------------------------------------------------------


async def test_an_idle_connection_keeps_nothing_of_its_last_request() -> None:
    async with connected() as (served, connection):
        data = await warm(served)
        marked = "X-Mark: " + "m" * 20_000
        long = request({"key": "k" * 20_000, "cost": {"tokens": 1}}, marked)
        for sent in (data.replace(b"X-Request-Id: mine", b"X-Mark: " + b"m" * 500), long):
            await connection.ask(sent)
            await wait_until(lambda: not connection.protocol.server_state.tasks)
            found = _reachable(
                connection.protocol, besides=(connection.wire, served.app, served.app.heads, connection.protocol.loop)
            )
            assert not [one for one in found if isinstance(one, bytes | bytearray | memoryview) and len(one) > 300]


def _reachable(start: Any, besides: tuple[Any, ...]) -> list[Any]:
    """All that an object keeps alive, without what modules, classes and some others do."""
    seen: dict[int, Any] = {id(one): one for one in besides}
    waiting, found = [start], []
    while waiting:
        one = waiting.pop()
        if (
            id(one) in seen
            or isinstance(one, type)
            or (type(one).__module__ in ("logging", "builtins") and callable(one))
        ):
            continue
        seen[id(one)] = one
        found.append(one)
        waiting += gc.get_referents(one)
        assert len(found) < 10_000
    return found


async def test_long_texts_are_not_cached() -> None:
    from strongroom import client_address as addresses
    from strongroom.keys.verification import _counted, cost_units

    async with serving() as served:
        for number in range(3):
            padded = "Bearer " + " " * (20_000 + number) + ADMIN
            answer = await served.client.get("/v1/keys", headers={"Authorization": padded})
            assert answer.status_code == 200
        assert (await served.get("/v1/keys")).status == 200
        assert {len(header) for header in served.app.services.authenticator._callers} == {len(f"Bearer {ADMIN}")}
    for name in ("x" * 900_000, "X" * 65):
        with pytest.raises(Exception, match="is not a resource"):
            cost_units({name: 1})
    assert cost_units({"pages": 3}) == {"pages": 3}
    assert max(map(len, _counted)) <= 64
    before = addresses._address.cache_info().currsize
    assert addresses.address("192.0.2.1" + " " * 1_000) is None
    assert addresses._address.cache_info().currsize == before
