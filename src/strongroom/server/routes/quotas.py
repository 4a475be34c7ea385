"""Quotas: put, show, list, change, delete; their usage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, Field

from ...cooperative import in_slices
from ...database import Replayed, RequestKey
from ...entities import DEFAULT_LIMIT, MAX_LIMIT, parse
from ...errors import InvalidInput, NotFound, Problem
from ...limits import MAX_LIMITS, Limit
from ...quotas import Quota, QuotaKind
from ...quotas.service import NewQuota, QuotaChanges, QuotaFields
from ..auth import Scope
from ..idempotent_calls import nothing, run_once
from ..openapi import about, body, may_be_unchanged, may_fail, takes, tells
from ..shapes import Closed, LimitStatusOut, Number
from ..wire import (
    Json,
    Preconditions,
    body_fields,
    caller_of,
    context_of,
    etag,
    not_modified,
    room_of,
)
from .entities import SLASH

routes = APIRouter(tags=["quotas"])

PATH = "/v1/quotas"
OF_TENANT = PATH + "/{kind}/{tenant}"
OF_NAME = PATH + "/{kind}/{tenant}/{name}"
Kind = Annotated[
    str,
    Path(description="`tenant` has no name; `user` and `group` have.", json_schema_extra={"enum": ["user", "group"]}),
]
TenantKind = Annotated[str, Path(json_schema_extra={"enum": ["tenant"]})]


class QuotaOut(BaseModel):
    """Limits that all keys of a subject share. `name`: the user's id or the group's name; empty for the tenant."""

    id: str
    tenant: str
    kind: QuotaKind
    name: str
    limits: list[Limit]
    description: str | None
    version: int
    created_at: datetime
    updated_at: datetime


class QuotaListOut(BaseModel):
    items: list[QuotaOut]
    next_cursor: str | None


class QuotaIn(QuotaFields):
    """A new quota."""

    limits: list[Limit] = Field(max_length=MAX_LIMITS)


PUT = about(body(QuotaIn), takes("If-Match", "If-None-Match"), tells("ETag"), tells("ETag", status=201))
CHANGE = about(body(QuotaChanges), takes("If-Match"), tells("ETag"))
MADE: dict[int | str, dict[str, Any]] = {201: {"model": QuotaOut, "description": "Created."}}


class QuotaStatsOut(BaseModel):
    """`count`: uses. `totals`: usage by resource since the quota's creation."""

    tenant: str
    kind: QuotaKind
    name: str
    count: int
    last_used_at: datetime | None
    totals: dict[str, Number]
    limits: list[LimitStatusOut]


class QuotaListQuery(Closed):
    tenant: str | None = Field(None, description="Only this tenant's quotas.")
    kind: Literal["tenant", "user", "group"] | None = Field(None, description="Only quotas of this kind.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


@routes.get(PATH, response_model=QuotaListOut, summary="List quotas, by tenant, kind and name")
async def list_quotas(request: Request, query: Annotated[QuotaListQuery, Query()]) -> Response:
    quotas = room_of(request).quotas
    caller_of(request).needs(Scope.READ)
    page = await quotas.list(**query.model_dump(), context=context_of(request))
    return Json({"items": await in_slices(Quota.model_dump, page.items), "next_cursor": page.next_cursor})


# Registered first: else a route with a name would match `stats` as the name.
@routes.get(
    PATH + "/tenant/{tenant}/stats",
    response_model=QuotaStatsOut,
    openapi_extra=may_fail("not_found"),
    summary="Usage of a tenant's quota",
)
async def tenant_quota_stats(request: Request, tenant: str) -> Response:
    return await _stats(request, "tenant", tenant, "")


@routes.get(OF_NAME + "/stats", response_model=QuotaStatsOut, summary="Usage of a user's or a group's quota")
async def quota_stats(request: Request, kind: Kind, tenant: str, name: str) -> Response:
    return await _stats(request, kind, tenant, name)


@routes.get(OF_TENANT, response_model=QuotaOut, openapi_extra=may_be_unchanged(), summary="A tenant's quota")
async def get_tenant_quota(request: Request, kind: TenantKind, tenant: str) -> Response:
    return await _show(request, kind, tenant, "")


@routes.get(OF_NAME, response_model=QuotaOut, openapi_extra=may_be_unchanged(), summary="A user's or a group's quota")
async def get_quota(request: Request, kind: Kind, tenant: str, name: str) -> Response:
    return await _show(request, kind, tenant, name)


@routes.put(
    OF_TENANT, response_model=QuotaOut, responses=MADE, openapi_extra=PUT, summary="Create or replace a tenant's quota"
)
async def put_tenant_quota(request: Request, kind: TenantKind, tenant: str) -> Response:
    """201 if it was created, 200 if it was replaced. The usage of a limit stays if its resource, window, models and
    routes stay. A caller of one tenant cannot set the quota of that tenant itself."""
    return await _put(request, kind, tenant, "")


@routes.put(
    OF_NAME,
    response_model=QuotaOut,
    responses=MADE,
    openapi_extra=PUT,
    summary="Create or replace a user's or a group's quota",
)
async def put_quota(request: Request, kind: Kind, tenant: str, name: str) -> Response:
    """201 if it was created, 200 if it was replaced. The usage of a limit stays if its resource, window, models and
    routes stay."""
    return await _put(request, kind, tenant, name)


@routes.patch(OF_TENANT, response_model=QuotaOut, openapi_extra=CHANGE, summary="Change a tenant's quota")
async def change_tenant_quota(request: Request, kind: TenantKind, tenant: str) -> Response:
    """Missing fields keep their values."""
    return await _change(request, kind, tenant, "")


@routes.patch(OF_NAME, response_model=QuotaOut, openapi_extra=CHANGE, summary="Change a user's or a group's quota")
async def change_quota(request: Request, kind: Kind, tenant: str, name: str) -> Response:
    """Missing fields keep their values."""
    return await _change(request, kind, tenant, name)


@routes.delete(
    OF_TENANT,
    status_code=204,
    response_class=Response,
    openapi_extra=takes("If-Match"),
    summary="Delete a tenant's quota",
)
async def delete_tenant_quota(request: Request, kind: TenantKind, tenant: str) -> Response:
    """This also deletes its usage."""
    return await _remove(request, kind, tenant, "")


@routes.delete(
    OF_NAME,
    status_code=204,
    response_class=Response,
    openapi_extra=takes("If-Match"),
    summary="Delete a user's or a group's quota",
)
async def delete_quota(request: Request, kind: Kind, tenant: str, name: str) -> Response:
    """This also deletes its usage."""
    return await _remove(request, kind, tenant, name)


async def _show(request: Request, kind: str, tenant: str, name: str) -> Response:
    quotas = room_of(request).quotas
    caller_of(request).needs(Scope.READ)
    quota = await quotas.get(*_subject(kind, tenant, name), context=context_of(request))
    if not_modified(request, quota.version):
        return Response(status_code=304, headers={"etag": etag(quota.version)})
    return _answer(quota)


async def _stats(request: Request, kind: str, tenant: str, name: str) -> Response:
    quotas = room_of(request).quotas
    caller_of(request).needs(Scope.READ)
    return Json((await quotas.stats(*_subject(kind, tenant, name), context=context_of(request))).shown())


async def _put(request: Request, kind: str, tenant: str, name: str) -> Response:
    quotas = room_of(request).quotas
    caller_of(request).needs(Scope.WRITE)
    context = context_of(request)

    async def work(key: RequestKey | None) -> Quota:
        new = await _new(request, *_subject(kind, tenant, name))
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(lambda: _version(request, kind, tenant, name))
            exists = preconditions.any
            return await quotas.put(new, context=context, expected=expected, exists=exists, idempotency_key=key)

    stored = await run_once(request, context, work, _again(request))
    return _answer(stored, 201 if stored.created_at == stored.updated_at else 200)


async def _change(request: Request, kind: str, tenant: str, name: str) -> Response:
    quotas = room_of(request).quotas
    caller_of(request).needs(Scope.WRITE)
    context, subject = context_of(request), _subject(kind, tenant, name)

    async def work(key: RequestKey | None) -> Quota:
        changes = parse(QuotaChanges, await body_fields(request, exact=("limits",)))
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(lambda: _version(request, kind, tenant, name))
            return await quotas.update(*subject, changes, context=context, expected=expected, idempotency_key=key)

    return _answer(await run_once(request, context, work, _again(request)))


async def _remove(request: Request, kind: str, tenant: str, name: str) -> Response:
    quotas = room_of(request).quotas
    caller_of(request).needs(Scope.WRITE)
    context, subject = context_of(request), _subject(kind, tenant, name)

    async def work(key: RequestKey | None) -> None:
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(lambda: _version(request, kind, tenant, name))
            await quotas.delete(*subject, context=context, expected=expected, idempotency_key=key)

    await run_once(request, context, work, nothing)
    return Response(status_code=204)


def _again(request: Request) -> Callable[[Replayed], Awaitable[Quota]]:
    quotas = room_of(request).quotas
    return lambda replayed: quotas.answered_before(replayed, context=context_of(request))


async def _version(request: Request, kind: str, tenant: str, name: str) -> int | None:
    quotas = room_of(request).quotas
    try:
        return (await quotas.get(*_subject(kind, tenant, name), context=context_of(request))).version
    except NotFound:
        return None


async def _new(request: Request, kind: str, tenant: str, name: str) -> NewQuota:
    """The quota from the body and the path. Amounts keep all digits. Raises InvalidInput with every problem."""
    fields = await body_fields(request, exact=("limits",))
    problems = [
        Problem(field, "belongs in the path, not in the body")
        for field in ("kind", "tenant", "name")
        if field in fields
    ]
    try:
        new = parse(NewQuota, {**fields, "kind": kind, "tenant": tenant, "name": name})
    except InvalidInput as error:
        raise InvalidInput([*problems, *error.problems]) from None
    if problems:
        raise InvalidInput(problems)
    return new


def _subject(kind: str, tenant: str, name: str) -> tuple[str, str, str]:
    return kind, tenant.replace(SLASH, "/"), name.replace(SLASH, "/")


def _answer(quota: Quota, status: int = 200) -> Response:
    return Json(quota.model_dump(), status, headers={"etag": etag(quota.version)})
