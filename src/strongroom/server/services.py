"""What the routes work with: the opened store and this process's own counters, bounds and watchers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..app import Strongroom
from ..errors import StrongroomError, TooManyRequests
from ..transaction import Transaction
from .auth import Authenticator
from .errors import ShuttingDown
from .metrics import Metrics
from .signers import Signers
from .verify import Gate

MAX_BATCH_ITEMS = 1_000
"""Verifications in one `verify:batch`."""
MAX_USAGE_ITEMS = 10_000
"""Events in one `usage:batch`."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one process takes on at once."""

    max_body_bytes: int = 1_048_576
    max_concurrency: int = 1_000
    max_watchers: int = 200


@dataclass(slots=True)
class Services:
    """One server process: built by `server.app.build`, handed to every route."""

    room: Strongroom
    bounds: Bounds
    access_log: bool = False
    signers: Signers | None = None
    metrics: Metrics = field(init=False)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    watchers: int = 0
    authenticator: Authenticator = field(init=False)
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.room.store.metrics)
        self.authenticator = Authenticator(self.room.keys)
        self.gate = Gate(self.bounds.max_concurrency)
        self.room.database.after_commit(self._committed)
        metrics = self.metrics
        metrics.gauge("strongroom_requests_in_work", "Requests being answered.", lambda: self.gate.inside)
        room = self.room
        metrics.gauge(
            "strongroom_feed_behind_seconds", "Age of what is known of others' changes.", lambda: room.feed.behind_s
        )
        metrics.gauge(
            "strongroom_clock_offset_seconds",
            "The store's clock minus this machine's.",
            lambda: room.clock.state().offset_us / 1_000_000,
        )
        metrics.gauge(
            "strongroom_clock_uncertainty_seconds",
            "How far the store's time, as this process knows it, may be off.",
            lambda: room.clock.state().uncertainty_us / 1_000_000,
        )
        metrics.counter("strongroom_retries", "Done again because another was faster.", "what", self._retries)
        lending = room.ledger.lending
        if lending is not None:
            metrics.gauge("strongroom_limit_leases", "Keys and quotas with a leased share.", lambda: lending.leases)
            metrics.gauge("strongroom_reservations", "Reservations that are open in memory.", lambda: lending.holds)
        metrics.counter(
            "strongroom_webhook_attempts",
            "Attempts at webhooks: delivered, failed (made again later), dead (given up).",
            "result",
            lambda: room.deliveries.attempts.counts,
        )
        metrics.gauge(
            "strongroom_webhook_deliveries_waiting",
            "Deliveries of the store that are neither delivered nor dead.",
            lambda: room.deliveries.waiting,
        )
        metrics.gauge("strongroom_watchers", "Streams of changes that are open.", lambda: self.watchers)

    def _committed(self, transaction: Transaction) -> None:
        for change in transaction.changes:
            self.metrics.write(change.collection.name, change.action)

    def _retries(self) -> Mapping[str, float]:
        return {**self.room.database.retries, "usage": self.room.ledger.retries}

    def enter_watcher(self) -> None:
        """Take a watcher's place. Raises TooManyRequests, ShuttingDown."""
        if self.closing.is_set():
            raise ShuttingDown
        if self.watchers >= self.bounds.max_watchers:
            raise TooManyRequests(f"{self.watchers} streams are open, which is as many as this server keeps")
        self.watchers += 1

    def leave_watcher(self) -> None:
        self.watchers -= 1

    def close(self) -> None:
        """The server is to stop: end the streams, which would never end by themselves."""
        self.closing.set()


__all__ = ["Bounds", "Services", "StrongroomError"]
