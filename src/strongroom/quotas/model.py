"""Quotas: limits that the keys of a tenant, of a user, or of a named group share."""

from __future__ import annotations

from typing import Literal

from ..entities import Entity, Index
from ..limits import Limit, Subject, compile_limits, subject_for
from ..storage.port import Check

NAME = "quotas"
QuotaKind = Literal["tenant", "user", "group"]


class Quota(
    Entity, collection=NAME, scope="global", indexes=[Index("tenant", "kind", "name"), Index("kind", "tenant", "name")]
):
    """Limits on the use of all keys of one tenant, user or group together; the id is `quota_id(kind, tenant, name)`.

    `name`: the user's id or the group's name; empty for the tenant itself. The collection is global as that of keys is:
    one commit reads and checks quotas together with keys of any tenant.
    """

    tenant: str
    kind: QuotaKind
    name: str = ""
    limits: list[Limit] = []
    description: str | None = None

    @property
    def subject(self) -> str:
        """Whose limits these are, as answers name it."""
        return "tenant" if self.kind == "tenant" else f"{self.kind}:{self.name}"


def quota_id(kind: QuotaKind, tenant: str, name: str = "") -> str:
    """The id of a quota and of its usage. It is never the id of a key, which begins with `key_`.

    A tenant's name may contain a slash, so its length stands before it: no two quotas have the same id.
    """
    return f"{kind}:{len(tenant)}:{tenant}/{name}" if kind != "tenant" else f"tenant:{len(tenant)}:{tenant}"


def tenant_of(id: str) -> str:
    """The tenant in a quota's id."""
    _, length, rest = id.split(":", 2)
    return rest[: int(length)]


def is_quota(id: str) -> bool:
    """Whether the id of a usage document belongs to a quota and not to a key."""
    return id.partition(":")[0] in ("tenant", "user", "group")


def quota_subject(quota: Quota) -> Subject:
    """A quota as the ledger needs it."""
    return subject_for(
        quota.id, Check(NAME, quota.id, quota.version), compile_limits(quota.limits, quota.subject), quota.tenant
    )
