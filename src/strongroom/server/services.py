"""The routes' services: the opened store and this process's counters, bounds and watchers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastapi import Request

from ..app import Strongroom
from ..client_address import Network
from ..database import Transaction
from ..errors import Denied, StrongroomError, TenantSuspended, TooManyRequests
from ..tenants import SignIn
from .auth import Authenticator, Caller
from .errors import ShuttingDown
from .idempotent_calls import Answers
from .metrics import Metrics
from .signers import Signers
from .verify import Gate

MAX_BATCH_ITEMS = 1_000
"""Verifications in one `verify:batch`."""
HEALTH_PLACES = 100
"""Concurrent requests to `/healthz`, `/readyz` and `/metrics`."""
MAX_USAGE_ITEMS = 10_000
"""Events in one `usage:batch`."""

_log = logging.getLogger(__name__)
CALLERS_SHARE = 4
"""A caller with one in this many of the places, for requests or streams, may not take the last of them."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of one process."""

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
    proxies: Sequence[Network] = ()
    metrics: Metrics = field(init=False)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    watchers_of: dict[str, int] = field(default_factory=dict)
    """Open streams by their reader: a tenant, for all its keys, or a key without a tenant."""
    requests_of: dict[str, int] = field(default_factory=dict)
    """Requests in work by their sender, like the streams."""
    authenticator: Authenticator = field(init=False)
    gate: Gate = field(init=False)
    answers: Answers = field(init=False)
    verify_gate: Gate = field(init=False)
    health_gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.room.store.metrics)
        self.authenticator = Authenticator(self.room.keys, self.proxies, self.room.sign_in)
        self.gate = Gate(self.bounds.max_concurrency)
        self.answers = Answers(self.room.database)
        self.verify_gate = Gate(self.bounds.max_concurrency)
        self.health_gate = Gate(HEALTH_PLACES)
        self.room.database.after_commit(self._committed)
        metrics = self.metrics
        gates = (self.gate, self.verify_gate, self.health_gate)
        metrics.gauge(
            "strongroom_requests_in_work", "Requests being answered.", lambda: sum(gate.inside for gate in gates)
        )
        room = self.room
        metrics.gauge(
            "strongroom_feed_behind_seconds",
            "Age of the last read of the change feed.",
            lambda: room.feed.behind_s,
            largest=True,
        )
        metrics.gauge(
            "strongroom_clock_offset_seconds",
            "The store's clock minus this machine's.",
            lambda: room.clock.state().offset_us / 1_000_000,
            largest=True,
        )
        metrics.gauge(
            "strongroom_clock_uncertainty_seconds",
            "The largest error of this process's estimate of the store's time.",
            lambda: room.clock.state().uncertainty_us / 1_000_000,
            largest=True,
        )
        if room.sign_in is not None:
            _measure_sign_in(metrics, room.sign_in)
        metrics.counter("strongroom_retries", "Retries after a conflict with another writer.", "what", self._retries)
        lease_manager = room.ledger.lease_manager
        if lease_manager is not None:
            metrics.gauge(
                "strongroom_limit_leases",
                "Keys and quotas with a limit lease of this process.",
                lambda: lease_manager.leases,
            )
            metrics.gauge("strongroom_reservations", "Open reservations in memory.", lambda: lease_manager.holds)
        metrics.counter(
            "strongroom_webhook_attempts",
            "Delivery attempts: delivered, failed (retried later), dead (given up).",
            "result",
            lambda: room.deliveries.attempts.counts,
        )
        metrics.gauge(
            "strongroom_webhook_deliveries_waiting",
            "Pending deliveries in the store.",
            lambda: room.deliveries.waiting,
            largest=True,
        )
        sealer = room.sealer
        metrics.gauge(
            "strongroom_sealing_lag_seconds",
            "How long the oldest record that is not sealed has been waiting.",
            lambda: sealer.behind_s,
            largest=True,
        )
        metrics.gauge(
            "strongroom_sealing_round_lag_seconds",
            "Age of the oldest record of the last round when it was sealed.",
            lambda: sealer.lag_s,
            largest=True,
        )
        metrics.gauge(
            "strongroom_sealing_unsealed_records",
            "Committed records that wait to be sealed.",
            lambda: sealer.unsealed,
            largest=True,
        )
        metrics.counter(
            "strongroom_sealed", "Rounds of sealing, and the records that they sealed.", "what", sealer.counts
        )
        witnesses = room.witnesses
        if witnesses is not None:
            metrics.counter(
                "strongroom_witness_submissions",
                "Checkpoints submitted to witnesses: cosigned, failed.",
                "result",
                lambda: witnesses.counts,
            )
        metrics.gauge("strongroom_watchers", "Open streams of changes.", lambda: self.watchers)
        writes, suspended = room.database.writes, room.suspended
        metrics.gauge(
            "strongroom_writes_off",
            "Whether writes of all tenants are off: 1, else 0.",
            lambda: float(writes.refusal is not None or writes.why_off() is not None),
            largest=True,
        )
        metrics.gauge(
            "strongroom_tenants_off",
            "Tenants whose own writes are off.",
            lambda: writes.tenants_off,
            largest=True,
        )
        metrics.gauge(
            "strongroom_tenants_suspended",
            "Tenants that are suspended or being deleted.",
            lambda: len(suspended.sentences),
            largest=True,
        )
        denials = room.database.denials
        metrics.labelled_counter(
            "strongroom_denials", "Calls that the rules refused.", ("operation", "collection"), lambda: denials.counts
        )
        metrics.counter(
            "strongroom_cross_tenant_attempts",
            "Denied calls of callers that belong to another tenant than they named.",
            "collection",
            lambda: denials.cross_tenant,
        )
        metrics.labelled_counter(
            "strongroom_audit_write_failures",
            "Records of denials that could not be written (the record of a change is written with the change).",
            (),
            lambda: {(): denials.failures},
        )

    @property
    def watchers(self) -> int:
        return sum(self.watchers_of.values())

    def _committed(self, transaction: Transaction) -> None:
        for change in transaction.changes:
            self.metrics.write(change.collection.name, change.action)

    def _retries(self) -> Mapping[str, float]:
        return {**self.room.database.retries, "usage": self.room.ledger.retries}

    async def record_denial(self, error: StrongroomError, caller: Caller | None, method: str, route: str) -> None:
        """Journal a refusal that no rule has journalled: a scope that is too small, or what one tenant's callers may
        not do. It has the request's method and route for an operation and a collection."""
        if not isinstance(error, Denied) or isinstance(error, TenantSuspended) or error.details.get("recorded"):
            return
        if caller is None:
            return
        database = self.room.database
        context = database.at_now(caller.context(caller.tenant, ""))
        try:
            await database.denials.note(context, method, route, "", error.message)
        except StrongroomError as failed:  # the caller is refused either way
            _log.warning("a denial of %s is not in the journal: %s", caller.actor, failed)

    def enter(self, caller: Caller) -> str:
        """Count a request inside the gate for this caller; returns the value for `leave`. Raises TooManyRequests.

        The last quarter of the places is reserved for callers with less than a quarter. So one caller whose bodies
        never arrive cannot take all places.
        """
        who = _who(caller)
        own, share = self.requests_of.get(who, 0), self.gate.limit // CALLERS_SHARE
        if own >= share > 0 and self.gate.limit - self.gate.inside < share:
            raise TooManyRequests(
                f"{own} requests of this caller are in work; the remaining capacity is reserved for others"
            )
        self.requests_of[who] = own + 1
        return who

    def leave(self, who: str) -> None:
        self.requests_of[who] -= 1
        if not self.requests_of[who]:
            del self.requests_of[who]

    def enter_watcher(self, caller: Caller) -> str:
        """Take a watcher's place; returns the value that gives it back. Raises TooManyRequests, ShuttingDown.

        The last quarter of the places is reserved for callers with less than a quarter, so one caller cannot take all.
        """
        if self.closing.is_set():
            raise ShuttingDown
        if self.watchers >= self.bounds.max_watchers:
            raise TooManyRequests(f"{self.watchers} streams are open, the most that this server accepts")
        who = _who(caller)
        own, share = self.watchers_of.get(who, 0), self.bounds.max_watchers // CALLERS_SHARE
        if own >= max(1, share) and self.bounds.max_watchers - self.watchers <= share:
            raise TooManyRequests(
                f"{own} streams of this caller are open; the remaining capacity is reserved for others"
            )
        self.watchers_of[who] = own + 1
        return who

    def leave_watcher(self, who: str) -> None:
        self.watchers_of[who] -= 1
        if not self.watchers_of[who]:
            del self.watchers_of[who]

    def close(self) -> None:
        """End the streams, because the server stops and a stream never ends by itself."""
        self.closing.set()


def _measure_sign_in(metrics: Metrics, sign_in: SignIn) -> None:
    metrics.counter(
        "strongroom_tokens",
        "Tokens that were verified: accepted, refused, unavailable (the issuer's keys or the store).",
        "result",
        lambda: sign_in.results,
    )
    metrics.gauge(
        "strongroom_token_keys_age_seconds",
        "Time since the token issuer's keys were read.",
        lambda: math.inf if (age_s := sign_in.state().age_s) is None else age_s,
        largest=True,
    )


def services_of(request: Request) -> Services:
    """The services of the request's application. Handlers are module-level functions and have no other access."""
    services: Services = request.app.state.services
    return services


def _who(caller: Caller) -> str:
    """The owner of a share of the places: the tenant, for all its keys; without a tenant, the key."""
    return f"tenant:{caller.tenant}" if caller.tenant is not None else caller.actor


__all__ = ["Bounds", "Services", "services_of"]
