"""Export of key files: a tenant's keys, read page by page and rendered row by row.

Rows are sorted by creation time, then by hash, so that the same keys give the same file from every store. Only keys
with the same creation time are in memory together. If they are many, as after an import, temporary files sort them.
"""

from __future__ import annotations

import heapq
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO

from ...access import ALL_TENANTS
from ...context import Context, check_tenant
from ...database import Database
from ...entities import MAX_IN, MAX_LIMIT, Document, Query, Where
from ...errors import InvalidInput, Problem
from ...limits import KeyUsage
from ..hasher import Hasher, sha256_of_imported
from ..model import ApiKey
from .key_file import Shape, render_row
from .key_file_rows import lost, row_of

MAX_HELD = 20_000
"""Rows with the same creation time that are sorted in memory."""
_LENGTH_BYTES = 4
_HASH_BYTES = 32


@dataclass(slots=True)
class Exported:
    """A tenant's keys, rendered row by row in order of their creation, and a count of what the shape lacks.

    `left_out` counts keys that were not exported, `lost` keys that lost a field, both by reason.
    """

    rows: list[bytes] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    count: int = 0


async def export_keys(
    database: Database,
    hasher: Hasher,
    shape: Shape,
    tenant: str,
    context: Context,
    now_us: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """All keys of a tenant, in memory. Raises as `export_rows`."""
    exported = Exported()
    rows = export_rows(exported, database, hasher, shape, tenant, context, now_us, progress)
    exported.rows = [row async for row in rows]
    return exported


async def export_rows(
    exported: Exported,
    database: Database,
    hasher: Hasher,
    shape: Shape,
    tenant: str,
    context: Context,
    now_us: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AsyncIterator[bytes]:
    """Yield the rendered rows; `exported` counts what is left out or lost. A key that changes meanwhile is exported in
    its old or its new state. Raises InvalidInput, StoreError, and the errors of the database."""
    check_tenant(tenant)
    if tenant == ALL_TENANTS:
        raise InvalidInput([Problem("tenant", "keys for all tenants are management keys: they are not exported")])
    query, cursor, done = Query(Where("tenant", "==", tenant), ("created_at",), MAX_LIMIT), None, 0
    moment: datetime | None = None
    with ExitStack() as files:
        group = _Group(files)
        while True:
            page = await database.select(context, ApiKey, query, cursor)
            usages = await _usages(database, context, page.items)
            for key in page.items:
                if not key["enabled"]:
                    exported.left_out["is disabled, which the file cannot say: elsewhere it would work again"] += 1
                    continue
                if key["sealed"] is None and sha256_of_imported(key["hash"]) is None:
                    exported.left_out["has another system's hash until its first use: --shape records has it"] += 1
                    continue
                exported.lost.update(lost(shape, key))
                row = row_of(key, usages.get(key["id"]), hasher, now_us)
                if key["created_at"] != moment:
                    moment = key["created_at"]
                    for rendered in group.sorted():
                        yield rendered
                group.add(row.sha256, render_row(shape, row))
                exported.count += 1
            done += len(page.items)
            progress(done, done)
            cursor = page.next_cursor
            if cursor is None:
                break
        for rendered in group.sorted():
            yield rendered


async def file_of(shape: Shape, rows: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A whole file, as from `key_file.render_file`, from a stream of rows."""
    opening, closing = (b"[", b"]") if shape == "plain" else (b"{", b"}")
    before = b'{\n  "keys": ' + opening + b"\n"
    some = False
    async for row in rows:
        yield before + row
        before, some = b",\n", True
    yield (b"\n  " if some else before[:-1]) + closing + b"\n}\n"


async def _usages(database: Database, context: Context, keys: list[Document]) -> dict[str, Document]:
    ids = [key["id"] for key in keys]
    found = {}
    for start in range(0, len(ids), MAX_IN):
        query = Query(Where("id", "in", ids[start : start + MAX_IN]), limit=MAX_IN)
        found.update({usage["id"]: usage for usage in (await database.select(context, KeyUsage, query)).items})
    return found


class _Group:
    """Sorts rows with the same creation time by their hashes."""

    def __init__(self, files: ExitStack) -> None:
        self._files = files
        self._held: list[tuple[bytes, bytes]] = []
        self._runs: list[IO[bytes]] = []

    def add(self, sha256: bytes, row: bytes) -> None:
        self._held.append((sha256, row))
        if len(self._held) >= MAX_HELD:
            run = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed by the stack
            for hashed, text in sorted(self._held):
                run.write(hashed + len(text).to_bytes(_LENGTH_BYTES, "big") + text)
            self._held.clear()
            self._runs.append(run)

    def sorted(self) -> Iterator[bytes]:
        """Yield the rows in order and forget them."""
        held, runs = sorted(self._held), self._runs
        self._held, self._runs = [], []
        for _, row in heapq.merge(*map(_read, runs), held) if runs else held:
            yield row
        for run in runs:
            run.close()


def _read(run: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    run.seek(0)
    while head := run.read(_HASH_BYTES + _LENGTH_BYTES):
        yield head[:_HASH_BYTES], run.read(int.from_bytes(head[_HASH_BYTES:], "big"))
