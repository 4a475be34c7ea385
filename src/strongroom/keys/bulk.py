"""Changes many keys, by a filter or a list of ids: some keys a step, and each key whole or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, Protocol

from ..context import Context
from ..entities import Page
from ..errors import (
    InvalidInput,
    NotFound,
    Problem,
    StrongroomError,
    Unavailable,
)
from .filter import KeyFilter
from .model import ApiKey, KeyChanges

BulkAction = Literal["disable", "enable", "delete", "purge", "restore", "update"]
BULK_FIELDS = frozenset(
    {
        "metadata", "limits", "groups", "description", "owner", "allowed_ips", "allowed_models", "allowed_routes",
        "expires_at",
    }
)  # fmt: skip
"""Fields that an update of many keys may change: none of them gives a key more power, or a name."""
PAGE = 100
MAX_PAGE = 500
MAX_IDS = 10_000
AT_ONCE = 50
"""Keys changed at the same time; their commits join."""


@dataclass(frozen=True, slots=True)
class BulkFailure:
    """A key that was not changed, and why. `code` is a code of `errors`."""

    id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class BulkStep:
    """One step that is done: how many keys it looked at, how many it changed, how many were unchanged, and failures.

    `cursor` goes on after it (None: this was the last step). Changes stay if the work is broken off here.
    """

    looked_at: int
    changed: int
    unchanged: int
    failed: tuple[BulkFailure, ...]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class Bulk:
    """An action on many keys.

    Exactly one of `where` and `ids`. `changes` with the action `update`: only BULK_FIELDS. `refuse` gives the error for
    a key that this caller may not change, or None. `dry_run`: only count.
    """

    action: BulkAction
    where: KeyFilter | None = None
    ids: Sequence[str] | None = None
    changes: KeyChanges | None = None
    dry_run: bool = False
    refuse: Callable[[ApiKey], StrongroomError | None] = lambda key: None

    def check(self) -> None:
        """Raises InvalidInput with every problem."""
        problems: list[Problem] = []
        if (self.where is None) == (self.ids is None):
            problems.append(
                Problem(
                    "filter",
                    f"found {'neither' if self.ids is None else 'both'}, expected exactly one of filter and ids",
                )
            )
        if self.ids is not None and not 1 <= len(self.ids) <= MAX_IDS:
            problems.append(Problem("ids", f"found {len(self.ids)} ids, expected 1 to {MAX_IDS}"))
        if self.action == "update":
            given = self.changes.model_fields_set if self.changes is not None else set()
            if not given:
                problems.append(Problem("changes", "found none, expected at least one field to change"))
            expected = ", ".join(sorted(BULK_FIELDS))
            for name in sorted(given - BULK_FIELDS):
                problems.append(
                    Problem(f"changes.{name}", f"cannot be changed of many keys at once, expected {expected}")
                )
        elif self.changes is not None:
            problems.append(Problem("changes", f"found changes with the action {self.action}, expected update"))
        if problems:
            raise InvalidInput(problems)

    @property
    def filter(self) -> KeyFilter | None:
        """The keys that the action concerns: deleted keys, for `restore`."""
        if self.where is not None and self.action == "restore":
            return replace(self.where, deleted=True)
        return self.where


class KeyChanger(Protocol):
    """The calls of the keys service that work on many keys makes."""

    async def get(self, id: str, *, deleted: bool = False, context: Context | None = None) -> ApiKey: ...

    async def page(
        self, filter: KeyFilter, *, limit: int = 100, cursor: str | None = None, context: Context | None = None
    ) -> Page[ApiKey]: ...

    async def update(
        self, id: str, changes: KeyChanges | None = None, /, *, context: Context | None = None
    ) -> ApiKey: ...

    async def disable(self, id: str, *, context: Context | None = None) -> ApiKey: ...

    async def enable(self, id: str, *, context: Context | None = None) -> ApiKey: ...

    async def restore(self, id: str, *, context: Context | None = None) -> ApiKey: ...

    async def delete(self, id: str, *, purge: bool = False, context: Context | None = None) -> None: ...


async def steps(
    keys: KeyChanger, bulk: Bulk, *, cursor: str | None = None, limit: int = PAGE, context: Context | None = None
) -> AsyncGenerator[BulkStep, None]:
    """Do the work, at most `limit` keys a step, from `cursor` on. A step reports each key that could not be changed.

    Raises InvalidInput before any change. Raises Unavailable if the store is out of reach: then go on from the cursor
    of the last step, or start again, which counts the changed keys as unchanged.
    """
    bulk.check()
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidInput([Problem("limit", f"found {limit}, expected 1 to {MAX_PAGE}")])
    while True:
        step = await _step(keys, bulk, cursor, limit, context)
        yield step
        cursor = step.cursor
        if cursor is None:
            return


async def _step(keys: KeyChanger, bulk: Bulk, cursor: str | None, limit: int, context: Context | None) -> BulkStep:
    failed: list[BulkFailure] = []
    if bulk.filter is not None:
        page = await keys.page(bulk.filter, limit=limit, cursor=cursor, context=context)
    else:
        page = await _named(keys, bulk.ids or (), cursor, limit, context, failed)
    looked_at = len(page.items) + len(failed)
    changed = 0
    for start in range(0, len(page.items), AT_ONCE):
        some = page.items[start : start + AT_ONCE]
        results = await asyncio.gather(*(_one(keys, bulk, key, context) for key in some), return_exceptions=True)
        for key, result in zip(some, results, strict=True):
            if not isinstance(result, BaseException):
                changed += result
            elif isinstance(result, StrongroomError) and not isinstance(result, Unavailable):
                failed.append(BulkFailure(key.id, result.code, result.message))
            else:
                raise result
    unchanged = looked_at - changed - len(failed)
    return BulkStep(looked_at, changed, unchanged, tuple(failed), page.next_cursor)


async def _named(
    keys: KeyChanger,
    ids: Sequence[str],
    cursor: str | None,
    limit: int,
    context: Context | None,
    failed: list[BulkFailure],
) -> Page[ApiKey]:
    """The next keys of a list of ids; the cursor is the number of ids before them."""
    start = 0
    if cursor is not None:
        if not (cursor.isascii() and cursor.isdigit() and 0 < int(cursor[:9]) < len(ids)):
            raise InvalidInput([Problem("cursor", "is not a cursor of this list of ids: start without a cursor")])
        start = int(cursor[:9])
    some = list(islice(ids, start, start + limit))
    found: list[ApiKey] = []
    results = await asyncio.gather(
        *(keys.get(id, deleted=True, context=context) for id in some), return_exceptions=True
    )
    for id, result in zip(some, results, strict=True):
        if isinstance(result, ApiKey):
            found.append(result)
        elif isinstance(result, NotFound | InvalidInput):
            failed.append(BulkFailure(id, result.code, result.message))
        else:
            raise result
    end = start + len(some)
    return Page(found, str(end) if end < len(ids) else None)


async def _one(keys: KeyChanger, bulk: Bulk, key: ApiKey, context: Context | None) -> bool:
    """Change one key. Returns False if it needs no change."""
    refused = bulk.refuse(key)
    if refused is not None:
        raise refused
    if key.deleted_at is not None and bulk.action in ("disable", "enable", "update"):
        raise NotFound(f"there is no key {key.id!r}")
    if _unchanged(bulk, key):
        return False
    if bulk.dry_run:
        return True
    match bulk.action:
        case "disable":
            await keys.disable(key.id, context=context)
        case "enable":
            await keys.enable(key.id, context=context)
        case "update":
            await keys.update(key.id, bulk.changes, context=context)
        case "delete" | "purge":
            await keys.delete(key.id, purge=bulk.action == "purge", context=context)
        case "restore":
            await keys.restore(key.id, context=context)
    return True


def _unchanged(bulk: Bulk, key: ApiKey) -> bool:
    """Whether a key needs no change."""
    match bulk.action:
        case "disable" | "enable":
            return key.enabled == (bulk.action == "enable")
        case "update":
            changes = bulk.changes
            return changes is None or all(
                getattr(key, name) == getattr(changes, name) for name in changes.model_fields_set
            )
        case "delete" | "restore":
            return (key.deleted_at is not None) == (bulk.action == "delete")
        case "purge":
            return False
