"""`strongroom webhooks …`: output for people and for programs, exit statuses, wrong calls."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from strongroom.cli import main
from strongroom.webhooks.signatures import secret_bytes

URL = "https://203.0.114.7/hook"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process, on a new SQLite store: status, output, errors."""
    store = f"sqlite:///{tmp_path}/store.db"
    (tmp_path / "store.db").touch()  # a store that nothing was written to yet
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["webhooks", *arguments, "--store", store])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def document(ran: tuple[int, str, str]) -> Any:
    assert ran[0] == 0, ran
    return json.loads(ran[1])


def created(run: Run, *options: str) -> dict[str, Any]:
    return dict(document(run("create", "--url", URL, "--json", *options)))


@pytest.fixture
def answering() -> Iterator[tuple[str, list[int]]]:
    """The URL of a receiver, and the statuses that it answers with in turn, then 200."""
    statuses: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(statuses.pop(0) if statuses else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", statuses
        server.shutdown()
        thread.join()


def test_a_webhook_is_created_shown_listed_changed_and_deleted(run: Run) -> None:
    made = created(
        run, "--tenant", "acme", "--event", "limit.threshold", "--threshold", "80", "--min-window", "1h",
        "--description", "on call",
    )  # fmt: skip
    secret_bytes(made.pop("secret"))
    assert (made["tenant"], made["events"], made["thresholds"]) == ("acme", ["limit.threshold"], [80])
    assert (made["min_window_s"], made["description"]) == (3_600, "on call")
    assert document(run("show", made["id"], "--json")) == made
    assert document(run("list", "--tenant", "acme", "--json")) == {"items": [made], "next_cursor": None}
    changed = document(run("update", made["id"], "--disable", "--event", "*", "--json"))
    assert (changed["enabled"], changed["events"], changed["thresholds"]) == (False, ["*"], [80])
    assert document(run("delete", made["id"], "--yes", "--json")) == {"deleted": made["id"]}
    status, _, err = run("show", made["id"])
    assert (status, err) == (1, f"strongroom: there is no webhook {made['id']!r}\n")


def test_a_terminal_shows_the_secret_once(run: Run) -> None:
    status, out, err = run("create", "--url", URL)
    assert status == 0
    assert (out.startswith("whsec_"), out.count("\n")) == (True, 1)  # a pipe gets nothing else
    assert "cannot be shown again" in err
    id = err.split()[1]
    status, out, _ = run("show", id)
    assert "50% 80% 100%" in out
    assert "whsec_" not in out
    status, out, _ = run("list")
    assert id in out
    assert "active" in out
    rotated = run("rotate-secret", id, "--overlap", "2h")
    assert "whsec_" in rotated[1]
    assert "old secret until" in rotated[2]


def test_an_empty_list_says_so(run: Run) -> None:
    assert run("list") == (0, "", "there are no webhooks\n")
    made = created(run)
    assert run("deliveries", made["id"]) == (0, "", "there are no deliveries\n")


def test_every_problem_of_a_call_is_reported_at_once(run: Run) -> None:
    wrong = ("--threshold", "0", "--event", "x", "--min-window", "soon")
    for arguments in (("create", "--url", "nonsense", *wrong), ("update", "whk_1", "--url", "nonsense", *wrong)):
        status, out, _ = run(*arguments, "--json")
        paths = {problem["path"] for problem in json.loads(out)["error"]["errors"]}
        assert (status, paths) == (2, {"url", "thresholds.0", "events", "min_window"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--url", "https://10.0.0.1/"), "url: found the address 10.0.0.1, expected a public address"),
        (("create", "--url", URL, "--event", "key.exploded"), "--event: found 'key.exploded'"),
        (("create", "--url", URL, "--threshold", "0"), "--threshold: "),
        (("create", "--url", URL, "--min-window", "soon"), "--min-window: "),
        (("update", "whk_1"), "no change was given"),
        (("rotate-secret", "whk_1", "--overlap", "soon"), "overlap: "),
        (("delete", "whk_1"), "--yes"),
        (("deliveries", "whk_1", "--state", "lost"), "state: found 'lost'"),
    ],
)
def test_a_wrong_call_has_status_2(run: Run, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert said in err


def test_a_webhook_is_tested_its_deliveries_listed_and_redriven(run: Run, answering: tuple[str, list[int]]) -> None:
    url, statuses = answering
    made = document(run("create", "--url", url, "--allow-private", "--json"))
    statuses[:] = [500, 204]
    status, out, _ = run("test", made["id"])
    assert status == 1
    assert "answered 500" in out
    assert document(run("test", made["id"], "--json"))["last_status"] == 204
    listed = document(run("deliveries", made["id"], "--json"))["items"]
    assert [one["state"] for one in listed] == ["delivered", "dead"]
    status, out, _ = run("deliveries", made["id"], "--state", "dead")
    assert [line.split()[2] for line in out.splitlines()[1:]] == ["dead"]
    redriven = document(run("redrive", listed[1]["id"], "--json"))
    assert (redriven["state"], redriven["attempts"]) == ("pending", 0)
    status, out, _ = run("redrive", listed[1]["id"])
    assert "pending" in out
