"""Background jobs on keys: scheduled rotations, the final removal of deleted keys, and the roll-up of usage."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..clock import Clock
from ..context import system_context, utc_from_us
from ..database import Database
from ..entities import MAX_IN, Query, Where
from ..errors import Conflict, NotFound, StrongroomError
from ..jobs import AcquiredLease
from ..jobs.maintenance import Job
from ..limits import ACTIVE_US, KeyUsage
from ..storage.port import Operation, Patch
from .model import ApiKey
from .service import Keys

EVERY_S = 30.0
"""A rotation or a removal happens at most this long after it is due, while any node runs."""
PAGE = 100
AT_ONCE = 20
ROLL_UP_EVERY_S = 60.0
USAGE_PAGE = 200
OVERLAP_US = 2 * ACTIVE_US
"""Each roll-up looks again at usage that was decided this long before the last: it may have been committed later."""
MAX_AT_END = 200
"""Keys whose use a process copies when it ends: the keys that it used for the first time most recently."""
AT_END_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)


def key_jobs(keys: Keys, database: Database, clock: Clock) -> list[Job]:
    """The key jobs, which all nodes share."""
    return [
        Job("keys", EVERY_S, DueKeys(keys, database, clock).run),
        Job("usage-roll-up", ROLL_UP_EVERY_S, RollUp(database, clock).run),
    ]


class DueKeys:
    """Does the work that keys are due for, each by a commit of its own under the job lease."""

    def __init__(self, keys: Keys, database: Database, clock: Clock) -> None:
        self._keys = keys
        self._database = database
        self._clock = clock

    async def run(self, lease: AcquiredLease) -> None:
        """Do all that is due now. Work that is done is not due any more, so a run that was broken off needs no
        position."""
        due = Query(Where("due_at", "<=", utc_from_us(self._clock.now_us())), ("due_at",), PAGE)
        cursor: str | None = None
        rotated = removed = 0
        while True:
            page = await self._database.find(system_context(), ApiKey, due, cursor)
            for start in range(0, len(page.items), AT_ONCE):
                keys = page.items[start : start + AT_ONCE]
                results = await asyncio.gather(*(self._do(key, lease) for key in keys), return_exceptions=True)
                for key, result in zip(keys, results, strict=True):
                    # The next run looks again at a key that was changed meanwhile, and a removed key needs no work. If
                    # the job lease is lost, saving the position raises.
                    if isinstance(result, BaseException):
                        if not isinstance(result, Conflict | NotFound):
                            raise result
                    elif result and key.deleted_at is None:
                        rotated += 1
                    elif result:
                        removed += 1
                await lease.save(None)
            cursor = page.next_cursor
            if cursor is None:
                break
        if rotated or removed:
            _log.info("rotated %d keys, whose secrets wait to be claimed, and removed %d for good", rotated, removed)

    async def _do(self, key: ApiKey, lease: AcquiredLease) -> bool:
        if key.deleted_at is not None:
            return await self._keys.editor.purge_due(key.id, lease.guard)
        return await self._keys.rotation.rotate_due(key.id, lease.guard)


class RollUp:
    """Copies the last use and the use count of each key from its usage into the key, where lists of keys show them.

    A copy is made under the key's version, and the journal does not record it. It gives the key a new version, so each
    period copies at most once, and only for keys that were used in it.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def run(self, lease: AcquiredLease) -> None:
        """Copy the use since the last run. A run that was broken off continues."""
        place: dict[str, Any] = json.loads(lease.position or "{}")
        since_us, cursor = place.get("since_us", 0), place.get("cursor")
        next_us = self._clock.now_us() - OVERLAP_US if cursor is None else place["next_us"]
        query = Query(Where("active_at", ">=", utc_from_us(since_us)), ("active_at",), USAGE_PAGE)
        while True:
            page = await self._database.find(system_context(), KeyUsage, query, cursor)
            for start in range(0, len(page.items), MAX_IN):
                await self._copy(lease, {usage.id: usage for usage in page.items[start : start + MAX_IN]})
            cursor = page.next_cursor
            if cursor is None:
                break
            await lease.save(json.dumps({"since_us": since_us, "cursor": cursor, "next_us": next_us}))
        await lease.save(json.dumps({"since_us": max(0, next_us - next_us % ACTIVE_US)}))

    async def at_end(self, ids: Callable[[], Sequence[str]]) -> None:
        """Copy the use of a process that ends: it may be the only process for days, and too short-lived for a run. The
        next run of any process copies the rest."""
        try:
            async with asyncio.timeout(AT_END_TIMEOUT_S):
                found = ids()[-MAX_AT_END:]
                for start in range(0, len(found), MAX_IN):
                    query = Query(Where("id", "in", found[start : start + MAX_IN]), limit=MAX_IN)
                    usages = (await self._database.find(system_context(), KeyUsage, query)).items
                    await self._copy(None, {usage.id: usage for usage in usages})
        except (StrongroomError, TimeoutError) as error:
            _log.info("when keys were last used is copied into them by another process: %s", error)

    async def _copy(self, lease: AcquiredLease | None, usages: Mapping[str, KeyUsage]) -> None:
        query = Query(Where("id", "in", list(usages)), limit=MAX_IN)
        keys = (await self._database.find(system_context(), ApiKey, query)).items
        now_us = self._clock.now_us()
        commits = []
        for key in keys:
            usage = usages[key.id]
            if (key.last_used, key.usage_count) != (usage.last_used_at, usage.count):
                fields = {"last_used": usage.last_used_at, "usage_count": usage.count}
                patch = Patch(ApiKey.__collection__.name, key.id, fields, key.version)
                operations: list[Operation] = [patch] if lease is None else [lease.guard, patch]
                commits.append(self._database.commit_counters(operations, now_us))
        for result in await asyncio.gather(*commits, return_exceptions=True):
            # The next run copies into a key that was changed meanwhile, and a removed key needs no copy. If the job
            # lease is lost, saving the position raises.
            if isinstance(result, BaseException) and not isinstance(result, Conflict | NotFound):
                raise result
