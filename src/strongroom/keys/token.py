"""The text of an API key: made, recognised, masked, hashed. Pure.

    sr_SR1k3Jx…43 random characters…Qa0dK2x
    │  │  │                          └ checksum: CRC-32 of everything before it, 6 characters of base62
    │  │  └ 43 characters of base62: 256 bits of randomness
    │  └ the mark and format version, in every key whatever its prefix
    └ a prefix of the issuer's choice

A text that carries the mark and is not exactly that (mistyped, truncated) is refused without a read. Secret scanners
find keys by SCAN_PATTERN and need nothing else to tell a real one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..pepper import Pepper, Peppers

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MARK = "SR1"
DEFAULT_PREFIX = "sr"
RANDOM_CHARS = 43
CHECKSUM_CHARS = 6
PREFIX_PATTERN = r"^[a-z][a-z0-9]*(?:_[a-z0-9]+)*$"
MAX_PREFIX_CHARS = 24
MAX_KEY_CHARS = 512
"""A longer text is not a key, imported ones included."""
SCAN_PATTERN = r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)*_SR1[0-9A-Za-z]{49}\b"
_KEY = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*_SR1[0-9A-Za-z]{49}")
_MARKED = re.compile(r"[a-z][a-z0-9_]*_SR1")
_SHA256 = "sha256:"
_SHA512 = "sha512:"
HINT_SLOTS = 4
"""Keys that may have one hint. Each is looked up by a name of its own, so that a text is found by one read."""
MAX_HINT_CHARS = 64


def generate(prefix: str = DEFAULT_PREFIX) -> str:
    """A new key's text. `prefix` matches PREFIX_PATTERN."""
    body = f"{prefix}_{MARK}" + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM_CHARS))
    return body + checksum(body)


def checksum(body: str) -> str:
    """CRC-32 of the text before it, as 6 base62 digits."""
    number = zlib.crc32(body.encode())
    digits = []
    for _ in range(CHECKSUM_CHARS):
        number, rest = divmod(number, 62)
        digits.append(ALPHABET[rest])
    return "".join(reversed(digits))


def is_possible(text: str) -> bool:
    """Whether a text can be a key at all: ours with the right checksum, or one that may have been imported."""
    if not 1 <= len(text) <= MAX_KEY_CHARS:
        return False
    if _MARKED.match(text) is None:
        return text.isprintable()
    return _KEY.fullmatch(text) is not None and checksum(text[:-CHECKSUM_CHARS]) == text[-CHECKSUM_CHARS:]


def masked(text: str) -> str:
    """What may be shown of a key: enough to recognise it, useless to anyone else."""
    if _KEY.fullmatch(text):
        prefix, _, rest = text.rpartition("_")
        return f"{prefix}_{rest[:7]}…{text[-4:]}"
    shown = min(4, len(text) // 8)
    return f"{text[:shown]}…{text[-shown:] if shown else ''}"


@dataclass(frozen=True, slots=True)
class HintRule:
    """How the hint of an imported key whose hash has a salt is found in its text: it is what stands before the first
    dot (`chars` None), or so many characters from the beginning."""

    chars: int | None = None

    @property
    def id(self) -> str:
        return "dot" if self.chars is None else str(self.chars)

    def hint(self, text: str) -> str | None:
        """A text's hint; None if it can have none."""
        if self.chars is not None:
            return text[: self.chars] if len(text) >= self.chars else None
        before, dot, _ = text.partition(".")
        return before if dot and len(before) <= MAX_HINT_CHARS else None

    def names(self, hint: str) -> list[str]:
        """What keys with this hint are stored under instead of a hash."""
        return [f"hint:{self.id}:{slot}:{hint}" for slot in range(HINT_SLOTS)]


@dataclass(frozen=True, slots=True)
class Imported:
    """How keys of other systems are looked up: by HMACs under those systems' secrets (by id), and by hints."""

    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    rules: tuple[HintRule, ...] = ()


class Hasher(Peppers):
    """Key texts as what the store holds: HMAC-SHA-256 under a pepper, of the text's SHA-256.

    Going by way of the SHA-256 lets an imported SHA-256 be brought under the pepper as well. A stored hash is
    `pepper id:hex`; as imported `sha256:hex`, `sha512:hex`, `hmac:secret's id:hex`, or `hint:rule:slot:hint`.
    """

    def __init__(self, peppers: Sequence[Pepper], imported: Imported | None = None) -> None:
        super().__init__(peppers)
        self._secret = self._current.secret
        self.imported = imported if imported is not None else Imported()

    def with_imported(self, imported: Imported) -> Hasher:
        """The same peppers, and other ways to look up imported keys."""
        return Hasher(self._peppers, imported)

    def digest(self, text: str) -> bytes:
        """The key's HMAC under the current pepper, 32 bytes: the name of the key in caches."""
        return hmac.digest(self._secret, hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "sha256")

    def hash(self, text: str) -> str:
        """What is stored for a text."""
        return self.hash_of(hashlib.sha256(text.encode()).digest())

    def hash_of(self, sha256: bytes) -> str:
        return f"{self._current.id}:{hmac.digest(self._secret, sha256, 'sha256').hex()}"

    def candidates(self, text: str) -> list[str]:
        """Every hash that a store may hold for this text, the current pepper's first."""
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
        """What a store may hold in place of the hash for a text whose hash cannot be looked up."""
        found = []
        for rule in self.imported.rules:
            hint = rule.hint(text)
            if hint is not None:
                found += rule.names(hint)
        return found

    def candidates_of(self, sha256: bytes) -> list[str]:
        """Those of the candidates that a text's SHA-256 is enough for."""
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
    """The rule and the hint in a stored form that is one; None if it is a hash."""
    if not stored.startswith("hint:"):
        return None
    _, rule, _, hint = stored.split(":", 3)
    return HintRule(None if rule == "dot" else int(rule)), hint


def sha256_of_imported(stored: str) -> bytes | None:
    """The SHA-256 in a stored form that was imported; None if it is under a pepper."""
    return bytes.fromhex(stored.removeprefix(_SHA256)) if stored.startswith(_SHA256) else None
