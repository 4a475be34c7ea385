"""Authenticates callers by the management key in `Authorization: Bearer …`: their scope and their tenant."""

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
from ..keys import AUDITOR, MANAGEMENT, CachedKey, Keys
from .errors import MalformedRequest

MAX_CALLERS = 10_000
"""Callers cached by their Authorization header."""
MAX_HEADER_BYTES = 1_024
"""A longer header is not cached: else headers with many spaces could fill the memory."""
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
"""Headers that a request may have once: of two, a proxy might read the first and this server the last."""
TRUSTED_FOR_S = 0.25
"""A cached caller is looked up again after this long. With the TRUSTED_FOR_S of the key cache, a management key that
another node revoked stops working within a second, even if the change feed is broken."""


class Scope(IntEnum):
    """What a management key may do; each scope includes the smaller ones. The permission AUDITOR stands beside them: it
    gives the audit trail and no scope."""

    NONE = 0
    READ = 1
    WRITE = 2
    ADMIN = 3

    @property
    def permission(self) -> str:
        return MANAGEMENT + self.name.lower()


_SCOPES = {scope.permission: scope for scope in (Scope.READ, Scope.WRITE, Scope.ADMIN)}


def scope_of(permissions: Iterable[str]) -> Scope:
    """The widest scope that is named in full. A wildcard such as `*` gives none: else each key with write permission
    could grant it."""
    return max((_SCOPES[name] for name in permissions if name in _SCOPES), default=Scope.NONE)


def is_management(permissions: Iterable[str], tenant: str) -> bool:
    """Whether only an administrator may create or change a key with these permissions."""
    return tenant == ALL_TENANTS or any(name.startswith(MANAGEMENT) for name in permissions)


class Caller:
    """An authenticated caller. `tenant` is the only tenant it may use; None: all tenants."""

    __slots__ = ("_clock", "actor", "audits", "claims", "ends_us", "key", "scope", "tenant", "trusted_until")

    def __init__(self, key: CachedKey, until_us: int | None, clock: Clock) -> None:
        self.key = key
        self._clock = clock
        ends = [moment for moment in (key.expires_us, until_us) if moment is not None]
        self.ends_us = min(ends, default=None)
        self.scope = scope_of(key.permissions)
        self.audits = AUDITOR in key.permissions
        self.tenant = None if key.tenant == ALL_TENANTS else key.tenant
        self.actor = f"key:{key.id}"
        scope = "auditor" if self.only_audits else self.scope.name.lower()
        claims: dict[str, Any] = {"admin": True, "scope": scope, "key_id": key.id}
        if self.tenant is not None:
            claims["tenant"] = self.tenant
        self.claims: Mapping[str, Any] = MappingProxyType(claims)
        self.trusted_until = time.monotonic() + TRUSTED_FOR_S

    @property
    def is_current(self) -> bool:
        """Whether the key is unchanged since it was looked up, and has not expired."""
        return (
            not self.key.stale
            and time.monotonic() < self.trusted_until
            and (self.ends_us is None or self._clock.now_us() < self.ends_us)
        )

    def needs(self, scope: Scope) -> None:
        """Raise Denied unless the caller has this scope."""
        if self.scope < scope:
            raise Denied(f"this call needs a key with the permission {scope.permission}; {self._has}")

    def needs_audit(self) -> None:
        """Raise Denied unless the caller may read the audit trail: its tenant's, or the whole one."""
        least = Scope.ADMIN if self.tenant is None else Scope.READ
        if not self.audits and self.scope < least:
            raise Denied(
                f"the audit trail needs a key with the permission {AUDITOR} or {least.permission}; {self._has}"
            )

    @property
    def only_audits(self) -> bool:
        """Whether the caller may read the audit trail and do nothing else."""
        return self.audits and not self.scope

    @property
    def _has(self) -> str:
        if self.scope:
            return f"it has {self.scope.permission}"
        return f"it has {AUDITOR}" if self.audits else "it is not a management key"

    def context(self, tenant: str | None, request_id: str) -> Context:
        """The context of this call for one tenant. The rules refuse a foreign tenant."""
        return Context(tenant, self.actor, self.claims, request_id)


class Authenticator:
    """Turns an Authorization header into a Caller. A cached caller costs one dict lookup."""

    def __init__(self, keys: Keys, proxies: Sequence[Network] = ()) -> None:
        self._keys = keys
        self._proxies = proxies
        # A dict looks up by a keyed hash of all bytes, so its time does not reveal how many characters of a guess are
        # right. Keys compares the store's hash in constant time.
        self._callers: dict[bytes, Caller] = {}
        self._bound: dict[bytes, Caller] = {}
        """Callers whose keys are allowed from some addresses only: the address is checked at each call."""

    def known(self, header: bytes | None) -> Caller | None:
        """The cached caller, if its key is unchanged."""
        caller = self._callers.get(header) if header is not None else None
        return caller if caller is not None and caller.is_current else None

    async def caller(self, header: bytes | None, scope: Mapping[str, Any]) -> Caller:
        """The caller of an ASGI scope with this Authorization header. Raises Unauthenticated; Denied if the key is not
        allowed from the client's address."""
        caller = self.known(header)
        if caller is not None:
            return caller
        bound = self._bound.get(header) if header is not None else None
        if bound is None or not bound.is_current:
            bound = await self._found(header)
        if not bound.key.allows(self.address(scope) if bound.key.networks else None):
            where = self.address(scope) or "an unknown address"
            raise Denied(f"this key may not be used from {where}: its allowed_ips do not include this address")
        return bound

    def address(self, scope: Mapping[str, Any]) -> str | None:
        """The client's address: the peer's, or the address that a trusted proxy names."""
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
    """The headers of an ASGI scope that may occur once. Raises MalformedRequest if one occurs twice."""
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
