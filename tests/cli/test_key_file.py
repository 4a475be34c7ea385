"""`strongroom import` and `export` of key files: reports, files, and interruptions."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import time_machine

from strongroom import Strongroom
from strongroom.keys.transfer import key_file_chunks
from strongroom.keys.transfer.key_file import KeyRow
from strongroom.keys.transfer.key_file_rows import Maker
from tests.cli.test_cli import Run, process, run
from tests.helpers.paths import DATA
from tests.helpers.waiting import PATIENCE_S

__all__ = ["run"]  # the fixture

KEY_FILES = DATA / "keys"
PLAIN, HASHED, BROKEN = (str(KEY_FILES / f"{name}.json") for name in ("plain", "hashed", "plain_broken"))
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def generated(file: Path, count: int) -> Path:
    """A plain file of `count` keys, each of which has live usage."""
    start = datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
    rows = [
        {
            "key": f"pk_{number:032x}",
            "name": f"key {number}",
            "token_limit_per_5h": 100_000,
            "expiry_date": "2099-01-01T00:00:00Z",
            "created_at": "2026-01-01T00:00:00Z",
            "last_used": "2026-01-02T00:00:00Z",
            "total_lifetime_tokens": 1_000 + number,
            "usage_windows": [{"window_start": start, "tokens_used": number}],
        }
        for number in range(count)
    ]
    file.write_text(json.dumps({"keys": rows}))
    return file


async def counted(url: str) -> tuple[int, int]:
    """How many keys there are, and how many journal records of keys."""
    async with Strongroom.open(url) as room:
        cursor, records, keys = None, 0, 0
        while (page := await room.store.changes(cursor)).records:
            cursor = page.cursor
            records += sum(record.collection == "api_keys" for record in page.records)
        while (listed := await room.keys.list(limit=1_000, cursor=cursor if keys else None)).items:
            keys, cursor = keys + len(listed.items), listed.next_cursor
            if cursor is None:
                break
        return keys, records


# --- What is told -----------------------------------------------------------------------------------------------


def test_the_broken_file_imports_nothing_and_all_nine_rows_are_named(run: Run) -> None:
    ran = run("import", BROKEN)
    assert ran.status == 1
    for row in range(1, 10):
        assert f"keys.{row}." in ran.out
    assert "keys.0." not in ran.out
    assert "8 of 12 rows are invalid; nothing was imported" in ran.err
    assert run("keys", "list", "--json").json["items"] == []

    ran = run("import", BROKEN, "--json")
    assert (ran.status, ran.err) == (1, "")
    assert [error["path"].split(".")[1] for error in ran.json["error"]["errors"]] == list("12345678")
    assert "keys.9.expiry_date" in [note["path"] for note in ran.json["notes"]]
    assert (ran.json["rows"], ran.json["refused"], ran.json["written"]) == (12, 8, 0)


def test_valid_rows_of_the_broken_file_are_imported_on_request(run: Run) -> None:
    with time_machine.travel(NOW, tick=False):
        ran = run("import", BROKEN, "--skip-invalid", "--json")
        assert (ran.status, ran.json["new"], ran.json["refused"], ran.json["written"]) == (0, 4, 8, 4)
        assert ran.json["checksums"]["equal"] is True
        rows = [row for row in json.loads(Path(BROKEN).read_text())["keys"] if "key" in row]
        codes = {row["name"]: run("keys", "verify", row["key"], "--json").json["code"] for row in rows}
    assert codes["data-science 9"] == "EXPIRED"  # its offset makes it 05:30 in UTC
    valid = [name for name, code in codes.items() if code == "VALID"]
    assert valid == ["billing-worker 0", "data-science 4", "QA bot 10", "Asha Rao 11"]  # 4 has the same text as 0
    assert codes["Asha Rao 7"] == "NOT_FOUND"


def test_a_dry_run_reports_its_effect_and_writes_nothing(run: Run) -> None:
    ran = run("import", PLAIN, "--dry-run", "--json")
    assert (ran.status, ran.json["new"], ran.json["written"], ran.json["dry_run"]) == (0, 40, 0, True)
    assert ran.json["checksums"] is None
    assert "would be imported" in run("import", PLAIN, "--dry-run").out
    assert run("keys", "list", "--json").json["items"] == []
    assert run("import", BROKEN, "--dry-run").status == 1


def test_an_import_reports_counts_and_checksums_and_can_be_repeated(run: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    for file, count in ((PLAIN, 40), (HASHED, 25)):
        first = run("import", file, "--tenant", "acme", "--json").json
        assert (first["new"], first["unchanged"], first["written"]) == (count, 0, count)
        before = asyncio.run(counted(url))
        again = run("import", file, "--tenant", "acme", "--json")
        assert again.status == 0
        assert (again.json["new"], again.json["unchanged"], again.json["written"]) == (0, count, 0)
        assert again.json["checksums"] == first["checksums"]
        assert asyncio.run(counted(url)) == before
    said = run("import", PLAIN, "--tenant", "acme").out
    assert said.count("sha256:") == 2
    assert "(40 keys)" in said


def test_differences_are_reported_and_applied_on_request(run: Run, tmp_path: Path) -> None:
    run("import", PLAIN)
    rows = json.loads(Path(PLAIN).read_text())
    rows["keys"][0]["name"] = "renamed"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(rows))
    ran = run("import", str(changed), "--json")
    assert (ran.status, ran.json["changed"], ran.json["written"]) == (0, 1, 0)
    assert ran.json["differences"][0]["fields"] == [{"field": "name", "file": "renamed", "store": "billing-worker 0"}]
    assert "--update overwrites them" in run("import", str(changed)).out
    ran = run("import", str(changed), "--update", "--json")
    assert (ran.json["changed"], ran.json["written"], ran.json["checksums"]["file_keys"]) == (1, 1, 40)
    assert run("import", str(changed), "--json").json["unchanged"] == 40


def test_keys_of_another_tenant_are_refused(run: Run) -> None:
    run("import", PLAIN, "--tenant", "acme")
    ran = run("import", PLAIN, "--tenant", "globex", "--json")
    assert (ran.status, ran.json["refused"], ran.json["written"]) == (1, 40, 0)
    assert "for the tenant 'acme'" in ran.json["error"]["errors"][0]["message"]
    assert run("import", PLAIN, "--tenant", "*").status == 2


def test_an_import_whose_checksums_differ_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    values_of = Maker.values_of

    def wrong(self: Maker, row: KeyRow, seal: Any) -> Any:
        return values_of(self, replace(row, name=row.name.upper()), seal)

    monkeypatch.setattr(Maker, "values_of", wrong)
    ran = run("import", HASHED)
    assert (ran.status, "differ in 25 keys" in ran.err) == (1, True)


# --- Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such file or directory"),
        ("", 'is empty: expected {"keys": …}'),
        ('{"keys": [}', "is not JSON: line 1, column 11: "),
        ("[1]", "is not a JSON object"),
        ('{"users": []}', 'has no "keys"'),
    ],
)
def test_an_unreadable_file_is_reported_in_one_sentence(
    run: Run, tmp_path: Path, content: str | None, sentence: str
) -> None:
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    ran = run("import", str(file))
    assert (ran.status, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert ran.err.startswith(f"strongroom: {file}: {sentence}")


def test_a_folder_a_forbidden_file_and_a_huge_file_are_reported_in_one_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("import", str(tmp_path)).err == f"strongroom: {tmp_path}: is a directory\n"
    monkeypatch.setattr(key_file_chunks, "MAX_FILE_BYTES", 1_000)
    assert run("import", PLAIN, "--dry-run").status == 0  # read in chunks, however large it is
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({"version": 1, **json.loads(Path(PLAIN).read_text())}))
    ran = run("import", str(odd))
    assert (ran.status, "is larger than" in ran.err) == (1, True)

    def forbidden(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert run("import", PLAIN).err == f"strongroom: {PLAIN}: permission denied\n"


def test_an_export_is_read_by_its_owner_only_and_overwrites_only_by_force(run: Run, tmp_path: Path) -> None:
    run("import", PLAIN)
    file = tmp_path / "out.json"
    ran = run("export", str(file), "--json")
    assert (ran.status, ran.json["keys"]) == (0, 40)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    run("keys", "create", "--name", "one more")
    ran = run("export", str(file))
    assert (ran.status, "--force" in ran.err) == (1, True)
    assert file.read_bytes() == before
    file.chmod(0o644)
    assert run("export", str(file), "--force").status == 0
    assert len(json.loads(file.read_text())["keys"]) == 41
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
    assert run("export", str(tmp_path)).err == f"strongroom: {tmp_path}: is a directory\n"
    assert "its folder does not exist" in run("export", str(tmp_path / "no" / "out.json")).err


def test_an_export_that_fails_leaves_the_old_file_and_no_other(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.json"
    file.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("strongroom.cli.files.os.fsync", full)
        ran = run("export", str(file), "--force")
    assert (ran.status, ran.err) == (1, f"strongroom: {file}: no space left on device\n")
    assert file.read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize("links", [True, False])
def test_an_export_never_overwrites_a_file_that_appeared_meanwhile(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def none(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr("strongroom.cli.files.os.link", none)
    file = tmp_path / "out.json"
    assert run("export", str(file)).status == 0
    monkeypatch.setattr("strongroom.cli.keyfile.check_target", lambda *_: None)
    file.write_text("theirs")
    assert run("export", str(file)).status == 1
    assert file.read_text() == "theirs"


def test_an_export_imported_into_another_store_exports_the_same(run: Run, tmp_path: Path) -> None:
    with time_machine.travel(NOW, tick=False):
        for shape, file in (("plain", PLAIN), ("hashed", HASHED)):
            one, two = tmp_path / f"{shape}-1.json", tmp_path / f"{shape}-2.json"
            first, second = (f"sqlite:///{tmp_path}/{shape}-{n}.db" for n in (1, 2))
            assert run("import", file, "--store", first).status == 0
            assert run("export", str(one), "--shape", shape, "--store", first).status == 0
            assert run("import", str(one), "--store", second).status == 0
            assert run("export", str(two), "--shape", shape, "--store", second).status == 0
            assert one.read_bytes() == two.read_bytes()


def test_an_export_reports_what_its_format_cannot_hold(run: Run, tmp_path: Path) -> None:
    id = json.loads(run("keys", "create", "--name", "off", "--json").out)["id"]
    run("keys", "disable", id)
    run("keys", "create", "--name", "on", "--permission", "chat:write")
    ran = run("export", str(tmp_path / "out.json"))
    assert "left out 1 key" in ran.err
    assert "1 key has permissions" in ran.err
    assert "wrote 1 keys" in ran.out


# --- Stopped anywhere -------------------------------------------------------------------------------------------


STOPPING_IN_ITS_SECOND_TRANSACTION = """
import asyncio, sys
from strongroom.keys.transfer import import_workers, key_file_import
from strongroom.cli import main

key_file_import.MIN_FOR_WORKERS = 1  # so that there are processes to be stopped with it

portions, whole = [], import_workers.Portion.__aiter__

async def half(self):
    portions.append(self)
    async for pack in whole(self):
        yield pack
        if len(portions) == 2:
            print("half-way", flush=True)
            await asyncio.sleep(3600)

import_workers.Portion.__aiter__ = half
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_import_is_completed_by_the_same_command(tmp_path: Path, number: signal.Signals) -> None:
    count = 3_000
    file, url = generated(tmp_path / "keys.json", count), f"sqlite:///{tmp_path}/store.db"
    command = [sys.executable, "-c", STOPPING_IN_ITS_SECOND_TRANSACTION, "import", str(file), "--store", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as importing:
        assert importing.stdout is not None
        assert importing.stdout.readline() == "half-way\n"
        importing.send_signal(number)
        _, err = importing.communicate(timeout=2 * PATIENCE_S)
    if number is signal.SIGINT:
        assert (importing.returncode, err.count("\n")) == (130, 2)  # and that a new store is made
        assert "the same command imports the rest" in err
    keys, records = asyncio.run(counted(url))
    assert 100 <= keys < count
    assert records == keys

    ran = process("import", str(file), "--store", url, "--json")
    assert ran.status == 0, ran
    assert (ran.json["unchanged"], ran.json["new"]) == (keys, count - keys)
    assert ran.json["checksums"]["equal"] is True
    assert ran.json["checksums"]["store_keys"] == count
    assert ran.json["checksums"]["used_since"] == 0
    assert asyncio.run(counted(url)) == (count, count)

    fresh = process("import", str(file), "--store", f"sqlite:///{tmp_path}/fresh.db", "--json")
    assert fresh.json["checksums"]["store"] == ran.json["checksums"]["store"]


def test_progress_is_on_standard_error_only_when_that_is_a_terminal(tmp_path: Path) -> None:
    file, url = generated(tmp_path / "keys.json", 400), f"sqlite:///{tmp_path}/store.db"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "strongroom.cli", "import", str(file), "--store", url, "--json"]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as importing:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4_096)
            except OSError:  # the other end is closed: Linux tells it so
                break
            if not part:
                break
            shown += part
        out, _ = importing.communicate(timeout=2 * PATIENCE_S)
    os.close(ours)
    assert b"importing" in shown
    assert json.loads(out)["new"] == 400
    assert process("import", str(file), "--store", url, "--json").err == ""


def test_an_unknown_format_is_refused_with_a_sentence(run: Run) -> None:
    ran = run("export", "keys.json", "--shape", "xml")
    assert ran.status == 2
    assert ran.err.startswith("strongroom: --shape: found 'xml', expected one of 'plain', 'hashed', 'records'")
