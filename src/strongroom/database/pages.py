"""Pages of limited size in bytes: the store is read a few documents at a time, as many as probably fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable
from dataclasses import replace
from typing import Protocol

from ..cooperative import Slices
from ..entities import Document, Query, behind
from ..storage.port import document_size

FIRST_ROWS = 32
"""Documents that are read at once while their size is not known."""
MAX_ROWS = 128
"""Documents that are read at once, at most: small documents may be followed by documents of the largest size."""
MAX_KNOWN = 10_000


class Reader(Protocol):
    """A store, or a cache before it."""

    def find(self, collection: str, tenant: str | None, query: Query) -> Awaitable[list[Document]]: ...


class PageSizes:
    """The mean document size of each collection and tenant, taken from the last page."""

    def __init__(self) -> None:
        self._means: OrderedDict[str, int] = OrderedDict()

    def rows(self, scope: str, max_bytes: int) -> int:
        """How many documents to read at once."""
        mean = self._means.get(scope)
        return FIRST_ROWS if mean is None else max(1, min(MAX_ROWS, max_bytes // mean + 1))

    def are_large(self, scope: str, max_bytes: int) -> bool:
        """Whether a page is known to hold fewer than MAX_ROWS of the documents."""
        return self._means.get(scope, 1) * MAX_ROWS > max_bytes

    def learn(self, scope: str, documents: int, size: int) -> None:
        self._means[scope] = max(1, size // documents)
        self._means.move_to_end(scope)
        if len(self._means) > MAX_KNOWN:
            self._means.popitem(last=False)


async def read_page(
    reader: Reader, collection: str, tenant: str | None, query: Query, sizes: PageSizes, scope: str, max_bytes: int
) -> tuple[list[Document], bool]:
    """At most `query.limit` documents of a checked query, of at most `max_bytes` together (or the first one alone), and
    whether there are more. A projection must have the fields that the query is ordered by."""
    page: list[Document] = []
    size = 0
    more = False
    slices = Slices()
    while not more:
        wanted = min(query.limit + 1 - len(page), sizes.rows(scope, max_bytes))
        found = await reader.find(collection, tenant, replace(query, limit=wanted))
        for document in found:
            await slices.pause()
            of_this = document_size(document)
            if len(page) == query.limit or (page and size + of_this > max_bytes):
                more = True
                break
            page.append(document)
            size += of_this
        if page:
            sizes.learn(scope, len(page), size)
        if len(found) < wanted:
            break
        query = behind(query, found[-1])
    return page, more


__all__ = ["PageSizes", "read_page"]
