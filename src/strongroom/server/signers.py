"""Verifies signed reports of leaked keys: secret scanners sign, and this module gets their public keys.

The signature is that of GitHub's secret-scanning partner programme: ECDSA over P-256 with SHA-256 of the body as sent,
DER in base64, by a key in its public list.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from ..errors import ConfigError, Unauthenticated, Unavailable
from ..published import fetch, is_file, read_file, reason, shown

IDENTIFIER = "github-public-key-identifier"
SIGNATURE = "github-public-key-signature"
MAX_AGE_S = 3_600.0
"""The list is fetched again after this long."""
MAX_STALE_S = 86_400.0
"""If the list cannot be fetched, the old list is used for this long."""
RETRY_S = 60.0
"""The shortest time between fetches: unauthenticated requests can cause them."""
TIMEOUT_S = 10.0
MAX_LIST_BYTES = 65_536
MAX_KEYS = 32
MAX_HEADER_CHARS = 256
_REFUSED = "the signature is not from a known key, or not for this body"
_log = logging.getLogger(__name__)


class _Listed(msgspec.Struct):
    key_identifier: str
    key: str


class _List(msgspec.Struct):
    public_keys: list[_Listed]


@dataclass(frozen=True, slots=True)
class Claim:
    """A signature that the key `identifier` is said to have made."""

    identifier: str
    _signed: bytes
    _key: ec.EllipticCurvePublicKey

    def check(self, body: bytes) -> str:
        """The identifier, if the signature fits this body. Raises Unauthenticated."""
        try:
            self._key.verify(self._signed, body, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise Unauthenticated(_REFUSED) from None
        return self.identifier


class Signers:
    """The public keys of one list: `place` is its URL, or a file with the same JSON."""

    def __init__(self, place: str) -> None:
        """Raises ConfigError for a file that cannot be used; a list behind a URL is fetched when it is needed."""
        self._place = place
        self._is_file = is_file(place)
        self._keys: Mapping[str, ec.EllipticCurvePublicKey] = {}
        self._known_at: float | None = None
        self._tried_at: float | None = None
        self._failed = False
        self._fetching = asyncio.Lock()
        if self._is_file:
            try:
                self._use(read_file(place, max_bytes=MAX_LIST_BYTES))
            except (OSError, ValueError) as error:
                raise ConfigError(f"STRONGROOM_LEAK_KEYS: {place}: {reason(error)}") from None

    async def claim(self, headers: Mapping[str, str]) -> Claim:
        """The claim in the headers, before the body is read. Raises Unauthenticated; Unavailable if the list of keys
        cannot be fetched."""
        identifier, signature = headers.get(IDENTIFIER, ""), headers.get(SIGNATURE, "")
        if not 0 < len(identifier) <= MAX_HEADER_CHARS or not 0 < len(signature) <= MAX_HEADER_CHARS:
            raise Unauthenticated(_REFUSED)
        try:
            signed = base64.b64decode(signature, validate=True)
        except (binascii.Error, ValueError):
            raise Unauthenticated(_REFUSED) from None
        key = await self._find(identifier)
        if key is None:
            raise Unauthenticated(_REFUSED)
        return Claim(identifier, signed, key)

    async def _find(self, identifier: str) -> ec.EllipticCurvePublicKey | None:
        if identifier not in self._keys or self._age_s() > MAX_AGE_S:
            await self._refresh()
        if self._failed and (identifier not in self._keys or self._age_s() > MAX_STALE_S):
            raise Unavailable("the public keys of the leak reporters are unavailable")
        return self._keys.get(identifier)

    def _age_s(self) -> float:
        return float("inf") if self._known_at is None else time.monotonic() - self._known_at

    async def _refresh(self) -> None:
        """Read the list again, unless a try was less than RETRY_S ago. A failure is logged and retried later."""
        async with self._fetching:
            now = time.monotonic()
            if self._tried_at is not None and now - self._tried_at < RETRY_S:
                return
            self._tried_at = now
            try:
                self._use(await self._listed())
                self._failed = False
            except (OSError, ValueError) as error:
                self._failed = True
                _log.warning("the list of public keys at %s cannot be used: %s", shown(self._place), reason(error))

    async def _listed(self) -> bytes:
        if self._is_file:
            return read_file(self._place, max_bytes=MAX_LIST_BYTES)
        return await fetch(self._place, max_bytes=MAX_LIST_BYTES, timeout_s=TIMEOUT_S)

    def _use(self, listed: bytes) -> None:
        """Use a list. Raises ValueError if it has no usable key."""
        try:
            found = msgspec.json.decode(listed, type=_List).public_keys
        except msgspec.MsgspecError as error:
            raise ValueError(f'expected {{"public_keys": [{{"key_identifier", "key"}}]}}: {error}') from None
        keys = {}
        for item in found[:MAX_KEYS]:
            key = _public_key(item.key)
            if key is None:
                _log.warning("the public key %s is not one of ECDSA over P-256: it is left out", item.key_identifier)
            else:
                keys[item.key_identifier] = key
        if not keys:
            raise ValueError("it has no public key of ECDSA over P-256")
        self._keys = keys
        self._known_at = self._tried_at = time.monotonic()


def _public_key(pem: str) -> ec.EllipticCurvePublicKey | None:
    """The key, if it is ECDSA over P-256."""
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1) else None
