"""Leaked keys: reports of secret scanners, the list of leaks, and the policies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from ...context import Context, kind_of
from ...cooperative import in_slices
from ...database import Replayed, RequestKey
from ...entities import DEFAULT_LIMIT, MAX_LIMIT, found_in, parse, size_of
from ...errors import InvalidInput, Problem, Unauthenticated
from ...keys import MAX_SIGHTINGS, Leak, LeakPolicy, PolicyFields, Sighting
from ...keys.leaks import Action, Done
from ..auth import Scope, authorization
from ..idempotent_calls import run_once
from ..openapi import about, body, request_body
from ..services import services_of
from ..shapes import Closed
from ..signers import IDENTIFIER, SIGNATURE
from ..wire import (
    Json,
    body_fields,
    caller_of,
    context_of,
    parse_json,
    room_of,
)
from .entities import SLASH

routes = APIRouter(tags=["leaks"])

PATH = "/v1/keys/leaked"
_TEXTS = ("type", "url", "source")
_SIGNED = [
    {
        "name": name,
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": description,
    }
    for name, description in (
        ("Github-Public-Key-Identifier", "The public key that verifies the signature."),
        ("Github-Public-Key-Signature", "ECDSA over P-256 with SHA-256 of the body as sent; DER, base64."),
    )
]


class SightingIn(BaseModel):
    """A found secret, in the form of GitHub's secret-scanning partner programme. Other fields are ignored."""

    token: str
    type: str | None = Field(None, description="The scanner's name for this type of secret.")
    url: str | None = Field(None, description="The URL where it was found.")
    source: str | None = Field(None, description="The kind of place: content, commit, …")


_REPORT = {"type": "array", "items": SightingIn.model_json_schema(), "maxItems": MAX_SIGHTINGS}


class LabelOut(BaseModel):
    """Whether a reported text is a key, in the programme's form of feedback."""

    token_hash: str = Field(description="SHA-256 of the secret, in hex.")
    token_type: str
    label: Literal["true_positive", "false_positive"]


class LeakOut(BaseModel):
    """A leaked secret of a key. `ends_at`: when the secret stops working; null: never."""

    id: str
    tenant: str
    key_id: str
    display: str
    type: str
    url: str
    source: str
    reporter: str
    done: Done
    ends_at: datetime | None
    last_administrator: bool
    created_at: datetime


class LeakListOut(BaseModel):
    items: list[LeakOut]
    next_cursor: str | None


class LeakListQuery(Closed):
    tenant: str | None = Field(None, description="Only this tenant's.")
    key_id: str | None = Field(None, description="Only this key's.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


class PolicyOut(BaseModel):
    """The leak policy of a tenant. `updated_at`: null if none was set."""

    tenant: str
    action: Action
    overlap_s: int | None = Field(description="How long a leaked secret keeps working after its rotation.")
    updated_at: datetime | None


def is_report(scope: Mapping[str, Any]) -> bool:
    """Whether a request reports leaks. The route authenticates it itself, because scanners sign and have no key."""
    return (scope["path"], scope["method"]) == (PATH, "POST")


@routes.post(
    PATH,
    response_model=list[LabelOut],
    openapi_extra=about(request_body(_REPORT), {"parameters": _SIGNED}),
    summary="Report leaked keys",
)
async def report_leaks(request: Request) -> Response:
    """For secret scanners: signed as in GitHub's partner programme, or with a management key with write permission. The
    tenant's policy is applied to each key; a repeated report changes nothing."""
    leaks = room_of(request).leaks
    raw, reporter, tenant = await _received(request)
    reported = _sightings(raw)
    request_id = request.scope["strongroom.request_id"]

    async def work() -> Response:
        found = await leaks.report(reported, reporter=reporter, tenant=tenant, request_id=request_id)
        return Json([_label(s, f.leak is not None) for s, f in zip(reported, found, strict=True)])

    return await services_of(request).answers.answered(request, Context(tenant, reporter, {}, request_id), work)


async def _received(request: Request) -> tuple[bytes, str, str | None]:
    """The body, the reporter, and the only tenant whose keys it may learn about. A refused reporter causes no lookup,
    and the body is read only after the reporter has named itself."""
    services = services_of(request)
    if IDENTIFIER in request.headers or SIGNATURE in request.headers:
        if services.signers is None:
            raise Unauthenticated("this server accepts no signed reports: STRONGROOM_LEAK_KEYS is not set")
        claim = await services.signers.claim(request.headers)
        raw = await request.body()
        return raw, f"secret-scanning:{claim.check(raw)}"[:200], None
    caller = await services.authenticator.caller(authorization(request.scope["headers"]), request.scope)
    request.scope["strongroom.caller"] = caller
    caller.needs(Scope.WRITE)
    return await request.body(), caller.actor, caller.tenant


@routes.get("/v1/leaks", response_model=LeakListOut, summary="List leaks, newest first")
async def list_leaks(request: Request, query: Annotated[LeakListQuery, Query()]) -> Response:
    leaks = room_of(request).leaks
    caller_of(request).needs(Scope.READ)
    page = await leaks.list(**query.model_dump(), context=context_of(request))
    return Json({"items": await in_slices(_shown, page.items), "next_cursor": page.next_cursor})


@routes.get("/v1/leaks/policy/{tenant}", response_model=PolicyOut, summary="Show the leak policy")
async def get_leak_policy(request: Request, tenant: str) -> Response:
    """The default is `notify`. The tenant `*` stands for keys of no single tenant."""
    leaks = room_of(request).leaks
    caller_of(request).needs(Scope.READ)
    return _policy(await leaks.policy(tenant.replace(SLASH, "/"), context=context_of(request)))


@routes.put(
    "/v1/leaks/policy/{tenant}",
    response_model=PolicyOut,
    openapi_extra=body(PolicyFields),
    summary="Set the leak policy",
)
async def set_leak_policy(request: Request, tenant: str) -> Response:
    """`notify`, `disable`, or `rotate`: a new secret waits to be claimed, and the leaked one works for `overlap_s`
    seconds more. Only for an administrator."""
    leaks = room_of(request).leaks
    caller_of(request).needs(Scope.ADMIN)
    asked = parse(PolicyFields, await body_fields(request))
    context = context_of(request)

    async def work(key: RequestKey | None) -> LeakPolicy:
        return await leaks.set_policy(
            tenant.replace(SLASH, "/"),
            context=context,
            idempotency_key=key,
            action=asked.action,
            overlap_s=asked.overlap_s,
        )

    async def again(replayed: Replayed) -> LeakPolicy:
        return await leaks.policy_set_before(replayed, context=context)

    return _policy(await run_once(request, context, work, again))


def _sightings(raw: bytes) -> list[Sighting]:
    """The reported texts. Raises MalformedRequest, InvalidInput with every problem."""
    items, problems = parse_json(raw)
    if problems:
        raise InvalidInput(problems)
    if not isinstance(items, list) or len(items) > MAX_SIGHTINGS:
        raise InvalidInput([Problem("", f"found {size_of(items)}, expected a list of at most {MAX_SIGHTINGS} objects")])
    found = []
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            problems.append(Problem(str(number), f"found {found_in(item)}, expected an object"))
            continue
        wrong = [name for name in _TEXTS if not isinstance(item.get(name), str | None)]
        wrong += [] if isinstance(item.get("token"), str) else ["token"]
        problems += [Problem(f"{number}.{name}", f"found {kind_of(item.get(name))}, expected text") for name in wrong]
        if not wrong:
            found.append(Sighting(item["token"], *(item.get(name) or "" for name in _TEXTS)))
    if problems:
        raise InvalidInput(problems)
    return found


def _label(sighting: Sighting, is_key: bool) -> dict[str, Any]:
    return {
        "token_hash": hashlib.sha256(sighting.token.encode()).hexdigest(),
        "token_type": sighting.type,
        "label": "true_positive" if is_key else "false_positive",
    }


def _shown(leak: Leak) -> dict[str, Any]:
    return leak.model_dump(exclude={"version", "updated_at"})


def _policy(policy: LeakPolicy) -> Response:
    return Json(policy.model_dump(include={"tenant", "action", "overlap_s", "updated_at"}))
