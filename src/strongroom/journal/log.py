"""The log as a whole: its one document, made at the first start."""

from __future__ import annotations

import secrets
from contextlib import suppress

from ..entities import Document
from ..errors import AlreadyExists, Conflict
from ..storage.port import Batch, Create, Store
from .trees import LOG, JournalLog

LOGS = JournalLog.__collection__.name


async def log_of(store: Store) -> Document | None:
    """The log as it is now; None if nothing was ever sealed."""
    return await store.get(LOGS, None, LOG)


async def made_log(store: Store, now_us: int) -> Document:
    """The log, made if there is none: of several processes that make it one succeeds."""
    log = await log_of(store)
    if log is not None:
        return log
    new: Document = {
        "origin": f"strongroom.invalid/{secrets.token_hex(8)}",
        "round": 0,
        "cursor": None,
        "checkpoint": "",
        "checkpoint_size": 0,
        "legacy_secret": secrets.token_bytes(32),
    }
    with suppress(AlreadyExists):  # another process has made it
        await store.commit(Batch(None, (Create(LOGS, LOG, new),), now_us))
    log = await log_of(store)
    if log is None:
        raise Conflict("the journal's log was removed while it was made")
    return log


__all__ = ["LOGS", "log_of", "made_log"]
