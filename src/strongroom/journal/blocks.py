"""What a verification takes of a part of the journal, once its leaves are computed."""

from __future__ import annotations

from msgspec import Struct

from .leaf import Mark


class Note(Struct, frozen=True):
    """A record of a redaction, or of what retention dropped."""

    sequence: int
    id: str
    action: str
    actor: str
    after: str | None


class Part(Struct, frozen=True):
    """The records of one tenant in a block: their sequences (8 bytes each, big-endian) and leaf hashes."""

    tenant: str | None
    sequences: bytes
    leaves: bytes
    redacted: int
    marks: list[tuple[int, Mark | None]] = []
    """Of the redacted records: their sequences, and what they say of it."""
    notes: list[Note] = []
    """What the journal says of itself: redactions, and what retention dropped."""


class Block(Struct, frozen=True):
    """A part of the journal, with the leaf hashes computed."""

    parts: list[Part]
    rows: int


__all__ = ["Block", "Note", "Part"]
