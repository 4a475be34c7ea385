"""Redaction: removes the values of one document or one user from the journal, in the store and in the archive.

The leaf of a redacted record does not change: the record keeps its commitments and loses the salts that open them. It
shows that it was redacted, by whom, when and why.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from msgspec import structs

from ..access import ALL_TENANTS, writer
from ..clock import Clock
from ..context import Context, utc_from_us
from ..database import Database
from ..entities import Document
from ..errors import Conflict, InvalidInput, Problem
from ..jobs import AcquiredLease, JobLeases
from ..journal.export_format import ExportedRecord
from ..journal.leaf import COMMITTED, NOTHING, committed_actor, redacted_salt
from ..journal.trees import JOURNAL, LOG, REDACT, JournalLog, legacy_salt, tree_id
from ..storage import tagged_json
from ..storage.journal_port import JOURNAL_ROW
from ..storage.port import Append, Batch, JournalFilter, JournalRow, Store
from .archive import Archive
from .legal_holds import LegalHolds
from .model import MAX_REASON_CHARS, MAX_SUBJECT_CHARS, POLICY, LegalHold, RetentionPolicy
from .retention import JOB, Policies, journal_record

OF_DOCUMENT = frozenset({"entity_id", "before", "after"})
OF_USER = frozenset(COMMITTED)
ROWS_AT_ONCE = 200
LEASE_WAIT_S = 30.0
"""How long a redaction waits for the retention job."""
_LEASE_PAUSE_S = 0.2
LOGS = JournalLog.__collection__.name


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose records are redacted: a user's (`user`: the actor), or those of a document. `tenant` None: the
    platform's."""

    tenant: str | None
    user: str | None = None
    collection: str | None = None
    entity_id: str | None = None

    def check(self) -> None:
        """Raises InvalidInput with every problem."""
        problems = []
        for name in ("user", "collection", "entity_id"):
            value = getattr(self, name)
            if value is not None and not 0 < len(value) <= MAX_SUBJECT_CHARS:
                problems.append(Problem(name, f"found {len(value)} characters, expected 1 to {MAX_SUBJECT_CHARS}"))
        document = self.collection is not None or self.entity_id is not None
        if (self.user is not None) == document:
            found = "it beside a document" if document else "nothing"
            expected = "expected a user, or a collection and an entity_id"
            problems.append(Problem("user", f"found {found}, {expected}"))
        elif document and (self.collection is None or self.entity_id is None):
            problems.append(Problem("entity_id", "a document has a collection and an entity_id: give both"))
        if self.collection == JOURNAL:
            problems.append(Problem("collection", "records about the journal itself are not redacted"))
        if problems:
            raise InvalidInput(problems)

    @property
    def fields(self) -> frozenset[str]:
        return OF_USER if self.user is not None else OF_DOCUMENT

    @property
    def where(self) -> JournalFilter:
        return JournalFilter(
            tenant=self.tenant,
            platform=self.tenant is None,
            actor=self.user,
            collection=self.collection,
            entity_id=self.entity_id,
        )

    def names(self, record: ExportedRecord) -> bool:
        """Whether an archived record is one of them."""
        return (
            record.tenant == self.tenant
            and record.collection != JOURNAL
            and self.user in (None, record.actor)
            and self.collection in (None, record.collection)
            and self.entity_id in (None, record.entity_id)
        )


@dataclass(frozen=True, slots=True)
class Redaction:
    """What was redacted: `records` in the store, `archived` in the archive. `record`: the id of the journal's record
    about it."""

    record: str
    records: int
    archived: int


class Redactions:
    """Redacts records of one store and its archive."""

    def __init__(
        self,
        database: Database,
        store: Store,
        clock: Clock,
        policies: Policies,
        holds: LegalHolds,
        archive: Archive | None,
    ) -> None:
        self._database = database
        self._store = store
        self._clock = clock
        self._policies = policies
        self._holds = holds
        self._archive = archive
        self._leases = JobLeases(database, clock)
        """Of a holder of its own: the node's own one may run the job at this moment."""

    async def redact(self, subject: Subject, reason: str, *, context: Context | None = None) -> Redaction:
        """Redact all records of a subject. Repeat a call that was interrupted. InvalidInput with every problem;
        Conflict under a legal hold, or while retention runs for longer than LEASE_WAIT_S; Denied."""
        by = writer(context, ALL_TENANTS)
        await self._database.authorize(by, "update", RetentionPolicy.__collection__, POLICY)
        subject.check()
        self._database.writes.expect_on(subject.tenant)
        if not reason.strip() or len(reason) > MAX_REASON_CHARS:
            raise InvalidInput([Problem("reason", f"found {len(reason)} characters, expected 1 to {MAX_REASON_CHARS}")])
        lease = await self._lease()
        try:
            return await self._redact(lease, subject, reason, by)
        finally:
            await lease.release(done=False)

    async def _lease(self) -> AcquiredLease:
        """The lease of the retention job, so that no segment is written from what is redacted meanwhile."""
        for _ in range(round(LEASE_WAIT_S / _LEASE_PAUSE_S)):
            lease = await self._leases.acquire(JOB)
            if lease is not None:
                return lease
            await asyncio.sleep(_LEASE_PAUSE_S)
        raise Conflict("retention is at work: try again")

    async def _redact(self, lease: AcquiredLease, subject: Subject, reason: str, by: Context) -> Redaction:
        guard = await self._policies.guard()
        holds = [hold for hold in await self._holds.active() if hold.concerns(subject.tenant)]
        count = 0
        async for rows in self._rows(subject):
            for row in rows:
                _refuse_held(holds, row[2], row[3], row[4], row[7], row[8])
            count += len(rows)
            await lease.save(lease.position)
        archived = 0
        async for _, record in self._archived(subject):
            _refuse_held(holds, record.tenant, record.at_us, record.actor, record.collection, record.entity_id)
            archived += 1
        now_us = self._clock.now_us()
        kind = "user" if subject.user is not None else "document"
        after: Document = {"of": kind, "reason": reason, "records": count, "archived": archived}
        if subject.collection is not None:
            after["collection"] = subject.collection
        note = journal_record(subject.tenant, now_us, REDACT, "", after, actor=by.actor, request_id=by.request_id)
        # From here on it is done: a legal hold that is placed later comes too late.
        await self._store.commit(Batch(None, (lease.guard, guard, Append(note)), now_us))
        mark = {
            "redacted": {"by": by.actor, "reason": reason, "at": utc_from_us(now_us).isoformat(), "record": note.id}
        }
        text = tagged_json.quick_dumps(mark)
        found = 0
        async for rows in self._rows(subject):
            rows = rows[: count - found]  # the others came meanwhile: nobody has looked for a legal hold of those
            if not rows:
                break
            found += await self._store.rewrite([_redacted(row, subject.fields, text) for row in rows])
            await lease.save(lease.position)
        return Redaction(note.id, found, await self._rewrite_archive(lease, subject, text))

    async def _rows(self, subject: Subject) -> AsyncIterator[list[JournalRow]]:
        """The records of a subject that are not redacted, with salts."""
        log = await self._store.get(LOGS, None, LOG)
        cursor = None
        while True:
            page = await self._store.rows(cursor, subject.where, limit=ROWS_AT_ONCE)
            rows = [row for row in page.rows if row[7] != JOURNAL]
            if any(not row[12] for row in rows):
                if log is None:
                    raise Conflict("records from before sealing have no salts yet: let a node run, then try again")
                secret = log["legacy_secret"]
                rows = [row if row[12] else (*row[:12], legacy_salt(secret, row[1]), *row[13:]) for row in rows]
            if rows:
                yield rows
            if page.cursor == cursor:
                return
            cursor = page.cursor

    async def _archived(self, subject: Subject) -> AsyncIterator[tuple[Any, ExportedRecord]]:
        if self._archive is None:
            return
        for _, _, file in self._archive.segments(tree_id(subject.tenant)):
            async for record in self._archive.records(file):
                if subject.names(record):
                    yield file, record

    async def _rewrite_archive(self, lease: AcquiredLease, subject: Subject, text: str) -> int:
        if self._archive is None:
            return 0
        total = 0
        for _, _, file in self._archive.segments(tree_id(subject.tenant)):
            changed = {
                record.index: _redacted_export(record, subject.fields, text)
                async for record in self._archive.records(file)
                if subject.names(record)
            }
            if changed:
                await self._archive.replace(file, changed)
                total += len(changed)
            await lease.save(lease.position)
        return total


def _refuse_held(
    holds: list[LegalHold], tenant: str | None, at_us: int, actor: str, collection: str, entity_id: str
) -> None:
    for hold in holds:
        if hold.matches(tenant, at_us, actor, collection, entity_id):
            raise Conflict(f"the legal hold {hold.id} blocks this: {hold.reason}", legal_hold=hold.id)


def _redacted(row: JournalRow, fields: frozenset[str], mark: str) -> JournalRow:
    """A row without these of its committed fields."""
    cells: list[Any] = list(row)
    values = {"actor": "", "entity_id": "", "before": None, "after": mark}
    for name in fields:
        cells[JOURNAL_ROW.index(name)] = values[name]
    if "actor" in fields:
        cells[JOURNAL_ROW.index("claims")] = None
    cells[JOURNAL_ROW.index("salt")] = redacted_salt(row, fields)
    return tuple(cells)


def _redacted_export(record: ExportedRecord, fields: frozenset[str], mark: str) -> ExportedRecord:
    """An archived record without these of its committed fields."""
    values = (
        committed_actor(record.actor, record.claims),
        record.entity_id.encode(),
        None if record.before is None else record.before.encode(),
        None if record.after is None else record.after.encode(),
    )
    before = record.commitments or (None, None, None, None)
    salts: list[bytes | None] = []
    commitments: list[bytes | None] = []
    for name, value, salt, commitment in zip(COMMITTED, values, record.salts, before, strict=True):
        if name not in fields or salt is None:
            salts.append(salt)
            commitments.append(commitment)
        else:
            salts.append(None)
            commitments.append(NOTHING if value is None else sha256(salt + value).digest())
    return structs.replace(
        record,
        actor="" if "actor" in fields else record.actor,
        claims=None if "actor" in fields else record.claims,
        entity_id="" if "entity_id" in fields else record.entity_id,
        before=None if "before" in fields else record.before,
        after=mark if "after" in fields else record.after,
        salts=(salts[0], salts[1], salts[2], salts[3]),
        commitments=(commitments[0], commitments[1], commitments[2], commitments[3]),
    )


__all__ = ["Redaction", "Redactions", "Subject"]
