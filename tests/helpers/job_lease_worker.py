"""A node that runs a job under a job lease, as a process of its own, for test_job_lease.py.

The job appends its fencing token to a document, again and again, each step under the lease's guard. On standard output
`step` lines report commits, and `fenced` lines report refused ones.
"""

from __future__ import annotations

import asyncio
import sys

from strongroom import Database, Entity, Registry
from strongroom.app import SYSTEM_ENTITIES
from strongroom.clock import clock_of
from strongroom.context import system_context
from strongroom.database.transaction import Transaction
from strongroom.errors import Conflict
from strongroom.jobs import job_lease as leases
from strongroom.jobs.job_lease import AcquiredLease, JobLeases
from strongroom.storage import open_store
from strongroom.storage.port import Check

WORK = "work"
SYSTEM = system_context()


class Trail(Entity, collection="trails", scope="global"):
    """What the holders have done: the fencing token of each step."""

    tokens: list[int] = []


def say(*words: object) -> None:
    print(*words, flush=True)


async def main(url: str, holder: str, lease_s: float) -> None:
    leases.FIRST_LOOK_S = 0.0
    leases.RETRY_S = 0.05
    store = await open_store(url)
    await store.prepare(Registry((*SYSTEM_ENTITIES, Trail)).collections)
    database = Database(store, Registry((*SYSTEM_ENTITIES, Trail)))
    clock = clock_of(store)
    await clock.start()

    async def work(lease: AcquiredLease) -> None:
        say("holds", lease.token)
        while True:
            guard = lease.guard
            say("ready", lease.token)
            await asyncio.to_thread(sys.stdin.readline)  # the test says when to go on, and may stop us just here

            async def append(tx: Transaction, guard: Check = guard) -> None:
                tx.guard = guard
                await tx.update(Trail, "trail", {"tokens": [*(await tx.get(Trail, "trail")).tokens, lease.token]})

            try:
                await database.transaction(SYSTEM, append)
            except Conflict:
                say("fenced", lease.token)
                raise
            say("step", lease.token)
            await lease.save(None)

    await JobLeases(database, clock, holder=holder, lease_s=lease_s).repeat(WORK, 60.0, work)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
