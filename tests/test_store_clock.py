"""The store's clock decides time to live, creation times and idempotency, whatever the machine's clock says.

Expired documents reserve nothing, and answers equal the stored documents.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any

import pytest
import time_machine

from strongroom import (
    Context,
    Database,
    Entity,
    Indexed,
    Query,
    Registry,
    Strongroom,
)
from strongroom.app import SYSTEM_ENTITIES
from strongroom.clock import StoreClock
from strongroom.context import utc_from_us
from strongroom.database.idempotency import IdempotentCall
from strongroom.errors import AlreadyExists
from strongroom.limits.ledger import Ledger
from strongroom.storage import open_store
from strongroom.storage.port import Capabilities
from tests.helpers.faulty_store import FaultyStore

HOUR = timedelta(hours=1)


class Ticket(Entity, collection="tickets", ttl="until"):
    code: Annotated[str | None, Indexed(unique=True)] = None
    until: datetime | None = None
    used: int = 0


class Loose(Entity, collection="looses"):
    free: dict[str, Any] = {}
    rate: float = 0.0
    at: datetime | None = None


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Ticket, Loose]


class Elsewhere(FaultyStore):
    """A store on another machine, whose clock is `off` from this one's."""

    off = timedelta()

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.store.capabilities, embedded=False)

    async def now_us(self) -> int:
        return await self.store.now_us() + self.off // timedelta(microseconds=1)


@asynccontextmanager
async def store_whose_clock_is(off: timedelta) -> AsyncIterator[tuple[Database, Elsewhere]]:
    store = Elsewhere(await open_store("json://:memory:"))
    store.off = off
    registry = Registry((*SYSTEM_ENTITIES, Ticket))
    await store.prepare(registry.collections)
    clock = StoreClock(store)
    await clock.sample()
    yield Database(store, registry, clock=clock), store
    await store.close()


# --- Which clock ----------------------------------------------------------------------------------------------


async def test_a_node_two_hours_ahead_removes_no_unexpired_document() -> None:
    async with store_whose_clock_is(-2 * HOUR) as (database, store):
        now = utc_from_us(await store.now_us())
        await database.create(Context("acme"), Ticket(id="lives", until=now + HOUR))
        await database.create(Context("acme"), Ticket(id="dies", until=now - HOUR))
        assert (await database.get(Context("acme"), Ticket, "lives")).until == now + HOUR
        assert await database.get_or_none(Context("acme"), Ticket, "dies") is None
        assert [one.id for one in (await database.find(Context("acme"), Ticket)).items] == ["lives"]
        assert await database.purge_expired(Context("acme"), Ticket) == 1
        assert [one["id"] for one in await store.find("tickets", "acme", Query())] == ["lives"]


async def test_creation_times_and_journal_times_come_from_the_stores_clock() -> None:
    async with store_whose_clock_is(-2 * HOUR) as (database, store):
        made = await database.create(Context("acme"), Ticket())
        now = utc_from_us(await store.now_us())
        assert made.created_at is not None
        assert now - HOUR < made.created_at <= now + timedelta(seconds=1)
        (stored,) = await store.find("tickets", "acme", Query())
        assert (stored["created_at"], stored["updated_at"]) == (made.created_at, made.updated_at)
        (record,) = (await store.changes(None)).records
        assert utc_from_us(record.at_us) == made.created_at


async def test_a_context_with_an_explicit_time_keeps_it() -> None:
    async with store_whose_clock_is(-2 * HOUR) as (database, _):
        moment = datetime.fromisoformat("2020-02-02T02:02:02+00:00")
        context = Context("acme", now_us=int(moment.timestamp()) * 1_000_000)
        assert (await database.create(context, Ticket())).created_at == moment


async def test_an_idempotency_record_lasts_a_day_by_the_stores_clock() -> None:
    async with store_whose_clock_is(25 * HOUR) as (database, store):
        await database.create(Context("acme"), Ticket(id="t"))
        for _ in range(2):
            await database.update(Context("acme"), Ticket, "t", {"used": 1}, idempotency_key="i")
        (call,) = await store.find("idempotent_calls", None, Query())
        assert timedelta(hours=23) < call["expires_at"] - utc_from_us(await store.now_us()) <= 24 * HOUR
        once = database.once("usage", "system", "j", "request")
        expires_at = once.operation.document["expires_at"]
        assert timedelta(hours=23) < expires_at - utc_from_us(await store.now_us()) <= 24 * HOUR
        assert IdempotentCall.__collection__.ttl == "expires_at"


async def test_an_embedded_store_uses_the_machines_clock(room: Strongroom) -> None:
    with time_machine.travel("2026-05-05T12:00:00Z", tick=False) as clock:
        made = await room.tenant("acme").create(Ticket())
        clock.shift(5)
        assert (await room.tenant("acme").update(Ticket, made.id, {"used": 1})).updated_at == (
            datetime.fromisoformat("2026-05-05T12:00:05+00:00")
        )
    assert isinstance(room.ledger, Ledger)


async def test_a_long_lived_context_uses_the_time_of_each_call(room: Strongroom) -> None:
    acme = Context("acme", "user:ada")
    with time_machine.travel("2036-05-05T12:00:00Z", tick=False) as clock:
        made = await room.database.create(acme, Ticket(id="t", until=datetime(2036, 5, 5, 13, tzinfo=UTC)))
        assert made.created_at == datetime(2036, 5, 5, 12, tzinfo=UTC)
        clock.shift(2 * HOUR)
        assert await room.database.get_or_none(acme, Ticket, "t") is None
        clock.shift(24 * HOUR)
        for _ in range(2):  # its record is of now, so that the second call finds it
            await room.database.create(acme, Ticket(id="t"), idempotency_key="once")


# --- What is answered is what is stored -----------------------------------------------------------------------

MOMENT = datetime.fromisoformat("2026-05-05T12:00:00+00:00")
LONG_AGO = datetime.fromisoformat("2020-05-05T12:00:00+00:00")


@pytest.mark.parametrize("chosen", [None, LONG_AGO])
@pytest.mark.parametrize("how", ["create", "replace"])
async def test_a_document_created_over_an_expired_one_is_new(
    room: Strongroom, how: str, chosen: datetime | None
) -> None:
    acme = room.tenant("acme")
    with time_machine.travel(MOMENT, tick=False) as clock:
        await acme.create(Ticket(id="t", until=MOMENT + timedelta(seconds=1)))
        clock.shift(2)
        new = Ticket(id="t", created_at=chosen)
        made = await (acme.create(new) if how == "create" else acme.replace(new))
        assert made.created_at == (chosen or MOMENT + timedelta(seconds=2))
        assert await acme.get(Ticket, "t") == made


@pytest.mark.parametrize("first", [None, LONG_AGO])
@pytest.mark.parametrize("then", [None, LONG_AGO])
@pytest.mark.parametrize("how", ["delete, replace", "delete, create", "create, replace"])
async def test_created_at_is_returned_as_stored(
    room: Strongroom, how: str, first: datetime | None, then: datetime | None
) -> None:
    acme = room.tenant("acme")
    with time_machine.travel(MOMENT, tick=False) as clock:
        if how.startswith("delete"):
            await acme.create(Ticket(id="t", created_at=first))
        clock.shift(2)

        async def body(tx: object) -> Ticket:
            from strongroom.database.transaction import Transaction

            assert isinstance(tx, Transaction)
            if how.startswith("delete"):
                await tx.delete(Ticket, "t")
            else:
                await tx.create(Ticket(id="t", created_at=first))
            new = Ticket(id="t", used=2, created_at=then)
            return await (tx.create(new) if how.endswith("create") else tx.replace(new))

        made = await room.database.transaction(acme.context, body)
        assert await acme.get(Ticket, "t") == made


class Level(StrEnum):
    HIGH = "high"


async def test_values_are_returned_as_stored(room: Strongroom) -> None:
    acme, id = room.tenant("acme"), uuid.UUID(int=7)
    given = {
        "a": id,
        "b": (1, 2),
        "c": -0.0,
        "d": Level.HIGH,
        "e": {"f": {3}},
        "g": Decimal("1.50"),
        "h": bytearray(b"x"),
    }
    at_two = datetime.fromisoformat("2026-05-05T14:00:00+02:00")
    made = await acme.create(Loose(id="l", free=given, rate=-0.0, at=at_two))
    replaced = await acme.replace(Loose(id="m", free=given, rate=-0.0, at=at_two))
    updated = await acme.update(Loose, "m", {"free": given, "rate": -0.0, "at": at_two})
    for answer in (made, replaced, updated):
        stored = await acme.get(Loose, answer.id)
        want = {"a": str(id), "b": [1, 2], "c": 0.0, "d": "high", "e": {"f": [3]}, "g": Decimal("1.5"), "h": b"x"}
        assert answer.free == want
        assert repr(answer.free) == repr({name: want[name] for name in answer.free})
        assert str(answer.rate) == "0.0"
        assert answer.at == at_two
        assert answer.at is not None
        assert answer.at.tzinfo is UTC
    assert updated == stored


# --- What has expired -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["create", "replace", "update"])
async def test_an_expired_document_reserves_no_unique_value(room: Strongroom, store: FaultyStore, how: str) -> None:
    acme = room.tenant("acme", actor="user:ada")
    with time_machine.travel(MOMENT, tick=False) as clock:
        await acme.create(Ticket(id="old", code="x", until=MOMENT + timedelta(seconds=1)))
        await acme.create(Ticket(id="there", code="y"))
        with pytest.raises(AlreadyExists):
            await acme.create(Ticket(code="x"))
        clock.shift(2)
        match how:
            case "create":
                made = await acme.create(Ticket(code="x"))
            case "replace":
                made = await acme.replace(Ticket(id="there", code="x"))
            case _:
                made = await acme.update(Ticket, "there", {"code": "x"})
        assert await acme.get(Ticket, made.id) == made
        assert await store.get("tickets", "acme", "old") is None
        records = [(r.action, r.entity_id, r.actor) for r in (await store.changes(None)).records if r.tenant == "acme"]
        assert ("expire", "old", "system") in records
        with pytest.raises(AlreadyExists):
            await acme.create(Ticket(code="x"))


async def test_an_expired_document_reserves_no_unique_value_on_any_backend(url: str) -> None:
    async with Strongroom.open(url, entities=[Ticket]) as room:
        acme = room.tenant("acme")
        await acme.create(Ticket(id="old", code="x", until=LONG_AGO))
        made = await acme.create(Ticket(code="x"))
        assert await acme.get(Ticket, made.id) == made
        await acme.create(Ticket(id="other", code="y", until=LONG_AGO))
        updated = await acme.update(Ticket, made.id, {"code": "y"})
        assert await acme.get(Ticket, made.id) == updated
        assert await room.store.get("tickets", "acme", "other") is None
        with pytest.raises(AlreadyExists):
            await acme.create(Ticket(code="y"))


async def test_an_expired_document_that_is_just_renewed_keeps_its_unique_value(
    room: Strongroom, store: FaultyStore
) -> None:
    acme = room.tenant("acme")
    with time_machine.travel(MOMENT, tick=False) as clock:
        await acme.create(Ticket(id="old", code="x", until=MOMENT + timedelta(seconds=1)))
        clock.shift(2)

        async def renew(method: str, collection: str) -> None:
            if (method, collection) == ("find", "tickets"):
                store.after_read = None
                await acme.replace(Ticket(id="old", code="x"))

        store.after_read = renew
        with pytest.raises(AlreadyExists):
            await acme.create(Ticket(code="x"))
        assert (await acme.get(Ticket, "old")).until is None


async def test_of_concurrent_creates_with_an_expired_unique_value_one_succeeds(room: Strongroom) -> None:
    acme = room.tenant("acme")
    with time_machine.travel(MOMENT, tick=False) as clock:
        await acme.create(Ticket(id="old", code="x", until=MOMENT + timedelta(seconds=1)))
        clock.shift(2)
        made = await asyncio.gather(*(acme.create(Ticket(code="x")) for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(one, Ticket) for one in made) == 1
        assert all(isinstance(one, Ticket | AlreadyExists) for one in made)
