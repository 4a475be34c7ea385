"""Writes off: an operator turns the writes of all tenants, or of one, off and on again.

Every node follows within a second, by the change feed, or by reading the switches while the feed is behind.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..access import reader, writer
from ..context import Context
from ..database import Database, Idempotency, Replayed, Transaction, WriteSwitch, switch_id
from ..entities import DEFAULT_LIMIT, MAX_PAGE_BYTES, And, Page, Query, TenantName, Where
from ..errors import Conflict
from .model import MAX_REASON_CHARS
from .service import Tenants, require_administrator


class WritesChange(BaseModel):
    """Turns writes off or on, of one tenant or (null) of all. `usage` false: verification, usage and reservations are
    refused too. Turning them off needs a `reason`, which callers are told."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    allowed: bool
    tenant: TenantName | None = None
    usage: bool = True
    reason: Annotated[str, Field(min_length=1, max_length=MAX_REASON_CHARS)] | None = None

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if not self.allowed and self.reason is None:
            raise ValueError("reason: is required to turn writes off")
        if self.allowed and not self.usage:
            raise ValueError("usage: found false, expected true: while writes are on, usage is on")
        return self


class WritesOf(BaseModel):
    """Whether writes of one tenant, or (null) of all, are on. `by` turned them last, at `changed_at`; both are null if
    nobody ever did. `migration`: why a migration lets nothing be written."""

    tenant: str | None
    allowed: bool
    usage: bool
    reason: str | None
    by: str | None
    changed_at: datetime | None


class WritesStatus(WritesOf):
    """The switch for all tenants, and one page of tenants whose own switch is off."""

    migration: str | None
    items: list[WritesOf]
    next_cursor: str | None


class Writes:
    """The switches of one store. Only an administrator of the platform turns them; a caller that is bound to a tenant
    sees that tenant's."""

    def __init__(self, database: Database, tenants: Tenants) -> None:
        self._database = database
        self._tenants = tenants
        database.after_commit(self._committed, WriteSwitch.__collection__.name)

    def _committed(self, transaction: Transaction) -> None:
        """Follow this process's own switch at once."""
        for change in transaction.changes:
            if isinstance(change.entity, WriteSwitch):
                self._database.writes.switched(change.entity)

    async def set(
        self, change: WritesChange, *, context: Context | None = None, idempotency_key: str | None = None
    ) -> WritesOf:
        """Turn writes off or on. Raises NotFound for an unknown tenant, InvalidInput, Denied, and Conflict where a
        migration turned the writes of the store off: only `strongroom migrate` takes that back."""
        require_administrator(context, "turn writes off or on")
        fence = self._database.writes.refusal
        if change.allowed and change.tenant is None and fence is not None:
            raise Conflict(f"a migration keeps the writes of this store off: {fence}")
        if not change.allowed and change.tenant is not None:
            await self._tenants.get(change.tenant)
        by = writer(context, change.tenant) if change.tenant is not None else _platform(context)
        switch = WriteSwitch(id=switch_id(change.tenant), by=by.actor, **change.model_dump())
        once = Idempotency.by(context, idempotency_key, "writes", change)

        async def body(tx: Transaction) -> WriteSwitch:
            return await tx.replace(switch)

        try:
            made = await self._database.transaction(by, body, idempotency=once)
        except Replayed as replayed:
            made = await self._database.answer_of(reader(context), WriteSwitch, replayed)
        return _shown(made)

    async def status(
        self,
        tenant: str | None = None,
        *,
        limit: int = DEFAULT_LIMIT,
        cursor: str | None = None,
        context: Context | None = None,
    ) -> WritesStatus:
        """Whether writes are on, and the tenants (or the one tenant) whose own switch is off, by name."""
        own = context.claims.get("tenant") if context is not None else None
        tenant = own if own is not None else tenant
        whole = await self._database.get_or_none(reader(context), WriteSwitch, switch_id(None))
        shown = _shown(whole) if whole is not None else WritesOf(
            tenant=None, allowed=True, usage=True, reason=None, by=None, changed_at=None
        )  # fmt: skip
        if tenant is not None:
            found = await self._database.get_or_none(reader(context), WriteSwitch, switch_id(tenant))
            page = Page([found] if found is not None and not found.allowed else [], None)
        else:
            where = And(Where("allowed", "==", False), Where("tenant", "!=", None))
            query = Query(where, ("tenant",), limit)
            page = await self._database.find(reader(context), WriteSwitch, query, cursor, max_bytes=MAX_PAGE_BYTES)
        return WritesStatus(
            **shown.model_dump(),
            migration=self._database.writes.refusal,
            items=[_shown(switch) for switch in page.items],
            next_cursor=page.next_cursor,
        )


def _platform(context: Context | None) -> Context:
    return context if context is not None else Context(None, "system", {"admin": True})


def _shown(switch: WriteSwitch) -> WritesOf:
    return WritesOf(
        tenant=switch.tenant,
        allowed=switch.allowed,
        usage=switch.usage,
        reason=switch.reason,
        by=switch.by,
        changed_at=switch.updated_at,
    )


__all__ = ["Writes", "WritesChange", "WritesOf", "WritesStatus"]
