"""`strongroom migrate`: wrong calls, plans, reports, interruptions, rollback."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.migrate import fill
from strongroom import Strongroom, config
from strongroom.cli import migrate as command
from tests.cli.test_cli import Run, process, run
from tests.helpers.server_process import running
from tests.helpers.servers import postgres
from tests.helpers.waiting import PATIENCE_S

__all__ = ["run"]  # the fixture


@pytest.fixture
def source(run: Run, tmp_path: Path) -> str:
    """A store with three keys."""
    for number in range(3):
        assert run("keys", "create", "--name", f"key {number}", "--json").status == 0
    return f"sqlite:///{tmp_path}/store.db"


def rows(file: Path, table: str = "api_keys") -> list[Any]:
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        return connection.execute(f"SELECT id, name, hash, created_at FROM {table} ORDER BY id").fetchall()


def sealed(url: str) -> None:
    """Seal the journal, as a server does."""

    async def seal() -> None:
        async with Strongroom.open(url, sealing=False) as room:
            await room.sealer.seal_now()

    asyncio.run(seal())


def test_migrate_reports_that_the_journals_trees_have_equal_roots(run: Run, source: str, tmp_path: Path) -> None:
    sealed(source)
    moved = run("migrate", "--from", source, "--to", f"sqlite:///{tmp_path}/first.db")
    assert moved.status == 0
    assert re.search(r"^equal roots +2 trees$", moved.out, re.MULTILINE), moved.out
    assert "STRONGROOM_JOURNAL_SIGNING_KEY" in moved.err
    again = run(
        "migrate", "--from", f"sqlite:///{tmp_path}/first.db", "--to", f"json:///{tmp_path}/second.json", "--json"
    )
    assert again.status == 0
    assert (again.json["trees"]["trees"], again.json["trees"]["unequal"]) == (2, 0)


def test_migrate_names_a_record_that_was_changed_behind_strongroom(run: Run, source: str, tmp_path: Path) -> None:
    sealed(source)
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("UPDATE _journal SET actor = 'eve' WHERE id = (SELECT max(id) FROM _journal)")
    moved = run("migrate", "--from", source, "--to", f"sqlite:///{tmp_path}/target.db")
    assert moved.status == 1
    assert re.search(r"^equal roots +1 of 2 trees$", moved.out, re.MULTILINE), moved.out
    assert "the journal of tenant 'default' differs at index" in moved.err
    assert moved.err.count("differs at index") == 1
    assert re.search(r"^stands at +following$", moved.out, re.MULTILINE), "the target stays closed"


def test_migrate_plans_moves_and_reports(run: Run, source: str, tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path}/target.db"
    plan = run("migrate", "--from", source, "--to", target, "--plan")
    assert (plan.status, plan.err) == (0, "")
    assert "create collection api_keys" in plan.out
    assert re.search(r"^api_keys +3$", plan.out, re.MULTILINE)

    moved = run("migrate", "--from", source, "--to", target, "--json")
    assert (moved.status, moved.err) == (0, f"making a new store: {tmp_path}/target.db\n")
    assert (moved.json["phase"], moved.json["equal"]) == ("done", True)
    (keys,) = [part for part in moved.json["parts"] if part["collection"] == "api_keys"]
    assert (keys["documents"], keys["target_documents"], keys["equal"]) == (3, 3, True)
    assert keys["checksum"] == keys["target_checksum"]
    assert len(rows(tmp_path / "target.db")) == 3
    assert rows(tmp_path / "target.db") == rows(tmp_path / "store.db")

    again = run("migrate", "--from", source, "--to", target)
    assert again.status == 0
    assert "already" in again.out
    assert "set STRONGROOM_STORE" in again.err
    assert len(run("keys", "list", "--store", target, "--json").json["items"]) == 3


def test_every_problem_of_a_call_is_reported_at_once_and_no_store_is_created(run: Run, tmp_path: Path) -> None:
    missing = f"sqlite:///{tmp_path}/nothing/here.db"
    ran = run("migrate", "--from", missing, "--to", "nonsense://user:secret@host/x", "--abort", "--rollback", "--json")
    assert ran.status == 2
    assert sorted(error["path"] for error in ran.json["error"]["errors"]) == ["--from", "--rollback", "--to"]
    assert "secret" not in ran.out
    assert not (tmp_path / "nothing").exists()
    ran = run("migrate", "--from", missing, "--to", missing)
    assert ran.status == 2
    assert "names the same store" in ran.err
    assert "there is no file" in ran.err
    assert run("migrate", "--from", "json://:memory:", "--to", missing).status == 2
    assert run("migrate", "--to", missing).status == 2


def test_source_and_target_may_not_be_one_file_under_two_names(run: Run, source: str, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "store.db")
    ran = run("migrate", "--from", source, "--to", f"sqlite:///{tmp_path}/link.db", "--overwrite")
    assert (ran.status, "names the same store" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://app:secret@db:5432/x?schema=s", "postgresql://app@db:5432/x?schema=s"),
        ("postgresql://db/x?user=app&password=secret&sslmode=require", "postgresql://db/x?user=app&sslmode=require"),
        ("postgresql://app:se%40cret@db/x", "postgresql://app@db/x"),
        ("postgresql://[secret", "postgresql:…"),
        ("firestore://project/database", "firestore://project/database"),
    ],
)
def test_a_password_is_never_shown_or_kept(url: str, shown: str) -> None:
    assert command.shown(url) == shown
    assert "secret" not in command.shown(url)


def test_a_target_in_use_is_refused_then_replaced_and_restored(run: Run, source: str, tmp_path: Path) -> None:
    target = f"json:///{tmp_path}/target.json"
    assert run("keys", "create", "--name", "theirs", "--store", target, "--json").status == 0
    both = ("migrate", "--from", source, "--to", target)
    ran = run(*both)
    assert (ran.status, "is not empty" in ran.err, "--overwrite" in ran.err) == (2, True, True)
    plan = run(*both, "--plan", "--json")
    assert (plan.status, [p["path"] for p in plan.json["problems"]]) == (1, ["--to"])
    before = json.loads((tmp_path / "target.json").read_text())["global"]["api_keys"]

    backup = tmp_path / "backup.gz"
    moved = run(*both, "--overwrite", "--backup", str(backup), "--json")
    assert (moved.status, moved.json["backup"]) == (0, str(backup))
    assert len(run("keys", "list", "--store", target, "--json").json["items"]) == 3
    undone = run(*both, "--rollback", "--json")
    assert (undone.status, undone.json["phase"]) == (0, "rolled back")
    after = json.loads((tmp_path / "target.json").read_text())["global"]["api_keys"]
    assert [{**key, "version": 0} for key in after.values()] == [{**key, "version": 0} for key in before.values()]
    assert run(*both, "--rollback").status == 0
    assert run("migrate", "--from", source, "--to", f"sqlite:///{tmp_path}/new.db", "--rollback").status == 1


def test_differences_are_named_and_set_the_exit_status(
    run: Run, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from strongroom.storage.port import Create
    from strongroom.storage.sqlite.store import SqliteStore

    commit = SqliteStore.commit

    def lossy(self: SqliteStore, batch: Any) -> Any:
        if self.path.endswith("target.db"):
            kept = [o for o in batch.operations if not (isinstance(o, Create) and o.document.get("name") == "key 1")]
            batch = type(batch)(batch.tenant, tuple(kept), batch.now_us)
        return commit(self, batch)

    monkeypatch.setattr(SqliteStore, "commit", lossy)
    ran = run("migrate", "--from", source, "--to", f"sqlite:///{tmp_path}/target.db")
    assert ran.status == 1
    (lost,) = [id for id, name, *_ in rows(tmp_path / "store.db") if name == "key 1"]
    assert f"api_keys/{lost}: missing in the target" in ran.err
    assert "DIFFERENT" in ran.out


def test_live_stops_before_the_switch_over_and_asks_at_a_terminal(
    run: Run, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"sqlite:///{tmp_path}/target.db"
    both = ("migrate", "--from", source, "--to", target)
    ready = run(*both, "--live")
    assert ready.status == 0
    assert "ready to switch over" in ready.out
    assert run("keys", "create", "--name", "meanwhile", "--json").status == 0
    assert run("keys", "create", "--name", "no", "--store", target, "--json").status == 1
    monkeypatch.setattr(command, "is_interactive", lambda: True)
    assert run(*both, "--live", stdin="n\n").status == 0
    assert run("keys", "create", "--name", "meanwhile too", "--json").status == 0
    moved = run(*both, "--live", stdin="y\n")
    assert (moved.status, "stands at" in moved.out, "Switch over now?" in moved.err) == (0, True, True)
    refused = run("keys", "create", "--name", "too late", "--json")
    assert (refused.status, refused.json["error"]["code"]) == (1, "writes_off")
    assert run("keys", "list", "--json").status == 0
    names = {item["name"] for item in run("keys", "list", "--store", target, "--json").json["items"]}
    assert names == {"key 0", "key 1", "key 2", "meanwhile", "meanwhile too"}
    aborted = run(*both, "--abort")
    assert (aborted.status, "done" in aborted.err) == (1, True)


def test_a_moved_source_answers_reads_and_names_the_target_to_operators_only(
    run: Run, source: str, tmp_path: Path
) -> None:
    target = f"json:///{tmp_path}/target.json"
    assert run("migrate", "--from", source, "--to", target, "--live", "--switch").status == 0
    refused = run("keys", "create", "--name", "too late", "--json")
    assert (refused.status, target in refused.json["error"]["message"]) == (1, False)
    with running(tmp_path, STRONGROOM_STORE=source) as server:
        with server.client() as client:  # its key was never made here, as the source had no server before
            assert client.get("/v1/keys").status_code == 401
        status, _, log = server.stop()
    (told,) = [line for line in map(json.loads, log.splitlines()) if "the other store is" in line["message"]]
    assert (status, told["level"], told["message"].rpartition(" ")[2]) == (0, "warning", command.shown(target))


def test_the_role_that_migrates_is_not_the_one_that_serves() -> None:
    said = command.what_next("postgresql://strongroom_owner@db:5432/app?sslmode=require")
    assert "postgresql://db:5432/app:" in said
    assert "as the application's role (strongroom_app" in said
    assert command.what_next("json:///x.json").endswith("set STRONGROOM_STORE to it wherever it is used")


async def everything_of(url: str) -> list[str]:
    """What a server with this store makes, as a plan of the command line would list it."""
    from strongroom.server.run import _opened

    async with _opened(config.load(store=url)) as room:
        return [collection.name for collection in room.database.registry.collections]


def test_the_command_line_and_the_server_know_the_same_entities(run: Run, tmp_path: Path) -> None:
    planned = run("schema", "plan", "--store", f"json:///{tmp_path}/new.json", "--json").json["changes"]
    asked = {change["collection"] for change in planned if change["kind"] == "create collection"}
    served = asyncio.run(everything_of(f"json:///{tmp_path}/served.json"))
    assert asked == set(served)
    assert {"policies", "signals", "actions", "coordination_status"} < asked
    assert run("schema", "plan", "--store", f"json:///{tmp_path}/served.json", "--json").json == {"changes": []}
    both = ("--from", f"json:///{tmp_path}/served.json", "--to", f"sqlite:///{tmp_path}/store.db")
    moved = run("migrate", *both, "--json")
    assert (moved.status, moved.err) == (0, "")
    assert "make tables" not in run("migrate", *both, "--plan").err


def test_a_plan_with_the_applications_role_says_whose_url_is_needed(
    run: Run, source: str, request: pytest.FixtureRequest
) -> None:
    server = postgres.start(request, "postgres-18", postgres.bundled())
    schema = postgres.new_schema()
    names = {part: f"{schema}_{part}" for part in ("owner", "application", "retention")}
    options = [word for part, name in names.items() for word in (f"--{part}", name)]
    owner, app = (server.url(schema, names[part]) for part in ("owner", "application"))
    server.execute(run("schema", "roles", *options, "--store", owner).out)
    assert run("schema", "apply", "--store", owner).status == 0
    plan = run("migrate", "--from", source, "--to", app, "--plan", "--json")
    assert (plan.status, [p["path"] for p in plan.json["problems"]]) == (1, ["--to"])
    (problem,) = plan.json["problems"]
    assert f"{names['application']} may not make tables" in problem["message"]
    assert names["owner"] in problem["message"]
    assert run("migrate", "--from", source, "--to", app).status == 2
    moved = run("migrate", "--from", source, "--to", owner)
    assert (moved.status, "as the application's role" in moved.err) == (0, True)
    assert len(run("keys", "list", "--store", app, "--json").json["items"]) == 3


def test_ctrl_c_says_how_to_resume_and_resuming_works(run: Run, tmp_path: Path) -> None:
    """The command is stopped while a terminal shows its progress."""
    asyncio.run(fill(f"sqlite:///{tmp_path}/large.db", 3_000))
    both = ["migrate", "--from", f"sqlite:///{tmp_path}/large.db", "--to", f"sqlite:///{tmp_path}/moved.db"]
    ours, theirs = pty.openpty()
    whole = [sys.executable, "-m", "strongroom.cli", *both, "--batch", "20"]
    with subprocess.Popen(whole, stderr=theirs, stdout=subprocess.DEVNULL, cwd=tmp_path) as stopped:
        os.close(theirs)
        seen = b""
        while b"copying documents" not in seen:
            seen += os.read(ours, 65_536)
        stopped.send_signal(signal.SIGINT)
        with suppress(OSError):  # the other end is closed
            while more := os.read(ours, 65_536):
                seen += more
        assert stopped.wait(2 * PATIENCE_S) == 130
    os.close(ours)
    assert b"the same command continues" in seen
    ran = process(*both, "--json")
    assert (ran.status, ran.json["equal"]) == (0, True)
    assert ran.json["documents"] >= 6_000, "those, and the journal's trees"
