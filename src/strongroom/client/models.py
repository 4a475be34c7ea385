"""What the server answers, as typed values: exact amounts, aware times; what a newer server adds is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Generic, TypeVar

import msgspec

Amount = int | Decimal
"""How much of a resource: whole, or for money with up to 9 decimals."""
Cost = Mapping[str, int | float | Decimal]
"""Amounts by resource, such as `{"requests": 1, "tokens": 250, "cost": Decimal("0.0025")}`."""
Moment = Annotated[datetime, msgspec.Meta(tz=True)]
T = TypeVar("T")


class Model(msgspec.Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """An answer. Words such as `code` and `kind` stay texts, because a newer server may know more of them."""


class Page(Model, Generic[T], frozen=True):
    """Some items, and where the next page begins (None: this was the last)."""

    items: list[T]
    next_cursor: str | None = None


# --- Limits ---------------------------------------------------------------------------------------------------


class Refill(msgspec.Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """What comes back of a total: `amount` with each `unit` of the calendar in `timezone`, or every `seconds`."""

    amount: Amount
    unit: str | None = None
    timezone: str = "UTC"
    seconds: int | None = None


class Window(msgspec.Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """The span in which a limit holds: made by `rolling`, `anchored`, `calendar` or `total`."""

    kind: str
    seconds: int | None = None
    unit: str | None = None
    timezone: str | None = None
    refill: Refill | None = None

    @classmethod
    def rolling(cls, seconds: int) -> Window:
        """The last `seconds`."""
        return cls("rolling", seconds=seconds)

    @classmethod
    def anchored(cls, seconds: int) -> Window:
        """`seconds` from the first use on; the first use after that starts another."""
        return cls("anchored", seconds=seconds)

    @classmethod
    def calendar(cls, unit: str, timezone: str = "UTC") -> Window:
        """The present minute, hour, day, week (from Monday) or month in `timezone` (an IANA name)."""
        return cls("calendar", unit=unit, timezone=timezone)

    @classmethod
    def total(cls, refill: Refill | None = None) -> Window:
        """No window: what is used stays used, but for what `refill` gives back."""
        return cls("total", refill=refill)


class Limit(msgspec.Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """At most `limit` of `resource` in each `window`; with `models` or `routes`, of the calls that name one of them."""

    resource: str
    limit: Amount
    window: Window
    models: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()


class LimitStatus(Model, frozen=True):
    """Where one limit stands. `resets_at`: when `used` next falls. `exceeded`: this limit denied the call.

    `subject` names whose limit it is: `key`, or a quota. Of what is `used`, `recorded` was used, `reserved` is held by
    reservations that are open, and `leased` is lent to the server's nodes.
    """

    resource: str
    limit: Amount
    used: Amount
    remaining: Amount
    window: Window
    resets_at: Moment | None = None
    exceeded: bool = False
    subject: str = "key"
    recorded: Amount | None = None
    reserved: Amount | None = None
    leased: Amount | None = None
    models: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()


# --- Keys -----------------------------------------------------------------------------------------------------


class ApiKey(Model, frozen=True):
    """A key. `display` is what may be shown of its text; the text itself is answered once, when it is made.

    `unclaimed`: the text of a rotation waits to be claimed.
    """

    id: str
    tenant: str
    name: str
    display: str
    version: int
    enabled: bool
    created_at: Moment
    updated_at: Moment
    user_id: str | None = None
    description: str | None = None
    owner: str | None = None
    environment: str = "live"
    permissions: list[str] = []
    metadata: dict[str, Any] = {}
    allowed_ips: list[str] = []
    allowed_models: list[str] = []
    allowed_routes: list[str] = []
    groups: list[str] = []
    limits: list[Limit] = []
    expires_at: Moment | None = None
    previous_until: Moment | None = None
    rotate_every_s: int | None = None
    rotation_overlap_s: int | None = None
    next_rotation_at: Moment | None = None
    unclaimed: bool = False
    leaked_at: Moment | None = None
    deleted_at: Moment | None = None
    last_used: Moment | None = None
    usage_count: int = 0


class IssuedKey(Model, frozen=True):
    """A key with its text, which the server shows this once (empty where a rotation holds it, to be claimed). The text
    is left out of the representation."""

    key: ApiKey
    text: str

    def __repr__(self) -> str:
        return f"IssuedKey(key={self.key!r})"


class KeyStats(Model, frozen=True):
    """`count`: uses. `totals`: what was used of each resource in the key's lifetime."""

    key_id: str
    tenant: str
    enabled: bool
    expired: bool
    count: int
    last_used_at: Moment | None = None
    totals: dict[str, Amount] = {}
    limits: list[LimitStatus] = []


class Verification(Model, frozen=True):
    """Whether a key may be used now. `code` is VALID, or says why not; only VALID debits anything.

    `retry_after_s`: seconds until the same call would be admitted if nothing else is used; None if waiting does not
    help. `message` explains a refusal. `uncounted`: the resources of the cost that no limit of the key counts: perhaps
    their names are written wrongly.
    """

    valid: bool
    code: str
    key_id: str | None = None
    tenant: str | None = None
    user_id: str | None = None
    permissions: list[str] = []
    metadata: dict[str, Any] = {}
    limits: list[LimitStatus] = []
    retry_after_s: float | None = None
    message: str | None = None
    uncounted: list[str] = []


class Reservation(Verification, frozen=True):
    """The answer to a reservation, and to what is done to it. `state` is open, settled or released; None if it was
    refused, and then there is no `reservation_id`. `charged`: what was used of it in all so far."""

    reservation_id: str | None = None
    state: str | None = None
    expires_at: Moment | None = None
    charged: dict[str, Amount] = {}


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One question of `verify_batch`: may this key be used, for this cost? The key is left out of the
    representation."""

    key: str
    cost: Cost | None = None
    permission: str | None = None
    ip: str | None = None
    model: str | None = None
    route: str | None = None

    def __repr__(self) -> str:
        return f"Ask(cost={self.cost!r}, permission={self.permission!r}, ip={self.ip!r})"


class BulkFailure(Model, frozen=True):
    """A key that was not changed, and why."""

    id: str
    code: str
    message: str = ""


class BulkStep(Model, frozen=True):
    """One part of the work: how many keys were looked at, changed, or were so already (`unchanged`), and what failed.
    `next_cursor` is None with the last part."""

    looked_at: int
    changed: int
    unchanged: int
    failed: list[BulkFailure] = []
    dry_run: bool = False
    next_cursor: str | None = None


# --- Usage ----------------------------------------------------------------------------------------------------


class Used(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was used of one key, given by its text or its id: an item of `record_many`. `idempotency_key` keeps it from
    being counted twice, in whatever batch it comes. `at` is when it was used (default: now). The text is left out of
    the representation."""

    cost: Cost
    key: str | None = None
    key_id: str | None = None
    model: str | None = None
    route: str | None = None
    idempotency_key: str | None = None
    at: datetime | None = None

    def __repr__(self) -> str:
        return f"Used(key_id={self.key_id!r}, cost={self.cost!r}, idempotency_key={self.idempotency_key!r})"


class Recorded(Model, frozen=True):
    """Where a key's limits stand after usage was recorded, and the resources of the cost that none of them counts."""

    key_id: str
    tenant: str
    limits: list[LimitStatus] = []
    uncounted: list[str] = []


class RecordedBatch(Model, frozen=True):
    """`recorded`: how many items were. `keys`: where the limits of each key stand, in the order of the first items."""

    recorded: int
    keys: list[Recorded] = []


# --- Quotas ---------------------------------------------------------------------------------------------------


class Quota(Model, frozen=True):
    """Limits that all keys of a subject share. `kind` is tenant, user or group; `name`: the user's id or the group's
    name, empty for the tenant itself."""

    tenant: str
    kind: str
    name: str
    version: int
    created_at: Moment
    updated_at: Moment
    id: str = ""
    limits: list[Limit] = []
    description: str | None = None


class QuotaStats(Model, frozen=True):
    """`count`: uses. `totals`: what was used of each resource since the quota is there."""

    tenant: str
    kind: str
    name: str
    count: int
    last_used_at: Moment | None = None
    totals: dict[str, Amount] = {}
    limits: list[LimitStatus] = []


# --- Statistics, health -----------------------------------------------------------------------------------------


class CurrentUsage(Model, frozen=True):
    """The window that counts now."""

    tokens_used_in_current_window: Amount
    window_started_at: Moment
    window_ends_at: Moment | None = None
    remaining_tokens: Amount | None = None


class OwnStats(Model, frozen=True):
    """The statistics of the key that asks, whose text is masked."""

    key: str
    name: str
    created_at: Moment
    is_expired: bool
    current_usage: CurrentUsage
    total_lifetime_tokens: Amount
    model: Any = None
    token_limit_per_5h: Amount | None = None
    expiry_date: Moment | None = None
    last_used: Moment | None = None


class Dependency(Model, frozen=True):
    """One thing that the server stands on. `status` is ok, degraded or unavailable."""

    status: str
    kind: str
    latency_ms: float
    details: dict[str, Any] = {}


class Readiness(Model, frozen=True):
    """Whether the server would answer requests, and what it stands on."""

    status: str
    ready: bool
    message: str | None = None
    dependencies: dict[str, Dependency] = {}


# --- Entities -------------------------------------------------------------------------------------------------


class Change(Model, frozen=True):
    """One change of a document. `action` is create, update or delete; `before` and `after` have the fields that it
    changed, secrets masked. Or `removed`: the document is there, but this caller may not see it any more (`reason` is
    access_lost)."""

    id: str
    action: str
    version: int | None = None
    at: Moment | None = None
    actor: str | None = None
    request_id: str | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    reason: str | None = None


# --- Webhooks -------------------------------------------------------------------------------------------------


class Webhook(Model, frozen=True):
    """An endpoint that is told of events. `failing_since` is set while every attempt fails; `disabled_reason` if it was
    disabled for that. `previous_until`: until when the secret before the last rotation signs as well."""

    id: str
    tenant: str
    url: str
    events: list[str]
    enabled: bool
    version: int
    created_at: Moment
    updated_at: Moment
    thresholds: list[int] = []
    min_window_s: int = 0
    description: str | None = None
    allow_private: bool = False
    previous_until: Moment | None = None
    failing_since: Moment | None = None
    disabled_reason: str | None = None


class IssuedWebhook(Model, frozen=True):
    """An endpoint with its secret, which the server shows this once. The secret is left out of the representation."""

    webhook: Webhook
    secret: str

    def __repr__(self) -> str:
        return f"IssuedWebhook(webhook={self.webhook!r})"


class Delivery(Model, frozen=True):
    """One event on its way to one endpoint. `state` is pending, delivered or dead; `due_at`: when it is tried next."""

    id: str
    webhook_id: str
    tenant: str
    event_id: str
    event_type: str
    state: str
    attempts: int
    created_at: Moment
    due_at: Moment | None = None
    last_attempt_at: Moment | None = None
    last_status: int | None = None
    last_error: str | None = None
    delivered_at: Moment | None = None
    expires_at: Moment | None = None
    version: int = 0
    updated_at: Moment | None = None


# --- Leaks ----------------------------------------------------------------------------------------------------


class Sighting(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A text that was found in public, and where. The text is left out of the representation."""

    token: str
    type: str | None = None
    url: str | None = None
    source: str | None = None

    def __repr__(self) -> str:
        return f"Sighting(type={self.type!r}, url={self.url!r}, source={self.source!r})"


class LeakLabel(Model, frozen=True):
    """Whether a reported text is a key: `label` is true_positive or false_positive."""

    token_hash: str
    token_type: str
    label: str


class Leak(Model, frozen=True):
    """A text of a key that was found in public. `ends_at`: when the text stops working; None: it works on."""

    id: str
    tenant: str
    key_id: str
    display: str
    done: str
    created_at: Moment
    type: str = ""
    url: str = ""
    source: str = ""
    reporter: str = ""
    ends_at: Moment | None = None
    last_administrator: bool = False


class AuditRecord(Model, frozen=True):
    """One record of the journal: who changed what, from what to what. `tenant` is None for the platform's own; `index`
    is its leaf in the tenant's tree, None until it is sealed. Secrets in `before` and `after` are `***`."""

    sequence: int
    at: Moment
    actor: str
    action: str
    collection: str
    index: int | None = None
    tenant: str | None = None
    request_id: str = ""
    entity_id: str = ""
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None


class LeakPolicy(Model, frozen=True):
    """What is done with a tenant's keys that leak: `action` is notify, disable or rotate; `overlap_s`: how long a
    leaked text works on where it is rotated. `updated_at` is None where none was set."""

    tenant: str
    action: str
    overlap_s: int | None = None
    updated_at: Moment | None = None
