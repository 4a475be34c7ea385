"""The process that storage/test_kill kills: it verifies and records at full speed, and prints what was acknowledged.

    python kill_worker.py URL KEY FIRST LAST

Lines: `ready`; `v N` N tokens were admitted; `r ID` the recording ID was acknowledged; `full` one token is denied.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from strongroom import Strongroom

CALLERS = 12


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")  # a line is there whole, or not: nothing is left in a buffer to be killed


async def main(url: str, text: str, first: int, last: int) -> None:
    async with Strongroom.open(url) as room:
        say("ready")

        async def verify(seed: int) -> None:
            chance = random.Random(seed)
            while True:
                tokens = chance.choice([1, 1, 2, 5])
                answer = await room.keys.verify(text, cost={"tokens": tokens, "requests": 1})
                if answer.valid:
                    say(f"v {tokens}")
                elif tokens == 1:
                    return

        async def record(caller: int) -> None:
            for number in range(first + caller, last, 3):
                await room.keys.record(key=text, cost={"images": 2}, idempotency_key=f"i{number}")
                say(f"r {number}")

        await asyncio.gather(*(verify(n) for n in range(CALLERS)), *(record(n) for n in range(3)))
        say("full")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
