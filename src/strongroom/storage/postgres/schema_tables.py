"""A declared collection on PostgreSQL: its table, its row-level security and its indexes, as DDL and as data.

An index's name describes it completely (`notes.index.status.-created_at`), so two indexes of one name are equal. A name
that is longer than PostgreSQL's identifiers is shortened with a hash; its comment has the whole name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable

from ...entities import SYSTEM_FIELDS, Collection, FieldSpec, FieldType, Index
from ..sql import describe, describe_field, index_columns, index_name, quoted
from .dialect import ENGINE, PostgresDialect

MAX_IDENTIFIER_BYTES = 63
"""PostgreSQL's NAMEDATALEN - 1; it cuts longer names silently."""
RESERVED_PREFIX = "strongroom_"
"""The prefix of the store's own tables; no collection's name may have it."""
OWN_COLUMNS = frozenset({"tenant_id", *SYSTEM_FIELDS})

DIALECT = PostgresDialect()
_HASH_DIGITS = 10


# --- Names ----------------------------------------------------------------------------------------------------


def identifier(name: str) -> str:
    """An identifier for a name (ASCII): the name itself, or its beginning and a hash of the whole."""
    if len(name) <= MAX_IDENTIFIER_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH_DIGITS]
    return f"{name[: MAX_IDENTIFIER_BYTES - _HASH_DIGITS - 1]}~{digest}"


def primary_key_name(collection: Collection) -> str:
    """The name of the primary key's constraint. The dot keeps it apart from every table's name."""
    return identifier(f"{collection.name}.key")


def physical_indexes(collection: Collection) -> dict[str, Index]:
    """The indexes that are built, by their names in PostgreSQL.

    A list field has none, as on SQLite: `@>` is not leakproof, so PostgreSQL never uses a GIN index below a row-level
    policy, and the index would only cost writes.
    """
    return {
        identifier(index_name(collection, index)): index
        for index in collection.indexes
        if all(collection.type_of(name) is not FieldType.LIST for name, _ in index.columns)
    }


# --- Tables ---------------------------------------------------------------------------------------------------


def described(collection: Collection, metadata: sa.MetaData) -> sa.Table:
    """The collection's table with its indexes, as SQLAlchemy Core and Alembic have it. `metadata` names the schema."""
    table = describe(collection, DIALECT, metadata)
    table.primary_key.name = primary_key_name(collection)
    for name, index in physical_indexes(collection).items():
        _described_index(table, collection, name, index)
    return table


def _described_index(table: sa.Table, collection: Collection, name: str, index: Index) -> sa.Index:
    columns: list[sa.ColumnElement[Any]] = []
    for field, descending in index_columns(collection, index):  # in the order that `PostgresDialect.order` gives
        column: sa.ColumnElement[Any] = table.c[field]
        if field in OWN_COLUMNS:
            columns.append(column.desc() if descending else column)
        else:
            columns.append(column.desc().nulls_last() if descending else column.asc().nulls_first())
    return sa.Index(name, *columns, unique=index.unique)


def _ddl(element: CreateTable | CreateColumn | CreateIndex) -> str:
    return str(element.compile(dialect=ENGINE)).strip()


def create_collection(schema: str, collection: Collection) -> str:
    """The script that makes the collection's table, its row-level security and its indexes."""
    table = described(collection, sa.MetaData(schema=schema))
    statements = [_ddl(CreateTable(table))]
    if is_secured(collection):
        statements += secure(schema, collection)
    for index in sorted(table.indexes, key=lambda item: str(item.name)):
        statements.append(_ddl(CreateIndex(index)))
    statements += comments_on(schema, collection)
    statements += [
        comment_on_index(schema, name, collection, index) for name, index in physical_indexes(collection).items()
    ]
    return ";\n".join(statements) + ";\n"


def comment_text(text: str) -> str:
    """A comment as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


_SYSTEM_COMMENTS = {
    "tenant_id": "The tenant whose document it is; row-level security compares it with app.current_tenant.",
    "id": "The document's id.",
    "version": "Greater with each change of the document; the ETag of the HTTP API.",
    "created_at": "When the document was made.",
    "updated_at": "When the document was last changed.",
}
_TENANT_COMMENT = "The tenant it concerns: what tenant_id is in the tables that are kept by tenant."


def comments_on(schema: str, collection: Collection) -> list[str]:
    """The statements that write comments on the collection's table and columns into the database."""
    table = f"{quoted(schema)}.{quoted(collection.name)}"
    kept = "One tenant's rows at a time." if collection.tenant_scoped else "Of all tenants, or of none."
    found = [f"COMMENT ON TABLE {table} IS {comment_text(f'{collection.doc} {kept}'.strip())}"]
    texts = {name: text for name, text in _SYSTEM_COMMENTS.items() if collection.tenant_scoped or name != "tenant_id"}
    for spec in collection.fields.values():
        parts = [spec.doc]
        if spec.name == "tenant" and not spec.doc and not collection.tenant_scoped:
            parts.append(_TENANT_COMMENT)
        if spec.secret:
            parts.append("Secret: never in the journal or a log.")
        if spec.name == collection.ttl:
            parts.append("From then on the document is gone, and is removed some time later.")
        if text := " ".join(filter(None, parts)):
            texts[spec.name] = text
    found += [f"COMMENT ON COLUMN {table}.{quoted(name)} IS {comment_text(text)}" for name, text in texts.items()]
    return found


def comment_on_index(schema: str, name: str, collection: Collection, index: Index) -> str:
    full = index_name(collection, index)
    return f"COMMENT ON INDEX {quoted(schema)}.{quoted(name)} IS '{full}'"


def create_index(schema: str, collection: Collection, name: str, *, concurrently: bool) -> str:
    """The statement that builds one of `physical_indexes`."""
    table = described(collection, sa.MetaData(schema=schema))
    index = next(item for item in table.indexes if item.name == name)
    text = _ddl(CreateIndex(index))
    return text.replace("INDEX ", "INDEX CONCURRENTLY ", 1) if concurrently else text


def add_column(spec: FieldSpec) -> str:
    """The clause of ALTER TABLE that adds a field to a table that may have rows.

    It is quick whatever the table's size: a constant default is kept in the catalogue and no row is touched. A field
    without a default may be null, for existing rows and for rows that older code still writes.
    """
    column = describe_field(spec, DIALECT, nullable=spec.optional or spec.default is None)
    table = sa.Table("t", sa.MetaData(), column)
    return f"ADD COLUMN {_ddl(CreateColumn(table.c[spec.name]))}"


# --- Row-level security ---------------------------------------------------------------------------------------

_OF_THIS_TENANT = "tenant_id = (SELECT nullif(current_setting('app.current_tenant', true), ''))"
"""The sub-select is evaluated once a statement. Unset reads null, but '' once a SET LOCAL has ended: hence nullif."""

_WITH_SECRETS = "(SELECT current_setting('app.secrets', true)) = 'on'"
"""For a collection that holds secrets alone (peppers): only a statement that sets `app.secrets` sees it."""


def is_of_secrets(collection: Collection) -> bool:
    """Whether a global collection holds secrets alone."""
    return not collection.tenant_scoped and bool(collection.fields) and collection.secrets == collection.fields.keys()


def is_secured(collection: Collection) -> bool:
    """Whether the collection's table is under row-level security."""
    return collection.tenant_scoped or is_of_secrets(collection)


_COMMANDS: Mapping[str, tuple[str, str]] = {
    "select": ("SELECT", "USING ({0})"),
    "insert": ("INSERT", "WITH CHECK ({0})"),
    "update": ("UPDATE", "USING ({0}) WITH CHECK ({0})"),
    "delete": ("DELETE", "USING ({0})"),
}


def secure(schema: str, collection: Collection, found: frozenset[str] = frozenset()) -> list[str]:
    """The statements that put a collection under row-level security: its owner too (FORCE), one policy a command.
    Policies in `found` are there and are replaced."""
    name = f"{quoted(schema)}.{quoted(collection.name)}"
    condition = _OF_THIS_TENANT if collection.tenant_scoped else _WITH_SECRETS
    statements = [f"DROP POLICY {quoted(policy)} ON {name}" for policy in sorted(found)]
    statements.append(f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    statements += [
        f"CREATE POLICY {policy_name(command)} ON {name} FOR {word} {text.format(condition)}"
        for command, (word, text) in _COMMANDS.items()
    ]
    return statements


def policy_name(command: str) -> str:
    """The policy of a command (`select`, …) on each collection that has some."""
    return f"tenant_{command}"


POLICY_NAMES = frozenset(map(policy_name, _COMMANDS))


_POLICY_EXPRESSION = "(tenant_id=(SELECTNULLIF(current_setting('app.current_tenant'::text,true),''::text)AS\"nullif\"))"
_SECRETS_EXPRESSION = "((SELECTcurrent_setting('app.secrets'::text,true)AScurrent_setting)='on'::text)"


def is_policy(collection: Collection, name: str, command: str, using: str | None, check: str | None) -> bool:
    """Whether a policy is one of those above, as the catalogue gives it back: its polcmd, its conditions as text."""
    letters = {policy_name("select"): "r", policy_name("insert"): "a", policy_name("update"): "w"}
    wanted = letters.get(name, "d")
    conditions = {"r": (True, False), "a": (False, True), "w": (True, True), "d": (True, False)}[wanted]
    expression = _POLICY_EXPRESSION if collection.tenant_scoped else _SECRETS_EXPRESSION
    return command == wanted and all(
        (text is not None and "".join(text.split()) == expression) if needed else text is None
        for text, needed in zip((using, check), conditions, strict=True)
    )


# --- Declarations as data -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """A declaration as it was last applied: it has what columns do not show (a list or a map, a default)."""

    tenant_scoped: bool
    fields: Mapping[str, Mapping[str, Any]]
    indexes: frozenset[str]


def declaration(collection: Collection) -> dict[str, Any]:
    """A collection as `strongroom_schema` keeps it, as JSON values."""
    return {
        "tenant_scoped": collection.tenant_scoped,
        "fields": {
            spec.name: {
                "type": str(spec.type),
                "optional": spec.optional,
                "default": None if spec.default is None else DIALECT.literal(spec),
            }
            for spec in sorted(collection.fields.values(), key=lambda spec: spec.name)
        },
        "indexes": sorted(physical_indexes(collection)),
    }


def stored(value: Mapping[str, Any]) -> Stored:
    """The declaration that `declaration` encoded."""
    return Stored(value["tenant_scoped"], value["fields"], frozenset(value["indexes"]))
