"""Pages of the journal's rows in SQLite: the statement for a filter, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..port import MAX_CHANGES_PAGE, JournalFilter, JournalRow
from ..sql import JOURNAL_COLUMNS, listed

_CONDITIONS = {
    "actor": "actor = ?",
    "action": '"action" = ?',
    "collection": "collection = ?",
    "entity_id": "entity_id = ?",
    "request_id": "request_id = ?",
    "since_us": "at_us >= ?",
    "until_us": "at_us < ?",
    "after_sequence": "sequence > ?",
    "through_sequence": "sequence <= ?",
}
_HEAD = "(SELECT seq FROM main.sqlite_sequence WHERE name = '_journal')"
_FLOOR = "(SELECT max(sequence) FROM _floors)"


class JournalPage(NamedTuple):
    """Rows after a position, the position up to which rows were examined, and the head and floor at that moment.

    `floor` is the greatest dropped sequence: of the tenant if the connection shows one, else of all.
    """

    rows: Sequence[JournalRow]
    position: int
    cursor: str
    head: int
    floor: int

    @classmethod
    def of(cls, found: Sequence[tuple[Any, ...]], position: int, limit: int) -> JournalPage:
        """The page in the result of `journal_rows`."""
        head, floor = found[0][:2]
        rows: list[Any] = [row[2:] for row in found] if found[0][2] is not None else []
        # A short page has examined everything there was at its moment, the head of which is in the same statement.
        examined = rows[-1][0] if len(rows) >= _page_size(limit) else head or 0
        return cls(rows, position, str(examined), head or 0, floor or 0)


def journal_rows(where: JournalFilter, position: int, limit: int) -> tuple[str, list[Any]]:
    """The statement that returns the rows of a filter after a position, each with the head and the floor, and its
    values. A row without a sequence if there are none. The connection shows the filter's tenant, if it has one."""
    conditions, values = ["sequence > ?"], [position]
    if where.platform:
        conditions.append("tenant_id IS NULL")
    for name, condition in _CONDITIONS.items():
        value = getattr(where, name)
        if value is not None:
            conditions.append(condition)
            values.append(value)
    sql = (
        f"WITH page AS MATERIALIZED (SELECT {listed(JOURNAL_COLUMNS)} FROM _journal "
        f"WHERE {' AND '.join(conditions)} ORDER BY sequence LIMIT ?) "
        f"SELECT {_HEAD}, {_FLOOR}, page.* FROM (SELECT 1) LEFT JOIN page"
    )
    return sql, [*values, _page_size(limit)]


def _page_size(limit: int) -> int:
    return min(limit, MAX_CHANGES_PAGE)
