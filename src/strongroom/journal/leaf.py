"""The leaf of a journal record: its canonical encoding, version 1, with salted commitments to what may be
redacted. Pure.

The content of a leaf is

    "strongroom/1\n"
    netstrings of: id, tenant, at_us, request_id, action, collection, rules
    four commitments of 32 bytes: actor, entity_id, before, after

A netstring is the length in bytes as a decimal number, `:`, the UTF-8 bytes, `,`; null is the empty netstring. Nothing
in it depends on the store: neither the sequence nor the version. A commitment is SHA-256 over a salt of 16 bytes and
the value: the text of `entity_id`; the tagged JSON text of `before` and `after`; for the actor a netstring of its name
and one of the claims' JSON text. A value that is null has 32 zero bytes instead.

The four salts are the SHA-512 of the record's salt, cut into four. Who redacts a value drops its salt and keeps its
commitment, so the leaf stays as it was, and nobody can find the value by guessing.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256, sha512
from typing import Any

from ..context import SALT_BYTES
from ..storage import tagged_json
from ..storage.port import JournalRow

VERSION = "strongroom/1"
NOTHING = bytes(32)
"""The commitment to a value that is null."""
COMMITTED = ("actor", "entity_id", "before", "after")
"""The fields in the order of their commitments. The claims are committed with the actor."""
HIDDEN = {"api_keys": ("hash", "previous_hash")}
"""Fields whose values enter a leaf by a commitment of their own: an imported hash may have no pepper, so a weak secret
could be guessed from it by a reader of the audit trail."""
_MARK = {"by", "reason", "at", "record"}
_REDACTED = b"\x01"
_SLOT = 32
REDACTED_BYTES = 2 + 5 * _SLOT
"""The length of the salt of a redacted record: a version, flags (bit n: field n of COMMITTED is redacted), then for
each field its salt, or its commitment if it is redacted, then the salt of hidden fields, each in 32 bytes."""


def leaf_of(row: JournalRow) -> bytes:
    """The leaf hash of a record. Raises ValueError if its salt has an impossible form."""
    _, id, tenant, at_us, actor, request_id, action, collection, entity_id, _, before, after, salt, claims, rules = row
    head = head_of(id, tenant, at_us, request_id, action, collection, rules)
    if collection in HIDDEN:
        before, after = hidden(row)
    if len(salt) != SALT_BYTES:
        return sha256(b"\x00" + head + b"".join(_opened(salt, actor, claims, entity_id, before, after))).digest()
    salts = sha512(salt).digest()
    who = committed_actor(actor, claims)
    return sha256(
        b"\x00"
        + head
        + sha256(salts[:16] + who).digest()
        + sha256(salts[16:32] + entity_id.encode()).digest()
        + (NOTHING if before is None else sha256(salts[32:48] + before.encode()).digest())
        + (NOTHING if after is None else sha256(salts[48:] + after.encode()).digest())
    ).digest()


def head_of(
    id: str, tenant: str | None, at_us: int, request_id: str, action: str, collection: str, rules: str | None
) -> bytes:
    """The beginning of a leaf's content: what is never redacted."""
    text = (
        f"{VERSION}\n{len(id)}:{id},{len(tenant or '')}:{tenant or ''},{len(at := str(at_us))}:{at},"
        f"{len(request_id)}:{request_id},{len(action)}:{action},{len(collection)}:{collection},"
        f"{len(rules or '')}:{rules or ''},"
    )
    if not text.isascii():
        text = _netstrings(id, tenant, str(at_us), request_id, action, collection, rules)
    return text.encode()


def _netstring(text: str) -> str:
    return f"{len(text.encode())}:{text},"


def _netstrings(*texts: str | None) -> str:
    return VERSION + "\n" + "".join(_netstring(text or "") for text in texts)


def committed_actor(actor: str, claims: str | None) -> bytes:
    """What a record commits to as its actor: the name, and the claims' text."""
    if claims is None and actor.isascii():
        return f"{len(actor)}:{actor},0:,".encode()
    return (_netstring(actor) + _netstring(claims or "")).encode()


# --- Salts and redaction --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opening:
    """What opens a record's commitments: of each field of COMMITTED its salt, or its commitment if it is redacted."""

    salts: tuple[bytes | None, ...]
    commitments: tuple[bytes | None, ...]
    hidden: bytes

    @property
    def redacted(self) -> tuple[str, ...]:
        """The redacted fields."""
        return tuple(name for name, salt in zip(COMMITTED, self.salts, strict=True) if salt is None)

    def to_bytes(self) -> bytes:
        """The salt of a redacted record."""
        flags = sum(1 << n for n, salt in enumerate(self.salts) if salt is None)
        slots = [
            (salt.ljust(_SLOT, b"\0") if salt is not None else commitment or NOTHING)
            for salt, commitment in zip(self.salts, self.commitments, strict=True)
        ]
        return _REDACTED + bytes([flags]) + b"".join(slots) + self.hidden


def opening_of(salt: bytes) -> Opening:
    """What a record's salt opens. Raises ValueError for a salt of an impossible form."""
    if len(salt) == SALT_BYTES:
        salts = sha512(salt).digest()
        parts: tuple[bytes | None, ...] = tuple(salts[at : at + 16] for at in range(0, 64, 16))
        return Opening(parts, (None,) * 4, sha256(salt + b"hidden").digest())
    if len(salt) != REDACTED_BYTES or salt[:1] != _REDACTED:
        raise ValueError(f"found a salt of {len(salt)} bytes, expected {SALT_BYTES} or {REDACTED_BYTES}")
    slots = [salt[at : at + _SLOT] for at in range(2, REDACTED_BYTES, _SLOT)]
    gone = [bool(salt[1] >> n & 1) for n in range(4)]
    return Opening(
        tuple(None if gone[n] else slots[n][:SALT_BYTES] for n in range(4)),
        tuple(slots[n] if gone[n] else None for n in range(4)),
        slots[4],
    )


def commitments_of(row: JournalRow) -> list[bytes]:
    """The four commitments of a record, in the order of COMMITTED."""
    before, after = hidden(row) if row[7] in HIDDEN else row[10:12]
    return _opened(row[12], row[4], row[13], row[8], before, after)


def _opened(
    salt: bytes, actor: str, claims: str | None, entity_id: str, before: str | None, after: str | None
) -> list[bytes]:
    opening = opening_of(salt)
    values: list[bytes | None] = [
        committed_actor(actor, claims),
        entity_id.encode(),
        None if before is None else before.encode(),
        None if after is None else after.encode(),
    ]
    found = []
    for value, part, commitment in zip(values, opening.salts, opening.commitments, strict=True):
        if part is None:
            found.append(commitment or NOTHING)
        else:
            found.append(NOTHING if value is None else sha256(part + value).digest())
    return found


def hidden(row: JournalRow) -> tuple[str | None, str | None]:
    """`before` and `after` as they enter the leaf, and as auditors see them: hidden values by their commitments."""
    names, key = HIDDEN.get(row[7], ()), opening_of(row[12]).hidden
    return _hidden(row[10], names, key), _hidden(row[11], names, key)


def _hidden(text: str | None, names: tuple[str, ...], key: bytes) -> str | None:
    if text is None or not any(f'"{name}"' in text for name in names):
        return text
    fields: dict[str, Any] = tagged_json.loads(text)
    for name in names:
        if fields.get(name) is not None:
            value = tagged_json.quick_dumps(fields[name])
            fields[name] = f"sha256:{sha256(key + value.encode()).hexdigest()}"
    return tagged_json.quick_dumps(fields)


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands in `after` once it is redacted. `record`: the id of the journal's record about it."""

    by: str
    reason: str
    record: str


def mark_of(after: str | None) -> Mark | None:
    """The mark of a redaction; None if the text is anything else."""
    try:
        found = json.loads(after or "null")
    except (ValueError, RecursionError):
        return None
    mark = found.get("redacted") if isinstance(found, dict) and len(found) == 1 else None
    if not isinstance(mark, dict) or mark.keys() != _MARK or not all(isinstance(one, str) for one in mark.values()):
        return None
    return Mark(mark["by"], mark["reason"], mark["record"])


def is_blank(
    redacted: Collection[str], actor: str, claims: str | None, entity_id: str, before: str | None, after: str | None
) -> bool:
    """Whether a record has nothing in the place of its redacted fields, where any text would lead to the same leaf."""
    return not (
        ("actor" in redacted and (actor or claims is not None))
        or ("entity_id" in redacted and entity_id)
        or ("before" in redacted and before is not None)
        or ("after" in redacted and mark_of(after) is None)
    )


def redacted_salt(row: JournalRow, fields: frozenset[str]) -> bytes:
    """The salt of a record once these fields of COMMITTED are redacted: their commitments stay, their salts go."""
    opening, commitments = opening_of(row[12]), commitments_of(row)
    salts = tuple(None if name in fields else salt for name, salt in zip(COMMITTED, opening.salts, strict=True))
    kept = tuple(commitment if salt is None else None for salt, commitment in zip(salts, commitments, strict=True))
    hidden_salt = NOTHING if {"before", "after"} <= fields else opening.hidden
    return Opening(salts, kept, hidden_salt).to_bytes()


__all__ = [
    "COMMITTED",
    "HIDDEN",
    "NOTHING",
    "REDACTED_BYTES",
    "VERSION",
    "Mark",
    "Opening",
    "commitments_of",
    "committed_actor",
    "head_of",
    "hidden",
    "is_blank",
    "leaf_of",
    "mark_of",
    "opening_of",
    "redacted_salt",
]
