"""Retention, redaction and legal holds over HTTP. Only an administrator of all tenants changes anything here."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from ...access import bound_to
from ...audit import LegalHold, Subject
from ...audit.model import MAX_REASON_CHARS, MAX_SUBJECT_CHARS
from ...entities import DEFAULT_LIMIT, MAX_LIMIT, parse
from ...errors import Denied
from ..auth import Scope
from ..openapi import about, body, may_fail
from ..services import services_of
from ..shapes import Closed, Moment
from ..wire import Json, body_fields, caller_of, context_of, room_of
from .entities import SLASH

routes = APIRouter(tags=["audit"])

HOLDS = "/v1/audit/holds"
RETENTION = "/v1/audit/retention"
OF_TENANT = "/v1/audit/{tenant}"


class RetentionOut(BaseModel):
    """How long records are kept. The floor is the least; it is raised and never lowered."""

    tenant: str | None = Field(description="null: all that have no days of their own.")
    days: int | None = Field(description="null: for ever.")
    floor_days: int


class RetentionIn(Closed):
    days: int | None = Field(None, description="Days that records are kept.")
    floor_days: int | None = Field(None, description="The least, which can only be raised.")


class LegalHoldOut(BaseModel):
    """A legal hold. `tenant` null: on the records of all tenants and of the platform."""

    id: str
    tenant: str | None
    user: str | None
    collection: str | None
    entity_id: str | None
    since: datetime | None
    until: datetime | None
    reason: str
    placed_by: str
    created_at: datetime | None
    lifted_at: datetime | None
    lifted_by: str | None
    lifted_because: str | None


class LegalHoldListOut(BaseModel):
    items: list[LegalHoldOut]
    next_cursor: str | None = Field(
        description="Null on the last page. Otherwise more may follow, even after an empty page."
    )


class HoldsQuery(Closed):
    tenant: str | None = Field(None, description="Only holds on this tenant's records, and on those of all.")
    active: bool | None = Field(None, description="Only holds that are not lifted, or only lifted ones.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


_Reason = Annotated[str, Field(min_length=1, max_length=MAX_REASON_CHARS, pattern=r"\S")]
_Subject = Annotated[str, Field(min_length=1, max_length=MAX_SUBJECT_CHARS)]


class HoldIn(Closed):
    reason: _Reason
    tenant: _Subject | None = Field(None, description="null: all tenants and the platform.")
    user: _Subject | None = Field(None, description="Only what this user did: the actor of the records.")
    collection: _Subject | None = None
    entity_id: _Subject | None = None
    since: Moment | None = None
    until: Moment | None = None


class ReasonIn(Closed):
    reason: _Reason


class RedactionIn(Closed):
    """Either `user`, or `collection` and `entity_id`."""

    reason: _Reason
    user: _Subject | None = Field(None, description="What this user did: the actor of the records.")
    collection: _Subject | None = None
    entity_id: _Subject | None = None


class RedactionOut(BaseModel):
    """`record`: the id of the journal's record about it. `records` were redacted in the store, `archived` in the
    archive."""

    record: str
    records: int
    archived: int


# --- Retention ------------------------------------------------------------------------------------------------


@routes.get(RETENTION, response_model=RetentionOut, summary="How long records are kept")
async def retention(request: Request) -> Response:
    """Of all tenants that have no days of their own."""
    _needs_all(request)
    return Json(asdict(await room_of(request).retention.of(None, everyone=True)))


@routes.patch(
    RETENTION, response_model=RetentionOut, openapi_extra=body(RetentionIn), summary="Change how long records are kept"
)
async def change_retention(request: Request) -> Response:
    """Of all tenants that have no days of their own, and the floor of all."""
    return await _change(request, None)


@routes.get(OF_TENANT + "/retention", response_model=RetentionOut, summary="How long a tenant's records are kept")
async def retention_of(request: Request, tenant: str) -> Response:
    """A caller of one tenant asks for that tenant."""
    caller_of(request).needs_audit()
    kept = await room_of(request).retention.of(tenant.replace(SLASH, "/"), context=context_of(request))
    return Json(asdict(kept))


@routes.patch(
    OF_TENANT + "/retention",
    response_model=RetentionOut,
    openapi_extra=body(RetentionIn),
    summary="Change how long a tenant's records are kept",
)
async def change_retention_of(request: Request, tenant: str) -> Response:
    """Its own days, and its floor."""
    return await _change(request, tenant.replace(SLASH, "/"))


async def _change(request: Request, tenant: str | None) -> Response:
    caller_of(request).needs(Scope.ADMIN)
    context = context_of(request)

    async def work() -> Response:
        given = parse(RetentionIn, await body_fields(request))
        policies = room_of(request).retention
        kept = await policies.set(tenant, everyone=tenant is None, **given.model_dump(), context=context)
        return Json(asdict(kept))

    return await services_of(request).answers.answered(request, context, work)


def _needs_all(request: Request) -> None:
    """Raises Denied unless the caller may read the audit trail of all tenants."""
    caller_of(request).needs_audit()
    if (tenant := bound_to(context_of(request))) is not None:
        raise Denied(f"this is about all tenants, and the caller belongs to tenant {tenant!r}")


# --- Legal holds ----------------------------------------------------------------------------------------------


@routes.get(HOLDS, response_model=LegalHoldListOut, summary="List legal holds")
async def list_holds(request: Request, query: Annotated[HoldsQuery, Query()]) -> Response:
    """In the order in which they were placed."""
    _needs_all(request)
    page = await room_of(request).legal_holds.list(**query.model_dump())
    return Json({"items": [_shown(hold) for hold in page.items], "next_cursor": page.next_cursor})


@routes.post(
    HOLDS,
    response_model=LegalHoldOut,
    status_code=201,
    openapi_extra=about(body(HoldIn), may_fail("conflict")),
    summary="Place a legal hold",
)
async def place_hold(request: Request) -> Response:
    """It counts at once, and blocks retention, redaction and the deletion of the tenant until it is lifted."""
    caller_of(request).needs(Scope.ADMIN)
    context = context_of(request)

    async def work() -> Response:
        given = parse(HoldIn, await body_fields(request))
        return Json(_shown(await room_of(request).legal_holds.place(**given.model_dump(), context=context)), 201)

    return await services_of(request).answers.answered(request, context, work)


@routes.post(
    HOLDS + "/{id}/lift",
    response_model=LegalHoldOut,
    openapi_extra=about(body(ReasonIn), may_fail("not_found", "conflict")),
    summary="Lift a legal hold",
)
async def lift_hold(request: Request, id: str) -> Response:
    """It stays on record. 409 for one that was lifted before."""
    caller_of(request).needs(Scope.ADMIN)
    context = context_of(request)

    async def work() -> Response:
        given = parse(ReasonIn, await body_fields(request))
        return Json(_shown(await room_of(request).legal_holds.lift(id, given.reason, context=context)))

    return await services_of(request).answers.answered(request, context, work)


def _shown(hold: LegalHold) -> dict[str, Any]:
    return {name: getattr(hold, name) for name in LegalHoldOut.model_fields}


# --- Redaction ------------------------------------------------------------------------------------------------


@routes.post(
    OF_TENANT + "/redactions",
    response_model=RedactionOut,
    openapi_extra=about(body(RedactionIn), may_fail("conflict")),
    summary="Redact a document's or a user's records",
)
async def redact(request: Request, tenant: str) -> Response:
    """Removes what they said, in the archive too. Their leaves stay, so every proof holds. 409 under a legal hold."""
    caller_of(request).needs(Scope.ADMIN)
    context = context_of(request)

    async def work() -> Response:
        given = parse(RedactionIn, await body_fields(request))
        subject = Subject(tenant.replace(SLASH, "/"), given.user, given.collection, given.entity_id)
        return Json(asdict(await room_of(request).redactions.redact(subject, given.reason, context=context)))

    return await services_of(request).answers.answered(request, context, work)
