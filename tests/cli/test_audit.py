"""`strongroom audit`: what an auditor types, with the exit statuses that scripts rely on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from strongroom import Strongroom
from strongroom.cli import main

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in an empty folder, on a store with a few sealed records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STRONGROOM_STORE", "sqlite:///store.db")

    def run(*arguments: str, status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main(arguments) == status, capsys.readouterr()
        return capsys.readouterr()

    made = json.loads(run("keys", "create", "--name", "k", "--tenant", "acme", "--json")[0])
    run("keys", "disable", made["id"])
    seal()
    return run


def seal() -> None:
    """Seal what is not sealed yet: the commands do not wait for it."""

    async def sealed() -> None:
        async with Strongroom.open("sqlite:///store.db") as room:
            await room.sealer.seal_now()

    asyncio.run(sealed())


def tamper(sql: str) -> None:
    """Change the store as its owner."""
    connection = apsw.Connection("store.db")
    connection.execute(sql)
    connection.close()


def test_an_auditor_checks_a_file_with_a_public_key_on_a_machine_without_the_store(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("keys.txt").write_text(run("audit", "keys")[0])
    Path("saved").write_text(run("audit", "checkpoint", "--tenant", "acme")[0])
    run("audit", "export", "acme.jsonl", "--tenant", "acme", "--proofs")
    run("audit", "evidence", "pack.zip", "--from", "1d")
    Path("store.db").unlink()
    monkeypatch.delenv("STRONGROOM_STORE")
    for file in ("acme.jsonl", "pack.zip"):
        out, _ = run("audit", "verify", file, "--public-key", "keys.txt", "--checkpoint", "saved")
        assert "whole: " in out
        assert "signed by strongroom.invalid/" in out
    lines = Path("acme.jsonl").read_bytes().replace(b"cli:", b"cli;", 1)
    Path("acme.jsonl").write_bytes(lines)
    out, _ = run("audit", "verify", "acme.jsonl", "--public-key", "keys.txt", status=1)
    assert "acme: index 0, altered: " in out
    report = json.loads(run("audit", "verify", "acme.jsonl", "--json", status=1)[0])
    assert (report["whole"], report["findings"][0]["index"]) == (False, 0)
    assert not Path("store.db").exists()


def test_verify_names_the_record_that_the_owner_of_the_store_changed(run: Run) -> None:
    assert "whole: " in run("audit", "verify")[0]
    tamper("UPDATE _journal SET actor = 'somebody' WHERE tenant_id = 'acme' AND action = 'update'")
    out, _ = run("audit", "verify", status=1)
    assert "acme: index 1, altered: the record at index 1 " in out
    assert "TAMPERED" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere.jsonl",), "nowhere.jsonl: no such file or directory"),
        (("store.db",), "is not an export with proofs"),
        (("--public-key", "store.db"), "--public-key"),
        (("--checkpoint", "empty"), "--checkpoint: empty: found no signed note"),
        (("--public-key", "empty"), "--public-key: empty: has no key"),
        (("--store", "sqlite:///other.db"), "there is no file"),
    ],
)
def test_a_wrong_call_is_status_2_and_a_sentence(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    Path("empty").write_text("")
    _, told = run("audit", "verify", *arguments, status=2)
    assert sentence in told
    assert len(told.splitlines()) == 1


def test_a_checkpoint_of_another_log_is_refused(run: Run) -> None:
    Path("saved").write_text("other.example\n1\n" + "A" * 43 + "=\n\n")
    assert "expected one of" in run("audit", "verify", "--checkpoint", "saved", status=2)[1]


def test_exports_have_four_formats_and_refuse_what_proofs_cannot_have(run: Run) -> None:
    for format, first in (("jsonl", "{"), ("csv", "sequence,"), ("cef", "CEF:0|"), ("ocsf", "{")):
        file = Path(f"trail.{format}")
        out, _ = run("audit", "export", str(file), "--tenant", "acme", "--format", format)
        assert out == f"wrote 2 records to {file}\n"
        assert file.read_text().startswith(first)
    assert "exists already" in run("audit", "export", "trail.csv", status=1)[1]
    run("audit", "export", "trail.csv", "--force")
    assert "records and rounds of sealing to platform" in run("audit", "export", "platform", "--proofs")[0]
    _, told = run("audit", "export", "x", "--proofs", "--actor", "a", "--format", "csv", status=2)
    assert "--format" in told
    assert "--actor" in told
    assert "xml" in run("audit", "export", "x", "--format", "xml", status=2)[1]
    assert "is sealed yet" in run("audit", "export", "x", "--proofs", "--tenant", "nobody", status=1)[1]
    assert not Path("x").exists()


def test_show_has_the_difference_field_by_field(run: Run) -> None:
    listed = json.loads(run("audit", "list", "--tenant", "acme", "--json")[0])["items"]
    assert [one["index"] for one in listed] == [0, 1]
    sequence = str(listed[1]["sequence"])
    rows = [line.split() for line in run("audit", "list", "--tenant", "acme")[0].splitlines()]
    assert [row[0] for row in rows] == ["SEQUENCE", str(listed[0]["sequence"]), sequence]
    shown: dict[str, Any] = json.loads(run("audit", "show", sequence, "--tenant", "acme", "--json")[0])
    assert {"field": "enabled", "before": True, "after": False} in shown["changes"]
    out, _ = run("audit", "show", sequence, "--tenant", "acme")
    assert ["enabled", "true", "false"] in [line.split() for line in out.splitlines()]
    assert "has no record with sequence" in run("audit", "show", sequence, status=1)[1]


def test_keys_rotate_and_old_checkpoints_still_verify(run: Run) -> None:
    Path("saved").write_text(run("audit", "checkpoint")[0])
    before = run("audit", "keys")[0].splitlines()
    after = run("audit", "keys", "--rotate")[0].splitlines()
    assert (len(before), after[2:]) == (2, before)
    Path("keys.txt").write_text("\n".join(after))
    run("keys", "create", "--name", "l", "--tenant", "acme")
    seal()
    out, _ = run("audit", "verify", "--public-key", "keys.txt", "--checkpoint", "saved")
    assert "whole: " in out
    listed = json.loads(run("audit", "list", "--collection", "journal", "--json")[0])["items"]
    assert [one["after"]["public_keys"] for one in listed] == [after[:2]]
    run("audit", "keys", "--make", "new-key")
    assert Path("new-key").stat().st_mode & 0o777 == 0o600
    assert "exists already" in run("audit", "keys", "--make", "new-key", status=1)[1]
