"""A logical backup of collections: compressed JSON lines that end with counts and checksums; written and verified.

    {"strongroom_backup": 1, "store": "…", "made_at": "…"}
    {"collection": "notes", "tenant": "acme", "document": {…}}
    {"parts": [{"collection": "notes", "tenant": "acme", "documents": 1, "checksum": "…"}], "lines": 1, "sha256": "…"}

Documents are in the JSON store's tagged JSON (bytes, decimals, times). `sha256` covers all lines before the last.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..entities import Collection, Document
from ..errors import Conflict, StorageFull, StoreError, Unavailable
from ..storage import tagged_json as _values
from ..storage.port import Store
from .checksum import Canonical, SetSum
from .compare import set_sum
from .streams import pages, parts

FORMAT = 1
LEVEL = 3
LINES_AT_ONCE = 500
Sums = dict[tuple[str, str | None], SetSum]


@dataclass(frozen=True, slots=True)
class Backup:
    """A file that was read to its end and verified."""

    path: Path
    sums: Mapping[tuple[str, str | None], SetSum]

    @property
    def documents(self) -> int:
        return sum(one.count for one in self.sums.values())


# --- Writing --------------------------------------------------------------------------------------------------


async def write(
    store: Store, name: str, collections: Sequence[Collection], path: Path, tell: Callable[[int], None]
) -> Backup:
    """Write every document of the collections to a new file, which is durable and complete when this returns.

    An existing file is accepted if it is a backup of exactly the store's present documents: its writer was killed after
    writing it. Raises Conflict for any other file.
    """
    if await asyncio.to_thread(path.exists):
        existing = await asyncio.to_thread(verified, path)
        if existing.sums != await _sums(store, collections):
            raise Conflict(f"{path}: exists already, and is no backup of the present documents: name a new file")
        return existing
    partial = path.with_name(path.name + ".partial")
    sums: Sums = {}
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as raw:
            with gzip.GzipFile("", "wb", LEVEL, raw, mtime=0) as file:
                await _write_all(_Writer(file), store, name, collections, sums, tell)
            raw.flush()
            await asyncio.to_thread(os.fsync, raw.fileno())
        os.rename(partial, path)
        _sync_folder(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    return Backup(path, sums)


class _Writer:
    """Writes lines, and keeps their count and digest."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.lines = -1  # the first line is not a document

    def write(self, *values: Mapping[str, Any]) -> None:
        text = b"".join(json.dumps(v, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for v in values)
        self._hash.update(text)
        self._file.write(text)
        self.lines += len(values)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


async def _write_all(
    writer: _Writer,
    store: Store,
    name: str,
    collections: Sequence[Collection],
    sums: Sums,
    tell: Callable[[int], None],
) -> None:
    made_at = _values.time_to_text(datetime.now(UTC))
    writer.write({"strongroom_backup": FORMAT, "store": name, "made_at": made_at})
    async with aclosing(parts(collections, store)) as found:
        async for part in found:
            canonical, total = Canonical(part.collection), SetSum()
            where = {"collection": part.collection.name, "tenant": part.tenant}
            async with aclosing(pages(store, part)) as some:
                async for page in some:
                    for document in page:
                        total.add(canonical.of(document))
                    lines = [{**where, "document": _values.tag(document)} for document in page]
                    await asyncio.to_thread(writer.write, *lines)
                    tell(writer.lines)
            if total.count:
                sums[part.collection.name, part.tenant] = total
    listed = [
        {"collection": name, "tenant": tenant, "documents": total.count, "checksum": total.text}
        for (name, tenant), total in sums.items()
    ]
    writer.write({"parts": listed, "lines": writer.lines, "sha256": writer.sha256})


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> Unavailable:
    kind = StorageFull if error.errno in (28, 122) else Unavailable
    return kind(f"{path}: the backup cannot be written: {error.strerror}; the store was not changed")


async def _sums(store: Store, collections: Sequence[Collection]) -> Sums:
    sums: Sums = {}
    async with aclosing(parts(collections, store)) as found:
        async for part in found:
            total = await set_sum(store, part, Canonical(part.collection))
            if total.count:
                sums[part.collection.name, part.tenant] = total
    return sums


# --- Reading --------------------------------------------------------------------------------------------------


def verified(path: Path) -> Backup:
    """Read and verify the whole file. Raises StoreError, with the file and the line, if any byte is damaged."""
    sums: Sums = {}
    digest = hashlib.sha256()
    trailer: Mapping[str, Any] | None = None
    count = -1
    for number, (raw, line) in enumerate(_lines(path), 1):
        if trailer is not None:
            raise StoreError(f"{path}: damaged at line {number}: found more behind its end")
        if number == 1 and line.get("strongroom_backup") != FORMAT:
            raise StoreError(f"{path}: is not a backup of format {FORMAT}")
        if "parts" in line:
            trailer = line
            continue
        digest.update(raw)
        count += 1
    if trailer is None:
        raise StoreError(f"{path}: damaged: it ends before its checksums")
    if trailer["sha256"] != digest.hexdigest() or trailer["lines"] != count:
        raise StoreError(f"{path}: damaged: the checksum of its lines differs")
    for one in trailer["parts"]:
        sums[one["collection"], one["tenant"]] = SetSum.of(one["documents"], one["checksum"])
    return Backup(path, sums)


def _lines(path: Path) -> Iterator[tuple[bytes, Mapping[str, Any]]]:
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            for raw in file:
                number += 1
                line = json.loads(raw)
                if not isinstance(line, dict):
                    raise ValueError("expected an object")
                yield raw, line
    except FileNotFoundError:
        raise StoreError(f"{path}: there is no such file: the backup is needed to roll back") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise StoreError(f"{path}: damaged at line {number + 1}: {error}") from None


async def documents(path: Path, skip: int) -> AsyncGenerator[list[tuple[str, str | None, Document]], None]:
    """The documents of a verified file as (collection, tenant, document), in pages, after the first `skip`."""
    lines = _lines(path)

    def some() -> list[tuple[str, str | None, Document]]:
        found = []
        for _, line in lines:
            if "document" in line:
                found.append((line["collection"], line["tenant"], _values.untag(line["document"])))
                if len(found) == LINES_AT_ONCE:
                    break
        return found

    while page := await asyncio.to_thread(some):
        if skip >= len(page):
            skip -= len(page)
            continue
        yield page[skip:]
        skip = 0
