"""The journal in Firestore: records as documents, one head a shard, and pages of them in the order of their commits."""

from __future__ import annotations

import asyncio
import hashlib
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.cloud.firestore_v1.types import query as _query

from ...errors import InvalidInput, Problem, Unavailable
from .. import tagged_json as _values
from ..port import ChangesPage, Record, past_the_end
from .client import RunQueryRequest, Wire, pause
from .draft import SHARDS, Line
from .paths import HEADS, JOURNAL, JOURNAL_PARTS, Paths, last_of
from .values import COMMIT_FIELD, DocumentPb, micros, put, take, value_of

END = "end"
MAX_TEXT_BYTES = 16_384
"""What a record tells of a document is readable JSON up to here, and compressed above."""
MAX_PART_BYTES = 900_000
"""A document holds 1 MiB, a record up to 2 MB: what is left over goes to documents of its own."""
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
    """How far a cursor has read each shard. InvalidInput if it is none of this journal's."""
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
    """The documents of one record: itself, and what does not fit into it.

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
    texts = {side: _values.dumps(getattr(record, side)) for side in ("before", "after")}
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
    """A record's document, and what it is sorted by: its commit and its position in it."""

    moment: int
    place: int
    shard: int
    number: int
    document: Any


class Journal:
    """Reads the journal. `heads` is the last record of each shard that is known of."""

    def __init__(self, wire: Wire, paths: Paths) -> None:
        self._wire = wire
        self._paths = paths
        self.heads = [0] * SHARDS
        self.is_followed = False
        """A listener keeps `heads` fresh, so that they need not be read each time."""

    def saw_head(self, shard: int, last: int) -> None:
        self.heads[shard] = max(self.heads[shard], last)

    def head_name(self, shard: int) -> str:
        return self._paths.internal(HEADS, f"{shard:02}")

    async def read_heads(self, shards: range | list[int]) -> None:
        found, _ = await self._wire.batch_get([self.head_name(shard) for shard in shards])
        for name, document in found.items():
            # What was read is what there is: after an emulator's restart that may be less than before.
            self.heads[int(last_of(name))] = document.fields["last"].integer_value if document is not None else 0

    async def changes(self, after: str | None, tenant: str | None, limit: int) -> ChangesPage:
        position = position_of(None if after == END else after)
        shards = range(SHARDS) if tenant is None or after == END else [shard_of(tenant)]
        if not self.is_followed or after == END:
            await self.read_heads(shards)
        if after == END:
            return ChangesPage((), cursor_text(list(self.heads)))
        ahead = [shard for shard in shards if position[shard] > self.heads[shard]]
        if ahead and self.is_followed:  # another node has given the cursor, and heard of more than this one
            await self.read_heads(ahead)
            ahead = [shard for shard in ahead if position[shard] > self.heads[shard]]
        if ahead:
            raise past_the_end()
        heads = list(self.heads)
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
                # Not a whole page from each shard: what another shard crowds out is read and paid for again.
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

        A head is written with its records, so that a shard has no gaps. Google's emulator has: its queries lag behind
        commits that are being made. There the whole shard is asked for, which can be checked, and asked for again.
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
            before, after = _values.loads(zlib.decompress(packed))
        else:
            before, after = (_values.loads(fields[side].string_value) for side in ("before", "after"))
        version = one.moment - fields["version_back"].integer_value if "version_back" in fields else None
        return Record(
            **{name: take(fields[name]) for name in _PLAIN},
            before=before,
            after=after,
            version=take(fields["version"]) if "version" in fields else version,
            sequence=fields["sequence"].integer_value,
        )
