"""Journals denials. A caller that is refused again and again writes a few records a minute at most, and none into a
tenant that does not exist."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ..context import MAX_TENANT_BYTES, Context, next_id
from ..entities import Document
from ..errors import StrongroomError
from ..storage.port import Append, Batch, Committed, Store
from .records import denial_record

PERIOD_S = 60.0
"""The first of equal denials (one actor, operation, collection and tenant) is a record at once; those that follow
within this time are one more record."""
MAX_KINDS_OF_ACTOR = 20
"""Kinds of denials that are counted apart for one actor in PERIOD_S; further kinds are counted together."""
MAX_KINDS = 2_000
"""Kinds of denials that one process counts apart; further kinds of all actors are counted together."""
_LAST_CHARACTER = "\U0010ffff"
_log = logging.getLogger(__name__)
_Kind = tuple[str, str, str, str | None]


@dataclass(slots=True)
class _Denied:
    """Denials of one kind since the last record of them."""

    context: Context
    operation: str
    collection: str
    entity_id: str
    reason: str
    attempted: Document | None


@dataclass(slots=True)
class _Period:
    until: float
    count: int = 0
    last: _Denied | None = None
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Denials:
    """Journals the denials of one process. `close` writes the counts that are not written yet."""

    def __init__(self, store: Store, commit: Callable[[Batch], Awaitable[Committed]]) -> None:
        self._store = store
        self._commit = commit
        self._periods: dict[_Kind, _Period] = {}
        self._tenants: set[str] = set()
        self._writing: set[asyncio.Task[None]] = set()
        self.counts: dict[tuple[str, str], int] = {}
        """Denials of this process by (operation, collection), with those that share a record."""
        self.cross_tenant: dict[str, int] = {}
        """Denials of callers that belong to another tenant than they named, by collection."""
        self.failures = 0
        """Records of denials that could not be written."""

    async def note(
        self,
        context: Context,
        operation: str,
        collection: str,
        entity_id: str,
        reason: str,
        attempted: Document | None = None,
    ) -> None:
        """Journal a denial: durably now if it is the first of its kind, else with later ones. `attempted`: what the
        call would have written (`attempted_fields`). Raises what the store raises."""
        self.counts[operation, collection] = self.counts.get((operation, collection), 0) + 1
        own = context.claims.get("tenant")
        if own is not None and own != context.tenant:
            self.cross_tenant[collection] = self.cross_tenant.get(collection, 0) + 1
        denied = _Denied(context, operation, collection, entity_id, reason, attempted)
        kind = self._kind((context.actor, operation, collection, context.tenant))
        period = self._periods.get(kind)
        if period is not None:
            period.count += 1
            period.last = denied
            if period.timer is None:
                delay_s = max(0.0, period.until - time.monotonic())
                period.timer = asyncio.get_running_loop().call_later(delay_s, self._over, kind)
            return
        self._periods[kind] = _Period(time.monotonic() + PERIOD_S)
        try:
            await self._write(denied, 1)
        except BaseException:
            self._periods.pop(kind, None)  # the next denial counts as the first
            self.failures += 1
            raise

    def _kind(self, kind: _Kind) -> _Kind:
        """The denial's kind, or the kind that it is counted with if there are too many."""
        self._drop(kind)
        if kind in self._periods:
            return kind
        if sum(actor == kind[0] for actor, *_ in self._periods) >= MAX_KINDS_OF_ACTOR:
            kind = (kind[0], "", "", None)
            self._drop(kind)
        if len(self._periods) >= MAX_KINDS:
            for other in list(self._periods):
                self._drop(other)
            if len(self._periods) >= MAX_KINDS and kind not in self._periods:
                kind = ("", "", "", None)
                self._drop(kind)
        return kind

    def _drop(self, kind: _Kind) -> None:
        """Forget a kind whose period is over, unless its timer will write what was counted."""
        period = self._periods.get(kind)
        if period is not None and period.timer is None and period.until <= time.monotonic():
            del self._periods[kind]

    def _over(self, kind: _Kind) -> None:
        period = self._periods.pop(kind, None)
        if period is not None and period.last is not None:
            task = asyncio.get_running_loop().create_task(self._write_counted(period.last, period.count))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _write_counted(self, denied: _Denied, count: int) -> None:
        try:
            await self._write(denied, count)
        except StrongroomError as error:
            self.failures += 1
            _log.warning("%d denials of %s are not in the journal: %s", count, denied.context.actor, error)

    async def _write(self, denied: _Denied, count: int) -> None:
        context = denied.context
        tenant = context.tenant
        own = context.claims.get("tenant")  # a tenant that may have nothing but keys
        if tenant is not None and tenant != own and not await self._is_tenant(tenant):
            context = Context(None, context.actor, context.claims, context.request_id or next_id(), context.now_us)
        record = denial_record(
            context,
            denied.operation,
            denied.collection,
            denied.entity_id,
            denied.reason,
            count=count,
            asked=tenant if context.tenant is None else None,
            attempted=denied.attempted,
        )
        await self._commit(Batch(context.tenant, (Append(record),), context.now_us))

    async def _is_tenant(self, tenant: str) -> bool:
        """Whether a tenant has, or once had, documents of its own."""
        if tenant in self._tenants:
            return True
        if not await has_been_tenant(self._store, tenant):
            return False
        if len(self._tenants) >= MAX_KINDS:
            self._tenants.clear()
        self._tenants.add(tenant)
        return True

    async def close(self) -> None:
        for kind, period in list(self._periods.items()):
            if period.timer is not None:
                period.timer.cancel()
            self._over(kind)
        if self._writing:
            await asyncio.wait(set(self._writing))


async def has_been_tenant(store: Store, name: str) -> bool:
    """Whether a tenant has, or once had, documents of its own."""
    return name in await store.tenants(just_before(name), 2)


def just_before(name: str) -> str:
    """A text directly before a name, with hardly any other name in between."""
    last = ord(name[-1]) - 1
    if last == 0xDFFF:
        last = 0xD7FF  # the code points in between are surrogates, which are no characters
    before = name[:-1] + chr(last) if last > 0 else name[:-1]
    return before + _LAST_CHARACTER * (MAX_TENANT_BYTES // 4) if last > 0 else before


__all__ = ["PERIOD_S", "Denials", "has_been_tenant", "just_before"]
