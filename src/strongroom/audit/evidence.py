"""Writes the evidence pack: what an auditor takes away, and checks without the store (`journal.evidence_format`)."""

from __future__ import annotations

import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from functools import partial
from hashlib import sha256
from typing import IO, Any

import msgspec

from ..clock import Clock
from ..context import Context, us_from_utc, utc_from_us
from ..cooperative import Slices
from ..database import Database
from ..entities import MAX_LIMIT, MAX_PAGE_BYTES, Entity, Query
from ..errors import NotFound
from ..journal.evidence_format import FORMAT, KEYS, MANIFEST, NOTE, Manifest, Part, encoded, signed_text
from ..journal.export import export_tree, logged_tree, range_of_times
from ..journal.signed_note import SignedNote
from ..journal.trees import JournalTree, tree_id
from ..keys.model import MANAGEMENT, ApiKey
from ..storage.port import Store
from ..tenants import DeletionStatement, Role, ServiceAccount, User
from .proofs import Proofs

Source = Callable[[], AsyncIterator[Mapping[str, Any]]]
"""Gives the documents of a part, one a line."""
TREES = JournalTree.__collection__.name
_COMPRESSION = 1
"""The fastest: packs are read once."""
_encode = msgspec.json.Encoder(decimal_format="number").encode


class Evidence:
    """Makes evidence packs of one store. `statements`: further parts by name, such as `retention` and `legal-holds`."""

    def __init__(self, store: Store, database: Database, proofs: Proofs, clock: Clock) -> None:
        self._store = store
        self._database = database
        self._proofs = proofs
        self._clock = clock
        self.statements: dict[str, Source] = {}

    async def write(
        self, file: IO[bytes], since: datetime | None, until: datetime | None, *, context: Context
    ) -> Manifest:
        """Write a pack with every sealed record from `since` (inclusive) to `until` (exclusive). Records that are not
        sealed yet are left out. Raises NotFound if none is sealed."""
        origin = (await logged_tree(self._store, None)).log["origin"]
        parts: list[Part] = []
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION) as pack:
            keys = "".join(f"{key}\n" for key in await self._proofs.verifiers())
            parts.append(await _write(pack, KEYS, _one(keys.encode())))
            async for tenant in self._tenants():
                part = await self._records(pack, tenant, since, until)
                if part is not None:
                    parts.append(part)
            for path, source in self._sources().items():
                parts.append(await _write(pack, path, _lines(source)))
            manifest = Manifest(
                FORMAT, origin, _text(self._now()) or "", context.actor, _text(since), _text(until), parts
            )
            content = encoded(manifest)
            text = signed_text(origin, content)
            note = await self._proofs.sign_text(text) or str(SignedNote(text))
            pack.writestr(MANIFEST, content)
            pack.writestr(NOTE, note)
        return manifest

    def _now(self) -> datetime:
        return utc_from_us(self._clock.now_us())

    async def _tenants(self) -> AsyncIterator[str | None]:
        """The tenants that have a tree, after the platform."""
        yield None
        after: tuple[object, ...] | None = None
        while True:
            found = await self._store.find(TREES, None, Query(limit=MAX_LIMIT, start_after=after))
            for tree in found:
                if tree["tenant"] is not None:
                    yield tree["tenant"]
            if len(found) < MAX_LIMIT:
                return
            after = (found[-1]["id"],)

    async def _records(
        self, pack: zipfile.ZipFile, tenant: str | None, since: datetime | None, until: datetime | None
    ) -> Part | None:
        """Write a tenant's export; None if it has no sealed record of this time. The platform's is always written."""
        try:
            tree = await logged_tree(self._store, tenant)
        except NotFound:
            return None
        found = await range_of_times(self._store, tree, _us(since), _us(until))
        if found is None and tenant is not None:
            return None
        first, end = found if found is not None else (tree.reader.size, tree.reader.size)
        note = await self._proofs.note(tree)
        lines = export_tree(self._store, tree, note, first=first, end=end)
        return await _write(pack, f"records/{tree_id(tenant)}.jsonl", lines, tenant, end - first)

    # --- Who may do what ---

    def _sources(self) -> dict[str, Source]:
        entities: Mapping[str, type[Entity]] = {"users": User, "roles": Role, "service-accounts": ServiceAccount}
        return {
            "access/keys.jsonl": self._keys,
            **{f"access/{name}.jsonl": partial(self._of_tenants, cls) for name, cls in entities.items()},
            "statements/deletions.jsonl": partial(self._documents, DeletionStatement, None),
            **{f"statements/{name}.jsonl": source for name, source in self.statements.items()},
        }

    async def _keys(self) -> AsyncIterator[Mapping[str, Any]]:
        """The access review: every key that can be used, or could be until lately."""
        now = self._now()
        async for key in self._entities(ApiKey, None):
            yield {
                "id": key.id,
                "name": key.name,
                "display": key.display,
                "tenant": key.tenant,
                "user_id": key.user_id,
                "owner": key.owner,
                "status": _status(key, now),
                "permissions": [one for one in key.permissions if not one.startswith(MANAGEMENT)],
                "management": [one for one in key.permissions if one.startswith(MANAGEMENT)],
                "allowed_ips": key.allowed_ips,
                "created_at": key.created_at,
                "expires_at": key.expires_at,
                "last_used": key.last_used,
                "usage_count": key.usage_count,
            }

    async def _of_tenants(self, cls: type[Entity]) -> AsyncIterator[Mapping[str, Any]]:
        after: str | None = None
        while True:
            tenants = await self._store.tenants(after, MAX_LIMIT)
            for tenant in tenants:
                async for document in self._documents(cls, tenant):
                    yield {"tenant": tenant, **document}
            if len(tenants) < MAX_LIMIT:
                return
            after = tenants[-1]

    async def _documents(self, cls: type[Entity], tenant: str | None) -> AsyncIterator[Mapping[str, Any]]:
        async for entity in self._entities(cls, tenant):
            yield entity.model_dump()

    async def _entities(self, cls: type[Any], tenant: str | None) -> AsyncIterator[Any]:
        cursor: str | None = None
        context = Context(tenant, "system", {"admin": True})
        while True:
            query = Query(order_by=("id",), limit=MAX_LIMIT)
            page = await self._database.find(context, cls, query, cursor, max_bytes=MAX_PAGE_BYTES)
            for entity in page.items:
                yield entity
            if page.next_cursor is None:
                return
            cursor = page.next_cursor


def _status(key: ApiKey, now: datetime) -> str:
    if key.deleted_at is not None:
        return "deleted"
    if not key.enabled:
        return "disabled"
    return "expired" if key.is_expired(now) else "active"


def _us(moment: datetime | None) -> int | None:
    return None if moment is None else us_from_utc(moment)


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat().replace("+00:00", "Z")


# --- Parts ----------------------------------------------------------------------------------------------------


async def _write(
    pack: zipfile.ZipFile,
    path: str,
    lines: AsyncIterator[bytes],
    tenant: str | None = None,
    records: int | None = None,
) -> Part:
    """Write a part, and give its line of the manifest."""
    digest, size, slices = sha256(), 0, Slices()
    with pack.open(path, "w", force_zip64=True) as part:
        async for line in lines:
            part.write(line)
            digest.update(line)
            size += len(line)
            await slices.pause()
    return Part(path, digest.hexdigest(), size, tenant, records)


async def _lines(source: Source) -> AsyncIterator[bytes]:
    async for document in source():
        yield _encode(document) + b"\n"


async def _one(content: bytes) -> AsyncIterator[bytes]:
    yield content


__all__ = ["Evidence", "Source"]
