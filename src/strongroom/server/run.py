"""Runs the server: `serve(settings)` listens, opens the store, answers until a signal stops it, closes.

Without the database the server starts and answers 503 until the database is reachable (`starting.py`). A wrong
configuration stops the start at once.

A stop loses nothing that was acknowledged. SIGTERM (or Ctrl-C) ends the listening, lets requests in flight finish, ends
the streams, writes the ledger's pending changes, and closes the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import uvicorn

from .. import __version__
from ..app import Strongroom
from ..config import Settings, load, warnings
from ..errors import ConfigError, StrongroomError, Unavailable
from ..served_entities import served_entities
from ..storage import store_for
from ..storage.url import shown_url
from . import adminkey, logs, tracing
from .app import Application, Bounds, build
from .connections import Connections, descriptors
from .protocol import Protocol
from .starting import Late, until_open
from .workers import supervise

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

EXIT_STOPPED = 0
EXIT_FAILED = 1
EXIT_WRONG_CALL = 2
COLLECT_AFTER = 50_000
"""New container objects before a garbage collection. Python's 700 means several collections for each page of keys, and
then full collections, which took 170 ms with 20,000 keys in memory. Only reference cycles wait, at most some MB."""
BACKLOG = 2_048
KEEP_ALIVE_S = 30
RESERVED_DESCRIPTORS = 256
"""Open files for the store (beside its connections), webhooks, logs and leases."""
STOP_SLACK_S = 5
"""Time to close the store, after the time for the requests in flight."""
_log = logging.getLogger("strongroom.server")
T = TypeVar("T")


class CannotListen(StrongroomError):
    """The server cannot listen at its address."""

    code = "cannot_listen"


def serve(settings: Settings, *, announce: Callable[[str], None] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status: 0 stopped, 1 could not run, 2 wrongly configured.

    The reason for 1 and 2 is one sentence on standard error. `announce` receives the text for standard output: the
    administrator's key of a first start.
    """
    _configure_logs(settings)
    try:
        for warning in warnings(settings):
            _log.warning(warning)
        served_entities(settings.entities)
        with contextlib.closing(_listen(settings.host, settings.port)) as listener:
            if settings.workers == 1:
                _run(_work(settings, listener, announce=announce or _print))
            else:
                prepared = _run(_prepared(settings, announce or _print))
                # Workers start as new processes and do not inherit a redirected sys.stdout.
                speak = None if prepared else _print_apart if sys.stdout is sys.stderr else _print
                with tempfile.TemporaryDirectory(prefix="strongroom-metrics-") as metrics_folder:
                    target = functools.partial(_worker, settings, os.getpid(), speak, metrics_folder)
                    supervise(target, listener, settings.workers, settings.stop_timeout_s + STOP_SLACK_S)
    except StrongroomError as error:
        return _said(error)
    return EXIT_STOPPED


def _configure_logs(settings: Settings) -> None:
    logs.configure(settings.log_level, format=settings.log_format, project=settings.google_cloud_project_id)


def _said(error: StrongroomError) -> int:
    print(f"strongroom: {error.message}", file=sys.stderr, flush=True)
    return EXIT_WRONG_CALL if isinstance(error, ConfigError) else EXIT_FAILED


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = {
            errno.EADDRINUSE: "another program listens there; stop it, or choose another with STRONGROOM_PORT",
            errno.EACCES: "this needs a permission that the program does not have; choose a port from 1024 on",
            errno.EADDRNOTAVAIL: "this machine has no such address; choose another with STRONGROOM_HOST",
        }.get(getattr(error, "errno", None) or 0, str(error))
        raise CannotListen(f"cannot listen at {host}:{port}: {reason}") from None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _print(text: str) -> None:
    print(text, flush=True)


def _print_apart(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(work)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # uvloop does not exist on Windows
        return None
    return uvloop.new_event_loop


@contextlib.asynccontextmanager
async def _opened(settings: Settings, spans: TracerProvider | None = None) -> AsyncIterator[Strongroom]:
    async with Strongroom.open(
        settings.store_url,
        entities=served_entities(settings.entities),
        peppers=settings.pepper_texts,
        journal_days=settings.journal_days,
        archive=settings.archive,
        cache=settings.cache_url,
        limits=settings.limits,
        lease_s=settings.lease_s,
        lease_folder=settings.lease_dir,
        sign_in=settings.sign_in,
        signing_key=settings.journal_signing_key,
        witnesses=settings.witnesses,
        tracer_provider=spans,
    ) as room:
        yield room


async def _prepared(settings: Settings, announce: Callable[[str], None]) -> bool:
    """Prepare the schema and the administrator's key once, before several workers start. False if the database is
    unreachable: each worker then does this later."""
    try:
        async with _opened(settings) as room:
            await _ensure_admin(settings, room, announce)
    except Unavailable as error:
        if not _may_come_back(settings):
            raise
        _log.warning("the store cannot be reached, starting without it: %s", error)
        return False
    return True


def _may_come_back(settings: Settings) -> bool:
    """Whether the store is a database server. An embedded store that cannot be opened needs the operator."""
    return not store_for(settings.store_url).capabilities.embedded


async def _ensure_admin(settings: Settings, room: Strongroom, announce: Callable[[str], None]) -> None:
    given = settings.admin_key.get_secret_value() if settings.admin_key is not None else None
    try:
        made = await adminkey.ensure(room, given)
    except Unavailable:
        if room.database.writes.refusal is None:
            raise
        _log.warning("the administrator's key was not checked: this store takes no writes")
        return
    if made is not None:
        announce(f"The administrator's key, shown this once; keep it:\n{made}")


def _worker(
    settings: Settings,
    parent: int,
    announce: Callable[[str], None] | None,
    metrics_folder: str,
    listener: socket.socket,
) -> None:
    """One of several processes. It stops when its parent is gone, because a killed parent cannot tell it to stop."""
    _configure_logs(settings)
    try:
        _run(_work(settings, listener, announce=announce, parent=parent, metrics_folder=metrics_folder))
    except StrongroomError as error:
        sys.exit(_said(error))


def collect_rarely() -> None:
    """Keep garbage collections short and rare, once everything is loaded.

    Objects that exist now are frozen. Otherwise a full collection walks through all of them while every answer waits
    (50 ms at the 99th percentile of pages of keys). The threshold is above the objects of one page or batch, which are
    not garbage while it is built.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])


async def _work(
    settings: Settings,
    listener: socket.socket,
    *,
    announce: Callable[[str], None] | None = None,
    parent: int | None = None,
    metrics_folder: str | None = None,
) -> None:
    connections = _connections(settings)
    async with contextlib.AsyncExitStack() as stack:
        spans = tracing.provider() if tracing.wanted() else None
        traces = spans is not None or settings.log_format == "cloud-logging"
        requests = tracing.Tracing(spans) if traces else None
        if requests is not None:
            stack.callback(requests.close)

        async def attempt() -> Application:
            async with contextlib.AsyncExitStack() as opening:
                room = await opening.enter_async_context(_opened(settings, spans))
                if announce is not None:
                    await _ensure_admin(settings, room, announce)
                await stack.enter_async_context(opening.pop_all())
            bounds = Bounds(settings.max_body_bytes, settings.max_concurrency, settings.max_watchers)
            application = build(
                room,
                bounds,
                access_log=settings.access_log,
                leak_keys=settings.leak_keys,
                proxies=settings.proxies,
                tracing=requests,
            )
            connections.measured(application.services.metrics)
            if metrics_folder is not None:
                shared = application.services.metrics.share(metrics_folder)
                shared.start()
                stack.push_async_callback(shared.close)
            collect_rarely()
            return application

        try:
            server = _Server(settings, await attempt(), connections, parent)
        except Unavailable as error:
            if not _may_come_back(settings):
                raise
            _log.warning("the store cannot be reached, starting without it: %s", error)
            late = Late(store_for(settings.store_url).capabilities.name)
            await _Server(settings, late, connections, parent).serve_late(late, until_open(attempt), listener)
        else:
            await server.serve(sockets=[listener])


def _connections(settings: Settings) -> Connections:
    """The configured number of connections, if the system has enough descriptors beside the store's."""
    reserved = RESERVED_DESCRIPTORS + settings.db_max_connections
    most, per_peer = settings.max_connections, settings.max_peer_connections
    found = descriptors(most + reserved)
    if found < most + reserved:
        most = max(found // 4, found - reserved)
        _log.warning(
            "STRONGROOM_MAX_CONNECTIONS: %d, but at most %d are accepted: the system allows this process %d open files",
            settings.max_connections,
            most,
            found,
        )
    # One peer must not take all places, unless the settings allow it.
    per_peer = min(per_peer, most * 3 // 4) if per_peer < settings.max_connections else per_peer
    return Connections(most, per_peer, settings.proxies)


class _Server(uvicorn.Server):
    """uvicorn's server. On a signal it returns instead of raising the signal again, so that the store is closed."""

    def __init__(
        self, settings: Settings, application: Application | Late, connections: Connections, parent: int | None
    ) -> None:
        config = uvicorn.Config(
            application,
            http=cast("Any", functools.partial(Protocol, connections=connections)),
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.stop_timeout_s,
        )
        super().__init__(config)
        self._application = application
        self._parent = parent
        self._settings = settings

    async def serve_late(self, late: Late, opening: Coroutine[Any, Any, Application], listener: socket.socket) -> None:
        """Serve, and switch to the application once the store can be opened. Raises a permanent failure to open."""

        async def switch() -> None:
            try:
                application = await opening
            except BaseException:
                self.should_exit = True
                raise
            late.application = application
            self.config.loaded_app = application  # new connections skip Late
            _log.info("the store was reached")

        task = asyncio.create_task(switch())
        try:
            await self.serve(sockets=[listener])
        finally:
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            _log.info(
                "listening at %s (strongroom %s, store %s, limits %s)",
                *(_address(listener), __version__, shown_url(self._settings.store_url), self._settings.limits),
                extra={"pid": os.getpid()},
            )

    async def on_tick(self, counter: int) -> bool:
        orphaned = self._parent is not None and os.getppid() != self._parent
        return await super().on_tick(counter) or orphaned

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._application.close()
        await super().shutdown(sockets)


def main() -> int:
    """`python -m strongroom.server.run`: serve with the settings from the environment."""
    try:
        return serve(load())
    except StrongroomError as error:
        return _said(error)


if __name__ == "__main__":
    sys.exit(main())
