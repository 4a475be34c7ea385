"""PostgreSQL's dialect: column types, literals, tests of a list's elements, exact sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Context, Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from ...entities import SUM_CONTEXT, SYSTEM_FIELDS, FieldSpec, FieldType
from .. import tagged_json
from ..sql import Convert, Dialect, Total, json_text

ENGINE = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
"""SQLAlchemy's, which writes the DDL; with its own parameter style it would double each % in a default."""

_TYPES: dict[FieldType, sa.types.TypeEngine[Any]] = {
    FieldType.BOOL: sa.Boolean(),
    FieldType.INT: sa.BigInteger(),
    FieldType.FLOAT: sa.Double(),
    FieldType.DECIMAL: sa.Numeric(),
    FieldType.TEXT: sa.Text(collation="C"),
    FieldType.BYTES: postgresql.BYTEA(),
    FieldType.TIMESTAMP: postgresql.TIMESTAMP(timezone=True),
    FieldType.LIST: postgresql.JSON(),
    FieldType.MAP: postgresql.JSON(),
}
ARRAY_TYPES: Mapping[FieldType, str] = {
    FieldType.BOOL: "boolean[]",
    FieldType.INT: "bigint[]",
    FieldType.FLOAT: "double precision[]",
    FieldType.DECIMAL: "numeric[]",
    FieldType.TEXT: "text[]",
    FieldType.BYTES: "bytea[]",
    FieldType.TIMESTAMP: "timestamptz[]",
    FieldType.LIST: "json[]",
    FieldType.MAP: "json[]",
}
"""The array types that bind many values of one field."""

_HUGE, _SCALE = "1e290::float8", 2**64
"""PostgreSQL refuses a sum of floats that exceeds their range, where other engines return infinity: greater floats are
summed separately, scaled down."""
_NORMAL = Context(prec=1_000, Emax=999_999, Emin=-999_999)  # more digits than any value or sum has in full


def _normalised(value: Decimal) -> Decimal:
    """In the port's form: 1E+1, not 10, and zero without digits."""
    return _NORMAL.normalize(value) if value else Decimal(0)


_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_ENDS = {_FIRST: "-infinity", _LAST: "infinity"}
"""The driver's values for the first and the last time; they sort correctly."""


def _time(value: datetime) -> datetime:
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)  # the driver reads those two without zone


class PostgresDialect(Dialect):
    """Scalars are the engine's own types and need no conversion: text sorts by bytes (COLLATE "C"), decimals are
    numeric. Lists and maps are `json`, which keeps their text as it was written; `jsonb` would give back 1E+16 as an
    int. What looks into them casts to jsonb, and an index on a list is a GIN index over that cast."""

    null_is_constant = False
    encoders: Mapping[FieldType, Convert] = {FieldType.LIST: json_text, FieldType.MAP: json_text}
    decoders: Mapping[FieldType, Convert] = {
        FieldType.DECIMAL: _normalised,
        FieldType.TIMESTAMP: _time,
        FieldType.LIST: tagged_json.loads,
        FieldType.MAP: tagged_json.loads,
    }

    def order(self, column: str, name: str, descending: bool) -> str:
        if name in SYSTEM_FIELDS:  # never null; to say more would keep the primary key from serving the order
            return super().order(column, name, descending)
        return f"{column} DESC NULLS LAST" if descending else f"{column} ASC NULLS FIRST"

    def placeholder(self, number: int) -> str:
        return f"${number}"

    def column_type(self, kind: FieldType) -> sa.types.TypeEngine[Any]:
        return _TYPES[kind]

    def literal(self, spec: FieldSpec) -> str:
        value = self.encode(spec.type, spec.default)
        match spec.type:
            case FieldType.BOOL:
                return "true" if value else "false"
            case FieldType.TEXT:
                return _text(value)
            case FieldType.BYTES:
                return f"'\\x{value.hex()}'::bytea"
            case FieldType.LIST | FieldType.MAP:
                return f"{_text(value)}::json"
            case FieldType.TIMESTAMP:
                return f"'{_ENDS.get(value) or tagged_json.time_to_text(value)}'::timestamptz"
            case FieldType.FLOAT:
                return f"'{value!r}'::double precision"
            case FieldType.DECIMAL:
                return f"'{value}'::numeric"
            case _:
                return (
                    f"'{value}'::bigint"  # quoted: -9223372036854775808 alone would be the negation of too great a one
                )

    def constraint(self, spec: FieldSpec) -> str | None:
        return None

    def element(self, item: Any) -> tuple[str, Any]:
        return ("object" if isinstance(tagged_json.tag(item), dict) else "scalar"), json_text(item)

    def contains(self, column: str, tests: Sequence[tuple[str, str | None]]) -> str:
        return "(" + " OR ".join(_CONTAINS[kind].format(column=column, item=item) for kind, item in tests) + ")"

    def total(self, column: str, kind: FieldType | None) -> Total:
        # sum(bigint) and sum(numeric) are numeric: nothing overflows, nothing is rounded
        if kind is FieldType.INT:
            return Total((f"sum({column})",), _whole)
        if kind is FieldType.DECIMAL:
            return Total((f"sum({column})",), _exact)
        return Total(
            (
                f"sum({column}) FILTER (WHERE abs({column}) < {_HUGE})",
                f"sum({column} / {_SCALE}) FILTER (WHERE abs({column}) >= {_HUGE})",
            ),
            _float,
        )


_CONTAINS = {
    "scalar": "{column}::jsonb @> {item}::jsonb",
    # @> also matches a part of an object: the first test can use an index, the second is exact
    "object": (
        "({column}::jsonb @> jsonb_build_array({item}::jsonb) AND "
        "EXISTS (SELECT 1 FROM jsonb_array_elements({column}::jsonb) AS element WHERE element = {item}::jsonb))"
    ),
}


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"  # standard_conforming_strings is on, as the store checks


def _whole(row: Sequence[Any]) -> int:
    return int(row[0] or 0)


def _exact(row: Sequence[Any]) -> Decimal:
    return SUM_CONTEXT.plus(row[0]) if row[0] is not None else Decimal(0)


def _float(row: Sequence[Any]) -> float:
    return float((row[0] or 0.0) + (row[1] or 0.0) * _SCALE)
