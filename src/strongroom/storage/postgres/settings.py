"""The settings in a `postgresql://` URL: the server, and the store's own options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from ...errors import ConfigError

SCHEMA = "strongroom"
MAX_CONNECTIONS = 20
CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 30.0
LOCK_TIMEOUT_S = 5.0
GRACE_S = 5.0
"""An answer that takes this much longer than the statement's time-out (at most as long again) means that the connection
is broken."""

_DRIVER_OPTIONS = frozenset(
    {
        *("host", "port", "user", "password", "passfile", "database", "dbname", "application_name"),
        *("sslmode", "sslcert", "sslcrl", "sslkey", "sslnegotiation", "sslpassword", "sslrootcert"),
        *("ssl_min_protocol_version", "ssl_max_protocol_version", "target_session_attrs", "gsslib", "krbsrvname"),
    }
)
_OWN_OPTIONS = ("schema", "max_connections", "connect_timeout_s", "statement_timeout_s", "lock_timeout_s", "pgbouncer")
_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


@dataclass(frozen=True)
class Settings:
    """`dsn` is the URL without the store's own options. It holds the password, so it is not shown."""

    dsn: str = field(repr=False)
    place: str
    """The server and database, as messages name them: without user or password."""
    schema: str = SCHEMA
    max_connections: int = MAX_CONNECTIONS
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    statement_timeout_s: float = STATEMENT_TIMEOUT_S
    lock_timeout_s: float = LOCK_TIMEOUT_S
    pgbouncer: bool = False

    @property
    def command_timeout_s(self) -> float:
        return self.statement_timeout_s + min(GRACE_S, self.statement_timeout_s)

    def session_settings(self) -> Mapping[str, str]:
        """The settings of each session. The store's statements join lists of keys to tables, never two tables. With
        nested loops alone, rows are locked in the order of the keys, so that two commits cannot deadlock."""
        return {
            "statement_timeout": f"{round(self.statement_timeout_s * 1000)}",
            "lock_timeout": f"{round(self.lock_timeout_s * 1000)}",
            "idle_in_transaction_session_timeout": f"{round(self.command_timeout_s * 1000)}",
            "enable_hashjoin": "off",
            "enable_mergejoin": "off",
            "jit": "off",  # it pays on long analyses, and would delay a page of documents by a tenth of a second
        }

    def connect_arguments(self) -> dict[str, Any]:
        """The arguments of `asyncpg.connect`, except the time-out of a command."""
        arguments: dict[str, Any] = {"dsn": self.dsn, "timeout": self.connect_timeout_s}
        if self.pgbouncer:
            # The next transaction may get another session: state of a session would be lost, or leak.
            return {**arguments, "statement_cache_size": 0}
        return {
            **arguments,
            "statement_cache_size": 1_000,
            "max_cached_statement_lifetime": 0,
            "max_cacheable_statement_size": 0,
            "server_settings": dict(self.session_settings()),
        }


def read_settings(url: str) -> Settings:
    """The settings in the URL. ConfigError names what is wrong; it never shows the password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(
            "store postgresql://…: expected postgresql://user:password@host:port/database, and in user and password "
            "%-escapes for what is special in a URL"
        ) from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    known = {*_OWN_OPTIONS, *_DRIVER_OPTIONS}
    if unknown := sorted(options.keys() - known):
        raise ConfigError(
            f"store postgresql://…: found the unknown option {', '.join(unknown)}, expected some of "
            f"{', '.join(_OWN_OPTIONS)}, or of the driver's {', '.join(sorted(_DRIVER_OPTIONS))}"
        )
    host = options.get("host", parts.hostname or "localhost")
    database = options.get("dbname", options.get("database", unquote(parts.path.lstrip("/"))))
    if not database:
        raise ConfigError("store postgresql://…: found no database, expected postgresql://user@host/database")
    driver = {name: value for name, value in options.items() if name in _DRIVER_OPTIONS}
    schema = options.get("schema", SCHEMA)
    if not _SCHEMA_NAME.fullmatch(schema) or schema.startswith("pg_") or schema == "public":
        raise ConfigError(
            f"store postgresql://…: schema: found {schema!r}, expected a name of lower-case letters, digits and _ that "
            "is the store's alone"
        )
    driver.setdefault("application_name", "strongroom")
    path = quote(unquote(parts.path.lstrip("/")))
    return Settings(
        dsn=f"postgresql://{parts.netloc}/{path}?{urlencode(driver)}",
        place=f"{host}:{options.get('port', port or 5432)}/{database}",
        schema=schema,
        max_connections=int(_number(options, "max_connections", MAX_CONNECTIONS, least=3, whole=True)),
        connect_timeout_s=_number(options, "connect_timeout_s", CONNECT_TIMEOUT_S),
        statement_timeout_s=_number(options, "statement_timeout_s", STATEMENT_TIMEOUT_S),
        lock_timeout_s=_number(options, "lock_timeout_s", LOCK_TIMEOUT_S),
        pgbouncer=_flag(options, "pgbouncer"),
    )


def _number(
    options: Mapping[str, str], name: str, default: float, *, least: float = 0.001, whole: bool = False
) -> float:
    text = options.get(name)
    if text is None:
        return default
    expected = f"a {'whole ' if whole else ''}number of at least {least:g}"
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise ConfigError(f"store postgresql://…: {name}: found {text!r}, expected {expected}") from None
    if not least <= value <= 86_400:
        raise ConfigError(f"store postgresql://…: {name}: found {text}, expected {expected}, at most 86400")
    return value


def _flag(options: Mapping[str, str], name: str) -> bool:
    text = options.get(name, "0")
    if text not in ("0", "1"):
        raise ConfigError(f"store postgresql://…: {name}: found {text!r}, expected 0 or 1")
    return text == "1"
