"""Removes what is over: documents whose time to live has come, which no read shows any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

from .context import Context, system_context
from .database import Database
from .entity import Entity
from .errors import StrongroomError
from .storage.port import Record

SWEEP_EVERY_S = 60.0
PAGE = 200
MAX_TENANTS = 100_000
"""Tenants remembered for sweeping; further ones are swept once they are written to again."""
_log = logging.getLogger(__name__)


class Sweeper:
    """One for a store and process. Several processes may sweep one store: what another has removed is nothing to do.

    Collections of tenants are swept for the tenants that were written to since this process began, by any process:
    the port has no way to ask for documents of all tenants, on purpose.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._mortal = {n: c for n, c in database.registry.by_name.items() if c.__collection__.ttl is not None}
        self._tenants: dict[tuple[str, str], None] = {}
        self._task: asyncio.Task[None] | None = None

    def seen(self, record: Record) -> None:
        """A record of the journal: its tenant may have something to remove one day."""
        if record.tenant is not None and record.collection in self._mortal and len(self._tenants) < MAX_TENANTS:
            self._tenants[record.collection, record.tenant] = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                await self.sweep()
            except StrongroomError as error:
                _log.warning("what has expired could not be removed, trying again later: %s", error)

    async def sweep(self) -> int:
        """Remove everything that has expired by now; returns how many documents that was."""
        removed = 0
        for context, cls in list(self._targets()):
            while True:
                count = await self._database.purge_expired(context, cls, PAGE)
                removed += count
                if count < PAGE:
                    break
        return removed

    def _targets(self) -> Iterator[tuple[Context, type[Entity]]]:
        for cls in self._mortal.values():
            if not cls.__collection__.tenant_scoped:
                yield system_context(), cls
        for name, tenant in self._tenants:
            if self._mortal[name].__collection__.tenant_scoped:
                yield system_context(tenant), self._mortal[name]
