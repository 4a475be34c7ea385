"""The files of Strongroom that a call enters on the event loop's thread, in the order of their first entry."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType

import strongroom

INSIDE = f"{Path(strongroom.__file__).parent}/"
RUNS = 8
"""Runs that are compared. Only what each of them enters belongs to the call: loops in the background run beside it."""
PAUSE_S = 0.02


async def files_entered(call: Callable[[], Awaitable[object]]) -> list[str]:
    """The files below `src/strongroom/` that each of several runs of `call` enters, in the order of the shortest."""
    runs = [await _entered(call) for _ in range(RUNS)]
    return [file for file in min(runs, key=len) if all(file in run for run in runs)]


async def _entered(call: Callable[[], Awaitable[object]]) -> dict[str, None]:
    entered: dict[str, None] = {}

    def enter(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(INSIDE):
            entered.setdefault(file.removeprefix(INSIDE))

    await asyncio.sleep(PAUSE_S)
    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        await call()
    finally:
        sys.setprofile(before)
    return entered
