"""`verify`: a key's check and debit over HTTP, beside a bare endpoint on the same server that keeps no count."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from .harness import Benchmark, BenchmarkError, Contender, Plan, Role, Sample, Target, Worker, side_by_side
from .load import Load, load_generator, post
from .servers import HOST, Server, bare_server, create_keys, strongroom_server

CONNECTIONS = (32, 128)
MANY_KEYS = 1_000
Targets = Mapping[tuple[str, int, int], float]
"""The least part of the floor, by mode, number of keys and number of connections."""
TARGETS: Targets = {
    ("durable", 1, 32): 0.55,
    ("durable", 1, 128): 0.8,
    ("leased", 1, 32): 0.85,
    ("durable", MANY_KEYS, 32): 0.75,
    ("leased", MANY_KEYS, 32): 0.95,
}
TOKENS = 250
LIMIT = {"resource": "tokens", "limit": 1_000_000_000_000, "window": {"kind": "rolling", "seconds": 18_000}}

FLOOR = "bare ASGI endpoint, nothing counted"
MODES = ("leased", "durable")


def run(plan: Plan) -> Benchmark:
    return measured(plan, "verify", "SQLite", None, TARGETS)


def measured(plan: Plan, name: str, engine: str, store: str | None, targets: Targets) -> Benchmark:
    """The benchmark `name` on the store of this URL (None: SQLite in the plan's folder)."""
    many = 20 if plan.quick else MANY_KEYS
    admin_key = secrets.token_hex(24)
    labels = (
        f"POST /v1/keys/verify, cost {TOKENS} tokens against one rolling limit of 5 hours that never denies; "
        "every answer is checked to be 200 and valid.",
        "One uvicorn worker process (uvloop, httptools, no access log) each; the load generator is a process of its "
        "own: closed loop, keep-alive, one request in flight a connection.",
        f"strongroom: `strongroom serve`; durable: each answer waits until its count is durable in {engine}; leased: "
        "counts are spent from shares of the limit that are durable before. The administrator's key authorises the "
        "caller.",
        "floor: reads the body, json.loads, SHA-256 of the key, dict lookup, json.dumps of as large an answer. It "
        "authorises nobody, counts nothing and writes nothing.",
        "Not compared: TLS, a network, more than one process. There is no peer: we know of no Python server that "
        "answers only after the count is durable.",
    )
    with ExitStack() as stack:
        folder = Path(plan.folder)
        generator = stack.enter_context(Worker(load_generator))
        bodies = [{"name": f"bench {n}", "tenant": "bench", "limits": [LIMIT]} for n in range(many)]
        ours: dict[str, tuple[Server, list[str]]] = {}
        why: dict[str, str] = {}
        known = [f"sr_{secrets.token_hex(24)}" for _ in range(many)]
        for mode in MODES:
            try:
                plan.progress(f"{name}: starting strongroom, {mode}, creating {many} keys")
                server = stack.enter_context(strongroom_server(folder / mode, admin_key, store, limits=mode))
                ours[mode] = server, create_keys(server, admin_key, bodies)
            except BenchmarkError as error:
                why[mode] = str(error)
        floor = stack.enter_context(bare_server(folder / "bare", known))

        def against(server: Server, keys: Sequence[str], connections: int) -> Callable[[float], Sample]:
            host = f"{HOST}:{server.port}"
            requests = tuple(
                post("/v1/keys/verify", {"key": key, "cost": {"tokens": TOKENS}}, host=host, bearer=admin_key)
                for key in keys
            )
            return lambda seconds: generator(Load(HOST, server.port, requests, connections, seconds, server.pid))

        def contender(mode: str, count: int, connections: int) -> Contender:
            label = _label(mode, count)
            if mode not in ours:
                return Contender(label, Role.OURS, None, why[mode])
            server, keys = ours[mode]
            return Contender(label, Role.OURS, against(server, keys[:count], connections))

        groups = []
        for connections in CONNECTIONS:
            contenders = (
                contender("leased", 1, connections),
                Contender(FLOOR, Role.FLOOR, against(floor, known, connections)),
                contender("durable", 1, connections),
                contender("leased", many, connections),
                contender("durable", many, connections),
            )
            aims = tuple(
                Target(_label(mode, count), of_floor=part)
                for (mode, count, at), part in targets.items()
                if at == connections and count in (1, many)
            )
            groups.append(side_by_side(plan, f"{connections} connections", contenders, aims))
    return Benchmark(name, "requests/s", labels, tuple(groups))


def _label(mode: str, keys: int) -> str:
    return f"strongroom, {mode}, {keys:,} key{'s' if keys > 1 else ''}"
