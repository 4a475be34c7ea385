"""Reservations: hold a part of a key's limits, settle the used amount, extend, release."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import APIRouter, Request, Response

from ...entities import found_in
from ...errors import InvalidInput, Problem
from ...keys import DEFAULT_TTL_S, MAX_TTL_S, cost_units
from ..auth import Scope
from ..idempotent_calls import idempotency_key
from ..openapi import body
from ..services import services_of
from ..shapes_usage import ExtendIn, ReservationOut, ReserveIn, SettleIn
from ..verify import item_problems
from ..wire import Json, body_fields, caller_of, context_of, room_of

routes = APIRouter(prefix="/v1/reservations", tags=["reservations"])

_reserved = functools.partial(cost_units, reserving=True)


@routes.post("", response_model=ReservationOut, openapi_extra=body(ReserveIn), summary="Reserve a part of the limits")
async def reserve(request: Request) -> Response:
    """Decided like a verification. Holds `cost`, and one of `concurrency`, until the reservation is settled or
    released, or expires after `ttl_s`. Durable: any node can settle it."""
    keys = room_of(request).keys
    caller = caller_of(request)
    caller.needs(Scope.WRITE)
    fields = await body_fields(request, exact=("cost",))
    problems = [*item_problems(fields, more=("ttl_s",), costs=_reserved), *_ttl_problems(fields)]
    if problems:
        raise InvalidInput(problems)
    answer = await keys.reserve(
        fields.pop("key"),
        **fields,
        tenant=caller.tenant,
        idempotency_key=idempotency_key(request),
        actor=caller.unique_actor,
        durable=True,
    )
    return Json(answer)


@routes.post(
    "/{id}/settle", response_model=ReservationOut, openapi_extra=body(SettleIn), summary="Settle a reservation"
)
async def settle(request: Request, id: str) -> Response:
    """Charges the total usage, even if it exceeds the held amount. A retry gets the same answer."""
    keys = room_of(request).keys
    caller_of(request).needs(Scope.WRITE)
    fields = await body_fields(request, exact=("cost",))
    problems = _unknown(fields, ("cost",))
    if not isinstance(fields.get("cost"), dict):
        problems.append(
            Problem(
                "cost",
                f"found {found_in(fields.get('cost'))}, expected an object: the total usage, by resource",
            )
        )
    else:
        problems += _cost_problems(fields["cost"], "cost")
    if problems:
        raise InvalidInput(problems)
    context = context_of(request)

    async def work() -> Response:
        return Json(await keys.settle(id, fields["cost"], context=context))

    return await services_of(request).answers.answered(request, context, work)


@routes.post(
    "/{id}/extend",
    response_model=ReservationOut,
    openapi_extra=body(ExtendIn, required=False),
    summary="Extend a reservation",
)
async def extend(request: Request, id: str) -> Response:
    """Sets the end to `ttl_s` seconds from now and the held total to `cost`; charges `used` now. If the limits do not
    allow this, the answer is not valid and the reservation does not change."""
    keys = room_of(request).keys
    caller_of(request).needs(Scope.WRITE)
    fields = await body_fields(request, exact=("cost", "used")) if await request.body() else {}
    problems = [*_unknown(fields, ("ttl_s", "cost", "used")), *_ttl_problems(fields)]
    for name in ("cost", "used"):
        if fields.get(name) is not None:
            if not isinstance(fields[name], dict):
                problems.append(Problem(name, f"found {found_in(fields[name])}, expected an object"))
            else:
                problems += _cost_problems(fields[name], name, reserving=name == "cost")
    if problems:
        raise InvalidInput(problems)
    context = context_of(request)

    async def work() -> Response:
        return Json(await keys.extend(id, **fields, context=context))

    return await services_of(request).answers.answered(request, context, work)


@routes.post("/{id}/release", response_model=ReservationOut, summary="Release a reservation")
async def release(request: Request, id: str) -> Response:
    """Charges only the reported usage. A retry gets the same answer."""
    keys = room_of(request).keys
    caller_of(request).needs(Scope.WRITE)
    context = context_of(request)

    async def work() -> Response:
        return Json(await keys.release(id, context=context))

    return await services_of(request).answers.answered(request, context, work)


def _unknown(fields: dict[str, Any], known: tuple[str, ...]) -> list[Problem]:
    return [Problem(name[:64], "is not a known field") for name in fields if name not in known]


def _ttl_problems(fields: dict[str, Any]) -> list[Problem]:
    ttl_s = fields.get("ttl_s", DEFAULT_TTL_S)
    if type(ttl_s) is int and 1 <= ttl_s <= MAX_TTL_S:
        return []
    return [Problem("ttl_s", f"found {str(ttl_s)[:64]!r}, expected a whole number of seconds from 1 to {MAX_TTL_S}")]


def _cost_problems(cost: dict[str, Any], name: str, *, reserving: bool = False) -> list[Problem]:
    try:
        cost_units(cost, reserving=reserving)
    except InvalidInput as error:
        return [Problem(f"{name}{problem.path.removeprefix('cost')}", problem.message) for problem in error.problems]
    return []
