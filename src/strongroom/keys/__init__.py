"""API keys: issue, verify, reserve, record usage, change, rotate, revoke; leaks; import and export.

`Keys` is the service, made of parts. Each part has a file: verifier, refund, reservations, usage_recorder, queries,
editor, rotation. `verification.usable` is the one place that decides whether a key may be used, before its limits are
asked.
"""

from .bulk import BULK_FIELDS, MAX_IDS, Bulk, BulkAction, BulkFailure, BulkStep
from .cached_key import CachedKey, is_allowed
from .durable_reservations import StoredReservation
from .filter import KeyFilter, KeyState
from .hasher import Hasher
from .import_source import KeySource
from .leaks import MAX_SIGHTINGS, Finding, Leak, LeakPolicy, Leaks, PolicyFields, Sighting
from .model import AUDITOR, MANAGEMENT, MAX_OVERLAP_S, ApiKey, Environment, IssuedKey, KeyChanges, KeyFields, NewKey
from .queries import KeyStats
from .refund import Charged
from .reservation import DEFAULT_TTL_S, MAX_TTL_S, amounts
from .service import Keys
from .token import SCAN_PATTERN, generate, is_possible, masked
from .usage_recorder import Usage
from .verification import MAX_RESOURCES, ONE_REQUEST, Reservation, Verification, check_address, cost_units
from .verifier import PendingVerification

__all__ = [
    "AUDITOR",
    "BULK_FIELDS",
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
    "Bulk",
    "BulkAction",
    "BulkFailure",
    "BulkStep",
    "CachedKey",
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
    "Leak",
    "LeakPolicy",
    "Leaks",
    "NewKey",
    "PendingVerification",
    "PolicyFields",
    "Reservation",
    "Sighting",
    "StoredReservation",
    "Usage",
    "Verification",
    "amounts",
    "check_address",
    "cost_units",
    "generate",
    "is_allowed",
    "is_possible",
    "masked",
]
