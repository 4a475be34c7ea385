"""Compares two stores part by part, in one pass over each: both checksums, and every document that differs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum

from ..entities import Document
from ..storage.port import Store
from .checksum import Canonical, SetSum
from .state import Part
from .streams import pages

DIFFERENCES_AT_ONCE = 200


class Kind(StrEnum):
    MISSING = "missing in the target"
    EXTRA = "only in the target"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class Difference:
    """One document that differs between the two stores."""

    collection: str
    tenant: str | None
    id: str
    kind: Kind

    def __str__(self) -> str:
        tenant = "" if self.tenant is None else f" of tenant {self.tenant!r}"
        return f"{self.collection}/{self.id}{tenant}: {self.kind}"


class _Side:
    """One store's documents of a part, as digests that are not compared yet."""

    def __init__(self, store: Store, part: Part, canonical: Canonical, sum: SetSum) -> None:
        self._pages = pages(store, part)
        self._digest = canonical.of
        self._sum = sum
        self.pending: dict[str, int] = {}
        self.last = b""
        self.ended = False

    async def read(self) -> None:
        page: list[Document] | None = await anext(self._pages, None)
        if page is None:
            self.ended = True
            return
        for document in page:
            digest = self._digest(document)
            self.pending[document["id"]] = digest
            self._sum.add(digest)
        self.last = page[-1]["id"].encode()

    async def close(self) -> None:
        await self._pages.aclose()


class Comparison:
    """A part in two stores. `source` and `target` are the checksums, complete once `differences` has ended."""

    def __init__(self, source: Store, target: Store, part: Part, canonical: Canonical) -> None:
        self.part = part
        self.source = SetSum()
        self.target = SetSum()
        self._sides = (_Side(source, part, canonical, self.source), _Side(target, part, canonical, self.target))

    async def differences(self) -> AsyncGenerator[list[Difference], None]:
        """The differences, a page at a time; empty pages too, so that the caller sees progress."""
        try:
            left, right = self._sides
            while not (left.ended and right.ended and not left.pending and not right.pending):
                behind = [side for side in self._sides if not side.ended]
                if len(behind) == 2 and left.last != right.last:
                    behind = [min(behind, key=lambda side: side.last)]
                await asyncio.gather(*(side.read() for side in behind))
                yield self._compared()
        finally:
            for side in self._sides:
                await side.close()

    def _compared(self) -> list[Difference]:
        """Compare and forget the documents up to the id that both sides have read."""
        left, right = (side.pending for side in self._sides)
        limits = [side.last for side in self._sides if not side.ended]
        found = []
        for id in sorted({*left, *right}, key=str.encode):
            if limits and id.encode() > min(limits):
                break
            one, other = left.pop(id, None), right.pop(id, None)
            if one != other:
                kind = Kind.MISSING if other is None else Kind.EXTRA if one is None else Kind.DIFFERENT
                found.append(Difference(self.part.collection.name, self.part.tenant, id, kind))
        return found


async def set_sum(store: Store, part: Part, canonical: Canonical) -> SetSum:
    """The checksum of one store's documents of a part."""
    found = SetSum()
    async with aclosing(pages(store, part)) as some:
        async for page in some:
            for document in page:
                found.add(canonical.of(document))
    return found
