"""Results of an import: each row's standing in the store, the plan of a file, and the checksums."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from .key_file import MAX_FINDINGS, KeyRow

T = TypeVar("T")


class Standing(StrEnum):
    """How a row of the file compares with the store."""

    NEW = "new"
    UNCHANGED = "unchanged"
    CHANGED = "changed"
    """The key's fields differ between file and store; `differences` lists them."""
    ROTATED = "rotated"
    """The store rotated the key since: the file's secret is not imported."""
    FOREIGN = "foreign"
    """Another tenant has the key."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One field whose values in file and store differ."""

    field: str
    file: Any
    store: Any


@dataclass(slots=True)
class Planned:
    """A row, the id it has or gets in the store, and its standing there."""

    row: KeyRow
    id: str
    standing: Standing
    tenant: str
    differences: tuple[Difference, ...] = ()


@dataclass(slots=True)
class Plan:
    """A file compared with the store: the count of each standing, and the rows of other tenants and with differences
    (MAX_FINDINGS of each at most). `standings` maps a chunk's number to the standings of its rows."""

    counts: Counter[Standing] = field(default_factory=Counter)
    foreign: list[Planned] = field(default_factory=list)
    changed: list[Planned] = field(default_factory=list)
    standings: list[bytes | None] = field(default_factory=list)
    """One byte for each row: the index of its standing in the enumeration. None: all rows are new."""
    few_keys: bool = False

    def add(self, planned: Sequence[Planned]) -> None:
        for one in planned:
            self.counts[one.standing] += 1
            if one.standing is Standing.FOREIGN and len(self.foreign) < MAX_FINDINGS:
                self.foreign.append(one)
            elif one.standing is Standing.CHANGED and len(self.changed) < MAX_FINDINGS:
                self.changed.append(one)
        self.standings.append(bytes(CODES[one.standing] for one in planned))

    def rows(self, number: int, rows: Sequence[KeyRow], wanted: frozenset[Standing]) -> list[KeyRow]:
        """The rows of a chunk that had one of these standings when they were compared."""
        codes = self.standings[number]
        if codes is None:
            return list(rows) if Standing.NEW in wanted else []
        kept = {CODES[standing] for standing in wanted}
        return [row for row, code in zip(rows, codes, strict=True) if code in kept]


CODES = {standing: code for code, standing in enumerate(Standing)}


@dataclass(frozen=True, slots=True)
class Checksums:
    """One digest over the file's rows, one over the same keys in the store, and the number of keys in each.

    A digest covers all fields of the shape. Keys that were used in the store since (`used_since`) count without usage.
    It is the sum of the rows' SHA-256, so the order of rows does not matter. `left_out` counts rows whose difference
    the plan has already reported. `unequal` lists the paths of rows with an unexpected difference (MAX_FINDINGS at
    most).
    """

    file: str
    store: str
    file_keys: int
    store_keys: int
    used_since: int
    left_out: int
    unequal: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.file == self.store


class Sums:
    """Adds up checksums row by row."""

    def __init__(self) -> None:
        self.file = self.store = 0
        self.file_keys = self.store_keys = self.used_since = 0
        self.unequal: list[str] = []

    def add(self, path: str, expected: bytes, found: bytes | None) -> None:
        mine = int.from_bytes(hashlib.sha256(expected).digest(), "big")
        self.file += mine
        self.file_keys += 1
        if found is not None:
            self.store_keys += 1
            self.store += mine if found == expected else int.from_bytes(hashlib.sha256(found).digest(), "big")
        if found != expected and len(self.unequal) < MAX_FINDINGS:
            self.unequal.append(path)

    def of(self, rows: int) -> Checksums:
        file, store = (f"sha256:{total % 2**256:064x}" for total in (self.file, self.store))
        return Checksums(
            file, store, self.file_keys, self.store_keys, self.used_since, rows - self.file_keys, tuple(self.unequal)
        )


def in_groups(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
