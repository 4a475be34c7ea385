"""Strongroom: the data layer for API platforms. These are the public names."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .app import Strongroom, Tenant
    from .context import Context, system_context
    from .database import Database, Transaction
    from .entities import (
        Aggregate,
        And,
        Cached,
        CachedList,
        Counter,
        Entity,
        Index,
        Indexed,
        Or,
        Page,
        Query,
        Registry,
        Secret,
        Where,
    )
    from .errors import StrongroomError
    from .keys import ApiKey, IssuedKey, Keys, Verification
    from .limits import Anchored, Calendar, Limit, Refill, Rolling, Total
    from .webhooks import InvalidSignature, verify_signature

__version__ = "0.1.0"

__all__ = [
    "Aggregate", "Anchored", "And", "ApiKey", "Cached", "CachedList", "Calendar", "Context", "Counter", "Database",
    "Entity", "Index", "Indexed", "InvalidSignature", "IssuedKey", "Keys", "Limit", "Or", "Page", "Query", "Refill",
    "Registry", "Rolling", "Secret", "Strongroom", "StrongroomError", "Tenant", "Total", "Transaction", "Verification",
    "Where", "__version__", "system_context", "verify_signature",
]  # fmt: skip

# The names are loaded at their first use (PEP 562), because the command line imports this package too and must answer
# `--help` without waiting for pydantic and cryptography.
_HOMES = {
    "app": ("Strongroom", "Tenant"),
    "context": ("Context", "system_context"),
    "database": ("Database", "Transaction"),
    "entities": (
        "Aggregate", "And", "Cached", "CachedList", "Counter", "Entity", "Index", "Indexed", "Or", "Page", "Query",
        "Registry", "Secret", "Where",
    ),
    "errors": ("StrongroomError",),
    "keys": ("ApiKey", "IssuedKey", "Keys", "Verification"),
    "limits": ("Anchored", "Calendar", "Limit", "Refill", "Rolling", "Total"),
    "webhooks": ("InvalidSignature", "verify_signature"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
