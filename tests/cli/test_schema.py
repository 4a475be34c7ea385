"""`strongroom schema` on PostgreSQL, and its advice, roles and retention on every store that has them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest

from strongroom import Strongroom
from strongroom.cli import main
from strongroom.database import index_advice as advice
from strongroom.entities.entity import Index
from strongroom.entities.query import Query, Where
from strongroom.state.model import ENTITIES, Signal
from strongroom.storage import open_store
from strongroom.storage.port import Create
from strongroom.storage.postgres import index_statistics as own
from strongroom.testing.storage.samples import batch
from strongroom.testing.storage.schema import declare
from tests.helpers.servers import postgres
from tests.helpers.waiting import wait_until

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    for name in [n for n in os.environ if n.startswith(("STRONGROOM_", "DATABASE_", "DB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def server(request: pytest.FixtureRequest) -> postgres.Server:
    return postgres.start(request, "postgres-18", postgres.bundled())


def test_the_printed_roles_serve_an_apply_a_plan_and_retention(run: Run, server: postgres.Server) -> None:
    schema = postgres.new_schema()
    owner, app, retention = (f"{schema}_{part}" for part in ("owner", "app", "ret"))
    names = ("--owner", owner, "--application", app, "--retention", retention)
    status, sql, err = run("schema", "roles", *names, "--store", server.url(schema))
    assert (status, err) == (0, "")
    assert json.loads(run("schema", "roles", *names, "--json", "--store", server.url(schema))[1]) == {"sql": sql}
    server.execute(sql)

    def url(role: str) -> str:
        return server.url(schema, role)

    status, _, err = run("schema", "apply", "--store", url(app))
    assert status == 1
    assert "strongroom schema apply" in err
    assert run("schema", "apply", "--store", url(owner))[0] == 0
    status, out, err = run("schema", "plan", "--store", url(app))
    assert (status, out, err) == (0, "", "the store matches the declarations\n")
    past = f"SELECT {schema}.strongroom_make_partitions('2020-01-01', 1)"
    server.execute(past)
    assert run("schema", "retain", "30", "--store", url(retention)) == (0, "2 partitions dropped, 0 made\n", "")
    server.execute(past)
    assert run("schema", "retain", "30", "--store", url(app)) == (0, "2 partitions dropped, 0 made\n", "")
    status, out, _ = run("schema", "retain", "30", "--json", "--store", url(retention))
    assert (status, json.loads(out)) == (0, {"made": 0, "dropped": 0})


def test_names_that_cannot_be_roles_and_stores_without_roles_are_refused(run: Run, server: postgres.Server) -> None:
    status, out, err = run("schema", "roles", "--owner", "same", "--application", "same", "--store", server.url("s"))
    assert (status, out) == (2, "")
    assert "expected four different names" in err
    Path("x.db").touch()
    for command in (("roles",), ("retain", "30")):
        status, _, err = run("schema", *command, "--store", "sqlite:///x.db")
        assert status == 2
        assert "sqlite store has no" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_at_a_terminal_only(
    run: Run, server: postgres.Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = ("--store", server.url(postgres.new_schema()))
    module = tmp_path / "steps_entities.py"
    declared = "from strongroom import Entity, Index\nclass Note(Entity, collection='notes'{}):\n    text: str = ''\n"
    module.write_text(declared.format(""))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run("schema", "apply", "--entities", "steps_entities", *store)[0] == 0
    module.write_text(declared.format(", indexes=[Index('text')]"))
    del sys.modules["steps_entities"]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    status, out, _ = run("schema", "apply", "--entities", "steps_entities", *store)
    assert (status, out) == (0, "add index notes.text_index\n")
    assert "notes: building index notes.index.text (1 of 1)\n" in terminal.getvalue()


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        (tmp_path / "store.db").touch()
        return f"sqlite:///{tmp_path}/store.db"
    server: postgres.Server = request.getfixturevalue("server")
    return server.url(postgres.new_schema())


def test_advice_names_unused_and_missing_indexes(run: Run, store_url: str) -> None:
    arguments = ("--entities", "strongroom.state", "--store", store_url)
    assert run("schema", "advise", *arguments)[0] == 1, "nothing is made yet"
    assert run("schema", "apply", *arguments)[0] == 0
    assert run("schema", "advise", *arguments) == (0, "", "no advice for the counted queries\n")

    async def ask() -> None:
        async with Strongroom.open(store_url, entities=ENTITIES) as room:
            for _ in range(advice.LEAST_SEEN):
                await room.tenant("acme").find(Signal, Query(Where("source_service", "==", "x"), ("-created_at",)))

    asyncio.run(ask())
    status, out, err = run("schema", "advise", *arguments)
    assert (status, err) == (0, "4 pieces of advice\n")
    (missing,) = [line for line in out.splitlines() if line.startswith("missing")]
    assert re.fullmatch(
        r"missing index signals \(source_service, -created_at\): asked for 100 times since [-0-9: ]+ UTC, and no index "
        r'helps; declare Index\("source_service", "-created_at"\)',
        missing,
    )
    found = json.loads(run("schema", "advise", "--json", *arguments)[1])["advice"]
    assert {(item["kind"], *item["fields"]) for item in found} == {
        ("missing index", "source_service", "-created_at"),
        *(("unused index", *index.fields) for index in Signal.__collection__.indexes if index != Index("expires_at")),
    }


async def test_advice_names_postgresqls_unused_indexes_and_sequential_scans(
    server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("LEAST_READS", "LEAST_WHOLE_READS", "LARGE_ROWS"):
        monkeypatch.setattr(own, limit, 5)
    url = server.url(schema := postgres.new_schema())
    store = await open_store(url)
    declared = declare(
        indexes=(Index("name"), Index("created_at", "name"), Index("-name", unique=True)), scope="global"
    )
    await store.prepare([declared])
    for number in range(10):
        await store.commit(batch(None, Create("things", f"{number}", {"name": f"n{number}"})))
    await store.close()  # a session that ends hands in what it has counted
    connection = await asyncpg.connect(server.admin)
    for _ in range(10):
        await connection.fetch(f"SELECT * FROM {schema}.things")
    await connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
    await connection.fetch(f"SELECT * FROM {schema}.things ORDER BY name NULLS FIRST, id")
    await connection.close()

    store = await open_store(url)
    await store.prepare([declared])

    async def told() -> set[tuple[str, tuple[str, ...]]]:
        return {(item.kind, item.fields) for item in await store.advise()}  # type: ignore[attr-defined]

    expected = {("unused index", ("created_at", "name")), ("missing index", ())}
    await wait_until(lambda: _equals(told, expected))
    reasons = " ".join(item.reason for item in await store.advise())  # type: ignore[attr-defined]
    assert "since the s" in reasons
    await store.close()


async def _equals(told: Callable[[], Awaitable[object]], expected: object) -> bool:
    return bool(await told() == expected)


def test_the_files_for_firestores_tools_are_generated_from_the_declarations(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    arguments = ("schema", "export", "--format", "firestore", "--entities", "strongroom.state")
    status, out, err = run(*arguments, "--directory", str(folder))
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"wrote {folder}/firestore.indexes.json", f"wrote {folder}/firestore.rules"]
    indexes = json.loads((folder / "firestore.indexes.json").read_text())
    fields = [
        [(f["fieldPath"], f.get("order")) for f in one["fields"]]
        for one in indexes["indexes"]
        if one["collectionGroup"] == "signals"
    ]
    assert [("status", "ASCENDING"), ("created_at", "ASCENDING")] in fields, fields
    (expiring,) = [one for one in indexes["fieldOverrides"] if one["collectionGroup"] == "signals" and one["ttl"]]
    assert expiring["fieldPath"] == "expires_at"
    assert "allow read, write: if false;" in (folder / "firestore.rules").read_text()
    status, out, _ = run(*arguments, "--json")
    assert status == 0
    assert json.loads(out).keys() == {"firestore.indexes.json", "firestore.rules"}
