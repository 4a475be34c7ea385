"""The lines of a file of records, JSON or CSV, as rows of names and values; `record_file` judges them. Pure."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from itertools import chain
from typing import Any

import msgspec

from ...context import repeated_name
from .key_file import KeyFileError

MAX_LINE_BYTES = 1 << 20
TIMES = ("created_at", "expires_at", "last_used", "previous_until", "next_rotation_at", "leaked_at", "deleted_at")
OF_DJANGO = {"hashed_key": "hash", "created": "created_at", "expiry_date": "expires_at"}
"""Columns of djangorestframework-api-key, mapped to field names."""
DELIMITERS = ",;\t"
MAX_NAMED = 8
"""Columns that an error message suggests."""
_SEPARATOR = re.compile(r'"?sep=([^\w\s"]|\t)"?', re.IGNORECASE)
_SHORT_OFFSET = re.compile(r"[+-]\d\d$")
_LISTS = ("permissions", "allowed_ips", "groups", "allowed_models", "allowed_routes")
_OBJECTS = ("metadata", "limits", "usage")
_BOOLEANS = {"true": True, "t": True, "1": True, "yes": True, "false": False, "f": False, "0": False, "no": False}
_TELLING = frozenset({"name", "hash", "key", "hashed_key", "type"})
"""A line that has any of these is a record."""


def is_records(beginning: bytes) -> bool:
    """Whether a file that begins with these bytes has records, and is no key file (`key_file`)."""
    try:
        first = next((line.strip() for _, line in _numbered(io.BytesIO(beginning))), b"")
    except KeyFileError:
        return True  # of neither shape: reading it as records reports the problem
    if first.startswith(b"{"):
        try:
            names = msgspec.json.decode(first, type=dict[str, msgspec.Raw]).keys()
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        return "keys" not in names and (not names.isdisjoint(_TELLING) or {"model", "fields"} <= names)
    return not first.startswith(b"[") and first != b""  # a file that is not JSON can only be CSV


def rows_of(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """Number, content and problem of each line that is not empty."""
    numbered = _numbered(lines)
    first = next(numbered, None)
    if first is None:
        raise KeyFileError("is empty: expected one JSON object a line, or CSV")
    if first[1].startswith(b"{"):
        yield _json_row(*first)
        for line in numbered:
            yield _json_row(*line)
    else:
        yield from _csv_rows(first, numbered)


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, in UTF-8, with their numbers. Accepts UTF-16, which some spreadsheets write."""
    remaining = iter(lines)
    first = next(remaining, b"")
    whole = chain([first], remaining)
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        whole = chain(_from_utf16(whole))
    elif b"\0" in first[:4]:
        raise KeyFileError("is not UTF-8: found zero bytes, expected UTF-8, or UTF-16 with its byte order mark")
    for number, line in enumerate(whole, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def _from_utf16(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a text in UTF-16, as UTF-8; `parts` are its bytes, split anywhere."""
    decoder = codecs.getincrementaldecoder("utf-16")()
    rest = ""
    try:
        for part in parts:
            *whole, rest = (rest + decoder.decode(part)).split("\n")
            yield from (f"{line}\n".encode() for line in whole)
        yield (rest + decoder.decode(b"", final=True)).encode()
    except UnicodeError as error:
        reason = error.reason if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else str(error)
        raise KeyFileError(f"is not UTF-16, which its first bytes say it is: {reason}") from None


def _json_row(number: int, line: bytes) -> tuple[int, dict[str, Any], str | None]:
    if len(line) > MAX_LINE_BYTES:
        return number, {}, f"found {len(line)} bytes, expected at most {MAX_LINE_BYTES}"
    try:
        raw = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        if (twice := repeated_name(line, None)) is not None:
            return number, {}, f"found the name {twice[:64]!r} more than once in one object, expected it once"
        if "model" in raw and "fields" in raw:  # Django's dumpdata has one object a line
            id = {"id": raw["pk"]} if "pk" in raw else {}
            raw = id | msgspec.json.decode(raw["fields"], type=dict[str, msgspec.Raw])
        # A float would lose digits of money.
        return number, {n: _exact(v) if n == "limits" else msgspec.json.decode(v) for n, v in raw.items()}, None
    except msgspec.ValidationError:
        return number, {}, "expected a JSON object"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        return number, {}, f"is not JSON: {str(error)[:200]}"


def _exact(raw: msgspec.Raw | str) -> Any:
    return json.loads(raw if isinstance(raw, str) else bytes(raw), parse_float=Decimal)


def _csv_rows(
    first: tuple[int, bytes], lines: Iterator[tuple[int, bytes]]
) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    began = first[0]

    def text() -> Iterator[str]:
        nonlocal began
        yield heading
        for number, line in lines:
            began = number
            yield _decoded(number, line)

    heading = _decoded(*first)
    named = _SEPARATOR.fullmatch(heading.strip("\r\n"))
    if named is not None:  # a spreadsheet's own first line
        began, line = next(lines, (began, b""))
        heading = _decoded(began, line)
    delimiter = named[1] if named is not None else max(DELIMITERS, key=lambda one: _known_columns(heading, one))
    rows = csv.reader(text(), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise KeyFileError(f"line {began}: is not CSV: {error}") from None
        if columns is None:
            columns = [_column(name) for name in cells]
            twice = [name for name in columns if name and columns.count(name) > 1]
            if twice:
                raise KeyFileError(f"has two columns {twice[0][:40]!r}")
            if "name" not in columns or not {"key", "hash", "hashed_key", "id"} & set(columns):
                found = ", ".join(repr(name[:40]) for name in columns[:MAX_NAMED])
                raise KeyFileError(
                    f"is neither JSON nor CSV with the columns name and hash (or key): its first line has {found}"
                )
            continue
        if not any(cell.strip() for cell in cells):  # a row of empty cells
            continue
        if len(cells) != len(columns):
            yield began, {}, f"found {len(cells)} columns, expected {len(columns)}"
            continue
        nameless = [cell.strip() for name, cell in zip(columns, cells, strict=True) if not name and cell.strip()]
        if nameless:
            yield began, {}, f"found {nameless[0][:40]!r} in a column without a name, expected nothing there"
            continue
        row, problems = _cells({name: cell for name, cell in zip(columns, cells, strict=True) if name})
        yield began, row, "; ".join(problems) or None


def _column(name: str) -> str:
    """A column's name as a field has it: `Created at` is `created_at`."""
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def _known_columns(heading: str, delimiter: str) -> tuple[int, int]:
    """How many columns of a first line have a known name with this delimiter, and how many there are."""
    try:
        names = [_column(name) for name in next(csv.reader([heading], delimiter=delimiter), [])]
    except csv.Error:
        return 0, 0
    return sum(name in _TELLING for name in names), len(names)


def _decoded(number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise KeyFileError(f"line {number}: is not UTF-8: {error.reason}; save it as UTF-8") from None


def _cells(cells: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Convert a row's texts to values. An empty cell is an absent field."""
    row: dict[str, Any] = {}
    problems: list[str] = []
    for name, cell in cells.items():
        text = cell.strip()
        if not text:
            continue
        if name in _OBJECTS or (name in _LISTS and text.startswith("[")):
            try:
                row[name] = _exact(text) if name == "limits" else msgspec.json.decode(text.encode())
            except (ValueError, RecursionError):
                problems.append(f"{name}: expected JSON")
        elif name in _LISTS:
            row[name] = re.split(r"[,;\s]+", text)
        elif name in ("enabled", "revoked"):
            row[name] = _BOOLEANS.get(text.lower(), text)
        elif name in ("usage_count", "rotate_every_s", "rotation_overlap_s"):
            row[name] = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text
        elif name in TIMES or name in OF_DJANGO:
            row[name] = text + ":00" if _SHORT_OFFSET.search(text) and ":" in text else text  # PostgreSQL writes +00
        else:
            row[name] = cell
    return row, problems
