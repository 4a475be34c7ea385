"""A Strongroom for threads: an event loop in a thread of its own, which WSGI applications and scripts call and wait on.

    with BlockingStrongroom("sqlite:///app.db") as room:
        issued = room.call(lambda inner: inner.keys.create(name="worker", tenant="acme"))
        answer = room.verify(issued.text)

Any thread may call.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, Unpack, overload

from .app import DEFAULT_STORE, OpenOptions, Strongroom
from .errors import ConfigError, Unavailable
from .keys import Keys

TIMEOUT_S = 30.0
"""How long a call waits for its answer."""
CLOSE_TIMEOUT_S = 30.0
P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound="BlockingStrongroom")


class _Open:
    """`open` of a room opens it; `open` of the class makes a room of a URL and opens that, as Strongroom.open does."""

    @overload
    def __get__(self, room: None, owner: type[BlockingStrongroom]) -> _OpenUrl: ...

    @overload
    def __get__(self, room: R, owner: type[BlockingStrongroom]) -> Callable[[], R]: ...

    def __get__(self, room: Any, owner: Any) -> Any:
        def of_class(
            url: str = DEFAULT_STORE, *, timeout_s: float = TIMEOUT_S, **options: Unpack[OpenOptions]
        ) -> BlockingStrongroom:
            """A room on the store at `url`, open. Raises what Strongroom.open raises."""
            made: BlockingStrongroom = owner(url, timeout_s=timeout_s, **options)
            return of_room(made)

        def of_room(one: R) -> R:
            one._opened()
            return one

        def open() -> Any:
            """Open the store; nothing if it is open. Raises what Strongroom.open raises."""
            return of_room(room)

        return of_class if room is None else open


class _OpenUrl(Protocol):
    def __call__(
        self, url: str = DEFAULT_STORE, *, timeout_s: float = TIMEOUT_S, **options: Unpack[OpenOptions]
    ) -> BlockingStrongroom: ...


def _waited_for(
    method: Callable[Concatenate[Keys, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[BlockingStrongroom, P], T]:
    """A method of `room.keys` as a method of the blocking room, with the same signature and description."""

    @wraps(method)
    def call(room: BlockingStrongroom, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return room.call(lambda inner: method(inner.keys, *args, **kwargs))

    return call


class BlockingStrongroom:
    """One store, opened in a thread. Any thread may call it, and any event loop may await `acall`.

    It is opened by `with`, by `open()`, or by the first call; it is closed at the end of the process at the latest.
    `BlockingStrongroom.open(url)` makes one that is open, as `Strongroom.open(url)` does for asyncio.
    A server that forks its workers must open it after the fork (the first call does), since threads do not survive it.
    `options` are those of Strongroom.open.
    """

    def __init__(
        self, url: str = DEFAULT_STORE, *, timeout_s: float = TIMEOUT_S, **options: Unpack[OpenOptions]
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._options = options
        self._lock = threading.Lock()
        self._running: _Running | None = None

    open = _Open()

    def close(self) -> None:
        """Finish the calls under way and close the store. The next call opens it again."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None and running.pid == os.getpid():
            atexit.unregister(self.close)
            running.stop()

    def __enter__(self) -> Self:
        self._opened()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, work: Callable[[Strongroom], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the room's own loop and wait for it: `call(lambda room: room.keys.get(id))`.

        Raises what it raises; Unavailable if there is no answer in time (it may still happen).
        """
        future = self._opened().submit(work)
        try:
            return future.result(self._timeout_s)
        except FutureTimeoutError:
            if future.done():  # the work's own
                raise
            future.cancel()
            raise Unavailable(f"no answer within {self._timeout_s:g} s", outcome="unknown") from None

    async def acall(self, work: Callable[[Strongroom], Coroutine[Any, Any, T]]) -> T:
        """`call` for another event loop: awaits, and blocks nothing once the store is open."""
        running = self._running
        if running is None or running.pid != os.getpid():
            running = await asyncio.to_thread(self._opened)
        return await asyncio.wrap_future(running.submit(work))

    verify = _waited_for(Keys.verify)
    record = _waited_for(Keys.record)

    def _opened(self) -> _Running:
        running = self._running
        if running is None:
            with self._lock:
                running = self._running
                if running is None:
                    running = self._running = _Running(self._url, self._options)
                    atexit.register(self.close)
        if running.pid != os.getpid():
            raise ConfigError(
                "the Strongroom was opened before this process was forked: open it in each worker (the first call does)"
            )
        return running


class _Running:
    """The thread, its loop, and the room that is open on it."""

    def __init__(self, url: str, options: OpenOptions) -> None:
        self.pid = os.getpid()
        self._opened: Future[Strongroom] = Future()
        self._calls: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(url, options), name="strongroom", daemon=True)
        self._thread.start()
        try:
            self._room = self._opened.result()
        except BaseException:
            self._thread.join()
            raise

    def submit(self, work: Callable[[Strongroom], Coroutine[Any, Any, T]]) -> Future[T]:
        try:
            return asyncio.run_coroutine_threadsafe(self._call(work), self._loop)
        except RuntimeError:
            raise Unavailable("the Strongroom is closed") from None

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(CLOSE_TIMEOUT_S)

    async def _call(self, work: Callable[[Strongroom], Coroutine[Any, Any, T]]) -> T:
        task = asyncio.current_task()
        if self._end.is_set() or task is None:
            raise Unavailable("the Strongroom is closed")
        self._calls.add(task)
        try:
            return await work(self._room)
        finally:
            self._calls.discard(task)

    def _run(self, url: str, options: OpenOptions) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(url, options))

    async def _serve(self, url: str, options: OpenOptions) -> None:
        try:
            async with Strongroom.open(url, **options) as room:
                self._opened.set_result(room)
                await self._end.wait()
                while self._calls:
                    await asyncio.wait(self._calls)
        except BaseException as error:
            if self._opened.done():
                raise
            self._opened.set_exception(error)
