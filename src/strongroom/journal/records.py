"""Journal records: who changed what, when, from what to what, in which request; secrets masked. Pure."""

from __future__ import annotations

from typing import Any

from ..context import Context, next_id
from ..entities import Collection, Document
from ..storage.port import Record

MASK = "***"


def change_record(
    context: Context,
    action: str,
    collection: Collection,
    entity_id: str,
    before: Document | None,
    after: Document | None,
) -> Record:
    """The record of one change. Create and delete carry the whole document, an update what it changed, and the fields
    by which cached lists are found: a node that hears of it must know which lists to forget."""
    if before is not None and after is not None:
        lists = {listed.by for listed in collection.cached.lists} if collection.cached is not None else ()
        changed = [name for name in after if name in lists or name not in before or before[name] != after[name]]
        before = {name: before.get(name) for name in changed}
        after = {name: after[name] for name in changed}
    return Record(
        id=next_id(),
        tenant=context.tenant,
        at_us=context.now_us,
        actor=context.actor,
        request_id=context.request_id,
        action=action,
        collection=collection.name,
        entity_id=entity_id,
        before=masked(collection, before),
        after=masked(collection, after),
    )


def denial_record(
    context: Context,
    operation: str,
    collection: str,
    entity_id: str,
    reason: str,
    *,
    count: int = 1,
    asked: str | None = None,
) -> Record:
    """The record of a call that the rules refused, or of `count` calls that are alike. `asked`: the tenant that was
    asked for, where the record is not that tenant's."""
    after: Document = {"operation": operation, "reason": reason}
    if count > 1:
        after["count"] = count
    if asked is not None:
        after["tenant"] = asked
    return Record(
        id=next_id(),
        tenant=context.tenant,
        at_us=context.now_us,
        actor=context.actor,
        request_id=context.request_id,
        action="deny",
        collection=collection,
        entity_id=entity_id,
        after=after,
    )


def masked(collection: Collection, document: Document | None) -> Document | None:
    """The declared fields of a document, with `***` for every secret that is set."""
    if document is None:
        return None
    secrets = collection.secrets
    return {
        name: _mask(value) if name in secrets else value
        for name, value in document.items()
        if name in collection.fields
    }


def _mask(value: Any) -> Any:
    return None if value is None else MASK
