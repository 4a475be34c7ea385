"""Events that webhooks tell of: what is put into the outbox, in the same commit as what it tells of.

    await tx.create(event("key.leaked", tenant, {"key_id": key.id}))      # in a transaction
    await database.commit_counters([..., put(event(...))], now_us)         # in a batch of one's own

An event is committed with its cause or not at all; `deliveries.py` sends it afterwards, from whichever node.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec

from ..context import new_id, utc_from_us
from ..entities import Entity, Index
from ..errors import InvalidInput, Problem
from ..storage.port import Put

NAME = "webhook_events"
PREFIX = "evt_"
LIMIT_THRESHOLD = "limit.threshold"
KEY_LEAKED = "key.leaked"
TEST = "webhook.test"
"""Sent when someone asks to have an endpoint tested; nobody subscribes to it."""
EVENT_TYPES = (KEY_LEAKED, LIMIT_THRESHOLD)
"""What can be subscribed to."""
KEPT = timedelta(days=30)
"""How long events and their deliveries are kept, whatever became of them."""
MAX_BODY_BYTES = 65_536
GRACE_S = 2.0
"""The node that commits an event sends it at once; others leave it alone for so long."""
_encode = msgspec.json.Encoder(decimal_format="number").encode


class Event(Entity, collection=NAME, scope="global", journalled=False, ttl="expires_at", indexes=[Index("due_at")]):
    """Something that happened to a tenant; the id is the `webhook-id` of each of its deliveries.

    `body` is what is sent, byte for byte the same in every repeat. `due_at` is when another node takes up an event
    that was not yet given to its endpoints; None once it was. `only`: the one endpoint that it is for.
    """

    tenant: str
    type: str
    body: str
    due_at: datetime | None = None
    only: str | None = None
    expires_at: datetime


def event(
    type: str,
    tenant: str,
    data: Mapping[str, Any],
    *,
    now_us: int | None = None,
    id: str | None = None,
    only: str | None = None,
) -> Event:
    """An event of `tenant`. `data` is JSON: plain values, aware times, exact decimals; no secrets. `now_us`: when it
    happened (now). `id`: one made of what happened, where the same thing may be told twice. Raises InvalidInput."""
    now_us = time.time_ns() // 1_000 if now_us is None else now_us
    moment = utc_from_us(now_us)
    body = _encode({"type": type, "timestamp": moment, "tenant": tenant, "data": dict(data)})
    if len(body) > MAX_BODY_BYTES:
        raise InvalidInput([Problem("data", f"found {len(body)} bytes of JSON, expected at most {MAX_BODY_BYTES}")])
    return Event(
        id=id if id is not None else new_id(PREFIX),
        tenant=tenant,
        type=type,
        body=body.decode(),
        due_at=moment + timedelta(seconds=GRACE_S),
        only=only,
        expires_at=moment + KEPT,
    )


def put(event: Event) -> Put:
    """The event as an operation. Not a Create: one that is there already must not make its batch fail. What is sent of
    it then was sent before, and is not sent again, since a delivery's id is made of the event's and the endpoint's."""
    return Put(NAME, event.id, Event.__codec__.encode(event))
