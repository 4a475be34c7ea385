"""A reservation around work: reserved before, extended while the work runs, settled with the amount that it used."""

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
"""How long a hold outlives a killed process. A running process extends its holds until their work ends."""
SETTLE_WAIT_S = 2.0
"""How long the end of a request waits for its settlement. After that the settlement continues in the background."""
RETRY_S = 0.5
CLOSE_WAIT_S = 10.0
_log = logging.getLogger(__name__)
_settling: set[asyncio.Task[None]] = set()
"""Running settlements. Without this reference a task whose caller was cancelled could be garbage-collected."""


class Hold:
    """A reservation for a piece of work. The key is charged the amount that the work used.

    `async with hold:` or `await hold` reserves; raises KeyRefused if the limits do not allow it. The end of the block,
    or `await hold.close()`, settles the reservation, also after an error or a cancellation.

    The verification's `cost` is the reserved amount. `fixed` is charged in any case.
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
        # Whole units, because floats would add three times 0.1 of a currency to more than 0.3.
        self._reserved = cost_units(presented.asked.get("cost") or {}, reserving=True)
        self._fixed = cost_units(fixed or {})
        self._used = dict(self._fixed)
        self._reported: dict[str, int] = {}
        """The usage that was reported to the reservation, and so is charged already."""
        self._opened = opened
        self._keeper: asyncio.Task[None] | None = None
        self._reservation: Reservation | None = None

    @property
    def verification(self) -> Reservation:
        """The answer to the reservation."""
        if self._reservation is None:
            raise RuntimeError("nothing is reserved yet: use `async with reserve(…)` or `await reserve(…)`")
        return self._reservation

    @property
    def used(self) -> Mapping[str, Amount]:
        """The amounts used so far, by resource."""
        return amounts_of(self._used)

    def use(self, **amounts: float | Decimal) -> None:
        """Add usage; usage beyond the reserved amount is charged too. A float counts as its decimal text. Raises
        InvalidInput, and counts nothing, if the sum cannot be charged."""
        self._used = _added(self._used, cost_units(amounts))

    def forgive(self) -> None:
        """Do not charge the fixed cost, because the request is refused. A fixed cost that was reported already stays
        charged."""
        for name, units in self._fixed.items():
            self._used[name] = max(self._used[name] - units, self._reported.get(name, 0))
        self._fixed = {}

    async def extend(self, **more: float | Decimal) -> Reservation:
        """Reserve more: `await hold.extend(tokens=500)`. Raises KeyRefused if the limits do not allow it; the hold then
        does not change."""
        return await self._extend(_added(self._reserved, cost_units(more)))

    async def close(self) -> None:
        """Charge the used amount and release the rest. A second call does nothing."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        keeper.cancel()
        # A task of its own, because a disconnected client cancels the current task (anyio does so at every await).
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
            raise RuntimeError("already reserved")
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
        """Extend the reservation while the work runs. Each extension reports the usage so far, so a killed process
        loses only the usage since the last one."""
        while True:
            await asyncio.sleep(self._ttl_s / 2)
            try:
                await self._extend(self._reserved)
            except (StrongroomError, KeyRefused) as error:
                _log.warning(
                    "a reservation could not be extended", extra={"reservation": self._id, "error": str(error)}
                )

    async def _settle(self, used: dict[str, int]) -> None:
        """Settle, with retries for `ttl_s`. A retry cannot charge twice, because a reservation is settled once."""
        deadline = time.monotonic() + self._ttl_s
        while True:
            try:
                try:
                    await self._keys.settle(self._id, amounts_of(used))
                except (NotFound, Conflict):  # it has ended: only the reported usage was charged
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
        # Logged, not raised: an error here would replace the answer of work that is done.
        _log.error(
            "a reservation could not be settled",
            extra={"reservation": self._id, "used": str(self.used), "error": error.code},
        )


def _added(units: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """The sum of both. Raises InvalidInput if it has too many resources or too large an amount."""
    total = {**units, **{name: units.get(name, 0) + amount for name, amount in more.items()}}
    cost_units(amounts_of(total), reserving=True)
    return total


async def returned(room: Strongroom, charges: list[Charged]) -> None:
    """Refund the charges of a request that was refused after its verification. The list is emptied first, so that a
    second caller refunds nothing. After SETTLE_WAIT_S the refund continues in the background."""
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
        except StrongroomError as error:  # no retry: if only the answer was lost, it would refund twice
            _log.error(
                "a refused request may have been charged",
                extra={"key": charged.answer.key_id, "units": str(dict(charged.units)), "error": error.code},
            )


def reserving(presented: Presented, cost: Cost, permission: str | None, model: str | None, *, first: bool) -> Presented:
    """The verification for a reservation of this request. Only the `first` reservation takes one of the key's
    concurrency limit, unless `cost` has a concurrency: two reservations of one request would count as two requests."""
    more: dict[str, Any] = {"cost": cost if first else {"concurrency": 0, **cost}}
    if permission is not None:
        more["permission"] = permission
    if model is not None:
        more["model"] = model
    return presented.asking(**more)


async def settled(timeout_s: float = CLOSE_WAIT_S) -> None:
    """Wait until the settlements and refunds of this loop are done. Call it before the room is closed."""
    loop = asyncio.get_running_loop()
    tasks = [task for task in _settling if task.get_loop() is loop]
    if tasks:
        await asyncio.wait(tasks, timeout=timeout_s)
