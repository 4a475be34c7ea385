"""The use of keys without limits, added up and written once a second.

Nothing is decided by it, so no caller waits for its write. Each sum has a number, and the usage document remembers the
last number of each writer: a sum whose answer was lost is written again, and counts once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..clock import Clock
from ..context import new_id
from . import tuning
from .admission import AdmissionRequest
from .corrections import AggregatedUse, add_once
from .usage_state import Cost, Subject, Subjects, UsageState

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sum:
    """The use of one key since the last write."""

    subjects: Subjects
    count: int = 0
    cost: dict[str, int] = field(default_factory=dict)
    used_at_us: int = 0


class UsageAggregation:
    """Adds up the use of keys without limits, and has each sum written once. `submit` takes the requests that do."""

    def __init__(self, clock: Clock, submit: Callable[[list[AdmissionRequest]], None]) -> None:
        self._clock = clock
        self._submit = submit
        self._sums: dict[str, _Sum] = {}
        self._written: set[str] = set()
        """Keys whose sum is being written. The next one waits for that, so that numbers are written in order."""
        self._unsure: dict[str, AdmissionRequest] = {}
        """Sums that could not be written, or whose answer was lost: written again as they were, with their number."""
        self._writer, self._number = new_id()[-12:], 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.flushes = 0
        """How often a flush has begun."""

    @property
    def idle(self) -> bool:
        """Whether nothing is left to be written."""
        return not (self._sums or self._unsure)

    @property
    def settled(self) -> bool:
        """Whether everything is written, and known to be."""
        return self.idle and not self._written

    def add(self, subjects: Subjects, cost: Cost, count: int = 1) -> None:
        """Count one use, or several."""
        found = self._sums.get(subjects.id)
        if found is None:
            found = self._sums[subjects.id] = _Sum(subjects)
        found.subjects = subjects
        found.count += count
        found.used_at_us = max(found.used_at_us, self._clock.now_us())
        for resource, units in cost.items():
            found.cost[resource] = found.cost.get(resource, 0) + units
        if self._timer is None:
            self._flush_later()

    def _flush_later(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(tuning.AGGREGATE_FOR_S, self.flush)

    def flush(self) -> None:
        """Have everything written now that is not being written."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.flushes += 1
        unsure, self._unsure = self._unsure, {}
        requests = list(unsure.values())
        self._written.update(unsure)
        sums, self._sums = self._sums, {}
        for id, one in sums.items():
            if id in self._written:
                self._sums[id] = one
                continue
            self._written.add(id)
            self._number += 1
            special = AggregatedUse(self._writer, self._number)
            requests.append(
                AdmissionRequest(
                    one.subjects, one.cost, True, None, None, one.count, one.used_at_us, special=special, owner=self
                )
            )
        if self._sums:
            self._flush_later()
        if requests:
            self._submit(requests)

    def close(self) -> None:
        """Start no timer any more; `flush` still writes."""
        self._closed = True

    def warn_of_loss(self) -> None:
        """Say how many keys lose their last use."""
        lost = self._sums.keys() | self._unsure.keys()
        if lost:
            _log.warning("the last uses of %d keys without limits could not be written", len(lost))

    # --- For statistics ---------------------------------------------------------------------------------------

    async def written(self, id: str) -> None:
        """Wait while a sum of this key is being written: it is not here any more, and not for certain in the store."""
        until = time.monotonic() + tuning.SHOWN_WITHOUT_S
        while id in self._written and time.monotonic() < until:  # noqa: ASYNC110 - an event for each write costs more
            await asyncio.sleep(tuning.LOOK_AGAIN_S)

    def show(self, id: str, state: UsageState) -> None:
        """Count in a state that was just read what is still to be written."""
        unsure, found = self._unsure.get(id), self._sums.get(id)
        if unsure is not None and isinstance(unsure.special, AggregatedUse):
            add_once(state, unsure.special, unsure.cost, unsure.count, unsure.used_at_us or 0)
        if found is not None:
            state.add_totals(found.cost, found.count, found.used_at_us)

    # --- The owner of its requests ------------------------------------------------------------------------------

    def recorded(self, request: AdmissionRequest) -> None:
        self._written.discard(request.subjects.id)

    def failed(self, request: AdmissionRequest) -> None:
        self._written.discard(request.subjects.id)
        request.attempts = 0
        self._unsure[request.subjects.id] = request
        self._flush_later()

    def gone(self, request: AdmissionRequest) -> None:
        self._written.discard(request.subjects.id)

    async def described(self, id: str) -> Subject | None:
        return None


__all__ = ["UsageAggregation"]
