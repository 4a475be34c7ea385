"""Background work, done once for all nodes: expiry, the journal's partitions, and the jobs that packages above add."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ..clock import Clock
from ..context import Context, system_context
from ..database import Database
from ..database.index_advice import persist
from ..entities import Entity
from ..errors import StrongroomError
from ..storage.port import JournalPartitions, Store, unwrapped
from .job_lease import AcquiredLease, JobLeases

EXPIRY_EVERY_S = 60.0
SHAPES_EVERY_S = 60.0
SHAPES_TIMEOUT_S = 5.0
PARTITIONS_EVERY_S = 21_600.0
PAGE = 200
TENANTS_PAGE = 100
MAX_TENANTS_A_RUN = 1_000
"""Tenants that one run of the expiry visits; the next run continues after them."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A periodic job: its name, and how often it is due."""

    name: str
    every_s: float
    run: Callable[[AcquiredLease], Awaitable[None]]


class Background:
    """The jobs of one node. `start` it last, `close` it first."""

    def __init__(self, leases: JobLeases, jobs: Sequence[Job]) -> None:
        self.leases = leases
        self.jobs = tuple(jobs)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self.leases.repeat(job.name, job.every_s, job.run)) for job in self.jobs]

    async def close(self) -> None:
        """Stop. The leases of unfinished jobs are released, so that other nodes continue them."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []


# --- Expiry ---------------------------------------------------------------------------------------------------


class Sweeper:
    """Removes expired documents of every tenant. Reads already hide them."""

    def __init__(self, database: Database, store: Store) -> None:
        self._database = database
        self._store = store
        mortal = [cls for cls in database.registry.by_name.values() if cls.__collection__.ttl is not None]
        self._global = [cls for cls in mortal if not cls.__collection__.tenant_scoped]
        self._scoped = [cls for cls in mortal if cls.__collection__.tenant_scoped]

    async def run(self, lease: AcquiredLease) -> None:
        """Sweep the global collections, then at most MAX_TENANTS_A_RUN tenants, from the position of the last run."""
        for cls in self._global:
            await self._purge(lease, system_context(), cls)
        if not self._scoped:
            return
        for _ in range(0, MAX_TENANTS_A_RUN, TENANTS_PAGE):
            tenants = await self._store.tenants(lease.position, TENANTS_PAGE)
            for tenant in tenants:
                for cls in self._scoped:
                    await self._purge(lease, system_context(tenant), cls)
            if len(tenants) < TENANTS_PAGE:
                await lease.save(None)  # the last tenant: the next run starts from the beginning
                return
            await lease.save(tenants[-1])

    async def _purge(self, lease: AcquiredLease, context: Context, cls: type[Entity]) -> None:
        if cls.__collection__.journalled and self._database.writes.why_refused(context.tenant) is not None:
            return  # they stay hidden, and are removed once writes are on again
        while await self._database.purge_expired(context.at_now(), cls, PAGE, guard=lease.guard) == PAGE:
            await lease.save(lease.position)


# --- Shapes of queries ----------------------------------------------------------------------------------------


class ShapeKeeper:
    """Adds the query shapes of this process to the shapes of all processes, every minute and at the end."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            await self.persist()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SHAPES_EVERY_S)
            await self.persist()

    async def persist(self) -> None:
        """Write the counts. A failure is only logged, because advice is not worth one; the next call writes them."""
        try:
            async with asyncio.timeout(SHAPES_TIMEOUT_S):
                await persist(self._database.commit_counters, self._clock.now_us(), self._database.shapes)
        except (StrongroomError, TimeoutError) as error:
            _log.info("query shapes could not be stored, trying again: %s", error)
        except Exception:  # any error: it must not end the task, nor keep the store from closing
            _log.exception("query shapes could not be stored")


# --- The journal's partitions ---------------------------------------------------------------------------------


class Partitions:
    """Creates the journal's partitions ahead of time, where the store has partitions (PostgreSQL)."""

    def __init__(self, make: Callable[[], Awaitable[int]]) -> None:
        self._make = make

    async def run(self, lease: AcquiredLease) -> None:
        """Create missing partitions. That is idempotent, so it needs no guard."""
        made = await self._make()
        if made:
            _log.info("created %d new partitions of the journal", made)


def background(
    database: Database,
    store: Store,
    clock: Clock,
    leases: JobLeases,
    *,
    more: Sequence[Job] = (),
) -> Background:
    """The jobs of a node: those of this module, and `more` of packages above."""
    jobs = [
        *more,
        Job("expiry", EXPIRY_EVERY_S, Sweeper(database, store).run),
    ]
    if isinstance(journal := unwrapped(store), JournalPartitions):
        jobs.append(Job("journal-partitions", PARTITIONS_EVERY_S, Partitions(journal.make_journal_partitions).run))
    return Background(leases, jobs)
