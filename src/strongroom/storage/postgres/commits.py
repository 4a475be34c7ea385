"""Commits on PostgreSQL: many batches in one transaction, as sets where possible, and an answer for each batch.

Three ways, the fastest first:

- Batches of no tenant without journal records (the usage ledger's) are one statement, committed in one round trip.
- Other batches run as one statement for each tenant. If every operation applied, the journal is appended and the
  transaction commits. Otherwise the stored versions tell which batches failed and why, and the others are tried again.
- Batches whose failure cannot be told that way (a unique index, a document changed twice) run one operation at a time,
  each batch in a savepoint.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from ...errors import StrongroomError, Unavailable
from ..port import Append, Batch, Committed, check_batch_size, check_operations
from ..sql import Line, RecentRows, quoted
from . import batch_sets as sets
from .batch_sets import Outcome, Sets, Statement
from .batch_steps import Locks, Steps
from .errors import DRIVER_ERRORS, UNMET, is_connection_lost, is_outdated, is_retried, sqlstate, translated
from .journal import Journal
from .journal_access import WITH_SECRETS
from .pool import Connector, close_politely
from .settings import Settings
from .tables import Statements, Table

MAX_ATTEMPTS = 12
"""How often a commit is tried that lost a deadlock, or its connection before the COMMIT."""
MAX_BACKOFF_S = 0.2
MAX_SET_ATTEMPTS = 3
"""How often batches are tried as sets before they run step by step. Each try answers the batches that fail."""
OUTCOME_ATTEMPTS = 20
"""How often the outcome of a commit whose answer was lost is asked for, while the server is gone or still commits. The
pauses between grow up to MAX_BACKOFF_S."""

_OF_ONE_BATCH = ("22", "23", "42", "54")
"""Classes of errors that concern one batch; all others end the whole transaction."""

Answer = Committed | Exception


@dataclass(slots=True)
class _Lost(Exception):
    """The connection was lost at the COMMIT. It has the transaction's id, the server's start, and a journal record."""

    xid: str
    started: Any
    record: tuple[int, str] | None


@dataclass(slots=True)
class _Group:
    """The batches of one transaction by their number, and the answers so far."""

    batches: Mapping[int, Batch]
    answers: dict[int, Answer] = field(default_factory=dict)

    def waiting(self) -> dict[int, Batch]:
        return {number: batch for number, batch in self.batches.items() if number not in self.answers}


class Commits:
    """Writes groups of batches on one connection of its own. Used by one task at a time."""

    def __init__(self, connector: Connector, tenants: set[str], recent: RecentRows) -> None:
        settings = connector.settings
        self._connector = connector
        self._settings: Settings = settings
        self._journal = Journal(settings.schema)
        self._locks = Locks(settings.schema)
        self._known_tenants = tenants
        self._recent = recent
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
        """The statement that begins a transaction which sees the whole journal."""
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
        """The answer for each batch. `as_sets`: no document is touched twice between them."""
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
        """Try to commit the batches without an answer. True: try those that still have none as sets again."""
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
                if not committed:  # or the outcome is unknown: then no batch of this attempt may be answered as done
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
        """Roll back. A connection that may be broken is closed."""
        connection = self._connection
        if connection is None:
            return
        try:
            if error is None or (isinstance(error, asyncpg.PostgresError) and not is_connection_lost(error)):
                if connection.is_in_transaction():
                    await connection.execute("ROLLBACK")
                return
        except DRIVER_ERRORS:
            pass  # closing it rolls back too
        self._connection = None
        connection.terminate()

    # --- As sets ----------------------------------------------------------------------------------------------

    async def _run_sets(self, group: _Group) -> bool:
        """Try the waiting batches as sets. True: those that have no answer then are to be tried as sets again."""
        by_tenant, outcomes = self._sets(group)
        all_sets = [group_sets for tenant_sets in by_tenant.values() for group_sets in tenant_sets.groups.values()]
        batches = {number: group.batches[number] for number in outcomes}
        of_secrets = any(one.table.of_secrets for one in all_sets)
        records = any(type(operation) is Append for batch in batches.values() for operation in batch.operations)
        alone = list(by_tenant) == [None] and not records and not of_secrets and not self._settings.pgbouncer
        connection = await self._connected()
        found: list[tuple[str | None, Statement, Sequence[Any]]] = []
        try:
            if alone:
                statement = by_tenant[None].statement(None, self._require)
                if await self._run_alone(connection, statement, outcomes):
                    for number, outcome in outcomes.items():
                        group.answers[number] = Committed(tuple(outcome.versions), outcome.values, None)
                    return True
                if not any(one.key[0] is sets.ADD for one in all_sets):  # versions alone tell why the others fail
                    verdicts = await self._verdicts(connection, [(None, statement, ())])
                    if verdicts:
                        group.answers |= verdicts
                        return True
            await self._begin_for(connection, next(iter(by_tenant), None))
            if of_secrets:
                await connection.execute(WITH_SECRETS)
            complete = True
            for position, (tenant, tenant_sets) in enumerate(by_tenant.items()):
                if position and tenant is not None:
                    await connection.fetch("SELECT set_config('app.current_tenant', $1, true)", tenant)
                statement = tenant_sets.statement(tenant)
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
        group.answers |= verdicts
        return bool(verdicts) or not found

    def _sets(self, group: _Group) -> tuple[dict[str | None, Sets], dict[int, Outcome]]:
        """The operations of the waiting batches by tenant, without tenants that only append; and an outcome for each
        batch. A batch that is wrong whatever is stored is answered with its error."""
        by_tenant: dict[str | None, Sets] = {}
        outcomes: dict[int, Outcome] = {}
        for number, batch in group.waiting().items():
            tenant_sets = by_tenant.get(batch.tenant)
            if tenant_sets is None:
                tenant_sets = by_tenant[batch.tenant] = Sets(self._statements, self._locks)
            try:
                tenant_sets.add(number, batch)
            except Exception as error:  # a malformed document is the fault of its own batch only
                group.answers[number] = error
            else:
                outcomes[number] = Outcome(batch)
        return {tenant: tenant_sets for tenant, tenant_sets in by_tenant.items() if tenant_sets.groups}, outcomes

    async def _run_alone(
        self, connection: asyncpg.Connection, statement: Statement, outcomes: Mapping[int, Outcome]
    ) -> bool:
        """Commit a statement of no tenant and without journal records in one round trip. False, and nothing is done,
        if not all of its operations apply. Raises Unavailable (outcome unknown) if the answer is lost."""
        try:
            rows = await connection.fetch(statement.sql, *statement.arguments)
        except asyncpg.PostgresError as error:
            if sqlstate(error) == UNMET:
                return False
            if is_connection_lost(error):  # the server may have ended it just after the commit
                raise await self._unknown_after(error) from error
            raise
        except DRIVER_ERRORS as error:
            raise await self._unknown_after(error) from error
        return sets.take(statement, rows, outcomes)

    async def _verdicts(
        self, connection: asyncpg.Connection, found: Iterable[tuple[str | None, Statement, Sequence[Any]]]
    ) -> dict[int, StrongroomError]:
        """For each batch with an operation that did not apply, the error of the first such operation."""
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
        # One round trip without parameters. The name is sent as hexadecimal digits, so it cannot be read as SQL.
        name = f"convert_from(decode('{tenant.encode().hex()}', 'hex'), 'UTF8')"
        await connection.execute(f"{self._begin}; SELECT set_config('app.current_tenant', {name}, true)")

    async def _finish(
        self,
        connection: asyncpg.Connection,
        group: _Group,
        batches: Mapping[int, Batch],
        outcomes: Mapping[int, Outcome],
    ) -> None:
        """Insert new tenants, append the journal, commit, answer."""
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
        # Set before the COMMIT: if its answer is lost, they hold if the transaction turns out to be committed.
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
        self._recent.committed([(sequence, *line) for sequence, line in enumerate(lines, base + 1)])

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
        """Whether the transaction committed. Raises Unavailable if that cannot be found out."""
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
        """Whether the transaction committed; None while it is in progress."""
        if self._started == lost.started:
            status = await connection.fetchval("SELECT pg_xact_status($1::text::xid8)", lost.xid)
            if status == "in progress":
                return None
            if status is not None:
                return bool(status == "committed")
        # After a restart another transaction may have the same id; no two journal records ever have one id.
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
