"""The client's examples run unchanged against a server, and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import EXAMPLES
from tests.helpers.server_app import ADMIN
from tests.helpers.server_process import running

SAID = {
    "client_sync": [
        "VALID: 900 tokens remain",
        "VALID: 800 tokens remain",
        "streamed: an answer",
        "tokens used: 202",
        "RATE_LIMITED: requests",
        "someone else was faster",
        "urgent: ['scale-up']",
    ],
    "client_async": ["10 of 25 were admitted", "tokens used: 52", *["create signal", "delete signal"] * 3],
}


@pytest.mark.server
@pytest.mark.parametrize("name", SAID)
def test_an_example_prints_what_it_promises(name: str, tmp_path: Path) -> None:
    with running(tmp_path) as server:
        environment = {"STRONGROOM_URL": f"http://127.0.0.1:{server.port}", "STRONGROOM_KEY": ADMIN}
        run = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()[-len(SAID[name]) :]
    assert all(line.startswith(wanted) for line, wanted in zip(lines, SAID[name], strict=True)), run.stdout
    assert ADMIN not in run.stdout
