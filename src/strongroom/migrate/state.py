"""The state of a migration, stored in its target in the batches that it describes; and the context of every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..context import next_id
from ..database import QueryShape, StoreState
from ..database.write_state import WRITES
from ..entities import Collection, Document, Entity, Index, Query, Where
from ..jobs import JobLease
from ..jobs.sealing import SEALING
from ..journal.trees import TREE_ENTITIES
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
"""The bytes of a batch without its progress document."""
NO_SUM = "0" * 64


class Phase(StrEnum):
    """The phases in their order. The last three belong to a rollback."""

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

    `carried`: whether the target's journal becomes that of the source, with its trees and its log; else the target had
    records of its own. `cursor`: where the copied part of the source's journal starts. `target_cursor`: the end of the
    target's journal before it. `fence`: why the target took no writes before, if so. `switched`: whether the source's
    writes are off.
    """

    source: str
    target: str
    phase: str
    nonce: str
    live: bool = False
    journal: bool = True
    carried: bool = False
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
    """The progress of one part: a collection of one tenant, the journal, or the restore of a backup.

    `number` counts batches; `position` is the last id or the journal's cursor; `count` and `checksum` describe the
    written documents. Each batch gives the document a new id: see `ProgressChain`.
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
TREES = tuple(entity.__collection__ for entity in TREE_ENTITIES)
LEASES = JobLease.__collection__
OWN = (MIGRATIONS, PARTS, STORE_STATE, LEASES, *TREES)
NOT_MOVED = frozenset(c.name for c in (*OWN, QueryShape.__collection__))
"""Collections about the store itself are not moved: job leases, whose positions refer to its journal, and the counted
query shapes. The journal's trees are built again (`trees`)."""
FOR_EVER = datetime(9999, 1, 1, tzinfo=UTC)
MIGRATE = "migrate"
"""The holder of the sealing lease, and the actor, of a migration."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a migration. `batch`: operations in a batch. `ignore`: collections that are not moved.

    `source` and `target` name the stores in messages and in the stored state: URLs without passwords.
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
        """The id of its MigrationPart, of a fixed length for any tenant name."""
        return sha256(f"{self.collection.name}\x00{self.tenant or ''}\x00{self.tenant is None}".encode()).hexdigest()

    def __str__(self) -> str:
        return self.collection.name if self.tenant is None else f"{self.collection.name} of tenant {self.tenant!r}"


JOURNAL_PART = "journal"
RESTORED_PART = "restored"


class ProgressChain:
    """The progress of a part as a chain: each batch deletes the progress document of the batch before, and creates its
    own.

    So the store refuses a batch that does not follow the batch before it directly, and applies no batch twice. And
    because no batch touches a document twice, a store can write it with set-based statements.
    """

    def __init__(self, state: MigrationPart) -> None:
        self.state = state

    def previous(self) -> tuple[Delete, ...]:
        """The first operation of a batch: it deletes the previous progress. The first batch of a part has none."""
        return (Delete(PARTS.name, self.state.id),) if self.state.id else ()

    def advance(self, **fields: Any) -> Create:
        """The last operation of a batch: it creates the progress that the next batch deletes."""
        number = self.state.number + 1
        self.state = self.state.model_copy(update={**fields, "number": number, "id": f"{self.state.part}-{number}"})
        return Create(PARTS.name, self.state.id, MigrationPart.__codec__.encode(self.state))


async def committed_progress(store: Store, part: str) -> MigrationPart | None:
    """The progress of a part, as it was committed last."""
    found = await store.find(PARTS.name, None, Query(Where("part", "==", part), limit=1).check(PARTS))
    return MigrationPart.__codec__.decode(found[0]) if found else None  # type: ignore[return-value]


Progress = Callable[[str, int, int | None], None]
"""Called with the step, how much of it is done, and how much there is (None: not known)."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """Report nothing."""


class Run:
    """The context of one call: both stores, the moved collections, and the state as it was committed last."""

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
        left_behind = NOT_MOVED | frozenset(options.ignore)
        self.collections: Mapping[str, Collection] = {c.name: c for c in collections if c.name not in left_behind}
        self.canonical: Mapping[str, Canonical] = {n: Canonical(c) for n, c in self.collections.items()}
        self.state: Migration | None = None
        self.journal = MigrationPart(part=JOURNAL_PART, of=JOURNAL_PART)
        self.committed = 0
        """Committed batches. Each one resets the number of retries."""

        self.declared = tuple(self.collections.values())
        self.existing: tuple[Collection, ...] = ()
        """The declared collections that the source has."""
        self.source_is_sealed = False
        """Whether the source has the collections of the journal's trees."""
        self.legacy_secret = b""
        """Gives salts to records of the source that are older than sealing; empty if it was never sealed."""

    @property
    def switching(self) -> bool:
        """Whether this migration turned the source's writes off."""
        return self.state is not None and self.state.switched

    @property
    def migration(self) -> Migration:
        """The state. Raises AssertionError before the migration started."""
        if self.state is None:
            raise AssertionError("the migration has no state yet")
        return self.state

    async def load(self) -> Migration | None:
        """Read the state from the target."""
        document = await self.target.get(MIGRATIONS.name, None, CURRENT)
        self.state = None if document is None else Migration.__codec__.decode(document)  # type: ignore[assignment]
        fresh = MigrationPart(part=JOURNAL_PART, of=JOURNAL_PART)
        self.journal = await committed_progress(self.target, JOURNAL_PART) or fresh
        return self.state

    async def save(self, *more: Operation, **fields: Any) -> None:
        """Change the state, together with `more` operations in the same batch."""
        await self.target.commit(Batch(None, (self.patch(**fields), *more), now_us()))
        self.note(**fields)

    def patch(self, **fields: Any) -> Patch:
        return Patch(MIGRATIONS.name, CURRENT, fields)

    def journal_progress(self) -> Create:
        """The journal's progress before its first batch, so that the first batch has a previous one too."""
        chain = ProgressChain(MigrationPart(part=JOURNAL_PART, of=JOURNAL_PART))
        first = chain.advance(position=self.migration.cursor)
        self.journal = chain.state
        return first

    def note(self, **fields: Any) -> None:
        """Apply committed fields to the state in memory."""
        self.committed += 1
        self.migration.__dict__.update(fields)


def now_us() -> int:
    return time.time_ns() // 1_000


def fence(allowed: bool, reason: str = "", other_store: str = "", *, at: int = 0) -> tuple[Put, Append]:
    """The operations that turn a store's writes on or off, and tell every process. `at`: their index in the batch.
    Callers of the store's API see `reason`, so it must not contain `other_store`."""
    document: Document = {"allowed": allowed, "reason": reason, "other_store": other_store}
    record = Record(
        id=next_id(),
        tenant=None,
        at_us=now_us(),
        actor=MIGRATE,
        request_id=next_id(),
        action="update",
        collection=STORE_STATE.name,
        entity_id=WRITES,
        after=document,
    )
    return Put(STORE_STATE.name, WRITES, document), Append(record, at)


async def sealing_stopped(store: Store) -> Put:
    """The operation that keeps every process from sealing the store's journal: the lease is the migration's."""
    found = await store.get(LEASES.name, None, SEALING)
    lease = JobLease() if found is None else JobLease.__codec__.decode(found)
    fields = JobLease.__codec__.encode(lease) | {"holder": MIGRATE, "expires_at": FOR_EVER}
    return Put(LEASES.name, SEALING, fields | {"token": fields["token"] + 1})


async def sealing_allowed(store: Store) -> tuple[Put, ...]:
    """The operation that gives the lease back, if the migration has it."""
    found = await store.get(LEASES.name, None, SEALING)
    if found is None or found["holder"] != MIGRATE:
        return ()
    fields = {name: found[name] for name in LEASES.fields} | {"holder": "", "expires_at": None}
    return (Put(LEASES.name, SEALING, fields),)
