"""Who calls: a management key in `Authorization: Bearer …`, what it may do, and for which tenants."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from ..access import ALL_TENANTS
from ..client_address import Network, client_address
from ..clock import Clock
from ..context import Context
from ..errors import Denied, Unauthenticated
from ..keys import MANAGEMENT, CachedKey, Keys
from .errors import MalformedRequest

MAX_CALLERS = 10_000
"""Callers cached by their Authorization header."""
MAX_HEADER_BYTES = 1_024
"""A longer header is not kept: a key may be imported with up to 512 characters, and one may put spaces before it."""
ONCE = frozenset(
    {
        b"authorization",
        b"content-length",
        b"github-public-key-identifier",
        b"github-public-key-signature",
        b"host",
        b"idempotency-key",
    }
)
"""Headers that a request may have once: of two, one part of a system might read the first and another the last."""
TRUSTED_FOR_S = 0.25
"""A caller is looked up again after this long, whatever was heard of its key meanwhile. With what
`keycache.TRUSTED_FOR_S` allows, a management key that was revoked elsewhere ends within a second, even where the feed
of changes is broken."""


class Scope(IntEnum):
    """What a management key may do; each includes those before it."""

    NONE = 0
    READ = 1
    WRITE = 2
    ADMIN = 3

    @property
    def permission(self) -> str:
        return MANAGEMENT + self.name.lower()


_SCOPES = {scope.permission: scope for scope in (Scope.READ, Scope.WRITE, Scope.ADMIN)}


def scope_of(permissions: Iterable[str]) -> Scope:
    """The widest scope that is named in full. A wildcard such as `*` gives none: whoever may write could grant it."""
    return max((_SCOPES[name] for name in permissions if name in _SCOPES), default=Scope.NONE)


def is_management(permissions: Iterable[str], tenant: str) -> bool:
    """Whether a key with these permissions, of this tenant, is one that only an administrator may make or touch."""
    return tenant == ALL_TENANTS or any(name.startswith(MANAGEMENT) for name in permissions)


class Caller:
    """An authenticated caller. `tenant` is the one it is bound to, or None for all of them."""

    __slots__ = ("_clock", "actor", "claims", "ends_us", "key", "scope", "tenant", "trusted_until")

    def __init__(self, key: CachedKey, until_us: int | None, clock: Clock) -> None:
        self.key = key
        self._clock = clock
        ends = [moment for moment in (key.expires_us, until_us) if moment is not None]
        self.ends_us = min(ends, default=None)
        self.scope = scope_of(key.permissions)
        self.tenant = None if key.tenant == ALL_TENANTS else key.tenant
        self.actor = f"key:{key.id}"
        claims: dict[str, Any] = {"admin": True, "scope": self.scope.name.lower(), "key_id": key.id}
        if self.tenant is not None:
            claims["tenant"] = self.tenant
        self.claims: Mapping[str, Any] = MappingProxyType(claims)
        self.trusted_until = time.monotonic() + TRUSTED_FOR_S

    @property
    def is_current(self) -> bool:
        """Whether nothing has happened to the key since it was looked up, and it has not expired."""
        return (
            not self.key.stale
            and time.monotonic() < self.trusted_until
            and (self.ends_us is None or self._clock.now_us() < self.ends_us)
        )

    def needs(self, scope: Scope) -> None:
        """Raise Denied unless the caller has this scope."""
        if self.scope < scope:
            has = f"it has {self.scope.permission}" if self.scope else "it is not a management key"
            raise Denied(f"this call needs a key with the permission {scope.permission}; {has}")

    def context(self, tenant: str | None, request_id: str) -> Context:
        """The caller's call for one tenant, now. The rules refuse a tenant it does not belong to."""
        return Context(tenant, self.actor, self.claims, request_id)


class Authenticator:
    """Turns an Authorization header into a Caller. Known ones cost one dict lookup."""

    def __init__(self, keys: Keys, proxies: Sequence[Network] = ()) -> None:
        self._keys = keys
        self._proxies = proxies
        # A dict finds by a keyed hash of all bytes and then compares once, so its time says nothing of how many
        # characters of a guess were right; the store's hash is compared in constant time by Keys.
        self._callers: dict[bytes, Caller] = {}
        self._bound: dict[bytes, Caller] = {}
        """Callers whose keys may be used from some addresses only: they are asked for theirs at each call."""

    def known(self, header: bytes | None) -> Caller | None:
        """The caller, if it is known and nothing has happened to its key."""
        caller = self._callers.get(header) if header is not None else None
        return caller if caller is not None and caller.is_current else None

    async def caller(self, header: bytes | None, scope: Mapping[str, Any]) -> Caller:
        """The caller of an ASGI scope with this Authorization header. Raises Unauthenticated; Denied if its key may not
        be used from where it calls."""
        caller = self.known(header)
        if caller is not None:
            return caller
        bound = self._bound.get(header) if header is not None else None
        if bound is None or not bound.is_current:
            bound = await self._found(header)
        if not bound.key.allows(self.address(scope) if bound.key.networks else None):
            where = self.address(scope) or "an unknown address"
            raise Denied(f"this key may not be used from {where}: its allowed_ips name others")
        return bound

    def address(self, scope: Mapping[str, Any]) -> str | None:
        """Where a request comes from: the peer's address, or what a trusted proxy says of it."""
        client = scope.get("client")
        forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"] if self._proxies else []
        return client_address(client[0] if client else None, forwarded, self._proxies)

    async def _found(self, header: bytes | None) -> Caller:
        secret = bearer(header)
        key = await self._keys.authenticate(secret, any_address=True) if secret else None
        if key is None or header is None or secret is None:
            if header is not None:
                self._callers.pop(header, None)
                self._bound.pop(header, None)
            raise Unauthenticated("the key is unknown, disabled or expired" if secret else None, token=bool(secret))
        caller = Caller(key, self._keys.cache.works_until_us(secret), self._keys.clock)
        callers, others = (self._bound, self._callers) if key.networks else (self._callers, self._bound)
        others.pop(header, None)
        if len(header) <= MAX_HEADER_BYTES:
            if len(callers) >= MAX_CALLERS:
                callers.clear()
            callers[header] = caller
        return caller


def bearer(header: bytes | None) -> str | None:
    """The token of an `Authorization: Bearer …` header, or None."""
    if header is None or header[:7].lower() != b"bearer ":
        return None
    try:
        return header[7:].strip().decode()
    except UnicodeDecodeError:
        return None


def single(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Those headers of an ASGI scope that a request may have once. Raises MalformedRequest if it has one twice."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in ONCE:
            if name in found:
                raise MalformedRequest(f"found several headers {name.decode()}, expected one")
            found[name] = value
    return found


def authorization(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The Authorization header of an ASGI scope."""
    for name, value in headers:
        if name == b"authorization":
            return value
    return None
