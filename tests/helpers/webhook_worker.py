"""Commits an event and is killed before its delivery: `python -m tests.helpers.webhook_worker URL`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from functools import partial

from strongroom.context import system_context
from strongroom.events.outbox import event
from strongroom.webhooks.http_sender import HttpSender, SendResult
from tests.helpers.webhook_receiver import delivering


class Stuck(HttpSender):
    """Says that an attempt has begun, and never ends it."""

    async def send(self, url: str, headers: Mapping[str, str], body: bytes, *, allow_private: bool) -> SendResult:
        print("sending", headers["webhook-id"], flush=True)
        await asyncio.Event().wait()
        raise AssertionError


async def main(url: str, when: str) -> None:
    async with delivering(url, sender=partial(Stuck, total_timeout_s=0.5)) as (room, _):
        if when == "before":
            await room.deliveries.close()  # the event is committed, and nobody is there to take it up
        made = event("key.leaked", "acme", {"key_id": "key_1"})
        await room.database.transaction(system_context("acme"), lambda tx: tx.create(made))
        print("committed", made.id, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
