"""Roles on PostgreSQL: the script that makes them, each table's privileges, and the check of the connected role.

Four roles: the owner migrates and never serves; the application reads and writes documents and appends to the journal;
the reader sees the journal of all tenants, and the application takes it on for single transactions (the change feed);
retention drops the journal's old partitions. The application can neither alter a table nor bypass a policy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import asyncpg

from ...errors import ConfigError, StoreError
from ..sql import quoted
from .journal_access import READER, READER_POLICY, reader_policies

OWNER = "strongroom_owner"
APPLICATION = "strongroom_app"
RETENTION = "strongroom_retention"
MAX_ROLE_BYTES = 63

_log = logging.getLogger(__name__)


class Schema(Protocol):
    """The settings that roles need."""

    @property
    def schema(self) -> str: ...


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# --- The operator's script ------------------------------------------------------------------------------------


def roles_sql(
    settings: Schema,
    owner: str = OWNER,
    application: str = APPLICATION,
    retention: str = RETENTION,
    reader: str = READER,
) -> str:
    """The SQL that makes the four roles and the schema, and grants each what it needs; for psql.

    It may run before the first `schema apply` or after it, and again. Set passwords with `\\password`, so that no file
    has them. ConfigError for names that cannot be roles or are not four.
    """
    names = (owner, application, retention, reader)
    for name in names:
        if not name or len(name.encode()) > MAX_ROLE_BYTES or not name.isprintable() or name.startswith("pg_"):
            raise ConfigError(f"role {name!r}: expected a name of 1 to {MAX_ROLE_BYTES} bytes that is not PostgreSQL's")
    if len(set(names)) < len(names):
        raise ConfigError(f"roles {', '.join(names)}: expected four different names")
    schema, own, app, retire, read = (quoted(name) for name in (settings.schema, *names))
    logins = ", ".join(map(_literal, (owner, application, retention)))
    makes = "\n".join(
        f"""    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {_literal(name)}) THEN
        CREATE ROLE {quoted(name)} {"NOLOGIN" if name == reader else "LOGIN"} NOSUPERUSER NOBYPASSRLS NOCREATEROLE
            NOCREATEDB NOREPLICATION NOINHERIT;
    ELSIF (SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = {_literal(name)}) THEN
        RAISE EXCEPTION 'role % is a superuser or has BYPASSRLS: choose another name', {_literal(name)};
    END IF;"""
        for name in names
    )
    return f"""\
-- Strongroom's roles in schema {settings.schema}. Run this in the store's database as an administrator (a superuser,
-- or a managed service's administrator). Then give each role that logs in its password: \\password {owner}, and so on.
BEGIN;
DO $$ BEGIN
{makes}
END $$;
CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {own};
ALTER SCHEMA {schema} OWNER TO {own};
REVOKE ALL ON SCHEMA {schema} FROM PUBLIC, {app}, {retire}, {read};
GRANT USAGE ON SCHEMA {schema} TO {app}, {retire}, {read};
-- The application takes the reader's role on for single transactions. It must not have its rights in all the others.
DO $$ BEGIN
    IF current_setting('server_version_num')::int >= 160000 THEN
        EXECUTE {_literal(f"GRANT {read} TO {app} WITH INHERIT FALSE, SET TRUE")};
    ELSE
        EXECUTE {_literal(f"GRANT {read} TO {app}")};
    END IF;
END $$;
DO $$ BEGIN
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I, %I, %I', current_database(), {logins});
END $$;
-- What the owner makes later, by `strongroom schema apply`, is the application's to use, without another step.
ALTER DEFAULT PRIVILEGES FOR ROLE {own} IN SCHEMA {schema} GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {app};
ALTER DEFAULT PRIVILEGES FOR ROLE {own} IN SCHEMA {schema} GRANT USAGE ON SEQUENCES TO {app};
ALTER DEFAULT PRIVILEGES FOR ROLE {own} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
ALTER DEFAULT PRIVILEGES FOR ROLE {own} IN SCHEMA {schema} GRANT EXECUTE ON FUNCTIONS TO {retire};
-- There are no types, so this grants nothing: it is how `strongroom schema apply` knows who the reader is.
ALTER DEFAULT PRIVILEGES FOR ROLE {own} IN SCHEMA {schema} GRANT USAGE ON TYPES TO {read};
{grants(settings.schema, [application], [retention], [reader])}COMMIT;
"""


def grants(schema: str, applications: Sequence[str], retentions: Sequence[str], readers: Sequence[str]) -> str:
    """The script that grants the roles exactly the privileges that they need on every table, and revokes all others."""
    name = quoted(schema)
    app_array = f"ARRAY[{', '.join(map(_literal, applications))}]::text[]"
    retention_array = f"ARRAY[{', '.join(map(_literal, retentions))}]::text[]"
    reader_array = f"ARRAY[{', '.join(map(_literal, readers))}]::text[]"
    return f"""DO $body$
DECLARE
    item record;
    grantee text;
    allowed text;
BEGIN
    FOR item IN
        SELECT relname, relispartition FROM pg_class
        WHERE relnamespace = '{name}'::regnamespace AND relkind IN ('r', 'p')
    LOOP
        -- A partition is used through the journal, whose privileges count. Nobody may change or remove a record.
        allowed := CASE
            WHEN item.relispartition THEN NULL
            WHEN item.relname = 'strongroom_journal' THEN 'SELECT, INSERT'
            WHEN item.relname = 'strongroom_journal_head' THEN 'SELECT, UPDATE'
            WHEN item.relname = 'strongroom_tenants' THEN 'SELECT, INSERT'
            WHEN item.relname LIKE 'strongroom\\_%' THEN 'SELECT'
            ELSE 'SELECT, INSERT, UPDATE, DELETE'
        END;
        FOREACH grantee IN ARRAY {app_array} LOOP
            EXECUTE format('REVOKE ALL ON TABLE {name}.%I FROM %I', item.relname, grantee);
            IF allowed IS NOT NULL THEN
                EXECUTE format('GRANT %s ON TABLE {name}.%I TO %I', allowed, item.relname, grantee);
            END IF;
        END LOOP;
        FOREACH grantee IN ARRAY {retention_array} LOOP
            EXECUTE format('REVOKE ALL ON TABLE {name}.%I FROM %I', item.relname, grantee);
            IF item.relname = 'strongroom_layout' THEN
                EXECUTE format('GRANT SELECT ON TABLE {name}.%I TO %I', item.relname, grantee);
            END IF;
        END LOOP;
        FOREACH grantee IN ARRAY {reader_array} LOOP
            EXECUTE format('REVOKE ALL ON TABLE {name}.%I FROM %I', item.relname, grantee);
            IF item.relname IN ('strongroom_journal', 'strongroom_journal_head', 'strongroom_journal_floors',
                'strongroom_tenants') THEN
                EXECUTE format('GRANT SELECT ON TABLE {name}.%I TO %I', item.relname, grantee);
            END IF;
        END LOOP;
    END LOOP;
    IF to_regclass('{name}.strongroom_layout') IS NOT NULL THEN
        {reader_policies(schema, readers)}
        FOREACH grantee IN ARRAY {app_array} LOOP
            EXECUTE format('GRANT USAGE ON SEQUENCE {name}.strongroom_version TO %I', grantee);
            EXECUTE format('GRANT EXECUTE ON FUNCTION {name}.strongroom_require, '
                '{name}.strongroom_make_partitions, {name}.strongroom_redact_journal, '
                '{name}.strongroom_drop_records, {name}.strongroom_drop_partitions TO %I', grantee);
        END LOOP;
        FOREACH grantee IN ARRAY {retention_array} LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION {name}.strongroom_make_partitions, '
                '{name}.strongroom_drop_partitions TO %I', grantee);
        END LOOP;
    END IF;
END $body$;
"""


async def granted_roles(connection: asyncpg.Connection, schema: str) -> tuple[list[str], list[str], list[str]]:
    """The application, the retention and the reader roles of `roles_sql`, as the owner's default privileges name
    them."""
    rows = await connection.fetch(
        """
        SELECT rolname::text AS name, bool_or(defaclobjtype = 'r' AND privilege_type = 'INSERT') AS application,
            bool_or(defaclobjtype = 'T') AS reader
        FROM pg_default_acl JOIN pg_namespace ON pg_namespace.oid = defaclnamespace,
            aclexplode(defaclacl) AS granted JOIN pg_roles ON pg_roles.oid = granted.grantee
        WHERE nspname = $1 AND defaclrole = (SELECT oid FROM pg_roles WHERE rolname = current_user)
        GROUP BY rolname ORDER BY rolname
        """,
        schema,
    )
    return (
        [r["name"] for r in rows if r["application"]],
        [r["name"] for r in rows if not r["application"] and not r["reader"]],
        [r["name"] for r in rows if not r["application"] and r["reader"]],
    )


# --- The connected role ---------------------------------------------------------------------------------------

_OWN_ROLE = """
SELECT me.rolname::text AS name, me.rolsuper, me.rolbypassrls, me.rolcreaterole,
    (SELECT string_agg(rolname, ', ' ORDER BY rolname) FROM pg_roles
        WHERE oid <> me.oid AND (rolsuper OR rolbypassrls) AND NOT me.rolsuper
        AND pg_has_role(me.oid, oid, 'MEMBER')) AS unsafe_membership,
    namespace.oid IS NOT NULL AS schema_exists,
    namespace.nspowner = me.oid AS owns_schema,
    coalesce(pg_has_role(me.oid, namespace.nspowner, 'MEMBER'), false) AS reaches_owner,
    pg_get_userbyid(namespace.nspowner)::text AS owner,
    (SELECT min(relname::text) FROM pg_class WHERE relnamespace = namespace.oid AND relkind IN ('r', 'p')
        AND pg_has_role(me.oid, relowner, 'MEMBER')) AS owned_table,
    (SELECT min(reader.rolname::text) FROM pg_policy, unnest(polroles) AS role
        JOIN pg_roles AS reader ON reader.oid = role
        WHERE polrelid = to_regclass(format('%I.strongroom_journal', $1::text)) AND polname = $2
        AND pg_has_role(me.oid, reader.oid, 'USAGE')) AS inherited_reader
FROM pg_roles AS me LEFT JOIN pg_namespace AS namespace ON nspname = $1
WHERE me.rolname = current_user
"""
_TOO_MUCH = """
SELECT relname::text FROM pg_class
WHERE relnamespace = $1::text::regnamespace AND relkind IN ('r', 'p') AND (
    has_table_privilege(oid, 'TRUNCATE') OR has_table_privilege(oid, 'TRIGGER')
    OR ((relispartition OR relname IN ('strongroom_journal', 'strongroom_journal_floors', 'strongroom_tenants'))
        AND has_table_privilege(oid, 'UPDATE, DELETE')))
ORDER BY relname LIMIT 1
"""
_WHAT_TO_RUN = "run what `strongroom schema roles` prints, and name the application role in the store's URL"


async def check_role(connection: asyncpg.Connection, settings: Schema) -> None:
    """Raises StoreError, with the command to run, if the connected role could bypass row-level security or change the
    journal.

    A role that owns the schema itself, and is neither superuser nor BYPASSRLS, may serve: FORCE keeps it under the
    policies. It could still alter the tables, which a warning in the log says.
    """
    schema = settings.schema
    row = await connection.fetchrow(_OWN_ROLE, schema, READER_POLICY)
    name = row["name"]

    def unsafe(why: str) -> StoreError:
        return StoreError(f"role {name}: {why}; {_WHAT_TO_RUN}")

    if row["rolsuper"]:
        raise unsafe("is a superuser, which bypasses row-level security")
    if row["rolbypassrls"]:
        raise unsafe("has BYPASSRLS, so row-level security does not bind it")
    if row["unsafe_membership"]:
        raise unsafe(f"is a member of {row['unsafe_membership']}, which bypasses row-level security")
    if not row["schema_exists"]:
        return
    if row["owns_schema"]:
        _log.warning(
            "role %s owns schema %s: it is held to the policies, but could alter the tables and the journal; "
            "`strongroom schema roles` prints the SQL that splits owner and application",
            name,
            schema,
        )
        return
    if row["reaches_owner"]:
        raise unsafe(f"is a member of {row['owner']}, who owns schema {schema} and could lift its policies")
    if row["owned_table"]:
        raise unsafe(f"owns {schema}.{row['owned_table']}, though not the schema, and could lift its policies")
    if row["rolcreaterole"]:
        raise unsafe("has CREATEROLE, so it could make itself a member of the schema's owner")
    if row["inherited_reader"]:
        raise unsafe(
            f"has the rights of {row['inherited_reader']} in every statement, so the journal of all tenants is open to "
            f"each: run ALTER ROLE {quoted(name)} NOINHERIT"
        )
    excess = await connection.fetchval(_TOO_MUCH, quoted(schema))
    if excess:
        raise unsafe(f"may do more than append and read in {schema}.{excess}")
