"""Retention: how long journal records are kept, and the job that archives and drops those that are older.

Whole tiles of level 0 go, oldest first, tree by tree. A segment of them is written to the archive. One batch then
removes the tiles, moves the tree's first index and adds a record to the journal, and the records are dropped after it.
A process that is killed in between is continued by the next run: the archive's file is used as it is, and the records
before a tree's first index are dropped again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from ..access import ALL_TENANTS, bound_to, may_see, writer
from ..clock import Clock
from ..context import Context, new_salt, next_id, system_context, us_from_utc
from ..database import Database, Transaction
from ..entities import MAX_LIMIT, And, Document, Query, Where
from ..errors import AlreadyExists, Conflict, Denied, InvalidInput, NotFound, Problem
from ..jobs import AcquiredLease
from ..journal.export import Sign, export_tree, logged_tree
from ..journal.trees import DROP, JOURNAL, PLATFORM, TILE, JournalRound, JournalTile, JournalTree, tree_id
from ..storage.port import (
    Append,
    Batch,
    Check,
    Create,
    Delete,
    JournalFilter,
    Operation,
    Patch,
    Record,
    Store,
)
from .archive import Archive
from .legal_holds import LegalHolds, touch_policy
from .model import MAX_DAYS, NEW_STORE_DAYS, POLICY, LegalHold, RetentionPolicy

"""The action of the record that says which records were dropped."""
JOB = "journal-retention"
RETENTION_EVERY_S = 3_600.0
MAX_SEGMENT_TILES = 64
"""Tiles that one segment of the archive has, and one batch removes."""
ROUNDS_AT_ONCE = 200
SAVE_EVERY_S = 2.0
"""How often the job renews its lease while trees have nothing to drop."""
_DAY_US = 86_400_000_000
TREES, TILES, ROUNDS = (cls.__collection__.name for cls in (JournalTree, JournalTile, JournalRound))
POLICIES = RetentionPolicy.__collection__.name
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """How long a tenant's records are kept: `days` None is for ever. `floor_days` is the least."""

    tenant: str | None
    days: int | None
    floor_days: int


class Policies:
    """The retention policies of one store. `days`: the setting for all tenants; None: what the store has."""

    def __init__(self, database: Database, days: int | None) -> None:
        self._database = database
        self._days = days

    async def begin(self, new: Callable[[], Awaitable[bool]]) -> None:
        """Note at the first start how long a store keeps its journal: a `new` one NEW_STORE_DAYS, an older one for
        ever."""
        if await self._database.get_or_none(system_context(), RetentionPolicy, POLICY) is not None:
            return
        policy = RetentionPolicy(id=POLICY, days=NEW_STORE_DAYS if await new() else None)
        document = RetentionPolicy.__codec__.encode(policy)
        try:
            await self._database.commit_counters([Create(POLICIES, POLICY, document)], self._database.now_us())
        except AlreadyExists:
            return  # another process starts at the same time

    async def of(self, tenant: str | None, *, everyone: bool = False, context: Context | None = None) -> Kept:
        """What counts for a tenant (None: for the platform; `everyone`: for all without own days). Raises Denied for
        another tenant's."""
        if tenant is not None and not may_see(context, tenant):
            raise Denied(f"the caller belongs to tenant {bound_to(context)!r}, not to {tenant!r}")
        system = system_context()
        general = await self._database.get_or_none(system, RetentionPolicy, POLICY)
        own = await self._database.get_or_none(system, RetentionPolicy, POLICY if everyone else tree_id(tenant))
        floor = max(one.floor_days if one is not None else 0 for one in (general, own))
        days = own.days if own is not None and not everyone else None
        if days is None:
            days = self._days if self._days is not None else general.days if general is not None else None
        return Kept(tenant, None if days is None else max(days, floor), floor)

    async def version(self) -> int:
        """The version of the policy that counts for all tenants."""
        policy = await self._database.get_or_none(system_context(), RetentionPolicy, POLICY)
        return (policy.version or 0) if policy is not None else 0

    async def guard(self) -> Check:
        """The condition that no legal hold was placed, and no policy for all tenants changed, since now."""
        return Check(POLICIES, POLICY, await self.version())

    async def set(
        self,
        tenant: str | None,
        *,
        everyone: bool = False,
        days: int | None = None,
        floor_days: int | None = None,
        context: Context | None = None,
    ) -> Kept:
        """Set how long a tenant's records are kept (None: the platform's; `everyone`: all that have no own days), and
        raise the floor. InvalidInput for days below the floor and for a lower floor, Denied."""
        by = writer(context, ALL_TENANTS)
        id = POLICY if everyone else tree_id(tenant)
        problems = [
            Problem(name, f"found {value}, expected {least} to {MAX_DAYS}")
            for name, value, least in (("days", days, 1), ("floor_days", floor_days, 0))
            if value is not None and not least <= value <= MAX_DAYS
        ]
        if problems:
            raise InvalidInput(problems)

        async def body(tx: Transaction) -> None:
            now = await tx.get_or_none(RetentionPolicy, id)
            general = now if everyone else await tx.get_or_none(RetentionPolicy, POLICY)
            floor = now.floor_days if now is not None else 0
            if floor_days is not None and floor_days < floor:
                raise InvalidInput(
                    [Problem("floor_days", f"found {floor_days}, but a floor is never lowered: it is {floor}")]
                )
            new_floor = max(floor, floor_days or 0)
            least = max(new_floor, general.floor_days if general is not None else 0)
            new_days = days if days is not None else now.days if now is not None else None
            if days is not None and days < least:
                raise InvalidInput([Problem("days", f"found {days}, expected at least the floor of {least}")])
            await tx.replace(RetentionPolicy(id=id, tenant=tenant, days=new_days, floor_days=new_floor))
            if not everyone:
                await touch_policy(tx)

        await self._database.transaction(by, body)
        return await self.of(tenant, everyone=everyone)


class Retention:
    """The job. `drop_empty` drops parts of the store that have no record any more, where it has parts."""

    def __init__(
        self,
        database: Database,
        store: Store,
        clock: Clock,
        policies: Policies,
        holds: LegalHolds,
        archive: Archive | None,
        sign: Sign,
        drop_empty: Callable[[], Awaitable[int]] | None = None,
    ) -> None:
        self._database = database
        self._store = store
        self._clock = clock
        self._policies = policies
        self._holds = holds
        self._archive = archive
        self._sign = sign
        self._drop_empty = drop_empty

    async def run(self, lease: AcquiredLease) -> None:
        """Drop what is old enough, of every tree."""
        last_rounds: set[int] = set()
        dropped, saved = 0, time.monotonic()
        async for tree in self.trees():
            last_rounds |= {tree["round"], tree["previous_round"]}
            if tree["dropped_sequence"] or tree["size"] - tree["first_index"] >= TILE:
                dropped += await self.tree(lease, tree["tenant"])
            if time.monotonic() - saved > SAVE_EVERY_S:
                await lease.save(None)
                saved = time.monotonic()
        dropped += await self._drop_rounds(lease, last_rounds)
        if dropped and self._drop_empty is not None:
            await self._drop_empty()

    async def trees(self) -> AsyncIterator[Document]:
        """The documents of all trees."""
        after = ""
        while True:
            where = Where("id", ">", after) if after else None
            page = await self._store.find(TREES, None, Query(where, ("id",), limit=MAX_LIMIT))
            for tree in page:
                yield tree
            if len(page) < MAX_LIMIT:
                return
            after = page[-1]["id"]

    async def tree(self, lease: AcquiredLease, tenant: str | None) -> int:
        """Drop what is old enough of one tree; the number of dropped records. Nothing while its writes are off."""
        writes = self._database.writes
        if writes.refusal is not None or writes.why_off(tenant) is not None:
            return 0
        dropped = await self._finish(tenant)
        kept = await self._policies.of(tenant)
        if kept.days is None:
            return dropped
        before_us = self._clock.now_us() - kept.days * _DAY_US
        while (count := await self._segment(lease, tenant, before_us)) is not None:
            dropped += count
        return dropped

    async def _finish(self, tenant: str | None) -> int:
        """Drop the records before a tree's first index, if a killed process left some."""
        tree = await self._store.get(TREES, None, tree_id(tenant))
        if tree is None or not (last := tree["dropped_sequence"]):
            return 0
        where = JournalFilter(tenant=tenant, platform=tenant is None, through_sequence=last)
        if not (await self._store.rows(None, where, limit=1)).rows:
            return 0
        return await self._store.drop(tenant, last)

    async def _segment(self, lease: AcquiredLease, tenant: str | None, before_us: int) -> int | None:
        """Archive and drop one segment; the number of its records. None if no tile is old enough, or a legal hold
        blocks the oldest."""
        guard = await self._policies.guard()
        holds = [hold for hold in await self._holds.active() if hold.concerns(tenant)]
        try:
            logged = await logged_tree(self._store, tenant)
        except NotFound:
            return None
        tree = await self._store.get(TREES, None, logged.reader.id)
        if tree is None or tree["broken"]:
            return None
        first: int = tree["first_index"]
        tiles = await self._old_tiles(tree, logged.reader.size, before_us)
        tiles = tiles[: await self._free(tenant, tiles, holds)]
        if not tiles:
            return None
        end = (tiles[-1]["number"] + 1) * TILE
        if self._archive is not None:
            written = next(
                (one for one in self._archive.segments(tree["id"]) if one[0] == first and one[1] <= end), None
            )
            if written is not None and (await self._archive.verify(written[2])).whole:
                end = written[1]  # a process was killed after it wrote this
                tiles = tiles[: (end - first) // TILE]
            else:
                note = await logged.checkpoint(self._sign)
                lines = export_tree(self._store, logged, note, first=first, end=end)
                await self._archive.write_segment(tree["id"], first, end, lines)
            await lease.save(None)
        last = tiles[-1]["last_sequence"] or tree["dropped_sequence"]
        after = {"first_index": first, "end": end, "archived": self._archive is not None}
        operations: list[Operation] = [
            lease.guard,
            guard,
            *(Delete(TILES, tile["id"]) for tile in tiles),
            Patch(TREES, tree["id"], {"first_index": end, "dropped_sequence": last}, expected=tree["version"]),
            Append(journal_record(tenant, self._clock.now_us(), DROP, tree["id"], after)),
        ]
        try:
            await self._store.commit(Batch(None, tuple(operations), self._clock.now_us()))
        except Conflict:
            await lease.save(None)  # raises if the lease was lost; else a hold was placed, or records were sealed
            return 0
        return await self._store.drop(tenant, last) if last else 0

    async def _old_tiles(self, tree: Document, logged: int, before_us: int) -> list[Document]:
        """The tiles from the first one on whose records are all older, as far as the log covers them."""
        where = And(
            Where("tree", "==", tree["id"]), Where("level", "==", 0), Where("number", ">=", tree["first_index"] // TILE)
        )
        found: list[Document] = []
        for tile in await self._store.find(TILES, None, Query(where, ("number",), limit=MAX_SEGMENT_TILES)):
            if us_from_utc(tile["last_at"]) >= before_us or (tile["number"] + 1) * TILE > logged:
                break
            if tile["number"] * TILE != tree["first_index"] + len(found) * TILE:
                break
            found.append(tile)
        return found

    async def _free(self, tenant: str | None, tiles: Sequence[Document], holds: Sequence[LegalHold]) -> int:
        """How many of the tiles, from the first on, have no record that is under a legal hold."""
        for number, tile in enumerate(tiles):
            first_us, last_us = us_from_utc(tile["first_at"]), us_from_utc(tile["last_at"])
            overlapping = [hold for hold in holds if hold.overlaps(first_us, last_us)]
            if any(not hold.of_subject for hold in overlapping):
                return number
            if overlapping and await self._held(tenant, tile, overlapping):
                return number
        return len(tiles)

    async def _held(self, tenant: str | None, tile: Document, holds: Sequence[LegalHold]) -> bool:
        """Whether a record of the tile is under one of these holds."""
        if tile["first_sequence"] is None:
            return False
        where = JournalFilter(
            tenant=tenant,
            platform=tenant is None,
            after_sequence=tile["first_sequence"] - 1,
            through_sequence=tile["last_sequence"],
        )
        cursor = None
        while True:
            page = await self._store.rows(cursor, where)
            if any(hold.holds(row) for row in page.rows for hold in holds):
                return True
            if page.cursor == cursor:
                return False
            cursor = page.cursor

    async def _drop_rounds(self, lease: AcquiredLease, last_rounds: set[int]) -> int:
        """Remove the rounds before the first index of the platform's tree, but for those that sealed a tree last."""
        platform = await self._store.get(TREES, None, PLATFORM)
        if platform is None or not platform["first_index"]:
            return 0
        after = -1
        total = 0
        while True:
            where = And(Where("index", ">", after), Where("index", "<", platform["first_index"]))
            page = await self._store.find(ROUNDS, None, Query(where, ("index",), limit=ROUNDS_AT_ONCE))
            if not page:
                return total
            after = page[-1]["index"]
            gone = [Delete(ROUNDS, one["id"]) for one in page if one["number"] not in last_rounds]
            if gone:
                await self._store.commit(Batch(None, (lease.guard, *gone), self._clock.now_us()))
                total += len(gone)
            await lease.save(None)


def journal_record(
    tenant: str | None,
    now_us: int,
    action: str,
    entity_id: str,
    after: Document,
    *,
    actor: str = "system",
    request_id: str = "",
) -> Record:
    """A record about the journal itself."""
    return Record(
        id=next_id(), tenant=tenant, at_us=now_us, actor=actor, request_id=request_id, action=action,
        collection=JOURNAL, entity_id=entity_id, after=after, salt=new_salt(),
    )  # fmt: skip


__all__ = ["DROP", "JOB", "RETENTION_EVERY_S", "Kept", "Policies", "Retention", "journal_record"]
