"""Background work on keys: the rotations that are due, and the removal for good of what was deleted long enough ago."""

from __future__ import annotations

import asyncio
import logging

from ..clock import Clock
from ..context import system_context, utc_from_us
from ..database import Database
from ..entities import Query, Where
from ..errors import Conflict, NotFound
from ..jobs import Turn
from ..jobs.maintenance import Job
from .model import ApiKey
from .service import Keys

EVERY_S = 30.0
"""A rotation, or a removal, happens so much later than it is due at most, while any node runs."""
PAGE = 100
AT_ONCE = 20
_log = logging.getLogger(__name__)


class KeyWork:
    """Does what keys are due for, each by a commit of its own that carries the lease."""

    def __init__(self, keys: Keys, database: Database, clock: Clock) -> None:
        self._keys = keys
        self._database = database
        self._clock = clock

    @property
    def job(self) -> Job:
        return Job("keys", EVERY_S, self.run)

    async def run(self, turn: Turn) -> None:
        """Do all that is due now. What is done is not due any more, so a run that was broken off needs no position."""
        due = Query(Where("due_at", "<=", utc_from_us(self._clock.now_us())), ("due_at",), PAGE)
        cursor: str | None = None
        rotated = removed = 0
        while True:
            page = await self._database.find(system_context(), ApiKey, due, cursor)
            for start in range(0, len(page.items), AT_ONCE):
                keys = page.items[start : start + AT_ONCE]
                results = await asyncio.gather(*(self._do(key, turn) for key in keys), return_exceptions=True)
                for key, result in zip(keys, results, strict=True):
                    # A key that was changed meanwhile is looked at again in the next run; one that was removed is gone.
                    # If it is the lease that is lost, saving the position tells.
                    if isinstance(result, BaseException):
                        if not isinstance(result, Conflict | NotFound):
                            raise result
                    elif result and key.deleted_at is None:
                        rotated += 1
                    elif result:
                        removed += 1
                await turn.save(None)
            cursor = page.next_cursor
            if cursor is None:
                break
        if rotated or removed:
            _log.info("rotated %d keys, whose texts wait to be claimed, and removed %d for good", rotated, removed)

    async def _do(self, key: ApiKey, turn: Turn) -> bool:
        if key.deleted_at is not None:
            return await self._keys.purge_due(key.id, turn.guard)
        return await self._keys.rotate_due(key.id, turn.guard)
