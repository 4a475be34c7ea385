"""Carries the journal's Merkle trees over: builds them again from the target's journal, and compares every root.

A leaf holds nothing that depends on the store, so equal roots prove that the target has the journal that the source
sealed, record for record. What a store adds of its own (the sequences in tiles, the log's cursor) is made again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from ..context import us_from_utc
from ..cooperative import Slices
from ..entities import MAX_LIMIT, Aggregate, And, Document, Query, Where
from ..errors import StoreError
from ..journal.leaf import leaf_of
from ..journal.merkle import Frontier, complete_subtrees, root_of, split
from ..journal.tree_state import NO_SEQUENCE, TILE_BITS, TREES, TreeState
from ..journal.trees import (
    LOG,
    PLATFORM,
    TILE,
    JournalLog,
    JournalRound,
    JournalTile,
    JournalTree,
    legacy_salt,
    round_leaf,
    tile_id,
)
from ..storage.journal_rows import record_of
from ..storage.port import (
    MAX_BATCH_BYTES,
    MAX_CHANGES_PAGE,
    MAX_OPERATIONS,
    Batch,
    Create,
    Delete,
    JournalFilter,
    JournalRow,
    Operation,
    Put,
    Store,
    document_size,
)
from .checksum import MODULUS, encoded_record, record_digest
from .state import ProgressChain, Run, now_us

LOGS, TILES, ROUNDS = (c.__collection__.name for c in (JournalLog, JournalTile, JournalRound))
_FIELDS = {c.__collection__.name: tuple(c.__collection__.fields) for c in (JournalLog, JournalTile, JournalRound)}
AT_ONCE = 4
ROUNDS_AT_ONCE = 200
"""Rounds, or trees, in a page: a round that extended thousands of trees has 300 KB."""
TILES_AT_ONCE = 200
FIRST_ROWS = 100
"""Trees that are built at the same time."""
MAX_NAMED = 20
"""Unequal trees that a report names, each with its first differing leaf."""
Leaf = tuple[bytes, int, int]
"""The hash of a leaf, the sequence of its record (NO_SEQUENCE for a round), and its time."""


@dataclass(frozen=True, slots=True)
class TreeDifference:
    """A tree of the source whose root the target's journal does not lead to. `tenant` None: the platform's tree.

    `index`: the first leaf that differs, `tile` the tile of level 0 that it is in.
    """

    tenant: str | None
    size: int
    index: int
    reason: str

    @property
    def tile(self) -> int:
        return self.index // TILE

    def __str__(self) -> str:
        whose = "the platform" if self.tenant is None else f"tenant {self.tenant!r}"
        return (
            f"the journal of {whose} differs at index {self.index} (tile {self.tile}) of {self.size} sealed: "
            f"{self.reason}"
        )


@dataclass(slots=True)
class TreesReport:
    """How many trees of the source were built again, how many of them have the same root, and the others."""

    trees: int = 0
    differences: tuple[TreeDifference, ...] = ()
    unequal: int = 0
    carried: bool = True
    """Whether the target continues the source's log; else it begins one of its own."""

    @property
    def equal(self) -> bool:
        return not self.unequal


async def source_log(run: Run) -> Document | None:
    """The log of the source; None if its journal was never sealed."""
    return await run.source.get(LOGS, None, LOG) if run.source_is_sealed else None


async def carry_trees(run: Run, report: TreesReport) -> None:
    """Build every tree of the source on the target, and the log if all roots are equal. A repeated call begins anew.

    Nobody seals either journal meanwhile.
    """
    log = await source_log(run)
    await remove_trees(run)
    if log is None:
        return
    report.carried = run.migration.carried
    if report.carried:
        await _copy_documents(run, ROUNDS)
    elif run.migration.cursor is not None:
        return  # an earlier migration copied the beginning of the journal, somewhere among the target's own records
    dropping = asyncio.Lock()
    building: set[asyncio.Task[TreeDifference | None]] = set()
    named: list[TreeDifference] = []

    def finished(tasks: set[asyncio.Task[TreeDifference | None]]) -> None:
        for task in tasks:
            report.trees += 1
            difference = task.result()
            if difference is not None:
                report.unequal += 1
                named.append(difference)
        run.progress("comparing the journal's trees", report.trees, None)

    try:
        async with aclosing(_documents(run.source, TREES)) as pages:
            async for page in pages:
                for tree in page:
                    if tree["tenant"] is None and not report.carried:
                        continue  # the platform's journal has records about the source itself, which are not copied
                    if len(building) >= AT_ONCE:
                        done, building = await asyncio.wait(building, return_when=asyncio.FIRST_COMPLETED)
                        finished(done)
                    building.add(asyncio.ensure_future(_TreeCopy(run, log, tree, dropping).build()))
        while building:
            done, building = await asyncio.wait(building)
            finished(done)
    finally:
        for task in building:
            task.cancel()
        await asyncio.gather(*building, return_exceptions=True)
    report.differences = tuple(named[:MAX_NAMED])
    if report.carried and report.equal:
        cursor = await _sealed_up_to(run)
        await _commit(run, [Put(LOGS, LOG, {**_fields(LOGS, log), "cursor": cursor})])


async def remove_trees(run: Run) -> None:
    """Remove the log and every tree of the target."""
    for name in (LOGS, TREES, TILES, ROUNDS):
        while found := await run.target.find(name, None, Query(limit=MAX_LIMIT)):
            operations = [Delete(name, one["id"]) for one in found]
            for begin in range(0, len(operations), MAX_OPERATIONS):
                await _commit(run, operations[begin : begin + MAX_OPERATIONS])


async def _sealed_up_to(run: Run) -> str | None:
    """A cursor of the target behind which every record that is not sealed comes; None: the sealer reads all again, and
    skips what is sealed."""
    end = (await run.target.changes("end")).cursor
    sizes = await run.target.aggregate(TREES, None, [Aggregate("sum", "size"), Aggregate("sum", "first_index")], None)
    platform = await run.target.get(TREES, None, PLATFORM)
    kept = Where("index", ">=", platform["first_index"] if platform is not None else 0)
    rounds = await run.target.aggregate(ROUNDS, None, [Aggregate("count")], kept)
    sealed = (sizes["sum_size"] or 0) - (sizes["sum_first_index"] or 0) - rounds["count"]
    return end if sealed == run.journal.count else None


# --- One tree -------------------------------------------------------------------------------------------------


class _TreeCopy:
    """Builds one tree from the target's records, and compares its root with the source's."""

    def __init__(self, run: Run, log: Document, tree: Document, dropping: asyncio.Lock) -> None:
        self._run = run
        self._log = log
        self._tree = tree
        self._writes = run.migration.carried
        self._dropping = dropping
        self._begin: int = tree["first_index"]
        self._after = None if self._writes else run.migration.target_cursor

    def _copied(self) -> AsyncGenerator[list[Leaf], None]:
        return leaves(self._run.target, self._run.source, self._log, self._tree, self._after)

    async def build(self) -> TreeDifference | None:
        tree, run = self._tree, self._run
        state = await self._prefix()
        short = None
        await self._align()
        async with aclosing(self._copied()) as pages:
            async for page in pages:
                for leaf, sequence, at_us in page:
                    state.add(leaf, sequence, at_us)
                await self._flush(state)
        if state.size < tree["size"]:
            short = TreeDifference(tree["tenant"], tree["size"], state.size, "the target has no more records")
        if short is None and state.frontier().to_bytes() == tree["frontier"]:
            if self._writes:
                document = {name: tree[name] for name in _TREE_FIELDS} | {
                    "sequence": state.sequence,
                    "dropped_sequence": 0,
                }
                await _commit(run, [Put(TREES, tree["id"], document)])
            return None
        return await self._difference() or short

    async def _align(self) -> None:
        """Drop the target's records that come before the source's first: retention removed them there after they were
        copied."""
        tenant = self._tree["tenant"]
        where = JournalFilter(tenant=tenant, platform=tenant is None)
        kept = JournalFilter(
            tenant=tenant, platform=tenant is None, after_sequence=self._tree["dropped_sequence"] or None
        )
        first = await _first_row(self._run.source, kept)
        if first is None:
            return
        before: int | None = None
        count, total = 0, 0
        cursor = self._after
        while True:
            page = await self._run.target.rows(cursor, where, FIRST_ROWS)
            for row in page.rows:
                if row[1] == first[1]:
                    if before is not None and self._writes:
                        async with self._dropping:
                            await self._run.target.drop(tenant, before)
                            await _dropped(self._run, count, total)
                    return
                before = row[0]
                count += 1
                total += record_digest(encoded_record(record_of(row)))
            if page.cursor == cursor:
                return
            cursor = page.cursor

    async def _prefix(self) -> TreeState:
        """The tree before its first record that retention has left: the tiles above stay, and lead to its hashes."""
        tree, begin = self._tree, self._begin
        if not begin:
            return TreeState(tree["tenant"])
        upper: dict[tuple[int, int], bytes] = {}
        async with aclosing(_upper_tiles(self._run.source, tree)) as pages:
            async for page in pages:
                for tile in page:
                    upper[tile["level"], tile["number"]] = tile["hashes"]
                if self._writes:
                    await _commit(self._run, [Put(TILES, tile["id"], _fields(TILES, tile)) for tile in page])
        hashes = [_subtree(upper, *one) for one in complete_subtrees(0, begin)]
        stored = {**tree, "size": begin, "sequence": 0, "broken": "", "version": 0}
        state = TreeState(tree["tenant"], {**stored, "frontier": Frontier(begin, hashes).to_bytes()})
        state.restore((), upper)
        return state

    async def _flush(self, state: TreeState) -> None:
        operations = state.operations(self._tree["round"], now_us())[:-1]
        state.committed(0)
        if not self._writes:
            return
        size = 0
        batch: list[Operation] = []
        for operation in operations:
            if not isinstance(operation, Create | Put):
                raise AssertionError("a tree is extended by new documents only")
            more = document_size(operation.document)
            if batch and (size + more > MAX_BATCH_BYTES or len(batch) >= MAX_OPERATIONS):
                await _commit(self._run, batch)
                batch, size = [], 0
            batch.append(Put(TILES, operation.id, operation.document))
            size += more
        if batch:
            await _commit(self._run, batch)

    async def _difference(self) -> TreeDifference | None:
        """The first leaf in which the two journals differ, or in which the source's own differs from its tree."""
        run, tree = self._run, self._tree
        size, index = tree["size"], self._begin
        tiles: dict[int, bytes] = {}
        ours = self._copied()
        theirs = leaves(run.source, run.source, self._log, tree)
        async with aclosing(_flat(ours)) as ours_flat, aclosing(_flat(theirs)) as theirs_flat:
            async for original in theirs_flat:
                copied = await anext(ours_flat, None)
                if copied is None:
                    return TreeDifference(tree["tenant"], size, index, "the target has no more records")
                if copied[0] != original[0]:
                    return TreeDifference(tree["tenant"], size, index, "the target's record is another")
                number, place = divmod(index, TILE)
                if number not in tiles:
                    tile = await run.source.get(TILES, None, tile_id(tree["id"], 0, number))
                    tiles = {number: tile["hashes"] if tile is not None else b""}
                expected = tiles[number][place * 32 : place * 32 + 32]
                if expected and expected != original[0]:
                    reason = "the source's record does not agree with its own tree"
                    return TreeDifference(tree["tenant"], size, index, reason)
                index += 1
        if index < size:
            return TreeDifference(tree["tenant"], size, index, "the source has no more records")
        reason = "the source's records after its last tile do not lead to its root"
        return TreeDifference(tree["tenant"], size, size - size % TILE, reason)


async def _dropped(run: Run, count: int, total: int) -> None:
    """Records that were copied are in the target's journal no more."""
    chain = ProgressChain(run.journal)
    checksum = f"{(int(run.journal.checksum, 16) - total) % MODULUS:064x}"
    previous = chain.previous()
    await _commit(run, [*previous, chain.advance(count=run.journal.count - count, checksum=checksum)])
    run.journal = chain.state


_TREE_FIELDS = tuple(JournalTree.__collection__.fields)


def _subtree(upper: dict[tuple[int, int], bytes], level: int, number: int) -> bytes:
    """The hash of a complete subtree of whole tiles, from the tiles above level 0."""
    tile_level, height = divmod(level, TILE_BITS)
    begin = number << height
    tile, place = divmod(begin, TILE)
    hashes = split(upper.get((tile_level, tile), b""))[place : place + (1 << height)]
    if len(hashes) != 1 << height:
        raise StoreError(f"tile {tile} of level {tile_level} of the source's tree is missing or too short")
    return root_of(hashes)


async def leaves(
    store: Store, rounds_in: Store, log: Document, tree: Document, after: str | None = None
) -> AsyncGenerator[list[Leaf], None]:
    """The leaves of a tree from its first stored record, computed from the records of `store` after a cursor, up to the
    tree's size.

    The platform's rounds come from the store `rounds_in`.
    """
    tenant = tree["tenant"]
    index, size = tree["first_index"], tree["size"]
    rounds = _Rounds(rounds_in if tenant is None else None, index)
    where = JournalFilter(tenant=tenant, platform=tenant is None)
    cursor = after
    slices = Slices()
    while index < size:
        page = await store.rows(cursor, where, MAX_CHANGES_PAGE)
        found: list[Leaf] = []
        for row in page.rows:
            await slices.pause()
            while index < size and (round := await rounds.at(index)) is not None:
                found.append(round)
                index += 1
            if index >= size:
                break
            if not row[12]:
                row = (*row[:12], legacy_salt(log["legacy_secret"], row[1]), *row[13:])
            found.append((leaf_of(row), row[0], row[3]))
            index += 1
        ended = page.cursor == cursor
        while ended and index < size and (round := await rounds.at(index)) is not None:
            found.append(round)
            index += 1
        if found:
            yield found
        if ended:
            return
        cursor = page.cursor


class _Rounds:
    """The leaves of the platform's tree that are rounds, in their order; without a store none."""

    def __init__(self, store: Store | None, begin: int) -> None:
        self._store = store
        self._next = begin
        self._waiting: deque[tuple[int, Leaf]] = deque()

    async def at(self, index: int) -> Leaf | None:
        """The round that is the leaf of this index, if one is; indexes are asked for in their order."""
        if not self._waiting and self._store is not None:
            query = Query(Where("index", ">=", self._next), ("index",), limit=ROUNDS_AT_ONCE)
            found = await self._store.find(ROUNDS, None, query)
            for one in found:
                leaf = round_leaf(one["number"], one["entries"]), NO_SEQUENCE, us_from_utc(one["sealed_at"])
                self._waiting.append((one["index"], leaf))
            if len(found) < ROUNDS_AT_ONCE:
                self._store = None
            else:
                self._next = found[-1]["index"] + 1
        if self._waiting and self._waiting[0][0] == index:
            return self._waiting.popleft()[1]
        return None


async def _flat(pages: AsyncGenerator[list[Leaf], None]) -> AsyncGenerator[Leaf, None]:
    async with aclosing(pages):
        async for page in pages:
            for leaf in page:
                yield leaf


# --- Documents ------------------------------------------------------------------------------------------------


def _fields(collection: str, document: Document) -> Document:
    return {name: document[name] for name in _FIELDS[collection]}


async def _first_row(store: Store, where: JournalFilter) -> JournalRow | None:
    cursor = None
    while True:
        page = await store.rows(cursor, where, 1)
        if page.rows:
            return page.rows[0]
        if page.cursor == cursor:
            return None
        cursor = page.cursor


async def _upper_tiles(store: Store, tree: Document) -> AsyncGenerator[list[Document], None]:
    """The tiles of a tree above level 0, in pages."""
    level = 1
    while tree["size"] >> (TILE_BITS * level):
        after: tuple[int, str] | None = None
        where = And(Where("tree", "==", tree["id"]), Where("level", "==", level))
        while True:
            found = await store.find(TILES, None, Query(where, ("number",), limit=TILES_AT_ONCE, start_after=after))
            if found:
                yield found
            if len(found) < TILES_AT_ONCE:
                break
            after = found[-1]["number"], found[-1]["id"]
        level += 1


async def _documents(store: Store, collection: str) -> AsyncGenerator[list[Document], None]:
    """All documents of a global collection, in pages."""
    after: tuple[str, ...] | None = None
    while True:
        found = await store.find(collection, None, Query(limit=ROUNDS_AT_ONCE, start_after=after))
        if found:
            yield found
        if len(found) < ROUNDS_AT_ONCE:
            return
        after = (found[-1]["id"],)


async def _copy_documents(run: Run, collection: str) -> None:
    async with aclosing(_documents(run.source, collection)) as pages:
        async for page in pages:
            batch: list[Operation] = []
            size = 0
            for one in page:
                document = _fields(collection, one)
                more = document_size(document)
                if batch and (size + more > MAX_BATCH_BYTES or len(batch) >= MAX_OPERATIONS):
                    await _commit(run, batch)
                    batch, size = [], 0
                batch.append(Put(collection, one["id"], document))
                size += more
            if batch:
                await _commit(run, batch)


async def _commit(run: Run, operations: Sequence[Operation]) -> None:
    await run.target.commit(Batch(None, tuple(operations), now_us()))
    run.committed += 1
