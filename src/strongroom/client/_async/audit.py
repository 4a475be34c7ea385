"""The audit trail over HTTP: who changed what, when, from what to what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime

from .._wire import decode, encode, once_of, query, without_none
from ..models import AuditProof, AuditRecord, LegalHold, Redaction, Retention
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

    # --- Retention, legal holds, redaction ---

    async def retention(self, tenant: str | None = None) -> Retention:
        """How long a tenant's records are kept (None: those of tenants without days of their own)."""
        if tenant is None:
            return decode(Retention, await self._http.send("GET", "/v1/audit/retention"))
        return decode(Retention, await self._http.send("GET", "/v1/audit/{tenant}/retention", {"tenant": tenant}))

    async def set_retention(
        self,
        tenant: str | None = None,
        *,
        days: int | None = None,
        floor_days: int | None = None,
        idempotency_key: str | None = None,
    ) -> Retention:
        """Set how long records are kept, and raise the floor. Raises InvalidInput for a lower floor, and for days below
        the floor."""
        body, once = encode(without_none({"days": days, "floor_days": floor_days})), once_of(idempotency_key)
        if tenant is None:
            return decode(Retention, await self._http.send("PATCH", "/v1/audit/retention", body=body, once=once))
        path = {"tenant": tenant}
        answer = await self._http.send("PATCH", "/v1/audit/{tenant}/retention", path, body=body, once=once)
        return decode(Retention, answer)

    def legal_holds(
        self, *, tenant: str | None = None, active: bool | None = None, page_size: int = DEFAULT_PAGE
    ) -> AsyncIterator[LegalHold]:
        """Every legal hold, over all pages; or those on a tenant's records; or those that are (not) lifted."""
        wanted = query({"tenant": tenant, "active": active})
        return self._http.items(LegalHold, "/v1/audit/holds", {}, wanted, page_size)

    async def place_legal_hold(
        self,
        reason: str,
        *,
        tenant: str | None = None,
        user: str | None = None,
        collection: str | None = None,
        entity_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        idempotency_key: str | None = None,
    ) -> LegalHold:
        """Place a legal hold: it blocks retention, redaction and the deletion of the tenant until it is lifted."""
        body = without_none(
            {
                "reason": reason,
                "tenant": tenant,
                "user": user,
                "collection": collection,
                "entity_id": entity_id,
                "since": since,
                "until": until,
            }
        )
        answer = await self._http.send("POST", "/v1/audit/holds", body=encode(body), once=once_of(idempotency_key))
        return decode(LegalHold, answer)

    async def lift_legal_hold(self, id: str, reason: str, *, idempotency_key: str | None = None) -> LegalHold:
        """Lift a legal hold. Raises NotFound, and Conflict if it was lifted before."""
        body, once = encode({"reason": reason}), once_of(idempotency_key)
        answer = await self._http.send("POST", "/v1/audit/holds/{id}/lift", {"id": id}, body=body, once=once)
        return decode(LegalHold, answer)

    async def redact(
        self,
        tenant: str,
        reason: str,
        *,
        user: str | None = None,
        collection: str | None = None,
        entity_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Redaction:
        """Remove what the journal says of a user, or of a document (`collection` and `entity_id`). Raises Conflict
        under a legal hold."""
        subject = {"user": user, "collection": collection, "entity_id": entity_id}
        body, once = encode(without_none({"reason": reason, **subject})), once_of(idempotency_key)
        path = {"tenant": tenant}
        answer = await self._http.send("POST", "/v1/audit/{tenant}/redactions", path, body=body, once=once)
        return decode(Redaction, answer)
