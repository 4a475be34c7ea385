"""What a type checker knows of the client: each answer's type, and that both clients give the same ones.

`make lint` checks it with mypy --strict; nothing here is run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, assert_type

from strongroom.client import (
    ApiKey,
    AsyncClient,
    AsyncHold,
    BulkStep,
    Change,
    Client,
    Hold,
    IssuedKey,
    IssuedWebhook,
    KeyStats,
    Limit,
    OwnStats,
    Page,
    Readiness,
    Recorded,
    Reservation,
    StrongroomError,
    Verification,
    Webhook,
    Window,
)


@dataclass
class Note:
    text: str


def answers_have_types(client: Client) -> None:
    issued = client.keys.create("a", limits=[Limit("tokens", 5, Window.rolling(60)), {"resource": "cost"}])
    assert_type(issued, IssuedKey)
    assert_type(issued.text, str)
    assert_type(issued.key, ApiKey)
    assert_type(issued.key.expires_at, datetime | None)
    assert_type(client.keys.list(tenant="t"), Iterator[ApiKey])
    assert_type(client.keys.page(), Page[ApiKey])
    assert_type(client.keys.update("k", user_id=None), ApiKey)
    assert_type(client.keys.stats("k"), KeyStats)
    assert_type(client.keys.bulk("disable"), Iterator[BulkStep])
    answer = client.keys.verify("k", cost={"tokens": 1, "cost": Decimal("0.1")})
    assert_type(answer, Verification)
    assert_type(answer.limits[0].used, int | Decimal)
    assert_type(client.keys.verify_batch([{"key": "k"}]), list[Verification])
    assert_type(client.usage.record(key="k", cost={"tokens": 1}), Recorded)
    assert_type(client.webhooks.create("https://example.com"), IssuedWebhook)
    assert_type(client.webhooks.list(), Iterator[Webhook])
    assert_type(client.stats(), OwnStats)
    assert_type(client.ready(), Readiness)


def documents_have_the_callers_type(client: Client) -> None:
    notes = client.tenant("acme").collection("notes", Note)
    assert_type(notes.get("n"), Note)
    assert_type(notes.create({"text": "t"}), Note)
    assert_type(notes.find(text="t"), Iterator[Note])
    assert_type(notes.page(), Page[Note])
    assert_type(client.tenant("acme").collection("notes").get("n"), dict[str, Any])
    with notes.watch() as watch:
        assert_type(next(watch), Change)
        assert_type(watch.cursor, str | None)


def a_hold_is_a_context_manager(client: Client) -> None:
    with client.reservations.hold("k", cost={"tokens": 100}) as hold:
        assert_type(hold, Hold)
        assert_type(hold.reservation, Reservation)
        hold.use(tokens=1, cost=Decimal("0.1"))


async def both_clients_give_the_same(client: AsyncClient) -> None:
    assert_type(await client.keys.create("a"), IssuedKey)
    assert_type(client.keys.list(), AsyncIterator[ApiKey])
    assert_type(await client.keys.verify("k"), Verification)
    assert_type(await client.keys.verify_batch([]), list[Verification])
    notes = client.tenant("acme").collection("notes", Note)
    assert_type(await notes.get("n"), Note)
    assert_type(notes.find(), AsyncIterator[Note])
    assert_type(await notes.page(), Page[Note])
    async with notes.watch() as watch:
        assert_type(await anext(watch), Change)
    async with client.reservations.hold("k") as hold:
        assert_type(hold, AsyncHold)
    async with client as same:
        assert_type(same, AsyncClient)


def errors_tell_where_they_come_from(error: StrongroomError) -> None:
    assert_type(error.request_id, str | None)
    assert_type(error.code, str)


def what_is_wrong_is_told(client: Client) -> None:
    client.keys.create(name=1)  # type: ignore[arg-type]
    client.keys.verify("k", cost={"tokens": "1"})  # type: ignore[dict-item]
    client.keys.update("k", name=None)  # type: ignore[arg-type]
    client.keys.create("k", environment="production")  # type: ignore[arg-type]
    client.keys.list(tenent="t")  # type: ignore[call-arg]
    client.keys.page(owner=1)  # type: ignore[arg-type]
    client.reservations.hold("k", {"tokens": 1})  # type: ignore[call-arg]
