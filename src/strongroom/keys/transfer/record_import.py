"""Import of records: compares them with a store, and writes new and changed ones.

An imported key has its record's id, or an id made from its hash, so a second run finds the keys that the first run has
written: it skips them and adds missing keys. Each key is committed together with its usage, many keys in one
transaction. The same import completes an import that was stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import msgspec

from ...context import Context, utc_from_us
from ...database import Database, Transaction
from ...entities import MAX_IN, MAX_LIMIT, Entity, Query, Where, with_fields
from ...errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    NotFound,
    Problem,
    TooLarge,
)
from ...limits import ACTIVE_US, KeyUsage
from ...quotas import Quota
from ..foreign_hash import sha256_of
from ..hasher import Hasher, HintRule, imported_hmac
from ..import_source import add_rule, add_secret, secret_id
from ..model import ApiKey, due_at
from ..token import masked
from .import_plan import Difference, Standing, in_groups
from .key_file_import import KEYS_PER_COMMIT
from .record_bulk_load import MIN_LOADED, load
from .record_fields import UsageLine
from .record_file import (
    KeyRecord,
    QuotaRecord,
    Record,
    shown,
    too_many_hints,
)

T = TypeVar("T")
READS_AT_ONCE = 100
"""Documents that are read at the same time, one call for each."""
_PATTERN = ApiKey(tenant="pattern", name="pattern", hash="pattern", display="pattern")
_NOT_COMPARED = frozenset({"created_at", "previous_until", "display"})
"""Fields that never change after the import, or that a use or a rotation here may have changed."""


@dataclass(slots=True)
class PlannedRecord:
    """A record, its id in the store, and its standing there. `problem`: why it cannot be imported."""

    record: Record
    id: str
    standing: Standing
    differences: tuple[Difference, ...] = ()
    problem: tuple[str, str] | None = None
    """The field and the problem."""


class RecordImport:
    """One import into one store, by one actor: for each chunk of a file `plan`, then `apply`.

    `hmac_secret`: the secret of the system that made the file's HMACs. Each method raises the errors of the database.
    """

    def __init__(
        self, database: Database, hasher: Hasher, context: Context, *, hmac_secret: bytes | None = None
    ) -> None:
        self._database = database
        self._hasher = hasher
        self._context = context
        self._secret = hmac_secret
        self._secret_id = secret_id(hasher.imported, hmac_secret) if hmac_secret is not None else None
        self.committed = 0

    # --- Plan -----------------------------------------------------------------------------------------------------

    async def plan(self, records: Sequence[Record]) -> list[PlannedRecord]:
        """Compare records with the store. Reads only."""
        keys = await self._stored(records)
        quotas = await self._each([r.id for r in records if isinstance(r, QuotaRecord)], self._get(Quota))
        by_id = {quota.id: quota for quota in quotas if quota is not None}
        there = [entity.id for entity in (*keys.values(), *by_id.values())]
        usages = dict(zip(there, await self._each(there, self._get(KeyUsage)), strict=True))
        planned = []
        for record in records:
            entity: ApiKey | Quota | None
            entity = keys.get(record.id) if isinstance(record, KeyRecord) else by_id.get(record.id)
            planned.append(self._compare(record, entity, usages.get(entity.id) if entity is not None else None))
        await self._check_hints([p for p in planned if p.standing is Standing.NEW])
        return planned

    async def _stored(self, records: Sequence[Record]) -> dict[str, ApiKey]:
        """The stored keys of these records, by the record's id. A key is looked up by that id, then by its hash."""
        wanted = [record for record in records if isinstance(record, KeyRecord)]
        found = await self._each([record.id for record in wanted], self._get(ApiKey))
        keys = {record.id: key for record, key in zip(wanted, found, strict=True) if key is not None}
        names = {name: record.id for record in wanted if record.id not in keys for name in self._names(record)}
        for field_name in ("hash", "previous_hash"):
            for group in in_groups(list(names), MAX_IN):
                query = Query(Where(field_name, "in", tuple(group)), limit=MAX_LIMIT)
                for key in (await self._database.find(self._reader(), ApiKey, query, fresh=True)).items:
                    keys.setdefault(names[getattr(key, field_name)], key)
        return keys

    def _names(self, record: KeyRecord) -> list[str]:
        """Every form in which the store may have a record's hash. Empty for a salted hash, which has no lookup."""
        sha256 = sha256_of(record.hash)
        if sha256 is not None:
            return self._hasher.candidates_of(sha256)
        stored = self._stored_digest(record)
        return [stored] if stored is not None else []

    def _stored_digest(self, record: KeyRecord) -> str | None:
        """The stored form of a digest. None for a salted hash, and for an HMAC whose secret is new to the store."""
        if record.hash.kind == "hmac-sha256":
            hex_digest = record.hash.text.rpartition(":")[2]
            return imported_hmac(self._secret_id, hex_digest) if self._secret_id is not None else None
        return record.hash.text if record.hash.is_digest else None

    def _compare(self, record: Record, entity: ApiKey | Quota | None, usage: KeyUsage | None) -> PlannedRecord:
        if entity is None:
            return PlannedRecord(record, record.id, Standing.NEW)
        if entity.tenant != record.tenant:
            problem = f"is in the store already, for the tenant {entity.tenant!r}: a key belongs to one tenant"
            return PlannedRecord(record, entity.id, Standing.FOREIGN, problem=("", problem))
        differences = [
            Difference(name, value, getattr(entity, name))
            for name, value in record.fields.items()
            if name not in _NOT_COMPARED and getattr(entity, name) != value
        ]
        if record.usage is not None and (usage is None or _is_as_imported(usage)):
            made = _usage_of(record.id, record.usage)
            if usage is None or not _same_usage(made, usage):
                differences.append(Difference("usage", record.usage.count, usage.count if usage is not None else 0))
        standing = Standing.CHANGED if differences else Standing.UNCHANGED
        if isinstance(record, KeyRecord) and isinstance(entity, ApiKey) and self._was_rotated(record, entity):
            standing = Standing.ROTATED
        return PlannedRecord(record, entity.id, standing, tuple(differences))

    def _was_rotated(self, record: KeyRecord, key: ApiKey) -> bool:
        """Whether the key has another secret than the record. False if unknown: the first use of a key
        replaces a hash other than SHA-256, so nothing is left to compare."""
        sha256 = sha256_of(record.hash)
        if sha256 is not None:
            return key.hash not in self._hasher.candidates_of(sha256)
        return key.verifier is not None and not record.hash.is_digest and key.verifier != record.hash.text

    async def _check_hints(self, planned: Sequence[PlannedRecord]) -> None:
        """Mark the records whose hint has no free slot, because HINT_SLOTS keys have it already."""
        taken = await self._taken(p.record for p in planned)
        for p in planned:
            record = p.record
            if isinstance(record, KeyRecord) and _salted(record) is not None and _free(record, taken) is None:
                rule, hint = record.hint or (HintRule(), "")
                p.standing = Standing.FOREIGN
                p.problem = ("prefix" if rule.chars is None else "hint", too_many_hints(hint))

    async def _taken(self, records: Iterable[Record]) -> set[str]:
        """The stored names of these records' hints that other keys have already."""
        hints = {r.hint for r in records if isinstance(r, KeyRecord) and _salted(r) is not None and r.hint is not None}
        names = [name for rule, hint in hints for name in rule.names(hint)]
        taken: set[str] = set()
        for field_name in ("hash", "previous_hash"):
            for group in in_groups(names, MAX_IN):
                query = Query(Where(field_name, "in", tuple(group)), limit=MAX_LIMIT)
                page = await self._database.find(self._reader(), ApiKey, query, fresh=True)
                taken.update(getattr(key, field_name) for key in page.items)
        return taken

    # --- Apply ----------------------------------------------------------------------------------------------------

    async def apply(self, planned: Sequence[PlannedRecord], *, update: bool) -> None:
        """Add new records and, with `update`, overwrite changed ones. A record that was used since keeps its usage."""
        work = [p for p in planned if p.standing is Standing.NEW or (update and p.standing is Standing.CHANGED)]
        await self._prepare(work)
        new = [(p, p.record) for p in work if p.standing is Standing.NEW and isinstance(p.record, KeyRecord)]
        if await self._load(new):
            work = [p for p in work if p.standing is not Standing.NEW or isinstance(p.record, QuotaRecord)]
        for group in in_groups(work, KEYS_PER_COMMIT):
            try:
                await self._commit(group)
            except (AlreadyExists, Conflict, NotFound):  # another process wrote meanwhile
                await self._commit(await self._planned_again(group), replace_usage=True)

    async def _load(self, new: Sequence[tuple[PlannedRecord, KeyRecord]]) -> bool:
        """Bulk-load new keys. False, with nothing written, if the store cannot or another process wrote one of them."""
        if self._database.loading is None or len(new) < MIN_LOADED:
            return False
        taken = await self._taken(record for _, record in new)
        made = [(self._key(record, taken), _usage_of(p.id, record.usage or UsageLine())) for p, record in new]
        try:
            loaded = await load(self._database, self._context, made)
        except (AlreadyExists, Conflict):
            return False
        self.committed += len(new) if loaded else 0
        return loaded

    async def _prepare(self, work: Sequence[PlannedRecord]) -> None:
        """Store the hint rules and the secret that the lookup of these keys needs."""
        keys = [p.record for p in work if isinstance(p.record, KeyRecord)]
        for rule in {r.hint[0] for r in keys if r.hint is not None and _salted(r) is not None}:
            imported = await add_rule(self._database, self._hasher.imported, rule, self._context)
            self._hasher = self._hasher.with_imported(imported)
        if self._secret is not None and self._secret_id is None and any(r.hash.kind == "hmac-sha256" for r in keys):
            imported, self._secret_id = await add_secret(
                self._database, self._hasher, self._hasher.imported, self._secret, self._context
            )
            self._hasher = self._hasher.with_imported(imported)

    async def _planned_again(self, group: Sequence[PlannedRecord]) -> list[PlannedRecord]:
        """The records of a group whose plan still holds. The others get their new standing."""
        again = []
        for was, now in zip(group, await self.plan([p.record for p in group]), strict=True):
            if now.standing is was.standing:
                again.append(now)
            was.id, was.standing, was.differences, was.problem = now.id, now.standing, now.differences, now.problem
        return again

    async def _commit(self, work: Sequence[PlannedRecord], *, replace_usage: bool = False) -> None:
        """One transaction for each tenant, since a journal record has one tenant. Splits one that is too large."""
        taken = await self._taken(p.record for p in work if p.standing is Standing.NEW)
        tenants: dict[str, list[PlannedRecord]] = {}
        for planned in work:
            tenants.setdefault(planned.record.tenant, []).append(planned)
        for tenant, some in tenants.items():
            made = {p.id: self._entity(p.record, taken) for p in some if p.standing is Standing.NEW}

            async def body(
                tx: Transaction, some: Sequence[PlannedRecord] = some, made: Mapping[str, Entity] = made
            ) -> None:
                for p in some:
                    if p.standing is Standing.CHANGED:
                        await self._update(tx, p)
                        continue
                    await tx.create(made[p.id])
                    if p.record.usage is not None or isinstance(p.record, KeyRecord):
                        usage = _usage_of(p.id, p.record.usage or UsageLine())
                        await (tx.replace(usage) if replace_usage else tx.create(usage))

            try:
                await self._database.transaction(Context(tenant, self._context.actor, self._context.claims), body)
            except TooLarge:
                if len(some) == 1:
                    raise
                for half in (some[: len(some) // 2], some[len(some) // 2 :]):
                    await self._commit(half, replace_usage=replace_usage)
            else:
                self.committed += len(some)

    async def _update(self, tx: Transaction, planned: PlannedRecord) -> None:
        record = planned.record
        cls = ApiKey if isinstance(record, KeyRecord) else Quota
        names = {difference.field for difference in planned.differences} - {"usage"}
        fields = {name: record.fields[name] for name in names}
        if cls is ApiKey and names & {"next_rotation_at", "deleted_at"}:
            key = await tx.get(ApiKey, planned.id)
            fields["due_at"] = due_at(
                fields.get("next_rotation_at", key.next_rotation_at), fields.get("deleted_at", key.deleted_at)
            )
        if fields:
            await tx.update(cls, planned.id, fields)
        if record.usage is not None and any(difference.field == "usage" for difference in planned.differences):
            usage = await tx.get_or_none(KeyUsage, planned.id)
            if usage is not None and not _is_as_imported(usage):
                return  # the key was used meanwhile
            if usage is not None:
                await tx.delete(KeyUsage, planned.id)  # an update would make a later run take the key for used
            await tx.create(_usage_of(planned.id, record.usage))

    # --- Records as entities ----------------------------------------------------------------------------------------

    def _entity(self, record: Record, taken: set[str]) -> ApiKey | Quota:
        if isinstance(record, QuotaRecord):
            return Quota(id=record.id, tenant=record.tenant, **record.fields)
        return self._key(record, taken)

    def _key(self, record: KeyRecord, taken: set[str]) -> ApiKey:
        sha256 = sha256_of(record.hash)
        secret = record.secret
        fields = dict(record.fields)
        if "display" not in fields:
            fields["display"] = masked(secret) if secret is not None else _display(record)
        if fields.get("rotate_every_s") is not None and fields.get("next_rotation_at") is None:
            now = utc_from_us(self._database.now_us())
            fields["next_rotation_at"] = now + timedelta(seconds=fields["rotate_every_s"])
        usage = record.usage or UsageLine()
        return (
            with_fields(  # not validated again: that costs as much as the write, and the reader has judged the fields
                _PATTERN,
                id=record.id,
                tenant=record.tenant,
                hash=self._hasher.hash(secret)
                if secret is not None
                else self._stored_digest(record) or _slot(record, taken),
                sealed=self._hasher.seal(sha256) if secret is not None and sha256 is not None else None,
                previous_hash=self._previous(record, taken),
                verifier=_salted(record),
                last_used=usage.last_used_at,
                usage_count=usage.count,
                due_at=due_at(fields.get("next_rotation_at"), fields.get("deleted_at")),
                **fields,
            )
        )

    def _previous(self, record: KeyRecord, taken: set[str]) -> str | None:
        previous = record.previous
        if previous is None:
            return None
        if previous.kind == "hmac-sha256":
            return imported_hmac(self._secret_id or "", previous.text.rpartition(":")[2])
        return previous.text if previous.is_digest else _slot(record, taken)

    # --- Reading ----------------------------------------------------------------------------------------------------

    def _reader(self) -> Context:
        return Context(None, self._context.actor, self._context.claims)

    def _get(self, cls: type[T]) -> Callable[[str], Awaitable[T | None]]:
        async def get(id: str) -> T | None:
            return await self._database.get_or_none(self._reader(), cls, id, fresh=True)  # type: ignore[type-var]

        return get

    @staticmethod
    async def _each(ids: Sequence[str], read: Callable[[str], Awaitable[T]]) -> list[T]:
        found: list[T] = []
        for group in in_groups(ids, READS_AT_ONCE):
            found += await asyncio.gather(*map(read, group))
        return found


def _salted(record: KeyRecord) -> str | None:
    """The salted hash of a record, its present or previous one, which has no lookup without a hint."""
    if not record.hash.is_digest:
        return record.hash.text
    return record.previous.text if record.previous is not None and not record.previous.is_digest else None


def _free(record: KeyRecord, taken: set[str]) -> str | None:
    """Take a free name for a record's hint. None if all are taken."""
    rule, hint = record.hint or (HintRule(), "")
    name = next((name for name in rule.names(hint) if name not in taken), None)
    if name is not None:
        taken.add(name)
    return name


def _slot(record: KeyRecord, taken: set[str]) -> str:
    name = _free(record, taken)
    if name is None:
        raise InvalidInput([Problem("hint", too_many_hints(record.hint[1] if record.hint is not None else ""))])
    return name


def _display(record: KeyRecord) -> str:
    return f"{record.hint[1][:16]}…" if record.hint is not None and record.hint[1] else shown(record.hash)


# --- Usage ------------------------------------------------------------------------------------------------------


_NO_USAGE = KeyUsage()


def _usage_of(id: str, line: UsageLine) -> KeyUsage:
    more = {name for name in ("told", "months") if getattr(line, name)}
    return with_fields(
        _NO_USAGE,
        id=id,
        count=line.count,
        last_used_at=line.last_used_at,
        active_at=utc_from_us(line.at - line.at % ACTIVE_US) if line.at else None,
        state=msgspec.json.encode(line.model_dump(include={"totals", "counters", "at", *more})).decode(),
    )


def _is_as_imported(usage: KeyUsage) -> bool:
    """Whether a usage document is unchanged since the import."""
    return usage.created_at == usage.updated_at


def _same_usage(one: KeyUsage, other: KeyUsage) -> bool:
    return (one.count, one.last_used_at, msgspec.json.decode(one.state)) == (
        other.count,
        other.last_used_at,
        msgspec.json.decode(other.state),
    )
