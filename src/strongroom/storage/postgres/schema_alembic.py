"""Alembic's comparison of declared tables with a live PostgreSQL, over the store's own asyncpg connection.

Alembic asks the database through SQLAlchemy, which is synchronous. It runs on a thread of its own, over a small DB-API
connection that hands each statement back to the event loop and the one asyncpg connection there. So the comparison
sees what that connection sees, under its lock, and needs neither a second connection nor a second driver.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import asyncpg
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.pool import StaticPool

from ...entities import Collection
from .schema_tables import described

Operation = tuple[Any, ...]
"""One difference in Alembic's form: `("add_column", schema, table, column)` and similar."""


async def operations(connection: asyncpg.Connection, schema: str, collections: Sequence[Collection]) -> list[Operation]:
    """The operations that would make the existing tables of `collections` equal to their declarations."""
    bridge = _Bridge(connection, asyncio.get_running_loop())
    return await asyncio.to_thread(_compared, bridge, schema, collections)


# --- A DB-API connection over asyncpg -------------------------------------------------------------------------


class _Cursor:
    """The part of a PEP 249 cursor that reflection uses: one statement, its description and its rows."""

    arraysize = 1
    rowcount = -1

    def __init__(self, owner: _Bridge) -> None:
        self._owner = owner
        self._rows: list[tuple[Any, ...]] = []
        self.description: list[tuple[Any, ...]] | None = None

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        names, self._rows = self._owner.run(sql, parameters)
        self.description = [(name, None, None, None, None, None, None) for name in names] if names else None

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        rows, self._rows = self._rows, []
        return rows

    def close(self) -> None:
        self._rows = []


class _Bridge:
    """A DB-API connection whose statements run on the event loop. Used from one other thread at a time."""

    def __init__(self, connection: asyncpg.Connection, loop: asyncio.AbstractEventLoop) -> None:
        self._connection = connection
        self._loop = loop

    def run(self, sql: str, parameters: Sequence[Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
        return asyncio.run_coroutine_threadsafe(self._run(sql, parameters), self._loop).result()

    async def _run(self, sql: str, parameters: Sequence[Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
        statement = await self._connection.prepare(sql)
        columns = statement.get_attributes()
        rows = await statement.fetch(*map(_bound, parameters, statement.get_parameters()))
        kinds = [column.type.name for column in columns]
        return [column.name for column in columns], [tuple(map(_plain, row, kinds)) for row in rows]

    def cursor(self) -> _Cursor:
        return _Cursor(self)

    def commit(self) -> None:
        """Nothing to do: the comparison only reads, and the transaction is its caller's."""

    rollback = close = commit


# As SQLAlchemy sets asyncpg up: JSON is read already, and the type "char" is text.


def _bound(value: Any, kind: asyncpg.Type) -> Any:
    return value.encode() if kind.name == "char" and isinstance(value, str) else value


def _plain(value: Any, kind: str) -> Any:
    if kind == "char" and isinstance(value, bytes):
        return value.decode().rstrip("\0")
    return json.loads(value) if kind in ("json", "jsonb") and isinstance(value, str) else value


class _NeverRaisedError(Exception):
    """SQLAlchemy wraps the driver's errors, which it knows by this class: so it lets asyncpg's through as they are."""


class _Dialect(PGDialect_asyncpg):
    """SQLAlchemy's own for asyncpg, which casts what it binds, spoken over `_Bridge` and so without greenlets."""

    is_async = False
    supports_statement_cache = True


def _engine(bridge: _Bridge) -> sa.Engine:
    dialect: Any = _Dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
    dialect.dbapi = SimpleNamespace(Error=_NeverRaisedError, paramstyle="numeric_dollar")
    pool = StaticPool(lambda: bridge, dialect=dialect)  # type: ignore[arg-type]
    engine = sa.Engine(pool, dialect, sa.make_url("postgresql://"))
    with engine.connect() as connection:
        dialect.initialize(connection)
    return engine


# --- Alembic's comparison -------------------------------------------------------------------------------------


def _compared(bridge: _Bridge, schema: str, collections: Sequence[Collection]) -> list[Operation]:
    metadata = sa.MetaData(schema=schema)
    for collection in collections:
        described(collection, metadata)
    wanted = {collection.name for collection in collections}

    def included(name: str | None, kind: str, parents: Mapping[str, str | None]) -> bool:
        if kind == "schema":
            return name == schema
        return kind != "table" or (parents["schema_name"] == schema and name in wanted)

    engine = _engine(bridge)
    try:
        with engine.connect() as connection:
            options = {"include_schemas": True, "include_name": included, "compare_type": True}
            found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    finally:
        engine.dispose()
    flat: list[Operation] = []
    for item in found:  # the changes of one column come as a list of their own
        flat += item if isinstance(item, list) else [item]
    return [one for one in flat if not str(one[0]).endswith("_comment")]  # comments: they change nothing
