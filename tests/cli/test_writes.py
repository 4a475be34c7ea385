"""`strongroom writes …`: off, on and status."""

from __future__ import annotations

import pytest

from tests.cli.test_cli import Run, run

__all__ = ["run"]  # the fixture


def test_writes_are_turned_off_shown_and_turned_on(run: Run) -> None:
    run("tenants", "create", "acme")
    made = run("writes", "off", "--reason", "a rollback", "--json").json
    assert (made["allowed"], made["usage"], made["reason"], made["tenant"]) == (False, True, "a rollback", None)
    assert made["by"].startswith("cli:")
    refused = run("keys", "create", "--name", "k", "--json")
    assert (refused.status, refused.json["error"]["code"]) == (1, "writes_off")
    assert run("writes", "off", "--tenant", "acme", "--no-usage", "--reason", "a breach").status == 0
    shown = run("writes", "status").out.splitlines()
    assert [line.split("  ")[0] for line in shown[1:]] == ["all tenants", "acme"]
    assert "off, usage too" in shown[2]
    assert "a breach" in shown[2]
    assert run("writes", "on", "--json").json["allowed"] is True
    status = run("writes", "status", "--json").json
    assert (status["allowed"], [one["tenant"] for one in status["items"]]) == (True, ["acme"])
    assert run("keys", "create", "--name", "k").status == 0
    assert run("writes", "on", "--tenant", "acme").status == 0
    assert run("writes", "status", "--json").json["items"] == []


def test_the_commands_print_the_switches_and_no_warning_of_them(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run("writes", "off", "--reason", "a rollback")
    run("writes", "status")
    run("writes", "on")
    assert [record.message for record in caplog.records if "are off" in record.message] == []


def test_wrong_switches_get_sentences(run: Run) -> None:
    run("tenants", "create", "acme")
    assert run("writes", "off").status == 2, "a reason is needed"
    assert "--tenant" in run("writes", "off", "--reason", "x", "--tenant", "*").err
    assert run("writes", "off", "--reason", "x", "--tenant", "nobody").status == 1
