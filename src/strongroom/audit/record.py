"""One record of the audit trail."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One record. `tenant` is None for the platform's records. `index` is the record's leaf in its tenant's tree; None
    until it is sealed. Secrets in `before` and `after` are `***`."""

    sequence: int
    index: int | None
    tenant: str | None
    at: datetime
    actor: str
    request_id: str
    action: str
    collection: str
    entity_id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
