"""The database: the one way a write takes from validation to the journal, and transactions over it."""

from .database import Database
from .idempotency import (
    MAX_IDEMPOTENCY_KEY_BYTES,
    Idempotency,
    IdempotentCall,
    IdempotentOperation,
    Replayed,
    RequestKey,
)
from .index_advice import QueryShape
from .reads import Reads
from .transaction import Transaction
from .write_state import StoreState, WriteState, WriteSwitch, switch_id

__all__ = [
    "MAX_IDEMPOTENCY_KEY_BYTES",
    "Database",
    "Idempotency",
    "IdempotentCall",
    "IdempotentOperation",
    "QueryShape",
    "Reads",
    "Replayed",
    "RequestKey",
    "StoreState",
    "Transaction",
    "WriteState",
    "WriteSwitch",
    "switch_id",
]
