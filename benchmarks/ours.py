"""Our side of `read`, `write`, `usage` and `store`: everything of Strongroom that the benchmarks call in process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import count, cycle
from pathlib import Path
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from strongroom import Entity, Index, IssuedKey, Strongroom
from strongroom.context import new_id
from strongroom.entities.entity import Document
from strongroom.storage import open_store
from strongroom.storage.port import Append, Batch, Check, Create, Put, Record

from .harness import Job, Round, Sample, closed_loop
from .notes import TENANT, note


class Note(Entity, collection="notes", indexes=[Index("status", "-created_at")]):
    """The note of `notes.py`, with the bounds that a product would declare."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    body: Annotated[str, Field(max_length=10_000)]
    status: Literal["draft", "done"] = "draft"
    author: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")]
    priority: Annotated[int, Field(ge=0, le=9)] = 0
    due_at: datetime | None = None


AT_ONCE = 64


def _url(folder: str) -> str:
    """A SQLite store in a folder, or (a URL) the store it names."""
    if "://" in folder:
        return folder
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path.absolute()}/strongroom.db"


@asynccontextmanager
async def entities(folder: str, rows: int) -> AsyncIterator[Round]:
    """For a `Worker`. Jobs:

    `get`: `tenant.get(Note, id)`, uniformly over `rows` rows.
    `create`: `tenant.create(Note(…))`, so validated, allowed by the rules, journalled and durable.
    """
    async with Strongroom.open(_url(folder), entities=[Note]) as room:
        tenant = room.tenant(TENANT)
        ids: list[str] = []
        for begin in range(0, rows, AT_ONCE):
            fresh = [Note(**note(number)) for number in range(begin, min(begin + AT_ONCE, rows))]
            ids += [made.id for made in await asyncio.gather(*map(tenant.create, fresh))]
        Random(1).shuffle(ids)
        turn = cycle(ids)
        numbers = count(rows)

        async def get() -> None:
            await tenant.get(Note, next(turn))

        async def create() -> None:
            await tenant.create(Note(**note(next(numbers))))

        async def measure(job: Job) -> Sample:
            return await closed_loop(get if job.what == "get" else create, job.seconds, job.callers)

        yield measure


@asynccontextmanager
async def verifying(folder: str, keys: int, tokens: int) -> AsyncIterator[Round]:
    """For a `Worker`: `room.keys.verify(…)`. Jobs: `one` (always the same key) and `many` (each in turn)."""
    limit = {"resource": "tokens", "limit": 1_000_000_000_000, "window": {"kind": "rolling", "seconds": 18_000}}
    async with Strongroom.open(_url(folder)) as room:
        issued: list[IssuedKey] = []
        for begin in range(0, keys, AT_ONCE):
            numbers = range(begin, min(begin + AT_ONCE, keys))
            fresh = (room.keys.create(name=f"bench {n}", tenant=TENANT, limits=[limit]) for n in numbers)
            issued += await asyncio.gather(*fresh)
        texts = [one.text for one in issued]

        async def measure(job: Job) -> Sample:
            turn = cycle(texts[:1] if job.what == "one" else texts)

            async def verify() -> None:
                answer = await room.keys.verify(next(turn), cost={"tokens": tokens})
                assert answer.valid, answer

            return await closed_loop(verify, job.seconds, job.callers)

        yield measure


@asynccontextmanager
async def store(folder: str, rows: int) -> AsyncIterator[Round]:
    """For a `Worker`: the storage port alone. Jobs:

    `get`: one document by id. `put`: a batch of [Check, Put] of one document under its version. `create`: a batch of
    [Create, Append]. No two callers work on one document at a time, so nothing conflicts.
    """
    backend = await open_store(_url(folder))
    try:
        await backend.prepare([Note.__collection__])
        encode = Note.__codec__.encode
        versions: dict[str, int] = {}
        for number in range(rows):
            id = new_id()
            create = Create("notes", id, encode(Note(**note(number))))
            committed = await backend.commit(Batch(TENANT, (create,), _now_us()))
            versions[id] = committed.versions[0]
        ids = list(versions)
        Random(1).shuffle(ids)
        turn = cycle(ids)
        documents: cycle[Document] = cycle([encode(Note(**note(number))) for number in range(100)])

        async def get() -> None:
            assert await backend.get("notes", TENANT, next(turn)) is not None

        async def put() -> None:
            id = next(turn)
            expected = versions[id]
            operations = (Check("notes", id, expected), Put("notes", id, next(documents)))
            versions[id] = (await backend.commit(Batch(TENANT, operations, _now_us()))).versions[1]

        async def create_and_append() -> None:
            id, document, now_us = new_id(), next(documents), _now_us()
            record = Record(new_id(), TENANT, now_us, "system", "bench", "create", "notes", id, after=document)
            operations = (Create("notes", id, document), Append(record, of=0))
            await backend.commit(Batch(TENANT, operations, now_us))

        kinds = {"get": get, "put": put, "create": create_and_append}

        async def measure(job: Job) -> Sample:
            return await closed_loop(kinds[job.what], job.seconds, job.callers)

        yield measure
    finally:
        await backend.close()


def _now_us() -> int:
    return time.time_ns() // 1_000
