"""A process that deletes a tenant, for the tests that kill it: it reports each step on standard output, and goes on
when it gets a line."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from strongroom import Strongroom


async def main(url: str, tenant: str) -> None:
    async with Strongroom.open(url) as room:
        deletions = room.tenants.deletions
        deletions.settle_s = 0
        step = deletions._step

        async def reported(*given: Any) -> Any:
            done = await step(*given)
            print("step", flush=True)
            await asyncio.to_thread(sys.stdin.readline)  # the test says when to go on, and may kill us just here
            return done

        vars(deletions)["_step"] = reported
        await room.tenants.delete(tenant, "the end")
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
