"""API keys: make, show, list, change, rotate, remove; their statistics; verifications in batches."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from ...keys import ApiKey
from ..services import Services
from ..wire import Json, body_fields, context_of, etag, idempotency_key

HIDDEN = frozenset({"hash", "previous_hash", "sealed"})


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/keys", tags=["keys"])
    keys = services.room.keys

    @routes.post("", status_code=201)
    async def create_key(request: Request) -> Response:
        issued = await keys.create(
            context=context_of(request), idempotency_key=idempotency_key(request), **await body_fields(request)
        )
        return Json({**shown(issued.key), "key": issued.text}, 201, headers={"etag": etag(issued.key.version)})

    return routes


def shown(key: ApiKey) -> dict[str, Any]:
    """What callers see of a key."""
    return {name: value for name, value in key.model_dump().items() if name not in HIDDEN}
