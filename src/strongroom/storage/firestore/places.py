"""The parts of a draft: the contents of places, the pending changes to them, records, and the results of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ...entities import Collection, Document, Index
from ...errors import StrongroomError
from ..port import Record
from .values import Codec

SHARDS = 16
"""Parts of the journal. Every commit to a part writes its head, and a document takes about one write a second. All
records of a tenant are in one part, so that they have an order."""
ANY = -1
"""Any version: the place holds a document."""
HINT = -2
"""The version of an older state: it serves only to estimate the size of a counter."""


@dataclass(frozen=True, slots=True)
class Raw:
    """The contents of a place: `version` 0 is nothing; `found` is the stored document, None if it was not read."""

    version: int
    found: Any | None = None


ABSENT = Raw(0)
HELD = Raw(ANY)


@dataclass(frozen=True)
class Plan:
    """A collection, as the writer needs it. `uniques` leaves out the field that places the document."""

    collection: Collection
    codec: Codec
    uniques: tuple[Index, ...]
    placed_by: str | None = None
    derive: Callable[[Document], Document] | None = None
    """Fields that are written beside the declared ones, for other readers of the database."""


@dataclass(slots=True)
class Pending:
    """A place, and the group's changes to it. `plan` is None for the store's own documents."""

    path: str
    base: Raw
    plan: Plan | None
    exists: bool
    id: str = ""
    touched: bool = False
    checked: bool = False
    whole: bool = False
    content: Document | None = None
    created_at: datetime | None = None
    keeps_created: bool = True
    updated_at: datetime | None = None
    sets: Document = field(default_factory=dict)
    increments: dict[str, int] = field(default_factory=dict)
    adders: list[int] = field(default_factory=list)

    def copy(self) -> Pending:
        return replace(
            self,
            sets=dict(self.sets),
            increments=dict(self.increments),
            adders=list(self.adders),
            content=None if self.content is None else dict(self.content),
        )


@dataclass(frozen=True, slots=True)
class Written:
    """An operation that made a version: the place, and for an increment the field and its sum so far in the group."""

    path: str
    field: str | None = None
    so_far: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """A record to be written: its place, and the operation of its batch whose version it takes."""

    record: Record
    shard: int
    number: int
    of: int | None
    batch: int

    @property
    def sequence(self) -> int:
        return self.number * SHARDS + self.shard


@dataclass(slots=True)
class Outcome:
    """The result of one batch: `made` has the write of each operation, `values` the sums that are known already."""

    made: list[Written | None] = field(default_factory=list)
    values: dict[int, int] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    error: StrongroomError | None = None


def values_of(index: Index, document: Document | None) -> tuple[Any, ...] | None:
    """A document's values in a unique index; None if one is null, since nulls are not compared."""
    if document is None:
        return None
    values = tuple(document[name] for name, _ in index.columns)
    return None if None in values else values
