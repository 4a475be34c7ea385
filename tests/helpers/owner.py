"""What the owner of a database can do to the journal behind Strongroom, on each store: direct SQL, raw Firestore
writes, an edited JSON file. The store must not be open in this process, except on a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import apsw

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
