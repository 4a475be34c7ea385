"""Roles on PostgreSQL: what each may do, what no role may do, and which roles are refused."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Annotated

import asyncpg
import pytest

from strongroom.app import SYSTEM_ENTITIES
from strongroom.entities.entity import Entity, Secret
from strongroom.entities.query import Aggregate, Query
from strongroom.errors import ConfigError, Conflict, Gone, SchemaError, StoreError
from strongroom.storage.port import Append, ChangeKind, Create, Delete, Patch, Put
from strongroom.storage.postgres import schema_layout as layout
from strongroom.storage.postgres.journal_access import READER_POLICY
from strongroom.storage.postgres.journal_indexes import INDEXES, index_name
from strongroom.storage.postgres.partitions import drop_partitions_before, ensure_partitions
from strongroom.storage.postgres.roles import check_role, roles_sql
from strongroom.storage.postgres.schema import prepare
from strongroom.storage.postgres.schema_tables import is_of_secrets
from strongroom.storage.postgres.store import PostgresStore
from strongroom.testing.storage.samples import COLLECTIONS, batch, item, record
from strongroom.testing.storage.schema import declare
from tests.helpers.postgres_schema import (
    NOW,
    RANK,
    RECORD,
    Place,
    Roles,
    Settings,
    append,
    catalog,
    documents,
    insert,
    on_each_version,
    us,
)


@on_each_version
async def test_the_application_role_only_reads_and_writes_documents_and_appends_to_the_journal(
    roles: tuple[Place, Roles],
) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    for user in (owner, app):
        await check_role(user, place.settings)
    assert await prepare(app, place.settings, [declare(), *COLLECTIONS]) == ()
    await insert(app, place, "acme", "a", "a")
    await insert(app, place, "other", "b", "b")
    assert [row["id"] for row in await documents(app, place, "acme")] == ["a"]
    assert await app.fetch(f"SELECT * FROM {place.table()}") == [], "no tenant, no rows"
    assert await owner.fetch(f"SELECT * FROM {place.table()}") == [], "the owner is under the policies too"
    await app.execute(
        f"INSERT INTO {place.table('strongroom_journal')} ({RECORD}) VALUES (1, now(), 0, 'r', 'a', 'q', 'x', 'c', 'e')"
    )
    await app.execute(f"UPDATE {place.table('strongroom_journal_head')} SET sequence = sequence + 1")
    await app.fetchval(f"SELECT nextval('{place.schema}.strongroom_version')")
    assert await app.fetchval(f"SELECT {place.schema}.strongroom_require(true)")
    assert await ensure_partitions(app, place.settings, datetime(2040, 1, 1, tzinfo=UTC)) == 4
    month = f"{datetime.now(UTC):%Y_%m}"
    forbidden = [
        "TRUNCATE {s}.strongroom_journal",
        "DELETE FROM {s}.strongroom_journal",
        "ALTER TABLE {s}.things RENAME TO x",
        "UPDATE {s}.strongroom_journal SET actor = 'x'",
        *(f"DELETE FROM {{s}}.strongroom_journal_{part}" for part in (month, "default", "2040_02")),
        *(f"UPDATE {{s}}.strongroom_journal_{part} SET actor = 'x'" for part in (month, "default", "2040_02")),
        f"SELECT * FROM {{s}}.strongroom_journal_{month}",
        f"DROP TABLE {{s}}.strongroom_journal_{month}",
        f"ALTER TABLE {{s}}.strongroom_journal DETACH PARTITION {{s}}.strongroom_journal_{month}",
        "DELETE FROM {s}.strongroom_journal_head",
        "DELETE FROM {s}.strongroom_tenants",
        "UPDATE {s}.strongroom_tenants SET tenant_id = 'x'",
        "UPDATE {s}.strongroom_schema SET declaration = '{{}}'",
        "UPDATE {s}.strongroom_layout SET version = 9",
        "ALTER TABLE {s}.things DISABLE ROW LEVEL SECURITY",
        "DROP POLICY tenant_select ON {s}.things",
        "CREATE POLICY mine ON {s}.things USING (true)",
        "ALTER TABLE {s}.things ADD COLUMN x int",
        "CREATE INDEX ON {s}.things (name)",
        "TRUNCATE {s}.things",
        "CREATE TABLE {s}.mine (id int)",
        "SELECT setval('{s}.strongroom_version', 1)",
        f"SET ROLE {who.owner}",
    ]
    for statement in forbidden:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.execute(statement.format(s=place.schema))
    assert await drop_partitions_before(app, place.settings, NOW) == 0, "there is no empty one of the past"
    async with app.transaction():
        await app.execute("SELECT set_config('app.current_tenant', 'acme', true)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with app.transaction():
                await app.execute(f"UPDATE {place.table()} SET tenant_id = 'other'")
        for verb in (f"UPDATE {place.table()} SET name = 'x'", f"DELETE FROM {place.table()}"):
            assert await app.execute(f"{verb} WHERE tenant_id = 'other'") in ("UPDATE 0", "DELETE 0")
    await app.close()
    await owner.close()


@on_each_version
async def test_the_application_role_sees_records_of_its_tenant_only_and_the_reader_role_all(
    roles: tuple[Place, Roles],
) -> None:
    place, who = roles
    journal, tenants = place.table("strongroom_journal"), place.table("strongroom_tenants")
    store = PostgresStore(place.url(who.application))
    await store.open()
    await store.prepare([declare(), *COLLECTIONS])
    given = [store.commit(batch(name, Create("items", "x", item()), Append(record("x", name)))) for name in ("a", "b")]
    await asyncio.gather(*given, store.commit(batch(None, Append(record("platform", None)))))
    assert [r.tenant for r in (await store.changes(None, tenant="a")).records] == ["a"]
    assert {r.tenant for r in (await store.changes(None)).records} == {"a", "b", None}
    assert await store.tenants() == ["a", "b"]
    await store.close()

    app = await place.connect(who.application)
    for table in (journal, tenants):
        assert await app.fetch(f"SELECT * FROM {table}") == [], "no tenant, no rows"
        async with app.transaction():
            await app.execute("SET LOCAL app.journal = 'whole'")
            assert await app.fetch(f"SELECT * FROM {table}") == [], "only the owner may say this"
    added = f"INSERT INTO {journal} (tenant_id, {RECORD}) VALUES ($1, 99, now(), 0, 'r', 'a', 'q', 'x', 'c', 'e')"
    for present, other in (("a", "b"), ("a", None), ("", "a")):
        async with app.transaction():
            await app.execute("SELECT set_config('app.current_tenant', $1, true)", present)
            for table in (journal, tenants):
                seen = await app.fetch(f"SELECT DISTINCT tenant_id FROM {table}")
                assert [row["tenant_id"] for row in seen] == ([present] if present else [])
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                async with app.transaction():
                    await app.execute(added, other)
            if other is not None:
                with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                    async with app.transaction():
                        await app.execute(f"INSERT INTO {tenants} VALUES ('new')")
    async with app.transaction():
        reader = '"' + who.reader + '"'
        await app.execute(f"SET LOCAL ROLE {reader}")
        assert await app.fetchval(f"SELECT count(*) FROM {journal}") == 3
        for statement in (added.replace("$1", "NULL"), f"SELECT * FROM {place.table()}", f"DELETE FROM {tenants}"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with app.transaction():
                    await app.execute(statement)
    await app.close()


class Vault(Entity, collection="vault", scope="global"):
    secret: Annotated[bytes, Secret()]


async def test_a_collection_of_secrets_is_visible_only_to_statements_that_declare_it(
    roles: tuple[Place, Roles],
) -> None:
    """As the peppers are: whoever reads another table by a mistake, or a stray SELECT, finds nothing."""
    place, who = roles
    owner, vault = await place.connect(), place.table("vault")
    declared = [declare(), *COLLECTIONS, Vault.__collection__]
    await prepare(owner, place.settings, declared)
    store = PostgresStore(place.url(who.application))
    await store.open()
    await store.prepare(declared)
    made = await store.commit(batch(None, Create("vault", "1", {"secret": b"one"}), Append(record("1", None), 0)))
    await store.commit(batch(None, Create("vault", "2", {"secret": b"two"})))
    await store.commit(batch(None, Put("vault", "2", {"secret": b"zwei"}), Patch("vault", "2", {"secret": b"deux"})))
    with pytest.raises(Conflict):
        await store.commit(batch(None, Put("vault", "1", {"secret": b"x"}, expected=made.versions[0] + 1)))
    assert [d["secret"] for d in await store.find("vault", None, Query(order_by=("-id",)))] == [b"deux", b"one"]
    assert (await store.get("vault", None, "1") or {})["secret"] == b"one"
    assert (await store.aggregate("vault", None, [Aggregate("count")], None))["count"] == 2
    await store.commit(batch(None, Delete("vault", "2")))
    await store.close()

    app = await place.connect(who.application)
    for user in (app, owner):
        assert await user.fetch(f"SELECT * FROM {vault}") == []
        assert await user.execute(f"UPDATE {vault} SET secret = 'x'") == "UPDATE 0"
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            await user.execute(f"INSERT INTO {vault} VALUES ('3', 1, now(), now(), 'x')")
        async with user.transaction():
            await user.execute("SET LOCAL app.secrets = 'on'")
            assert [row["secret"] for row in await user.fetch(f"SELECT * FROM {vault}")] == [b"one"]
    await owner.execute(f"ALTER TABLE {vault} DISABLE ROW LEVEL SECURITY")  # or a store of the first release
    (change,) = await prepare(owner, place.settings, declared)
    assert (change.kind, change.collection) == (ChangeKind.CHANGE_POLICIES, "vault")
    assert await app.fetch(f"SELECT * FROM {vault}") == []
    assert await prepare(owner, place.settings, declared, mode="plan") == ()
    await app.close()
    await owner.close()


async def make_layout_2(owner: asyncpg.Connection, place: Place) -> None:
    """Take away what layout 3 added."""
    journal = place.table("strongroom_journal")
    for end in INDEXES:
        if end not in ("sequence", "tenant_id.sequence"):
            await owner.execute(f'DROP INDEX "{place.schema}"."{index_name("strongroom_journal", end)}"')
    for policy in ("owner_delete", "owner_update"):
        await owner.execute(f"DROP POLICY {policy} ON {journal}")
    await owner.execute(f"ALTER TABLE {journal} DROP COLUMN salt, DROP COLUMN claims, DROP COLUMN rules")
    await owner.execute(f"DROP TABLE {place.table('strongroom_journal_floors')}")
    for function in ("strongroom_redact_journal", "strongroom_drop_records"):
        await owner.execute(f"DROP FUNCTION {place.schema}.{function}")
    await owner.execute(f"UPDATE {place.table('strongroom_layout')} SET version = 2")


async def make_layout_1(owner: asyncpg.Connection, place: Place) -> None:
    """Take away what layout 2 added."""
    for table in ("strongroom_journal", "strongroom_tenants"):
        for policy in ("owner_select", "tenant_insert", "tenant_select", READER_POLICY):
            await owner.execute(f"DROP POLICY {policy} ON {place.table(table)}")
        await owner.execute(f"ALTER TABLE {place.table(table)} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY")
    await owner.execute(f"ALTER TABLE {place.table('strongroom_journal_head')} DROP COLUMN floor")
    await owner.execute(f"UPDATE {place.table('strongroom_layout')} SET version = 1")


OWN_TABLES = ("strongroom_journal", "strongroom_journal_floors", "strongroom_journal_head", "strongroom_tenants")


async def test_a_store_of_layout_2_gets_salts_floors_and_indexes(
    roles: tuple[Place, Roles],
) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    declared = [declare(), *COLLECTIONS]
    new = await catalog(owner, place.schema, *OWN_TABLES)
    await insert(owner, place, "acme", "a", "a")
    for sequence in (5, 6):
        await append(owner, place, sequence, us(datetime.now(UTC)))
    await owner.execute(f"UPDATE {place.table('strongroom_journal_head')} SET sequence = 6, floor = 4")
    await make_layout_2(owner, place)
    with pytest.raises(SchemaError, match=r"layout 2 becomes 3.*run `strongroom schema apply"):
        await prepare(app, place.settings, declared)
    await prepare(owner, place.settings, declared)
    assert await catalog(owner, place.schema, *OWN_TABLES) == new, "as a new schema"
    assert await prepare(app, place.settings, declared) == await prepare(owner, place.settings, declared) == ()
    await append(owner, place, 7, us(datetime.now(UTC)))  # as a node of the last release does, which is still running
    store = PostgresStore(place.url(who.application))
    await store.open()
    await store.prepare(declared)
    found = (await store.rows()).rows
    assert [(row[0], row[12:]) for row in found] == [(n, (b"", None, None)) for n in (5, 6, 7)]
    with pytest.raises(Gone):  # what was dropped before may have been anyone's
        await store.changes("3", tenant="acme")
    await store.close()
    # An apply that was killed before its last index
    index = index_name("strongroom_journal", "actor.sequence")
    await owner.execute(f'DROP INDEX "{place.schema}"."{index}"')
    with pytest.raises(SchemaError, match="the journal lacks an index"):
        await prepare(app, place.settings, declared)
    await prepare(owner, place.settings, declared)
    assert await catalog(owner, place.schema, *OWN_TABLES) == new
    await app.close()
    await owner.close()


async def test_the_application_redacts_and_drops_records_by_functions_only(roles: tuple[Place, Roles]) -> None:
    place, who = roles
    store = PostgresStore(place.url(who.application))
    await store.open()
    await store.prepare([declare(), *COLLECTIONS])
    for name in ("acme", "other"):
        await store.commit(batch(name, *(Append(record(f"{n}", name, salt=bytes(16))) for n in range(3))))
    app = await place.connect(who.application)
    journal, floors = place.table("strongroom_journal"), place.table("strongroom_journal_floors")
    reader = '"' + who.reader + '"'
    for role in ("", f"SET LOCAL ROLE {reader}"):
        for statement in (
            f"UPDATE {journal} SET actor = ''",
            f"DELETE FROM {journal}",
            f"UPDATE {floors} SET sequence = 0",
            f"DELETE FROM {floors}",
            f"INSERT INTO {floors} VALUES ('acme', 1)",
        ):
            settings = "SET LOCAL app.current_tenant = 'acme'; SET LOCAL app.journal = 'whole'"
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await app.execute(f"{settings}; {role}; {statement}")
    rows = (await store.rows()).rows
    with pytest.raises(StoreError):  # a record that a function changed shows that it was redacted
        await store.rewrite([(*rows[0][:4], "another actor", *rows[0][5:])])
    assert (await store.rows()).rows == rows
    assert await store.rewrite([(*rows[0][:12], b"\x01" * 162, None, None)]) == 1
    assert await store.drop("acme", rows[1][0]) == 2
    async with app.transaction():
        await app.execute("SET LOCAL app.current_tenant = 'other'; SET LOCAL app.journal = 'whole'")
        assert await app.fetch(f"SELECT * FROM {floors}") == [], "no tenant sees another's floor"
    await app.close()
    await store.close()


async def test_a_store_of_layout_1_is_upgraded_by_its_owner_and_only_then_served(
    admin: asyncpg.Connection, roles: tuple[Place, Roles]
) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    declared = [declare(), *COLLECTIONS]
    for sequence in (5, 6):
        await append(owner, place, sequence, us(datetime.now(UTC)))
    head = place.table("strongroom_journal_head")
    await owner.execute(f"UPDATE {head} SET sequence = 6")
    await make_layout_2(owner, place)
    await make_layout_1(owner, place)
    with pytest.raises(SchemaError, match=r"layout 1 becomes 3.*run `strongroom schema apply"):
        await prepare(app, place.settings, declared)
    (planned,) = await prepare(owner, place.settings, declared, mode="plan")
    assert planned.kind is ChangeKind.CHANGE_POLICIES
    assert not planned.destructive
    await prepare(owner, place.settings, declared)
    assert await prepare(app, place.settings, declared) == await prepare(owner, place.settings, declared) == ()
    assert await owner.fetchval(f"SELECT floor FROM {head}") == 4, "what retention had dropped before"
    assert await app.fetch(f"SELECT * FROM {place.table('strongroom_journal')}") == []
    store = PostgresStore(place.url(who.application))
    await store.open()
    await store.prepare(declared)
    assert [r.sequence for r in (await store.changes(None)).records] == [5, 6]
    with pytest.raises(Gone):
        await store.changes("3")
    await store.close()
    # What is changed by hand is set up again, and no node starts before.
    await owner.execute(f"DROP POLICY tenant_insert ON {place.table('strongroom_journal')}")
    with pytest.raises(SchemaError, match="row-level security was changed"):
        await prepare(app, place.settings, declared)
    await prepare(owner, place.settings, declared)
    assert await prepare(app, place.settings, declared) == ()
    # A reader that an administrator has not made yet
    made_by_owner = f"ALTER DEFAULT PRIVILEGES FOR ROLE {who.owner} IN SCHEMA {place.schema}"
    await admin.execute(f"{made_by_owner} REVOKE USAGE ON TYPES FROM {who.reader}")
    await owner.execute(f"UPDATE {place.table('strongroom_layout')} SET version = 1")
    with pytest.raises(SchemaError, match="run what `strongroom schema roles` prints, then this again"):
        await prepare(owner, place.settings, declared)
    await app.close()
    await owner.close()


async def test_a_role_with_permanent_reader_rights_is_refused(
    admin: asyncpg.Connection, roles: tuple[Place, Roles]
) -> None:
    place, who = roles
    application = '"' + who.application.replace('"', '""') + '"'
    await admin.execute(f"ALTER ROLE {application} INHERIT; REVOKE {who.reader} FROM {application}")
    await admin.execute(f"GRANT {who.reader} TO {application}")
    app = await place.connect(who.application)
    with pytest.raises(StoreError, match=r"in every statement.*NOINHERIT"):
        await check_role(app, place.settings)
    await app.close()


async def test_a_cursor_before_dropped_records_raises_gone(connection: asyncpg.Connection, place: Place) -> None:
    store = PostgresStore(place.url(place.owner))
    await store.open()
    await store.prepare(COLLECTIONS)
    past = us(datetime(2020, 1, 15, tzinfo=UTC))
    await ensure_partitions(connection, place.settings, datetime(2020, 1, 1, tzinfo=UTC), 0)
    begun = (await store.changes("end")).cursor
    for number in range(3):
        await store.commit(batch("acme", Append(record(f"{number}", "acme", at_us=past))))
    middle = (await store.changes(None, limit=2)).cursor
    end = (await store.changes(None)).cursor
    await store.commit(batch("other", Append(record("new", "other"))))
    quiet = (await store.changes(end, tenant="acme")).cursor
    assert await store.drop("acme", int(end)) == 3
    assert await store.drop_journal_before(us(datetime(2020, 3, 1, tzinfo=UTC))) == 1
    for tenant in (None, "acme"):
        for cursor in (begun, middle):
            with pytest.raises(Gone, match="past the journal's retention"):
                await store.changes(cursor, tenant=tenant)
        assert (await store.changes(quiet, tenant=tenant)).records == ()
    assert [r.entity_id for r in (await store.changes(end)).records] == ["new"]
    assert [r.entity_id for r in (await store.changes(None)).records] == ["new"], (
        "what is left of it, from its beginning"
    )
    await store.close()


@on_each_version
async def test_tables_added_later_are_granted_to_the_application_role(roles: tuple[Place, Roles]) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    grown = [declare(RANK), declare(name="also"), *COLLECTIONS]
    with pytest.raises(SchemaError, match=r"add field things\.rank; create collection also; run `strongroom schema"):
        await prepare(app, place.settings, grown)
    await prepare(owner, place.settings, grown)
    assert await prepare(app, place.settings, grown) == ()
    await insert(app, place, "acme", "a", "a")
    assert await app.fetchval(f"SELECT count(*) FROM {place.table('also')}") == 0
    await ensure_partitions(owner, place.settings, datetime(2050, 1, 1, tzinfo=UTC))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await app.execute(f"DELETE FROM {place.table('strongroom_journal_2050_01')}")
    await check_role(app, place.settings)
    await app.close()
    await owner.close()


@on_each_version
async def test_retention_drops_partitions_and_sees_no_document(roles: tuple[Place, Roles]) -> None:
    place, who = roles
    retention = await place.connect(who.retention)
    await ensure_partitions(retention, place.settings, datetime(2020, 1, 1, tzinfo=UTC), 0)
    assert await drop_partitions_before(retention, place.settings, NOW) == 1
    for statement in ("SELECT * FROM {s}.things", "SELECT * FROM {s}.strongroom_journal", "DELETE FROM {s}.things"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await retention.execute(statement.format(s=place.schema))
    await retention.close()


async def test_a_hand_made_index_does_not_keep_the_application_from_starting(roles: tuple[Place, Roles]) -> None:
    place, who = roles
    owner, app = await place.connect(), await place.connect(who.application)
    await owner.execute(f"CREATE INDEX mine ON {place.table()} (tenant_id, created_at)")
    assert await prepare(app, place.settings, [declare(), *COLLECTIONS]) == ()
    await app.close()
    await owner.close()


@on_each_version
async def test_without_a_schema_the_application_role_is_told_the_command_to_run(
    admin: asyncpg.Connection, place: Place
) -> None:
    await admin.execute(roles_sql(place.settings, *(f"{place.owner}_{end}" for end in "oarw")))
    await admin.execute(f"ALTER ROLE {place.owner}_a PASSWORD 'secret'")
    app = await place.connect(f"{place.owner}_a")
    with pytest.raises(SchemaError, match="`strongroom schema apply --store URL` with the owner's URL"):
        await prepare(app, place.settings, [declare()])
    await app.close()


async def test_a_role_without_access_is_told_the_command_to_run(
    admin: asyncpg.Connection, connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    await admin.execute(f"CREATE ROLE {place.owner}_x LOGIN PASSWORD 'secret'")
    stranger = await place.connect(f"{place.owner}_x")
    with pytest.raises(StoreError, match=r"may not read it: .*`strongroom schema roles`"):
        await prepare(stranger, place.settings, [declare()])
    await stranger.close()


UNSAFE = {
    "SUPERUSER": "is a superuser",
    "BYPASSRLS": "has BYPASSRLS",
    "IN ROLE {owner}": "is a member of {owner}",
    "NOINHERIT IN ROLE {owner}": "is a member of {owner}",
    "IN ROLE {super}": "is a member of {super}, which bypasses row-level security",
    "CREATEROLE": "has CREATEROLE",
    "IN ROLE pg_write_all_data": "may do more than append and read in strongroom_journal",
}


@on_each_version
@pytest.mark.parametrize("attributes", UNSAFE)
async def test_an_unsafe_role_is_refused_with_what_to_run(
    admin: asyncpg.Connection, connection: asyncpg.Connection, place: Place, attributes: str
) -> None:
    await prepare(connection, place.settings, [declare()])
    names = {"owner": place.owner, "super": f"{place.owner}_super"}
    await admin.execute(f"CREATE ROLE {names['super']} SUPERUSER")
    role = f"{place.owner}_app"
    await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret' {attributes.format_map(names)}")
    await admin.execute(f"GRANT USAGE ON SCHEMA {place.schema} TO {role}")
    opened = await place.connect(role)
    with pytest.raises(StoreError) as raised:
        await check_role(opened, place.settings)
    text = str(raised.value).replace(f"{place.schema}.", "")
    assert text.startswith(f"role {role}: {UNSAFE[attributes].format_map(names)}"), text
    assert "run what `strongroom schema roles` prints" in text
    await opened.close()


def test_the_peppers_are_a_collection_of_secrets_alone() -> None:
    collections = [entity.__collection__ for entity in SYSTEM_ENTITIES]
    assert {collection.name for collection in collections if is_of_secrets(collection)} == {"peppers", "key_sources"}


async def test_a_role_that_owns_one_table_is_refused(
    admin: asyncpg.Connection, connection: asyncpg.Connection, place: Place
) -> None:
    await prepare(connection, place.settings, [declare()])
    role = f"{place.owner}_app"
    await admin.execute(
        f"CREATE ROLE {role} LOGIN PASSWORD 'secret'; GRANT USAGE ON SCHEMA {place.schema} TO {role}; "
        f"ALTER TABLE {place.table()} OWNER TO {role}"
    )
    opened = await place.connect(role)
    with pytest.raises(StoreError, match=r"owns .*\.things, though not the schema"):
        await check_role(opened, place.settings)
    await opened.close()


async def test_an_owner_may_serve_in_a_single_role_set_up_with_a_warning(
    connection: asyncpg.Connection, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    await check_role(connection, place.settings)
    assert caplog.records == [], "there is nothing to own yet"
    await prepare(connection, place.settings, [declare()])
    with caplog.at_level(logging.WARNING):
        await check_role(connection, place.settings)
    (record,) = caplog.records
    assert "`strongroom schema roles` prints the SQL that splits owner and application" in record.getMessage()
    await insert(connection, place, "acme", "a", "a")
    assert await connection.fetch(f"SELECT * FROM {place.table()}") == [], "FORCE holds for the owner"


@pytest.mark.parametrize(
    "names",
    [("", "b", "c"), ("a", "a", "c"), ("pg_x", "b", "c"), ("a\n", "b", "c"), ("a" * 64, "b", "c"), ("r", "b", "c")],
)
def test_names_that_cannot_be_four_roles_are_refused(names: tuple[str, str, str]) -> None:
    with pytest.raises(ConfigError, match="role"):
        roles_sql(Settings("strongroom"), *names, "r")


async def test_an_existing_superuser_is_never_made_the_application(admin: asyncpg.Connection, place: Place) -> None:
    await admin.execute(f"CREATE ROLE {place.owner}_a SUPERUSER")
    with pytest.raises(asyncpg.RaiseError, match="is a superuser or has BYPASSRLS"):
        await admin.execute(roles_sql(place.settings, *(f"{place.owner}_{end}" for end in "oarw")))
    await admin.execute("ROLLBACK")


def test_the_oldest_supported_layout_is_not_newer_than_the_current_one() -> None:
    assert 1 <= layout.OLDEST_LAYOUT <= layout.LAYOUT
