"""Django: the middleware and the decorator, with sync and async views, in WSGI and in ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, JsonResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path

from strongroom import IssuedKey
from strongroom.blocking import BlockingStrongroom
from strongroom.errors import InvalidInput
from strongroom.integrations.django import api_key, public, reserve, verification_of
from tests.helpers.asgi_calls import REQUESTS, bearer, fields
from tests.helpers.asgi_calls import check_refusal as check

if not settings.configured:
    settings.configure(
        ALLOWED_HOSTS=["*"],
        LOGGING_CONFIG=None,
        MIDDLEWARE=["strongroom.integrations.django.StrongroomMiddleware"],
        SECRET_KEY="only-for-tests",
        USE_TZ=True,
    )
    django.setup()


def any_key(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"user": verification_of(request).user_id})


@api_key(permission="chat:write", cost=lambda request: {"requests": 1, "tokens": int(request.GET.get("n", 1))})
def chat(request: HttpRequest, id: int) -> JsonResponse:
    return JsonResponse({"user": verification_of(request).user_id, "id": id})


@api_key(permission="chat:write")
async def later(request: HttpRequest, id: int) -> JsonResponse:
    await asyncio.sleep(0)
    return JsonResponse({"user": verification_of(request).user_id, "id": id})


@api_key(cost={"requests": 1})
def holding(request: HttpRequest) -> JsonResponse:
    with reserve(request, cost={"tokens": 500}):
        return JsonResponse({})


@api_key(cost={"requests": 1})
async def holding_later(request: HttpRequest) -> JsonResponse:
    async with reserve(request, cost={"tokens": 500}):
        return JsonResponse({})


@public
def free(request: HttpRequest) -> JsonResponse:
    with pytest.raises(LookupError):
        verification_of(request)
    return JsonResponse({})


class Urls:
    """What Django takes for the module of URLs."""

    urlpatterns = (
        path("any/", any_key),
        path("chat/<int:id>/", chat),
        path("later/<int:id>/", later),
        path("free/", free),
        path("holding/", holding),
        path("holding_later/", holding_later),
        path("healthz", any_key),
    )


Get = Callable[..., Awaitable[Any]]


@pytest.fixture
def room(tmp_path: Path) -> Iterator[BlockingStrongroom]:
    with BlockingStrongroom(f"sqlite:///{tmp_path}/a.db") as room:
        yield room


@pytest.fixture(params=["wsgi", "asgi"])
def get(request: pytest.FixtureRequest) -> Get:
    """A GET request through Django's handler of each kind."""

    async def call(url: str, headers: dict[str, str] | None = None, **more: Any) -> Any:
        if request.param == "wsgi":
            return await asyncio.to_thread(lambda: Client().get(url, headers=headers, **more))
        return await AsyncClient().get(url, headers=headers, **more)

    return call


def using(room: BlockingStrongroom, **more: Any) -> Any:
    return override_settings(ROOT_URLCONF=Urls, STRONGROOM={"room": room, **more})


async def make(room: BlockingStrongroom, **given: Any) -> IssuedKey:
    return await room.acall(lambda inner: inner.keys.create(name="k", **given))


def check_refusal(answer: Any, status: int, code: str) -> None:
    check(answer, status, code)


@pytest.mark.parametrize("view", ["chat", "later"])
async def test_a_decorated_view_is_called_only_with_a_valid_key(room: BlockingStrongroom, get: Get, view: str) -> None:
    good = await make(room, user_id="u1", permissions=["chat:write"], limits=[REQUESTS])
    reader = await make(room, permissions=["chat:read"])
    with using(room):
        check_refusal(await get(f"/{view}/3/"), 401, "unauthenticated")
        check_refusal(await get(f"/{view}/3/", bearer("x")), 401, "not_found")
        check_refusal(await get(f"/{view}/3/", bearer(reader.text)), 403, "insufficient_permissions")
        answers = [await get(f"/{view}/3/?n=7", bearer(good.text)) for _ in range(3)]
    assert answers[0].json() == {"user": "u1", "id": 3}
    assert fields(answers[0].headers["RateLimit"])["requests-rolling-3600"]["r"] == 1
    check_refusal(answers[2], 429, "rate_limited")
    stats = await room.acall(lambda inner: inner.keys.stats(good.key.id))
    assert stats.totals == {
        "requests": 2,
        **({"tokens": 14} if view == "chat" else {}),
    }  # charged by the decorator alone


@pytest.mark.parametrize("view", ["holding", "holding_later"])
async def test_a_denied_reservation_refunds_the_charge_of_the_request(
    room: BlockingStrongroom, get: Get, view: str
) -> None:
    tokens = {"resource": "tokens", "limit": 100, "window": {"kind": "total"}}
    issued = await make(room, limits=[REQUESTS, tokens])
    with using(room):
        check_refusal(await get(f"/{view}/", bearer(issued.text)), 429, "usage_exceeded")
    stats = await room.acall(lambda inner: inner.keys.stats(issued.key.id))
    assert (stats.count, [int(limit.used) for limit in stats.limits]) == (0, [0, 0])


async def test_every_view_needs_a_key_except_public_views_and_exempt_paths(room: BlockingStrongroom, get: Get) -> None:
    issued = await make(room, user_id="u1")
    with using(room, exempt=["/healthz"]):
        check_refusal(await get("/any/"), 401, "unauthenticated")
        assert (await get("/any/", bearer(issued.text))).json() == {"user": "u1"}
        assert (await get("/free/")).status_code == 200
        with pytest.raises(LookupError):  # let in without a key, so its view finds none
            await get("/healthz")
        assert (await get("/nothing/")).status_code == 404


async def test_only_decorated_views_need_a_key_where_that_is_set(room: BlockingStrongroom, get: Get) -> None:
    with using(room, everywhere=False):
        with pytest.raises(LookupError):
            await get("/any/")
        check_refusal(await get("/chat/3/"), 401, "unauthenticated")


async def test_the_middlewares_own_requirements_apply_to_every_view(room: BlockingStrongroom, get: Get) -> None:
    issued = await make(room, permissions=["read"], limits=[{**REQUESTS, "resource": "tokens"}])
    with using(room, permission="read", cost={"tokens": 2}, header="X-API-Key"):
        assert (await get("/any/", {"x-api-key": issued.text})).status_code == 200
        check_refusal(await get("/any/", {"x-api-key": issued.text}), 429, "usage_exceeded")
        check_refusal(await get("/any/", bearer(issued.text)), 401, "unauthenticated")
    with using(room, permission="write"):
        check_refusal(await get("/any/", bearer(issued.text)), 403, "insufficient_permissions")


async def test_a_route_is_named_by_its_pattern(room: BlockingStrongroom, get: Get) -> None:
    issued = await make(room, permissions=["chat:*"], allowed_routes=["GET /chat/<int:id>/"])
    with using(room):
        assert (await get("/chat/3/", bearer(issued.text))).status_code == 200
        check_refusal(await get("/any/", bearer(issued.text)), 403, "insufficient_permissions")


async def test_a_forwarded_address_is_trusted_from_listed_proxies_only(room: BlockingStrongroom, get: Get) -> None:
    issued = await make(room, allowed_ips=["203.0.113.0/24"])
    headers = {**bearer(issued.text), "x-forwarded-for": "198.51.100.1, 203.0.113.9"}
    with using(room, trusted_proxies=["127.0.0.0/8"]):
        assert (await get("/any/", headers)).status_code == 200
    with using(room):
        check_refusal(await get("/any/", headers), 403, "forbidden")


async def test_invalid_settings_stop_the_start(room: BlockingStrongroom, get: Get) -> None:
    with using(room, permision="read"), pytest.raises(ImproperlyConfigured, match="permision"):
        await get("/any/")
    with using(room, cost={"tokens": -1}), pytest.raises(InvalidInput, match="tokens"):
        await get("/any/")
    with override_settings(STRONGROOM=None), pytest.raises(ImproperlyConfigured, match="STRONGROOM"):
        await get("/any/")


async def test_a_decorator_without_the_middleware_admits_no_request(room: BlockingStrongroom, get: Get) -> None:
    issued = await make(room, permissions=["chat:write"])
    with using(room), override_settings(MIDDLEWARE=[]), pytest.raises(ImproperlyConfigured, match="MIDDLEWARE"):
        await get("/chat/3/", bearer(issued.text))
