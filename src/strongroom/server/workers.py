"""Several server processes on one listening socket: started together, replaced when one dies, stopped together."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from types import FrameType

RESTART_PAUSE_S = 1.0
"""The pause before a dead worker is replaced: a worker that cannot start must not keep the machine busy."""
POLL_S = 0.2
_log = logging.getLogger(__name__)
_spawn = multiprocessing.get_context("spawn")
multiprocessing.allow_connection_pickling()

Target = Callable[[socket.socket], None]


def supervise(target: Target, listener: socket.socket, count: int, stop_timeout_s: float) -> None:
    """Run `count` processes of `target(listener)` until SIGTERM or SIGINT. `target` must be picklable.

    A worker that does not end within `stop_timeout_s` is killed.
    """
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    workers: list[SpawnProcess] = []
    try:
        while not stopping:
            for dead in [worker for worker in workers if not worker.is_alive()]:
                _log.error("a worker ended", extra={"worker": dead.pid, "exit_status": dead.exitcode})
                workers.remove(dead)
                time.sleep(RESTART_PAUSE_S)
            while len(workers) < count and not stopping:
                worker = _spawn.Process(target=target, args=(listener,))
                worker.start()
                workers.append(worker)
            time.sleep(POLL_S)
    finally:
        _stop(workers, stop_timeout_s)
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(workers: list[SpawnProcess], timeout_s: float) -> None:
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + timeout_s
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            _log.error("a worker did not stop in time and was killed", extra={"worker": worker.pid})
            worker.kill()
            worker.join()
