"""SQL views over the usage of keys and quotas, for people with a SQL client: the script for each engine.

A key's usage is one document with JSON in it (`usage_state.KeyUsage`); the views give it as rows. The owner of the
tables creates them once. No declaration needs them, and they cost nothing until they are queried.
"""

from __future__ import annotations

from ..errors import ConfigError
from .windows import MONEY, MONEY_SCALE

LIFETIME, BY_MONTH = "strongroom_usage", "strongroom_usage_by_month"
_COMMENTS = {
    LIFETIME: "What each key or quota has used of each resource in all. Cost is in whole currency units.",
    BY_MONTH: "The same for the present month and the last one in which it was used before, by the calendar in UTC.",
}


def views_sql(engine: str, schema: str = "") -> str:
    """The script that makes the views, repeatable, for psql or sqlite3. ConfigError for an engine without SQL."""
    match engine:
        case "postgresql":
            return _postgresql('"' + schema.replace('"', '""') + '".')
        case "sqlite":
            return _sqlite()
        case _:
            raise ConfigError(f"a {engine} store has no views: name a postgresql:// or sqlite:// store")


_WHOSE = (
    "SELECT coalesce(k.tenant, q.tenant) AS tenant_id, CASE WHEN k.id IS NULL THEN NULL ELSE u.id END AS key_id, "
    "CASE WHEN k.id IS NULL THEN u.id END AS quota_id, coalesce(k.name, q.name) AS name, k.user_id"
)


def _postgresql(schema: str) -> str:
    joined = (
        f"FROM {schema}key_usage AS u LEFT JOIN {schema}api_keys AS k USING (id) "
        f"LEFT JOIN {schema}quotas AS q USING (id)"
    )
    used = f"trim_scale(r.value::numeric / CASE r.key WHEN '{MONEY}' THEN {MONEY_SCALE} ELSE 1 END) AS used"
    lifetime = (
        f"{_WHOSE}, r.key AS resource, {used}, u.last_used_at {joined} "
        "CROSS JOIN LATERAL jsonb_each_text(coalesce(u.state::jsonb -> 'totals', '{}')) AS r"
    )
    monthly = (
        f"{_WHOSE}, m.key AS month, r.key AS resource, {used} {joined} "
        "CROSS JOIN LATERAL jsonb_each(coalesce(u.state::jsonb -> 'months', '{}')) AS m "
        "CROSS JOIN LATERAL jsonb_each_text(m.value) AS r"
    )
    lines = []
    for name, select in ((LIFETIME, lifetime), (BY_MONTH, monthly)):
        lines.append(f"CREATE OR REPLACE VIEW {schema}{name} WITH (security_invoker = true) AS\n{select};")
        lines.append(f"COMMENT ON VIEW {schema}{name} IS '{_COMMENTS[name]}';")
    return "\n".join(["BEGIN;", *lines, "COMMIT;", ""])


def _sqlite() -> str:
    joined = "FROM key_usage AS u LEFT JOIN api_keys AS k USING (id) LEFT JOIN quotas AS q USING (id)"
    used = f"CASE r.key WHEN '{MONEY}' THEN r.value * 1.0 / {MONEY_SCALE} ELSE r.value END AS used"
    lifetime = f"{_WHOSE}, r.key AS resource, {used}, u.last_used_at {joined}, json_each(u.state, '$.totals') AS r"
    monthly = (
        f"{_WHOSE}, m.key AS month, r.key AS resource, {used} {joined}, "
        "json_each(u.state, '$.months') AS m, json_each(m.value) AS r"
    )
    lines = []
    for name, select in ((LIFETIME, lifetime), (BY_MONTH, monthly)):
        lines += [f"DROP VIEW IF EXISTS {name};", f"CREATE VIEW {name} AS", f"{select};"]
    return "\n".join(["BEGIN;", *lines, "COMMIT;", ""])
