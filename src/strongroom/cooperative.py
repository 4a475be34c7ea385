"""Long work on the event loop in slices of a few milliseconds, so that nobody else's request waits for all of it."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

SLICE_S = 0.005
"""Work that has run for so long lets the loop do something else before it goes on."""
_A = TypeVar("_A")
_B = TypeVar("_B")
_F = TypeVar("_F", bound=Callable[..., Any])


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


def to_be_awaited(function: _F) -> _F:
    """Mark a function that returns a coroutine as a coroutine function, as it would be with `async def`: mocks and
    frameworks ask. (Before Python 3.12 only `asyncio.iscoroutinefunction` and mocks can be told.)"""
    mark = getattr(inspect, "markcoroutinefunction", None)
    if mark is not None:
        mark(function)
    else:
        vars(function)["_is_coroutine"] = getattr(asyncio.coroutines, "_is_coroutine", None)
    return function


__all__ = ["SLICE_S", "Slices", "in_slices"]
