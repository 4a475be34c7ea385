"""The audit trail over HTTP: `GET /v1/audit`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from ...cooperative import in_slices
from ...entities import DEFAULT_LIMIT, MAX_LIMIT
from ..shapes import Closed, Moment
from ..wire import caller_of, context_of, room_of
from .entities import Document

routes = APIRouter(tags=["audit"])

PATH = "/v1/audit"


class AuditRecordOut(BaseModel):
    """One record of the journal. Secrets and hashes of keys in `before` and `after` are `***`."""

    sequence: int
    index: int | None = Field(description="The record's leaf in the tenant's tree; null until the record is sealed.")
    tenant: str | None = Field(description="null: a record of the platform.")
    at: datetime
    actor: str
    request_id: str
    action: str
    collection: str
    entity_id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class AuditListOut(BaseModel):
    items: list[AuditRecordOut]
    next_cursor: str | None = Field(
        description="Null on the last page. Otherwise more may follow, even after an empty page."
    )


class AuditListQuery(Closed):
    tenant: str | None = Field(None, description="Only this tenant's records.")
    actor: str | None = Field(None, description="Only changes by this actor, for example `key:key_…`.")
    action: Literal["create", "update", "add", "delete", "expire", "deny"] | None = Field(None)
    collection: str | None = Field(None, description="Only changes of this collection, for example `api_keys`.")
    entity_id: str | None = Field(None, description="Only changes of the document with this id.")
    request_id: str | None = Field(None, description="Only changes by this request.")
    since: Moment | None = Field(None, description="Not before this time.")
    until: Moment | None = Field(None, description="Before this time.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


@routes.get(PATH, response_model=AuditListOut, summary="List changes, oldest first")
async def list_audit(request: Request, query: Annotated[AuditListQuery, Query()]) -> Response:
    """For an administrator or an auditor of all tenants. A management key of one tenant reads that tenant's records."""
    audit = room_of(request).audit
    caller_of(request).needs_audit()
    page = await audit.list(**query.model_dump(), context=context_of(request))
    return Document({"items": await in_slices(shown, page.items), "next_cursor": page.next_cursor})


def shown(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in AuditRecordOut.model_fields}
