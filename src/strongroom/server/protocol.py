"""uvicorn's HTTP protocol: strict about valid requests, bounded (`arrival`), with a direct path for verifications.

A verification that arrives in one piece goes to `VerifyRoute.answer_directly`, and `direct` writes its answer. Every
other request, and a verification that the route cannot answer directly, goes to the ASGI application.

A connection answers its requests one after the other. Pipelined requests wait: at most PIECE_BYTES of them are parsed,
the rest of the input is kept unparsed, and the socket is not read until their turn. An invalid request is answered in
its turn too, and ends the connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, cast

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..context import next_id
from ..errors import StrongroomError
from . import errors, heads
from .arrival import Arrival
from .connections import MAX_TURNED_AWAY, Connections
from .cycles import Cycle, Flow
from .direct import VERIFY, Direct, KnownHeads, is_plain_verification
from .errors import HeadersTooLarge, MalformedRequest
from .heads import ALWAYS_ONCE, NEVER_TRAILERS, NOTED
from .outgoing import Outgoing
from .verify import Asgi, VerifyRoute

PIECE_BYTES = 1_024
"""The size of the pieces in which input is parsed. While a request waits for its turn, no further piece is parsed."""

_NOT_HTTP = "the request is not valid HTTP"
_NO_HEADS = KnownHeads()
"""For an application without a direct path: it never learns a head."""

# The part of a request that is expected next.
_NOTHING, _HEAD, _BODY = range(3)


class _Stop(Exception):
    """Stops the parser: the rest of the input is not parsed."""


class Protocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, connections: Connections | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._verify: VerifyRoute | None = getattr(self.app, "verify", None)
        self._heads: KnownHeads = getattr(self.app, "heads", _NO_HEADS)
        self._direct: Any = Direct(self)
        self._connections = connections
        self._peer: str | None = None
        self._entered = self._turned_away = False

        self._running: Any = None
        """The request that is answered now."""
        self._phase = _NOTHING
        self._keep = True
        """Whether another request may follow the current one."""
        self._last = False
        """Further input is dropped, not parsed."""
        self._problem: StrongroomError | None = None
        """The problem of the request that is parsed now."""
        self._error: StrongroomError | None = None
        """The connection's last answer, sent after all earlier answers."""
        self._noted: dict[bytes, bytes] = {}
        self._repeated = False
        self._whole: bytes | None = None
        """The received body of a verification that may take the direct path."""
        self._data: bytes | memoryview | None = None
        """The parsed bytes, if they begin with a request."""
        self._backlog: deque[memoryview] = deque()
        self._working_off = False

        self._arrival = Arrival(self.loop, self._overdue)
        self._may_linger = True

    # --- The connection ---

    def connection_made(self, transport) -> None:  # type: ignore[no-untyped-def]
        outgoing = Outgoing(transport, self.loop, self._linger)
        super().connection_made(outgoing)  # type: ignore[arg-type]  # Outgoing has the used part of a transport
        self.flow = Flow(cast("Any", outgoing))
        if self._connections is not None:
            try:
                self._peer = self._connections.enter(self.client[0] if self.client else None)
                self._entered = True
            except StrongroomError as error:
                self._turn_away(error)
                return
        self._arrival.await_rest()

    def _turn_away(self, error: StrongroomError) -> None:
        connections = cast(Connections, self._connections)
        self._turned_away = self._may_linger = connections.turned_away < MAX_TURNED_AWAY
        connections.turned_away += self._turned_away
        self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake all waiting tasks, and break every reference cycle of this connection. So its memory is free at once,
        not at the next garbage collection."""
        if self._connections is not None:
            if self._entered:
                self._connections.leave(self._peer)
            self._connections.turned_away -= self._turned_away
            self._entered = self._turned_away = False
        self.connections.discard(self)
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        self._backlog.clear()
        self.flow.resume_writing()
        self._arrival.end()
        self._outgoing.release()
        self._outgoing.close_now()
        self._last = True
        self._running = self._direct = self.cycle = self.parser = cast("Any", None)
        self._forget()

    def _forget(self) -> None:
        """Keep no data of an answered request."""
        self.headers = self.scope = self.cycle = cast("Any", None)
        self.url = b""
        self._noted = cast("Any", None)

    @property
    def _outgoing(self) -> Outgoing:
        return cast("Outgoing", self.transport)

    def shutdown(self) -> None:
        """Answer the current request, then close the connection: the server stops."""
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is None:
            self._outgoing.close_now()
        else:
            last.keep_alive = False

    # --- What is parsed ---

    def on_message_begin(self) -> None:
        self._phase = _HEAD
        self.url = b""
        self.headers = []
        self._noted = {}
        self._repeated = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if self._phase == _BODY:  # a trailer: nothing here reads one
            if name in NEVER_TRAILERS:
                self._wrong(f"found the header {name.decode()} after the body")
            return
        if name in NOTED:
            if name in self._noted:
                self._repeated = True
                if name in ALWAYS_ONCE:
                    self._wrong(f"found several headers {name.decode()}, expected one")
            self._noted[name] = value
        self.headers.append((name, value))

    def _wrong(self, text: str) -> None:
        self._problem = MalformedRequest(text)
        raise _Stop

    def on_headers_complete(self) -> None:
        if (
            self._running is None
            and self._verify is not None
            and not self.flow.write_paused
            and not self.pipeline
            and not self._repeated
            and is_plain_verification(self.url, self._noted, self.parser)
        ):
            self._whole = b""
        else:
            self._begin_asgi()
        self._phase = _BODY

    def _begin_asgi(self) -> None:
        """Give a request, before its body has arrived, to the application, now or in its turn."""
        parser: Any = self.parser
        version, method = parser.get_http_version(), parser.get_method()
        problem = heads.problem_of(version, method, self._noted, upgrades=parser.should_upgrade())
        if problem is not None:
            self._wrong(problem)
        self._keep = version == "1.1" and parser.should_keep_alive() and not parser.should_upgrade()
        expected = self._noted.get(b"expect", b"").lower() == b"100-continue" and version == "1.1"
        parsed: Any = httptools.parse_url(self.url)
        if parsed.path is None:
            self._wrong("the request names no path")
        scope = self._scope_of(method, parsed.path, parsed.query or b"", self.headers, version)
        self.cycle = cycle = self._cycle_of(scope, asyncio.Event(), expected, self._keep)
        if self._running is None and not self.pipeline and not self.flow.write_paused:
            self._start(cycle, self.app)
        else:
            self._hold()
            self.pipeline.appendleft((cycle, self.app))

    def _scope_of(self, *asked: Any) -> Any:
        """A request's ASGI scope."""
        scope = heads.asked_of(*asked)
        scope.update(
            asgi={"version": self.asgi_version, "spec_version": "2.3"},
            server=self.server,
            client=self.client,
            scheme=self.scheme,
            state=self.app_state.copy(),
        )
        return scope

    def _cycle_of(self, scope: Any, event: asyncio.Event, expects_continue: bool, keep_alive: bool) -> Cycle:
        return Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=event,
            expect_100_continue=expects_continue,
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )

    def _start(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        self._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._arrival.content(len(body))
        if self._whole is not None:
            self._whole += body
            return
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._phase = _NOTHING
        data, self._data = self._data, None
        body, self._whole = self._whole, None
        if body is not None:
            headers, noted = self.headers, self._noted
            if self._verify_directly(noted[b"authorization"], headers, body) and isinstance(data, bytes):
                self._heads.learn(
                    data, headers, noted, body
                )  # only known callers, so that strangers cannot fill the cache
            return
        if self._arrival.late_at is not None:
            self._arrival.complete()
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()
        if not self._keep:
            self._last = True
            raise _Stop

    def _verify_directly(self, authorization: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
        """Let the route answer a verification that has arrived whole; returns whether it did so without ASGI."""
        if self._arrival.late_at is not None:
            self._arrival.complete()
        direct = self._direct
        direct.receive(headers, body)
        self.cycle = self._running = direct
        if cast("VerifyRoute", self._verify).answer_directly(authorization, body, direct):
            return True
        direct.hand_on(self.app)
        return False

    def _in_pieces(self, body: bytes) -> None:
        """Take the ASGI path after all, because the body arrives in several pieces."""
        self._whole = None
        self._begin_asgi()
        if body:
            self._arrival.content(-len(body))  # on_body counts them again
            self.on_body(body)

    def start_whole(self, request: Direct, app: Asgi) -> None:
        """Let an ASGI application answer a verification that has arrived whole."""
        headers, body = request.take()
        scope = self._scope_of(b"POST", VERIFY, b"", headers, "1.1")
        event = asyncio.Event()
        event.set()
        cycle = self._cycle_of(scope, event, False, request.keep_alive)
        cycle.body += body
        cycle.more_body = False
        cycle.disconnected = request.disconnected
        if self.cycle is cast("Any", request):  # else the next request is the parser's current one already
            self.cycle = cycle
        self._start(cycle, app)

    # --- What comes in ---

    def data_received(self, data: bytes) -> None:
        if len(data) > PIECE_BYTES or self._last or self._backlog or self.pipeline:
            self._receive_more(data)
            return
        if self._phase == _NOTHING and self._running is None and not self.flow.write_paused:
            found = self._heads.find(data)
            if found is not None:
                head, body = found
                self._verify_directly(head.authorization, head.headers, body)
                return
        self._parse(data)

    def _parse(self, data: bytes | memoryview) -> None:
        self._data = data if self._phase == _NOTHING else None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError:
            if not self._last:
                self._refuse(self._problem or MalformedRequest(_NOT_HTTP))
            return
        if self._phase:
            self._bound(len(data))

    def _receive_more(self, data: bytes) -> None:
        """Handle input that is larger than a piece, arrives while requests wait, or must be dropped."""
        if self._last:
            self._drop(len(data))
            return
        view = memoryview(data)
        self._backlog.extend(view[at : at + PIECE_BYTES] for at in range(0, len(view), PIECE_BYTES))
        self._work_off()

    def _work_off(self) -> None:
        """Parse the kept input until a request must wait for its turn."""
        if self._working_off:
            return
        self._working_off = True
        try:
            while self._backlog and not self.pipeline and not self._last:
                self._parse(self._backlog.popleft())
        finally:
            self._working_off = False
        if self._last:
            self._drop(sum(map(len, self._backlog)))
            self._backlog.clear()
        if self._backlog or self.pipeline:
            self._hold()
        else:
            self._release()

    def _hold(self) -> None:
        self.flow.pause_reading()
        cast("Flow", self.flow).held = True

    def _release(self) -> None:
        cast("Flow", self.flow).held = False
        self.flow.resume_reading()

    def _bound(self, size: int) -> None:
        """Check the bounds of a request that has not arrived whole yet."""
        if self._phase == _HEAD:
            if not self._arrival.head_fits(size):
                self._refuse(HeadersTooLarge())
                return
        else:
            if not self._arrival.body_fits(size):
                self._refuse(MalformedRequest("the chunk extensions and trailers of the body are too large"))
                return
            if self._whole is not None:
                self._in_pieces(self._whole)
            if self.cycle.response_complete:
                self._drop(size)
        self._arrival.await_rest()

    def _drop(self, size: int) -> None:
        if not self._arrival.discard_fits(size):
            self._outgoing.close_now()

    # --- What goes out ---

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._running = None
        if self._outgoing.is_closing():
            return
        if self._phase == _NOTHING and not self.pipeline and not self._backlog and self._error is None:
            self._forget()
            self._arrival.look_again(self.timeout_keep_alive)
            if self.flow.read_paused:
                self._release()
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Start the next waiting request, if it is its turn."""
        self._outgoing.flush()  # may pause the writing: a client that does not read gets no further answers
        if self._running is None and not self.flow.write_paused and not self._outgoing.is_closing():
            if self.pipeline:
                self._start(*self.pipeline.pop())
            elif self._error is not None:
                self._answer_error(self._error)
                return
        if not self.pipeline:
            self._work_off()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._outgoing.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._outgoing.unwatch()
        self._go_on()

    def _refuse(self, error: StrongroomError) -> None:
        """Answer the current request with an error, in its turn, and end the connection."""
        if self._last or self._outgoing.is_closing():
            return
        self._last = True
        cycle: Any = self.cycle
        if self._whole is not None:
            self._whole = None
        elif self._phase == _BODY:
            if self.pipeline and self.pipeline[0][0] is cycle:
                self.pipeline.popleft()
            elif cycle.response_started:  # an answer has begun: no second one
                cycle.disconnected = True
                cycle.message_event.set()
                self.transport.close()
                return
            else:
                self._running = None
                cycle.disconnected = True
                cycle.message_event.set()
        self._error = error
        self._go_on()

    def _answer_error(self, error: StrongroomError) -> None:
        status, headers, body = errors.response(error, next_id())
        lines = b"".join(b"%s: %s\r\n" % header for header in (*self.server_state.default_headers, *headers))
        self._error = None
        if self._connections is not None:
            self._connections.answered(status)
        self.transport.write(b"%s%sconnection: close\r\n\r\n%s" % (STATUS_LINE[status], lines, body))
        self._phase = _BODY  # a body may still arrive
        self.transport.close()

    # --- Time ---

    def _overdue(self) -> None:
        if self._outgoing.is_closing() and not self._arrival.lingering:
            return
        if self._arrival.lingering:
            if not self._arrival.lingers_on():
                self._outgoing.close_now()
        elif self._running is None or (self._running is self.cycle and self._phase == _BODY):
            self._outgoing.close_now()
        else:  # the server is still working on the answer
            self._arrival.look_again(self.timeout_keep_alive)

    def _linger(self) -> bool:
        """Whether to read for a while before the close. A close with unread input resets the connection, and the client
        might never read the answer."""
        arrival = self._arrival
        nothing_unread = self._phase == _NOTHING and not (self._backlog or self.pipeline or arrival.discarded_bytes)
        if arrival.lingering or nothing_unread or not self._may_linger:
            return False
        arrival.linger()
        self._last = True
        self.pipeline.clear()
        self._backlog.clear()
        self._outgoing.half_close()
        if self._outgoing.get_write_buffer_size():
            self._outgoing.watch()
        self._release()
        return True


__all__ = ["Protocol"]
