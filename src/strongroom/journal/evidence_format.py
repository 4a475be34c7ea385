"""The evidence pack: a ZIP file of records with proofs, statements and lists, with a signed manifest. Pure: names and
forms.

    manifest.json       the log, the range of times, and each part with its SHA-256
    manifest.note       a signed note over the manifest's hash; without a key it has no signature
    keys.txt            the log's public keys: whoever checks the pack should have them from elsewhere
    records/*.jsonl     an export with proofs for each tree (`export_format`)
    access/*.jsonl      who may do what: keys, users, roles, service accounts
    statements/*.jsonl  retention, legal holds, deletions
"""

from __future__ import annotations

from hashlib import sha256

import msgspec
from msgspec import Struct

FORMAT = 1
MANIFEST = "manifest.json"
NOTE = "manifest.note"
KEYS = "keys.txt"
HEADLINE = "strongroom evidence v1"
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
"""The manifest has a few hundred bytes for each tenant."""


class Part(Struct, frozen=True):
    """A file of the pack. `tenant` and `records` are those of an export."""

    path: str
    sha256: str
    size: int
    tenant: str | None = None
    records: int | None = None


class Manifest(Struct, frozen=True):
    strongroom_evidence: int
    origin: str
    made_at: str
    made_by: str
    since: str | None
    until: str | None
    parts: list[Part]


def signed_text(origin: str, manifest: bytes) -> str:
    """What the log signs of a manifest. It is no checkpoint: its second line is no size."""
    return f"{HEADLINE}\n{origin}\n{sha256(manifest).hexdigest()}\n"


decode_manifest = msgspec.json.Decoder(Manifest).decode


def encoded(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


__all__ = [
    "FORMAT",
    "KEYS",
    "MANIFEST",
    "MAX_MANIFEST_BYTES",
    "NOTE",
    "Manifest",
    "Part",
    "decode_manifest",
    "encoded",
    "signed_text",
]
