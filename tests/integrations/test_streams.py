"""Reservations around requests: streams are charged their usage however they end; concurrency is held meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from strongroom import IssuedKey, Strongroom
from strongroom.blocking import BlockingStrongroom
from strongroom.errors import InvalidInput, Unavailable
from strongroom.integrations import _hold
from strongroom.integrations._core import KeyRefused, Presented
from strongroom.integrations.asgi import (
    Hold,
    Message,
    Receive,
    Scope,
    Send,
    StrongroomMiddleware,
    reserve,
    settled,
)
from strongroom.integrations.flask import ApiKeys
from tests.helpers.asgi_calls import bearer, check_refusal, client
from tests.helpers.faulty_store import Fault
from tests.helpers.stores import opened
from tests.helpers.waiting import wait_until

TOKENS = {"resource": "tokens", "limit": 1_000, "window": {"kind": "total"}}
AT_ONCE = {"resource": "concurrency", "limit": 1, "window": {"kind": "total"}}


@pytest.fixture(params=["durable", "leased"])
async def room(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Strongroom]:
    async with Strongroom.open(f"sqlite:///{tmp_path}/a.db", limits=request.param) as room:
        yield room


async def tokens(room: Strongroom, issued: IssuedKey) -> tuple[Any, Any]:
    """What is charged, and what is reserved."""
    await settled()
    (status,) = [s for s in (await room.keys.stats(issued.key.id)).limits if s.resource == "tokens"]
    return status.recorded, status.reserved


class Client:
    """One request, called straight, whose client can go away."""

    def __init__(self, app: Any, text: str) -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {text}".encode())],
            "client": ("192.0.2.1", 1),
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self._asked = False
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


def streaming(room: Strongroom, *, reserved: int = 100, go: asyncio.Event | None = None, **settings: Any) -> Starlette:
    """Streams ten parts of 30 tokens; waits for `go` after the third."""

    async def view(request: Request) -> StreamingResponse:
        hold = await reserve(request, cost={"tokens": reserved})

        async def parts() -> AsyncIterator[str]:
            for number in range(10):
                if number == 3 and go is not None:
                    await go.wait()
                hold.use(tokens=30)
                yield "part "

        return StreamingResponse(parts())

    return Starlette(routes=[Route("/", view)], middleware=[Middleware(StrongroomMiddleware, room=room, **settings)])


async def test_a_stream_is_charged_what_it_used_even_above_its_reservation(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])
    async with client(streaming(room)) as http:
        answer = await http.get("/", headers=bearer(issued.text))
    assert answer.text == "part " * 10
    assert await tokens(room, issued) == (300, 0)


async def test_a_disconnected_client_is_charged_what_it_received(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])
    one = Client(streaming(room, go=asyncio.Event()), issued.text)
    await wait_until(lambda: len(one.sent) == 4)  # the start and three parts
    one.gone.set()
    with suppress(asyncio.CancelledError):
        await one.task
    assert await tokens(room, issued) == (90, 0)


async def test_a_request_that_is_cancelled_is_charged_what_it_used(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])
    one = Client(streaming(room, go=asyncio.Event()), issued.text)
    await wait_until(lambda: len(one.sent) == 4)
    one.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one.task
    assert await tokens(room, issued) == (90, 0)


async def test_a_failed_stream_is_charged_its_usage_and_an_unstarted_stream_nothing(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        hold = await reserve(scope, cost={"tokens": 100})
        hold.use(tokens=scope["path"].count("x"))
        raise RuntimeError("on purpose")

    async with client(StrongroomMiddleware(fail, room=room)) as http:
        for path in ("/", "/xxx"):
            with pytest.raises(RuntimeError, match="on purpose"):
                await http.get(path, headers=bearer(issued.text))
    assert await tokens(room, issued) == (3, 0)


async def test_a_denied_reservation_is_a_429_before_the_response_starts(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])
    async with client(streaming(room, reserved=1_001)) as http:
        document = check_refusal(await http.get("/", headers=bearer(issued.text)), 429, "usage_exceeded")
    assert document["violated-policies"] == ["tokens-total"]
    assert await tokens(room, issued) == (0, 0)


async def test_a_started_response_is_not_started_again_by_a_denial(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        _ = await reserve(scope, cost={"tokens": 1_001})

    one = Client(StrongroomMiddleware(app, room=room), issued.text)
    with pytest.raises(KeyRefused):
        await one.task
    assert [message["type"] for message in one.sent] == ["http.response.start"]


async def test_a_block_settles_at_its_end_and_can_reserve_more(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with reserve(scope, cost={"tokens": 600}) as hold:
            hold.use(tokens=500)
            assert hold.used == {"tokens": 500}
            await hold.extend(tokens=300)
            with pytest.raises(KeyRefused):
                await hold.extend(tokens=101)  # 1,001 in all
            hold.use(tokens=350)
            with pytest.raises(InvalidInput):
                hold.use(tokens=-1)
        await PlainTextResponse("done")(scope, receive, send)

    async with client(StrongroomMiddleware(app, room=room)) as http:
        assert (await http.get("/", headers=bearer(issued.text))).text == "done"
    assert await tokens(room, issued) == (850, 0)


async def test_with_concurrency_a_request_counts_until_it_is_answered(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[AT_ONCE, TOKENS])
    go = asyncio.Event()
    app = streaming(room, go=go, concurrency=True)
    first = Client(app, issued.text)
    await wait_until(lambda: len(first.sent) == 4)
    second = Client(app, issued.text)
    await second.task
    assert second.status == 429
    go.set()
    await first.task
    assert first.status == 200  # though it reserved tokens as well: a request is one, whatever it reserves
    async with client(app) as http:
        assert (await http.get("/", headers=bearer(issued.text))).status_code == 200
    assert await tokens(room, issued) == (600, 0)
    assert (await room.keys.stats(issued.key.id)).totals["requests"] == 2


async def test_an_unverified_request_cannot_reserve(room: Strongroom) -> None:
    with pytest.raises(LookupError, match="not verified"):
        _ = reserve({"type": "http"}, cost={"tokens": 1})


# --- Long work, and a store that fails --------------------------------------------------------------------------


def presented(issued: IssuedKey, cost: Mapping[str, int | Decimal]) -> Presented:
    return Presented.of(issued.text, "authorization", cost=cost)


async def test_long_work_extends_its_hold_and_reports_usage(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])
    hold = await Hold(room, presented(issued, {"tokens": 400}), ttl_s=3)
    hold.use(tokens=7)
    first = hold.verification.expires_at
    assert first is not None

    async def kept() -> bool:
        limits = (await room.keys.stats(issued.key.id)).limits
        return limits[0].recorded == 7

    await wait_until(kept)  # as of now, should the process be killed
    await asyncio.sleep(3.2)  # longer than it would have lasted: time itself is what is tested
    (status,) = (await room.keys.stats(issued.key.id)).limits
    assert status.used == 400  # what it used, and what it still holds
    hold.use(tokens=3)
    await hold.close()
    assert await tokens(room, issued) == (10, 0)


async def test_usage_of_an_expired_hold_is_recorded(room: Strongroom, monkeypatch: pytest.MonkeyPatch) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])
    hold = await Hold(room, presented(issued, {"tokens": 400}))
    hold.use(tokens=7)
    await room.keys.release(hold.verification.reservation_id or "")  # as if its time had ended
    await hold.close()
    await hold.close()
    assert await tokens(room, issued) == (7, 0)


async def test_float_amounts_are_charged_as_written_however_often_they_are_added(room: Strongroom) -> None:
    budget = {"resource": "cost", "limit": 10, "window": {"kind": "total"}}
    issued = await room.keys.create(name="k", limits=[budget])
    hold = await Hold(room, presented(issued, {"cost": Decimal("0.7")}))
    await hold.extend(cost=0.1)
    for _ in range(3):
        hold.use(cost=0.1)
    hold.use(cost=Decimal("0.000000001"))
    assert hold.used == {"cost": Decimal("0.300000001")}
    await hold.close()
    await settled()
    (status,) = (await room.keys.stats(issued.key.id)).limits
    assert (status.recorded, status.reserved) == (Decimal("0.300000001"), 0)


async def test_a_float_amount_of_an_expired_hold_is_recorded_as_written(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[{"resource": "cost", "limit": 10, "window": {"kind": "total"}}])
    hold = await Hold(room, presented(issued, {"cost": Decimal("0.7")}))
    for _ in range(3):
        hold.use(cost=0.1)
    await room.keys.release(hold.verification.reservation_id or "")
    await hold.close()
    await settled()
    assert (await room.keys.stats(issued.key.id)).totals["cost"] == Decimal("0.3")


async def test_an_amount_that_cannot_be_settled_is_refused_when_it_is_reported(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[TOKENS])
    hold = await Hold(room, presented(issued, {"tokens": 400}))
    hold.use(tokens=7)
    wrong: list[tuple[dict[str, float], str]] = [
        ({"tokens": 0.5}, "tokens: found 0.5, expected a whole number"),
        ({"cost": 0.1234567891}, "expected at most 9 decimals"),
        ({"tokens": 10**15}, "expected 0 to 1000000000000000"),  # with the seven it is more
        ({f"r{number}": 1 for number in range(32)}, "found 33 resources"),
        ({"concurrency": 1}, "reserve it"),
    ]
    for amounts, what in wrong:
        with pytest.raises(InvalidInput, match=what):
            hold.use(**amounts)
    assert hold.used == {"tokens": 7}
    await hold.close()
    assert await tokens(room, issued) == (7, 0)


async def test_a_settlement_that_the_store_refuses_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hold, "RETRY_S", 0.01)
    monkeypatch.setattr(_hold, "SETTLE_WAIT_S", 0.05)
    async with opened("json://:memory:") as (room, store):
        issued = await room.keys.create(name="k", limits=[TOKENS])
        hold = await Hold(room, presented(issued, {"tokens": 400}))
        hold.use(tokens=7)
        store.fault = lambda number, batch: Fault("before", Unavailable("gone"))
        await hold.close()  # returns: the answer is not held up
        store.fault = lambda number, batch: None
        assert await tokens(room, issued) == (7, 0)


# --- Threads ----------------------------------------------------------------------------------------------------


def test_a_flask_stream_is_charged_what_was_sent(tmp_path: Path) -> None:
    app = Flask(__name__)
    with BlockingStrongroom(f"sqlite:///{tmp_path}/a.db") as room:
        issued = room.call(lambda inner: inner.keys.create(name="k", limits=[TOKENS]))
        keys = ApiKeys(app, room=room)

        @app.get("/<int:reserved>")
        @keys.required()
        def view(reserved: int) -> Response:
            hold = keys.reserve(cost={"tokens": reserved}).open()

            def parts() -> Iterator[str]:
                for _ in range(10):
                    hold.use(tokens=30)
                    yield "part "

            return Response(parts())

        http = app.test_client()
        assert http.get("/100", headers=bearer(issued.text), buffered=True).text == "part " * 10
        gone = http.get("/100", headers=bearer(issued.text))
        stream = gone.iter_encoded()
        assert next(stream) == b"part "
        gone.close()
        refused: Any = http.get("/1001", headers=bearer(issued.text))
        refused.content = refused.data
        check_refusal(refused, 429, "usage_exceeded")
        (status,) = room.call(lambda inner: inner.keys.stats(issued.key.id)).limits
        assert 300 < status.used < 600
        assert status.reserved == 0
