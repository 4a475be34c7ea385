"""One collection on PostgreSQL: the SQL that reads it, and the SQL that writes one document of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...entities import Collection, FieldType, Index
from ...errors import InvalidInput, Problem
from ..port import document_size
from ..sql import MAX_SHAPES, Codec, Compiler, listed, quoted
from .dialect import PostgresDialect
from .schema_tables import is_of_secrets, physical_indexes

_DIALECT = PostgresDialect()
Encoders = tuple[Callable[[Any], Any] | None, ...]
VARIABLE = frozenset({FieldType.TEXT, FieldType.BYTES, FieldType.LIST, FieldType.MAP})
_JSON = frozenset({FieldType.LIST, FieldType.MAP})

# A read of a tenant's documents is one statement in a transaction of its own. The inner query uses the tenant that the
# outer query returns, so set_config runs first; the row-level policy reads the setting later, at the first row. In the
# other order no row would be visible. The setting ends with the statement.
_OF_TENANT = (
    "SELECT n.* FROM (SELECT set_config('app.current_tenant', $1, true) AS tenant OFFSET 0) AS t "
    "CROSS JOIN LATERAL ({} OFFSET 0) AS n"
)
_OF_SECRETS = (
    "SELECT n.* FROM (SELECT set_config('app.secrets', 'on', true) AS secrets OFFSET 0) AS t "
    "CROSS JOIN LATERAL ({} OFFSET 0) AS n"
)


class Table:
    """SQL and codec of one collection in `schema`."""

    def __init__(self, schema: str, collection: Collection) -> None:
        self.name = collection.name
        self.collection = collection
        self.tenant_scoped = collection.tenant_scoped
        self.codec = codec = Codec(collection, _DIALECT)
        self.sql_name = name = f"{quoted(schema)}.{quoted(collection.name)}"
        self.next_version = f"nextval('{quoted(schema)}.strongroom_version'::regclass)"
        self.encode = codec.encode
        self.decode = codec.decode
        self.indexes: dict[str, Index] = physical_indexes(collection)
        self.of_secrets = is_of_secrets(collection)
        page = _OF_TENANT if self.tenant_scoped else _OF_SECRETS if self.of_secrets else "{}"
        scope, bound = ("n.tenant_id = t.tenant", 1) if self.tenant_scoped else (None, 0)
        if self.of_secrets:
            scope = "t.secrets = 'on'"
        self.pages = Compiler(codec, "n", page, totals=page, table=name, scope=scope, bound=bound)
        where = "tenant_id = t.tenant AND id = $2" if self.tenant_scoped else "id = $1"
        if self.of_secrets:
            where = f"t.secrets = 'on' AND {where}"
        self.by_id = page.format(f"SELECT {listed(codec.columns)} FROM {name} WHERE {where}")
        fields = collection.fields.values()
        self.variable = tuple(number for number, spec in enumerate(fields) if spec.type in VARIABLE)
        self.fixed_size = document_size({spec.name: 0 for spec in fields})
        lengths = [_length(spec.name, spec.type) for spec in fields if spec.type in VARIABLE]
        self.length = " + ".join(lengths) or "0"
        self.unique_fields = frozenset(
            name for index in collection.indexes if index.unique for name, _ in index.columns
        )
        self.texts: dict[tuple[Any, ...], str] = {}
        self._encoders: dict[tuple[str, ...], Encoders] = {}

    def encoders(self, fields: tuple[str, ...]) -> Encoders:
        """The encoders of these fields' values, None for a value that is stored as it is. InvalidInput if there is no
        such field."""
        found = self._encoders.get(fields)
        if found is None:
            known = self.collection.fields
            if unknown := [name for name in fields if name not in known]:
                raise InvalidInput([Problem(name, "is not a known field") for name in unknown])
            if len(self._encoders) >= MAX_SHAPES:
                self._encoders.clear()
            found = self._encoders[fields] = tuple(_DIALECT.encoders.get(known[name].type) for name in fields)
        return found


def _length(name: str, kind: FieldType) -> str:
    text = f"d.{quoted(name)}::text" if kind in _JSON else f"d.{quoted(name)}"
    return f"coalesce(octet_length({text}), 0)"


class Statements:
    """The SQL that writes one document of a collection in a transaction whose tenant is set."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._name = table.sql_name
        self._key_columns = ("tenant_id", "id") if table.tenant_scoped else ("id",)
        self._keys = len(self._key_columns)
        self.key = " AND ".join(f"d.{name} = ${n}" for n, name in enumerate(self._key_columns, 1))
        by_key = f"FROM {self._name} AS d WHERE {self.key}"
        self.version = f"SELECT d.version {by_key}"
        self.locked = f"SELECT d.version {by_key} FOR SHARE"
        self.stored = f"SELECT {', '.join(f'd.{quoted(c)}' for c in table.codec.columns)} {by_key}"
        self.delete = f"DELETE {by_key} RETURNING d.version"
        self.delete_version = f"DELETE {by_key} AND d.version = ${self._keys + 1} RETURNING d.version"
        columns = (*self._key_columns, "created_at", "updated_at", *table.codec.fields)
        marks = ", ".join(f"${n}" for n in range(1, len(columns) + 1))
        self.insert = (
            f"INSERT INTO {self._name} AS d (version, {listed(columns)}) VALUES ({table.next_version}, {marks}) "
            f"ON CONFLICT ({listed(self._key_columns)}) DO NOTHING RETURNING d.version"
        )
        self._update_texts: dict[tuple[tuple[str, ...], bool], str] = {}
        self._add_texts: dict[str, str] = {}

    def update(self, columns: tuple[str, ...], *, versioned: bool) -> str:
        """Sets `columns`; parameters: the key, [the version,] the columns. Returns the version and the length of the
        texts."""
        found = self._update_texts.get((columns, versioned))
        if found is None:
            first = self._keys + 1 + versioned
            sets = "".join(f", {quoted(column)} = ${n}" for n, column in enumerate(columns, first))
            condition = f" AND d.version = ${self._keys + 1}" if versioned else ""
            found = self._update_texts[columns, versioned] = (
                f"UPDATE {self._name} AS d SET version = {self.table.next_version}{sets} WHERE {self.key}{condition} "
                f"RETURNING d.version, {self.table.length}"
            )
        return found

    def add(self, field: str) -> str:
        """Parameters: the key, the time, the amount, the least and the greatest value of the field before."""
        found = self._add_texts.get(field)
        if found is None:
            self.table.encoders((field,))
            at, amount, low, high = (f"${self._keys + n}" for n in range(1, 5))
            column = quoted(field)
            found = self._add_texts[field] = (
                f"UPDATE {self._name} AS d SET version = {self.table.next_version}, updated_at = {at}, "
                f"{column} = d.{column} + {amount} WHERE {self.key} AND d.{column} BETWEEN {low} AND {high} "
                f"RETURNING d.version, d.{column}"
            )
        return found
