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
TARGETS = {32: 0.5, 128: 0.7}
MANY_KEYS = 1_000
TOKENS = 250
LIMIT = {"resource": "tokens", "limit": 1_000_000_000_000, "window": {"kind": "rolling", "seconds": 18_000}}

FLOOR = "bare ASGI endpoint, nothing counted"
ONE_KEY = "strongroom, 1 key"


def run(plan: Plan) -> Benchmark:
    return measured(plan, "verify", "SQLite", None, TARGETS)


def measured(plan: Plan, name: str, engine: str, store: str | None, targets: Mapping[int, float]) -> Benchmark:
    """The benchmark `name` on the store of this URL (None: SQLite in the plan's folder)."""
    many = 20 if plan.quick else MANY_KEYS
    admin_key = secrets.token_hex(24)
    many_keys = f"strongroom, {many:,} keys"
    labels = (
        f"POST /v1/keys/verify, cost {TOKENS} tokens against one rolling limit of 5 hours that never denies; "
        "every answer is checked to be 200 and valid.",
        "One uvicorn worker process (uvloop, httptools, no access log) each; the load generator is a process of its "
        "own: closed loop, keep-alive, one request in flight a connection.",
        f"strongroom: `strongroom serve` with its defaults, counts durable in {engine}; the caller is authorised by "
        "the administrator's key.",
        "floor: reads the body, json.loads, SHA-256 of the key, dict lookup, json.dumps of as large an answer. It "
        "authorises nobody, counts nothing and writes nothing.",
        "Not compared: TLS, a network, more than one process. There is no peer: we know of no Python server that "
        "answers only after the count is durable.",
    )
    with ExitStack() as stack:
        folder = Path(plan.folder)
        generator = stack.enter_context(Worker(load_generator))
        ours: Server | None = None
        why = ""
        keys = [f"sr_{secrets.token_hex(24)}" for _ in range(many)]
        try:
            plan.progress(f"{name}: starting strongroom, creating {many} keys")
            ours = stack.enter_context(strongroom_server(folder / "strongroom", admin_key, store))
            bodies = [{"name": f"bench {n}", "tenant": "bench", "limits": [LIMIT]} for n in range(many)]
            keys = create_keys(ours, admin_key, bodies)
        except BenchmarkError as error:
            why = str(error)
        floor = stack.enter_context(bare_server(folder / "bare", keys))

        def against(server: Server | None, keys: Sequence[str], connections: int) -> Callable[[float], Sample] | None:
            if server is None or (why and server is ours):
                return None
            host = f"{HOST}:{server.port}"
            requests = tuple(
                post("/v1/keys/verify", {"key": key, "cost": {"tokens": TOKENS}}, host=host, bearer=admin_key)
                for key in keys
            )
            return lambda seconds: generator(Load(HOST, server.port, requests, connections, seconds, server.pid))

        groups = []
        for connections in CONNECTIONS:
            contenders = (
                Contender(ONE_KEY, Role.OURS, against(ours, keys[:1], connections), why),
                Contender(FLOOR, Role.FLOOR, against(floor, keys, connections)),
                Contender(many_keys, Role.OURS, against(ours, keys, connections), why),
            )
            aims = tuple(
                Target(label, targets[connections], of_floor=True)
                for label in (ONE_KEY, many_keys)
                if connections in targets
            )
            groups.append(side_by_side(plan, f"{connections} connections", contenders, aims))
    return Benchmark(name, "requests/s", labels, tuple(groups))
