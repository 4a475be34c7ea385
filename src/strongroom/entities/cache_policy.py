"""The cache policy of an entity: names, lifetimes, and cached lists. It is checked with the entity."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX_CACHED_S = 86_400.0
ABSENT_S = 5.0
_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")


@dataclass(frozen=True, slots=True, init=False)
class CachedList:
    """A list that is cached under `name:{value}`: the documents whose field `by` has that value.

    `where`: further equalities that the documents satisfy; `order_by` as in Query. `Database.find` answers from the
    list the first page, up to 100 documents, of a query with exactly these conditions and this order.
    """

    name: str
    by: str
    where: tuple[tuple[str, str | int | bool], ...]
    order_by: tuple[str, ...]

    def __init__(
        self,
        name: str,
        by: str,
        *,
        where: Mapping[str, str | int | bool] | None = None,
        order_by: Iterable[str] = (),
    ) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "by", by)
        object.__setattr__(self, "where", tuple(sorted((where or {}).items())))
        object.__setattr__(self, "order_by", tuple(order_by))


@dataclass(frozen=True, slots=True, init=False)
class Cached:
    """Documents of this entity may be read from a cache: `class Policy(Entity, …, cache=Cached(seconds=300))`.

    `seconds`: how long an entry is kept at most; the journal tells of changes long before that. `name`: the prefix of
    the key in Redis (default: the collection's name). `absent_s`: how long the absence of a document is kept. `lists`:
    the lists that are cached as well.
    """

    seconds: float
    name: str
    absent_s: float
    lists: tuple[CachedList, ...]

    def __init__(
        self, seconds: float, *, name: str = "", absent_s: float = ABSENT_S, lists: Iterable[CachedList] = ()
    ) -> None:
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "absent_s", min(absent_s, seconds))
        object.__setattr__(self, "lists", tuple(lists))

    def named(self, collection: str) -> Cached:
        """The same policy; its name is the collection's if none was given."""
        return Cached(self.seconds, name=self.name or collection, absent_s=self.absent_s, lists=self.lists)


def problems_of_cache(
    cache: Cached,
    *,
    fields: Mapping[str, bool],
    hidden: Iterable[str],
    counters: Iterable[str],
    ttl: str | None,
    journalled: bool,
) -> list[str]:
    """What is wrong with this declaration, a sentence each.

    `fields`: the declared fields, and whether each is a text, a whole number or a boolean; `hidden`: the secret ones.
    """
    wrong = []
    if not journalled:
        wrong.append("cache: an entity that is not journalled cannot be cached: nothing would tell of its changes")
    if secret := sorted(hidden):
        wrong.append(f"cache: {', '.join(secret)} is secret and must not leave the store: leave `cache` away")
    if not 1 <= cache.seconds <= MAX_CACHED_S or not cache.absent_s >= 0:
        wrong.append(f"cache: found {cache.seconds:g} and {cache.absent_s:g} seconds, expected 1 to {MAX_CACHED_S:g}")
    names = [cache.name, *(listed.name for listed in cache.lists)]
    if not all(_NAME.fullmatch(name) for name in names) or len(set(names)) < len(names):
        wrong.append(f"cache: found the names {names}, expected different ones of lower-case letters, digits and _")
    for listed in cache.lists:
        if ttl is not None:
            wrong.append(f"cache: list {listed.name!r}: documents that expire by themselves cannot be listed")
        if counted := sorted(counters):
            wrong.append(f"cache: list {listed.name!r}: {counted[0]!r} is a counter, whose changes do not name a list")
        for name in (listed.by, *(name for name, _ in listed.where)):
            if not fields.get(name, False):
                wrong.append(f"cache: list {listed.name!r}: expected {name!r} to be a field of text, int or bool")
    return wrong
