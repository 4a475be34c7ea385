"""What the owner of a database can do to the journal behind Strongroom, on each store: direct SQL, raw Firestore
writes, an edited JSON file. The store must not be open in this process, except on a server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

import apsw
import asyncpg

from strongroom.storage.firestore.client import RunQueryRequest
from strongroom.storage.firestore.journal_documents import record_name
from strongroom.storage.firestore.paths import JOURNAL
from strongroom.storage.firestore.places import SHARDS
from strongroom.storage.firestore.store import FirestoreStore
from strongroom.storage.firestore.values import WritePb, put, take
from tests.helpers.servers.postgres import admin_dsn

Row = dict[str, Any]
"""A record as the store keeps it, with at least `sequence`, `id`, `actor` and `at_us`."""


class Owner(Protocol):
    async def records(self, tenant: str | None) -> list[Row]:
        """The records, in the order of their sequence."""
        ...

    async def write(self, old: Row | None, new: Row | None) -> None:
        """Replace a record (None: there is none) with another (None: remove it)."""
        ...

    async def documents(self, collection: str) -> list[Row]:
        """The documents of a global collection, in the order of their ids."""
        ...

    async def write_document(self, collection: str, id: str, document: Row | None) -> None:
        """Replace a document with another (None: remove it)."""
        ...


def owner_of(url: str) -> Owner:
    """The owner of the store at a URL."""
    scheme = urlsplit(url).scheme
    if scheme == "postgresql":
        return PostgresOwner(url)
    if scheme == "firestore":
        return FirestoreOwner(url)
    path = unquote(url.partition(":///")[2])
    return SqliteOwner(path) if scheme == "sqlite" else JsonOwner(Path(path))


class SqliteOwner:
    def __init__(self, path: str) -> None:
        self._path = path

    def _rows(self, sql: str, values: Any = ()) -> list[Row]:
        connection = apsw.Connection(self._path)
        try:
            found = []
            cursor = connection.cursor()
            for row in cursor.execute(sql, values):
                found.append({name: value for (name, *_), value in zip(cursor.get_description(), row, strict=True)})
            return found
        finally:
            connection.close()

    async def records(self, tenant: str | None) -> list[Row]:
        rows = self._rows("SELECT * FROM _journal WHERE tenant_id IS ? ORDER BY sequence", (tenant,))
        return [{name: value for name, value in row.items() if name != "at"} for row in rows]

    async def write(self, old: Row | None, new: Row | None) -> None:
        if old is not None:
            self._rows("DELETE FROM _journal WHERE sequence = ?", (old["sequence"],))
        if new is not None:
            self._insert("_journal", new)

    def _insert(self, table: str, row: Row) -> None:
        names = ", ".join(f'"{name}"' for name in row)
        marks = ", ".join("?" for _ in row)
        self._rows(f'INSERT INTO "{table}" ({names}) VALUES ({marks})', tuple(row.values()))

    async def documents(self, collection: str) -> list[Row]:
        return self._rows(f'SELECT * FROM "{collection}" ORDER BY id')

    async def write_document(self, collection: str, id: str, document: Row | None) -> None:
        self._rows(f'DELETE FROM "{collection}" WHERE id = ?', (id,))
        if document is not None:
            self._insert(collection, document)


class JsonOwner:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _read(self) -> Any:
        return json.loads(self._path.read_text())

    async def records(self, tenant: str | None) -> list[Row]:
        return [line for line in self._read()["journal"] if line["tenant"] == tenant]

    async def write(self, old: Row | None, new: Row | None) -> None:
        data = self._read()
        journal = [line for line in data["journal"] if old is None or line["sequence"] != old["sequence"]]
        data["floors"] = data["floors"] or [["another tenant", 0]]  # so that the store opens with a gap
        data["journal"] = sorted([*journal, *([new] if new is not None else [])], key=lambda line: line["sequence"])
        self._path.write_text(json.dumps(data))

    async def documents(self, collection: str) -> list[Row]:
        documents = self._read()["global"].get(collection, {})
        return [documents[id] for id in sorted(documents)]

    async def write_document(self, collection: str, id: str, document: Row | None) -> None:
        data = self._read()
        documents = data["global"].setdefault(collection, {})
        documents.pop(id, None)
        if document is not None:
            documents[id] = document
        self._path.write_text(json.dumps(data))


class PostgresOwner:
    """The server's superuser, to whom no policy applies."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._schema = dict(parse_qsl(parts.query))["schema"]
        self._dsn = admin_dsn(parts.port or 0, parts.path.lstrip("/"))

    async def execute(self, sql: str, *values: Any) -> list[Row]:
        connection = await asyncpg.connect(self._dsn, server_settings={"search_path": self._schema})
        try:
            return [dict(row) for row in await connection.fetch(sql, *values)]
        finally:
            await connection.close()

    async def _insert(self, table: str, row: Row) -> None:
        names = ", ".join(f'"{name}"' for name in row)
        marks = ", ".join(f"${number}" for number in range(1, len(row) + 1))
        await self.execute(f'INSERT INTO "{table}" ({names}) VALUES ({marks})', *row.values())

    async def records(self, tenant: str | None) -> list[Row]:
        sql = "SELECT * FROM strongroom_journal WHERE tenant_id IS NOT DISTINCT FROM $1 ORDER BY sequence"
        return await self.execute(sql, tenant)

    async def write(self, old: Row | None, new: Row | None) -> None:
        if old is not None:
            await self.execute("DELETE FROM strongroom_journal WHERE sequence = $1", old["sequence"])
        if new is not None:
            await self._insert("strongroom_journal", new)

    async def documents(self, collection: str) -> list[Row]:
        return await self.execute(f'SELECT * FROM "{collection}" ORDER BY id COLLATE "C"')

    async def write_document(self, collection: str, id: str, document: Row | None) -> None:
        await self.execute(f'DELETE FROM "{collection}" WHERE id = $1', id)
        if document is not None:
            await self._insert(collection, document)


class FirestoreOwner:
    """Whoever has a service account of the project."""

    def __init__(self, url: str) -> None:
        self._url = url

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[FirestoreStore]:
        store = FirestoreStore.from_url(self._url)
        await store.wire.open()
        try:
            yield store
        finally:
            await store.wire.close()

    async def _all(self, collection: str) -> list[Row]:
        async with self._opened() as store:
            request = RunQueryRequest(parent=store.paths.documents)
            request.structured_query.from_.add().collection_id = collection
            found, _ = await store.wire.query(request)
            return [{name: take(value) for name, value in document.fields.items()} for document in found]

    async def _write(self, collection: str, name: str, fields: Row | None) -> None:
        async with self._opened() as store:
            write = WritePb()
            if fields is None:
                write.delete = store.paths.internal(collection, name)
            else:
                write.update.name = store.paths.internal(collection, name)
                for field, value in fields.items():
                    put(write.update.fields[field], value)
            await store.wire.commit([write])

    async def records(self, tenant: str | None) -> list[Row]:
        rows = [row for row in await self._all(JOURNAL) if row["tenant"] == tenant]
        return sorted(rows, key=lambda row: row["sequence"])

    async def write(self, old: Row | None, new: Row | None) -> None:
        def name(row: Row) -> str:
            return record_name(row["sequence"] % SHARDS, row["sequence"] // SHARDS)

        if old is not None and (new is None or name(new) != name(old)):
            await self._write(JOURNAL, name(old), None)
        if new is not None:
            await self._write(JOURNAL, name(new), new)

    async def documents(self, collection: str) -> list[Row]:
        return sorted(await self._all(collection), key=lambda row: row["id"])

    async def write_document(self, collection: str, id: str, document: Row | None) -> None:
        await self._write(collection, id, document)
