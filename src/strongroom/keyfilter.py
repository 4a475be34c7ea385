"""Which keys are meant: the filters of a list of keys, and of work on many, as one query that an index serves. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from .apikey import Environment
from .errors import InvalidInput, Problem
from .query import And, Filter, Query, Where

_LAST = chr(0x10FFFF)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class KeyFilter:
    """All of what is given must hold. `created_after` and `created_before` are exclusive; `deleted`: those that were
    deleted and can be restored, instead of those that were not."""

    tenant: str | None = None
    user_id: str | None = None
    owner: str | None = None
    environment: Environment | None = None
    name_prefix: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    deleted: bool = False

    def within(self, tenant: str | None) -> KeyFilter | None:
        """The same for a caller who sees this tenant's keys alone (None: all); None if that leaves no keys."""
        if tenant is None:
            return self
        return replace(self, tenant=tenant) if self.tenant in (None, tenant) else None

    @property
    def where(self) -> Filter:
        """The filter. Raises InvalidInput that names what is wrong."""
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
        for name, op in (("created_after", ">"), ("created_before", "<")):
            moment: datetime | None = getattr(self, name)
            if moment is None:
                continue
            if moment.utcoffset() is None:
                problems.append(
                    Problem(name, "found a time without a zone, expected one with (for example 2027-01-01T00:00:00Z)")
                )
            filters.append(Where("created_at", op, moment))
        if problems:
            raise InvalidInput(problems)
        return filters[0] if len(filters) == 1 else And(*filters)

    def query(self, limit: int) -> Query:
        """Newest first; by name where a prefix of it is asked for; those deleted longest ago first."""
        order: tuple[str, ...] = ("-created_at",)
        if self.deleted:
            order = ("deleted_at", "-created_at")
        elif self.name_prefix:
            order = ("name",)
        return Query(self.where, order, limit)


def after_prefix(prefix: str) -> str | None:
    """The first text, in the order of UTF-8 bytes, after all that begin with `prefix`; None if there is none."""
    stem = prefix.rstrip(_LAST)
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    if 0xD800 <= following <= 0xDFFF:  # surrogates are no characters
        following = 0xE000
    return stem[:-1] + chr(following)
