"""Usage, recorded on a key after the fact, also beyond a limit."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from ...context import kind_of
from ...entities import found_in
from ...errors import InvalidInput, Problem, StrongroomError
from ...keys import Usage, Verification, cost_units
from ..auth import Scope
from ..idempotent_calls import idempotency_key
from ..openapi import about, body, may_fail
from ..services import MAX_USAGE_ITEMS, services_of
from ..shapes_usage import UsageBatchIn, UsageBatchOut, UsageIn, UsageOut
from ..wire import (
    Json,
    body_fields,
    caller_of,
    context_of,
    expect_object,
    parse_json,
    room_of,
)

routes = APIRouter(prefix="/v1/usage", tags=["usage"])

_TEXTS = ("key", "key_id", "idempotency_key", "model", "route")


@routes.post(
    "", response_model=UsageOut, openapi_extra=about(body(UsageIn), may_fail("not_found")), summary="Record usage"
)
async def record_usage(request: Request) -> Response:
    """Counts on the key in any state, and over its limits. Durable once answered, and counted once for an idempotency
    key (within a day)."""
    keys = room_of(request).keys
    caller_of(request).needs(Scope.WRITE)
    fields = await body_fields(request, exact=("cost",))
    header = idempotency_key(request)
    problems = _problems(fields, header)
    if problems:
        raise InvalidInput(problems)
    answer = await keys.record(
        key=fields.get("key"),
        key_id=fields.get("key_id"),
        cost=fields["cost"],
        model=fields.get("model"),
        route=fields.get("route"),
        idempotency_key=header if header is not None else fields.get("idempotency_key"),
        at=_at(fields.get("at")),
        context=context_of(request),
    )
    return Json(_shown(answer))


@routes.post(
    ":batch",
    response_model=UsageBatchOut,
    openapi_extra=about(body(UsageBatchIn), may_fail("not_found")),
    summary="Record usage in a batch",
)
async def record_batch(request: Request) -> Response:
    """Like many single records, with one debit for each key. If a record is invalid, nothing is counted. If some
    records still cannot be counted, the error has `counted` and `failed`. With an Idempotency-Key a retry counts
    nothing twice."""
    keys = room_of(request).keys
    caller_of(request).needs(Scope.WRITE)
    items = _items(await request.body())
    context, named = context_of(request), idempotency_key(request)

    async def work() -> Response:
        answers = await keys.record_many(items, idempotency_key=named, context=context)
        return Json({"recorded": len(items), "keys": [_shown(one) for one in answers]})

    return await services_of(request).answers.answered(request, context, work)


def _shown(answer: Verification) -> dict[str, Any]:
    return {
        "key_id": answer.key_id,
        "tenant": answer.tenant,
        "limits": answer.limits,
        "uncounted": answer.uncounted,
    }


class _Item(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    cost: dict[str, Any]
    key: str | None = None
    key_id: str | None = None
    model: str | None = None
    route: str | None = None
    idempotency_key: str | None = None
    at: datetime | None = None


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    items: list[_Item]


_QUOTED = tuple(f'"{name}"'.encode() for name in _Item.__struct_fields__)
_decode = msgspec.json.Decoder(_Batch, float_hook=Decimal).decode


def _items(data: bytes) -> list[Usage]:
    """The items of a batch. Raises InvalidInput with every problem of every item."""
    try:
        items = _decode(data).items
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise _problems_with(data) from None
    twice = any(
        data.count(name) > len(items) for name in _QUOTED
    )  # a repeated name, or the name inside a text: the slow path decides
    if twice and (problems := parse_json(data)[1]):
        raise InvalidInput(problems)
    if not 1 <= len(items) <= MAX_USAGE_ITEMS:
        raise InvalidInput([Problem("items", f"found {len(items)}, expected 1 to {MAX_USAGE_ITEMS}")])
    return [
        Usage(item.cost, item.key, item.key_id, item.model, item.route, item.idempotency_key, item.at) for item in items
    ]


def _at(value: Any) -> datetime | None:
    """A time from JSON. Raises ValueError."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"found {kind_of(value)}, expected a time such as 2026-05-01T12:00:00Z")
    try:
        return msgspec.convert(value, datetime)
    except msgspec.ValidationError:
        raise ValueError(f"found {value[:64]!r}, expected a time such as 2026-05-01T12:00:00Z") from None


def _problems_with(data: bytes) -> StrongroomError:
    value, problems = parse_json(data)
    fields = expect_object(value)
    items = fields.get("items")
    problems += [Problem(name[:64], "is not a known field") for name in fields if name != "items"]
    if not isinstance(items, list):
        problems.append(Problem("items", f"found {found_in(items)}, expected a list of 1 to {MAX_USAGE_ITEMS} records"))
    else:
        for number, item in enumerate(items[:MAX_USAGE_ITEMS]):
            found = (
                _problems(item, None)
                if isinstance(item, dict)
                else [Problem("", f"found {found_in(item)}, expected an object")]
            )
            problems += [Problem(f"items.{number}.{one.path}".rstrip("."), one.message) for one in found]
    return InvalidInput(problems or "the body cannot be read")


def _problems(fields: dict[str, Any], header: str | None) -> list[Problem]:
    known = (*_TEXTS, "at", "cost")
    problems = [Problem(name[:64], "is not a known field") for name in fields if name not in known]
    texts = {name: fields[name] for name in _TEXTS if fields.get(name) is not None}
    problems += [
        Problem(name, f"found {found_in(value)}, expected text")
        for name, value in texts.items()
        if not isinstance(value, str)
    ]
    if ("key" in texts) == ("key_id" in texts):
        problems.append(
            Problem("key", f"found {'both' if 'key' in texts else 'neither'}, expected exactly one of key and key_id")
        )
    if header is not None and texts.get("idempotency_key", header) != header:
        problems.append(Problem("idempotency_key", "differs from the header Idempotency-Key"))
    try:
        _at(fields.get("at"))
    except ValueError as error:
        problems.append(Problem("at", str(error)))
    cost = fields.get("cost")
    if not isinstance(cost, dict) or not cost:
        problems.append(Problem("cost", f"found {found_in(cost)}, expected an object with at least one amount"))
        return problems
    try:
        cost_units(cost)
    except InvalidInput as error:
        problems += error.problems
    return problems
