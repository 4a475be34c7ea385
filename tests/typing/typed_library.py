"""What a type checker knows of the library: a misspelt option is told. `make lint` reads this; nothing runs it."""

from __future__ import annotations

from typing import assert_type

from fastapi import FastAPI

from strongroom import Entity, IssuedKey, Strongroom, Tenant, Verification
from strongroom.blocking import BlockingStrongroom
from strongroom.integrations.fastapi import install


class Note(Entity, collection="typed_notes"):
    text: str


async def options_are_known(tenant: Tenant, note: Note) -> None:
    assert_type(await tenant.create(note, idempotency_key="k"), Note)
    assert_type(await tenant.update(Note, "n", {"text": "t"}, expected=1), Note)
    await tenant.create(note, idempotency="k")  # type: ignore[call-arg]
    await tenant.replace(note, expcted=1)  # type: ignore[call-arg]
    await tenant.update(Note, "n", {}, expcted=1)  # type: ignore[call-arg]
    await tenant.delete(Note, "n", expected="1")  # type: ignore[arg-type]
    await tenant.add(Note, "n", "count", 1, at_mots=3)  # type: ignore[call-arg]


async def fields_are_known(room: Strongroom) -> None:
    assert_type(await room.keys.create(name="a", limits=[{"resource": "tokens", "limit": 1}]), IssuedKey)
    assert_type(await room.keys.verify("k", cost={"tokens": 1}), Verification)
    await room.keys.verify("k", csot={"tokens": 1})  # type: ignore[call-arg]
    await room.audit.list(tennant="a")  # type: ignore[call-arg]
    await room.keys.create(nmae="a")  # type: ignore[call-arg]
    await room.keys.update("k", tenant="a")  # type: ignore[call-arg]
    await room.webhooks.create(url="https://example.com", event=["*"])  # type: ignore[call-arg]
    await room.webhooks.update("w", urls="https://example.com")  # type: ignore[call-arg]
    await room.quotas.put(kind="tenant", tenant="a", limit=[])  # type: ignore[call-arg]
    await room.leaks.set_policy("a", actoin="notify")  # type: ignore[call-arg]


def blocking_twins_know_the_same(app: FastAPI) -> None:
    room = BlockingStrongroom.open("sqlite:///app.db", limits="leased")
    assert_type(room, BlockingStrongroom)
    assert_type(room.open(), BlockingStrongroom)
    assert_type(room.verify("k", cost={"tokens": 1}), Verification)
    room.verify("k", csot={"tokens": 1})  # type: ignore[call-arg]
    room.record(key="k")  # type: ignore[call-arg]
    BlockingStrongroom("sqlite:///app.db", limit="leased")  # type: ignore[call-arg]
    install(app, url="sqlite:///app.db", limit="leased")  # type: ignore[call-arg]
