"""Starlette and FastAPI: their own authentication and dependencies, over keys verified in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from strongroom import Strongroom, Verification
from strongroom.errors import ConfigError, InvalidInput
from strongroom.integrations import fastapi as ours
from strongroom.integrations.fastapi import RESPONSES, ApiKeyAuth, install
from strongroom.integrations.starlette import (
    ApiKeyBackend,
    ApiKeyUser,
    KeyRefused,
    StrongroomMiddleware,
    refused,
    templates,
)
from strongroom.keys.refund import Charged
from tests.helpers.asgi_calls import (
    JSON,
    REQUESTS,
    bearer,
    check_refusal,
    client,
    fields,
    lifespan,
    speak,
    websocket,
)

HUNDRED = {**REQUESTS, "limit": 100}


@pytest.fixture
async def room() -> AsyncIterator[Strongroom]:
    async with Strongroom.open("json://:memory:") as room:
        yield room


@pytest.fixture
def routes_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Strongroom], list[str | None]]:
    """The routes that a room's keys are verified for from now on."""

    def watch(room: Strongroom) -> list[str | None]:
        asked: list[str | None] = []
        verify = room.keys.verify_charged

        async def watching(text: str, **more: Any) -> Charged:
            asked.append(more.get("route"))
            return await verify(text, **more)

        monkeypatch.setattr(room.keys, "verify_charged", watching)
        return asked

    return watch


# --- Starlette --------------------------------------------------------------------------------------------------


def starlette(room: Strongroom, **settings: Any) -> Starlette:
    async def who(request: Request) -> JSONResponse:
        user = request.user
        name = user.display_name if user.is_authenticated else None
        return JSONResponse({"user": name, "tenant": getattr(user, "tenant", None)})

    @requires("chat:write")
    async def write(request: Request) -> JSONResponse:
        return JSONResponse({"wrote": True})

    routes = [
        Route("/who", who),
        Route("/write/{id}", write, methods=["POST"]),
        Mount("/v2", routes=[Route("/who/{id:int}", who)]),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(StrongroomMiddleware, room=room, exempt=["/who"], route=templates(routes), **settings),
            Middleware(AuthenticationMiddleware, backend=ApiKeyBackend()),
        ],
    )


async def test_starlettes_user_is_the_key_and_requires_checks_its_permissions(room: Strongroom) -> None:
    all_chat = await room.keys.create(name="k", tenant="acme", user_id="u1", permissions=["chat:*"])
    reader = await room.keys.create(name="r", permissions=["chat:read"])
    async with client(starlette(room)) as http:
        answer = await http.get("/v2/who/3", headers=bearer(all_chat.text))
        assert answer.json() == {"user": "u1", "tenant": "acme"}
        assert (await http.get("/who")).json() == {"user": None, "tenant": None}  # exempt
        assert (await http.post("/write/1", headers=bearer(all_chat.text))).status_code == 200
        assert (await http.post("/write/1", headers=bearer(reader.text))).status_code == 403
        check_refusal(await http.post("/write/1"), 401, "unauthenticated")


async def test_middleware_before_the_router_sees_the_route_template(
    room: Strongroom, routes_of: Callable[[Strongroom], list[str | None]]
) -> None:
    issued = await room.keys.create(name="k", permissions=["chat:write"])
    asked = routes_of(room)
    async with client(starlette(room)) as http:
        for method, path in (("POST", "/write/1"), ("GET", "/v2/who/7"), ("GET", "/nothing")):
            await http.request(method, path, headers=bearer(issued.text))
    assert asked == ["POST /write/{id}", "GET /v2/who/{id:int}", "GET /nothing"]


async def test_a_backend_without_the_middleware_authenticates_nobody() -> None:
    assert await ApiKeyBackend().authenticate(HTTPConnection({"type": "http", "headers": []})) is None


async def test_an_exception_handler_answers_denials_inside_the_middleware(room: Strongroom) -> None:
    async def view(request: Request) -> JSONResponse:
        from strongroom.integrations import _core

        raise KeyRefused(_core.missing("authorization", "for a test"))

    app = Starlette(routes=[Route("/", view)], exception_handlers={KeyRefused: refused})
    async with client(app) as http:
        check_refusal(await http.get("/"), 401, "unauthenticated")


# --- FastAPI ----------------------------------------------------------------------------------------------------

Writer = Annotated[Verification, Depends(ApiKeyAuth(permission="chat:write", cost={"requests": 1, "tokens": 5}))]
Own = Annotated[Verification, Depends(ApiKeyAuth(header="X-API-Key", scheme_name="OwnHeader"))]


def again(key: Writer) -> str | None:
    return key.key_id


def fastapi(**settings: Any) -> FastAPI:
    app = FastAPI()
    install(app, **settings)

    @app.post("/chat/{id}", responses=RESPONSES)
    async def chat(id: int, key: Writer, same: Annotated[str | None, Depends(again)]) -> JSON:
        return {"user": key.user_id, "same": same == key.key_id}

    @app.get("/own")
    async def own(key: Own) -> JSON:
        return {"user": key.user_id}

    @app.get("/open")
    async def open_to_all() -> JSON:
        return {}

    @app.websocket("/live")
    async def live(socket: WebSocket, key: Writer) -> None:
        await socket.accept()
        await socket.close()

    included = APIRouter()

    @included.get("/items/{id}")
    async def item(id: int, key: Writer) -> JSON:
        return {}

    app.include_router(included, prefix="/v1")
    app.include_router(included, prefix="/v2/{org}")
    below = FastAPI()
    install(below)
    below.include_router(included, prefix="/deep")
    app.mount("/sub", below)
    return app


async def test_a_dependency_returns_the_verification_and_charges_once_a_request(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", user_id="u1", permissions=["chat:write"], limits=[REQUESTS])
    async with client(fastapi(room=room)) as http:
        answers = [await http.post("/chat/3", headers=bearer(issued.text)) for _ in range(3)]
        assert answers[0].json() == {"user": "u1", "same": True}
        assert fields(answers[0].headers["ratelimit"])["requests-rolling-3600"]["r"] == 1
        assert (await http.get("/open")).status_code == 200
        assert "ratelimit" not in (await http.get("/open")).headers
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    check_refusal(answers[2], 429, "rate_limited")
    assert (await room.keys.stats(issued.key.id)).totals == {"requests": 2, "tokens": 10}


async def test_a_dependency_denies_with_problem_documents(room: Strongroom) -> None:
    reader = await room.keys.create(name="k", permissions=["chat:read"])
    async with client(fastapi(room=room)) as http:
        check_refusal(await http.post("/chat/3"), 401, "unauthenticated")
        check_refusal(await http.post("/chat/3", headers=bearer("x")), 401, "not_found")
        check_refusal(await http.post("/chat/3", headers=bearer(reader.text)), 403, "insufficient_permissions")
        assert (await http.get("/own", headers={"x-api-key": reader.text})).status_code == 200
        check_refusal(await http.get("/own", headers=bearer(reader.text)), 401, "unauthenticated")


async def test_each_route_is_named_by_its_whole_template(
    room: Strongroom, routes_of: Callable[[Strongroom], list[str | None]]
) -> None:
    """One router included twice is two routes: a key for one of them is not one for the other."""
    issued = await room.keys.create(name="k", permissions=["chat:write"])
    asked = routes_of(room)
    async with client(fastapi(room=room)) as http:
        await http.post("/chat/3", headers=bearer(issued.text))
        for path in ("/v1/items/3", "/v2/acme/items/3", "/sub/deep/items/3"):
            assert (await http.get(path, headers=bearer(issued.text))).status_code == 200
    assert asked == [
        "POST /chat/{id}",
        "GET /v1/items/{id}",
        "GET /v2/{org}/items/{id}",
        "GET /sub/deep/items/{id}",
    ]


async def test_a_trusted_proxy_is_trusted_below_a_mount_too(room: Strongroom) -> None:
    issued = await room.keys.create(
        name="k", permissions=["chat:write"], allowed_ips=["203.0.113.0/24"], limits=[HUNDRED]
    )
    headers = {**bearer(issued.text), "x-forwarded-for": "203.0.113.9"}
    app = fastapi(room=room, trusted_proxies=["10.0.0.0/8"])
    for path in ("/v1/items/3", "/sub/deep/items/3"):
        async with client(app, "10.0.0.1") as http:
            answer = await http.get(path, headers=headers)
            assert answer.status_code == 200
            assert len(answer.headers.get_list("ratelimit")) == 1  # though it came through two middlewares
        async with client(app, "192.0.2.1") as http:
            check_refusal(await http.get(path, headers=headers), 403, "forbidden")


async def test_a_websocket_has_the_same_dependency(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", permissions=["chat:write"])
    app = fastapi(room=room)
    accepted = await speak(app, websocket(headers=bearer(issued.text)))
    assert [m["type"] for m in accepted] == ["websocket.accept", "websocket.close"]
    assert [(m["type"], m["code"]) for m in await speak(app, websocket())] == [("websocket.close", 1008)]


async def test_openapi_shows_the_key_as_a_security_scheme(room: Strongroom) -> None:
    schema = fastapi(room=room).openapi()
    assert schema["components"]["securitySchemes"] == {
        "ApiKey": {"type": "http", "scheme": "bearer", "bearerFormat": "API key"},
        "OwnHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    assert schema["paths"]["/chat/{id}"]["post"]["security"] == [{"ApiKey": []}]
    assert "application/problem+json" in schema["paths"]["/chat/{id}"]["post"]["responses"]["429"]["content"]
    assert "security" not in schema["paths"]["/open"]["get"]


async def test_fastapis_own_lifespan_runs_with_an_open_store(tmp_path: Any) -> None:
    app = fastapi(url=f"sqlite:///{tmp_path}/a.db")
    async with lifespan(app) as state, client(app) as http:
        issued = await state["strongroom"].keys.create(name="k", permissions=["chat:write"])
        assert (await http.post("/chat/3", headers=bearer(issued.text))).status_code == 200


async def test_an_invalid_option_is_refused_where_it_is_declared(room: Strongroom) -> None:
    with pytest.raises(InvalidInput, match=r"cost\.tokens"):
        ApiKeyAuth(cost={"tokens": -1})
    with pytest.raises(InvalidInput, match="trusted_proxies"):
        install(FastAPI(), room=room, trusted_proxies=["nowhere"])
    with pytest.raises(ConfigError, match="both"):
        StrongroomMiddleware(FastAPI(), room=room, url="json://:memory:")
    app = FastAPI()

    @app.get("/")
    async def view(key: Writer) -> None: ...

    async with client(app) as http:
        with pytest.raises(ConfigError, match="install"):
            await http.get("/", headers=bearer("x"))


def test_the_module_exports_what_an_application_needs() -> None:
    assert set(ours.__all__) >= {"ApiKeyAuth", "Verification", "install", "reserve", "KeyRefused"}
    assert ApiKeyUser(Verification(True, "VALID", "k1")).identity == "k1"
