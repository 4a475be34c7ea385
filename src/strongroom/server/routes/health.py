"""Whether the server lives, whether it is ready, and what it has done."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from ...errors import Unauthenticated
from ...storage.port import Health
from ..auth import Scope, authorization
from ..metrics import CONTENT_TYPE
from ..services import Services
from ..shapes import AliveOut, ReadyOut
from ..wire import Json

CHECK_TIMEOUT_S = 5.0
DEGRADED_S = 0.5
"""A dependency that answers, but later than this, is degraded."""


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["health"])
    store = services.room.store

    async def check_store() -> dict[str, Any]:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                health = await store.check()
        except TimeoutError:
            health = Health(False, CHECK_TIMEOUT_S, {"error": f"no answer within {CHECK_TIMEOUT_S} s"})
        status = "unavailable" if not health.ok else "degraded" if health.latency_s > DEGRADED_S else "ok"
        return {
            "status": status,
            "kind": store.capabilities.name,
            "latency_ms": round(health.latency_s * 1_000, 3),
            "details": dict(health.details),
        }

    @routes.get("/healthz", response_model=AliveOut, summary="Alive")
    async def healthz() -> Response:
        """The process answers. It says nothing of what it depends on."""
        return Json({"status": "ok"})

    @routes.get("/readyz", response_model=ReadyOut, responses={503: {"model": ReadyOut}}, summary="Ready")
    async def readyz(request: Request) -> Response:
        """Each dependency, its latency, and whether it is degraded. 503 if requests would fail. The details are for
        callers with a management key."""
        checked = await check_store()
        try:
            caller = await services.authenticator.caller(authorization(request.scope["headers"]))
            may_see = caller.scope >= Scope.READ
        except Unauthenticated:
            may_see = False
        if not may_see:
            del checked["details"]
        stopping = services.closing.is_set()
        status = "stopping" if stopping else "ready" if checked["status"] == "ok" else checked["status"]
        ready = not stopping and checked["status"] != "unavailable"
        body = {"status": status, "ready": ready, "dependencies": {"store": checked}}
        return Json(body, 200 if ready else 503)

    @routes.get("/metrics", summary="Metrics", response_class=Response)
    async def metrics() -> Response:
        """This process's metrics in Prometheus' text format."""
        return Response(services.metrics.text(), media_type=CONTENT_TYPE)

    return routes
