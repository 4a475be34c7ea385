"""Access to the journal and to the list of tenants on PostgreSQL: a tenant sees its own part, the reader role all.

The change feed, the list of tenants and the question whether a record exists run under the reader role, which the
application takes on for one transaction. In a set-up with a single role (for development) there is no reader role: the
owner sees everything in a transaction that sets `app.journal`.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from ..sql import quoted

READER = "strongroom_reader"
POLICIES = {
    "strongroom_journal": ("owner_delete", "owner_select", "owner_update", "tenant_insert", "tenant_select"),
    "strongroom_journal_floors": ("owner_all", "tenant_select"),
    "strongroom_tenants": ("owner_select", "tenant_insert", "tenant_select"),
}
"""The store's own tables under row-level security, and the policies of each."""
AS_OWNER = "SET LOCAL app.journal = 'whole'"
"""Begins a transaction in which an owner that serves sees all of them."""
WITH_SECRETS = "SET LOCAL app.secrets = 'on'"
"""A transaction sets this to use a collection that holds secrets alone."""

_PRESENT = "nullif(current_setting('app.current_tenant', true), '')"
READER_POLICY = "reader_select"


def policies(schema: str) -> str:
    """The script that puts the tables under row-level security; repeatable. `reader_policies` come after it.

    A record's tenant is compared for each row, not once a statement: one statement appends the records of many tenants,
    and sets the tenant for each. A record of no tenant is added where none is set, and seen as a whole only. The owner
    updates and deletes in the functions of `journal_upkeep` and `partitions`.
    """
    name = quoted(schema)
    parts = []
    for table, names in POLICIES.items():
        whole = (
            "(SELECT current_setting('app.journal', true) = 'whole' AND EXISTS (SELECT FROM pg_catalog.pg_class "
            f"WHERE oid = '{name}.{table}'::regclass AND pg_get_userbyid(relowner) = current_user))"
        )
        conditions = {
            "owner_all": f"USING ({whole}) WITH CHECK ({whole})",
            "owner_delete": f"FOR DELETE USING ({whole})",
            "owner_select": f"FOR SELECT USING ({whole})",
            "owner_update": f"FOR UPDATE USING ({whole})",
            "tenant_insert": f"FOR INSERT WITH CHECK (tenant_id IS NOT DISTINCT FROM {_PRESENT})",
            "tenant_select": f"FOR SELECT USING (tenant_id = (SELECT {_PRESENT}))",
        }
        parts.append(f"ALTER TABLE {name}.{table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;")
        for policy in names:
            parts.append(f"DROP POLICY IF EXISTS {policy} ON {name}.{table};")
            parts.append(f"CREATE POLICY {policy} ON {name}.{table} {conditions[policy]};")
    return "\n".join(parts)


def reader_policies(schema: str, readers: Sequence[str]) -> str:
    """The statements that let the readers, and no other role, see all of the tables."""
    name = quoted(schema)
    parts = []
    for table in POLICIES:
        parts.append(f"DROP POLICY IF EXISTS {READER_POLICY} ON {name}.{table};")
        if readers:
            to = ", ".join(map(quoted, readers))
            parts.append(f"CREATE POLICY {READER_POLICY} ON {name}.{table} FOR SELECT TO {to} USING (true);")
    return "\n".join(parts)


_WHO = """
SELECT namespace.nspowner = me.oid AS owns,
    (SELECT min(reader.rolname::text) FROM pg_policy, unnest(polroles) AS role
        JOIN pg_roles AS reader ON reader.oid = role
        WHERE polrelid = to_regclass(format('%I.strongroom_journal', $1::text)) AND polname = $2
        AND pg_has_role(me.oid, reader.oid, 'MEMBER')) AS reader
FROM pg_roles AS me LEFT JOIN pg_namespace AS namespace ON nspname = $1 WHERE me.rolname = current_user
"""


async def taking_all(connection: asyncpg.Connection, schema: str) -> str | None:
    """The statement that begins a transaction which sees the whole tables; None if the connected role may not."""
    row = await connection.fetchrow(_WHO, schema, READER_POLICY)
    if row["owns"] is not False:  # or there is no schema yet, and the role that makes it will own it
        return AS_OWNER
    return f"SET LOCAL ROLE {quoted(row['reader'])}" if row["reader"] is not None else None
