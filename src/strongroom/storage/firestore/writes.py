"""The write for each place that a commit touches, with its precondition."""

from __future__ import annotations

from typing import Any

from .places import ANY, Pending, Plan
from .values import COMMIT_FIELD, WritePb, put, timestamp


def write_of(place: Pending, commit: str) -> Any | None:
    """The write for a place; None if there is nothing to write. Its precondition is the draft's assumption."""
    base = place.base.version
    if not place.touched:
        if not place.checked:
            return None
        if base == 0:
            return _deletion(place, exists=False)
        # A write that changes nothing leaves the version as it is, and is refused if the version is another.
        write = WritePb()
        write.update.name = place.path
        write.update_mask.SetInParent()
        write.current_document.update_time.CopyFrom(timestamp(base))
        return write
    if not place.exists:
        return _deletion(place, exists=False) if base == 0 else _deletion(place)
    write = WritePb()
    write.update.name = place.path
    fields = write.update.fields
    if place.plan is None:
        for name, value in (place.content or {}).items():
            if name != COMMIT_FIELD:
                put(fields[name], value)
    else:
        _put_document(place, place.plan, write)
    fields[COMMIT_FIELD].string_value = commit
    if not place.whole:
        write.update_mask.field_paths.extend(fields)
    for name, amount in place.increments.items():
        transform = write.update_transforms.add(field_path=name)
        transform.increment.integer_value = amount
    if base == 0:
        write.current_document.exists = False
    elif place.increments:
        write.current_document.exists = True
    elif base != ANY:
        write.current_document.update_time.CopyFrom(timestamp(base))
    return write


def _put_document(place: Pending, plan: Plan, write: Any) -> None:
    fields = write.update.fields
    given = place.content if place.whole else place.sets
    plan.codec.put(write.update, given or {})
    if given and plan.derive is not None and place.content is not None:
        for name, value in plan.derive(place.content).items():
            put(fields[name], value)
    put(fields["updated_at"], place.updated_at)
    if not place.keeps_created:
        put(fields["created_at"], place.created_at)
    elif place.whole and place.base.found is not None:
        fields["created_at"].CopyFrom(place.base.found.fields["created_at"])
    if place.whole:
        fields["id"].string_value = place.id


def _deletion(place: Pending, *, exists: bool | None = None) -> Any:
    write = WritePb(delete=place.path)
    if exists is not None:
        write.current_document.exists = exists
    elif place.base.version != ANY:
        write.current_document.update_time.CopyFrom(timestamp(place.base.version))
    return write
