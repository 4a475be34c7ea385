"""Hashes of API keys from other systems: recognised, checked, and compared with a secret. Pure.

There are two kinds. A *digest* depends on the key's secret only (SHA-256, SHA-512), or on it and one secret of the
other system (HMAC-SHA-256): it finds the key. A *verifier* has a salt of its own (salted SHA-256, PBKDF2, bcrypt,
Argon2): something else must find the key, and then the verifier is compared.

The forms that are read, and the stored form:

    64 hex digits, 43 or 44 of base64, sha256:…, sha256-…, sha256$$…       sha256:<hex>
    128 hex digits, sha512:…, sha512$$… (djangorestframework-api-key 3)    sha512:<hex>
    hmac-sha256:… in hex or base64                                         hmac-sha256:<hex>
    sha256$<salt>$…: SHA-256 of salt and text, in hex or base64            sha256$<salt>$<hex>
    sha256_suffix$<salt>$…: of text and salt                               sha256_suffix$<salt>$<hex>
    pbkdf2_sha256$…, pbkdf2_sha1$… (Django)                                as it is
    $2a$…, $2b$…, $2y$…, bcrypt$$2b$… (Django)                             $2b$… and so on
    bcrypt_sha256$$2b$… (Django: bcrypt of the text's SHA-256 in hex)      as it is
    $argon2id$v=19$…, $argon2i$…, $argon2d$…, argon2$argon2id$… (Django)   $argon2id$v=19$…
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2d, Argon2i, Argon2id

from ..errors import ConfigError

MAX_HASH_CHARS = 512
MAX_SALT_CHARS = 128
MAX_PBKDF2_ITERATIONS = 4_000_000
MAX_BCRYPT_COST = 15
MAX_ARGON2_KIB = 262_144
MAX_ARGON2_PASSES = 16
MAX_ARGON2_WORK_KIB = 1_048_576
"""Memory times passes."""
MAX_ARGON2_LANES = 16
"""The most work that a hash may ask for, about 2 s of one core each: more would let a file of keys stop a service."""
MIN_ARGON2_SALT = 8
BCRYPT_BYTES = 72
"""bcrypt hashes no more bytes of a secret. Older libraries silently cut a longer one, so the hash is of the cut one."""

Kind = Literal["sha256", "sha512", "hmac-sha256", "salted-sha256", "pbkdf2", "bcrypt", "argon2"]

_HEX_256 = re.compile(r"[0-9a-fA-F]{64}")
_HEX_512 = re.compile(r"[0-9a-fA-F]{128}")
_BASE64_256 = re.compile(r"[A-Za-z0-9+/_-]{43}=?")
_BASE64_512 = re.compile(r"[A-Za-z0-9+/_-]{86}(?:==)?")
_SALTED = re.compile(r"(sha256|sha256_suffix)\$(.+)\$([^$]+)", re.DOTALL)
_PBKDF2 = re.compile(r"(pbkdf2_sha256|pbkdf2_sha1)\$([0-9]{1,10})\$([^$]+)\$([A-Za-z0-9+/]+={0,2})")
_BCRYPT = re.compile(r"\$2([abxy])\$([0-9]{2})\$([./A-Za-z0-9]{53})")
_ARGON2 = re.compile(
    r"\$(argon2id|argon2i|argon2d)\$v=([0-9]{1,4})\$m=([0-9]{1,10}),t=([0-9]{1,10}),p=([0-9]{1,10})"
    r"\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)"
)
_ARGON2_OTHER = re.compile(r"\$argon2(?:id|i|d)\$")
_PBKDF2_BYTES = {"pbkdf2_sha256": ("sha256", 32), "pbkdf2_sha1": ("sha1", 20)}
_ARGON2_OF: dict[str, Callable[[bytes, str], None]] = {
    "argon2id": Argon2id.verify_phc_encoded,
    "argon2i": Argon2i.verify_phc_encoded,
    "argon2d": Argon2d.verify_phc_encoded,
}
EXPECTED = (
    "expected SHA-256 or SHA-512 in hex or base64, hmac-sha256:…, sha256$salt$…, pbkdf2_sha256$…, pbkdf2_sha1$…, "
    "$2b$… (bcrypt), bcrypt_sha256$… or $argon2id$…"
)


@dataclass(frozen=True, slots=True)
class ForeignHash:
    """One hash of another system, parsed. `text` is the stored form."""

    kind: Kind
    text: str = field(repr=False)

    @property
    def is_digest(self) -> bool:
        """Whether it finds the key."""
        return self.kind in ("sha256", "sha512", "hmac-sha256")


def parsed_hash(hash: str) -> ForeignHash:
    """Parse a hash of another system. Raises ValueError for a hash that is unknown, damaged, or too slow to compare;
    the message never contains the hash."""
    if len(hash) > MAX_HASH_CHARS:
        raise ValueError(f"found {len(hash)} characters, expected at most {MAX_HASH_CHARS}")
    if (found := _digest(hash)) is not None:
        return found
    if hash.startswith("pbkdf2_"):
        return _pbkdf2(hash)
    if hash.startswith(("$2", "bcrypt$", "bcrypt_sha256$")):
        return _bcrypt(hash)
    if hash.startswith(("$argon2", "argon2$")):
        return _argon2(hash)
    if hash.startswith(("sha256$", "sha256_suffix$")):
        return _salted(hash)
    raise ValueError(f"found {_shown(hash)}, {EXPECTED}")


def is_slow(verifier: str) -> bool:
    """Whether a comparison takes milliseconds or more."""
    return not verifier.startswith("sha256")


def matches(verifier: str, text: str) -> bool:
    """Whether a verifier was made of this secret; the comparison takes constant time, the hash takes its own time.
    `verifier` is a stored form that `parsed_hash` gave. Raises ConfigError if bcrypt is needed and not installed."""
    password = text.encode("utf-8", "surrogatepass")
    if verifier.startswith("sha256"):
        scheme, salt, digest = _parts(_SALTED, verifier)
        salted = salt.encode() + password if scheme == "sha256" else password + salt.encode()
        return hmac.compare_digest(hashlib.sha256(salted).hexdigest(), digest)
    if verifier.startswith("pbkdf2_"):
        scheme, iterations, salt, digest = _parts(_PBKDF2, verifier)
        name, _ = _PBKDF2_BYTES[scheme]
        made = hashlib.pbkdf2_hmac(name, password, salt.encode(), int(iterations))
        return hmac.compare_digest(base64.b64encode(made), digest.encode())
    if verifier.startswith("$argon2"):
        variant = verifier.split("$", 2)[1]
        try:
            _ARGON2_OF[variant](password, verifier)
        except InvalidKey:
            return False
        return True
    if verifier.startswith("bcrypt_sha256$"):
        return _bcrypt_matches(hashlib.sha256(password).hexdigest().encode(), verifier.removeprefix("bcrypt_sha256$"))
    return _bcrypt_matches(password[:BCRYPT_BYTES], verifier)


# --- Digests ----------------------------------------------------------------------------------------------------


def sha256_of(digest: ForeignHash) -> bytes | None:
    """The SHA-256 in a digest; None for another kind."""
    return bytes.fromhex(digest.text.removeprefix("sha256:")) if digest.kind == "sha256" else None


def _digest(hash: str) -> ForeignHash | None:
    for prefix in ("hmac-sha256:", "hmac_sha256:", "hmac-sha256$", "hmac_sha256$"):
        if hash.startswith(prefix):
            return ForeignHash("hmac-sha256", f"hmac-sha256:{_bytes_256(hash.removeprefix(prefix)).hex()}")
    for prefix in ("sha256:", "sha256-"):
        if hash.startswith(prefix):
            return ForeignHash("sha256", f"sha256:{_bytes_256(hash.removeprefix(prefix)).hex()}")
    for prefix in ("sha512:", "sha512-", "sha512$$"):
        if hash.startswith(prefix):
            return ForeignHash("sha512", f"sha512:{_bytes_512(hash.removeprefix(prefix)).hex()}")
    hash = hash.removeprefix("sha256$$")  # a digest follows, or a salt that begins with a dollar sign
    if _HEX_256.fullmatch(hash) or _BASE64_256.fullmatch(hash):
        return ForeignHash("sha256", f"sha256:{_bytes_256(hash).hex()}")
    if _HEX_512.fullmatch(hash):
        return ForeignHash("sha512", f"sha512:{hash.lower()}")
    return None


def _bytes_256(text: str) -> bytes:
    if _HEX_256.fullmatch(text):
        return bytes.fromhex(text)
    if _BASE64_256.fullmatch(text):
        return _from_base64(text)
    raise ValueError(f"found {len(text)} characters after the scheme, expected 32 bytes as 64 hex digits or in base64")


def _bytes_512(text: str) -> bytes:
    if _HEX_512.fullmatch(text):
        return bytes.fromhex(text)
    if _BASE64_512.fullmatch(text):
        return _from_base64(text)
    raise ValueError(f"found {len(text)} characters after the scheme, expected 64 bytes as 128 hex digits or in base64")


def _from_base64(text: str) -> bytes:
    """Decode base64 of either alphabet. Raises ValueError if the last character has unused bits that are set: the text
    was cut or mistyped."""
    plain = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        found = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error:
        raise ValueError("found text that is no base64") from None
    if base64.b64encode(found).decode().rstrip("=") != plain:
        raise ValueError("found base64 that is damaged at its end")
    return found


# --- Verifiers --------------------------------------------------------------------------------------------------


def _salted(hash: str) -> ForeignHash:
    found = _SALTED.fullmatch(hash)
    if found is None or len(found[2]) > MAX_SALT_CHARS:
        raise ValueError(
            f"found a salted SHA-256 in another form, expected sha256$salt$digest with a salt of 1 to {MAX_SALT_CHARS}"
        )
    return ForeignHash("salted-sha256", f"{found[1]}${found[2]}${_bytes_256(found[3]).hex()}")


def _pbkdf2(hash: str) -> ForeignHash:
    found = _PBKDF2.fullmatch(hash)
    if found is None:
        raise ValueError(
            "found PBKDF2 in another form, expected pbkdf2_sha256$iterations$salt$base64 (or pbkdf2_sha1$…), as Django"
        )
    scheme, iterations, _, digest = found.groups()
    if not 1 <= int(iterations) <= MAX_PBKDF2_ITERATIONS:
        raise ValueError(f"found {iterations} iterations, expected 1 to {MAX_PBKDF2_ITERATIONS}")
    length = len(_from_base64(digest))
    expected = _PBKDF2_BYTES[scheme][1]
    if length != expected or not digest.endswith("="):
        raise ValueError(f"found a digest of {length} bytes, expected {expected} in base64 with its padding")
    return ForeignHash("pbkdf2", hash)


def _bcrypt(hash: str) -> ForeignHash:
    prehashed = hash.startswith("bcrypt_sha256$")
    found = _BCRYPT.fullmatch(hash.removeprefix("bcrypt_sha256$").removeprefix("bcrypt$"))
    if found is None:
        raise ValueError("found bcrypt in another form, expected $2b$ (or $2a$, $2y$), two digits, $ and 53 characters")
    variant, cost, rest = found.groups()
    if variant == "x":
        raise ValueError("found $2x$, which marks hashes made with a fault in them, expected $2a$, $2b$ or $2y$")
    if not 4 <= int(cost) <= MAX_BCRYPT_COST:
        raise ValueError(f"found the cost {cost}, expected 4 to {MAX_BCRYPT_COST}")
    if importlib.util.find_spec("bcrypt") is None:
        raise ValueError("found bcrypt, for which a package is missing: pip install 'strongroom[hashes]'")
    return ForeignHash("bcrypt", f"{'bcrypt_sha256$' if prehashed else ''}$2{variant}${cost}${rest}")


def _argon2(hash: str) -> ForeignHash:
    text = hash.removeprefix("argon2") if hash.startswith("argon2$") else hash
    found = _ARGON2.fullmatch(text)
    if found is None:
        if _ARGON2_OTHER.match(text) and "$v=" not in text:
            raise ValueError("found Argon2 without a version (1.0, before 2016), expected v=19: it cannot be compared")
        raise ValueError("found Argon2 in another form, expected $argon2id$v=19$m=…,t=…,p=…$salt$hash (a PHC string)")
    _, version, memory, passes, lanes, salt, digest = found.groups()
    if int(version) != 19:
        raise ValueError(f"found Argon2 v={version}, expected v=19: it cannot be compared")
    for name, value, least, most in (
        ("t", int(passes), 1, MAX_ARGON2_PASSES),
        ("p", int(lanes), 1, MAX_ARGON2_LANES),
        ("m", int(memory), 8 * int(lanes), MAX_ARGON2_KIB),
    ):
        if not least <= value <= most:
            raise ValueError(f"found {name}={value}, expected {least} to {most}")
    if int(memory) * int(passes) > MAX_ARGON2_WORK_KIB:
        raise ValueError(f"found m={memory} and t={passes}, expected a product of at most {MAX_ARGON2_WORK_KIB}")
    if len(_from_base64(salt)) < MIN_ARGON2_SALT or len(_from_base64(digest)) < 4:
        raise ValueError("found a salt or a digest that is too short, expected 8 bytes and 4 at least")
    return ForeignHash("argon2", text)


def _bcrypt_matches(password: bytes, hash: str) -> bool:
    try:
        import bcrypt
    except ImportError:
        raise ConfigError("keys with bcrypt hashes need a package: pip install 'strongroom[hashes]'") from None
    return bcrypt.checkpw(password, hash.encode())


def _parts(pattern: re.Pattern[str], verifier: str) -> tuple[str, ...]:
    found = pattern.fullmatch(verifier)
    if found is None:
        raise ValueError("a verifier that `parsed_hash` did not give")
    return found.groups()


def _shown(hash: str) -> str:
    """The part of an unknown hash that a message may show: its scheme, or its length."""
    scheme = re.match(r"\$?[A-Za-z0-9_.-]{1,20}[$:]", hash)
    return f"{scheme[0]}…" if scheme else f"a text of {len(hash)} characters"
