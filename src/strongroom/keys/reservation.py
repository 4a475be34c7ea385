"""Shared by local and durable reservations: the units that they hold, where these count, and the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakValueDictionary

import msgspec

from ..context import utc_from_us
from ..errors import InvalidInput, Problem
from ..limits import Amount, Entries, LimitStatus, Subject, Subjects, from_units, leased_status
from ..limits.usage_state import CONCURRENCY
from .cache import KeyCache
from .cached_key import CachedKey
from .verification import (
    ONE_REQUEST,
    Reservation,
    Verification,
    admitted,
    check_address,
    cost_units,
    refused,
    uncounted,
)

DEFAULT_TTL_S = 60
MAX_TTL_S = 86_400
State = Literal["open", "settled", "released"]


def reserved_units(cost: Mapping[str, Amount] | None, ttl_s: int, ip: str | None) -> dict[str, int]:
    """The units to hold, with one of `concurrency`. Raises InvalidInput with every problem."""
    problems: list[Problem] = []
    if type(ttl_s) is not int or not 1 <= ttl_s <= MAX_TTL_S:
        problems.append(Problem("ttl_s", f"found {ttl_s!r}, expected 1 to {MAX_TTL_S} seconds"))
    units: dict[str, int] = {}
    try:
        units = dict(ONE_REQUEST) if cost is None else cost_units(cost, reserving=True)
    except InvalidInput as error:
        problems += error.problems
    if ip is not None:
        try:
            check_address(ip)
        except InvalidInput as error:
            problems += error.problems
    if problems:
        raise InvalidInput(problems)
    units.setdefault(CONCURRENCY, 1)
    return units


def used_since(before: Mapping[str, int], total: Mapping[str, int], field: str = "cost") -> dict[str, int]:
    """The units used since `before`. Raises InvalidInput if a total is less than before: a charge is never reduced."""
    problems = [
        Problem(
            f"{field}.{name}",
            f"found {from_units(name, units)}, expected at least the {from_units(name, least)} that were reported",
        )
        for name, units in total.items()
        if units < (least := before.get(name, 0))
    ]
    if problems:
        raise InvalidInput(problems)
    return {name: units - before.get(name, 0) for name, units in total.items()}


def same_amounts(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether both are the same amounts; a missing amount is 0."""
    return all(one.get(name, 0) == other.get(name, 0) for name in (*one, *other))


def ended_otherwise(before: str | None, now: State) -> str:
    """The message for a reservation that was ended in another way before."""
    return f"the reservation was {before} before" + (", with other amounts" if before == now == "settled" else "")


class Turns:
    """Locks: one change of a reservation at a time. A second change would else be decided on values that the first has
    not committed yet. Document versions detect the changes of other nodes."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, id: str) -> asyncio.Lock:
        """Held while the reservation with this id is changed."""
        lock = self._locks.get(id)
        if lock is None:
            lock = self._locks[id] = asyncio.Lock()
        return lock

    def taken(self, id: str) -> bool:
        """Whether a change of it is under way, or waits."""
        return id in self._locks


async def subjects_of_ids(
    cache: KeyCache, held_by: Iterable[str], quota_ids: Iterable[str], key: CachedKey | None
) -> list[Subject]:
    """Where the use of a reservation counts: on the subjects that hold it, as they are now, without those that were
    removed; and on quotas of its key (`quota_ids`) that were made since."""
    known = {subject.id: subject for subject in key.subjects.all} if key is not None else {}
    held, wanted = set(held_by), {*held_by, *quota_ids}
    found = [subject for id, subject in known.items() if id in wanted]
    others = [await cache.subject_of(id) for id in sorted(held - known.keys())]
    return [*found, *(subject for subject in others if subject is not None)]


def together(subjects: Sequence[Subject], key: CachedKey | None) -> Subjects:
    """These subjects as one admission request counts on them: the key's own object, if they are the same."""
    if key is not None and list(subjects) == list(key.subjects.all):
        return key.subjects
    first, *others = subjects
    return Subjects(first.id, first.guard, first.compiled_limits, tuple(others), first.tenant)


def minus(wanted: Mapping[str, int], used: Mapping[str, int]) -> dict[str, int]:
    """The part of `wanted` that is not `used` yet, 0 at least."""
    return {name: max(0, units - used.get(name, 0)) for name, units in wanted.items()}


def plus(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The sum of both."""
    return {
        name: one.get(name, 0) + other.get(name, 0) for name in (*one, *(name for name in other if name not in one))
    }


def amounts(units: Mapping[str, int]) -> dict[str, Amount]:
    """Units as the amounts of callers."""
    return {name: from_units(name, amount) for name, amount in units.items()}


def as_reservation(answer: Verification, id: str | None = None, state: str | None = None, **more: Any) -> Reservation:
    """The answer of a verification as the answer of a reservation."""
    fields = {name: getattr(answer, name) for name in Verification.__struct_fields__}
    return Reservation(**fields, reservation_id=id, state=state, **more)


def with_changes(answer: Reservation, **changes: Any) -> Reservation:
    """An answer with some fields changed."""
    return msgspec.structs.replace(answer, **changes)


def with_uncounted(answer: Reservation, key: CachedKey | None, cost: Mapping[str, Amount] | None) -> Reservation:
    """An answer with the resources of the caller's cost that no limit of the key counts."""
    found = uncounted(key, cost) if key is not None and cost is not None else []
    return with_changes(answer, uncounted=found) if found != answer.uncounted else answer


def open_answer(key: CachedKey, id: str, limits: list[LimitStatus], ends_us: int) -> Reservation:
    """The answer for a reservation that is open."""
    answer = as_reservation(admitted(key, ()), id, "open", expires_at=utc_from_us(ends_us))
    return with_changes(answer, limits=limits)


def held_answer(
    key: CachedKey, id: str, entries: Entries, state: State, *, limits: list[LimitStatus] | None = None, **more: Any
) -> Reservation:
    """The answer to a call on a local reservation."""
    shown = [leased_status(leased_limit) for leased_limit, _ in entries] if limits is None else limits
    return Reservation(
        True,
        "VALID",
        key.id,
        key.tenant,
        key.user_id,
        key.permissions,
        key.metadata,
        shown,
        reservation_id=id,
        state=state,
        **more,
    )


def not_covered(key: CachedKey, entries: Entries, wanted: Mapping[str, int]) -> Verification:
    """The refusal of an extension that this process's leases do not cover."""
    limits = [leased_status(leased_limit) for leased_limit, _ in entries]
    denied = [
        msgspec.structs.replace(status, exceeded=True)
        for status in limits
        if wanted.get(status.resource) and status.resource != CONCURRENCY
    ]
    answer = refused(key, "USAGE_EXCEEDED", "this process's limit leases do not have enough units for so much more")
    return msgspec.structs.replace(answer, limits=denied or limits)
