"""The differences between declared collections and their tables on PostgreSQL, and the changes to announce.

Alembic's comparison finds columns and indexes; what it does not look at (row-level security, collations, indexes that
a failed build left behind) is read here, and what columns cannot tell (a list from a map, a default) is in the
declaration that was last applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from ...entities import Collection, FieldSpec
from ...errors import SchemaError
from ..port import ChangeKind, SchemaChange
from ..sql import quoted
from .schema_tables import OWN_COLUMNS, POLICY_NAMES, Stored, declaration, is_policy, is_secured, physical_indexes

# --- What Alembic does not compare ----------------------------------------------------------------------------

_BESIDE = """
SELECT relname::text AS name, relrowsecurity AND relforcerowsecurity AS secured,
    ARRAY(SELECT ROW(polname::text, polcmd::text, polpermissive AND polroles = '{0}',
            pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid))
        FROM pg_policy WHERE polrelid = pg_class.oid) AS policies,
    ARRAY(SELECT indexed.relname::text FROM pg_index JOIN pg_class AS indexed ON indexed.oid = indexrelid
        WHERE indrelid = pg_class.oid AND NOT (indisvalid AND indisready)) AS invalid,
    ARRAY(SELECT attname::text FROM pg_attribute LEFT JOIN pg_collation ON pg_collation.oid = attcollation
        WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped AND attcollation <> 0
        AND collname <> 'C') AS collated
FROM pg_class WHERE relnamespace = $1::text::regnamespace AND relname = ANY($2::text[])
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """The differences of one existing collection: the work to do."""

    collection: Collection
    rescoped: bool = False
    """The table is scoped by tenant and the declaration is not, or the other way round: the table is made anew."""
    added: tuple[FieldSpec, ...] = ()
    retyped: Mapping[str, str] = field(default_factory=dict)
    """Fields of another type, with the text to announce for each."""
    nullable: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    new_indexes: tuple[str, ...] = ()
    """Declared indexes that are missing or invalid, by their names in PostgreSQL."""
    rebuilt_indexes: tuple[str, ...] = ()
    """Declared indexes that exist and are dropped with a retyped column."""
    old_indexes: tuple[str, ...] = ()
    """Indexes that are not declared, or that a failed build left invalid."""
    policies: frozenset[str] | None = None
    """The policies that are there, if row-level security must be set up again."""

    @property
    def needs_values(self) -> bool:
        """Whether a required field without a default is added."""
        return any(_is_demanding(spec) for spec in self.added)


def _is_demanding(spec: FieldSpec) -> bool:
    return not spec.optional and not spec.has_default


async def compare(
    connection: asyncpg.Connection, schema: str, collections: Sequence[Collection], applied: Mapping[str, Stored]
) -> list[Difference]:
    """What differs in each of `collections`, whose tables are there. SchemaError for what cannot be declared."""
    if not collections:
        return []
    from .schema_alembic import operations  # slow to import, and most starts do not need it

    names = [collection.name for collection in collections]
    beside = {row["name"]: row for row in await connection.fetch(_BESIDE, quoted(schema), names)}
    by_table: dict[str, list[tuple[Any, ...]]] = {name: [] for name in names}
    for operation in await operations(connection, schema, collections):
        by_table[_table_of(operation)].append(operation)
    return [
        _difference(collection, by_table[collection.name], beside[collection.name], applied.get(collection.name))
        for collection in collections
    ]


def _table_of(operation: tuple[Any, ...]) -> str:
    match operation:
        case ("add_index" | "remove_index" | "add_constraint" | "remove_constraint", item):
            return str(item.table.name)
        case (_, table):
            return str(table.name)
        case _:
            return str(operation[2])


@dataclass(slots=True)
class _Physical:
    """Alembic's operations on one table, by their kind."""

    added: set[str] = field(default_factory=set)
    retyped: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    nullable: list[str] = field(default_factory=list)
    tightened: set[str] = field(default_factory=set)
    new_indexes: set[str] = field(default_factory=set)
    old_indexes: set[str] = field(default_factory=set)


def _physical(collection: Collection, operations: Sequence[tuple[Any, ...]]) -> _Physical:
    found = _Physical()
    for operation in operations:
        match operation:
            case ("add_column", _, _, column):
                found.added.add(column.name)
            case ("remove_column", _, _, column):
                found.dropped.append(column.name)
            case ("modify_type", _, _, name, _, was, wanted):
                found.retyped[name] = f"from {str(was).lower()} to {str(wanted).lower()}"
            case ("modify_nullable", _, _, name, _, _, may_be_null):
                if may_be_null:
                    found.nullable.append(name)
                else:
                    found.tightened.add(name)
            case ("add_index", index):
                found.new_indexes.add(index.name)
            case ("remove_index", index):
                found.old_indexes.add(index.name)
            case _:
                raise SchemaError(f"{collection.name}: its table was changed by hand ({operation[0]}): undo that first")
    return found


def _difference(
    collection: Collection, operations: Sequence[tuple[Any, ...]], beside: Mapping[str, Any], applied: Stored | None
) -> Difference:
    found = _physical(collection, operations)
    if "tenant_id" in found.added or "tenant_id" in found.dropped:
        return Difference(collection, rescoped=True)
    touched = {*found.added, *found.retyped, *found.dropped, *found.nullable, *found.tightened}
    if damaged := sorted(touched & OWN_COLUMNS):
        raise SchemaError(f"{collection.name}: its column {damaged[0]} was changed by hand: undo that first")
    retyped = found.retyped
    for name in beside["collated"]:
        if name in collection.fields:
            retyped.setdefault(name, "its collation was changed by hand")
    defaults = []
    for name, spec in (declaration(collection)["fields"] if applied is not None else {}).items():
        before = applied.fields.get(name) if applied is not None else None
        if before is None or name in found.added:
            continue
        if before["type"] != spec["type"]:  # says more than the column types, and lists and maps share one
            retyped[name] = f"from {before['type']} to {spec['type']}"
        elif before["default"] != spec["default"] and name not in retyped:
            defaults.append(name)
    invalid = set(beside["invalid"])
    declared = physical_indexes(collection)
    with_retyped = {name for name, index in declared.items() if any(column in retyped for column, _ in index.columns)}
    new_indexes = found.new_indexes | (invalid & declared.keys())
    policies = frozenset(name for name, *_ in beside["policies"])
    as_made = all(
        plain and is_policy(collection, name, command, *texts) for name, command, plain, *texts in beside["policies"]
    )
    secured = beside["secured"] and policies == POLICY_NAMES and as_made
    return Difference(
        collection,
        added=tuple(spec for spec in collection.fields.values() if spec.name in found.added),
        retyped={name: retyped[name] for name in collection.fields if name in retyped},
        nullable=tuple(name for name in found.nullable if name not in retyped),
        defaults=tuple(defaults),
        dropped=tuple(found.dropped),
        new_indexes=tuple(sorted(new_indexes)),
        rebuilt_indexes=tuple(sorted(with_retyped - new_indexes)),
        old_indexes=tuple(sorted(found.old_indexes | invalid)),
        policies=policies if is_secured(collection) and not secured else None,
    )


# --- The changes to announce ------------------------------------------------------------------------------------


def changes_of(difference: Difference, has_documents: bool) -> tuple[SchemaChange, ...]:
    """The changes to announce. `has_documents` matters where `difference.needs_values`."""
    collection = difference.collection
    name = collection.name
    if difference.rescoped:
        scopes = ("global", "tenant") if collection.tenant_scoped else ("tenant", "global")
        detail = f"its scope is {scopes[0]} in the store, {scopes[1]} in the declaration"
        dropped = SchemaChange(ChangeKind.DROP_COLLECTION, name, destructive=True, detail=detail)
        return (dropped, SchemaChange(ChangeKind.CREATE_COLLECTION, name))
    changes = []
    for spec in collection.fields.values():
        if spec in difference.added:
            demanding = has_documents and _is_demanding(spec)
            detail = "it is required and has no default, and there are documents" if demanding else ""
            changes.append(SchemaChange(ChangeKind.ADD_FIELD, name, spec.name, destructive=demanding, detail=detail))
        elif detail := difference.retyped.get(spec.name, ""):
            changes.append(SchemaChange(ChangeKind.CHANGE_FIELD, name, spec.name, destructive=True, detail=detail))
        elif spec.name in difference.nullable:
            changes.append(SchemaChange(ChangeKind.CHANGE_FIELD, name, spec.name, detail="it may be null"))
        elif spec.name in difference.defaults:
            changes.append(SchemaChange(ChangeKind.CHANGE_FIELD, name, spec.name, detail="its default"))
    changes += [SchemaChange(ChangeKind.DROP_FIELD, name, field, destructive=True) for field in difference.dropped]
    declared = physical_indexes(collection)
    changes += [
        SchemaChange(ChangeKind.ADD_INDEX, name, index.name)
        for full_name, index in declared.items()
        if full_name in difference.new_indexes
    ]
    changes += [
        SchemaChange(ChangeKind.DROP_INDEX, name, full_name.removeprefix(f"{name}."))
        for full_name in difference.old_indexes
        if full_name not in declared
    ]
    if difference.policies is not None:
        changes.append(SchemaChange(ChangeKind.CHANGE_POLICIES, name, detail="row-level security was changed"))
    return tuple(changes)
