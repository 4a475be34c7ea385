"""The deletion of a tenant: everything it has is removed in steps, and a signed statement says what was removed.

The tenant's status is `deleting` first, so that nothing new is written. Each step commits its removals together with
their count, so a deletion that was broken off, also by a killed process, goes on from there: another call continues
it, or the job. The tenant's journal stays: it is for retention to drop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from ..access import writer
from ..clock import Clock
from ..context import Context, new_id, system_context, us_from_utc, utc_from_us
from ..database import Database, Idempotency, Replayed, Transaction
from ..entities import DEFAULT_LIMIT, MAX_LIMIT, Entity, Index, Page, Query, Where
from ..errors import AlreadyExists, Conflict, NotFound, StrongroomError, TooLarge
from ..storage.port import Check
from .model import Tenant
from .parts import Removed, TenantPart

SETTLE_S = 1.0
"""The removal begins this long after the status is `deleting`: so soon every node refuses the tenant's writes."""
DELETIONS_EVERY_S = 30.0
"""How soon the job continues a deletion that was broken off."""
FIRST_STEP = 20
MAX_STEP = 80
"""Documents of one step. Firestore takes 500 writes in a commit, and a document with its record and unique values may
need five."""
HEADLINE = "strongroom tenant deletion v1"
_log = logging.getLogger(__name__)


class TenantDeletion(Entity, collection="tenant_deletions", scope="global", journalled=False):
    """A deletion under way; the id is the tenant. `counts`: the removed documents so far, by collection."""

    statement_id: str
    actor: str
    request_id: str
    reason: str | None = None
    started_at: datetime
    counts: dict[str, int] = {}


class DeletionStatement(
    Entity,
    collection="deletion_statements",
    scope="global",
    indexes=[Index("tenant", "-created_at"), Index("-created_at")],
):
    """What a deletion removed. `journal_size` and `journal_root`: the tenant's tree in the journal, as far as it was
    sealed when the deletion ended. `note`: all of this as text, signed (C2SP signed note) if there is a signing key."""

    tenant: str
    actor: str
    request_id: str
    reason: str | None = None
    started_at: datetime
    finished_at: datetime
    counts: dict[str, int] = {}
    journal_size: int | None = None
    journal_root: str | None = None
    signed: bool = False
    note: str


@dataclass(slots=True)
class DeletionHooks:
    """What `app.py` adds. `legal_hold`: why a tenant may not be deleted, None if it may. `guard`: a condition that does
    not hold any more once a legal hold is placed; it is read before `legal_hold` is asked, and each step expects it, so
    that no step is committed after a hold was placed. `tree`: the size and the root
    of a tenant's tree in the journal, as far as it is sealed. `sign`: a text as a signed note, None without a key."""

    legal_hold: Callable[[str], Awaitable[str | None]] | None = None
    guard: Callable[[], Awaitable[Check]] | None = None
    tree: Callable[[str], Awaitable[tuple[int, str] | None]] | None = None
    sign: Callable[[str], Awaitable[str | None]] | None = None


class _Lease(Protocol):
    """The job's lease."""

    async def save(self, position: str | None) -> None: ...


class Deletions:
    """The deletions of tenants of one store."""

    def __init__(
        self, database: Database, parts: Sequence[TenantPart], clock: Clock, *, settle_s: float = SETTLE_S
    ) -> None:
        self._database = database
        self._parts = tuple(parts)
        self._clock = clock
        self.settle_s = settle_s
        self.hooks = DeletionHooks()

    async def run(self, lease: _Lease) -> None:
        """The job: continue every deletion under way. Each step checks what it removes, so it needs no guard."""
        page = await self._database.find(system_context(), TenantDeletion, Query(limit=MAX_LIMIT))
        for deletion in page.items:
            try:
                await self.go_on(deletion.id)
            except StrongroomError as error:  # a legal hold, or a store that is gone for a moment: the next run
                _log.warning("the deletion of the tenant %r waits: %s", deletion.id, error)
            await lease.save(None)

    async def begin(
        self,
        tenant: str,
        reason: str | None,
        is_known: Callable[[str], Awaitable[bool]],
        *,
        context: Context | None,
        expected: int | None,
        once: Idempotency | None,
    ) -> None:
        """Mark a tenant as `deleting`. Raises NotFound, Conflict under a legal hold or at another version, Denied."""
        by = writer(context, tenant)
        await self._database.authorize(by, "delete", Tenant.__collection__, tenant)
        await self._refuse_if_held(tenant)

        async def body(tx: Transaction) -> None:
            now = await tx.get_or_none(Tenant, tenant)
            if now is None and not await is_known(tenant):
                raise NotFound(f"there is no tenant {tenant[:64]!r}")
            found = now.version if now is not None else 0
            if expected is not None and expected != found:
                message = f"tenants/{tenant[:64]}: found version {found}, expected {expected}"
                raise Conflict(message, found=found, expected=expected)
            if now is not None and now.status == "deleting":
                return
            fields = {"status": "deleting", "reason": reason}
            if now is None:
                await tx.create(Tenant.parse({"id": tenant, **fields}))
            else:
                await tx.update(Tenant, tenant, fields)
            deletion = TenantDeletion(
                id=tenant,
                statement_id=new_id("del_"),
                actor=by.actor,
                request_id=tx.context.request_id,
                reason=reason,
                started_at=tx.context.now,
            )
            await tx.replace(deletion)

        try:
            await self._database.transaction(_own(by), body, idempotency=once)
        except Replayed:
            return

    async def go_on(self, tenant: str, *, within_s: float | None = None) -> DeletionStatement | None:
        """Remove what the tenant has, and return the statement. `within_s`: stop after this time, and return None;
        the job continues. Raises NotFound if no deletion is under way, Conflict under a legal hold."""
        until = time.monotonic() + within_s if within_s is not None else None
        deletion = await self._database.get(system_context(), TenantDeletion, tenant)
        by = Context(tenant, deletion.actor, system_context().claims, deletion.request_id)
        age_s = (self._clock.now_us() - us_from_utc(deletion.started_at)) / 1_000_000
        await asyncio.sleep(max(0.0, min(self.settle_s, self.settle_s - age_s)))
        anything = True
        while anything:  # until a whole round finds nothing: a late write of another node may follow the first one
            anything = False
            for part in self._parts:
                size = FIRST_STEP
                while True:
                    if until is not None and time.monotonic() >= until:
                        return None
                    removed, size = await self._step(part, by, size)
                    if not removed:
                        break
                    anything = True
        return await self._finish(tenant, by)

    async def _step(self, part: TenantPart, by: Context, size: int) -> tuple[Removed, int]:
        """Remove about `size` documents. Returns them, and the size of the next step."""
        tenant = by.tenant or ""

        while True:
            guard = await self.hooks.guard() if self.hooks.guard is not None else None
            await self._refuse_if_held(tenant)

            async def body(tx: Transaction, size: int = size, guard: Check | None = guard) -> Removed:
                tx.guard = guard
                removed = await part.remove(tx, tenant, size)
                if removed:
                    counts = Counter((await tx.get(TenantDeletion, tenant)).counts)
                    counts.update(collection for collection, _ in removed)
                    await tx.update(TenantDeletion, tenant, {"counts": dict(counts)})
                return removed

            try:
                removed = await self._database.transaction(by.at_now(), body)
            except TooLarge:
                if size == 1:
                    raise
                size = max(1, size // 4)
            except Conflict:
                if guard is None or guard == await self.hooks.guard():  # type: ignore[misc]  # it gave the guard
                    raise
            except NotFound:  # another node has removed one of them: go on, unless it has ended the deletion
                await self._database.get(system_context(), TenantDeletion, tenant)
            else:
                part.removed(removed)
                return removed, min(MAX_STEP, size * 2)

    async def _finish(self, tenant: str, by: Context) -> DeletionStatement:
        deletion = await self._database.get(system_context(), TenantDeletion, tenant)
        tree = await self.hooks.tree(tenant) if self.hooks.tree is not None else None
        fields: dict[str, Any] = {
            "id": deletion.statement_id,
            "tenant": tenant,
            "actor": deletion.actor,
            "request_id": deletion.request_id,
            "reason": deletion.reason,
            "started_at": deletion.started_at,
            "finished_at": utc_from_us(self._clock.now_us()),
            "counts": deletion.counts,
            "journal_size": tree[0] if tree is not None else None,
            "journal_root": tree[1] if tree is not None else None,
        }
        text = statement_text(fields)
        note = await self.hooks.sign(text) if self.hooks.sign is not None else None
        statement = DeletionStatement(**fields, signed=note is not None, note=note if note is not None else text)
        platform = Context(None, deletion.actor, by.claims, deletion.request_id)
        try:
            statement = await self._database.create(platform, statement)
        except AlreadyExists:  # by another node, or before this process was killed
            statement = await self._database.get(system_context(), DeletionStatement, deletion.statement_id)

        async def body(tx: Transaction) -> None:
            await tx.delete(Tenant, tenant)
            await tx.delete(TenantDeletion, tenant)

        with suppress(NotFound):  # another node was first
            await self._database.transaction(by.at_now(), body)
        _log.info("deleted the tenant %r: %d documents", tenant, sum(statement.counts.values()))
        return statement

    async def statements(
        self, tenant: str | None = None, limit: int = DEFAULT_LIMIT, cursor: str | None = None
    ) -> Page[DeletionStatement]:
        """The statements of ended deletions, the newest first."""
        where = Where("tenant", "==", tenant) if tenant is not None else None
        return await self._database.find(
            system_context(), DeletionStatement, Query(where, ("-created_at",), limit), cursor
        )

    async def _refuse_if_held(self, tenant: str) -> None:
        reason = await self.hooks.legal_hold(tenant) if self.hooks.legal_hold is not None else None
        if reason is not None:
            raise Conflict(f"the tenant {tenant[:64]!r} is under a legal hold and cannot be deleted: {reason}")


def statement_text(fields: dict[str, Any]) -> str:
    """The text that is signed: a headline, and the statement as one line of JSON with its names in order."""
    return f"{HEADLINE}\n{json.dumps(fields, sort_keys=True, separators=(',', ':'), default=_shown)}\n"


def _shown(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _own(by: Context) -> Context:
    """The same actor with the rights of the system: the rules for callers do not mention what the deletion keeps."""
    return Context(by.tenant, by.actor, system_context().claims, by.request_id)


__all__ = ["DELETIONS_EVERY_S", "DeletionHooks", "DeletionStatement", "Deletions", "TenantDeletion", "statement_text"]
