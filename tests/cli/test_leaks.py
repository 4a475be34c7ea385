"""`strongroom leaks …`: reports from files and standard input, the list, the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strongroom.keys.token import generate
from tests.cli.test_cli import Run, run

__all__ = ["run"]  # the fixture


def make(run: Run, *options: str) -> Any:
    return run("keys", "create", "--name", "k", "--tenant", "acme", *options, "--json").json


def test_a_policy_is_shown_and_set(run: Run) -> None:
    assert run("leaks", "policy", "acme", "--json").json == {
        "tenant": "acme",
        "action": "notify",
        "overlap_s": None,
        "updated_at": None,
    }
    ran = run("leaks", "policy", "acme", "--set", "rotate", "--overlap", "1h")
    assert (ran.status, ran.err) == (0, "")
    assert run("leaks", "policy", "acme", "--json").json["overlap_s"] == 3_600
    assert "rotate" in run("leaks", "policy", "acme").out
    assert run("leaks", "policy", "acme", "--set", "disable", "--json").json["overlap_s"] is None


def test_leaked_secrets_are_reported_one_a_line_and_never_printed(run: Run, tmp_path: Path) -> None:
    run("leaks", "policy", "acme", "--set", "disable")
    made, unknown = make(run), generate()
    ran = run("leaks", "report", "--url", "https://x.example/1", "--json", stdin=f"\n{made['key']}\n {unknown} \n")
    assert ran.status == 0
    known, other = ran.json["items"]
    assert (known["new"], known["leak"]["done"], known["leak"]["url"]) == (True, "disabled", "https://x.example/1")
    assert (other["new"], other["leak"]) == (False, None)
    assert known["leak"]["reporter"].startswith("cli:")
    assert run("keys", "show", made["id"], "--json").json["enabled"] is False
    file = tmp_path / "found.json"
    file.write_text(json.dumps([{"token": made["key"], "url": "https://elsewhere.example"}, {"token": unknown}]))
    again = run("leaks", "report", str(file))
    assert "was reported before" in again.out
    assert "is no key of this store" in again.out
    listed = run("leaks", "list", "--tenant", "acme")
    assert listed.out.count(made["id"]) == 1
    assert "https://x.example/1" in listed.out
    assert [leak["id"] for leak in run("leaks", "list", "--json").json["items"]] == [known["leak"]["id"]]
    assert run("leaks", "list", "--tenant", "other").err == "no leak was reported\n"
    for text in (made["key"], unknown):
        assert text not in ran.out + again.out + listed.out


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["report"], "", "found no secret"),
        (["report"], "[1]", "expected an array of objects"),
        (["report"], '[{"token": 5}]', "0.token"),
        (["report"], '[{"url": "x"}]', "0.token"),
        (["report", "no-such-file"], "", "no-such-file"),
        (["policy", "acme", "--set", "burn"], "", "--set: found"),
        (["policy", "acme", "--set", "disable", "--overlap", "1h"], "", "overlap"),
        (["policy", "acme", "--overlap", "1h"], "", "--set rotate"),
        (["policy", "acme", "--set", "rotate", "--overlap", "31d"], "", "overlap"),
        (["policy", "acme", "--set", "rotate", "--overlap", "soon"], "", "soon"),
        (["policy", ""], "", "tenant"),
    ],
)
def test_a_wrong_call_is_refused_with_a_sentence(run: Run, arguments: list[str], stdin: str, words: str) -> None:
    ran = run("leaks", *arguments, stdin=stdin)
    assert (ran.status, ran.out) == (2, "")
    assert words in ran.err
