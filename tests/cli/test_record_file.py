"""`strongroom import` and `export` of record files: reports, secrets, and the detection of each format."""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
from pathlib import Path

import pytest
from django.contrib.auth.hashers import PBKDF2PasswordHasher

from tests.cli.test_cli import Run, run
from tests.helpers.paths import DATA

__all__ = ["run"]  # the fixture

TEXT = "abcdefgh.0123456789abcdefghijklmnopqrstuv"
SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()


def file_of(folder: Path, *rows: dict[str, object]) -> str:
    file = folder / "keys.jsonl"
    file.write_text("".join(json.dumps({"name": "worker", **row}) + "\n" for row in rows))
    return str(file)


def test_another_systems_keys_are_imported_and_work(run: Run, tmp_path: Path) -> None:
    file = file_of(
        tmp_path,
        {"hash": PBKDF2PasswordHasher().encode(TEXT, "salt", 1_000), "prefix": "abcdefgh", "tenant": "acme"},
        {"hash": hashlib.sha512(b"another").hexdigest(), "plan": "gold"},
    )
    ran = run("import", file, "--dry-run")
    assert (ran.status, "nothing was written" in ran.out) == (0, True)
    assert "line 2, plan" in ran.out
    assert run("keys", "list", "--json").json["items"] == []
    ran = run("import", file, "--json")
    assert (ran.json["shape"], ran.json["new"], ran.json["written"], ran.json["missing"]) == ("records", 2, 2, 0)
    again = run("import", file, "--json").json
    assert (again["new"], again["unchanged"], again["written"]) == (0, 2, 0)
    verified = run("keys", "verify", TEXT, "--json").json
    assert (verified["valid"], verified["tenant"]) == (True, "acme")


def test_one_invalid_row_imports_nothing_unless_it_is_skipped(run: Run, tmp_path: Path) -> None:
    file = file_of(tmp_path, {"hash": SHA256}, {"hash": "md5$salt$x", "name": ""}, {"hash": "$2b$10$x"})
    ran = run("import", file)
    assert ran.status == 1
    for said in ("line 2, hash", "line 2, name", "line 3, hash", "found md5$…"):
        assert said in ran.out
    assert "2 of 3 rows are invalid; nothing was imported" in ran.err
    assert run("keys", "list", "--json").json["items"] == []
    ran = run("import", file, "--json")
    assert [error["path"] for error in ran.json["error"]["errors"] if "name" not in error["path"]] == [
        "line 2, hash",
        "line 3, hash",
    ]
    ran = run("import", file, "--skip-invalid", "--json")
    assert (ran.status, ran.json["refused"], ran.json["written"]) == (0, 2, 1)


def test_hmacs_need_the_other_systems_secret_in_a_file(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"their secret\n")
    file = file_of(tmp_path, {"hash": "hmac-sha256:" + hmac.digest(b"their secret", TEXT.encode(), "sha256").hex()})
    ran = run("import", file)
    assert (ran.status, "--hmac-secret-file" in ran.out) == (1, True)
    assert run("import", file, "--hmac-secret-file", str(secret)).status == 0
    assert run("keys", "verify", TEXT, "--json").json["valid"]
    secret.write_bytes(b"\n")
    ran = run("import", file, "--hmac-secret-file", str(secret))
    assert (ran.status, "expected the secret" in ran.err) == (2, True)
    ran = run("import", file, "--hmac-secret-file", str(tmp_path / "nowhere"))
    assert (ran.status, "no such file" in ran.err) == (1, True)


def test_an_hmac_secret_for_a_file_of_another_format_is_refused(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    plain = DATA / "keys" / "plain.json"
    ran = run("import", str(plain), "--hmac-secret-file", str(secret))
    assert (ran.status, "is for files of records" in ran.err) == (2, True)


def test_everything_is_exported_and_arrives_in_another_store(run: Run, tmp_path: Path) -> None:
    for tenant in ("acme", "globex"):
        run("keys", "create", "--name", "k", "--tenant", tenant, "--limit", "tokens=100/1h")
    disabled = run("keys", "list", "--json").json["items"][0]["id"]
    run("keys", "disable", disabled)
    file = tmp_path / "all.jsonl"
    ran = run("export", str(file), "--shape", "records", "--all-tenants")
    assert (ran.status, "wrote 2 keys and 0 quotas of all tenants" in ran.out) == (0, True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    other = f"sqlite:///{tmp_path}/other.db"
    assert run("import", str(file), "--store", other, "--json").json["written"] == 2
    keys = run("keys", "list", "--store", other, "--json").json["items"]
    assert {(key["id"] == disabled, key["enabled"], key["tenant"]) for key in keys} == {
        (key["id"] == disabled, key["enabled"], key["tenant"]) for key in run("keys", "list", "--json").json["items"]
    }
    one = tmp_path / "one.jsonl"
    assert run("export", str(one), "--shape", "records", "--tenant", "acme", "--json").json["keys"] == 1
    assert run("export", str(one), "--shape", "records").status == 1  # it is there already
    ran = run("export", str(tmp_path / "x"), "--all-tenants")
    assert (ran.status, "use records" in ran.err) == (2, True)


def test_an_export_reports_keys_that_its_format_cannot_hold(run: Run, tmp_path: Path) -> None:
    file = file_of(tmp_path, {"hash": hashlib.sha512(b"another").hexdigest()}, {"hash": SHA256})
    run("import", file)
    ran = run("export", str(tmp_path / "plain.json"), "--json")
    assert ran.json["keys"] == 1
    assert list(ran.json["left_out"].values()) == [1]


@pytest.mark.parametrize("content", ['{"name": "k"', 'name,hash\n"k'])
def test_a_broken_file_is_reported_with_its_name(run: Run, tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken"
    file.write_text(content)
    ran = run("import", str(file))
    assert (ran.status, f"{file}: " in ran.err) == (1, True)
