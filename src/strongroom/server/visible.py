"""Decides what a reader of a stream may see of each change: the rules need the whole document before and after it.

A journal record has only the changed fields, and the rules may read others. So the states of a document are rebuilt
backwards, from the stored document through the later records. For a deleted document they start from the record of its
deletion, which has all fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..context import Context, utc_from_us
from ..cooperative import in_slices
from ..database import Database
from ..entities import Collection, Document, is_expired
from ..errors import Gone
from ..journal import is_redacted, masked
from ..storage.port import ChangesPage, Record

LOOK_AHEAD_PAGES = 8
"""Pages of later records that are read to rebuild states. A stream that is further behind gets a `reset` and continues
at the end of the journal."""
LOOK_AHEAD = 100
"""Records in each page."""
_REMOVALS = frozenset({"delete", "expire"})
ACTIONS = {"create": "create", "update": "update", "add": "update", "delete": "delete", "expire": "delete"}
"""The actions of records that a stream delivers, and their names in it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One change as a reader may see it. `removed`: the document exists, and the reader may no longer see it."""

    record: Record
    action: str
    before: Document | None
    after: Document | None
    reason: str | None = None


class View:
    """One reader's view of one collection's records."""

    def __init__(self, database: Database, collection: Collection) -> None:
        self._database = database
        self._collection = collection

    async def of(self, context: Context, page: ChangesPage) -> list[Seen]:
        """The changes of a page that the reader may see now. Raises Gone if the states cannot be rebuilt."""
        name = self._collection.name
        mine = [record for record in page.records if record.collection == name and record.action in ACTIONS]
        if not mine:
            return []
        if any(is_redacted(record) for record in mine):
            raise Gone("a record after the cursor was redacted")
        if not self._database.rules_read_documents:
            allowed = self._may(context, mine[0].entity_id, None)
            return [Seen(r, ACTIONS[r.action], r.before, r.after) for r in mine] if allowed else []
        states = await self._states(context, mine, page.cursor)
        known = [record for record in mine if record.id in states]
        seen = await in_slices(lambda record: self._seen(context, record, states[record.id]), known)
        return [one for one in seen if one is not None]

    def _may(self, context: Context, id: str, document: Document | None) -> bool:
        return self._database.decide(context, "get", self._collection, id, document).allowed

    def _seen(self, context: Context, record: Record, state: _State) -> Seen | None:
        id = record.entity_id
        before = state.before is not None and self._may(context, id, state.before)
        after = state.after is not None and self._may(context, id, state.after)
        if before and state.after is not None and not after:
            return Seen(record, "removed", None, None, "access_lost")
        # The stored document must be visible too: else a reader that lost access would get its old contents.
        if not (before or after) or (state.now is not None and not self._may(context, id, state.now)):
            return None
        if (
            not before and state.before is not None
        ):  # it became visible with this change: all fields are new to the reader
            return Seen(record, ACTIONS[record.action], None, masked(self._collection, state.after))
        return Seen(record, ACTIONS[record.action], record.before, record.after)

    # --- States -----------------------------------------------------------------------------------------------

    async def _states(self, context: Context, records: Sequence[Record], cursor: str) -> dict[str, _State]:
        """The states around each record, by the record's id. A record whose document is gone without a record of the
        deletion is left out."""
        database, collection = self._database, self._collection
        chains: dict[str, list[Record]] = {}
        for record in records:
            chains.setdefault(record.entity_id, []).append(record)
        now = {id: await database.load(context, collection, id) for id in chains}
        least = {id: len(chain) - 1 for id, chain in chains.items()}  # the documents were loaded after these records
        open_ids = {id for id in chains if _base(chains[id], now[id], least[id]) is None}
        ended = False
        for _ in range(LOOK_AHEAD_PAGES):
            if not open_ids or ended:
                break
            page = await database.changes(cursor, context.tenant, LOOK_AHEAD)
            cursor, ended = page.cursor, not page.records
            for record in page.records:
                if record.collection == collection.name and record.entity_id in open_ids and record.action in ACTIONS:
                    chains[record.entity_id].append(record)
            open_ids = {id for id in open_ids if _base(chains[id], now[id], least[id]) is None}
        if open_ids and not ended:
            raise Gone("the stream is too far behind to evaluate the rules: start without a cursor")
        states: dict[str, _State] = {}
        for id, chain in chains.items():
            stored = None if is_expired(collection, now[id], self._database.at_now(context).now) else now[id]
            around = _around(chain, now[id], least[id])
            wanted = {record.id for record in records if record.entity_id == id}
            for record, (before, after) in zip(chain, around, strict=False):
                if record.id in wanted:
                    states[record.id] = _State(before, after, stored)
        return states


@dataclass(frozen=True, slots=True)
class _State:
    """A document before and after a record, and as stored now (None: it does not exist)."""

    before: Document | None
    after: Document | None
    now: Document | None


def _base(chain: Sequence[Record], now: Document | None, least: int) -> int | None:
    """The index of the record, from `least` on, that left the document in its stored state; None if there is none."""
    for number in range(len(chain) - 1, least - 1, -1):
        record = chain[number]
        if now is None:
            if record.action in _REMOVALS:
                return number
        elif record.action not in _REMOVALS and record.version == now["version"]:
            return number
    return None


def _around(
    chain: Sequence[Record], now: Document | None, least: int
) -> Iterable[tuple[Document | None, Document | None]]:
    """(before, after) of each record."""
    base = _base(chain, now, least)
    if base is None:
        # The journal ends here, and no record left the stored version. The document was changed meanwhile, or was
        # migrated from another store with other versions. Its state is unknown, so it is not shown.
        if now is None or chain[-1].action in _REMOVALS or (chain[-1].version or 0) > now["version"]:
            return []
        base = len(chain) - 1
    states: list[tuple[Document | None, Document | None]] = [(None, None)] * len(chain)
    after = now
    for number in range(base, -1, -1):
        record = chain[number]
        before = _undone(record, after)
        states[number] = (before, after)
        after = before
    return states[: base + 1]


def _undone(record: Record, after: Document | None) -> Document | None:
    """The document before a record, from the document after it."""
    if record.action == "create":
        return None
    if record.action in _REMOVALS:
        at = utc_from_us(record.at_us)
        system = {"id": record.entity_id, "version": record.version or 0, "created_at": at, "updated_at": at}
        return {**system, **(record.before or {})}
    if after is None:
        return None
    if record.action == "add":
        amounts: dict[str, Any] = record.after or {}
        return {**after, **{name: after[name] - amount for name, amount in amounts.items() if name in after}}
    return {**after, **(record.before or {})}
