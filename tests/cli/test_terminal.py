"""The command line at a terminal: no arguments, a narrow window, Ctrl-C; and missing extras."""

from __future__ import annotations

import io
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from strongroom.cli import output
from tests.cli.test_cli import Run, created, run
from tests.helpers.waiting import PATIENCE_S

__all__ = ["run"]  # the fixture


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("arguments", [[], ["keys"], ["schema"]])
def test_without_arguments_the_help_is_printed(run: Run, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith(f"Usage: {' '.join(['strongroom', *arguments])} ")
    assert "\ufffd" not in ran.err
    assert ran.err == run(*arguments, "--help").out


HIDDEN = """
import sys
for name in {modules!r}:
    sys.modules[name] = None
from strongroom.cli import main
for url in {urls!r}:
    sys.stdout.write(f"{{main(['schema', 'plan', '--store', url])}}\\n")
sys.stdout.write(f"{{main(['serve', '--store', 'json://:memory:'])}}\\n")
"""


def test_a_store_whose_extra_is_not_installed_is_refused_with_the_extras_name(tmp_path: Path) -> None:
    code = HIDDEN.format(
        modules=["asyncpg", "google.auth", "uvicorn"], urls=["postgresql://db/x", "firestore://project/database"]
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=PATIENCE_S
    )
    assert ran.stdout.split() == ["2", "2", "2"]
    lines = ran.stderr.splitlines()
    assert lines == [
        "strongroom: a postgresql:// store needs the module asyncpg: pip install 'strongroom[postgres]'",
        "strongroom: a firestore:// store needs the module google.auth: pip install 'strongroom[firestore]'",
        "strongroom: the server needs uvicorn: pip install 'strongroom[server]'",
    ]


def test_a_list_of_keys_is_readable_in_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ("--limit", "tokens=100000/5h", "--limit", "cost=25.50/calendar:month@Europe/Berlin")
    key = created(run, "--tenant", "acme", "--expires", "2099-01-01T00:00:00Z", *limits)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    assert run("keys", "list").status == 0
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["ID", "TENANT", "NAME", "KEY", "STATE"]
    assert lines[1].split() == [key["id"], "acme", "worker", key["display"], "active"]
    assert lines[2:] == [
        "    expires: 2099-01-01 00:00:00Z",
        "    limits: tokens=100000/5h  cost=25.5/calendar:month@Europe/Berlin",
    ]
    output.print_table(("A", "B"), [("a", "b")])
    assert terminal.getvalue().splitlines()[-1].split() == ["a", "b"]


def test_a_terminal_shows_the_secret_of_a_new_key_last(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run("keys", "create", "--name", "worker").status == 0
    first, *_, last = terminal.getvalue().splitlines()
    assert (first.split()[0], last.split()[0]) == ("id", "key")


def at_a_terminal(folder: Path, *arguments: str, until: bytes) -> tuple[int, bytes]:
    """Run a command at a terminal of its own, press Ctrl-C once it has printed `until`; its status, and all it said."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process was started with
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, "-m", "strongroom.cli", *arguments])  # noqa: S606
    seen = b""
    while until not in seen:
        seen += os.read(terminal, 65_536)
    os.write(terminal, b"\x03")
    with suppress(OSError):  # the other end is closed
        while more := os.read(terminal, 65_536):
            seen += more
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


def test_ctrl_c_at_a_confirmation_ends_the_command_at_once(run: Run, tmp_path: Path) -> None:
    key = created(run)
    status, said = at_a_terminal(tmp_path, "keys", "delete", key["id"], until=b"[y/N]")
    assert status == 130
    assert b"Traceback" not in said
    assert run("keys", "show", key["id"], "--json").json["deleted_at"] is None
    status, said = at_a_terminal(tmp_path, "keys", "verify", until=b"Key: ")
    assert status == 130
    assert b"Traceback" not in said


def keys_in(file: Path) -> int:
    with suppress(sqlite3.Error), sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        count: int = connection.execute("SELECT count(*) FROM api_keys").fetchone()[0]
        return count
    return 0


def test_ctrl_c_in_a_benchmark_ends_it_at_once_and_without_a_trace(tmp_path: Path) -> None:
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # whatever started the tests
    code = f"{listening}; from strongroom.cli import main; raise SystemExit(main(['bench', '--seconds', '600']))"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while not any(keys_in(file) >= 200 for file in tmp_path.glob("*/bench.db")):
            assert time.monotonic() < deadline, "the keys to measure with were not made"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("strongroom: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
