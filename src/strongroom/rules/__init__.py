"""Whether a call is allowed: a pure function from a request to a decision with its reason.

The access-rules language will give such a function; until a rules file is given, `default_policy` decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from msgspec import Struct

from ..context import Context
from ..entities import Collection, Document

Operation = Literal["get", "list", "create", "update", "delete"]


class Request(Struct, frozen=True):
    """What is asked: `before` is the stored document (None on create and list), `after` the one to be (None on
    get, list and delete; for an addition to a counter, which reads nothing, both are None)."""

    context: Context
    operation: Operation
    collection: Collection
    id: str | None = None
    before: Document | None = None
    after: Document | None = None


class Decision(Struct, frozen=True):
    """Allowed or not, and why: the reason goes into the journal and into the error."""

    allowed: bool
    reason: str


Policy = Callable[[Request], Decision]

OWN_DATA = Decision(True, "a tenant's own data")
ADMINISTRATOR = Decision(True, "an administrator")
NO_TENANT = Decision(False, "the call names no tenant, and this collection is kept by tenant")
ADMINISTRATORS_ONLY = Decision(False, "only administrators may use this collection")


def default_policy(request: Request) -> Decision:
    """A tenant's own data only; collections that belong to no tenant are for administrators (claim `admin`).

    `context.tenant` is the tenant that is asked for. A claim `tenant` says whom the caller belongs to: it must be
    the same one, for administrators too. A caller without that claim belongs to the tenant it asks for (in process)
    or to the platform.
    """
    context = request.context
    claims = context.claims
    own = claims.get("tenant")
    if own is not None and own != context.tenant:
        return Decision(False, f"the caller belongs to tenant {own!r}, not to {context.tenant!r}")
    if not request.collection.tenant_scoped:
        return ADMINISTRATOR if claims.get("admin") is True else ADMINISTRATORS_ONLY
    return OWN_DATA if context.tenant is not None else NO_TENANT
