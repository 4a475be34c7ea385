"""Administrators: the keys that can administer the whole store. A caller must leave at least one of them."""

from __future__ import annotations

from datetime import datetime

from ..access import ALL_TENANTS
from ..context import system_context
from ..database import Database, Transaction
from ..entities import MAX_LIMIT, Query, Where
from ..errors import Conflict
from .model import ApiKey

ADMINISTRATOR = "strongroom:admin"


def administers(key: ApiKey, now: datetime) -> bool:
    """Whether a key can administer the whole store now."""
    return (
        key.tenant == ALL_TENANTS
        and ADMINISTRATOR in key.permissions
        and key.enabled
        and key.deleted_at is None
        and not key.is_expired(now)
    )


async def is_last_administrator(database: Database, tx: Transaction, key: ApiKey, now: datetime) -> bool:
    """Whether this key can administer the whole store and no other can."""
    if not administers(key, now):
        return False
    query = Query(Where("permissions", "array-contains", ADMINISTRATOR), limit=MAX_LIMIT)
    cursor = None
    while True:
        page = await database.find(system_context(), ApiKey, query, cursor)
        for other in page.items:
            # Read in the transaction: of two keys that are removed at once, each would count as the other's successor.
            if other.id != key.id and administers(other, now) and administers(await tx.get(ApiKey, other.id), now):
                return False
        cursor = page.next_cursor
        if cursor is None:
            return True


async def keep_one(database: Database, tx: Transaction, before: ApiKey, after: ApiKey | None, now: datetime) -> None:
    """Raise Conflict if a change of a key (None: its deletion) leaves nobody who can administer the whole store."""
    if after is not None and administers(after, now):
        return
    if await is_last_administrator(database, tx, before, now):
        raise Conflict(
            f"{before.id!r} is the last administrator of all tenants: first create another key with the tenant "
            f"{ALL_TENANTS} and the permission {ADMINISTRATOR}"
        )


__all__ = ["ADMINISTRATOR", "administers", "is_last_administrator", "keep_one"]
