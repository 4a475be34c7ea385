"""How tests wait: for a condition, with a limit that only a failure ever reaches; never for luck."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest

PATIENCE_S = 30.0
"""How long a test waits for what takes milliseconds on an idle machine. Others may be busy on this one; only a test
that fails anyway waits so long."""


async def wait_until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """Wait until `condition`, or what it gives to be awaited, is something true, and give that."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"after {timeout_s} s it was still {value!r}: {inspect.getsource(condition).strip()}")
        await asyncio.sleep(0.005)


def wait_without_loop(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """wait_until for a test that has no event loop."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"after {timeout_s} s it was still {value!r}: {inspect.getsource(condition).strip()}")
        time.sleep(0.005)
    return value


def tear_down_the_loop() -> None:
    """Cancel every task but the test's own, as `asyncio.run` does at its end."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
