"""Usage: what has happened, recorded on a key after the fact, over a limit too."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from ...errors import InvalidInput, Problem
from ...verification import cost_units
from ..auth import Scope
from ..openapi import body
from ..services import Services
from ..shapes import UsageIn, UsageOut
from ..wire import Json, body_fields, caller_of, context_of, idempotency_key

_TEXTS = ("key", "key_id", "idempotency_key")


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/usage", tags=["usage"])
    keys = services.room.keys

    @routes.post("", response_model=UsageOut, openapi_extra=body(UsageIn), summary="Record usage")
    async def record_usage(request: Request) -> Response:
        """Counts on the key whatever its state, and past its limits: it has happened. Durable once it is answered, and
        counted once for one idempotency key (within a day)."""
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
            idempotency_key=header if header is not None else fields.get("idempotency_key"),
            context=context_of(request),
        )
        return Json({"key_id": answer.key_id, "tenant": answer.tenant, "limits": answer.limits})

    return routes


def _problems(fields: dict[str, Any], header: str | None) -> list[Problem]:
    known = (*_TEXTS, "cost")
    problems = [Problem(name[:64], "is not a known field") for name in fields if name not in known]
    texts = {name: fields[name] for name in _TEXTS if fields.get(name) is not None}
    problems += [Problem(name, "expected text") for name, value in texts.items() if not isinstance(value, str)]
    if ("key" in texts) == ("key_id" in texts):
        problems.append(Problem("key", "expected exactly one of key and key_id"))
    if header is not None and texts.get("idempotency_key", header) != header:
        problems.append(Problem("idempotency_key", "differs from the header Idempotency-Key"))
    cost = fields.get("cost")
    if not isinstance(cost, dict) or not cost:
        problems.append(Problem("cost", "expected an object with at least one amount"))
        return problems
    try:
        cost_units(cost)
    except InvalidInput as error:
        problems += error.problems
    return problems
