"""Who acts, and whose keys and data a caller sees. Pure."""

from __future__ import annotations

from .context import TOKEN, Context, system_context

ALL_TENANTS = "*"
"""The tenant of a management key that may act for every tenant."""
DEFAULT_TENANT = "default"


def bound_to(context: Context | None) -> str | None:
    """The one tenant whose keys a caller sees: the tenant it belongs to, else the tenant it acts for; None for all."""
    if context is None:
        return None
    own: str | None = context.claims.get("tenant")
    return own if own is not None else context.tenant


def may_see(context: Context | None, tenant: str) -> bool:
    """Whether a caller sees the keys of a tenant."""
    own = bound_to(context)
    return own is None or own == tenant


def unique_actor(context: Context | None) -> str:
    """The name under which a caller's idempotency keys are kept: its actor, for a user with the tenant. A key's id is
    unique in the store, a user's name only in its tenant: two tenants may each have a user `ann`."""
    if context is None:
        return "system"
    return user_of(context.claims["tenant"], context.actor) if TOKEN in context.claims else context.actor


def user_of(tenant: str, actor: str) -> str:
    """The actor of a tenant's user, unique in the store: the length says where the tenant's name ends."""
    return f"{len(tenant)}:{tenant}:{actor}"


def reader(context: Context | None) -> Context:
    """The context to read with: the system reads on the caller's behalf, and `may_see` checks what it found."""
    return system_context() if context is None else system_context(actor=context.actor)


def acting(context: Context | None) -> Context:
    """The caller's own context, before the tenant of the key that it names is known."""
    return context if context is not None else system_context()


def writer(context: Context | None, tenant: str) -> Context:
    """The context to write with: the caller's, on behalf of a tenant. The rules see both, and the journal record is
    that tenant's."""
    scoped = None if tenant == ALL_TENANTS else tenant
    if context is None:
        return system_context(scoped)
    return Context(scoped, context.actor, context.claims, context.request_id)
