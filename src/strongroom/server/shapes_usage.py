"""The shapes of verifications, usage and reservations, for OpenAPI."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)

from ..keys import (
    DEFAULT_TTL_S,
    MAX_TTL_S,
)
from .services import MAX_BATCH_ITEMS, MAX_USAGE_ITEMS
from .shapes import Address, Closed, Cost, HeldCost, LimitStatusOut, Totals, UsedCost


class VerifyIn(Closed):
    """`cost`: amounts by resource; default: one request. `permission`: one that the key must have. `ip`: the caller's
    address."""

    key: str
    cost: Cost | None = None
    permission: str | None = None
    ip: Address | None = None
    model: str | None = Field(None, description="The model of the call: some limits apply to some models only.")
    route: str | None = Field(None, description="As `model`.")


class VerifyOneIn(VerifyIn):
    """As `verify:batch`'s items; a single one may be a dry run."""

    peek: bool = Field(False, description="A dry run: the same answer, without a debit.")


class VerifyOut(BaseModel):
    """Whether the key may be used now. Only VALID debits anything."""

    valid: bool
    code: Literal[
        "VALID", "NOT_FOUND", "DISABLED", "EXPIRED", "INSUFFICIENT_PERMISSIONS", "FORBIDDEN", "RATE_LIMITED",
        "USAGE_EXCEEDED",
    ]  # fmt: skip
    key_id: str | None
    tenant: str | None
    user_id: str | None
    permissions: list[str]
    metadata: dict[str, Any]
    limits: list[LimitStatusOut]
    retry_after_s: float | None = Field(description="Seconds after which the same call would be admitted.")
    message: str | None = Field(description="Why the call is not valid.")
    uncounted: list[str] = Field(description="Resources of the cost that no limit of the key counts.")


class VerifyBatchIn(Closed):
    items: list[VerifyIn] = Field(min_length=1, max_length=MAX_BATCH_ITEMS)


class VerifyBatchOut(BaseModel):
    items: list[VerifyOut]


class UsageIn(Closed):
    """Usage of a key, given by its secret or its id."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["key"], "properties": {"key": {"type": "string"}}},
                {"required": ["key_id"], "properties": {"key_id": {"type": "string"}}},
            ]
        }
    )

    key: str | None = None
    key_id: str | None = None
    cost: UsedCost
    model: str | None = None
    route: str | None = None
    idempotency_key: str | None = Field(None, description="As the header Idempotency-Key.")
    at: datetime | None = Field(
        None, description="The time of the usage. It counts in the windows that still include this time. Default: now."
    )


class UsageBatchIn(Closed):
    items: list[UsageIn] = Field(min_length=1, max_length=MAX_USAGE_ITEMS)


class UsageOut(BaseModel):
    key_id: str
    tenant: str
    limits: list[LimitStatusOut]
    uncounted: list[str] = Field(description="Resources of the cost that no limit of the key counts.")


class UsageBatchOut(BaseModel):
    """`recorded`: the number of recorded items. `keys`: the state of each key's limits, in the order of the first
    items."""

    recorded: int
    keys: list[UsageOut]


class ReserveIn(VerifyIn):
    """Like a verification: holds `cost`, and one of `concurrency`, for `ttl_s` seconds."""

    cost: HeldCost | None = None
    ttl_s: int = Field(DEFAULT_TTL_S, ge=1, le=MAX_TTL_S)


class ReservationOut(VerifyOut):
    """A reservation. `charged`: its total usage so far."""

    reservation_id: str | None
    state: Literal["open", "settled", "released"] | None
    expires_at: datetime | None
    charged: Totals


class SettleIn(Closed):
    """The total usage, also above the held amount."""

    cost: Cost


class ExtendIn(Closed):
    """`cost`: the new held total (default: unchanged). `used`: the total usage so far, which is charged now."""

    ttl_s: int = Field(DEFAULT_TTL_S, ge=1, le=MAX_TTL_S)
    cost: HeldCost | None = None
    used: Cost | None = None
