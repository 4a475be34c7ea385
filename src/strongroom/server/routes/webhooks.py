"""The routes of webhooks: endpoints, the rotation of their secrets, test events, deliveries and their redrive."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from ...cooperative import in_slices
from ...database import Replayed, RequestKey
from ...entities import DEFAULT_LIMIT, MAX_LIMIT, parse
from ...errors import NotFound
from ...webhooks import (
    DEFAULT_OVERLAP_S,
    MAX_OVERLAP_S,
    Delivery,
    IssuedWebhook,
    NewWebhook,
    Webhook,
    WebhookChanges,
    WebhookFields,
)
from ..auth import Caller, Scope
from ..idempotent_calls import nothing, run_once
from ..openapi import about, body, may_be_unchanged, takes, tells
from ..services import services_of
from ..shapes import Closed
from ..wire import (
    Json,
    Preconditions,
    body_fields,
    caller_of,
    context_of,
    etag,
    not_modified,
    read,
    room_of,
)

HIDDEN = frozenset({"secret", "previous_secret"})
"""Fields of an endpoint that no answer contains."""
F = TypeVar("F", bound=WebhookFields)
PATH = "/v1/webhooks"
routes = APIRouter(tags=["webhooks"])


class WebhookOut(BaseModel):
    """An endpoint. `failing_since` is set while every attempt fails; `disabled_reason` says why it was disabled."""

    id: str
    tenant: str
    url: str
    events: list[str]
    thresholds: list[int]
    min_window_s: int
    description: str | None
    enabled: bool
    allow_private: bool
    previous_until: datetime | None = Field(description="When the previous secret stops signing.")
    failing_since: datetime | None
    disabled_reason: str | None
    version: int
    created_at: datetime
    updated_at: datetime


class IssuedWebhookOut(WebhookOut):
    """An endpoint with its secret, which only this answer contains."""

    secret: str


class WebhookListOut(BaseModel):
    items: list[WebhookOut]
    next_cursor: str | None


class RotateSecretIn(Closed):
    overlap_s: int = Field(DEFAULT_OVERLAP_S, ge=0, le=MAX_OVERLAP_S, description="Seconds that both secrets sign.")


class DeliveryOut(BaseModel):
    """The delivery of one event to one endpoint. `due_at`: when it is attempted next."""

    id: str
    webhook_id: str
    tenant: str
    event_id: str
    event_type: str
    state: Literal["pending", "delivered", "dead"]
    attempts: int
    due_at: datetime | None
    last_attempt_at: datetime | None
    last_status: int | None
    last_error: str | None
    delivered_at: datetime | None
    expires_at: datetime
    version: int
    created_at: datetime
    updated_at: datetime


class DeliveryListOut(BaseModel):
    items: list[DeliveryOut]
    next_cursor: str | None


class WebhookListQuery(Closed):
    tenant: str | None = Field(None, description="Only this tenant's endpoints.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


class DeliveryListQuery(Closed):
    state: Literal["pending", "delivered", "dead"] | None = Field(None, description="Only deliveries in this state.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


@routes.post(
    PATH,
    status_code=201,
    response_model=IssuedWebhookOut,
    openapi_extra=about(body(NewWebhook), tells("ETag", "Location", status=201)),
    summary="Create a webhook",
)
async def create_webhook(request: Request) -> Response:
    """Only this answer contains the endpoint's secret. `tenant` defaults to the caller's tenant, else to `default`. An
    endpoint of `*` receives the events of every tenant. Only an administrator who is bound to no tenant sets
    `allow_private`, or the tenant `*`."""
    caller = _writer(request)
    new = await _parsed(request, NewWebhook, {"tenant": caller.tenant} if caller.tenant is not None else {})
    context = context_of(request)

    async def work(key: RequestKey | None) -> IssuedWebhook:
        return await room_of(request).webhooks.create(new, context=context, idempotency_key=key)

    return _issued(await run_once(request, context, work, _issued_before(request)), 201)


@routes.get(PATH, response_model=WebhookListOut, summary="List webhooks, newest first")
async def list_webhooks(request: Request, query: Annotated[WebhookListQuery, Query()]) -> Response:
    caller_of(request).needs(Scope.READ)
    page = await room_of(request).webhooks.list(**query.model_dump(), context=context_of(request))
    return Json({"items": await in_slices(shown, page.items), "next_cursor": page.next_cursor})


@routes.get(PATH + "/{id}", response_model=WebhookOut, openapi_extra=may_be_unchanged(), summary="Show a webhook")
async def get_webhook(request: Request, id: str) -> Response:
    caller_of(request).needs(Scope.READ)
    webhook = await room_of(request).webhooks.get(id, context=context_of(request))
    if not_modified(request, webhook.version):
        return Response(status_code=304, headers={"etag": etag(webhook.version)})
    return _answer(webhook)


@routes.patch(
    PATH + "/{id}",
    response_model=WebhookOut,
    openapi_extra=about(body(WebhookChanges), takes("If-Match"), tells("ETag")),
    summary="Change some fields of a webhook",
)
async def update_webhook(request: Request, id: str) -> Response:
    """Other fields keep their value. To enable an endpoint clears its failures."""
    _writer(request)
    context = context_of(request)

    async def work(key: RequestKey | None) -> Webhook:
        changes = await _parsed(request, WebhookChanges)
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(lambda: _version(request, id))
            return await room_of(request).webhooks.update(
                id, changes, context=context, expected=expected, idempotency_key=key
            )

    async def again(replayed: Replayed) -> Webhook:
        return await room_of(request).webhooks.answered_before(replayed, context=context)

    return _answer(await run_once(request, context, work, again))


@routes.delete(
    PATH + "/{id}",
    status_code=204,
    response_class=Response,
    openapi_extra=takes("If-Match"),
    summary="Delete a webhook",
)
async def delete_webhook(request: Request, id: str) -> Response:
    """Its pending deliveries are not sent any more."""
    _writer(request)
    context = context_of(request)

    async def work(key: RequestKey | None) -> None:
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(lambda: _version(request, id))
            await room_of(request).webhooks.delete(id, context=context, expected=expected, idempotency_key=key)

    await run_once(request, context, work, nothing)
    return Response(status_code=204)


@routes.post(
    PATH + "/{id}/rotate-secret",
    response_model=IssuedWebhookOut,
    openapi_extra=about(body(RotateSecretIn, required=False), takes("If-Match"), tells("ETag")),
    summary="Rotate a webhook's secret",
)
async def rotate_webhook_secret(request: Request, id: str) -> Response:
    """Only this answer contains the new secret. The previous secret signs beside it for `overlap_s` seconds."""
    _writer(request)
    context = context_of(request)

    async def work(key: RequestKey | None) -> IssuedWebhook:
        asked = await read(request, RotateSecretIn) if await request.body() else RotateSecretIn()
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(lambda: _version(request, id))
            overlap_s = asked.overlap_s
            return await room_of(request).webhooks.rotate_secret(
                id, overlap_s=overlap_s, context=context, expected=expected, idempotency_key=key
            )

    return _issued(await run_once(request, context, work, _issued_before(request)), 200)


# --- Deliveries -----------------------------------------------------------------------------------------------


@routes.post(PATH + "/{id}/test", response_model=DeliveryOut, summary="Test a webhook")
async def test_webhook(request: Request, id: str) -> Response:
    """Makes one attempt and returns its result: `delivered` or `dead`. A disabled endpoint can be tested too."""
    _writer(request)
    context = context_of(request)

    async def work() -> Response:
        return Json(seen(await room_of(request).deliveries.test(id, context=context)))

    return await services_of(request).answers.answered(request, context, work)


@routes.get(PATH + "/{id}/deliveries", response_model=DeliveryListOut, summary="A webhook's deliveries")
async def list_deliveries(request: Request, id: str, query: Annotated[DeliveryListQuery, Query()]) -> Response:
    """Newest first. Deliveries are kept for 30 days."""
    caller_of(request).needs(Scope.READ)
    page = await room_of(request).deliveries.list(id, **query.model_dump(), context=context_of(request))
    return Json({"items": await in_slices(seen, page.items), "next_cursor": page.next_cursor})


@routes.get("/v1/deliveries/{id}", response_model=DeliveryOut, summary="Show a delivery")
async def get_delivery(request: Request, id: str) -> Response:
    caller_of(request).needs(Scope.READ)
    return Json(seen(await room_of(request).deliveries.get(id, context=context_of(request))))


@routes.post("/v1/deliveries/{id}/redrive", response_model=DeliveryOut, summary="Redrive a delivery")
async def redrive_delivery(request: Request, id: str) -> Response:
    """Starts the delivery again with all its retries, under the same event id. A pending delivery is attempted now."""
    _writer(request)
    context = context_of(request)

    async def work() -> Response:
        return Json(seen(await room_of(request).deliveries.redrive(id, context=context)))

    return await services_of(request).answers.answered(request, context, work)


# --- Helpers --------------------------------------------------------------------------------------------------


def _issued_before(request: Request) -> Callable[[Replayed], Awaitable[IssuedWebhook]]:
    return lambda replayed: room_of(request).webhooks.issued_before(replayed, context=context_of(request))


async def _version(request: Request, id: str) -> int | None:
    """The endpoint's version; None if there is no such endpoint."""
    try:
        return (await room_of(request).webhooks.get(id, context=context_of(request))).version
    except NotFound:
        return None


def shown(webhook: Webhook) -> dict[str, Any]:
    """An endpoint's fields for callers."""
    return {name: value for name, value in webhook.model_dump().items() if name not in HIDDEN}


def seen(delivery: Delivery) -> dict[str, Any]:
    """A delivery's fields for callers."""
    return delivery.model_dump()


def _answer(webhook: Webhook, status: int = 200, **more: Any) -> Response:
    return Json({**shown(webhook), **more}, status, headers={"etag": etag(webhook.version)})


def _issued(made: IssuedWebhook, status: int) -> Response:
    answer = _answer(made.webhook, status, secret=made.secret)
    if status == 201:
        answer.headers["location"] = f"/v1/webhooks/{quote(made.webhook.id, safe='')}"
    return answer


def _writer(request: Request) -> Caller:
    caller = caller_of(request)
    caller.needs(Scope.WRITE)
    return caller


async def _parsed(request: Request, model: type[F], defaults: Mapping[str, Any] = MappingProxyType({})) -> F:
    """The fields of the body. Raises InvalidInput with every problem."""
    return parse(model, {**defaults, **await body_fields(request)})
