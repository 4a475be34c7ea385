"""Webhooks over HTTP: endpoints that are told of events, and the deliveries to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from .._wire import (
    UNSET,
    Unset,
    decode,
    encode,
    given,
    if_match,
    issued_webhook,
    listed,
    once_of,
    query,
    without_none,
)
from ..models import Delivery, IssuedWebhook, Webhook
from .transport import AsyncTransport

DEFAULT_PAGE = 100


class AsyncWebhooks:
    """Endpoints that are told of events, and the deliveries to them."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._http = transport

    async def create(
        self,
        url: str,
        *,
        tenant: str | None = None,
        events: Iterable[str] = (),
        thresholds: Iterable[int] | None = None,
        min_window_s: int | None = None,
        description: str | None = None,
        enabled: bool | None = None,
        allow_private: bool | None = None,
        secret: str | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedWebhook:
        """Make an endpoint. Its secret is in the answer, this once. Without `events` it is told of all.

        Raises InvalidInput with every problem.
        """
        fields = without_none(
            {
                "url": url,
                "tenant": tenant,
                "events": listed(events) or None,
                "thresholds": None if thresholds is None else listed(thresholds),
                "min_window_s": min_window_s,
                "description": description,
                "enabled": enabled,
                "allow_private": allow_private,
                "secret": secret,
            }
        )
        answer = await self._http.send("POST", "/v1/webhooks", body=encode(fields), once=once_of(idempotency_key))
        return issued_webhook(answer)

    async def get(self, id: str) -> Webhook:
        """One endpoint. Raises NotFound."""
        return decode(Webhook, await self._http.send("GET", "/v1/webhooks/{id}", {"id": id}))

    def list(self, *, tenant: str | None = None, page_size: int = DEFAULT_PAGE) -> AsyncIterator[Webhook]:
        """Every endpoint, newest first, page after page."""
        return self._http.items(Webhook, "/v1/webhooks", {}, query({"tenant": tenant}), page_size)

    async def update(
        self,
        id: str,
        *,
        url: str | Unset = UNSET,
        events: Iterable[str] | Unset = UNSET,
        thresholds: Iterable[int] | Unset = UNSET,
        min_window_s: int | Unset = UNSET,
        description: str | Unset | None = UNSET,
        enabled: bool | Unset = UNSET,
        allow_private: bool | Unset = UNSET,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> Webhook:
        """Change the fields that are given. `expected`: the version that it must have, else PreconditionFailed.

        Raises NotFound, InvalidInput with every problem.
        """
        fields = given(
            {
                "url": url,
                "events": listed(events),
                "thresholds": listed(thresholds),
                "min_window_s": min_window_s,
                "description": description,
                "enabled": enabled,
                "allow_private": allow_private,
            }
        )
        answer = await self._http.send(
            "PATCH",
            "/v1/webhooks/{id}",
            {"id": id},
            body=encode(fields),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode(Webhook, answer)

    async def delete(self, id: str, *, expected: int | None = None, idempotency_key: str | None = None) -> None:
        """Remove an endpoint; what was not delivered to it is not delivered any more. Raises NotFound."""
        await self._http.send(
            "DELETE", "/v1/webhooks/{id}", {"id": id}, headers=if_match(expected), once=once_of(idempotency_key)
        )

    async def rotate_secret(
        self,
        id: str,
        *,
        overlap_s: int | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedWebhook:
        """Give the endpoint a new secret. The one before signs beside it for `overlap_s` seconds. Raises NotFound."""
        answer = await self._http.send(
            "POST",
            "/v1/webhooks/{id}/rotate-secret",
            {"id": id},
            body=encode(without_none({"overlap_s": overlap_s})),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return issued_webhook(answer)

    async def test(self, id: str) -> Delivery:
        """Send the endpoint a test event now, and say what came of it. It is not sent again where the answer is lost.

        Raises NotFound.
        """
        return decode(Delivery, await self._http.send("POST", "/v1/webhooks/{id}/test", {"id": id}))

    def deliveries(
        self, id: str, *, state: str | None = None, page_size: int = DEFAULT_PAGE
    ) -> AsyncIterator[Delivery]:
        """The deliveries to an endpoint, newest first. `state`: only those pending, delivered or dead."""
        return self._http.items(
            Delivery, "/v1/webhooks/{id}/deliveries", {"id": id}, query({"state": state}), page_size
        )

    async def delivery(self, id: str) -> Delivery:
        """One delivery. Raises NotFound."""
        return decode(Delivery, await self._http.send("GET", "/v1/deliveries/{id}", {"id": id}))

    async def redrive(self, id: str) -> Delivery:
        """Send a delivery again, under the same event id, from the beginning. Raises NotFound."""
        return decode(
            Delivery, await self._http.send("POST", "/v1/deliveries/{id}/redrive", {"id": id}, repeatable=True)
        )
