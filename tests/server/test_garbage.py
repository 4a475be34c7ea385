"""No answer of the server waits while Python looks for garbage in everything that the process has loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAUSES = """
import gc, time
from strongroom.server.run import collect_rarely

def pause():
    began = time.process_time()
    gc.collect()
    return time.process_time() - began

loaded = [{"key": [number]} for number in range(400_000)]
before = min(pause() for _ in range(3))
collect_rarely()
after = min(pause() for _ in range(3))
assert after < before / 5, (before, after)
"""

PAGE = """
import asyncio, gc, tempfile
from pathlib import Path
from strongroom import Strongroom
from strongroom.server import adminkey
from strongroom.server.app import build
from strongroom.server.run import collect_rarely
import httpx

ADMIN = "an-administrator's-key-of-enough-characters"
KEYS = 1_000

async def collections_of_a_page(client):
    runs = []
    gc.callbacks.append(lambda phase, info: runs.append(phase))
    answer = await client.get(f"/v1/keys?limit={KEYS}", headers={"Authorization": f"Bearer {ADMIN}"})
    gc.callbacks.pop()
    assert answer.status_code == 200 and len(answer.json()["items"]) == KEYS
    return len(runs)

async def main():
    with tempfile.TemporaryDirectory() as folder:
        async with Strongroom.open(f"sqlite:///{folder}/a.db") as room:
            await adminkey.ensure(room, ADMIN)
            async with asyncio.TaskGroup() as tasks:
                for number in range(KEYS + 1):
                    tasks.create_task(room.keys.create(name=f"key {number}", metadata={"number": number}))
            transport = httpx.ASGITransport(build(room))
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                await collections_of_a_page(client)
                assert await collections_of_a_page(client) > 5, "this would prove nothing"
                collect_rarely()
                found = await collections_of_a_page(client)
                assert found <= 2, found

asyncio.run(main())
"""

GARBAGE = """
import gc, weakref
from strongroom.server.run import collect_rarely

class Node:
    pass

collect_rarely()
alive = weakref.WeakSet()
most = 0
for number in range(300_000):
    node = Node()
    node.self = node  # a cycle: only a collection frees it
    alive.add(node)
    if number % 1_000 == 0:
        most = max(most, len(alive))
assert most < 100_000, most
"""


def _run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=ROOT)


def test_a_collection_takes_no_longer_because_much_is_loaded() -> None:
    _run(PAUSES)


def test_the_largest_page_is_answered_with_hardly_a_collection() -> None:
    _run(PAGE)


def test_garbage_is_still_collected() -> None:
    _run(GARBAGE)
