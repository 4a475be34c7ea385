"""Deliveries of events to webhooks: an outbox, sent soon, tried again for a day, then a dead letter.

How nothing is lost or told under two ids. An event is committed with its cause (`outbox.py`). Whoever takes it up
commits, in one batch, that it was taken up and one delivery for each endpoint that wants it. A delivery is claimed by
moving its `due_at` past the time that an attempt can take, under the version it was read at: of two nodes one succeeds.
If that node dies, the claim lapses and another takes over. So an endpoint hears of an event at least once, sometimes
twice, and always under the event's own id.

Who does it. The node that committed an event takes it up at once. What is due otherwise (repeats, and what a node that
died left behind) is looked for by every node, but claimed under a lease, by one at a time; each claim carries the
lease's guard. The result of an attempt is written under the claim's own version instead: it is worth keeping even if
the lease has changed hands meanwhile, and is refused once someone else has claimed the delivery.
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
from ..jobs import LeaseLost, Leases, Turn
from ..storage.port import Check, Create, Operation, Patch
from .delivery_attempt import DEFAULT_TIMING, NAME, Attempts, Delivery, State, Timing
from .endpoints import MAX_PER_TENANT, Webhook, Webhooks
from .http_sender import Sender, require_httpx

JOB = "webhook-deliveries"
MAX_SENDING = 64
"""Attempts under way at once in one process; of one endpoint MAX_SENDING_EACH, so that one that hangs leaves room."""
MAX_SENDING_EACH = 4
MAX_PUT_OFF = 10_000
"""Deliveries that this process remembers as waiting for a busy endpoint; further ones become due by themselves."""
MAX_FRESH = 10_000
"""Events of this process that wait to be taken up at once; further ones are found like those of others."""
PAGE = 100
MAX_SKEW = timedelta(minutes=1)
"""An endpoint hears of what happened since it was made, and of so much before."""
SAVE_EVERY_S = 4.0
CLOSE_TIMEOUT_S = 3.0
E = TypeVar("E", bound=Entity)
_log = logging.getLogger(__name__)


def delivery_id(event_id: str, webhook_id: str) -> str:
    """One event goes to one endpoint once, however often it is taken up."""
    return "dlv_" + hashlib.sha256(f"{event_id}\x00{webhook_id}".encode()).hexdigest()[:31]


class Deliveries:
    """The outbox of one store, as one node works on it. `start` after everything else is there; `close` before."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        leases: Leases,
        webhooks: Webhooks,
        sender: Sender,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self._database = database
        self._clock = clock
        self._leases = leases
        self._webhooks = webhooks
        self._sender = sender
        self._timing = timing
        self.attempts = Attempts(database, clock, webhooks, sender, timing)
        self._claim = timedelta(seconds=sender.total_timeout_s + timing.claim_margin_s)
        self._fresh: deque[str] = deque()
        self._wake = asyncio.Event()
        self._sending: dict[asyncio.Task[None], Delivery] = {}
        self._busy: Counter[str] = Counter()
        """Attempts under way, by endpoint."""
        self._put_off: dict[str, deque[Delivery]] = {}
        """Deliveries that wait until their endpoint has room, by endpoint."""
        self._look_now = False
        self._task: asyncio.Task[None] | None = None
        self.waiting = 0
        """Deliveries of the store that are neither delivered nor dead, as counted every `count_every_s`."""
        self._counted_at = -math.inf
        database.after_commit(self._committed)

    # --- What callers do --------------------------------------------------------------------------------------

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
        """A delivery by its id. NotFound for another tenant's too."""
        found = await self._database.get_or_none(system_context(), Delivery, id)
        if found is None or not may_see(context, found.tenant):
            raise NotFound(f"there is no delivery {id!r}")
        return found

    async def redrive(self, id: str, *, context: Context | None = None) -> Delivery:
        """Send a delivery again from the beginning, under the same event id: a dead letter, or one that arrived. One
        that waits for its next attempt is attempted now. Raises NotFound; Conflict while the endpoint is disabled."""
        delivery = await self.get(id, context=context)
        webhook = await self._webhooks.get(delivery.webhook_id, context=context)
        if not webhook.enabled:
            raise Conflict(f"the webhook {webhook.id} is disabled: enable it first")

        async def body(tx: Transaction) -> Delivery:
            cause = await tx.get_or_none(Event, delivery.event_id)
            if cause is None:
                raise NotFound(f"the event {delivery.event_id!r} is not kept any more")
            now = utc_from_us(self._clock.now_us())
            fields = {"state": "pending", "attempts": 0, "due_at": now, "delivered_at": None, "expires_at": now + KEPT}
            await tx.update(Event, cause.id, {"expires_at": now + KEPT})
            return await tx.update(Delivery, id, fields)

        made = await self._database.transaction(system_context(), body)
        self.wake()
        return made

    async def test(self, webhook_id: str, *, context: Context | None = None) -> Delivery:
        """Send an endpoint a `webhook.test` event and wait for what comes of it: one attempt, `delivered` or `dead`.
        Raises NotFound, ConfigError without httpx."""
        webhook = await self._webhooks.get(webhook_id, context=context)
        require_httpx()
        now_us = self._clock.now_us()
        ping = event(TEST, webhook.tenant, {"webhook_id": webhook.id}, now_us=now_us, only=webhook.id)
        ping = ping.model_copy(update={"due_at": None})
        delivery = self._delivery(ping, webhook, due_at=utc_from_us(now_us) + self._claim)

        async def body(tx: Transaction) -> Delivery:
            await tx.create(ping)
            return await tx.create(delivery)

        made = await self._database.transaction(system_context(), body)
        await self.attempts.make(made)
        return await self.get(made.id)

    def wake(self, event_ids: Iterable[str] = ()) -> None:
        """Look now: these events were committed by this process, or something else became due."""
        ids = list(event_ids)
        self._fresh.extend(ids[: MAX_FRESH - len(self._fresh)])
        self._look_now = self._look_now or not ids
        self._wake.set()

    def _committed(self, transaction: Transaction) -> None:
        ids = [c.operation.id for c in transaction.changes if c.collection.name == EVENTS and c.action == "create"]
        if ids:
            self.wake(ids)

    # --- The work ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to deliver. Without httpx nothing is delivered by this process, which is logged once."""
        try:
            require_httpx()
        except ConfigError as error:
            _log.info("%s", error)
            return
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop: what is under way may end within CLOSE_TIMEOUT_S; the rest is given back for others to do."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self._sending:
            await asyncio.wait(self._sending, timeout=CLOSE_TIMEOUT_S)
        given_up = dict(self._sending)
        for task in given_up:
            task.cancel()
        if given_up:
            await asyncio.wait(given_up)
        waiting = [delivery for several in self._put_off.values() for delivery in several]
        if given_up or waiting:
            await self._give_back([*given_up.values(), *waiting])
        await self._sender.close()

    async def _give_back(self, deliveries: Iterable[Delivery]) -> None:
        """Make what was claimed and not done due at once. What this fails for becomes due by itself."""
        now = utc_from_us(self._clock.now_us())
        try:
            async with asyncio.timeout(1.0):
                for delivery in deliveries:
                    await self.attempts.save(delivery, due_at=now)
        except (StrongroomError, TimeoutError) as error:
            _log.info("claims on deliveries could not be given back, they lapse: %s", error)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        look_at = loop.time() + self._timing.first_look_s * random.uniform(1.0, 1.2)  # noqa: S311 - jitter
        while True:
            self._wake.clear()
            try:
                while self._fresh and len(self._sending) < MAX_SENDING:
                    await self._take_up(self._fresh.popleft(), None)
                await self._send_put_off()
                if self._look_now or loop.time() >= look_at:
                    self._look_now = False
                    look_at = loop.time() + self._timing.poll_s * random.uniform(1.0, 1.2)  # noqa: S311 - jitter
                    look_at = min(look_at, loop.time() + await self._sweep())
            except Exception as error:
                # Whatever it is: an outbox that nobody works on any more would fill up silently.
                level = logging.WARNING if isinstance(error, StrongroomError) else logging.ERROR
                _log.log(level, "webhooks: trying again: %s", error, exc_info=level == logging.ERROR)
                look_at = loop.time() + self._timing.poll_s
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, look_at - loop.time())):
                    await self._wake.wait()

    # --- Taking events up -------------------------------------------------------------------------------------

    async def _take_up(self, id: str, guard: Check | None) -> None:
        """Commit a delivery for each endpoint that wants the event, and begin to send as many as there is room for."""
        found = await self._database.get_or_none(system_context(), Event, id, fresh=True)
        if found is None or found.due_at is None:
            return  # it was taken up by another node
        made = [
            self._delivery(found, webhook, due_at=utc_from_us(self._clock.now_us()))
            for webhook in await self._wanting(found)
        ]
        claimed: list[Delivery] = []
        for delivery in made:
            if len(self._sending) + len(claimed) < MAX_SENDING and self._has_room(delivery.webhook_id):
                delivery.due_at = utc_from_us(self._clock.now_us()) + self._claim
                claimed.append(delivery)
        operations: list[Operation] = [] if guard is None else [guard]
        operations.append(Patch(EVENTS, id, {"due_at": None}, found.version))
        first = len(operations)
        operations += [Create(NAME, one.id, Delivery.__codec__.encode(one)) for one in made]
        try:
            committed = await self._database.commit_counters(operations, self._clock.now_us())
        except AlreadyExists:
            # The event was put a second time: what is sent of it was made at the first.
            with suppress(Conflict, NotFound):
                await self._database.commit_counters(operations[:first], self._clock.now_us())
            return
        except (Conflict, NotFound):
            return  # another node was faster, and tells; or the lease was lost, which its next use tells
        for number, delivery in enumerate(made):
            delivery.version = committed.versions[first + number]
        begun = {delivery.id for delivery in claimed}
        for delivery in made:
            if delivery.id in begun:
                self._begin(delivery)
            else:
                self._remember(delivery)

    async def _wanting(self, event: Event) -> Sequence[Webhook]:
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

    # --- What is due ------------------------------------------------------------------------------------------

    async def _sweep(self) -> float:
        """Take up and attempt what is due and nobody else works on; returns in how many seconds to look again."""
        if not self._webhooks.any:
            self.waiting = 0
            return self._timing.poll_s  # what was left behind concerns nobody
        await self._count()
        due_s = min(await self._due_in_s(Event), await self._due_in_s(Delivery))
        if due_s > 0:
            return min(self._timing.poll_s, due_s)
        turn = await self._leases.acquire(JOB)
        if turn is None:
            return self._timing.poll_s
        try:
            await self._work(turn)
        except LeaseLost:
            return 0.0
        except BaseException:
            await self._return_lease(turn)
            raise
        await turn.give_back(done=True)
        return min(self._timing.poll_s, max(0.0, await self._due_in_s(Delivery)))

    async def _count(self) -> None:
        """Count what waits, if that was long ago."""
        now = asyncio.get_running_loop().time()
        if now - self._counted_at < self._timing.count_every_s:
            return
        self._counted_at = now
        where = Where("due_at", ">", utc_from_us(0))  # it is null once a delivery has ended
        found = await self._database.aggregate(system_context(), Delivery, Aggregate("count"), where=where)
        self.waiting = found["count"]

    async def _return_lease(self, turn: Turn) -> None:
        try:
            async with asyncio.timeout(1.0):
                await turn.give_back(done=False)
        except (StrongroomError, TimeoutError) as error:
            _log.info("the lease of %r could not be given back, it ends by itself: %s", JOB, error)

    async def _work(self, turn: Turn) -> None:
        while True:
            # What this node has just committed itself is not left to wait for what is due of others.
            while self._fresh and len(self._sending) < MAX_SENDING:
                await self._take_up(self._fresh.popleft(), None)
            events = await self._due(Event)
            for one in events:
                await self._take_up(one.id, turn.guard)
            deliveries = await self._due(Delivery)
            if not events and not deliveries:
                return
            for delivery in deliveries:
                await self._claim_one(delivery, turn)
            if len(self._sending) >= MAX_SENDING:
                await asyncio.wait(self._sending, timeout=SAVE_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            await self._count()
            await turn.save(None)  # raises if the lease was lost, for which nothing above succeeded

    async def _claim_one(self, delivery: Delivery, turn: Turn) -> None:
        """Begin an attempt. If its endpoint is busy, put it off, so that the search finds the deliveries behind it.

        This process sends it as soon as the endpoint has room, any other process once it is due again."""
        now = utc_from_us(self._clock.now_us())
        if len(self._sending) >= MAX_SENDING:
            return  # it stays due
        has_room = self._has_room(delivery.webhook_id)
        wait = self._claim if has_room else timedelta(seconds=self._sender.total_timeout_s * random.uniform(0.5, 1.5))  # noqa: S311
        if not await self.attempts.save(delivery, guard=turn.guard, due_at=now + wait):
            return
        if has_room:
            self._begin(delivery)
        else:
            self._remember(delivery)

    async def _due(self, cls: type[E]) -> Sequence[E]:
        now = utc_from_us(self._clock.now_us())
        query = Query(Where("due_at", "<=", now), ("due_at",), PAGE)
        return (await self._database.find(system_context(), cls, query, fresh=True)).items

    async def _due_in_s(self, cls: type[Event] | type[Delivery]) -> float:
        """In how many seconds the first is due; without end if none is."""
        query = Query(Where("due_at", ">", utc_from_us(0)), ("due_at",), 1)
        for one in (await self._database.find(system_context(), cls, query, fresh=True)).items:
            if one.due_at is not None:
                return (us_from_utc(one.due_at) - self._clock.now_us()) / 1_000_000
        return math.inf

    # --- One attempt ------------------------------------------------------------------------------------------

    def _remember(self, delivery: Delivery) -> None:
        """Send this delivery when its endpoint has room."""
        if sum(map(len, self._put_off.values())) < MAX_PUT_OFF:
            self._put_off.setdefault(delivery.webhook_id, deque()).append(delivery)

    async def _send_put_off(self) -> None:
        """Begin attempts that were put off and whose endpoint has room now, unless another node has claimed them."""
        for webhook_id, several in list(self._put_off.items()):
            while several and self._has_room(webhook_id) and len(self._sending) < MAX_SENDING:
                delivery = several.popleft()
                due_at = utc_from_us(self._clock.now_us()) + self._claim
                if await self.attempts.save(delivery, due_at=due_at):
                    self._begin(delivery)
            if not several:
                self._put_off.pop(webhook_id, None)

    def _has_room(self, webhook_id: str) -> bool:
        return self._busy[webhook_id] < MAX_SENDING_EACH

    def _begin(self, delivery: Delivery) -> None:
        task = asyncio.get_running_loop().create_task(self.attempts.make(delivery))
        self._sending[task] = delivery
        self._busy[delivery.webhook_id] += 1
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        delivery = self._sending.pop(task)
        self._busy[delivery.webhook_id] -= 1
        if not self._busy[delivery.webhook_id]:
            del self._busy[delivery.webhook_id]
        if self._fresh or self._put_off:
            self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("an attempt at %s failed, it is made again later", delivery.id, exc_info=error)


def _was_there(webhook: Webhook, event: Event) -> bool:
    """Whether the endpoint had been made when the event happened, by clocks that may differ a little."""
    if webhook.created_at is None or event.created_at is None:
        return True
    return webhook.created_at <= event.created_at + MAX_SKEW


__all__ = ["Deliveries", "Delivery", "Timing"]
