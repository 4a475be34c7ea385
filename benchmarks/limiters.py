"""The peers and the bare statement of `limits`: other ways to check a key or to count against a limit."""

# The peers come with the lock of `make bench`, not with that of `make lint`; both must pass.
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,misc", no-warn-unused-ignores

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import apsw
from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from starlette.requests import HTTPConnection

from .harness import Job, Round, Sample, closed_loop, tight_loop

LIMIT = 1_000_000_000
WINDOW_S = 18_000
Message = MutableMapping[str, Any]


def _sync(operation: Callable[[], object]) -> Round:
    async def measure(job: Job) -> Sample:
        return tight_loop(operation, job.seconds)

    return measure


@asynccontextmanager
async def django_api_key(folder: str) -> AsyncIterator[Round]:
    """For a `Worker`: djangorestframework-api-key's check, as its permission class makes it, on SQLite."""
    import django
    from django.conf import settings
    from django.core.management import call_command

    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"  # it is called on this thread, as a synchronous worker would
    os.makedirs(folder, exist_ok=True)
    settings.configure(
        INSTALLED_APPS=["rest_framework", "rest_framework_api_key"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{folder}/django.db"}},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
    )
    django.setup()
    call_command("migrate", verbosity=0)
    from rest_framework_api_key.models import APIKey

    _, key = APIKey.objects.create_key(name="bench")

    def check() -> None:
        assert APIKey.objects.is_valid(key)

    yield _sync(check)


@asynccontextmanager
async def moving_window(storage: str) -> AsyncIterator[Round]:
    """For a `Worker`: `limits`, its moving window, on a storage of its own (`memory://` or `redis://…`)."""
    from limits import RateLimitItemPerSecond
    from limits.storage import storage_from_string
    from limits.strategies import MovingWindowRateLimiter

    limiter = MovingWindowRateLimiter(storage_from_string(storage))
    item = RateLimitItemPerSecond(LIMIT, WINDOW_S)

    def hit() -> None:
        assert limiter.hit(item, "key")

    yield _sync(hit)


@asynccontextmanager
async def slow_api() -> AsyncIterator[Round]:
    """For a `Worker`: one request through FastAPI with slowapi's decorator, in memory, in process."""
    from slowapi import Limiter, _rate_limit_exceeded_handler
    from slowapi.errors import RateLimitExceeded

    limiter = Limiter(key_func=lambda request: request.headers.get("authorization", ""), strategy="moving-window")
    app = FastAPI()
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]

    @app.get("/")
    @limiter.limit(f"{LIMIT} per 5 hours")
    async def index(request: Request) -> Response:
        return Response(b"ok")

    yield through(app)


@asynccontextmanager
async def bare_fastapi() -> AsyncIterator[Round]:
    """For a `Worker`: the same request through FastAPI alone."""
    app = FastAPI()

    @app.get("/")
    async def index(request: Request) -> Response:
        return Response(b"ok")

    yield through(app)


@asynccontextmanager
async def dependent_fastapi() -> AsyncIterator[Round]:
    """For a `Worker`: the same request through FastAPI, with a dependency that does nothing."""
    app = FastAPI()

    async def nothing(connection: HTTPConnection) -> None:
        pass

    @app.get("/", dependencies=[Depends(nothing)])
    async def index(request: Request) -> Response:
        return Response(b"ok")

    yield through(app)


def through(app: Any, authorization: bytes = b"Bearer bench") -> Round:
    """Rounds of one request after another through an ASGI application, in process."""
    headers = [(b"host", b"api.example"), (b"authorization", authorization)]

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def ask() -> None:
        status = 0

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": "GET",
            "path": "/",
            "raw_path": b"/",
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": ("192.0.2.7", 4_000),
            "server": ("192.0.2.1", 80),
            "state": {},
        }
        await app(scope, receive, send)
        assert status == 200, status

    async def measure(job: Job) -> Sample:
        return await closed_loop(ask, job.seconds, job.callers)

    return measure


@asynccontextmanager
async def conditional_update(folder: str) -> AsyncIterator[Round]:
    """For a `Worker`: a naive limit, one conditional UPDATE a request in a transaction of its own (SQLite, WAL,
    synchronous=FULL), for a window that never ends."""
    os.makedirs(folder, exist_ok=True)
    connection = apsw.Connection(f"{folder}/naive.db")
    connection.execute("PRAGMA journal_mode = wal").fetchall()
    connection.execute("PRAGMA synchronous = full").fetchall()
    connection.execute("CREATE TABLE usage (key TEXT PRIMARY KEY, used INTEGER, at REAL)").fetchall()
    connection.execute("INSERT INTO usage VALUES ('key', 0, 0)").fetchall()

    def debit() -> None:
        connection.execute(
            "UPDATE usage SET used = used + 1, at = ? WHERE key = 'key' AND used + 1 <= ?", (time.time(), LIMIT)
        ).fetchall()
        assert connection.changes() == 1

    try:
        yield _sync(debit)
    finally:
        connection.close()
