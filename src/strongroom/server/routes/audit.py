"""The audit trail over HTTP: `GET /v1/audit`."""

from __future__ import annotations

from base64 import b64encode
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from ...cooperative import in_slices
from ...entities import DEFAULT_LIMIT, INT64_MAX, MAX_LIMIT
from ...errors import InvalidInput, Problem
from ..openapi import may_fail
from ..shapes import Closed, Moment
from ..wire import Json, caller_of, context_of, room_of
from .entities import SLASH, Document

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
    action: Literal["create", "update", "add", "delete", "expire", "deny", "redact", "drop", "rotate"] | None = None
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


# --- Proofs ---------------------------------------------------------------------------------------------------


PROOF_ERRORS = may_fail("not_found", "gone")
"""Nothing is sealed yet; retention has dropped what the proof needs."""


class ProofOut(BaseModel):
    """A proof of inclusion (`index`, `size`, `leaf`, `root`), or of consistency (`from`, `to`, `from_root`, `to_root`).
    Hashes are in base64."""

    model_config = ConfigDict(populate_by_name=True)

    index: int | None = Field(None, description="The leaf's place in the tree; the first one is 0.")
    size: int | None = Field(None, description="The size of the tree.")
    leaf: str | None = Field(None, description="The hash of the leaf.")
    root: str | None = Field(None, description="The root of the tree of this size.")
    from_: int | None = Field(None, alias="from", description="The smaller size.")
    to: int | None = Field(None, description="The greater size.")
    from_root: str | None = Field(None, description="The root of the smaller tree.")
    to_root: str | None = Field(None, description="The root of the greater tree.")
    proof: list[str] = Field(description="The hashes of the proof, in the order of RFC 6962.")
    checkpoint: str | None = Field(description="The latest checkpoint, if it is of this size; else null.")


class ProofQuery(Closed):
    """Either `index` (and `size`), or `from` (and `to`)."""

    index: int | None = Field(None, ge=0, le=INT64_MAX, description="Inclusion: the leaf's index.")
    size: int | None = Field(None, ge=1, le=INT64_MAX, description="Inclusion: the tree's size (default: the latest).")
    from_: int | None = Field(None, alias="from", ge=1, le=INT64_MAX, description="Consistency: the smaller size.")
    to: int | None = Field(None, ge=1, le=INT64_MAX, description="Consistency: the greater size (default: the latest).")


class CheckpointQuery(Closed):
    witnessed: bool = Field(False, description="The latest one that a witness has cosigned, with its cosignature.")


@routes.get(
    PATH + "/checkpoint",
    response_class=PlainTextResponse,
    summary="The platform's latest checkpoint",
    openapi_extra=PROOF_ERRORS,
)
async def platform_checkpoint(request: Request, query: Annotated[CheckpointQuery, Query()]) -> Response:
    """A C2SP signed note. For an administrator or an auditor of all tenants."""
    if not query.witnessed:
        return await _checkpoint(request, None)
    caller_of(request).needs_audit()
    return PlainTextResponse(await room_of(request).proofs.witnessed(context=context_of(request)))


@routes.get(
    PATH + "/proof",
    response_model=ProofOut,
    summary="Prove something about the platform's tree",
    openapi_extra=PROOF_ERRORS,
)
async def platform_proof(request: Request, query: Annotated[ProofQuery, Query()]) -> Response:
    """For an administrator or an auditor of all tenants."""
    return await _proof(request, None, query)


@routes.get(
    PATH + "/{tenant}/checkpoint",
    response_class=PlainTextResponse,
    summary="A tenant's latest checkpoint",
    openapi_extra=PROOF_ERRORS,
)
async def tenant_checkpoint(request: Request, tenant: str) -> Response:
    """A C2SP signed note. 404 until a record of the tenant is sealed."""
    return await _checkpoint(request, tenant.replace(SLASH, "/"))


@routes.get(
    PATH + "/{tenant}/proof",
    response_model=ProofOut,
    summary="Prove something about a tenant's tree",
    openapi_extra=PROOF_ERRORS,
)
async def tenant_proof(request: Request, tenant: str, query: Annotated[ProofQuery, Query()]) -> Response:
    """Inclusion: a record is in the tree. Consistency: a smaller tree is the beginning of a greater one."""
    return await _proof(request, tenant.replace(SLASH, "/"), query)


async def _checkpoint(request: Request, tenant: str | None) -> Response:
    caller_of(request).needs_audit()
    return PlainTextResponse(await room_of(request).proofs.checkpoint(tenant, context=context_of(request)))


async def _proof(request: Request, tenant: str | None, query: ProofQuery) -> Response:
    caller_of(request).needs_audit()
    proofs, context = room_of(request).proofs, context_of(request)
    if problems := _mixed(query):
        raise InvalidInput(problems)
    if query.index is not None:
        found = await proofs.inclusion(tenant, query.index, query.size, context=context)
        return Json(
            {
                "index": found.index,
                "size": found.size,
                "leaf": _base64(found.leaf),
                "root": _base64(found.root),
                "proof": [_base64(one) for one in found.proof],
                "checkpoint": found.checkpoint,
            }
        )
    one = await proofs.consistency(tenant, query.from_ or 0, query.to, context=context)
    return Json(
        {
            "from": one.first,
            "to": one.second,
            "from_root": _base64(one.first_root),
            "to_root": _base64(one.second_root),
            "proof": [_base64(hash) for hash in one.proof],
            "checkpoint": one.checkpoint,
        }
    )


def _mixed(query: ProofQuery) -> list[Problem]:
    """What is wrong with a query that is neither of the two forms."""
    inclusion = [name for name in ("index", "size") if getattr(query, name) is not None]
    consistency = [name for name, value in (("from", query.from_), ("to", query.to)) if value is not None]
    if inclusion and consistency:
        return [Problem(consistency[0], f"found it beside {inclusion[0]}, expected index and size, or from and to")]
    if inclusion and query.index is None:
        return [Problem("index", "found no index beside size, expected one")]
    if consistency and query.from_ is None:
        return [Problem("from", "found no from beside to, expected one")]
    return [] if inclusion or consistency else [Problem("index", "found nothing, expected index, or from")]


def _base64(hash: bytes) -> str:
    return b64encode(hash).decode()
