"""The server's answers as typed values: exact amounts, aware times; fields of a newer server are ignored."""

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
    """An answer. Words such as `code` and `kind` are text, because a newer server may have more of them."""


class Page(Model, Generic[T], frozen=True):
    """A page of items, and the cursor of the next page (None: this is the last page)."""

    items: list[T]
    next_cursor: str | None = None


# --- Limits ---------------------------------------------------------------------------------------------------


class Refill(msgspec.Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """A refill of a total: `amount` at each `unit` of the calendar in `timezone`, or every `seconds`."""

    amount: Amount
    unit: str | None = None
    timezone: str = "UTC"
    seconds: int | None = None


class Window(msgspec.Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """The window of a limit: made by `rolling`, `anchored`, `calendar` or `total`."""

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
        """`seconds` from the first use; the first use after that starts a new window."""
        return cls("anchored", seconds=seconds)

    @classmethod
    def calendar(cls, unit: str, timezone: str = "UTC") -> Window:
        """The current minute, hour, day, week (from Monday) or month in `timezone` (an IANA name)."""
        return cls("calendar", unit=unit, timezone=timezone)

    @classmethod
    def total(cls, refill: Refill | None = None) -> Window:
        """No window: usage stays, except for amounts that `refill` gives back."""
        return cls("total", refill=refill)


class Limit(msgspec.Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """At most `limit` of `resource` in each `window`; with `models` or `routes` only for calls that name one of
    them."""

    resource: str
    limit: Amount
    window: Window
    models: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()


class LimitStatus(Model, frozen=True):
    """The state of one limit. `resets_at`: when `used` next falls. `exceeded`: this limit denied the call.

    `subject` is the limit's owner: `key`, or a quota. `used` = `recorded` + `reserved` (held by open reservations) +
    `leased` (leased to other nodes).
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
    """A key. `display` is its masked secret; only the answer to its creation has the secret.

    `unclaimed`: a rotated secret waits to be claimed.
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
    """A key with its secret, shown once (empty while a rotated secret waits to be claimed). The `repr` has no
    secret."""

    key: ApiKey
    text: str

    def __repr__(self) -> str:
        return f"IssuedKey(key={self.key!r})"


class KeyStats(Model, frozen=True):
    """`count`: uses. `totals`: lifetime usage by resource."""

    key_id: str
    tenant: str
    enabled: bool
    expired: bool
    count: int
    last_used_at: Moment | None = None
    totals: dict[str, Amount] = {}
    limits: list[LimitStatus] = []


class Verification(Model, frozen=True):
    """Whether a key may be used now. `code` is VALID or the reason of the refusal; only VALID debits.

    `retry_after_s`: seconds until the same call would be admitted if nothing else is used; None if waiting does not
    help. `message` explains a refusal. `uncounted`: resources of the cost that no limit of the key counts, for example
    misspelt names.
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
    """The answer to a reservation and its later calls. `state` is open, settled or released, or None for a refusal,
    which has no `reservation_id`. `charged`: its total usage so far."""

    reservation_id: str | None = None
    state: str | None = None
    expires_at: Moment | None = None
    charged: dict[str, Amount] = {}


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One item of `verify_batch`: a key and its cost. The `repr` has no key."""

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
    """One step of the work: the numbers of keys examined, changed and already so (`unchanged`), and the failures.
    `next_cursor` is None in the last step."""

    looked_at: int
    changed: int
    unchanged: int
    failed: list[BulkFailure] = []
    dry_run: bool = False
    next_cursor: str | None = None


# --- Usage ----------------------------------------------------------------------------------------------------


class Used(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Usage of one key, given by its secret or its id: an item of `record_many`. `idempotency_key` prevents a double
    count, in any batch. `at` is the time of the usage (default: now). The `repr` has no secret."""

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
    """A key's limits after usage was recorded, and the resources of the cost that none of them counts."""

    key_id: str
    tenant: str
    limits: list[LimitStatus] = []
    uncounted: list[str] = []


class RecordedBatch(Model, frozen=True):
    """`recorded`: the number of recorded items. `keys`: the state of each key's limits, in the order of the first
    items."""

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
    """`count`: uses. `totals`: usage by resource since the quota's creation."""

    tenant: str
    kind: str
    name: str
    count: int
    last_used_at: Moment | None = None
    totals: dict[str, Amount] = {}
    limits: list[LimitStatus] = []


# --- Tenants --------------------------------------------------------------------------------------------------


class WriteSwitch(Model, frozen=True):
    """Whether writes of one tenant, or (None) of all, are on. `by` turned them last; `usage`: whether verification,
    usage and reservations go on."""

    tenant: str | None
    allowed: bool
    usage: bool
    reason: str | None = None
    by: str | None = None
    changed_at: Moment | None = None


class WritesStatus(WriteSwitch, frozen=True, kw_only=True):
    """The switch for all tenants, and one page of tenants whose own switch is off. `migration`: why a migration lets
    nothing be written."""

    items: list[WriteSwitch]
    next_cursor: str | None = None
    migration: str | None = None


class TenantRecord(Model, frozen=True):
    """A tenant. `status` is active, suspended or deleting; `reason` and `suspended_at` say why and since when.
    `version` 0 and `created_at` None: nobody created it, it has data."""

    id: str
    status: str
    version: int
    name: str | None = None
    reason: str | None = None
    suspended_at: Moment | None = None
    plan: str | None = None
    contact_email: str | None = None
    region: str | None = None
    settings: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    created_at: Moment | None = None
    updated_at: Moment | None = None


class DeletionStatement(Model, frozen=True):
    """What the deletion of a tenant removed: `counts` by collection. `journal_size` and `journal_root`: the tenant's
    tree in the journal when it ended. `note` is all of this as text, with its signature if `signed`."""

    id: str
    tenant: str
    actor: str
    request_id: str
    started_at: Moment
    finished_at: Moment
    counts: dict[str, int]
    note: str
    signed: bool
    version: int
    created_at: Moment
    updated_at: Moment
    reason: str | None = None
    journal_size: int | None = None
    journal_root: str | None = None


class DeletionAnswer(Model, frozen=True):
    """The answer to a deletion: the tenant, whose `status` is deleting, while it is not complete."""

    status: str | None = None


# --- Statistics, health -----------------------------------------------------------------------------------------


class CurrentUsage(Model, frozen=True):
    """The current window."""

    tokens_used_in_current_window: Amount
    window_started_at: Moment
    window_ends_at: Moment | None = None
    remaining_tokens: Amount | None = None


class OwnStats(Model, frozen=True):
    """The statistics of the calling key, with its secret masked."""

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
    """One dependency of the server. `status` is ok, degraded or unavailable."""

    status: str
    kind: str
    latency_ms: float
    details: dict[str, Any] = {}


class Readiness(Model, frozen=True):
    """Whether the server can answer requests, and the state of its dependencies."""

    status: str
    ready: bool
    message: str | None = None
    dependencies: dict[str, Dependency] = {}


# --- Entities -------------------------------------------------------------------------------------------------


class Change(Model, frozen=True):
    """One change of a document. `action` is create, update or delete; `before` and `after` have the changed fields,
    secrets masked. `removed` means that the caller may no longer see the document (`reason` is access_lost)."""

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
    """An endpoint that receives events. `failing_since` is set while every attempt fails, `disabled_reason` if the
    endpoint was disabled for that. `previous_until`: when the previous secret stops signing."""

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
    """An endpoint with its secret, shown once. The `repr` has no secret."""

    webhook: Webhook
    secret: str

    def __repr__(self) -> str:
        return f"IssuedWebhook(webhook={self.webhook!r})"


class Delivery(Model, frozen=True):
    """The delivery of one event to one endpoint. `state` is pending, delivered or dead; `due_at`: the next attempt."""

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
    """A found secret, and its place. The `repr` has no secret."""

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
    """A leaked secret of a key. `ends_at`: when the secret stops working; None: never."""

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
    """One record of the journal: who changed what, from what to what. `tenant` is None for a record of the platform.
    `index` is the record's leaf in the tenant's tree, None until it is sealed. Secrets in `before` and `after` are
    `***`."""

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


class AuditProof(Model, frozen=True):
    """A proof about a tree of the journal. Hashes are in base64. Of inclusion: `index`, `size`, `leaf` and `root`; of
    consistency: `first`, `second`, `first_root` and `second_root`. `checkpoint` is the signed note, if it is of this
    size."""

    proof: list[str]
    checkpoint: str | None = None
    index: int | None = None
    size: int | None = None
    leaf: str | None = None
    root: str | None = None
    first: int | None = msgspec.field(default=None, name="from")
    second: int | None = msgspec.field(default=None, name="to")
    first_root: str | None = msgspec.field(default=None, name="from_root")
    second_root: str | None = msgspec.field(default=None, name="to_root")


class Retention(Model, frozen=True):
    """How long journal records are kept: `days` None is for ever. `floor_days` is the least. `tenant` None: of all that
    have no days of their own."""

    tenant: str | None
    days: int | None
    floor_days: int


class LegalHold(Model, frozen=True):
    """Journal records that stay as they are until the hold is lifted. `tenant` None: those of all tenants and of the
    platform. `user`: the actor of the records."""

    id: str
    tenant: str | None
    user: str | None
    collection: str | None
    entity_id: str | None
    since: Moment | None
    until: Moment | None
    reason: str
    placed_by: str
    created_at: Moment | None = None
    lifted_at: Moment | None = None
    lifted_by: str | None = None
    lifted_because: str | None = None


class Redaction(Model, frozen=True):
    """The number of redacted records in the store and in the archive. `record` is the id of the journal's record about
    it."""

    record: str
    records: int
    archived: int


class LeakPolicy(Model, frozen=True):
    """The leak policy of a tenant: `action` is notify, disable or rotate; `overlap_s`: how long a leaked secret keeps
    working after its rotation. `updated_at` is None if none was set."""

    tenant: str
    action: str
    overlap_s: int | None = None
    updated_at: Moment | None = None
