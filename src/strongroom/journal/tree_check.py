"""Compares one tree with its records: tile by tile, then its right edge, its last round and a saved checkpoint. It
reports the first leaf that differs, and why."""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Sequence

from ..entities import MAX_LIMIT, And, Document, Query, Where
from ..errors import Gone
from ..storage.port import JournalFilter, Store
from .blocks import Part
from .findings import Kind, Report, TreeReport
from .leaf import Mark
from .merkle import HASH_BYTES, Frontier, complete_subtrees, root_of, split
from .signed_note import Checkpoint
from .tree_reader import TreeReader
from .trees import DROP, TILE, JournalRound, JournalTile, round_id, tile_id, tree_id

TILES = JournalTile.__collection__.name
ROUNDS = JournalRound.__collection__.name
MAX_SEARCHED_ROUNDS = 20_000
"""Rounds that are searched for the one in which a tree first differs."""
MAX_EXCHANGED = 64
"""Records that were sealed together, of which each pair is tried to find two that were exchanged."""
KEPT_ROUNDS = 64
TILE_BYTES = TILE * HASH_BYTES
SEQUENCE_BYTES = 8
_BITS = 8


class TreeCheck:
    """A tree, as far as its records were read."""

    def __init__(self, store: Store, document: Document, legacy_secret: bytes, report: Report, ahead: int) -> None:
        self._store = store
        self._document = document
        self._secret = legacy_secret
        self._report = report
        self._ahead = ahead
        self.id: str = document["id"]
        self.tenant: str | None = document["tenant"]
        self.size: int = document["size"]
        self.sequence: int = document["sequence"]
        self.first: int = document["first_index"]
        self.dropped: int = document["dropped_sequence"]
        """Retention has dropped the records up to this sequence, or is about to."""
        self.logged = (document["size"], document["round"])
        self.previous = (document["previous_size"], document["previous_round"])
        self._edge: bytes = document["frontier"]
        self.bad = False
        self.seen = 0
        """The sequence of the last record that was added."""
        self.result = TreeReport(self.tenant, self.size, self.first, self.first)
        self._frontier = Frontier()
        """Of the complete tiles; `_leaves` and `_sequences` are those of the leaves after them."""
        self._leaves = bytearray()
        self._sequences = bytearray()
        self._upper: dict[int, bytearray] = {}
        self._tiles: dict[int, Document] = {}
        self._upper_damaged = False
        self._redactions: dict[str, tuple[str, str, int]] = {}
        """The journal's records of redactions: who, why, and of how many records."""
        self._marked: dict[Mark | None, tuple[int, int]] = {}
        """What redacted records say of it: how many say it, and the sequence of the first."""
        self._drops: set[int] = set()
        """The first indexes that the journal's records of retention name."""

    @property
    def position(self) -> int:
        return self._frontier.size + len(self._leaves) // HASH_BYTES

    def note(self, part: Part) -> None:
        """Keep what redacted records say of it, and what the journal says of redactions and of retention."""
        for sequence, mark in part.marks:
            if self.dropped < sequence <= self.sequence:
                count, first = self._marked.get(mark, (0, sequence))
                self._marked[mark] = count + 1, first
        for note in part.notes:
            try:
                after = json.loads(note.after or "null")
                if note.action == DROP:
                    self._drops.add(after["end"])
                else:
                    self._redactions[note.id] = note.actor, after["reason"], int(after["records"])
            except (ValueError, TypeError, LookupError, RecursionError):
                continue  # an impossible one says nothing; its leaf tells that it was changed

    def found(self, kind: Kind, message: str, index: int | None = None) -> None:
        self.bad = True
        self._report.found(self.tenant, kind, message, index)

    async def begin(self) -> None:
        """Take the hashes left of the first record that retention left."""
        if self._document["broken"]:
            whose = "the platform" if self.tenant is None else f"tenant {self.tenant!r}"
            self._report.note(f"records of {whose} are not sealed any more: {self._document['broken']}")
        if self.id != tree_id(self.tenant):
            self.found("damaged", f"the stored tree {self.id} names a tenant that is not its own")
            return
        if len(self._edge) != self.size.bit_count() * HASH_BYTES:
            self.found("damaged", "what is stored of the tree contradicts itself: its size and its right edge")
            return
        if self.first % TILE or not 0 <= self.first <= self.size:
            self.found("damaged", f"the stored first index of the tree is {self.first}, expected that of a tile")
            return
        level = 1
        while count := self.first >> (_BITS * level):
            wanted = count % TILE * HASH_BYTES
            tile = await self._store.get(TILES, None, tile_id(self.id, level, count // TILE)) if wanted else None
            hashes = (tile["hashes"] if tile is not None else b"")[:wanted]
            if len(hashes) != wanted:
                self.found("damaged", f"the tile {count // TILE} of level {level} is missing or too short")
                return
            self._upper[level] = bytearray(hashes)
            level += 1
        for level, number in complete_subtrees(0, self.first):
            above, inside = divmod(level, _BITS)
            begin = (number << inside) % TILE * HASH_BYTES
            hashes = bytes(self._upper[above][begin : begin + (HASH_BYTES << inside)])
            self._frontier.add_subtree(level, root_of(split(hashes)))

    async def add(self, sequences: bytes, leaves: bytes) -> None:
        """Add the next leaves, and compare each tile that they complete."""
        at = 0
        while at < len(leaves) and not self.bad:
            taken = min(TILE_BYTES - len(self._leaves), len(leaves) - at)
            self._leaves += leaves[at : at + taken]
            self._sequences += sequences[at // 4 : (at + taken) // 4]
            at += taken
            if len(self._leaves) == TILE_BYTES:
                await self._complete()

    async def _complete(self) -> None:
        number = self._frontier.size // TILE
        tile = await self._tile(number)
        hashes, sequences = bytes(self._leaves), bytes(self._sequences)
        root = root_of(split(hashes))
        if tile is None and number < self.size // TILE:
            self.found("damaged", f"the stored tile {number} of level 0 is missing")
        elif tile is None or tile["hashes"] != hashes or tile["sequences"] != sequences:
            await self._differs(number, tile, hashes, sequences, root)
        if self.bad:
            return
        self._leaves, self._sequences = bytearray(), bytearray()
        self._frontier.add_subtree(_BITS, root)
        level = 1
        while True:
            above = self._upper.setdefault(level, bytearray())
            above += root
            if len(above) < TILE_BYTES:
                return
            number //= TILE
            await self._compare_upper(level, number, bytes(above))
            root, self._upper[level] = root_of(split(bytes(above))), bytearray()
            level += 1

    async def _tile(self, number: int) -> Document | None:
        """A stored tile of level 0. Those after it are read with it."""
        if number not in self._tiles:
            where = And(Where("tree", "==", self.id), Where("level", "==", 0), Where("number", ">=", number))
            query = Query(where, ("number",), limit=self._ahead)
            self._tiles = {tile["number"]: tile for tile in await self._store.find(TILES, None, query)}
        return self._tiles.pop(number, None)

    async def _compare_upper(self, level: int, number: int, hashes: bytes) -> None:
        stored = await self._store.get(TILES, None, tile_id(self.id, level, number))
        found = stored["hashes"] if stored is not None else b""
        if found.startswith(hashes) or self._upper_damaged:  # sealing may have added others meanwhile
            return
        self._upper_damaged = True  # one sentence is enough
        pairs = zip(split(found[: len(found) // HASH_BYTES * HASH_BYTES]), split(hashes), strict=False)
        place = next((n for n, (one, other) in enumerate(pairs) if one != other), 0)
        covered = 1 << (_BITS * level)
        begin = (number * TILE + place) * covered
        message = (
            f"the stored hash above the records {begin} to {begin + covered - 1} was changed; the records are whole"
        )
        self._report.found(self.tenant, "damaged", message)

    # --- What is wrong ---

    async def _differs(self, number: int, tile: Document | None, hashes: bytes, sequences: bytes, root: bytes) -> None:
        """Report the first leaf of a tile that differs from the stored hashes. `tile` is None behind the tree's end."""
        if tile is None:
            await self._wrong_size()
        elif not await self._is_above(number, root):
            self._first_difference(number, tile, hashes, sequences)
        else:
            where = f"the records {number * TILE} to {(number + 1) * TILE - 1} are whole"
            self.found("damaged", f"the stored tile {number} of level 0 was changed; {where}")

    def _first_difference(self, number: int, tile: Document, hashes: bytes, sequences: bytes) -> None:
        """Report the first of these leaves that is not in its place in the stored tile; nothing, if all are."""
        begin = number * TILE
        if len(tile["hashes"]) != TILE_BYTES or len(tile["sequences"]) != TILE * SEQUENCE_BYTES:
            self.found("damaged", f"the stored tile {number} of level 0 has another length")
            return
        found, stored = split(hashes), split(tile["hashes"])
        found_at, stored_at = numbers(sequences), numbers(tile["sequences"])
        for at in range(len(found)):
            if (found[at], found_at[at]) != (stored[at], stored_at[at]):
                self.found(*_difference(found, stored, found_at, stored_at, at, begin), begin + at)
                return

    async def _is_above(self, number: int, root: bytes) -> bool:
        """Whether the tile above has this root, so that the records are those that were sealed."""
        above = await self._store.get(TILES, None, tile_id(self.id, 1, number // TILE))
        begin = number % TILE * HASH_BYTES
        return above is not None and above["hashes"][begin : begin + HASH_BYTES] == root

    async def end(self, rounds: Rounds) -> None:
        """Compare the size, the last tile and the right edge, once all records were read."""
        self.result.end = self.position
        if not self.bad and self.position != self.size:
            await self._wrong_size(rounds)
        if self.bad:
            return
        whole = self._frontier.copy()
        for leaf in split(bytes(self._leaves)):
            whole.add(leaf)
        self.result.root = whole.root()
        if whole.to_bytes() != self._edge:
            await self._wrong_edge(rounds)
            return
        for level, tile in self._upper.items():
            if tile:
                await self._compare_upper(level, (self.size >> (_BITS * level)) // TILE, bytes(tile))

    async def _wrong_size(self, rounds: Rounds | None = None) -> None:
        position = self.position
        counts = f"the tree has {self.size} records, the journal has {position}"
        tile = await self._tile(self._frontier.size // TILE)
        if tile is not None:  # it was complete once
            number = tile["number"]
            self._first_difference(number, tile, bytes(self._leaves), bytes(self._sequences))
            if not self.bad:
                self.found("truncated", f"{counts}: those from index {position} on are gone", position)
            return
        good, end = await self._window(rounds)
        if position > self.size:
            extra = self._extra(good, end)
            self.found("inserted", f"{counts}: one was put in at index {extra} or later", extra)
        elif self.seen < self.sequence and end > position:
            self.found("truncated", f"{counts}: those from index {position} on are gone", position)
        elif end <= good + 1:
            self.found("deleted", f"{counts}: the record at index {good} is gone", good)
        else:
            self.found("deleted", f"{counts}: one of the records {good} to {end - 1} is gone", good)

    async def _wrong_edge(self, rounds: Rounds) -> None:
        """The last leaves do not lead to the stored right edge."""
        above = (self.size // TILE).bit_count()
        sealed = await rounds.entry(self.logged[1], self.id)
        if sealed == (self.size, self.result.root) or split(self._edge)[:above] != self._frontier.hashes:
            self.found("damaged", "the stored right edge of the tree was changed; the records are whole")
            return
        good, end = await self._window(rounds)
        if (pair := self._exchanged(good, end)) is not None:
            self.found("swapped", f"the records {pair[0]} and {pair[1]} were exchanged", pair[0])
        elif end <= good + 1:
            self.found("altered", f"the record at index {good} is not the one that was sealed", good)
        else:
            where = f"one of the records {good} to {end - 1}, which were sealed together,"
            self.found("altered", f"{where} is not the one that was sealed", good)

    async def _window(self, rounds: Rounds | None) -> tuple[int, int]:
        """Of the leaves after the last complete tile: the index up to which they agree with what was sealed, and the
        index before which one does not. The stored right edge and the rounds tell."""
        begin, leaves = self._frontier.size, split(bytes(self._leaves))
        good, end = begin, self.size
        edge = split(self._edge)[(self.size // TILE).bit_count() :]
        for (level, number), stored in zip(complete_subtrees(begin, self.size), edge, strict=False):
            first, last = number << level, (number + 1) << level
            if last - begin > len(leaves) or root_of(leaves[first - begin : last - begin]) != stored:
                end = last
                break
            good = last
        for size, root in await rounds.of(self, begin) if rounds is not None else []:
            if good < size <= end:
                if size - begin > len(leaves) or self._root_at(size, leaves) != root:
                    return good, size
                good = size
        return good, end

    def _root_at(self, size: int, leaves: Sequence[bytes]) -> bytes:
        reached = self._frontier.copy()
        for leaf in leaves[: size - reached.size]:
            reached.add(leaf)
        return reached.root()

    def _extra(self, good: int, end: int) -> int:
        """The index of the one record too many, found by leaving each one out in turn."""
        begin, leaves = self._frontier.size, split(bytes(self._leaves))
        target = Frontier.of_bytes(self.size, self._edge).root() if self.position == self.size + 1 else None
        for at in range(good, end + 1 if target is not None else good):
            if self._root_at(self.size, [*leaves[: at - begin], *leaves[at - begin + 1 :]]) == target:
                return at
        return good

    def _exchanged(self, good: int, end: int) -> tuple[int, int] | None:
        """The two records that lead to the stored right edge if they are exchanged."""
        if end - good > MAX_EXCHANGED:
            return None
        begin, leaves = self._frontier.size, split(bytes(self._leaves))
        target = Frontier.of_bytes(self.size, self._edge).root()
        for one in range(good - begin, end - begin):
            for other in range(one + 1, len(leaves)):
                other_way = [*leaves]
                other_way[one], other_way[other] = leaves[other], leaves[one]
                if self._root_at(self.size, other_way) == target:
                    return begin + one, begin + other
        return None

    # --- Roots at other sizes, once the records agreed with the tiles ---

    async def root_at(self, size: int) -> bytes | None:
        """The root of the first `size` leaves; None if retention dropped the hashes that it needs."""
        try:
            return await TreeReader(self._store, self._document, self._secret).root(size)
        except Gone:
            return None

    async def check_round(self, rounds: Rounds, log_round: int) -> None:
        """Check that the last round of this tree says its size and root."""
        size, number = self.logged if self.logged[1] <= log_round else self.previous
        if self.bad or not number:
            return
        entry = await rounds.entry(number, self.id)
        if entry is None:
            self.found("forked", f"round {number}, which sealed the tree, does not name it")
        elif entry[0] != size or entry[1] != await self.root_at(size):
            good, bad = 0, entry[0]
            for sealed, root in await rounds.of(self, 0):
                if sealed > self.size or await self.root_at(sealed) != root:
                    bad = sealed
                    break
                good = sealed
            where = f"the first {good} records are those that were sealed, the records up to {bad - 1} are not"
            self.found("forked", f"the tree is not the one that round {number} sealed: {where}", good)

    async def check_entry(self, rounds: Rounds, number: int, size: int, root: bytes) -> None:
        """Check that the tree had this size and root in a round."""
        if (size, root) == (self.size, self.result.root):
            return
        if size > self.size or await self.root_at(size) in (None, root):  # others say so if records are missing
            return
        good = 0
        for sealed, other in await rounds.of(self, 0):
            if sealed > self.size or await self.root_at(sealed) != other:
                break
            good = sealed
        self.found("forked", f"the tree is not the one that round {number} sealed with {size} records", good)

    async def check_notes(self) -> None:
        """Check that the journal's own records tell of each redaction, and of what retention dropped."""
        if self.bad:
            return
        if self.first and self.first not in self._drops:
            message = f"the records before index {self.first} are gone, and no record says that retention dropped them"
            self.found("deleted", message, 0)
            return
        if self.dropped:
            where = JournalFilter(tenant=self.tenant, platform=self.tenant is None, through_sequence=self.dropped)
            page = await self._store.rows(None, where, limit=1)
            if page.rows:
                whose = "the platform" if self.tenant is None else f"tenant {self.tenant!r}"
                self._report.note(
                    f"records of {whose} stand before index {self.first}, where retention drops all (the first has "
                    f"sequence {page.rows[0][0]}): they were not compared. Retention was interrupted, or somebody put "
                    "them in; its next run removes them"
                )
        for mark, (count, first) in self._marked.items():
            who = self._redactions.get(mark.record) if mark is not None else None
            if mark is None or who is None or who[:2] != (mark.by, mark.reason) or count > who[2]:
                index = await TreeReader(self._store, self._document, self._secret).index_of(first)
                message = f"{count} records were redacted, and no record of the journal says so, by whom and why"
                self._report.found(self.tenant, "altered", f"{message}: the first is that at index {index}", index)

    async def check_saved(self, saved: Checkpoint) -> None:
        """Compare the tree with a checkpoint that was kept elsewhere."""
        if saved.size > self.size:
            message = f"the tree has {self.size} records, the saved checkpoint {saved.size}"
            self.found("old_copy", f"{message}: an old copy of the store was put back, or its end was cut", self.size)
            return
        root = await self.root_at(saved.size) if not self.bad else None
        if root is None:
            self._report.note(f"the saved checkpoint of {saved.size} records could not be compared")
        elif root != saved.root:
            message = f"the first {saved.size} records are not those of the saved checkpoint: history was rewritten"
            self.found("forked", message)


def numbers(sequences: bytes) -> list[int]:
    return list(struct.unpack(f">{len(sequences) // SEQUENCE_BYTES}Q", sequences))


def _difference(
    found: list[bytes], stored: list[bytes], found_at: list[int], stored_at: list[int], at: int, begin: int
) -> tuple[Kind, str]:
    """What happened at the first place where a tile differs, from the leaves and sequences around it."""
    index, after = begin + at, at + 1
    sequence = f"(sequence {found_at[at] or stored_at[at]})"
    if not stored_at[at] or not found_at[at]:
        return "damaged", f"what the sealing round at index {index} sealed was changed, or the round is gone"
    other = found.index(stored[at]) if stored[at] in found else -1
    if other > at and found[at] == stored[other]:
        return "swapped", f"the records {index} and {begin + other} were exchanged"
    if found[at] == stored[at]:
        return "altered", f"the record at index {index} has sequence {found_at[at]}, it was sealed with {stored_at[at]}"
    if found_at[at] < stored_at[at] or other == after:
        return "inserted", f"at index {index} stands a record {sequence} that was not sealed there"
    if found_at[at] > stored_at[at] or (after < TILE and found[at] == stored[after]):
        return "deleted", f"the record at index {index} (sequence {stored_at[at]}) is gone"
    return "altered", f"the record at index {index} {sequence} is not the one that was sealed"


class Rounds:
    """The sealing rounds, the last ones kept."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: OrderedDict[int, dict[str, tuple[int, bytes]]] = OrderedDict()

    async def entry(self, number: int, tree: str) -> tuple[int, bytes] | None:
        """A tree's size and root as a round has them."""
        if number not in self._kept:
            document = await self._store.get(ROUNDS, None, round_id(number))
            self._kept[number] = entries_of(document) if document is not None else {}
            if len(self._kept) > KEPT_ROUNDS:
                self._kept.popitem(last=False)
        return self._kept[number].get(tree)

    async def of(self, tree: TreeCheck, after: int) -> list[tuple[int, bytes]]:
        """The sizes and roots of one tree as its rounds have them, from sizes greater than `after`, the least first.
        The MAX_SEARCHED_ROUNDS before the tree's last round are searched."""
        found: list[tuple[int, bytes]] = []
        last = tree.logged[1] + 1
        for _ in range(MAX_SEARCHED_ROUNDS // MAX_LIMIT):
            query = Query(Where("id", "<", round_id(last)), ("-id",), limit=MAX_LIMIT)
            page = await self._store.find(ROUNDS, None, query)
            for document in page:
                entry = entries_of(document).get(tree.id)
                if entry is None:
                    continue
                if entry[0] <= after:
                    return found[::-1]
                found.append(entry)
            if len(page) < MAX_LIMIT:
                break
            last = page[-1]["number"]
        return found[::-1]


def entries_of(document: Document) -> dict[str, tuple[int, bytes]]:
    """A round's entries by tree; none if they are damaged, which its leaf shows."""
    try:
        return {tree: (size, bytes.fromhex(root)) for tree, size, root in json.loads(document["entries"])}
    except (ValueError, TypeError, RecursionError):
        return {}


__all__ = ["SEQUENCE_BYTES", "Rounds", "TreeCheck", "entries_of", "numbers"]
