"""Redacts and removes journal records, for `JournalStore.rewrite` and `drop`. No other code changes the journal's rows.

Two functions in the database do it as the schema's owner, because no other role may update or delete a record. The
application may call them: what they can do is no more than redaction and retention do. A redacted record shows that it
was redacted, records go oldest first, and the floor says up to where they are gone.

PostgreSQL keeps the replaced rows on disk until VACUUM has run, and in archives of its write-ahead log.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from ..port import JournalRow
from ..sql import JOURNAL_COLUMNS, quoted

DROPPED_AT_ONCE = 5_000
"""Rows that one transaction removes."""
PLAIN_SALT_BYTES = 16
"""A record that is not redacted has a salt of so many bytes, or none."""

_REDACTED = {"actor": "text", "entity_id": "text", "before": "text", "after": "text", "salt": "bytea", "claims": "text"}
_GIVEN = {"sequence": "bigint", "id": "text", **_REDACTED}
_values = itemgetter(*map(JOURNAL_COLUMNS.index, _GIVEN))


def functions(schema: str) -> str:
    """The script that makes the floors' table, if it is not there, and the two functions. They run as the owner, so
    they name everything in full."""
    name = quoted(schema)
    arguments = ", ".join(f"{column}s {kind}[]" for column, kind in _GIVEN.items())
    return f"""
CREATE TABLE IF NOT EXISTS {name}.strongroom_journal_floors (tenant_id text COLLATE "C", sequence bigint NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS "strongroom_journal_floors.unique"
ON {name}.strongroom_journal_floors (tenant_id) NULLS NOT DISTINCT;
CREATE OR REPLACE FUNCTION {name}.strongroom_redact_journal({arguments}) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    found integer;
BEGIN
    IF EXISTS (SELECT FROM unnest(salts) AS given(salt) WHERE length(salt) <= {PLAIN_SALT_BYTES}) THEN
        RAISE EXCEPTION 'only redaction rewrites a record: found the salt of a plain one' USING ERRCODE = '23514';
    END IF;
    PERFORM set_config('app.journal', 'whole', true);
    UPDATE {name}.strongroom_journal AS journal
    SET {", ".join(f"{column} = given.{column}" for column in _REDACTED)}
    FROM unnest({", ".join(f"{column}s" for column in _GIVEN)}) AS given({", ".join(_GIVEN)})
    WHERE journal.sequence = given.sequence AND journal.id = given.id;
    GET DIAGNOSTICS found = ROW_COUNT;
    PERFORM set_config('app.journal', '', true);
    RETURN found;
END
$body$;
CREATE OR REPLACE FUNCTION {name}.strongroom_drop_records(tenant text, through bigint) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    last bigint;
    removed integer;
BEGIN
    PERFORM set_config('app.journal', 'whole', true);
    -- two statements, because IS NOT DISTINCT FROM would use no index
    IF tenant IS NULL THEN
        SELECT max(sequence) INTO last FROM (SELECT sequence FROM {name}.strongroom_journal
            WHERE tenant_id IS NULL AND sequence <= through ORDER BY sequence LIMIT {DROPPED_AT_ONCE}) AS oldest;
        DELETE FROM {name}.strongroom_journal WHERE tenant_id IS NULL AND sequence <= last;
    ELSE
        SELECT max(sequence) INTO last FROM (SELECT sequence FROM {name}.strongroom_journal
            WHERE tenant_id = tenant AND sequence <= through ORDER BY sequence LIMIT {DROPPED_AT_ONCE}) AS oldest;
        DELETE FROM {name}.strongroom_journal WHERE tenant_id = tenant AND sequence <= last;
    END IF;
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF removed > 0 THEN
        INSERT INTO {name}.strongroom_journal_floors AS kept VALUES (tenant, last)
        ON CONFLICT (tenant_id) DO UPDATE SET sequence = greatest(kept.sequence, excluded.sequence);
        -- at the end: appends wait for the head's lock
        UPDATE {name}.strongroom_journal_head SET floor = greatest(floor, last) WHERE floor < last;
    END IF;
    PERFORM set_config('app.journal', '', true);
    RETURN removed;
END
$body$;
REVOKE ALL ON FUNCTION {name}.strongroom_redact_journal, {name}.strongroom_drop_records FROM PUBLIC;
"""


def rewrite(schema: str, rows: Sequence[JournalRow]) -> tuple[str, list[Sequence[object]]]:
    """The statement that replaces what redaction changes of these rows, and its values; it returns how many it found"""
    places = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(_GIVEN.values(), 1))
    return f"SELECT {quoted(schema)}.strongroom_redact_journal({places})", list(zip(*map(_values, rows), strict=True))


def drop_some(schema: str) -> str:
    """The statement that removes up to DROPPED_AT_ONCE of a tenant's oldest rows; it returns how many it removed."""
    return f"SELECT {quoted(schema)}.strongroom_drop_records($1, $2)"
