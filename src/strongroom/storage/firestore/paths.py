"""Document names in Firestore: made from tenants, collections, ids and unique values, and decoded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...entities import Collection
from ...errors import InvalidInput, Problem
from .. import tagged_json

MAX_SEGMENT_BYTES = 1_500
"""Firestore's limit for one part of a document's name."""

# Collections of entities begin with a letter, so these can never be one.
TENANTS = "tenants"
TENANT_RECORDS = "_strongroom_tenants"
UNIQUE = "_strongroom_unique"
SCHEMA = "_strongroom_schema"
JOURNAL = "_strongroom_journal"
JOURNAL_PARTS = "_strongroom_journal_parts"
HEADS = "_strongroom_heads"
FLOORS = "_strongroom_floors"

# A name in a path must not contain "/", be "." or "..", or look like "__x__". The escapes below keep the order of the
# UTF-8 bytes, so that documents ordered by name are ordered by id, without an index of their own:
#   "/" becomes "." U+10FFFF U+0002, which sorts after "." and anything else, and before "0";
#   "." U+10FFFF in an id becomes "." U+10FFFF U+0001, to be distinct from it;
#   a reserved name gets a U+0001 at its end, and so does a reserved name that ends with U+0001 already.
_HIGH = "\U0010ffff"
_SLASH, _DOT_HIGH = f".{_HIGH}\x02", f".{_HIGH}\x01"
_RESERVED = re.compile(r"(?:\.|\.\.|__.*__)\x01*", re.DOTALL)


def encoded(text: str) -> str:
    """An id or a tenant as a part of a path. Ids without anything special stay themselves; order is kept.

    Raises InvalidInput for what is too long once it is encoded: about 190 slashes.
    """
    name = text
    if "/" in name or _HIGH in name:
        name = name.replace(f".{_HIGH}", _DOT_HIGH).replace("/", _SLASH)
        if len(name.encode()) > MAX_SEGMENT_BYTES:
            found = f"found {len(name.encode())} bytes as a name in Firestore, expected at most {MAX_SEGMENT_BYTES}"
            raise InvalidInput([Problem("id", f"{found}: use fewer slashes")])
    return name + "\x01" if _RESERVED.fullmatch(name) else name


def decoded(name: str) -> str:
    """The text behind `encoded`'s."""
    if _RESERVED.fullmatch(name) and name.endswith("\x01"):
        name = name[:-1]
    return name.replace(_SLASH, "/").replace(_DOT_HIGH, f".{_HIGH}") if _HIGH in name else name


@dataclass(frozen=True, slots=True)
class Paths:
    """The names of one database's documents. `placed` is the collection that a placed entity stands in, by its own
    collection's name (FIRESTORE_COLLECTION)."""

    project: str
    database: str
    keys_collection: str | None = None

    @property
    def root(self) -> str:
        return f"projects/{self.project}/databases/{self.database}"

    @property
    def documents(self) -> str:
        return f"{self.root}/documents"

    def parent(self, collection: Collection, tenant: str | None) -> str:
        """The parent of a collection. Raises InvalidInput if the tenant is missing."""
        if not collection.tenant_scoped:
            return self.documents
        if tenant is None:
            raise InvalidInput([Problem("tenant", f"is needed: {collection.name} belongs to tenants")])
        return self.tenant(tenant)

    def tenant(self, tenant: str) -> str:
        return f"{self.documents}/{TENANTS}/{encoded(tenant)}"

    def collection_id(self, collection: Collection) -> str:
        """The last part of the collection's path."""
        if collection.name == "api_keys" and self.keys_collection is not None:
            return self.keys_collection
        if collection.name == TENANTS:  # `tenants/{tenant}` is the parent of a tenant's documents
            return TENANT_RECORDS
        return collection.name

    def document(self, collection: Collection, tenant: str | None, segment: str) -> str:
        """`segment` is the id, or what a placed collection's field holds."""
        return f"{self.parent(collection, tenant)}/{self.collection_id(collection)}/{encoded(segment)}"

    def reservation(self, collection: Collection, tenant: str | None, index: str, values: Sequence[object]) -> str:
        """The document that reserves these values of a unique index for their holder."""
        scope = tenant if collection.tenant_scoped else None
        held = [scope is not None, scope or "", collection.name, index, *(tagged_json.tag(value) for value in values)]
        text = json.dumps(held, ensure_ascii=False, separators=(",", ":"))
        return self.internal(UNIQUE, hashlib.sha256(text.encode()).hexdigest())

    def internal(self, collection: str, name: str) -> str:
        return f"{self.documents}/{collection}/{name}"


def last_of(name: str) -> str:
    """The last part of a document's name, as it is in the path."""
    return name.rpartition("/")[2]
