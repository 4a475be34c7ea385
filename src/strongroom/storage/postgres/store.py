"""The PostgreSQL store: any number of nodes, row-level security in the engine, reads in one round trip, group commit.

Connections: reads borrow one from the pool. Two lanes write, each one group of batches at a time on a connection of
its own: one lane for tenants' batches, one for batches of no tenant, such as the usage ledger's. One more connection
listens for the commits of other nodes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import asyncpg

from ...cooperative import in_slices
from ...entities import Aggregate, Collection, Document, Filter, Query
from ...errors import Gone, InvalidInput, Problem, StoreError, StrongroomError, Unavailable
from ..journal_rows import record_of
from ..port import (
    MAX_CHANGES_PAGE,
    MAX_TENANTS_PAGE,
    WHOLE_JOURNAL,
    Advice,
    Batch,
    Capabilities,
    ChangesPage,
    Committed,
    Health,
    JournalFilter,
    JournalRow,
    RowsPage,
    SchemaChange,
    past_the_end,
)
from ..sql import RecentRows, canonical, content_size, quoted
from . import index_statistics, journal_upkeep, partitions, schema
from .commits import Commits
from .errors import DRIVER_ERRORS, is_connection_lost, is_outdated, translated
from .journal import Journal
from .journal_access import taking_all
from .lane import Lane
from .listener import Listener
from .pool import Connector, Pool, Pooled, close_politely
from .roles import check_role, roles_sql
from .settings import read_settings
from .tables import Table

OWN_CONNECTIONS = 3
"""Of max_connections: one for each lane, and one that listens. The others read."""

T = TypeVar("T")
_CURSOR = re.compile(r"[0-9]{1,18}")
_END = "end"
_GREATEST_SEQUENCE = 2**63 - 1


class PostgresStore:
    """The storage port over one schema of a PostgreSQL database, 15 or later.

    `url` is `postgresql://user:password@host:port/database?schema=strongroom&…`. Options, with their defaults:

    - `schema` (strongroom): the schema of all tables. Nothing else may be in it.
    - `max_connections` (20): the most connections of this process.
    - `connect_timeout_s` (5): to connect, or to wait for one of the connections.
    - `statement_timeout_s` (30), `lock_timeout_s` (5): a statement that runs or waits longer fails with Unavailable.
    - `pgbouncer` (0): 1 if a pooler in transaction mode is in between. Then the store relies on no session: it prepares
      no statements, sets time-outs in each transaction, and finds other nodes' changes by polling alone.

    The driver's other options (`sslmode`, `sslrootcert`, `application_name`, …) are passed on to it.
    """

    def __init__(self, url: str) -> None:
        self.settings = read_settings(url)
        name = quoted(self.settings.schema)
        self._place = self.settings.place
        self._connector = Connector(self.settings)
        self._journal = Journal(self.settings.schema)
        self._tables: Mapping[str, Table] = {}
        self._known_tenants: set[str] = set()
        self._recent = RecentRows()
        self._taking_all: str | None = None
        """The statement that begins a transaction which sees the whole journal; None if this role may not see it."""
        self._pool: Pool | None = None
        self._platform: Lane | None = None
        self._tenants: Lane | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._listener = Listener(self._connector, self._journal.channel, self._changed)
        self._tenants_page = (
            f"SELECT tenant_id FROM {name}.strongroom_tenants WHERE tenant_id > $1 ORDER BY tenant_id LIMIT $2"
        )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("postgresql", multi_process=True, persistent=True)

    # --- Opening and closing ---

    async def open(self) -> None:
        if self._pool is not None:
            return
        pool = Pool(self._connector, self.settings.max_connections - OWN_CONNECTIONS)
        try:
            async with pool.connection() as connection:
                await check_role(connection, self.settings)
                await self._find_reader(connection)
        except DRIVER_ERRORS as error:
            await pool.close()
            raise translated(error, self._place) from error
        except BaseException:
            await pool.close()
            raise
        self._pool = pool
        self._recent.clear()
        self._platform, self._tenants = (
            Lane(self._place, Commits(self._connector, self._known_tenants, self._recent)) for _ in range(2)
        )
        for lane in self._lanes():
            lane.commits.taking_all = self._taking_all
        if self._callbacks:
            self._listen()

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        await self._listener.close()
        for lane in self._lanes():
            await lane.close()
        await pool.close()
        self._tables = {}

    def _lanes(self) -> list[Lane]:
        return [lane for lane in (self._platform, self._tenants) if lane is not None]

    def _opened(self) -> Pool:
        if self._pool is None:
            raise Unavailable(f"{self._place}: the store is not open")
        return self._pool

    async def prepare(
        self,
        collections: Sequence[Collection],
        *,
        mode: Literal["apply", "plan"] = "apply",
        allow_destructive: bool = False,
    ) -> tuple[SchemaChange, ...]:
        self._opened()
        if mode == "plan":
            return await self._fit(collections, mode, allow_destructive)
        lanes = self._lanes()
        async with lanes[0].writing, lanes[1].writing:
            changes = await self._fit(collections, mode, allow_destructive)
            self._tables = {c.name: Table(self.settings.schema, c) for c in collections}
            for lane in lanes:
                lane.commits.prepare(self._tables)
        return changes

    async def _fit(
        self, collections: Sequence[Collection], mode: Literal["apply", "plan"], allow_destructive: bool
    ) -> tuple[SchemaChange, ...]:
        """Compare or change the schema on a connection of its own, since it changes settings and may take long."""
        connection = await self._connector.connect()
        try:
            changes = await schema.prepare(
                connection, self.settings, collections, mode=mode, allow_destructive=allow_destructive
            )
            if mode == "apply":
                await self._find_reader(connection)
                if self._taking_all is None:
                    raise StoreError(
                        f"{self._place}: this role may not read the journal as a whole, as the change feed does: as an "
                        "administrator run what `strongroom schema roles` prints"
                    )
            return changes
        except DRIVER_ERRORS as error:
            raise translated(error, self._place) from error
        finally:
            await close_politely(connection)

    async def _find_reader(self, connection: asyncpg.Connection) -> None:
        self._taking_all = await taking_all(connection, self.settings.schema)
        for lane in self._lanes():
            lane.commits.taking_all = self._taking_all

    # --- Reading ---

    def _table(self, collection: str, tenant: str | None) -> Table:
        table = self._tables.get(collection)
        if table is None:
            self._opened()
            raise InvalidInput(f"{collection}: the store was not prepared for this collection")
        if tenant is None and table.tenant_scoped:
            raise InvalidInput([Problem("tenant", f"is needed: {collection} belongs to tenants")])
        return table

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        table = self._tables.get(collection)
        if table is None or (tenant is None and table.tenant_scoped):
            table = self._table(collection, tenant)  # raises the reason
        values = (tenant, id) if table.tenant_scoped else (id,)
        # Point reads are the most frequent calls: the usual case makes no call that it can avoid.
        pool = self._pool or self._opened()
        lent = pool.take()
        statement = lent.statements.get(table.by_id) if lent is not None else None
        if lent is None or statement is None:
            if lent is not None:
                pool.give_back(lent)
            rows = await self._rows(table.by_id, values)
        else:
            try:
                rows = await statement.fetch(*values)
            except BaseException as error:
                self._failed(pool, lent, error, last=False)
                rows = await self._rows(table.by_id, values)
            else:
                pool.give_back(lent)
        return table.decode(rows[0]) if rows else None

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        table = self._table(collection, tenant)
        select, values = table.pages.find(query)
        rows = await self._rows(select.sql, [tenant, *values] if table.tenant_scoped else values)
        return await in_slices(select.decode, rows)

    async def aggregate(
        self, collection: str, tenant: str | None, aggregates: Sequence[Aggregate], where: Filter | None
    ) -> dict[str, Any]:
        table = self._table(collection, tenant)
        totals, values = table.pages.aggregate(aggregates, where)
        return totals.read((await self._rows(totals.sql, [tenant, *values] if table.tenant_scoped else values))[0])

    async def changes(
        self, after: str | None, *, tenant: str | None = None, limit: int = MAX_CHANGES_PAGE
    ) -> ChangesPage:
        if after == _END:
            return ChangesPage((), str(await self._head()))
        position, limit = _position(after), min(limit, MAX_CHANGES_PAGE)
        if tenant is None:
            rows = await self._all_rows(self._journal.page, (position, limit))
        else:
            rows = await self._rows(self._journal.page_of_tenant, (position, limit, tenant))
        head, floor = rows[0][:2]
        if position > head:
            raise past_the_end()
        if after is not None and position < floor:
            raise Gone("the records that come after the cursor are past the journal's retention")
        lines = [row[2:] for row in rows if row[2] is not None]
        records = tuple(await in_slices(record_of, lines))
        # At the end the cursor is the journal's head, not the tenant's last record: a quiet tenant's cursor would one
        # day be past the retention.
        cursor = str(records[-1].sequence if len(records) == limit else head)
        return ChangesPage(records, cursor, content_size(lines))

    async def rows(
        self, after: str | None = None, where: JournalFilter = WHOLE_JOURNAL, limit: int = MAX_CHANGES_PAGE
    ) -> RowsPage:
        position, limit = _position(after), min(limit, MAX_CHANGES_PAGE)
        if where == WHOLE_JOURNAL and after is not None and (recent := self._recent.after(position, limit)):
            return RowsPage(recent, str(recent[-1][0]))
        texts = (where.tenant, where.actor, where.action, where.collection, where.entity_id, where.request_id)
        if any(text is not None and "\0" in text for text in texts):  # no record has it, and PostgreSQL refuses it
            return RowsPage((), str(await self._head()))
        sql, values = self._journal.rows(where, position, limit)
        if where.tenant is None:
            found = await self._all_rows(sql, values)
        else:
            found = await self._rows(sql, values)
        head: int = found[0][0]
        if position > head:
            raise past_the_end()
        rows = await in_slices(_journal_row, found if found[0][2] is not None else ())
        return RowsPage(rows, str(rows[-1][0] if len(rows) == limit else head))

    async def _head(self) -> int:
        """The journal's last sequence."""
        head: int = (await self._rows(self._journal.head, ()))[0][0]
        return head

    async def tenants(self, after: str | None = None, limit: int = MAX_TENANTS_PAGE) -> list[str]:
        rows = await self._all_rows(self._tenants_page, (after or "", min(limit, MAX_TENANTS_PAGE)))
        return [row[0] for row in rows]

    async def now_us(self) -> int:
        rows = await self._rows("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint", ())
        now: int = rows[0][0]
        return now

    async def _rows(self, sql: str, values: Sequence[Any], begin: str | None = None) -> Sequence[Any]:
        """The rows of one read, in a transaction that begins with `begin` if it is given. If its connection is lost,
        the read is tried once more on a new one."""
        pool = self._pool or self._opened()
        if begin is None and self.settings.pgbouncer:
            # The driver asks for a statement's types first; only in a transaction is it one server throughout.
            begin = "BEGIN READ ONLY"
        for last in (False, True):
            lent = pool.take() or await pool.acquire()
            try:
                if begin is None:
                    rows: Sequence[Any] = await (await lent.prepared(sql)).fetch(*values)
                else:
                    rows = await self._rows_within(lent, begin, sql, values)
            except BaseException as error:
                self._failed(pool, lent, error, last=last)
            else:
                pool.give_back(lent)
                return rows
        raise AssertionError("the last attempt returns or raises")

    async def _rows_within(self, lent: Pooled, begin: str, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        """The rows of one read in a transaction of its own."""
        connection = lent.connection
        try:
            await connection.execute(begin)
            rows: Sequence[Any]
            if self.settings.pgbouncer:
                rows = await connection.fetch(sql, *values)
            else:
                rows = await (await lent.prepared(sql)).fetch(*values)
            await connection.execute("COMMIT")
        except BaseException as error:
            if isinstance(error, asyncpg.PostgresError) and not is_connection_lost(error):
                with suppress(*DRIVER_ERRORS):
                    await connection.execute("ROLLBACK")
            if connection.is_in_transaction():
                connection.terminate()
            raise
        return rows

    async def _all_rows(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        """The rows of one read of the journal, or of the list of tenants, across all tenants."""
        self._opened()
        if self._taking_all is None:
            raise StoreError(f"{self._place}: this role may not read the journal as a whole: prepare the store first")
        return await self._rows(sql, values, f"BEGIN READ ONLY; {self._taking_all}")

    def _failed(self, pool: Pool, lent: Pooled, error: BaseException, *, last: bool) -> None:
        """Return the connection of a read that failed. Raises the reason unless the read should be tried again."""
        timed_out = isinstance(error, TimeoutError) or lent.expired
        pool.failed(lent, error)
        if not isinstance(error, DRIVER_ERRORS):
            raise error
        if timed_out:
            raise translated(TimeoutError(), self._place) from error
        if last or not (is_connection_lost(error) or is_outdated(error)):
            raise translated(error, self._place) from error

    # --- Writing ---

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        lane = self._platform if batch.tenant is None else self._tenants
        if self._pool is None or lane is None:
            future: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
            future.set_exception(Unavailable(f"{self._place}: the store is not open"))
            return future
        return lane.submit(batch)

    async def rewrite(self, rows: Sequence[JournalRow]) -> int:
        if not rows:
            return 0
        found: int = (await self._rows(*journal_upkeep.rewrite(self.settings.schema, rows)))[0][0]
        self._recent.clear()
        return found

    async def drop(self, tenant: str | None, through_sequence: int) -> int:
        total = 0
        while True:
            values = (tenant, min(through_sequence, _GREATEST_SEQUENCE))
            removed: int = (await self._rows(journal_upkeep.drop_some(self.settings.schema), values))[0][0]
            self._recent.clear()
            total += removed
            if removed < journal_upkeep.DROPPED_AT_ONCE:
                return total

    # --- Waking ---

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop soon after any process has appended to the journal. It may be called without
        need, and a call may be lost with its connection: a follower of the journal must poll as well."""
        self._callbacks.append(callback)
        if self._pool is not None:
            self._listen()

    def _listen(self) -> None:
        if not self.settings.pgbouncer:
            self._listener.start()

    def _changed(self) -> None:
        for callback in self._callbacks:
            callback()

    # --- For operators ---

    async def check(self) -> Health:
        began = time.perf_counter()
        pool = self._pool
        details: dict[str, Any] = {"server": self._place, "schema": self.settings.schema}
        details["queued"] = sum(lane.queued for lane in self._lanes())
        if pool is not None:
            details["connections_in_use"] = pool.in_use
        try:
            ((version, standby, replicas),) = await self._rows(_HEALTH, ())
        except StrongroomError as error:
            return Health(False, time.perf_counter() - began, {**details, "problem": error.message})
        latency_s = time.perf_counter() - began
        details |= {"postgresql": version, "standby": standby, "replicas": replicas}
        if standby:
            details["problem"] = f"{self._place}: this PostgreSQL only reads: name the primary"
        return Health(not standby, latency_s, details)

    def roles_sql(self, owner: str, application: str, retention: str, reader: str) -> str:
        """The SQL that makes the roles of these names for this store's schema. ConfigError for what cannot be names."""
        return roles_sql(self.settings, owner, application, retention, reader)

    async def unchangeable(self) -> str | None:
        """Why this role may not change the schema, and which role may; None if this role may."""
        return await self._maintain(lambda connection: schema.unchangeable(connection, self.settings.schema))

    async def durability(self) -> dict[str, str]:
        """The server's settings that decide whether commits are on its disk."""
        ((fsync, commit, pages),) = await self._rows(_DURABILITY, ())
        return {"fsync": fsync, "synchronous_commit": commit, "full_page_writes": pages}

    async def advise(self) -> list[Advice]:
        """Advice from PostgreSQL's statistics about the indexes of the prepared collections."""
        collections = [table.collection for table in self._tables.values()]
        return await self._maintain(
            lambda connection: index_statistics.advise(connection, self.settings.schema, collections)
        )

    async def make_journal_partitions(self) -> int:
        """Make the journal's partitions of this month and the next; returns how many were missing. Without them no
        record is lost, but a partition that is made late has to take over the records that came before it."""
        return await self._maintain(
            lambda connection: partitions.ensure_partitions(connection, self.settings, datetime.now(UTC))
        )

    async def drop_journal_before(self, at_us: int) -> int:
        """Drop the journal's partitions of earlier months that have no record any more; returns how many."""
        before = partitions.journal_time(at_us)
        return await self._maintain(
            lambda connection: partitions.drop_partitions_before(connection, self.settings, before)
        )

    async def _maintain(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        try:
            async with self._opened().connection() as connection:
                return await work(connection)
        except DRIVER_ERRORS as error:
            raise translated(error, self._place) from error


def _position(after: str | None) -> int:
    """The sequence of a cursor. Raises InvalidInput for a text that is not one."""
    if after is not None and not _CURSOR.fullmatch(after):
        raise InvalidInput([Problem("after", "is not a cursor of this journal")])
    return int(after or 0)


def _journal_row(row: Sequence[Any]) -> JournalRow:
    """The journal row in a row of a page, which begins with the head and the floor."""
    found: Any = row[2:]
    return canonical(found)


_DURABILITY = (
    "SELECT current_setting('fsync'), current_setting('synchronous_commit'), current_setting('full_page_writes')"
)
_HEALTH = (
    "SELECT current_setting('server_version'), pg_is_in_recovery(), "
    "(SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming')"
)
