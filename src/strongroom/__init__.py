"""Strongroom: the data layer for API platforms. These are the public names."""

from .app import Strongroom, Tenant
from .context import Context, system_context
from .database import Database, Page
from .entity import Counter, Entity, Index, Indexed, Registry, Secret
from .errors import StrongroomError
from .keys import ApiKey, IssuedKey, Keys, Verification
from .query import Aggregate, And, Or, Query, Where
from .transaction import Transaction
from .windows import Anchored, Calendar, Limit, Rolling, Total

__version__ = "0.1.0"

__all__ = [
    "Aggregate", "Anchored", "And", "ApiKey", "Calendar", "Context", "Counter", "Database", "Entity", "Index",
    "Indexed", "IssuedKey", "Keys", "Limit", "Or", "Page", "Query", "Registry", "Rolling", "Secret", "Strongroom",
    "StrongroomError", "Tenant", "Total", "Transaction", "Verification", "Where", "__version__", "system_context",
]  # fmt: skip
