"""Reads keys: one key, a page, their number, their statistics, and the answers to idempotent retries."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Unpack

from ..access import bound_to, may_see, reader
from ..clock import Clock
from ..context import Context, utc_from_us
from ..database import Database, Replayed
from ..entities import MAX_LIMIT, MAX_PAGE_BYTES, Aggregate, Page
from ..limits import Amount, Ledger, LimitStatus, UsageState, from_units, limit_status
from .cache import KeyCache
from .cached_key import quota_ids, subjects_of
from .filter import KeyFilter, KeyFilterGiven
from .model import ApiKey, IssuedKey, no_key

LOOK_AT = 2_000
"""Keys that one page of a filter looks at, where a store cannot judge the filter whole."""


@dataclass(frozen=True, slots=True)
class KeyStats:
    """A key's statistics: expired or not, usage of each limit's window, lifetime totals, number and time of uses."""

    key: ApiKey
    expired: bool
    count: int
    last_used_at: datetime | None
    totals: dict[str, Amount]
    limits: list[LimitStatus]
    state: UsageState


class KeyQueries:
    """Reads the keys of one store, for callers who may see them."""

    def __init__(self, database: Database, cache: KeyCache, ledger: Ledger, clock: Clock) -> None:
        self._database = database
        self._cache = cache
        self._ledger = ledger
        self._clock = clock

    async def get(self, id: str, *, deleted: bool = False, context: Context | None = None) -> ApiKey:
        """A key by its id; with `deleted`, a deleted key too. Raises NotFound, also for a key of another tenant."""
        key = await self._database.get_or_none(reader(context), ApiKey, id)
        if key is None or not may_see(context, key.tenant) or (key.deleted_at is not None and not deleted):
            raise no_key(id)
        return key

    async def list(
        self,
        *,
        limit: int = 100,
        cursor: str | None = None,
        context: Context | None = None,
        **filters: Unpack[KeyFilterGiven],
    ) -> Page[ApiKey]:
        """One page of the keys for which all of `filters` holds (see KeyFilter). A caller who is bound to one tenant
        gets the keys of that tenant.

        Newest first, or by name where `name_prefix` is given. `deleted` shows the deleted keys instead of the others,
        the earliest deletion first. Raises InvalidInput.
        """
        return await self.page(KeyFilter(**filters), limit=limit, cursor=cursor, context=context)

    async def page(
        self, filter: KeyFilter, *, limit: int = 100, cursor: str | None = None, context: Context | None = None
    ) -> Page[ApiKey]:
        """As `list`, for a filter.

        Where the store cannot judge the filter whole, a page ends after LOOK_AT keys: it may hold fewer than `limit`,
        or none, and `next_cursor` goes on.
        """
        wanted = filter.within(bound_to(context))
        if wanted is None:
            return Page([], None)
        where, by = reader(context), wanted.keeps(utc_from_us(self._clock.now_us()))

        async def find(size: int) -> Page[ApiKey]:
            return await self._database.find(where, ApiKey, wanted.query(size), cursor, max_bytes=MAX_PAGE_BYTES)

        if by is None or not 1 <= limit <= MAX_LIMIT:
            return await find(limit)
        found: list[ApiKey] = []
        looked_at = 0
        while True:
            page = await find(min(max(limit, LOOK_AT // 4), MAX_LIMIT, LOOK_AT - looked_at))
            places = [place for place, key in enumerate(page.items) if by(key)]
            most = limit - len(found)
            if len(places) >= most and places[most - 1] + 1 < len(page.items):
                # The page ends at its last matching key: the same query, cut there, has the cursor of that place.
                page = await find(places[most - 1] + 1)
                return Page([*found, *(key for key in page.items if by(key))], page.next_cursor)
            found += [page.items[place] for place in places]
            looked_at += len(page.items)
            cursor = page.next_cursor
            if cursor is None or len(found) == limit or looked_at >= LOOK_AT:
                return Page(found, cursor)

    async def count(self, filter: KeyFilter, *, context: Context | None = None) -> int:
        """How many keys match a filter."""
        wanted = filter.within(bound_to(context))
        if wanted is None:
            return 0
        if wanted.keeps(utc_from_us(self._clock.now_us())) is not None:
            number, cursor = 0, None
            while True:
                page = await self.page(filter, limit=MAX_LIMIT, cursor=cursor, context=context)
                number, cursor = number + len(page.items), page.next_cursor
                if cursor is None:
                    return number
        counted = Aggregate("count")
        found = await self._database.aggregate(reader(context), ApiKey, counted, where=wanted.where)
        return int(found[counted.name])

    async def stats(self, id: str, *, context: Context | None = None) -> KeyStats:
        """A key's statistics, as of now."""
        key = await self.get(id, context=context)
        now_us = self._clock.now_us()
        state = await self._ledger.usage_state(id)
        quotas = await self._cache.quotas.of(key.tenant, quota_ids(key))
        statuses = await self._ledger.statuses(subjects_of(key, quotas), now_us)
        return KeyStats(
            key=key,
            expired=key.is_expired(utc_from_us(now_us)),
            count=state.count,
            last_used_at=utc_from_us(state.last_used_us) if state.last_used_us is not None else None,
            totals={name: from_units(name, units) for name, units in sorted(state.totals.items())},
            limits=[limit_status(status) for status in statuses],
            state=state,
        )

    async def answered_before(self, replayed: Replayed, *, context: Context | None = None) -> ApiKey:
        """The key that an idempotent call was answered with."""
        return await self._database.answer_of(reader(context), ApiKey, replayed)

    async def issued_before(self, replayed: Replayed, *, context: Context | None = None) -> IssuedKey:
        """The key and the secret that an idempotent call was answered with."""
        return IssuedKey(await self.answered_before(replayed, context=context), (replayed.memo or b"").decode())


__all__ = ["KeyQueries", "KeyStats"]
