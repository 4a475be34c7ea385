"""`prepare` on PostgreSQL: compares the schema with the declarations, and changes it while other processes use it.

A start where nothing differs costs one round trip or two: the declarations that were last applied are kept beside a
fingerprint of each table. Only if one of them differs is the live schema compared, by Alembic.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol

import asyncpg

from ...entities import Collection
from ...errors import Denied, SchemaError, Unavailable
from ..port import ChangeKind, SchemaChange
from . import schema_apply as online
from .partitions import ensure_partitions
from .roles import check_role
from .schema_compare import Difference, changes_of, compare
from .schema_layout import State, read_state
from .schema_tables import RESERVED_PREFIX, declaration, stored

LOCK_WAIT_S = 300.0
"""How long an apply waits for another one to end."""
_LOCK_PAUSE_S = 0.1

_log = logging.getLogger(__name__)

__all__ = ["check_role", "prepare", "unchangeable"]


class Settings(Protocol):
    """The settings that `prepare` needs."""

    @property
    def schema(self) -> str: ...

    @property
    def pgbouncer(self) -> bool: ...


async def prepare(
    connection: asyncpg.Connection,
    settings: Settings,
    collections: Sequence[Collection],
    *,
    mode: Literal["apply", "plan"] = "apply",
    allow_destructive: bool = False,
) -> tuple[SchemaChange, ...]:
    """As `Store.prepare`. `connection` is in no transaction. SchemaError, with the command to run, if something
    differs and this role may not change it; Unavailable if another apply, or users of the tables, block it."""
    _refuse_reserved(collections)
    if mode == "plan":
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            state = await read_state(connection, settings.schema)
            return (await _plan(connection, settings.schema, state, collections)).changes
    state = await read_state(connection, settings.schema)
    if state.made:
        await _keep_partitions_ahead(connection, settings)
    if state.made and not state.outdated and not _differing(state, collections, drift=state.may_change):
        return ()
    if not state.may_change:
        if not state.made:
            raise SchemaError(
                f"schema {settings.schema} is not made yet, and this role may not make it: run what "
                "`strongroom schema roles` prints, then `strongroom schema apply --store URL` with the owner's URL"
            )
        plan = await _plan(connection, settings.schema, state, collections)
        if not plan.changes:
            return ()
        raise SchemaError(
            f"schema {settings.schema} does not fit the declarations, and this role may not change it: "
            f"{'; '.join(map(str, plan.changes))}; run `strongroom schema apply --store URL` with the owner's URL"
        )
    async with _sole_applier(connection, settings):
        state = await read_state(connection, settings.schema)
        plan = await _plan(connection, settings.schema, state, collections)
        refused = [change for change in plan.changes if change.destructive]
        if refused and not allow_destructive:
            raise SchemaError(
                f"the declarations would lose stored data or not match it: {'; '.join(map(str, refused))}; "
                "allow_destructive permits it"
            )
        await _apply(connection, settings, state, plan, collections)
        return plan.changes


async def unchangeable(connection: asyncpg.Connection, schema: str) -> str | None:
    """Why the connected role may not change the schema, and which role may; None if this role may."""
    if (await read_state(connection, schema)).may_change:
        return None
    role, owner = await connection.fetchrow(
        "SELECT current_user::text, (SELECT pg_get_userbyid(nspowner)::text FROM pg_namespace WHERE nspname = $1)",
        schema,
    )
    whom = f"that of the schema's owner, {owner}" if owner is not None else "that of a role which may make a schema"
    return f"role {role} may not make tables in schema {schema}: name another URL, {whom}"


async def _keep_partitions_ahead(connection: asyncpg.Connection, settings: Settings) -> None:
    """Every node does this at its start. A failure does not stop the start: the default partition takes the records."""
    try:
        made = await ensure_partitions(connection, settings, datetime.now(UTC))
    except (Denied, Unavailable) as error:
        _log.warning("schema %s: the journal's next partitions were not made: %s", settings.schema, error)
        return
    if made:
        _log.info("schema %s: made %d partitions of the journal", settings.schema, made)


def _refuse_reserved(collections: Sequence[Collection]) -> None:
    if reserved := [c.name for c in collections if c.name.startswith(RESERVED_PREFIX)]:
        raise SchemaError(
            f"collection {reserved[0]!r}: found a name that begins with {RESERVED_PREFIX}, which PostgreSQL's store "
            "keeps for its own tables: choose another"
        )


def _differing(state: State, collections: Sequence[Collection], *, drift: bool) -> list[Collection]:
    """The collections whose declaration is not the one applied, or (`drift`) whose table was changed since."""
    return [
        collection
        for collection in collections
        if state.applied.get(collection.name) != stored(declaration(collection))
        or (drift and collection.name in state.drifted)
    ]


# --- Planning -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """`created` are the collections without a table; `differences` are those of the rest, some with nothing to do."""

    created: tuple[Collection, ...]
    differences: Mapping[str, Difference]
    changes: tuple[SchemaChange, ...]


async def _plan(connection: asyncpg.Connection, schema: str, state: State, collections: Sequence[Collection]) -> _Plan:
    standing = [collection for collection in collections if collection.name in state.tables]
    found = await compare(connection, schema, standing, state.applied)
    differences = {difference.collection.name: difference for difference in found}
    changes: list[SchemaChange] = []
    if state.outdated is not None:
        changes.append(SchemaChange(ChangeKind.CHANGE_POLICIES, "strongroom_journal", detail=state.outdated))
    for collection in collections:
        difference = differences.get(collection.name)
        if difference is None:
            changes.append(SchemaChange(ChangeKind.CREATE_COLLECTION, collection.name))
            continue
        name, by_tenant = collection.name, collection.tenant_scoped
        filled = difference.needs_values and await online.has_documents(connection, schema, name, by_tenant)
        changes += changes_of(difference, filled)
    created = tuple(collection for collection in collections if collection.name not in differences)
    return _Plan(created, differences, tuple(changes))


# --- Applying -------------------------------------------------------------------------------------------------


async def _apply(
    connection: asyncpg.Connection, settings: Settings, state: State, plan: _Plan, collections: Sequence[Collection]
) -> None:
    schema = settings.schema
    if state.outdated is not None:
        if settings.pgbouncer:
            raise _needs_session(schema)
        await online.upgrade(connection, schema)
        await online.index_journal(connection, schema)
        for difference in plan.differences.values():
            await online.comment(connection, schema, difference.collection)
    replaced = {name for name, difference in plan.differences.items() if difference.rescoped}
    changed = {change.collection for change in plan.changes} & plan.differences.keys()
    used = [d for name, d in plan.differences.items() if name in changed and name not in replaced]
    if used and settings.pgbouncer:
        raise _needs_session(schema)
    for difference in used:
        await online.refuse_duplicates(connection, schema, difference)
    for difference in used:
        await online.change(connection, schema, difference)
    new = [*plan.created, *(d.collection for name, d in plan.differences.items() if name in replaced)]
    unsaid = [c for c in _differing(state, collections, drift=True) if c.name not in changed and c not in new]
    async with connection.transaction():
        if new or not state.made:
            await online.create(connection, schema, state, new, replaced)
        for collection in unsaid:  # only the kept declaration is new, the table fits
            await online.finish(connection, schema, collection)


def _needs_session(schema: str) -> SchemaError:
    return SchemaError(
        f"schema {schema}: tables in use are changed in steps that need a session of their own, which pgbouncer "
        "does not give: run `strongroom schema apply --store URL` with a URL that goes to PostgreSQL directly"
    )


@asynccontextmanager
async def _sole_applier(connection: asyncpg.Connection, settings: Settings) -> AsyncIterator[None]:
    """Keep every other apply of this schema out. Through pgbouncer, which lends no session, in one transaction."""
    # Polled instead of awaited: the build of an index waits for every transaction that waits for a lock.
    key = int.from_bytes(
        hashlib.sha256(f"strongroom schema {settings.schema}".encode()).digest()[:8], "big", signed=True
    )
    deadline = time.monotonic() + LOCK_WAIT_S
    if settings.pgbouncer:
        while True:
            async with connection.transaction():
                if await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", key):
                    yield
                    return
            await _pause(settings, deadline)
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", key):
        await _pause(settings, deadline)
    try:
        await connection.execute(
            f"SET statement_timeout = {online.STATEMENT_TIMEOUT_S * 1000}; "
            f"SET lock_timeout = {online.INDEX_LOCK_TIMEOUT_S * 1000}"
        )
        yield
    finally:
        if not connection.is_closed():
            await connection.execute("RESET statement_timeout; RESET lock_timeout")
            await connection.fetchval("SELECT pg_advisory_unlock($1)", key)


async def _pause(settings: Settings, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise Unavailable(f"schema {settings.schema}: another process has been changing it for {LOCK_WAIT_S:g} s")
    await asyncio.sleep(_LOCK_PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311  # jitter, not a secret
