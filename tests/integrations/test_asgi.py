"""The ASGI middleware: admission, refusals, forwarded addresses, and its lifespan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom import Strongroom, Verification
from strongroom import client_address as addresses
from strongroom.errors import ConfigError, InvalidInput, StrongroomError, Unavailable
from strongroom.integrations import _core
from strongroom.integrations.asgi import (
    Message,
    Receive,
    Scope,
    Send,
    StrongroomMiddleware,
    route_of,
    verification_of,
)
from strongroom.keys.token import generate
from tests.helpers.asgi_calls import (
    REQUESTS,
    bearer,
    check_refusal,
    client,
    echo,
    fields,
    lifespan,
    speak,
    websocket,
)
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import opened


@pytest.fixture
async def room() -> AsyncIterator[Strongroom]:
    async with Strongroom.open("json://:memory:") as room:
        yield room


# --- Who is let in ----------------------------------------------------------------------------------------------


async def test_a_valid_key_is_admitted_and_identifies_its_holder_to_the_application(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", user_id="u1", limits=[REQUESTS])
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await echo(scope, receive, send)

    async with client(StrongroomMiddleware(app, room=room)) as http:
        answer = await http.get("/", headers=bearer(issued.text))
    assert answer.json() == {"key_id": issued.key.id}
    verification = seen[0]["strongroom.key"]
    assert isinstance(verification, Verification)
    assert verification.user_id == "u1"
    assert verification_of(seen[0]) is verification
    assert seen[0]["state"] == {"strongroom": room, "strongroom_key": verification}
    assert issued.text not in repr(seen[0]["strongroom.guarded"])


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ([], "is missing"),
        ([("authorization", "Basic dXNlcjpwYXNz")], "Bearer"),
        ([("authorization", "Bearer ")], "holds no key"),
        ([("authorization", "Bearer a"), ("authorization", "Bearer b")], "2 times"),
        ([("authorization", b"Bearer \xff\xfe")], "holds no key"),
    ],
    ids=["none", "another scheme", "empty", "two", "not text"],
)
async def test_a_request_without_a_readable_key_is_401_with_instructions(
    room: Strongroom, headers: Any, why: str
) -> None:
    async with client(StrongroomMiddleware(echo, room=room)) as http:
        answer = await http.get("/", headers=headers)
    document = check_refusal(answer, 401, "unauthenticated")
    assert why in document["detail"]
    assert answer.headers["www-authenticate"] == 'Bearer realm="api"'


async def test_an_unknown_key_is_a_401_that_does_not_repeat_it(room: Strongroom) -> None:
    text = generate("sr")
    async with client(StrongroomMiddleware(echo, room=room)) as http:
        answer = await http.get("/", headers=bearer(text))
    check_refusal(answer, 401, "not_found")
    assert answer.headers["www-authenticate"] == 'Bearer realm="api", error="invalid_token"'
    assert text not in answer.text


@pytest.mark.parametrize(
    ("fields", "asked", "code"),
    [
        ({"expires_at": datetime.now(UTC) - timedelta(seconds=1)}, {}, "expired"),
        ({"permissions": ["chat:read"]}, {"permission": "chat:write"}, "insufficient_permissions"),
        ({"allowed_ips": ["10.0.0.0/8"]}, {}, "forbidden"),
    ],
)
async def test_a_key_without_permission_is_a_403_with_the_reason(
    room: Strongroom, fields: Any, asked: Any, code: str
) -> None:
    issued = await room.keys.create(name="k")
    await room.keys.update(issued.key.id, **fields)
    async with client(StrongroomMiddleware(echo, room=room, **asked)) as http:
        check_refusal(await http.get("/", headers=bearer(issued.text)), 403, code)


async def test_a_key_that_is_disabled_is_refused_from_the_next_request_on(room: Strongroom) -> None:
    issued = await room.keys.create(name="k")
    async with client(StrongroomMiddleware(echo, room=room)) as http:
        assert (await http.get("/", headers=bearer(issued.text))).status_code == 200
        await room.keys.disable(issued.key.id)
        check_refusal(await http.get("/", headers=bearer(issued.text)), 403, "disabled")


async def test_exactly_the_limit_is_admitted(room: Strongroom) -> None:
    tokens = {"resource": "tokens", "limit": 1_000, "window": {"kind": "calendar", "unit": "hour"}}
    money = {"resource": "cost", "limit": 5, "window": {"kind": "total"}}
    issued = await room.keys.create(name="k", limits=[REQUESTS, tokens, money])
    app = StrongroomMiddleware(echo, room=room, cost={"requests": 1, "tokens": 10})
    async with client(app) as http:
        answers = [await http.get("/", headers=bearer(issued.text)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    policies = fields(answers[0].headers["ratelimit-policy"])
    assert policies == {
        "requests-rolling-3600": {"q": 2, "w": 3600},
        "tokens-calendar-hour-UTC": {"q": 1_000, "qu": "tokens", "w": 3600},
    }
    states = fields(answers[1].headers["ratelimit"])
    assert {name: state["r"] for name, state in states.items()} == {
        "requests-rolling-3600": 0,
        "tokens-calendar-hour-UTC": 980,
    }
    assert 0 < int(states["requests-rolling-3600"]["t"]) <= 3_612  # the window and one bucket
    document = check_refusal(answers[2], 429, "rate_limited")
    assert document["violated-policies"] == ["requests-rolling-3600"]
    assert document["type"].endswith("#quota-exceeded")
    assert [limit["resource"] for limit in document["limits"] if limit.get("exceeded")] == ["requests"]
    assert int(answers[2].headers["retry-after"]) == pytest.approx(document["retry_after_s"], abs=1)
    stats = await room.keys.stats(issued.key.id)
    assert stats.totals == {"requests": 2, "tokens": 20}  # what is refused is not charged


async def test_a_limit_without_a_window_sends_no_retry_after(room: Strongroom) -> None:
    issued = await room.keys.create(
        name="k", limits=[{"resource": "requests", "limit": 0, "window": {"kind": "total"}}]
    )
    async with client(StrongroomMiddleware(echo, room=room)) as http:
        answer = await http.get("/", headers=bearer(issued.text))
    check_refusal(answer, 429, "rate_limited")
    assert "retry-after" not in answer.headers


async def test_an_unavailable_store_admits_no_request() -> None:
    async with opened("json://:memory:") as (room, store):
        issued = await room.keys.create(name="k", limits=[REQUESTS])
        _broken(store)
        async with client(StrongroomMiddleware(echo, room=room)) as http:
            check_refusal(await http.get("/", headers=bearer(issued.text)), 503, "unavailable")
            store.fault = lambda number, batch: None
            assert (await http.get("/", headers=bearer(issued.text))).status_code == 200


def _broken(store: FaultyStore) -> None:
    store.fault = lambda number, batch: Fault("before", Unavailable("the disk is gone at /secret/place"))


# --- Settings ---------------------------------------------------------------------------------------------------


async def test_options_may_be_functions_of_the_request(room: Strongroom) -> None:
    tokens = {"resource": "tokens", "limit": 100, "window": {"kind": "total"}}
    issued = await room.keys.create(name="k", permissions=["read"], limits=[tokens])
    app = StrongroomMiddleware(
        echo,
        room=room,
        permission=lambda scope: "read" if scope["method"] == "GET" else "write",
        cost=lambda scope: {"tokens": len(scope["path"])},
    )
    async with client(app) as http:
        assert (await http.get("/12345678", headers=bearer(issued.text))).status_code == 200
        check_refusal(await http.post("/1", headers=bearer(issued.text)), 403, "insufficient_permissions")
    assert (await room.keys.stats(issued.key.id)).totals == {"tokens": 9}


async def test_the_key_header_is_configurable(room: Strongroom) -> None:
    issued = await room.keys.create(name="k")
    async with client(StrongroomMiddleware(echo, room=room, header="X-API-Key")) as http:
        assert (await http.get("/", headers={"x-api-key": issued.text})).status_code == 200
        answer = await http.get("/", headers=bearer(issued.text))
    check_refusal(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"] == 'ApiKey realm="api", header="x-api-key"'


async def test_exempt_paths_need_no_key_and_others_do(room: Strongroom) -> None:
    async with client(StrongroomMiddleware(echo, room=room, exempt=["/healthz", "/docs/*"])) as http:
        found = {path: (await http.get(path)).status_code for path in ("/healthz", "/docs/a", "/healthz/", "/docs")}
    assert found == {"/healthz": 200, "/docs/a": 200, "/healthz/": 401, "/docs": 401}


async def test_the_route_is_the_frameworks_template_or_the_path(room: Strongroom) -> None:
    class Route:
        path = "/items/{id}"

    scope = {"type": "http", "method": "GET", "path": "/items/3"}
    assert route_of(scope) == "GET /items/3"
    assert route_of({**scope, "route": Route}) == "GET /items/{id}"
    mounted = {**scope, "route": Route, "path": "/api/v1/items/3", "root_path": "/api/v1", "app_root_path": "/api"}
    assert route_of(mounted) == "GET /v1/items/{id}"
    # A template that does not fit the path (a prefix was lost) would take one route's permission for another's.
    assert route_of({**scope, "route": Route, "path": "/admin/items/3"}) == "GET /admin/items/3"


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"header": "no good"}, "header"),
        ({"exempt": ["healthz"]}, "exempt"),
        ({"exempt": ["/*/x"]}, "exempt"),
        ({"trusted_proxies": ["10.0.0.0/40"]}, "trusted_proxies"),
        ({"cost": {"tokens": -1}}, "cost.tokens"),
    ],
)
def test_an_invalid_option_stops_the_start(room: Strongroom, settings: Any, path: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        StrongroomMiddleware(echo, room=room, **settings)
    assert [problem.path for problem in caught.value.problems] == [path]


def test_contradicting_options_stop_the_start(room: Strongroom) -> None:
    with pytest.raises(ConfigError, match="both a room and a url"):
        StrongroomMiddleware(echo, room=room, url="json://:memory:")
    with pytest.raises(ConfigError, match="cache"):
        StrongroomMiddleware(echo, room=room, cache="memory://")


# --- The caller's address ---------------------------------------------------------------------------------------


async def test_a_forwarded_address_is_trusted_from_listed_proxies_only(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", allowed_ips=["203.0.113.0/24"])
    app = StrongroomMiddleware(echo, room=room, trusted_proxies=["10.0.0.0/8"])
    headers = {**bearer(issued.text), "x-forwarded-for": "203.0.113.9"}
    async with client(app, "10.1.1.1") as http:
        assert (await http.get("/", headers=headers)).status_code == 200
        # What the client wrote stands to the left of what the proxy saw.
        spoofed = {**headers, "x-forwarded-for": "203.0.113.9, 198.51.100.4"}
        check_refusal(await http.get("/", headers=spoofed), 403, "forbidden")
    async with client(app, "198.51.100.4") as http:
        check_refusal(await http.get("/", headers=headers), 403, "forbidden")
    async with client(StrongroomMiddleware(echo, room=room), "10.1.1.1") as http:
        check_refusal(await http.get("/", headers=headers), 403, "forbidden")


async def test_a_peer_without_an_address_is_not_an_allowed_address(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", allowed_ips=["0.0.0.0/0"])
    free = await room.keys.create(name="free")
    async with client(StrongroomMiddleware(echo, room=room), "a-unix-socket") as http:
        check_refusal(await http.get("/", headers=bearer(issued.text)), 403, "forbidden")
        assert (await http.get("/", headers=bearer(free.text))).status_code == 200


_PROXIES = _core.networks("trusted_proxies", ["10.0.0.0/8", "fd00::/8"])
_proxy = st.one_of(
    st.ip_addresses(network="10.0.0.0/8").map(str),
    st.ip_addresses(network="fd00::/8").map(str),
    st.ip_addresses(network="10.0.0.0/8").map(lambda ip: f"::ffff:{ip}"),
)
_caller = st.ip_addresses(network="203.0.113.0/24").map(str)
_anything = st.one_of(_proxy, _caller, st.text("0123456789abcdef:., []x", max_size=20))


@given(st.lists(_anything, max_size=4), _caller, st.lists(_proxy, max_size=3), _proxy)
def test_a_client_cannot_forge_its_forwarded_address(
    written: list[str], caller: str, proxies: list[str], peer: str
) -> None:
    """The proxies append: the caller's own address stands right of everything that it wrote itself."""
    forwarded = ",".join([*written, caller, *proxies]).encode()
    assert addresses.client_address(peer, [forwarded], _PROXIES) == caller


@given(st.lists(_anything, max_size=4), _caller)
def test_a_peer_that_is_not_a_proxy_is_the_client(written: list[str], peer: str) -> None:
    assert addresses.client_address(peer, [",".join(written).encode()], _PROXIES) == peer


@given(_caller, st.integers(1, 65_535))
def test_a_port_in_a_forwarded_address_is_ignored(caller: str, port: int) -> None:
    assert addresses.address(f"{caller}:{port}") == caller
    assert addresses.address(f"[::1]:{port}") == "::1"


# --- WebSockets -------------------------------------------------------------------------------------------------


async def _accepting(scope: Scope, receive: Receive, send: Send) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})


async def test_a_websocket_is_accepted_with_a_key_and_closed_without(room: Strongroom) -> None:
    issued = await room.keys.create(name="k")
    app = StrongroomMiddleware(_accepting, room=room)
    assert await speak(app, websocket(headers=bearer(issued.text))) == [{"type": "websocket.accept"}]
    closed = await speak(app, websocket())
    assert [(m["type"], m.get("code")) for m in closed] == [("websocket.close", 1008)]


async def test_a_websocket_is_refused_with_a_status_where_the_server_can(room: Strongroom) -> None:
    app = StrongroomMiddleware(_accepting, room=room)
    sent = await speak(app, websocket(extensions={"websocket.http.response": {}}))
    assert [m["type"] for m in sent] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert sent[0]["status"] == 401
    assert dict(sent[0]["headers"])[b"content-type"] == b"application/problem+json"


# --- Lifespan ---------------------------------------------------------------------------------------------------


async def test_a_store_url_is_opened_at_startup_and_closed_at_shutdown(tmp_path: Path) -> None:
    events: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await echo(scope, receive, send)
            return
        assert isinstance(scope["state"]["strongroom"], Strongroom)
        for answer in ("startup", "shutdown"):
            message: Message = await receive()
            events.append(message["type"])
            await send({"type": f"lifespan.{answer}.complete"})

    middleware = StrongroomMiddleware(app, url=f"sqlite:///{tmp_path}/a.db")
    async with lifespan(middleware) as state:
        issued = await state["strongroom"].keys.create(name="k")
        async with client(middleware) as http:
            assert (await http.get("/", headers=bearer(issued.text))).status_code == 200
    assert events == ["lifespan.startup", "lifespan.shutdown"]
    async with Strongroom.open(f"sqlite:///{tmp_path}/a.db") as room:  # closed: its lock is free
        assert (await room.keys.verify(issued.text)).valid


async def _with_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    for moment in ("startup", "shutdown"):
        assert (await receive())["type"] == f"lifespan.{moment}"
        await send({"type": f"lifespan.{moment}.complete"})


@pytest.mark.parametrize("application", [_with_lifespan, echo], ids=["with a lifespan", "without"])
async def test_the_server_learns_of_the_shutdown_when_it_is_complete(application: Any) -> None:
    """A server may stop its event loop then, in the middle of what is still to be written."""
    state: dict[str, Any] = {}
    incoming: list[Message] = [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]
    told: list[str] = []

    async def receive() -> Message:
        return incoming.pop()

    async def send(message: Message) -> None:
        told.append(message["type"])
        if message["type"] == "lifespan.shutdown.complete":
            with pytest.raises(StrongroomError):
                await state["strongroom"].keys.create(name="late")

    app = StrongroomMiddleware(application, url="json://:memory:")
    await app({"type": "lifespan", "state": state}, receive, send)
    assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def _http_alone(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http", "only HTTP is known here"
    await echo(scope, receive, send)


async def _silent(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await echo(scope, receive, send)


@pytest.mark.parametrize("app", [_http_alone, _silent, echo], ids=["raises", "returns", "answers as to HTTP"])
async def test_an_application_without_a_lifespan_still_gets_an_open_store(app: Any) -> None:
    middleware = StrongroomMiddleware(app, url="json://:memory:")
    async with lifespan(middleware) as state, client(middleware) as http:
        issued = await state["strongroom"].keys.create(name="k")
        assert (await http.get("/", headers=bearer(issued.text))).status_code == 200


async def test_a_store_that_the_application_opened_is_found_in_the_lifespan_state(room: Strongroom) -> None:
    issued = await room.keys.create(name="k")
    middleware = StrongroomMiddleware(echo)

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        await middleware({**scope, "state": {"strongroom": room}}, receive, send)

    async with client(server) as http:
        assert (await http.get("/", headers=bearer(issued.text))).status_code == 200


async def test_a_store_that_cannot_be_opened_stops_the_server_and_keeps_its_password() -> None:
    url = "postgresql://me:hunter2-hunter2@127.0.0.1:1/nothing"
    with pytest.raises(RuntimeError) as caught:
        async with lifespan(StrongroomMiddleware(echo, url=url)):
            raise AssertionError("it was started")
    assert "hunter2" not in str(caught.value)


async def test_without_lifespan_events_a_store_url_is_not_opened_and_an_error_says_so() -> None:
    async with client(StrongroomMiddleware(echo, url="json://:memory:")) as http:
        with pytest.raises(ConfigError, match="lifespan"):
            await http.get("/", headers=bearer("x"))


def test_no_framework_is_imported_before_its_integration() -> None:
    script = (
        "import sys, strongroom.integrations.asgi, strongroom.blocking; "
        "print(sorted({'fastapi', 'starlette', 'flask', 'django', 'uvicorn'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


async def test_a_failing_startup_is_not_mistaken_for_a_missing_lifespan(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise OSError("its database is away")

    async with lifespan(StrongroomMiddleware(broken, url="json://:memory:")):
        assert "its database is away" in caplog.text
