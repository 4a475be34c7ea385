"""Peppers: the secrets that a store's hashes, fingerprints and sealed values are made with. Pure.

The first pepper is the current one. Older peppers still open what they sealed and recognise what they made.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .errors import StoreError

_NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class Pepper:
    """One secret, and the id that stands in what is made with it."""

    id: str
    secret: bytes = field(repr=False)


class Peppers:
    """The peppers of one store, the current one first."""

    def __init__(self, peppers: Sequence[Pepper]) -> None:
        self._peppers = tuple(peppers)
        self._current = self._peppers[0]

    @property
    def current_id(self) -> str:
        return self._current.id

    @property
    def pepper_ids(self) -> frozenset[str]:
        return frozenset(pepper.id for pepper in self._peppers)

    def macs(self, content: bytes, purpose: str) -> list[str]:
        """`pepper id:HMAC` of a content under each pepper, the current pepper's first. Each purpose has its own key."""
        keys = ((pepper.id, _key(pepper, purpose)) for pepper in self._peppers)
        return [f"{id}:{hmac.digest(key, content, 'sha256').hex()}" for id, key in keys]

    def seal(self, content: bytes, purpose: str = "seal") -> bytes:
        """A content encrypted under the current pepper, for one purpose: by default the SHA-256 of a key, which exports
        need."""
        return self._sealer(purpose)(content)

    def sealer(self) -> Callable[[bytes], bytes]:
        """`seal`, for many keys: with a cipher that is made once."""
        return self._sealer("seal")

    def _sealer(self, purpose: str) -> Callable[[bytes], bytes]:
        id, cipher = self._current.id.encode(), AESGCM(_key(self._current, purpose))

        def seal(content: bytes) -> bytes:
            nonce = secrets.token_bytes(_NONCE_BYTES)
            return b"%b:%b%b" % (id, nonce, cipher.encrypt(nonce, content, id))

        return seal

    def unseal(self, sealed: bytes, purpose: str = "seal") -> bytes:
        """The content that `seal` encrypted. StoreError if its pepper is missing, or it was altered."""
        id, _, rest = sealed.partition(b":")
        for pepper in self._peppers:
            if pepper.id.encode() == id:
                try:
                    return AESGCM(_key(pepper, purpose)).decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], id)
                except (InvalidTag, ValueError):  # ValueError: too short to hold a nonce
                    break
        what = "hash" if purpose == "seal" else purpose
        raise StoreError(f"a sealed {what} cannot be opened: its pepper is missing, or it was altered")

    def conceal(self, content: bytes, context: str) -> bytes:
        """A content encrypted under the current pepper and `context`: what it is, and for whom. An answer to an
        idempotent call has the caller's idempotency key in its context, and nothing stores that key."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + AESGCM(_context_key(self._current, context)).encrypt(nonce, content, None)

    def reveal(self, concealed: bytes, context: str) -> bytes | None:
        """The content that `conceal` encrypted; None if its pepper is missing or the context is another."""
        nonce, content = concealed[:_NONCE_BYTES], concealed[_NONCE_BYTES:]
        for pepper in self._peppers:
            try:
                return AESGCM(_context_key(pepper, context)).decrypt(nonce, content, None)
            except InvalidTag:
                continue  # the pepper was rotated since
        return None


def _context_key(pepper: Pepper, context: str) -> bytes:
    return hmac.digest(pepper.secret, b"memo\x00" + context.encode("utf-8", "backslashreplace"), "sha256")


def _key(pepper: Pepper, purpose: str) -> bytes:
    return hmac.digest(pepper.secret, purpose.encode(), "sha256")


__all__ = ["Pepper", "Peppers"]
