"""The changes that a transaction has planned, and the batch that commits them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Literal, cast

import msgspec
from msgspec import structs

from ..context import Context, utc_from_us
from ..entities import SYSTEM_FIELDS, Collection, Document, Entity
from ..journal import change_record
from ..rules import Operation as RuleOperation
from ..storage.port import (
    Add,
    Append,
    Batch,
    Check,
    Committed,
    Create,
    Delete,
    Operation,
    Patch,
    Put,
    Record,
)

Action = Literal["create", "update", "delete", "add", "expire"]
Found = tuple[Collection, Document]
"""A stored document and its collection."""

RULE_OF: Mapping[Action, RuleOperation] = {
    "create": "create",
    "update": "update",
    "add": "update",
    "delete": "delete",
    "expire": "delete",
}
"""The operation that the rules are asked for, for each action."""


class Change(msgspec.Struct, eq=False):
    """One planned change: the store's operation, and what the rules and the journal need to know of it.

    `after` has the declared fields; of an addition, the field and the amount. `fixed`: the caller chose the expected
    version, or there is none, so a conflict is the caller's answer and no reason to run the transaction again.
    `position` is the operation's index in the batch.
    """

    action: Action
    collection: Collection
    operation: Create | Put | Patch | Delete | Add
    before: Document | None
    after: Document | None
    entity: Entity | None
    fixed: bool
    position: int = -1

    @property
    def created_at(self) -> datetime | None:
        """The document's creation time as the store will have it; None: the time of this commit."""
        if self.before is not None:
            return cast(datetime, self.before["created_at"])
        operation = self.operation
        return operation.created_at if isinstance(operation, Create | Put) else None

    def planned(self, now: datetime) -> Document | None:
        """The document as a later read in the same transaction sees it; None if this change removes it."""
        if self.after is None or self.entity is None:
            return None
        return {**self.after, **system_fields(self.entity), "created_at": self.created_at or now}


def system_fields(entity: Entity) -> Document:
    """The fields of an entity that the store sets."""
    return {name: getattr(entity, name) for name in SYSTEM_FIELDS}


def operations_of(
    context: Context,
    changes: Iterable[Change],
    read: Mapping[tuple[str, str], Document | None],
    expired: Iterable[Found],
    first: Sequence[Operation],
) -> tuple[Operation, ...]:
    """`first`, checks of the documents that were read and that no change expects, the removal of expired documents,
    and the changes; each change is followed by its journal record."""
    operations: list[Operation] = list(first)
    if read:
        # Checks come before the changes, because a check sees what was changed before it. An addition and a creation
        # expect no version themselves, so the document that they were decided on is checked for them as well.
        expected = {
            (change.collection.name, change.operation.id)
            for change in changes
            if isinstance(change.operation, Put | Patch | Delete) and change.operation.expected is not None
        }
        for (name, id), document in read.items():
            if (name, id) not in expected:
                operations.append(Check(name, id, 0 if document is None else document["version"]))
    for collection, document in expired:  # before the changes, which need the unique values that these hold
        operations.append(Delete(collection.name, document["id"], document["version"]))
        if collection.journalled:
            by = Context(context.tenant, "system", {}, context.request_id, context.now_us)
            record = change_record(by, "expire", collection, document["id"], document, None)
            operations.append(Append(record, len(operations) - 1))
    for change in changes:
        collection, operation = change.collection, change.operation
        change.position = len(operations)
        operations.append(operation)
        if collection.journalled:
            record = change_record(context, change.action, collection, operation.id, change.before, change.after)
            operations.append(Append(record, change.position))
    return tuple(operations)


def answer_to_keep(result: object, changes: Iterable[Change], now: datetime) -> Document | None:
    """The document that a call answers with, kept for its repeat. Its version is 0 where the commit sets it."""
    if not isinstance(result, Entity) or not hasattr(type(result), "__collection__"):
        return None
    system = system_fields(result)
    change = next((change for change in changes if change.entity is result), None)
    if change is not None:
        system |= {"version": 0, "created_at": change.created_at or now, "updated_at": now}
    return {**system, **result.__codec__.encode(result)}


def records_of(batch: Batch, committed: Committed) -> list[Record]:
    """The journal records of a committed batch, as a reader of an ordered journal gets them."""
    if committed.sequence is None:
        return []
    appends = [operation for operation in batch.operations if isinstance(operation, Append)]
    first = committed.sequence - len(appends) + 1
    return [
        structs.replace(
            append.record,
            sequence=first + number,
            version=append.record.version if append.of is None else committed.versions[append.of],
        )
        for number, append in enumerate(appends)
    ]


def stamp(changes: Iterable[Change], committed: Committed, now_us: int) -> None:
    """Give the entities that the transaction's body returned the version and the times that the store set."""
    now = utc_from_us(now_us)
    for change in changes:
        if change.entity is not None:
            version = committed.versions[change.position]
            change.entity.__dict__.update(version=version, created_at=change.created_at or now, updated_at=now)


__all__ = [
    "RULE_OF",
    "Action",
    "Change",
    "Found",
    "answer_to_keep",
    "operations_of",
    "records_of",
    "stamp",
    "system_fields",
]
