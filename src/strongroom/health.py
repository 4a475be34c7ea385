"""What an operator should see: each thing that this process depends on, whether it is well, and how quick it is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .cache import Cache
from .clock import MachineClock, StoreClock
from .context import utc_from_us
from .database import WriteState
from .jobs.maintenance import Background
from .jobs.sealing import Sealing
from .journal import ChangeFeed
from .journal.signing_key import SigningKeys
from .storage.port import Health, Store
from .tenants import SignIn

CHECK_TIMEOUT_S = 5.0
DEGRADED_S = 0.5
"""A dependency that answers, but later than this, is degraded."""
FEED_LATE_S = 0.75
"""Where the feed of changes is further behind than this, keys in memory are not believed without asking the store."""
SEALING_LATE_S = 10.0
"""A record that waits longer to be sealed is reported: another node would have taken over by then."""
MAX_PROBLEMS = 20
MISSED_PERIODS = 3
"""Background work that was not done by any node for so many of its periods is said to be late."""

Status = Literal["ok", "degraded", "unavailable"]


@dataclass(frozen=True, slots=True)
class Dependency:
    """How one thing is. `kind`: which implementation it is. `latency_s`: how long it took to answer, where it is asked.
    `details` are for operators only."""

    status: Status
    kind: str
    latency_s: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


async def of_store(store: Store) -> Dependency:
    """Ask the store; one that does not answer in CHECK_TIMEOUT_S is unavailable."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            health = await store.check()
    except TimeoutError:
        health = Health(False, CHECK_TIMEOUT_S, {"error": f"no answer within {CHECK_TIMEOUT_S} s"})
    status: Status = "unavailable" if not health.ok else "degraded" if health.latency_s > DEGRADED_S else "ok"
    return Dependency(status, store.capabilities.name, health.latency_s, health.details)


def of_cache(cache: Cache) -> Dependency:
    """Whether Redis is in use, and what the cache has spared. Without it reads are slower, never wrong."""
    state = cache.redis_state
    details = {"redis": state, **asdict(cache.stats)}
    kind = "memory" if state == "none" else "redis"
    return Dependency("ok" if state in ("none", "closed") else "degraded", kind, 0.0, details)


def of_feed(feed: ChangeFeed) -> Dependency:
    """How far this process is behind what others have committed."""
    behind_s = feed.behind_s
    return Dependency("degraded" if behind_s > FEED_LATE_S else "ok", "journal", behind_s)


def of_clock(clock: MachineClock | StoreClock) -> Dependency:
    """How well the store's time is known."""
    state = clock.state()
    details = {
        "offset_ms": state.offset_us / 1_000,
        "uncertainty_ms": state.uncertainty_us / 1_000,
        "asked_s_ago": round(state.age_s, 3),
    }
    kind = "store" if isinstance(clock, StoreClock) else "machine"
    return Dependency("degraded" if state.degraded else "ok", kind, state.uncertainty_us / 1_000_000, details)


def of_sign_in(sign_in: SignIn) -> Dependency:
    """Whether the token issuer's keys are known and current. Without them tokens are refused, and keys work as ever."""
    state = sign_in.state()
    details = {
        "jwks": state.place,
        "keys": state.keys,
        "read_s_ago": None if state.age_s is None else round(state.age_s, 3),
        "error": state.error,
    }
    return Dependency("degraded" if state.error is not None or not state.keys else "ok", "jwt", 0.0, details)


def of_background(background: Background, now_us: int) -> Dependency:
    """Who does the background work, and when it was done last, by any node."""
    details: dict[str, Any] = {}
    late = False
    for job in background.jobs:
        state = background.leases.jobs.get(job.name)
        if state is None:
            details[job.name] = {"state": "not looked at yet"}
            continue
        done_us = state.done_us
        overdue = done_us is not None and now_us - done_us > MISSED_PERIODS * job.every_s * 1_000_000
        late = late or overdue or state.error is not None
        details[job.name] = {
            "holder": state.holder or None,
            "token": state.token,
            "last_success": None if done_us is None else utc_from_us(done_us).isoformat(),
            "error": state.error,
        }
    return Dependency("degraded" if late else "ok", "leases", 0.0, details)


def of_writes(writes: WriteState, suspended: int) -> Dependency:
    """Whether anything turns writes off, for all tenants or some."""
    why = writes.refusal or writes.why_off()
    details = {
        "allowed": why is None,
        "usage": writes.usage_of_all,
        "reason": why,
        "tenants_off": writes.tenants_off,
        "tenants_suspended": suspended,
    }
    kind = "migration" if writes.refusal is not None else "switch"
    return Dependency("ok" if why is None else "degraded", kind, 0.0, details)


def of_sealing(sealing: Sealing, keys: SigningKeys | None, alarms: Mapping[str, str] | None = None) -> Dependency:
    """Whether the journal is sealed in time, its trees are whole, and its checkpoints are signed."""
    details: dict[str, Any] = {"rounds": sealing.rounds, "records": sealing.records, "lag_s": round(sealing.lag_s, 3)}
    problems = [sealing.error] if sealing.error is not None else []
    problems += [f"the tree {tree} is not extended: {reason}" for tree, reason in sealing.sealer.broken.items()]
    if keys is None:
        details["unsigned"] = "without STRONGROOM_JOURNAL_SIGNING_KEY nobody can tell who made the checkpoints"
    elif keys.problem is not None:
        problems.append(keys.problem)
    problems += [f"the witness {url} {alarm}" for url, alarm in (alarms or {}).items()]
    if problems:
        details["problems"] = problems[:MAX_PROBLEMS]
    late = sealing.active and sealing.behind_s > SEALING_LATE_S
    return Dependency("degraded" if problems or late else "ok", "unsigned" if keys is None else "signed", 0.0, details)


async def check(
    store: Store,
    feed: ChangeFeed,
    clock: MachineClock | StoreClock,
    background: Background,
    cache: Cache | None = None,
    sign_in: SignIn | None = None,
    writes: WriteState | None = None,
    suspended: Sized = (),
    sealing: tuple[Sealing, SigningKeys | None, Mapping[str, str] | None] | None = None,
) -> dict[str, Dependency]:
    """Everything, by name. Only the store is needed for all; where another is not well, the server is degraded."""
    found = {"store": await of_store(store)}
    if cache is not None:
        found["cache"] = of_cache(cache)
    found["feed"] = of_feed(feed)
    found["clock"] = of_clock(clock)
    if sign_in is not None:
        found["sign_in"] = of_sign_in(sign_in)
    if writes is not None:
        found["writes"] = of_writes(writes, len(suspended))
    found["background"] = of_background(background, clock.now_us())
    if sealing is not None:
        found["journal"] = of_sealing(*sealing)
    return found


def overall(dependencies: Mapping[str, Dependency]) -> Status:
    """The worst of them."""
    statuses = {dependency.status for dependency in dependencies.values()}
    return "unavailable" if "unavailable" in statuses else "degraded" if "degraded" in statuses else "ok"
