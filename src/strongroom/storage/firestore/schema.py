"""Schema on Firestore: the stored declarations, their changes, and the files that Firestore's own tools deploy."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.cloud.firestore_v1.types import query as _query

from ...entities import Collection, Document, FieldSpec, FieldType, Index
from ...errors import SchemaError, StoreError, Unavailable
from ..port import ChangeKind, SchemaChange
from .client import PRECONDITION, Rejected, RunQueryRequest, Wire, pause, translated
from .paths import JOURNAL, JOURNAL_PARTS, SCHEMA, TENANTS, UNIQUE, Paths, decoded, last_of
from .places import SHARDS, Plan, values_of
from .query import collection_documents, composite_index
from .search_fields import PERIODS, REQUEST
from .values import COMMIT_FIELD, Codec, WritePb, default_of, micros, put_field, timestamp

FORMAT = 1
MAX_WRITES = 300
MAX_ATTEMPTS = 20
_PAGE = 300
_EQUAL: Any = _query.StructuredQuery.FieldFilter.Operator.EQUAL
Described = dict[str, Any]


def plan_of(collection: Collection) -> Plan:
    placed_by = collection.placed_by
    uniques = tuple(index for index in collection.indexes if index.unique and index.fields != (placed_by,))
    derive = _seed_names if collection.name == "api_keys" else None
    return Plan(collection, Codec(collection), uniques, placed_by, derive)


def _seed_names(key: Document) -> Document:
    """An API key's fields under the names that other readers of the database know (seeds 000 and 001)."""
    limits = key.get("limits") or []
    requests = next((limit["limit"] for limit in limits if limit.get("resource") == "requests"), None)
    return {"key_hash": key.get("hash"), "is_active": key.get("enabled"), "rate_limit": requests}


# --- Stored declarations ---------------------------------------------------------------------------------------


def described(collection: Collection, lazy: Iterable[str] = ()) -> Described:
    """A declaration as the store keeps it. `lazy` fields are missing in documents that were written before them."""
    lazy = frozenset(lazy)
    return {
        "scope": "tenant" if collection.tenant_scoped else "global",
        "fields": {
            spec.name: {"type": str(spec.type), "lazy": spec.name in lazy} for spec in collection.fields.values()
        },
        "indexes": [{"fields": list(index.fields), "unique": index.unique} for index in collection.indexes],
        "placed_by": collection.placed_by,
    }


def lazy_fields(known: Described) -> frozenset[str]:
    return frozenset(name for name, field in known["fields"].items() if field["lazy"])


@dataclass(frozen=True)
class Known:
    """One collection's schema document, and its version there (0: it is not there yet)."""

    content: Described
    version: int


class Schema:
    """The schema documents of one database."""

    def __init__(self, wire: Wire, paths: Paths) -> None:
        self._wire = wire
        self._paths = paths

    async def check_format(self) -> None:
        """Check the format of the database, or mark a new one. Raises StoreError for another format."""
        name = self._paths.internal(SCHEMA, "_config")
        for _ in range(MAX_ATTEMPTS):
            found = (await self._wire.batch_get([name]))[0].get(name)
            if found is not None:
                config = json.loads(found.fields["content"].string_value)
                if config != {"format": FORMAT, "shards": SHARDS}:
                    raise StoreError(
                        f"{self._paths.root}: has {config}, this version of Strongroom reads format {FORMAT} "
                        f"with {SHARDS} shards"
                    )
                return
            write = self._document("_config", {"format": FORMAT, "shards": SHARDS}, 0)
            try:
                await self._wire.commit([write])
            except Rejected as rejected:
                if rejected.code not in PRECONDITION:
                    raise translated(rejected.code, rejected.text, "open") from None
        raise Unavailable(f"{self._paths.root}: its format could not be written")

    async def read(self) -> dict[str, Known]:
        request = RunQueryRequest(parent=self._paths.documents)
        request.structured_query.from_.add().collection_id = SCHEMA
        found, _ = await self._wire.query(request)
        return {
            last_of(document.name): Known(
                json.loads(document.fields["content"].string_value), micros(document.update_time)
            )
            for document in found
            if last_of(document.name) != "_config"
        }

    def _document(self, name: str, content: Described, version: int) -> Any:
        write = WritePb()
        write.update.name = self._paths.internal(SCHEMA, name)
        write.update.fields["content"].string_value = json.dumps(content)
        if version:
            write.current_document.update_time.CopyFrom(timestamp(version))
        else:
            write.current_document.exists = False
        return write

    async def write(self, collections: Sequence[Collection], known: Mapping[str, Known], lazy: Mapping[str, set[str]]
                    ) -> bool:  # fmt: skip
        """Keep the declarations. False if another process has changed one of them meanwhile."""
        writes = []
        for collection in collections:
            before = known.get(collection.name)
            content = described(collection, lazy[collection.name])
            if before is None or before.content != content:
                writes.append(self._document(collection.name, content, before.version if before else 0))
        if not writes:
            return True
        try:
            await self._wire.commit(writes)
        except Rejected as rejected:
            if rejected.code in PRECONDITION:
                return False
            raise translated(rejected.code, rejected.text, "prepare") from None
        return True

    async def has_documents(self, collection: Collection) -> bool:
        request = collection_documents(self._paths, collection, ["id"])
        request.structured_query.limit.value = 1
        return bool((await self._wire.query(request))[0])

    async def documents(self, collection: Collection, select: Sequence[str]) -> AsyncIterator[list[Any]]:
        """All documents of a collection, of all tenants, in pages."""
        request = collection_documents(self._paths, collection, ["id", *select])
        query = request.structured_query
        query.limit.value = _PAGE
        while True:
            found, _ = await self._wire.query(request)
            if found:
                yield found
            if len(found) < _PAGE:
                return
            query.start_at.before = False
            del query.start_at.values[:]
            query.start_at.values.add().reference_value = found[-1].name

    def tenant_of(self, name: str) -> str | None:
        """The tenant of a document, from its name."""
        parts = name.removeprefix(self._paths.documents + "/").split("/")
        return decoded(parts[1]) if len(parts) == 4 and parts[0] == TENANTS else None

    # --- Differences ---

    def differences(self, collection: Collection, known: Known | None, has_documents: bool) -> list[SchemaChange]:
        """The changes that the store needs for one declaration."""
        name = collection.name
        if known is None:
            return [SchemaChange(ChangeKind.CREATE_COLLECTION, name)]
        there, wanted = known.content, described(collection)
        if there["scope"] != wanted["scope"] or there["placed_by"] != wanted["placed_by"]:
            detail = f"it is {_where(there)} in the store, {_where(wanted)} in the declaration"
            dropped = SchemaChange(ChangeKind.DROP_COLLECTION, name, destructive=True, detail=detail)
            return [dropped, SchemaChange(ChangeKind.CREATE_COLLECTION, name)]
        changes = []
        for spec in collection.fields.values():
            field = there["fields"].get(spec.name)
            if field is None:
                changes.append(_addition(name, spec, has_documents))
            elif field["type"] != spec.type:
                detail = f"from {field['type']} to {spec.type}"
                changes.append(SchemaChange(ChangeKind.CHANGE_FIELD, name, spec.name, destructive=True, detail=detail))
        for field_name in there["fields"].keys() - collection.fields.keys():
            changes.append(SchemaChange(ChangeKind.DROP_FIELD, name, field_name, destructive=True))
        for kind, here, other in (
            (ChangeKind.ADD_INDEX, wanted["indexes"], there["indexes"]),
            (ChangeKind.DROP_INDEX, there["indexes"], wanted["indexes"]),
        ):
            changes += [SchemaChange(kind, name, _index(one).name) for one in here if one not in other]
        return changes

    # --- Making documents fit ---

    async def fit(self, collection: Collection, known: Known, changes: Sequence[SchemaChange]) -> None:
        """Rewrite the documents: dropped fields go, changed ones get their default, unique values are reserved."""
        if any(change.kind is ChangeKind.DROP_COLLECTION for change in changes):
            await self._clear(collection, known)
            return
        reset = [c.name or "" for c in changes if c.kind is ChangeKind.CHANGE_FIELD]
        dropped = [c.name or "" for c in changes if c.kind is ChangeKind.DROP_FIELD]
        if reset or dropped:
            await self._rewrite(collection, reset, dropped)
        for index in _uniques(collection, changes, ChangeKind.ADD_INDEX, reset):
            await self._reserve(collection, index)
        for one in known.content["indexes"]:
            if one["unique"] and not any(index.unique and index == _index(one) for index in collection.indexes):
                await self._release(collection, _index(one).name)

    async def check_unique(self, collection: Collection, changes: Sequence[SchemaChange]) -> None:
        """SchemaError if two documents have one value of a unique index that is to be added."""
        reset = {c.name or "" for c in changes if c.kind is ChangeKind.CHANGE_FIELD}
        for index in _uniques(collection, changes, ChangeKind.ADD_INDEX, reset):
            holders: dict[tuple[Any, ...], str] = {}
            async for tenant, id, document, _ in self._each(collection, index, reset):
                values = values_of(index, document)
                if values is not None and (other := holders.setdefault((tenant, *values), id)) != id:
                    columns = " and ".join(name for name, _ in index.columns)
                    raise SchemaError(
                        f"add index {collection.name}.{index.name}: {other!r} and {id!r} have the same {columns}"
                    )

    async def _each(
        self, collection: Collection, index: Index, reset: Iterable[str] = ()
    ) -> AsyncIterator[tuple[str | None, str, Document, Any]]:
        codec = Codec(collection)
        columns = [name for name, _ in index.columns]
        system = {"id", "created_at", "updated_at"}
        async for page in self.documents(collection, [name for name in columns if name not in system]):
            for found in page:
                for name in reset:
                    if name in columns and name in found.fields:
                        put_field(found.fields[name], default_of(collection.fields[name]), collection.fields[name].type)
                yield self.tenant_of(found.name), found.fields["id"].string_value, codec.document(found), found

    async def _reserve(self, collection: Collection, index: Index) -> None:
        writes: list[Any] = []
        async for tenant, id, document, _ in self._each(collection, index):
            values = values_of(index, document)
            if values is not None:
                writes.append(self.reservation(collection, tenant, index, values, id))
            if len(writes) >= MAX_WRITES:
                await self._commit(writes)
                writes = []
        await self._commit(writes)

    def reservation(
        self, collection: Collection, tenant: str | None, index: Index, values: Sequence[Any], id: str
    ) -> Any:
        write = WritePb()
        write.update.name = self._paths.reservation(collection, tenant, index.name, values)
        write.update.fields["holder"].string_value = id
        write.update.fields["index"].string_value = f"{collection.name}.{index.name}"
        return write

    async def _release(self, collection: Collection, index: str) -> None:
        """Drop the reservations of one index."""
        request = RunQueryRequest(parent=self._paths.documents)
        query = request.structured_query
        query.from_.add().collection_id = UNIQUE
        only = query.where.field_filter
        only.field.field_path = "index"
        only.op = _EQUAL
        only.value.string_value = f"{collection.name}.{index}"
        query.limit.value = MAX_WRITES
        while True:
            found, _ = await self._wire.query(request)
            if not found:
                return
            await self._commit([WritePb(delete=document.name) for document in found])

    async def _rewrite(self, collection: Collection, reset: Sequence[str], dropped: Sequence[str]) -> None:
        commit = f"schema-{secrets.token_hex(8)}"
        async for page in self.documents(collection, [*reset, *dropped]):
            writes = []
            for found in page:
                write = WritePb()
                write.update.name = found.name
                for name in reset:
                    spec = collection.fields[name]
                    put_field(write.update.fields[name], default_of(spec), spec.type)
                write.update.fields[COMMIT_FIELD].string_value = commit
                write.update_mask.field_paths.extend([*reset, *dropped, COMMIT_FIELD])
                write.current_document.exists = True
                writes.append(write)
            await self._commit(writes)

    async def _clear(self, collection: Collection, known: Known) -> None:
        async for page in self.documents(collection, []):
            await self._commit([WritePb(delete=found.name) for found in page])
        for name in ("id", *(_index(one).name for one in known.content["indexes"] if one["unique"])):
            await self._release(collection, name)

    async def _commit(self, writes: list[Any]) -> None:
        if not writes:
            return
        for attempt in range(MAX_ATTEMPTS):
            try:
                await self._wire.commit(writes)
                return
            except Rejected as rejected:
                if rejected.code not in PRECONDITION:
                    raise translated(rejected.code, rejected.text, "prepare") from None
            await pause(attempt)
        raise Unavailable("prepare: documents are being changed without a pause; run it again")


def _where(content: Described) -> str:
    return f"{content['scope']}" + (f", placed by {content['placed_by']}" if content["placed_by"] else "")


def _index(one: Described) -> Index:
    return Index(*one["fields"], unique=one["unique"])


def _addition(name: str, spec: FieldSpec, has_documents: bool) -> SchemaChange:
    if has_documents and not spec.optional and not spec.has_default:
        detail = "it is required and has no default, and there are documents"
        return SchemaChange(ChangeKind.ADD_FIELD, name, spec.name, destructive=True, detail=detail)
    return SchemaChange(ChangeKind.ADD_FIELD, name, spec.name)


def _uniques(
    collection: Collection, changes: Sequence[SchemaChange], kind: ChangeKind, reset: Iterable[str]
) -> list[Index]:
    """The unique indexes that must be made again: those that are new, and those over a field that is changed."""
    named = {change.name for change in changes if change.kind is kind}
    fields = set(reset)
    return [
        index
        for index in plan_of(collection).uniques
        if index.name in named or fields & {name for name, _ in index.columns}
    ]


# --- Files for Firestore's own tools ---------------------------------------------------------------------------


def firestore_indexes(collections: Sequence[Collection], keys_collection: str = "api_keys") -> dict[str, Any]:
    """`firestore.indexes.json` for these declarations: composite indexes, exemptions, policies for the time to live."""
    paths = Paths("", "", keys_collection)
    composite: list[dict[str, Any]] = []
    overrides: list[dict[str, Any]] = []
    for collection in collections:
        group = paths.collection_id(collection)
        for index in collection.indexes:
            for entry in _composites(collection, group, index):
                if entry not in composite:
                    composite.append(entry)
        listed = {name for index in collection.indexes for name, _ in index.columns}
        for spec in collection.fields.values():
            exempt = spec.secret or (spec.type in (FieldType.MAP, FieldType.LIST) and spec.name not in listed)
            if exempt:
                overrides.append(_override(group, spec.name, []))
            elif spec.name == collection.ttl:
                overrides.append(_override(group, spec.name, _SINGLE, ttl=True))
        overrides.append(_override(group, COMMIT_FIELD, []))
    overrides += [_override(JOURNAL, name, _ASCENDING) for name in (REQUEST, *PERIODS)]
    for group, fields in (
        (JOURNAL, (*_NEVER_ASKED, COMMIT_FIELD)),
        (JOURNAL_PARTS, ("packed", COMMIT_FIELD)),
        (SCHEMA, ("content",)),
    ):
        overrides += [_override(group, name, []) for name in fields]
    return {"indexes": composite, "fieldOverrides": overrides}


_NEVER_ASKED = (
    "before", "after", "packed", "parts", "claims", "rules", "salt",
    "id", "at_us", "request_id", "sequence", "place", "version", "version_back",
)  # fmt: skip
"""Exemptions of the journal's fields: an index over a growing field limits a collection to 500 writes a second."""
_ASCENDING = [{"order": "ASCENDING", "queryScope": "COLLECTION"}]
_SINGLE = [{"order": "ASCENDING", "queryScope": "COLLECTION"}, {"order": "DESCENDING", "queryScope": "COLLECTION"}]


def _override(group: str, field: str, indexes: list[dict[str, str]], *, ttl: bool = False) -> dict[str, Any]:
    return {"collectionGroup": group, "fieldPath": field, "ttl": ttl, "indexes": indexes}


def _composites(collection: Collection, group: str, index: Index) -> list[dict[str, Any]]:
    """The composite indexes that a declared one stands for. Firestore ends each with the document's name, and has
    those over one field by itself; where a field places the documents, pages are ordered by the field `id` instead."""
    columns = list(index.columns)
    found = []
    if collection.placed_by is not None:
        if index.fields != (collection.placed_by,):
            found += [[*columns, ("id", columns[-1][1])], *([columns] if len(columns) > 1 else [])]
            equal = [name for name, _ in columns if name != "created_at"]
            found += [[*((n, False) for n in equal[:size]), ("id", False)] for size in range(1, len(equal) + 1)]
    elif len(columns) > 1:
        found.append(columns)
    return [composite_index(group, one) for one in found]


FIRESTORE_RULES = """rules_version = '2';

// Strongroom's servers reach the database with a service account, which these rules do not concern.
// Everybody else, such as a client with the web SDK, reaches nothing.
service cloud.firestore {
  match /databases/{database}/documents {
    match /tenants/{tenant}/{document=**} {
      allow read, write: if false;
    }
    match /{document=**} {
      allow read, write: if false;
    }
  }
}
"""
