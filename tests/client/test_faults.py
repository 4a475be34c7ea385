"""The client under faults of network, server and caller: nothing happens twice or hangs, every error is typed, and no
key is shown."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from strongroom.client import (
    AsyncClient,
    Client,
    Conflict,
    InvalidInput,
    Limit,
    NoAnswer,
    NotFound,
    Retries,
    StrongroomError,
    TooManyRequests,
    Unavailable,
    UnexpectedAnswer,
    Window,
    new_idempotency_key,
)
from strongroom.client.errors import BY_CODE
from strongroom.server.errors import STATUS
from tests.helpers.clients import QUICK, Connector, Told, problem, request_to, scripted, shop
from tests.helpers.server_app import ADMIN
from tests.helpers.server_process import Running
from tests.helpers.servers.proxy import Proxy
from tests.helpers.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("client-faults")]
VALID = {"valid": True, "code": "VALID", "key_id": "key_1", "reservation_id": "res_1"}


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
async def proxy(server: Running) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def client(connect: Connector, server: Running) -> Any:
    """Straight to the server."""
    return connect(f"http://127.0.0.1:{server.port}", ADMIN)


@pytest.fixture
def through(connect: Connector, proxy: Proxy) -> Any:
    """Through the proxy."""
    return connect(f"http://127.0.0.1:{proxy.port}", ADMIN)


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


# --- The network ------------------------------------------------------------------------------------------------


async def test_a_create_whose_answer_was_lost_creates_one_key(
    client: Any, through: Any, proxy: Proxy, tenant: str
) -> None:
    proxy.drop_answer_to(request_to("POST /v1/keys "))
    issued = await through.keys.create("once", tenant=tenant)
    assert proxy.dropped.is_set()
    assert [key.id async for key in client.keys.list(tenant=tenant)] == [issued.key.id]
    assert (await client.keys.verify(issued.text)).valid
    proxy.drop_answer_to(request_to("POST /v1/keys/"))
    rotated = await through.keys.rotate(issued.key.id)
    assert proxy.dropped.is_set()
    assert (await client.keys.verify(rotated.text)).valid
    proxy.drop_answer_to(request_to("DELETE "))
    await through.keys.delete(issued.key.id)
    assert proxy.dropped.is_set()


async def test_usage_whose_answer_was_lost_is_counted_once(client: Any, through: Any, proxy: Proxy) -> None:
    issued = await client.keys.create("once")
    proxy.drop_answer_to(request_to("POST /v1/usage "))
    await through.usage.record(key_id=issued.key.id, cost={"tokens": 5})
    assert proxy.dropped.is_set()
    assert (await client.keys.stats(issued.key.id)).totals == {"tokens": 5}


async def test_a_create_whose_answer_was_lost_adds_one_document(
    client: Any, through: Any, proxy: Proxy, tenant: str
) -> None:
    proxy.drop_answer_to(request_to("POST /v1/tenants/"))
    made = await through.tenant(tenant).collection("orders").create({"owner": "o"})
    assert proxy.dropped.is_set()
    assert [one["id"] async for one in client.tenant(tenant).collection("orders").find()] == [made["id"]]


async def test_a_verification_without_an_idempotency_key_is_not_retried(
    client: Any, through: Any, proxy: Proxy
) -> None:
    issued = await client.keys.create("once", limits=[Limit("tokens", 100, Window.total())])
    proxy.drop_answer_to(request_to("POST /v1/keys/verify "))
    with pytest.raises(NoAnswer) as caught:
        await through.keys.verify(issued.text, cost={"tokens": 5})
    assert caught.value.details["outcome"] == "unknown"
    assert issued.text not in str(caught.value)
    assert (await client.keys.stats(issued.key.id)).limits[0].used == 5


async def test_a_verification_with_an_idempotency_key_is_retried_and_debits_once(
    client: Any, through: Any, proxy: Proxy
) -> None:
    issued = await client.keys.create("once", limits=[Limit("tokens", 100, Window.total())])
    proxy.drop_answer_to(request_to("POST /v1/keys/verify "))
    answer = await through.keys.verify(issued.text, cost={"tokens": 5}, idempotency_key=new_idempotency_key())
    assert proxy.dropped.is_set()
    assert (answer.valid, answer.limits[0].used) == (True, 5)
    assert (await client.keys.stats(issued.key.id)).limits[0].used == 5


async def test_the_client_reconnects_to_a_server_that_returns(connect: Connector, proxy: Proxy) -> None:
    through = connect(f"http://127.0.0.1:{proxy.port}", ADMIN, retries=Retries(times=20, base_s=0.05, most_s=0.1))
    proxy.refuse()
    asked = asyncio.ensure_future(through.keys.page(limit=1))
    await wait_until(lambda: proxy.accepted >= 2)
    proxy.heal()
    assert (await asked).items


async def test_a_refused_connection_is_retried_even_for_a_verification(connect: Connector) -> None:
    async with scripted(Told(200, VALID)) as server:
        port = server.port
    client = connect(f"http://127.0.0.1:{port}", ADMIN)
    with pytest.raises(NoAnswer, match="cannot be reached") as caught:
        await client.keys.verify("sr_x")
    assert (caught.value.details["outcome"], caught.value.code) == ("not_done", "unavailable")
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


async def test_a_server_that_does_not_answer_times_out(connect: Connector) -> None:
    async with scripted(Told(hangs=True)) as server:
        client = connect(server.url, ADMIN, timeout_s=0.5, retries=Retries(times=1, base_s=0.01))
        started = time.monotonic()
        with pytest.raises(NoAnswer, match=r"no answer within 0\.5 s"):
            await client.keys.get("key_1")
        assert time.monotonic() - started < PATIENCE_S
        assert len(server.asked) == 2


async def test_an_exhausted_connection_pool_has_its_own_error(connect: Connector) -> None:
    async with scripted(Told(hangs=True)) as server:
        make = httpx.AsyncClient if connect.kind == "async" else httpx.Client
        http: Any = make(limits=httpx.Limits(max_connections=1))
        ask: Any = http.get if connect.kind == "async" else functools.partial(asyncio.to_thread, http.get)
        holder = asyncio.create_task(ask(server.url, timeout=30))
        await wait_until(lambda: server.asked)
        client = connect(server.url, http=http, timeout_s=0.5, retries=Retries(times=0))
        with pytest.raises(NoAnswer) as found:
            await client.alive()
        assert found.value.details["outcome"] == "not_done"
        assert not http.is_closed
        await client.aclose()
        assert not http.is_closed  # it is the caller's
        await http.aclose() if isinstance(http, httpx.AsyncClient) else http.close()
        holder.cancel()
    await asyncio.wait([holder])


# --- Retries ----------------------------------------------------------------------------------------------------


async def test_a_write_is_retried_with_the_same_idempotency_key(connect: Connector) -> None:
    answers = [
        problem(503, "unavailable"),
        Told(0),
        problem(502, "bad_gateway"),
        Told(200, {"key_id": "k", "tenant": "t"}),
    ]
    async with scripted(*answers) as server:
        await connect(server.url, ADMIN).usage.record(key_id="k", cost={"tokens": 1})
        await connect(server.url, ADMIN).usage.record(key_id="k", cost={"tokens": 1})
    keys = [asked.headers["idempotency-key"] for asked in server.asked]
    assert len(keys) == 5
    assert len(set(keys[:4])) == 1
    assert keys[4] != keys[0]


async def test_a_verification_is_retried_after_429_but_not_after_503(connect: Connector) -> None:
    for status, code, calls in ((503, "unavailable", 1), (429, "too_many_requests", 2)):
        async with scripted(problem(status, code), Told(200, VALID)) as server:
            client = connect(server.url, ADMIN)
            if status == 503:
                with pytest.raises(Unavailable):
                    await client.keys.verify("sr_x")
            else:
                assert (await client.keys.verify("sr_x")).valid
            assert len(server.asked) == calls
            assert "idempotency-key" not in server.asked[0].headers


async def test_the_client_waits_for_retry_after(connect: Connector) -> None:
    async with scripted(
        problem(429, "too_many_requests", headers={"retry-after": "1"}), Told(200, {"status": "ok"})
    ) as server:
        started = time.monotonic()
        assert await connect(server.url).alive()
        assert time.monotonic() - started >= 1


async def test_a_retry_after_beyond_the_budget_is_raised_at_once(connect: Connector) -> None:
    async with scripted(problem(429, "too_many_requests", headers={"retry-after": "3600"})) as server:
        with pytest.raises(TooManyRequests) as caught:
            await connect(server.url).alive()
        assert caught.value.details["retry_after_s"] == 3600
        assert len(server.asked) == 1


async def test_retries_are_bounded(connect: Connector) -> None:
    async with scripted(problem(503, "unavailable")) as server:
        with pytest.raises(Unavailable):
            await connect(server.url).alive()
        assert len(server.asked) == 1 + QUICK.times
        with pytest.raises(Unavailable):
            await connect(server.url, retries=Retries(times=0)).alive()
        assert len(server.asked) == 2 + QUICK.times


@pytest.mark.parametrize(
    ("status", "code"), [(401, "unauthenticated"), (404, "not_found"), (500, "internal"), (409, "conflict")]
)
async def test_a_permanent_error_is_not_retried(connect: Connector, status: int, code: str) -> None:
    async with scripted(problem(status, code)) as server:
        with pytest.raises(StrongroomError):
            await connect(server.url, ADMIN).keys.get("key_1")
        assert len(server.asked) == 1


# --- Errors -----------------------------------------------------------------------------------------------------


def test_each_code_of_the_server_is_an_error_of_the_client() -> None:
    assert {code: BY_CODE[code].code for code in STATUS} == {code: code for code in STATUS}


async def test_an_unknown_error_code_is_preserved(connect: Connector) -> None:
    async with scripted(problem(409, "brand_new")) as server:
        with pytest.raises(Conflict) as caught:
            await connect(server.url, ADMIN).keys.get("key_1")
        assert (caught.value.code, caught.value.message, caught.value.request_id) == ("brand_new", "Detail", "r1")


async def test_the_servers_problems_reach_the_caller_unchanged(connect: Connector) -> None:
    told = problem(422, "invalid_input", errors=[{"path": "name", "message": "is required"}], unknown={"a": 1})
    async with scripted(told) as server:
        with pytest.raises(InvalidInput) as caught:
            await connect(server.url, ADMIN).keys.get("key_1")
        assert [(p.path, p.message) for p in caught.value.problems] == [("name", "is required")]
        assert (caught.value.message, caught.value.request_id) == ("Detail", "r1")


async def test_an_answer_that_is_not_strongrooms_has_its_own_error(connect: Connector) -> None:
    html = {"content-type": "text/html"}
    for told, error in (
        (Told(404, b"<html>nothing here</html>", html), NotFound),
        (Told(418, b"<html>teapot</html>", html), UnexpectedAnswer),
        (Told(200, b"<html>log in</html>", html), UnexpectedAnswer),
        (Told(302, b"", {"location": "http://127.0.0.1:1/elsewhere"}), UnexpectedAnswer),
        (Told(200, {"id": 5}), UnexpectedAnswer),
    ):
        async with scripted(told) as server:
            with pytest.raises(error) as caught:
                await connect(server.url, ADMIN, retries=Retries(times=0)).keys.get("key_1")
            assert ADMIN not in f"{caught.value} {caught.value!r} {caught.value.details}"
            assert len(server.asked) == 1  # a redirect is not followed: the key would go along


async def test_unknown_fields_of_a_newer_server_are_ignored(connect: Connector) -> None:
    limit = {
        "resource": "tokens", "limit": 1, "used": 0, "remaining": 1, "resets_at": None, "colour": "red",
        "window": {"kind": "lunar", "phase": "full"},
    }  # fmt: skip
    answer = {**VALID, "code": "BRAND_NEW", "valid": False, "limits": [limit], "extra": [1]}
    async with scripted(Told(200, answer)) as server:
        verification = await connect(server.url, ADMIN).keys.verify("sr_x")
    assert (verification.code, verification.limits[0].window.kind) == ("BRAND_NEW", "lunar")


# --- The caller -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options", "path"),
    [
        ("keys.example.com", {}, "url"),
        ("ftp://keys.example.com", {}, "url"),
        ("https://", {}, "url"),
        ("https://host:port", {}, "url"),
        ("https://user:hunter2@keys.example.com", {}, "url"),
        ("https://keys.example.com?a=1", {}, "url"),
        ("https://keys.example.com", {"key": "hunter2\r\nX: y"}, "key"),
        ("https://keys.example.com", {"key": ""}, "key"),
        ("https://keys.example.com", {"key": "hunter2ü"}, "key"),
        ("https://keys.example.com", {"timeout_s": 0}, "timeout_s"),
    ],
)
@pytest.mark.parametrize("make", [AsyncClient, Client])
def test_an_invalid_client_configuration_is_refused(make: Any, url: str, options: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        make(url, **options)
    assert [p.path for p in caught.value.problems] == [path]
    assert "hunter2" not in str(caught.value)


def test_an_invalid_retry_configuration_is_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        Retries(times=-1, base_s=-1, budget_s=float("nan"))
    assert {p.path for p in caught.value.problems} == {"times", "base_s", "budget_s"}


async def test_an_invalid_call_is_refused_before_it_is_sent(connect: Connector) -> None:
    async with scripted(Told(200, VALID)) as server:
        client = connect(server.url, ADMIN)
        call: Any
        for call, path in (
            (lambda: client.keys.get(""), "id"),
            (lambda: client.keys.delete("key_1", idempotency_key="two\nlines"), "idempotency_key"),
            (lambda: client.keys.delete("key_1", idempotency_key="x" * 256), "idempotency_key"),
            (lambda: client.keys.verify("k", cost={"cost": object()}), ""),
            (lambda: client.keys.create("k", permissions="chat"), ""),
            (lambda: client.tenant("t").collection("c").create(5), "document"),
            (lambda: client.tenant("").collection("c").get("x"), "tenant"),
        ):
            with pytest.raises(InvalidInput) as caught:
                await call()
            assert [p.path for p in caught.value.problems] == [path]
        assert server.asked == []


async def test_no_error_or_log_shows_a_key(connect: Connector, client: Any) -> None:
    issued = await client.keys.create("secret")
    assert issued.text not in f"{issued!r} {issued}"
    assert ADMIN not in repr(client)
    assert ADMIN not in repr(vars(getattr(client, "_target", client)))


async def test_one_client_serves_concurrent_calls(connect: Connector, client: Any) -> None:
    issued = await client.keys.create("busy", limits=[Limit("tokens", 1_000, Window.total())])
    answers = await asyncio.gather(*(client.keys.verify(issued.text, cost={"tokens": 7}) for _ in range(150)))
    assert sum(answer.valid for answer in answers) == 1_000 // 7
    assert (await client.keys.stats(issued.key.id)).limits[0].used == 1_000 // 7 * 7
