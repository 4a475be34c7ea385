"""The journal in Firestore: records as documents, one head a shard, and pages of them in the order of their commits."""

from __future__ import annotations

import asyncio
import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.cloud.firestore_v1.types import query as _query

from ...errors import InvalidInput, Problem, Unavailable
from .. import tagged_json
from ..port import ChangesPage, Record, past_the_end
from .client import AggregationRequest, RunQueryRequest, Wire, pause
from .paths import HEADS, JOURNAL, JOURNAL_PARTS, Paths, last_of
from .places import SHARDS, Line
from .values import COMMIT_FIELD, DocumentPb, micros, put, take, value_of

END = "end"
MAX_TEXT_BYTES = 16_384
"""A record's documents are readable JSON up to this size, and compressed above."""
MAX_PART_BYTES = 900_000
"""A Firestore document holds 1 MiB, a record up to 2 MB: the rest goes to further documents."""
GAP_ATTEMPTS = 10
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_CURSOR = re.compile(r"f(?:[0-9a-z]{1,12}\.){15}[0-9a-z]{1,12}")
_PLAIN = ("id", "tenant", "at_us", "actor", "request_id", "action", "collection", "entity_id")
_Direction: Any = _query.StructuredQuery.Direction
_Operator: Any = _query.StructuredQuery.FieldFilter.Operator


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


# --- Records as documents -------------------------------------------------------------------------------------


def record_name(shard: int, number: int) -> str:
    return f"{shard:02}-{number:016}"


def record_documents(paths: Paths, line: Line, commit: str, place: int, back: int | None) -> list[Any]:
    """The documents of one record: its own, and further ones for the part that does not fit.

    `place` is its position in the commit. `back`: it takes the version of the commit that writes it, less so many
    microseconds; None: its own.
    """
    record = line.record
    name = record_name(line.shard, line.number)
    document = DocumentPb(name=paths.internal(JOURNAL, name))
    fields = document.fields
    for field in _PLAIN:
        put(fields[field], getattr(record, field))
    fields["sequence"].integer_value = line.sequence
    fields["place"].integer_value = place
    fields[COMMIT_FIELD].string_value = commit
    if back is None:
        put(fields["version"], record.version)
    else:
        fields["version_back"].integer_value = back
    texts = {side: tagged_json.dumps(getattr(record, side)) for side in ("before", "after")}
    if sum(map(len, texts.values())) <= MAX_TEXT_BYTES:
        for side, text in texts.items():
            fields[side].string_value = text
        return [document]
    packed = zlib.compress(f"[{texts['before']},{texts['after']}]".encode(), 1)
    parts = [packed[start : start + MAX_PART_BYTES] for start in range(0, len(packed), MAX_PART_BYTES)]
    fields["packed"].bytes_value = parts[0]
    fields["parts"].integer_value = len(parts) - 1
    documents = [document]
    for number, part in enumerate(parts[1:], 1):
        more = DocumentPb(name=paths.internal(JOURNAL_PARTS, f"{name}-{number}"))
        more.fields["packed"].bytes_value = part
        more.fields[COMMIT_FIELD].string_value = commit
        documents.append(more)
    return documents


@dataclass(frozen=True, slots=True)
class _Found:
    """A record's document, and its sort key: its commit and its position in the commit."""

    moment: int
    place: int
    shard: int
    number: int
    document: Any


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
        self._known = [0] * SHARDS
        """The last record of each shard that this node has heard of: trusted only when their sum is confirmed."""
        self._sum_of_heads = AggregationRequest(parent=paths.documents)
        aggregation = self._sum_of_heads.structured_aggregation_query
        aggregation.structured_query.from_.add().collection_id = HEADS
        aggregation.aggregations.add(alias="sum").sum.field.field_path = "last"

    def saw_head(self, shard: int, last: int) -> None:
        self._known[shard] = max(self._known[shard], last)

    def forget_heads(self) -> None:
        """Read all heads again. After a lost connection an emulator that restarted empty may answer, and two histories
        can have the same sum."""
        self._known = [0] * SHARDS

    def head_name(self, shard: int) -> str:
        return self._paths.internal(HEADS, f"{shard:02}")

    async def _heads(self, shards: Sequence[int]) -> list[int]:
        """The last record of each of these shards as of now, at its place among all shards."""
        known = list(
            self._known
        )  # copied before the request: a head that becomes known meanwhile may not be in the sum
        if len(shards) == SHARDS:
            answer = await self._wire.aggregate(self._sum_of_heads)
            if answer["sum"].integer_value == sum(known):
                return known
        found, _ = await self._wire.batch_get([self.head_name(shard) for shard in shards])
        for name, document in found.items():
            # Even if it is less than the known head: an emulator that restarted, or a restored database, has fewer.
            shard, last = int(last_of(name)), 0 if document is None else document.fields["last"].integer_value
            known[shard] = self._known[shard] = last
        return known

    async def changes(self, after: str | None, tenant: str | None, limit: int) -> ChangesPage:
        position = position_of(None if after == END else after)
        shards = list(range(SHARDS)) if tenant is None or after == END else [shard_of(tenant)]
        heads = await self._heads(shards)
        if after == END:
            return ChangesPage((), cursor_text(heads))
        if any(position[shard] > heads[shard] for shard in shards):
            raise past_the_end()
        behind = [shard for shard in shards if position[shard] < heads[shard]]
        found = await self._merged(behind, position, heads, tenant, limit)
        records = await self._records(found)
        return ChangesPage(tuple(records), cursor_text(position))

    async def _merged(
        self, behind: list[int], position: list[int], heads: list[int], tenant: str | None, limit: int
    ) -> list[_Found]:
        """The next records of all shards in the order of their commits; moves `position` past them."""
        waiting: dict[int, list[_Found]] = {shard: [] for shard in behind}
        fetched = {shard: position[shard] for shard in behind}
        chosen: list[_Found] = []
        while len(chosen) < limit:
            empty = [shard for shard in behind if not waiting[shard] and fetched[shard] < heads[shard]]
            if empty:
                # Not a whole page from each shard: records that do not fit into the page are read and billed again.
                size = max(10, (limit - len(chosen)) // len(empty) + 1) if len(behind) > 1 else limit
                pages = await asyncio.gather(
                    *(self._page(shard, fetched[shard], heads[shard], tenant, min(size, limit)) for shard in empty)
                )
                for shard, (page, upto) in zip(empty, pages, strict=True):
                    waiting[shard] = page
                    fetched[shard] = upto
                continue
            ready = [records[0] for records in waiting.values() if records]
            if not ready:
                break
            first = min(ready, key=lambda one: (one.moment, one.place, one.shard, one.number))
            chosen.append(waiting[first.shard].pop(0))
            position[first.shard] = first.number
        for shard in behind:
            if not waiting[shard] and fetched[shard] >= heads[shard]:
                position[shard] = heads[shard]
        return chosen

    async def _page(
        self, shard: int, after: int, upto: int, tenant: str | None, limit: int
    ) -> tuple[list[_Found], int]:
        """The next records of a shard, and the number up to which there are no others.

        A head is written with its records, so a shard has no gaps. Queries of Google's emulator have gaps, because
        they lag behind commits under way. There the query is for the whole shard, which shows the gaps, and is
        repeated.
        """
        checked = tenant is None or self._wire.emulator is not None
        request = self._request(shard, after, upto, None if checked else tenant, limit)
        missing: list[int] = []
        for attempt in range(GAP_ATTEMPTS):
            found, _ = await self._wire.query(request)
            page = [self._found(shard, document) for document in found]
            last = page[-1].number if len(page) >= limit else upto
            missing = sorted({*range(after + 1, last + 1)}.difference(one.number for one in page)) if checked else []
            if not missing:
                return [one for one in page if tenant is None or take(one.document.fields["tenant"]) == tenant], last
            await pause(attempt)
        raise Unavailable(f"the journal has no record {record_name(shard, missing[0])}, which was written")

    def _found(self, shard: int, document: Any) -> _Found:
        number = int(last_of(document.name).partition("-")[2])
        place = document.fields["place"].integer_value
        return _Found(micros(document.update_time), place, shard, number, document)

    def _request(self, shard: int, after: int, upto: int, tenant: str | None, limit: int) -> Any:
        request = RunQueryRequest(parent=self._paths.documents)
        query = request.structured_query
        query.from_.add().collection_id = JOURNAL
        query.order_by.add(direction=_Direction.ASCENDING).field.field_path = "__name__"
        query.limit.value = limit
        query.start_at.before = False
        query.start_at.values.add().reference_value = self._paths.internal(JOURNAL, record_name(shard, after))
        query.end_at.before = False
        query.end_at.values.add().reference_value = self._paths.internal(JOURNAL, record_name(shard, upto))
        if tenant is not None:
            only = query.where.field_filter
            only.field.field_path = "tenant"
            only.op = _Operator.EQUAL
            only.value.CopyFrom(value_of(tenant))
        return request

    async def _records(self, found: list[_Found]) -> list[Record]:
        names = [
            self._paths.internal(JOURNAL_PARTS, f"{last_of(one.document.name)}-{number}")
            for one in found
            if "parts" in one.document.fields
            for number in range(1, one.document.fields["parts"].integer_value + 1)
        ]
        parts: Mapping[str, Any] = (await self._wire.batch_get(names))[0] if names else {}
        return [self._record(one, parts) for one in found]

    def _record(self, one: _Found, parts: Mapping[str, Any]) -> Record:
        fields = one.document.fields
        if "packed" in fields:
            packed = fields["packed"].bytes_value
            for number in range(1, fields["parts"].integer_value + 1):
                name = self._paths.internal(JOURNAL_PARTS, f"{last_of(one.document.name)}-{number}")
                packed += parts[name].fields["packed"].bytes_value
            before, after = tagged_json.loads(zlib.decompress(packed))
        else:
            before, after = (tagged_json.loads(fields[side].string_value) for side in ("before", "after"))
        version = one.moment - fields["version_back"].integer_value if "version_back" in fields else None
        return Record(
            **{name: take(fields[name]) for name in _PLAIN},
            before=before,
            after=after,
            version=take(fields["version"]) if "version" in fields else version,
            sequence=fields["sequence"].integer_value,
        )
