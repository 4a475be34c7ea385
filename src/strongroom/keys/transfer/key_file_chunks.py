"""The chunked reader of key files: only one chunk of the file is in memory at a time.

`survey` reads the file once: it finds where the chunks begin, judges every row, and finds keys that the file has twice.
After that, `rows` reads any chunk again, in any process. `key_file_parse.parse` reads files with an unexpected layout
or invalid JSON: it holds the whole file in memory and names the exact problem.

A JSON streaming library (ijson) was measured and is not used. It reads an unpaired surrogate as "?", which changes
the key. It does not report duplicate names in a row. It gives no byte positions, which the import's worker processes
need.
"""

from __future__ import annotations

import os
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import UNSET, UnsetType

from ...context import name_problem, text_problem, us_from_utc
from ...entities import MAX_ID_BYTES
from ...errors import Conflict
from ...limits import MAX_AMOUNT, SATURATED
from ..token import MAX_KEY_CHARS, is_possible
from .key_file import MAX_NAME_CHARS, SHORT_KEY_CHARS, Finding, KeyFile, KeyFileError, KeyRow, Shape
from .key_file_parse import HASHES_NAMED, MAX_FILE_BYTES, judged, parse

CHUNK_BYTES = 256 * 1024
"""The usual size of a chunk: some hundred rows."""
MAX_CHUNK_BYTES = 16 * CHUNK_BYTES
"""`key_file_parse.parse` reads a file with a longer row, or with a row whose end is not found."""
MAX_CUTS = 200
"""Positions that are tried as the end of a chunk. Most of them lie between two usage windows of a row."""
HELD_ROWS = 500

_OPENING = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"keys"\s*:\s*([\[{])')
_CLOSING = {b"[": re.compile(rb"\]\s*\}\s*\Z"), b"{": re.compile(rb"\}\s*\}\s*\Z")}
_BETWEEN = re.compile(rb"\s*,\s*")
_SPACE = b" \t\r\n"
_TIME = re.compile(r"(?:19[7-9]\d|[2-8]\d{3})-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|\+00:00)")
_HASH_AS_KEY = re.compile(r"sha256:([0-9a-fA-F]{64})")
_ESCAPED = re.compile(rb"\\u00[2-7]")
_HASH = re.compile(r"[0-9a-fA-F]{64}")


class _NotInChunks(Exception):
    """The file must be read whole."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a file: `count` rows in the bytes from `start` to `end`. The first row has the number `first`."""

    start: int
    end: int
    first: int
    count: int


@dataclass(slots=True)
class ChunkedKeyFile:
    """A surveyed file. `file` has the findings, as from `key_file_parse.parse`. It has the rows only if the file was
    read whole; else `chunks` leads to them."""

    path: Path
    file: KeyFile
    count: int
    accepted: int
    now_us: int
    chunks: Sequence[Chunk] = ()
    stamp: tuple[int, int] = (0, 0)
    twice: frozenset[str] = frozenset()
    """Paths of rows that are refused because an earlier row has the same key."""
    held: bool = field(default=False)

    @property
    def shape(self) -> Shape:
        return self.file.shape

    def rows(self, chunk: Chunk) -> list[KeyRow]:
        """The accepted rows of a chunk. Raises Conflict if the file was changed since it was surveyed."""
        if self.held:
            return self.file.rows[chunk.start : chunk.end]
        with self.path.open("rb") as opened:
            if _stamp(opened) != self.stamp:
                raise Conflict(f"{self.path}: was changed while it was read: run the command again")
            data = _read(opened, chunk)
        rows, _, _ = _judge(self.shape, data, chunk.first, self.now_us, {})
        return [row for row in rows if row.path not in self.twice] if self.twice else rows

    def without_rows(self) -> ChunkedKeyFile:
        """A copy for another process, with only the fields that reading chunks needs."""
        return self if self.held else replace(self, file=KeyFile(self.shape))


def in_memory(path: Path, file: KeyFile, now_us: int) -> ChunkedKeyFile:
    """A source from a file that is held in memory."""
    chunks = [
        Chunk(start, min(start + HELD_ROWS, len(file.rows)), start, min(HELD_ROWS, len(file.rows) - start))
        for start in range(0, len(file.rows), HELD_ROWS)
    ]
    return ChunkedKeyFile(path, file, file.count, len(file.rows), now_us, chunks, held=True)


def survey(path: Path, now_us: int, progress: Callable[[int, int], None] = lambda done, size: None) -> ChunkedKeyFile:
    """Read a file and judge every row. `progress` receives the bytes read. Raises KeyFileError if the file has neither
    shape, and OSError."""
    with path.open("rb") as opened:
        size = opened.seek(0, 2)
        try:
            return _surveyed(path, opened, now_us, lambda done: progress(done, size))
        except _NotInChunks:
            if size > MAX_FILE_BYTES:
                raise KeyFileError(
                    f"is larger than {MAX_FILE_BYTES >> 20} MiB, and cannot be read in chunks: is it right JSON, and "
                    'nothing in it but {"keys": …}? Else split it, an import may be made of several files'
                ) from None
            opened.seek(0)
            return in_memory(path, parse(opened.read(), now_us), now_us)


def _stamp(opened: BinaryIO) -> tuple[int, int]:
    found = os.fstat(opened.fileno())
    return found.st_size, found.st_mtime_ns


def _read(opened: BinaryIO, chunk: Chunk) -> bytes:
    opened.seek(chunk.start)
    return opened.read(chunk.end - chunk.start)


# --- The survey -----------------------------------------------------------------------------------------------


def _surveyed(path: Path, opened: BinaryIO, now_us: int, progress: Callable[[int], None]) -> ChunkedKeyFile:
    stamp = _stamp(opened)
    opened.seek(0)
    opening = _OPENING.match(opened.read(4_096))
    if opening is None:
        raise _NotInChunks
    bracket = opening[1]
    shape: Shape = "plain" if bracket == b"[" else "hashed"
    file = KeyFile(shape)
    marks = array("Q")
    chunks = []
    for chunk, data in _chunks(opened, opening.end(), bracket):
        seen: dict[bytes, str] = {}
        usual = bytearray()
        _, refused, findings = _judge(shape, data, chunk.first, now_us, seen, usual=usual)
        file.refused += refused
        for finding in findings:
            file.keep(finding)
        # refused rows count too: a repeated key is reported even if its first row was refused
        marks.frombytes(b"".join(known[:8] for known in seen))
        marks.frombytes(usual)
        chunks.append(chunk)
        progress(chunk.end)
    count = sum(chunk.count for chunk in chunks)
    source = ChunkedKeyFile(path, file, count, count - file.refused, now_us, chunks, stamp)
    repeated = _repeated(marks)
    del marks
    return _without_repeated(source, opened, repeated) if repeated else source


def _repeated(marks: array[int]) -> frozenset[int]:
    """The marks that occur more than once. Two keys share a mark by chance in one of a hundred million files."""
    found = set()
    before = None
    for mark in sorted(marks):
        if mark == before:
            found.add(mark)
        before = mark
    return frozenset(found)


def _without_repeated(source: ChunkedKeyFile, opened: BinaryIO, repeated: frozenset[int]) -> ChunkedKeyFile:
    """Survey again, and compare the keys of all rows with these marks. Refuses a row whose key an earlier row has."""
    if source.shape == "hashed":
        raise _NotInChunks  # `parse` reports duplicate hashes
    file = KeyFile(source.shape)
    seen: dict[bytes, str] = {}
    twice: list[str] = []
    for chunk in source.chunks:
        data = _read(opened, chunk)
        _, refused, findings = _judge(source.shape, data, chunk.first, source.now_us, seen, repeated, twice)
        file.refused += refused
        for finding in findings:
            file.keep(finding)
    return replace(source, file=file, accepted=source.count - file.refused, twice=frozenset(twice))


def _chunks(opened: BinaryIO, start: int, bracket: bytes) -> Iterator[tuple[Chunk, bytes]]:
    """The chunks from `start`, behind the opening bracket, to the file's end, with their bytes. Raises _NotInChunks."""
    closing = b"]" if bracket == b"[" else b"}"
    first, size = 0, CHUNK_BYTES
    while True:
        opened.seek(start)
        data = opened.read(size)
        at_end = len(data) < size
        if at_end and (found := _CLOSING[bracket].search(data)) is not None:
            rows = data[: found.start()]
            count = _count(bracket, rows, closing)
            if count is None or (count == 0 and first):  # a comma with no row after it
                raise _NotInChunks
            if count:
                yield Chunk(start, start + len(rows), first, count), rows
            return
        cut = None if at_end else _cut(data, bracket, closing)
        if cut is None:
            if at_end or size >= MAX_CHUNK_BYTES:
                raise _NotInChunks
            size *= 2
            continue
        end, count, following = cut
        yield Chunk(start, start + end, first, count), data[:end]
        start, first, size = start + following, first + count, CHUNK_BYTES


def _cut(data: bytes, bracket: bytes, closing: bytes) -> tuple[int, int, int] | None:
    """Where the last whole row of `data` ends, the number of rows before that, and where the next row begins.

    Each comma is tried as the end: the bytes before it are valid JSON only if it separates two rows.
    """
    end = len(data)
    for _ in range(MAX_CUTS):
        end = data.rfind(b"}", 0, end)
        if end < 0:
            return None
        between = _BETWEEN.match(data, end + 1)
        if between is None or between.end() == len(data):
            continue
        count = _count(bracket, data[: end + 1], closing)
        if count:
            return end + 1, count, between.end()
    return None


def _count(bracket: bytes, rows: bytes, closing: bytes) -> int | None:
    """The number of rows in these bytes. None if they are not whole rows."""
    if not rows.strip(_SPACE):
        return 0
    try:
        if bracket == b"[":
            return len(msgspec.json.decode(b"[" + rows + closing, type=list[msgspec.Raw]))
        count = len(msgspec.json.decode(b"{" + rows + closing, type=dict[str, msgspec.Raw]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if len(HASHES_NAMED.findall(rows)) > count:
        raise _NotInChunks  # of duplicate names, the decoder kept only the last
    return count


# --- Rows -----------------------------------------------------------------------------------------------------
#
# msgspec reads a usual row in a fifth of the time. `key_file_parse.judged` reads a row with anything unusual. Both make
# the same row of the same JSON.

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=SATURATED)]


class _Window(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    window_start: str
    tokens_used: Annotated[int, msgspec.Meta(ge=0, le=MAX_AMOUNT)]


class _Plain(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    key: Annotated[str, msgspec.Meta(min_length=SHORT_KEY_CHARS, max_length=MAX_KEY_CHARS)]
    name: _Name
    token_limit_per_5h: Annotated[int, msgspec.Meta(ge=0, le=MAX_AMOUNT)] | None
    expiry_date: str | None
    created_at: str
    last_used: str | UnsetType | None = UNSET
    total_lifetime_tokens: _Count | UnsetType | None = UNSET
    usage_windows: list[_Window] | UnsetType | None = UNSET
    model: _Name | UnsetType | None = UNSET


class _Hashed(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    name: _Name
    created_at: str
    expires_at: str | None
    user_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_BYTES // 4)] | UnsetType | None = UNSET
    last_used: str | UnsetType | None = UNSET
    usage_count: _Count | UnsetType | None = UNSET


class _Unusual(Exception):
    """The row must be judged by `key_file_parse.judged`."""


_plains = msgspec.json.Decoder(list[_Plain])
_hasheds = msgspec.json.Decoder(dict[str, _Hashed])


def _judge(
    shape: Shape,
    data: bytes,
    first: int,
    now_us: int,
    seen: dict[bytes, str],
    repeated: frozenset[int] = frozenset(),
    twice: list[str] | None = None,
    usual: bytearray | None = None,
) -> tuple[list[KeyRow], int, list[Finding]]:
    """The accepted rows of a chunk, the number of refused rows, and the findings. Appends the marks of rows that took
    the quick way to `usual`; adds the keys of the other rows to `seen`."""
    wrapped = b"[" + data + b"]" if shape == "plain" else b"{" + data + b"}"
    raws: Any = None
    try:
        read: Any = (_plains if shape == "plain" else _hasheds).decode(wrapped)
        if _may_repeat(data, list(read) if shape == "plain" else list(read.values())):
            read, raws = None, _raws(shape, wrapped)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        read, raws = None, _raws(shape, wrapped)
    rows, findings, refused = [], list[Finding](), 0
    known = raws if read is None else read
    names = range(len(known)) if shape == "plain" else list(known)
    for position, name in enumerate(names):
        try:
            if read is None:
                raise _Unusual
            row = (
                _plain(read[name], first + position, now_us) if shape == "plain" else _hashed(name, read[name], now_us)
            )
            if repeated and int.from_bytes(row.sha256[:8], sys.byteorder) in repeated:
                raise _Unusual
        except _Unusual:
            raws = _raws(shape, wrapped) if raws is None else raws
            said: int | str = first + position if shape == "plain" else name
            found, more = judged(shape, said, raws[name], now_us, seen)
            findings += more
            if found is None:
                refused += 1
                if twice is not None:
                    twice.append(f"keys.{said}")
                continue
            row = found
        else:
            if usual is not None:
                usual += row.sha256[:8]
        rows.append(row)
    return rows, refused, findings


def _may_repeat(data: bytes, rows: list[Any]) -> bool:
    """Whether a row may have a duplicate name, of which the decoder keeps one: the text has the name more often than
    rows have it. May answer True wrongly: a value can look like a name, and names can contain escapes."""
    if _ESCAPED.search(data):
        return True
    for name in type(rows[0]).__struct_fields__ if rows else ():
        count = data.count(b'"%b"' % name.encode())
        if count and count != sum(getattr(row, name) is not UNSET for row in rows):
            return True
    windows = sum(len(row.usage_windows) for row in rows if getattr(row, "usage_windows", None))
    return any(data.count(b'"%b"' % name.encode()) != windows for name in _Window.__struct_fields__)


def _raws(shape: Shape, wrapped: bytes) -> Any:
    return msgspec.json.decode(wrapped, type=list[msgspec.Raw] if shape == "plain" else dict[str, msgspec.Raw])


def _plain(read: _Plain, number: int, now_us: int) -> KeyRow:
    key = read.key
    secret: str | None = key
    digest = _HASH_AS_KEY.fullmatch(key)
    if digest is not None:
        hashed, secret = bytes.fromhex(digest[1]), None
    elif is_possible(key):
        hashed = sha256(key.encode()).digest()
    else:
        raise _Unusual
    created_us, expires_us = _us(read.created_at), _us_or_none(read.expiry_date)
    windows: list[tuple[int, int]] = []
    for window in read.usage_windows or ():
        start_us = _us(window.window_start)
        if start_us > now_us:
            raise _Unusual
        windows.append((start_us, window.tokens_used))
    if (expires_us is not None and (expires_us < created_us or expires_us <= now_us)) or sum(
        tokens for _, tokens in windows
    ) > SATURATED:
        raise _Unusual
    model = None if read.model is None or read.model is UNSET else _usual(read.model)
    return KeyRow(
        f"keys.{number}", hashed, secret, _usual(read.name), None, model, read.token_limit_per_5h, created_us,
        expires_us, _us_or_none(read.last_used), 0, read.total_lifetime_tokens or 0, tuple(sorted(windows)),
    )  # fmt: skip


def _hashed(name: str, read: _Hashed, now_us: int) -> KeyRow:
    if _HASH.fullmatch(name) is None:
        raise _Unusual
    created_us, expires_us = _us(read.created_at), _us_or_none(read.expires_at)
    if expires_us is not None and (expires_us < created_us or expires_us <= now_us):
        raise _Unusual
    user_id = None if read.user_id is None or read.user_id is UNSET else _usual(read.user_id)
    if user_id is not None and name_problem(user_id, MAX_ID_BYTES):
        raise _Unusual
    return KeyRow(
        f"keys.{name[:12]}…", bytes.fromhex(name), None, _usual(read.name), user_id, None, None, created_us, expires_us,
        _us_or_none(read.last_used), read.usage_count or 0, 0, (),
    )  # fmt: skip


def _usual(text: str) -> str:
    if text_problem(text, MAX_ID_BYTES):
        raise _Unusual
    return text


def _us(text: str) -> int:
    if _TIME.fullmatch(text) is None:
        raise _Unusual
    try:
        return us_from_utc(datetime.fromisoformat(text))
    except ValueError:
        raise _Unusual from None


def _us_or_none(text: str | UnsetType | None) -> int | None:
    return None if text is None or text is UNSET else _us(text)
