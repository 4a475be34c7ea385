"""Writes off: an operator turns the writes of all tenants, or of one, off and on again.

Every node follows within a second, by the change feed, or by reading the switches while the feed is behind.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationInfo, field_validator

from ..access import ALL_TENANTS, reader, writer
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

    allowed: StrictBool
    tenant: TenantName | None = None
    usage: Annotated[StrictBool, Field(validate_default=True)] = True
    reason: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_REASON_CHARS)] | None, Field(validate_default=True)
    ] = None

    @field_validator("tenant")
    @classmethod
    def _one_tenant(cls, value: str | None) -> str | None:
        if value == ALL_TENANTS:
            raise ValueError(f"found {value!r}, expected one tenant: leave it out for all")
        return value

    @field_validator("usage")
    @classmethod
    def _off_with_writes(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("allowed") is True:
            raise ValueError("found false, expected true: while writes are on, usage is on")
        return value

    @field_validator("reason")
    @classmethod
    def _with_reason(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("allowed") is False:
            raise ValueError("is required to turn writes off")
        return value


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
            return await self.answered_before(replayed, context=context)
        return _shown(made)

    async def answered_before(self, replayed: Replayed, *, context: Context | None = None) -> WritesOf:
        """The answer of an idempotent call that was made before."""
        return _shown(await self._database.answer_of(reader(context), WriteSwitch, replayed))

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
