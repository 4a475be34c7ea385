# Generated from _async/tenants.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""Tenants over HTTP: who uses the platform. A tenant's own data is at `client.tenant(id)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .._wire import UNSET, Unset, decode, encode, given, if_match, once_of, query, without_none
from ..models import DeletionAnswer, DeletionStatement, TenantRecord
from .transport import Transport

DEFAULT_PAGE = 100
NDJSON = "application/x-ndjson"
SILENCE_S = 60.0
"""An export that sends nothing for this long counts as lost."""


class Tenants:
    """Tenants. Only an administrator of all tenants changes them."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def create(
        self,
        id: str,
        *,
        name: str | None = None,
        plan: str | None = None,
        contact_email: str | None = None,
        region: str | None = None,
        settings: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> TenantRecord:
        """Create a tenant. A name that has data already keeps it. Raises AlreadyExists, InvalidInput with every
        problem."""
        fields = {
            "id": id,
            "name": name,
            "plan": plan,
            "contact_email": contact_email,
            "region": region,
            "settings": settings,
            "metadata": metadata,
        }
        body = encode(without_none(fields))
        answer = self._http.send("POST", "/v1/tenants", body=body, once=once_of(idempotency_key))
        return decode(TenantRecord, answer)

    def get(self, id: str) -> TenantRecord:
        """A tenant. Raises NotFound."""
        return decode(TenantRecord, self._http.send("GET", "/v1/tenants/{tenant}", {"tenant": id}))

    def list(
        self, *, status: str | None = None, plan: str | None = None, page_size: int = DEFAULT_PAGE
    ) -> Iterator[TenantRecord]:
        """Every matching tenant, by name, over all pages; also names that nobody created and that have data."""
        return self._http.items(TenantRecord, "/v1/tenants", {}, query({"status": status, "plan": plan}), page_size)

    def update(
        self,
        id: str,
        *,
        name: str | Unset | None = UNSET,
        plan: str | Unset | None = UNSET,
        contact_email: str | Unset | None = UNSET,
        region: str | Unset | None = UNSET,
        settings: Mapping[str, Any] | Unset = UNSET,
        metadata: Mapping[str, Any] | Unset = UNSET,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> TenantRecord:
        """Change the given fields. `expected`: the required version; else PreconditionFailed. Raises NotFound,
        InvalidInput with every problem."""
        fields = {
            "name": name,
            "plan": plan,
            "contact_email": contact_email,
            "region": region,
            "settings": settings,
            "metadata": metadata,
        }
        answer = self._http.send(
            "PATCH",
            "/v1/tenants/{tenant}",
            {"tenant": id},
            body=encode(given(fields)),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode(TenantRecord, answer)

    def suspend(
        self,
        id: str,
        reason: str | None = None,
        *,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> TenantRecord:
        """Suspend a tenant: within a second its keys verify as DISABLED and its writes are refused. Raises NotFound,
        Conflict if it is being deleted."""
        answer = self._http.send(
            "POST",
            "/v1/tenants/{tenant}/suspend",
            {"tenant": id},
            body=encode(without_none({"reason": reason})),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode(TenantRecord, answer)

    def resume(self, id: str, *, expected: int | None = None, idempotency_key: str | None = None) -> TenantRecord:
        """Take a suspension back. Raises NotFound, Conflict if it is being deleted."""
        answer = self._http.send(
            "POST",
            "/v1/tenants/{tenant}/resume",
            {"tenant": id},
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode(TenantRecord, answer)

    def export(self, id: str) -> Iterator[bytes]:
        """Everything that a tenant has, and its journal: JSON Lines, in pieces as they arrive. The file is whole if its
        last line has the type `end`. Raises NotFound, NoAnswer."""
        at = {"tenant": id}
        with self._http.stream("/v1/tenants/{tenant}/export", at, {}, SILENCE_S, NDJSON) as pieces:
            yield from pieces

    def delete(
        self,
        id: str,
        reason: str | None = None,
        *,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> DeletionStatement:
        """Delete a tenant and everything it has; returns when all is gone, with the signed statement of it. Raises
        NotFound, Conflict under a legal hold."""
        once = once_of(idempotency_key)
        while True:
            answer = self._http.send(
                "DELETE",
                "/v1/tenants/{tenant}",
                {"tenant": id},
                query=query({"reason": reason}),
                headers=if_match(expected),
                once=once,
            )
            if decode(DeletionAnswer, answer).status != "deleting":
                return decode(DeletionStatement, answer)
