"""The load generator: keep-alive HTTP/1.1 connections that send ready-made requests and check every answer."""

from __future__ import annotations

import asyncio
import json
import os
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, cast

from .harness import BenchmarkError, Round, Sample, percentiles_us, warm_up_s

ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """One round: `requests` are whole HTTP requests, sent in turn. `server_pid`'s processor time is reported. `mark`:
    what a good answer contains; without one, that the key is valid."""

    host: str
    port: int
    requests: tuple[bytes, ...]
    connections: int
    seconds: float
    server_pid: int
    mark: bytes | None = None


def post(path: str, body: Any, *, host: str, bearer: str | None = None) -> bytes:
    """A whole HTTP/1.1 POST of `body` as JSON."""
    payload = json.dumps(body, separators=(",", ":")).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    if bearer is not None:
        lines.append(f"Authorization: Bearer {bearer}")
    lines.append(f"Content-Length: {len(payload)}")
    return "\r\n".join([*lines, "", ""]).encode() + payload


@asynccontextmanager
async def load_generator() -> AsyncIterator[Round]:
    """For a `Worker`: each job is a `Load`."""
    yield run


async def run(load: Load) -> Sample:
    """Open the connections, warm up, measure, wait for the last answers, close."""
    loop = asyncio.get_running_loop()
    state = _State(await _probe(load))
    connections = []
    for number in range(load.connections):
        # Each starts elsewhere in the list, so that all keys are in use at any time.
        start = number * len(load.requests) // load.connections
        requests = load.requests[start:] + load.requests[:start]
        _, connection = await loop.create_connection(
            lambda requests=requests: _Connection(state, requests),  # type: ignore[misc]  # cannot infer the default
            load.host,
            load.port,
        )
        connections.append(connection)
    try:
        for connection in connections:
            connection.send()
        await state.wait(warm_up_s(load.seconds))
        state.latencies = array("d")
        server_cpu, client_cpu, begin = _processor_time(load.server_pid), process_time(), perf_counter()
        await state.wait(load.seconds)
        elapsed = perf_counter() - begin
        latencies = state.latencies
        client_cores = (process_time() - client_cpu) / elapsed
        server_cpu_after = _processor_time(load.server_pid)
        state.stopping = True
        await asyncio.wait_for(asyncio.gather(*(c.idle for c in connections)), ANSWER_TIMEOUT_S)
    finally:
        for connection in connections:
            connection.close()
    cores = None
    if server_cpu is not None and server_cpu_after is not None:
        cores = (server_cpu_after - server_cpu) / elapsed
    return Sample(len(latencies), elapsed, *percentiles_us(latencies), cores, client_cores)


async def _probe(load: Load) -> bytes:
    """Ask once, read the answer with a real parser, and give back the bytes by which a good answer is known."""
    reader, writer = await asyncio.open_connection(load.host, load.port)
    try:
        writer.write(load.requests[0])
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(_content_length(head, len(head)))
    finally:
        writer.close()
    if head[9:12] != b"200":
        raise BenchmarkError(f"answer {head[:12]!r}: {body[:300]!r}")
    if load.mark is not None:
        if load.mark not in body:
            raise BenchmarkError(f"expected {load.mark!r} in the answer: {body[:300]!r}")
        return load.mark
    if json.loads(body)["valid"] is not True:
        raise BenchmarkError(f"expected a valid key: {body[:300]!r}")
    return next(mark for mark in (b'"valid":true', b'"valid": true') if mark in body)


def _content_length(data: bytes, end: int) -> int:
    at = data.find(b"ength: ", 0, end)
    if at < 0:
        raise BenchmarkError(f"an answer without content-length: {data[:300]!r}")
    return int(data[at + 7 : data.index(b"\r\n", at)])


def _processor_time(pid: int) -> float | None:
    """User and system time of a process and its threads in seconds; None where /proc does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _State:
    """What the connections of one round share."""

    def __init__(self, mark: bytes) -> None:
        self.mark = mark
        self.latencies = array("d")
        self.stopping = False
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, reason: str) -> None:
        if not self._failure.done():
            self._failure.set_exception(BenchmarkError(reason))

    async def wait(self, seconds: float) -> None:
        """Let the connections work. Raises BenchmarkError as soon as one of them got a wrong answer."""
        await asyncio.wait([self._failure], timeout=seconds)
        if self._failure.done():
            self._failure.result()


class _Connection(asyncio.Protocol):
    """One request in flight at a time; the next is sent when the answer is whole."""

    __slots__ = ("_at", "_buffer", "_requests", "_sent", "_state", "_transport", "idle")

    def __init__(self, state: _State, requests: Sequence[bytes]) -> None:
        self._state = state
        self._requests = requests
        self._at = 0
        self._buffer = b""
        self._sent = 0.0
        self._transport: asyncio.Transport | None = None
        self.idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self) -> None:
        assert self._transport is not None
        request = self._requests[self._at]
        self._at = (self._at + 1) % len(self._requests)
        self._sent = perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if self._buffer:
            data = self._buffer + data
        end = data.find(b"\r\n\r\n")
        if end < 0 or len(data) < end + 4 + _content_length(data, end):
            self._buffer = data
            return
        self._buffer = b""
        state.latencies.append(perf_counter() - self._sent)
        if data[9:12] != b"200" or state.mark not in data:
            state.fail(f"a wrong answer under load: {data[:600]!r}")
        if not state.stopping:
            self.send()
        elif not self.idle.done():
            self.idle.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.idle.done():
            self._state.fail(f"the server closed a connection under load ({exc})")
            self.idle.set_result(None)

    def close(self) -> None:
        if not self.idle.done():
            self.idle.set_result(None)
        if self._transport is not None:
            self._transport.close()
