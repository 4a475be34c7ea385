"""Redacts journal records in Firestore, and drops old ones."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from google.cloud.firestore_v1.types import query as _query

from ...errors import TooLarge, Unavailable
from ..port import MAX_BATCH_BYTES, MAX_OPERATIONS, JournalFilter, JournalRow
from .client import PRECONDITION, UNCERTAIN, Rejected, RunQueryRequest, Wire, pause, translated
from .journal import Journal, floor_name, number_through, put_conditions, shard_of
from .journal_documents import REWRITTEN, Found, record_name, rewritten_documents
from .paths import JOURNAL, Paths
from .places import SHARDS
from .values import COMMIT_FIELD, WritePb

TIMEOUT_S = 30.0
"""How long a commit is tried while others write the same documents, or while Firestore does not answer."""
DROPPED_AT_ONCE = 100
"""Records that one commit removes: with their further documents at most 400 writes."""
_Direction: Any = _query.StructuredQuery.Direction


class Upkeep:
    """Changes journal records after they were written: whole commits, each safe to repeat."""

    def __init__(self, wire: Wire, paths: Paths, journal: Journal) -> None:
        self._wire = wire
        self._paths = paths
        self._journal = journal

    # --- Redaction ---

    async def rewrite(self, rows: Sequence[JournalRow]) -> int:
        """Replace what may be redacted, in one commit. TooLarge if that cannot hold the rows."""
        wanted = {
            self._paths.internal(JOURNAL, record_name(row[0] % SHARDS, row[0] // SHARDS)): row
            for row in rows
            if row[0] > 0
        }
        if not wanted:
            return 0
        deadline = time.monotonic() + TIMEOUT_S
        attempt = 0
        while True:
            documents, _ = await self._wire.batch_get(list(wanted))
            found = {
                name: document
                for name, document in documents.items()
                if document is not None and document.fields["id"].string_value == wanted[name][1]
            }
            commit = f"rewrite-{secrets.token_hex(8)}"
            writes = [write for name in found for write in self._rewriting(found[name], wanted[name], commit)]
            size = sum(write.ByteSize() for write in writes)
            if len(writes) > MAX_OPERATIONS or size > MAX_BATCH_BYTES:
                raise TooLarge(
                    f"found {len(writes)} writes of {size} bytes for {len(rows)} journal records, expected at most "
                    f"{MAX_OPERATIONS} of {MAX_BATCH_BYTES} bytes: rewrite fewer at once"
                )
            if not writes or await self._committed(writes, "rewrite", deadline):
                return len(found)
            await pause(attempt)
            attempt += 1

    def _rewriting(self, document: Any, row: JournalRow, commit: str) -> list[Any]:
        """The writes that replace a record's fields and further documents."""
        record, *further = rewritten_documents(self._paths, document, row, commit)
        write = WritePb(update=record)
        write.update_mask.field_paths.extend((*REWRITTEN, COMMIT_FIELD))
        write.current_document.update_time.CopyFrom(document.update_time)
        kept = {part.name for part in further}
        gone = [name for name in Found.of(document).part_names(self._paths) if name not in kept]
        return [write, *(WritePb(update=part) for part in further), *(WritePb(delete=name) for name in gone)]

    async def _committed(self, writes: list[Any], what: str, deadline: float) -> bool:
        """Whether Firestore took the writes; False if they must be made again, from what is there now."""
        try:
            await self._wire.commit(writes)
            return True
        except Rejected as rejected:
            if rejected.code not in PRECONDITION | UNCERTAIN:
                raise translated(rejected.code, rejected.text, what) from None
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{what}: Firestore does not take the commit ({rejected}): whether it was applied is not known",
                    outcome="unknown",
                    retry_after_s=1.0,
                ) from None
            return False

    # --- Dropping ---

    async def drop(self, tenant: str | None, through_sequence: int) -> int:
        """Remove a tenant's records up to and with a sequence; readers are told first."""
        shard = shard_of(tenant)
        where = JournalFilter(tenant=tenant, platform=tenant is None)
        last = await self._last(shard, where, number_through(shard, through_sequence))
        if not last:
            return 0
        await self._raise_floor(shard, tenant, last)
        count = after = 0
        while after < last:
            found = await self._names(shard, where, after, last)
            names = [name for one in found for name in (one.document.name, *one.part_names(self._paths))]
            if names:
                await self._removed(names)
            count += len(found)
            after = found[-1].number if len(found) >= DROPPED_AT_ONCE else last
        return count

    async def _last(self, shard: int, where: JournalFilter, upto: int) -> int:
        """The number of the last record that matches, up to a number; 0 if there is none."""
        upto = min(upto, (await self._journal.heads([shard]))[shard].last)
        if upto < 1:
            return 0
        query = self._query(where, _Direction.DESCENDING, 1)
        query.structured_query.start_at.before = True
        query.structured_query.start_at.values.add().reference_value = self._name(shard, upto)
        query.structured_query.end_at.before = True
        query.structured_query.end_at.values.add().reference_value = self._name(shard, 0)
        found, _ = await self._wire.query(query)
        return Found.of(found[0]).number if found else 0

    async def _names(self, shard: int, where: JournalFilter, after: int, upto: int) -> list[Found]:
        query = self._query(where, _Direction.ASCENDING, DROPPED_AT_ONCE)
        for name in ("parts", "place"):
            query.structured_query.select.fields.add().field_path = name
        query.structured_query.start_at.before = False
        query.structured_query.start_at.values.add().reference_value = self._name(shard, after)
        query.structured_query.end_at.before = False
        query.structured_query.end_at.values.add().reference_value = self._name(shard, upto)
        found, _ = await self._wire.query(query)
        return [Found.of(document) for document in found]

    def _query(self, where: JournalFilter, direction: Any, limit: int) -> Any:
        request = RunQueryRequest(parent=self._paths.documents)
        query = request.structured_query
        query.from_.add().collection_id = JOURNAL
        query.order_by.add(direction=direction).field.field_path = "__name__"
        query.limit.value = limit
        put_conditions(query, where)
        return request

    def _name(self, shard: int, number: int) -> str:
        return self._paths.internal(JOURNAL, record_name(shard, number))

    async def _raise_floor(self, shard: int, tenant: str | None, last: int) -> None:
        """Note what will be gone: in the shard's head, for all readers, and for readers of this tenant alone."""
        head_name, name = self._journal.head_name(shard), floor_name(self._paths, tenant)
        deadline = time.monotonic() + TIMEOUT_S
        attempt = 0
        while True:
            documents, _ = await self._wire.batch_get([head_name, name])
            head, floor = documents[head_name], documents[name]
            writes = []
            if head is not None and head.fields["dropped"].integer_value < last:
                write = WritePb()
                write.update.name = head_name
                write.update.fields["dropped"].integer_value = last
                write.update_mask.field_paths.append("dropped")
                write.current_document.update_time.CopyFrom(head.update_time)
                writes.append(write)
            if floor is None or floor.fields["number"].integer_value < last:
                write = WritePb()
                write.update.name = name
                write.update.fields["number"].integer_value = last
                if tenant is not None:
                    write.update.fields["tenant"].string_value = tenant
                if floor is None:
                    write.current_document.exists = False
                else:
                    write.current_document.update_time.CopyFrom(floor.update_time)
                writes.append(write)
            if not writes or await self._committed(writes, "drop", deadline):
                return
            await pause(attempt)
            attempt += 1

    async def _removed(self, names: Sequence[str]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        attempt = 0
        while not await self._committed([WritePb(delete=name) for name in names], "drop", deadline):
            await pause(attempt)
            attempt += 1
