"""The command line: exit statuses, one JSON document, sentences instead of tracebacks, the key commands, its docs."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from strongroom import Limit, __version__
from strongroom.cli import app, bench, docs, main, output, shortforms
from strongroom.errors import (
    ConfigError,
    Conflict,
    InvalidInput,
    NotFound,
    Problem,
    SchemaError,
    Unavailable,
)
from tests.helpers.paths import ROOT
from tests.helpers.waiting import PATIENCE_S

COMMANDS = (
    "serve", "import", "export", "migrate", "bench", "doctor", "estimate",
    "audit list", "audit show", "audit export", "audit checkpoint", "audit keys", "audit verify", "audit evidence",
    "audit retention", "audit hold", "audit redact",
    "keys create", "keys list", "keys show", "keys verify", "keys rotate",
    "keys disable", "keys enable", "keys delete", "keys stats", "keys claim", "keys restore", "keys bulk",
    "keys rotate-pepper", "keys update", "keys recover-administrator", "keys mend-clock",
    "quotas set", "quotas list", "quotas show", "quotas stats", "quotas delete", "quotas mend-clock",
    "webhooks create", "webhooks list", "webhooks show", "webhooks update", "webhooks rotate-secret",
    "webhooks delete", "webhooks test", "webhooks deliveries", "webhooks redrive",
    "leaks report", "leaks list", "leaks policy",
    "tenants create", "tenants list", "tenants show", "tenants update", "tenants suspend", "tenants resume",
    "tenants export", "tenants import", "tenants delete", "tenants statements",
    "writes off", "writes on", "writes status",
    "schema plan", "schema apply", "schema views", "schema export", "schema roles", "schema advise", "schema retain",
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on standard output."""
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process, on a new SQLite store."""
    for name in [n for n in os.environ if n.startswith(("STRONGROOM_", "DATABASE_", "DB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STRONGROOM_STORE", f"sqlite:///{tmp_path}/store.db")
    (tmp_path / "store.db").touch()  # a store that nothing was written to yet
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = main(arguments)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


def process(*arguments: str, stdin: str = "", **environment: str) -> Ran:
    """Run one command line in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "strongroom.cli", *arguments],
        input=stdin, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def created(run: Run, *options: str) -> dict[str, Any]:
    ran = run("keys", "create", "--name", "worker", "--json", *options)
    assert ran.status == 0, ran
    return dict(ran.json)


# --- The whole --------------------------------------------------------------------------------------------------


def below(command: Any, name: str = "") -> Iterator[str]:
    if not hasattr(command, "commands"):
        yield name
    for part, inner in getattr(command, "commands", {}).items():
        yield from below(inner, f"{name} {part}".strip())


def test_the_commands_are_exactly_these() -> None:
    assert sorted(below(typer.main.get_command(app))) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_the_common_options(run: Run, command: str) -> None:
    ran = run(*command.split(), "--help")
    assert (ran.status, ran.err) == (0, "")
    assert f"strongroom {command}" in ran.out.partition("Example:")[2]
    assert "--store" in ran.out
    assert "--json" in ran.out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["keys", "--help"], ["import", "--help"]])
def test_help_imports_no_heavy_module(arguments: list[str]) -> None:
    heavy = "strongroom.app pydantic_settings sqlalchemy fastapi uvicorn rich cryptography msgspec apsw asyncio"
    if arguments == ["--help"]:
        heavy += " pydantic"  # which Typer itself imports to read an option
    code = (
        f"import sys\nfrom strongroom.cli import main\nstatus = main({arguments!r})\n"
        f"sys.stderr.write(' '.join(n for n in {heavy.split()!r} if n in sys.modules))\nsys.exit(status)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout


def test_version_prints_the_version(run: Run) -> None:
    assert run("--version").out == f"strongroom {__version__}\n"


def test_completion_knows_the_commands() -> None:
    words = {"_STRONGROOM_COMPLETE": "complete_bash", "COMP_WORDS": "strongroom keys r", "COMP_CWORD": "2"}
    code = "import sys; sys.argv = ['strongroom']; from strongroom.cli import main; sys.exit(main())"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **words}
    )
    assert (ran.returncode, ran.stdout.split()) == (0, ["rotate", "restore", "recover-administrator", "rotate-pepper"])


def test_completion_can_be_shown() -> None:
    ran = process("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert ran.status == 0
    assert "_STRONGROOM_COMPLETE=complete_bash" in ran.out


def test_the_reference_pages_are_up_to_date() -> None:
    for name, page in docs.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), "run make docs"


def test_the_reference_says_every_command_and_setting() -> None:
    commands, settings = docs.cli_page(), docs.configuration_page()
    assert [c for c in COMMANDS if f"## strongroom {c}\n" not in commands] == []
    for name in ("STRONGROOM_STORE", "STRONGROOM_ADMIN_KEY", "DATABASE_URL", "FIRESTORE_EMULATOR_HOST"):
        assert f"| `{name}` |" in settings


# --- Exit statuses and errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "code", "words"),
    [
        (["keys", "show"], 2, "invalid_input", "Missing argument 'ID'"),
        (["keys", "nonsense"], 2, "invalid_input", "No such command 'nonsense'"),
        (["keys", "list", "--limit", "many"], 2, "invalid_input", "--limit"),
        (["keys", "list", "--nonsense"], 2, "invalid_input", "--nonsense"),
        (["keys", "list", "--limit", "0"], 2, "invalid_input", "expected 1 to 1000"),
        (["keys", "list", "--cursor", "nonsense"], 2, "invalid_input", "cursor"),
        (["keys", "list", "--store", "nonsense://x"], 2, "config_error", "nonsense://x"),
        (["keys", "show", "key_nope"], 1, "not_found", "there is no key 'key_nope'"),
        (["keys", "rotate", "key_nope", "--overlap", "soon"], 2, "invalid_input", "found the duration 'soon'"),
        (["keys", "verify", "x", "--cost", "tokens"], 2, "invalid_input", "expected NAME=VALUE"),
        (["keys", "verify", "x", "--ip", "nowhere"], 2, "invalid_input", "nowhere"),
        (["keys", "delete", "key_nope"], 2, "invalid_input", "confirm it with --yes"),
        (["schema", "plan", "--entities", "no_such_module"], 2, "config_error", "no_such_module"),
        (["import", "no-such-file.json"], 1, "key_file", "no such file"),
    ],
)  # fmt: skip
def test_a_failure_sets_the_status_and_prints_a_sentence_or_a_json_document(
    run: Run, arguments: list[str], status: int, code: str, words: str
) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (status, "")
    assert ran.err.startswith("strongroom: ")
    assert ran.err.count("\n") == 1
    assert words in ran.err
    ran = run(*arguments, "--json")
    assert (ran.status, ran.err) == (status, "")
    assert set(ran.json) == {"error"}
    assert set(ran.json["error"]) == {"code", "message", "errors"}
    assert (ran.json["error"]["code"], words in ran.json["error"]["message"]) == (code, True)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidInput([Problem("name", "is required")]), 2), (ConfigError("x"), 2), (NotFound(), 1), (Conflict(), 1),
        (Unavailable(), 1), (SchemaError(), 1), (RuntimeError("boom"), 1), (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)  # fmt: skip
def test_each_error_has_its_status_and_no_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("strongroom.cli.keys.in_store", fail)
    ran = run("keys", "list")
    assert ran.status == status
    assert "Traceback" not in ran.err
    assert ran.err.startswith("strongroom: ")
    assert run("keys", "list", "--json").json["error"]["message"]


def test_a_traceback_is_shown_on_request_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("strongroom.cli.keys.in_store", fail)
    assert "Traceback" in run("--debug", "keys", "list").err
    monkeypatch.setenv("STRONGROOM_DEBUG", "1")
    ran = run("keys", "list", "--json")
    assert "Traceback" in ran.err
    assert ran.json["error"]["code"] == "internal"


def test_exit_statuses_reach_the_shell(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/store.db"
    (tmp_path / "store.db").touch()
    assert process("--version").status == 0
    assert process("keys", "show", "nope", "--store", store).status == 1
    assert process("keys", "show", "--store", store).status == 2


def test_a_closed_pipe_prints_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m strongroom.cli schema export | head -1"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("{\n", "")


def test_a_json_store_that_another_process_uses_is_refused_with_a_sentence(run: Run, tmp_path: Path) -> None:
    store = f"json:///{tmp_path}/store.json"
    code = (
        "import asyncio, sys\nfrom strongroom import Strongroom\nasync def main():\n"
        f"    async with Strongroom.open({store!r}):\n"
        "        print('open', flush=True)\n        await asyncio.to_thread(sys.stdin.read)\nasyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        ran = run("keys", "list", "--store", store)
        holder.communicate()
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.count("\n") == 1


# --- Keys -------------------------------------------------------------------------------------------------------


def test_a_key_is_created_changed_and_deleted_by_commands(run: Run) -> None:
    ran = run(
        "keys", "create", "--name", "billing worker", "--tenant", "acme", "--user", "u1", "--permission", "chat:write",
        "--limit", "tokens=1000/5h", "--limit", "cost=2.50/calendar:day@Europe/Berlin", "--expires", "90d",
        "--allow-ip", "10.0.0.0/8", "--metadata", "plan=gold", "--metadata", "seats=3", "--prefix", "acme", "--json",
    )  # fmt: skip
    key = ran.json
    assert (ran.status, ran.err) == (0, "")
    assert key["key"].startswith("acme_SR1")
    assert key["metadata"] == {"plan": "gold", "seats": 3}
    assert [limit["limit"] for limit in key["limits"]] == [1_000, 2.5]
    assert datetime.fromisoformat(key["expires_at"]) - datetime.now(UTC) > timedelta(days=89)
    assert not {"hash", "sealed", "previous_hash"} & key.keys()

    shown = run("keys", "show", key["id"], "--json").json
    assert shown == {name: value for name, value in key.items() if name != "key"}
    use = ("keys", "verify", "--ip", "10.1.2.3", "--permission", "chat:write", "--cost", "tokens=600", "--json")
    answer = run(*use, stdin=key["key"] + "\n").json
    assert (answer["code"], answer["limits"][0]["remaining"], answer["tenant"]) == ("VALID", 400, "acme")
    ran = run(*use, key["key"])
    assert (ran.status, ran.json["code"], ran.json["valid"]) == (1, "USAGE_EXCEEDED", False)
    assert run("keys", "verify", key["key"], "--tenant", "other", "--json").json["code"] == "NOT_FOUND"
    stats = run("keys", "stats", key["id"], "--json").json
    assert (stats["count"], stats["totals"], stats["limits"][0]["used"]) == (1, {"tokens": 600}, 600)

    rotated = run("keys", "rotate", key["id"], "--overlap", "1h", "--json").json
    assert (rotated["id"], rotated["key"] == key["key"]) == (key["id"], False)
    small = ("keys", "verify", "--ip", "10.1.2.3", "--json")
    assert run(*small, key["key"]).json["code"] == run(*small, rotated["key"]).json["code"] == "VALID"
    assert run("keys", "disable", key["id"], "--json").json["enabled"] is False
    assert run(*small, rotated["key"]).json["code"] == "DISABLED"
    assert run("keys", "enable", key["id"], "--json").json["enabled"] is True
    assert run("keys", "delete", key["id"], "--yes", "--json").json == {"deleted": key["id"]}
    assert run(*small, rotated["key"]).json["code"] == "NOT_FOUND"
    assert run("keys", "list", "--json").json == {"items": [], "next_cursor": None}


def test_every_problem_of_a_call_is_reported_at_once(run: Run) -> None:
    ran = run(
        "keys", "create", "--name", "", "--limit", "nonsense", "--limit", "tokens=1/5h", "--limit",
        "tokens=1/calendar:eon", "--limit", "tokens=x/5h", "--expires", "soon", "--allow-ip", "nowhere",
        "--metadata", "plan", "--json",
    )  # fmt: skip
    assert ran.status == 2
    assert sorted(error["path"] for error in ran.json["error"]["errors"]) == [
        "allowed_ips", "expires_at", "limits.0", "limits.2.window.unit", "limits.3", "metadata.0", "name",
    ]  # fmt: skip
    ran = run("keys", "create", "--name", "", "--limit", "nonsense")
    assert ran.err.splitlines()[0] == "strongroom: 2 problems:"


def test_the_secret_is_shown_once_with_a_notice(run: Run) -> None:
    ran = run("keys", "create", "--name", "worker")
    (text,) = re.findall(r"sr_SR1\w{49}", ran.out)
    assert ran.out == f"{text}\n"  # a pipe gets nothing else
    assert "cannot be shown again" in ran.err
    (id,) = re.findall(r"^id +(key_\w+)$", ran.err, re.MULTILINE)
    for command in ("show", "stats", "disable", "enable"):
        assert text not in run("keys", command, id).out
    assert text not in run("keys", "list").out
    rotated = run("keys", "rotate", id)
    assert len(re.findall(r"sr_SR1\w{49}", rotated.out)) == 1
    assert "cannot be shown again" in rotated.err


def test_the_same_create_again_with_one_idempotency_key_is_one_key(run: Run) -> None:
    first = created(run, "--idempotency-key", "once")
    assert created(run, "--idempotency-key", "once")["key"] == first["key"]
    assert len(run("keys", "list", "--json").json["items"]) == 1


def test_keys_are_listed_by_tenant_and_user_in_pages(run: Run) -> None:
    for tenant, user in (("acme", "u1"), ("acme", "u2"), ("globex", "u1")):
        created(run, "--tenant", tenant, "--user", user)
    page = run("keys", "list", "--limit", "2", "--json").json
    rest = run("keys", "list", "--limit", "2", "--cursor", page["next_cursor"], "--json").json
    assert len({item["id"] for item in (*page["items"], *rest["items"])}) == 3
    assert [i["tenant"] for i in run("keys", "list", "--tenant", "globex", "--json").json["items"]] == ["globex"]
    assert len(run("keys", "list", "--user", "u1", "--json").json["items"]) == 2
    assert "there are more: --cursor " in run("keys", "list", "--limit", "2").err


def test_a_plain_table_is_aligned_and_shows_no_control_characters(run: Run) -> None:
    created(run)
    assert run("keys", "create", "--name", "李娜 \x1b[31m[red]", "--json").status == 0
    lines = run("keys", "list").out.splitlines()
    column = lines[0].index("KEY")
    assert len(lines) == 3
    assert lines[2][column:].startswith("sr_SR1")
    assert "李娜 \ufffd[31m[red]" in lines[1]


def test_a_terminal_shows_a_table_with_names_unescaped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    created(run, "--name", "[red]danger[/red] \x1b[31m")
    monkeypatch.setattr(output, "_is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "200")
    ran = run("keys", "list")
    assert "[red]danger[/red] \ufffd[31m" in ran.out


def test_delete_asks_for_confirmation_at_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    key = created(run)
    monkeypatch.setattr("strongroom.cli.options.is_interactive", lambda: True)
    ran = run("keys", "delete", key["id"], stdin="n\n")
    assert (ran.status, "Delete" in ran.err) == (1, True)
    assert run("keys", "show", key["id"]).status == 0
    assert run("keys", "delete", key["id"], stdin="y\n").status == 0
    assert run("keys", "show", key["id"], "--json").json["deleted_at"] is not None


def test_changes_are_in_the_journal_under_the_operators_name(run: Run, tmp_path: Path) -> None:
    import asyncio

    from strongroom import Strongroom

    created(run)

    async def actors() -> set[str]:
        async with Strongroom.open(f"sqlite:///{tmp_path}/store.db") as room:
            return {r.actor for r in (await room.store.changes(None)).records if r.collection == "api_keys"}

    (actor,) = asyncio.run(actors())
    assert actor.startswith("cli:")


def test_the_store_option_overrides_the_environment(run: Run, tmp_path: Path) -> None:
    created(run, "--store", f"sqlite:///{tmp_path}/other.db")
    assert run("keys", "list", "--json").json["items"] == []


# --- Short forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "resource", "amount", "window"),
    [
        ("tokens=100000/5h", "tokens", 100_000, {"kind": "rolling", "seconds": 18_000}),
        ("requests=60/60s", "requests", 60, {"kind": "rolling", "seconds": 60}),
        ("requests=60/rolling:1m", "requests", 60, {"kind": "rolling", "seconds": 60}),
        ("tokens=5/anchored:2d", "tokens", 5, {"kind": "anchored", "seconds": 172_800}),
        (
            "cost=25.50/calendar:month@Europe/Berlin",
            "cost",
            Decimal("25.50"),
            {"kind": "calendar", "unit": "month", "timezone": "Europe/Berlin"},
        ),
        ("cost=1/calendar:day", "cost", 1, {"kind": "calendar", "unit": "day", "timezone": "UTC"}),
        ("requests=9/total", "requests", 9, {"kind": "total"}),
        (
            "cost=100/total+0.5/day@Europe/Berlin",
            "cost",
            100,
            {"kind": "total", "refill": {"amount": Decimal("0.5"), "unit": "day", "timezone": "Europe/Berlin"}},
        ),
        (
            "tokens=100/total+5/month",
            "tokens",
            100,
            {"kind": "total", "refill": {"amount": 5, "unit": "month", "timezone": "UTC"}},
        ),
        ("tokens=100/total+5/1h", "tokens", 100, {"kind": "total", "refill": {"amount": 5, "seconds": 3600}}),
    ],
)
def test_limits_are_read_from_their_short_form_and_shown_in_it(
    text: str, resource: str, amount: Any, window: dict[str, Any]
) -> None:
    found = shortforms.limit(text)
    assert found == {"resource": resource, "limit": amount, "window": window}
    limit = Limit.model_validate(found)
    assert Limit.model_validate(shortforms.limit(shortforms.show_limit(limit.model_dump()))) == limit


def test_limits_of_some_models_and_on_concurrency_have_a_short_form() -> None:
    text = "tokens=9/1h models=gpt-*,o1 routes=/chat"
    limit = Limit.model_validate(shortforms.limit(text))
    assert (limit.models, limit.routes) == (("gpt-*", "o1"), ("/chat",))
    assert shortforms.show_limit(limit.model_dump()) == text
    open_now = Limit.model_validate(shortforms.limit("concurrency=5"))
    assert (open_now.resource, open_now.limit) == ("concurrency", 5)
    assert shortforms.show_limit(open_now.model_dump()) == "concurrency=5"
    for wrong in ("tokens=9/1h models", "tokens=9/1h models=", "tokens=9/1h users=a", "tokens=9/1h models=a models=b"):
        with pytest.raises(ValueError, match="expected models=NAME"):
            shortforms.limit(wrong)
    with pytest.raises(ValueError, match="found the refill '5', expected for example 10/day"):
        shortforms.limit("tokens=9/total+5")


@given(st.text(max_size=30) | st.from_regex(r"[a-z]{1,5}=[0-9.]{0,6}/[a-z0-9:@+/ =]{0,12}", fullmatch=True))
def test_a_short_form_of_a_limit_is_read_or_refused(text: str) -> None:
    for read in (
        shortforms.limit,
        shortforms.seconds,
        lambda t: shortforms.moment(t, datetime.now(UTC)),
        shortforms.pair,
    ):
        sentence = "found it"
        try:
            assert read(text) is not None
        except ValueError as error:
            sentence = str(error)
        assert sentence.startswith("found ")


@pytest.mark.parametrize("text", ["2027-01-01T00:00:00", "soon", "5", "h", "-5h", "999999999999w", ""])
def test_invalid_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="found"):
        shortforms.moment(text, datetime.now(UTC))


# --- Schema, bench, serve ---------------------------------------------------------------------------------------


def test_the_schema_is_planned_applied_and_then_matches(run: Run, tmp_path: Path) -> None:
    module = "own_entities_of_the_cli_test"
    (tmp_path / f"{module}.py").write_text(
        'from strongroom import Entity\n\n\nclass Note(Entity, collection="notes"):\n    text: str\n'
    )
    own = ("--entities", module)
    planned = run("schema", "plan", *own, "--json").json["changes"]
    assert {"kind": "create collection", "collection": "notes"}.items() <= next(
        c for c in planned if c["collection"] == "notes"
    ).items()
    assert run("schema", "plan", *own, "--json").json["changes"] == planned  # planning changed nothing
    ran = run("schema", "apply", *own)
    assert (ran.status, "create collection notes" in ran.out) == (0, True)
    assert run("schema", "plan", *own, "--json").json == {"changes": []}
    assert "matches the declarations" in run("schema", "plan", *own).err
    exported = run("schema", "export", *own).json
    assert exported["notes"]["properties"]["text"]["type"] == "string"
    assert "api_keys" in exported


def test_bench_measures_and_leaves_no_keys_behind(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "KEYS", 3)
    store = ("--store", f"sqlite:///{tmp_path}/bench.db")
    measured = run("bench", "--seconds", "0.1", "--callers", "2", "--json", *store).json
    assert all(result["per_second"] > 0 for result in measured["results"])
    assert run("keys", "list", "--json", *store).json["items"] == []
    ran = run("bench", "--seconds", "0.1", "--callers", "2")
    assert (ran.status, "verify" in ran.out) == (0, True)
    assert (tmp_path / "store.db").stat().st_size == 0  # without --store it never touches the configured one


@pytest.mark.server
def test_serve_runs_until_it_is_stopped_and_keeps_standard_output_clean(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "strongroom.cli", "serve", "--port", "0", "--json"]
    store = {**os.environ, "STRONGROOM_STORE": f"sqlite:///{tmp_path}/store.db"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=store) as server:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"listening at (http://[0-9.:]+)", line):
                urllib.request.urlopen(f"{found[1]}/healthz", timeout=PATIENCE_S).close()  # noqa: S310
                break
        server.send_signal(signal.SIGTERM)
        out, _ = server.communicate(timeout=PATIENCE_S)
    assert server.returncode == 0, (lines, out)
    assert json.loads(out) == {"stopped": True}
    assert any("administrator" in line for line in lines)
    assert f"(strongroom {__version__}, store sqlite:///{tmp_path}/store.db, limits durable)" in lines[-1]


def test_serve_reports_wrong_settings(run: Run) -> None:
    ran = run("serve", "--workers", "2", "--store", "json:///x.json")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("strongroom: --workers=2 and a json: store")
