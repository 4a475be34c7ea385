"""What is stored of the journal's Merkle trees: their sizes and right edges, their tiles, and the rounds of sealing.

A tree belongs to one tenant, or to the platform. The tree of the platform has, besides the platform's own records,
one record for each round of sealing: its root covers the new roots of all other trees, so a signature on it covers
everything.
"""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256

from ..entities import Entity, Index

TILE = 256
"""The hashes in a complete tile. A tile of level 0 has leaf hashes, one of level n the roots of tiles of level n-1."""
PLATFORM = "platform"
"""The id of the platform's tree."""
SEAL = "seal"
"""The action of the record that each round adds to the platform's journal."""
JOURNAL = "journal"
"""The collection that records about the journal itself name: seals, redactions, retention."""


def tree_id(tenant: str | None) -> str:
    """The id of a tenant's tree, or of the platform's."""
    return PLATFORM if tenant is None else "t" + sha256(tenant.encode()).hexdigest()[:40]


def tile_id(tree: str, level: int, number: int) -> str:
    return f"{tree}-{level}-{number:010d}"


class JournalTree(
    Entity, collection="journal_trees", scope="global", journalled=False, indexes=[Index("round"), Index("tenant")]
):
    """One tree. The id is `tree_id(tenant)`.

    `size`: the sealed records. `sequence`: that of the last one. `frontier`: the hashes of the complete subtrees along
    the right edge (`merkle.Frontier`). `round`: the last round that sealed records of it; the tree's root at `size`
    is covered by that round once the log has reached it. `first_index`: the first leaf whose record retention has
    not dropped (a multiple of TILE). `sealed_at`: the time of the last round of this tree.
    """

    tenant: str | None = None
    size: int = 0
    sequence: int = 0
    frontier: bytes = b""
    round: int = 0
    first_index: int = 0
    sealed_at: datetime | None = None


class JournalTile(
    Entity,
    collection="journal_tiles",
    scope="global",
    journalled=False,
    indexes=[Index("tree", "level", "number"), Index("tree", "level", "first_sequence")],
):
    """A tile: up to TILE hashes of one level of a tree. The id is `tile_id(tree, level, number)`.

    A tile of level 0 is written once, complete. One of a higher level is written anew whenever a tile below it is
    complete. `first_sequence`, `sequences` (8 bytes each, big-endian), `first_at` and `last_at` are those of the
    records of a tile of level 0, on this store. Retention removes tiles of level 0 with their records.
    """

    tree: str
    level: int
    number: int
    hashes: bytes
    first_sequence: int | None = None
    sequences: bytes = b""
    first_at: datetime | None = None
    last_at: datetime | None = None


class JournalRound(Entity, collection="journal_rounds", scope="global", journalled=False):
    """A round of sealing: which trees it extended. The id is its number with ten digits.

    `entries` is the JSON text of `[[tree, size, root in hex], …]` in the order of the tree ids; their leaf hashes make
    a Merkle tree whose root is in the round's record. `sequence` is that of the round's record.
    """

    entries: str
    record_id: str


class JournalLog(Entity, collection="journal_log", scope="global", journalled=False):
    """The log as a whole; one document, LOG. `origin` names it in checkpoints, on every store it moves to.

    `round`: the last finished round. `cursor`: the journal is sealed up to there. `checkpoint`: the signed note of the
    platform's tree after that round, unsigned without a key. `legacy_secret`: gives salts to records older than
    sealing.
    """

    origin: str
    round: int = 0
    cursor: str | None = None
    checkpoint: str = ""
    checkpoint_size: int = 0
    legacy_secret: bytes = b""


LOG = "log"
TREE_ENTITIES: tuple[type[Entity], ...] = (JournalTree, JournalTile, JournalRound, JournalLog)


def legacy_salt(secret: bytes, record_id: str) -> bytes:
    """The salt of a record that was written before records had salts."""
    return sha256(secret + record_id.encode()).digest()[:16]


__all__ = [
    "JOURNAL",
    "LOG",
    "PLATFORM",
    "SEAL",
    "TILE",
    "TREE_ENTITIES",
    "JournalLog",
    "JournalRound",
    "JournalTile",
    "JournalTree",
    "legacy_salt",
    "tile_id",
    "tree_id",
]
