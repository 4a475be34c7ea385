"""One clock for all nodes: the store's, carried forward between samples by this machine's monotonic clock.

Limits, leases and expiries are decided by the store's clock, so that nodes whose own clocks differ agree. Asking the
store each time would cost a round trip. So it is asked every few seconds, and the offset to the monotonic clock, which
nobody can set, is kept. A jump of the machine's wall clock therefore changes nothing. A sample is as uncertain as half
its round trip (the store read its clock at some moment in between); with age it becomes less certain, since no two
oscillators run alike. The most certain sample is the one in use (Cristian's algorithm, with the clock filter of NTP).

An embedded store's clock is this machine's wall clock, for every process on the machine alike: it is simply read.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from .errors import StrongroomError, Unavailable
from .storage.port import Store

SAMPLE_EVERY_S = 4.0
"""How often the store is asked, with a jitter of a quarter, so that nodes do not ask in step."""
FIRST_SAMPLES = 3
KEPT_SAMPLES = 16
SAMPLE_TIMEOUT_S = 2.0
START_ATTEMPTS = 3
DRIFT_PPM = 200
"""How far two machines' oscillators may run apart: twice the drift of the worst ordinary oscillators."""
MAX_HOLD_US = 250_000
"""During a backward correction of up to this much the time stands still. A larger step is no correction: the store's
clock was set back, and a time that stands still would keep windows closed that are over by the store's clock."""
STALE_AFTER_S = 60.0
"""A clock whose store could not be asked for this long is reported as degraded; it continues all the same."""
_log = logging.getLogger(__name__)


class Clock(Protocol):
    """Gives the time that limits, leases and expiries are decided at."""

    def now_us(self) -> int:
        """Microseconds since the epoch."""
        ...


@dataclass(frozen=True, slots=True)
class ClockState:
    """What an operator should see of a clock. `offset_us`: the store's clock minus this machine's wall clock now.
    `uncertainty_us`: how far the time may be off. `age_s`: how long ago the store was asked last; 0 if it is local."""

    offset_us: int
    uncertainty_us: int
    age_s: float
    degraded: bool


class _Steady:
    """Removes small backward steps from a time: it stands still until the former time is reached again."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0

    def __call__(self, now_us: int) -> int:
        if now_us < self._last and self._last - now_us <= MAX_HOLD_US:
            return self._last
        self._last = now_us
        return now_us


class MachineClock:
    """This machine's wall clock, for a store that is embedded."""

    def __init__(self) -> None:
        self._steady = _Steady()

    def now_us(self) -> int:
        return self._steady(time.time_ns() // 1_000)

    def state(self) -> ClockState:
        return ClockState(0, 0, 0.0, False)

    async def start(self) -> None:
        """Nothing needs to be asked."""

    async def close(self) -> None:
        """Nothing was started."""


@dataclass(frozen=True, slots=True)
class _Sample:
    offset_us: int
    """The store's clock minus the monotonic one."""
    uncertainty_us: int
    taken_us: int
    """By the monotonic clock."""

    def uncertain_at(self, monotonic_us: int) -> int:
        return self.uncertainty_us + (monotonic_us - self.taken_us) * DRIFT_PPM // 1_000_000


class StoreClock:
    """The clock of a store that other machines use too. `start` before use; `close` after."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._samples: deque[_Sample] = deque(maxlen=KEPT_SAMPLES)
        self._best: _Sample | None = None
        self._steady = _Steady()
        self._task: asyncio.Task[None] | None = None
        self.times_set = 0
        """How often the store's clock was set, forwards or back, beyond drift."""

    async def start(self) -> None:
        """Ask the store's clock, and start the task that asks it again. Raises Unavailable after START_ATTEMPTS without
        an answer."""
        await self._first_sample()
        for _ in range(FIRST_SAMPLES - 1):
            await self.sample()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _first_sample(self) -> None:
        """A busy store may answer the first question of a new connection late."""
        for _ in range(START_ATTEMPTS - 1):
            with suppress(Unavailable):
                await self.sample()
                return
        await self.sample()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    def now_us(self) -> int:
        """The store's time as far as it is known, without a round trip. It goes back only if the store's clock was set
        back."""
        if self._best is None:
            raise RuntimeError("the clock was not started")
        return self._steady(time.monotonic_ns() // 1_000 + self._best.offset_us)

    def state(self) -> ClockState:
        if self._best is None:
            raise RuntimeError("the clock was not started")
        monotonic_us = time.monotonic_ns() // 1_000
        age_s = (monotonic_us - self._samples[-1].taken_us) / 1_000_000
        offset_us = monotonic_us + self._best.offset_us - time.time_ns() // 1_000
        return ClockState(offset_us, self._best.uncertain_at(monotonic_us), age_s, age_s > STALE_AFTER_S)

    async def sample(self) -> None:
        """Ask the store once; use the answer if it is the most certain sample. Raises Unavailable."""
        before_us = time.monotonic_ns() // 1_000
        try:
            async with asyncio.timeout(SAMPLE_TIMEOUT_S):
                store_us = await self._store.now_us()
        except TimeoutError:
            raise Unavailable(f"the store's clock did not answer within {SAMPLE_TIMEOUT_S} s") from None
        after_us = time.monotonic_ns() // 1_000
        half_us = (after_us - before_us + 1) // 2
        new = _Sample(store_us - before_us - half_us, half_us, after_us)
        old = self._best
        if old is not None and abs(new.offset_us - old.offset_us) > new.uncertainty_us + old.uncertain_at(after_us):
            # One clock cannot give both samples: it was set, or another machine has taken over.
            self.times_set += 1
            self._samples.clear()
            _log.warning("the store's clock was set by %.6f s", (new.offset_us - old.offset_us) / 1_000_000)
        self._samples.append(new)
        self._best = min(self._samples, key=lambda sample: sample.uncertain_at(after_us))

    async def _run(self) -> None:
        failed = False
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S * random.uniform(0.75, 1.25))  # noqa: S311 - jitter, not a secret
            try:
                await self.sample()
                failed = False
            except Exception as error:  # the task must go on after any error, or the clock would drift without end
                if not failed:
                    foreseen = isinstance(error, StrongroomError)
                    message = "the store's clock cannot be asked, going on from the last answer: %s"
                    _log.warning(message, error, exc_info=not foreseen)
                failed = True


def clock_of(store: Store) -> MachineClock | StoreClock:
    """The clock that decides on this store, not yet started."""
    return MachineClock() if store.capabilities.embedded else StoreClock(store)


__all__ = ["Clock", "ClockState", "MachineClock", "StoreClock", "clock_of"]
