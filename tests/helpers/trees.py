"""Recomputes a store's trees from its journal, and compares what is stored of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from strongroom.entities import Document, Query, Where
from strongroom.journal.leaf import leaf_of
from strongroom.journal.merkle import Frontier, root_of, split
from strongroom.journal.signed_note import Checkpoint, SignedNote
from strongroom.journal.trees import PLATFORM, TILE, legacy_salt, round_leaf, tile_id, tree_id
from strongroom.storage.port import JournalRow, Store


@dataclass
class Trees:
    """A store's trees as they must be."""

    log: Document
    leaves: dict[str, list[bytes]] = field(default_factory=dict)
    """By the tree's id, the leaves in the order of their index."""
    sequences: dict[str, list[int]] = field(default_factory=dict)
    """Of the same leaves; 0 for a round."""
    rounds: int = 0

    @property
    def roots(self) -> dict[str, str]:
        return {tree: root_of(leaves).hex() for tree, leaves in self.leaves.items()}


async def all_rows(store: Store) -> list[JournalRow]:
    rows: list[JournalRow] = []
    cursor: str | None = None
    while True:
        page = await store.rows(cursor)
        rows += page.rows
        if page.cursor == cursor:
            return rows
        cursor = page.cursor


async def _all(store: Store, collection: str, order: str = "id") -> list[Document]:
    found: list[Document] = []
    after: tuple[object, ...] | None = None
    while True:
        page = await store.find(collection, None, Query(order_by=(order,), limit=1_000, start_after=after))
        found += page
        if len(page) < 1_000:
            return found
        after = (page[-1][order],) if order == "id" else (page[-1][order], page[-1]["id"])


async def check_trees(store: Store, *, sealed: bool = True) -> Trees:
    """Compare every tree, tile and round of a store with what its journal says. `sealed`: everything must be."""
    log = await store.get("journal_log", None, "log")
    assert log is not None
    trees = Trees(log)
    for row in await all_rows(store):
        if not row[12]:
            row = (*row[:12], legacy_salt(log["legacy_secret"], row[1]), *row[13:])
        trees.leaves.setdefault(tree_id(row[2]), []).append(leaf_of(row))
        trees.sequences.setdefault(tree_id(row[2]), []).append(row[0])
    rounds = await _all(store, "journal_rounds")
    trees.rounds = len(rounds)
    assert [one["number"] for one in rounds] == list(range(1, log["round"] + 1))
    platform, sequences = trees.leaves.setdefault(PLATFORM, []), trees.sequences.setdefault(PLATFORM, [])
    for one in rounds:
        platform.insert(one["index"], round_leaf(one["number"], one["entries"]))
        sequences.insert(one["index"], 0)
    stored = {one["id"]: one for one in await _all(store, "journal_trees")}
    if sealed:
        assert {id: tree["size"] for id, tree in stored.items()} == {
            id: len(leaves) for id, leaves in trees.leaves.items() if leaves
        }
        assert not [tree for tree in stored.values() if tree["round"] > log["round"]]
    for id, tree in stored.items():
        await _check_tree(store, tree, trees.leaves[id][: tree["size"]], trees.sequences[id])
    _check_rounds(rounds, trees)
    for id, tree in stored.items():
        if id != PLATFORM and tree["round"] <= log["round"]:
            entries = json.loads(rounds[tree["round"] - 1]["entries"])
            assert [size for name, size, _ in entries if name == id] == [tree["size"]], "its round covers its root"
    if log["round"]:
        note = SignedNote.parse(log["checkpoint"])
        root = root_of(platform[: log["checkpoint_size"]])
        assert Checkpoint.parse(note.text) == Checkpoint(log["origin"], log["checkpoint_size"], root)
    return trees


async def _check_tree(store: Store, tree: Document, leaves: list[bytes], sequences: list[int]) -> None:
    assert len(leaves) == tree["size"]
    frontier = Frontier()
    for leaf in leaves:
        frontier.add(leaf)
    assert frontier.to_bytes() == tree["frontier"]
    assert [one for one in sequences[: tree["size"]] if one][-1:] == ([tree["sequence"]] if tree["sequence"] else [])
    hashes, level = leaves, 0
    while len(hashes) >= (TILE if level == 0 else 1):
        complete = len(hashes) // TILE
        for number in range(complete if level == 0 else -(-len(hashes) // TILE)):
            tile = await store.get("journal_tiles", None, tile_id(tree["id"], level, number))
            assert tile is not None, (tree["id"], level, number)
            assert split(tile["hashes"]) == hashes[number * TILE : (number + 1) * TILE], (level, number)
            if level == 0:
                some = sequences[number * TILE : (number + 1) * TILE]
                found = [int.from_bytes(tile["sequences"][at : at + 8], "big") for at in range(0, TILE * 8, 8)]
                assert found == some
                assert tile["first_sequence"] == next(iter(filter(None, some)), None)
                assert tile["last_sequence"] == max(sequences[: (number + 1) * TILE])
                assert tile["first_at"] <= tile["last_at"]
        hashes = [root_of(hashes[number * TILE : (number + 1) * TILE]) for number in range(complete)]
        level += 1
    tiles = await store.find("journal_tiles", None, Query(Where("tree", "==", tree["id"]), limit=1_000))
    assert len(tiles) < 1_000
    for tile in tiles:
        assert tile["number"] * TILE ** (tile["level"] + 1) < tree["size"]


def _check_rounds(rounds: list[Document], trees: Trees) -> None:
    """Each tree's entries grow, and each has the root that the tree had at that size."""
    sizes: dict[str, int] = {}
    for one in rounds:
        entries = json.loads(one["entries"])
        assert [entry[0] for entry in entries] == sorted({entry[0] for entry in entries})
        for tree, size, root in entries:
            assert size > sizes.get(tree, 0)
            sizes[tree] = size
            assert root_of(trees.leaves[tree][:size]).hex() == root
