"""One request of a connection while an ASGI application answers it."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from ..context import next_id
from ..errors import StrongroomError
from . import errors
from .errors import Message


class Flow(FlowControl):
    """Flow control that keeps reading paused while requests wait, even if the application wants more of a body."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Cycle(RequestResponseCycle):
    """One request answered by an ASGI application."""

    async def send(self, message: Any) -> None:
        if self.waiting_for_100_continue and not self.response_started:
            # The client may send its body or not, so the next bytes could be a body or a request: close.
            self.keep_alive = False
        await super().send(message)
        if self.response_complete:
            self.body = bytearray()

    async def send_500_response(self) -> None:
        status, headers, body = errors.response(StrongroomError(), next_id())
        self.keep_alive = False
        start: Message = {"type": "http.response.start", "status": status, "headers": headers}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})
