"""Seed 003, section 8: every change of data makes a journal record, and nobody changes a record unnoticed."""

from __future__ import annotations

import base64
import json
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import apsw
import asyncpg
import httpx
import pytest

from strongroom import Context, Entity, Strongroom
from strongroom.app import SYSTEM_ENTITIES
from strongroom.entities import Registry
from strongroom.errors import AlreadyExists, Conflict
from strongroom.journal import TREE_ENTITIES
from strongroom.journal.trees import tree_id
from strongroom.journal.verify_store import verify_store
from strongroom.storage import open_store
from strongroom.storage.firestore.schema import FIRESTORE_RULES
from strongroom.storage.firestore.store import FirestoreStore
from strongroom.storage.port import JournalFilter, JournalRow
from strongroom.storage.postgres.roles import roles_sql
from strongroom.storage.sqlite.isolation import Guarded
from strongroom.storage.sqlite.writer import OWN_TEXTS
from tests.conftest import backend_of
from tests.helpers.owner import FirestoreOwner, PostgresOwner, owner_of
from tests.helpers.server_app import serving
from tests.helpers.servers import postgres

SKEW_US = 10_000_000
"""A node's clock is the store's, carried forward: it may differ a little."""
ADMIN = Context("acme", claims={"admin": True}, actor="user:root")


class Clause(Entity, collection="clauses"):
    name: str
    limit: int = 0


class Memo(Entity, collection="memos", scope="global"):
    text: str


ENTITIES: list[type[Entity]] = [Clause, Memo]


async def rows_of(room: Strongroom, where: JournalFilter) -> list[JournalRow]:
    found: list[JournalRow] = []
    cursor: str | None = None
    while (page := await room.store.rows(cursor, where)).cursor != cursor:
        found += page.rows
        cursor = page.cursor
    return found


# --- BDD.12.14.06 -----------------------------------------------------------------------------------------------


async def test_bdd_12_14_06_every_mutation_of_data_creates_an_audit_record(url: str) -> None:
    """On each store: who, when, what, before and after, in the transaction of the change; then sealed as a leaf."""
    async with Strongroom.open(url, entities=ENTITIES, sealing=False) as room:
        acme = room.tenant("acme", actor="user:ada", claims={"sub": "ada"})
        began_us = await room.store.now_us()
        made = await acme.create(Clause(id="c1", name="first", limit=1))
        changed = await acme.update(Clause, "c1", {"limit": 2})
        replaced = await acme.replace(Clause(id="c1", name="second", limit=3))
        await acme.delete(Clause, "c1")
        await acme.create(Clause(id="twice", name="x"))
        with pytest.raises(AlreadyExists):
            await acme.create(Clause(id="twice", name="x"))
        with pytest.raises(Conflict):
            await acme.update(Clause, "twice", {"limit": 9}, expected=12345)
        issued = await room.keys.create(name="k", tenant="acme", context=ADMIN)
        await room.keys.disable(issued.key.id, context=ADMIN)
        ended_us = await room.store.now_us()

        rows = await rows_of(room, JournalFilter(tenant="acme", collection="clauses"))
        assert [(row[6], row[8], row[4]) for row in rows] == [
            ("create", "c1", "user:ada"), ("update", "c1", "user:ada"), ("update", "c1", "user:ada"),
            ("delete", "c1", "user:ada"), ("create", "twice", "user:ada"),
        ]  # fmt: skip
        assert [row[9] for row in rows[:3]] == [made.version, changed.version, replaced.version]
        assert all(began_us - SKEW_US <= row[3] <= ended_us + SKEW_US for row in rows)
        assert all(row[5] and row[12] for row in rows), "the request, and a salt"
        contents = [[None if text is None else json.loads(text) for text in row[10:12]] for row in rows]
        assert contents[0][0] is None
        assert contents[0][1] == {"name": "first", "limit": 1}
        assert contents[1] == [{"limit": 1}, {"limit": 2}]
        assert contents[2] == [{"name": "first", "limit": 2}, {"name": "second", "limit": 3}]
        assert contents[3] == [{"name": "second", "limit": 3}, None]
        keys = await rows_of(room, JournalFilter(tenant="acme", collection="api_keys"))
        assert [(row[6], row[4]) for row in keys] == [("create", "user:root"), ("update", "user:root")]
        assert issued.text not in str(keys), "a secret never enters the journal"

        await room.sealer.seal_now()
        tree = await room.store.get("journal_trees", None, tree_id("acme"))
        assert tree is not None
        assert tree["size"] == len(await rows_of(room, JournalFilter(tenant="acme")))


# --- BDD.12.14.34 -----------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """A sealed store, closed: `url` as the application opens it, `owner_url` as the owner of the database does."""

    url: str
    owner_url: str

    async def problems(self) -> list[tuple[str | None, str, int | None]]:
        """What verification finds."""
        store = await open_store(self.owner_url)
        try:
            await store.prepare(Registry(TREE_ENTITIES).collections)
            report = await verify_store(store)
        finally:
            await store.close()
        return [(one.tenant, one.kind, one.index) for one in report.findings]

    async def owner_changes_a_record(self) -> None:
        owner = owner_of(self.owner_url)
        old = (await owner.records("acme"))[2]
        await owner.write(old, {**old, "actor": "user:nobody"})


async def sealed(url: str, owner_url: str | None = None) -> Kept:
    async with Strongroom.open(url, entities=ENTITIES, sealing=False) as room:
        for number in range(5):
            await room.tenant("acme").create(Clause(id=f"c{number}", name="x"))
        await room.sealer.seal_now()
    kept = Kept(url, owner_url or url)
    assert await kept.problems() == []
    return kept


async def found_by_verification(kept: Kept) -> None:
    """The owner of the database can change a record. Whoever verifies then learns which one."""
    await kept.owner_changes_a_record()
    (problem,) = await kept.problems()
    assert problem[0] == "acme"
    assert problem[2] is None or problem[2] <= 2


@pytest.fixture
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return backend_of(request.param, tmp_path, request).new_url()


@pytest.mark.parametrize("new_url", ["sqlite"], indirect=True)
async def test_bdd_12_14_34_sqlites_own_connections_refuse_to_change_a_record(new_url: str) -> None:
    kept = await sealed(new_url)
    file = unquote(new_url.partition(":///")[2])
    with closing(apsw.Connection(file)) as raw:
        before = raw.execute("SELECT * FROM _journal ORDER BY sequence").fetchall()
        for options in ({}, {"writes": True, "own_texts": OWN_TEXTS}, {"whole_journal": True}):
            connection = Guarded(file, (), 1.0, **options)
            try:
                for table in ("_journal", "main._journal", "[_JOURNAL]"):
                    for sql in (
                        f"UPDATE {table} SET actor = 'x'",
                        f"DELETE FROM {table}",
                        f"REPLACE INTO {table} SELECT * FROM {table}",
                        f"DROP TABLE {table}",
                        f"ALTER TABLE {table} RENAME TO other",
                    ):
                        with pytest.raises((apsw.AuthError, apsw.SQLError)):
                            connection.execute(sql).fetchall()
            finally:
                connection.close()
        assert raw.execute("SELECT * FROM _journal ORDER BY sequence").fetchall() == before
    await found_by_verification(kept)


@pytest.fixture
def two_roles(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """On PostgreSQL, the URLs of the application's role and of the owner's, and the schema."""
    server = postgres.start(request, "postgres-18", postgres.bundled())
    schema = postgres.new_schema()
    owner, app, retention, reader = (f"{name}_{schema}" for name in ("owner", "app", "retention", "reader"))

    class Settings:
        pass

    settings: Any = Settings()
    settings.schema = schema
    server.execute(
        roles_sql(settings, owner, app, retention, reader),
        *(f"ALTER ROLE {role} PASSWORD '{role}'" for role in (owner, app)),
    )
    return server.url(schema, app), server.url(schema, owner), schema


async def test_bdd_12_14_34_postgresql_refuses_the_applications_role_to_change_a_record(
    two_roles: tuple[str, str, str],
) -> None:
    url, owner_url, schema = two_roles
    store = await open_store(owner_url)
    await store.prepare(Registry((*SYSTEM_ENTITIES, *ENTITIES)).collections)
    await store.close()
    kept = await sealed(url, owner_url)
    before = await PostgresOwner(url).records("acme")
    role = url.partition("//")[2].partition(":")[0]
    connection = await asyncpg.connect(url.partition("?")[0], user=role)
    try:
        for sql in (
            f"UPDATE {schema}.strongroom_journal SET actor = 'x'",
            f"DELETE FROM {schema}.strongroom_journal",
            f"TRUNCATE {schema}.strongroom_journal",
            f"DELETE FROM {schema}.strongroom_journal_default",
            f"DROP TABLE {schema}.strongroom_journal",
            f"ALTER TABLE {schema}.strongroom_journal DISABLE ROW LEVEL SECURITY",
            f"INSERT INTO {schema}.strongroom_journal SELECT * FROM {schema}.strongroom_journal "
            "ON CONFLICT DO UPDATE SET actor = 'x'",
        ):
            with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.PostgresSyntaxError)):
                await connection.execute(sql)
    finally:
        await connection.close()
    assert await PostgresOwner(url).records("acme") == before
    await found_by_verification(kept)


@pytest.mark.parametrize("new_url", ["firestore"], indirect=True)
async def test_bdd_12_14_34_firestores_rules_refuse_every_client_to_change_a_record(new_url: str) -> None:
    """With the rules that `schema export` writes, in Google's emulator: clients have no service account."""
    kept = await sealed(new_url)
    store = FirestoreStore.from_url(new_url)
    project, emulator = store.paths.project, store.wire.emulator
    rules = {"rules": {"files": [{"name": "firestore.rules", "content": FIRESTORE_RULES}]}}
    before = await FirestoreOwner(new_url).records("acme")
    number = next(iter(before))["sequence"]
    name = f"_strongroom_journal/{number % 16:02}-{number // 16:016}"
    documents = f"http://{emulator}/v1/projects/{project}/databases/(default)/documents"
    change = {"fields": {"actor": {"stringValue": "x"}}}
    async with httpx.AsyncClient() as client:
        put = await client.put(f"http://{emulator}/emulator/v1/projects/{project}:securityRules", json=rules)
        assert put.status_code == 200, put.text
        for headers in ({}, {"authorization": f"Bearer {_token(project)}"}):
            for answer in (
                await client.get(f"{documents}/{name}", headers=headers),
                await client.patch(f"{documents}/{name}", json=change, headers=headers),
                await client.delete(f"{documents}/{name}", headers=headers),
                await client.post(f"{documents}/_strongroom_journal", json=change, headers=headers),
                await client.patch(f"{documents}/_strongroom_heads/00", json=change, headers=headers),
                await client.patch(f"{documents}/journal_log/log", json=change, headers=headers),
            ):
                assert answer.status_code == 403, (str(answer.request.url), answer.text)
    assert await FirestoreOwner(new_url).records("acme") == before
    await found_by_verification(kept)


def _token(project: str) -> str:
    """A signed-in user of the emulator, who says that he is everything."""

    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    claims = {"sub": "eve", "user_id": "eve", "aud": project, "admin": True, "tenant": "acme"}
    return f"{part({'alg': 'none', 'type': 'JWT'})}.{part(claims)}."


@pytest.mark.parametrize("new_url", ["json"], indirect=True)
async def test_bdd_12_14_34_a_json_file_is_its_owners_and_a_changed_record_is_found(new_url: str) -> None:
    """A file has no engine that could refuse anything: it is readable and writable by its owner only."""
    kept = await sealed(new_url)
    assert os.stat(unquote(new_url.partition(":///")[2])).st_mode & 0o077 == 0
    await found_by_verification(kept)


async def test_bdd_12_14_34_no_call_of_the_api_changes_a_record(url: str) -> None:
    async with serving(url, sealing=False) as served:
        await served.post("/v1/keys", {"name": "k", "tenant": "acme"})
        before = await rows_of(served.room, JournalFilter(tenant="acme"))
        assert before
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            for path in ("/v1/audit", f"/v1/audit/{before[0][1]}", "/v1/audit/acme/checkpoint", "/v1/audit/acme/proof"):
                assert (await served.call(method, path, {})).status in (404, 405), (method, path)
            for collection in ("_journal", "journal", "strongroom_journal", "_strongroom_journal", "journal_trees"):
                path = f"/v1/tenants/acme/{collection}/{before[0][1]}"
                assert (await served.call(method, path, {})).status in (404, 405, 422), (method, path)
        rows = await rows_of(served.room, JournalFilter(tenant="acme"))
        assert rows[: len(before)] == before
