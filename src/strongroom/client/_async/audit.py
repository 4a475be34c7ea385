"""The audit trail over HTTP: who changed what, when, from what to what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime

from .._wire import decode, query
from ..models import AuditProof, AuditRecord
from .transport import AsyncTransport

DEFAULT_PAGE = 100


class AsyncAudit:
    """The journal's records."""

    def __init__(self, transport: AsyncTransport) -> None:
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
    ) -> AsyncIterator[AuditRecord]:
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

    async def checkpoint(self, tenant: str | None = None) -> str:
        """The latest signed checkpoint of a tenant's tree (None: of the platform's), a C2SP signed note. Keep it: it
        shows later that the journal was only added to. Raises NotFound if nothing is sealed yet."""
        if tenant is None:
            answer = await self._http.send("GET", "/v1/audit/checkpoint")
        else:
            answer = await self._http.send("GET", "/v1/audit/{tenant}/checkpoint", {"tenant": tenant})
        return answer.decode()

    async def inclusion(self, index: int, *, tenant: str | None = None, size: int | None = None) -> AuditProof:
        """The proof that a record is in the tree: the leaf of this index, in the tree of this size (None: the
        latest). Raises InvalidInput for an index past the tree."""
        return await self._proof(tenant, {"index": index, "size": size})

    async def consistency(self, first: int, second: int | None = None, *, tenant: str | None = None) -> AuditProof:
        """The proof that the tree of size `first` is the beginning of the tree of size `second` (None: the latest)."""
        return await self._proof(tenant, {"from": first, "to": second})

    async def _proof(self, tenant: str | None, wanted: dict[str, int | None]) -> AuditProof:
        if tenant is None:
            answer = await self._http.send("GET", "/v1/audit/proof", query=query(wanted))
        else:
            answer = await self._http.send("GET", "/v1/audit/{tenant}/proof", {"tenant": tenant}, query=query(wanted))
        return decode(AuditProof, answer)
