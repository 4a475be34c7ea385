"""The peer of `read` and `write`: advanced-alchemy, SQLAlchemy's async repositories, on aiosqlite."""

# The peer comes with the lock of `make bench`, not with that of `make lint`; both must pass.
# mypy: disable-error-code="import-not-found", allow-subclassing-any, no-warn-unused-ignores

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import count, cycle
from random import Random
from typing import Any
from uuid import UUID

from advanced_alchemy.base import UUIDAuditBase
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from sqlalchemy import Index, String, event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Mapped, mapped_column

from .harness import Job, Round, Sample, closed_loop
from .notes import note


class Note(UUIDAuditBase):
    """The same columns and index as ours; the id and the times are the library's."""

    __tablename__ = "notes"
    __table_args__ = (Index("notes_status", "status", "created_at"),)

    title: Mapped[str] = mapped_column(String(200))
    body: Mapped[str]
    status: Mapped[str]
    author: Mapped[str]
    priority: Mapped[int]
    due_at: Mapped[datetime | None]


class Notes(SQLAlchemyAsyncRepository[Note]):
    """Repository of notes."""

    model_type = Note


@asynccontextmanager
async def advanced_alchemy(folder: str, rows: int, pool: int) -> AsyncIterator[Round]:
    """For a `Worker`. Jobs:

    `get`: `repository.get(id)` in one session that stays open, uniformly over `rows` rows.
    `create`: `repository.add(…, auto_commit=True)`, a session each.
    """
    os.makedirs(folder, exist_ok=True)
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{folder}/peer.db", pool_size=pool, max_overflow=0, connect_args={"timeout": 60}
    )

    @event.listens_for(engine.sync_engine, "connect")
    def durable(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("PRAGMA synchronous = full")

    try:
        async with engine.begin() as connection:
            await connection.run_sync(Note.metadata.create_all)
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        async with sessions() as session:
            made = await Notes(session=session).add_many([Note(**note(n)) for n in range(rows)], auto_commit=True)
            ids: list[UUID] = [row.id for row in made]
        Random(1).shuffle(ids)
        turn = cycle(ids)
        numbers = count(rows)

        async def create() -> None:
            async with sessions() as session:
                await Notes(session=session).add(
                    Note(**note(next(numbers))), auto_commit=True, auto_refresh=False, auto_expunge=False
                )

        async def measure(job: Job) -> Sample:
            if job.what == "create":
                return await closed_loop(create, job.seconds, job.callers)
            async with sessions() as session:
                repository = Notes(session=session)

                async def get() -> None:
                    found = await repository.get(next(turn))
                    session.expunge(found)

                return await closed_loop(get, job.seconds, job.callers)

        yield measure
    finally:
        await engine.dispose()
