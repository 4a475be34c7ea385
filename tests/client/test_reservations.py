"""Reservations of the client: usage is settled exactly once, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import pytest

from strongroom.client import Conflict, InvalidInput, Limit, NotFound, Refused, Window
from tests.helpers.clients import (
    Asked,
    Connector,
    Scripted,
    Told,
    problem,
    request_to,
    scripted,
    shop,
)
from tests.helpers.server_app import ADMIN
from tests.helpers.server_process import Running
from tests.helpers.servers.proxy import Proxy
from tests.helpers.waiting import wait_until

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("client-holds")]
OPEN = Told(200, {"valid": True, "code": "VALID", "key_id": "key_1", "reservation_id": "rsv_1", "state": "open"})
SETTLED = Told(200, {"valid": True, "code": "VALID", "key_id": "key_1", "state": "settled", "charged": {"tokens": 5}})
RECORDED = Told(200, {"key_id": "key_1", "tenant": "t"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with shop(tmp_path_factory.mktemp("client")) as process:
        yield process


@pytest.fixture(params=["async", "sync"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connector]:
    connector = Connector(request.param)
    yield connector
    await connector.close()


@pytest.fixture
def client(connect: Connector, server: Running) -> Any:
    return connect(f"http://127.0.0.1:{server.port}", ADMIN)


@pytest.fixture
async def proxy(server: Running) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as proxy:
        yield proxy


# --- On a real server -------------------------------------------------------------------------------------------


async def test_a_reservation_is_created_extended_settled_and_released(client: Any) -> None:
    issued = await client.keys.create("steps", limits=[Limit("tokens", 100, Window.total())])
    reservation = await client.reservations.reserve(issued.text, cost={"tokens": 60}, ttl_s=30)
    assert (reservation.valid, reservation.state, reservation.limits[0].reserved) == (True, "open", 60)
    refused = await client.reservations.reserve(issued.text, cost={"tokens": 60})
    assert (refused.valid, refused.code, refused.reservation_id) == (False, "USAGE_EXCEEDED", None)
    id = reservation.reservation_id
    extended = await client.reservations.extend(id, ttl_s=60, cost={"tokens": 80}, used={"tokens": 10})
    assert (extended.valid, extended.charged["tokens"]) == (True, 10)
    assert extended.expires_at > reservation.expires_at
    assert not (await client.reservations.extend(id, cost={"tokens": 200})).valid
    for _ in range(2):
        settled = await client.reservations.settle(id, {"tokens": 70})
        assert (settled.state, settled.charged["tokens"]) == ("settled", 70)
    with pytest.raises(Conflict):
        await client.reservations.settle(id, {"tokens": 71})
    other = (await client.reservations.reserve(issued.text, cost={"tokens": 30})).reservation_id
    for _ in range(2):
        assert (await client.reservations.release(other)).state == "released"
    assert (await client.keys.stats(issued.key.id)).limits[0].used == 70
    with pytest.raises(NotFound):
        await client.reservations.settle("rsv_unknown", {"tokens": 1})


async def test_used_amounts_are_settled_and_the_rest_is_released(client: Any) -> None:
    limits = [
        Limit("tokens", 1_000, Window.total()),
        Limit("cost", 1, Window.total()),
        Limit("requests", 5, Window.total()),
    ]
    issued = await client.keys.create("stream", limits=limits)
    cost = {"requests": 1, "tokens": 500, "cost": Decimal("0.5")}
    async with client.reservations.hold(issued.text, cost=cost) as hold:
        assert [one.reserved for one in hold.reservation.limits] == [500, Decimal("0.5"), 1]
        for _ in range(10):
            hold.use(tokens=7, cost=0.01)
    stats = await client.keys.stats(issued.key.id)
    assert [one.used for one in stats.limits] == [70, Decimal("0.1"), 1]


async def test_usage_above_the_hold_is_charged_in_full(client: Any) -> None:
    issued = await client.keys.create("more", limits=[Limit("tokens", 100, Window.total())])
    async with client.reservations.hold(issued.text, cost={"tokens": 50}) as hold:
        hold.use({"tokens": 170})
    assert (await client.keys.stats(issued.key.id)).limits[0].used == 170
    assert (await client.keys.verify(issued.text, cost={"tokens": 0})).code == "USAGE_EXCEEDED"


async def test_a_hold_whose_answers_were_lost_is_settled_once(client: Any, connect: Connector, proxy: Proxy) -> None:
    issued = await client.keys.create("lost", limits=[Limit("tokens", 100, Window.total())])
    through = connect(f"http://127.0.0.1:{proxy.port}", ADMIN)
    proxy.drop_answer_to(request_to("POST /v1/reservations "))
    async with through.reservations.hold(issued.text, cost={"tokens": 50}) as hold:
        assert proxy.dropped.is_set()
        assert (await client.keys.stats(issued.key.id)).limits[0].reserved == 50
        hold.use(tokens=20)
        await hold.extend()
        proxy.drop_answer_to(request_to("POST /v1/reservations/"))
    assert proxy.dropped.is_set()
    limit = (await client.keys.stats(issued.key.id)).limits[0]
    assert (limit.used, limit.reserved) == (20, 0)


async def test_a_hold_is_extended_while_its_stream_continues(client: Any) -> None:
    issued = await client.keys.create("long", limits=[Limit("tokens", 100, Window.total())])
    async with client.reservations.hold(issued.text, cost={"tokens": 50}, ttl_s=3) as hold:
        hold.use(tokens=3)
        ended = asyncio.get_running_loop().time() + 3.5

        async def charged() -> bool:
            stats = await client.keys.stats(issued.key.id)
            return stats.limits[0].recorded == 3 and asyncio.get_running_loop().time() > ended

        await wait_until(charged)  # what is used so far is charged at once, whatever becomes of the holder
        assert hold.trouble is None
        assert (await client.keys.stats(issued.key.id)).limits[0].reserved == 47
        hold.use(tokens=4)
    limit = (await client.keys.stats(issued.key.id)).limits[0]
    assert (limit.used, limit.reserved) == (7, 0)


async def test_the_number_of_open_holds_is_bounded(client: Any) -> None:
    issued = await client.keys.create("concurrent", limits=[Limit("concurrency", 2, Window.total())])
    holds = client.reservations
    async with holds.hold(issued.text), holds.hold(issued.text):
        with pytest.raises(Refused) as caught:
            await holds.hold(issued.text).__aenter__()
        assert (caught.value.verification.code, caught.value.code) == ("RATE_LIMITED", "refused")
    async with holds.hold(issued.text):
        pass


# --- On a server that answers as it is told -----------------------------------------------------------------------


def settlements(server: Scripted) -> list[Asked]:
    return [asked for asked in server.asked if asked.path.endswith("/settle")]


async def test_a_hold_is_settled_when_its_block_fails(connect: Connector) -> None:
    async def stream(client: Any) -> None:
        async with client.reservations.hold("sr_x", cost={"requests": 2, "tokens": 9}) as hold:
            hold.use(tokens=5)
            raise RuntimeError("mine")

    async with scripted(OPEN, SETTLED) as server:
        with pytest.raises(RuntimeError, match="mine"):
            await stream(connect(server.url, ADMIN))
    assert [asked.json for asked in settlements(server)] == [{"cost": {"requests": 2, "tokens": 5}}]


async def test_a_hold_is_settled_when_its_task_is_cancelled_twice() -> None:
    connect = Connector("async")
    async with scripted(OPEN, Told(503, {}, {"retry-after": "0"}), Told(503, {}), SETTLED) as server:
        client = connect(server.url, ADMIN)
        started = asyncio.Event()

        async def stream() -> None:
            async with client.reservations.hold("sr_x", cost={"tokens": 9}) as hold:
                hold.use(tokens=5)
                started.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(stream())
        await started.wait()
        task.cancel()
        await wait_until(lambda: settlements(server))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [asked.json for asked in settlements(server)] == [{"cost": {"tokens": 5}}] * 3
        await connect.close()


@pytest.mark.parametrize(("status", "code"), [(404, "not_found"), (409, "conflict")])
async def test_usage_beyond_the_reported_amount_is_recorded_after_the_hold_has_expired(
    connect: Connector, status: int, code: str
) -> None:
    async with scripted(OPEN, OPEN, problem(status, code), RECORDED) as server:
        client = connect(server.url, ADMIN)
        async with client.reservations.hold("sr_x", cost={"tokens": 9}) as hold:
            hold.use(tokens=5)
            await hold.extend()
            hold.use(tokens=2, cost=Decimal("0.1"))
    assert server.asked[1].json == {"ttl_s": 60, "used": {"tokens": 5}}
    recorded = server.asked[-1]
    assert recorded.path == "/v1/usage"
    assert recorded.json == {"key_id": "key_1", "cost": {"tokens": 2, "cost": 0.1}}
    assert recorded.headers["idempotency-key"] == "hold-rsv_1"


async def test_a_hold_that_could_not_be_extended_reports_it_and_continues(connect: Connector) -> None:
    no_more = Told(200, {"valid": False, "code": "USAGE_EXCEEDED", "message": "no more"})
    async with scripted(OPEN, problem(503, "unavailable"), no_more, OPEN, SETTLED) as server:
        client = connect(server.url, ADMIN)
        async with client.reservations.hold("sr_x", cost={"tokens": 9}, ttl_s=0.15) as hold:
            await wait_until(lambda: len(server.asked) >= 3)
            await wait_until(lambda: isinstance(hold.trouble, Refused) or len(server.asked) >= 4)
            await wait_until(lambda: len(server.asked) >= 5)
            await wait_until(lambda: hold.trouble is None)
    assert settlements(server)


async def test_a_key_that_is_refused_opens_nothing(connect: Connector) -> None:
    denied = {"valid": False, "code": "USAGE_EXCEEDED", "message": "tokens: all used", "retry_after_s": 12.5}
    async with scripted(Told(200, denied)) as server:
        hold = connect(server.url, ADMIN).reservations.hold("sr_x", cost={"tokens": 9})
        with pytest.raises(Refused, match="USAGE_EXCEEDED: tokens: all used") as caught:
            await hold.__aenter__()
        assert (caught.value.details["retry_after_s"], caught.value.verification.valid) == (12.5, False)
        assert len(server.asked) == 1


async def test_an_invalid_amount_is_refused_and_changes_nothing(connect: Connector) -> None:
    async with scripted(OPEN, SETTLED) as server:
        client = connect(server.url, ADMIN)
        async with client.reservations.hold("sr_x", cost={"tokens": 9}) as hold:
            hold.use(tokens=1)
            for wrong in ({"tokens": -1}, {"tokens": "5"}, {"tokens": float("nan")}):
                with pytest.raises(InvalidInput):
                    hold.use(wrong)
    assert settlements(server)[0].json == {"cost": {"tokens": 1}}
