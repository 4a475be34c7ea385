"""The stored hashes of secrets, and the look-up of keys that were imported from other systems. Pure."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..pepper import Pepper, Peppers

_SHA256 = "sha256:"
_SHA512 = "sha512:"
HINT_SLOTS = 4
"""Keys that may share one hint. Each is stored under a name of its own, so that one read finds a secret."""
MAX_HINT_CHARS = 64


@dataclass(frozen=True, slots=True)
class HintRule:
    """Where the hint of an imported key with a salted hash stands in its secret: before the first dot (`chars` None),
    or in the first `chars` characters."""

    chars: int | None = None

    @property
    def id(self) -> str:
        return "dot" if self.chars is None else str(self.chars)

    def hint(self, text: str) -> str | None:
        """The hint in a secret; None if it has none."""
        if self.chars is not None:
            return text[: self.chars] if len(text) >= self.chars else None
        before, dot, _ = text.partition(".")
        return before if dot and len(before) <= MAX_HINT_CHARS else None

    def names(self, hint: str) -> list[str]:
        """The names that keys with this hint are stored under instead of a hash."""
        return [f"hint:{self.id}:{slot}:{hint}" for slot in range(HINT_SLOTS)]


@dataclass(frozen=True, slots=True)
class Imported:
    """How keys of other systems are found: by HMACs under the secrets of those systems (by id), and by hints."""

    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    rules: tuple[HintRule, ...] = ()


class Hasher(Peppers):
    """The stored form of secrets: HMAC-SHA-256 under a pepper, of the secret's SHA-256.

    An imported SHA-256 can so be brought under the pepper too. A stored hash is `pepper id:hex`; an imported one is
    `sha256:hex`, `sha512:hex`, `hmac:secret's id:hex`, or `hint:rule:slot:hint`.
    """

    def __init__(self, peppers: Sequence[Pepper], imported: Imported | None = None) -> None:
        super().__init__(peppers)
        self._secret = self._current.secret
        self.imported = imported if imported is not None else Imported()

    def with_imported(self, imported: Imported) -> Hasher:
        """The same peppers with other import sources."""
        return Hasher(self._peppers, imported)

    def digest(self, text: str) -> bytes:
        """The HMAC of a secret under the current pepper, 32 bytes: the name of the key in caches."""
        return hmac.digest(self._secret, hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "sha256")

    def hash(self, text: str) -> str:
        """The hash that is stored for a secret."""
        return self.hash_of(hashlib.sha256(text.encode()).digest())

    def hash_of(self, sha256: bytes) -> str:
        return f"{self._current.id}:{hmac.digest(self._secret, sha256, 'sha256').hex()}"

    def candidates(self, text: str) -> list[str]:
        """Every hash that a store may hold for this secret, the current pepper's first."""
        encoded = text.encode("utf-8", "surrogatepass")
        return [
            *self.candidates_of(hashlib.sha256(encoded).digest()),
            _SHA512 + hashlib.sha512(encoded).hexdigest(),
            *(
                imported_hmac(id, hmac.digest(secret, encoded, "sha256").hex())
                for id, secret in self.imported.secrets.items()
            ),
        ]

    def hints(self, text: str) -> list[str]:
        """The names that a store may hold instead of the hash, for a secret whose hash cannot be looked up."""
        found = []
        for rule in self.imported.rules:
            hint = rule.hint(text)
            if hint is not None:
                found += rule.names(hint)
        return found

    def candidates_of(self, sha256: bytes) -> list[str]:
        """The candidates that can be made of a secret's SHA-256."""
        under = [f"{p.id}:{hmac.digest(p.secret, sha256, 'sha256').hex()}" for p in self._peppers]
        return [*under, _SHA256 + sha256.hex()]

    def is_current(self, stored: str) -> bool:
        return stored.startswith(self._current.id + ":")


def imported_sha256(hex_digest: str) -> str:
    """The stored form of an imported SHA-256."""
    return _SHA256 + hex_digest.lower()


def imported_hmac(secret_id: str, hex_digest: str) -> str:
    """The stored form of an imported HMAC-SHA-256 under one of the secrets of `Imported`."""
    return f"hmac:{secret_id}:{hex_digest}"


def hint_of_imported(stored: str) -> tuple[HintRule, str] | None:
    """The rule and the hint in a stored name; None if it is a hash."""
    if not stored.startswith("hint:"):
        return None
    _, rule, _, hint = stored.split(":", 3)
    return HintRule(None if rule == "dot" else int(rule)), hint


def sha256_of_imported(stored: str) -> bytes | None:
    """The SHA-256 in an imported hash; None if the hash is under a pepper."""
    return bytes.fromhex(stored.removeprefix(_SHA256)) if stored.startswith(_SHA256) else None
