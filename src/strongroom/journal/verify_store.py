"""Verifies the journal of an open store: each column of each record against the stored hashes, those against the
round that sealed them, and the rounds against the signed checkpoint.

The journal is read once, in the order of its cursors. Each tree keeps the leaves of one tile, so memory grows with the
number of trees and not with that of records. A caller may pass blocks that other processes computed.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from msgspec import structs

from ..context import SALT_BYTES
from ..cooperative import Slices
from ..entities import MAX_LIMIT, Document, Query, Where
from ..errors import Gone, InvalidInput, Problem
from ..storage.port import MAX_CHANGES_PAGE, JournalRow, Store
from .blocks import Block, Note, Part
from .export_format import tree_origin
from .findings import Report, check_note
from .leaf import Mark, is_blank, leaf_of, mark_of, opening_of
from .merkle import HASH_BYTES, split
from .signed_note import Checkpoint, VerifierKey
from .tree_check import SEQUENCE_BYTES, Rounds, TreeCheck, entries_of, numbers
from .trees import (
    DROP,
    JOURNAL,
    LOG,
    PLATFORM,
    REDACT,
    JournalLog,
    JournalRound,
    JournalTree,
    legacy_salt,
    round_id,
    round_leaf,
    tree_id,
)

LOGS = JournalLog.__collection__.name
TREES = JournalTree.__collection__.name
ROUNDS = JournalRound.__collection__.name
LOOKS = 20
"""Times that the log and the platform's tree are read until both are of the same round."""
MAX_LATE = 100_000
"""Records that are in no tree yet, and are looked for after the log's cursor one by one; more are counted."""
ROUNDS_AHEAD = 100
TILES_AHEAD = 16
FEW_TREES = 64
"""So many trees read TILES_AHEAD tiles at once; with more, each reads one."""

Progress = Callable[[int, int], None]


def block_of(rows: Sequence[JournalRow], legacy_secret: bytes) -> Block:
    """Compute the leaves of rows."""
    groups: dict[str | None, list[JournalRow]] = {}
    for row in rows:
        groups.setdefault(row[2], []).append(row)
    parts = []
    for tenant, group in groups.items():
        marks: list[tuple[int, Mark | None]] = []
        if any(len(row[12]) != SALT_BYTES for row in group):
            group = [row if row[12] else with_salt(row, legacy_secret) for row in group]
            marks = [(row[0], mark_of(row[11])) for row in group if len(row[12]) != SALT_BYTES]
            leaves = [_leaf_or_none(row) for row in group]
        else:
            leaves = [leaf_of(row) for row in group]
        notes = [
            Note(row[0], row[1], row[6], row[4], row[11])
            for row in group
            if row[7] == JOURNAL and row[6] in (REDACT, DROP)
        ]
        sequences = struct.pack(f">{len(group)}Q", *[row[0] for row in group])
        parts.append(Part(tenant, sequences, b"".join(leaves), len(marks), marks, notes))
    return Block(parts, len(rows))


def with_salt(row: JournalRow, legacy_secret: bytes) -> JournalRow:
    """A row that is older than sealing, with its salt."""
    return (*row[:12], legacy_salt(legacy_secret, row[1]), *row[13:])


def _leaf_or_none(row: JournalRow) -> bytes:
    """The leaf of a row; if its salt is impossible, or something stands in the place of what was redacted, zeros, which
    are the leaf of no record."""
    try:
        _, _, _, _, actor, _, _, collection, entity_id, _, before, after, salt, claims, _ = row
        redacted = opening_of(salt).redacted
        if redacted and (collection == JOURNAL or not is_blank(redacted, actor, claims, entity_id, before, after)):
            return bytes(HASH_BYTES)
        return leaf_of(row)
    except ValueError:
        return bytes(HASH_BYTES)


async def blocks_of(store: Store, legacy_secret: bytes) -> AsyncIterator[Block]:
    """The whole journal, computed in this process."""
    cursor: str | None = None
    while True:
        page = await store.rows(cursor, limit=MAX_CHANGES_PAGE)
        if page.rows:
            yield block_of(page.rows, legacy_secret)
        if page.cursor == cursor or (cursor is None and not page.rows and page.cursor == "0"):
            return
        cursor = page.cursor


# --- The whole journal ----------------------------------------------------------------------------------------


class StoreVerification:
    """One verification of an open store. `log` is read by `begin`; then `add` takes the journal's blocks in order, and
    `end` completes the report."""

    def __init__(self, store: Store, keys: Sequence[VerifierKey] = (), saved: Checkpoint | None = None) -> None:
        self._store = store
        self._keys = keys
        self._saved = saved
        self._trees: dict[str | None, TreeCheck] = {}
        self._rounds = Rounds(store)
        self._next_rounds: deque[Document] = deque()
        self._last_round = 0
        self._late: set[tuple[str | None, int]] = set()
        self._named: dict[str, tuple[int, int, bytes]] = {}
        """The trees that rounds sealed: the last round of each, the tree's size and its root. The leaf of each of these
        rounds is in the platform's tree."""
        self._older: dict[str, tuple[int, int, bytes]] = {}
        """The same of rounds before the platform's first record: nothing proves them any more."""
        self._settled = False
        """Whether the log and the platform's tree were read as one round left them."""
        self.report = Report()
        self.log: Document | None = None

    async def begin(self) -> None:
        """Read the log and its trees. Raises InvalidInput if the saved checkpoint is of another log."""
        log, platform = await self._top()
        self.log = log
        after = ""
        documents: list[Document] = []
        while True:
            query = Query(Where("id", ">", after) if after else None, ("id",), limit=MAX_LIMIT)
            page = await self._store.find(TREES, None, query)
            documents += page
            if len(page) < MAX_LIMIT:
                break
            after = page[-1]["id"]
        ahead = TILES_AHEAD if len(documents) <= FEW_TREES else 1
        for document in documents:
            if document["id"] == PLATFORM and platform is not None:
                document = platform
            tree = TreeCheck(self._store, document, self.legacy_secret, self.report, ahead)
            self._trees[tree.tenant] = tree
            self.report.trees.append(tree.result)
            await tree.begin()
        if log is None:
            if documents:
                self.report.found(None, "damaged", "the document of the log is gone, but it has trees")
            else:
                self.report.note("no record is sealed yet, so nothing can be verified")
        self._check_saved_origin()

    async def _top(self) -> tuple[Document | None, Document | None]:
        """The log and the platform's tree, which each round writes in one batch."""
        log = await self._store.get(LOGS, None, LOG)
        platform: Document | None = None
        for _ in range(LOOKS):
            platform = await self._store.get(TREES, None, PLATFORM)
            again = await self._store.get(LOGS, None, LOG)
            self._settled = (log and log["round"]) == (again and again["round"])
            log = again
            if self._settled:
                break
        return log, platform

    def _check_saved_origin(self) -> None:
        saved, log = self._saved, self.log
        if saved is None:
            return
        if log is None:
            what = f"the saved checkpoint of {saved.size} records is of a log that the store no longer has"
            self.report.found(None, "old_copy", what)
        elif saved.origin != log["origin"] and not saved.origin.startswith(log["origin"] + "/tenants/"):
            found = f"found a checkpoint of {saved.origin!r}, expected one of {log['origin']!r}"
            raise InvalidInput([Problem("checkpoint", found)])

    @property
    def legacy_secret(self) -> bytes:
        secret: bytes = self.log["legacy_secret"] if self.log is not None else b""
        return secret

    async def add(self, block: Block) -> None:
        """Take the next records of the journal."""
        self.report.checked += block.rows
        for part in block.parts:
            tree = self._trees.get(part.tenant)
            if tree is None:
                self._keep_late(part.tenant, numbers(part.sequences))
                continue
            tree.note(part)
            late = [one for one in numbers(part.sequences) if one > tree.sequence]
            part = _without(part, len(late), tree.sequence) if late else part
            part = _after(part, tree.dropped) if tree.dropped else part
            tree.result.unsealed += len(late)
            self._keep_late(part.tenant, late)
            if part.sequences and not tree.bad:
                tree.seen = int.from_bytes(part.sequences[-SEQUENCE_BYTES:], "big")
                tree.result.redacted += part.redacted
                await (tree.add(part.sequences, part.leaves) if tree.tenant is not None else self._platform(tree, part))

    def _keep_late(self, tenant: str | None, sequences: Sequence[int]) -> None:
        room = MAX_LATE - len(self._late)
        self._late.update((tenant, sequence) for sequence in sequences[:room])

    async def _platform(self, tree: TreeCheck, part: Part) -> None:
        """Add records of the platform, with the leaves of the rounds that stand between them."""
        for leaf, at in zip(split(part.leaves), range(0, len(part.sequences), SEQUENCE_BYTES), strict=True):
            await self._add_rounds(tree)
            await tree.add(part.sequences[at : at + SEQUENCE_BYTES], leaf)

    async def _add_rounds(self, tree: TreeCheck) -> None:
        """Add the rounds whose leaves come next in the platform's tree."""
        while not tree.bad and tree.position < tree.size:
            if not self._next_rounds:
                query = Query(Where("id", ">", round_id(self._last_round)), ("id",), limit=ROUNDS_AHEAD)
                self._next_rounds.extend(await self._store.find(ROUNDS, None, query))
                if not self._next_rounds:
                    return
                self._last_round = self._next_rounds[-1]["number"]
            document = self._next_rounds[0]
            if document["index"] > tree.position:
                return
            self._next_rounds.popleft()
            found = self._older if document["index"] < tree.first else self._named
            number = document["number"]
            found |= {id: (number, size, root) for id, (size, root) in entries_of(document).items()}
            if document["index"] < tree.first:
                continue
            try:
                leaf = round_leaf(document["number"], document["entries"])
            except (ValueError, RecursionError):
                leaf = bytes(HASH_BYTES)
            await tree.add(bytes(SEQUENCE_BYTES), leaf)

    async def end(self) -> Report:
        """Compare the trees with the rounds, and the log with its signatures."""
        slices = Slices()
        log_round = self.log["round"] if self.log is not None else 0
        platform = self._trees.get(None)
        if platform is not None:
            await self._add_rounds(platform)
        for tree in self._trees.values():
            await slices.pause()
            await tree.end(self._rounds)
            if tree.tenant is not None:
                await tree.check_round(self._rounds, log_round)
                await self._check_named(tree, platform)
            await tree.check_notes()
        await self._check_log(platform)
        await self._check_saved()
        self._check_missing()
        await self._check_late()
        return self.report

    async def _check_named(self, tree: TreeCheck, platform: TreeCheck | None) -> None:
        """Check a tree against the last round that names it, among those in the platform's tree: what the tree's own
        document says of its rounds is not signed."""
        if tree.bad or platform is None or platform.bad:
            return
        entry = self._named.get(tree.id)
        if entry is None and (entry := self._older.get(tree.id)) is not None:
            self.report.note(
                "some trees were sealed last before the first record that the platform has left: "
                "their rounds are in its archive"
            )
        if entry is None:
            self.report.note("some trees are in no finished round yet, so no checkpoint covers them")
        else:
            await tree.check_entry(self._rounds, *entry)

    async def _check_log(self, platform: TreeCheck | None) -> None:
        """Check the signed checkpoint of the platform's tree."""
        if self.log is None or not self.log["round"]:
            if platform is not None:
                self.report.found(None, "damaged", "the platform's tree was sealed, but the log says that no round was")
            elif self._keys and self.report.checked:
                self.report.found(None, "signature", "none of the given keys signed: there is no checkpoint")
            return
        if platform is None:
            self.report.found(None, "damaged", "the platform's tree is gone")
            return
        checkpoint = check_note(self.log["checkpoint"], self.log["origin"], self._keys, None, self.report)
        if checkpoint is None or platform.bad:
            return
        if checkpoint.size < platform.size and self._settled:
            message = f"the checkpoint is of {checkpoint.size} records, the tree has {platform.size}"
            platform.found("forked", f"{message}: an older one was put in its place", checkpoint.size)
        elif checkpoint.size > platform.size:
            platform.found("truncated", f"the checkpoint is of {checkpoint.size} records, the tree has {platform.size}")
        elif await platform.root_at(checkpoint.size) != checkpoint.root:
            message = f"the platform's tree does not lead to the root of its checkpoint ({checkpoint.size} records)"
            platform.found("forked", f"{message}: history was rewritten after it was signed")

    async def _check_saved(self) -> None:
        saved, log = self._saved, self.log
        if saved is None or log is None:
            return
        for tree in self._trees.values():
            if tree_origin(log["origin"], tree.tenant) == saved.origin:
                await tree.check_saved(saved)
                return
        message = f"the store has no tree {saved.origin!r} any more, of which {saved.size} records were saved"
        self.report.found(None, "old_copy", message)

    async def outdated(self) -> bool:
        """Whether retention has dropped records since the trees were read, so that what is missing says nothing."""
        for tree in self._trees.values():
            now = await self._store.get(TREES, None, tree.id)
            if tree.bad and now is not None and now["first_index"] != tree.first:
                return True
        return False

    def _check_missing(self) -> None:
        """Every tree that a round sealed must be there, and not be smaller."""
        there = {tree.id: tree for tree in self._trees.values()}
        tenants = {tree_id(tenant): tenant for tenant, _ in self._late}
        for id, (_, size, _) in (self._older | self._named).items():
            if id not in there:
                tenant = tenants.get(id)
                whose = "its tree" if tenant is not None else f"the tree {id}"
                self.report.found(tenant, "damaged", f"{whose} is gone, of which {size} records were sealed")
            elif there[id].size < size and not there[id].bad:
                there[id].found("truncated", f"the tree has {there[id].size} records, a round sealed {size}")
        self._late = {one for one in self._late if tree_id(one[0]) in there or tree_id(one[0]) not in self._named}

    async def _check_late(self) -> None:
        """Records that are in no tree must stand after the log's cursor: they wait for the next round."""
        cursor = self.log["cursor"] if self.log is not None else None
        late = self._late
        if self.log is not None and self.log["round"] and cursor is None:
            self.report.found(None, "damaged", "the log does not say any more up to where the journal is sealed")
        while late and cursor is not None:
            try:
                page = await self._store.rows(cursor, limit=MAX_CHANGES_PAGE)
            except (Gone, InvalidInput) as error:
                message = f"up to where the journal is sealed, as the log says it, was changed: {error}"
                self.report.found(None, "damaged", message)
                return
            late.difference_update((row[2], row[0]) for row in page.rows)
            if page.cursor == cursor:
                break
            cursor = page.cursor
        else:
            return
        if late:
            tenant, sequence = min(late, key=lambda one: (one[0] or "", one[1]))
            tree = self._trees.get(tenant)
            if tree is not None and tree.bad:
                return
            message = (
                f"{len(late)} records, the first with sequence {sequence}, stand among sealed ones and are in no tree"
            )
            self.report.found(tenant, "inserted", message)


def _without(part: Part, late: int, sequence: int) -> Part:
    """A part without its records that come later than a sequence, of which it has so many."""
    found = numbers(part.sequences)
    if all(one <= sequence for one in found[: len(found) - late]):
        kept = len(found) - late
        return structs.replace(
            part, sequences=part.sequences[: kept * SEQUENCE_BYTES], leaves=part.leaves[: kept * HASH_BYTES]
        )
    leaves = split(part.leaves)  # not in the order of their sequences: somebody put one in behind
    kept_ones = [number for number, one in enumerate(found) if one <= sequence]
    sequences = b"".join(found[number].to_bytes(SEQUENCE_BYTES, "big") for number in kept_ones)
    return structs.replace(part, sequences=sequences, leaves=b"".join(leaves[number] for number in kept_ones))


def _after(part: Part, sequence: int) -> Part:
    """A part without the records up to a sequence: retention has dropped them from the tree."""
    gone = sum(one <= sequence for one in numbers(part.sequences))
    return structs.replace(
        part, sequences=part.sequences[gone * SEQUENCE_BYTES :], leaves=part.leaves[gone * HASH_BYTES :]
    )


async def verify_store(
    store: Store,
    *,
    keys: Sequence[VerifierKey] = (),
    saved: Checkpoint | None = None,
    blocks: Callable[[bytes], AsyncIterator[Block]] | None = None,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Verify the journal of an open store that is prepared for TREE_ENTITIES. `blocks` computes the journal's leaves,
    from the secret of old records' salts (None: in this process). Raises InvalidInput if `saved` is of another log."""
    while True:
        verification = StoreVerification(store, keys, saved)
        await verification.begin()
        total = sum(tree.size - tree.first for tree in verification.report.trees)
        secret = verification.legacy_secret
        slices = Slices()
        async for block in blocks(secret) if blocks is not None else blocks_of(store, secret):
            await verification.add(block)
            progress(verification.report.checked, total)
            await slices.pause()
        report = await verification.end()
        if report.whole or not await verification.outdated():
            return report


__all__ = ["Block", "Part", "StoreVerification", "block_of", "blocks_of", "verify_store"]
