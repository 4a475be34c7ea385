"""Legal holds: place, lift, list, and ask what a hold blocks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from ..access import ALL_TENANTS, writer
from ..context import Context, new_id, system_context
from ..database import Database, Transaction
from ..entities import DEFAULT_LIMIT, MAX_LIMIT, Page, Query, Where
from ..errors import Conflict, InvalidInput, Problem
from ..storage.port import JournalRow
from .model import MAX_REASON_CHARS, MAX_SUBJECT_CHARS, POLICY, LegalHold, RetentionPolicy

MAX_ACTIVE = 1_000
"""Holds at a time: each is compared with each record that is dropped or redacted."""


class LegalHolds:
    """The legal holds of one store. Only an administrator of the platform places and lifts them.

    A hold that was placed counts at once: it is placed together with a change of the policy that counts for all
    tenants, and retention and redaction expect the version of that policy from before they asked for the holds."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def place(
        self,
        reason: str,
        *,
        tenant: str | None = None,
        user: str | None = None,
        collection: str | None = None,
        entity_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        context: Context | None = None,
    ) -> LegalHold:
        """Place a hold. InvalidInput with every problem, Conflict if there are MAX_ACTIVE, Denied."""
        by = writer(context, ALL_TENANTS)
        problems = _reason_problems(reason)
        for name, value in (("user", user), ("collection", collection), ("entity_id", entity_id)):
            if value is not None and not 0 < len(value) <= MAX_SUBJECT_CHARS:
                problems.append(Problem(name, f"found {len(value)} characters, expected 1 to {MAX_SUBJECT_CHARS}"))
        if entity_id is not None and collection is None:
            problems.append(Problem("collection", "is needed with entity_id"))
        if since is not None and until is not None and until <= since:
            problems.append(
                Problem("until", f"found {until.isoformat()}, expected a time after since ({since.isoformat()})")
            )
        if problems:
            raise InvalidInput(problems)
        hold = LegalHold(
            id=new_id(), tenant=tenant, user=user, collection=collection, entity_id=entity_id, since=since, until=until,
            reason=reason, placed_by=by.actor,
        )  # fmt: skip

        async def body(tx: Transaction) -> LegalHold:
            await touch_policy(tx)
            return await tx.create(hold)

        if len(await self.active()) >= MAX_ACTIVE:
            raise Conflict(f"there are {MAX_ACTIVE} legal holds, which is the most: lift one first")
        return await self._database.transaction(by, body)

    async def lift(self, id: str, reason: str, *, context: Context | None = None) -> LegalHold:
        """Lift a hold; it stays on record. NotFound, Conflict if it was lifted, InvalidInput, Denied."""
        by = writer(context, ALL_TENANTS)
        if problems := _reason_problems(reason):
            raise InvalidInput(problems)

        async def body(tx: Transaction) -> LegalHold:
            hold = await tx.get(LegalHold, id)
            if not hold.active:
                raise Conflict(f"the legal hold {id} was lifted already")
            fields = {"lifted_at": by.now, "lifted_by": by.actor, "lifted_because": reason}
            return await tx.update(LegalHold, id, fields)

        return await self._database.transaction(by, body)

    async def active(self) -> list[LegalHold]:
        """All holds that are not lifted."""
        found: list[LegalHold] = []
        cursor = None
        while True:
            query = Query(Where("lifted_at", "==", None), ("id",), limit=MAX_LIMIT)
            page = await self._database.find(system_context(), LegalHold, query, cursor)
            found += page.items
            if page.next_cursor is None:
                return found
            cursor = page.next_cursor

    async def blocking(
        self, tenant: str | None, matches: Callable[[LegalHold], bool] = lambda hold: True
    ) -> LegalHold | None:
        """The first active hold on records of a tenant (None: of the platform) that `matches`. Without it: any hold,
        which is what blocks the tenant's deletion."""
        return next((hold for hold in await self.active() if hold.concerns(tenant) and matches(hold)), None)

    async def blocking_rows(self, rows: list[JournalRow]) -> LegalHold | None:
        """The first active hold on one of these records."""
        return next((hold for hold in await self.active() if any(map(hold.holds, rows))), None)

    async def list(
        self,
        *,
        tenant: str | None = None,
        active: bool | None = None,
        limit: int = DEFAULT_LIMIT,
        cursor: str | None = None,
    ) -> Page[LegalHold]:
        """A page of holds, in the order in which they were placed: all, or those on a tenant's records. A page may be
        empty and not be the last."""
        query = Query(order_by=("id",), limit=limit)
        page = await self._database.find(system_context(), LegalHold, query, cursor)
        items = [
            hold
            for hold in page.items
            if (tenant is None or hold.tenant in (tenant, None)) and active in (None, hold.active)
        ]
        return Page(items, page.next_cursor)


async def touch_policy(tx: Transaction) -> None:
    """Give the policy that counts for all tenants a new version."""
    policy = await tx.get_or_none(RetentionPolicy, POLICY)
    if policy is None:
        await tx.create(RetentionPolicy(id=POLICY))
    else:
        await tx.replace(policy)


def _reason_problems(reason: str) -> list[Problem]:
    if reason.strip() and len(reason) <= MAX_REASON_CHARS:
        return []
    return [Problem("reason", f"found {len(reason)} characters, expected 1 to {MAX_REASON_CHARS}")]
