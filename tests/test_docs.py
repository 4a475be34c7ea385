"""The examples in the README and the docs run, and come first on their page; the docs name what exists."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def examples() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for number, block in enumerate(_BLOCK.findall(page.read_text()), 1):
            found.append((f"{page.name}-{number}", block))
    return found


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in examples()])
def test_an_example_runs_as_it_is_written(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")


def test_there_are_examples() -> None:
    assert {name.split("-")[0] for name, _ in examples()} >= {"README.md", "entities.md", "keys.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link.strip()).exists()]
    assert not missing


GENERATED = ("cli.md", "configuration.md")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_ANCHOR = re.compile(r"\]\(([^)#:\s]*)#([^)\s]+)\)")
_FILE = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml)|(?:[\w.-]+/)+)`")
_EXAMPLE = re.compile(r"^(?:```(?:python|sh|json)\n|    \S)", re.MULTILINE)
README_FIGURES = 8


def anchors(page: Path) -> set[str]:
    """The anchors that a renderer makes of the page's headings."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_a_section_name_one_of_its_page(page: Path) -> None:
    links = _ANCHOR.findall(page.read_text())
    missing = [
        f"{name}#{anchor}"
        for name, anchor in links
        if anchor not in anchors((page.parent / name).resolve() if name else page)
    ]
    assert not missing


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("README.md", "architecture.md")], ids=lambda page: page.name
)
def test_a_page_opens_with_an_example(page: Path) -> None:
    """Use comes before options, guarantees and mechanism."""
    assert _EXAMPLE.search(page.read_text().partition("\n## ")[0])


@pytest.mark.parametrize("page", [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_file_and_folder_that_the_architecture_names_exists(page: Path) -> None:
    named = set(_FILE.findall(page.read_text()))
    assert len(named) > 5
    inside = ROOT / "src" / "strongroom"
    planned = {"model.py", "service.py", "store.py"}  # the files of a new package
    missing = [name for name in named - planned if not (inside / name).exists() and not (ROOT / name).exists()]
    assert not missing


def test_the_readme_has_at_most_eight_figures_and_names_the_floor_of_each() -> None:
    table = (ROOT / "README.md").read_text().partition("## Figures")[2].partition("## ")[0]
    header, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert "ratio to the floor" in header
    assert 0 < len(rows) <= README_FIGURES
    for row in rows:
        assert re.search(r"\d × \w", row), row
        assert re.search(r"`\w+` \|$", row), row  # the benchmark that prints it


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:src|tests|docs|benchmarks|examples)/[\w./-]+)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]
