"""The storage port: the interface of backends, which store and find documents and commit batches atomically.

The rules, which the conformance suite (`strongroom.testing`) checks:

- A document is a dict of the collection's declared fields (all present) and the system fields `id`, `version`,
  `created_at`, `updated_at`. Values are those of `entities.values`: None, bool, int64, finite float, Decimal, str,
  bytes, aware UTC datetime with microseconds, list, dict; a backend gives back equal values of the same type.
- `entities` has checked all arguments; a backend does not validate them again.
- A collection that was not prepared, and no tenant for a collection that is kept by tenant: InvalidInput.
- `tenant` is the tenant whose documents a call concerns; None for global collections. A backend must make it
  impossible, not just unlikely, that a call with tenant A sees or changes a document of tenant B.
- A version is the store's own, an opaque positive int64. Each change gives a document a greater version, and no id
  ever has one version twice, not even if it was deleted and made again, whatever the clocks do.
- The texts and bytes of one index are at most `MAX_INDEXED_BYTES` together, which `entities.entity` has checked.
- Errors are those of `strongroom.errors`; no driver's exception leaves a backend.
- A backend belongs to the event loop it was opened on.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec
from msgspec import Struct

from ..entities import Aggregate, Collection, Document, Filter, Query
from ..errors import TooLarge
from .journal_port import (
    JOURNAL_ROW,
    MAX_CHANGES_PAGE,
    WHOLE_JOURNAL,
    ChangesPage,
    JournalFilter,
    JournalRow,
    JournalStore,
    Record,
    RowsPage,
    past_the_end,
)

MAX_DOCUMENT_BYTES = 1_000_000
MAX_OPERATIONS = 500
MAX_BATCH_BYTES = 3_500_000
"""The greatest document with its journal record, before and after, is 3 MB; a message to Firestore's emulator 4 MiB."""
MAX_TENANTS_PAGE = 1_000


# --- Batches --------------------------------------------------------------------------------------------------


class Create(Struct, frozen=True):
    """Add a document. AlreadyExists if the id, or a value of a unique index, is taken.

    `document` has the declared fields; `created_at` and `updated_at` override the batch's time (imports, migrations).
    """

    collection: str
    id: str
    document: Document
    created_at: datetime | None = None
    updated_at: datetime | None = None


class Put(Struct, frozen=True):
    """Replace a document's declared fields, or add it. `expected` is the version it must have; None: any, 0: none.

    `created_at`, for a document that is there already too, and `updated_at` override what the store would set.
    """

    collection: str
    id: str
    document: Document
    expected: int | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class Patch(Struct, frozen=True):
    """Set some fields. NotFound if there is no document, Conflict if it has another version than `expected`."""

    collection: str
    id: str
    fields: Document
    expected: int | None = None


class Delete(Struct, frozen=True):
    """Remove a document. NotFound if there is none; Conflict if it has another version than `expected`."""

    collection: str
    id: str
    expected: int | None = None


class Add(Struct, frozen=True):
    """Add `amount` to an int field without reading it. NotFound if there is no document.

    BoundExceeded if the result would be above `at_most` or below `at_least`, or leave int64.
    """

    collection: str
    id: str
    field: str
    amount: int
    at_most: int | None = None
    at_least: int | None = None


class Check(Struct, frozen=True):
    """The document must have this version when the batch commits (0: must not exist). Conflict otherwise."""

    collection: str
    id: str
    expected: int


class Append(Struct, frozen=True):
    """Append a record to the journal. `of` is the index, in the same batch, of the operation whose version it takes
    (0 if that is a Delete)."""

    record: Record
    of: int | None = None


Operation = Create | Put | Patch | Delete | Add | Check | Append


class Batch(Struct, frozen=True):
    """Operations that commit together or not at all. At most MAX_OPERATIONS; an operation sees those before it.

    Operations on tenant collections concern `tenant`; those on global collections may stand beside them.
    `now_us` becomes `updated_at` (and `created_at`).
    """

    tenant: str | None
    operations: tuple[Operation, ...]
    now_us: int


class Committed(Struct, frozen=True):
    """The result of a durable commit: the new version of each operation's document (0 for delete, check, append), the
    new value of each Add by its index, and the sequence of the batch's last journal record (None without records).

    Of several operations on one document the last one's version is the document's; those before it have versions that
    are no greater."""

    versions: tuple[int, ...]
    values: Mapping[int, int] = msgspec.field(default_factory=dict)
    sequence: int | None = None


# --- Schema ---------------------------------------------------------------------------------------------------


class ChangeKind(StrEnum):
    CREATE_COLLECTION = "create collection"
    ADD_FIELD = "add field"
    ADD_INDEX = "add index"
    DROP_INDEX = "drop index"
    CHANGE_FIELD = "change field"
    DROP_FIELD = "drop field"
    DROP_COLLECTION = "drop collection"
    CHANGE_POLICIES = "change policies"
    """The engine's tenant isolation was changed by hand, and is set up again."""


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """One difference between the declarations and the store. A destructive one can lose data."""

    kind: ChangeKind
    collection: str
    name: str | None = None
    destructive: bool = False
    detail: str = ""

    def __str__(self) -> str:
        what = f"{self.collection}.{self.name}" if self.name else self.collection
        return f"{self.kind} {what}" + (f": {self.detail}" if self.detail else "")


# --- Advice ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Advice:
    """An unused index or a missing one; `fields` as in `Index`, `-name` for descending."""

    collection: str
    kind: Literal["unused index", "missing index"]
    fields: tuple[str, ...]
    reason: str
    """The observed figures, and the start of the observation."""
    fix: str
    """What to do."""

    def __str__(self) -> str:
        where = f"{self.collection} ({', '.join(self.fields)})" if self.fields else self.collection
        return f"{self.kind} {where}: {self.reason}; {self.fix}"


@runtime_checkable
class Advising(Protocol):
    """A store whose engine counts what its indexes serve."""

    async def advise(self) -> list[Advice]:
        """Advice from the engine's own statistics, for the prepared collections."""
        ...


# --- Loading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alike:
    """Many new documents of one global collection that differ in some fields only, perhaps with their records.

    `pattern` has all declared fields. `rows` has of each document its id, its time of creation (None: that of the
    load), and its values of the `varying` fields. `record` is the pattern of the records, whose ids are `record_ids`
    and whose salts are `record_salts`: each has its document's id, and in `after` its document's varying values; of a
    secret that is set, what the pattern has there.
    """

    collection: str
    pattern: Document
    varying: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]
    record: Record | None = None
    record_ids: Sequence[str] = ()
    record_salts: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Pack:
    """New documents and their journal records, made ready for one kind of store; `parts` are that store's own."""

    documents: int
    records: int
    parts: Sequence[Any]


class Packer(Protocol):
    """Makes documents ready for a store; pure, and can be sent to another process."""

    def pack(self, operations: Sequence[Create | Append]) -> Pack:
        """Creations in global collections, and records of these. Raises as `commit` where one of them alone is wrong
        (TooLarge, InvalidInput)."""
        ...

    def pack_alike(self, some: Sequence[Alike]) -> Pack:
        """The same of documents that are alike, in a fraction of the time. Raises as `pack`."""
        ...


@runtime_checkable
class Loading(Protocol):
    """A store that can add very many new documents faster than by batches."""

    def packer(self) -> Packer:
        """A packer for the collections that are prepared now."""
        ...

    async def load(self, packs: AsyncIterable[Pack], now_us: int, *, rebuild: bool = False) -> float:
        """Add the documents of all packs, durably; none of them if this or the iteration raises. Returns for how many
        seconds others could not write.

        All packs are held in memory before the store is locked, so that it is locked for about a second at most. With
        `rebuild` each pack is written when it comes, and the indexes are built anew at the end: faster if most
        documents are new, but the store is locked all the time, in proportion to the number of documents. AlreadyExists
        if an id, or a value of a unique index, is taken; else as `Store.commit`.
        """
        ...


# --- Operating ------------------------------------------------------------------------------------------------


@runtime_checkable
class JournalPartitions(Protocol):
    """A store that keeps its journal in parts, and can drop the old ones."""

    async def make_journal_partitions(self) -> int:
        """Make the parts that will be needed soon. Returns the number of new parts."""
        ...

    async def drop_journal_before(self, at_us: int) -> int:
        """Drop the parts for older records that have no record any more. Returns the number of dropped parts."""
        ...


@runtime_checkable
class SchemaRights(Protocol):
    """A store whose users differ in whether they may change its schema."""

    async def unchangeable(self) -> str | None:
        """Why this user may not change the schema, and which user may; None if this one may."""
        ...


@runtime_checkable
class Durability(Protocol):
    """A store whose server may have settings that lose acknowledged commits."""

    async def durability(self) -> dict[str, str]:
        """The server's settings that decide whether a commit is on its disk."""
        ...


# --- The port -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The features in which backends differ. The conformance suite adapts its tests to them and skips none."""

    name: str
    multi_process: bool
    """Several processes may use the store at once. False: the store refuses a second process with Unavailable."""
    persistent: bool
    """Committed documents are still there after the store was closed and opened again."""
    embedded: bool = False
    """The engine runs in this process: its clock is this machine's, and no server may be gone for a while."""
    ordered_journal: bool = False
    """A record's sequence is greater than that of every record committed before it, the records of one batch have
    consecutive sequences, and the cursor behind a record is the text of its sequence."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the store answers, with details for operators."""

    ok: bool
    latency_s: float
    details: Mapping[str, Any] = field(default_factory=dict)


class Store(JournalStore, Protocol):
    """A backend. `storage.open_store(url)` gives one; `open` comes before, `close` after everything else."""

    @property
    def capabilities(self) -> Capabilities: ...

    async def open(self) -> None:
        """Connect. StoreError if the store is damaged or foreign, Unavailable if it is locked or out of reach."""
        ...

    async def close(self) -> None:
        """Finish the commits in flight, then release all resources. Idempotent."""
        ...

    async def prepare(
        self,
        collections: Sequence[Collection],
        *,
        mode: Literal["apply", "plan"] = "apply",
        allow_destructive: bool = False,
    ) -> tuple[SchemaChange, ...]:
        """Make the store fit the declarations, or (plan) only list the differences.

        Adding collections, fields and indexes never loses anything; documents written before a field existed get its
        default (or null). A field that is added, not optional and without default, in a collection that has
        documents, and every destructive change (a field dropped or its type changed) is refused with SchemaError
        unless `allow_destructive`; then nothing at all is applied. A field that becomes optional is changed; one that
        is optional no longer stays as it is, since documents may be without it. Collections that are not declared are
        left alone.
        Afterwards, exactly `collections` can be used, until the next prepare.
        """
        ...

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        """One document, or None. Reads the last commit of any process (strong consistency)."""
        ...

    async def tenants(self, after: str | None = None, limit: int = MAX_TENANTS_PAGE) -> list[str]:
        """The tenants that have, or once had, documents, in the order of their UTF-8 bytes, after `after`.

        For operators of the store (expiry, migration, backup), never for a caller that acts for a tenant.
        """
        ...

    async def now_us(self) -> int:
        """The store's clock, in microseconds since the epoch: one clock for every node that uses the store."""
        ...

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        """At most query.limit documents in query.order, as `entities.evaluate` defines. `query` has been checked."""
        ...

    async def aggregate(
        self, collection: str, tenant: str | None, aggregates: Sequence[Aggregate], where: Filter | None
    ) -> dict[str, Any]:
        """Values by Aggregate.name, as `entities.aggregate` defines."""
        ...

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        """Apply a batch atomically and durably. Batches given without awaiting may share one engine transaction
        (group commit), each succeeding or failing by itself; those of one tenant (or of none) in the order given.

        Raises the errors of its operations (the message and `details["operation"]` have the failed one's index),
        TooLarge past the MAX_ limits above, Unavailable or StorageFull when the engine cannot write. After an error,
        nothing of the batch is applied. Unavailable with `details["outcome"] == "unknown"` is the exception: the batch
        may be applied or not, because the connection was lost with the answer, the disk failed at the commit, or the
        process's own loop ended during it. Not a coroutine: commit takes the batch when it is called, in order.
        """
        ...

    async def check(self) -> Health:
        """Whether the store answers now. Never raises; `ok` is False instead."""
        ...


@runtime_checkable
class Wrapping(Protocol):
    """A store that adds something to another store."""

    @property
    def store(self) -> Store: ...


def unwrapped(store: Store) -> Store:
    """The innermost store, which may also implement `Advising`, `Loading` and the like."""
    while isinstance(store, Wrapping):
        store = store.store
    return store


def document_size(document: Document) -> int:
    """The size of a document in bytes, counted alike for every engine (close to Firestore's way): names, text and bytes
    by their UTF-8 length + 1, numbers and times 8, booleans and null 1, 32 for the document."""
    return 32 + _size(document)


def _size(value: Any) -> int:
    # The most frequent types come first, since every written value is measured.
    if isinstance(value, str):
        return (len(value) if value.isascii() else len(value.encode())) + 1
    if value is None or isinstance(value, bool):
        return 1
    if isinstance(value, int | float):
        return 8
    if isinstance(value, bytes):
        return len(value) + 1
    if isinstance(value, dict):
        size = 0
        for name, item in value.items():
            size += _size(name) + _size(item)
        return size
    if isinstance(value, list):
        return sum(map(_size, value))
    return 8


def check_operations(batch: Batch) -> None:
    """Raise TooLarge if a batch has more than MAX_OPERATIONS."""
    if len(batch.operations) > MAX_OPERATIONS:
        raise TooLarge(f"found {len(batch.operations)} operations in a batch, expected at most {MAX_OPERATIONS}")


def check_batch_size(batch: Batch) -> None:
    """Raise TooLarge if documents, fields and journal records together exceed MAX_BATCH_BYTES."""
    size = 0
    for operation in batch.operations:
        match operation:
            case Create() | Put():
                size += document_size(operation.document)
            case Patch():
                size += document_size(operation.fields)
            case Append():
                size += sum(document_size(part) for part in (operation.record.before, operation.record.after) if part)
            case _:
                pass
    if size > MAX_BATCH_BYTES:
        raise TooLarge(f"found {size} bytes in a batch, expected at most {MAX_BATCH_BYTES}")


__all__ = [
    "JOURNAL_ROW",
    "MAX_BATCH_BYTES",
    "MAX_CHANGES_PAGE",
    "MAX_DOCUMENT_BYTES",
    "MAX_OPERATIONS",
    "MAX_TENANTS_PAGE",
    "WHOLE_JOURNAL",
    "Add",
    "Advice",
    "Advising",
    "Alike",
    "Append",
    "Batch",
    "Capabilities",
    "ChangeKind",
    "ChangesPage",
    "Check",
    "Committed",
    "Create",
    "Delete",
    "Durability",
    "Health",
    "JournalFilter",
    "JournalPartitions",
    "JournalRow",
    "JournalStore",
    "Loading",
    "Operation",
    "Pack",
    "Packer",
    "Patch",
    "Put",
    "Record",
    "RowsPage",
    "SchemaChange",
    "SchemaRights",
    "Store",
    "Wrapping",
    "check_batch_size",
    "check_operations",
    "document_size",
    "past_the_end",
    "unwrapped",
]
