# Generated from _async/webhooks.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""Webhooks over HTTP: endpoints that receive events, and their deliveries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
from .transport import Transport

DEFAULT_PAGE = 100


class Webhooks:
    """Endpoints that receive events, and their deliveries."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def create(
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
        """Create an endpoint. The answer has its secret, once. Without `events` it receives all.

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
        answer = self._http.send("POST", "/v1/webhooks", body=encode(fields), once=once_of(idempotency_key))
        return issued_webhook(answer)

    def get(self, id: str) -> Webhook:
        """One endpoint. Raises NotFound."""
        return decode(Webhook, self._http.send("GET", "/v1/webhooks/{id}", {"id": id}))

    def list(self, *, tenant: str | None = None, page_size: int = DEFAULT_PAGE) -> Iterator[Webhook]:
        """Every endpoint, newest first, over all pages."""
        return self._http.items(Webhook, "/v1/webhooks", {}, query({"tenant": tenant}), page_size)

    def update(
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
        """Change the given fields. `expected`: the required version, else PreconditionFailed.

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
        answer = self._http.send(
            "PATCH",
            "/v1/webhooks/{id}",
            {"id": id},
            body=encode(fields),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode(Webhook, answer)

    def delete(self, id: str, *, expected: int | None = None, idempotency_key: str | None = None) -> None:
        """Delete an endpoint and its waiting deliveries. Raises NotFound."""
        self._http.send(
            "DELETE", "/v1/webhooks/{id}", {"id": id}, headers=if_match(expected), once=once_of(idempotency_key)
        )

    def rotate_secret(
        self,
        id: str,
        *,
        overlap_s: int | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedWebhook:
        """Give the endpoint a new secret. Both secrets sign for `overlap_s` seconds. Raises NotFound."""
        answer = self._http.send(
            "POST",
            "/v1/webhooks/{id}/rotate-secret",
            {"id": id},
            body=encode(without_none({"overlap_s": overlap_s})),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return issued_webhook(answer)

    def test(self, id: str) -> Delivery:
        """Send the endpoint a test event now and return the result. Not retried without an answer.

        Raises NotFound.
        """
        return decode(Delivery, self._http.send("POST", "/v1/webhooks/{id}/test", {"id": id}))

    def deliveries(self, id: str, *, state: str | None = None, page_size: int = DEFAULT_PAGE) -> Iterator[Delivery]:
        """The deliveries to an endpoint, newest first. `state`: pending, delivered or dead."""
        return self._http.items(
            Delivery, "/v1/webhooks/{id}/deliveries", {"id": id}, query({"state": state}), page_size
        )

    def delivery(self, id: str) -> Delivery:
        """One delivery. Raises NotFound."""
        return decode(Delivery, self._http.send("GET", "/v1/deliveries/{id}", {"id": id}))

    def redrive(self, id: str) -> Delivery:
        """Restart a delivery with the same event id. Raises NotFound."""
        return decode(Delivery, self._http.send("POST", "/v1/deliveries/{id}/redrive", {"id": id}, repeatable=True))
