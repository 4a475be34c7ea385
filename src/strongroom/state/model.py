"""Shared state of a platform's services, as seed 002 has it: policies, signals, actions, coordination status.

Each is kept by tenant. Times in nanoseconds are ints, as their producers send them; `created_at`, `updated_at` and
`version` are the store's, on every entity. Policies, signals and actions may be read from a cache, under the names and
for the times of the seed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from ..entities import Cached, CachedList, Entity, Index, Indexed

Name = Annotated[str, Field(min_length=1, max_length=200)]
MAX_PAYLOAD_BYTES = 262_144


class Policy(
    Entity,
    collection="policies",
    indexes=[Index("policy_type", "-created_at")],
    cache=Cached(seconds=300, name="policy"),
):
    """A rule of governance that services ask for. Its history is the journal's."""

    policy_type: Name
    policy_name: Annotated[Name, Indexed()]
    rules: dict[str, Any] = {}
    enabled: bool = True


class Signal(
    Entity,
    collection="signals",
    indexes=[Index("status", "created_at"), Index("status", "-priority", "timestamp_ns"), Index("expires_at")],
    ttl="expires_at",
    cache=Cached(seconds=60, name="signal"),
):
    """A control signal on its way from a producer to whoever processes it. It is gone once `expires_at` has come."""

    signal_type: Annotated[Name, Indexed()]
    timestamp_ns: Annotated[int, Field(ge=0)]
    metadata: dict[str, Any] = {}
    payload: Annotated[bytes, Field(max_length=MAX_PAYLOAD_BYTES)] = b""
    priority: int = 0
    status: Literal["pending", "processed", "failed"] = "pending"
    source_service: Name | None = None
    expires_at: datetime | None = None


PENDING_ACTIONS = CachedList("actions", by="source_service", where={"status": "pending"}, order_by=("-created_at",))
"""A service's pending actions, newest first."""


class Action(
    Entity,
    collection="actions",
    indexes=[Index("status", "created_at"), Index("source_service", "status", "-created_at")],
    cache=Cached(seconds=60, name="action", lists=[PENDING_ACTIONS]),
):
    """A task that one service wants another to do."""

    action_type: Annotated[Name, Indexed()]
    source_service: Name
    parameters: dict[str, Any] = {}
    status: Literal["pending", "accepted", "failed"] = "pending"


class CoordinationStatus(Entity, collection="coordination_status", indexes=[Index("status", "-updated_at")]):
    """How one service is, by its own word; the id is the service's."""

    service_name: Annotated[Name, Indexed()]
    status: Literal["healthy", "degraded", "unhealthy"]
    timestamp_ns: Annotated[int, Field(ge=0)]
    pending_signals: Annotated[int, Field(ge=0)] = 0
    pending_actions: Annotated[int, Field(ge=0)] = 0


ENTITIES: tuple[type[Entity], ...] = (Policy, Signal, Action, CoordinationStatus)
