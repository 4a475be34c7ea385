"""Verifies bearer JWTs (RFC 7519, with the rules of RFC 8725) against the keys of one issuer.

The order is the security: size, form, header, algorithm, key, signature, and only then the claims. Nothing in the
token's header leads anywhere: `jku`, `x5u`, `jwk` and `x5c` are not read, and `kid` only finds a key in memory.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import msgspec

from ..access import ALL_TENANTS
from ..clock import Clock
from ..context import MAX_TENANT_BYTES, kind_of, name_problem, repeated_name, text_problem
from ..errors import Unauthenticated
from .jwks import ALLOWED, MAX_KID_CHARS, MAX_TRIED, Jwks, SigningKey
from .model import MAX_SUBJECT_CHARS

MAX_TOKEN_BYTES = 8_192
"""A longer token is refused before any of it is decoded."""
MAX_HEADERS = 256
"""Headers of tokens that are kept decoded; each has at most MAX_TOKEN_BYTES."""
MAX_DEPTH = 16
"""Levels of lists and objects in a token's header or claims."""
MAX_TOKEN_ROLES = 100
DEFAULT_LEEWAY_S = 60
"""How far the clocks of the issuer and of the store may differ."""
MAX_LEEWAY_S = 300
MAX_TIME_S = 253_402_300_799
"""The last second of the year 9999. A later time in a token counts as this one."""
TYPES = frozenset({"jwt", "at+jwt"})
"""The `typ` of tokens that stand for a caller; a logout token or a proof of possession does not."""

_STANDARD = bytes.maketrans(b"-_+/=", b"+/!!!")
"""From base64url to base64; what is only in the latter becomes an error."""
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}")
_OBJECT = f"a JSON object with distinct names and at most {MAX_DEPTH} levels"
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """Which tokens are accepted. `jwks`: an https:// URL or a file. A name of a claim with `/` or `:` is taken as it
    is; in another name a dot leads into an object (`realm_access.roles`)."""

    issuer: str
    audiences: tuple[str, ...]
    jwks: str
    tenant_claim: str = "tenant"
    roles_claim: str = "roles"
    leeway_s: int = DEFAULT_LEEWAY_S


class VerifiedToken(msgspec.Struct, frozen=True, gc=False):
    """What a token says, after its signature and its times were checked. `expires_us` includes the leeway."""

    subject: str
    tenant: str
    roles: tuple[str, ...]
    claims: Mapping[str, Any]
    expires_us: int
    key: SigningKey


def is_token(text: str) -> bool:
    """Whether a bearer text has the form of a JWT: three parts (five if it is encrypted), of which the first is a JSON
    object in base64url. No secret that Strongroom makes has this form."""
    if not text.startswith("e") or text.count(".") not in (2, 4):  # `{` is `e` and more; keys are not kept decoded
        return False
    if len(text) > MAX_TOKEN_BYTES:  # longer than every key: `verify` says so
        return True
    return _header(text.partition(".")[0]) is not None


class Tokens:
    """Verifies the tokens of one issuer."""

    def __init__(self, settings: TokenSettings, keys: Jwks, clock: Clock) -> None:
        self._settings = settings
        self._keys = keys
        self._clock = clock
        self._leeway_us = settings.leeway_s * 1_000_000
        self._tenant_path = _path(settings.tenant_claim)
        self._roles_path = _path(settings.roles_claim)

    async def verify(self, text: str) -> VerifiedToken:
        """The content of a token. Raises Unauthenticated, which says what is wrong with it; Unavailable if the issuer's
        keys cannot be read."""
        if len(text) > MAX_TOKEN_BYTES:
            raise refused(f"the token has {len(text)} characters, expected at most {MAX_TOKEN_BYTES}")
        parts = text.split(".")
        header = _header(parts[0])
        if header is None or len(parts) != 3:
            raise refused("the token is encrypted or no JWT, expected three parts: header, claims, signature")
        if header.problem is not None:
            raise refused(header.problem)
        signature = _decoded(parts[2])
        if not signature:
            raise refused("the token's signature is missing, or is not base64url")
        signed = text[: -len(parts[2]) - 1].encode("utf-8", "replace")
        key = await self._signed_by(header.kid, header.algorithm, signed, signature)
        content = _decoded(parts[1])
        claims = _object(content) if content is not None else None
        if claims is None:
            raise refused(f"the token's content is not {_OBJECT}")
        return self._checked(claims, key)

    async def _signed_by(self, kid: str | None, algorithm: str, signed: bytes, signature: bytes) -> SigningKey:
        """The key that made the signature."""
        found = await self._keys.find(kid)
        fitting = [key for key in found if key.fits(algorithm)][:MAX_TRIED]
        for key in fitting:
            if key.verifies(algorithm, signed, signature):
                return key
        if fitting:
            raise refused("the token's signature is not by a key of the issuer")
        which = f"with the id {kid[:64]!r}" if kid is not None else "for a token without a key id"
        raise refused(f"the issuer has no key {which}" + (f" for {algorithm}" if found else ""))

    def _checked(self, claims: dict[str, Any], key: SigningKey) -> VerifiedToken:
        """The content, if its claims are those of a caller at this moment."""
        settings = self._settings
        if claims.get("iss") != settings.issuer:
            raise refused("the token is from another issuer than STRONGROOM_JWT_ISSUER names")
        audience = claims.get("aud")
        given = [audience] if isinstance(audience, str) else audience if isinstance(audience, list) else ()
        if not any(one in settings.audiences for one in given if isinstance(one, str)):
            raise refused("the token is for another audience than STRONGROOM_JWT_AUDIENCE names")
        if "cnf" in claims:  # whoever stole it could use it, which its issuer wanted to prevent
            raise refused("the token is bound to a key of its holder ('cnf'), which this server cannot check")
        expires_us = self._expiry_us(claims)
        return VerifiedToken(
            _subject(claims),
            self._tenant(claims),
            self._roles(claims),
            MappingProxyType(claims),
            expires_us,
            key,
        )

    def _expiry_us(self, claims: Mapping[str, Any]) -> int:
        """When the token stops working. Raises Unauthenticated if that is over, or if the token is not valid yet."""
        now_us, leeway_us = self._clock.now_us(), self._leeway_us
        expires_us = _time_us(claims, "exp")
        if expires_us is None:
            raise refused("the token has no claim 'exp': it would never expire")
        if now_us >= expires_us + leeway_us:
            raise refused("the token has expired")
        for name in ("nbf", "iat"):
            begins_us = _time_us(claims, name)
            if begins_us is not None and now_us < begins_us - leeway_us:
                raise refused(f"the token is not valid yet: its claim {name!r} is in the future")
        return expires_us + leeway_us

    def _tenant(self, claims: Mapping[str, Any]) -> str:
        name, tenant = self._settings.tenant_claim, _at(claims, self._tenant_path)
        if tenant is None:
            raise refused(f"the token has no claim {name!r}, which names the caller's tenant")
        problem = name_problem(tenant, MAX_TENANT_BYTES)
        if problem is None and tenant == ALL_TENANTS:
            problem = "found '*', which no token may name: a token belongs to one tenant"
        if problem is not None:
            raise refused(f"the token's claim {name!r}: {problem}")
        return str(tenant)

    def _roles(self, claims: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of roles in the token: a list, or one text with spaces. Others than names of roles are left out."""
        name, found = self._settings.roles_claim, _at(claims, self._roles_path)
        if found is None:
            return ()
        roles = found.split() if isinstance(found, str) else found
        if not isinstance(roles, list):
            raise refused(f"the token's claim {name!r}: found {kind_of(found)}, expected a list of texts")
        if len(roles) > MAX_TOKEN_ROLES:
            raise refused(f"the token's claim {name!r}: found {len(roles)} roles, expected at most {MAX_TOKEN_ROLES}")
        return tuple(dict.fromkeys(one for one in roles if isinstance(one, str) and _ROLE.fullmatch(one)))


def refused(message: str) -> Unauthenticated:
    """The error for a token that is not accepted."""
    return Unauthenticated(message, token=True)


# --- Form -----------------------------------------------------------------------------------------------------


class _Header(msgspec.Struct, frozen=True, gc=False):
    """What is needed of a token's header; `problem`: why no token with this header is accepted."""

    algorithm: str
    kid: str | None
    problem: str | None = None


@lru_cache(maxsize=MAX_HEADERS)  # an issuer's tokens have the same few headers
def _header(part: str) -> _Header | None:
    """The header of a token; None for a text that is not the header of one."""
    content = _decoded(part)
    try:
        header = _decode(content) if content is not None else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if content is None or not isinstance(header, dict):
        return None
    problem = _header_problem(content, header)
    return _Header("", None, problem) if problem is not None else _Header(header["alg"], header.get("kid"))


def _header_problem(content: bytes, header: Mapping[str, Any]) -> str | None:
    if _object(content) is None:
        return f"the token's header is not {_OBJECT}"
    for name in ("crit", "b64", "enc", "zip"):
        if name in header:
            return f"the token's header has {name!r}, which is not accepted"
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in ALLOWED:
        return f"found the algorithm {str(algorithm)[:64]!r}, expected one of {', '.join(sorted(ALLOWED))}"
    if kid is not None and text_problem(kid, MAX_KID_CHARS) is not None:
        return f"the token's key id is not a text of 1 to {MAX_KID_CHARS} bytes"
    for name, known in (("typ", TYPES), ("cty", frozenset[str]())):
        value = header.get(name)
        if value is not None and not (isinstance(value, str) and value.lower().removeprefix("application/") in known):
            return f"the token's header has {name} {str(value)[:64]!r}, which is not accepted"
    return None


def _decoded(part: str) -> bytes | None:
    """The bytes of a part in base64url, without padding; None if it is not that."""
    try:
        standard = part.encode("ascii").translate(_STANDARD)
        return binascii.a2b_base64(standard + b"=" * (-len(part) % 4), strict_mode=True)
    except ValueError:
        return None


def _object(content: bytes) -> dict[str, Any] | None:
    """The JSON object in a part's bytes; None if there is none, if it is nested too deeply, or if it repeats a name."""
    try:
        found = _decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    if content.count(b"{") + content.count(b"[") > MAX_DEPTH and not _is_shallow(found, MAX_DEPTH):
        return None
    return found if repeated_name(content, found) is None else None


def _is_shallow(value: Any, depth: int) -> bool:
    """Whether a value has at most this many levels of lists and objects. What reads the claims later may use Python's
    stack for each level."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(one, depth - 1) for one in inner)


# --- Claims ---------------------------------------------------------------------------------------------------


def _subject(claims: Mapping[str, Any]) -> str:
    subject = claims.get("sub")
    problem = "is missing" if subject is None else text_problem(subject, MAX_SUBJECT_CHARS)
    if problem is None and not str(subject).isprintable():
        problem = "found a control character"
    if problem is not None:
        raise refused(f"the token's claim 'sub', which names the caller: {problem}")
    return str(subject)


def _time_us(claims: Mapping[str, Any], name: str) -> int | None:
    """A NumericDate in microseconds; None if it is absent. Raises Unauthenticated."""
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused(f"the token's claim {name!r}: found {kind_of(value)}, expected a time in seconds")
    return int(min(max(value, 0), MAX_TIME_S) * 1_000_000)


def _path(name: str) -> tuple[str, ...]:
    return (name,) if "/" in name or ":" in name else tuple(name.split("."))


def _at(claims: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = claims
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


__all__ = [
    "DEFAULT_LEEWAY_S",
    "MAX_LEEWAY_S",
    "MAX_TOKEN_BYTES",
    "TokenSettings",
    "Tokens",
    "VerifiedToken",
    "is_token",
]
