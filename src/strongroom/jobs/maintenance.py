"""Background work, done once for all nodes: expiry, the journal's retention, and the jobs that packages above add."""

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
from ..errors import ConfigError, StrongroomError
from ..storage.port import JournalPartitions, Store, unwrapped
from .job_lease import Leases, Turn

EXPIRY_EVERY_S = 60.0
SHAPES_EVERY_S = 60.0
SHAPES_TIMEOUT_S = 5.0
PARTITIONS_EVERY_S = 21_600.0
RETENTION_EVERY_S = 3_600.0
PAGE = 200
TENANTS_PAGE = 100
MAX_TENANTS_A_RUN = 1_000
"""Tenants looked through in one run of the expiry; the next run goes on after them."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work, by name, and how often it is due."""

    name: str
    every_s: float
    run: Callable[[Turn], Awaitable[None]]


class Background:
    """The jobs of one node. `start` after everything else is there; `close` before anything is taken away."""

    def __init__(self, leases: Leases, jobs: Sequence[Job]) -> None:
        self.leases = leases
        self.jobs = tuple(jobs)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self.leases.repeat(job.name, job.every_s, job.run)) for job in self.jobs]

    async def close(self) -> None:
        """Stop. What is half done is given back, for another node to go on with."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []


# --- Expiry ---------------------------------------------------------------------------------------------------


class Sweeper:
    """Removes documents whose time to live has come, which no read shows any more, of every tenant."""

    def __init__(self, database: Database, store: Store) -> None:
        self._database = database
        self._store = store
        mortal = [cls for cls in database.registry.by_name.values() if cls.__collection__.ttl is not None]
        self._global = [cls for cls in mortal if not cls.__collection__.tenant_scoped]
        self._scoped = [cls for cls in mortal if cls.__collection__.tenant_scoped]

    async def run(self, turn: Turn) -> None:
        """Sweep the global collections, then at most MAX_TENANTS_A_RUN tenants, from where the last run ended."""
        for cls in self._global:
            await self._purge(turn, system_context(), cls)
        if not self._scoped:
            return
        for _ in range(0, MAX_TENANTS_A_RUN, TENANTS_PAGE):
            tenants = await self._store.tenants(turn.position, TENANTS_PAGE)
            for tenant in tenants:
                for cls in self._scoped:
                    await self._purge(turn, system_context(tenant), cls)
            if len(tenants) < TENANTS_PAGE:
                await turn.save(None)  # that were all: the next run begins again
                return
            await turn.save(tenants[-1])

    async def _purge(self, turn: Turn, context: Context, cls: type[Entity]) -> None:
        while await self._database.purge_expired(context.at_now(), cls, PAGE, guard=turn.guard) == PAGE:
            await turn.save(turn.position)


# --- What is asked for ----------------------------------------------------------------------------------------


class ShapeKeeper:
    """Adds the shapes of queries that this process has seen to those of all processes, each minute and at the end."""

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
            await self.keep()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SHAPES_EVERY_S)
            await self.keep()

    async def keep(self) -> None:
        """Write the counts. Advice is not worth a failure: what could not be written waits for the next time."""
        try:
            async with asyncio.timeout(SHAPES_TIMEOUT_S):
                await persist(self._database.commit_counters, self._clock.now_us(), self._database.shapes)
        except (StrongroomError, TimeoutError) as error:
            _log.info("the shapes of queries could not be kept, trying again: %s", error)
        except Exception:  # whatever it is: it may neither end the task nor keep the store from being closed
            _log.exception("the shapes of queries could not be kept")


# --- The journal's partitions ---------------------------------------------------------------------------------


class Partitions:
    """Makes the journal's parts for the time to come, where the store keeps it in parts (PostgreSQL)."""

    def __init__(self, make: Callable[[], Awaitable[int]]) -> None:
        self._make = make

    async def run(self, turn: Turn) -> None:
        """Make those that are missing. To make one twice is to make it once, so this needs no guard."""
        made = await self._make()
        if made:
            _log.info("made %d new parts of the journal", made)


class Retention:
    """Drops the journal's old parts, where the store can (PostgreSQL: whole partitions)."""

    def __init__(self, drop_before: Callable[[int], Awaitable[int]], clock: Clock, keep_s: float) -> None:
        self._drop_before = drop_before
        self._clock = clock
        self._keep_us = round(keep_s * 1_000_000)

    async def run(self, turn: Turn) -> None:
        """Drop what is wholly older than the time that the journal is kept. To drop a part twice is to drop it once,
        so this needs no guard."""
        dropped = await self._drop_before(self._clock.now_us() - self._keep_us)
        if dropped:
            _log.info("dropped %d old parts of the journal", dropped)


def background(
    database: Database,
    store: Store,
    clock: Clock,
    leases: Leases,
    *,
    more: Sequence[Job] = (),
    journal_kept_s: float | None = None,
) -> Background:
    """All the jobs that a node takes its share of, and `more` of those who stand above. `journal_kept_s`: how long the
    journal is kept; None: for ever. Raises ConfigError if the store cannot drop what is older."""
    jobs = [
        *more,
        Job("expiry", EXPIRY_EVERY_S, Sweeper(database, store).run),
    ]
    backend = unwrapped(store)
    journal = backend if isinstance(backend, JournalPartitions) else None
    if journal is not None:
        jobs.append(Job("journal-partitions", PARTITIONS_EVERY_S, Partitions(journal.make_journal_partitions).run))
    if journal_kept_s is not None:
        if journal is None:
            raise ConfigError(f"a {store.capabilities.name} store cannot drop old parts of its journal")
        retention = Retention(journal.drop_journal_before, clock, journal_kept_s)
        jobs.append(Job("journal-retention", RETENTION_EVERY_S, retention.run))
    return Background(leases, jobs)
