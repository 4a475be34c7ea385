"""Long work on the event loop in slices of a few milliseconds, so that nobody else's request waits for all of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

SLICE_S = 0.005
"""Work that has run for so long lets the loop do something else before it goes on."""
_A = TypeVar("_A")
_B = TypeVar("_B")


class Slices:
    """`await slices.pause()` between the steps of long work yields if SLICE_S is used up; else it returns at once."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until = time.perf_counter() + SLICE_S

    @property
    def over(self) -> bool:
        """Whether the present slice is used up."""
        return time.perf_counter() >= self._until

    async def pause(self) -> None:
        """Let the loop run if the present slice is used up."""
        if self.over:
            await asyncio.sleep(0)
            self._until = time.perf_counter() + SLICE_S


async def in_slices(work: Callable[[_A], _B], items: Iterable[_A]) -> list[_B]:
    """`[work(item) for item in items]`, in slices."""
    found: list[_B] = []
    until = time.perf_counter() + SLICE_S
    for item in items:
        if time.perf_counter() >= until:
            await asyncio.sleep(0)
            until = time.perf_counter() + SLICE_S
        found.append(work(item))
    return found


__all__ = ["SLICE_S", "Slices", "in_slices"]
