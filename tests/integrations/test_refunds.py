"""A request that is refused after its admission is charged nothing, in every integration and every window."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import pytest
import time_machine
from fastapi import Depends, FastAPI
from fastapi import Request as FastRequest
from flask import Flask
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from strongroom import (
    Anchored,
    Calendar,
    IssuedKey,
    Limit,
    Refill,
    Rolling,
    Strongroom,
    Total,
    Verification,
)
from strongroom.blocking import BlockingStrongroom
from strongroom.integrations._core import KeyRefused
from strongroom.integrations.asgi import StrongroomMiddleware, reserve, settled
from strongroom.integrations.fastapi import ApiKeyAuth, install
from strongroom.integrations.flask import ApiKeys
from strongroom.integrations.starlette import refused
from tests.helpers.asgi_calls import bearer, check_refusal, client
from tests.helpers.stores import new_url, opened

WINDOWS: list[Any] = [
    Rolling(seconds=3_600),
    Anchored(seconds=3_600),
    Calendar(unit="day"),
    Total(),
    Total(refill=Refill(amount=1, unit="day")),
]
TOKENS = Limit(resource="tokens", limit=100, window=Total())
REQUESTS = Limit(resource="requests", limit=9, window=Rolling(seconds=3_600))
ONE = ApiKeyAuth(cost={"requests": 1})
NOON = datetime(2026, 5, 5, 12, tzinfo=UTC)


@pytest.fixture(params=["durable", "leased"])
async def room(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Strongroom]:
    async with opened(new_url("sqlite", tmp_path), limits=request.param) as (room, _):
        yield room


async def stands(room: Strongroom, issued: IssuedKey) -> tuple[int, dict[str, Any], dict[str, int]]:
    """Uses, totals, and what of each limit is used or held."""
    await settled()
    stats = await room.keys.stats(issued.key.id)
    limits = {limit.resource: int(limit.used) for limit in stats.limits}
    return stats.count, {name: amount for name, amount in stats.totals.items() if amount}, limits


async def key_of(room: Strongroom) -> IssuedKey:
    """A key of a tenant with a quota, used once before."""
    await room.quotas.put(kind="tenant", tenant="acme", limits=[REQUESTS])
    issued = await room.keys.create(name="k", tenant="acme", limits=[TOKENS, REQUESTS])
    assert (await room.keys.verify(issued.text)).valid
    return issued


async def nothing_was_charged(room: Strongroom, issued: IssuedKey) -> None:
    assert (await stands(room, issued))[:2] == (1, {"requests": 1})
    quota = await room.quotas.stats("tenant", "acme")
    assert (quota.count, quota.totals, int(quota.limits[0].used)) == (1, {"requests": 1}, 1)


# --- Taking back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS, ids=lambda one: f"{one.kind}{'-refill' * bool(one.refill)}")
async def test_a_refund_restores_the_usage_exactly(room: Strongroom, window: Any) -> None:
    limit = Limit(resource="tokens", limit=100, window=window)
    issued = await room.keys.create(name="k", limits=[limit])
    for before in (0, 30):  # the first use of its windows, and a later one
        charged = await room.keys.verify_charged(issued.text, cost={"tokens": 60})
        assert (await stands(room, issued))[2] == {"tokens": before + 60}
        await room.keys.undo(charged)
        assert (await stands(room, issued))[0] == (1 if before else 0)
        assert (await stands(room, issued))[2] == {"tokens": before}
        assert (await room.keys.verify(issued.text, cost={"tokens": 30})).valid
    denied = await room.keys.verify_charged(issued.text, cost={"tokens": 60})
    assert denied.answer.code == "USAGE_EXCEEDED"
    await room.keys.undo(denied)
    assert (await stands(room, issued))[2] == {"tokens": 60}


async def test_a_refund_of_a_key_without_limits_is_not_counted(room: Strongroom) -> None:
    issued = await room.keys.create(name="k")
    for written in (False, True):
        charged = await room.keys.verify_charged(issued.text, cost={"tokens": 60})
        if written:
            room.ledger.aggregation.flush()
            await room.ledger.settled()
        await room.keys.undo(charged)
        room.ledger.aggregation.flush()
        await room.ledger.settled()
        assert await stands(room, issued) == (0, {}, {})


async def test_a_refund_does_not_reduce_a_window_that_began_after_the_charge(tmp_path: Path) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        async with opened(new_url("sqlite", tmp_path)) as (room, _):
            windows: list[Any] = [Rolling(seconds=60), Anchored(seconds=60), Calendar(unit="minute")]
            for window in windows:
                limit = Limit(resource="tokens", limit=100, window=window)
                issued = await room.keys.create(name="k", limits=[limit])
                charged = await room.keys.verify_charged(issued.text, cost={"tokens": 60})
                clock.shift(timedelta(seconds=61))
                assert (await room.keys.verify(issued.text, cost={"tokens": 100})).valid
                await room.keys.undo(charged)
                assert (await stands(room, issued))[2] == {"tokens": 100}, window


# --- The integrations ------------------------------------------------------------------------------------------


async def test_a_denied_reservation_refunds_fastapis_charge(room: Strongroom) -> None:
    app = FastAPI()
    install(app, room=room)

    @app.get("/")
    async def view(request: FastRequest, key: Annotated[Verification, Depends(ONE)]) -> str:
        async with reserve(request, cost={"tokens": 500}):
            return "let in"

    issued = await key_of(room)
    async with client(app) as http:
        check_refusal(await http.get("/", headers=bearer(issued.text)), 429, "usage_exceeded")
    await nothing_was_charged(room, issued)


async def test_a_denial_by_a_second_dependency_refunds_the_first(room: Strongroom) -> None:
    app = FastAPI(dependencies=[Depends(ApiKeyAuth())])
    install(app, room=room)

    @app.get("/")
    async def view(key: Annotated[Verification, Depends(ApiKeyAuth(permission="admin"))]) -> str:
        return "let in"

    issued = await key_of(room)
    async with client(app) as http:
        check_refusal(await http.get("/", headers=bearer(issued.text)), 403, "insufficient_permissions")
    await nothing_was_charged(room, issued)


@pytest.mark.parametrize("handler", [False, True])
@pytest.mark.parametrize("concurrency", [False, True])
async def test_a_denied_reservation_refunds_the_middlewares_charge(
    room: Strongroom, concurrency: bool, handler: bool
) -> None:
    async def view(request: Request) -> PlainTextResponse:
        first = await reserve(request, cost={"tokens": 10})
        first.use(tokens=3)  # happened
        second = await reserve(request, cost={"tokens": 500})
        return PlainTextResponse(f"let in for {second.used}")

    app = Starlette(
        routes=[Route("/", view)],
        middleware=[Middleware(StrongroomMiddleware, room=room, concurrency=concurrency)],
        exception_handlers={KeyRefused: refused} if handler else {},
    )
    issued = await key_of(room)
    async with client(app) as http:
        check_refusal(await http.get("/", headers=bearer(issued.text)), 429, "usage_exceeded")
    _, totals, limits = await stands(room, issued)
    assert totals == {"requests": 1, "tokens": 3}
    assert limits == {"tokens": 3, "requests": 1}


async def test_a_request_that_succeeds_despite_a_denied_reservation_is_charged(room: Strongroom) -> None:
    async def view(request: Request) -> PlainTextResponse:
        with pytest.raises(KeyRefused):
            async with reserve(request, cost={"tokens": 500}):
                pass
        return PlainTextResponse("a shorter answer")

    app = Starlette(routes=[Route("/", view)], middleware=[Middleware(StrongroomMiddleware, room=room)])
    issued = await key_of(room)
    async with client(app) as http:
        assert (await http.get("/", headers=bearer(issued.text))).status_code == 200
    assert (await stands(room, issued))[0] == 2


def test_a_denied_reservation_refunds_flasks_charge(tmp_path: Path) -> None:
    with BlockingStrongroom(new_url("sqlite", tmp_path)) as room:
        app = Flask("refused")
        keys = ApiKeys(app, room=room)

        @app.get("/")
        @keys.required(cost={"requests": 1})
        def view() -> str:
            with keys.reserve(cost={"tokens": 500}):
                return "let in"

        issued = room.call(lambda inner: inner.keys.create(name="k", limits=[TOKENS, REQUESTS]))
        assert app.test_client().get("/", headers=bearer(issued.text)).status_code == 429
        stats = room.call(lambda inner: inner.keys.stats(issued.key.id))
        assert (stats.count, [int(limit.used) for limit in stats.limits]) == (0, [0, 0])
