"""Writes off: turn the writes of all tenants, or of one, off and on; and whether they are on."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from ...database import Replayed, RequestKey
from ...entities import DEFAULT_LIMIT, MAX_LIMIT, parse
from ...tenants import WritesChange, WritesOf
from ..auth import Scope
from ..idempotent_calls import run_once
from ..openapi import about, body, may_fail
from ..shapes import Closed
from ..wire import Json, body_fields, caller_of, context_of, room_of

routes = APIRouter(tags=["writes"])

PATH = "/v1/writes"


class WritesOut(BaseModel):
    """Whether writes of one tenant, or (null) of all, are on, who turned them last, and why."""

    tenant: str | None
    allowed: bool
    usage: bool = Field(description="Whether verification, usage and reservations go on.")
    reason: str | None
    by: str | None
    changed_at: datetime | None


class WritesStatusOut(WritesOut):
    """The switch for all tenants, and the tenants whose own switch is off."""

    migration: str | None = Field(description="Why a migration lets nothing be written; null if none does.")
    items: list[WritesOut]
    next_cursor: str | None = Field(description="Null on the last page. Otherwise more may follow.")


class WritesQuery(Closed):
    tenant: str | None = Field(None, description="Only this tenant.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


@routes.get(PATH, response_model=WritesStatusOut, summary="Whether writes are on")
async def writes_status(request: Request, query: Annotated[WritesQuery, Query()]) -> Response:
    """The switch for all tenants, and each tenant whose own switch is off. A caller of one tenant sees that tenant."""
    caller_of(request).needs(Scope.READ)
    status = await room_of(request).writes.status(**query.model_dump(), context=context_of(request))
    return Json(status.model_dump())


@routes.post(
    PATH,
    response_model=WritesOut,
    openapi_extra=about(body(WritesChange), may_fail("not_found", "conflict")),
    summary="Turn writes off or on",
)
async def turn_writes(request: Request) -> Response:
    """On every server within a second. Calls that are refused meanwhile are answered with 503 and the code
    `writes_off`. Reads go on, and without `"usage": false` verification, usage and reservations too. Only an
    administrator of all tenants turns writes off or on."""
    caller_of(request).needs(Scope.ADMIN)
    writes, context = room_of(request).writes, context_of(request)

    async def work(key: RequestKey | None) -> WritesOf:
        change = parse(WritesChange, await body_fields(request))
        return await writes.set(change, context=context, idempotency_key=key)

    async def again(replayed: Replayed) -> WritesOf:
        return await writes.answered_before(replayed, context=context)

    return Json((await run_once(request, context, work, again)).model_dump())
