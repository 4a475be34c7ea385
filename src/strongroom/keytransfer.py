"""Import and export of key files: what a file's rows are in a store, put there in resumable steps, and read back.

An imported key's id is made from the key's own SHA-256, so a second run finds what the first has written: what is there
is left alone, what is missing is added. Each key is committed together with its usage, many keys in one transaction;
stopped anywhere, the same import completes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from .apikey import ALL_TENANTS, ApiKey
from .context import Context, check_tenant, us_from_utc, utc_from_us
from .database import Database, Transaction
from .errors import AlreadyExists, Conflict, InvalidInput, Problem, StoreError
from .keyfile import WINDOW_S, KeyRow, Shape, render_row
from .keytext import Hasher, imported_sha256, masked, sha256_of_imported
from .query import MAX_IN, MAX_LIMIT, Query, Where
from .storage.port import MAX_OPERATIONS
from .usage import Account, KeyUsage
from .windows import Limit, Rolling, RollingCounter

KEYS_PER_COMMIT = MAX_OPERATIONS // 4
"""A key is four operations at most: itself, its journal record, its usage removed and made anew."""
READS_AT_ONCE = 100

_WINDOW = Rolling(seconds=WINDOW_S)
FIVE_HOURS = Limit(resource="tokens", limit=0, window=_WINDOW).id
"""The counter of the plain shape's one limit: tokens in the last five hours."""

Progress = Callable[[int, int], None]
T = TypeVar("T")


def no_progress(done: int, total: int) -> None:
    """Nobody watches."""


# --- The plan -------------------------------------------------------------------------------------------------


class Standing(StrEnum):
    """What a row is to the store."""

    NEW = "new"
    UNCHANGED = "unchanged"
    CHANGED = "changed"
    """File and store say different things of the key; `differences` has them."""
    ROTATED = "rotated"
    """The key got another text here since: the one in the file stays out."""
    FOREIGN = "foreign"
    """The key is there, for another tenant."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of which file and store say different things."""

    field: str
    file: Any
    store: Any


@dataclass(slots=True)
class Planned:
    """A row, the id it has or gets in the store, and its standing there."""

    row: KeyRow
    id: str
    standing: Standing
    tenant: str
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, slots=True)
class Checksums:
    """The same digest over the file's rows and over what the store has of them, and how many keys each is over.

    It covers all that the shape speaks of; of a key that was used here since (`used_since` of them), all but its usage.
    `left_out` are the rows of which file and store are known to say different things; `unequal` has the
    paths of those where it was not known.
    """

    file: str
    store: str
    file_keys: int
    store_keys: int
    used_since: int
    left_out: int
    unequal: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.file == self.store


def id_of(sha256: bytes) -> str:
    """The id of an imported key: the same in every run and store, and not a piece of the hash that other files show."""
    return "key_" + hashlib.sha256(b"strongroom imported key\x00" + sha256).hexdigest()[:31]


class KeyImport:
    """One import into a tenant of one store, by one actor: `plan`, then `apply`, then `checksums`.

    Each raises what the database raises. What `apply` has committed is counted in `committed`, also when it is stopped.
    """

    def __init__(self, database: Database, hasher: Hasher, shape: Shape, tenant: str, context: Context) -> None:
        check_tenant(tenant)
        if tenant == ALL_TENANTS:
            raise InvalidInput([Problem("tenant", "keys for all tenants are management keys: they are not imported")])
        self._database = database
        self._hasher = hasher
        self._shape = shape
        self._tenant = tenant
        self._context = context
        self.committed = 0

    # --- Plan ---------------------------------------------------------------------------------------------------

    async def plan(self, rows: Sequence[KeyRow], progress: Progress = no_progress) -> list[Planned]:
        """Compare the rows with the store. Reads only."""
        is_empty = not (await self._database.find(self._reader(), ApiKey, Query(limit=1))).items
        planned: list[Planned] = []
        for chunk in _chunks(rows, KEYS_PER_COMMIT):
            planned += [self._compare(row) for row in chunk] if is_empty else await self._plan(chunk)
            progress(len(planned), len(rows))
        return planned

    async def _plan(self, rows: Sequence[KeyRow]) -> list[Planned]:
        found = await self._stored(rows)
        ids = [key.id for key in found.values()]
        usages = dict(zip(ids, await self._each(ids, self._usage), strict=True))
        return [
            self._compare(row, key, usages[key.id])
            if (key := found.get(row.sha256)) is not None
            else self._compare(row)
            for row in rows
        ]

    async def _stored(self, rows: Sequence[KeyRow]) -> dict[bytes, ApiKey]:
        """The keys that the store has of these rows: imported ones by their id, its own by their hash."""
        by_id = await self._each([id_of(row.sha256) for row in rows], self._key)
        found = {row.sha256: key for row, key in zip(rows, by_id, strict=True) if key is not None}
        rows_by_hash = {
            candidate: row.sha256
            for row in rows
            if row.sha256 not in found
            for candidate in self._hasher.candidates_of(row.sha256)
        }
        for name in ("hash", "previous_hash"):
            for chunk in _chunks(list(rows_by_hash), MAX_IN):
                page = await self._database.find(
                    self._reader(), ApiKey, Query(Where(name, "in", chunk), limit=MAX_LIMIT)
                )
                for key in page.items:
                    found.setdefault(rows_by_hash[getattr(key, name)], key)
        return found

    def _compare(self, row: KeyRow, key: ApiKey | None = None, usage: KeyUsage | None = None) -> Planned:
        if key is None:
            return Planned(row, id_of(row.sha256), Standing.NEW, self._tenant)
        if key.tenant != self._tenant:
            return Planned(row, key.id, Standing.FOREIGN, key.tenant)
        now_us = time.time_ns() // 1_000
        differences = tuple(
            Difference(name, of_file, of_store)
            for (name, of_file), (_, of_store) in zip(
                _said(self._shape, row, now_us).items(),
                _said(self._shape, row_of(key, usage, self._hasher, now_us), now_us).items(),
                strict=True,
            )
            if of_file != of_store and name not in _UNCHANGEABLE and (name not in _USAGE or _is_as_imported(usage))
        )
        if key.hash not in self._hasher.candidates_of(row.sha256):
            standing = Standing.ROTATED
        else:
            standing = Standing.CHANGED if differences else Standing.UNCHANGED
        return Planned(row, key.id, standing, key.tenant, differences)

    # --- Apply --------------------------------------------------------------------------------------------------

    async def apply(self, planned: Sequence[Planned], *, update: bool, progress: Progress = no_progress) -> None:
        """Add what is new and, with `update`, set what differs. The usage of a key that was used here since stays."""
        work = [p for p in planned if p.standing is Standing.NEW or (update and p.standing is Standing.CHANGED)]
        for chunk in _chunks(work, KEYS_PER_COMMIT):
            try:
                await self._commit(chunk, fresh=True)
            except (
                AlreadyExists,
                Conflict,
            ):  # someone else wrote meanwhile, or a removed key has left its usage behind
                await self._commit(await self._planned_again(chunk), fresh=False)
            self.committed += len(chunk)
            progress(self.committed, len(work))

    async def _planned_again(self, chunk: Sequence[Planned]) -> list[Planned]:
        """Those of a chunk that still want what was planned for them; the others get their new standing."""
        again = []
        for was, now in zip(chunk, await self._plan([p.row for p in chunk]), strict=True):
            if now.standing is was.standing:
                again.append(now)
            was.id, was.standing, was.tenant, was.differences = now.id, now.standing, now.tenant, now.differences
        return again

    async def _commit(self, chunk: Sequence[Planned], *, fresh: bool) -> None:
        context = Context(self._tenant, self._context.actor, self._context.claims)

        async def body(tx: Transaction) -> None:
            for planned in chunk:
                if planned.standing is Standing.CHANGED:
                    await self._update(tx, planned)
                    continue
                await tx.create(self._key_of(planned.row))
                usage = _usage_of(self._shape, planned.id, planned.row, Account(), tx.context.now_us)
                await (tx.create(usage) if fresh else tx.replace(usage))

        await self._database.transaction(context, body)

    async def _update(self, tx: Transaction, planned: Planned) -> None:
        names = {difference.field for difference in planned.differences}
        if names - _USAGE:
            key = await tx.get(ApiKey, planned.id)
            await tx.update(ApiKey, planned.id, self._changed(planned.row, key))
        if names & _USAGE:
            usage = await tx.get_or_none(KeyUsage, planned.id)
            if usage is not None and _is_as_imported(usage):  # else it was used a moment ago
                # Made anew, so that a later run still knows it as imported and not used.
                await tx.delete(KeyUsage, planned.id)
                row, account = planned.row, _account(usage)
                made = _usage_of(self._shape, planned.id, row, account, tx.context.now_us)
                await tx.create(made)
                copied = {"last_used": made.last_used_at, "usage_count": made.count}
                await tx.update(ApiKey, planned.id, copied)

    def _key_of(self, row: KeyRow) -> ApiKey:
        """A row as a key. With its text it is hashed under the pepper; else that is done at its first use."""
        known = row.text is not None
        return ApiKey(
            id=id_of(row.sha256),
            created_at=utc_from_us(row.created_us),
            tenant=self._tenant,
            name=row.name,
            hash=self._hasher.hash_of(row.sha256) if known else imported_sha256(row.sha256.hex()),
            sealed=self._hasher.seal(row.sha256) if known else None,
            display=masked(row.text) if row.text is not None else f"sha256:{row.sha256.hex()[:8]}…",
            user_id=row.user_id,
            metadata={} if row.model is None else {"model": row.model},
            limits=_limits(row.token_limit),
            expires_at=_utc(row.expires_us),
            last_used=_utc(row.last_used_us),
            usage_count=row.uses,
        )

    def _changed(self, row: KeyRow, key: ApiKey) -> dict[str, Any]:
        fields: dict[str, Any] = {"name": row.name, "expires_at": _utc(row.expires_us)}
        if self._shape == "hashed":
            return fields | {"user_id": row.user_id}
        others = {name: value for name, value in key.metadata.items() if name != "model"}
        fields["metadata"] = others if row.model is None else {**others, "model": row.model}
        fields["limits"] = [*_limits(row.token_limit), *(limit for limit in key.limits if limit.id != FIVE_HOURS)]
        return fields

    # --- Checksums ----------------------------------------------------------------------------------------------

    async def checksums(
        self, planned: Sequence[Planned], now_us: int, *, updated: bool, progress: Progress = no_progress
    ) -> Checksums:
        """Read what was imported again, and compare it with the file."""
        included = (Standing.NEW, Standing.UNCHANGED, *((Standing.CHANGED,) if updated else ()))
        compared = sorted((p for p in planned if p.standing in included), key=lambda p: p.row.sha256)
        file, store = hashlib.sha256(), hashlib.sha256()
        store_keys = used_since = done = 0
        unequal = []
        for chunk in _chunks(compared, READS_AT_ONCE):
            keys = await self._each([p.id for p in chunk], self._key)
            usages = await self._each([p.id for p in chunk], self._usage)
            for p, key, usage in zip(chunk, keys, usages, strict=True):
                as_imported = _is_as_imported(usage)
                used_since += usage is not None and not as_imported
                expected = _canonical(self._shape, p.row, now_us, with_usage=as_imported)
                file.update(expected)
                if key is None:
                    unequal.append(p.row.path)
                    continue
                store_keys += 1
                row = row_of(key, usage, self._hasher, now_us)
                found = _canonical(self._shape, row, now_us, with_usage=as_imported)
                store.update(found)
                if found != expected:
                    unequal.append(p.row.path)
            done += len(chunk)
            progress(done, len(compared))
        return Checksums(
            f"sha256:{file.hexdigest()}", f"sha256:{store.hexdigest()}", len(compared), store_keys, used_since,
            len(planned) - len(compared), tuple(unequal),
        )  # fmt: skip

    # --- Reading ------------------------------------------------------------------------------------------------

    def _reader(self) -> Context:
        return Context(None, self._context.actor, self._context.claims)

    async def _key(self, id: str) -> ApiKey | None:
        return await self._database.get_or_none(self._reader(), ApiKey, id)

    async def _usage(self, id: str) -> KeyUsage | None:
        return await self._database.get_or_none(self._reader(), KeyUsage, id)

    @staticmethod
    async def _each(ids: Sequence[str], read: Callable[[str], Awaitable[T]]) -> list[T]:
        found: list[T] = []
        for chunk in _chunks(ids, READS_AT_ONCE):
            found += await asyncio.gather(*map(read, chunk))
        return found


# --- Export ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Exported:
    """A tenant's keys, rendered row by row in order of their creation, and what the shape has no place for.

    `left_out` and `lost` count keys by what is the matter with them.
    """

    rows: list[bytes] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)


async def export_keys(
    database: Database,
    hasher: Hasher,
    shape: Shape,
    tenant: str,
    context: Context,
    now_us: int,
    progress: Progress = no_progress,
) -> Exported:
    """Read all keys of a tenant. Keys that are changed meanwhile are in their old or their new state."""
    check_tenant(tenant)
    if tenant == ALL_TENANTS:
        raise InvalidInput([Problem("tenant", "keys for all tenants are management keys: they are not exported")])
    exported = Exported()
    rendered: list[tuple[int, bytes, bytes]] = []
    query, cursor, done = Query(Where("tenant", "==", tenant), ("-created_at",), MAX_LIMIT), None, 0
    while True:
        page = await database.find(context, ApiKey, query, cursor)
        usages = await asyncio.gather(*(database.get_or_none(context, KeyUsage, key.id) for key in page.items))
        for key, usage in zip(page.items, usages, strict=True):
            if not key.enabled:
                exported.left_out["is disabled, which the file cannot say: elsewhere it would work again"] += 1
                continue
            row = row_of(key, usage, hasher, now_us)
            exported.lost.update(_lost(shape, key))
            rendered.append((row.created_us, row.sha256, render_row(shape, row)))
        done += len(page.items)
        progress(done, done)
        cursor = page.next_cursor
        if cursor is None:
            break
    rendered.sort()
    exported.rows = [row for _, _, row in rendered]
    return exported


def _lost(shape: Shape, key: ApiKey) -> Iterator[str]:
    """What of a key the shape has no place for."""
    if key.permissions:
        yield "permissions"
    if key.allowed_ips:
        yield "addresses it may be used from"
    if key.previous_hash is not None:
        yield "an old text that still works"
    if shape == "plain":
        if key.user_id is not None:
            yield "a user"
        if any(limit.id != FIVE_HOURS for limit in key.limits):
            yield "limits other than tokens in 5 hours"
        if key.metadata.keys() - {"model"}:
            yield "metadata other than the model"
    else:
        if key.limits:
            yield "limits"
        if key.metadata:
            yield "metadata"


def row_of(key: ApiKey, usage: KeyUsage | None, hasher: Hasher, now_us: int) -> KeyRow:
    """A stored key as a row; without its text, which is not stored. StoreError if its SHA-256 cannot be opened."""
    sha256 = sha256_of_imported(key.hash)
    if sha256 is None:
        if key.sealed is None:
            raise StoreError(f"the key {key.id} has no sealed hash")
        sha256 = hasher.unseal(key.sealed)
    account = _account(usage)
    model = key.metadata.get("model")
    counter = RollingCounter(_WINDOW, account.unknown.get(FIVE_HOURS))
    created_us = us_from_utc(key.created_at) if key.created_at is not None else 0
    return KeyRow(
        path=key.id,
        sha256=sha256,
        text=None,
        name=key.name,
        user_id=key.user_id,
        model=model if isinstance(model, str) and model else None,
        token_limit=_token_limit(key),
        created_us=created_us,
        expires_us=None if key.expires_at is None else us_from_utc(key.expires_at),
        last_used_us=account.last_used_us,
        uses=account.count,
        tokens=account.totals.get("tokens", 0),
        windows=tuple(counter.buckets(now_us)),
    )


# --- Helpers --------------------------------------------------------------------------------------------------


_UNCHANGEABLE = frozenset({"created_at"})
_USAGE = frozenset({"last_used", "total_lifetime_tokens", "usage_windows", "usage_count"})


def _said(shape: Shape, row: KeyRow, now_us: int) -> dict[str, Any]:
    """All that a shape says of a key, as values to compare; of its windows, the buckets that count now."""
    said: dict[str, Any] = {"name": row.name, "created_at": _utc(row.created_us), "last_used": _utc(row.last_used_us)}
    if shape == "plain":
        return said | {
            "expiry_date": _utc(row.expires_us),
            "model": row.model,
            "token_limit_per_5h": row.token_limit,
            "total_lifetime_tokens": row.tokens,
            "usage_windows": _live(row, now_us),
        }
    return said | {"expires_at": _utc(row.expires_us), "user_id": row.user_id, "usage_count": row.uses}


def _canonical(shape: Shape, row: KeyRow, now_us: int, *, with_usage: bool) -> bytes:
    """What the checksums are made of: one line a key."""
    said = _said(shape, row, now_us)
    return _encode([row.sha256.hex(), {n: v for n, v in said.items() if with_usage or n not in _USAGE}]) + b"\n"


_encode = msgspec.json.Encoder().encode


def _is_as_imported(usage: KeyUsage | None) -> bool:
    """Whether a usage document is as it was made, and no charge has been written into it since."""
    return usage is not None and usage.active_at is None and usage.created_at == usage.updated_at


def _usage_of(shape: Shape, id: str, row: KeyRow, account: Account, now_us: int) -> KeyUsage:
    """A row's usage: the live part of its windows, its totals, the number and time of its uses. What the shape does not
    speak of stays as the account has it."""
    account.last_used_us = row.last_used_us
    if shape == "hashed":
        account.count = row.uses
        _set(account.totals, "requests", row.uses)
        return KeyUsage(id=id, **account.document())
    _set(account.totals, "tokens", row.tokens)
    account.unknown.pop(FIVE_HOURS, None)
    if live := _live(row, now_us):
        counter = RollingCounter(_WINDOW)
        for start_us, tokens in live:
            counter.add_at(start_us, tokens)
        account.counters[FIVE_HOURS] = counter
    return KeyUsage(id=id, **account.document())


def _set(totals: dict[str, int], resource: str, units: int) -> None:
    totals.pop(resource, None)
    if units:
        totals[resource] = units


def _live(row: KeyRow, now_us: int) -> list[tuple[int, int]]:
    """The row's windows that count now, as buckets of a minute."""
    counter = RollingCounter(_WINDOW)
    for start_us, tokens in row.windows:
        counter.add_at(start_us, tokens)
    return [bucket for bucket in counter.buckets(now_us) if bucket[1]]


def _account(usage: KeyUsage | None) -> Account:
    if usage is None:
        return Account()
    return Account({**KeyUsage.__codec__.encode(usage), "version": usage.version})


def _limits(token_limit: int | None) -> list[Limit]:
    return [] if token_limit is None else [Limit(resource="tokens", limit=token_limit, window=_WINDOW)]


def _token_limit(key: ApiKey) -> int | None:
    return next((int(limit.limit) for limit in key.limits if limit.id == FIVE_HOURS), None)


def _utc(us: int | None) -> datetime | None:
    return None if us is None else utc_from_us(us)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
