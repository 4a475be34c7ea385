"""The SQL texts that write one collection, compiled once for each shape of an operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...entities import FieldType
from ...errors import InvalidInput, Problem
from ..port import document_size
from ..sql import listed, quoted
from .isolation import Table

_VARIABLE = frozenset({FieldType.TEXT, FieldType.BYTES, FieldType.LIST, FieldType.MAP})


class Patches(NamedTuple):
    """How many documents are patched at once: `measured` are the positions of the values that make up their size."""

    sql: str
    encoders: Sequence[Callable[[Any], Any] | None]
    measured: tuple[int, ...]


class Statements:
    """The texts that write one collection."""

    def __init__(self, table: Table) -> None:
        name, codec = quoted(table.name), table.codec
        self.table = table
        self.encode = codec.encode
        marks = ", ".join("?" for _ in codec.columns)
        sets = "".join(f", {quoted(field)} = ?" for field in codec.fields)
        self.version = f"SELECT version FROM {name} WHERE id = ?"
        self.versions = f"SELECT id, version FROM {name} WHERE id IN (SELECT value FROM json_each(?))"
        self.insert = f"INSERT INTO {name} ({listed(codec.columns)}) VALUES ({marks})"
        self.delete = f"DELETE FROM {name} WHERE id = ? RETURNING version"
        self.delete_version = f"DELETE FROM {name} WHERE id = ? AND version = ? RETURNING version"
        self.times = f"UPDATE {name} SET created_at = ifnull(?, created_at), updated_at = ? WHERE id = ?"
        self.put = self._update(sets, "", "")
        self.put_version = self._update(sets, " AND version = ?", "")
        self._patches: dict[tuple[tuple[str, ...], bool], tuple[str, Sequence[Callable[[Any], Any] | None]]] = {}
        self._adds: dict[str, str] = {}
        self._many: dict[tuple[str, ...], Patches | None] = {}
        fields = codec.collection.fields.values()
        self.variable = tuple(i for i, spec in enumerate(fields) if spec.type in _VARIABLE)
        self.fixed_size = document_size({spec.name: 0 for spec in fields})
        lengths = [f"ifnull(octet_length({quoted(spec.name)}), 0)" for spec in fields if spec.type in _VARIABLE]
        self._length = " + ".join(lengths) or "0"

    def _update(self, sets: str, condition: str, returning: str) -> str:
        name = quoted(self.table.name)
        return (
            f"UPDATE {name} SET version = max(?, version + 1), updated_at = ?{sets} WHERE id = ?{condition} "
            f"RETURNING version{returning}"
        )

    def patch(self, fields: tuple[str, ...], versioned: bool) -> tuple[str, Sequence[Callable[[Any], Any] | None]]:
        """The text that sets these fields and answers the version and a measure of the size, and their encoders."""
        found = self._patches.get((fields, versioned))
        if found is None:
            codec = self.table.codec
            known = codec.collection.fields
            if unknown := [name for name in fields if name not in known]:
                raise InvalidInput([Problem(name, "is not a known field") for name in unknown])
            sets = "".join(f", {quoted(name)} = ?" for name in fields)
            sql = self._update(sets, " AND version = ?" if versioned else "", f", {self._length}")
            found = sql, [codec.dialect.encoders.get(known[name].type) for name in fields]
            self._patches[fields, versioned] = found
        return found

    def patches(self, fields: tuple[str, ...]) -> Patches | None:
        """The statement for many documents at once. None for unknown fields, and unless the fields determine the
        size of the whole document."""
        if fields not in self._many:
            if not self.table.codec.collection.fields.keys() >= set(fields):
                return None
            names = tuple(self.table.codec.fields)
            whole = {names[i] for i in self.variable}.issubset(fields) and not self.table.tenant_scoped
            sql, encoders = self.patch(fields, True)
            sql = sql[: sql.index(" RETURNING ")]  # the new version is known, and answering it doubles the time
            measured = tuple(i for i, name in enumerate(fields) if names.index(name) in self.variable)
            self._many[fields] = Patches(sql, encoders, measured) if whole else None
        return self._many[fields]

    def add(self, field: str) -> str:
        found = self._adds.get(field)
        if found is None:
            if field not in self.table.codec.fields:
                raise InvalidInput([Problem(field, "is not a known field")])
            column = quoted(field)
            found = self._update(f", {column} = {column} + ?", f" AND {column} BETWEEN ? AND ?", f", {column}")
            self._adds[field] = found
        return found
