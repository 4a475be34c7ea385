"""A store with a tree of millions of leaves, made in seconds: its tiles are written directly.

The complete tiles of one level are all alike, so their hashes are computed once; each is stored and read as any other.
The leaves after the last complete tile have their records, which a proof reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from strongroom.app import SYSTEM_ENTITIES
from strongroom.entities import Registry
from strongroom.journal.log import LOGS, made_log
from strongroom.journal.merkle import root_of
from strongroom.journal.tree_reader import TILES, TreeReader
from strongroom.journal.tree_state import TREES, TreeState
from strongroom.journal.trees import LOG, TILE, tile_id, tree_id
from strongroom.storage import open_store
from strongroom.storage.port import Append, Batch, Create, Operation, Put, Record

LAST = 200
"""Leaves after the last complete tile: a proof reads their records."""
BATCH = 200
_NOW = datetime(2027, 1, 1, tzinfo=UTC)
_NOW_US = 1_798_761_600_000_000


async def make(url: str, tenant: str, about: int) -> int:
    """Make a store whose tenant has a tree of about so many leaves; returns how many."""
    store = await open_store(url)
    await store.prepare(Registry(SYSTEM_ENTITIES).collections)
    tiles = about // TILE
    size = tiles * TILE + LAST
    batch: list[Operation] = []
    for operation in _tiles(tree_id(tenant), tiles):
        batch.append(operation)
        if len(batch) == BATCH:
            await store.commit(Batch(None, tuple(batch), _NOW_US))
            batch = []
    await store.commit(Batch(None, tuple(batch), _NOW_US))
    records = [
        Record(f"r{number}", tenant, _NOW_US, "a", "", "create", "c", "e", salt=bytes(16)) for number in range(LAST)
    ]
    committed = await store.commit(Batch(tenant, tuple(map(Append, records)), _NOW_US))
    tree = _tree(tenant, size, committed.sequence or 0)
    tree["frontier"] = b"".join(await TreeReader(store, tree, b"").subtrees(0, size))
    await store.commit(Batch(None, (Put(TREES, tree.pop("id"), tree),), _NOW_US))
    log = await made_log(store, _NOW_US)
    cursor = (await store.changes("end")).cursor
    fields = {name: value for name, value in log.items() if name in ("origin", "legacy_secret", "checkpoint")}
    done = {**fields, "round": 1, "cursor": cursor, "checkpoint_size": 0}
    await store.commit(Batch(None, (Put(LOGS, LOG, done),), _NOW_US))
    await store.close()
    return size


def _record(tenant: str, number: int) -> Record:
    return Record(f"r{number}", tenant, _NOW_US, "a", "", "create", "c", "e", salt=bytes(16))


def _tiles(tree: str, count: int) -> Iterator[Operation]:
    """The tiles of every level, for so many complete tiles of level 0."""
    hashes = [sha256(number.to_bytes(4, "big")).digest() for number in range(TILE)]
    level = 0
    while count:
        whole = b"".join(hashes)
        for number in range(count):
            yield Create(TILES, tile_id(tree, level, number), _tile(tree, level, number, whole))
        hashes = [root_of(hashes)] * TILE
        level += 1
        if rest := count % TILE:
            part = b"".join(hashes[:rest])
            yield Create(TILES, tile_id(tree, level, count // TILE), _tile(tree, level, count // TILE, part))
        count //= TILE


def _tile(tree: str, level: int, number: int, hashes: bytes) -> dict[str, Any]:
    return {
        "tree": tree,
        "level": level,
        "number": number,
        "hashes": hashes,
        "first_sequence": None,
        "last_sequence": None if level else 0,
        "sequences": b"" if level else bytes(8 * TILE),
        "first_at": None if level else _NOW,
        "last_at": None if level else _NOW,
    }


def _tree(tenant: str, size: int, sequence: int) -> dict[str, Any]:
    new = TreeState(tenant).document()
    return {**new, "size": size, "sequence": sequence, "round": 1, "sealed_at": _NOW}
