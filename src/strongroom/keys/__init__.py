"""API keys: issue, look up, verify, rotate, revoke; reservations and usage; leaks."""

from .bulk import BULK_FIELDS, MAX_IDS, Bulk, BulkAction, BulkFailure, BulkStep
from .cached_key import KnownKey, is_allowed, quota_part, subjects
from .durable_reservations import StoredReservation
from .filter import KeyFilter, KeyState
from .import_source import KeySource
from .leaks import MAX_SIGHTINGS, Finding, Leak, LeakPolicy, Leaks, PolicyFields, Sighting
from .model import (
    ALL_TENANTS,
    DEFAULT_TENANT,
    MANAGEMENT,
    MAX_OVERLAP_S,
    ApiKey,
    Environment,
    KeyChanges,
    KeyFields,
    LimitLike,
    NewKey,
    TenantName,
    not_given,
    parse,
)
from .refund import Charged
from .reservation import DEFAULT_TTL_S, MAX_TTL_S, amounts
from .rotation import IssuedKey, acting, once_for, reader, writer
from .service import Keys, KeyStats
from .token import SCAN_PATTERN, Hasher, Pepper, generate, is_possible, masked
from .usage_recorder import Usage
from .verification import (
    MAX_RESOURCES,
    ONE_REQUEST,
    LimitStatus,
    Reservation,
    Verification,
    check_address,
    cost_units,
    limit_status,
)
from .verifier import Begun, bound_to, may_see

__all__ = [
    "ALL_TENANTS",
    "BULK_FIELDS",
    "DEFAULT_TENANT",
    "DEFAULT_TTL_S",
    "MANAGEMENT",
    "MAX_IDS",
    "MAX_OVERLAP_S",
    "MAX_RESOURCES",
    "MAX_SIGHTINGS",
    "MAX_TTL_S",
    "ONE_REQUEST",
    "SCAN_PATTERN",
    "ApiKey",
    "Begun",
    "Bulk",
    "BulkAction",
    "BulkFailure",
    "BulkStep",
    "Charged",
    "Environment",
    "Finding",
    "Hasher",
    "IssuedKey",
    "KeyChanges",
    "KeyFields",
    "KeyFilter",
    "KeySource",
    "KeyState",
    "KeyStats",
    "Keys",
    "KnownKey",
    "Leak",
    "LeakPolicy",
    "Leaks",
    "LimitLike",
    "LimitStatus",
    "NewKey",
    "Pepper",
    "PolicyFields",
    "Reservation",
    "Sighting",
    "StoredReservation",
    "TenantName",
    "Usage",
    "Verification",
    "acting",
    "amounts",
    "bound_to",
    "check_address",
    "cost_units",
    "generate",
    "is_allowed",
    "is_possible",
    "limit_status",
    "masked",
    "may_see",
    "not_given",
    "once_for",
    "parse",
    "quota_part",
    "reader",
    "subjects",
    "writer",
]
