"""The format of exports that prove themselves, version 1: JSON Lines. Pure: lines in and out.

    header    which tree, and which of its leaves: from `first` to before `end`; `before`: the hashes of the complete
              subtrees left of `first`
    record    one a line, each with its leaf hash and with the salts that open its four commitments
    round     in the platform's tree: one for each round of sealing
    closing   `after`: the hashes of the complete subtrees from `end` to the checkpoint's size; the checkpoint; and the
              round proof, which ties a tenant's checkpoint to the platform's

`before`, `after` and `claims` of a record are texts: exactly what was committed to. A file without its last line was
cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from urllib.parse import quote

import msgspec
from msgspec import Struct

from ..storage.port import JournalRow
from .leaf import COMMITTED, NOTHING, committed_actor, head_of, hidden, is_blank, opening_of
from .merkle import leaf_hash, root_from_inclusion
from .signed_note import Checkpoint
from .trees import entry_hash, round_leaf_of_root, tree_id

FORMAT = 1
MAX_LINE_BYTES = 32 * 1024 * 1024
"""A record has two documents of at most a megabyte, and escaping makes a character six."""


class Header(Struct, frozen=True, tag_field="kind", tag="header"):
    strongroom_audit: int
    log: str
    origin: str
    tenant: str | None
    first: int
    end: int
    size: int
    before: list[bytes]


class ExportedRecord(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="record"):
    """A record and what opens its leaf. `salts`: in the order of `leaf.COMMITTED`; null for a redacted field, whose
    commitment is in `commitments` instead."""

    index: int
    id: str
    tenant: str | None
    at_us: int
    request_id: str
    action: str
    collection: str
    rules: str | None
    actor: str
    claims: str | None
    entity_id: str
    before: str | None
    after: str | None
    leaf: bytes
    salts: tuple[bytes | None, bytes | None, bytes | None, bytes | None]
    commitments: tuple[bytes | None, bytes | None, bytes | None, bytes | None] | None = None

    def leaf_hash(self) -> bytes:
        """The leaf hash that the fields lead to. Raises ValueError for a field that is neither open nor redacted."""
        head = head_of(self.id, self.tenant, self.at_us, self.request_id, self.action, self.collection, self.rules)
        who, what = committed_actor(self.actor, self.claims), self.entity_id.encode()
        before = None if self.before is None else self.before.encode()
        after = None if self.after is None else self.after.encode()
        if self.commitments is not None:
            if not is_blank(self.redacted, self.actor, self.claims, self.entity_id, self.before, self.after):
                raise ValueError("it has a value in the place of a redacted one")
            values = (who, what, before, after)
            return leaf_hash(head + b"".join(self._commitment(number, value) for number, value in enumerate(values)))
        one, two, three, four = self.salts
        if one is None or two is None or three is None or four is None:
            raise ValueError("a salt is missing, and there is no commitment")
        if not len(one) == len(two) == len(three) == len(four) == _SALT:  # else bytes could move into the value
            raise ValueError(f"a salt has not {_SALT} bytes")
        return sha256(
            b"\x00"
            + head
            + sha256(one + who).digest()
            + sha256(two + what).digest()
            + (NOTHING if before is None else sha256(three + before).digest())
            + (NOTHING if after is None else sha256(four + after).digest())
        ).digest()

    def _commitment(self, number: int, value: bytes | None) -> bytes:
        salt, commitment = self.salts[number], self.commitments[number] if self.commitments is not None else None
        if salt is not None and len(salt) == _SALT:
            return NOTHING if value is None else sha256(salt + value).digest()
        if salt is not None or commitment is None or len(commitment) != len(NOTHING):
            raise ValueError(f"{COMMITTED[number]} has neither a salt of {_SALT} bytes nor a commitment of 32")
        return commitment

    @property
    def redacted(self) -> tuple[str, ...]:
        return tuple(name for name, salt in zip(COMMITTED, self.salts, strict=True) if salt is None)


_SALT = 16


class ExportedRound(Struct, frozen=True, tag_field="kind", tag="round"):
    """A leaf of the platform's tree that is no record: a round of sealing, with the number of trees that it extended
    and the root over their new roots."""

    index: int
    number: int
    count: int
    root: bytes
    leaf: bytes

    def leaf_hash(self) -> bytes:
        return round_leaf_of_root(self.number, self.count, self.root)


Line = ExportedRecord | ExportedRound


class RoundProof(Struct, frozen=True):
    """A tenant's tree is an entry (`[tree, size, root]`) of a sealing round with `count` entries; the round is the leaf
    `index` of the platform's tree, whose root is in the platform's checkpoint. `path` proves the one, `proof` the
    other."""

    number: int
    count: int
    entry: tuple[str, int, str]
    entry_index: int
    path: list[bytes]
    index: int
    proof: list[bytes]
    checkpoint: str

    def fits(self, tree: Checkpoint, tenant: str | None, platform: Checkpoint) -> bool:
        """Whether it ties a tree's checkpoint to the platform's. Raises ValueError for an impossible proof."""
        root = root_from_inclusion(self.entry_index, self.count, entry_hash(self.entry), self.path)
        leaf = round_leaf_of_root(self.number, self.count, root)
        sealed = root_from_inclusion(self.index, platform.size, leaf, self.proof)
        return self.entry == (tree_id(tenant), tree.size, tree.root.hex()) and sealed == platform.root


class Closing(Struct, frozen=True, tag_field="kind", tag="closing"):
    count: int
    after: list[bytes]
    checkpoint: str
    round: RoundProof | None = None


def tree_origin(log: str, tenant: str | None) -> str:
    """The origin in the checkpoints of a tenant's tree, or of the platform's."""
    return log if tenant is None else f"{log}/tenants/{quote(tenant, safe='')}"


def exported(row: JournalRow, index: int, leaf: bytes) -> ExportedRecord:
    """A journal row as it is exported; its salt must not be empty. Hashes of API keys are replaced by their
    commitments, as in the leaf."""
    _, id, tenant, at_us, actor, request_id, action, collection, entity_id, *_, salt, claims, rules = row
    before, after = hidden(row)
    opening = opening_of(salt)
    salts, commitments = opening.salts, opening.commitments
    return ExportedRecord(
        index, id, tenant, at_us, request_id, action, collection, rules, actor, claims, entity_id, before, after, leaf,
        (salts[0], salts[1], salts[2], salts[3]),
        None if not opening.redacted else (commitments[0], commitments[1], commitments[2], commitments[3]),
    )  # fmt: skip


_encoder = msgspec.json.Encoder()
_encode = _encoder.encode


def line_of(part: Header | Line | Closing) -> bytes:
    return _encode(part) + b"\n"


decode_header = msgspec.json.Decoder(Header).decode
decode_closing = msgspec.json.Decoder(Closing).decode
_decode_lines = msgspec.json.Decoder(Line).decode_lines


def lines_of(block: bytes) -> Sequence[Line]:
    """The records and rounds of whole lines. Raises msgspec.DecodeError, RecursionError."""
    return _decode_lines(block)


def is_exact(block: bytes, lines: Sequence[Line]) -> bool:
    """Whether a block has these lines as `line_of` writes them: a name that stands twice, or one more, could tell
    another reader something else."""
    return block == _encoder.encode_lines(lines)


__all__ = [
    "FORMAT",
    "MAX_LINE_BYTES",
    "Closing",
    "ExportedRecord",
    "ExportedRound",
    "Header",
    "Line",
    "RoundProof",
    "decode_closing",
    "decode_header",
    "exported",
    "is_exact",
    "line_of",
    "lines_of",
    "tree_origin",
]
