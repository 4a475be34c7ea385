"""Every command block of the documentation runs, in order, on an empty machine: no store, no database."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from strongroom.cli import app, docs
from tests.helpers import docs_commands
from tests.helpers.paths import ROOT
from tests.helpers.servers import free_port, postgres
from tests.helpers.waiting import PATIENCE_S
from tests.test_docs import PAGES

SERVED = 'serve; export KEY="$(administrator)"'
FILLED = "strongroom keys create --name worker --tenant acme --store sqlite:///data/strongroom.db >made.out"
SEALED = "until strongroom audit checkpoint --tenant acme >made.out 2>&1; do sleep 0.1; done"
DATABASE = """
createdb --host db --username postgres --encoding=UTF8 --template=template0 strongroom
strongroom schema roles --store postgresql://db/strongroom | psql --quiet --host db --username postgres strongroom
strongroom schema apply --store postgresql://strongroom_owner:…@db/strongroom >made.out
"""
FIRST_EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SIGN_IN = ROOT / "docs" / "sign-in.md"
BEFORE: Mapping[str, str] = {
    "audit.md": f"{FILLED}\n{SERVED}\n{SEALED}",
    "backends.md": FILLED + DATABASE,
    "http.md": SERVED,
    "import.md": FILLED,
    "keys.md": f"{FILLED}\nexport STRONGROOM_STORE=sqlite:///data/strongroom.db",
    "migrate.md": FILLED + DATABASE,
    "operations.md": SERVED,
    "sign-in.md": f"{sys.executable} - >token.out <<'END'\n{FIRST_EXAMPLE.findall(SIGN_IN.read_text())[0]}END",
}
"""What a page takes for granted: it says so in words, and another page has the commands."""
WITH_COMMANDS = [page for page in PAGES if any(block.reason is None for block in docs_commands.blocks(page))]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "cli.md"], ids=lambda page: page.name
)  # the examples of cli.md, which is written from the commands, are read below
def test_no_command_stands_in_a_block_that_nothing_would_run(page: Path) -> None:
    assert docs_commands.unmarked(page) == []


def examples_of_the_reference() -> list[str]:
    helps = re.findall(r"```text\n(.*?)\n```", docs.cli_page(), re.DOTALL)
    parts = [text.partition("Example:")[2].replace("\\\n", " ") for text in helps]
    return [line.strip() for part in parts for line in part.splitlines() if line.strip().startswith("strongroom ")]


def test_the_examples_of_the_command_line_reference_are_calls_that_it_takes() -> None:
    examples = examples_of_the_reference()
    assert len(examples) > 50
    for example in examples:
        words = shlex.split(example)[1:]
        ends = [words.index(word) for word in ("|", "<", ">") if word in words]
        words = words[: min(ends, default=len(words))]
        command: Any = typer.main.get_command(app)
        context = None
        while True:  # each level reads its own options; InvalidInput or a usage error if it does not know one
            context = command.make_context(command.name or "strongroom", words, parent=context)
            if not hasattr(command, "commands"):
                break
            _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.fixture(scope="module")
def strongroom(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the program `strongroom`."""
    folder = tmp_path_factory.mktemp("bin")
    path = folder / "socket"
    command = [sys.executable, docs_commands.__file__, str(path)]
    with subprocess.Popen(command, cwd=docs_commands.ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        program = folder / "strongroom"
        program.write_text(docs_commands.client(path))
        program.chmod(0o755)
        yield folder
        process.terminate()


@pytest.mark.xdist_group("docs-commands")
def test_the_tests_of_a_group_run_on_one_worker(request: pytest.FixtureRequest) -> None:
    """The pages make the same database: run at once they would remove it from each other."""
    grouped = getattr(request.config.option, "loadgroup", False)
    assert request.node.nodeid.endswith("@docs-commands") is grouped


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[postgres.Server]:
    """A PostgreSQL server without the database that the pages make, and none afterwards."""
    server = postgres.start(request, "postgres-18", postgres.bundled())
    gone = "DROP DATABASE IF EXISTS strongroom WITH (FORCE)"
    server.execute(gone)
    yield server
    server.execute(gone)


@pytest.mark.server
@pytest.mark.xdist_group("docs-commands")  # the pages make the same database
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_order_from_an_empty_machine(
    page: Path, strongroom: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    port = free_port()
    replaced = {
        "localhost:8080": f"localhost:{port}",
        "…the key it printed…": '"$(administrator)"',
        "…the token it printed…": '"$(cat token.out)"',
        "…the secret…": """'"$(text_of_key $N)"'""",
    }
    binaries = ""
    before = BEFORE.get(page.name, "")
    if "postgresql://" in docs_commands.script(page, before, {}):
        server: postgres.Server = request.getfixturevalue("database")
        binaries = f"{server.binaries}:"
        replaced |= {
            "--host db --username postgres": f"--host 127.0.0.1 --port {server.port} --username admin",
            ":…@db/": f":secret@127.0.0.1:{server.port}/",
            "//db/": f"//127.0.0.1:{server.port}/",
        }
    for old, new in replaced.items():
        before = before.replace(old, new)
    script = docs_commands.script(page, before, replaced)
    assert "…" not in script, "what is left out of a command must be in the table of what is put there"
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    path = f"{strongroom}:{binaries}{os.environ['PATH']}"
    settings = {"PATH": path, "PYTHONPATH": str(docs_commands.ROOT), "STRONGROOM_PORT": str(port)}
    ran = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**kept, **settings}, timeout=4 * PATIENCE_S,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, (ran.stdout, ran.stderr)
