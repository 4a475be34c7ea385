"""Tenants: list, create, show, change, suspend, resume, export, delete."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from ...cooperative import in_slices
from ...database import Replayed, RequestKey
from ...entities import DEFAULT_LIMIT, MAX_LIMIT, parse
from ...errors import InvalidInput, NotFound, Problem
from ...tenants import DeletionStatement, NewTenant, Reason, Tenant, TenantChanges, TenantFields, TenantStatus
from ..auth import Scope
from ..idempotent_calls import run_once
from ..openapi import about, body, may_be_unchanged, may_fail, takes, tells
from ..shapes import Closed
from ..wire import Json, Preconditions, body_fields, caller_of, context_of, etag, not_modified, room_of
from .entities import SLASH

routes = APIRouter(tags=["tenants"])

PATH = "/v1/tenants"
ONE = PATH + "/{tenant}"
DELETE_WITHIN_S = 5.0
"""A deletion that takes longer is answered with 202, and a job completes it."""
NDJSON = "application/x-ndjson"


class TenantOut(BaseModel):
    """A tenant. `version` 0 and `created_at` null: nobody created it, it has data. `suspended_at` and `reason`: since
    when, and why, it is suspended."""

    id: str
    name: str | None
    status: TenantStatus
    reason: str | None
    suspended_at: datetime | None
    plan: str | None
    contact_email: str | None
    region: str | None
    settings: dict[str, Any]
    metadata: dict[str, Any]
    version: int
    created_at: datetime | None
    updated_at: datetime | None


class TenantListOut(BaseModel):
    items: list[TenantOut]
    next_cursor: str | None = Field(description="Null on the last page. Otherwise more may follow.")


class DeletionStatementOut(BaseModel):
    """What a deletion removed, by collection. `journal_size` and `journal_root`: the tenant's tree in the journal when
    it ended. `note`: all of this as text, with its signature if `signed` (C2SP signed note)."""

    id: str
    tenant: str
    actor: str
    request_id: str
    reason: str | None
    started_at: datetime
    finished_at: datetime
    counts: dict[str, int]
    journal_size: int | None
    journal_root: str | None
    signed: bool
    note: str
    version: int
    created_at: datetime
    updated_at: datetime


class TenantListQuery(Closed):
    status: Literal["active", "suspended", "deleting"] | None = Field(None, description="Only tenants in this state.")
    plan: str | None = Field(None, description="Only tenants with this plan.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


class DeleteQuery(Closed):
    reason: str | None = Field(None, min_length=1, max_length=1_000, description="Why, for the statement.")


CREATED = about(tells("ETag", "Location", status=201), may_fail("already_exists"))
CHANGE = about(takes("If-Match"), tells("ETag"), may_fail("not_found"))


@routes.get(PATH, response_model=TenantListOut, summary="List tenants, by name")
async def list_tenants(request: Request, query: Annotated[TenantListQuery, Query()]) -> Response:
    """Names that have data are tenants too, also if nobody created them. A caller of one tenant gets that tenant."""
    caller_of(request).needs(Scope.READ)
    page = await room_of(request).tenants.list(**query.model_dump(), context=context_of(request))
    return Json({"items": await in_slices(Tenant.model_dump, page.items), "next_cursor": page.next_cursor})


@routes.post(
    PATH,
    status_code=201,
    response_model=TenantOut,
    openapi_extra=about(body(NewTenant), CREATED),
    summary="Create a tenant",
)
async def create_tenant(request: Request) -> Response:
    """`id` is the name that paths, keys and tokens have. A name that has data already keeps it. Only an administrator
    of all tenants creates tenants."""
    return await _create(request, None)


@routes.post(
    ONE,
    status_code=201,
    response_model=TenantOut,
    openapi_extra=about(body(TenantFields, required=False), CREATED),
    summary="Create the tenant of this name",
)
async def create_named_tenant(request: Request, tenant: str) -> Response:
    """As the other way, with the name in the path."""
    return await _create(request, _decoded(tenant))


@routes.get(
    ONE,
    response_model=TenantOut,
    openapi_extra=about(may_be_unchanged(always=False), may_fail("not_found")),
    summary="Show a tenant",
)
async def get_tenant(request: Request, tenant: str) -> Response:
    """A caller of one tenant sees that tenant. Without an ETag, nobody created it: it has data."""
    caller_of(request).needs(Scope.READ)
    found = await room_of(request).tenants.get(_decoded(tenant), context=context_of(request))
    if not_modified(request, found.version):
        return Response(status_code=304, headers={"etag": etag(found.version)})
    return _answer(found)


@routes.patch(
    ONE, response_model=TenantOut, openapi_extra=about(body(TenantChanges), CHANGE), summary="Change a tenant"
)
async def change_tenant(request: Request, tenant: str) -> Response:
    """Missing fields keep their values. `status` is changed by suspend and resume."""
    changes = room_of(request).tenants.update

    async def work(key: RequestKey | None, expected: int | None) -> Tenant:
        fields = parse(TenantChanges, await body_fields(request))
        return await changes(
            _decoded(tenant), fields, context=context_of(request), expected=expected, idempotency_key=key
        )

    return await _change(request, tenant, work)


@routes.post(
    ONE + "/suspend",
    response_model=TenantOut,
    openapi_extra=about(body(Reason, required=False), CHANGE),
    summary="Suspend a tenant",
)
async def suspend_tenant(request: Request, tenant: str) -> Response:
    """Within a second its keys verify as DISABLED and its writes are refused. Its data can still be read."""
    tenants = room_of(request).tenants

    async def work(key: RequestKey | None, expected: int | None) -> Tenant:
        fields = parse(Reason, await _fields(request))
        return await tenants.suspend(
            _decoded(tenant), fields.reason, context=context_of(request), expected=expected, idempotency_key=key
        )

    return await _change(request, tenant, work)


@routes.post(ONE + "/resume", response_model=TenantOut, openapi_extra=CHANGE, summary="Resume a tenant")
async def resume_tenant(request: Request, tenant: str) -> Response:
    """Takes a suspension back."""
    tenants = room_of(request).tenants

    async def work(key: RequestKey | None, expected: int | None) -> Tenant:
        await _nothing_given(request)
        return await tenants.resume(
            _decoded(tenant), context=context_of(request), expected=expected, idempotency_key=key
        )

    return await _change(request, tenant, work)


@routes.get(
    ONE + "/export",
    response_class=StreamingResponse,
    responses={200: {"content": {NDJSON: {"schema": {"type": "string"}}}, "description": "JSON Lines"}},
    openapi_extra=may_fail("not_found"),
    summary="Export a tenant, whole",
)
async def export_tenant(request: Request, tenant: str) -> Response:
    """Everything that the tenant has, and its journal, as JSON Lines, without any secret in clear. A file without a
    line of the type `end` was cut. An administrator of the tenant itself gets its keys without their hashes."""
    caller_of(request).needs(Scope.ADMIN)
    lines = await room_of(request).tenants.export(_decoded(tenant), context=context_of(request))
    return StreamingResponse(_chunks(lines), media_type=NDJSON, headers={"cache-control": "no-store"})


@routes.delete(
    ONE,
    response_model=DeletionStatementOut,
    responses={202: {"model": TenantOut, "description": "It takes longer, and is completed in the background."}},
    openapi_extra=about(takes("If-Match"), tells("ETag", status=202), may_fail("not_found")),
    summary="Delete a tenant and everything it has",
)
async def delete_tenant(request: Request, tenant: str, query: Annotated[DeleteQuery, Query()]) -> Response:
    """Answers with the signed statement of what was deleted. The tenant's journal stays until retention drops it. A
    call that was broken off can be repeated, and is completed in the background otherwise. 409 under a legal hold."""
    tenants, name, context = room_of(request).tenants, _decoded(tenant), context_of(request)
    caller_of(request).needs(Scope.ADMIN)

    async def work(key: RequestKey | None) -> DeletionStatement | None:
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(lambda: _version(request, name))
            return await tenants.delete(
                name,
                query.reason,
                context=context,
                expected=expected,
                within_s=DELETE_WITHIN_S,
                idempotency_key=key,
            )

    async def again(replayed: Replayed) -> DeletionStatement | None:
        return await tenants.deletion_begun_before(name, within_s=DELETE_WITHIN_S)

    statement = await run_once(request, context, work, again)
    if statement is None:
        return _answer(await tenants.get(name, context=context), 202)
    return Json(statement.model_dump())


async def _create(request: Request, name: str | None) -> Response:
    tenants, context = room_of(request).tenants, context_of(request)
    caller_of(request).needs(Scope.ADMIN)

    async def work(key: RequestKey | None) -> Tenant:
        new = await _new(request, name)
        return await tenants.create(new, context=context, idempotency_key=key)

    made = await run_once(request, context, work, _again(request))
    answer = _answer(made, 201)
    answer.headers["location"] = f"{PATH}/{quote(made.id, safe='')}"
    return answer


async def _new(request: Request, name: str | None) -> NewTenant:
    """The tenant from the body and the path. Raises InvalidInput with every problem."""
    if name is None:
        return parse(NewTenant, await body_fields(request))
    fields = await _fields(request)
    problems = [Problem("id", "belongs in the path, not in the body")] if fields.get("id", name) != name else []
    try:
        new = parse(NewTenant, {**fields, "id": name})
    except InvalidInput as error:
        raise InvalidInput([*problems, *error.problems]) from None
    if problems:
        raise InvalidInput(problems)
    return new


async def _change(
    request: Request, tenant: str, work: Callable[[RequestKey | None, int | None], Awaitable[Tenant]]
) -> Response:
    """A change of a tenant, under its preconditions."""
    caller_of(request).needs(Scope.ADMIN)

    async def checked(key: RequestKey | None) -> Tenant:
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(lambda: _version(request, _decoded(tenant)))
            return await work(key, expected)

    return _answer(await run_once(request, context_of(request), checked, _again(request)))


async def _fields(request: Request) -> dict[str, Any]:
    """The body as a dict; none without a body."""
    return await body_fields(request) if await request.body() else {}


async def _nothing_given(request: Request) -> None:
    if fields := await _fields(request):
        raise InvalidInput([Problem(name, "is not a known field") for name in sorted(fields)])


async def _version(request: Request, tenant: str) -> int | None:
    try:
        return (await room_of(request).tenants.get(tenant, context=context_of(request))).version or None
    except NotFound:
        return None


def _again(request: Request) -> Callable[[Replayed], Awaitable[Tenant]]:
    tenants = room_of(request).tenants
    return lambda replayed: tenants.answered_before(replayed, context=context_of(request))


CHUNK_BYTES = 65_536
"""An export is sent in chunks of about this size."""


async def _chunks(lines: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    waiting: list[bytes] = []
    size = 0
    try:
        async for line in lines:
            waiting.append(line)
            size += len(line)
            if size >= CHUNK_BYTES:
                yield b"".join(waiting)
                waiting, size = [], 0
        yield b"".join(waiting)
    finally:
        await lines.aclose()


def _decoded(segment: str) -> str:
    return segment.replace(SLASH, "/")


def _answer(tenant: Tenant, status: int = 200) -> Response:
    headers = {"etag": etag(tenant.version)} if tenant.version else {}
    return Json(tenant.model_dump(), status, headers=headers)
