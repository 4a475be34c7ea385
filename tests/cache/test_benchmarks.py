"""The cache's benchmarks run, count reads at the store, and leave no files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.waiting import PATIENCE_S


@pytest.mark.server
@pytest.mark.parametrize(("name", "groups"), [("cache", 2), pytest.param("zipf", 2, marks=pytest.mark.soak)])
def test_a_quick_run_measures_every_contender(name: str, groups: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", name, "--json", "--dir", str(tmp_path)]
    done = subprocess.run(  # the status is asserted below
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=8 * PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    (benchmark,) = result["benchmarks"]
    assert len(benchmark["groups"]) >= groups
    assert all(figure["rate"] > 0 for group in benchmark["groups"] for figure in group["figures"])
    assert list(tmp_path.iterdir()) == []
