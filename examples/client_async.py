"""Follows a collection while it changes, and verifies many keys at once, over HTTP with the asynchronous client.

make serve, then in another terminal, with the administrator's key that it prints:
STRONGROOM_KEY=... python examples/client_async.py
"""

from __future__ import annotations

import asyncio
import os

from strongroom.client import AsyncClient, Limit, Window

URL = os.environ.get("STRONGROOM_URL", "http://127.0.0.1:8080")
KEY = os.environ["STRONGROOM_KEY"]


async def keys(client: AsyncClient) -> None:
    """A limit is exact under concurrent verifications."""
    issued = await client.keys.create("async example", tenant="acme", limits=[Limit("tokens", 50, Window.total())])
    asked = (client.keys.verify(issued.text, cost={"tokens": 5}) for _ in range(25))
    answers = await asyncio.gather(*asked)
    print(f"{sum(answer.valid for answer in answers)} of {len(answers)} were admitted")
    async with client.reservations.hold(issued.text, cost={"concurrency": 1}) as hold:
        hold.use(tokens=2)  # over the limit: usage that happened is counted
    print("tokens used:", (await client.keys.stats(issued.key.id)).totals["tokens"])
    await client.keys.delete(issued.key.id, purge=True)


async def changes(client: AsyncClient) -> None:
    """A watch gives each change once, even if its connection breaks."""
    signals = client.tenant("acme").collection("signals")
    async with signals.watch() as watch:
        for number in range(3):
            made = await signals.create({"signal_type": f"signal {number}", "timestamp_ns": number})
            await signals.delete(made["id"])
        for _ in range(6):
            change = await anext(watch)
            print(change.action, (change.after or change.before or {}).get("signal_type", ""))


async def main() -> None:
    async with AsyncClient(URL, KEY) as client:
        await keys(client)
        await changes(client)


if __name__ == "__main__":
    asyncio.run(main())
