"""The outbox: events for webhooks, committed in the same batch as their cause.

    await tx.create(event("key.leaked", tenant, {"key_id": key.id}))      # in a transaction
    await database.commit_counters([..., put(event(...))], now_us)         # in a batch

An event is committed with its cause or not at all. Any node sends it afterwards (`webhooks/deliveries.py`).
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
"""Sent when a caller tests an endpoint. It cannot be subscribed to."""
EVENT_TYPES = (KEY_LEAKED, LIMIT_THRESHOLD)
"""The types that endpoints subscribe to."""
KEPT = timedelta(days=30)
"""How long events and their deliveries are kept, delivered or not."""
MAX_BODY_BYTES = 65_536
GRACE_S = 2.0
"""The node that commits an event dispatches it at once. Other nodes wait this long first."""
_encode = msgspec.json.Encoder(decimal_format="number").encode


class Event(Entity, collection=NAME, scope="global", journalled=False, ttl="expires_at", indexes=[Index("due_at")]):
    """An event of a tenant. The id is the `webhook-id` of each of its deliveries.

    `body` is the request's body, the same bytes in every retry. `due_at`: when another node dispatches an event that
    its own node has not; None once it is dispatched. `only`: the id of the one endpoint that receives it.
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
    """An event of `tenant`. `data` is JSON: plain values, aware times, exact decimals; no secrets. `now_us`: the time
    of the event (default: now). `id`: derive it from the cause where the same event may be committed twice. Raises
    InvalidInput."""
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
    """The operation that adds the event to a batch: a Put, because an event that exists already must not fail the
    batch. It is not sent again then, because the id of a delivery derives from the ids of event and endpoint."""
    return Put(NAME, event.id, Event.__codec__.encode(event))
