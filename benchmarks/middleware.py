"""`middleware`: what verifying keys in process adds to a request, beside the same application without it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import ExitStack, asynccontextmanager
from itertools import cycle
from typing import Any, Literal

from strongroom import Strongroom
from strongroom.integrations.asgi import StrongroomMiddleware

from .harness import Benchmark, Job, Plan, Role, Round, Sample, Target, closed_loop, side_by_side, start

CALLERS = 32
OF_FLOOR = 0.06
"""Of the application's own rate. It answers at once, so this says how much longer the middleware takes than nothing."""
BARE = "bare ASGI application"
Message = MutableMapping[str, Any]


def run(plan: Plan) -> Benchmark:
    labels = (
        "One ASGI request after another in process: no server, no network. The application answers 2 bytes.",
        "strongroom: the same application in StrongroomMiddleware; one key with a rolling limit on requests that never "
        "denies; every answer is checked to be 200, and has the RateLimit headers but where it says without.",
        "leased: counts are debited in shares before they are spent; durable: each answer waits for its commit "
        f"(SQLite, WAL, synchronous=FULL), so it is measured with {CALLERS} callers that share commits.",
        "What the middleware adds is 1 / its rate - 1 / the bare rate.",
    )
    with ExitStack() as stack:
        leased = start(stack, plan, "leased", guarding, f"{plan.folder}/leased", "leased")
        durable = start(stack, plan, "durable", guarding, f"{plan.folder}/durable", "durable")
        alone = (
            leased.contender("strongroom, leased", Role.OURS, "guarded"),
            leased.contender("strongroom, leased, without RateLimit headers", Role.OURS, "plain"),
            leased.contender("room.keys.verify alone, leased", Role.OURS, "verify"),
            leased.contender(BARE, Role.FLOOR, "bare"),
        )
        together = (
            leased.contender("strongroom, leased", Role.OURS, "guarded", CALLERS),
            durable.contender("strongroom, durable", Role.OURS, "guarded", CALLERS),
            durable.contender("room.keys.verify alone, durable", Role.OURS, "verify", CALLERS),
            leased.contender(BARE, Role.FLOOR, "bare", CALLERS),
        )
        targets = [Target("strongroom, leased", of_floor=OF_FLOOR)]
        groups = (
            side_by_side(plan, "1 caller", alone, targets),
            side_by_side(plan, f"{CALLERS} callers", together, targets),
        )
    return Benchmark("middleware", "requests/s", labels, groups)


async def _app(scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Any]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def _receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


@asynccontextmanager
async def guarding(folder: str, limits: Literal["durable", "leased"]) -> AsyncIterator[Round]:
    """For a `Worker`. Jobs: `bare` (the application), `guarded` (in the middleware), `plain` (so, without RateLimit
    headers), `verify` (no ASGI at all)."""
    limit = {"resource": "requests", "limit": 1_000_000_000_000, "window": {"kind": "rolling", "seconds": 18_000}}
    async with Strongroom.open(f"sqlite:///{folder}.db", limits=limits) as room:
        issued = await room.keys.create(name="bench", limits=[limit])
        apps: dict[str, Callable[..., Awaitable[None]]] = {
            "bare": _app,
            "guarded": StrongroomMiddleware(_app, room=room),
            "plain": StrongroomMiddleware(_app, room=room, rate_limit_headers=False),
        }
        headers = [
            (b"host", b"api.example"),
            (b"user-agent", b"bench"),
            (b"accept", b"*/*"),
            (b"authorization", f"Bearer {issued.text}".encode()),
        ]
        paths = cycle(["/items/1", "/items/2"])

        def asking(app: Callable[..., Awaitable[None]]) -> Callable[[], Awaitable[None]]:
            async def ask() -> None:
                status = 0

                async def send(message: Message) -> None:
                    nonlocal status
                    if message["type"] == "http.response.start":
                        status = message["status"]

                scope = {
                    "type": "http",
                    "method": "GET",
                    "path": next(paths),
                    "query_string": b"",
                    "headers": headers,
                    "client": ("192.0.2.7", 4_000),
                    "state": {},
                }
                await app(scope, _receive, send)
                assert status == 200, status

            return ask

        async def verify() -> None:
            answer = await room.keys.verify(issued.text, ip="192.0.2.7", route="GET /items/1")
            assert answer.valid, answer

        async def measure(job: Job) -> Sample:
            operation = verify if job.what == "verify" else asking(apps[job.what])
            return await closed_loop(operation, job.seconds, job.callers)

        yield measure
