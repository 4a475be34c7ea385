"""The administrator's key: created at the first start and shown once, or set by the configuration."""

from __future__ import annotations

import hashlib
import hmac

from ..access import ALL_TENANTS
from ..app import Strongroom
from ..context import system_context
from ..entities import And, Query, Where
from ..errors import AlreadyExists, ConfigError, NotFound
from ..keys import ApiKey, generate, masked
from .auth import Scope

ID = "admin"
PREFIX = "sr_admin"
_PERMISSION = Scope.ADMIN.permission


async def ensure(room: Strongroom, given: str | None) -> str | None:
    """Create the administrator's key if there is none. Returns the secret of a new key, to be shown once.

    With `given`, the key `admin` has exactly this secret afterwards; several processes may do this at once. Raises
    ConfigError if the secret belongs to another key.
    """
    if given is not None:
        await _set(room, given)
        return None
    held = And(Where("permissions", "array-contains", _PERMISSION), Where("deleted_at", "==", None))
    if (await room.database.find(system_context(), ApiKey, Query(held, limit=1))).items:
        return None
    secret = generate(PREFIX)
    try:
        deleted = await room.database.get_or_none(system_context(), ApiKey, ID)
        if deleted is not None and deleted.deleted_at is not None:
            await room.keys.delete(ID, purge=True)  # the new key needs its id
        await room.database.create(system_context(), _key(room, secret))
    except (AlreadyExists, NotFound):
        # Another process has just created it and shows it, or someone removed its permission.
        return None
    return secret


async def recover(room: Strongroom) -> str:
    """Give the administrator's key a new secret, and return it, to be shown once. The old secret stops working. A
    deleted or disabled key, or a key without its permission, is repaired."""
    secret = generate(PREFIX)
    await _set(room, secret)
    return secret


async def _set(room: Strongroom, secret: str) -> None:
    context = system_context()
    hasher = room.keys.hasher
    for _ in range(3):
        key = await room.database.get_or_none(context, ApiKey, ID)
        try:
            if key is None:
                await room.database.create(context, _key(room, secret))
            elif not _is(key, hasher.candidates(secret)):
                wanted = _key(room, secret)
                fields = ("tenant", "hash", "sealed", "display", "permissions", "enabled", "expires_at", "allowed_ips")
                changes = {name: getattr(wanted, name) for name in fields}
                changes |= dict.fromkeys(("previous_hash", "previous_until", "unclaimed", "deleted_at", "due_at"))
                await room.database.update(context, ApiKey, ID, changes)
            return
        except AlreadyExists:  # another process was faster: check whether it set the same secret
            if key is not None:
                break
    raise ConfigError("STRONGROOM_ADMIN_KEY: another key has this secret: choose a new one")


def _is(key: ApiKey, candidates: list[str]) -> bool:
    """Whether this is an enabled administrator's key with one of these hashes. Compares all of them, in constant
    time."""
    same = [hmac.compare_digest(key.hash, candidate) for candidate in candidates]
    return (
        any(same)
        and key.enabled
        and key.deleted_at is None
        and key.expires_at is None
        and key.tenant == ALL_TENANTS
        and _PERMISSION in key.permissions
        and not key.allowed_ips
    )


def _key(room: Strongroom, secret: str) -> ApiKey:
    hasher = room.keys.hasher
    return ApiKey(
        id=ID,
        tenant=ALL_TENANTS,
        name="administrator",
        hash=hasher.hash(secret),
        sealed=hasher.seal(hashlib.sha256(secret.encode()).digest()),
        display=masked(secret),
        permissions=[_PERMISSION],
    )
