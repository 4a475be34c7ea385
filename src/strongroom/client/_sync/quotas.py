# Generated from _async/quotas.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""Quotas over HTTP: limits that the keys of a tenant, of one of its users, or of a named group share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from .._wire import (
    UNSET,
    Unset,
    decode,
    encode,
    given,
    if_match,
    listed,
    once_of,
    query,
    without_none,
)
from ..models import Limit, Quota, QuotaStats
from .transport import Transport

Kind = Literal["tenant", "user", "group"]
LimitIn = Limit | Mapping[str, Any]
DEFAULT_PAGE = 100


class Quotas:
    """Quotas. Each has a subject: `("tenant", "acme")`, `("user", "acme", "u1")` or `("group", "acme", "batch")`."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def put(
        self,
        kind: Kind,
        tenant: str,
        name: str = "",
        *,
        limits: Iterable[LimitIn],
        description: str | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> Quota:
        """Create or replace a subject's quota. The usage of a limit stays if its resource, window, models and routes
        stay.

        `expected`: the required version (0: it must not exist); else PreconditionFailed. Raises InvalidInput with every
        problem; Denied for a caller of the tenant that the quota binds.
        """
        answer = self._http.send(
            "PUT",
            "/v1/quotas/{kind}/{tenant}/{name}" if name else "/v1/quotas/{kind}/{tenant}",
            {"kind": kind, "tenant": tenant, "name": name},
            body=encode(without_none({"limits": listed(limits), "description": description})),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode(Quota, answer)

    def get(self, kind: Kind, tenant: str, name: str = "") -> Quota:
        """A subject's quota. Raises NotFound."""
        answer = self._http.send(
            "GET",
            "/v1/quotas/{kind}/{tenant}/{name}" if name else "/v1/quotas/{kind}/{tenant}",
            {"kind": kind, "tenant": tenant, "name": name},
        )
        return decode(Quota, answer)

    def list(
        self, *, tenant: str | None = None, kind: Kind | None = None, page_size: int = DEFAULT_PAGE
    ) -> Iterator[Quota]:
        """Every matching quota, by tenant, kind and name, over all pages."""
        return self._http.items(Quota, "/v1/quotas", {}, query({"tenant": tenant, "kind": kind}), page_size)

    def update(
        self,
        kind: Kind,
        tenant: str,
        name: str = "",
        *,
        limits: Iterable[LimitIn] | Unset = UNSET,
        description: str | Unset | None = UNSET,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> Quota:
        """Change the given fields. Raises NotFound, InvalidInput with every problem."""
        answer = self._http.send(
            "PATCH",
            "/v1/quotas/{kind}/{tenant}/{name}" if name else "/v1/quotas/{kind}/{tenant}",
            {"kind": kind, "tenant": tenant, "name": name},
            body=encode(given({"limits": listed(limits), "description": description})),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode(Quota, answer)

    def delete(
        self,
        kind: Kind,
        tenant: str,
        name: str = "",
        *,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Delete a subject's quota and its usage. Raises NotFound."""
        self._http.send(
            "DELETE",
            "/v1/quotas/{kind}/{tenant}/{name}" if name else "/v1/quotas/{kind}/{tenant}",
            {"kind": kind, "tenant": tenant, "name": name},
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )

    def stats(self, kind: Kind, tenant: str, name: str = "") -> QuotaStats:
        """The usage of each limit, and totals. Raises NotFound."""
        answer = self._http.send(
            "GET",
            "/v1/quotas/{kind}/{tenant}/{name}/stats" if name else "/v1/quotas/tenant/{tenant}/stats",
            {"kind": kind, "tenant": tenant, "name": name},
        )
        return decode(QuotaStats, answer)
