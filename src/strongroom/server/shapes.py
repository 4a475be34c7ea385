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
    """One thing that is wrong with the input: where, and what was found and expected."""

    path: str
    message: str


def _only_unknown(schema: dict[str, Any]) -> None:
    schema.clear()
    schema["const"] = "unknown"


class NotCounted(BaseModel):
    """Records of a batch that were not counted, by their number, and why. Of those that are `unavailable` it is not
    known whether they were."""

    code: str
    message: str
    items: list[int]


class ProblemDetails(BaseModel):
    """An error, as RFC 9457 has it. `errors` is there where the input is wrong, and names everything that is. `outcome`
    is there, and `unknown`, where a write may have been done all the same: read before it is tried again. `counted` and
    `failed` are there where of a batch of usage some records were counted or may have been: their numbers."""

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
    """A key. `display` is what may be shown of its text; the text itself is shown once, when it is made."""

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
    previous_until: datetime | None = Field(description="Until when the text before the last rotation works.")
    last_used: datetime | None = Field(description="As of about a minute ago; `/stats` has it as of now.")
    usage_count: int = Field(description="Uses, as of about a minute ago; `/stats` has it as of now.")
    description: str | None
    owner: str | None
    environment: Environment
    groups: list[str] = Field(description="The quotas of its tenant that it shares with other keys.")
    allowed_models: list[str]
    allowed_routes: list[str]
    rotate_every_s: int | None
    rotation_overlap_s: int | None
    next_rotation_at: datetime | None
    unclaimed: bool = Field(description="Whether the text of a rotation waits to be claimed.")
    leaked_at: datetime | None
    deleted_at: datetime | None
    version: int
    created_at: datetime
    updated_at: datetime


class IssuedKeyOut(KeyOut):
    """A key with its text, which is shown this once; null where a rotation holds it to be claimed."""

    key: str | None


class KeyListOut(BaseModel):
    items: list[KeyOut]
    next_cursor: str | None


class RotateIn(Closed):
    overlap_s: int = Field(0, ge=0, le=MAX_OVERLAP_S, description="Seconds that the old text works on.")
    hold: bool = Field(False, description="Do not show the new text: keep it to be claimed.")


class LimitStatusOut(BaseModel):
    """Where one limit stands. `used` is what was `recorded`, is `reserved` (held by open reservations) and is `leased`
    (lent to other nodes). `resets_at`: when `recorded` next falls. `subject`: whose limit it is, if not the key's own:
    `tenant`, or `user:…` or `group:…`. `exceeded`: this limit denied the call."""

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
    """`count`: uses. `totals`: what was used of each resource in the key's lifetime."""

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
    name_prefix: str | None = Field(None, description="Only keys whose names begin so; by name.")
    name_contains: str | None = Field(
        None, min_length=1, max_length=200, description="Only keys whose names have this part, in capitals or not."
    )
    state: KeyState | None = Field(
        None, description="`disabled`; `expired` and not disabled; or `active`: neither of these."
    )
    group: str | None = Field(None, description="Only keys that share this quota.")
    permission: str | None = Field(None, description="Only keys with exactly this permission among theirs.")
    expires_after: Moment | None = None
    expires_before: Moment | None = Field(None, description="Not those that never expire.")
    used_after: Moment | None = Field(None, description="Last used after that, as of about a minute ago.")
    used_before: Moment | None = Field(None, description="Not used since, or never.")
    created_after: Moment | None = None
    created_before: Moment | None = None
    deleted: bool = Field(False, description="The deleted keys that can be restored, instead of the others.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the page before.")


class BulkFilterIn(Closed):
    """All of what is given must hold."""

    tenant: str | None = None
    user_id: str | None = None
    owner: str | None = None
    environment: Environment | None = None
    name_prefix: str | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    deleted: bool | None = None
    name_contains: str | None = Field(
        None, min_length=1, max_length=200, description="Only keys whose names have this part, in capitals or not."
    )
    state: KeyState | None = Field(
        None, description="`disabled`; `expired` and not disabled; or `active`: neither of these."
    )
    group: str | None = Field(None, description="Only keys that share this quota.")
    permission: str | None = Field(None, description="Only keys with exactly this permission among theirs.")
    expires_after: Moment | None = None
    expires_before: Moment | None = Field(None, description="Not those that never expire.")
    used_after: Moment | None = Field(None, description="Last used after that, as of about a minute ago.")
    used_before: Moment | None = Field(None, description="Not used since, or never.")


BulkChangesIn: type[BaseModel] = create_model(
    "BulkChangesIn",
    __base__=Closed,
    __doc__="Some fields of keys, to be changed; those not given stay.",
    **{name: (info.annotation, info) for name, info in KeyChanges.model_fields.items() if name in BULK_FIELDS},  # type: ignore[call-overload]
)


class BulkIn(Closed):
    action: BulkAction
    filter: BulkFilterIn | None = None
    ids: list[str] | None = Field(None, max_length=MAX_BULK_IDS)
    changes: Annotated[dict[str, Any], Like(BulkChangesIn)] | None = Field(None, description="With `update`.")
    dry_run: bool = Field(False, description="Only count.")
    limit: int = Field(BULK_PAGE, ge=1, le=MAX_BULK_PAGE, description="Keys to look at in this call.")
    cursor: str | None = Field(None, description="The `next_cursor` of the call before.")


class BulkFailureOut(BaseModel):
    id: str
    code: str
    message: str


class BulkOut(BaseModel):
    """`changed` and `unchanged` (it was so already) and `failed` are together all that was `looked_at`."""

    dry_run: bool
    looked_at: int
    changed: int
    unchanged: int
    failed: list[BulkFailureOut]
    next_cursor: str | None


class KeyQuery(Closed):
    deleted: bool = Field(False, description="Show it if it was deleted, too.")


class DeleteQuery(Closed):
    purge: bool = Field(False, description="Remove it and its usage for good.")


# --- Verifying and usage --------------------------------------------------------------------------------------


class VerifyIn(Closed):
    """`cost`: amounts by resource; without it one request. `permission`: one the key must have. `ip`: who uses it."""

    key: str
    cost: Cost | None = None
    permission: str | None = None
    ip: Address | None = None
    model: str | None = Field(None, description="What the call is for: some limits are for some models only.")
    route: str | None = Field(None, description="As `model`.")


class VerifyOneIn(VerifyIn):
    """As `verify:batch`'s items; a single one may be a dry run."""

    peek: bool = Field(False, description="A dry run: the same answer, and nothing is counted.")


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
    """What has happened, on a key given by its text or its id."""

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
        None, description="When it was used: it counts in the windows that still count that moment. Default: now."
    )


class UsageBatchIn(Closed):
    items: list[UsageIn] = Field(min_length=1, max_length=MAX_USAGE_ITEMS)


class UsageOut(BaseModel):
    key_id: str
    tenant: str
    limits: list[LimitStatusOut]
    uncounted: list[str] = Field(description="Resources of the cost that no limit of the key counts.")


class UsageBatchOut(BaseModel):
    """`recorded`: how many items were. `keys`: where the limits of each key stand, in the order of the first items."""

    recorded: int
    keys: list[UsageOut]


class ReserveIn(VerifyIn):
    """As a verification: `cost` is held for `ttl_s` seconds, and one of `concurrency`."""

    cost: HeldCost | None = None
    ttl_s: int = Field(DEFAULT_TTL_S, ge=1, le=MAX_TTL_S)


class ReservationOut(VerifyOut):
    """A reservation. `charged`: what was used of it in all so far."""

    reservation_id: str | None
    state: Literal["open", "settled", "released"] | None
    expires_at: datetime | None
    charged: Totals


class SettleIn(Closed):
    """What was used in all, more than was held too."""

    cost: Cost


class ExtendIn(Closed):
    """`cost`: what is to be held in all from now on (without it: as it is). `used`: what was used in all so far; it is
    charged now."""

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
    """The first event of a stream: where it stands."""

    cursor: str = Field(min_length=1)


class ChangeEvent(BaseModel):
    """A change of a document. `before` and `after`: its fields as the journal has them, secrets masked; null where
    there was, or is, no such document."""

    id: str = Field(min_length=1)
    action: Literal["create", "update", "delete"]
    version: int
    at: datetime
    actor: str
    request_id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class RemovedEvent(BaseModel):
    """A document that is there, but that the rules do not let the caller see any more."""

    id: str = Field(min_length=1)
    action: Literal["removed"]
    version: int
    at: datetime
    reason: Literal["access_lost"]


class ResetEvent(BaseModel):
    """Changes were missed: the stream goes on at `cursor`, the journal's present end. Read anew."""

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
    message: str | None = Field(None, description="Why it is not ready, where the server has not yet had its store.")
    dependencies: dict[str, DependencyOut]
