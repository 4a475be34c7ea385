"""Filters of keys, for lists and for work on many keys. Pure.

A store answers one query, `where`, in an order that an index serves. Conditions that no store can answer (a part of a
name in any case, expired now) are checked on the keys of its answer: `keeps`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, TypedDict, get_args

from ..entities import And, Filter, Or, Query, Where
from ..errors import InvalidInput, Problem
from .model import ApiKey, Environment

KeyState = Literal["active", "disabled", "expired"]
TIMES = ("created_after", "created_before", "expires_after", "expires_before", "used_after", "used_before")
_LAST = chr(0x10FFFF)
_FIELD_OF = {"created": "created_at", "expires": "expires_at", "used": "last_used"}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class KeyFilterGiven(TypedDict, total=False):
    """The fields of a KeyFilter, as keywords."""

    tenant: str | None
    user_id: str | None
    owner: str | None
    environment: Environment | None
    name_prefix: str | None
    created_after: datetime | None
    created_before: datetime | None
    deleted: bool
    name_contains: str | None
    state: KeyState | None
    group: str | None
    permission: str | None
    expires_after: datetime | None
    expires_before: datetime | None
    used_after: datetime | None
    used_before: datetime | None


@dataclass(frozen=True, slots=True)
class KeyFilter:
    """All given conditions must hold. Times are exclusive. `deleted`: the deleted keys that can be restored, instead of
    the others.

    `name_contains`: a part of the name, without regard to case. `state`: `disabled`, or `expired` (and not disabled),
    or `active` (neither). `group` and `permission`: one that the key itself names. `expires_before` leaves out keys
    that never expire; `used_before` includes keys that were never used (the last use is known to about a minute).
    """

    tenant: str | None = None
    user_id: str | None = None
    owner: str | None = None
    environment: Environment | None = None
    name_prefix: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    deleted: bool = False
    name_contains: str | None = None
    state: KeyState | None = None
    group: str | None = None
    permission: str | None = None
    expires_after: datetime | None = None
    expires_before: datetime | None = None
    used_after: datetime | None = None
    used_before: datetime | None = None

    def within(self, tenant: str | None) -> KeyFilter | None:
        """The filter for a caller who may see this tenant's keys only (None: all keys). None if no key is left."""
        if tenant is None:
            return self
        return replace(self, tenant=tenant) if self.tenant in (None, tenant) else None

    @property
    def where(self) -> Filter:
        """The filter that the store answers. Raises InvalidInput with every problem."""
        filters: list[Filter] = []
        problems: list[Problem] = []
        for name in ("tenant", "user_id", "owner", "environment"):
            value = getattr(self, name)
            if value is not None:
                filters.append(Where(name, "==", value))
        filters.append(Where("deleted_at", ">", _EPOCH) if self.deleted else Where("deleted_at", "==", None))
        if self.name_prefix:
            filters.append(Where("name", ">=", self.name_prefix))
            if (end := after_prefix(self.name_prefix)) is not None:
                filters.append(Where("name", "<", end))
        if self.state is not None:
            if self.state not in get_args(KeyState):
                expected = " or ".join(get_args(KeyState))
                problems.append(Problem("state", f"found {str(self.state)[:64]!r}, expected {expected}"))
            filters.append(Where("enabled", "==", self.state != "disabled"))
        if self.group is not None:
            filters.append(Where("groups", "array-contains", self.group))
        elif self.permission is not None:  # a store filters by one list only
            filters.append(Where("permissions", "array-contains", self.permission))
        for name in TIMES:
            moment: datetime | None = getattr(self, name)
            if moment is None:
                continue
            if moment.utcoffset() is None:
                problems.append(
                    Problem(name, "found a time without a zone, expected one with (for example 2027-01-01T00:00:00Z)")
                )
            field, _, side = name.partition("_")
            by = Where(_FIELD_OF[field], ">" if side == "after" else "<", moment)
            filters.append(Or(by, Where("last_used", "==", None)) if name == "used_before" else by)
        if problems:
            raise InvalidInput(problems)
        return filters[0] if len(filters) == 1 else And(*filters)

    def keeps(self, now: datetime) -> Callable[[ApiKey], bool] | None:
        """The check of the keys that the query finds; None: they all match."""
        tests: list[Callable[[ApiKey], bool]] = []
        if self.name_contains:
            part = self.name_contains.casefold()
            tests.append(lambda key: part in key.name.casefold())
        if self.state in ("active", "expired"):
            expired = self.state == "expired"
            tests.append(lambda key: key.is_expired(now) == expired)
        if self.group is not None and self.permission is not None:
            wanted = self.permission
            tests.append(lambda key: wanted in key.permissions)
        return (lambda key: all(test(key) for test in tests)) if tests else None

    def query(self, limit: int) -> Query:
        """Newest first; by name for a prefix; deleted keys by their deletion, the earliest first."""
        order: tuple[str, ...] = ("-created_at",)
        if self.deleted:
            order = ("deleted_at", "-created_at")
        elif self.name_prefix:
            order = ("name",)
        return Query(self.where, order, limit)


def after_prefix(prefix: str) -> str | None:
    """The first text, in the order of UTF-8 bytes, after all texts with this prefix; None if there is none."""
    stem = prefix.rstrip(_LAST)
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    if 0xD800 <= following <= 0xDFFF:  # surrogates are no characters
        following = 0xE000
    return stem[:-1] + chr(following)
