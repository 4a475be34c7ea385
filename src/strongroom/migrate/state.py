"""How far a migration is, kept in its target beside what it has written; and what every step of it works with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..context import next_id
from ..database import QueryShape, StoreState
from ..database.write_state import WRITES
from ..entities import Collection, Document, Entity, Index, Query, Where
from ..jobs import JobLease
from ..storage.port import (
    MAX_BATCH_BYTES,
    MAX_OPERATIONS,
    Append,
    Batch,
    Create,
    Delete,
    Operation,
    Patch,
    Put,
    Record,
    Store,
)
from .checksum import Canonical

CURRENT = "current"
BATCH_BYTES = MAX_BATCH_BYTES - 10_000
"""What a batch may hold beside what it says of its progress."""
NO_SUM = "0" * 64


class Phase(StrEnum):
    """The steps in their order. The last three are those of a rollback."""

    CLEARING = "clearing"
    JOURNAL = "journal"
    COPYING = "copying"
    FOLLOWING = "following"
    SWITCHING = "switching"
    DONE = "done"
    REMOVING = "removing"
    RESTORING = "restoring"
    ROLLED_BACK = "rolled back"


UNDOING = frozenset({Phase.REMOVING, Phase.RESTORING})


class Migration(Entity, collection="migrations", scope="global", journalled=False):
    """The one migration into this store. `source` and `target` are URLs without passwords.

    `cursor` is from where on the source's journal is taken over, `target_cursor` behind what it is appended here.
    `fence` is what the target said of its writes before, `switched` whether the source's were turned off.
    """

    source: str
    target: str
    phase: str
    nonce: str
    live: bool = False
    journal: bool = True
    cursor: str | None = None
    target_cursor: str | None = None
    followed: int = 0
    backup: str | None = None
    fence: str | None = None
    switched: bool = False
    late: int = 0
    pause_ms: int | None = None
    begun_at: datetime
    ended_at: datetime | None = None


class MigrationPart(Entity, collection="migration_parts", scope="global", journalled=False, indexes=[Index("part")]):
    """How far one part is: a collection of one tenant, the journal, the restoring of a backup. There is one of a part.

    `number` counts the batches, `position` is the last id, or the journal's cursor; `count` and `checksum` are of what
    was written. The id is new with each batch: see `Baton`.
    """

    part: str
    of: str
    tenant: str | None = None
    number: int = 0
    position: str | None = None
    count: int = 0
    checksum: str = NO_SUM
    done: bool = False


MIGRATIONS, PARTS, STORE_STATE = (c.__collection__ for c in (Migration, MigrationPart, StoreState))
OWN = (MIGRATIONS, PARTS, STORE_STATE)
NOT_MOVED = frozenset(c.name for c in (*OWN, JobLease.__collection__, QueryShape.__collection__))
"""What a store says of itself stays where it is: its nodes' leases, whose positions mean its own journal, and which
queries it was asked."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked. `batch`: operations in a batch. `ignore`: collections that are left behind.

    `source` and `target` are what the stores are called, in messages and in what is kept: URLs without passwords.
    """

    source: str = "the source"
    target: str = "the target"
    live: bool = False
    switch: bool = False
    overwrite: bool = False
    backup: Path | None = None
    journal: bool = True
    ignore: tuple[str, ...] = ()
    batch: int = MAX_OPERATIONS


@dataclass(frozen=True, slots=True)
class Part:
    """The documents of one collection, of one tenant or (None) of the platform."""

    collection: Collection
    tenant: str | None

    @property
    def id(self) -> str:
        """The id of its MigrationPart: of a fixed length, whatever a tenant is called."""
        return sha256(f"{self.collection.name}\x00{self.tenant or ''}\x00{self.tenant is None}".encode()).hexdigest()

    def __str__(self) -> str:
        return self.collection.name if self.tenant is None else f"{self.collection.name} of tenant {self.tenant!r}"


JOURNAL_PART = "journal"
RESTORED_PART = "restored"


class Baton:
    """A part's progress, handed from batch to batch: each removes what the one before it has left, and leaves its own.

    So a batch is refused unless it comes right behind the one before, and no batch is applied twice; and since no
    document is touched twice in a batch, a store may write all of it as sets.
    """

    def __init__(self, state: MigrationPart) -> None:
        self.state = state

    def taken(self) -> tuple[Delete, ...]:
        """What begins a batch: there is nothing to take from a part that was not begun."""
        return (Delete(PARTS.name, self.state.id),) if self.state.id else ()

    def handed_on(self, **fields: Any) -> Create:
        """What ends the batch. It is what the next one takes."""
        number = self.state.number + 1
        self.state = self.state.model_copy(update={**fields, "number": number, "id": f"{self.state.part}-{number}"})
        return Create(PARTS.name, self.state.id, MigrationPart.__codec__.encode(self.state))


async def standing(store: Store, part: str) -> MigrationPart | None:
    """How far a part is, as it was last committed."""
    found = await store.find(PARTS.name, None, Query(Where("part", "==", part), limit=1).check(PARTS))
    return MigrationPart.__codec__.decode(found[0]) if found else None  # type: ignore[return-value]


Progress = Callable[[str, int, int | None], None]
"""Takes what is being done, how much of it is done, and how much there is (None: not known)."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """Nobody watches."""


class Run:
    """One call's view of a migration: both stores, the collections that move, the state as it was last committed."""

    def __init__(
        self,
        source: Store,
        target: Store,
        collections: Sequence[Collection],
        options: Options,
        progress: Progress = no_progress,
    ) -> None:
        self.source = source
        self.target = target
        self.options = options
        self.progress = progress
        left = NOT_MOVED | frozenset(options.ignore)
        self.collections: Mapping[str, Collection] = {c.name: c for c in collections if c.name not in left}
        self.canonical: Mapping[str, Canonical] = {n: Canonical(c) for n, c in self.collections.items()}
        self.state: Migration | None = None
        self.journal = MigrationPart(part=JOURNAL_PART, of=JOURNAL_PART)
        self.committed = 0
        """Batches that have moved the state: a failure after some of them is not the same failure again."""

        self.declared = tuple(self.collections.values())
        self.held: tuple[Collection, ...] = ()
        """Those of them that the source has."""

    @property
    def switching(self) -> bool:
        """Whether it was this migration that turned the source's writes off."""
        return self.state is not None and self.state.switched

    @property
    def migration(self) -> Migration:
        """The state. There must be one."""
        if self.state is None:
            raise AssertionError("a migration is begun before it goes on")
        return self.state

    async def load(self) -> Migration | None:
        """Read the state as it is in the target."""
        document = await self.target.get(MIGRATIONS.name, None, CURRENT)
        self.state = None if document is None else Migration.__codec__.decode(document)  # type: ignore[assignment]
        self.journal = await standing(self.target, JOURNAL_PART) or MigrationPart(part=JOURNAL_PART, of=JOURNAL_PART)
        return self.state

    async def save(self, *more: Operation, **fields: Any) -> None:
        """Change the state, and whatever else belongs into the same batch."""
        await self.target.commit(Batch(None, (self.patch(**fields), *more), now_us()))
        self.note(**fields)

    def patch(self, **fields: Any) -> Patch:
        return Patch(MIGRATIONS.name, CURRENT, fields)

    def begin_journal(self) -> Create:
        """The journal's progress before its first batch, which takes it as every other batch does."""
        baton = Baton(MigrationPart(part=JOURNAL_PART, of=JOURNAL_PART))
        first = baton.handed_on(position=self.migration.cursor)
        self.journal = baton.state
        return first

    def note(self, **fields: Any) -> None:
        """These fields were committed."""
        self.committed += 1
        self.migration.__dict__.update(fields)


def now_us() -> int:
    return time.time_ns() // 1_000


def fence(allowed: bool, reason: str = "", other_store: str = "", *, at: int = 0) -> tuple[Put, Append]:
    """What turns a store's writes on or off, and tells every process so; in its batch it begins at index `at`. Whoever
    calls the store's API is told `reason`, so that `other_store` must not stand in it."""
    document: Document = {"allowed": allowed, "reason": reason, "other_store": other_store}
    record = Record(
        id=next_id(),
        tenant=None,
        at_us=now_us(),
        actor="migrate",
        request_id=next_id(),
        action="update",
        collection=STORE_STATE.name,
        entity_id=WRITES,
        after=document,
    )
    return Put(STORE_STATE.name, WRITES, document), Append(record, at)
