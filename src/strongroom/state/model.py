"""Shared state of a platform's services after seed 002: policies, signals, actions, coordination status.

Every entity belongs to a tenant. Times in nanoseconds are ints, as their producers send them; the store sets
`created_at`, `updated_at` and `version`. Policies, signals and actions are cached, under the names and with the times
to live of the seed.
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
    """A governance rule that services read. The journal has its history."""

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
    """A control signal from a producer to a consumer. It expires at `expires_at`."""

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
    """A task that one service requests of another."""

    action_type: Annotated[Name, Indexed()]
    source_service: Name
    parameters: dict[str, Any] = {}
    status: Literal["pending", "accepted", "failed"] = "pending"


class CoordinationStatus(Entity, collection="coordination_status", indexes=[Index("status", "-updated_at")]):
    """The health that a service reports of itself; the id is the service's."""

    service_name: Annotated[Name, Indexed()]
    status: Literal["healthy", "degraded", "unhealthy"]
    timestamp_ns: Annotated[int, Field(ge=0)]
    pending_signals: Annotated[int, Field(ge=0)] = 0
    pending_actions: Annotated[int, Field(ge=0)] = 0


ENTITIES: tuple[type[Entity], ...] = (Policy, Signal, Action, CoordinationStatus)
