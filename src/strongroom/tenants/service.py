"""The tenants service: creates, lists, changes, suspends and resumes tenants.

A name that has data is a tenant, also if nobody created it: it is active, and has version 0 and no `created_at`.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypedDict, Unpack

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..access import ALL_TENANTS, acting, reader, writer
from ..clock import Clock
from ..context import MAX_TENANT_BYTES, Context, name_problem, system_context, text_problem, utc_from_us
from ..database import Database, Idempotency, Replayed, Transaction
from ..entities import (
    DEFAULT_LIMIT,
    MAX_CURSOR_BYTES,
    MAX_IN,
    MAX_LIMIT,
    MAX_PAGE_BYTES,
    And,
    Filter,
    Page,
    Query,
    TenantName,
    Where,
    not_given,
    parse,
)
from ..errors import AlreadyExists, Conflict, Denied, InvalidInput, NotFound, Problem
from ..journal import just_before
from ..storage.port import Store
from .deletion import Deletions, DeletionStatement
from .model import MAX_REASON_CHARS, STATUSES, Email, Metadata, Name, Region, Tenant
from .parts import Documents, Imported, TenantPart
from .transfer import TenantFile, export_lines

MAX_ROUNDS = 20
"""Reads of one list: it may be shorter than its limit, and then has a cursor."""
_OF_THE_STORE = ("version", "created_at", "updated_at")
_ELSEWHERE = dict.fromkeys(("status", "reason", "suspended_at"), "is set by suspend and resume")


class TenantFields(BaseModel):
    """The fields of a tenant that a caller may give."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: Name | None = None
    plan: Name | None = None
    contact_email: Email | None = None
    region: Region | None = None
    settings: Metadata = {}
    metadata: Metadata = {}


class NewTenant(TenantFields):
    """A new tenant. `id` is the name that paths, keys and tokens have."""

    not_given: ClassVar[Mapping[str, str]] = not_given(elsewhere=_ELSEWHERE, of_the_store=_OF_THE_STORE)

    id: TenantName

    @field_validator("id")
    @classmethod
    def _tenant(cls, value: str) -> str:
        if problem := name_problem(value, MAX_TENANT_BYTES):
            raise ValueError(problem)
        if value == ALL_TENANTS:
            raise ValueError(f"found {value!r}, which stands for all tenants")
        return value


class TenantChanges(TenantFields):
    """A change of some fields of a tenant. Other fields stay."""

    not_given: ClassVar[Mapping[str, str]] = not_given(
        unchangeable=("id",), elsewhere=_ELSEWHERE, of_the_store=_OF_THE_STORE
    )


class Reason(BaseModel):
    """Why a tenant is suspended or deleted."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    reason: Annotated[str, Field(min_length=1, max_length=MAX_REASON_CHARS)] | None = None


class TenantGiven(TypedDict, total=False):
    """The fields of a change as keywords."""

    name: str | None
    plan: str | None
    contact_email: str | None
    region: str | None
    settings: Mapping[str, Any]
    metadata: Mapping[str, Any]


class Tenants:
    """The tenants of one store. Only an administrator of the platform creates, changes, suspends and deletes them; a
    caller that is bound to one tenant sees that tenant."""

    def __init__(self, database: Database, store: Store, parts: Sequence[TenantPart], clock: Clock) -> None:
        self._database = database
        self._store = store
        self._documents = Documents(database, store)
        self._parts = (self._documents, *parts)
        self._clock = clock
        self.deletions = Deletions(database, self._parts, clock)

    # --- Reading ----------------------------------------------------------------------------------------------

    async def get(self, tenant: str, *, context: Context | None = None) -> Tenant:
        """One tenant. Raises NotFound, Denied (journalled) for another tenant than the caller's own."""
        _check_name(tenant)
        await self._require_sight(context, "get", tenant)
        found = await self._database.get_or_none(reader(context), Tenant, tenant)
        if found is not None:
            return found
        if not await self.is_known(tenant):
            raise NotFound(f"there is no tenant {tenant[:64]!r}")
        return Tenant(id=tenant)

    async def is_known(self, tenant: str) -> bool:
        """Whether a name that nobody created as a tenant has data now."""
        if await self._documents.any(tenant):
            return True
        for part in self._parts:
            if part is not self._documents and tenant in await part.tenants(just_before(tenant), 2):
                return True
        return False

    async def list(
        self,
        *,
        status: str | None = None,
        plan: str | None = None,
        limit: int = DEFAULT_LIMIT,
        cursor: str | None = None,
        context: Context | None = None,
    ) -> Page[Tenant]:
        """One page of tenants, by name; only `next_cursor` says whether there are more. A caller that is bound to a
        tenant gets that one."""
        problems = []
        if status is not None and status not in STATUSES:
            problems.append(Problem("status", f"found {status[:64]!r}, expected {', '.join(STATUSES)}"))
        if type(limit) is not int or not 1 <= limit <= MAX_LIMIT:
            problems.append(Problem("limit", f"found {limit!r}, expected 1 to {MAX_LIMIT}"))
        if problems:
            raise InvalidInput(problems)
        own = context.claims.get("tenant") if context is not None else None
        if own is not None:
            found = await self.get(own, context=context)
            fits = status in (None, found.status) and plan in (None, found.plan)
            return Page([found] if fits else [], None)
        await self._database.authorize(acting(context), "list", Tenant.__collection__)
        if plan is not None or status not in (None, "active"):  # a tenant that nobody created has no plan and is active
            filters: list[Filter] = [Where("plan", "==", plan)] if plan is not None else []
            filters += [Where("status", "==", status)] if status is not None else []
            query = Query(And(*filters), ("id",), limit)
            return await self._database.find(reader(context), Tenant, query, cursor, max_bytes=MAX_PAGE_BYTES)
        return await self._page_of_all(status, limit, _position(cursor))

    async def _page_of_all(self, status: str | None, limit: int, after: str | None) -> Page[Tenant]:
        items: list[Tenant] = []
        for _ in range(MAX_ROUNDS):
            found, after, more = await self._some(after, limit - len(items))
            items += [tenant for tenant in found if status in (None, tenant.status)]
            if not more:
                return Page(items, None)
            if len(items) == limit:
                break
        return Page(items, _cursor(after or ""))

    async def _some(self, after: str | None, limit: int) -> tuple[Sequence[Tenant], str | None, bool]:
        """The next tenants, at most `limit`; the name that the next ones come after; and whether there are more."""
        where = Where("id", ">", after) if after is not None else None
        query = Query(where, ("id",), limit)
        page = await self._database.find(reader(None), Tenant, query, max_bytes=MAX_PAGE_BYTES)
        stored = {tenant.id: tenant for tenant in page.items}
        ends = [page.items[-1].id] if page.next_cursor is not None else []
        names = set(stored)
        for part in self._parts:
            found = await part.tenants(after, limit)
            names.update(found)
            if len(found) == limit:
                ends.append(found[-1])
        # Code points are in the order of their UTF-8 bytes. Past the first end a source may have names that it was not
        # asked for.
        sure = sorted(name for name in names if not ends or name <= min(ends))
        taken = sure[:limit]
        implicit = [name for name in taken if name not in stored]
        gone = await self._gone(implicit)
        tenants = [stored.get(name) or Tenant(id=name) for name in taken if name not in gone]
        return tenants, taken[-1] if taken else after, bool(ends) or len(sure) > limit

    async def _gone(self, names: Sequence[str]) -> set[str]:
        """Those of the names whose tenants were deleted, and that have no data since."""
        deleted: set[str] = set()
        for start in range(0, len(names), MAX_IN):
            query = Query(Where("tenant", "in", list(names[start : start + MAX_IN])), limit=MAX_LIMIT)
            page = await self._database.find(reader(None), DeletionStatement, query)
            deleted.update(statement.tenant for statement in page.items)
        return {name for name in deleted if not await self.is_known(name)}

    # --- Changing ---------------------------------------------------------------------------------------------

    async def create(
        self,
        new: NewTenant | str,
        /,
        *,
        context: Context | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[TenantGiven],
    ) -> Tenant:
        """Create a tenant: `create("acme", name="Acme Inc.")`. A name that has data already keeps it. Raises
        AlreadyExists, InvalidInput with every problem, Denied."""
        if isinstance(new, str):
            new = parse(NewTenant, {"id": new, **fields})
        require_administrator(context, "create a tenant")
        once = Idempotency.by(context, idempotency_key, "create tenant", new)
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self.answered_before(replayed, context=context)
        made = Tenant(**new.model_dump())

        async def body(tx: Transaction) -> Tenant:
            if await tx.get_or_none(Tenant, made.id) is not None:
                raise AlreadyExists(f"the tenant {made.id[:64]!r} exists already")
            return await tx.create(made)

        try:
            return await self._database.transaction(writer(context, made.id), body, idempotency=once)
        except Replayed as done:
            return await self.answered_before(done, context=context)

    async def answered_before(self, replayed: Replayed, *, context: Context | None = None) -> Tenant:
        """The tenant that an idempotent call was answered with."""
        return await self._database.answer_of(reader(context), Tenant, replayed)

    async def update(
        self,
        tenant: str,
        /,
        changes: TenantChanges | None = None,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[TenantGiven],
    ) -> Tenant:
        """Change some fields of a tenant. One that nobody created is created so. Raises NotFound, InvalidInput,
        Conflict, Denied."""
        changes = changes if changes is not None else parse(TenantChanges, fields)
        values = {name: getattr(changes, name) for name in changes.model_fields_set}
        once = Idempotency.by(context, idempotency_key, "update tenant", tenant, changes, expected)
        return await self._set(tenant, "change a tenant", lambda now: values, context, expected, once)

    async def suspend(
        self,
        tenant: str,
        reason: str | None = None,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> Tenant:
        """Suspend a tenant: its keys verify as DISABLED and its writes are refused, everywhere within a second. Raises
        NotFound, Conflict if the tenant is being deleted, InvalidInput, Denied."""
        parse(Reason, {"reason": reason})
        once = Idempotency.by(context, idempotency_key, "suspend tenant", tenant, reason, expected)

        def change(now: Tenant) -> dict[str, Any]:
            if now.status == "suspended":  # a repeat without a reason keeps the first one
                return {"reason": reason if reason is not None else now.reason}
            return {"status": "suspended", "reason": reason, "suspended_at": utc_from_us(self._clock.now_us())}

        return await self._set(tenant, "suspend a tenant", change, context, expected, once)

    async def resume(
        self,
        tenant: str,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> Tenant:
        """Take a suspension back. Raises NotFound, Conflict if the tenant is being deleted, Denied."""
        once = Idempotency.by(context, idempotency_key, "resume tenant", tenant, expected)

        def change(now: Tenant) -> dict[str, Any]:
            return {"status": "active", "reason": None, "suspended_at": None}

        return await self._set(tenant, "resume a tenant", change, context, expected, once)

    async def _set(
        self,
        tenant: str,
        what: str,
        change: Callable[[Tenant], Mapping[str, Any]],
        context: Context | None,
        expected: int | None,
        once: Idempotency | None,
    ) -> Tenant:
        """Set the fields that `change` gives for the present tenant."""
        _check_name(tenant)
        require_administrator(context, what)
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self.answered_before(replayed, context=context)

        async def body(tx: Transaction) -> Tenant:
            now = await tx.get_or_none(Tenant, tenant)
            if now is None:
                if not await self.is_known(tenant):
                    raise NotFound(f"there is no tenant {tenant[:64]!r}")
                if expected:
                    raise Conflict(f"tenants/{tenant[:64]}: found version 0, expected {expected}", found=0)
                return await tx.create(Tenant(id=tenant, **change(Tenant(id=tenant))))
            if now.status == "deleting":
                raise Conflict(f"the tenant {tenant[:64]!r} is being deleted")
            fields = {name: value for name, value in change(now).items() if getattr(now, name) != value}
            if not fields and (expected is None or expected == now.version):
                return now
            return await tx.update(Tenant, tenant, fields, expected=expected)

        try:
            return await self._database.transaction(writer(context, tenant), body, idempotency=once)
        except Replayed as done:
            return await self.answered_before(done, context=context)

    async def delete(
        self,
        tenant: str,
        reason: str | None = None,
        *,
        context: Context | None = None,
        expected: int | None = None,
        within_s: float | None = None,
        idempotency_key: str | None = None,
    ) -> DeletionStatement | None:
        """Delete a tenant and everything it has, and return the signed statement of what was deleted. Its journal
        stays.

        A call that was broken off is repeated, or a job completes it. `within_s`: return None after this time, and
        leave the rest to the job. Raises NotFound, Conflict under a legal hold or at another version, InvalidInput,
        Denied.
        """
        _check_name(tenant)
        parse(Reason, {"reason": reason})
        require_administrator(context, "delete a tenant")
        once = Idempotency.by(context, idempotency_key, "delete tenant", tenant, reason, expected)
        await self.deletions.begin(tenant, reason, self.is_known, context=context, expected=expected, once=once)
        return await self.deletion_begun_before(tenant, within_s=within_s)

    async def deletion_begun_before(self, tenant: str, *, within_s: float | None = None) -> DeletionStatement | None:
        """The statement of a deletion that an earlier call began; None if it is not complete within the time."""
        try:
            return await self.deletions.go_on(tenant, within_s=within_s)
        except NotFound:  # it is complete
            return (await self.deletions.statements(tenant, 1)).items[0]

    # --- Export and import ------------------------------------------------------------------------------------

    async def export(self, tenant: str, *, context: Context | None = None) -> AsyncGenerator[bytes, None]:
        """The lines of a tenant's export (`transfer.py`): everything that it has, and its journal, without any secret
        in clear. A caller that is bound to the tenant gets its keys without their hashes. Raises NotFound, Denied."""
        bound = context is not None and context.claims.get("tenant") is not None
        if context is not None and (not context.is_admin or context.claims.get("scope", "admin") != "admin"):
            raise Denied("only an administrator may export a tenant")
        found = await self.get(tenant, context=context)
        return export_lines(self._store, self._parts, found, self._clock.now_us(), whole=not bound)

    async def import_file(self, lines: Callable[[], Iterable[bytes]], *, context: Context | None = None) -> Imported:
        """Import an export into an empty tenant. `lines` is called twice: the file is checked whole before anything is
        written. Raises InvalidInput with the problems of its lines, Conflict if the tenant has data, Denied."""
        require_administrator(context, "import a tenant")
        file = TenantFile(lines, self._parts)
        tenant = await asyncio.to_thread(file.check)
        stored = await self._database.get_or_none(system_context(), Tenant, tenant.id)
        if (stored is not None and stored.status == "deleting") or await self.is_known(tenant.id):
            raise Conflict(f"the tenant {tenant.id[:64]!r} has data: an import needs an empty tenant")
        told = Imported(tenant.id)
        await file.write(acting(context), told)

        async def body(tx: Transaction) -> None:
            await tx.replace(tenant)

        await self._database.transaction(writer(context, tenant.id), body)
        return told

    # --- Who may ----------------------------------------------------------------------------------------------

    async def _require_sight(self, context: Context | None, operation: Literal["get", "list"], tenant: str) -> None:
        own = context.claims.get("tenant") if context is not None else None
        if context is None or own is None or own == tenant:
            return
        asked = Context(tenant, context.actor, context.claims, context.request_id)
        await self._database.authorize(asked, operation, Tenant.__collection__, tenant)
        raise Denied(f"the caller belongs to tenant {own!r}, not to {tenant[:64]!r}")


def require_administrator(context: Context | None, what: str) -> None:
    """Raise Denied unless the caller is an administrator of the platform, who is bound to no tenant."""
    if context is None:
        return
    if not context.is_admin or context.claims.get("scope", "admin") != "admin" or context.claims.get("tenant"):
        raise Denied(f"only an administrator of all tenants may {what}")


def _check_name(tenant: str) -> None:
    if problem := text_problem(tenant, MAX_TENANT_BYTES):
        raise InvalidInput([Problem("tenant", problem)])


# --- Cursors --------------------------------------------------------------------------------------------------


def _cursor(after: str) -> str:
    text = json.dumps(["tenants", after], ensure_ascii=False)
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _position(cursor: str | None) -> str | None:
    if cursor is None:
        return None
    try:
        if len(cursor) > MAX_CURSOR_BYTES:
            raise ValueError
        kind, after = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if kind != "tenants" or text_problem(after, MAX_TENANT_BYTES):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise InvalidInput([Problem("cursor", "is not a cursor of this query: start without a cursor")]) from None
    return str(after)


__all__ = ["NewTenant", "Reason", "TenantChanges", "TenantFields", "Tenants", "require_administrator"]
