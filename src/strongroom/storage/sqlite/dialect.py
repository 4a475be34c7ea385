"""SQLite's dialect: column types, literals, lists as JSON, exact sums; and SQLite's errors as Strongroom's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import apsw
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from ...entities import FieldSpec, FieldType, total
from ...errors import (
    SchemaError,
    StorageFull,
    StoreError,
    StrongroomError,
    TooLarge,
    Unavailable,
)
from .. import tagged_json as _values
from ..sql import Convert, Dialect, Total, json_text, quoted

ENGINE = sqlite.dialect()
"""SQLAlchemy's, which writes the DDL."""

_TYPES: dict[FieldType, type[sa.types.TypeEngine[Any]]] = {
    FieldType.BOOL: sa.INTEGER,
    FieldType.INT: sa.INTEGER,
    FieldType.FLOAT: sa.REAL,
    FieldType.BYTES: sa.BLOB,
}


class SqliteDialect(Dialect):
    """Times are ISO 8601 text, decimals text in their order, lists and maps JSON text; each compares as it should."""

    encoders: Mapping[FieldType, Convert] = {
        FieldType.DECIMAL: _values.decimal_to_text,
        FieldType.TIMESTAMP: _values.time_to_text,
        FieldType.LIST: json_text,
        FieldType.MAP: json_text,
    }
    decoders: Mapping[FieldType, Convert] = {
        FieldType.BOOL: bool,
        FieldType.DECIMAL: _values.text_to_decimal,
        FieldType.TIMESTAMP: datetime.fromisoformat,  # the text ends in Z, so the time is aware
        FieldType.LIST: _values.loads,
        FieldType.MAP: _values.loads,
    }

    def placeholder(self, number: int) -> str:
        return f"?{number}"

    def column_type(self, kind: FieldType) -> sa.types.TypeEngine[Any]:
        return _TYPES.get(kind, sa.TEXT)()

    def literal(self, spec: FieldSpec) -> str:
        value = self.encode(spec.type, spec.default)
        if isinstance(value, str):
            return "'" + value.replace("'", "''") + "'"
        if isinstance(value, bytes):
            return f"X'{value.hex()}'"
        return repr(int(value) if isinstance(value, bool) else value)

    def constraint(self, spec: FieldSpec) -> str | None:
        return f"{quoted(spec.name)} IN (0, 1)" if spec.type is FieldType.BOOL else None

    def element(self, item: Any) -> tuple[str, Any]:
        if isinstance(item, bool):
            return ("true" if item else "false"), None
        if isinstance(item, int | float):
            return "number", item
        if isinstance(item, str):
            return "text", item
        return "object", _values.dumps(item)

    def contains(self, column: str, tests: Sequence[tuple[str, str | None]]) -> str:
        ways = " OR ".join(_ELEMENTS[kind].format(value) for kind, value in tests)
        return f"EXISTS (SELECT 1 FROM json_each({column}) AS element WHERE {ways})"

    def total(self, column: str, kind: FieldType | None) -> Total:
        if kind is FieldType.INT:
            # in two halves, since SQLite refuses a sum that leaves int64 though an average may well be of it
            return Total((f"sum({column} >> 32)", f"sum({column} & 4294967295)"), _halves)
        if kind is FieldType.DECIMAL:
            return Total((f"group_concat({column}, ' ')",), _decimals)
        return Total((f"total({column})",), _float)


_ELEMENTS = {
    "true": "element.type = 'true'",
    "false": "element.type = 'false'",
    "number": "(element.type IN ('integer', 'real') AND element.value = {})",
    "text": "(element.type = 'text' AND element.value = {})",
    "object": "(element.type = 'object' AND element.value = {})",
}


def _halves(row: Sequence[Any]) -> int:
    return ((row[0] or 0) << 32) + (row[1] or 0)


def _decimals(row: Sequence[Any]) -> Decimal:
    found: Decimal = total([_values.text_to_decimal(text) for text in (row[0] or "").split()], FieldType.DECIMAL)
    return found


def _float(row: Sequence[Any]) -> float:
    return float(row[0])


# --- Errors ---------------------------------------------------------------------------------------------------


def translated(error: apsw.Error, path: str) -> StrongroomError:
    """Convert SQLite's error to Strongroom's. Includes SQLite's message unless it could contain a value."""
    match error:
        case apsw.FullError():
            return StorageFull(f"{path}: the disk is full: writes are refused, reads go on")
        case apsw.BusyError() | apsw.LockedError() | apsw.ProtocolError():
            return Unavailable(f"{path}: another process holds the store's lock: try again")
        case apsw.CorruptError() | apsw.NotADBError() | apsw.FormatError():
            return StoreError(f"{path}: is damaged, or is not a SQLite file: restore a backup, or name another file")
        case apsw.TooBigError():
            return TooLarge(f"{path}: a text or row is larger than SQLite can hold")
        case apsw.SQLError():
            return SchemaError(f"{path}: the tables were changed by another process: prepare the store again ({error})")
        case apsw.AuthError():
            return StoreError(f"{path}: a statement reached past its tenant's view and was refused ({error})")
        case apsw.ConstraintError():
            return StoreError(f"{path}: a document does not fit its table ({error})")
        case _:
            return Unavailable(f"{path}: SQLite cannot read or write ({type(error).__name__}: {error})")


def commit_error(error: apsw.Error, path: str) -> StrongroomError:
    """The error of a COMMIT. The log may hold the whole transaction although the fsync behind it failed: then SQLite
    rolls it back here, and a crash before the next commit brings it back. Nothing was committed only if
    SQLite did not get the lock, or could not write the log to its end."""
    known = translated(error, path)
    if type(known) is not Unavailable or isinstance(error, apsw.BusyError | apsw.LockedError | apsw.ProtocolError):
        return known
    return Unavailable(
        f"{path}: SQLite failed to commit ({type(error).__name__}: {error}), and whether it was done is not known: "
        "read before you try again",
        outcome="unknown",
    )
