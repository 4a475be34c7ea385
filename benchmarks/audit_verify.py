"""`audit_verify`: the journal verified on the live SQLite store and on an export, beside bare hashlib that computes the
same leaves and nodes."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from hashlib import sha256, sha512
from itertools import starmap
from pathlib import Path
from typing import Any

from .harness import Benchmark, BenchmarkError, Job, Plan, Role, Round, Sample, Target, side_by_side, start

RECORDS, QUICK_RECORDS = 1_000_000, 5_000
BARE_RECORDS = 100_000
SMALL = 10
"""The memory is compared with that of a journal of so many times fewer records."""
AT_ONCE = 500
TENANT = "acme"
OF_FLOOR = 0.35
NOW_US = 1_800_000_000_000_000

LIVE = "strongroom audit verify, the live SQLite store"
EXPORT = "strongroom audit verify FILE, an export"
BARE = "bare hashlib: the columns are ready as bytes; salts, commitments, leaves and nodes are hashed"
NODES = "bare hashlib: the leaves' contents are ready; leaves and nodes are hashed"


def run(plan: Plan) -> Benchmark:
    records = QUICK_RECORDS if plan.quick else RECORDS
    with ExitStack() as stack:
        ours = start(stack, plan, f"a journal of {records:,} records", _ours, plan.folder, records)
        bare = start(stack, plan, BARE, _bare, min(records, BARE_RECORDS))
        contenders = (
            ours.contender(LIVE, Role.OURS, "live"),
            ours.contender(EXPORT, Role.OURS, "export"),
            bare.contender(BARE, Role.FLOOR, "bare"),
            bare.contender(NODES, Role.PEER, "nodes"),
        )
        targets = [Target(LIVE, of_floor=OF_FLOOR), Target(EXPORT, of_floor=OF_FLOOR)]
        group = side_by_side(plan, f"{records:,} records of one tenant", contenders, targets)
    memory = Path(plan.folder, "memory")
    labels = (
        f"{records:,} records of a tenant, sealed; an update of a note with one field before and after.",
        "strongroom: the whole command as a process, with its start. Every column is compared through its commitment, "
        "every tile, the right edge, the rounds and the checkpoint's signatures.",
        f"bare hashlib: {min(records, BARE_RECORDS):,} records in memory, one process; it reads nothing, decodes "
        "nothing and compares nothing. The floor computes the same hashes; the peer gets the commitments for nothing.",
        memory.read_text() if memory.exists() else "",
    )
    return Benchmark("audit_verify", "records/s", tuple(label for label in labels if label), (group,))


@asynccontextmanager
async def _ours(folder: str, records: int) -> AsyncIterator[Round]:
    small = max(records // SMALL, AT_ONCE)
    await _fill(f"{folder}/small", small)
    await _fill(f"{folder}/large", records)
    peaks = {}
    for name in ("small", "large"):  # in this order, because the peak is that of all children so far
        for what in ("live", "export"):
            await asyncio.to_thread(_verify, f"{folder}/{name}", what)
        peaks[name] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    told = f"peak memory of a process: {peaks['small']} MB at {small:,} records, {peaks['large']} MB at {records:,}."
    await asyncio.to_thread(Path(folder, "memory").write_text, told)

    async def measure(job: Job) -> Sample:
        before, begin = os.times(), time.perf_counter()
        await asyncio.to_thread(_verify, f"{folder}/large", job.what)
        seconds, after = time.perf_counter() - begin, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return Sample(records, seconds, cores=cpu / seconds)

    yield measure


async def _fill(folder: str, records: int) -> None:
    """A store with so many sealed records, its public keys, and an export."""
    from strongroom import Strongroom
    from strongroom.storage.port import Append, Batch

    os.mkdir(folder)
    async with Strongroom.open(f"sqlite:///{folder}/store.db", sealing=False) as room:
        for begin in range(0, records, AT_ONCE):
            appends = tuple(Append(_record(number)) for number in range(begin, min(begin + AT_ONCE, records)))
            await room.store.commit(Batch(TENANT, appends, NOW_US))
        await room.sealer.seal_now()
        keys = "".join(f"{key}\n" for key in await room.proofs.verifiers())
        await asyncio.to_thread(Path(folder, "keys.txt").write_text, keys)
        with open(f"{folder}/export.jsonl", "wb") as export:  # noqa: ASYNC230 - nothing else runs here
            async for line in room.audit.proved(TENANT):
                export.write(line)


def _record(number: int) -> Any:
    from strongroom.context import new_salt
    from strongroom.storage.port import Record

    note = f"the text of note {number} as it"
    return Record(
        f"0199f3c2a{number:019x}", TENANT, NOW_US + number, "key:key_0199f3c2abcdef0123456789",
        f"0199f3c2b{number:019x}", "update", "notes", f"note-{number:09}",
        {"text": f"{note} was"}, {"text": f"{note} is now"}, salt=new_salt(),
    )  # fmt: skip


def _verify(folder: str, what: str) -> None:
    """Run the command. Raises BenchmarkError unless it found the journal whole."""
    place = [f"{folder}/export.jsonl"] if what == "export" else ["--store", f"sqlite:///{folder}/store.db"]
    command = [sys.executable, "-m", "strongroom.cli", "audit", "verify", "--public-key", f"{folder}/keys.txt", *place]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or "whole: " not in done.stdout:
        raise BenchmarkError(f"audit verify: {done.stdout[-500:]} {done.stderr[-500:]}")


@asynccontextmanager
async def _bare(count: int) -> AsyncIterator[Round]:
    from strongroom.journal.leaf import commitments_of, committed_actor, head_of

    parts, contents = [], []
    for number in range(count):
        one = _record(number)
        note = f"the text of note {number} as it"
        before, after = f'{{"text":"{note} was"}}', f'{{"text":"{note} is now"}}'
        row: Any = (
            number, one.id, TENANT, one.at_us, one.actor, one.request_id, one.action, one.collection, one.entity_id, 1,
            before, after, one.salt, None, None,
        )  # fmt: skip
        head = head_of(one.id, TENANT, one.at_us, one.request_id, one.action, one.collection, None)
        values = (committed_actor(one.actor, None), one.entity_id.encode(), before.encode(), after.encode())
        parts.append((head, one.salt, *values))
        contents.append(head + b"".join(commitments_of(row)))

    async def measure(job: Job) -> Sample:
        cpu, begin, done = time.process_time(), time.perf_counter(), 0
        while (seconds := time.perf_counter() - begin) < job.seconds or not done:
            _hash_all(contents if job.what == "nodes" else list(starmap(_content, parts)))
            done += count
        return Sample(done, seconds, cores=(time.process_time() - cpu) / seconds)

    yield measure


def _content(head: bytes, salt: bytes, actor: bytes, entity_id: bytes, before: bytes, after: bytes) -> bytes:
    """A leaf's content, with its commitments."""
    salts = sha512(salt).digest()
    return (
        head
        + sha256(salts[:16] + actor).digest()
        + sha256(salts[16:32] + entity_id).digest()
        + sha256(salts[32:48] + before).digest()
        + sha256(salts[48:] + after).digest()
    )


def _hash_all(contents: list[bytes]) -> bytes:
    """The root of a tree, in the shortest loop that computes it."""
    hashes = [sha256(b"\x00" + content).digest() for content in contents]
    while len(hashes) > 1:
        pairs = [sha256(b"\x01" + hashes[at] + hashes[at + 1]).digest() for at in range(0, len(hashes) - 1, 2)]
        hashes = pairs + hashes[len(pairs) * 2 :]
    return hashes[0]
