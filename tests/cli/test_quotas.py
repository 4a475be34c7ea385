"""`strongroom quotas …`: set, list, show, stats, delete."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.test_cli import Run, run

__all__ = ["run"]  # the fixture


def put(run: Run, *options: str) -> Any:
    limits = () if "--limit" in options else ("--limit", "requests=9/1h")
    return run("quotas", "set", "--tenant", "acme", *options, *limits, "--json").json


def test_a_quota_is_set_shown_listed_and_removed(run: Run) -> None:
    made = put(run, "--user", "u1", "--limit", "tokens=100/5h", "--description", "the first")
    assert (made["kind"], made["tenant"], made["name"], made["description"]) == ("user", "acme", "u1", "the first")
    assert made["limits"] == [
        {"resource": "tokens", "limit": 100, "window": {"kind": "rolling", "seconds": 18_000}}
    ]  # fmt: skip
    assert run("quotas", "show", "--tenant", "acme", "--user", "u1", "--json").json == made
    shown = run("quotas", "show", "--tenant", "acme", "--user", "u1").out
    assert "tokens=100/5h" in shown
    assert "the first" in shown

    replaced = put(run, "--user", "u1", "--limit", "cost=100/total+10/day@Europe/Berlin", "--limit", "concurrency=20")
    assert replaced["id"] == made["id"]
    assert [limit["resource"] for limit in replaced["limits"]] == ["cost", "concurrency"]
    put(run)
    put(run, "--group", "free", "--limit", "tokens=5/1h models=gpt-*")
    out = run("quotas", "list").out.splitlines()
    assert [line.split()[:2] for line in out[1:]] == [["acme", "group"], ["acme", "tenant"], ["acme", "user"]]
    assert "cost=100/total+10/day@Europe/Berlin  concurrency=20" in out[3]
    assert "tokens=5/1h models=gpt-*" in out[1]
    assert [one["kind"] for one in run("quotas", "list", "--kind", "user", "--json").json["items"]] == ["user"]
    page = run("quotas", "list", "--limit", "2", "--json").json
    assert len(page["items"]) == 2
    rest = run("quotas", "list", "--cursor", page["next_cursor"], "--json").json
    assert [one["kind"] for one in rest["items"]] == ["user"]
    assert "there are more: --cursor" in run("quotas", "list", "--limit", "2").err

    assert run("quotas", "delete", "--tenant", "acme", "--user", "u1", "--yes", "--json").json == {
        "deleted": made["id"]
    }
    assert "removed the quota of the tenant 'acme'" in run("quotas", "delete", "--tenant", "acme", "--yes").out
    gone = run("quotas", "show", "--tenant", "acme", "--user", "u1")
    assert gone.status == 1
    assert "there is no quota of the user 'u1' of the tenant 'acme'" in gone.err
    assert run("quotas", "list", "--tenant", "nobody").err == "there are no quotas\n"


def test_statistics_show_what_all_keys_used(run: Run) -> None:
    put(run, "--limit", "tokens=100/total+5/day", "--limit", "requests=9/1h")
    key = run("keys", "create", "--name", "k", "--tenant", "acme", "--json").json["key"]
    assert run("keys", "verify", "--cost", "tokens=30", "--cost", "requests=1", stdin=key).status == 0
    stats = run("quotas", "stats", "--tenant", "acme", "--json").json
    assert (stats["kind"], stats["tenant"], stats["totals"]) == ("tenant", "acme", {"requests": 1, "tokens": 30})
    assert [(one["resource"], one["used"], one["remaining"]) for one in stats["limits"]] == [
        ("tokens", 30, 70), ("requests", 1, 8)
    ]  # fmt: skip
    out = run("quotas", "stats", "--tenant", "acme").out
    assert "total+5/day" in out
    assert "total tokens" in out


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        (("--user", "u", "--group", "g"), "group", "cannot be combined with --user"),
        (("--limit", "tokens"), "limits.0", "found 'tokens', expected for example"),
        (
            ("--limit", "tokens=5/1h", "--limit", "tokens=5/calendar:year"),
            "limits.1.window.unit",
            "found 'year', expected",
        ),
        (
            ("--limit", "x", "--limit", "tokens=5/total+0/day"),
            "limits.1.window.refill.amount",
            "found 0, expected more",
        ),
        (("--limit", "tokens=5/total+1.5/day"), "limits.0.window.refill.amount", "found 1.5, expected a whole number"),
        (("--limit", "tokens=1/1h", "--limit", "tokens=2/1h"), "limits", "found two limits on tokens with the same"),
        (("--user", ""), "name", "found an empty text"),
        (("--description", "x" * 1_001), "description", "found 1001 characters, expected at most 1000"),
    ],
)
def test_a_wrong_call_names_its_problem(run: Run, options: tuple[str, ...], path: str, message: str) -> None:
    ran = run("quotas", "set", "--tenant", "acme", *options, "--json")
    assert ran.status == 2
    problems = {problem["path"]: problem["message"] for problem in ran.json["error"]["errors"]}
    assert problems[path].startswith(message)


def test_an_unknown_kind_of_quota_is_refused(run: Run) -> None:
    ran = run("quotas", "list", "--kind", "team", "--json")
    assert (ran.status, ran.json["error"]["errors"]) == (
        2, [{"path": "kind", "message": "found 'team', expected tenant, user or group"}]
    )  # fmt: skip


def test_a_removal_is_confirmed(run: Run) -> None:
    put(run)
    for options in ((), ("--json",)):
        ran = run("quotas", "delete", "--tenant", "acme", *options)
        assert ran.status == 2
        assert "--yes" in ran.out + ran.err
    assert run("quotas", "show", "--tenant", "acme").status == 0
