"""The generated reference pages: docs/cli.md from the commands' help, docs/configuration.md from the settings table.

`make docs` writes them; `python -m strongroom.cli.docs --check` only checks them.
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

    strongroom keys create --name worker --tenant acme --limit tokens=100000/5h
    strongroom keys list --tenant acme --json

After `make serve` or `make test` the program is `.venv/bin/strongroom`. It opens the store itself and needs no
server. Several processes may share one SQLite file; a JSON store takes one process at a time.

| option or variable | effect |
|---|---|
| `--store URL` | the store; without it the [settings](configuration.md) choose it |
| `--json` | prints one JSON document on standard output; notes and progress go to standard error |
| `--debug`, `STRONGROOM_DEBUG=1` | shows the traceback of an unexpected error |
| `--install-completion` | installs shell completion of commands and options |

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | the work failed: an invalid key, a file with invalid rows, an unreachable store |
| 2 | the call is wrong |
| 130 | stopped with Ctrl-C; nothing is half done |

With `--json` an error is `{"error": {"code": "…", "message": "…", "errors": [{"path": "…", "message": "…"}]}}`.
"""

CONFIGURATION_OPENING = """# Configuration

```sh
export STRONGROOM_STORE=sqlite:///data/strongroom.db
export STRONGROOM_LIMITS=leased
strongroom serve
```

Settings come from the environment. Options of the [command line](cli.md) override them. A file `.env` in the current
folder is read too: one `NAME=value` a line. It does not override the environment, and other names in it are ignored.

Contradicting settings stop the start with a message that names both. A setting for a feature that this version lacks
stops it too. `strongroom doctor` checks the settings and the store.

| name | default | meaning |
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
    """Write the pages into ./docs; with --check name the outdated pages instead."""
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
