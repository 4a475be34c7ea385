"""The program that the suite runs in other processes: `python -m strongroom.testing.storage.process OPENER write|add
URL NUMBER`.

It prints a line for each acknowledged commit, at once, so that whoever kills it knows what it was promised.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time

from ...errors import BoundExceeded, StrongroomError
from ...storage.port import Add, Append, Create, Put, Store
from .backend import opened
from .samples import COLLECTIONS, batch, item, record

WRITERS = 4
TENANT = "acme"


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one write a line, so a kill leaves no partial line


async def write(store: Store, life: int) -> None:
    """Commit batches until killed: two documents, an addition and a record, with one name."""
    await store.commit(batch(TENANT, Put("items", f"total-{life}", item())))

    async def work(writer: int) -> None:
        for n in itertools.count():
            name = f"{life}-{writer}-{n}"
            await store.commit(
                batch(
                    TENANT,
                    Create("items", f"{name}-a", item(name, code=f"{name}-a")),
                    Append(record(name, TENANT), 0),
                    Add("items", f"total-{life}", "used", 1),
                    Create("items", f"{name}-b", item(name)),
                    now_us=time.time_ns() // 1_000,
                )
            )
            say(f"committed {name}")

    await asyncio.gather(*(work(writer) for writer in range(WRITERS)))


async def add(store: Store, bound: int) -> None:
    """Add to one counter in several tasks until its bound is reached; print how many additions were admitted."""

    async def work() -> int:
        for admitted in itertools.count():
            try:
                await store.commit(
                    batch(TENANT, Add("items", "total", "used", 1, at_most=bound), Append(record("add")))
                )
            except BoundExceeded:
                return admitted
        raise AssertionError("a count never ends")

    say(f"admitted {sum(await asyncio.gather(*(work() for _ in range(WRITERS))))}")


async def main(opener: str, what: str, url: str, number: int) -> None:
    try:
        store = await opened(opener, url)
    except StrongroomError as error:
        say(f"refused {type(error).__name__} {error.message}")
        return
    await store.prepare(COLLECTIONS)
    say("opened")
    await (write if what == "write" else add)(store, number)
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
