"""A stream of one collection's changes as server-sent events, resumable, bounded, and asked of the rules each time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import Request, Response

from ..context import Context, utc_from_us
from ..entity import Entity
from ..errors import InvalidInput, Problem, StrongroomError
from ..fairness import Slices
from ..storage.port import ChangesPage, Record
from ..transaction import is_expired
from .auth import Scope, authorization
from .errors import Message, Send
from .services import Services
from .verify import Receive

HEARTBEAT_S = 15.0
SEND_TIMEOUT_S = 30.0
"""A reader that takes nothing for this long is dropped; it can resume from the last event it has."""
RETRY_MS = 2_000
_ACTIONS = {"create": "create", "update": "update", "add": "update", "delete": "delete", "expire": "delete"}
_encode = msgspec.json.Encoder().encode


async def watch(services: Services, cls: type[Entity], request: Request, context: Context) -> Response:
    """The stream, begun: what is wrong with the call is raised here, before anything is answered."""
    for name in request.query_params:
        if name != "cursor":
            raise InvalidInput([Problem(name[:128], "is not a known parameter; expected cursor")])
    after = request.headers.get("last-event-id") or request.query_params.get("cursor") or "end"
    await services.room.database.authorize(context, "list", cls.__collection__)
    services.enter_watcher()
    pages = services.room.feed.follow(context.tenant or "", after, heartbeat_s=HEARTBEAT_S)
    try:
        first = await anext(pages)
    except BaseException as error:
        services.leave_watcher()
        if isinstance(error, InvalidInput):
            raise InvalidInput([Problem("cursor", "is not a cursor of this stream: begin again without it")]) from None
        raise
    return EventStream(_Stream(services, cls, context, authorization(request.scope["headers"])), after, pages, first)


class _Stream:
    """What one watcher may see, and how it is written."""

    def __init__(self, services: Services, cls: type[Entity], context: Context, header: bytes | None) -> None:
        self.services = services
        self._database = services.room.database
        self._cls = cls
        self._collection = cls.__collection__
        self._context = context
        self._header = header

    async def events(self, page: ChangesPage) -> bytes:
        """A page's changes as events. The last carries the page's cursor, which a client resumes from: one that lost
        the connection in the midst of a page gets its first changes again, and misses none."""
        await self._still_allowed()
        texts = []
        slices = Slices()
        for record in page.records:
            await slices.pause()
            text = await self._event(record)
            if text is not None:
                texts.append(text)
        if not texts:
            # An id without data moves the client's cursor and is not an event: nothing is read twice for nothing.
            return b": \nid: %s\n\n" % page.cursor.encode()
        return b"\n\n".join(texts) + b"\nid: %s\n\n" % page.cursor.encode()

    async def _still_allowed(self) -> None:
        """The key may have been disabled, or have lost its permission, since the stream began."""
        caller = await self.services.authenticator.caller(self._header)
        caller.needs(Scope.READ)

    async def _event(self, record: Record) -> bytes | None:
        if record.collection != self._collection.name or record.action not in _ACTIONS:
            return None
        context = self._context.at_now()
        document = await self._database.load(context, self._collection, record.entity_id)
        if is_expired(self._collection, document, context.now):
            document = None
        visible = document if document is not None else record.before or record.after
        if not self._database.decide(context, "get", self._collection, record.entity_id, visible).allowed:
            return None
        data = {
            "id": record.entity_id,
            "action": _ACTIONS[record.action],
            "version": record.version,
            "at": utc_from_us(record.at_us),
            "actor": record.actor,
            "request_id": record.request_id,
            "before": record.before,
            "after": record.after,
        }
        return b"event: %s\ndata: %s" % (_ACTIONS[record.action].encode(), _encode(data))


class EventStream(Response):
    """The ASGI answer. It ends when the client goes, when the server stops, or when the caller may no longer see it."""

    media_type = "text/event-stream"

    def __init__(
        self, stream: _Stream, after: str, pages: AsyncGenerator[ChangesPage, None], first: ChangesPage
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._stream = stream
        self._after = after
        self._pages = pages
        self._first = first

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        services = self._stream.services
        headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        waits: list[asyncio.Task[Any]] = []
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            waits = [
                asyncio.ensure_future(wait) for wait in (self._pump(send), _gone(receive), services.closing.wait())
            ]
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                wait.result()
        except (StrongroomError, TimeoutError):
            pass  # no longer allowed, or it reads nothing: the stream ends, and a client that resumes is told why
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
            await self._pages.aclose()
            services.leave_watcher()
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b""})

    async def _pump(self, send: Send) -> None:
        page = self._first
        cursor = self._after if page.records else page.cursor
        ready = (RETRY_MS, cursor.encode(), _encode({"cursor": cursor}))
        await _write(send, b"retry: %d\nevent: ready\nid: %s\ndata: %s\n\n" % ready)
        while True:
            if page.records:
                await _write(send, await self._stream.events(page))
            page = await anext(self._pages)
            if not page.records:
                await self._stream._still_allowed()
                await _write(send, b": \nid: %s\n\n" % page.cursor.encode())


async def _write(send: Send, body: bytes) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


__all__ = ["EventStream", "watch"]
