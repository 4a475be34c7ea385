"""PostgreSQL's schema: what an apply creates, what a plan finds, and which schemas are refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Annotated

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from strongroom.app import SYSTEM_ENTITIES
from strongroom.entities.entity import Collection, Entity, FieldSpec, FieldType, Index, Secret
from strongroom.errors import SchemaError, StoreError
from strongroom.storage.port import ChangeKind
from strongroom.storage.postgres.schema import prepare
from strongroom.storage.postgres.schema_tables import identifier, is_of_secrets, physical_indexes
from strongroom.testing.storage.backend import examples
from strongroom.testing.storage.samples import COLLECTIONS
from strongroom.testing.storage.schema import declare
from tests.helpers.postgres_schema import (
    NOW,
    RANK,
    REQUIRED,
    Place,
    catalog,
    documents,
    insert,
    kinds,
    on_each_version,
    told,
)

# --- What is made ---------------------------------------------------------------------------------------------


@on_each_version
async def test_every_tenant_table_has_forced_policies_and_indexes_led_by_the_tenant(
    connection: asyncpg.Connection, place: Place
) -> None:
    collections = [cls.__collection__ for cls in SYSTEM_ENTITIES] + list(COLLECTIONS)
    await prepare(connection, place.settings, collections)
    for collection in collections:
        columns, indexes, policies, flags = (await catalog(connection, place.schema, collection.name))[collection.name]
        assert [name for name, *_ in columns if name == "tenant_id"] == ["tenant_id"] * collection.tenant_scoped
        assert {collation for _, kind, _, collation, _ in columns if kind == "text"} == {"C"}
        secured = collection.tenant_scoped or is_of_secrets(collection)
        assert flags[:2] == (secured, secured)
        assert {command for _, command, _, _ in policies} == (set("rawd") if secured else set())
        assert len(indexes) == len(physical_indexes(collection)) + 1
        if collection.tenant_scoped:
            assert all("(tenant_id, " in definition for definition, *_ in indexes), indexes
        wanted = "NULLIF(current_setting('app.current_tenant'::text, true), ''::text)"
        if not collection.tenant_scoped:
            wanted = "current_setting('app.secrets'::text, true)"
        assert all(wanted in (using or check) for _, _, using, check in policies)


async def test_collections_with_a_long_common_prefix_have_distinct_index_names(
    connection: asyncpg.Connection, place: Place
) -> None:
    long = "c" * 58
    fields = [FieldSpec("f" * 40 + end, FieldType.TEXT) for end in "ab"]
    indexes = tuple(Index(spec.name) for spec in fields)
    collections = [declare(*fields, indexes=indexes, name=long + end) for end in "xy"]
    await prepare(connection, place.settings, collections)
    assert await prepare(connection, place.settings, collections, mode="plan") == ()
    for collection in collections:
        assert all(len(name) <= 63 for name in physical_indexes(collection))
        found = (await catalog(connection, place.schema, collection.name))[collection.name][1]
        comments = {comment for _, _, _, comment in found if comment}
        assert comments == {f"{collection.name}.index.{spec.name}" for spec in fields}


@given(st.text("abc.-_", max_size=200), st.text("abc.-_", max_size=200))
def test_a_shortened_name_fits_and_is_unique(one: str, other: str) -> None:
    assert len(identifier(one)) <= 63
    assert (identifier(one) == identifier(other)) == (one == other)


async def test_a_collection_with_a_reserved_name_is_refused(connection: asyncpg.Connection, place: Place) -> None:
    with pytest.raises(SchemaError, match="strongroom_journal"):
        await prepare(connection, place.settings, [declare(name="strongroom_journal")])


async def test_versions_keep_growing_when_the_store_is_recreated(connection: asyncpg.Connection, place: Place) -> None:
    async def version() -> int:
        await prepare(connection, place.settings, [declare()])
        given: int = await connection.fetchval(f"SELECT nextval('{place.schema}.strongroom_version')")
        return given

    first = await version()
    assert abs(first - datetime.now(UTC).timestamp() * 1e6) < 600e6
    await connection.execute(f"DROP SCHEMA {place.schema} CASCADE")
    assert await version() > first


async def test_every_table_and_column_has_a_comment(connection: asyncpg.Connection, place: Place) -> None:
    class Told(Entity, collection="told", ttl="until"):
        """What the owner's people read.

        Not this.
        """

        tenant: str = Field(default="", description="It's theirs.")
        until: datetime | None = None
        token: Annotated[str, Secret()] = ""

    collections = [*(entity.__collection__ for entity in SYSTEM_ENTITIES), Told.__collection__]
    await prepare(connection, place.settings, collections)
    tables = await connection.fetch(
        "SELECT relname::text AS name, obj_description(oid, 'pg_class') AS text FROM pg_class "
        "WHERE relnamespace = $1::text::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition",
        place.schema,
    )
    assert [row["name"] for row in tables if not row["text"]] == []
    assert {row["name"]: row["text"] for row in tables}["told"].startswith("What the owner's people read. One tenant")
    columns = await connection.fetch(
        "SELECT relname::text AS table, attname::text AS name, col_description(attrelid, attnum) AS text "
        "FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid WHERE attnum > 0 AND NOT attisdropped "
        "AND relnamespace = $1::text::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition",
        place.schema,
    )
    texts = {(row["table"], row["name"]): row["text"] for row in columns}
    own = {"tenant_id", "tenant", "id", "version", "created_at", "updated_at"}
    silent = [key for key, text in texts.items() if not text and (key[1] in own or key[0].startswith("strongroom_"))]
    assert silent == []
    assert texts["told", "tenant"] == "It's theirs."
    assert "Secret" in texts["told", "token"]
    assert "the document is gone" in texts["told", "until"]
    assert "tenant_id" in texts["api_keys", "tenant"], "one thing under two names says so"
    assert await prepare(connection, place.settings, collections, mode="plan") == (), "comments are no difference"


async def test_the_head_of_the_journal_stays_one_row(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [])
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute(f"INSERT INTO {place.table('strongroom_journal_head')} VALUES (1)")


async def test_a_precondition_that_does_not_hold_raises_its_own_sqlstate(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [])
    assert await connection.fetchval(f"SELECT {place.schema}.strongroom_require(true)") is True
    for wrong in ("false", "null"):
        with pytest.raises(asyncpg.PostgresError) as raised:
            await connection.fetchval(f"SELECT {place.schema}.strongroom_require({wrong})")
        assert raised.value.sqlstate == "SR001"


# --- Comparing ------------------------------------------------------------------------------------------------


async def test_a_plan_writes_nothing_at_all(connection: asyncpg.Connection, place: Place) -> None:
    planned = await prepare(connection, place.settings, [declare()], mode="plan")
    assert kinds(planned) == [(ChangeKind.CREATE_COLLECTION, None)]
    assert await connection.fetchval("SELECT to_regnamespace($1)", place.schema) is None
    await prepare(connection, place.settings, [declare()])
    before = await catalog(connection, place.schema, "things")
    await prepare(connection, place.settings, [declare(RANK, indexes=(Index("rank"),))], mode="plan")
    assert await catalog(connection, place.schema, "things") == before


BY_HAND = {
    'DROP INDEX {s}."things.index.name"': (ChangeKind.ADD_INDEX, "name_index"),
    "CREATE INDEX mine ON {s}.things (tenant_id)": (ChangeKind.DROP_INDEX, "mine"),
    "ALTER TABLE {s}.things DROP COLUMN rank": (ChangeKind.ADD_FIELD, "rank"),
    "ALTER TABLE {s}.things ADD COLUMN mine int": (ChangeKind.DROP_FIELD, "mine"),
    "ALTER TABLE {s}.things ALTER COLUMN rank TYPE integer": (ChangeKind.CHANGE_FIELD, "rank"),
    'ALTER TABLE {s}.things ALTER COLUMN word TYPE text COLLATE "POSIX"': (ChangeKind.CHANGE_FIELD, "word"),
    "ALTER TABLE {s}.things ALTER COLUMN maybe SET NOT NULL": (ChangeKind.CHANGE_FIELD, "maybe"),
    "ALTER TABLE {s}.things NO FORCE ROW LEVEL SECURITY": (ChangeKind.CHANGE_POLICIES, None),
    "ALTER TABLE {s}.things DISABLE ROW LEVEL SECURITY": (ChangeKind.CHANGE_POLICIES, None),
    "DROP POLICY tenant_delete ON {s}.things": (ChangeKind.CHANGE_POLICIES, None),
    "ALTER POLICY tenant_select ON {s}.things USING (true)": (ChangeKind.CHANGE_POLICIES, None),
    "CREATE POLICY mine ON {s}.things USING (true)": (ChangeKind.CHANGE_POLICIES, None),
}


@on_each_version
@pytest.mark.parametrize("statement", BY_HAND)
async def test_manual_schema_changes_are_shown_by_plan_and_undone_by_apply(
    connection: asyncpg.Connection, place: Place, statement: str
) -> None:
    maybe = FieldSpec("maybe", FieldType.INT, optional=True)
    word = FieldSpec("word", FieldType.TEXT, has_default=True, default="")
    declared = [declare(RANK, maybe, word, indexes=(Index("name"),))]
    await prepare(connection, place.settings, declared)
    assert await prepare(connection, place.settings, declared) == ()
    made = await catalog(connection, place.schema, "things")
    await connection.execute(statement.format(s=place.schema))
    expected = [BY_HAND[statement]]
    assert kinds(await prepare(connection, place.settings, declared, mode="plan"))[:1] == expected
    assert kinds(await prepare(connection, place.settings, declared, allow_destructive=True))[:1] == expected
    assert await prepare(connection, place.settings, declared, mode="plan") == ()
    after = await catalog(connection, place.schema, "things")
    assert after == made


async def test_changed_system_columns_are_refused_instead_of_repaired(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    await connection.execute(f"ALTER TABLE {place.table()} DROP COLUMN version")
    with pytest.raises(SchemaError, match=r"things: its column version was changed by hand"):
        await prepare(connection, place.settings, [declare()], allow_destructive=True)


async def test_changing_a_list_into_a_map_is_a_change_of_type(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [declare(FieldSpec("more", FieldType.LIST, optional=True))])
    changed = declare(FieldSpec("more", FieldType.MAP, optional=True))
    (change,) = await prepare(connection, place.settings, [changed], mode="plan")
    assert (str(change), change.destructive) == ("change field things.more: from list to map", True)


async def test_a_changed_default_is_a_change_without_loss(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [declare(RANK)])
    other = declare(replace(RANK, default=8))
    assert told(await prepare(connection, place.settings, [other])) == ["change field things.rank: its default"]
    await insert(connection, place, "acme", "a", "a")
    assert [row["rank"] for row in await documents(connection, place, "acme")] == [8]
    assert await prepare(connection, place.settings, [other], mode="plan") == ()


# --- Migrations ≡ schema --------------------------------------------------------------------------------------

DEFAULTS = {
    FieldType.BOOL: True,
    FieldType.INT: -(2**63),
    FieldType.FLOAT: 0.5,
    FieldType.DECIMAL: Decimal("-1.5"),
    FieldType.TEXT: "it's 100% \\ :a {} é",
    FieldType.BYTES: b"\x00'",
    FieldType.TIMESTAMP: NOW,
    FieldType.LIST: ["a", {"$b": [1, 1.0]}],
    FieldType.MAP: {"a": b"x"},
}


@st.composite
def field_specs(draw: st.DrawFn, name: str) -> FieldSpec:
    kind = draw(st.sampled_from(list(FieldType)))
    optional = draw(st.booleans())
    # one without value for old rows is added as one that may be null, unlike in a new table: see its own test
    has_default = draw(st.booleans()) or not optional
    return FieldSpec(name, kind, optional, has_default=has_default, default=DEFAULTS[kind] if has_default else None)


@st.composite
def declarations(draw: st.DrawFn) -> Collection:
    names = draw(st.sets(st.sampled_from("abc")))
    fields = {"name": FieldSpec("name", FieldType.TEXT)} | {name: draw(field_specs(name)) for name in sorted(names)}
    scalars = [f"{sign}{spec.name}" for spec in fields.values() if spec.type.is_scalar for sign in ("", "-")]
    columns = st.lists(
        st.sampled_from([*scalars, "-created_at", "id"]), min_size=1, max_size=3, unique_by=lambda n: n.strip("-")
    )
    drawn = draw(st.lists(st.builds(lambda c, u: Index(*c, unique=u), columns, st.booleans()), max_size=3))
    scoped = draw(st.sampled_from([True, True, True, False]))
    return Collection("things", scoped, MappingProxyType(fields), tuple(dict.fromkeys(drawn)))


def relaxed(old: Collection, new: Collection) -> Collection:
    """`new`, but for fields that may be null in the old one: such a field stays so."""
    kept = {
        spec.name: replace(spec, optional=True)
        if (was := old.fields.get(spec.name)) is not None and was.optional and was.type is spec.type
        else spec
        for spec in new.fields.values()
    }
    return replace(new, fields=MappingProxyType(kept)) if old.tenant_scoped == new.tenant_scoped else new


@examples(0.6)
@given(old=declarations(), new=declarations(), filled=st.booleans())
async def test_a_migrated_old_schema_equals_the_new_schema(
    connection: asyncpg.Connection, place: Place, old: Collection, new: Collection, filled: bool
) -> None:
    await connection.execute(f"DROP SCHEMA IF EXISTS {place.schema} CASCADE")
    await prepare(connection, place.settings, [old])
    if filled and old.tenant_scoped:
        await insert(connection, place, "acme", "a", "a")
        await insert(connection, place, "other", "a", "a")
    planned = await prepare(connection, place.settings, [new], mode="plan")
    assert await prepare(connection, place.settings, [new], allow_destructive=True) == planned
    assert await prepare(connection, place.settings, [new], mode="plan") == ()
    migrated = await catalog(connection, place.schema, "things")
    if filled and old.tenant_scoped and new.tenant_scoped:
        assert [row["id"] for row in await documents(connection, place, "other")] == ["a"]
    await connection.execute(f"DROP SCHEMA {place.schema} CASCADE")
    await prepare(connection, place.settings, [relaxed(old, new)])
    assert migrated == await catalog(connection, place.schema, "things")


async def test_a_new_required_field_is_nullable_for_processes_that_write_without_it(
    connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    await insert(connection, place, "acme", "a", "a")
    with pytest.raises(SchemaError, match=r"things\.must: it is required and has no default, and there are documents"):
        await prepare(connection, place.settings, [declare(REQUIRED)])
    async with connection.transaction():
        await connection.execute("SELECT set_config('app.current_tenant', 'acme', true)")
        await connection.execute(f"DELETE FROM {place.table()}")
    assert told(await prepare(connection, place.settings, [declare(REQUIRED)])) == ["add field things.must"]
    await insert(connection, place, "acme", "b", "b")
    assert [row["must"] for row in await documents(connection, place, "acme")] == [None]


# --- Foreign, too new, too old --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "sentence"),
    [("9", "a later version of Strongroom made it"), ("0", "an earlier version of Strongroom made it")],
)
async def test_a_schema_of_another_layout_is_refused(
    connection: asyncpg.Connection, place: Place, version: str, sentence: str
) -> None:
    await prepare(connection, place.settings, [declare()])
    await connection.execute(f"UPDATE {place.table('strongroom_layout')} SET version = {version}")
    for mode in ("apply", "plan"):
        with pytest.raises(StoreError, match=f"found layout {version}, .*{sentence}"):
            await prepare(connection, place.settings, [declare()], mode=mode)


async def test_a_schema_without_its_layout_is_damaged(connection: asyncpg.Connection, place: Place) -> None:
    await prepare(connection, place.settings, [declare()])
    await connection.execute(f"DELETE FROM {place.table('strongroom_layout')}")
    with pytest.raises(StoreError, match="damaged, restore a backup"):
        await prepare(connection, place.settings, [declare()])


async def test_a_foreign_schema_is_left_unchanged(connection: asyncpg.Connection, place: Place) -> None:
    await connection.execute(f"CREATE SCHEMA {place.schema}; CREATE TABLE {place.table('theirs')} (id int)")
    with pytest.raises(StoreError, match=r"holds tables that are not Strongroom's"):
        await prepare(connection, place.settings, [declare()])
    assert await connection.fetchval("SELECT to_regclass($1)", place.table("strongroom_layout")) is None
