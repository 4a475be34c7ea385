"""The effect of a group of batches on the documents that it touches, computed before it is sent as one commit.

A draft takes the present contents of a place from one of three sources: a read for this commit; while it is optimistic,
what an operation expects (a version, or that nothing is there), or what this process saw last. Each source becomes a
precondition of the commit. So a batch whose assumptions hold costs one call. If one does not hold, Firestore refuses
the commit, the places are read, and the batch is decided again on their contents, which also give the error.

Why a draft guesses at all: a durable verification is one call this way. Without what the process saw last it is two
calls and two billed reads more, and three calls and three reads without any guess: every call is a round trip to
Firestore, and each read costs a third of a write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec import structs

from ...context import utc_from_us
from ...entities import INT64_MAX, INT64_MIN, Document, FieldType, Index
from ...errors import AlreadyExists, BoundExceeded, Conflict, InvalidInput, NotFound, StrongroomError, TooLarge
from ..port import MAX_DOCUMENT_BYTES, Add, Append, Batch, Check, Create, Delete, Operation, Patch, Put, document_size
from .paths import HEADS, Paths
from .places import ABSENT, HELD, HINT, Line, Outcome, Pending, Plan, Raw, Written, values_of
from .values import copied, take

SAFE_COUNT = 2**61
SAFE_AMOUNT = 2**40
"""Firestore's increment stops silently at the ends of int64. So an amount is added without a read only if it is small
and the counter was this far from the ends when this process saw it last. To reach an end, others would have to add 2^61
in between: 2^21 additions of the greatest such amount. Otherwise the counter is read first."""


class Draft:
    """The next commit. `lookup` returns what this process saw last at a place; None for an exact draft, which uses only
    what was `read`."""

    def __init__(
        self,
        plans: Mapping[str, Plan],
        paths: Paths,
        read: Mapping[str, Raw],
        lookup: Callable[[str], Raw | None] | None,
        shard_of: Callable[[str | None], int],
    ) -> None:
        self.plans = plans
        self.paths = paths
        self.read = read
        self.lookup = lookup
        self.shard_of = shard_of
        self.need: set[str] = set()
        """Places that must be read first; the draft is void until then."""
        self.pending: dict[str, Pending] = {}
        self.lines: list[Line] = []
        self._own: dict[str, Pending] = {}
        self._number = 0
        self._batch: Batch

    def run(self, batch: Batch) -> Outcome:
        """Apply a batch; if it fails, nothing of it stays."""
        outcome = Outcome()
        self._batch = batch
        self._own = {}
        for number, operation in enumerate(batch.operations):
            try:
                outcome.made.append(self._apply(number, operation, outcome))
            except StrongroomError as error:
                error.message = f"operation {number}: {error.message}"
                error.args = (error.message,)
                error.details["operation"] = number
                outcome.error = error
                return outcome
        self.pending.update(self._own)
        self.lines += outcome.lines
        self._number += 1
        return outcome

    # --- Places ---

    def _base(self, path: str, expects: Raw | None, *, hint: bool = False, certain: bool = False) -> Raw:
        """The contents of a place. An optimistic draft assumes `expects`; with `certain` an exact draft does so too."""
        if (found := self.read.get(path)) is not None:
            return found
        if self.lookup is not None:
            seen = self.lookup(path)
            if seen is not None and (expects is None or seen.version == expects.version):
                if seen.version != HINT or hint:
                    return seen
            elif expects is not None:
                return expects
        elif certain and expects is not None:
            return expects
        self.need.add(path)
        return expects or ABSENT

    def _open(self, path: str, plan: Plan | None, expects: Raw | None, **how: bool) -> Pending:
        """The place, for this batch."""
        own = self._own.get(path)
        if own is None:
            shared = self.pending.get(path)
            if shared is not None:
                own = shared.copy()
            else:
                base = self._base(path, expects, **how)
                own = Pending(path, base, plan, base.version != 0)
            self._own[path] = own
        return own

    def _content(self, plan: Plan, place: Pending) -> Document:
        """The declared fields of an existing document."""
        if place.content is None:
            base = place.base
            if base.found is None or base.version == HINT:
                self.need.add(place.path)
                fields = plan.collection.fields.values()
                return {spec.name: 0 if spec.type is FieldType.INT else None for spec in fields}
            place.content = plan.codec.fields_of(base.found)
        for name, amount in place.increments.items():
            place.content[name] += amount
            place.sets[name] = place.content[name]
        place.increments.clear()
        return place.content

    def _inner(self, path: str, expects: Raw | None, **how: bool) -> Pending:
        """One of the store's own documents: its fields are plain values."""
        place = self._open(path, None, expects, **how)
        if place.content is None and place.exists and place.base.found is not None:
            place.content = {name: take(value) for name, value in place.base.found.fields.items()}
        return place

    @staticmethod
    def _put_inner(place: Pending, content: Document | None) -> None:
        place.touched = True
        place.exists = content is not None
        place.content = content
        place.whole = True

    # --- Operations ---

    def _apply(self, number: int, operation: Operation, outcome: Outcome) -> Written | None:
        if isinstance(operation, Append):
            self._append(operation, outcome)
            return None
        plan = self.plans.get(operation.collection)
        if plan is None:
            raise InvalidInput(f"{operation.collection}: the store was not prepared for this collection")
        name = f"{operation.collection}/{operation.id}"
        place = self._place(plan, operation)
        if place is None or not place.exists:
            self._check_absent(operation, name)
            if isinstance(operation, Check) and place is not None:
                place.checked = True
            if isinstance(operation, Create | Put):
                return self._created(plan, operation, place or self._new_place(plan, operation, name), name)
            return None
        self._check_present(operation, name, place)
        match operation:
            case Check():
                place.checked = True
                return None
            case Delete():
                self._removed(plan, operation.id, place)
                return None
            case Put():
                return self._changed(plan, operation, place, operation.document, name)
            case Patch():
                return self._changed(plan, operation, place, operation.fields, name)
            case Add():
                return self._added(number, plan, operation, place, name, outcome)
            case _:
                raise AssertionError("a document that is there is not created")

    def _place(self, plan: Plan, operation: Create | Put | Patch | Delete | Add | Check) -> Pending | None:
        """The place of the operation's document; None if it is placed by a field and there is none."""
        expects = _expected(operation)
        hint = isinstance(operation, Add) and operation.at_most is None and operation.at_least is None
        if plan.placed_by is None:
            path = self.paths.document(plan.collection, self._batch.tenant, operation.id)
            place = self._open(path, plan, expects, hint=hint)
        else:
            pointer = self._pointer(plan, operation.id, ABSENT if expects is ABSENT else None)
            if not pointer.exists:
                pointer.checked = True
                return None
            path = self.paths.document(plan.collection, self._batch.tenant, str((pointer.content or {}).get("place")))
            place = self._open(path, plan, None if expects is ABSENT else expects, hint=hint)
        place.id = operation.id
        return place

    def _pointer(self, plan: Plan, id: str, expects: Raw | None) -> Pending:
        """For a collection that is placed by a field: the document that points from an id to its place."""
        return self._inner(self.paths.reservation(plan.collection, self._batch.tenant, "id", [id]), expects)

    def _point(self, plan: Plan, pointer: Pending, id: str, place: Any) -> None:
        self._put_inner(pointer, {"holder": id, "place": place, "index": f"{plan.collection.name}.id"})

    def _check_absent(self, operation: Operation, name: str) -> None:
        match operation:
            case Patch() | Delete() | Add():
                raise NotFound(f"{name}: there is no such document")
            case Put(expected=expected) | Check(expected=expected) if expected:
                raise Conflict(f"{name}: there is no document, expected version {expected}")
            case _:
                pass

    def _check_present(self, operation: Operation, name: str, place: Pending) -> None:
        match operation:
            case Create():
                raise AlreadyExists(f"{name}: a document with this id exists already")
            case (
                Put(expected=expected) | Patch(expected=expected) | Delete(expected=expected) | Check(expected=expected)
            ):
                if expected is not None and (place.touched or place.base.version != expected):
                    found = "another one, made before it in the batch" if place.touched else str(place.base.version)
                    raise Conflict(f"{name}: found version {found}, expected {expected}")
            case _:
                pass

    def _new_place(self, plan: Plan, operation: Create | Put, name: str) -> Pending:
        """The new place of a document that a field places."""
        value = operation.document[plan.placed_by or "id"]
        self._point(plan, self._pointer(plan, operation.id, ABSENT), operation.id, value)
        return self._free_place(plan, value, operation.id, name)

    def _created(self, plan: Plan, operation: Create | Put, place: Pending, name: str) -> Written:
        document = self._declared(plan, operation.document, name)
        place.id = operation.id
        self._claim(plan, operation.id, None, document, name)
        now = utc_from_us(self._batch.now_us)
        place.touched = place.exists = place.whole = True
        place.content, place.sets = document, {}
        place.created_at, place.keeps_created = operation.created_at or now, False
        place.updated_at = operation.updated_at or now
        return Written(place.path)

    def _free_place(self, plan: Plan, value: Any, id: str, name: str) -> Pending:
        """The place for this value of the placing field. AlreadyExists if another document is there."""
        path = self.paths.document(plan.collection, self._batch.tenant, value)
        place = self._open(path, plan, ABSENT)
        if place.exists:
            raise AlreadyExists(f"{name}: another document has this {plan.placed_by}")
        place.id = id
        return place

    def _changed(self, plan: Plan, operation: Put | Patch, place: Pending, given: Document, name: str) -> Written:
        whole = isinstance(operation, Put)
        needs_old = not whole or plan.uniques or plan.placed_by is not None
        old = self._content(plan, place) if needs_old else None
        if old is None:
            place.increments.clear()  # all of it is replaced
        new = self._declared(plan, given if old is None or whole else {**old, **given}, name)
        place = self._moved(plan, operation.id, place, old, new, name)
        self._claim(plan, operation.id, old, new, name)
        fields = plan.collection.fields
        place.touched = True
        place.content = new
        place.sets.update(new if whole else {key: new[key] for key in given if key in fields})
        place.updated_at = utc_from_us(self._batch.now_us)
        if isinstance(operation, Put):
            place.updated_at = operation.updated_at or place.updated_at
            if operation.created_at is not None:
                place.created_at, place.keeps_created = operation.created_at, False
        return Written(place.path)

    def _moved(self, plan: Plan, id: str, place: Pending, old: Document | None, new: Document, name: str) -> Pending:
        """The place after a change of the field that it is placed by."""
        if plan.placed_by is None or old is None or old[plan.placed_by] == new[plan.placed_by]:
            return place
        target = self._free_place(plan, new[plan.placed_by], id, name)
        target.touched = target.exists = target.whole = True
        found = place.base.found
        target.created_at = take(found.fields["created_at"]) if place.keeps_created and found else place.created_at
        target.keeps_created = False
        place.touched, place.exists, place.content, place.sets = True, False, None, {}
        self._point(plan, self._pointer(plan, id, None), id, new[plan.placed_by])
        return target

    def _removed(self, plan: Plan, id: str, place: Pending) -> None:
        if plan.uniques or plan.placed_by is not None:
            self._claim(plan, id, self._content(plan, place), None, id)
        if plan.placed_by is not None:
            self._put_inner(self._pointer(plan, id, None), None)
        place.touched, place.exists, place.whole, place.content = True, False, False, None
        place.sets, place.increments = {}, {}

    def _added(self, number: int, plan: Plan, operation: Add, place: Pending, name: str, outcome: Outcome) -> Written:
        place.updated_at = utc_from_us(self._batch.now_us)
        place.adders.append(self._number)
        field_name, amount = operation.field, operation.amount
        if self._is_blind(operation, place):
            place.touched = True
            place.increments[field_name] = so_far = place.increments.get(field_name, 0) + amount
            return Written(place.path, field_name, so_far)
        content = self._content(plan, place)
        value = content[field_name] + amount
        least = INT64_MIN if operation.at_least is None else operation.at_least
        most = INT64_MAX if operation.at_most is None else operation.at_most
        if not least <= value <= most:
            raise BoundExceeded(f"{name}: adding {amount} to {field_name} would leave {least} to {most}")
        old, new = dict(content), {**content, field_name: value}
        self._claim(plan, operation.id, old, new, name)
        place.touched = True
        place.content = new
        place.sets[field_name] = outcome.values[number] = value
        return Written(place.path)

    @staticmethod
    def _is_blind(operation: Add, place: Pending) -> bool:
        """Whether the addition needs no read of the counter."""
        found = place.base.found
        if operation.at_most is not None or operation.at_least is not None or abs(operation.amount) > SAFE_AMOUNT:
            return False
        if found is None or operation.field not in found.fields or (place.touched and not place.increments):
            return False
        if place.plan is None or any(operation.field in dict(index.columns) for index in place.plan.uniques):
            return False
        return abs(int(found.fields[operation.field].integer_value)) <= SAFE_COUNT

    @staticmethod
    def _declared(plan: Plan, document: Document, name: str) -> Document:
        declared = {field_name: copied(document[field_name]) for field_name in plan.collection.fields}
        if (size := document_size(declared)) > MAX_DOCUMENT_BYTES:
            raise TooLarge(f"{name}: found {size} bytes in a document, expected at most {MAX_DOCUMENT_BYTES}")
        return declared

    # --- Unique values ---

    def _claim(self, plan: Plan, id: str, old: Document | None, new: Document | None, name: str) -> None:
        """Take the unique values of `new` and give up those of `old`. AlreadyExists if another has one of them."""
        for index in plan.uniques:
            before, after = values_of(index, old), values_of(index, new)
            if before == after:
                continue
            if after is not None:
                place = self._inner(self._reservation(plan, index, after), ABSENT)
                if place.exists and (place.content or {}).get("holder") != id:
                    columns = " and ".join(column for column, _ in index.columns)
                    raise AlreadyExists(f"{name}: another document has this {columns}")
                self._put_inner(place, {"holder": id, "index": f"{plan.collection.name}.{index.name}"})
            if before is not None:
                # The document's own precondition covers its reservations: they are written together.
                place = self._inner(self._reservation(plan, index, before), HELD, certain=True)
                if place.content is None or place.content.get("holder") == id:
                    self._put_inner(place, None)

    def _reservation(self, plan: Plan, index: Index, values: Sequence[Any]) -> str:
        return self.paths.reservation(plan.collection, self._batch.tenant, index.name, values)

    # --- The journal ---

    def _append(self, operation: Append, outcome: Outcome) -> None:
        record = operation.record
        shard = self.shard_of(record.tenant)
        head = self._inner(self.paths.internal(HEADS, f"{shard:02}"), None)
        content = head.content or {}
        last = content.get("last", 0) + 1
        searchable = content.get("searchable", last)  # a head that an older version wrote does not have it
        self._put_inner(head, {**content, "last": last, "searchable": searchable})
        of = operation.of
        record = structs.replace(
            record,
            before=copied(record.before),
            after=copied(record.after),
            claims=copied(record.claims),
            sequence=0,
        )
        if of is not None:
            record = structs.replace(record, version=0 if outcome.made[of] is None else None)
        outcome.lines.append(Line(record, shard, last, None if record.version == 0 else of, self._number))


def _expected(operation: Create | Put | Patch | Delete | Add | Check) -> Raw | None:
    """The contents that an operation expects at its place; None if it expects none in particular."""
    match operation:
        case Create():
            return ABSENT
        case Put(expected=expected) | Patch(expected=expected) | Delete(expected=expected) | Check(expected=expected):
            if expected is None:
                return None
            return Raw(expected) if expected else ABSENT
        case _:
            return None


def places_of(plans: Mapping[str, Plan], paths: Paths, batch: Batch) -> set[str]:
    """The places that a batch's operations name, for reading them at once."""
    found = set()
    for operation in batch.operations:
        if isinstance(operation, Append) or (plan := plans.get(operation.collection)) is None:
            continue
        if plan.collection.tenant_scoped and batch.tenant is None:
            continue
        if plan.placed_by is None:
            with suppress(InvalidInput):  # an id that no name can hold: the draft raises the error
                found.add(paths.document(plan.collection, batch.tenant, operation.id))
        else:
            found.add(paths.reservation(plan.collection, batch.tenant, "id", [operation.id]))
    return found


def needs_content(plans: Mapping[str, Plan], operation: Operation) -> bool:
    """Whether an operation cannot be decided by its expectation alone."""
    if isinstance(operation, Append) or (plan := plans.get(operation.collection)) is None:
        return False
    match operation:
        case Create() | Check():
            return plan.placed_by is not None and isinstance(operation, Check)
        case Put(expected=expected) | Delete(expected=expected) if expected is not None:
            return bool(expected and (plan.uniques or plan.placed_by is not None))
        case _:
            return True
