"""What requests and answers look like, for OpenAPI. Answers are not validated by these: the tests compare them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema

from ..entities import DEFAULT_LIMIT, MAX_LIMIT, NO_NUMBER, RESOURCE_PATTERN
from ..keys import (
    BULK_FIELDS,
    DEFAULT_TTL_S,
    MAX_OVERLAP_S,
    MAX_RESOURCES,
    MAX_TTL_S,
    BulkAction,
    Environment,
    KeyChanges,
    KeyState,
)
from ..keys import MAX_IDS as MAX_BULK_IDS
from ..keys.bulk import MAX_PAGE as MAX_BULK_PAGE
from ..keys.bulk import PAGE as BULK_PAGE
from ..limits import MAX_AMOUNT, Limit, Window
from ..limits.windows import CONCURRENCY
from .errors import MAX_PROBLEMS, STATUS
from .services import MAX_BATCH_ITEMS, MAX_USAGE_ITEMS

Number = Annotated[float, Field(ge=0, description="A whole number; for the resource `cost` one with up to 9 decimals.")]


def _amounts(**more: Any) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "type": "object",
            "description": "Amounts by resource: whole numbers; of `cost`, money, with up to 9 decimals.",
            "properties": {"cost": {"type": "number", "minimum": 0, "maximum": MAX_AMOUNT // 10**6}},
            "additionalProperties": {"type": "integer", "minimum": 0, "maximum": MAX_AMOUNT},
            "propertyNames": {"pattern": RESOURCE_PATTERN, "not": {"const": CONCURRENCY}},
            "maxProperties": MAX_RESOURCES,
            **more,
        }
    )


Cost = Annotated[dict[str, float], _amounts()]
UsedCost = Annotated[dict[str, float], _amounts(minProperties=1)]
HeldCost = Annotated[dict[str, float], _amounts(propertyNames={"pattern": RESOURCE_PATTERN})]
"""`concurrency` may be held, and is not used up."""
Totals = Annotated[
    dict[str, float],
    WithJsonSchema(
        {
            "type": "object",
            "description": "Amounts by resource: whole numbers; of `cost`, money, with up to 9 decimals.",
            "propertyNames": {"pattern": RESOURCE_PATTERN},
            "additionalProperties": {"type": "number", "minimum": 0},
        }
    ),
]


Address = Annotated[
    str,
    WithJsonSchema(
        {"type": "string", "anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]}
    ),
]


class Like:
    """Describes a field as a model, which a route reads by itself."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._model = model

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(self._model.__pydantic_core_schema__)


Moment = Annotated[AwareDatetime, NO_NUMBER]
"""A time as callers give it: with a zone, and no number."""


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- Errors ---------------------------------------------------------------------------------------------------


class ProblemItem(BaseModel):
    """One problem of the input: its path, the value and the expectation."""

    path: str
    message: str


def _only_unknown(schema: dict[str, Any]) -> None:
    schema.clear()
    schema["const"] = "unknown"


class NotCounted(BaseModel):
    """The records of a batch that were not counted, by their index, with the reason. With `unavailable` a record may
    have been counted."""

    code: str
    message: str
    items: list[int]


class ProblemDetails(BaseModel):
    """An error (RFC 9457). `errors`: all problems of the input. `outcome` is `unknown` if a write may have happened:
    read before you retry. `counted` and `failed`: the indexes of the counted and the other records of a usage batch."""

    type: str = Field(pattern="^/docs#error-[a-z_]+$")
    title: str = Field(min_length=1)
    status: int = Field(ge=400, le=599)
    detail: str = Field(min_length=1)
    code: str = Field(json_schema_extra={"enum": list(STATUS)})
    request_id: str = Field(pattern="^[A-Za-z0-9_.:-]{1,128}$")
    errors: list[ProblemItem] = Field([], min_length=1, max_length=MAX_PROBLEMS)
    outcome: Literal["unknown"] | SkipJsonSchema[None] = Field(None, json_schema_extra=_only_unknown)
    counted: list[int] = []
    failed: list[NotCounted] = []


# --- Keys -----------------------------------------------------------------------------------------------------


class KeyOut(BaseModel):
    """A key. `display` is its masked secret; the secret itself is shown once, at the creation."""

    id: str
    tenant: str
    name: str
    display: str
    user_id: str | None
    permissions: list[str]
    metadata: dict[str, Any]
    allowed_ips: list[str]
    limits: list[Limit]
    enabled: bool
    expires_at: datetime | None
    previous_until: datetime | None = Field(description="When the previous secret stops working.")
    last_used: datetime | None = Field(description="About a minute old; `/stats` is current.")
    usage_count: int = Field(description="Number of uses, about a minute old; `/stats` is current.")
    description: str | None
    owner: str | None
    environment: Environment
    groups: list[str] = Field(description="The groups of the tenant whose quotas the key shares.")
    allowed_models: list[str]
    allowed_routes: list[str]
    rotate_every_s: int | None
    rotation_overlap_s: int | None
    next_rotation_at: datetime | None
    unclaimed: bool = Field(description="Whether a rotated secret waits to be claimed.")
    leaked_at: datetime | None
    deleted_at: datetime | None
    version: int
    created_at: datetime
    updated_at: datetime


class IssuedKeyOut(KeyOut):
    """A key with its secret, shown once; null while a rotated secret waits to be claimed."""

    key: str | None


class KeyListOut(BaseModel):
    items: list[KeyOut]
    next_cursor: str | None


class RotateIn(Closed):
    overlap_s: int = Field(0, ge=0, le=MAX_OVERLAP_S, description="Seconds that the old secret keeps working.")
    hold: bool = Field(False, description="Do not return the new secret: keep it for `claim`.")


class LimitStatusOut(BaseModel):
    """The state of one limit. `used` = `recorded` + `reserved` (held by open reservations) + `leased` (leased to other
    nodes). `resets_at`: when `recorded` next falls. `subject`: the owner of the limit: `key`, `tenant`, `user:…` or
    `group:…`. `exceeded`: this limit denied the call."""

    resource: str = Field(pattern=RESOURCE_PATTERN)
    limit: Number
    used: Number
    remaining: Number
    recorded: Number
    reserved: Number
    leased: Number
    subject: str = "key"
    models: list[str] = []
    routes: list[str] = []
    window: Window
    resets_at: datetime | None
    exceeded: bool = False


class KeyStatsOut(BaseModel):
    """`count`: uses. `totals`: lifetime usage by resource."""

    key_id: str
    tenant: str
    enabled: bool
    expired: bool
    count: int
    last_used_at: datetime | None
    totals: Totals
    limits: list[LimitStatusOut]


class KeyListQuery(Closed):
    tenant: str | None = Field(None, description="Only this tenant's keys.")
    user_id: str | None = Field(None, description="Only this user's keys.")
    owner: str | None = Field(None, description="Only this owner's keys.")
    environment: Environment | None = None
    name_prefix: str | None = Field(None, description="Only keys whose names begin with this; ordered by name.")
    name_contains: str | None = Field(
        None, min_length=1, max_length=200, description="Only keys whose names contain this, in any case."
    )
    state: KeyState | None = Field(None, description="`active`, `disabled`, or `expired` and not disabled.")
    group: str | None = Field(None, description="Only keys of this group.")
    permission: str | None = Field(None, description="Only keys with exactly this permission.")
    expires_after: Moment | None = None
    expires_before: Moment | None = Field(None, description="Excludes keys without an expiry.")
    used_after: Moment | None = Field(None, description="Last used after this time (about a minute old).")
    used_before: Moment | None = Field(None, description="Not used since this time, or never.")
    created_after: Moment | None = None
    created_before: Moment | None = None
    deleted: bool = Field(False, description="Only deleted keys that can be restored.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


class BulkFilterIn(Closed):
    """A key must match all given conditions."""

    tenant: str | None = None
    user_id: str | None = None
    owner: str | None = None
    environment: Environment | None = None
    name_prefix: str | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    deleted: bool | None = None
    name_contains: str | None = Field(
        None, min_length=1, max_length=200, description="Only keys whose names contain this, in any case."
    )
    state: KeyState | None = Field(None, description="`active`, `disabled`, or `expired` and not disabled.")
    group: str | None = Field(None, description="Only keys of this group.")
    permission: str | None = Field(None, description="Only keys with exactly this permission.")
    expires_after: Moment | None = None
    expires_before: Moment | None = Field(None, description="Excludes keys without an expiry.")
    used_after: Moment | None = Field(None, description="Last used after this time (about a minute old).")
    used_before: Moment | None = Field(None, description="Not used since this time, or never.")


BulkChangesIn: type[BaseModel] = create_model(
    "BulkChangesIn",
    __base__=Closed,
    __doc__="Fields of keys to change; missing fields keep their values.",
    **{name: (info.annotation, info) for name, info in KeyChanges.model_fields.items() if name in BULK_FIELDS},  # type: ignore[call-overload]
)


class BulkIn(Closed):
    action: BulkAction
    filter: BulkFilterIn | None = None
    ids: list[str] | None = Field(None, max_length=MAX_BULK_IDS)
    changes: Annotated[dict[str, Any], Like(BulkChangesIn)] | None = Field(None, description="With `update`.")
    dry_run: bool = Field(False, description="Only count the keys.")
    limit: int = Field(BULK_PAGE, ge=1, le=MAX_BULK_PAGE, description="The most keys that this call examines.")
    cursor: str | None = Field(None, description="The `next_cursor` of the last call.")


class BulkFailureOut(BaseModel):
    id: str
    code: str
    message: str


class BulkOut(BaseModel):
    """`looked_at` is the sum of `changed`, `unchanged` (already so) and `failed`."""

    dry_run: bool
    looked_at: int
    changed: int
    unchanged: int
    failed: list[BulkFailureOut]
    next_cursor: str | None


class KeyQuery(Closed):
    deleted: bool = Field(False, description="Also show a deleted key.")


class DeleteQuery(Closed):
    purge: bool = Field(False, description="Remove the key and its usage for good.")


# --- Verifying and usage --------------------------------------------------------------------------------------


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


# --- Statistics as seed 004 has them --------------------------------------------------------------------------


class CurrentUsageOut(BaseModel):
    tokens_used_in_current_window: int
    window_started_at: datetime
    window_ends_at: datetime | None
    remaining_tokens: int | None


class StatsOut(BaseModel):
    """The statistics of the key that calls."""

    key: str
    name: str
    model: Any
    token_limit_per_5h: int | None
    expiry_date: datetime | None
    created_at: datetime
    last_used: datetime | None
    is_expired: bool
    current_usage: CurrentUsageOut
    total_lifetime_tokens: int


# --- Streams --------------------------------------------------------------------------------------------------


class ReadyEvent(BaseModel):
    """The first event of a stream: its cursor."""

    cursor: str = Field(min_length=1)


class ChangeEvent(BaseModel):
    """A change of a document. `before` and `after`: its fields, secrets masked; null if the document did not exist
    before, or does not exist after."""

    id: str = Field(min_length=1)
    action: Literal["create", "update", "delete"]
    version: int
    at: datetime
    actor: str
    request_id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class RemovedEvent(BaseModel):
    """A document that the rules no longer let the caller see."""

    id: str = Field(min_length=1)
    action: Literal["removed"]
    version: int
    at: datetime
    reason: Literal["access_lost"]


class ResetEvent(BaseModel):
    """Changes were missed: the stream continues at `cursor`, the journal's current end. Read the collection again."""

    cursor: str = Field(min_length=1)
    reason: str


# --- Health ---------------------------------------------------------------------------------------------------


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
