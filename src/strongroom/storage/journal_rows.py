"""Journal records from the rows that stores keep of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import tagged_json
from .port import Record


def record_of(row: Sequence[Any]) -> Record:
    """The record of a row."""
    sequence, id, tenant, at_us, actor, request_id, action, collection, entity_id, version, *values = row
    before, after, salt, claims, rules = values
    return Record(
        id=id,
        tenant=tenant,
        at_us=at_us,
        actor=actor,
        request_id=request_id,
        action=action,
        collection=collection,
        entity_id=entity_id,
        before=None if before is None else tagged_json.loads(before),
        after=None if after is None else tagged_json.loads(after),
        version=version,
        sequence=sequence,
        salt=salt,
        claims=None if claims is None else tagged_json.loads(claims),
        rules=rules,
    )
