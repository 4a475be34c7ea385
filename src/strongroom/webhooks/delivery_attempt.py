"""One attempt to deliver an event to an endpoint: send it signed, store the result, disable an endpoint that fails.

The result is written under the version of the claim, so the store refuses it once another node claimed the delivery.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from ..access import ALL_TENANTS
from ..clock import Clock
from ..context import system_context, utc_from_us
from ..database import Database
from ..entities import Entity, Index
from ..errors import Conflict, NotFound, StrongroomError
from ..events import TEST, Event
from ..storage.port import Check, Operation, Patch
from .http_sender import GONE, HttpSender, SendResult
from .model import Webhook
from .secrets import WebhookSecrets
from .signatures import sign

NAME = "webhook_deliveries"
MAX_ATTEMPTS = 11
FIRST_BACKOFF_S = 5.0
BACKOFF_FACTOR = 4.0
MAX_BACKOFF_S = 21_600.0
"""The waits between attempts: 5 s, 20 s, 80 s, 5 min, 21 min, 85 min, 5.7 h, then 6 h each; 25.6 h in all."""
JITTER = 0.1
DISABLE_AFTER = timedelta(days=5)
"""An endpoint whose attempts all failed for this long is disabled."""
CLAIM_MARGIN_S = 20.0
"""A claim outlasts the longest attempt by this, for the commits before and after it."""
MAX_ERROR_CHARS = 300
State = Literal["pending", "delivered", "dead"]
_log = logging.getLogger(__name__)


class Delivery(
    Entity,
    collection=NAME,
    scope="global",
    journalled=False,
    ttl="expires_at",
    indexes=[Index("due_at"), Index("webhook_id", "-created_at"), Index("webhook_id", "state", "-created_at")],
):
    """The delivery of one event to one endpoint. `due_at`: when it is attempted next, or, during an attempt, when the
    claim of that attempt lapses; None once it is `delivered` or `dead`. `attempts` counts attempts since the creation
    or the last redrive."""

    webhook_id: str
    tenant: str
    event_id: str
    event_type: str
    state: State = "pending"
    attempts: int = 0
    due_at: datetime | None = None
    last_attempt_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None
    delivered_at: datetime | None = None
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Timing:
    """How often the outbox is polled, and how long claims and backoffs last. Tests shorten these times."""

    poll_s: float = 5.0
    first_look_s: float = 5.0
    """A process that ends before this delivers only the events that it committed itself."""
    claim_margin_s: float = CLAIM_MARGIN_S
    backoff_s: float = FIRST_BACKOFF_S
    count_every_s: float = 15.0
    """How often waiting deliveries are counted, for the metrics."""
    disable_after: timedelta = DISABLE_AFTER


DEFAULT_TIMING = Timing()


def backoff_s(attempts: int, first_s: float = FIRST_BACKOFF_S) -> float:
    """The wait after this many attempts, without jitter."""
    return min(MAX_BACKOFF_S, first_s * BACKOFF_FACTOR ** (attempts - 1))


class DeliveryAttempts:
    """The attempts of one node."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        secrets: WebhookSecrets,
        sender: HttpSender,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self._database = database
        self._clock = clock
        self._secrets = secrets
        self._sender = sender
        self.timing = timing
        self.counts: Counter[str] = Counter({"delivered": 0, "failed": 0, "dead": 0})
        """Attempts of this process by result. `failed` attempts are retried, `dead` letters are not."""

    async def run(self, delivery: Delivery) -> None:
        """Send a claimed delivery once, and store the result."""
        try:
            webhook = await self._database.get_or_none(system_context(), Webhook, delivery.webhook_id, fresh=True)
            event = await self._database.get_or_none(system_context(), Event, delivery.event_id, fresh=True)
            if webhook is None or event is None or not (webhook.enabled or event.type == TEST):
                error = "the event is not kept any more" if event is None else "the webhook is disabled"
                error = "the webhook was removed" if webhook is None else error
                await self.record(delivery, None, SendResult(None, error))
                return
            await self.record(delivery, webhook, await self._send(webhook, event))
        except StrongroomError as failure:
            # The store is unavailable. The claim lapses, and another attempt follows.
            _log.warning("the result of the attempt at %s could not be stored: %s", delivery.id, failure)

    async def _send(self, webhook: Webhook, event: Event) -> SendResult:
        body = event.body.encode()
        try:
            keys = self._secrets.signing(webhook)
        except StrongroomError as error:
            return SendResult(None, error.message)
        headers = {
            **sign(keys, event.id, self._clock.now_us() // 1_000_000, body),
            "content-type": "application/json",
            "user-agent": "Strongroom-Webhooks/1",
        }
        return await self._sender.send(webhook.url, headers, body, allow_private=webhook.allow_private)

    async def record(self, delivery: Delivery, webhook: Webhook | None, result: SendResult) -> None:
        """Store the result of an attempt: the delivery is now delivered, to be retried, or dead."""
        now = utc_from_us(self._clock.now_us())
        attempts = delivery.attempts + 1
        error = None if result.accepted else _error_of(result)[:MAX_ERROR_CHARS]
        last = webhook is None or attempts >= MAX_ATTEMPTS or delivery.event_type == TEST or result.status == GONE
        state: State = "delivered" if result.accepted else "dead" if last else "pending"
        saved = await self.save(
            delivery,
            state=state,
            attempts=attempts,
            due_at=now + timedelta(seconds=self._wait_s(attempts, result)) if state == "pending" else None,
            last_attempt_at=now,
            last_status=result.status,
            last_error=error,
            delivered_at=now if result.accepted else None,
        )
        if not saved:
            return  # the claim lapsed during the attempt, and another node claimed the delivery
        self.counts["failed" if state == "pending" else state] += 1
        if webhook is not None:
            await self._update_health(webhook, delivery, result, now)

    def _wait_s(self, attempts: int, result: SendResult) -> float:
        wait_s = backoff_s(attempts, self.timing.backoff_s) * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
        return min(MAX_BACKOFF_S, max(wait_s, result.retry_after_s or 0.0))

    async def save(self, delivery: Delivery, *, guard: Check | None = None, **fields: object) -> bool:
        """Write fields under the version of the claim; False if another node claimed the delivery since."""
        operations: list[Operation] = [] if guard is None else [guard]
        operations.append(Patch(NAME, delivery.id, dict(fields), delivery.version))
        try:
            committed = await self._database.commit_counters(operations, self._clock.now_us())
        except (Conflict, NotFound):
            return False
        delivery.version = committed.versions[-1]
        return True

    # --- Endpoints that fail ----------------------------------------------------------------------------------

    async def _update_health(self, webhook: Webhook, delivery: Delivery, result: SendResult, now: datetime) -> None:
        """Store since when an endpoint fails. Disable it if it failed for `disable_after`, or answered 410 Gone."""
        if result.accepted:
            if webhook.failing_since is not None:
                await self._set_failing_since(webhook, None)
        elif result.status == GONE and delivery.event_type != TEST:
            await self._disable(webhook, "it answered 410: gone")
        elif webhook.failing_since is None:
            await self._set_failing_since(webhook, now)
        elif now - webhook.failing_since >= self.timing.disable_after:
            await self._disable(webhook, f"every attempt failed since {webhook.failing_since.isoformat()}")

    async def _set_failing_since(self, webhook: Webhook, failing_since: datetime | None) -> None:
        patch = Patch(Webhook.__collection__.name, webhook.id, {"failing_since": failing_since}, webhook.version)
        try:
            await self._database.commit_counters([patch], self._clock.now_us())
        except (Conflict, NotFound):
            return  # the endpoint was changed or removed meanwhile: the next attempt decides again

    async def _disable(self, webhook: Webhook, reason: str) -> None:
        tenant = None if webhook.tenant == ALL_TENANTS else webhook.tenant
        context = system_context(tenant, actor="system:webhooks")
        fields = {"enabled": False, "disabled_reason": reason}
        try:
            await self._database.update(context, Webhook, webhook.id, fields, expected=webhook.version)
        except (Conflict, NotFound):
            return  # the endpoint was changed meanwhile and may work now: the next attempt decides again
        _log.warning("the webhook %s was disabled: %s", webhook.id, reason)


def _error_of(result: SendResult) -> str:
    if result.error is not None:
        return result.error.replace("\x00", "")
    if result.status is not None and 300 <= result.status < 400:
        return f"answered {result.status}: redirects are not followed"
    return f"answered {result.status}"


__all__ = ["Delivery", "DeliveryAttempts", "State", "Timing", "backoff_s"]
