"""Reads the journal in Firestore: one head a shard, and pages of records in the order of their commits."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.cloud.firestore_v1.types import query as _query
from msgspec import structs

from ...errors import Gone, InvalidInput, Problem, Unavailable
from ..port import (
    MAX_CHANGES_PAGE,
    WHOLE_JOURNAL,
    ChangesPage,
    JournalFilter,
    RowsPage,
    past_the_end,
)
from .client import AggregationRequest, RunQueryRequest, Wire, pause
from .journal_documents import Found, record_name
from .paths import FLOORS, HEADS, JOURNAL, Paths, last_of
from .places import SHARDS
from .search_fields import REQUEST, needs_search_fields, periods_of, request_key
from .values import value_of

END = "end"
GAP_ATTEMPTS = 10
MAX_GAPS = 100_000
MAX_EXAMINED = 5_000
"""Documents that one page reads at most, if few of them match."""
_log = logging.getLogger(__name__)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_CURSOR = re.compile(r"f(?:[0-9a-z]{1,12}\.){15}[0-9a-z]{1,12}")
_Direction: Any = _query.StructuredQuery.Direction
_Operator: Any = _query.StructuredQuery.FieldFilter.Operator
_IS_NULL: Any = _query.StructuredQuery.UnaryFilter.Operator.IS_NULL
_AND: Any = _query.StructuredQuery.CompositeFilter.Operator.AND
EQUAL_FIELDS = ("tenant", "actor", "action", "collection", "entity_id")


def shard_of(tenant: str | None) -> int:
    """The part of the journal that a tenant's records are in: the same on every node, for ever."""
    if tenant is None:
        return 0
    return int.from_bytes(hashlib.sha256(tenant.encode()).digest()[:4]) % SHARDS


# --- Cursors: how far each shard has been read, in base 36 ---------------------------------------------------


def cursor_text(position: list[int]) -> str:
    return "f" + ".".join(map(_base36, position))


def position_of(cursor: str | None) -> list[int]:
    """How far a cursor has read each shard. Raises InvalidInput for a text that is no cursor of this journal."""
    if cursor is None:
        return [0] * SHARDS
    if not _CURSOR.fullmatch(cursor):
        raise InvalidInput([Problem("after", "is not a cursor of this journal")])
    return [int(part, 36) for part in cursor[1:].split(".")]


def _base36(number: int) -> str:
    text = ""
    while number:
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
    return text or "0"


# --- Heads and pages ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """The state of a shard: its last record, the greatest number that was dropped on purpose, and the first record
    from which on all have the fields of searches."""

    last: int = 0
    dropped: int = 0
    searchable: int = 1

    @classmethod
    def of(cls, document: Any | None) -> Head:
        if document is None:
            return cls()
        fields = document.fields
        last = fields["last"].integer_value
        searchable = fields["searchable"].integer_value if "searchable" in fields else last + 1
        return cls(last, fields["dropped"].integer_value if "dropped" in fields else 0, searchable)


NO_HEAD = Head()


class Journal:
    """Reads the journal.

    A page is correct only if it knows the last record of every shard as of now: a record that is missed here is a
    revocation that this node does not hear of. So each call asks Firestore. One sum over the heads costs one read, and
    confirms all heads that are known already; only after a commit of another node are the heads themselves read. A
    listener saves that read, but nothing relies on it: its stream may be silent because the connection is gone.
    """

    def __init__(self, wire: Wire, paths: Paths) -> None:
        self._wire = wire
        self._paths = paths
        self._known = [NO_HEAD] * SHARDS
        """The head of each shard, as this node has heard of it: trusted only when the sum is confirmed."""
        self._gaps: set[tuple[int, int]] = set()
        """Records that are missing although nobody dropped them, as readers of rows have found."""
        self._sum_of_heads = AggregationRequest(parent=paths.documents)
        aggregation = self._sum_of_heads.structured_aggregation_query
        aggregation.structured_query.from_.add().collection_id = HEADS
        aggregation.aggregations.add(alias="sum").sum.field.field_path = "last"

    def saw_head(self, shard: int, document: Any) -> None:
        head = Head.of(document)
        if head.last >= self._known[shard].last:
            self._known[shard] = head

    def forget_heads(self) -> None:
        """Read all heads again. After a lost connection an emulator that restarted empty may answer, and two histories
        can have the same sum."""
        self._known = [NO_HEAD] * SHARDS

    def head_name(self, shard: int) -> str:
        return self._paths.internal(HEADS, f"{shard:02}")

    async def heads(self, shards: Sequence[int]) -> list[Head]:
        """The heads of these shards as of now, each at its place among all shards."""
        known = list(
            self._known
        )  # copied before the request: a head that becomes known meanwhile may not be in the sum
        if len(shards) == SHARDS:
            answer = await self._wire.aggregate(self._sum_of_heads)
            if answer["sum"].integer_value == sum(head.last for head in known):
                return known
        found, _ = await self._wire.batch_get([self.head_name(shard) for shard in shards])
        for name, document in found.items():
            # Even if it is less than the known head: an emulator that restarted, or a restored database, has fewer.
            shard = int(last_of(name))
            known[shard] = self._known[shard] = Head.of(document)
        return known

    async def changes(self, after: str | None, tenant: str | None, limit: int) -> ChangesPage:
        where = WHOLE_JOURNAL if tenant is None else JournalFilter(tenant=tenant)
        found, start, position = await self._examined(after, where, limit, whole=True)
        if after is not None:
            await self._check_not_dropped(tenant, start, position)
        parts = await self._parts(found)
        records = [one.record(self._paths, parts) for one in found]
        return ChangesPage(tuple(records), cursor_text(position))

    async def rows(self, after: str | None, where: JournalFilter, limit: int) -> RowsPage:
        found, _, position = await self._examined(after, where, limit, whole=False)
        parts = await self._parts(found)
        return RowsPage([one.row(self._paths, parts) for one in found], cursor_text(position))

    async def _check_not_dropped(self, tenant: str | None, start: list[int], position: list[int]) -> None:
        """Raise Gone if records after the start were dropped on purpose, perhaps while the page was read."""
        if tenant is None:
            heads = self._known  # whoever met a gap has read them again
            gone = any(start[shard] < heads[shard].dropped for shard in range(SHARDS))
        else:
            shard = shard_of(tenant)
            if start != position:
                await self.heads([shard])
            gone = start[shard] < self._known[shard].dropped and start[shard] < await self.floor(tenant)
        if gone:
            raise Gone("the records that come after the cursor were dropped")

    async def floor(self, tenant: str | None) -> int:
        """The greatest number of a tenant's records that were dropped."""
        document = await self._wire.get(floor_name(self._paths, tenant))
        return 0 if document is None else int(document.fields["number"].integer_value)

    async def _examined(
        self, after: str | None, where: JournalFilter, limit: int, *, whole: bool
    ) -> tuple[list[Found], list[int], list[int]]:
        """The next records that match, and the positions before and after them. `whole`: a gap is an error."""
        limit = min(limit, MAX_CHANGES_PAGE)
        position = position_of(None if after == END else after)
        everything = after == END or not (where.platform or where.tenant is not None)
        shards = list(range(SHARDS)) if everything else [shard_of(where.tenant)]
        heads = await self.heads(shards)
        if after == END:
            end = [head.last for head in heads]
            return [], end, end
        if any(position[shard] > heads[shard].last for shard in shards):
            raise past_the_end()
        start = list(position)
        behind = [shard for shard in shards if position[shard] < heads[shard].last]
        found = await self._merged(behind, position, heads, where, limit, whole)
        return found, start, position

    async def _merged(
        self, behind: list[int], position: list[int], heads: list[Head], where: JournalFilter, limit: int, whole: bool
    ) -> list[Found]:
        """The next records of all shards in the order of their commits; moves `position` past them."""
        waiting: dict[int, list[Found]] = {shard: [] for shard in behind}
        fetched = {shard: max(position[shard], _first(shard, where) - 1) for shard in behind}
        ends = {shard: min(heads[shard].last, _last(shard, where)) for shard in behind}
        chosen: list[Found] = []
        examined = 0
        while len(chosen) < limit:
            empty = [shard for shard in behind if not waiting[shard] and fetched[shard] < ends[shard]]
            if empty and examined >= MAX_EXAMINED:
                break
            if empty:
                # Not a whole page from each shard: records that do not fit into the page are read and billed again.
                size = max(10, (limit - len(chosen)) // len(empty) + 1) if len(behind) > 1 else limit
                pages = await asyncio.gather(
                    *(self._page(shard, fetched[shard], ends[shard], where, min(size, limit), whole) for shard in empty)
                )
                for shard, (page, upto, count) in zip(empty, pages, strict=True):
                    waiting[shard] = page
                    fetched[shard] = upto
                    examined += count
                continue
            ready = [records[0] for records in waiting.values() if records]
            if not ready:
                break
            first = min(ready, key=lambda one: (one.moment, one.place, one.shard, one.number))
            chosen.append(waiting[first.shard].pop(0))
            position[first.shard] = first.number
        for shard in behind:
            if not waiting[shard]:
                position[shard] = heads[shard].last if fetched[shard] >= ends[shard] else fetched[shard]
        return chosen

    async def _page(
        self, shard: int, after: int, upto: int, where: JournalFilter, limit: int, whole: bool
    ) -> tuple[list[Found], int, int]:
        """The next records of a shard that match, the number up to which there are no others, and how many documents
        were read for that.

        A head is written with its records, so a shard has no gaps, except where records were dropped. Queries of
        Google's emulator have gaps, because they lag behind commits under way. There the query is for the whole shard,
        which shows the gaps, and is repeated. A gap that stays is a record that the database's owner has removed. The
        change feed must not pass over it, but readers of rows do: verification says what is missing.
        """
        checked = where == WHOLE_JOURNAL or self._wire.emulator is not None
        if not checked and needs_search_fields(where) and after + 1 < self._known[shard].searchable:
            # Older records lack the fields: these are found by the rest of the filter alone.
            upto = min(upto, self._known[shard].searchable - 1)
            where_asked = _without_search_fields(where)
        else:
            where_asked = WHOLE_JOURNAL if checked else where
        request = _request(self._paths, shard, after, upto, where_asked, limit)
        page: list[Found] = []
        last, missing = upto, list[int]()
        for attempt in range(GAP_ATTEMPTS):
            documents, _ = await self._wire.query(request)
            page = [Found.of(document) for document in documents]
            last = page[-1].number if len(page) >= limit else upto
            missing = sorted({*range(after + 1, last + 1)}.difference(one.number for one in page)) if checked else []
            if missing and missing[-1] > self._known[shard].dropped:
                await self.heads([shard])
            missing = [number for number in missing if number > self._known[shard].dropped]
            if not whole:
                missing = [number for number in missing if (shard, number) not in self._gaps]
            if not missing:
                return [one for one in page if one.matches(where)], last, len(page)
            await pause(attempt)
        message = f"the journal has no record {record_name(shard, missing[0])}, which was written"
        if whole:
            raise Unavailable(message)
        _log.error("%s; %d are missing there", message, len(missing))
        self._gaps.update((shard, number) for number in missing[: MAX_GAPS - len(self._gaps)])
        return [one for one in page if one.matches(where)], last, len(page)

    async def _parts(self, found: list[Found]) -> Mapping[str, Any]:
        """The further documents of large records, by their names."""
        names = [name for one in found for name in one.part_names(self._paths)]
        return (await self._wire.batch_get(names))[0] if names else {}


def floor_name(paths: Paths, tenant: str | None) -> str:
    """The document that says which of a tenant's records were dropped."""
    key = hashlib.sha256(f"{tenant is None}\x00{tenant or ''}".encode()).hexdigest()
    return paths.internal(FLOORS, key)


# --- Queries --------------------------------------------------------------------------------------------------


def number_through(shard: int, sequence: int) -> int:
    """The number of the last record of a shard up to and with a sequence."""
    return (sequence - shard) // SHARDS


def _first(shard: int, where: JournalFilter) -> int:
    return 1 if where.after_sequence is None else number_through(shard, where.after_sequence) + 1


def _last(shard: int, where: JournalFilter) -> int:
    return sys.maxsize if where.through_sequence is None else number_through(shard, where.through_sequence)


def _without_search_fields(where: JournalFilter) -> JournalFilter:
    return structs.replace(where, request_id=None, since_us=None, until_us=None)


def _request(paths: Paths, shard: int, after: int, upto: int, where: JournalFilter, limit: int) -> Any:
    """The query for records of a shard after a number, in their order.

    All conditions are for equal values, so Firestore merges its indexes of single fields.
    """
    request = RunQueryRequest(parent=paths.documents)
    query = request.structured_query
    query.from_.add().collection_id = JOURNAL
    query.order_by.add(direction=_Direction.ASCENDING).field.field_path = "__name__"
    query.limit.value = limit
    query.start_at.before = False
    query.start_at.values.add().reference_value = paths.internal(JOURNAL, record_name(shard, after))
    query.end_at.before = False
    query.end_at.values.add().reference_value = paths.internal(JOURNAL, record_name(shard, upto))
    put_conditions(query, where)
    return request


def put_conditions(query: Any, where: JournalFilter) -> None:
    conditions = query.where.composite_filter
    for name in EQUAL_FIELDS:
        if (value := getattr(where, name)) is not None:
            _put_condition(conditions, name, _Operator.EQUAL, value_of(value))
    if where.platform:
        null = conditions.filters.add().unary_filter
        null.field.field_path = "tenant"
        null.op = _IS_NULL
    if where.request_id is not None:
        _put_condition(conditions, REQUEST, _Operator.EQUAL, value_of(request_key(where.request_id)))
    if (periods := periods_of(where, time.time_ns() // 1_000)) is not None:
        name, values = periods
        _put_condition(conditions, name, _Operator.IN, value_of(values))
    if conditions.filters:
        conditions.op = _AND
    else:
        query.ClearField("where")


def _put_condition(conditions: Any, name: str, operator: Any, value: Any) -> None:
    condition = conditions.filters.add().field_filter
    condition.field.field_path = name
    condition.op = operator
    condition.value.CopyFrom(value)
