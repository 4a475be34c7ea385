"""Every application in examples/ runs and answers over HTTP: valid keys, invalid keys, and a key over its limit."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.helpers.asgi_calls import bearer, check_refusal, fields
from tests.helpers.paths import EXAMPLES
from tests.helpers.server_process import free_port
from tests.helpers.waiting import PATIENCE_S

START_TIMEOUT_S = 40.0
CALLS = {
    "asgi_app": ("GET", "/stream", "an answer comes one word at a time "),
    "django_app": ("GET", "/notes/7/", '{"note": 7, "user": "u1"}'),
    "fastapi_app": ("POST", "/chat?prompt=hello+there", "there hello "),
    "flask_app": ("GET", "/words?n=3", "word 0 word 1 word 2 "),
    "starlette_app": ("GET", "/notes/7", '{"note":7,"user":"u1"}'),
}
"""A request to each example, and what it answers."""


def test_every_example_is_tested() -> None:
    assert {file.stem for file in EXAMPLES.glob("*_app.py")} == set(CALLS)


@contextmanager
def running(name: str, folder: Path) -> Iterator[tuple[str, httpx.Client]]:
    """An example as a process of its own. Gives the key that it prints and a client."""
    port = free_port()
    environment = {"PATH": os.environ["PATH"], "PORT": str(port), "STORE": f"sqlite:///{folder}/example.db"}
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    said: list[str] = []

    def read(stream: Iterator[str]) -> None:
        for line in stream:
            said.append(line)
            lines.put(line)

    reader = threading.Thread(target=read, args=(process.stdout,))
    reader.start()
    try:
        key = ""
        deadline = time.monotonic() + START_TIMEOUT_S
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
            while not (key and _answers(http)):
                assert process.poll() is None, "".join(said)
                assert time.monotonic() < deadline, "".join(said)
                with suppress(queue.Empty):
                    line = lines.get(timeout=0.05)
                    key = line.removeprefix("key: ").strip() if line.startswith("key: ") else key
            yield key, http
        process.terminate()
        process.wait(PATIENCE_S)
        assert "Traceback" not in "".join(said), "".join(said)
        assert "lifespan" not in "".join(said), "what is shown as an example causes no warning"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join()
        process.stdout.close()


def _answers(http: httpx.Client) -> bool:
    try:
        http.get("/nothing")
    except httpx.TransportError:
        return False
    return True


@pytest.mark.server
@pytest.mark.parametrize("name", sorted(CALLS))
def test_an_example_admits_valid_keys_and_no_others(name: str, tmp_path: Path) -> None:
    method, path, expected = CALLS[name]
    with running(name, tmp_path) as (key, http):
        check_refusal(http.request(method, path), 401, "unauthenticated")
        check_refusal(http.request(method, path, headers=bearer(f"{key}x")), 401, "not_found")
        answers = [http.request(method, path, headers=bearer(key)) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429], answers[0].text
    assert answers[0].text == expected
    assert fields(answers[2].headers["RateLimit"])["requests-rolling-60"]["r"] == 0
    document = check_refusal(answers[3], 429, "rate_limited")
    assert document["violated-policies"] == ["requests-rolling-60"]
    assert int(answers[3].headers["Retry-After"]) <= 61
