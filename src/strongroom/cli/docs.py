"""The generated reference pages: docs/cli.md from the commands' help, docs/configuration.md from the settings table.

`make docs` writes them; `python -m strongroom.cli.docs --check` only says whether they are up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from . import app
from .session import EXIT_FAILED

WIDTH = 100
GENERATED = "<!-- Written by `make docs`: change the source, not this page. -->\n\n"

CLI_OPENING = """# Command line

After `make serve` or `make test` the command line is `.venv/bin/strongroom`. What it does to a store it does directly,
with or without a server: several processes may share one SQLite file; a JSON store belongs to one at a time.

- `--store` names the store; without it the [settings](configuration.md) do.
- `--json` prints exactly one JSON document on standard output, for errors too:
  `{"error": {"code": "…", "message": "…", "errors": [{"path": "…", "message": "…"}]}}`. Notes and progress are on
  standard error.
- Exit status: 0 done; 1 the work failed (a key that is not valid, a file with wrong rows, a store that does not
  answer); 2 the call is wrong; 130 stopped with Ctrl-C, with nothing half done.
- `--debug` (or `STRONGROOM_DEBUG=1`) shows a traceback where something unforeseen went wrong.
- `strongroom --install-completion` makes the shell complete commands and options.
"""

CONFIGURATION_OPENING = """# Configuration

Everything is read from the environment; options of the [command line](cli.md) outrank it. Settings that contradict
each other stop the start with a sentence that names both, and so does what this version does not have yet: nothing is
ignored in silence.

A file `.env` in the current folder is read as well: `NAME=value` a line. What the environment sets already stays, and
names that are no settings are left alone. `strongroom doctor` says what is wrong with the settings and the store.

| name | default | what it is |
|---|---|---|
"""


def cli_page() -> str:
    """docs/cli.md: every command with its help, in the order of `strongroom --help`."""
    commands = _helps(typer.main.get_command(app), "strongroom", None)
    return GENERATED + CLI_OPENING + "".join(f"\n## {path}\n\n```text\n{text}\n```\n" for path, text in commands)


def _helps(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    """(command path, help text) of a command and all below it."""
    context = command.make_context(
        name, [], parent=parent, resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
    )
    yield context.command_path, command.get_help(context)
    for below in getattr(command, "commands", {}):
        yield from _helps(command.commands[below], below, context)


def configuration_page() -> str:
    """docs/configuration.md: the settings table."""
    from ..config import settings_table

    rows = []
    for setting in settings_table():
        default = "" if setting.default is None else f"`{setting.default}`"
        help = setting.help.replace("|", "\\|") + (" Secret." if setting.secret else "")
        rows.append(f"| `{setting.name}` | {default} | {help} |\n")
    return f"{GENERATED}{CONFIGURATION_OPENING}{''.join(rows)}"


PAGES = {"cli.md": cli_page, "configuration.md": configuration_page}


def main(arguments: list[str]) -> int:
    """Write the pages into ./docs, or with --check name those that are out of date."""
    folder = Path("docs")
    if not folder.is_dir():
        sys.stderr.write("strongroom: there is no folder docs here: run this in a checkout\n")
        return EXIT_FAILED
    stale = [name for name, page in PAGES.items() if _text(folder / name) != page()]
    if "--check" in arguments:
        for name in stale:
            sys.stderr.write(f"docs/{name} is out of date: run make docs\n")
        return EXIT_FAILED if stale else 0
    for name in stale:
        (folder / name).write_text(PAGES[name](), encoding="utf-8")
        sys.stderr.write(f"wrote docs/{name}\n")
    return 0


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
