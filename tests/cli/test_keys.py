"""`strongroom keys …` over the life of a key: held secrets, deletion and restore, bulk changes, a new pepper."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.cli import main


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
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
        status = main(["keys", *arguments])
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


def created(run: Run, *options: str) -> dict[str, Any]:
    ran = run("create", "--name", "worker", "--json", *options)
    assert ran.status == 0, ran
    return dict(ran.json)


def code(run: Run, text: str) -> str:
    return str(run("verify", "--json", stdin=text + "\n").json["code"])


def test_a_key_is_created_with_every_field(run: Run) -> None:
    key = created(
        run, "--owner", "ops", "--description", "nightly", "--environment", "test", "--group", "trial", "--model",
        "small", "--route", "GET /*", "--rotate-every", "90d", "--rotation-overlap", "7d",
    )  # fmt: skip
    assert key["key"].startswith("sr_test_SR1")
    assert (key["owner"], key["description"], key["environment"]) == ("ops", "nightly", "test")
    assert (key["groups"], key["allowed_models"], key["allowed_routes"]) == (["trial"], ["small"], ["GET /*"])
    assert (key["rotate_every_s"], key["rotation_overlap_s"]) == (90 * 86_400, 7 * 86_400)
    assert not {"hash", "sealed", "previous_hash", "verifier", "due_at"} & key.keys()
    said = run("show", key["id"]).out
    assert all(word in said for word in ("ops", "nightly", "trial", "next rotation"))
    ran = run("create", "--name", "k", "--rotate-every", "soon", "--environment", "prod", "--json")
    assert [problem["path"] for problem in ran.json["error"]["errors"]] == ["rotate_every_s", "environment"]
    assert ran.status == 2


def test_a_held_secret_is_claimed(run: Run) -> None:
    key = created(run)
    ran = run("rotate", key["id"], "--hold", "--overlap", "1h")
    assert "strongroom keys claim" in ran.err
    assert "_SR1" not in ran.out.replace(key["display"], "").split("shown as")[0]
    again = run("rotate", key["id"], "--hold", "--overlap", "1h", "--json").json
    assert (again["key"], again["unclaimed"]) == (None, True)
    claimed = run("claim", key["id"], "--idempotency-key", "c", "--json").json
    assert claimed == run("claim", key["id"], "--idempotency-key", "c", "--json").json
    assert code(run, claimed["key"]) == code(run, key["key"]) == "VALID"
    ran = run("claim", key["id"], "--json")
    assert (ran.status, ran.json["error"]["code"]) == (1, "conflict")


def test_a_deleted_key_is_restored_or_purged(run: Run) -> None:
    key = created(run)
    ran = run("delete", key["id"], "--yes")
    assert f"strongroom keys restore {key['id']}" in ran.out
    assert code(run, key["key"]) == "NOT_FOUND"
    assert run("list", "--json").json["items"] == []
    assert [item["id"] for item in run("list", "--deleted", "--json").json["items"]] == [key["id"]]
    assert "deleted" in run("show", key["id"]).out
    assert run("restore", key["id"], "--json").json["deleted_at"] is None
    assert code(run, key["key"]) == "VALID"
    assert run("delete", key["id"], "--yes").status == 0
    assert "for good" in run("delete", key["id"], "--purge", "--yes").out
    assert run("restore", key["id"]).status == 1
    assert run("show", key["id"]).status == 1


def test_keys_list_filters(run: Run) -> None:
    live, test = created(run, "--owner", "ops"), created(run, "--environment", "test")
    for options, expected in (
        (["--owner", "ops"], [live]),
        (["--environment", "test"], [test]),
        (["--name-prefix", "work", "--environment", "live"], [live]),
        (["--created-after", "2020-01-01T00:00:00Z"], [test, live]),
        (["--created-before", "2020-01-01T00:00:00Z"], []),
    ):
        found = run("list", *options, "--json").json["items"]
        assert [item["id"] for item in found] == [key["id"] for key in expected], options
    ran = run("list", "--created-after", "2020-01-01", "--created-before", "x", "--environment", "prod", "--json")
    assert ran.status == 2
    assert [p["path"] for p in ran.json["error"]["errors"]] == ["created_after", "created_before", "environment"]


def test_keys_are_changed_in_bulk(run: Run) -> None:
    keys = [created(run, "--tenant", tenant) for tenant in ("acme", "acme", "beta")]
    ran = run("bulk", "disable", "--tenant", "acme", "--dry-run")
    assert ran.out == "2 would be changed, 0 unchanged, 0 failed\n"
    assert code(run, keys[0]["key"]) == "VALID"
    assert run("bulk", "disable", "--tenant", "acme", "--yes").out == "2 changed, 0 unchanged, 0 failed\n"
    assert [code(run, key["key"]) for key in keys] == ["DISABLED", "DISABLED", "VALID"]
    done = run("bulk", "enable", "--all", "--yes", "--json").json
    assert (done["looked_at"], done["changed"], done["unchanged"], done["failed"]) == (3, 2, 1, [])
    ids = [keys[0]["id"], "none"]
    ran = run("bulk", "update", *ids, "--limit", "tokens=5/1h", "--metadata", "plan=pro", "--group", "trial", "--yes")
    assert ran.status == 1
    assert ran.out == "1 changed, 0 unchanged, 1 failed\n"
    assert "none: there is no key 'none'" in ran.err
    changed = run("show", ids[0], "--json").json
    assert (changed["metadata"], changed["groups"], changed["limits"][0]["limit"]) == ({"plan": "pro"}, ["trial"], 5)
    assert changed["name"] == "worker"
    run("bulk", "delete", "--all", "--yes")
    assert run("bulk", "restore", "--tenant", "beta", "--yes").out.startswith("1 changed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["disable"], "expected exactly one of ids, a filter and --all"),
        (["disable", "x", "--all"], "expected exactly one of ids"),
        (["disable", "--tenant", "a", "--all", "--yes"], "expected exactly one of ids"),
        (["explode", "--all"], "found 'explode', expected disable, enable"),
        (["update", "--all", "--yes"], "at least one field to change"),
        (["disable", "--all", "--limit", "tokens=1/1h", "--yes"], "expected update"),
        (["update", "--all", "--limit", "tokens", "--yes"], "--limit: found"),
        (["disable", "--all"], "confirm it with --yes"),
        (["disable", "--all", "--cursor", "x", "--yes"], "cursor"),
    ],
)
def test_an_invalid_bulk_change_has_status_2(run: Run, arguments: list[str], said: str) -> None:
    ran = run("bulk", *arguments)
    assert ran.status == 2
    assert said in ran.err


def test_answering_no_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    key = created(run)
    monkeypatch.setattr("strongroom.cli.options.is_interactive", lambda: True)
    ran = run("bulk", "delete", "--all", stdin="n\n")
    assert ran.status != 0
    assert "delete 1 keys?" in ran.err
    assert code(run, key["key"]) == "VALID"


def test_a_new_pepper_leaves_every_key_working(run: Run) -> None:
    key = created(run)
    assert run("rotate-pepper", "--json").json == {"pepper": "000002"}
    assert code(run, key["key"]) == "VALID"
    assert run("rotate-pepper").out == "new hashes are made with pepper 000003\n"


LIMITS = [
    "cost=25.5/total+0.5/day@Europe/Berlin",
    "tokens=100000/anchored:5h models=gpt-*,o1 routes=/chat",
    "requests=9/calendar:month@Asia/Kolkata",
    "requests=60/1m",
    "concurrency=5",
]


def test_a_limit_is_shown_in_the_form_in_which_it_is_given(run: Run) -> None:
    key = created(run, *(option for limit in LIMITS for option in ("--limit", limit)))
    lines = run("show", key["id"]).out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("limits "))
    shown = [line[len("limits") :].strip() for line in lines[first : first + len(LIMITS)]]
    assert shown == LIMITS
    (row,) = run("list").out.splitlines()[1:]
    assert row.endswith("  ".join(LIMITS))
    again = created(run, *(option for limit in shown for option in ("--limit", limit)))
    assert again["limits"] == key["limits"]


def test_the_status_of_a_limit_is_shown_completely(run: Run, tmp_path: Path) -> None:
    key = created(
        run, "--tenant", "acme", "--limit", "tokens=100/1h models=gpt-*", "--limit", "cost=9/total+1/day", "--limit",
        "concurrency=2",
    )  # fmt: skip
    assert main(["quotas", "set", "--tenant", "acme", "--limit", "tokens=50/1h routes=/chat"]) == 0
    rows = table(run("stats", key["id"]).out)
    assert list(rows[0]) == ["RESOURCE", "OF", "WINDOW", "USED", "LIMIT", "REMAINING", "FREES FROM", "MODELS", "ROUTES"]
    assert [(row["RESOURCE"], row["OF"], row["WINDOW"], row["MODELS"], row["ROUTES"]) for row in rows] == [
        ("tokens", "key", "1h", "gpt-*", ""),
        ("cost", "key", "total+1/day", "", ""),
        ("concurrency", "key", "open now", "", ""),
        ("tokens", "tenant", "1h", "", "/chat"),
    ]

    async def reserve() -> None:
        async with Strongroom.open(f"sqlite:///{tmp_path}/store.db") as room:
            assert (await room.keys.reserve(key["key"], cost={"tokens": 40}, model="gpt-4", route="/chat")).valid

    asyncio.run(reserve())
    tokens, _, concurrency, quota = table(run("stats", key["id"]).out)
    for row in (tokens, quota):
        assert (row["USED"], row["RECORDED"], row["RESERVED"], row["LEASED"]) == ("40", "0", "40", "0")
    assert (concurrency["USED"], concurrency["REMAINING"]) == ("1", "1")

    dry = run("verify", "--cost", "tokens=20", "--model", "gpt-4", "--route", "/chat", "--peek", stdin=key["key"])
    ran = run("verify", "--cost", "tokens=20", "--model", "gpt-4", "--route", "/chat", stdin=key["key"])
    assert (ran.status, dry.status) == (1, 1)
    assert table(dry.out) == table(ran.out)
    assert [(row["OF"], row["DENIED"]) for row in table(ran.out) if row["DENIED"]] == [("tenant", "yes")]


def table(out: str) -> list[dict[str, str]]:
    """The rows of the table at the end of what was printed, by its columns."""
    lines = out.splitlines()
    header = max(number for number, line in enumerate(lines) if line.startswith("RESOURCE"))
    names = [name.strip() for name in re.split(r"  +", lines[header])]
    starts = [re.search(rf"(?:^|  ){re.escape(name)}(?:  |$)", lines[header]) for name in names]
    places = [match.start() + match[0].index(name) for match, name in zip(starts, names, strict=True) if match]
    return [
        {name: line[begin:end].strip() for name, begin, end in zip(names, places, [*places[1:], None], strict=True)}
        for line in lines[header + 1 :]
    ]


def test_only_a_purge_is_reported_as_permanent(run: Run) -> None:
    key = created(run)
    assert "cannot be undone" not in run("delete", key["id"]).err
    assert "cannot be undone" in run("delete", key["id"], "--purge").err
    assert "--yes" in run("delete", key["id"]).err


# --- Changing one key, and listing all ----------------------------------------------------------------------------


def test_an_update_sets_the_given_fields_and_keeps_the_others(run: Run) -> None:
    key = created(run, "--user", "u1", "--limit", "tokens=100/5h", "--metadata", "plan=free", "--expires", "30d")
    changed = run("update", key["id"], "--name", "renamed", "--limit", "tokens=200/5h", "--group", "trial", "--json")
    assert changed.status == 0
    now = changed.json
    assert (now["name"], now["groups"], now["limits"][0]["limit"]) == ("renamed", ["trial"], 200)
    assert {n: now[n] for n in ("user_id", "metadata", "expires_at")} == {
        n: key[n] for n in ("user_id", "metadata", "expires_at")
    }
    cleared = run("update", key["id"], "--clear", "expires", "--clear", "--user", "--clear", "limit", "--json").json
    assert (cleared["expires_at"], cleared["user_id"], cleared["limits"]) == (None, None, [])
    assert (cleared["name"], cleared["metadata"]) == ("renamed", {"plan": "free"})
    assert run("update", key["id"], "--clear", "metadata", "--json").json["metadata"] == {}


def test_every_problem_of_an_update_is_reported_at_once(run: Run) -> None:
    key = created(run)
    wrong = ("--limit", "tokens", "--expires", "soon", "--clear", "tenant", "--clear", "expires", "--metadata", "x")
    told = run("update", key["id"], *wrong, "--json").json["error"]["errors"]
    assert sorted(one["path"] for one in told) == ["clear", "clear", "expires_at", "limits.0", "metadata.0"]
    assert "expected at least one option" in run("update", key["id"]).err
    assert run("update", "key_nope", "--name", "x").status == 1


def test_all_pages_are_listed_as_one(run: Run) -> None:
    ids = {created(run)["id"] for _ in range(5)}
    listed = run("list", "--all", "--limit", "2", "--json").json
    assert (len(listed["items"]), {one["id"] for one in listed["items"]}) == (5, ids)
    assert listed["next_cursor"] is None
    assert len(run("list", "--limit", "2", "--json").json["items"]) == 2
