"""PostgreSQL's errors as Strongroom's: by SQLSTATE, never by the text of a message."""

from __future__ import annotations

import ssl

import asyncpg

from ...errors import ConfigError, SchemaError, StorageFull, StoreError, StrongroomError, TooLarge, Unavailable

UNMET = "SR001"
"""What `strongroom_require` raises: a precondition of the statement did not hold."""
UNIQUE_VIOLATION = "23505"
_RETRIED = frozenset({"40001", "40P01"})  # a serialisation failure, a deadlock
_CONNECTION_LOST = frozenset({"57P01", "57P02", "57P05", "25P03"})  # ended by an administrator, a crash, a time-out

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
"""All errors of the driver when the server or the network is at fault (ssl.SSLError is an OSError). A call raises the
driver's InternalClientError on a connection whose server was killed during the call before."""


def sqlstate(error: BaseException) -> str:
    return getattr(error, "sqlstate", None) or ""


def is_retried(error: BaseException) -> bool:
    """Whether the same transaction may succeed when it is tried again; nothing of it was applied."""
    return sqlstate(error) in _RETRIED


def is_connection_lost(error: BaseException) -> bool:
    """Whether the connection is broken; the command on it may or may not have been executed."""
    state = sqlstate(error)
    if state:
        return state[:2] == "08" or state in _CONNECTION_LOST
    return isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError | TimeoutError)


def is_outdated(error: BaseException) -> bool:
    """Whether a prepared statement is older than a change of its tables; the driver has dropped it by now."""
    return isinstance(error, asyncpg.exceptions.InvalidCachedStatementError | asyncpg.OutdatedSchemaCacheError)


def translated(error: BaseException, place: str) -> StrongroomError:
    """The driver's error as one of Strongroom's. The driver's text is included only where it cannot hold a value or a
    password."""
    state = sqlstate(error)
    if state:
        return _of_state(state, error, place)
    if isinstance(error, TimeoutError):
        return Unavailable(f"{place}: PostgreSQL does not answer in time")
    if isinstance(error, ssl.SSLError):
        return Unavailable(f"{place}: no secure connection: check sslmode and the certificates ({error.reason})")
    if isinstance(error, ConnectionRefusedError):
        return Unavailable(f"{place}: PostgreSQL cannot be reached: nothing listens there")
    return Unavailable(f"{place}: the connection to PostgreSQL was lost ({type(error).__name__})")


def _of_state(state: str, error: BaseException, place: str) -> StrongroomError:
    match state:
        case "28P01" | "28000":
            return ConfigError(f"{place}: PostgreSQL refuses the user or the password: check them in the store's URL")
        case "3D000":
            return ConfigError(f"{place}: there is no such database: run createdb, or name another one")
        case "53100" | "53200":
            return StorageFull(f"{place}: PostgreSQL's disk or memory is full: writes are refused, reads go on")
        case "53300":
            return Unavailable(
                f"{place}: PostgreSQL has no connection left: lower max_connections in the store's URL, or raise the "
                "server's"
            )
        case "55P03":
            return Unavailable(f"{place}: a lock was held for longer than lock_timeout_s: try again")
        case "57014":
            return Unavailable(f"{place}: a statement took longer than statement_timeout_s, and was ended")
        case "25006":
            return Unavailable(f"{place}: this PostgreSQL only reads (a standby?): name the primary")
        case "42501":
            return StoreError(
                f"{place}: the role lacks a right, or a row is not its tenant's: run what `strongroom schema roles` "
                "prints, as the owner"
            )
        case "54000" | "54001" | "54011" | "22P05":
            return TooLarge(f"{place}: a value is larger than PostgreSQL can index or hold (SQLSTATE {state})")
        case _:
            pass
    if state in _RETRIED:
        return Unavailable(f"{place}: other transactions were in the way time and again: try again")
    match state[:2]:
        case "42" | "3F" | "0A":
            return SchemaError(
                f"{place}: the tables are not as this store expects them: prepare the store again (SQLSTATE {state})"
            )
        case "22" | "23":
            return StoreError(f"{place}: a document does not fit its table (SQLSTATE {state})")
        case "XX":
            return StoreError(f"{place}: PostgreSQL reports damage or a fault of its own (SQLSTATE {state})")
        case _:
            return Unavailable(f"{place}: PostgreSQL cannot do this now ({type(error).__name__}, SQLSTATE {state})")
