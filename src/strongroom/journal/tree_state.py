"""A tree in memory while its records are sealed: adds leaves, and gives the documents to store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..context import utc_from_us
from ..entities import Document
from ..storage.port import Create, Operation, Patch, Put
from .merkle import Frontier, joined, root_of, split
from .tree_reader import TILES
from .trees import TILE, JournalTree, tile_id, tree_id

TREES = JournalTree.__collection__.name
TILE_BITS = 8
NO_SEQUENCE = 0
"""Stands for a round among the sequences of a tile."""
_SEQUENCE_BYTES = 8
_NEW: Document = {
    "size": 0,
    "sequence": 0,
    "round": 0,
    "previous_size": 0,
    "previous_round": 0,
    "first_index": 0,
    "dropped_sequence": 0,
    "frontier": b"",
    "broken": "",
}


class Disagreement(Exception):
    """The stored records of a tree do not lead to its stored hashes. The text says what is wrong."""


class TreeState:
    """One tree. `add` leaves, commit `operations`, then call `committed`; after a failed commit, forget the state."""

    def __init__(self, tenant: str | None, stored: Document | None = None) -> None:
        self.tenant = tenant
        self.id = tree_id(tenant)
        self.version: int = stored["version"] if stored is not None else 0
        found: dict[str, Any] = stored if stored is not None else _NEW
        self._stored_size: int = found["size"]
        self.size: int = found["size"]
        self.sequence: int = found["sequence"]
        self.round: int = found["round"]
        self.previous_size: int = found["previous_size"]
        self.previous_round: int = found["previous_round"]
        self.first_index: int = found["first_index"]
        self.dropped_sequence: int = found["dropped_sequence"]
        self.broken: str = found["broken"]
        hashes = split(found["frontier"])
        tiles = self.size >> TILE_BITS
        self._above = Frontier(tiles, hashes[: tiles.bit_count()])
        """Of the complete tiles."""
        self._below = Frontier(self.size - (tiles << TILE_BITS), hashes[tiles.bit_count() :])
        """Of the leaves after them."""
        self.leaves = bytearray()
        """The hashes of the leaves after the last complete tile."""
        self.sequences = bytearray()
        self._first_us = self._last_us = 0
        self._upper: dict[int, bytearray] = {}
        """The hashes of the last, incomplete tile of each level above 0."""
        self._new_tiles: list[Operation] = []
        self._new_upper: dict[tuple[int, int], bytes] = {}

    @property
    def extended(self) -> bool:
        """Whether leaves were added that are not committed."""
        return self.size != self._stored_size

    def incomplete_tiles(self) -> list[tuple[int, int]]:
        """The level and number of the stored tiles above level 0 that are not complete: `restore` needs them."""
        found = []
        level, count = 1, self.size >> TILE_BITS
        while count:
            if count % TILE:
                found.append((level, count >> TILE_BITS))
            level, count = level + 1, count >> TILE_BITS
        return found

    def restore(self, leaves: Iterable[tuple[bytes, int, int]], upper: dict[tuple[int, int], bytes]) -> None:
        """Take the leaves after the last complete tile (hash, sequence, time), and the incomplete tiles above level 0.
        Raises Disagreement unless they lead to the stored frontier."""
        expected = self._below
        self._below = Frontier()
        for leaf, sequence, at_us in leaves:
            self._append(leaf, sequence, at_us)
        if self._below.size != expected.size:
            raise Disagreement(f"found {self._below.size} records after its last tile, expected {expected.size}")
        if self._below.hashes != expected.hashes:
            raise Disagreement("the records after its last tile do not lead to its hashes")
        for level, number in self.incomplete_tiles():
            count = (self.size >> (TILE_BITS * level)) % TILE
            hashes = upper.get((level, number), b"")[: count * 32]
            if len(hashes) != count * 32:
                raise Disagreement(f"its tile {number} of level {level} has {len(hashes) // 32} hashes, not {count}")
            self._upper[level] = bytearray(hashes)

    # --- Adding leaves ----------------------------------------------------------------------------------------

    def add(self, leaf: bytes, sequence: int, at_us: int) -> None:
        """Add the next leaf: a record, or with NO_SEQUENCE a round."""
        self._append(leaf, sequence, at_us)
        self.size += 1
        if sequence:
            self.sequence = sequence
        if self._below.size == TILE:
            self._complete()

    def _append(self, leaf: bytes, sequence: int, at_us: int) -> None:
        if not self._below.size:
            self._first_us = self._last_us = at_us
        elif at_us > self._last_us:
            self._last_us = at_us
        elif at_us < self._first_us:
            self._first_us = at_us
        self._below.add(leaf)
        self.leaves += leaf
        self.sequences += sequence.to_bytes(_SEQUENCE_BYTES, "big")

    def _complete(self) -> None:
        """The tile of level 0 is complete: note it, and its root in the tile above, and so on."""
        number = self._above.size
        (root,) = self._below.hashes
        self._new_tiles.append(Create(TILES, tile_id(self.id, 0, number), self._tile(number)))
        self._below = Frontier()
        self.leaves, self.sequences = bytearray(), bytearray()
        self._above.add(root)
        level = 1
        while True:
            tile = self._upper.setdefault(level, bytearray())
            tile += root
            self._new_upper[level, number >> TILE_BITS] = bytes(tile)
            number >>= TILE_BITS
            if len(tile) < TILE * 32:
                return
            root = root_of(split(bytes(tile)))
            self._upper[level] = bytearray()
            level += 1

    def _tile(self, number: int) -> Document:
        sequences = memoryview(self.sequences)
        parts = (sequences[at : at + _SEQUENCE_BYTES] for at in range(0, len(sequences), _SEQUENCE_BYTES))
        return {
            "tree": self.id,
            "level": 0,
            "number": number,
            "hashes": bytes(self.leaves),
            "first_sequence": next((found for one in parts if (found := int.from_bytes(one, "big"))), None),
            "last_sequence": self.sequence,
            "sequences": bytes(self.sequences),
            "first_at": utc_from_us(self._first_us),
            "last_at": utc_from_us(self._last_us),
        }

    def frontier(self) -> Frontier:
        return Frontier(self.size, [*self._above.hashes, *self._below.hashes])

    def root(self) -> bytes:
        return joined([*self._above.hashes, *self._below.hashes])

    def document(self) -> Document:
        return {
            "id": self.id,
            "tenant": self.tenant,
            "size": self.size,
            "sequence": self.sequence,
            "frontier": b"".join([*self._above.hashes, *self._below.hashes]),
            "round": self.round,
            "previous_size": self.previous_size,
            "previous_round": self.previous_round,
            "first_index": self.first_index,
            "dropped_sequence": self.dropped_sequence,
            "broken": self.broken,
        }

    # --- Committing -------------------------------------------------------------------------------------------

    def operations(self, round: int, now_us: int) -> list[Operation]:
        """What stores the added leaves, in the round of this number. The last one is that of the tree itself."""
        if self.round != round:
            self.previous_size, self.previous_round = self._stored_size, self.round
            self.round = round
        upper = [
            Put(TILES, tile_id(self.id, level, number), _upper_tile(self.id, level, number, hashes))
            for (level, number), hashes in self._new_upper.items()
        ]
        document = self.document() | {"sealed_at": utc_from_us(now_us)}
        del document["id"]
        if not self.version:
            return [*self._new_tiles, *upper, Put(TREES, self.id, document, expected=0)]
        return [*self._new_tiles, *upper, Patch(TREES, self.id, document, expected=self.version)]

    def committed(self, version: int) -> None:
        """The operations were committed; the tree's document has this version."""
        self.version = version
        self._stored_size = self.size
        self._new_tiles, self._new_upper = [], {}


def _upper_tile(tree: str, level: int, number: int, hashes: bytes) -> Document:
    return {
        "tree": tree,
        "level": level,
        "number": number,
        "hashes": hashes,
        "first_sequence": None,
        "last_sequence": None,
        "sequences": b"",
        "first_at": None,
        "last_at": None,
    }
