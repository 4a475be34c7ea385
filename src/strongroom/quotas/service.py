"""The quotas service: puts, changes, removes and lists quotas, and shows their usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, TypedDict, Unpack

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ..access import ALL_TENANTS, acting, bound_to, may_see, reader, writer
from ..clock import Clock
from ..context import (
    MAX_TENANT_BYTES,
    Context,
    kind_of,
    name_problem,
    system_context,
    text_problem,
    utc_from_us,
)
from ..database import Database, Idempotency, Replayed, Transaction
from ..entities import MAX_ID_BYTES, MAX_PAGE_BYTES, And, Filter, Page, Query, Where, not_given, parse
from ..errors import Denied, InvalidInput, NotFound, Problem
from ..limits import (
    MAX_LIMITS,
    Amount,
    ClockMended,
    KeyUsage,
    Ledger,
    Limit,
    LimitLike,
    LimitStatus,
    UsageState,
    distinct,
    from_units,
    limit_status,
    refills_that_begin,
)
from .model import Quota, QuotaKind, quota_id, quota_subject

MAX_DESCRIPTION_CHARS = 1_000
KINDS = ("tenant", "user", "group")


class QuotaName(BaseModel):
    """What names a quota: its kind and tenant, and the name of the user or the group."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    kind: QuotaKind
    tenant: str
    name: str = Field(default="", validate_default=True)

    @field_validator("kind", mode="before")
    @classmethod
    def _kind(cls, value: Any) -> Any:
        if problem := _kind_problem(value):
            raise ValueError(problem)
        return value

    @field_validator("tenant")
    @classmethod
    def _tenant(cls, value: str) -> str:
        if problem := text_problem(value, MAX_TENANT_BYTES):
            raise ValueError(problem)
        if value == ALL_TENANTS:  # keys with this tenant are management keys, which count against no quota
            raise ValueError(f"found {value!r}, expected one tenant: a quota is of a tenant's own keys")
        return value

    @field_validator("name")
    @classmethod
    def _name(cls, value: str, info: ValidationInfo) -> str:
        kind, tenant = info.data.get("kind"), info.data.get("tenant", "")
        if kind == "tenant" and value:
            raise ValueError("a quota of kind tenant has no name: it is the tenant's own")
        if kind in ("user", "group") and (problem := text_problem(value, MAX_ID_BYTES - len(tenant.encode()) - 16)):
            raise ValueError(problem)
        return value

    @property
    def id(self) -> str:
        return quota_id(self.kind, self.tenant, self.name)


class QuotaFields(BaseModel):
    """The fields of a quota that a caller may give."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    limits: list[Limit] = Field(default=[], max_length=MAX_LIMITS)
    description: str | None = Field(default=None, max_length=MAX_DESCRIPTION_CHARS)

    @field_validator("limits")
    @classmethod
    def _distinct(cls, value: list[Limit]) -> list[Limit]:
        return distinct(value)

    @field_validator("description")
    @classmethod
    def _text(cls, value: str | None) -> str | None:
        if value and (problem := text_problem(value, 4 * MAX_DESCRIPTION_CHARS)):
            raise ValueError(problem)
        return value


class NewQuota(QuotaName, QuotaFields):
    """A quota to put."""

    limits: list[Limit] = Field(max_length=MAX_LIMITS)

    @field_validator("tenant", "name")
    @classmethod
    def _named(cls, value: str) -> str:
        if value and (problem := name_problem(value, MAX_ID_BYTES)):
            raise ValueError(problem)
        return value


class QuotaChanges(QuotaFields):
    """A change of some fields of a quota. Other fields stay."""

    not_given: ClassVar[Mapping[str, str]] = not_given(
        unchangeable=("id", "tenant", "kind", "name"), of_the_store=("version", "created_at", "updated_at")
    )


class QuotaGiven(TypedDict, total=False):
    """The fields of a change as keywords."""

    limits: Sequence[LimitLike]
    description: str | None


class NewQuotaGiven(QuotaGiven, total=False):
    """The fields of a quota to put, as keywords."""

    kind: QuotaKind
    tenant: str
    name: str


@dataclass(frozen=True, slots=True)
class QuotaStats:
    """The usage of a quota by all its keys together, and the state of each limit."""

    quota: Quota
    count: int
    last_used_at: datetime | None
    totals: dict[str, Amount]
    limits: list[LimitStatus]

    def shown(self) -> dict[str, Any]:
        """As JSON shows it, over HTTP and on the command line."""
        return {
            "tenant": self.quota.tenant,
            "kind": self.quota.kind,
            "name": self.quota.name,
            "count": self.count,
            "last_used_at": self.last_used_at,
            "totals": self.totals,
            "limits": self.limits,
        }


class Quotas:
    """The quotas of one store. A caller who is bound to a tenant sees and sets the quotas of that tenant only. It sees
    the quota of the tenant itself, but does not set it."""

    def __init__(self, database: Database, ledger: Ledger, clock: Clock) -> None:
        self._database = database
        self._ledger = ledger
        self._clock = clock

    async def put(
        self,
        new: NewQuota | None = None,
        /,
        *,
        context: Context | None = None,
        expected: int | None = None,
        exists: bool = False,
        idempotency_key: str | None = None,
        **fields: Unpack[NewQuotaGiven],
    ) -> Quota:
        """Make a quota, or replace the quota of this name: `put(kind="user", tenant="acme", name="u1", limits=[…])`.

        Usage stays counted where resource, window and scope stay the same. `expected`: the version to replace (0: no
        quota may exist); `exists`: a quota must exist.

        Raises InvalidInput with every problem, Conflict, Denied.
        """
        new = new if new is not None else parse(NewQuota, fields)
        await self._may_set(context, new)
        quota = Quota(
            id=new.id,
            tenant=new.tenant,
            kind=new.kind,
            name=new.name,
            limits=new.limits,
            description=new.description,
        )
        once = Idempotency.by(context, idempotency_key, "put quota", new, expected, exists)
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self.answered_before(replayed, context=context)
        by = writer(context, new.tenant)
        await self._begin_refills(await self._database.get_or_none(system_context(), Quota, new.id), new.limits)
        try:
            return await self._database.transaction(
                by, lambda tx: tx.replace(quota, expected=expected, exists=exists), idempotency=once
            )
        except Replayed as done:
            return await self.answered_before(done, context=context)

    async def answered_before(self, replayed: Replayed, *, context: Context | None = None) -> Quota:
        """The quota that an idempotent call was answered with."""
        return await self._database.answer_of(reader(context), Quota, replayed)

    async def get(self, kind: str, tenant: str, name: str = "", *, context: Context | None = None) -> Quota:
        """The quota of this name. Raises NotFound, also for a quota of another tenant."""
        named = _quota_name(kind, tenant, name)
        quota = None
        if may_see(context, named.tenant):
            quota = await self._database.get_or_none(reader(context), Quota, named.id)
        if quota is None:
            raise NotFound(f"there is no quota of {_named(named)}")
        return quota

    async def list(
        self,
        *,
        tenant: str | None = None,
        kind: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
        context: Context | None = None,
    ) -> Page[Quota]:
        """One page of quotas, by tenant, kind and name. A caller who is bound to one tenant gets those of that
        tenant."""
        if kind is not None and (problem := _kind_problem(kind)):
            raise InvalidInput([Problem("kind", problem)])
        own = bound_to(context)
        if own is not None and tenant is not None and own != tenant:
            return Page([], None)
        tenant = own if own is not None else tenant
        filters: list[Filter] = [] if tenant is None else [Where("tenant", "==", tenant)]
        if kind is not None:
            filters.append(Where("kind", "==", kind))
        order: Sequence[str] = ("tenant", "name") if kind is not None else ("tenant", "kind", "name")
        if tenant is not None:
            order = order[1:]
        query = Query(And(*filters) if filters else None, tuple(order), limit)
        return await self._database.find(reader(context), Quota, query, cursor, max_bytes=MAX_PAGE_BYTES)

    async def update(
        self,
        kind: str,
        tenant: str,
        name: str = "",
        /,
        changes: QuotaChanges | None = None,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[QuotaGiven],
    ) -> Quota:
        """Change some fields of a quota. Usage stays counted where resource, window and scope stay the same. Raises
        NotFound, InvalidInput, Conflict, Denied."""
        changes = changes if changes is not None else parse(QuotaChanges, fields)
        once = Idempotency.by(context, idempotency_key, "update quota", kind, tenant, name, changes, expected)
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self.answered_before(replayed, context=context)
        quota = await self.get(kind, tenant, name, context=context)
        await self._may_set(context, quota)
        values = {field: getattr(changes, field) for field in changes.model_fields_set}
        by = writer(context, quota.tenant)
        await self._begin_refills(quota, values.get("limits", ()))
        try:
            return await self._database.transaction(
                by, lambda tx: tx.update(Quota, quota.id, values, expected=expected), idempotency=once
            )
        except Replayed as done:
            return await self.answered_before(done, context=context)

    async def _begin_refills(self, before: Quota | None, limits: Sequence[Limit]) -> None:
        """Start the refills that a change adds now, and not at their first use."""
        beginning = refills_that_begin(before.limits, limits) if before is not None else ()
        if before is not None and beginning:
            await self._ledger.begin_refills(quota_subject(before), beginning)

    async def delete(
        self,
        kind: str,
        tenant: str,
        name: str = "",
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Remove a quota and its usage in one commit: a new quota of this name begins with no usage. Raises
        NotFound, Conflict, Denied."""
        once = Idempotency.by(context, idempotency_key, "delete quota", _quota_name(kind, tenant, name).id, expected)
        if await self._database.repeated(acting(context), once) is not None:
            return
        quota = await self.get(kind, tenant, name, context=context)
        await self._may_set(context, quota)

        by = writer(context, quota.tenant)
        await self._database.authorize(by, "delete", Quota.__collection__, quota.id)

        async def body(tx: Transaction) -> None:
            await tx.delete(Quota, quota.id, expected=expected)
            await tx.drop(KeyUsage, quota.id)

        # The rules for callers do not mention counters.
        own = Context(by.tenant, by.actor, system_context().claims, by.request_id)
        try:
            await self._database.transaction(own, body, idempotency=once)
        except Replayed:
            return
        self._ledger.removed(quota.id)

    async def stats(self, kind: str, tenant: str, name: str = "", *, context: Context | None = None) -> QuotaStats:
        """The current usage of a quota. Raises NotFound."""
        quota = await self.get(kind, tenant, name, context=context)
        now_us = self._clock.now_us()
        return quota_stats(quota, await self._ledger.usage_state(quota.id), now_us)

    async def mend_clock(
        self, kind: str, tenant: str, name: str = "", *, context: Context | None = None
    ) -> ClockMended | None:
        """Set back the usage of a quota that was charged at a time ahead of the store's clock, as `Keys.mend_clock`
        does for a key. Raises NotFound, Denied, Unavailable."""
        quota = await self.get(kind, tenant, name, context=context)
        await self._may_set(context, quota)
        return await self._ledger.set_back(quota.id)

    async def _may_set(self, context: Context | None, quota: QuotaName | Quota) -> None:
        """Raises Denied unless the caller may set this quota."""
        own = bound_to(context)
        if own is None or context is None:
            return
        if own != quota.tenant:
            await self._database.rules.refuse_other_tenant(context, quota.tenant, "update", Quota.__collection__)
        if quota.kind == "tenant":
            raise Denied("only a caller for all tenants may change a tenant's own quota")


def quota_stats(quota: Quota, state: UsageState, now_us: int) -> QuotaStats:
    """The usage of a quota, from its usage state."""
    statuses = state.statuses(quota_subject(quota).compiled_limits, state.moment(now_us))
    return QuotaStats(
        quota=quota,
        count=state.count,
        last_used_at=utc_from_us(state.last_used_us) if state.last_used_us is not None else None,
        totals={name: from_units(name, units) for name, units in sorted(state.totals.items())},
        limits=[limit_status(status) for status in statuses],
    )


def _kind_problem(kind: object) -> str | None:
    if kind in KINDS:
        return None
    found = repr(kind[:64]) if isinstance(kind, str) else kind_of(kind)
    return f"found {found}, expected tenant, user or group"


def _quota_name(kind: str, tenant: str, name: str) -> QuotaName:
    return parse(QuotaName, {"kind": kind, "tenant": tenant, "name": name})


def _named(quota: QuotaName) -> str:
    return (
        f"the tenant {quota.tenant!r}"
        if quota.kind == "tenant"
        else (f"the {quota.kind} {quota.name!r} of the tenant {quota.tenant!r}")
    )


__all__ = ["NewQuota", "Quota", "QuotaChanges", "QuotaFields", "QuotaName", "QuotaStats", "Quotas", "quota_stats"]
