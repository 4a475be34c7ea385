"""The tables behind the declarations, described once for every dialect with SQLAlchemy Core."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import sqlalchemy as sa

from ...entities import (
    Collection,
    FieldSpec,
    FieldType,
    Index,
)
from .dialect import Dialect


def index_name(collection: Collection, index: Index) -> str:
    """A name that says all of the index, so that two indexes of one name are alike: `notes.index.status.-created_at`.

    No collection has a dot in its name, so an index's name is never a table's.
    """
    return f"{collection.name}.{'unique' if index.unique else 'index'}.{'.'.join(index.fields)}"


def index_columns(collection: Collection, index: Index) -> tuple[tuple[str, bool], ...]:
    """(column, descending) pairs: the tenant first; the id last, so that a page in the index's order needs no sort."""
    columns = index.columns
    if not index.unique and all(name != "id" for name, _ in columns):
        columns = (*columns, ("id", columns[-1][1]))
    return ((("tenant_id", False),) if collection.tenant_scoped else ()) + columns


def describe(
    collection: Collection,
    dialect: Dialect,
    metadata: sa.MetaData,
    *,
    table: str | None = None,
    nullable: Container[str] = (),
) -> sa.Table:
    """The collection's table with its columns and primary key, perhaps under another name, and with columns that may
    be null though the declaration says otherwise (documents written before may have no value there)."""
    key = ("tenant_id", "id") if collection.tenant_scoped else ("id",)
    columns = [sa.Column(name, dialect.column_type(FieldType.TEXT), nullable=False) for name in key]
    columns.append(sa.Column("version", dialect.column_type(FieldType.INT), nullable=False))
    for name in ("created_at", "updated_at"):
        columns.append(sa.Column(name, dialect.column_type(FieldType.TIMESTAMP), nullable=False))
    for spec in collection.fields.values():
        columns.append(describe_field(spec, dialect, nullable=spec.optional or spec.name in nullable))
    return sa.Table(table or collection.name, metadata, *columns, sa.PrimaryKeyConstraint(*key), sqlite_strict=True)


def describe_field(spec: FieldSpec, dialect: Dialect, *, nullable: bool) -> sa.Column[Any]:
    """One declared field as a column."""
    default: Any = None if spec.default is None else sa.literal_column(dialect.literal(spec))
    rule = dialect.constraint(spec)
    return sa.Column(
        spec.name,
        dialect.column_type(spec.type),
        *([sa.CheckConstraint(rule)] if rule else []),
        nullable=nullable,
        server_default=default,
    )
