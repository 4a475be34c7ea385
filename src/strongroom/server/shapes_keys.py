"""The shapes of requests and answers about keys, for OpenAPI."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    Field,
    create_model,
)

from ..entities import DEFAULT_LIMIT, MAX_LIMIT
from ..keys import (
    BULK_FIELDS,
    MAX_OVERLAP_S,
    BulkAction,
    Environment,
    KeyChanges,
    KeyState,
)
from ..keys import MAX_IDS as MAX_BULK_IDS
from ..keys.bulk import MAX_PAGE as MAX_BULK_PAGE
from ..keys.bulk import PAGE as BULK_PAGE
from ..limits import Limit
from .shapes import Closed, Like, LimitStatusOut, Moment, Totals


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


class KeyConditions(Closed):
    """A key must meet every condition that is given."""

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


class KeyListQuery(KeyConditions):
    deleted: bool = Field(False, description="Only deleted keys that can be restored.")
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, description="The `next_cursor` of the last page.")


class BulkFilterIn(KeyConditions):
    """A key must match all given conditions."""

    deleted: bool | None = None


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
