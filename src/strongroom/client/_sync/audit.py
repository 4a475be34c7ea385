# Generated from _async/audit.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""The audit trail over HTTP: who changed what, when, from what to what."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from .._wire import query
from ..models import AuditRecord
from .transport import Transport

DEFAULT_PAGE = 100


class Audit:
    """The journal's records."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def list(
        self,
        *,
        tenant: str | None = None,
        actor: str | None = None,
        action: str | None = None,
        collection: str | None = None,
        entity_id: str | None = None,
        request_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        page_size: int = DEFAULT_PAGE,
    ) -> Iterator[AuditRecord]:
        """Every matching record, oldest first, over all pages. Raises Denied for another tenant's records."""
        wanted = query(
            {
                "tenant": tenant,
                "actor": actor,
                "action": action,
                "collection": collection,
                "entity_id": entity_id,
                "request_id": request_id,
                "since": since,
                "until": until,
            }
        )
        return self._http.items(AuditRecord, "/v1/audit", {}, wanted, page_size)
