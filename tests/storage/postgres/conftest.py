"""Fixtures of the tests that change a PostgreSQL schema: a database that no other process uses, a schema, its owner."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tests.helpers.postgres_schema import Place, Settings, split
from tests.helpers.servers import postgres

_numbers = itertools.count()
_databases: dict[str, str] = {}


@pytest.fixture
def dsn(request: pytest.FixtureRequest) -> str:
    """The URL, as administrator, of a database that this process has to itself: the build of an index waits for the
    transactions of its database, and other tests leave some open."""
    version = getattr(request, "param", "bundled")
    if version not in _databases:
        binaries = postgres.bundled() if version == "bundled" else postgres.installed()
        assert binaries is not None
        server = postgres.start(request, "postgres-18" if version == "bundled" else "postgres-installed", binaries)
        name = f"schema_{os.getpid()}"
        server.execute(f"CREATE DATABASE {name}")
        _databases[version] = postgres.admin_dsn(server.port, name)
    return _databases[version]


@pytest.fixture
async def admin(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def place(admin: asyncpg.Connection, dsn: str) -> Place:
    """A role that may make schemas, and no schema yet."""
    unique = f"{os.getpid()}_{next(_numbers)}"
    owner = f"owner_{unique}"
    database = await admin.fetchval("SELECT current_database()")
    await admin.execute(f"CREATE ROLE {owner} LOGIN PASSWORD 'secret'; GRANT CREATE ON DATABASE {database} TO {owner}")
    return Place(dsn, Settings(f"s_{unique}"), owner)


@pytest.fixture
async def connection(place: Place) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the schema's owner-to-be."""
    opened = await place.connect()
    yield opened
    await opened.close()


@pytest.fixture(params=["roles first", "apply first"])
async def roles(request: pytest.FixtureRequest, admin: asyncpg.Connection, place: Place) -> AsyncIterator[Any]:
    async with split(admin, place, apply_first=request.param == "apply first") as made:
        yield made
