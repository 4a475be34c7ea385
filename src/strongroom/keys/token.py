"""The secret of an API key: generated, recognised, masked. Pure.

    sr_SR1k3Jx…43 random characters…Qa0dK2x
    │  │  │                          └ checksum: CRC-32 of everything before it, 6 characters of base62
    │  │  └ 43 characters of base62: 256 bits of randomness
    │  └ the mark and format version, in every key whatever its prefix
    └ a prefix of the issuer's choice

A secret with the mark and another form (mistyped, truncated) is refused without a read. Secret scanners find keys by
SCAN_PATTERN, and the checksum tells a real key.
"""

from __future__ import annotations

import re
import secrets
import zlib

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MARK = "SR1"
DEFAULT_PREFIX = "sr"
RANDOM_CHARS = 43
CHECKSUM_CHARS = 6
PREFIX_PATTERN = r"^[a-z][a-z0-9]*(?:_[a-z0-9]+)*$"
MAX_PREFIX_CHARS = 24
MAX_KEY_CHARS = 512
"""A longer text is not a key, not even an imported one."""
SCAN_PATTERN = r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)*_SR1[0-9A-Za-z]{49}\b"
_KEY = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*_SR1[0-9A-Za-z]{49}")
_MARKED = re.compile(r"[a-z][a-z0-9_]*_SR1")


def generate(prefix: str = DEFAULT_PREFIX) -> str:
    """A new secret. `prefix` matches PREFIX_PATTERN."""
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
    """Whether a text can be a key: generated here with the right checksum, or perhaps imported."""
    if not 1 <= len(text) <= MAX_KEY_CHARS:
        return False
    if _MARKED.match(text) is None:
        return text.isprintable()
    return _KEY.fullmatch(text) is not None and checksum(text[:-CHECKSUM_CHARS]) == text[-CHECKSUM_CHARS:]


def masked(text: str) -> str:
    """A secret as it may be shown: its owner recognises it, and nobody can use it."""
    if _KEY.fullmatch(text):
        prefix, _, rest = text.rpartition("_")
        return f"{prefix}_{rest[:7]}…{text[-4:]}"
    shown = min(4, len(text) // 8)
    return f"{text[:shown]}…{text[-shown:] if shown else ''}"
