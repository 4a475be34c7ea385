"""Deliveries of events to webhooks: an outbox that sends at once, retries for a day, then keeps a dead letter.

Delivery is at least once, always under the event's own id. An event is committed together with its cause (the outbox).
A node dispatches the event: one batch marks it as dispatched and creates one delivery for each subscribed endpoint.
A node claims a delivery when it moves `due_at` past the longest attempt, under the version that it read; of two nodes
one succeeds. If that node dies, the claim lapses and another node attempts the delivery.

The node that committed an event dispatches it at once. Retries, and the work of nodes that died, become due instead:
every node polls for them, but only the holder of the job lease claims them, and each claim carries the lease's guard.
The result of an attempt is written under the version of its claim instead. So the result is stored even if another node
acquired the lease meanwhile, and refused once another node claimed the delivery.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TypeVar

from ..access import ALL_TENANTS, may_see
from ..clock import Clock
from ..context import Context, system_context, us_from_utc, utc_from_us
from ..database import Database, Transaction
from ..entities import MAX_PAGE_BYTES, Aggregate, And, Entity, Filter, Page, Query, Where
from ..errors import (
    AlreadyExists,
    ConfigError,
    Conflict,
    NotFound,
    StrongroomError,
)
from ..events import KEPT, TEST, Event, event
from ..events.outbox import NAME as EVENTS
from ..jobs import AcquiredLease, JobLeaseLost, JobLeases
from ..storage.port import Check, Create, Operation, Patch
from .delivery_attempt import (
    DEFAULT_TIMING,
    NAME,
    Delivery,
    DeliveryAttempts,
    State,
    Timing,
)
from .endpoints import MAX_PER_TENANT, Webhooks
from .http_sender import HttpSender, require_httpx
from .model import Webhook

JOB = "webhook-deliveries"
MAX_SENDING = 64
"""Concurrent attempts of one process, and of one endpoint (below): an endpoint that hangs leaves room for others."""
MAX_SENDING_EACH = 4
MAX_QUEUED = 10_000
"""Deliveries to busy endpoints that this process queues in memory; further ones become due again later."""
MAX_FRESH = 10_000
"""Events of this process that wait for their dispatch; further ones become due after events.GRACE_S."""
PAGE = 100
MAX_SKEW = timedelta(minutes=1)
"""An endpoint receives events since its creation, and of this time before it: the clocks of nodes may differ."""
SAVE_EVERY_S = 4.0
CLOSE_TIMEOUT_S = 3.0
E = TypeVar("E", bound=Entity)
_log = logging.getLogger(__name__)


def delivery_id(event_id: str, webhook_id: str) -> str:
    """The id of the one delivery of an event to an endpoint, however often the event is dispatched."""
    return "dlv_" + hashlib.sha256(f"{event_id}\x00{webhook_id}".encode()).hexdigest()[:31]


class Deliveries:
    """The outbox of one store, as one node works on it. `start` it last, `close` it first."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        leases: JobLeases,
        webhooks: Webhooks,
        sender: HttpSender,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self._database = database
        self._clock = clock
        self._leases = leases
        self._webhooks = webhooks
        self._sender = sender
        self._timing = timing
        self.attempts = DeliveryAttempts(database, clock, webhooks.secrets, sender, timing)
        self._claim_lasts = timedelta(seconds=sender.total_timeout_s + timing.claim_margin_s)
        self._fresh: deque[str] = deque()
        self._wake = asyncio.Event()
        self._sending: dict[asyncio.Task[None], Delivery] = {}
        self._busy: Counter[str] = Counter()
        """Concurrent attempts, by endpoint."""
        self._queued: dict[str, deque[Delivery]] = {}
        """Deliveries that wait until their endpoint is less busy, by endpoint."""
        self._poll_now = False
        self._task: asyncio.Task[None] | None = None
        self.waiting = 0
        """Pending deliveries of the store, counted every `count_every_s`."""
        self._counted_at = -math.inf
        database.after_commit(self._committed, EVENTS)

    # --- For callers ------------------------------------------------------------------------------------------

    async def list(
        self,
        webhook_id: str,
        *,
        state: State | None = None,
        limit: int = 100,
        cursor: str | None = None,
        context: Context | None = None,
    ) -> Page[Delivery]:
        """One page of an endpoint's deliveries, newest first. Raises NotFound."""
        await self._webhooks.get(webhook_id, context=context)
        where: Filter = Where("webhook_id", "==", webhook_id)
        if state is not None:
            where = And(where, Where("state", "==", state))
        query = Query(where, ("-created_at",), limit)
        return await self._database.find(system_context(), Delivery, query, cursor, max_bytes=MAX_PAGE_BYTES)

    async def get(self, id: str, *, context: Context | None = None) -> Delivery:
        """A delivery by its id. Raises NotFound, also for a delivery of another tenant."""
        found = await self._database.get_or_none(system_context(), Delivery, id)
        if found is None or not may_see(context, found.tenant):
            raise NotFound(f"there is no delivery {id!r}")
        return found

    async def redrive(self, id: str, *, context: Context | None = None) -> Delivery:
        """Send a delivery again, with all its retries, under the same event id: a dead letter or a delivered one. A
        pending delivery is attempted now. Raises NotFound; Conflict while the endpoint is disabled."""
        delivery = await self.get(id, context=context)
        webhook = await self._webhooks.get(delivery.webhook_id, context=context)
        if not webhook.enabled:
            raise Conflict(f"the webhook {webhook.id} is disabled: enable it first")

        async def body(tx: Transaction) -> Delivery:
            event = await tx.get_or_none(Event, delivery.event_id)
            if event is None:
                raise NotFound(f"the event {delivery.event_id!r} is not kept any more")
            now = utc_from_us(self._clock.now_us())
            fields = {"state": "pending", "attempts": 0, "due_at": now, "delivered_at": None, "expires_at": now + KEPT}
            await tx.update(Event, event.id, {"expires_at": now + KEPT})
            return await tx.update(Delivery, id, fields)

        made = await self._database.transaction(system_context(), body)
        self.wake()
        return made

    async def test(self, webhook_id: str, *, context: Context | None = None) -> Delivery:
        """Send an endpoint a `webhook.test` event, and return the result of the one attempt: `delivered` or `dead`.
        Raises NotFound, ConfigError without httpx."""
        webhook = await self._webhooks.get(webhook_id, context=context)
        require_httpx()
        now_us = self._clock.now_us()
        ping = event(TEST, webhook.tenant, {"webhook_id": webhook.id}, now_us=now_us, only=webhook.id)
        ping = ping.model_copy(update={"due_at": None})
        delivery = self._delivery(ping, webhook, due_at=utc_from_us(now_us) + self._claim_lasts)

        async def body(tx: Transaction) -> Delivery:
            await tx.create(ping)
            return await tx.create(delivery)

        made = await self._database.transaction(system_context(), body)
        await self.attempts.run(made)
        return await self.get(made.id)

    def wake(self, event_ids: Iterable[str] = ()) -> None:
        """Wake the loop: this process committed these events, or (without ids) something became due."""
        ids = list(event_ids)
        self._fresh.extend(ids[: MAX_FRESH - len(self._fresh)])
        self._poll_now = self._poll_now or not ids
        self._wake.set()

    def _committed(self, transaction: Transaction) -> None:
        ids = [c.operation.id for c in transaction.changes if c.collection.name == EVENTS and c.action == "create"]
        if ids:
            self.wake(ids)

    # --- The loop ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to deliver. Without httpx this process delivers nothing, and logs that once."""
        try:
            require_httpx()
        except ConfigError as error:
            _log.info("%s", error)
            return
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop. Attempts may finish within CLOSE_TIMEOUT_S; the claims of the rest are released for other nodes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self._sending:
            await asyncio.wait(self._sending, timeout=CLOSE_TIMEOUT_S)
        cancelled = dict(self._sending)
        for task in cancelled:
            task.cancel()
        if cancelled:
            await asyncio.wait(cancelled)
        waiting = [delivery for several in self._queued.values() for delivery in several]
        if cancelled or waiting:
            await self._release([*cancelled.values(), *waiting])
        await self._sender.close()

    async def _release(self, deliveries: Iterable[Delivery]) -> None:
        """Make claimed deliveries due at once. If the store does not answer, their claims lapse."""
        now = utc_from_us(self._clock.now_us())
        try:
            async with asyncio.timeout(1.0):
                for delivery in deliveries:
                    await self.attempts.save(delivery, due_at=now)
        except (StrongroomError, TimeoutError) as error:
            _log.info("claims on deliveries could not be released and will lapse: %s", error)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        poll_at = loop.time() + self._timing.first_look_s * random.uniform(1.0, 1.2)  # noqa: S311 - jitter
        while True:
            self._wake.clear()
            try:
                while self._fresh and len(self._sending) < MAX_SENDING:
                    await self._dispatch(self._fresh.popleft(), None)
                await self._send_queued()
                if self._poll_now or loop.time() >= poll_at:
                    self._poll_now = False
                    poll_at = loop.time() + self._timing.poll_s * random.uniform(1.0, 1.2)  # noqa: S311 - jitter
                    poll_at = min(poll_at, loop.time() + await self._poll())
            except Exception as error:
                # Any error: an outbox whose loop has ended would fill up silently.
                level = logging.WARNING if isinstance(error, StrongroomError) else logging.ERROR
                _log.log(level, "webhooks: trying again: %s", error, exc_info=level == logging.ERROR)
                poll_at = loop.time() + self._timing.poll_s
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, poll_at - loop.time())):
                    await self._wake.wait()

    # --- Dispatching events -----------------------------------------------------------------------------------

    async def _dispatch(self, id: str, guard: Check | None) -> None:
        """Commit a delivery for each subscribed endpoint, and send as many of them at once as there is room for."""
        found = await self._database.get_or_none(system_context(), Event, id, fresh=True)
        if found is None or found.due_at is None:
            return  # another node dispatched it
        made = [
            self._delivery(found, webhook, due_at=utc_from_us(self._clock.now_us()))
            for webhook in await self._subscribed(found)
        ]
        claimed: list[Delivery] = []
        for delivery in made:
            if len(self._sending) + len(claimed) < MAX_SENDING and self._has_room(delivery.webhook_id):
                delivery.due_at = utc_from_us(self._clock.now_us()) + self._claim_lasts
                claimed.append(delivery)
        operations: list[Operation] = [] if guard is None else [guard]
        operations.append(Patch(EVENTS, id, {"due_at": None}, found.version))
        first = len(operations)
        operations += [Create(NAME, one.id, Delivery.__codec__.encode(one)) for one in made]
        try:
            committed = await self._database.commit_counters(operations, self._clock.now_us())
        except AlreadyExists:
            # The event was put a second time, and its deliveries exist since the first.
            with suppress(Conflict, NotFound):
                await self._database.commit_counters(operations[:first], self._clock.now_us())
            return
        except (Conflict, NotFound):
            return  # another node dispatched it, or the lease was lost: its next use raises
        for number, delivery in enumerate(made):
            delivery.version = committed.versions[first + number]
        started = {delivery.id for delivery in claimed}
        for delivery in made:
            if delivery.id in started:
                self._start_attempt(delivery)
            else:
                self._queue(delivery)

    async def _subscribed(self, event: Event) -> Sequence[Webhook]:
        tenants = [event.tenant] if event.tenant == ALL_TENANTS else [event.tenant, ALL_TENANTS]
        query = Query(Where("tenant", "in", tenants), limit=2 * MAX_PER_TENANT)
        found = (await self._database.find(system_context(), Webhook, query, fresh=True)).items
        return [webhook for webhook in found if webhook.enabled and webhook.wants(event) and _was_there(webhook, event)]

    def _delivery(self, event: Event, webhook: Webhook, due_at: datetime) -> Delivery:
        return Delivery(
            id=delivery_id(event.id, webhook.id),
            webhook_id=webhook.id,
            tenant=webhook.tenant,
            event_id=event.id,
            event_type=event.type,
            due_at=due_at,
            expires_at=event.expires_at,
        )

    # --- Due events and deliveries ----------------------------------------------------------------------------

    async def _poll(self) -> float:
        """Dispatch and attempt what is due, under the job lease; returns in how many seconds to poll again."""
        if not self._webhooks.subscriptions:
            self.waiting = 0
            return self._timing.poll_s  # without endpoints nothing can be delivered
        await self._count()
        due_s = min(await self._due_in_s(Event), await self._due_in_s(Delivery))
        if due_s > 0:
            return min(self._timing.poll_s, due_s)
        lease = await self._leases.acquire(JOB)
        if lease is None:
            return self._timing.poll_s
        try:
            await self._do_due(lease)
        except JobLeaseLost:
            return 0.0
        except BaseException:
            await self._release_lease(lease)
            raise
        await lease.release(done=True)
        return min(self._timing.poll_s, max(0.0, await self._due_in_s(Delivery)))

    async def _count(self) -> None:
        """Count the pending deliveries, if the last count was long ago."""
        now = asyncio.get_running_loop().time()
        if now - self._counted_at < self._timing.count_every_s:
            return
        self._counted_at = now
        where = Where("due_at", ">", utc_from_us(0))  # it is null once a delivery is delivered or dead
        found = await self._database.aggregate(system_context(), Delivery, Aggregate("count"), where=where)
        self.waiting = found["count"]

    async def _release_lease(self, lease: AcquiredLease) -> None:
        try:
            async with asyncio.timeout(1.0):
                await lease.release(done=False)
        except (StrongroomError, TimeoutError) as error:
            _log.info("the lease of the job %r could not be released and will expire: %s", JOB, error)

    async def _do_due(self, lease: AcquiredLease) -> None:
        while True:
            # Events that this node just committed do not wait behind the due work of other nodes.
            while self._fresh and len(self._sending) < MAX_SENDING:
                await self._dispatch(self._fresh.popleft(), None)
            events = await self._due(Event)
            for one in events:
                await self._dispatch(one.id, lease.guard)
            deliveries = await self._due(Delivery)
            if not events and not deliveries:
                return
            for delivery in deliveries:
                await self._claim(delivery, lease)
            if len(self._sending) >= MAX_SENDING:
                await asyncio.wait(self._sending, timeout=SAVE_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            await self._count()
            await lease.save(None)  # raises if the lease was lost; then the commits above failed

    async def _claim(self, delivery: Delivery, lease: AcquiredLease) -> None:
        """Claim a due delivery, and start an attempt, or queue it if its endpoint is busy. Both move `due_at`, so that
        the poll finds the deliveries behind it. A queued delivery is sent by this process once the endpoint has room,
        by any other process once it is due again."""
        now = utc_from_us(self._clock.now_us())
        if len(self._sending) >= MAX_SENDING:
            return  # it stays due
        has_room = self._has_room(delivery.webhook_id)
        again_s = self._sender.total_timeout_s * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
        wait = self._claim_lasts if has_room else timedelta(seconds=again_s)
        if not await self.attempts.save(delivery, guard=lease.guard, due_at=now + wait):
            return
        if has_room:
            self._start_attempt(delivery)
        else:
            self._queue(delivery)

    async def _due(self, cls: type[E]) -> Sequence[E]:
        now = utc_from_us(self._clock.now_us())
        query = Query(Where("due_at", "<=", now), ("due_at",), PAGE)
        return (await self._database.find(system_context(), cls, query, fresh=True)).items

    async def _due_in_s(self, cls: type[Event] | type[Delivery]) -> float:
        """In how many seconds the first one is due; infinity if there is none."""
        query = Query(Where("due_at", ">", utc_from_us(0)), ("due_at",), 1)
        for one in (await self._database.find(system_context(), cls, query, fresh=True)).items:
            if one.due_at is not None:
                return (us_from_utc(one.due_at) - self._clock.now_us()) / 1_000_000
        return math.inf

    # --- Attempts ---------------------------------------------------------------------------------------------

    def _queue(self, delivery: Delivery) -> None:
        """Send this delivery when its endpoint is less busy."""
        if sum(map(len, self._queued.values())) < MAX_QUEUED:
            self._queued.setdefault(delivery.webhook_id, deque()).append(delivery)

    async def _send_queued(self) -> None:
        """Start queued attempts whose endpoint has room now, unless another node claimed them."""
        for webhook_id, several in list(self._queued.items()):
            while several and self._has_room(webhook_id) and len(self._sending) < MAX_SENDING:
                delivery = several.popleft()
                due_at = utc_from_us(self._clock.now_us()) + self._claim_lasts
                if await self.attempts.save(delivery, due_at=due_at):
                    self._start_attempt(delivery)
            if not several:
                self._queued.pop(webhook_id, None)

    def _has_room(self, webhook_id: str) -> bool:
        return self._busy[webhook_id] < MAX_SENDING_EACH

    def _start_attempt(self, delivery: Delivery) -> None:
        task = asyncio.get_running_loop().create_task(self.attempts.run(delivery))
        self._sending[task] = delivery
        self._busy[delivery.webhook_id] += 1
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        delivery = self._sending.pop(task)
        self._busy[delivery.webhook_id] -= 1
        if not self._busy[delivery.webhook_id]:
            del self._busy[delivery.webhook_id]
        if self._fresh or self._queued:
            self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("an attempt at %s failed and is retried later", delivery.id, exc_info=error)


def _was_there(webhook: Webhook, event: Event) -> bool:
    """Whether the endpoint existed when the event happened, by clocks that differ by at most MAX_SKEW."""
    if webhook.created_at is None or event.created_at is None:
        return True
    return webhook.created_at <= event.created_at + MAX_SKEW


__all__ = ["Deliveries", "Delivery", "Timing"]
