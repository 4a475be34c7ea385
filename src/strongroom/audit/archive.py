"""The archive: a folder with the segments of trees that retention drops, each a file that proves itself.

A segment is an export with proofs (`journal.export_format`). It is written under a temporary name, synced to the disk,
verified, and only then renamed. So a file with a segment's name is whole, and a killed process leaves at
most a file that nobody reads.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import StorageFull, StoreError
from ..journal.export_format import MAX_LINE_BYTES, ExportedRecord, line_of, lines_of
from ..journal.findings import Report
from ..journal.verify_export import verify_export

_SEGMENT = re.compile(r"([0-9]{12})-([0-9]{12})\.jsonl")
_PART = ".part"
BUFFER_BYTES = 1024 * 1024


class Archive:
    """The segments in a folder: one folder a tree, one file a segment, named by its first index and its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def segments(self, tree: str) -> list[tuple[int, int, Path]]:
        """The first index, the end and the file of a tree's segments, in order. Raises StoreError."""
        try:
            files = list((self.folder / tree).iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unusable(self.folder, error) from error
        matches = [(match, file) for file in files if (match := _SEGMENT.fullmatch(file.name))]
        return sorted((int(match[1]), int(match[2]), file) for match, file in matches)

    async def write_segment(self, tree: str, first: int, end: int, lines: AsyncIterator[bytes]) -> Path:
        """Write a segment, durably, and verify it. Raises StoreError if it does not verify or cannot be written."""
        file = self.folder / tree / f"{first:012d}-{end:012d}.jsonl"
        part = file.with_suffix(_PART)
        try:
            await asyncio.to_thread(_make_folder, file.parent)
            with part.open("wb") as opened:
                buffer = bytearray()
                async for line in lines:
                    buffer += line
                    if len(buffer) > BUFFER_BYTES:
                        await asyncio.to_thread(opened.write, bytes(buffer))
                        buffer.clear()
                await asyncio.to_thread(_sync, opened, bytes(buffer))
            await asyncio.to_thread(_verify, part)
            await asyncio.to_thread(_rename, part, file)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        return file

    async def verify(self, file: Path) -> Report:
        """The report of a segment's verification. Raises InvalidInput for a file that is none."""
        return await asyncio.to_thread(_report, file)

    async def records(self, file: Path) -> AsyncIterator[ExportedRecord]:
        """The records of a segment."""
        lines = _lines(file)
        while (block := await asyncio.to_thread(next, lines, None)) is not None:
            for line in lines_of(block):
                if isinstance(line, ExportedRecord):
                    yield line

    async def replace(self, file: Path, changed: dict[int, ExportedRecord]) -> None:
        """Replace records of a segment by their index, durably, and verify it. Raises StoreError."""
        part = file.with_suffix(_PART)
        try:
            await asyncio.to_thread(_replaced, file, part, changed)
            await asyncio.to_thread(_verify, part)
            await asyncio.to_thread(_rename, part, file)
        except OSError as error:
            raise _unusable(self.folder, error) from error


def _unusable(folder: Path, error: OSError) -> StorageFull | StoreError:
    problem = f"the archive {folder} cannot be used: {error.strerror}"
    return StorageFull(problem) if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError(problem)


def _make_folder(folder: Path) -> None:
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for one in made:
        _sync_folder(one.parent)


def _sync(opened: BinaryIO, rest: bytes) -> None:
    opened.write(rest)
    opened.flush()
    os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(part: Path, file: Path) -> None:
    part.replace(file)
    _sync_folder(file.parent)


def _report(file: Path) -> Report:
    with file.open("rb") as opened:
        return verify_export(opened, file.name, size=0)


def _verify(file: Path) -> None:
    report = _report(file)
    if not report.whole:
        raise StoreError(f"a segment of the archive does not verify: {report.findings[0].message}")


def _lines(file: Path) -> Iterator[bytes]:
    """The lines between the first and the last one."""
    with file.open("rb") as opened:
        opened.readline(MAX_LINE_BYTES)
        before = opened.readline(MAX_LINE_BYTES)
        while line := opened.readline(MAX_LINE_BYTES):
            yield before
            before = line


def _replaced(file: Path, part: Path, changed: dict[int, ExportedRecord]) -> None:
    with file.open("rb") as old, part.open("wb") as new:
        new.write(old.readline(MAX_LINE_BYTES))
        before = old.readline(MAX_LINE_BYTES)
        while line := old.readline(MAX_LINE_BYTES):
            (record,) = lines_of(before)
            new.write(line_of(changed[record.index]) if record.index in changed else before)
            before = line
        new.write(before)
        _sync(new, b"")


__all__ = ["Archive"]
