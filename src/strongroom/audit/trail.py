"""The audit trail: who changed what, when, with the values before and after. It reads and filters the journal.

Records come oldest first. Each call reads a bounded part of the journal, so a filter that matches few records costs no
more than others: the call may return an empty page with a cursor that continues.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, TypedDict, Unpack

from ..access import ALL_TENANTS, bound_to
from ..context import Context, us_from_utc, utc_from_us
from ..cooperative import Slices
from ..database import Database
from ..entities import DEFAULT_LIMIT, MAX_CURSOR_BYTES, MAX_LIMIT, MAX_PAGE_BYTES, Page
from ..errors import Denied, Gone, InvalidInput, Problem
from ..journal import FIRST_PAGE, MASK, next_limit
from ..journal.feed import PAGE
from ..keys.model import NAME as KEYS
from ..storage.port import Record, Store, document_size

MAX_EXAMINED = 10_000
"""Records that one call examines; its cursor continues after them. Large records, of which fewer than PAGE are read at
once, count more, so a call reads MAX_EXAMINED / PAGE pages of about MAX_PAGE_BYTES."""
OUT_OF_ORDER_US = 3_600 * 1_000_000
"""Records are in commit order. Clock differences and long calls may put their times out of order, but by less than an
hour."""
NAME = "journal"
ACTIONS = ("create", "update", "add", "delete", "expire", "deny")
HASHES = frozenset({"hash", "previous_hash"})
"""Fields of API keys that audit records mask like secrets: an imported hash may have no pepper, so a weak secret could
be guessed from it. The journal itself keeps them, because the change feed finds keys by them."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One record. `tenant` is None for the platform's records. `index` is the record's leaf in its tenant's tree; this
    version seals no records, so it is None. Secrets in `before` and `after` are `***`."""

    sequence: int
    index: int | None
    tenant: str | None
    at: datetime
    actor: str
    request_id: str
    action: str
    collection: str
    entity_id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


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

    def matches(self, record: Record) -> bool:
        for name in ("actor", "action", "collection", "entity_id", "request_id"):
            wanted = getattr(self, name)
            if wanted is not None and getattr(record, name) != wanted:
                return False
        if self.since is not None and record.at_us < us_from_utc(self.since):
            return False
        return self.until is None or record.at_us < us_from_utc(self.until)

    def check(self) -> None:
        """Raise InvalidInput with every problem."""
        problems = [
            Problem(name, "found a time without a zone, expected one with (for example 2027-01-01T00:00:00Z)")
            for name in ("since", "until")
            if (moment := getattr(self, name)) is not None and moment.utcoffset() is None
        ]
        if not problems and self.since is not None and self.until is not None and self.since >= self.until:
            problems.append(Problem("until", f"found {self.until}, expected a time after since ({self.since})"))
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

    def __init__(self, store: Store, database: Database) -> None:
        self._store = store
        self._database = database

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
        tenant, InvalidInput, and Gone if retention dropped records after the cursor.
        """
        wanted.check()
        if type(limit) is not int or not 1 <= limit <= MAX_LIMIT:
            raise InvalidInput([Problem("limit", f"found {limit!r}, expected 1 to {MAX_LIMIT}")])
        tenant = await self._tenant(wanted, context)
        name = _fingerprint(wanted, tenant)
        if cursor is not None:
            after, skip = _position(cursor, name)
        else:
            after, skip = await self._start(wanted, tenant), 0
        reading = _Reading(wanted, limit)
        until_us = us_from_utc(wanted.until) + OUT_OF_ORDER_US if wanted.until is not None else None
        slices = Slices()
        size = FIRST_PAGE
        while True:
            asked = min(size + skip, MAX_LIMIT)
            page = await self._store.changes(after, tenant=tenant, limit=asked)
            for number, record in enumerate(page.records):
                await slices.pause()
                if number < skip:
                    continue
                if reading.is_full(record):
                    return Page(reading.items, _cursor(name, after, number))
                if until_us is not None and record.at_us >= until_us:
                    return Page(reading.items, None)
                reading.take(record, PAGE / size)
            if not page.records:
                return Page(reading.items, None)
            after, skip = page.cursor, 0
            size = next_limit(size, page)

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
            raise Denied(f"list {NAME}: {reason}", reason=reason)
        return own

    async def _start(self, wanted: AuditFilter, tenant: str | None) -> str | None:
        """A cursor before the first record of the time range, found by binary search where cursors are ordered numbers;
        otherwise, or without `since`, the start of the journal."""
        if wanted.since is None:
            return None
        before_us = us_from_utc(wanted.since) - OUT_OF_ORDER_US
        end = (await self._store.changes("end")).cursor
        if not (end.isascii() and end.isdigit()):
            return None
        start: str | None = None
        low, high = 0, int(end)
        while high - low > FIRST_PAGE:
            middle = (low + high) // 2
            try:
                page = await self._store.changes(str(middle), tenant=tenant, limit=1)
            except Gone:
                low = middle
                continue
            if page.records and page.records[0].at_us < before_us:
                start = page.cursor
                low = max(int(page.cursor), middle + 1)
            else:
                high = middle
        return start


class _Reading:
    """A page under construction."""

    def __init__(self, wanted: AuditFilter, limit: int) -> None:
        self._wanted = wanted
        self._limit = limit
        self.items: list[AuditRecord] = []
        self._bytes = 0
        self._examined = 0.0

    def is_full(self, record: Record) -> bool:
        """Whether the page ends before this record."""
        if self._examined >= MAX_EXAMINED or len(self.items) >= self._limit:
            return True
        return bool(self.items) and self._wanted.matches(record) and self._bytes + _size(record) > MAX_PAGE_BYTES

    def take(self, record: Record, weight: float) -> None:
        self._examined += weight
        if self._wanted.matches(record):
            self._bytes += _size(record)
            self.items.append(_audited(record))


def _audited(record: Record) -> AuditRecord:
    return AuditRecord(
        sequence=record.sequence,
        index=None,
        tenant=record.tenant,
        at=utc_from_us(record.at_us),
        actor=record.actor,
        request_id=record.request_id,
        action=record.action,
        collection=record.collection,
        entity_id=record.entity_id,
        before=_shown(record, record.before),
        after=_shown(record, record.after),
    )


def _shown(record: Record, fields: dict[str, Any] | None) -> dict[str, Any] | None:
    if fields is None or record.collection != KEYS:
        return fields
    return {name: MASK if name in HASHES and value is not None else value for name, value in fields.items()}


def _size(record: Record) -> int:
    return sum(document_size(part) for part in (record.before, record.after) if part is not None)


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
