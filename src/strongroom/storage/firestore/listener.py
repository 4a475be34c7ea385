"""A native listener on the journal's heads: it wakes the followers of the journal on every node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from ...errors import StrongroomError
from .client import ListenRequest, Wire, pause
from .journal import Journal
from .paths import HEADS, Paths, last_of

MAX_PAUSES = 7
"""The pauses between attempts to listen grow up to this step."""
_log = logging.getLogger(__name__)


class Listener:
    """One stream for all callbacks, opened with the first and again whenever it breaks."""

    def __init__(self, wire: Wire, paths: Paths, journal: Journal) -> None:
        self._wire = wire
        self._paths = paths
        self._journal = journal
        self._callbacks: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        self.is_live = False
        """Whether Firestore has sent all heads on the present stream. It says nothing of a stream that went silent."""

    def add(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        task, self._task = self._task, None
        self._callbacks = []
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _follow(self) -> None:
        attempt = 0
        while True:
            try:
                async for answer in self._wire.listen(self._requests()):
                    attempt = 0
                    self._take(answer)
            except StrongroomError as error:
                _log.info("the listener ended and begins again: %s", error.message)
            except Exception:
                _log.exception("the listener ended with an unexpected error and begins again")
            finally:
                self.is_live = False
                self._journal.forget_heads()
            await pause(min(attempt, MAX_PAUSES))
            attempt += 1

    async def _requests(self) -> AsyncIterator[Any]:
        request = ListenRequest(database=self._paths.root)
        request.add_target.target_id = 1
        request.add_target.query.parent = self._paths.documents
        request.add_target.query.structured_query.from_.add().collection_id = HEADS
        yield request
        await asyncio.Event().wait()  # the stream stays open until it is cancelled

    def _take(self, answer: Any) -> None:
        kind = answer.WhichOneof("response_type")
        if kind == "document_change":
            document = answer.document_change.document
            self._journal.saw_head(int(last_of(document.name)), document)
        elif kind == "target_change":
            change = answer.target_change
            if change.target_change_type in (_REMOVE, _RESET):
                self.is_live = False
            elif change.target_change_type == _CURRENT:
                self.is_live = True
            if change.target_change_type != _NO_CHANGE or not change.HasField("read_time"):
                return
            for callback in self._callbacks:
                callback()


_NO_CHANGE, _REMOVE, _CURRENT, _RESET = 0, 2, 3, 4
