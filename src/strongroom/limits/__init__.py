"""Limits: windows, counters, the ledger that admits uses exactly, and the limit leases of the nodes."""

from .admission import KeyChanged
from .backoff import Backoff
from .calendar import calendar_span
from .corrections import refills_that_begin
from .counters import SATURATED, RollingCounter, counter_for
from .idempotent_admission import statuses_kept
from .lease_log import folder_for
from .lease_manager import LEASE_S, LeaseManager
from .leased_key import Entries, LocalReservation
from .ledger import ClockMended, Ledger
from .reservation_change import HoldChange, HoldEnded
from .status import LimitStatus, explain_denial, leased_status, limit_status
from .thresholds import DEFAULT_THRESHOLDS, MAX_THRESHOLD, MAX_THRESHOLDS, Crossing
from .usage_state import (
    ACTIVE_US,
    AdmissionDecision,
    CompiledLimit,
    KeyUsage,
    Status,
    Subject,
    Subjects,
    UsageState,
    compile_limits,
    subject_for,
)
from .usage_views import views_sql
from .windows import (
    MAX_AMOUNT,
    MAX_LIMITS,
    MONEY,
    Amount,
    Anchored,
    Calendar,
    Limit,
    LimitLike,
    Refill,
    Rolling,
    Total,
    Window,
    distinct,
    from_units,
    to_units,
)

__all__ = [
    "ACTIVE_US",
    "DEFAULT_THRESHOLDS",
    "LEASE_S",
    "MAX_AMOUNT",
    "MAX_LIMITS",
    "MAX_THRESHOLD",
    "MAX_THRESHOLDS",
    "MONEY",
    "SATURATED",
    "AdmissionDecision",
    "Amount",
    "Anchored",
    "Backoff",
    "Calendar",
    "ClockMended",
    "CompiledLimit",
    "Crossing",
    "Entries",
    "HoldChange",
    "HoldEnded",
    "KeyChanged",
    "KeyUsage",
    "LeaseManager",
    "Ledger",
    "Limit",
    "LimitLike",
    "LimitStatus",
    "LocalReservation",
    "Refill",
    "Rolling",
    "RollingCounter",
    "Status",
    "Subject",
    "Subjects",
    "Total",
    "UsageState",
    "Window",
    "calendar_span",
    "compile_limits",
    "counter_for",
    "distinct",
    "explain_denial",
    "folder_for",
    "from_units",
    "leased_status",
    "limit_status",
    "refills_that_begin",
    "statuses_kept",
    "subject_for",
    "to_units",
    "views_sql",
]
