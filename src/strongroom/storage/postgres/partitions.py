"""The journal's monthly partitions in PostgreSQL: made ahead of time, dropped once retention has emptied them.

Two functions in the database do the work, as the schema's owner. The application role may call both, since it runs all
the time, and so may the retention role.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Protocol

import asyncpg

from ...errors import Denied, Unavailable
from ..sql import quoted

MONTHS_AHEAD = 3
"""Partitions are made for this month and so many after it."""
MAX_MONTHS_AHEAD = 120
LOCK_TIMEOUT_MS = 3_000
"""How long making or dropping a partition waits for transactions on the journal. Later ones wait behind it."""

_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)


class Schema(Protocol):
    """The settings that partitions need."""

    @property
    def schema(self) -> str: ...


def journal_time(at_us: int) -> datetime:
    """The journal's `at` of a record: its time, cut to the years that a calendar has. `at_us` beside it stays exact."""
    try:
        return min(max(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at_us), _FIRST), _LAST)
    except OverflowError:
        return _LAST if at_us > 0 else _FIRST


def functions(schema: str) -> str:
    """The script that makes the two functions. They run as the owner, so they name everything in full."""
    name, literal = quoted(schema), "'" + schema.replace("'", "''") + "'"
    return f"""
CREATE OR REPLACE FUNCTION {name}.strongroom_make_partitions(first timestamptz, months_ahead integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $body$
DECLARE
    lower_bound timestamptz;
    upper_bound timestamptz;
    partition text;
    grantee text;
    made integer := 0;
BEGIN
    FOR month IN 0 .. least(months_ahead, {MAX_MONTHS_AHEAD}) LOOP
        lower_bound := date_trunc('month', first) + make_interval(months => month);
        upper_bound := lower_bound + interval '1 month';
        partition := to_char(lower_bound, '"strongroom_journal_"YYYY"_"MM');
        CONTINUE WHEN to_regclass(format('%I.%I', {literal}, partition)) IS NOT NULL;
        -- so that nobody adds a record of this month to the default partition while its records are moved
        LOCK TABLE {name}.strongroom_journal_default IN ACCESS EXCLUSIVE MODE;
        CONTINUE WHEN to_regclass(format('%I.%I', {literal}, partition)) IS NOT NULL;
        EXECUTE format('CREATE TABLE %I.%I (LIKE {name}.strongroom_journal)', {literal}, partition);
        EXECUTE format(
            'WITH moved AS (DELETE FROM {name}.strongroom_journal_default WHERE at >= %L AND at < %L RETURNING *) '
            'INSERT INTO %I.%I SELECT * FROM moved', lower_bound, upper_bound, {literal}, partition);
        EXECUTE format('ALTER TABLE {name}.strongroom_journal ATTACH PARTITION %I.%I FOR VALUES FROM (%L) TO (%L)',
            {literal}, partition, lower_bound, upper_bound);
        -- the privileges of the journal count; the default privileges of later tables would give more
        FOR grantee IN
            SELECT DISTINCT rolname FROM pg_class, aclexplode(relacl) AS granted
            JOIN pg_roles ON pg_roles.oid = granted.grantee
            WHERE pg_class.oid = to_regclass(format('%I.%I', {literal}, partition)) AND granted.grantee <> relowner
        LOOP
            EXECUTE format('REVOKE ALL ON TABLE %I.%I FROM %I', {literal}, partition, grantee);
        END LOOP;
        made := made + 1;
    END LOOP;
    RETURN made;
END
$body$;
CREATE OR REPLACE FUNCTION {name}.strongroom_drop_partitions(before timestamptz) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $body$
DECLARE
    partition text;
    filled boolean;
    dropped integer := 0;
BEGIN
    FOR partition IN
        SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = '{name}.strongroom_journal'::regclass
        AND relname ~ '^strongroom_journal_[0-9]{{4}}_[0-9]{{2}}$'
        ORDER BY relname
    LOOP
        -- never one that is still being written to, whatever the date says
        CONTINUE WHEN to_timestamp(right(partition, 7), 'YYYY_MM') + interval '1 month' > least(before, now());
        EXECUTE format('SELECT EXISTS (SELECT FROM %I.%I)', {literal}, partition) INTO filled;
        CONTINUE WHEN filled;
        LOCK TABLE {name}.strongroom_journal IN ACCESS EXCLUSIVE MODE;
        EXECUTE format('SELECT EXISTS (SELECT FROM %I.%I)', {literal}, partition) INTO filled;
        CONTINUE WHEN filled;
        EXECUTE format('DROP TABLE %I.%I', {literal}, partition);
        dropped := dropped + 1;
    END LOOP;
    RETURN dropped;
END
$body$;
REVOKE ALL ON FUNCTION {name}.strongroom_make_partitions, {name}.strongroom_drop_partitions FROM PUBLIC;
"""


async def ensure_partitions(
    connection: asyncpg.Connection, settings: Schema, now: datetime, months_ahead: int = MONTHS_AHEAD
) -> int:
    """Make the journal's partitions of the month of `now` and of those after it; how many were made.

    Records of such a month that the default partition holds, because it came late, move. Raises as
    `drop_partitions_before`.
    """
    sql = f"SELECT {quoted(settings.schema)}.strongroom_make_partitions($1, $2)"
    return await _call(connection, sql, now, months_ahead, needed="that of the schema's owner or of the application")


async def drop_partitions_before(connection: asyncpg.Connection, settings: Schema, before: datetime) -> int:
    """Drop the partitions of months before `before` that have no record any more; how many were dropped.

    Raises Denied for a role that may not, Unavailable if the journal was in use for longer than LOCK_TIMEOUT_MS.
    """
    sql = f"SELECT {quoted(settings.schema)}.strongroom_drop_partitions($1)"
    return await _call(connection, sql, before, needed="that of the schema's owner, of the application or of retention")


async def _call(connection: asyncpg.Connection, sql: str, *arguments: object, needed: str) -> int:
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
            done: int = await connection.fetchval(sql, *arguments)
    except asyncpg.InsufficientPrivilegeError:
        raise Denied(f"this role may not change the journal's partitions, expected {needed}") from None
    except asyncpg.LockNotAvailableError:
        raise Unavailable("the journal is in use: its partitions were left as they are, try again") from None
    return done
