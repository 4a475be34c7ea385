"""What an import found and did: the standing of each row in the store, the plan of a file, the checksums at the end."""

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
    """What a row is to the store."""

    NEW = "new"
    UNCHANGED = "unchanged"
    CHANGED = "changed"
    """File and store say different things of the key; `differences` has them."""
    ROTATED = "rotated"
    """The key has been rotated in the store: the secret of the file is not imported."""
    FOREIGN = "foreign"
    """The key is there, for another tenant."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of which file and store say different things."""

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
    """What a file's rows are to the store: how many of each standing, and those of other tenants and with differences
    (MAX_FINDINGS of each at most). `standings` has each row's, by the number of its chunk."""

    counts: Counter[Standing] = field(default_factory=Counter)
    foreign: list[Planned] = field(default_factory=list)
    changed: list[Planned] = field(default_factory=list)
    standings: list[bytes | None] = field(default_factory=list)
    """A byte a row, the index of its standing in the enumeration; None: all are new."""
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
    """The same digest over the file's rows and over what the store has of them, and how many keys each is over.

    It covers all that the shape speaks of; of a key that was used here since (`used_since` of them), all but its usage.
    It is the sum of the rows' SHA-256, so it does not depend on their order. `left_out` are the rows of which file and
    store are known to say different things; `unequal` has the paths of those where it was not known (MAX_FINDINGS at
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
    """Checksums in the making."""

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
