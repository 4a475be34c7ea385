"""A stream of one collection's changes, which continues after a lost connection."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Self

from ...errors import StrongroomError
from .._aio import sleep
from .._events import READY, Parser, Resumption
from .._wire import may_resume
from ..errors import NoAnswer
from ..models import Change
from .transport import AsyncTransport

SILENCE_S = 45.0
"""The server sends at least every 15 s. After this long without a byte the connection counts as lost."""
GIVE_UP_AFTER_S = 300.0
MOST_WAIT_S = 30.0


class AsyncWatch:
    """An iterator of changes. As a context manager it starts at the beginning of the block, so no change within the
    block is missed, and closes its connection at the end."""

    def __init__(
        self, transport: AsyncTransport, at: Mapping[str, str], cursor: str | None, give_up_after_s: float
    ) -> None:
        self._http = transport
        self._at = at
        self._give_up_after_s = give_up_after_s
        self._stands = Resumption(cursor)
        self._changes = self._follow()
        self._first: Change | None = None

    @property
    def cursor(self) -> str | None:
        """The cursor for a later watch: after the returned changes, the last of which may come again."""
        return self._stands.cursor

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        change, self._first = self._first, None
        while change is None:
            change = await anext(self._changes)
        return change

    async def __aenter__(self) -> Self:
        self._first = await anext(self._changes)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the stream."""
        await self._changes.aclose()

    async def _follow(self) -> AsyncGenerator[Change | None]:
        """The changes; None at each new connection."""
        alive_at = time.monotonic()
        tried = 0
        while True:
            parser = Parser()
            headers = {"Last-Event-ID": self._stands.cursor} if self._stands.cursor is not None else {}
            try:
                async with self._http.stream(
                    "/v1/tenants/{tenant}/{collection}:watch", self._at, headers, SILENCE_S
                ) as chunks:
                    async for chunk in chunks:
                        alive_at = time.monotonic()
                        tried = 0
                        for event in parser.feed(chunk):
                            change = self._stands.take(event)
                            if change is not None or event.name == READY:
                                yield change
                failure: StrongroomError = NoAnswer("the stream ended", outcome="unknown")
            except StrongroomError as error:
                if not may_resume(error):
                    raise
                failure = error
            wait_s = self._http.retries.backoff_s(tried)
            told_s = failure.details.get("retry_after_s", (parser.retry_ms or 0) / 1_000)
            wait_s = min(wait_s + told_s, MOST_WAIT_S)
            if time.monotonic() + wait_s > alive_at + self._give_up_after_s:
                raise failure
            await sleep(wait_s)
            tried += 1
