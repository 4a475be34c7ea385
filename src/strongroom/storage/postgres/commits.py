"""Batches into PostgreSQL: many in one transaction, as sets if that will do, and each with an answer of its own.

The way of a commit: the batches' operations run as one statement a tenant; if every one of them applied, the journal is
appended and all is committed. Those that did not apply are told by what is stored now, and the others begin again. What
cannot be told that way (a unique index, one document changed twice) runs an operation at a time, in savepoints.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from ...errors import StrongroomError, Unavailable
from ..port import (
    Append,
    Batch,
    Committed,
    check_batch_size,
    check_operations,
)
from ..sql import Line, quoted
from . import batch_sets as sets
from .batch_sets import Outcome, Sets, Statement
from .batch_steps import Locks, Steps
from .errors import (
    DRIVER_ERRORS,
    UNMET,
    is_connection_lost,
    is_outdated,
    is_retried,
    sqlstate,
    translated,
)
from .journal import Journal
from .journal_access import WITH_SECRETS
from .pool import Connector, close_politely
from .settings import Settings
from .tables import Statements, Table

MAX_ATTEMPTS = 12
"""How often a commit that lost a deadlock, or its connection before it was to commit, is begun again."""
MAX_BACKOFF_S = 0.2
MAX_SET_ATTEMPTS = 3
"""How often batches are tried as sets, those that do not apply being told each time, before they run step by step."""
OUTCOME_ATTEMPTS = 20
"""How often a commit whose answer was lost is asked after, with pauses up to MAX_BACKOFF_S, while the server is gone or
still at it."""

_OF_ONE_BATCH = ("22", "23", "42", "54")
"""Classes of errors that are one batch's own fault; the others end the transaction of all."""

Answer = Committed | Exception


@dataclass(slots=True)
class _Lost(Exception):
    """The connection was lost at the commit: the transaction's id, the server's start, and a journal record of its."""

    xid: str
    started: Any
    record: tuple[int, str] | None


@dataclass(slots=True)
class _Group:
    """Batches that begin, and perhaps commit, together: those that are still to be answered, by their number."""

    batches: Mapping[int, Batch]
    answers: dict[int, Answer] = field(default_factory=dict)

    def waiting(self) -> dict[int, Batch]:
        return {number: batch for number, batch in self.batches.items() if number not in self.answers}


class Commits:
    """Writes groups of batches on one connection of its own. Used by one task at a time."""

    def __init__(self, connector: Connector, tenants: set[str]) -> None:
        settings = connector.settings
        self._connector = connector
        self._settings: Settings = settings
        self._journal = Journal(settings.schema)
        self._locks = Locks(settings.schema)
        self._known_tenants = tenants
        self._statements: Mapping[str, Statements] = {}
        self._connection: asyncpg.Connection | None = None
        self._started: Any = None
        name = quoted(settings.schema)
        self._require = f"{name}.strongroom_require"
        # The tenant is set for each row as it is added, since the policy compares it with the row's.
        self._add_tenants = (
            f"INSERT INTO {name}.strongroom_tenants (tenant_id) "
            "SELECT set_config('app.current_tenant', u.tenant_id, true) FROM unnest($1::text[]) AS u(tenant_id) "
            "ON CONFLICT DO NOTHING"
        )
        self.taking_all: str | None = None
        """What a transaction begins with that is to see the journal as a whole."""
        self._begin = "BEGIN"
        if settings.pgbouncer:
            limits = "; ".join(f"SET LOCAL {key} = '{value}'" for key, value in settings.session_settings().items())
            self._begin = f"BEGIN; {limits}"

    def prepare(self, tables: Mapping[str, Table]) -> None:
        self._statements = {name: Statements(table) for name, table in tables.items()}

    def footprint(self) -> sets.Footprint:
        return sets.Footprint(self._statements)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await close_politely(connection)

    # --- A group of batches -----------------------------------------------------------------------------------

    async def write(self, batches: Sequence[Batch], *, as_sets: bool) -> list[Answer]:
        """What became of each batch. `as_sets`: no document is touched twice between them."""
        group = _Group(dict(enumerate(batches)))
        lost = 0
        for attempt in range(MAX_ATTEMPTS):
            if attempt > 1:
                await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF_S, 0.002 * 2**attempt)))  # noqa: S311
            try:
                as_sets = await self._attempt(group, as_sets=as_sets and attempt < MAX_SET_ATTEMPTS)
                if not group.waiting():
                    break
            except StrongroomError as error:
                self._answer_all(group, error)
                break
            except DRIVER_ERRORS as error:
                await self._abandon(error)
                lost += is_connection_lost(error)
                again = is_retried(error) or is_outdated(error) or (is_connection_lost(error) and lost <= 2)
                if again and attempt + 1 < MAX_ATTEMPTS and not isinstance(error, TimeoutError):
                    continue
                if sqlstate(error)[:2] in _OF_ONE_BATCH and len(group.waiting()) > 1:
                    for number, batch in group.waiting().items():
                        group.answers[number] = (await self.write([batch], as_sets=False))[0]
                else:
                    self._answer_all(group, translated(error, self._settings.place))
                break
            except BaseException as error:
                await self._abandon(error)
                raise
        else:
            self._answer_all(
                group, Unavailable(f"{self._settings.place}: other transactions were in the way: try again")
            )
        return [group.answers[number] for number in range(len(batches))]

    def _answer_all(self, group: _Group, error: StrongroomError) -> None:
        for number in group.waiting():
            own = type(error).__new__(type(error))
            StrongroomError.__init__(own, error.message, **error.details)
            group.answers[number] = own

    async def _attempt(self, group: _Group, *, as_sets: bool) -> bool:
        """Try to commit what waits. What has no answer then is to be tried again; True: as sets."""
        before = dict(group.answers)
        try:
            if not as_sets:
                await self._run_steps(group)
                return False
            return await self._run_sets(group)
        except _Lost as lost:
            await self._abandon(lost)
            committed = False
            try:
                committed = await self._was_committed(lost)
            finally:
                if not committed:  # or nobody knows: then nothing of this attempt may be told as done
                    group.answers = before
            return as_sets

    async def _connected(self) -> asyncpg.Connection:
        connection = self._connection
        if connection is None or connection.is_closed():
            connection = await self._connector.connect()
            try:
                self._started = await connection.fetchval("SELECT pg_postmaster_start_time()")
            except BaseException:
                connection.terminate()
                raise
            self._connection = connection
        return connection

    async def _abandon(self, error: BaseException | None = None) -> None:
        """Take back what was not committed. A connection that may be of no use any more is thrown away."""
        connection = self._connection
        if connection is None:
            return
        try:
            if error is None or (isinstance(error, asyncpg.PostgresError) and not is_connection_lost(error)):
                if connection.is_in_transaction():
                    await connection.execute("ROLLBACK")
                return
        except DRIVER_ERRORS:
            pass  # thrown away, which rolls back too
        self._connection = None
        connection.terminate()

    # --- As sets ----------------------------------------------------------------------------------------------

    async def _run_sets(self, group: _Group) -> bool:
        waiting = group.waiting()
        by_tenant: dict[str | None, Sets] = {}
        outcomes: dict[int, Outcome] = {}
        for number, batch in waiting.items():
            tenant_sets = by_tenant.get(batch.tenant)
            if tenant_sets is None:
                tenant_sets = by_tenant[batch.tenant] = Sets(self._statements, self._locks)
            try:
                tenant_sets.add(number, batch)
            except Exception as error:  # a document that is none is its own batch's fault, and nobody else's
                group.answers[number] = error
            else:
                outcomes[number] = Outcome(batch)
        statements = {tenant: s.statement(tenant) for tenant, s in by_tenant.items() if s.groups}
        connection = await self._connected()
        batches = {number: waiting[number] for number in outcomes}
        lines = any(type(op) is Append for batch in batches.values() for op in batch.operations)
        found: list[tuple[str | None, Statement, Sequence[Any]]] = []
        try:
            of_secrets = any(group.table.of_secrets for s in by_tenant.values() for group in s.groups.values())
            alone = list(statements) == [None] and not lines and not self._settings.pgbouncer and not of_secrets
            if alone and await self._run_alone(connection, by_tenant[None], outcomes):
                for number, outcome in outcomes.items():
                    group.answers[number] = Committed(tuple(outcome.versions), outcome.values, None)
                return True
            await self._begin_for(connection, next(iter(statements), None))
            if of_secrets:
                await connection.execute(WITH_SECRETS)
            complete, first = True, True
            for tenant, statement in statements.items():
                if not first and tenant is not None:
                    await connection.fetch("SELECT set_config('app.current_tenant', $1, true)", tenant)
                first = False
                rows = await connection.fetch(statement.sql, *statement.arguments)
                found.append((tenant, statement, rows))
                complete = sets.take(statement, rows, outcomes) and complete
            if complete:
                await self._finish(connection, group, batches, outcomes)
                return True
            verdicts = await self._verdicts(connection, found)
        except asyncpg.PostgresError as error:
            await self._abandon()
            if sqlstate(error)[:2] in _OF_ONE_BATCH and not is_outdated(error):
                return False
            raise
        await self._abandon()
        for number, verdict in verdicts.items():
            group.answers[number] = verdict
        return bool(verdicts) or not found

    async def _run_alone(self, connection: asyncpg.Connection, given: Sets, outcomes: Mapping[int, Outcome]) -> bool:
        """All in one round trip, for batches of no tenant that append nothing. False, and nothing done, if not all of
        their operations apply."""
        statement = given.statement(None, self._require)
        try:
            rows = await connection.fetch(statement.sql, *statement.arguments)
        except asyncpg.PostgresError as error:
            if sqlstate(error) == UNMET:
                return False
            if is_connection_lost(error):  # it may have been ended just after the commit
                raise await self._unknown_after(error) from error
            raise
        except DRIVER_ERRORS as error:
            raise await self._unknown_after(error) from error
        return sets.take(statement, rows, outcomes)

    async def _verdicts(
        self, connection: asyncpg.Connection, found: Iterable[tuple[str | None, Statement, Sequence[Any]]]
    ) -> dict[int, StrongroomError]:
        """For each batch of which an operation did not apply, the first such one's error."""
        first: dict[int, tuple[int, StrongroomError]] = {}
        for tenant, statement, rows in found:
            if tenant is not None:
                await connection.fetch("SELECT set_config('app.current_tenant', $1, true)", tenant)
            for table, slots in sets.unapplied(statement, rows):
                ids = [slot.operation.id for slot in slots]  # type: ignore[union-attr]  # an Append is in no set
                scope = "tenant_id = $2 AND " if table.tenant_scoped else ""
                sql = f"SELECT id, version FROM {table.sql_name} WHERE {scope}id = ANY($1::text[])"
                versions = dict(await connection.fetch(sql, ids, *((tenant,) if table.tenant_scoped else ())))
                for slot, id in zip(slots, ids, strict=True):
                    error = sets.verdict(slot, versions.get(id, 0))
                    if error is not None and (slot.batch not in first or slot.number < first[slot.batch][0]):
                        first[slot.batch] = slot.number, error
        return {batch: error for batch, (_, error) in first.items()}

    # --- Step by step -----------------------------------------------------------------------------------------

    async def _run_steps(self, group: _Group) -> None:
        waiting = group.waiting()
        connection = await self._connected()
        await connection.execute(self._begin)
        if any(self._has_secrets(batch) for batch in waiting.values()):
            await connection.execute(WITH_SECRETS)
        steps = Steps(connection, self._statements, self._locks)
        outcomes: dict[int, Outcome] = {}
        failed: dict[int, Answer] = {}
        for number, batch in waiting.items():
            await connection.execute("SAVEPOINT batch")
            try:
                check_operations(batch)
                check_batch_size(batch)
                outcome = Outcome(batch)
                outcome.versions, outcome.values = await steps.apply(batch)
                outcomes[number] = outcome
            except asyncpg.PostgresError as error:
                if sqlstate(error)[:2] not in _OF_ONE_BATCH or is_outdated(error):
                    raise
                failed[number] = translated(error, self._settings.place)
            except DRIVER_ERRORS:
                raise
            except Exception as error:
                failed[number] = error
            if number in failed:
                await connection.execute("ROLLBACK TO SAVEPOINT batch")
            else:
                await connection.execute("RELEASE SAVEPOINT batch")
        await self._finish(connection, group, {number: waiting[number] for number in outcomes}, outcomes)
        group.answers |= failed

    # --- The end of a transaction -----------------------------------------------------------------------------

    async def _begin_for(self, connection: asyncpg.Connection, tenant: str | None) -> None:
        if tenant is None:
            await connection.execute(self._begin)
            return
        # In one round trip, which binds nothing: as hexadecimal digits a name can be nothing but a name.
        name = f"convert_from(decode('{tenant.encode().hex()}', 'hex'), 'UTF8')"
        await connection.execute(f"{self._begin}; SELECT set_config('app.current_tenant', {name}, true)")

    async def _finish(
        self,
        connection: asyncpg.Connection,
        group: _Group,
        batches: Mapping[int, Batch],
        outcomes: Mapping[int, Outcome],
    ) -> None:
        """Note new tenants, append the journal, commit, answer."""
        if not outcomes:
            await connection.execute("ROLLBACK")
            return
        new = {
            batch.tenant
            for batch in batches.values()
            if batch.tenant is not None and batch.tenant not in self._known_tenants and self._has_documents(batch)
        }
        if new:
            await connection.fetch(self._add_tenants, sorted(new))
        lines: list[Line] = []
        last: dict[int, int] = {}
        for number, outcome in outcomes.items():
            own = outcome.lines(batches[number])
            if own:
                lines += own
                last[number] = len(lines)
        base, record, xid = 0, None, None
        if lines:
            end, xid = await self._journal.append(connection, lines)
            base = end - len(lines)
            record = base + 1, lines[0][0]
        else:
            xid = await connection.fetchval("SELECT pg_current_xact_id()::text")
        answers: dict[int, Answer] = {
            number: Committed(tuple(outcome.versions), outcome.values, base + last[number] if number in last else None)
            for number, outcome in outcomes.items()
        }
        # Before the commit: if its answer is lost, they are true if the transaction is found committed.
        group.answers |= answers
        try:
            await connection.execute("COMMIT")
        except DRIVER_ERRORS as error:
            if not is_connection_lost(error):
                for number in answers:
                    del group.answers[number]
                raise
            raise _Lost(xid, self._started, record) from error
        self._known_tenants |= new

    def _has_documents(self, batch: Batch) -> bool:
        return any(
            type(op) is not Append and self._statements[op.collection].table.tenant_scoped  # type: ignore[union-attr]
            for op in batch.operations
        )

    def _has_secrets(self, batch: Batch) -> bool:
        tables = (self._statements.get(getattr(op, "collection", "")) for op in batch.operations)
        return any(one is not None and one.table.of_secrets for one in tables)

    # --- A commit whose answer was lost -----------------------------------------------------------------------

    async def _was_committed(self, lost: _Lost) -> bool:
        """Whether the transaction committed. Unavailable if that cannot be known."""
        for attempt in range(OUTCOME_ATTEMPTS):
            if attempt:
                await asyncio.sleep(random.uniform(0.5, 1) * min(MAX_BACKOFF_S, 0.01 * 2**attempt))  # noqa: S311
            try:
                connection = await self._connected()
                found = await self._outcome(connection, lost)
            except Unavailable:
                continue
            except DRIVER_ERRORS as error:
                await self._abandon(error)
                continue
            if found is not None:
                return found
        raise self._unknown()

    async def _outcome(self, connection: asyncpg.Connection, lost: _Lost) -> bool | None:
        """None: the server is still at it."""
        if self._started == lost.started:
            status = await connection.fetchval("SELECT pg_xact_status($1::text::xid8)", lost.xid)
            if status == "in progress":
                return None
            if status is not None:
                return bool(status == "committed")
        # After a restart a transaction's id may have been given to another one; a record's id never is.
        if lost.record is None:
            raise self._unknown()
        if self.taking_all is None:
            raise self._unknown()
        async with connection.transaction(readonly=True):
            await connection.execute(self.taking_all)
            return bool(await connection.fetch(self._journal.recorded, *lost.record))

    async def _unknown_after(self, error: BaseException) -> Unavailable:
        await self._abandon(error)
        return self._unknown()

    def _unknown(self) -> Unavailable:
        return Unavailable(
            f"{self._settings.place}: the connection was lost during a commit, and whether it was done is not known: "
            "read before you try again",
            outcome="unknown",
        )
