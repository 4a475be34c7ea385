"""The interface for differences between SQL engines: how names, placeholders, literals, lists and sums are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ...entities import (
    FieldSpec,
    FieldType,
)


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def listed(names: Sequence[str]) -> str:
    return ", ".join(map(quoted, names))


Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Total:
    """How a field is summed: the expressions to select, and the function from their values to sum and count."""

    columns: tuple[str, ...]
    finish: Callable[[Sequence[Any]], Any]


class Dialect(ABC):
    """One engine's SQL. `encoders` and `decoders` convert the types that the driver does not accept."""

    encoders: Mapping[FieldType, Convert]
    decoders: Mapping[FieldType, Convert]
    null_is_constant = True
    """Whether `field IS NULL` tells the planner that the field is the same in every row, as `field = 1` does."""

    @abstractmethod
    def placeholder(self, number: int) -> str:
        """The placeholder of this parameter, numbered from 1. A text may repeat a number."""

    @abstractmethod
    def column_type(self, kind: FieldType) -> sa.types.TypeEngine[Any]: ...

    @abstractmethod
    def literal(self, spec: FieldSpec) -> str:
        """The field's default as an SQL literal."""

    @abstractmethod
    def constraint(self, spec: FieldSpec) -> str | None:
        """The column's CHECK condition beyond its type, as an SQL expression."""

    @abstractmethod
    def element(self, item: Any) -> tuple[str, Any]:
        """How an item of a list is looked for: the kind of the test, which shapes the text, and the value to bind
        (None: the kind says it all)."""

    @abstractmethod
    def contains(self, column: str, tests: Sequence[tuple[str, str | None]]) -> str:
        """Whether a list has an element that passes one of the tests: (kind, placeholder or None)."""

    @abstractmethod
    def total(self, column: str, kind: FieldType | None) -> Total: ...

    def order(self, column: str, name: str, descending: bool) -> str:
        """`column`, of the field `name`, as a term of ORDER BY that puts null first (descending: last)."""
        return f"{column} DESC" if descending else column

    def encode(self, kind: FieldType | None, value: Any) -> Any:
        convert = self.encoders.get(kind) if kind is not None else None
        return value if convert is None else convert(value)
