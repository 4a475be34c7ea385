"""The stored documents of the journal's Merkle trees: sizes and right edges, tiles, and the rounds of sealing.

A tree belongs to one tenant, or to the platform. Its leaves are its records in the order of their sequence. The
platform's tree has, between its own records, one leaf for each round of sealing: it covers the new roots of all other
trees, so a signature on the platform's tree covers everything. A round is no record: no reader of the change feed or of
the audit trail would want one more for each change.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256

from ..entities import Entity, Index
from .merkle import leaf_hash, root_of

TILE = 256
"""The hashes in a complete tile. A tile of level 0 has leaf hashes, one of level n the roots of tiles of level n-1."""
PLATFORM = "platform"
"""The id of the platform's tree."""
JOURNAL = "journal"
"""The collection that records about the journal itself name: redactions, retention, new keys."""
REDACT = "redact"
"""The action of the record that says that records were redacted."""
DROP = "drop"
"""The action of the record that says that retention dropped records."""
ROUND_VERSION = "strongroom-round/1"


@functools.lru_cache(maxsize=10_000)
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
    the right edge (`merkle.Frontier`). `round`: the last round that extended the tree; the tree's root at `size` is
    covered by that round once the log has reached it. Until then (in the middle of a round) `previous_size` and
    `previous_round` count: what the tree was after the round before. `first_index`: the first leaf whose record
    retention has not dropped (a multiple of TILE). `dropped_sequence`: that of the last record before it, on this
    store; readers skip records up to it, which may still be there for a moment. `sealed_at`: the time of the last round
    of this tree. `broken`: why it is not extended any more: its stored records do not agree with it.
    """

    tenant: str | None = None
    size: int = 0
    sequence: int = 0
    frontier: bytes = b""
    round: int = 0
    previous_size: int = 0
    previous_round: int = 0
    first_index: int = 0
    dropped_sequence: int = 0
    sealed_at: datetime | None = None
    broken: str = ""


class JournalTile(
    Entity,
    collection="journal_tiles",
    scope="global",
    journalled=False,
    indexes=[Index("tree", "level", "number"), Index("tree", "level", "first_sequence")],
):
    """A tile: up to TILE hashes of one level of a tree. The id is `tile_id(tree, level, number)`.

    A tile of level 0 is written once, complete. One of a higher level is written anew whenever a tile below it is
    complete. `sequences` (8 bytes each, big-endian; 0 for a round), `first_at` and `last_at` are those of the leaves of
    a tile of level 0, on this store. `first_sequence` is that of its first record; None if it has rounds only.
    `last_sequence` is that of the last record of the tree up to the end of the tile.
    Retention removes tiles of level 0 with their records.
    """

    tree: str
    level: int
    number: int
    hashes: bytes
    first_sequence: int | None = None
    last_sequence: int | None = None
    sequences: bytes = b""
    first_at: datetime | None = None
    last_at: datetime | None = None


class JournalRound(Entity, collection="journal_rounds", scope="global", journalled=False, indexes=[Index("index")]):
    """A round of sealing: which trees it extended. The id is `round_id(number)`.

    `entries` is the JSON text of `[[tree, size, root in hex], …]` of the tenants' trees, in the order of the tree ids.
    `index` is the leaf of the round in the platform's tree: `round_leaf(number, entries)`.
    """

    number: int
    index: int
    entries: str
    sealed_at: datetime


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
Entry = tuple[str, int, str]
"""A tree, its size, and its root in hex."""
TREE_ENTITIES: tuple[type[Entity], ...] = (JournalTree, JournalTile, JournalRound, JournalLog)


def round_id(number: int) -> str:
    return f"{number:010d}"


def entry_hash(entry: Sequence[str | int]) -> bytes:
    """The leaf of a tree in the small tree of its round."""
    return leaf_hash(json.dumps(list(entry), separators=(",", ":")).encode())


def round_leaf(number: int, entries: str) -> bytes:
    """The leaf of a round in the platform's tree, from its entries as they are stored. Raises ValueError if these are
    not in the form of `JournalRound.entries`."""
    found = json.loads(entries)
    if not isinstance(found, list) or not all(isinstance(entry, list) for entry in found):
        raise ValueError("found no list of entries in a round")
    return round_leaf_of_root(number, len(found), root_of(entry_hash(entry) for entry in found))


def new_round(number: int, entries: Sequence[Entry]) -> tuple[str, bytes]:
    """The text of a new round's entries, and its leaf: `round_leaf` of that text."""
    texts = [f'["{tree}",{size},"{root}"]' for tree, size, root in entries]
    root = root_of(leaf_hash(text.encode()) for text in texts)
    return f"[{','.join(texts)}]", round_leaf_of_root(number, len(entries), root)


def round_leaf_of_root(number: int, count: int, root: bytes) -> bytes:
    """The same from the number of entries and the root of the round's small tree."""
    return leaf_hash(f"{ROUND_VERSION}\n{number}\n{count}\n{root.hex()}\n".encode())


def legacy_salt(secret: bytes, record_id: str) -> bytes:
    """The salt of a record that was written before records had salts."""
    return sha256(secret + record_id.encode()).digest()[:16]


__all__ = [
    "DROP",
    "JOURNAL",
    "LOG",
    "PLATFORM",
    "REDACT",
    "TILE",
    "TREE_ENTITIES",
    "Entry",
    "JournalLog",
    "JournalRound",
    "JournalTile",
    "JournalTree",
    "entry_hash",
    "legacy_salt",
    "new_round",
    "round_id",
    "round_leaf",
    "round_leaf_of_root",
    "tile_id",
    "tree_id",
]
