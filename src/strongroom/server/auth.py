"""Authenticates callers by the management key or the JWT in `Authorization: Bearer …`: their scope and their tenant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from time import monotonic
from types import MappingProxyType
from typing import Any

from ..access import ALL_TENANTS, user_of
from ..client_address import Network, client_address
from ..clock import Clock
from ..context import TOKEN, Context
from ..errors import Denied, Unauthenticated
from ..keys import AUDITOR, MANAGEMENT, CachedKey, Keys
from ..tenants import Session, SignIn, Source, is_token
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
LONG_HEADER_BYTES = 128
"""A longer header is nearly always a token's. It is found in memory by its last END_BYTES, the end of the signature."""
END_BYTES = 32
MAX_LONG_BYTES = 16_777_216
"""The long headers of cached callers, together; the claims of their tokens take about four times as much."""
MAX_SHOWN_CHARS = 200
NO_SIGN_IN = (
    "this server accepts no JWTs: STRONGROOM_JWT_ISSUER, STRONGROOM_JWT_AUDIENCE and STRONGROOM_JWKS are not set"
)
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
_BY_NAME = {scope.name.lower(): scope for scope in _SCOPES.values()}
_AUDITS = AUDITOR.removeprefix(MANAGEMENT)


def scope_of(permissions: Iterable[str]) -> Scope:
    """The widest scope that is named in full. A wildcard such as `*` gives none: else each key with write permission
    could grant it."""
    return max((_SCOPES[name] for name in permissions if name in _SCOPES), default=Scope.NONE)


def is_management(permissions: Iterable[str], tenant: str) -> bool:
    """Whether only an administrator may create or change a key with these permissions."""
    return tenant == ALL_TENANTS or any(name.startswith(MANAGEMENT) for name in permissions)


class Caller:
    """An authenticated caller: `key` or `session` says which. `tenant` is the only tenant it may use; None: all
    tenants. `unique_actor` is `actor`, made unique in the store."""

    __slots__ = (
        "_clock",
        "actor",
        "audits",
        "claims",
        "ends_us",
        "header",
        "key",
        "scope",
        "session",
        "source",
        "tenant",
        "trusted_until",
        "unique_actor",
    )

    key: CachedKey | None
    session: Session | None
    tenant: str | None
    unique_actor: str
    claims: Mapping[str, Any]

    @classmethod
    def of_key(cls, header: bytes, key: CachedKey, until_us: int | None, clock: Clock) -> Caller:
        caller = cls(header, f"key:{key.id}", scope_of(key.permissions), AUDITOR in key.permissions, key, clock)
        caller.key, caller.session = key, None
        ends = [moment for moment in (key.expires_us, until_us) if moment is not None]
        caller.ends_us = min(ends, default=None)
        caller.tenant = None if key.tenant == ALL_TENANTS else key.tenant
        caller.unique_actor = caller.actor
        claims: dict[str, Any] = {"admin": True, "scope": caller.scope_name, "key_id": key.id}
        if caller.tenant is not None:
            claims["tenant"] = caller.tenant
        caller.claims = MappingProxyType(claims)
        return caller

    @classmethod
    def of_session(cls, header: bytes, session: Session, clock: Clock) -> Caller:
        """The claims are Strongroom's own, and the token's are all in TOKEN: so no name in a token is taken for one of
        Strongroom's."""
        rights = session.rights
        scope = max((_BY_NAME[name] for name in rights.scopes if name in _BY_NAME), default=Scope.NONE)
        caller = cls(header, f"user:{session.subject}", scope, _AUDITS in rights.scopes, session.source, clock)
        caller.key, caller.session, caller.tenant = None, session, session.tenant
        caller.unique_actor = user_of(session.tenant, caller.actor)
        left_s = (session.expires_us - clock.now_us()) / 1_000_000
        caller.trusted_until = min(caller.trusted_until, monotonic() + left_s)
        claims: dict[str, Any] = {
            "scope": caller.scope_name,
            "tenant": session.tenant,
            "user_id": session.subject,
            "roles": rights.roles,
            "permissions": rights.permissions,
            TOKEN: session.claims,
        }
        if scope:  # for Strongroom's own collections, of which the caller sees its tenant's part
            claims["admin"] = True
        caller.claims = MappingProxyType(claims)
        return caller

    def __init__(self, header: bytes, actor: str, scope: Scope, audits: bool, source: Source, clock: Clock) -> None:
        self.header = header
        self.actor = actor
        self.scope = scope
        self.audits = audits
        self.source = source
        self._clock = clock
        self.ends_us: int | None = None
        self.trusted_until = monotonic() + TRUSTED_FOR_S

    @property
    def is_current(self) -> bool:
        """Whether the key is unchanged since it was looked up, and has not expired; for a session, its roles too."""
        return (
            not self.source.stale
            and monotonic() < self.trusted_until
            and (self.ends_us is None or self._clock.now_us() < self.ends_us)
        )

    @property
    def scope_name(self) -> str:
        return "auditor" if self.only_audits else self.scope.name.lower()

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
        if self.audits:
            return f"it has {AUDITOR}"
        if self.session is None:
            return "it is not a management key"
        roles = ", ".join(self.session.rights.roles)[:MAX_SHOWN_CHARS]
        return f"the caller's roles in the tenant {self.session.tenant!r} ({roles or 'none'}) give no scope"

    def context(self, tenant: str | None, request_id: str) -> Context:
        """The context of this call for one tenant. The rules refuse a foreign tenant."""
        return Context(tenant, self.actor, self.claims, request_id)


class Authenticator:
    """Turns an Authorization header into a Caller. A cached caller costs one dict lookup."""

    def __init__(self, keys: Keys, proxies: Sequence[Network] = (), sign_in: SignIn | None = None) -> None:
        self._keys = keys
        self._proxies = proxies
        self._sign_in = sign_in
        # A dict looks up by a keyed hash of all bytes, so its time does not reveal how many characters of a guess are
        # right. Keys compares the store's hash in constant time.
        self._callers: dict[bytes, Caller] = {}
        self._bound: dict[bytes, Caller] = {}
        """Callers whose keys are allowed from some addresses only: the address is checked at each call."""
        self._long: dict[bytes, Caller] = {}
        """Callers with long headers, such as those with a token, by the end of the header."""
        self._long_bytes = 0

    def known(self, header: bytes | None) -> Caller | None:
        """The cached caller, if its key is unchanged."""
        if header is None:
            return None
        if len(header) <= LONG_HEADER_BYTES:
            caller = self._callers.get(header)
            return caller if caller is not None and caller.is_current else None
        # Hashing all of a token would take longer than all the rest. Whoever knows the end of a signature has the
        # token, so the time of the comparison reveals nothing.
        caller = self._long.get(header[-END_BYTES:])
        if caller is None or caller.header != header or caller.source.stale or monotonic() >= caller.trusted_until:
            return None
        return caller

    async def caller(self, header: bytes | None, scope: Mapping[str, Any]) -> Caller:
        """The caller of an ASGI scope with this Authorization header. Raises Unauthenticated; Denied if the key is not
        allowed from the client's address; Unavailable."""
        caller = self.known(header)
        if caller is not None:
            return caller
        bound = self._bound.get(header) if header is not None else None
        if bound is None or not bound.is_current:
            bound = await self._found(header)
        if bound.key is not None and not bound.key.allows(self.address(scope) if bound.key.networks else None):
            where = self.address(scope) or "an unknown address"
            raise Denied(f"this key may not be used from {where}: its allowed_ips do not include this address")
        return bound

    def address(self, scope: Mapping[str, Any]) -> str | None:
        """The client's address: the peer's, or the address that a trusted proxy names."""
        client = scope.get("client")
        forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"] if self._proxies else []
        return client_address(client[0] if client else None, forwarded, self._proxies)

    async def _found(self, header: bytes | None) -> Caller:
        text = bearer(header)
        if header is None or not text:
            raise Unauthenticated
        if is_token(text):
            return await self._signed_in(header, text)
        key = await self._keys.authenticate(text, any_address=True)
        self._forget(header)
        if key is None:
            raise Unauthenticated("the key is unknown, disabled or expired", token=True)
        caller = Caller.of_key(header, key, self._keys.cache.works_until_us(text), self._keys.clock)
        if len(header) <= MAX_HEADER_BYTES:
            self._keep(caller, self._bound if key.networks else self._callers)
        return caller

    async def _signed_in(self, header: bytes, text: str) -> Caller:
        """The caller with a token."""
        self._forget(header)
        if self._sign_in is None:
            raise Unauthenticated(NO_SIGN_IN, token=True)
        caller = Caller.of_session(header, await self._sign_in.session(text), self._keys.clock)
        self._keep(caller, self._callers)
        return caller

    def _keep(self, caller: Caller, callers: dict[bytes, Caller]) -> None:
        header = caller.header
        if callers is self._callers and len(header) > LONG_HEADER_BYTES:
            if caller.ends_us is not None:  # `known` would have to ask the clock for each token
                return
            self._forget(header)  # another request may have been faster
            self._long[header[-END_BYTES:]] = caller
            self._long_bytes += len(header)
            while self._long_bytes > MAX_LONG_BYTES:
                self._forget(next(iter(self._long.values())).header)
            return
        if len(callers) >= MAX_CALLERS:
            callers.clear()
        callers[header] = caller

    def _forget(self, header: bytes) -> None:
        self._callers.pop(header, None)
        self._bound.pop(header, None)
        forgotten = self._long.pop(header[-END_BYTES:], None)
        if forgotten is not None:
            self._long_bytes -= len(forgotten.header)


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
