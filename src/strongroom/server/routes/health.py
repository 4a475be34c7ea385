"""Health, readiness and metrics: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from ... import health
from ...errors import Denied, Unauthenticated, Unavailable
from ...health import Dependency
from ..auth import Scope, authorization
from ..metrics import CONTENT_TYPE
from ..services import services_of
from ..wire import Json


class AliveOut(BaseModel):
    status: Literal["ok"]


class DependencyOut(BaseModel):
    status: Literal["ok", "degraded", "unavailable"]
    kind: str
    latency_ms: float
    details: dict[str, Any] = {}


class ReadyOut(BaseModel):
    status: Literal["ready", "degraded", "unavailable", "stopping"]
    ready: bool
    message: str | None = Field(None, description="Why the server is not ready, while it has no store yet.")
    dependencies: dict[str, DependencyOut]


routes = APIRouter(tags=["health"])


@routes.get("/healthz", response_model=AliveOut, summary="Alive")
async def healthz() -> Response:
    """The process answers. This does not check its dependencies."""
    return Json({"status": "ok"})


@routes.get("/readyz", response_model=ReadyOut, responses={503: {"model": ReadyOut}}, summary="Ready")
async def readyz(request: Request) -> Response:
    """Each dependency, its latency, and whether it is degraded. 503 if requests would fail. The details are for
    callers with a management key."""
    services = services_of(request)
    room = services.room
    parts = (room.store, room.feed, room.clock, room.background, room.cache, room.sign_in)
    sealing = room.sealer, room.proofs.keys, room.witnesses.alarms if room.witnesses is not None else None
    found = await health.check(*parts, room.database.writes, room.suspended.sentences, sealing)
    try:
        caller = await services.authenticator.caller(authorization(request.scope["headers"]), request.scope)
        may_see = caller.scope >= Scope.READ
    except (Denied, Unauthenticated, Unavailable):
        may_see = False
    stopping = services.closing.is_set()
    worst = health.overall(found)
    status = "stopping" if stopping else "ready" if worst == "ok" else worst
    ready = not stopping and worst != "unavailable"
    dependencies = {name: shown(dependency, may_see) for name, dependency in found.items()}
    return Json({"status": status, "ready": ready, "dependencies": dependencies}, 200 if ready else 503)


@routes.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """The metrics of all workers of this server in Prometheus' text format."""
    return Response(services_of(request).metrics.text(), media_type=CONTENT_TYPE)


def shown(dependency: Dependency, details: bool) -> dict[str, Any]:
    """A dependency in the form of an answer."""
    body: dict[str, Any] = {
        "status": dependency.status,
        "kind": dependency.kind,
        "latency_ms": round(dependency.latency_s * 1_000, 3),
    }
    return {**body, "details": dict(dependency.details)} if details else body
