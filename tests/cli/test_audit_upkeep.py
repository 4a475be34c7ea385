"""`strongroom audit retention|hold|redact`."""

from __future__ import annotations

from tests.cli.test_cli import Run, run

__all__ = ["run"]  # the fixture


def test_retention_is_shown_and_set_for_all_and_for_one(run: Run) -> None:
    run("tenants", "create", "acme")
    assert run("audit", "retention", "--json").json == {"tenant": None, "days": 90, "floor_days": 0}
    assert run("audit", "retention", "--floor", "183").out == "records are kept 183 days; the floor is 183 days\n"
    shown = run("audit", "retention", "--tenant", "acme", "--days", "400", "--json").json
    assert shown == {"tenant": "acme", "days": 400, "floor_days": 183}
    for wrong in (("--days", "100"), ("--floor", "90"), ("--days", "0")):
        assert run("audit", "retention", *wrong).status == 2, wrong
    assert run("audit", "retention", "--platform", "--json").json["days"] == 183
    assert "--floor: found 90" in run("audit", "retention", "--floor", "90").err
    assert "--platform" in run("audit", "retention", "--platform", "--tenant", "acme").err


def test_a_legal_hold_is_placed_listed_and_lifted(run: Run) -> None:
    run("tenants", "create", "acme")
    made = run("audit", "hold", "--tenant", "acme", "--user", "user:ada", "--reason", "case 7", "--json").json
    assert made["placed_by"].startswith("cli:")
    (listed,) = run("audit", "hold", "--json").json["items"]
    assert listed == made
    assert "case 7" in run("audit", "hold").out
    assert run("audit", "hold", "--tenant", "beta", "--json").json["items"] == []
    assert run("tenants", "delete", "acme", "--yes").status == 1
    assert run("audit", "hold", "--lift", made["id"], "--reason", "closed").out == f"legal hold {made['id']} lifted\n"
    assert run("audit", "hold").out == ""
    for wrong in (("--user", "u"), ("--lift", "x"), ("--lift", "x", "--reason", "r", "--user", "u"), ("--reason", "")):
        assert run("audit", "hold", *wrong).status == 2, wrong
    assert run("audit", "hold", "--lift", "no such", "--reason", "r").status == 1


def test_a_users_records_are_redacted(run: Run) -> None:
    run("tenants", "create", "acme")
    (record,) = run("audit", "list", "--tenant", "acme", "--json").json["items"]
    done = ("audit", "redact", "--tenant", "acme", "--user", record["actor"], "--reason", "asked")
    assert run(*done).status == 2, "it must be confirmed"
    assert run(*done, "--yes", "--json").json["records"] == 1
    items = run("audit", "list", "--tenant", "acme", "--json").json["items"]
    assert [(one["actor"], one["entity_id"]) for one in items if one["collection"] == "tenants"] == [("", "")]
    both = ("--user", "ada", "--collection", "notes", "--id", "n1")
    for wrong, found in (((), "nothing"), (both, "it beside a document")):
        refused = run("audit", "redact", "--tenant", "acme", *wrong, "--reason", "r", "--yes")
        assert (refused.status, f"--user: found {found}, expected a user" in refused.err) == (2, True), refused.err
    refused = run("audit", "redact", "--collection", "notes", "--reason", "r", "--yes")
    assert (refused.status, refused.err.startswith("strongroom: --id: ")) == (2, True), refused.err
