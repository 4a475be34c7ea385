"""Exports a part of a tree with its proofs, line by line: `export_format` says what is in it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ..entities import Document
from ..errors import Gone, NotFound
from ..storage.port import JournalFilter, Store
from .export_format import (
    FORMAT,
    Closing,
    ExportedRound,
    Header,
    Line,
    RoundProof,
    exported,
    line_of,
    tree_origin,
)
from .merkle import inclusion_ranges, prove, root_of
from .signed_note import Checkpoint, SignedNote
from .tree_reader import Leaf, TreeReader
from .trees import LOG, JournalLog, JournalRound, JournalTree, entry_hash, round_id, tree_id

LOGS = JournalLog.__collection__.name
TREES = JournalTree.__collection__.name
ROUNDS = JournalRound.__collection__.name

Sign = Callable[[Checkpoint], str]
"""Signs a checkpoint and gives the note."""


def unsigned(checkpoint: Checkpoint) -> str:
    """The note of a log that has no key."""
    return str(SignedNote(checkpoint.text))


@dataclass(frozen=True, slots=True)
class LoggedTree:
    """A tree as far as the log covers it. `round` is the last round that extended it so far."""

    log: Document
    reader: TreeReader
    round: int

    @property
    def tenant(self) -> str | None:
        return self.reader.tenant

    async def checkpoint(self, sign: Sign) -> str:
        """The signed note of the tree: the log's own one for the platform's tree."""
        if self.tenant is None:
            note: str = self.log["checkpoint"]
            return note
        size = self.reader.size
        return sign(Checkpoint(tree_origin(self.log["origin"], self.tenant), size, await self.reader.root(size)))


async def logged_tree(store: Store, tenant: str | None) -> LoggedTree:
    """A tenant's tree, or the platform's. Raises NotFound if none of its records is sealed."""
    whose = f"tenant {tenant!r}" if tenant is not None else "the platform"
    tree = await store.get(TREES, None, tree_id(tenant))
    log = await store.get(LOGS, None, LOG)  # after the tree: the log is never two rounds behind it
    if log is None or tree is None:
        raise NotFound(f"no record of {whose} is sealed yet")
    if tenant is None:
        size, number = log["checkpoint_size"], log["round"]
    elif tree["round"] <= log["round"]:
        size, number = tree["size"], tree["round"]
    else:  # in the middle of a round
        size, number = tree["previous_size"], tree["previous_round"]
    if not size:
        raise NotFound(f"no record of {whose} is sealed yet")
    return LoggedTree(log, TreeReader(store, tree, log["legacy_secret"], size, use_edge=True), number)


async def round_proof(store: Store, tree: LoggedTree) -> RoundProof | None:
    """What ties a tenant's tree to the platform's checkpoint; None if retention dropped the round from the
    platform's tree."""
    document = await store.get(ROUNDS, None, round_id(tree.round))
    stored = await store.get(TREES, None, tree_id(None))
    if document is None or stored is None:
        return None
    entries: list[tuple[str, int, str]] = [(id, size, root) for id, size, root in json.loads(document["entries"])]
    at = next((number for number, entry in enumerate(entries) if entry[0] == tree.reader.id), None)
    if at is None:
        return None
    leaves = [entry_hash(entry) for entry in entries]
    path = prove(
        inclusion_ranges(at, len(leaves)),
        lambda level, number: root_of(leaves[number << level : (number + 1) << level]),
    )
    size = tree.log["checkpoint_size"]
    platform = TreeReader(store, stored, tree.log["legacy_secret"], size, use_edge=True)
    try:
        proof = await platform.hashes(inclusion_ranges(document["index"], size))
    except Gone:
        return None
    return RoundProof(tree.round, len(entries), entries[at], at, path, document["index"], proof, tree.log["checkpoint"])


async def export_tree(
    store: Store, tree: LoggedTree, note: str, *, first: int | None = None, end: int | None = None
) -> AsyncIterator[bytes]:
    """The lines of an export of a tree's leaves from `first` (None: the first that is left) to before `end` (None: the
    last one). `note`: the tree's checkpoint. Raises Gone if retention drops them meanwhile."""
    reader = tree.reader
    first = reader.first if first is None else first
    end = reader.size if end is None else end
    origin = tree_origin(tree.log["origin"], tree.tenant)
    before = await reader.subtrees(0, first)
    yield line_of(Header(FORMAT, tree.log["origin"], origin, tree.tenant, first, end, reader.size, before))
    count = 0
    async for leaf in reader.leaves(first, end):
        count += 1
        yield line_of(_line(leaf))
    after = await reader.subtrees(end, reader.size)
    proof = await round_proof(store, tree) if tree.tenant is not None else None
    yield line_of(Closing(count, after, note, proof))


def _line(leaf: Leaf) -> Line:
    if leaf.row is not None:
        return exported(leaf.row, leaf.index, leaf.hash)
    assert leaf.round is not None  # noqa: S101 - a leaf has one of both
    entries = json.loads(leaf.round["entries"])
    root = root_of(entry_hash(entry) for entry in entries)
    return ExportedRound(leaf.index, leaf.round["number"], len(entries), root, leaf.hash)


async def range_of_times(
    store: Store, tree: LoggedTree, since_us: int | None, until_us: int | None
) -> tuple[int, int] | None:
    """The first index and the end of the least range that has every sealed record of a time range; None if there is
    none."""
    if since_us is None and until_us is None:
        return tree.reader.first, tree.reader.size
    where = JournalFilter(tenant=tree.tenant, platform=tree.tenant is None, since_us=since_us, until_us=until_us)
    first, last, cursor = None, None, None
    while True:
        page = await store.rows(cursor, where)
        if page.rows:
            first, last = page.rows[0][0] if first is None else first, page.rows[-1][0]
        if page.cursor == cursor:
            break
        cursor = page.cursor
    if first is None or last is None or (begin := await tree.reader.index_of(first)) is None:
        return None
    end = await tree.reader.index_of(last)
    return begin, tree.reader.size if end is None else end + 1


__all__ = ["LoggedTree", "Sign", "export_tree", "logged_tree", "range_of_times", "round_proof", "unsigned"]
