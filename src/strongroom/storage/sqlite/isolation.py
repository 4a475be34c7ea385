"""Isolation inside SQLite: connections on which the tables of tenants can be reached through one tenant's views only.

Each connection has, in its own temporary schema, a view of the collection's name over a second view, the guard, that
selects `WHERE tenant_id = current_tenant()`; INSTEAD OF triggers write. `current_tenant()` answers what the connection
was last told, and null, which no row equals, after that. An authorizer, which SQLite asks when it compiles a statement,
denies a tenant's table unless it is the guard or a trigger that names it. The guard and the triggers bear a random
token in their names: SQLite tells the authorizer the name of a common table expression just as it tells that of a view,
so `WITH notes AS (SELECT * FROM main.notes)` would pass if the view's own name were enough. And since EXPLAIN shows the
token to anyone, a statement whose text has it is refused: a name in SQL cannot be written but as it is.

The writer only adds to the journal: SQLite asks no leave for the rows that REPLACE removes. So the writer names the
store's own tables in the few texts that it is given, and in no other. Records are redacted and removed on a connection
that can do nothing else, and is opened for each of these calls (`journal_upkeep`).

The file itself holds plain tables, for people with `sqlite3`.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import apsw

from ..sql import JOURNAL_COLUMNS, Codec, Compiler, listed, quoted
from .schema import connect

MAX_CHECKED = 10_000
"""Statements that were checked and are not checked again."""
_OWN_TABLES = re.compile(r"(?<![\w$])(?:_journal|_floors|_times|_meta|_fields|sqlite_sequence)(?![\w$])", re.IGNORECASE)
REDACTABLE = frozenset({"actor", "entity_id", "before", "after", "salt", "claims"})
"""The columns of a journal record that redaction changes."""
_JOURNAL_VIEWS = {"_journal": JOURNAL_COLUMNS, "_floors": ("sequence",)}
JOURNAL_BY_FIELD = "_journal_by_field"
"""A tenant's journal, found by an index of another field than the tenant."""
_PAGE = "WITH page AS MATERIALIZED ({}) SELECT * FROM page"


class Cursor(Protocol):
    """An apsw cursor, as far as it is used here; the columns of a row have the types of its statement."""

    def fetchall(self) -> list[tuple[Any, ...]]: ...


Execute = Callable[..., Cursor]


class Table:
    """One collection as connections see it: its view or table, what to read, and how."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.name = codec.collection.name
        self.tenant_scoped = codec.collection.tenant_scoped
        self.point_fields = frozenset({"id"}) | codec.collection.unique_fields
        self.columns = codec.columns
        self.decode = codec.decode
        self.by_id = f"SELECT {listed(self.columns)} FROM {quoted(self.name)} WHERE id = ?"
        # A few rows by their key are read on the calling thread.
        self.points = Compiler(codec, quoted(self.name))
        # The first step computes the whole page, without the interpreter's lock. Fetching the rows is then cheap.
        self.pages = Compiler(codec, quoted(self.name), page=_PAGE)


class Guarded:
    """A connection whose statements see the documents of one tenant, and global ones.

    `writes` allows what the writer does; `own_texts` are the statements by which it may use the store's own tables.
    `whole_journal` shows the journal of all tenants, and nothing else does. `upkeep` may redact and remove records by
    the `own_texts`, and nothing else.
    """

    __slots__ = ("_check", "_present", "connection", "cursor", "execute")

    def __init__(
        self,
        path: str,
        tables: Iterable[Table],
        busy_timeout_s: float,
        *,
        writes: bool = False,
        own_texts: Iterable[str] = (),
        whole_journal: bool = False,
        upkeep: bool = False,
    ) -> None:
        self._present: list[str | None] = [None]
        self.connection = connection = connect(path, busy_timeout_s)
        try:
            if writes:
                # or else a savepoint's copies of changed pages go to a temporary file, from some 15 pages on
                connection.execute("PRAGMA temp_store = MEMORY").fetchall()  # before the views, which it would remove
            # a partial of C functions: SQLite calls this once a statement, and a Python frame would double its cost
            connection.create_scalar_function(
                "current_tenant", functools.partial(self._present.__getitem__, 0), 0, deterministic=True
            )
            rights = _Rights(secrets.token_hex(16))
            for table in tables:
                if not table.tenant_scoped:
                    rights.allow_table(table.name, writes)
                    continue
                rights.allow_view(table.name)
                _make_view(connection, table.name, table.columns, rights.guard(table.name))
                if writes:
                    rights.allow_triggers(table.name)
                    _make_triggers(connection, table.name, table.columns, rights)
            if writes:
                rights.allow_append()
            elif upkeep:
                rights.allow_upkeep()
                # overwrite removed content with zeros: what was redacted must not be left in free parts of pages
                connection.execute("PRAGMA secure_delete = ON").fetchall()
            elif whole_journal:
                rights.allow_whole_journal()
            else:
                for name, columns in _JOURNAL_VIEWS.items():
                    rights.allow_view(name)
                    _make_view(connection, name, columns, rights.guard(name))
                rights.allow_view(JOURNAL_BY_FIELD, "_journal")
                _make_view(
                    connection, JOURNAL_BY_FIELD, JOURNAL_COLUMNS, rights.guard(JOURNAL_BY_FIELD), "_journal", by="+"
                )
                connection.execute("PRAGMA query_only = ON").fetchall()
            connection.authorizer = rights.authorize
            self._check = connection.exec_trace = rights.checker(frozenset(own_texts) if writes or upkeep else None)
        except BaseException:
            connection.close()
            raise
        self.cursor = connection.cursor()
        self.execute: Execute = self.cursor.execute

    def set_tenant(self, tenant: str | None) -> None:
        """Set the tenant whose documents the next statements see."""
        self._present[0] = tenant

    def trust(self, trusted: bool) -> None:
        """Whether the next statements run unchecked. The check costs a part of a small statement. Trust only statements
        that consist of declared names, between the begin and the end of a transaction."""
        self.connection.exec_trace = None if trusted else self._check

    def close(self) -> None:
        self.connection.close()


def _make_view(
    connection: apsw.Connection, name: str, columns: Iterable[str], guard: str, table: str | None = None, by: str = ""
) -> None:
    """Make the view of a table, by default of the one of its name. With `by` + it does not use the tenant's index."""
    own = listed(tuple(columns))
    connection.execute(
        f"CREATE TEMP VIEW {quoted(guard)} AS SELECT {own} FROM main.{quoted(table or name)} "
        f"WHERE {by}tenant_id = current_tenant()"
    ).fetchall()
    connection.execute(f"CREATE TEMP VIEW {quoted(name)} AS SELECT {own} FROM temp.{quoted(guard)}").fetchall()


def _make_triggers(connection: apsw.Connection, name: str, columns: tuple[str, ...], rights: _Rights) -> None:
    table, view = f"main.{quoted(name)}", f"temp.{quoted(name)}"
    given = ", ".join(f"NEW.{quoted(column)}" for column in columns)
    taken = ", ".join(f"{quoted(column)} = NEW.{quoted(column)}" for column in columns[1:])
    mine = "tenant_id = current_tenant() AND id = OLD.id"
    for event, body in (
        ("INSERT", f"INSERT INTO {table} (tenant_id, {listed(columns)}) VALUES (current_tenant(), {given})"),
        ("UPDATE", f"UPDATE {table} SET {taken} WHERE {mine}"),
        ("DELETE", f"DELETE FROM {table} WHERE {mine}"),
    ):
        trigger = quoted(rights.trigger(name, event))
        connection.execute(f"CREATE TEMP TRIGGER {trigger} INSTEAD OF {event} ON {view} BEGIN {body}; END").fetchall()


_WRITES = {"INSERT": apsw.SQLITE_INSERT, "UPDATE": apsw.SQLITE_UPDATE, "DELETE": apsw.SQLITE_DELETE}
_HARMLESS = frozenset({apsw.SQLITE_SELECT, apsw.SQLITE_FUNCTION, apsw.SQLITE_TRANSACTION, apsw.SQLITE_SAVEPOINT})


class _Rights:
    """What a connection may do. What is not allowed here is denied: schema tables, PRAGMA, ATTACH, DDL and the rest."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._changeable: frozenset[str] = frozenset()
        # (what, schema, table) → the view or triggers through which alone it may be done, or None: in any way
        self._allowed: dict[tuple[int, str | None, str | None], frozenset[str | None] | None] = {
            (apsw.SQLITE_READ, "main", "json_each"): None,
            (apsw.SQLITE_READ, "main", "sqlite_sequence"): None,
            (apsw.SQLITE_READ, "main", "_times"): None,
        }

    def guard(self, name: str) -> str:
        return f"{name} {self._token}"

    def trigger(self, name: str, event: str) -> str:
        return f"{name} {self._token} {event}"

    def allow_table(self, name: str, writes: bool) -> None:
        for what in (apsw.SQLITE_READ, *(_WRITES.values() if writes else ())):
            self._allowed[what, "main", name] = None
        self._allowed[apsw.SQLITE_READ, None, name] = None  # how SQLite asks for a count of rows, of no column

    def allow_view(self, name: str, table: str | None = None) -> None:
        self._allowed[apsw.SQLITE_READ, "temp", name] = None
        self._allowed[apsw.SQLITE_READ, "temp", self.guard(name)] = None
        what = (apsw.SQLITE_READ, "main", table or name)
        self._allowed[what] = (self._allowed.get(what) or frozenset()) | {self.guard(name)}

    def allow_triggers(self, name: str) -> None:
        triggers = {event: self.trigger(name, event) for event in _WRITES}
        for event, what in _WRITES.items():
            self._allowed[what, "temp", name] = None
            self._allowed[what, "main", name] = frozenset({triggers[event]})
        self._allowed[apsw.SQLITE_READ, "main", name] = frozenset({self.guard(name), *triggers.values()})

    def allow_append(self) -> None:
        """The writer adds to the journal, and keeps the records' times and the greatest version that was deleted."""
        self._allowed[apsw.SQLITE_INSERT, "main", "_journal"] = None
        self._allowed[apsw.SQLITE_READ, "main", "_journal"] = None
        self._allowed[apsw.SQLITE_INSERT, "main", "_times"] = None
        self._allowed[apsw.SQLITE_UPDATE, "main", "_times"] = None
        self._allowed[apsw.SQLITE_READ, "main", "_meta"] = None
        self._allowed[apsw.SQLITE_UPDATE, "main", "_meta"] = None

    def allow_upkeep(self) -> None:
        """Redaction and retention: they change some columns of the journal, remove rows, and note the floor."""
        self.allow_whole_journal()
        self._changeable = REDACTABLE
        self._allowed[apsw.SQLITE_UPDATE, "main", "_journal"] = None
        self._allowed[apsw.SQLITE_DELETE, "main", "_journal"] = None
        self._allowed[apsw.SQLITE_UPDATE, "main", "_floors"] = None
        self._allowed[apsw.SQLITE_INSERT, "main", "_floors"] = None

    def allow_whole_journal(self) -> None:
        for name in _JOURNAL_VIEWS:
            self._allowed[apsw.SQLITE_READ, "main", name] = None

    def checker(self, own_texts: frozenset[str] | None) -> Callable[[Any, str, Any], bool]:
        """What a connection asks of each statement that it is about to run. `own_texts`: the only ones that may name
        the store's own tables; None: the authorizer sees to these. Raises apsw.AuthError."""
        token, harmless = self._token, set(own_texts or ())

        def check(_: Any, sql: str, __: Any) -> bool:
            if sql in harmless:  # this is asked each time, and most texts come again and again
                return True
            if token in sql.lower():
                raise apsw.AuthError("not authorized: the statement names a guard")
            if own_texts is not None and _OWN_TABLES.search(sql):
                raise apsw.AuthError("not authorized: the statement names one of the store's own tables")
            if len(harmless) >= MAX_CHECKED:
                harmless.clear()
                harmless.update(own_texts or ())
            harmless.add(sql)
            return True

        return check

    def authorize(
        self, what: int, first: str | None, second: str | None, schema: str | None, through: str | None
    ) -> int:
        """SQLite's question about one access of a statement that it compiles; for a table `first` is its name,
        and `second` the column that it updates."""
        if what in _HARMLESS:
            return apsw.SQLITE_OK
        if what == apsw.SQLITE_UPDATE and first == "_journal" and second not in self._changeable:
            return apsw.SQLITE_DENY
        ways = self._allowed.get((what, schema, first), _NO_WAY)
        return apsw.SQLITE_OK if ways is None or through in ways else apsw.SQLITE_DENY


_NO_WAY: frozenset[str | None] = frozenset()
