"""Pages of the journal's rows in SQLite: the statement for a filter, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...entities import INT64_MAX
from ..port import MAX_CHANGES_PAGE, JournalFilter, JournalRow
from ..sql import JOURNAL_COLUMNS, listed, quoted
from .isolation import JOURNAL_BY_FIELD
from .schema import BLOCK

_INDEXED = ("request_id", "entity_id", "actor", "action", "collection")
"""The fields with an index of their own, the most selective first."""
_OF_FEW_VALUES = frozenset({"action", "collection"})
"""Fields for which the index of the tenant is better, if there is one tenant."""
_TIMED = "ifnull((SELECT through FROM main._times ORDER BY block DESC LIMIT 1), 0)"
"""The last record whose time is in `_times`; a process of an earlier version appends others."""
_SINCE = (
    f"sequence > max(?, min({_TIMED}, ifnull({BLOCK} * (SELECT block FROM main._times WHERE last_us >= ? "
    f"ORDER BY block LIMIT 1) - 1, {_TIMED})))"
)
_UNTIL = (
    f"sequence <= min(?, iif({_TIMED} < {{head}}, {{head}}, ifnull({BLOCK - 1} + {BLOCK} * "
    "(SELECT block FROM main._times WHERE first_us < ? ORDER BY block DESC LIMIT 1), 0)))"
)
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
    bounds, values = _bounds(where, position)
    given = [name for name in _INDEXED if getattr(where, name) is not None]
    of_one_tenant = where.tenant is not None or where.platform
    leading = next((name for name in given if not (of_one_tenant and name in _OF_FEW_VALUES)), None)
    # Without statistics SQLite cannot know which index is best; a + keeps it from using a column's index.
    conditions = [f"{'' if name == leading else '+'}{quoted(name)} = ?" for name in given]
    if where.platform:
        conditions.append(f"{'' if leading is None else '+'}tenant_id IS NULL")
    values += [getattr(where, name) for name in given]
    for name, condition in (("since_us", "+at_us >= ?"), ("until_us", "+at_us < ?")):
        if getattr(where, name) is not None:
            conditions.append(condition)
            values.append(getattr(where, name))
    source = "_journal" if leading is None or where.tenant is None else JOURNAL_BY_FIELD
    sql = (
        f"WITH page AS MATERIALIZED (SELECT {listed(JOURNAL_COLUMNS)} FROM {source} "
        f"WHERE {' AND '.join([*bounds, *conditions])} ORDER BY sequence LIMIT ?) "
        f"SELECT {_HEAD}, {_FLOOR}, page.* FROM (SELECT 1) LEFT JOIN page"
    )
    return sql, [*values, _page_size(limit)]


def _bounds(where: JournalFilter, position: int) -> tuple[list[str], list[Any]]:
    """The conditions that bound the sequence, one for each side: SQLite seeks by one only."""
    lower, upper = max(position, where.after_sequence or 0), where.through_sequence
    conditions, values = ["sequence > ?"], [lower]
    if where.since_us is not None:
        conditions = [_SINCE]
        values.append(where.since_us)
    if where.until_us is not None:
        conditions.append(_UNTIL.format(head=_HEAD))
        values += [INT64_MAX if upper is None else upper, where.until_us]
    elif upper is not None:
        conditions.append("sequence <= ?")
        values.append(upper)
    return conditions, values


def _page_size(limit: int) -> int:
    return min(limit, MAX_CHANGES_PAGE)
