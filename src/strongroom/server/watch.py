"""Streams the changes of one collection as server-sent events: resumable, bounded, each change checked by the rules."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec
from fastapi import Request, Response

from ..context import Context, utc_from_us
from ..cooperative import Slices
from ..entities import Entity
from ..errors import Gone, InvalidInput, Problem, StrongroomError, Unavailable
from ..storage.port import ChangesPage
from .auth import Scope, authorization
from .errors import Message, Send
from .services import Services
from .verify import Receive
from .visible import Seen, View
from .wire import caller_of

HEARTBEAT_S = 15.0
CHECK_EVERY_S = 0.5
"""How often a stream's caller is authenticated anew: so soon a revoked key and an expired token end a quiet stream."""
SEND_TIMEOUT_S = 30.0
"""A client that reads nothing for this long is disconnected; it can resume after its last event."""
RETRY_MS = 2_000
_encode = msgspec.json.Encoder().encode


async def watch(services: Services, cls: type[Entity], request: Request, context: Context) -> Response:
    """A started stream. Raises the errors of the call here, before the answer begins."""
    for name in request.query_params:
        if name != "cursor":
            raise InvalidInput([Problem(name[:128], "is not a known parameter; expected cursor")])
    after = request.headers.get("last-event-id") or request.query_params.get("cursor") or "end"
    await services.room.database.authorize(context, "list", cls.__collection__)
    stream = _Stream(services, cls, context, request.scope)
    who = services.enter_watcher(caller_of(request))
    pages = stream.pages(after)
    try:
        first = await anext(pages)
    except BaseException as error:
        services.leave_watcher(who)
        if isinstance(error, InvalidInput):
            raise InvalidInput([Problem("cursor", "is not a cursor of this stream: start without a cursor")]) from None
        raise
    return EventStream(stream, after, pages, first, who)


class _Stream:
    """One watcher's view, and the format of its events."""

    def __init__(self, services: Services, cls: type[Entity], context: Context, scope: Mapping[str, Any]) -> None:
        self.services = services
        self._view = View(services.room.database, cls.__collection__)
        self._context = context
        self._scope = scope
        self._header = authorization(scope["headers"])

    async def events(self, page: ChangesPage) -> bytes:
        """The changes of a page as events. Only the last event has the page's cursor. So a client that lost the
        connection within a page gets the first changes of the page again, and misses none."""
        await self.still_allowed()
        texts = []
        slices = Slices()
        for seen in await self._view.of(self._context.at_now(), page):
            await slices.pause()
            texts.append(_event(seen))
        if not texts:
            # An id without data only moves the client's cursor: else a resumed stream would read this page again.
            return b": \nid: %s\n\n" % page.cursor.encode()
        return b"\n\n".join(texts) + b"\nid: %s\n\n" % page.cursor.encode()

    def pages(self, after: str) -> AsyncGenerator[ChangesPage, None]:
        """The tenant's records after a cursor, in pages."""
        return self.services.room.feed.follow(self._context.tenant or "", after, heartbeat_s=HEARTBEAT_S)

    async def still_allowed(self) -> None:
        """Raise unless the key is still enabled, or the token still good, and the caller may still read."""
        caller = await self.services.authenticator.caller(self._header, self._scope)
        caller.needs(Scope.READ)

    async def refused(self) -> None:
        """Wait until the caller is refused, and raise the reason."""
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            with contextlib.suppress(Unavailable):  # nothing can be delivered now either; the next page will tell
                await self.still_allowed()


def _event(seen: Seen) -> bytes:
    record = seen.record
    data: dict[str, Any] = {
        "id": record.entity_id,
        "action": seen.action,
        "version": record.version,
        "at": utc_from_us(record.at_us),
    }
    if seen.reason is not None:
        data["reason"] = seen.reason
    else:
        data |= {
            "actor": record.actor,
            "request_id": record.request_id,
            "before": seen.before,
            "after": seen.after,
        }
    return b"event: %s\ndata: %s" % (seen.action.encode(), _encode(data))


class EventStream(Response):
    """The ASGI answer. It ends when the client disconnects, the server stops, or the caller loses access."""

    media_type = "text/event-stream"

    def __init__(
        self, stream: _Stream, after: str, pages: AsyncGenerator[ChangesPage, None], first: ChangesPage, who: str
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._stream = stream
        self._after = after
        self._pages = pages
        self._first = first
        self._who = who

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        services = self._stream.services
        headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        waits: list[asyncio.Task[Any]] = []
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            waits = [
                asyncio.ensure_future(wait)
                for wait in (self._pump(send), _gone(receive), services.closing.wait(), self._stream.refused())
            ]
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                wait.result()
        except (StrongroomError, TimeoutError):
            pass  # access lost, or a client that does not read: the stream ends, and a resuming client gets the reason
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
            await self._pages.aclose()
            services.leave_watcher(self._who)
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b""})

    async def _pump(self, send: Send) -> None:
        page = self._first
        cursor = self._after if page.records else page.cursor
        ready = (RETRY_MS, cursor.encode(), _encode({"cursor": cursor}))
        await _write(send, b"retry: %d\nevent: ready\nid: %s\ndata: %s\n\n" % ready)
        while True:
            try:
                if page.records:
                    await _write(send, await self._stream.events(page))
                page = await anext(self._pages)
            except Gone as error:
                page = await self._reset(send, error)
                continue
            if not page.records:
                await self._stream.still_allowed()
                await _write(send, b": \nid: %s\n\n" % page.cursor.encode())

    async def _reset(self, send: Send, error: Gone) -> ChangesPage:
        """Continue at the current end of the journal, and report that changes were missed."""
        await self._pages.aclose()
        self._pages = self._stream.pages("end")
        page = await anext(self._pages)
        data = {"cursor": page.cursor, "reason": error.message}
        await _write(send, b"event: reset\nid: %s\ndata: %s\n\n" % (page.cursor.encode(), _encode(data)))
        return page


async def _write(send: Send, body: bytes) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


__all__ = ["EventStream", "watch"]
