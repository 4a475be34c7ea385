"""Rows: the codec of one collection, and the journal's records."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ...entities import (
    SYSTEM_FIELDS,
    Collection,
    Document,
)
from .. import tagged_json
from ..port import JournalRow, Record
from .dialect import Dialect


def json_text(value: Any) -> str:
    """As `tagged_json.dumps`, in a third of its time: C does all but the tags.

    A tag appears as one `"$` in the text. If the text has more of these than tags, a text or key of the user's begins
    with $ and may need an escape.
    """
    if not value and isinstance(value, list | dict):  # most lists and maps of most documents
        return "{}" if isinstance(value, dict) else "[]"
    tags = 0

    def tag(inner: Any) -> Any:
        nonlocal tags
        tags += 1
        return tagged_json.tag(inner)

    text = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=tag).encode(value)
    return text if text.count('"$') == tags else tagged_json.dumps(value)


class Codec:
    """Between documents of one collection and rows in the order of `columns`."""

    def __init__(self, collection: Collection, dialect: Dialect) -> None:
        self.collection = collection
        self.dialect = dialect
        self.fields = tuple(collection.fields)
        self.columns = (*SYSTEM_FIELDS, *self.fields)
        self.encode: Callable[[Document], tuple[Any, ...]] = _encoder(collection, dialect, self.fields)
        self.decode: Callable[[Sequence[Any]], Document] = self.decoder(self.columns)

    def decoder(self, columns: Sequence[str]) -> Callable[[Sequence[Any]], Document]:
        """The function that makes a document of a row with these columns."""
        return _decoder(self.collection, self.dialect, columns)


# A generated function for each collection takes half the time of a loop over converters, most of a read's own time.


def _decoder(collection: Collection, dialect: Dialect, columns: Sequence[str]) -> Callable[[Sequence[Any]], Document]:
    cells = [f"c{number}" for number in range(len(columns))]
    scope: dict[str, Any] = {}
    members = []
    for cell, name in zip(cells, columns, strict=True):
        convert = dialect.decoders.get(collection.type_of(name))  # type: ignore[arg-type]  # every column has a type
        if convert is None:
            members.append(f"{name!r}: {cell}")
        else:
            scope[f"decode_{cell}"] = convert
            members.append(f"{name!r}: None if {cell} is None else decode_{cell}({cell})")
    source = f"def decode(row):\n    {', '.join(cells)}, = row\n    return {{{', '.join(members)}}}\n"
    return _made(source, "decode", scope)


def _encoder(collection: Collection, dialect: Dialect, fields: Sequence[str]) -> Callable[[Document], tuple[Any, ...]]:
    scope: dict[str, Any] = {}
    cells = []
    for number, name in enumerate(fields):
        convert = dialect.encoders.get(collection.fields[name].type)
        if convert is None:
            cells.append(f"document[{name!r}]")
        else:
            scope[f"encode_{number}"] = convert
            cells.append(f"None if (v := document[{name!r}]) is None else encode_{number}(v)")
    source = f"def encode(document):\n    return ({''.join(f'{cell}, ' for cell in cells)})\n"
    return _made(source, "encode", scope)


def _made(source: str, name: str, scope: dict[str, Any]) -> Callable[[Any], Any]:
    exec(source, scope)  # noqa: S102  # the source holds declared names only, each a checked identifier
    made: Callable[[Any], Any] = scope[name]
    return made


# --- The journal's rows ---------------------------------------------------------------------------------------

JOURNAL_COLUMNS = (
    "sequence", "id", "tenant_id", "at_us", "actor", "request_id", "action", "collection", "entity_id", "version",
    "before", "after", "salt", "claims", "rules",
)  # fmt: skip
"""The columns of the journal's table: those of JOURNAL_ROW, in their order."""
_BEFORE, _AFTER, _SALT = (JOURNAL_COLUMNS.index(name) for name in ("before", "after", "salt"))
Line = tuple[Any, ...]
"""A record's values in the order of JOURNAL_COLUMNS, without the sequence, which the store gives."""


def line(record: Record, version: int | None) -> Line:
    """A record as a row; before, after and claims are JSON text."""
    return (
        record.id,
        record.tenant,
        record.at_us,
        record.actor,
        record.request_id,
        record.action,
        record.collection,
        record.entity_id,
        version,
        None if record.before is None else tagged_json.quick_dumps(record.before),
        None if record.after is None else tagged_json.quick_dumps(record.after),
        record.salt,
        None if record.claims is None else tagged_json.quick_dumps(record.claims),
        record.rules,
    )


def canonical(row: JournalRow) -> JournalRow:
    """A row whose texts are those of `quick_dumps`. Before records had salts, some imports wrote other texts."""
    if row[_SALT]:
        return row
    cells: list[Any] = list(row)
    for at in (_BEFORE, _AFTER):
        if cells[at] is not None:
            cells[at] = tagged_json.quick_dumps(tagged_json.loads(cells[at]))
    return tuple(cells)


def content_size(rows: Sequence[Sequence[Any]]) -> int:
    """About how many bytes `before` and `after` have in rows of JOURNAL_COLUMNS."""
    return sum(len(row[_BEFORE] or "") + len(row[_AFTER] or "") for row in rows)
