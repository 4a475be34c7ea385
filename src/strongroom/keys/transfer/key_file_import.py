"""Import of key files: compares the rows of a file with a store, writes what is new, and reads it back.

An imported key's id is made from the key's SHA-256, so a second run finds the keys that the first run has written: it
skips them and adds missing keys. Each key is committed together with its usage, many keys in one transaction. The same
import completes an import that was stopped. A file is read chunk by chunk
(`key_file_chunks`), so memory does not grow with the file, except for a byte a row.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ...access import ALL_TENANTS
from ...context import Context, check_tenant_name
from ...database import Database, Transaction
from ...entities import MAX_IN, MAX_LIMIT, Document, Query, Where
from ...errors import AlreadyExists, Conflict, InvalidInput, Problem
from ...limits import KeyUsage, UsageState
from ...storage.port import MAX_OPERATIONS
from ..hasher import Hasher
from ..model import ApiKey
from .import_plan import CODES, Checksums, Difference, Plan, Planned, Standing, Sums, in_groups
from .import_workers import Portion, Task, Workers
from .key_file import KeyRow, Shape
from .key_file_chunks import ChunkedKeyFile
from .key_file_rows import (
    UNCHANGEABLE,
    USAGE_SAID,
    Maker,
    canonical,
    id_of,
    is_as_imported,
    is_five_hours,
    limits_of,
    row_of,
    said,
    usage_document,
    utc,
)

KEYS_PER_COMMIT = MAX_OPERATIONS // 4
"""A key takes four operations at most: the key, its journal record, and its usage deleted and created again."""
COMMITS_AT_ONCE = 4
"""Transactions in flight: the store writes one, or several as a group, while the next are prepared."""
QUERIES_AT_ONCE = 8
FIRST_LOAD, MOST_LOADED = 1_000, 30_000
"""Keys in the first transaction of a load, and in the largest one, where others use the store."""
LOCKED_S = 0.5
"""The target time for such a transaction, during which others wait. The last one's time sets the size of the next."""
MIN_FILL, FILL_GROWTH = 100_000, 3
"""Keys at least in the second transaction that fills an empty store, and the growth of further ones: each adds this
many times the keys before it. Each rebuilds all indexes, so there are few."""
FEW_KEYS = 1_000
"""With fewer keys, the store counts as new: the import may keep the lock for long."""

_log = logging.getLogger(__name__)
MIN_FOR_WORKERS = 5_000
"""With fewer keys, the import would be over before a worker process has started."""
Progress = Callable[[int, int], None]
T = TypeVar("T")


def no_progress(done: int, total: int) -> None:
    """Progress is not reported."""


class KeyImport:
    """One import into a tenant of one store, by one actor: `plan`, then `apply`, then `checksums`.

    Each raises the errors of the database. `committed` counts committed keys, also after a stop. For a
    file that is read chunk by chunk: `compare`, `carry_out`, `check`; `workers` processes then read it beside this one,
    where that pays.
    """

    def __init__(
        self, database: Database, hasher: Hasher, shape: Shape, tenant: str, context: Context, *, workers: int = 0
    ) -> None:
        check_tenant_name(tenant)
        if tenant == ALL_TENANTS:
            raise InvalidInput([Problem("tenant", "keys for all tenants are management keys: they are not imported")])
        self._database = database
        self._hasher = hasher
        self._shape = shape
        self._tenant = tenant
        self._context = context
        self._workers = workers
        self._maker = Maker(hasher, shape, tenant)
        self.committed = 0

    # --- Plan ---------------------------------------------------------------------------------------------------

    async def plan(self, rows: Sequence[KeyRow], progress: Progress = no_progress) -> list[Planned]:
        """Compare the rows with the store. Reads only."""
        is_empty = not await self._some_keys(1)
        planned: list[Planned] = []
        for group in in_groups(rows, KEYS_PER_COMMIT):
            planned += [self._compare(row) for row in group] if is_empty else await self._plan(group)
            progress(len(planned), len(rows))
        return planned

    async def compare(self, source: ChunkedKeyFile, progress: Progress = no_progress) -> Plan:
        """As `plan`, for a file read chunk by chunk."""
        plan = Plan(few_keys=len(await self._some_keys(FEW_KEYS)) < FEW_KEYS)
        if not await self._some_keys(1):
            plan.counts[Standing.NEW] = source.accepted
            plan.standings = [None] * len(source.chunks)
            return plan
        for chunk in source.chunks:
            plan.add(await self._plan(source.rows(chunk)))
            progress(chunk.first + chunk.count, source.count)
        return plan

    async def _some_keys(self, limit: int) -> list[Document]:
        return (await self._database.select(self._reader(), ApiKey, Query(limit=limit, fields=()))).items

    async def _plan(self, rows: Sequence[KeyRow]) -> list[Planned]:
        found = await self._stored(rows)
        usages = await self._by_id(KeyUsage, [key["id"] for key in found.values()])
        return [
            self._compare(row, key, usages.get(key["id"]))
            if (key := found.get(row.sha256)) is not None
            else self._compare(row)
            for row in rows
        ]

    async def _stored(self, rows: Sequence[KeyRow]) -> dict[bytes, Document]:
        """The stored keys of these rows: imported keys by their id, the store's own keys by their hash."""
        ids = {id_of(row.sha256): row.sha256 for row in rows}
        found = {ids[id]: key for id, key in (await self._by_id(ApiKey, list(ids))).items()}
        rows_by_hash = {
            candidate: row.sha256
            for row in rows
            if row.sha256 not in found
            for candidate in self._hasher.candidates_of(row.sha256)
        }
        for name in ("hash", "previous_hash"):
            for key in await self._each(ApiKey, name, list(rows_by_hash)):
                found.setdefault(rows_by_hash[key[name]], key)
        return found

    def _compare(self, row: KeyRow, key: Document | None = None, usage: Document | None = None) -> Planned:
        if key is None:
            return Planned(row, id_of(row.sha256), Standing.NEW, self._tenant)
        if key["tenant"] != self._tenant:
            return Planned(row, key["id"], Standing.FOREIGN, key["tenant"])
        now_us = self._database.now_us()
        stored = row_of(key, usage, self._hasher, now_us)
        differences: tuple[Difference, ...] = ()
        if canonical(self._shape, row, now_us, with_usage=True) != canonical(
            self._shape, stored, now_us, with_usage=True
        ):
            differences = tuple(
                Difference(name, of_file, of_store)
                for (name, of_file), (_, of_store) in zip(
                    said(self._shape, row, now_us).items(), said(self._shape, stored, now_us).items(), strict=True
                )
                if of_file != of_store
                and name not in UNCHANGEABLE
                and (name not in USAGE_SAID or is_as_imported(usage))
            )
        if key["hash"] not in self._hasher.candidates_of(row.sha256):
            standing = Standing.ROTATED
        else:
            standing = Standing.CHANGED if differences else Standing.UNCHANGED
        return Planned(row, key["id"], standing, key["tenant"], differences)

    # --- Apply --------------------------------------------------------------------------------------------------

    async def apply(self, planned: Sequence[Planned], *, update: bool, progress: Progress = no_progress) -> None:
        """Add new keys and, with `update`, overwrite changed ones. Keys that were used here since keep their usage."""
        work = [p for p in planned if p.standing is Standing.NEW or (update and p.standing is Standing.CHANGED)]
        await self._apply(in_groups(work, KEYS_PER_COMMIT), lambda: progress(self.committed, len(work)))

    async def _apply(self, groups: Iterator[Sequence[Planned]], progress: Callable[[], None]) -> None:
        """Commit COMMITS_AT_ONCE groups at a time. Raises the first failure after the groups in flight have ended."""
        while some := [group for _, group in zip(range(COMMITS_AT_ONCE), groups, strict=False)]:
            results = await asyncio.gather(*map(self._apply_one, some), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            progress()

    async def _apply_one(self, group: Sequence[Planned]) -> None:
        try:
            await self._commit(group, fresh=True)
        except (AlreadyExists, Conflict):  # another process wrote, or a removed key left its usage
            await self._commit(await self._planned_again(group), fresh=False)
        self.committed += len(group)

    async def _planned_again(self, group: Sequence[Planned]) -> list[Planned]:
        """The rows of a group whose plan still holds. The others get their new standing."""
        again = []
        for was, now in zip(group, await self._plan([p.row for p in group]), strict=True):
            if now.standing is was.standing:
                again.append(now)
            was.id, was.standing, was.tenant, was.differences = now.id, now.standing, now.tenant, now.differences
        return again

    async def _commit(self, group: Sequence[Planned], *, fresh: bool) -> None:
        async def body(tx: Transaction) -> None:
            for planned in group:
                if planned.standing is Standing.CHANGED:
                    await self._update(tx, planned)
                    continue
                key = self._maker.key_of(planned.row)
                await tx.create(ApiKey(id=planned.id, created_at=utc(planned.row.created_us), **key))
                usage = KeyUsage(id=planned.id, **self._maker.usage_of(planned.row, tx.context.now_us))
                await (tx.create(usage) if fresh else tx.replace(usage))

        await self._database.transaction(self._writer(), body)

    async def _update(self, tx: Transaction, planned: Planned) -> None:
        names = {difference.field for difference in planned.differences}
        if names - USAGE_SAID:
            key = await tx.get(ApiKey, planned.id)
            await tx.update(ApiKey, planned.id, self._changed(planned.row, ApiKey.__codec__.encode(key)))
        if names & USAGE_SAID:
            found = await tx.get_or_none(KeyUsage, planned.id)
            usage = _document(found) if found is not None else None
            if usage is not None and is_as_imported(usage):  # else the key was used meanwhile
                # Created again: an update would make a later run take the key for used.
                await tx.delete(KeyUsage, planned.id)
                fields = usage_document(self._shape, planned.row, UsageState(usage), tx.context.now_us)
                await tx.create(KeyUsage(id=planned.id, **fields))
                copied = {"last_used": fields["last_used_at"], "usage_count": fields["count"]}
                await tx.update(ApiKey, planned.id, copied)

    def _changed(self, row: KeyRow, key: Document) -> dict[str, Any]:
        fields: dict[str, Any] = {"name": row.name, "expires_at": utc(row.expires_us)}
        if self._shape == "hashed":
            return fields | {"user_id": row.user_id}
        others = {name: value for name, value in key["metadata"].items() if name != "model"}
        fields["metadata"] = others if row.model is None else {**others, "model": row.model}
        kept = [limit for limit in key["limits"] if not is_five_hours(limit)]
        fields["limits"] = [*limits_of(row.token_limit), *kept]
        return fields

    # --- A file, chunk by chunk ---------------------------------------------------------------------------------

    async def carry_out(
        self, source: ChunkedKeyFile, plan: Plan, *, update: bool, progress: Progress = no_progress
    ) -> None:
        """As `apply`, for a file that `compare` has read."""
        total = plan.counts[Standing.NEW] + (plan.counts[Standing.CHANGED] if update else 0)
        wanted = frozenset({Standing.NEW, Standing.CHANGED} if update else {Standing.NEW})

        def told() -> None:
            progress(self.committed, total)

        loaded: set[int] = set()
        if (store := self._database.loading) is not None:
            new = bytes([CODES[Standing.NEW]])
            whole = [n for n, codes in enumerate(plan.standings) if codes is None or not codes.strip(new)]
            task = Task(source.without_rows(), self._maker, store.packer(), self._context.actor, self._tenant)
            loaded = await self._load(task, whole, plan.few_keys, told)
        for number, chunk in enumerate(source.chunks):
            rows = [] if number in loaded else plan.rows(number, source.rows(chunk), wanted)
            if rows:
                planned = [one for one in await self._plan(rows) if one.standing in wanted]
                await self._apply(in_groups(planned, KEYS_PER_COMMIT), told)

    async def _load(self, task: Task, numbers: Sequence[int], rebuild: bool, told: Callable[[], None]) -> set[int]:
        """Bulk-load chunks whose rows are all new, in growing transactions. Returns the numbers of the loaded chunks. A
        portion is not loaded if another process wrote one of its keys, or a removed key left its usage behind."""
        chunks = {task.source.chunks[number].first: number for number in numbers}
        count = sum(task.source.chunks[number].count for number in numbers)
        loaded: set[int] = set()
        async with Workers(task, self._workers if count >= MIN_FOR_WORKERS else 0) as workers:
            packs = workers.packs([task.source.chunks[number] for number in numbers])
            size, done = FIRST_LOAD, 0
            while done < count:
                portion = Portion(packs, size)
                locked_s = LOCKED_S
                try:
                    locked_s = await self._database.load_packs(self._writer(), ApiKey, portion, rebuild=rebuild)
                    self.committed += portion.keys
                    loaded.update(chunks[chunk.first] for chunk in portion.chunks)
                except (AlreadyExists, Conflict):
                    _log.info("%d keys are imported one by one: some are there by now", portion.keys)
                done += sum(chunk.count for chunk in portion.chunks)
                told()
                faster = min(2.0, LOCKED_S / max(locked_s, 0.001))
                if rebuild:
                    size = max(done * FILL_GROWTH, MIN_FILL)
                else:
                    size = round(min(max(size * faster, FIRST_LOAD), MOST_LOADED))
        return loaded

    async def check(
        self, source: ChunkedKeyFile, plan: Plan, now_us: int, *, updated: bool, progress: Progress = no_progress
    ) -> Checksums:
        """As `checksums`, for a file that `carry_out` has imported."""
        wanted = frozenset({Standing.NEW, Standing.UNCHANGED, *((Standing.CHANGED,) if updated else ())})
        sums = Sums()
        for number, chunk in enumerate(source.chunks):
            rows = plan.rows(number, source.rows(chunk), wanted)
            found = await self._stored(rows) if plan.standings[number] is not None else None
            ids = [key["id"] if found and (key := found.get(row.sha256)) else id_of(row.sha256) for row in rows]
            await self._add_sums(sums, list(zip(rows, ids, strict=True)), now_us)
            progress(chunk.first + chunk.count, source.count)
        return sums.of(source.accepted)

    # --- Checksums ----------------------------------------------------------------------------------------------

    async def checksums(
        self, planned: Sequence[Planned], now_us: int, *, updated: bool, progress: Progress = no_progress
    ) -> Checksums:
        """Read the imported keys back, and compare them with the file."""
        included = (Standing.NEW, Standing.UNCHANGED, *((Standing.CHANGED,) if updated else ()))
        compared = [p for p in planned if p.standing in included]
        sums = Sums()
        for group in in_groups(compared, KEYS_PER_COMMIT):
            await self._add_sums(sums, [(p.row, p.id) for p in group], now_us)
            progress(sums.file_keys, len(compared))
        return sums.of(len(planned))

    async def _add_sums(self, sums: Sums, rows: Sequence[tuple[KeyRow, str]], now_us: int) -> None:
        ids = [id for _, id in rows]
        keys, usages = await self._by_id(ApiKey, ids), await self._by_id(KeyUsage, ids)
        for row, id in rows:
            key, usage = keys.get(id), usages.get(id)
            as_imported = is_as_imported(usage)
            sums.used_since += usage is not None and not as_imported
            expected = canonical(self._shape, row, now_us, with_usage=as_imported)
            found = None
            if key is not None:
                stored = row_of(key, usage, self._hasher, now_us)
                found = canonical(self._shape, stored, now_us, with_usage=as_imported)
            sums.add(row.path, expected, found)

    # --- Reading ------------------------------------------------------------------------------------------------

    def _reader(self) -> Context:
        return Context(None, self._context.actor, self._context.claims)

    def _writer(self) -> Context:
        return Context(self._tenant, self._context.actor, self._context.claims)

    async def _by_id(self, cls: type[ApiKey | KeyUsage], ids: Sequence[str]) -> dict[str, Document]:
        return {document["id"]: document for document in await self._each(cls, "id", ids)}

    async def _each(self, cls: type[ApiKey | KeyUsage], name: str, values: Sequence[str]) -> list[Document]:
        """The documents whose unique field has one of these values: MAX_IN values a query, several queries at once."""
        found: list[Document] = []
        for some in in_groups(list(in_groups(values, MAX_IN)), QUERIES_AT_ONCE):
            queries = (Query(Where(name, "in", group), limit=MAX_LIMIT) for group in some)
            for page in await asyncio.gather(*(self._database.select(self._reader(), cls, q) for q in queries)):
                found += page.items
        return found


def _document(usage: KeyUsage) -> Document:
    own = {"id": usage.id, "version": usage.version, "created_at": usage.created_at, "updated_at": usage.updated_at}
    return {**KeyUsage.__codec__.encode(usage), **own}
