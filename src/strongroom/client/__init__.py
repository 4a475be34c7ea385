"""A typed client of Strongroom's HTTP API: `Client` for threads, `AsyncClient` for asyncio, from one source."""

from importlib.util import find_spec

if find_spec("httpx") is None:
    raise ModuleNotFoundError("the client needs httpx: pip install 'strongroom[client]'", name="httpx")

from ..errors import (
    AlreadyExists,
    BoundExceeded,
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    Problem,
    StorageFull,
    StrongroomError,
    TenantSuspended,
    TooLarge,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    WritesOff,
)
from ._async.client import AsyncClient
from ._async.entities import AsyncCollection, AsyncTenant
from ._async.reservations import AsyncHold
from ._async.watch import AsyncWatch
from ._sync.client import Client
from ._sync.entities import Collection, Tenant
from ._sync.reservations import Hold
from ._sync.watch import Watch
from ._wire import Retries, new_idempotency_key
from .errors import (
    MalformedRequest,
    MethodNotAllowed,
    NoAnswer,
    PreconditionFailed,
    Refused,
    UnexpectedAnswer,
)
from .models import (
    ApiKey,
    Ask,
    AuditProof,
    AuditRecord,
    BulkFailure,
    BulkStep,
    Change,
    Cost,
    CurrentUsage,
    DeletionStatement,
    Delivery,
    Dependency,
    IssuedKey,
    IssuedWebhook,
    KeyStats,
    Leak,
    LeakLabel,
    LeakPolicy,
    LegalHold,
    Limit,
    LimitStatus,
    OwnStats,
    Page,
    Quota,
    QuotaStats,
    Readiness,
    Recorded,
    RecordedBatch,
    Redaction,
    Refill,
    Reservation,
    Retention,
    Sighting,
    TenantRecord,
    Used,
    Verification,
    Webhook,
    Window,
    WritesStatus,
    WriteSwitch,
)

__all__ = [
    "AlreadyExists", "ApiKey", "Ask", "AsyncClient", "AsyncCollection", "AsyncHold", "AsyncTenant", "AsyncWatch",
    "AuditProof", "AuditRecord", "BoundExceeded", "BulkFailure", "BulkStep", "Change", "Client", "Collection",
    "Conflict", "Cost", "CurrentUsage", "DeletionStatement", "Delivery", "Denied", "Dependency", "Hold", "InvalidInput",
    "IssuedKey",
    "IssuedWebhook", "KeyStats", "Leak", "LeakLabel", "LeakPolicy", "LegalHold", "Limit", "LimitStatus",
    "MalformedRequest",
    "MethodNotAllowed", "NoAnswer", "NotFound", "OwnStats", "Page", "PreconditionFailed", "Problem", "Quota",
    "QuotaStats", "Readiness", "Recorded", "RecordedBatch", "Redaction", "Refill", "Refused", "Reservation",
    "Retention", "Retries",
    "Sighting", "StorageFull", "StrongroomError", "Tenant", "TenantRecord", "TenantSuspended", "TooLarge",
    "TooManyRequests", "Unauthenticated", "Unavailable", "UnexpectedAnswer", "Used", "Verification", "Watch", "Webhook",
    "Window", "WriteSwitch", "WritesOff", "WritesStatus", "new_idempotency_key",
]  # fmt: skip
