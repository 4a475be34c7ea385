"""Asks the rules about a call, and journals what they refuse."""

from __future__ import annotations

from ..clock import Clock
from ..context import Context
from ..entities import Collection, Document
from ..errors import Denied
from ..journal import Denials, attempted_fields
from ..rules import Decision, Policy, Request, default_policy
from ..rules import Operation as RuleOperation


class Authorization:
    """The rules of one database. Every method takes the caller's Context first."""

    def __init__(self, policy: Policy, denials: Denials, clock: Clock) -> None:
        self.policy = policy
        self._denials = denials
        self._clock = clock

    @property
    def reads_documents(self) -> bool:
        """Whether the rules may depend on a document's fields. The default rules depend on the caller alone."""
        return self.policy is not default_policy

    def decide(
        self,
        context: Context,
        operation: RuleOperation,
        collection: Collection,
        id: str | None = None,
        before: Document | None = None,
        after: Document | None = None,
    ) -> Decision:
        """What the rules say. Nothing is journalled."""
        return self.policy(Request(context, operation, collection, id, before, after))

    async def authorize(
        self,
        context: Context,
        operation: RuleOperation,
        collection: Collection,
        id: str | None = None,
        before: Document | None = None,
        after: Document | None = None,
    ) -> None:
        """Ask the rules. A denial is journalled first, then raised; of equal denials the first one and a count."""
        decision = self.policy(Request(context, operation, collection, id, before, after))
        if not decision.allowed:
            await self.refuse(context, operation, collection, id, decision, before, after)

    async def refuse(
        self,
        context: Context,
        operation: RuleOperation,
        collection: Collection,
        id: str | None,
        decision: Decision,
        before: Document | None = None,
        after: Document | None = None,
    ) -> None:
        """Journal a denial, with what the call would have changed, then raise it."""
        attempted = attempted_fields(collection, before, after)
        by = context.by(self._clock)
        await self._denials.note(by, operation, collection.name, id or "", decision.reason, attempted)
        raise Denied(f"{operation} {collection.name}: {decision.reason}", reason=decision.reason, recorded=True)

    async def refuse_other_tenant(
        self, context: Context, tenant: str, operation: RuleOperation, collection: Collection, id: str | None = None
    ) -> None:
        """Refuse a call that names another tenant than the caller's own, as the rules refuse one."""
        own = context.claims.get("tenant", context.tenant)
        asked = Context(tenant, context.actor, context.claims, context.request_id)
        reason = f"the caller belongs to tenant {own!r}, not to {tenant!r}"
        await self.refuse(asked, operation, collection, id, Decision(False, reason))


__all__ = ["Authorization"]
