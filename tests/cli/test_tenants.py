"""`strongroom tenants …`: create, list, show, update, suspend, resume, export, import, delete, statements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import Run, run

__all__ = ["run"]  # the fixture


def test_a_tenant_is_created_listed_changed_suspended_and_resumed(run: Run) -> None:
    made = run("tenants", "create", "acme", "--name", "Acme Inc.", "--plan", "gold", "--metadata", "crm=17", "--json")
    assert (made.json["id"], made.json["plan"], made.json["metadata"]) == ("acme", "gold", {"crm": 17})
    assert run("tenants", "create", "acme").status == 1
    run("keys", "create", "--name", "k", "--tenant", "with keys")
    listed = run("tenants", "list").out.splitlines()
    assert listed[1].split() == ["acme", "active", "gold", *listed[1].split()[3:5], "Acme", "Inc."]
    assert listed[2].split() == ["with", "keys", "active", "in", "use"]
    page = run("tenants", "list", "--limit", "1", "--json").json
    rest = run("tenants", "list", "--cursor", page["next_cursor"], "--json").json
    assert [one["id"] for one in (*page["items"], *rest["items"])] == ["acme", "with keys"]
    changed = run("tenants", "update", "acme", "--plan", "silver", "--name", "", "--json").json
    assert (changed["plan"], changed["name"]) == ("silver", None)
    suspended = run("tenants", "suspend", "acme", "--reason", "unpaid")
    assert "suspended" in suspended.out
    assert "unpaid" in suspended.out
    assert run("tenants", "list", "--status", "suspended", "--json").json["items"][0]["id"] == "acme"
    assert run("tenants", "resume", "acme", "--json").json["status"] == "active"
    assert "by its use" in run("tenants", "show", "with keys").out


def test_wrong_calls_get_sentences_that_name_the_option(run: Run) -> None:
    wrong = run("tenants", "create", "acme", "--contact-email", "no", "--region", "?", "--metadata", "x")
    assert wrong.status == 2
    for option in ("--contact-email", "--region", "--metadata"):
        assert option in wrong.err
    assert run("tenants", "create", " acme").status == 2
    assert run("tenants", "update", "acme").status == 2
    assert run("tenants", "list", "--status", "gone").status == 2
    missing = run("tenants", "show", "nobody")
    assert (missing.status, missing.err) == (1, "strongroom: there is no tenant 'nobody'\n")
    assert run("tenants", "delete", "acme").status == 2, "without a terminal it needs --yes"
    assert run("tenants", "list").err == "there are no tenants\n"


def test_the_json_schema_of_each_collection_is_exported(run: Run) -> None:
    exported = run("schema", "export").json
    for name in ("tenants", "users", "service_accounts", "roles", "configurations", "cloud_accounts"):
        assert exported[name]["additionalProperties"] is False
        assert exported[name]["x-strongroom"]["collection"] == name
    assert exported["cloud_accounts"]["x-strongroom"]["secrets"] == ["credentials"]


@pytest.mark.usefixtures("quickly")
def test_a_tenant_is_exported_deleted_and_imported_again(run: Run, tmp_path: Path) -> None:
    run("tenants", "create", "acme", "--plan", "gold")
    key = run("keys", "create", "--name", "k", "--tenant", "acme", "--json").json["key"]
    file = tmp_path / "acme.jsonl"
    assert run("tenants", "export", "acme", str(file)).out == f"wrote 6 lines of acme to {file}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    again = run("tenants", "export", "acme", str(file))
    assert (again.status, "--force" in again.err) == (1, True)
    assert run("tenants", "export", "acme", str(file), "--force", "--json").json["lines"] == 6
    assert run("tenants", "export", "nobody", str(tmp_path / "x")).status == 1
    assert not (tmp_path / "x").exists()
    assert run("tenants", "export", "acme", str(tmp_path / "no" / "x")).status == 2
    gone = run("tenants", "delete", "acme", "--reason", "the end", "--yes", "--json").json
    assert (gone["counts"], gone["reason"]) == ({"api_keys": 1, "key_usage": 1}, "the end") or gone["counts"] == {
        "api_keys": 1
    }
    assert run("keys", "verify", stdin=key).status == 1
    assert "the end" in run("tenants", "statements").out
    assert run("tenants", "statements", "--tenant", "acme", "--json").json["items"][0]["id"] == gone["id"]
    told = run("tenants", "import", str(file), "--json").json
    assert told["written"] == {"api_keys": 1}
    assert run("keys", "verify", stdin=key).status == 0
    assert run("tenants", "show", "acme", "--json").json["plan"] == "gold"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]))
    cut = run("tenants", "import", str(file))
    assert (cut.status, "it was cut" in cut.err) == (2, True)
    assert run("tenants", "import", str(tmp_path / "nothing")).status == 2
    file.write_text("\n".join(lines))
    assert run("tenants", "import", str(file)).status == 1, "the tenant has data"
    assert "headline" not in json.dumps(told)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process writes, so a deletion need not wait until all nodes have heard of it."""
    from strongroom.tenants.deletion import Deletions

    monkeypatch.setattr(Deletions.__init__, "__kwdefaults__", {"settle_s": 0.0})
