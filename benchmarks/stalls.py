"""`stalls`: the longest time that `/healthz` waits while one client sends the heaviest requests there are."""

from __future__ import annotations

import http.client
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from .harness import Benchmark, BenchmarkError, Contender, Plan, Role, Sample, Target, side_by_side
from .servers import HOST, Server, create_keys, strongroom_server

AT_MOST_MS = 250
PING_EVERY_S = 0.005
TIMEOUT_S = 120.0
DOCUMENTS, DOCUMENT_BYTES = 300, 750_000
KEYS = 2_000
EVENTS = 10_000
VERIFICATIONS = 1_000
TENANT = "/v1/tenants/stalls/policies"
LIMIT = {"resource": "tokens", "limit": 1_000_000_000_000, "window": {"kind": "rolling", "seconds": 18_000}}


@dataclass(frozen=True, slots=True)
class Heavy:
    """A route: its name, and what makes the next request of it: method, path, body."""

    name: str
    request: Callable[[], tuple[str, str, Any]]
    reads: int | None = None
    """Only so many bytes of the answer are read, of a stream that has no end."""


def run(plan: Plan) -> Benchmark:
    labels = (
        f"One client sends the route's largest request over and over; another asks for /healthz each "
        f"{PING_EVERY_S * 1_000:g} ms and keeps the longest time that an answer took. `quiet` is the machine's own.",
        "strongroom: `strongroom serve`, one worker, durable in SQLite; the clients are threads of one other process.",
    )
    admin_key = secrets.token_hex(24)
    small = plan.quick
    with ExitStack() as stack:
        server = stack.enter_context(strongroom_server(Path(plan.folder) / "strongroom", admin_key))
        client = stack.enter_context(_client(server, admin_key))
        plan.progress("stalls: writing documents and keys")
        texts = create_keys(
            server, admin_key, [{"name": f"bench {n}", "limits": [LIMIT]} for n in range(50 if small else KEYS)]
        )
        for number in range(20 if small else DOCUMENTS):
            rules = {f"line {n}": "x" * 70 for n in range(DOCUMENT_BYTES // 90)}
            _ask(client, "PUT", f"{TENANT}/{number}", {"policy_type": "t", "policy_name": "n", "rules": rules})
        routes = _routes(client, texts, small)
        contenders = [Contender("quiet: no other request", Role.FLOOR, _measure(server, admin_key, None))]
        contenders += [Contender(one.name, Role.OURS, _measure(server, admin_key, one)) for one in routes]
        targets = [Target(one.name, at_most=AT_MOST_MS) for one in routes]
        group = side_by_side(plan, "longest wait for /healthz", contenders, targets)
    return Benchmark("stalls", "ms, longest", labels, (group,))


def _routes(client: http.client.HTTPConnection, texts: list[str], small: bool) -> list[Heavy]:
    numbers = count()
    events, verifications = (500, 100) if small else (EVENTS, VERIFICATIONS)
    ids = [key["id"] for key in _ask(client, "GET", "/v1/keys?limit=500")["items"]]

    def batch(path: str, item: Callable[[int], dict[str, Any]], most: int) -> Callable[[], tuple[str, str, Any]]:
        def request() -> tuple[str, str, Any]:
            first = next(numbers) * most
            return "POST", path, {"items": [item(first + n) for n in range(most)]}

        return request

    def usage(item: Callable[[int], dict[str, Any]]) -> Callable[[], tuple[str, str, Any]]:
        return batch("/v1/usage:batch", lambda n: {**item(n), "cost": {"tokens": 1}}, events)

    def bulk() -> tuple[str, str, Any]:
        changes = {"description": f"changed {next(numbers)}"}
        return "POST", "/v1/keys:bulk", {"action": "update", "ids": ids, "limit": 500, "changes": changes}

    def leaks() -> tuple[str, str, Any]:
        return "POST", "/v1/keys/leaked", [{"token": f"leaked-{next(numbers)}-{n}"} for n in range(verifications)]

    return [
        Heavy("GET, a page of 1,000 documents of 0.75 MB", lambda: ("GET", f"{TENANT}?limit=1000", None)),
        Heavy("GET :watch, from the beginning", lambda: ("GET", f"{TENANT}:watch?cursor=0", None), 50_000_000),
        Heavy("GET, a page of 1,000 keys", lambda: ("GET", "/v1/keys?limit=1000", None)),
        Heavy(f"POST usage:batch, {events:,} unknown keys", usage(lambda n: {"key": f"unknown-{n}"})),
        Heavy(f"POST usage:batch, {events:,} unknown ids", usage(lambda n: {"key_id": f"unknown-{n}"})),
        Heavy(f"POST usage:batch, {events:,} events of known keys", usage(lambda n: {"key": texts[n % len(texts)]})),
        Heavy(
            f"POST usage:batch, {events:,} events, each to be counted once",
            usage(lambda n: {"key_id": ids[n % 10], "idempotency_key": f"{n}"}),
        ),
        Heavy(
            f"POST verify:batch, {verifications:,} unknown keys",
            batch("/v1/keys/verify:batch", lambda n: {"key": f"unknown-{n}"}, verifications),
        ),
        Heavy(
            f"POST verify:batch, {verifications:,} known keys",
            batch("/v1/keys/verify:batch", lambda n: {"key": texts[n % len(texts)]}, verifications),
        ),
        Heavy(f"POST keys:bulk, {len(ids)} keys changed", bulk),
        Heavy(f"POST keys/leaked, {verifications:,} unknown texts", leaks),
        Heavy("GET /v1/audit, a page of large records", lambda: ("GET", "/v1/audit?limit=1000&tenant=stalls", None)),
        Heavy("GET /v1/audit, a filter that nothing fits", lambda: ("GET", "/v1/audit?limit=1000&actor=nobody", None)),
        Heavy("GET /openapi.json", lambda: ("GET", "/openapi.json", None)),
        Heavy("GET /metrics", lambda: ("GET", "/metrics", None)),
    ]


# --- Measuring ------------------------------------------------------------------------------------------------


def _measure(server: Server, admin_key: str, heavy: Heavy | None) -> Callable[[float], Sample]:
    def measure(seconds: float) -> Sample:
        with _client(server, admin_key) as client, _pinging(server, admin_key) as longest:
            end = perf_counter() + seconds
            if heavy is None:
                sleep(seconds)
            while heavy is not None:  # one request at least, however long it takes
                _send(client, heavy)
                if perf_counter() >= end:
                    break
        # A figure's rate is the longest wait in milliseconds.
        return Sample(round(longest[0] * 1e6), 1_000.0)

    return measure


@contextmanager
def _pinging(server: Server, admin_key: str) -> Iterator[list[float]]:
    longest = [0.0]
    stop = threading.Event()
    failed: list[str] = []

    def ping() -> None:
        with _client(server, admin_key) as client:
            while not stop.is_set():
                began = perf_counter()
                try:
                    _ask(client, "GET", "/healthz")
                except BenchmarkError as error:
                    failed.append(str(error))
                    return
                longest[0] = max(longest[0], perf_counter() - began)
                sleep(PING_EVERY_S)

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield longest
    finally:
        stop.set()
        thread.join()
    if failed:
        raise BenchmarkError(failed[0])


@contextmanager
def _client(server: Server, admin_key: str) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=TIMEOUT_S)
    connection.headers = {"Authorization": f"Bearer {admin_key}"}  # type: ignore[attr-defined]  # ours, for `_ask`
    try:
        yield connection
    finally:
        connection.close()


def _send(client: http.client.HTTPConnection, heavy: Heavy) -> None:
    method, path, body = heavy.request()
    if heavy.reads is None:
        _ask(client, method, path, body, expected=(200, 422))
        return
    answer = _answer(client, method, path, body)
    left = heavy.reads
    while left > 0 and (data := answer.read1(65_536)) and b": \nid" not in data[-200:]:
        left -= len(data)
    client.close()  # it has no end


def _ask(
    client: http.client.HTTPConnection, method: str, path: str, body: Any = None, expected: tuple[int, ...] = (200, 201)
) -> Any:
    answer = _answer(client, method, path, body)
    text = answer.read()
    if answer.status not in expected:
        raise BenchmarkError(f"{method} {path} answered {answer.status}: {text[:300]!r}")
    return json.loads(text) if text.startswith((b"{", b"[")) else None


def _answer(client: http.client.HTTPConnection, method: str, path: str, body: Any) -> http.client.HTTPResponse:
    data = json.dumps(body, separators=(",", ":")).encode() if body is not None else None
    try:
        client.request(method, path, data, {**client.headers, "Content-Type": "application/json"})  # type: ignore[attr-defined]
        return client.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise BenchmarkError(f"{method} {path}: {type(error).__name__}: {error}") from None
