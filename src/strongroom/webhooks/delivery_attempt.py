"""One attempt to deliver an event to an endpoint: sent once, signed; what came of it is kept, and judged.

The result is written under the version of the claim, so it is refused once someone else has claimed the delivery.
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
from .endpoints import Webhook, Webhooks
from .http_sender import GONE, Answer, Sender
from .signatures import sign

NAME = "webhook_deliveries"
MAX_ATTEMPTS = 11
FIRST_BACKOFF_S = 5.0
BACKOFF_FACTOR = 4.0
MAX_BACKOFF_S = 21_600.0
"""The waits between attempts: 5 s, 20 s, 80 s, 5 min, 21 min, 85 min, 5.7 h, then 6 h each; 25.6 h in all."""
JITTER = 0.1
DISABLE_AFTER = timedelta(days=5)
"""An endpoint none of whose attempts succeeded for so long is disabled."""
CLAIM_MARGIN_S = 20.0
"""A claim is longer than an attempt by so much, for the commits before and after it."""
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
    """One event on its way to one endpoint. `due_at`: when it is attempted next, or, during an attempt, when that
    attempt is given up for lost; None once it is `delivered` or `dead`. `attempts` counts those since it was made or
    redriven."""

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
    """How often what is due is looked for, and how long a claim holds beyond an attempt. Tests shorten them."""

    poll_s: float = 5.0
    first_look_s: float = 5.0
    """A process that lives shorter takes up only what it committed itself."""
    claim_margin_s: float = CLAIM_MARGIN_S
    backoff_s: float = FIRST_BACKOFF_S
    count_every_s: float = 15.0
    """What waits is counted so often, for the metrics."""
    disable_after: timedelta = DISABLE_AFTER


DEFAULT_TIMING = Timing()


def backoff_s(attempts: int, first_s: float = FIRST_BACKOFF_S) -> float:
    """How long to wait after so many attempts, without jitter."""
    return min(MAX_BACKOFF_S, first_s * BACKOFF_FACTOR ** (attempts - 1))


class Attempts:
    """What one node attempts at the endpoints of a store."""

    def __init__(
        self, database: Database, clock: Clock, webhooks: Webhooks, sender: Sender, timing: Timing = DEFAULT_TIMING
    ) -> None:
        self._database = database
        self._clock = clock
        self._webhooks = webhooks
        self._sender = sender
        self.timing = timing
        self.counts: Counter[str] = Counter({"delivered": 0, "failed": 0, "dead": 0})
        """Attempts of this process by what came of them; `failed` ones are made again, `dead` letters are not."""

    async def make(self, delivery: Delivery) -> None:
        """Send once, and keep what came of it."""
        try:
            webhook = await self._database.get_or_none(system_context(), Webhook, delivery.webhook_id, fresh=True)
            cause = await self._database.get_or_none(system_context(), Event, delivery.event_id, fresh=True)
            if webhook is None or cause is None or not (webhook.enabled or cause.type == TEST):
                gone = "the event is not kept any more" if cause is None else "the webhook is disabled"
                await self.keep(delivery, None, Answer(None, "the webhook was removed" if webhook is None else gone))
                return
            await self.keep(delivery, webhook, await self._send(webhook, cause))
        except StrongroomError as error:
            # The store is away. The claim lapses, and the attempt is made again.
            _log.warning("the attempt at %s could not be kept: %s", delivery.id, error)

    async def _send(self, webhook: Webhook, cause: Event) -> Answer:
        body = cause.body.encode()
        try:
            keys = self._webhooks.keys_of(webhook)
        except StrongroomError as error:
            return Answer(None, error.message)
        headers = {
            **sign(keys, cause.id, self._clock.now_us() // 1_000_000, body),
            "content-type": "application/json",
            "user-agent": "Strongroom-Webhooks/1",
        }
        return await self._sender.send(webhook.url, headers, body, allow_private=webhook.allow_private)

    async def keep(self, delivery: Delivery, webhook: Webhook | None, answer: Answer) -> None:
        """Write what came of an attempt: delivered, to be tried again, or dead."""
        now = utc_from_us(self._clock.now_us())
        attempts = delivery.attempts + 1
        error = None if answer.accepted else _why(answer)[:MAX_ERROR_CHARS]
        last = webhook is None or attempts >= MAX_ATTEMPTS or delivery.event_type == TEST or answer.status == GONE
        state: State = "delivered" if answer.accepted else "dead" if last else "pending"
        saved = await self.save(
            delivery,
            state=state,
            attempts=attempts,
            due_at=now + timedelta(seconds=self._wait_s(attempts, answer)) if state == "pending" else None,
            last_attempt_at=now,
            last_status=answer.status,
            last_error=error,
            delivered_at=now if answer.accepted else None,
        )
        if not saved:
            return  # the attempt took longer than its claim, and another node has made one of its own
        self.counts["failed" if state == "pending" else state] += 1
        if webhook is not None:
            await self._judge(webhook, delivery, answer, now)

    def _wait_s(self, attempts: int, answer: Answer) -> float:
        wait_s = backoff_s(attempts, self.timing.backoff_s) * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
        return min(MAX_BACKOFF_S, max(wait_s, answer.retry_after_s or 0.0))

    async def save(self, delivery: Delivery, *, guard: Check | None = None, **fields: object) -> bool:
        """Write fields under the version that was claimed; False if another node has claimed it since."""
        operations: list[Operation] = [] if guard is None else [guard]
        operations.append(Patch(NAME, delivery.id, dict(fields), delivery.version))
        try:
            committed = await self._database.commit_counters(operations, self._clock.now_us())
        except (Conflict, NotFound):
            return False
        delivery.version = committed.versions[-1]
        return True

    # --- Endpoints that fail ----------------------------------------------------------------------------------

    async def _judge(self, webhook: Webhook, delivery: Delivery, answer: Answer, now: datetime) -> None:
        """Remember since when an endpoint fails, and disable one that has failed for too long or says it is gone."""
        if answer.accepted:
            if webhook.failing_since is not None:
                await self._mark(webhook, None)
        elif answer.status == GONE and delivery.event_type != TEST:
            await self._disable(webhook, "it answered 410: gone")
        elif webhook.failing_since is None:
            await self._mark(webhook, now)
        elif now - webhook.failing_since >= self.timing.disable_after:
            await self._disable(webhook, f"every attempt failed since {webhook.failing_since.isoformat()}")

    async def _mark(self, webhook: Webhook, failing_since: datetime | None) -> None:
        patch = Patch(Webhook.__collection__.name, webhook.id, {"failing_since": failing_since}, webhook.version)
        try:
            await self._database.commit_counters([patch], self._clock.now_us())
        except (Conflict, NotFound):
            return  # it was changed or removed meanwhile: the next attempt says it again

    async def _disable(self, webhook: Webhook, reason: str) -> None:
        tenant = None if webhook.tenant == ALL_TENANTS else webhook.tenant
        context = system_context(tenant, actor="system:webhooks")
        fields = {"enabled": False, "disabled_reason": reason}
        try:
            await self._database.update(context, Webhook, webhook.id, fields, expected=webhook.version)
        except (Conflict, NotFound):
            return  # it was changed meanwhile, perhaps so that it works: the next attempt says
        _log.warning("the webhook %s was disabled: %s", webhook.id, reason)


def _why(answer: Answer) -> str:
    if answer.error is not None:
        return answer.error.replace("\x00", "")
    if answer.status is not None and 300 <= answer.status < 400:
        return f"answered {answer.status}: redirects are not followed"
    return f"answered {answer.status}"


__all__ = ["Attempts", "Delivery", "State", "Timing", "backoff_s"]
