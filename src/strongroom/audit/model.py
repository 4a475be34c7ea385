"""The stored documents of retention policies and legal holds."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from ..context import us_from_utc
from ..entities import Entity
from ..storage.port import JournalRow

MAX_REASON_CHARS = 500
MAX_SUBJECT_CHARS = 500
MAX_DAYS = 36_500
NEW_STORE_DAYS = 90
"""Days that a new store keeps its journal unless a setting says otherwise."""
POLICY = "default"
"""The id of the policy that counts for all tenants. A tenant's own has the id of its tree."""


class LegalHold(Entity, collection="legal_holds", scope="global"):
    """Records that must stay as they are. `tenant` None: those of all tenants and of the platform. The other fields
    narrow it: to what a user did, to one collection or document, to a time range (`since` inclusive, `until`
    exclusive). A lifted hold stays on record."""

    tenant: str | None = None
    user: str | None = None
    collection: str | None = None
    entity_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    reason: str = Field(max_length=MAX_REASON_CHARS)
    placed_by: str = ""
    lifted_at: datetime | None = None
    lifted_by: str | None = None
    lifted_because: str | None = None

    @property
    def active(self) -> bool:
        return self.lifted_at is None

    @property
    def of_subject(self) -> bool:
        """Whether it is narrowed to a user, a collection or a document."""
        return self.user is not None or self.collection is not None or self.entity_id is not None

    def concerns(self, tenant: str | None) -> bool:
        """Whether it holds records of this tenant, or (None) of the platform."""
        return self.active and (self.tenant is None or self.tenant == tenant)

    def overlaps(self, first_us: int, last_us: int) -> bool:
        """Whether it holds records of a time between these, both inclusive."""
        return (self.since is None or us_from_utc(self.since) <= last_us) and (
            self.until is None or first_us < us_from_utc(self.until)
        )

    def matches(self, tenant: str | None, at_us: int, actor: str, collection: str, entity_id: str) -> bool:
        """Whether it holds a record with these fields."""
        return (
            self.concerns(tenant)
            and self.overlaps(at_us, at_us)
            and (self.user is None or self.user == actor)
            and (self.collection is None or self.collection == collection)
            and (self.entity_id is None or self.entity_id == entity_id)
        )

    def holds(self, row: JournalRow) -> bool:
        _, _, tenant, at_us, actor, _, _, collection, entity_id, *_ = row
        return self.matches(tenant, at_us, actor, collection, entity_id)


class RetentionPolicy(Entity, collection="retention_policies", scope="global"):
    """How long records are kept: POLICY's for all, or a tenant's own. `days` None: POLICY's counts, or for ever.
    `floor_days` is the least that must be kept. It is raised and never lowered."""

    tenant: str | None = None
    days: int | None = Field(default=None, ge=1, le=MAX_DAYS)
    floor_days: int = Field(default=0, ge=0, le=MAX_DAYS)
