"""The database: the one way a write takes from validation to the journal, and transactions over it."""

from .database import Database, Page
from .idempotency import MAX_IDEMPOTENCY_KEY_BYTES, Idempotency, IdempotentCall, Once, Replayed, RequestKey
from .index_advice import QueryShape
from .transaction import Transaction, is_expired, with_fields
from .write_state import StoreState

__all__ = [
    "MAX_IDEMPOTENCY_KEY_BYTES",
    "Database",
    "Idempotency",
    "IdempotentCall",
    "Once",
    "Page",
    "QueryShape",
    "Replayed",
    "RequestKey",
    "StoreState",
    "Transaction",
    "is_expired",
    "with_fields",
]
