"""The output of commands: tables and fields for people, one JSON document for programs, errors, progress."""

from __future__ import annotations

import io
import json
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import datetime
from typing import Any, TextIO

Rows = Sequence[Sequence[str]]
_GAP = "  "
_INDENT = "    "


def make_every_text_printable() -> None:
    """Replace characters that the terminal's encoding lacks; else a single name could end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


# --- For programs ---------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """One document: plain values, dataclass-like structs, times, exact decimals as numbers."""
    import msgspec

    encoded = msgspec.json.format(msgspec.json.Encoder(decimal_format="number").encode(value)).decode()
    encoding = (sys.stdout.encoding or "utf-8").lower().replace("-", "")
    if encoding != "utf8":
        encoded = "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in encoded)
    sys.stdout.write(encoded + "\n")


def print_error(as_json: bool, code: str, message: str, problems: Sequence[Mapping[str, str]] = ()) -> None:
    """With --json a document on standard output, else a sentence on standard error, with one line for each problem."""
    if as_json:
        print_json({"error": {"code": code, "message": message, "errors": problems}})
        return
    if len(problems) < 2:
        print_note(f"strongroom: {' '.join(message.splitlines())}")  # a driver's message may have several lines
        return
    print_note(f"strongroom: {len(problems)} problems:")
    for problem in problems:
        print_note(f"  {problem['path']}: {problem['message']}" if problem["path"] else f"  {problem['message']}")


# --- For people -----------------------------------------------------------------------------------------------


def print_line(text: str = "") -> None:
    sys.stdout.write(shown(text) + "\n")


def print_text(text: str) -> None:
    """Print a text of several lines as it is, for a file."""
    sys.stdout.write(text)


def print_note(text: str) -> None:
    """Print a line on standard error, apart from the result."""
    sys.stderr.write(shown(text) + "\n")


def shown(text: str) -> str:
    """The text without control characters: a name from anyone could move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def print_secret(name: str, secret: str, once: str, print_rest: Callable[[], None]) -> None:
    """Print a secret that is shown `once`, below the rest. A pipe gets only the secret, for `KEY=$(strongroom …)`; the
    rest then goes to standard error."""
    if _is_terminal(sys.stdout):
        print_rest()
        print_line(f"{name:<8}  {secret}")
    else:
        with redirect_stdout(sys.stderr):
            print_rest()
        print_line(secret)
    print_note(once)


def moment(value: datetime | None, absent: str = "never") -> str:
    return absent if value is None else value.isoformat(sep=" ", timespec="seconds").replace("+00:00", "Z")


def print_fields(fields: Sequence[tuple[str, str | Sequence[str]]]) -> None:
    """Print aligned names and values; each of several values has its own line. Fields without a value are left out."""
    width = max((_cells(name) for name, value in fields if value), default=0)
    for name, value in fields:
        lines = [value] if isinstance(value, str) else value
        for number, line in enumerate(line for line in lines if line):
            first = name if number == 0 else ""
            print_line(f"{first}{' ' * (width - _cells(first))}  {line}".rstrip())


def print_page(columns: Sequence[str], rows: Rows, next_cursor: str | None, nothing: str) -> None:
    """Print one page of a list, or `nothing` if it is empty, and the cursor of the next page."""
    if rows:
        print_table(columns, rows)
    else:
        print_note(nothing)
    if next_cursor is not None:
        print_note(f"there are more: --cursor {next_cursor}")


def print_table(columns: Sequence[str], rows: Rows) -> None:
    """Print a table: drawn by Rich on a terminal, else as aligned columns. Columns that do not fit into the terminal
    are printed below each row, because folded cells cannot be copied."""
    if _is_terminal(sys.stdout):
        width = shutil.get_terminal_size().columns
        if _width(columns, rows) > width:
            _print_stacked(columns, rows, width)
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold", no_wrap=column == "ID")  # a folded id cannot be copied
        for row in rows:
            table.add_row(*(Text(shown(cell)) for cell in row))
        Console().print(table)
        return
    cells = [list(columns), *([shown(cell) for cell in row] for row in rows)]
    widths = _widths(columns, rows)
    for row in cells:
        line = _GAP.join(cell + " " * (width - _cells(cell)) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def _widths(columns: Sequence[str], rows: Rows) -> list[int]:
    cells = [columns, *([shown(cell) for cell in row] for row in rows)]
    return [max(_cells(row[i]) for row in cells) for i in range(len(columns))]


def _width(columns: Sequence[str], rows: Rows) -> int:
    widths = _widths(columns, rows)
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _print_stacked(columns: Sequence[str], rows: Rows, width: int) -> None:
    """Print a table of the first columns that fit, and below each row the other columns with their names."""
    widths = _widths(columns, rows)
    fitting = 1
    while _width(columns[: fitting + 1], [row[: fitting + 1] for row in rows]) <= width:
        fitting += 1
    for number, row in enumerate([columns, *rows]):
        cells = [shown(cell) for cell in row[:fitting]]
        print_line(
            _GAP.join(
                cell + " " * (size - _cells(cell)) for cell, size in zip(cells, widths[:fitting], strict=True)
            ).rstrip()
        )
        line = ""
        for name, cell in zip(columns[fitting:], row[fitting:], strict=True):
            item = f"{name.lower()}: {shown(cell)}" if number and cell else ""
            if line and item and _cells(line) + len(_GAP) + _cells(item) > width:
                print_line(line)
                line = ""
            line = f"{line}{_GAP}{item}" if line and item else line or (item and f"{_INDENT}{item}")
        if line:
            print_line(line)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def _cells(text: str) -> int:
    """The terminal columns of a text: East Asian wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on standard error if it is a terminal. Call the function with the done and the total amount."""
    if not _is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def log_on_terminal(name: str) -> Iterator[None]:
    """Print the lines of the logger `name` on standard error if it is a terminal."""
    if not _is_terminal(sys.stderr):
        yield
        return
    import logging

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print_note(record.getMessage())

    logger, handler = logging.getLogger(name), Lines(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
