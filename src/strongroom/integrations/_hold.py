"""A reservation around a piece of work: held before, kept while it lasts, settled with what it used."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator, Iterable, Mapping
from decimal import Decimal
from types import TracebackType
from typing import Any, Self

from ..app import Strongroom
from ..errors import Conflict, NotFound, StrongroomError, Unavailable
from ..keys import Charged, Reservation, cost_units
from ..keys import amounts as amounts_of
from ..limits import Amount
from ._core import Cost, KeyRefused, Presented, refusal_of, refusal_of_error

TTL_S = 60
"""How long a hold outlives a process that is killed. One that is alive keeps its holds for as long as their work."""
SETTLE_WAIT_S = 2.0
"""How long the end of a request waits for its settlement, which goes on meanwhile if the store cannot be reached."""
RETRY_S = 0.5
CLOSE_WAIT_S = 10.0
_log = logging.getLogger(__name__)
_settling: set[asyncio.Task[None]] = set()
"""Tasks that settle: the loop itself holds tasks only weakly, and their callers may have been cancelled."""


class Hold:
    """What is reserved for a piece of work, of which the key is charged what was used.

    `async with hold:` or `await hold` reserves (raises KeyRefused if the limits do not allow it); leaving the block or
    `await hold.close()` settles, also when the work was cancelled because its client went away, or failed.

    `presented` asks for the cost to reserve; `fixed` counts as used whatever happens.
    """

    def __init__(
        self,
        room: Strongroom,
        presented: Presented,
        *,
        ttl_s: int = TTL_S,
        fixed: Cost | None = None,
        opened: list[Hold] | None = None,
    ) -> None:
        self._keys = room.keys
        self._presented = presented
        self._ttl_s = ttl_s
        # In units, whole numbers: three times 0.1 of a currency are exactly 0.3.
        self._reserved = cost_units(presented.asked.get("cost") or {}, reserving=True)
        self._fixed = cost_units(fixed or {})
        self._used = dict(self._fixed)
        self._reported: dict[str, int] = {}
        """What the reservation was told to be used, and so is charged already."""
        self._opened = opened
        self._keeper: asyncio.Task[None] | None = None
        self._reservation: Reservation | None = None

    @property
    def verification(self) -> Reservation:
        """The answer that made the hold."""
        if self._reservation is None:
            raise RuntimeError("nothing is reserved yet: use `async with reserve(…)` or `await reserve(…)`")
        return self._reservation

    @property
    def used(self) -> Mapping[str, Amount]:
        """What was used so far."""
        return amounts_of(self._used)

    def use(self, **amounts: float | Decimal) -> None:
        """Count what was used, on top of what was before; more than was reserved is charged as well. A float is what it
        is written as. Raises InvalidInput for what could not be charged in the end; then nothing is counted."""
        self._used = _added(self._used, cost_units(amounts))

    def forgive(self) -> None:
        """The request is refused: what it was to cost in any case is not charged, unless it was reported already."""
        for name, units in self._fixed.items():
            self._used[name] = max(self._used[name] - units, self._reported.get(name, 0))
        self._fixed = {}

    async def extend(self, **more: float | Decimal) -> Reservation:
        """Reserve more: `await hold.extend(tokens=500)`. Raises KeyRefused if the limits do not allow it; what is held
        stays held."""
        return await self._extend(_added(self._reserved, cost_units(more)))

    async def close(self) -> None:
        """Charge what was used, and give back the rest. A second time does nothing."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        keeper.cancel()
        # In a task of its own: a client that goes away cancels this one, again and again where anyio does it.
        task = asyncio.create_task(self._settle(dict(self._used)))
        _settling.add(task)
        task.add_done_callback(_settling.discard)
        await asyncio.wait([task], timeout=SETTLE_WAIT_S)

    def __await__(self) -> Generator[Any, None, Self]:
        return self._reserve().__await__()

    async def __aenter__(self) -> Self:
        return await self._reserve()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _reserve(self) -> Self:
        if self._reservation is not None:
            raise RuntimeError("this was reserved already")
        try:
            answer = await self._keys.reserve(self._presented.secret, ttl_s=self._ttl_s, **self._presented.asked)
        except StrongroomError as error:
            raise KeyRefused(refusal_of_error(error)) from error
        if not answer.valid:
            raise KeyRefused(refusal_of(answer, self._presented.header))
        self._reservation = answer
        self._keeper = asyncio.create_task(self._keep())
        if self._opened is not None:
            self._opened.append(self)
        return self

    @property
    def _id(self) -> str:
        id = self.verification.reservation_id
        if id is None:
            raise RuntimeError("a valid reservation has no id")
        return id

    async def _extend(self, units: dict[str, int]) -> Reservation:
        used = dict(self._used)
        cost = amounts_of(units)
        answer = await self._keys.extend(self._id, ttl_s=self._ttl_s, cost=cost, used=amounts_of(used))
        if not answer.valid:
            raise KeyRefused(refusal_of(answer, self._presented.header))
        self._reserved, self._reported = units, used
        return answer

    async def _keep(self) -> None:
        """Work that takes long keeps its hold. What it used so far is told with it, and so is charged even if this
        process is killed."""
        while True:
            await asyncio.sleep(self._ttl_s / 2)
            try:
                await self._extend(self._reserved)
            except (StrongroomError, KeyRefused) as error:
                _log.warning(
                    "a reservation could not be extended", extra={"reservation": self._id, "error": str(error)}
                )

    async def _settle(self, used: dict[str, int]) -> None:
        """Charge what was used; tried again, since it is charged once, for as long as the hold lasts without us."""
        deadline = time.monotonic() + self._ttl_s
        while True:
            try:
                try:
                    await self._keys.settle(self._id, amounts_of(used))
                except (NotFound, Conflict):  # it has ended, so what it was not told is recorded
                    await self._record(used)
            except Unavailable as error:
                if time.monotonic() >= deadline:
                    self._lost(error)
                    return
                await asyncio.sleep(RETRY_S)
            except StrongroomError as error:
                self._lost(error)
                return
            else:
                return

    async def _record(self, used: dict[str, int]) -> None:
        rest = {name: units - self._reported.get(name, 0) for name, units in used.items()}
        if any(rest.values()):
            once = f"{self._id} ended before it was settled"
            await self._keys.record(key_id=self.verification.key_id, cost=amounts_of(rest), idempotency_key=once)

    def _lost(self, error: StrongroomError) -> None:
        # Logged, not raised: the work is done, and its answer is not to be lost over its bill.
        _log.error(
            "a reservation could not be settled",
            extra={"reservation": self._id, "used": str(self.used), "error": error.code},
        )


def _added(units: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """Both together. Raises InvalidInput where the sum could not be charged: too many resources, or too much of one."""
    total = {**units, **{name: units.get(name, 0) + amount for name, amount in more.items()}}
    cost_units(amounts_of(total), reserving=True)
    return total


async def returned(room: Strongroom, charges: list[Charged]) -> None:
    """Take back what a request was charged that is refused after all: once, whoever calls this for it. It goes on
    meanwhile if the store cannot be reached."""
    taken, charges[:] = list(charges), []
    if not taken:
        return
    task = asyncio.create_task(_return(room, taken))
    _settling.add(task)
    task.add_done_callback(_settling.discard)
    await asyncio.wait([task], timeout=SETTLE_WAIT_S)


async def _return(room: Strongroom, charges: Iterable[Charged]) -> None:
    for charged in charges:
        try:
            await room.keys.undo(charged)
        except StrongroomError as error:  # not tried again: it may be taken back already, and would be twice
            _log.error(
                "a refused request may be charged all the same",
                extra={"key": charged.answer.key_id, "units": str(dict(charged.units)), "error": error.code},
            )


def reserving(presented: Presented, cost: Cost, permission: str | None, model: str | None, *, first: bool) -> Presented:
    """What a reservation for a request asks. The `first` of them holds one of the key's limit on concurrency, unless
    its cost says how many: a request is one, whatever it reserves."""
    more: dict[str, Any] = {"cost": cost if first else {"concurrency": 0, **cost}}
    if permission is not None:
        more["permission"] = permission
    if model is not None:
        more["model"] = model
    return presented.asking(**more)


async def settled(timeout_s: float = CLOSE_WAIT_S) -> None:
    """Wait until what is being settled on this loop is: before a room is closed."""
    loop = asyncio.get_running_loop()
    tasks = [task for task in _settling if task.get_loop() is loop]
    if tasks:
        await asyncio.wait(tasks, timeout=timeout_s)
