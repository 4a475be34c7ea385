"""A process that writes to the source of migrate/test_live: entities, keys and usage; prints what was acknowledged.

    python migrate_writer.py URL KEY WRITERS

Lines: `ready`; `e ID VALUE` the entity ID holds VALUE; `d ID` it is deleted; `v N` N tokens were admitted;
`refused` a write was refused because the store takes none; then only that, once a tenth of a second, until a line comes
on standard input.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from strongroom import Entity, Index, Strongroom
from strongroom.errors import NotFound, StrongroomError, Unavailable

FENCE = "the data moves to"


class Paper(Entity, collection="papers", indexes=[Index("code", unique=True)]):
    """A tenant's document with a unique value that changes hands."""

    value: int = 0
    code: str | None = None


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


async def main(url: str, text: str, writers: int) -> None:
    async with Strongroom.open(url, entities=[Paper]) as room:
        say("ready")
        stop = asyncio.Event()
        asyncio.get_running_loop().add_reader(0, stop.set)

        async def until_told(step: object) -> None:
            while not stop.is_set():
                try:
                    await step()  # type: ignore[operator]
                except Unavailable as error:
                    if FENCE not in error.message:
                        raise
                    say("refused")
                    await asyncio.sleep(0.1)

        def writer(number: int) -> object:
            chance = random.Random(number)
            tenant = room.tenant(f"t{number % 2}")
            count = 0

            async def step() -> None:
                nonlocal count
                count += 1
                id = f"{number}-{chance.randrange(40)}"
                if chance.random() < 0.15:
                    try:
                        await tenant.delete(Paper, id)
                    except NotFound:
                        return
                    say(f"d {id}")
                    return
                # The code wanders from paper to paper: whoever had it lets go of it first.
                code = f"{number}-{chance.randrange(5)}"
                for other in (await tenant.find(Paper)).items:
                    if other.code == code and other.id != id:
                        await tenant.update(Paper, other.id, {"code": None})
                await tenant.replace(Paper(id=id, value=count, code=code))
                say(f"e {id} {count}")

            return step

        async def verify() -> None:
            answer = await room.keys.verify(text, cost={"tokens": 3})
            if answer.valid:
                say("v 3")

        await asyncio.gather(*(until_told(writer(n)) for n in range(writers)), *(until_told(verify) for _ in range(2)))


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    except* StrongroomError as group:
        say(f"failed {group.exceptions}")
        raise
