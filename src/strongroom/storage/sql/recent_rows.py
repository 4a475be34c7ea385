"""The journal rows that a store has just committed, in memory: sealing follows close behind, and need not read them."""

from __future__ import annotations

from collections.abc import Sequence

from ..port import JournalRow

MAX_ROWS = 20_000
MAX_CHARACTERS = 8_000_000
"""What is kept at most, in rows and in characters of their `before` and `after`. Beyond it nothing is kept until a
reader asks again."""


class RecentRows:
    """Rows in the order of the journal without a gap, from the last one that a reader has on."""

    __slots__ = ("_rows", "_size", "_wanted")

    def __init__(self) -> None:
        self._rows: list[JournalRow] = []
        self._size = 0
        self._wanted = False

    def committed(self, rows: Sequence[JournalRow]) -> None:
        """Keep rows that were committed in one transaction, if somebody reads them."""
        if not self._wanted or not rows:
            return
        own = self._rows
        first, last = rows[0][0], rows[-1][0]
        if own and own[-1][0] + 1 != first:  # another process has appended in between
            self.clear()
        if last - first != len(rows) - 1:
            self.clear()
            return
        own += rows
        self._size += _size(rows)
        if len(own) > MAX_ROWS or self._size > MAX_CHARACTERS:
            self.clear()
            self._wanted = False

    def after(self, position: int, limit: int) -> list[JournalRow]:
        """Up to `limit` rows that follow a sequence, and forget those before; empty if the store must be read."""
        self._wanted = True
        own = self._rows
        if not own or not own[0][0] <= position + 1 <= own[-1][0]:
            return []
        begin = position + 1 - own[0][0]
        if begin:
            self._size -= _size(own[:begin])
            del own[:begin]
        return own[:limit]

    def clear(self) -> None:
        """Forget all rows, because some were changed in the store."""
        self._rows.clear()
        self._size = 0


def _size(rows: Sequence[JournalRow]) -> int:
    return sum(len(row[10] or "") + len(row[11] or "") for row in rows)
