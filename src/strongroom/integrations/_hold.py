"""A reservation around a piece of work: held before, kept while it lasts, settled with what it used."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any, Self

from ..app import Strongroom
from ..errors import InvalidInput, Problem, StrongroomError
from ..verification import Verification, cost_units
from ..windows import Amount
from ._core import Cost, KeyRefused, Presented, refusal_of, refusal_of_error

TTL_S = 60
"""How long a hold outlives a process that is killed. One that is alive keeps its holds for as long as their work."""
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
        if type(ttl_s) is not int or ttl_s < 1:
            raise InvalidInput([Problem("ttl_s", f"found {ttl_s!r}, expected 1 or more whole seconds")])
        cost_units(presented.asked.get("cost") or {})
        self._keys = room.keys
        self._presented = presented
        self._ttl_s = ttl_s
        self._used: dict[str, Amount] = dict(fixed or {})
        self._opened = opened
        self._keeper: asyncio.Task[None] | None = None
        self._verification: Verification | None = None

    @property
    def verification(self) -> Verification:
        """The answer that made the hold."""
        if self._verification is None:
            raise RuntimeError("nothing is reserved yet: use `async with reserve(…)` or `await reserve(…)`")
        return self._verification

    @property
    def used(self) -> Mapping[str, Amount]:
        """What was used so far."""
        return dict(self._used)

    def use(self, **amounts: Amount) -> None:
        """Count what was used, on top of what was before; more than was reserved is charged as well. Raises
        InvalidInput."""
        cost_units(amounts)
        for resource, amount in amounts.items():
            self._used[resource] = self._used.get(resource, 0) + amount

    async def extend(self, **more: Amount) -> Verification:
        """Reserve more: `await hold.extend(tokens=500)`. Raises KeyRefused if the limits do not allow it; what is held
        stays held."""
        answer = await self._keys.extend(self._id, ttl_s=self._ttl_s, cost=more or None)
        if not answer.valid:
            raise KeyRefused(refusal_of(answer, self._presented.header))
        return answer

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
        await asyncio.shield(task)

    def __await__(self) -> Generator[Any, None, Self]:
        return self._reserve().__await__()

    async def __aenter__(self) -> Self:
        return await self._reserve()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _reserve(self) -> Self:
        if self._verification is not None:
            raise RuntimeError("this was reserved already")
        try:
            answer = await self._keys.reserve(self._presented.text, ttl_s=self._ttl_s, **self._presented.asked)
        except StrongroomError as error:
            raise KeyRefused(refusal_of_error(error)) from error
        if not answer.valid:
            raise KeyRefused(refusal_of(answer, self._presented.header))
        self._verification = answer
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

    async def _settle(self, used: Cost) -> None:
        try:
            await self._keys.settle(self._id, used)
        except StrongroomError as error:
            # Logged, not raised: the work is done, and its answer is not to be lost over its bill.
            _log.error("a reservation could not be settled", extra={"reservation": self._id, "error": error.code})

    async def _keep(self) -> None:
        """Work that takes long keeps its hold. What it used so far is told with it, and so is charged even if this
        process is killed."""
        while True:
            await asyncio.sleep(self._ttl_s / 2)
            try:
                await self._keys.extend(self._id, ttl_s=self._ttl_s, used=dict(self._used) or None)
            except StrongroomError as error:
                _log.warning(
                    "a reservation could not be extended", extra={"reservation": self._id, "error": error.code}
                )


async def settled() -> None:
    """Wait until what is being settled on this loop is: before a room is closed."""
    loop = asyncio.get_running_loop()
    while tasks := [task for task in _settling if task.get_loop() is loop]:
        await asyncio.wait(tasks)
