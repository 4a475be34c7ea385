"""Reads a stored tree: hashes of its subtrees, roots at any size, and its leaves with their records."""

from __future__ import annotations

import struct
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from ..entities import And, Document, Query, Where
from ..errors import Gone
from ..storage.port import MAX_CHANGES_PAGE, JournalFilter, JournalRow, Store
from .leaf import leaf_of
from .merkle import HASH_BYTES, Range, complete_subtrees, joined, root_of, split
from .trees import TILE, JournalRound, JournalTile, legacy_salt, round_leaf, tile_id

TILES = JournalTile.__collection__.name
ROUNDS = JournalRound.__collection__.name
KEPT_TILES = 64
ROUNDS_PAGE = 256
FIRST_ROWS = 100
PAGE_BYTES = 4 * 1024 * 1024
_BITS = 8


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf: of a record, or (in the platform's tree) of a sealing round."""

    index: int
    hash: bytes
    row: JournalRow | None
    round: Document | None = None


class TreeReader:
    """One tree at a size (None: that of its document). `legacy_secret` is the log's. `use_edge`: take the hashes along
    the right edge from the tree's document, instead of reading the last records; a verification must not."""

    def __init__(
        self, store: Store, tree: Document, legacy_secret: bytes, size: int | None = None, *, use_edge: bool = False
    ) -> None:
        self._store = store
        self._secret = legacy_secret
        self._last: bytes | None = None
        self._tiles: OrderedDict[str, Document | None] = OrderedDict()
        self.id: str = tree["id"]
        self.tenant: str | None = tree["tenant"]
        self.size: int = tree["size"] if size is None else size
        self.first: int = tree["first_index"]
        self._dropped: int = tree["dropped_sequence"]
        self._sequence: int = tree["sequence"]
        self._edge: dict[tuple[int, int], bytes] = {}
        if use_edge:
            hashes = split(tree["frontier"])
            self._edge = dict(zip(complete_subtrees(0, tree["size"]), hashes, strict=False))

    # --- Hashes ---

    async def subtree(self, level: int, number: int) -> bytes:
        """The hash of a complete subtree. Raises Gone if retention dropped what it needs."""
        if (level, number) in self._edge:
            return self._edge[level, number]
        above, inside = divmod(level, _BITS)
        first = number << inside
        if not above and first >= self.size - self.size % TILE:
            hashes = await self._last_hashes()
        else:
            tile = await self._tile(above, first // TILE)
            hashes = tile["hashes"] if tile is not None else b""
        begin = first % TILE * HASH_BYTES
        found = hashes[begin : begin + (HASH_BYTES << inside)]
        if len(found) != HASH_BYTES << inside:
            raise Gone(f"retention dropped the records from index {number << level} on")
        return root_of(split(found))

    async def subtrees(self, begin: int, end: int) -> list[bytes]:
        """The hashes of the complete subtrees that make up a range of a proof. Raises Gone."""
        return [await self.subtree(level, number) for level, number in complete_subtrees(begin, end)]

    async def hashes(self, ranges: list[Range]) -> list[bytes]:
        """The hashes of the ranges of a proof. Raises Gone."""
        return [joined(await self.subtrees(begin, end)) for begin, end in ranges]

    async def root(self, size: int) -> bytes:
        """The root of the first `size` leaves. Raises Gone."""
        return joined(await self.subtrees(0, size))

    async def _tile(self, level: int, number: int) -> Document | None:
        id = tile_id(self.id, level, number)
        if id not in self._tiles:
            self._tiles[id] = await self._store.get(TILES, None, id)
            if len(self._tiles) > KEPT_TILES:
                self._tiles.popitem(last=False)
        return self._tiles[id]

    async def _last_hashes(self) -> bytes:
        """The hashes of the leaves after the last complete tile."""
        if self._last is None:
            begin = self.size - self.size % TILE
            self._last = b"".join([leaf.hash async for leaf in self.leaves(begin)])
        return self._last

    # --- Leaves ---

    async def index_of(self, sequence: int) -> int | None:
        """The index of the record with this sequence; None if it is not sealed."""
        return (await self.indexes_of([sequence])).get(sequence)

    async def indexes_of(self, sequences: Iterable[int]) -> dict[int, int]:
        """The indexes of the records with these sequences, of those that are sealed."""
        found: dict[int, int] = {}
        left = deque(sorted(sequences))
        begin = 0
        while left:
            tile = await self._tile_of(left[0])
            if tile is None or (begin := (tile["number"] + 1) * TILE) > self.size or left[0] > tile["last_sequence"]:
                break
            places = {one: at for at, one in enumerate(_sequences(tile), begin - TILE) if one}
            while left and left[0] <= tile["last_sequence"]:
                if (one := left.popleft()) in places:
                    found[one] = places[one]
        if left and left[0] <= self._sequence:
            wanted = set(left)
            async for leaf in self.leaves(self.size - self.size % TILE):
                if leaf.row is not None and leaf.row[0] in wanted:
                    found[leaf.row[0]] = leaf.index
        return found

    async def _tile_of(self, sequence: int) -> Document | None:
        """The tile of level 0 that has a sequence, if one has it."""
        where = And(Where("tree", "==", self.id), Where("level", "==", 0), Where("first_sequence", "<=", sequence))
        tiles = await self._store.find(TILES, None, Query(where, ("-first_sequence",), limit=1))
        return tiles[0] if tiles else None

    async def leaves(self, begin: int, end: int | None = None) -> AsyncIterator[Leaf]:
        """The leaves from `begin` on, up to `end` (None: the tree's size)."""
        end = self.size if end is None else end
        at = begin - begin % TILE
        before = await self._tile(0, at // TILE - 1) if at else None
        where = JournalFilter(
            tenant=self.tenant,
            platform=self.tenant is None,
            after_sequence=before["last_sequence"] if before is not None else self._dropped or None,
            through_sequence=self._sequence,
        )
        rounds = _RoundReader(self._store, at) if self.tenant is None else None
        cursor, limit = None, FIRST_ROWS
        while at < end:
            page = await self._store.rows(cursor, where, limit=limit)
            found: list[Leaf] = []
            for row in page.rows:
                if rounds is not None:
                    found += [leaf async for leaf in rounds.at(at + len(found), end)]
                if at + len(found) >= end:
                    break
                found.append(Leaf(at + len(found), leaf_of(row := salted(row, self._secret)), row))
            if page.cursor == cursor and rounds is not None:
                found += [leaf async for leaf in rounds.at(at + len(found), end)]
            at += len(found)
            for leaf in found:
                if leaf.index >= begin:
                    yield leaf
            if page.cursor == cursor:
                return
            cursor, limit = page.cursor, _next_limit(limit, page.rows)


def salted(row: JournalRow, legacy_secret: bytes) -> JournalRow:
    """A row as it is sealed: a record that is older than salts gets one."""
    return row if row[12] else (*row[:12], legacy_salt(legacy_secret, row[1]), *row[13:])


def _sequences(tile: Document) -> tuple[int, ...]:
    return struct.unpack(f">{len(tile['sequences']) // 8}Q", tile["sequences"])


def _next_limit(limit: int, rows: Sequence[JournalRow]) -> int:
    """How many rows to read next, so that they have about PAGE_BYTES at most."""
    sizes = [len(row[10] or "") + len(row[11] or "") + 200 for row in rows]
    fitting = PAGE_BYTES * len(sizes) // max(sum(sizes), 1) if sizes else limit
    return max(1, min(4 * limit, fitting, MAX_CHANGES_PAGE))


class _RoundReader:
    """The rounds of the platform's tree, in the order of their leaves."""

    def __init__(self, store: Store, begin: int) -> None:
        self._store = store
        self._next = begin
        self._read: list[Document] | None = None

    async def at(self, index: int, end: int) -> AsyncIterator[Leaf]:
        """The rounds whose leaves stand at `index` and directly after it."""
        while index < end:
            if not self._read:
                if self._read is not None and self._next < 0:
                    return
                query = Query(Where("index", ">=", self._next), ("index",), limit=ROUNDS_PAGE)
                self._read = list(await self._store.find(ROUNDS, None, query))[::-1]
                self._next = self._read[0]["index"] + 1 if len(self._read) == ROUNDS_PAGE else -1
                if not self._read:
                    return
            if self._read[-1]["index"] != index:
                return
            one = self._read.pop()
            yield Leaf(index, round_leaf(one["number"], one["entries"]), None, one)
            index += 1


__all__ = ["Leaf", "TreeReader", "salted"]
