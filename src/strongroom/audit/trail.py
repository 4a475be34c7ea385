"""The audit trail: who changed what, when, with the values before and after. It searches the journal.

Records come oldest first. The store finds them by an index for each filter. A call makes a bounded number of reads, so
it may return an empty page with a cursor that continues.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, TypedDict, Unpack

from ..access import ALL_TENANTS, bound_to
from ..context import Context, us_from_utc, utc_from_us
from ..cooperative import Slices, in_slices
from ..database import Database
from ..entities import DEFAULT_LIMIT, MAX_CURSOR_BYTES, MAX_LIMIT, MAX_PAGE_BYTES, Page
from ..errors import Denied, InvalidInput, NotFound, Problem
from ..journal import FIRST_PAGE, MASK
from ..journal.export import export_tree, logged_tree, range_of_times
from ..keys.model import NAME as KEYS
from ..storage import tagged_json
from ..storage.port import JournalFilter, JournalRow, RowsPage, Store
from .formats import Format, formatter, header_of
from .proofs import Proofs
from .record import AuditRecord

MAX_READS = 20
"""Reads of the store that one call makes; its cursor continues after them. Each reads about MAX_PAGE_BYTES at most."""
NAME = "journal"
ACTIONS = ("create", "update", "add", "delete", "expire", "deny", "redact", "drop", "rotate")
HASHES = frozenset({"hash", "previous_hash"})
"""Fields of API keys that audit records mask like secrets: an imported hash may have no pepper, so a weak secret could
be guessed from it. The journal itself keeps them, because the change feed finds keys by them."""


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Every given field must match. `since` is inclusive, `until` exclusive."""

    tenant: str | None = None
    actor: str | None = None
    action: str | None = None
    collection: str | None = None
    entity_id: str | None = None
    request_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def rows(self, tenant: str | None) -> JournalFilter:
        """The filter of the journal's rows, of one tenant or (None) of all."""
        return JournalFilter(
            tenant=tenant,
            actor=self.actor,
            action=self.action,
            collection=self.collection,
            entity_id=self.entity_id,
            request_id=self.request_id,
            since_us=us_from_utc(self.since) if self.since is not None else None,
            until_us=us_from_utc(self.until) if self.until is not None else None,
        )

    def check(self) -> None:
        """Raise InvalidInput with every problem."""
        problems = [
            Problem(name, "found a time without a zone, expected one with (for example 2027-01-01T00:00:00Z)")
            for name in ("since", "until")
            if (moment := getattr(self, name)) is not None and moment.utcoffset() is None
        ]
        since, until = self.since, self.until
        if not problems and since is not None and until is not None and since >= until:
            problems.append(
                Problem("until", f"found {until.isoformat()}, expected a time after since ({since.isoformat()})")
            )
        if self.action is not None and self.action not in ACTIONS:
            problems.append(Problem("action", f"found {self.action[:64]!r}, expected one of {', '.join(ACTIONS)}"))
        if problems:
            raise InvalidInput(problems)


class AuditGiven(TypedDict, total=False):
    """The fields of an AuditFilter as keyword arguments."""

    tenant: str | None
    actor: str | None
    action: str | None
    collection: str | None
    entity_id: str | None
    request_id: str | None
    since: datetime | None
    until: datetime | None


class Audit:
    """The audit trail of one store."""

    def __init__(self, store: Store, database: Database, proofs: Proofs) -> None:
        self._store = store
        self._database = database
        self._proofs = proofs

    async def list(
        self,
        *,
        limit: int = DEFAULT_LIMIT,
        cursor: str | None = None,
        context: Context | None = None,
        **wanted: Unpack[AuditGiven],
    ) -> Page[AuditRecord]:
        """Like `page`, with the fields of AuditFilter as keywords: `list(tenant="acme", since=…)`."""
        return await self.page(AuditFilter(**wanted), limit=limit, cursor=cursor, context=context)

    async def page(
        self,
        wanted: AuditFilter,
        *,
        limit: int = DEFAULT_LIMIT,
        cursor: str | None = None,
        context: Context | None = None,
    ) -> Page[AuditRecord]:
        """The next matching records, oldest first: at most `limit`, and MAX_PAGE_BYTES. Only `next_cursor` says whether
        there may be more records: an empty page can have one.

        A caller bound to a tenant reads that tenant's records; other callers read all. Raises Denied for another
        tenant, InvalidInput, and Gone for a cursor of a journal that an older copy replaced.
        """
        rows, next_cursor = await self._rows(wanted, limit, cursor, context)
        return Page([*await self._audited(rows)], next_cursor)

    async def _rows(
        self, wanted: AuditFilter, limit: int, cursor: str | None, context: Context | None
    ) -> tuple[Sequence[JournalRow], str | None]:
        """The rows of a page, and the next cursor."""
        wanted.check()
        if type(limit) is not int or not 1 <= limit <= MAX_LIMIT:
            raise InvalidInput([Problem("limit", f"found {limit!r}, expected 1 to {MAX_LIMIT}")])
        tenant = await self._tenant(wanted, context)
        name = _fingerprint(wanted, tenant)
        after, skip = _position(cursor, name) if cursor is not None else (None, 0)
        reading = _Reading(limit)
        where = wanted.rows(tenant)
        slices = Slices()
        size = min(FIRST_PAGE, limit + 1)
        for _ in range(MAX_READS):
            page = await self._store.rows(after, where, min(size + skip, MAX_LIMIT))
            for number, row in enumerate(page.rows):
                await slices.pause()
                if number < skip:
                    continue
                if reading.is_full(row):
                    return reading.rows, _cursor(name, after, number)
                reading.take(row)
            if page.cursor == after:
                return reading.rows, None
            after, skip = page.cursor, 0
            size = _next_size(size, page)
        return reading.rows, _cursor(name, after, 0)

    async def _audited(self, rows: Sequence[JournalRow]) -> Sequence[AuditRecord]:
        """The rows as audit records, with their indexes."""
        groups: dict[str | None, list[int]] = {}
        for row in rows:
            groups.setdefault(row[2], []).append(row[0])
        indexes: dict[int, int] = {}
        for tenant, sequences in groups.items():
            with suppress(NotFound):  # nothing is sealed yet
                tree = await logged_tree(self._store, tenant)
                indexes |= await tree.reader.indexes_of(sequences)
        return await in_slices(lambda row: audited(row, indexes.get(row[0])), rows)

    async def record(self, sequence: int, tenant: str | None, *, context: Context | None = None) -> AuditRecord:
        """One record of a tenant, or (None) of the platform. Raises NotFound, Denied."""
        own = await self._tenant(AuditFilter(tenant), context)
        where = JournalFilter(tenant=own, platform=own is None, after_sequence=sequence - 1, through_sequence=sequence)
        cursor: str | None = None
        while True:
            page = await self._store.rows(cursor, where, 1)
            if page.rows:
                return (await self._audited(page.rows))[0]
            if page.cursor == cursor:
                whose = f"tenant {own!r}" if own is not None else "the platform"
                raise NotFound(f"{whose} has no record with sequence {sequence}")
            cursor = page.cursor

    # --- Exports and proofs -----------------------------------------------------------------------------------

    async def exported(
        self, format: Format, wanted: AuditFilter, *, context: Context | None = None
    ) -> AsyncIterator[bytes]:
        """The matching records as lines of a format. Raises what `page` raises."""
        yield header_of(format)
        line, cursor = formatter(format), None
        while True:
            page = await self.page(wanted, limit=MAX_LIMIT, cursor=cursor, context=context)
            for record in page.items:
                yield line(record)
            if page.next_cursor is None:
                return
            cursor = page.next_cursor

    async def proved(
        self,
        tenant: str | None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        context: Context | None = None,
    ) -> AsyncIterator[bytes]:
        """An export of the sealed records of a tenant (None: of the platform) that proves itself, as lines
        (`journal.export_format`). It has every record of the time range, and those that lie between. Raises NotFound if
        none is sealed, Denied, InvalidInput."""
        wanted = AuditFilter(tenant, since=since, until=until)
        wanted.check()
        await self._tenant(wanted, context)
        tree = await logged_tree(self._store, tenant)
        where = wanted.rows(tenant)
        found = await range_of_times(self._store, tree, where.since_us, where.until_us)
        begin, end = found if found is not None else (tree.reader.size, tree.reader.size)
        note = await self._proofs.note(tree)
        async for line in export_tree(self._store, tree, note, first=begin, end=end):
            yield line

    async def _tenant(self, wanted: AuditFilter, context: Context | None) -> str | None:
        """The tenant whose records are read; None for all. Raises Denied."""
        own = bound_to(context)
        if own is None or context is None:
            return wanted.tenant
        if wanted.tenant not in (None, own):
            reason = f"the caller belongs to tenant {own!r}"
            asked = None if wanted.tenant == ALL_TENANTS else wanted.tenant
            by = Context(asked, context.actor, context.claims, context.request_id)
            await self._database.denials.note(self._database.at_now(by), "list", NAME, "", reason)
            raise Denied(f"list {NAME}: {reason}", reason=reason, recorded=True)
        return own


def _next_size(size: int, page: RowsPage) -> int:
    """How many rows to read next, so that they have about MAX_PAGE_BYTES at most."""
    if not page.rows:
        return size
    fitting = MAX_PAGE_BYTES * len(page.rows) // max(sum(_size(row) for row in page.rows), 1)
    return max(1, min(2 * size, fitting, MAX_LIMIT))


class _Reading:
    """A page under construction."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.rows: list[JournalRow] = []
        self._bytes = 0

    def is_full(self, row: JournalRow) -> bool:
        """Whether the page ends before this row."""
        if len(self.rows) >= self._limit:
            return True
        return bool(self.rows) and self._bytes + _size(row) > MAX_PAGE_BYTES

    def take(self, row: JournalRow) -> None:
        self._bytes += _size(row)
        self.rows.append(row)


def audited(row: JournalRow, index: int | None) -> AuditRecord:
    """A row of the journal as an audit record."""
    sequence, _, tenant, at_us, actor, request_id, action, collection, entity_id, _, before, after, *_ = row
    return AuditRecord(
        sequence,
        index,
        tenant,
        utc_from_us(at_us),
        actor,
        request_id,
        action,
        collection,
        entity_id,
        _shown(collection, before),
        _shown(collection, after),
    )


def _shown(collection: str, text: str | None) -> dict[str, Any] | None:
    fields: dict[str, Any] | None = None if text is None else tagged_json.loads(text)
    if fields is None or collection != KEYS:
        return fields
    return {name: MASK if name in HASHES and value is not None else value for name, value in fields.items()}


def _size(row: JournalRow) -> int:
    """About how many bytes a row's documents have."""
    return len(row[10] or "") + len(row[11] or "")


# --- Cursors --------------------------------------------------------------------------------------------------


def _fingerprint(wanted: AuditFilter, tenant: str | None) -> str:
    text = json.dumps([tenant, asdict(wanted)], default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _cursor(name: str, after: str | None, skip: int) -> str:
    text = json.dumps([name, after, skip], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _position(cursor: str, name: str) -> tuple[str | None, int]:
    """The journal cursor to continue from, and how many records after it were examined. Raises InvalidInput."""
    try:
        if len(cursor) > MAX_CURSOR_BYTES:
            raise ValueError
        given, after, skip = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        fits = given == name and (after is None or (isinstance(after, str) and after != "end"))
        if not fits or type(skip) is not int or not 0 <= skip < MAX_LIMIT:
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise InvalidInput([Problem("cursor", "is not a cursor of this query: start without a cursor")]) from None
    return after, skip


__all__ = ["Audit", "AuditFilter", "AuditRecord"]
