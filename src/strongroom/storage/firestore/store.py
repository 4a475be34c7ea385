"""The Firestore store: tenants' documents below `/tenants/{tenant}`, each batch one commit under its preconditions.

A version is Firestore's commit time in microseconds. It grows for each document whatever any machine's clock does, and
Firestore itself checks it as a precondition.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote

from ...entities import Aggregate, Collection, Document, Filter, Query
from ...errors import ConfigError, InvalidInput, SchemaError, StrongroomError, Unavailable
from ..port import (
    MAX_CHANGES_PAGE,
    MAX_TENANTS_PAGE,
    WHOLE_JOURNAL,
    Batch,
    Capabilities,
    ChangeKind,
    ChangesPage,
    Committed,
    Health,
    JournalFilter,
    JournalRow,
    RowsPage,
    SchemaChange,
)
from .client import RunQueryRequest, Wire, pause
from .group_commit import Writer
from .journal import Journal, shard_of
from .journal_upkeep import Upkeep
from .listener import Listener
from .paths import SCHEMA, TENANTS, Paths
from .places import Plan
from .query import Search
from .schema import FIRESTORE_RULES, MAX_ATTEMPTS, Known, Schema, firestore_indexes, lazy_fields, plan_of
from .values import micros

DEFAULT_COLLECTION = "api_keys"
DEFAULT_DATABASE = "(default)"


class FirestoreStore:
    """The storage port over one Firestore database.

    `keys_collection` is where API keys stand (FIRESTORE_COLLECTION); `emulator` is `host:port`, else
    FIRESTORE_EMULATOR_HOST, else Google's own service with the machine's credentials.
    """

    def __init__(
        self,
        project: str,
        database: str = DEFAULT_DATABASE,
        *,
        keys_collection: str = DEFAULT_COLLECTION,
        emulator: str | None = None,
    ) -> None:
        self.paths = Paths(project, database, keys_collection)
        self.wire = Wire(self.paths, emulator)
        self._schema = Schema(self.wire, self.paths)
        self._journal = Journal(self.wire, self.paths)
        self._upkeep = Upkeep(self.wire, self.paths, self._journal)
        self._writer = Writer(self.wire, self.paths, self._journal)
        self._listener = Listener(self.wire, self.paths, self._journal)
        self._plans: Mapping[str, Plan] = {}
        self._lazy: Mapping[str, frozenset[str]] = {}
        self._preparing = asyncio.Lock()
        self._closed: str | None = "the store is not open"
        self._clock: tuple[int, int] | None = None  # the store's time less this machine's monotonic one, and when

    @classmethod
    def from_url(cls, url: str) -> FirestoreStore:
        """`firestore://project/database?collection=api_keys&emulator=host:port`; ConfigError for anything else."""
        rest = url.partition("://")[2]
        where, _, options = rest.partition("?")
        project, _, database = where.partition("/")
        given = dict(parse_qsl(options, keep_blank_values=True))
        unknown = given.keys() - {"collection", "emulator"}
        if not project or "/" in database or unknown:
            found = f"the option {sorted(unknown)[0]!r}" if unknown else repr(url)
            raise ConfigError(
                f"store: found {found}, expected firestore://project/database?collection=…&emulator=host:port"
            )
        collection = given.get("collection") or DEFAULT_COLLECTION
        if "/" in collection or collection.startswith("_") or collection == TENANTS:
            raise ConfigError(f"store: collection {collection!r} is reserved or has a slash in it")
        return cls(
            unquote(project),
            unquote(database) or DEFAULT_DATABASE,
            keys_collection=collection,
            emulator=given.get("emulator"),
        )

    def deployment(self, collections: Sequence[Collection]) -> dict[str, str]:
        """The files that Google's tools deploy for these declarations: the texts of `firestore.indexes.json` and
        `firestore.rules` by their names. The store need not be open."""
        indexes = firestore_indexes(collections, self.paths.keys_collection or DEFAULT_COLLECTION)
        return {"firestore.indexes.json": json.dumps(indexes, indent=2) + "\n", "firestore.rules": FIRESTORE_RULES}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("firestore", multi_process=True, persistent=True)

    # --- Opening and closing ---

    async def open(self) -> None:
        if self._closed is None:
            return
        await self.wire.open()
        try:
            await self._schema.check_format()
        except BaseException:
            await self.wire.close()
            raise
        self._plans, self._lazy, self._writer.plans = {}, {}, {}
        self._closed = None

    async def close(self) -> None:
        if self._closed is None:
            self._closed = "the store is closed"
        await self._writer.drain()
        await self._listener.stop()
        await self.wire.close()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise Unavailable(f"firestore://{self.paths.project}/{self.paths.database}: {self._closed}")

    def _plan(self, collection: str) -> Plan:
        self._check_open()
        plan = self._plans.get(collection)
        if plan is None:
            raise InvalidInput(f"{collection}: the store was not prepared for this collection")
        return plan

    # --- Schema ---

    async def prepare(
        self,
        collections: Sequence[Collection],
        *,
        mode: Literal["apply", "plan"] = "apply",
        allow_destructive: bool = False,
    ) -> tuple[SchemaChange, ...]:
        self._check_open()
        async with self._preparing:
            for attempt in range(MAX_ATTEMPTS):
                known = await self._schema.read()
                changes = {c.name: await self._differences(c, known.get(c.name)) for c in collections}
                planned = tuple(change for some in changes.values() for change in some)
                if mode == "plan":
                    return planned
                refused = [change for change in planned if change.destructive]
                if refused and not allow_destructive:
                    raise SchemaError(
                        f"the declarations would lose stored data or not match it: {'; '.join(map(str, refused))}; "
                        "allow_destructive permits it"
                    )
                if await self._apply(collections, known, changes):
                    return planned
                await pause(attempt)  # another process prepares the same store: compare again
        raise Unavailable("prepare: other processes keep changing the schema")

    async def _differences(self, collection: Collection, known: Known | None) -> list[SchemaChange]:
        new = known is not None and any(name not in known.content["fields"] for name in collection.fields)
        return self._schema.differences(collection, known, new and await self._schema.has_documents(collection))

    async def _apply(
        self,
        collections: Sequence[Collection],
        known: Mapping[str, Known],
        changes: Mapping[str, list[SchemaChange]],
    ) -> bool:
        await self._writer.drain()
        lazy: dict[str, set[str]] = {}
        for collection in collections:
            before = known.get(collection.name)
            added = {c.name or "" for c in changes[collection.name] if c.kind is ChangeKind.ADD_FIELD}
            cleared = any(c.kind is ChangeKind.DROP_COLLECTION for c in changes[collection.name])
            kept = set() if before is None or cleared else set(lazy_fields(before.content)) & collection.fields.keys()
            lazy[collection.name] = kept | added
            if before is not None:
                await self._schema.check_unique(collection, changes[collection.name])
        for collection in collections:
            before = known.get(collection.name)
            if before is not None and changes[collection.name]:
                await self._schema.fit(collection, before, changes[collection.name])
        if not await self._schema.write(collections, known, lazy):
            return False
        self._plans = {c.name: plan_of(c) for c in collections}
        self._lazy = {name: frozenset(fields) for name, fields in lazy.items()}
        self._writer.plans = self._plans
        self._writer.seen.clear()
        return True

    # --- Reading ---

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        plan = self._plan(collection)
        if plan.placed_by is not None:
            return await self._get_placed(plan, tenant, id)
        try:
            name = self.paths.document(plan.collection, tenant, id)
        except InvalidInput:
            self.paths.parent(plan.collection, tenant)  # raises if the tenant is missing
            return None
        found = await self.wire.get(name)
        self._writer.keep(name, found)
        return None if found is None else plan.codec.document(found)

    async def _get_placed(self, plan: Plan, tenant: str | None, id: str) -> Document | None:
        """A document by its id, where another field places it. It may be moved during the read."""
        pointer = self.paths.reservation(plan.collection, tenant, "id", [id])
        seen = self._writer.lookup(pointer)
        place = seen.found.fields["place"].string_value if seen is not None and seen.found is not None else None
        for attempt in range(MAX_ATTEMPTS):
            if place is None:
                there = await self.wire.get(pointer)
                self._writer.keep(pointer, there)
                if there is None:
                    return None
                place = there.fields["place"].string_value
            name = self.paths.document(plan.collection, tenant, place)
            found = await self.wire.get(name)
            self._writer.keep(name, found)
            if found is not None and found.fields["id"].string_value == id:
                return plan.codec.document(found)
            place = None
            await pause(attempt)
        raise Unavailable(f"{plan.collection.name}/{id}: it is moved without a pause")

    async def tenants(self, after: str | None = None, limit: int = MAX_TENANTS_PAGE) -> list[str]:
        self._check_open()
        request = RunQueryRequest(parent=self.paths.documents)
        query = request.structured_query
        query.from_.add().collection_id = TENANTS
        query.order_by.add(direction=1).field.field_path = "__name__"
        query.limit.value = limit
        if after:
            query.start_at.before = False
            query.start_at.values.add().reference_value = self.paths.tenant(after)
        found, _ = await self.wire.query(request)
        return [document.fields["id"].string_value for document in found]

    async def now_us(self) -> int:
        """Firestore has no call for its clock, but each read returns its time."""
        self._check_open()
        began = time.monotonic_ns() // 1_000
        _, moment = await self.wire.batch_get([self.paths.internal(SCHEMA, "_config")])
        now = micros(moment)
        if self._clock is not None:
            now = max(now, self._clock[0] + began - self._clock[1])
        self._clock = now, began
        return now

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        return await self._search(collection, tenant).find(query)

    async def aggregate(
        self, collection: str, tenant: str | None, aggregates: Sequence[Aggregate], where: Filter | None
    ) -> dict[str, Any]:
        return await self._search(collection, tenant).aggregate(aggregates, where)

    def _search(self, collection: str, tenant: str | None) -> Search:
        return Search(self.wire, self.paths, self._plan(collection), tenant, self._lazy[collection])

    # --- Writing ---

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        if self._closed is not None:
            future: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
            future.set_exception(Unavailable(self._closed))
            return future
        return self._writer.commit(batch)

    # --- The journal ---

    async def changes(
        self, after: str | None, *, tenant: str | None = None, limit: int = MAX_CHANGES_PAGE
    ) -> ChangesPage:
        self._check_open()
        return await self._journal.changes(after, tenant, limit)

    async def rows(
        self, after: str | None = None, where: JournalFilter = WHOLE_JOURNAL, limit: int = MAX_CHANGES_PAGE
    ) -> RowsPage:
        self._check_open()
        return await self._journal.rows(after, where, limit)

    async def rewrite(self, rows: Sequence[JournalRow]) -> int:
        self._check_open()
        return await self._upkeep.rewrite(rows)

    async def drop(self, tenant: str | None, through_sequence: int) -> int:
        self._check_open()
        return await self._upkeep.drop(tenant, through_sequence)

    def on_change(self, callback: Callable[[], None]) -> None:
        self._check_open()
        self._listener.add(callback)

    async def check(self) -> Health:
        began = time.perf_counter()
        details: dict[str, Any] = {"project": self.paths.project, "database": self.paths.database}
        try:
            self._check_open()
            await self.wire.batch_get([self.paths.internal(SCHEMA, "_config")])
        except StrongroomError as error:
            return Health(False, time.perf_counter() - began, {**details, "problem": error.message})
        return Health(
            True,
            time.perf_counter() - began,
            {
                **details,
                "emulator": self.wire.emulator,
                "listening": self._listener.is_live,
                **self._writer.counts,
                **self.wire.billed,
            },
        )


__all__ = ["FirestoreStore", "shard_of"]
