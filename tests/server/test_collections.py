"""The server's process spares its answers Python's collections of garbage."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from strongroom.server.run import collect_rarely

runs = []
gc.callbacks.append(lambda phase, info: runs.append(info["generation"]))
collect_rarely()
assert gc.get_freeze_count() > 10_000, gc.get_freeze_count()  # whatever was loaded
runs.clear()
page = [[{"metadata": [number]}] for number in range(5_000)]
assert runs == [], runs
cycles = []
for _ in range(100_000):
    cycle = []
    cycle.append(cycle)
assert runs != []  # garbage is collected all the same
"""


def test_garbage_collection_skips_loaded_modules_and_does_not_run_within_a_page() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
