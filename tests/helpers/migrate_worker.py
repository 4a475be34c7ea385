"""The process that migrate/test_live kills: a migration that sends itself SIGKILL at one of its writes.

    python migrate_worker.py FROM TO migrate|fence NUMBER

`migrate`: at the NUMBERth write to the target, by turns before it is made and behind it. `fence`: a live migration that
switches over, behind the NUMBERth write to the source.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable

from strongroom import migrate as library
from strongroom.migrate import Options
from strongroom.storage import open_store
from strongroom.storage.port import Batch, Committed, Store
from strongroom.testing.storage.samples import COLLECTIONS
from tests.helpers.faulty_store import FaultyStore


class Killing(FaultyStore):
    """A store whose process is killed at a commit: before it is made (an odd number), or once it is durable."""

    def __init__(self, store: Store, at: int, *, behind: bool) -> None:
        super().__init__(store)
        self._left = at
        self._behind = behind

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        self._left -= 1
        return asyncio.ensure_future(self._commit_or_die(batch, self._left == 0))

    async def _commit_or_die(self, batch: Batch, now: bool) -> Committed:
        if now and not self._behind:
            os.kill(os.getpid(), signal.SIGKILL)
        committed = await self.store.commit(batch)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return committed


async def main(source: str, target: str, what: str, number: int) -> None:
    one, other = await open_store(source), await open_store(target)
    live = what == "fence"
    options = Options(source=source, target=target, live=live, switch=live, batch=7)
    if live:
        one = Killing(one, number, behind=True)
    else:
        other = Killing(other, number, behind=number % 2 == 0)
    report = await library.migrate(one, other, COLLECTIONS, options)
    await one.close()
    await other.close()
    sys.exit(0 if report.is_done else 1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
