"""SECURITY.md is up to date: each line of its threat model names existing tests."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.helpers.paths import ROOT

TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = re.compile(r"`([\w./-]+\.py)::(\w+)`")


def promises() -> list[list[str]]:
    """The rows of the table: attacker, what holds, shown by."""
    table = TEXT.partition("## Threat model")[2].partition("**Not in this version:**")[0]
    rows = [line.strip().strip("|").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def test_the_threat_model_has_its_table() -> None:
    assert len(promises()) >= 15


@pytest.mark.parametrize("row", promises(), ids=lambda row: row[1][:40])
def test_each_line_of_the_threat_model_names_tests_that_are_there(row: list[str]) -> None:
    assert len(row) == 3, "a line has three cells: attacker, what holds, shown by"
    named = NAMED.findall(row[2])
    assert named, "no test is named"
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert name in names_in(path), f"{path} has no {name}"


def test_security_md_promises_nothing_that_is_only_planned() -> None:
    table = " ".join(cell for row in promises() for cell in row[:2])
    for word in ("envelope", "ML-KEM", "quantum"):
        assert word not in table
