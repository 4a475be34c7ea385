"""Seals the journal: adds its new records to their trees, in rounds.

A round reads the records after the log's cursor and extends the trees of their tenants, each in one batch with its
tiles. The last batch of a round extends the platform's tree with its own records and with the round's leaf, and moves
the log on. So a process may be killed between any two batches: the next round reads the same records again, skips
those that a tree has already, and finishes the same round.

Only one process seals at a time, under a lease whose guard is in each batch. Besides, each batch expects the versions
of the documents that it replaces.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..context import us_from_utc, utc_from_us
from ..cooperative import Slices
from ..entities import MAX_IN, MAX_LIMIT, MAX_PAGE_BYTES, Document, Query, Where
from ..errors import ConfigError, Conflict, StoreError
from ..storage.port import (
    MAX_BATCH_BYTES,
    MAX_CHANGES_PAGE,
    MAX_OPERATIONS,
    Batch,
    Check,
    Create,
    Operation,
    Patch,
    Put,
    RowsPage,
    Store,
    document_size,
)
from .leaf import leaf_of
from .log import LOGS, log_of, made_log
from .signed_note import Checkpoint, SignedNote
from .tree_reader import ROUNDS, TILES, Leaf, TreeReader, salted
from .tree_state import NO_SEQUENCE, TREES, Disagreement, TreeState
from .trees import (
    LOG,
    PLATFORM,
    TILE,
    JournalLog,
    new_round,
    round_id,
    tile_id,
    tree_id,
)

MAX_RECORDS = 20_000
"""Records that one round seals, and a page more."""
MAX_TREES = 2_500
"""Trees that one round extends, and those of a page more: their entries fit into one document, even after a crash."""
KEPT_TREES = 4_096
"""Trees that stay in memory, each with the leaves of its last tile (10 KB at most)."""
TREE_BYTES = 4_096
"""The most that the document of a tree has."""
PAUSE_EVERY = 16
"""After so many records a round looks whether others are to run: some 100 microseconds."""
FIRST_ROWS = 100
RENEW_EVERY_S = 1.0
_log = logging.getLogger(__name__)


class JournalBroken(StoreError):
    """The stored records do not agree with the platform's tree, so nothing may be sealed and signed upon it."""


class Clock(Protocol):
    """Gives the store's time, as `clock` does."""

    def now_us(self) -> int: ...


class Lease(Protocol):
    """The right to seal, as `jobs.AcquiredLease` gives it."""

    @property
    def guard(self) -> Check: ...

    @property
    def position(self) -> str | None: ...

    async def save(self, position: str | None) -> None: ...


class Signer(Protocol):
    """Signs the log's checkpoints, as `signing_key.SigningKeys` does."""

    def sign(self, checkpoint: Checkpoint, time_s: int) -> str:
        """The signed note. Raises ConfigError if the key cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class Sealed:
    """The work of a round: how many `records` it sealed, the time of the oldest. `more`: others may be left."""

    records: int = 0
    trees: int = 0
    more: bool = False
    oldest_us: int | None = None


class Sealer:
    """Seals one store's journal. Call `forget` when another process may have sealed since the last round."""

    def __init__(self, store: Store, clock: Clock, signer: Signer | None = None) -> None:
        self._store = store
        self._clock = clock
        self.signer = signer
        self._stored_log: Document | None = None
        self._trees: OrderedDict[str, TreeState] = OrderedDict()
        self._ahead: dict[str, TreeState] = {}
        self._limit = FIRST_ROWS
        self._renewed_at = 0.0
        self.broken: dict[str, str] = {}
        """Why trees are not extended any more, by their ids, as far as this process has met them."""

    def forget(self) -> None:
        """Read everything anew at the next round."""
        self._stored_log = None
        self._trees.clear()
        self._ahead.clear()

    async def behind(self) -> bool:
        """Whether there are records after the log's cursor, as the store has it now."""
        log = await log_of(self._store)
        cursor = log["cursor"] if log is not None else None
        while True:
            page = await self._store.rows(cursor, limit=1)
            if page.rows or page.cursor == cursor:
                return bool(page.rows)
            cursor = page.cursor

    async def round(self, lease: Lease) -> Sealed:
        """Seal what was committed since the last round, up to MAX_RECORDS. Raises Conflict if another process has the
        lease, and the errors of the store; then nothing, or a part of the round that is continued later, was done."""
        self._renewed_at = time.monotonic()
        try:
            try:
                return await self._round(lease)
            except Conflict:  # retention moved the first index of a tree, or another process has the lease
                self.forget()
                return await self._round(lease)
        except BaseException:
            self.forget()  # what was committed is not known
            raise

    async def _round(self, lease: Lease) -> Sealed:
        log = self._stored_log or await self._begin()
        number, cursor, secret = log["round"] + 1, log["cursor"], log["legacy_secret"]
        touched = dict(self._ahead)
        records, seen, oldest_us, more = 0, 0, None, True
        slices = Slices()
        while records < MAX_RECORDS and len(touched) < MAX_TREES:
            page = await self._page(cursor)
            if page.cursor == cursor:
                more = False
                break
            states = await self._states({row[2] for row in page.rows}, log)
            for at, row in enumerate(page.rows):
                if not at % PAUSE_EVERY and slices.over:
                    await slices.pause()
                state = states[row[2]]
                if row[0] <= state.sequence or state.broken:
                    continue
                state.add(leaf_of(row if row[12] else salted(row, secret)), row[0], row[3])
                records += 1
                touched[state.id] = state
                if oldest_us is None or row[3] < oldest_us:
                    oldest_us = row[3]
            seen += len(page.rows)
            short = len(page.rows) < self._limit
            cursor = page.cursor
            self._fit(page)
            await self._renew(lease)
            if short:
                break
        if not touched and not seen:
            return Sealed()
        platform = touched.pop(PLATFORM, None)
        await self._commit_trees(lease, touched.values(), number)
        await self._finish(lease, log, number, cursor, platform, touched)
        self._shrink()
        return Sealed(records, len(touched) + (platform is not None), more, oldest_us)

    # --- Reading ----------------------------------------------------------------------------------------------

    async def _begin(self) -> Document:
        """Read the log, or make it, and the trees that an unfinished round extended."""
        log = await made_log(self._store, self._clock.now_us())
        self._ahead = {}
        after: tuple[str, ...] | None = None
        while True:
            where = Where("round", "==", log["round"] + 1)
            found = await self._store.find(TREES, None, Query(where, limit=MAX_LIMIT, start_after=after))
            for stored in found:
                state = await self._restored(TreeState(stored["tenant"], stored), log)
                self._ahead[state.id] = self._trees[state.id] = state
            if len(found) < MAX_LIMIT:
                break
            after = (found[-1]["id"],)
        self._stored_log = log
        return log

    async def _page(self, cursor: str | None) -> RowsPage:
        return await self._store.rows(cursor, limit=self._limit)

    def _fit(self, page: RowsPage) -> None:
        """Read about MAX_PAGE_BYTES at once."""
        size = sum(len(row[10] or "") + len(row[11] or "") + 200 for row in page.rows)
        fitting = MAX_PAGE_BYTES * len(page.rows) // max(size, 1)
        self._limit = max(1, min(4 * self._limit, fitting or self._limit, MAX_CHANGES_PAGE))

    async def _states(self, tenants: set[str | None], log: Document) -> dict[str | None, TreeState]:
        """The trees of these tenants, those that are not in memory from the store."""
        found = {}
        missing = {}
        for tenant in tenants:
            id = tree_id(tenant)
            state = self._trees.get(id)
            if state is None:
                missing[id] = tenant
            else:
                self._trees.move_to_end(id)
                found[tenant] = state
        ids = sorted(missing)
        for at in range(0, len(ids), MAX_IN):
            some = ids[at : at + MAX_IN]
            stored = {one["id"]: one for one in await self._store.find(TREES, None, _of_ids(some))}
            for id in some:
                state = await self._restored(TreeState(missing[id], stored.get(id)), log)
                found[missing[id]] = self._trees[id] = state
        return found

    async def _restored(self, state: TreeState, log: Document) -> TreeState:
        """The tree with what it needs to be extended; broken, if its records do not agree with it."""
        if state.broken:
            self.broken[state.id] = state.broken
            return state
        if not state.size:
            return state
        try:
            upper = {}
            for level, number in state.incomplete_tiles():
                tile = await self._store.get(TILES, None, tile_id(state.id, level, number))
                upper[level, number] = tile["hashes"] if tile is not None else b""
            reader = TreeReader(self._store, state.document(), log["legacy_secret"])
            leaves = [_placed(leaf) async for leaf in reader.leaves(state.size - state.size % TILE)]
            state.restore(leaves, upper)
        except (Disagreement, ValueError) as error:  # ValueError: a salt, or a round, of an impossible form
            await self._break(state, str(error))
        return state

    async def _break(self, state: TreeState, reason: str) -> None:
        """Extend this tree no more, so that the others go on and nobody signs what does not fit."""
        whose = "the platform" if state.tenant is None else f"tenant {state.tenant!r}"
        _log.error("the journal of %s was changed behind Strongroom, and is not sealed any more: %s", whose, reason)
        state.broken = self.broken[state.id] = reason
        if state.tenant is not None:
            await self._commit([Patch(TREES, state.id, {"broken": reason}, expected=state.version)])

    # --- Writing ----------------------------------------------------------------------------------------------

    async def _commit_trees(self, lease: Lease, states: Iterable[TreeState], number: int) -> None:
        """Commit what was added to the trees of tenants, several in a batch, each in one."""
        operations: list[Operation] = []
        members: list[tuple[TreeState, int]] = []
        size = 0
        now_us = self._clock.now_us()
        extended = [(state, state.operations(number, now_us)) for state in states if state.extended]
        # First the trees without new tiles: batches of nothing but patches are several times as fast on SQLite.
        for state, some in sorted(extended, key=lambda one: not _is_patch(one[1])):
            weight = _weight(some)
            changes_kind = bool(operations) and _is_patch(operations) and not _is_patch(some)
            if operations and (
                changes_kind or len(operations) + len(some) >= MAX_OPERATIONS or size + weight > MAX_BATCH_BYTES // 2
            ):
                await self._commit_some(lease, operations, members)
                operations, members, size = [], [], 0
            operations += some
            members.append((state, len(operations)))  # behind the guard, the last operation has this index
            size += weight
        if operations:
            await self._commit_some(lease, operations, members)

    async def _commit_some(
        self, lease: Lease, operations: Sequence[Operation], members: Sequence[tuple[TreeState, int]]
    ) -> None:
        versions = await self._commit([lease.guard, *operations])
        for state, index in members:
            state.committed(versions[index])
        await self._renew(lease)

    async def _finish(
        self,
        lease: Lease,
        log: Document,
        number: int,
        cursor: str | None,
        platform: TreeState | None,
        touched: dict[str, TreeState],
    ) -> None:
        """The last batch: the platform's tree with the round's leaf, the round, and the log."""
        now_us = self._clock.now_us()
        changed = {name: value for name, value in log.items() if name in _LOG_FIELDS} | {"cursor": cursor}
        operations: list[Operation] = []
        if platform is None and touched:
            platform = (await self._states({None}, log))[None]
        if platform is not None:
            if not platform.size and log["round"]:
                await self._break(platform, "its tree was removed")
            if platform.broken:
                raise JournalBroken(f"nothing is sealed: the platform's journal was changed: {platform.broken}")
            entries = [
                (state.id, state.size, state.root().hex())
                for state in sorted(touched.values(), key=lambda state: state.id)
                if not state.broken
            ]
            text, leaf = new_round(number, entries)
            round = {"number": number, "index": platform.size, "entries": text, "sealed_at": utc_from_us(now_us)}
            platform.add(leaf, NO_SEQUENCE, now_us)
            checkpoint = Checkpoint(log["origin"], platform.size, platform.root())
            changed["round"], changed["checkpoint_size"] = number, platform.size
            changed["checkpoint"] = self._signed(checkpoint, now_us)
            operations = [Create(ROUNDS, round_id(number), round), *platform.operations(number, now_us)]
        operations.append(Put(LOGS, LOG, changed, expected=log["version"]))
        versions = await self._commit([lease.guard, *operations])
        if platform is not None:
            platform.committed(versions[-2])
        self._stored_log = {**log, **changed, "version": versions[-1]}
        self._ahead = {}

    def _signed(self, checkpoint: Checkpoint, now_us: int) -> str:
        """The note, unsigned if there is no key or it cannot be used: records are sealed all the same."""
        if self.signer is not None:
            try:
                return self.signer.sign(checkpoint, now_us // 1_000_000)
            except ConfigError:  # the signer has logged it, and reports it
                pass
        return str(SignedNote(checkpoint.text))

    async def _commit(self, operations: Sequence[Operation]) -> tuple[int, ...]:
        committed = await self._store.commit(Batch(None, tuple(operations), self._clock.now_us()))
        return committed.versions

    async def _renew(self, lease: Lease) -> None:
        if (now := time.monotonic()) - self._renewed_at > RENEW_EVERY_S:
            await lease.save(lease.position)
            self._renewed_at = now

    def _shrink(self) -> None:
        while len(self._trees) > KEPT_TREES:
            self._trees.popitem(last=False)


_LOG_FIELDS = frozenset(JournalLog.__collection__.fields)


def _placed(leaf: Leaf) -> tuple[bytes, int, int]:
    """The hash, sequence and time of a leaf that is sealed already."""
    if leaf.row is not None:
        return leaf.hash, leaf.row[0], leaf.row[3]
    return leaf.hash, NO_SEQUENCE, us_from_utc(leaf.round["sealed_at"]) if leaf.round is not None else 0


def _of_ids(ids: Sequence[str]) -> Query:
    return Query(Where("id", "in", ids), limit=MAX_IN)


def _is_patch(operations: Sequence[Operation]) -> bool:
    return type(operations[0]) is Patch


def _weight(operations: Iterable[Operation]) -> int:
    return TREE_BYTES + sum(document_size(one.document) for one in operations if isinstance(one, Create | Put))


__all__ = ["JournalBroken", "Lease", "Sealed", "Sealer", "Signer"]
