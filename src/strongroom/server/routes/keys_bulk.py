"""Bulk changes of API keys, by a filter or by ids; rotation of the pepper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from ...errors import (
    ConfigError,
    Conflict,
    Denied,
    InvalidInput,
    Problem,
    StrongroomError,
)
from ...keys import ApiKey, Bulk, BulkStep, KeyChanges, KeyFilter
from ..auth import Caller, Scope, is_management
from ..openapi import body
from ..services import services_of
from ..shapes_keys import BulkIn, BulkOut
from ..wire import Json, body_fields, caller_of, context_of, read, room_of
from .keys_fields import parsed

routes = APIRouter(prefix="/v1/keys", tags=["keys"])


@routes.post(":bulk", response_model=BulkOut, openapi_extra=body(BulkIn), summary="Change many keys")
async def change_keys(request: Request) -> Response:
    """Changes the keys of `filter` or `ids`, at most `limit` in one call; `next_cursor` continues. Each key is changed
    entirely or not at all. `failed` names the others. A second run counts changed keys as `unchanged`. `restore`
    applies to the deleted keys of a filter."""
    room = room_of(request)
    caller = caller_of(request)
    caller.needs(Scope.WRITE)
    asked = await read(request, BulkIn)
    bulk = await _bulk(request, asked, caller)
    context = context_of(request)

    async def work() -> Response:
        async with aclosing(room.keys.bulk(bulk, cursor=asked.cursor, limit=asked.limit, context=context)) as steps:
            step = await anext(steps)
        return Json(_shown(step, asked.dry_run))

    return await services_of(request).answers.answered(request, context, work)


@routes.post(":rotate-pepper", status_code=204, response_class=Response, summary="Rotate the pepper")
async def rotate_pepper(request: Request) -> Response:
    """Makes a new pepper for new hashes. Old hashes keep working, and are renewed at their next use. Only for an
    administrator of all tenants. 409 if the configuration sets the peppers."""
    room = room_of(request)
    caller = caller_of(request)
    caller.needs(Scope.ADMIN)
    if caller.tenant is not None:
        raise Denied("this call needs an administrator of all tenants")

    async def work() -> Response:
        try:
            await room.rotate_pepper()
        except ConfigError as error:
            raise Conflict(str(error)) from None
        return Response(status_code=204)

    return await services_of(request).answers.answered(request, context_of(request), work)


async def _bulk(request: Request, asked: BulkIn, caller: Caller) -> Bulk:
    """The requested work. Raises InvalidInput with every problem."""
    problems: list[Problem] = []
    where, changes = None, None
    if asked.filter is not None:
        given = {name: value for name, value in asked.filter.model_dump().items() if value not in (None, False)}
        if not given:
            problems.append(Problem("filter", "found none, expected at least one condition"))
        where = KeyFilter(**given)
    if asked.changes is not None:
        # Parsed again, because amounts of limits need all their digits.
        exactly = (await body_fields(request, exact=("changes",)))["changes"]
        fields = {**asked.changes, **{name: exactly[name] for name in ("limits",) if name in exactly}}
        try:
            changes = parsed(KeyChanges, fields)
        except InvalidInput as error:
            problems += [Problem(f"changes.{p.path}", p.message) for p in error.problems]
    bulk = Bulk(asked.action, where, asked.ids, changes, asked.dry_run, _refusal(caller))
    try:
        if changes is not None or asked.changes is None:
            bulk.check()
    except InvalidInput as error:
        problems += error.problems
    if problems:
        raise InvalidInput(problems)
    return bulk


def _refusal(caller: Caller) -> Callable[[ApiKey], StrongroomError | None]:
    def refusal(key: ApiKey) -> StrongroomError | None:
        """Only administrators change management keys, as in single changes."""
        if caller.scope < Scope.ADMIN and is_management(key.permissions, key.tenant):
            return Denied(f"only a key with {Scope.ADMIN.permission} may change this key")
        return None

    return refusal


def _shown(step: BulkStep, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "looked_at": step.looked_at,
        "changed": step.changed,
        "unchanged": step.unchanged,
        "failed": [{"id": one.id, "code": one.code, "message": one.message} for one in step.failed],
        "next_cursor": step.cursor,
    }
