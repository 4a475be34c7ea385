"""API keys: create, show, list, change, rotate, delete; their statistics; verifications in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response

from ...context import Context
from ...cooperative import in_slices
from ...database import Replayed, RequestKey
from ...entities import found_in, size_of
from ...errors import InvalidInput, Problem
from ...keys import ApiKey, IssuedKey, KeyChanges, Keys, KeyStats, NewKey, is_allowed
from ..auth import Caller, Scope, is_management
from ..idempotent_calls import idempotency_key, nothing, run_once
from ..openapi import about, body, may_be_unchanged, takes, tells
from ..services import MAX_BATCH_ITEMS, services_of
from ..shapes_keys import (
    DeleteQuery,
    IssuedKeyOut,
    KeyListOut,
    KeyListQuery,
    KeyOut,
    KeyQuery,
    KeyStatsOut,
    RotateIn,
)
from ..shapes_usage import VerifyBatchIn, VerifyBatchOut
from ..verify import item_problems
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
from .keys_fields import K, parsed

routes = APIRouter(prefix="/v1/keys", tags=["keys"])


@routes.post(
    "",
    status_code=201,
    response_model=IssuedKeyOut,
    openapi_extra=about(body(NewKey), tells("ETag", "Location", status=201)),
    summary="Create a key",
)
async def create_key(request: Request) -> Response:
    """The answer has the key's secret in `key`, once. `tenant` defaults to `default`, or to the caller's tenant. A key
    with a `strongroom:` permission is a management key: only an administrator creates one."""
    keys = room_of(request).keys
    caller = _writer(request)
    new = await _parsed(request, NewKey, {"tenant": caller.tenant} if caller.tenant is not None else {})
    _guard(caller, new.permissions, new.tenant)
    context = context_of(request)

    async def work(key: RequestKey | None) -> IssuedKey:
        return await keys.create(new, context=context, idempotency_key=key)

    issued = await run_once(request, context, work, _issued_before(keys, context))
    return _answer(issued.key, 201, {"location": f"/v1/keys/{quote(issued.key.id, safe='')}"}, key=issued.text)


@routes.get("", response_model=KeyListOut, summary="List keys, newest first")
async def list_keys(request: Request, query: Annotated[KeyListQuery, Query()]) -> Response:
    keys = room_of(request).keys
    caller_of(request).needs(Scope.READ)
    page = await keys.list(**query.model_dump(), context=context_of(request))
    return Json({"items": await in_slices(ApiKey.shown, page.items), "next_cursor": page.next_cursor})


@routes.get("/{id}", response_model=KeyOut, openapi_extra=may_be_unchanged(), summary="Show a key")
async def get_key(request: Request, id: str, query: Annotated[KeyQuery, Query()]) -> Response:
    keys = room_of(request).keys
    caller_of(request).needs(Scope.READ)
    key = await keys.get(id, deleted=query.deleted, context=context_of(request))
    if not_modified(request, key.version):
        return Response(status_code=304, headers={"etag": etag(key.version)})
    return _answer(key)


@routes.patch(
    "/{id}",
    response_model=KeyOut,
    openapi_extra=about(body(KeyChanges), takes("If-Match"), tells("ETag")),
    summary="Change some fields of a key",
)
async def update_key(request: Request, id: str) -> Response:
    """Missing fields keep their values. The usage of a limit stays if its resource, window, models and routes stay."""
    services = services_of(request)
    keys = services.room.keys
    caller = _writer(request)
    context = context_of(request)

    async def work(key: RequestKey | None) -> ApiKey:
        changes = await _parsed(request, KeyChanges)
        before = await _own(request, id)
        _guard(caller, changes.permissions if "permissions" in changes.model_fields_set else (), before.tenant)
        if caller.key is not None and id == caller.key.id:
            _stay_usable(changes.allowed_ips or (), services.authenticator.address(request.scope))
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(_version_of(before))
            return await keys.update(id, changes, context=context, expected=expected, idempotency_key=key)

    return _answer(await run_once(request, context, work, _answered_before(keys, context)))


@routes.delete(
    "/{id}", status_code=204, response_class=Response, openapi_extra=takes("If-Match"), summary="Delete a key"
)
async def delete_key(request: Request, id: str, query: Annotated[DeleteQuery, Query()]) -> Response:
    """The key's secrets stop working. `restore` reverses this within 30 days; then the key and its usage are removed.
    `purge` removes the key now, also an already deleted one."""
    keys = room_of(request).keys
    _writer(request)
    context = context_of(request)

    async def work(key: RequestKey | None) -> None:
        before = await _own(request, id, deleted=query.purge)
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(_version_of(before))
            await keys.delete(id, purge=query.purge, context=context, expected=expected, idempotency_key=key)

    await run_once(request, context, work, nothing)
    return Response(status_code=204)


@routes.post("/{id}/restore", response_model=KeyOut, openapi_extra=tells("ETag"), summary="Restore a deleted key")
async def restore_key(request: Request, id: str) -> Response:
    """Restores the key within 30 days. Without effect on a key that is not deleted."""
    return _answer(await _changed(request, id, Keys.restore, deleted=True))


@routes.post("/{id}/disable", response_model=KeyOut, openapi_extra=tells("ETag"), summary="Disable a key")
async def disable_key(request: Request, id: str) -> Response:
    return _answer(await _changed(request, id, Keys.disable))


@routes.post("/{id}/enable", response_model=KeyOut, openapi_extra=tells("ETag"), summary="Enable a key")
async def enable_key(request: Request, id: str) -> Response:
    return _answer(await _changed(request, id, Keys.enable))


@routes.post(
    "/{id}/rotate",
    response_model=IssuedKeyOut,
    openapi_extra=about(body(RotateIn, required=False), takes("If-Match"), tells("ETag")),
    summary="Rotate a key",
)
async def rotate_key(request: Request, id: str) -> Response:
    """Gives the key a new secret, shown once; its id, limits and usage stay. The old secret works for `overlap_s`
    seconds more. With `hold` the answer has no secret (`key` is null); it waits to be claimed."""
    keys = room_of(request).keys
    _writer(request)
    context = context_of(request)

    async def work(key: RequestKey | None) -> IssuedKey:
        asked = await read(request, RotateIn) if await request.body() else RotateIn()
        before = await _own(request, id)
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(_version_of(before))
            overlap_s, hold = asked.overlap_s, asked.hold
            return await keys.rotate(
                id, overlap_s=overlap_s, hold=hold, context=context, expected=expected, idempotency_key=key
            )

    issued = await run_once(request, context, work, _issued_before(keys, context))
    return _answer(issued.key, key=issued.text or None)


@routes.post(
    "/{id}/claim",
    response_model=IssuedKeyOut,
    openapi_extra=tells("ETag"),
    summary="Claim a rotated secret",
)
async def claim_key(request: Request, id: str) -> Response:
    """Returns the secret of a scheduled rotation, or of one with `hold`, once. With an `Idempotency-Key` a retry
    returns it again for a day."""
    keys = room_of(request).keys
    _writer(request)
    context = context_of(request)

    async def work(key: RequestKey | None) -> IssuedKey:
        await _own(request, id)
        return await keys.claim(id, context=context, idempotency_key=key)

    issued = await run_once(request, context, work, _issued_before(keys, context))
    return _answer(issued.key, key=issued.text)


@routes.get("/{id}/stats", response_model=KeyStatsOut, summary="A key's statistics")
async def key_stats(request: Request, id: str) -> Response:
    keys = room_of(request).keys
    caller_of(request).needs(Scope.READ)
    return Json(_stats(await keys.stats(id, context=context_of(request))))


@routes.post(
    "/verify:batch", response_model=VerifyBatchOut, openapi_extra=body(VerifyBatchIn), summary="Verify several keys"
)
async def verify_batch(request: Request) -> Response:
    """Decided and answered in the given order. After an error some items may have been debited."""
    services = services_of(request)
    keys = services.room.keys
    caller = _writer(request)
    items = _items(await body_fields(request, exact=("items",)))
    named = idempotency_key(request)

    async def work() -> Response:
        answers = await keys.verify_many(
            [
                {
                    "text": item["key"],
                    **{name: item.get(name) for name in ("cost", "permission", "ip", "model", "route")},
                    "tenant": caller.tenant,
                    "idempotency_key": None if named is None else _nth(named, number),
                    "actor": caller.unique_actor,
                }
                for number, item in enumerate(items)
            ]
        )
        for answer in answers:
            services.metrics.verified[answer.code] = services.metrics.verified.get(answer.code, 0) + 1
        return Json({"items": answers})

    return await services.answers.answered(request, context_of(request), work)


async def _changed(
    request: Request, id: str, change: Callable[..., Awaitable[ApiKey]], *, deleted: bool = False
) -> ApiKey:
    """Disable, enable or restore a key; `change` is the method of Keys."""
    keys = room_of(request).keys
    _writer(request)
    context = context_of(request)

    async def work(key: RequestKey | None) -> ApiKey:
        await _own(request, id, deleted=deleted)
        return await change(keys, id, context=context, idempotency_key=key)

    return await run_once(request, context, work, _answered_before(keys, context))


def _answered_before(keys: Keys, context: Context) -> Callable[[Replayed], Awaitable[ApiKey]]:
    return lambda replayed: keys.queries.answered_before(replayed, context=context)


def _issued_before(keys: Keys, context: Context) -> Callable[[Replayed], Awaitable[IssuedKey]]:
    return lambda replayed: keys.queries.issued_before(replayed, context=context)


async def _own(request: Request, id: str, *, deleted: bool = False) -> ApiKey:
    """The key to change. Raises NotFound; Denied if only administrators may change it."""
    keys = room_of(request).keys
    caller = _writer(request)
    key = await keys.get(id, deleted=deleted, context=context_of(request))
    _guard(caller, key.permissions, key.tenant)
    return key


def _answer(
    found: ApiKey, status: int = 200, headers: Mapping[str, str] = MappingProxyType({}), **more: Any
) -> Response:
    return Json({**found.shown(), **more}, status, headers={"etag": etag(found.version), **headers})


def _writer(request: Request) -> Caller:
    caller = caller_of(request)
    caller.needs(Scope.WRITE)
    return caller


def _stay_usable(allowed_ips: Sequence[str], address: str | None) -> None:
    """Raise InvalidInput if the change would stop the caller's own key from undoing it: else the last administrator
    could lock itself out."""
    if not is_allowed(allowed_ips, address):
        found = f"none that has {address or 'the address of this call, which is not known'}"
        raise InvalidInput([Problem("allowed_ips", f"found {found}, expected to include the address of this call")])


def _guard(caller: Caller, permissions: Iterable[str], tenant: str) -> None:
    """Only administrators change management keys: nobody may grant more than it has."""
    if is_management(permissions, tenant):
        caller.needs(Scope.ADMIN)


async def _parsed(request: Request, model: type[K], defaults: Mapping[str, Any] = MappingProxyType({})) -> K:
    """The body as a key's fields. Amounts keep all their digits. Raises InvalidInput with every problem."""
    return parsed(model, {**defaults, **await body_fields(request, exact=("limits",))})


def _version_of(key: ApiKey) -> Callable[[], Awaitable[int | None]]:
    async def version() -> int | None:
        return key.version

    return version


def _stats(stats: KeyStats) -> dict[str, Any]:
    return {
        "key_id": stats.key.id,
        "tenant": stats.key.tenant,
        "enabled": stats.key.enabled,
        "expired": stats.expired,
        "count": stats.count,
        "last_used_at": stats.last_used_at,
        "totals": stats.totals,
        "limits": stats.limits,
    }


def _nth(key: str, number: int) -> str:
    """The idempotency key of one item of a batch. It differs from every other item, and from a single call with the
    same key."""
    return hashlib.sha256(f"{number}\x00{key}".encode()).hexdigest()


def _items(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The verifications of a batch. Raises InvalidInput with every problem of every item, before any is decided."""
    problems = [Problem(name[:64], "is not a known field") for name in fields if name != "items"]
    items = fields.get("items")
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_BATCH_ITEMS:
        problems.append(
            Problem("items", f"found {size_of(items)}, expected a list of 1 to {MAX_BATCH_ITEMS} verifications")
        )
        raise InvalidInput(problems)
    for number, item in enumerate(items):
        if isinstance(item, dict):
            problems += item_problems(item, f"items.{number}.")
        else:
            problems.append(Problem(f"items.{number}", f"found {found_in(item)}, expected an object"))
    if problems:
        raise InvalidInput(problems)
    return items
