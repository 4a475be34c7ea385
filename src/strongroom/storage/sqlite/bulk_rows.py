"""New documents as rows of SQLite's tables, ready for statements of many rows. Pure: any process can do it.

Documents that are alike are encoded a column at a time, not a document at a time. The values that all of them share are
encoded once, also inside the journal's JSON, and are bound once for each statement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, NamedTuple

from ...entities import Collection, FieldType
from ...errors import InvalidInput, TooLarge
from .. import tagged_json as _values
from ..port import (
    MAX_DOCUMENT_BYTES,
    Alike,
    Append,
    Create,
    Pack,
    Record,
    document_size,
)
from ..sql import JOURNAL_COLUMNS, Codec, json_text, line
from .dialect import SqliteDialect

JOURNAL = "_journal"
_BYTES_PER_CHARACTER = 8
_VARIABLE = frozenset({FieldType.TEXT, FieldType.BYTES, FieldType.LIST, FieldType.MAP})
_NESTED = frozenset({FieldType.LIST, FieldType.MAP})
_LINE = tuple(name for name in JOURNAL_COLUMNS if name not in ("sequence", "version"))
_VERSION = JOURNAL_COLUMNS[1:].index("version")
_OWN = ("id", "entity_id", "after", "salt")
"""What records of documents that are alike do not share."""
_MAX_REMEMBERED = 1_000
_string: Callable[[str], str] = json.encoder.encode_basestring
_TIMES = ("created_at", "updated_at")


class Part(NamedTuple):
    """Rows of one table. `same` has the columns in which all rows are equal, `values` the others, row after row."""

    table: str
    same: Mapping[str, Any]
    columns: tuple[str, ...]
    values: list[Any]


class SqlitePacker:
    """Packs documents of global collections. Can be pickled, so that any process can pack."""

    def __init__(self, collections: Sequence[Collection]) -> None:
        self._collections = tuple(collections)
        dialect = SqliteDialect()
        self._codecs = {c.name: Codec(c, dialect) for c in collections if not c.tenant_scoped}
        self._variable = {
            name: [i for i, spec in enumerate(codec.collection.fields.values()) if spec.type in _VARIABLE]
            for name, codec in self._codecs.items()
        }
        self._texts: dict[int, tuple[Any, str, str]] = {}

    def __reduce__(self) -> tuple[type[SqlitePacker], tuple[list[Collection]]]:
        return SqlitePacker, ([replace(c, fields=dict(c.fields)) for c in self._collections],)

    def _codec(self, collection: str) -> Codec:
        codec = self._codecs.get(collection)
        if codec is None:
            raise InvalidInput(f"{collection}: is no global collection that the store was prepared for")
        return codec

    def pack(self, operations: Sequence[Create | Append]) -> Pack:
        rows: dict[str, list[Any]] = {}
        lines: list[Any] = []
        documents = records = 0
        for operation in operations:
            if isinstance(operation, Append):
                found = line(operation.record, 0)
                lines += (*found[:_VERSION], *found[_VERSION + 1 :])
                records += 1
                continue
            codec = self._codec(operation.collection)
            row = codec.encode(operation.document)
            length = 0
            for number in self._variable[operation.collection]:
                if value := row[number]:
                    length += len(value)
            if length * _BYTES_PER_CHARACTER > MAX_DOCUMENT_BYTES // 2:
                _check_size(codec, operation.id, operation.document)
            times = (_time(operation.created_at), _time(operation.updated_at))
            rows.setdefault(operation.collection, []).extend((operation.id, *times, *row))
            documents += 1
        parts = [Part(name, {}, ("id", *_TIMES, *self._codecs[name].fields), some) for name, some in rows.items()]
        return Pack(documents, records, [*parts, Part(JOURNAL, {}, _LINE, lines)] if lines else parts)

    # --- Documents that are alike ---

    def pack_alike(self, some: Sequence[Alike]) -> Pack:
        parts: list[Part] = []
        for alike in some:
            parts += self._parts(alike)
        documents, records = sum(len(alike.rows) for alike in some), sum(len(alike.record_ids) for alike in some)
        return Pack(documents, records, parts)

    def _parts(self, alike: Alike) -> list[Part]:
        codec, rows, varying = self._codec(alike.collection), alike.rows, alike.varying
        ids, created, *given = zip(*rows, strict=True) if rows else [()] * (2 + len(varying))
        types = [codec.collection.fields[name].type for name in varying]
        cells = [self._cells(codec, kind, column) for kind, column in zip(types, given, strict=True)]
        own = dict(zip(codec.fields, codec.encode(alike.pattern), strict=True))
        same = {name: value for name, value in own.items() if name not in varying}
        longest = _longest([column for kind, column in zip(types, cells, strict=True) if kind in _VARIABLE])
        if (longest + sum(map(_length, same.values()))) * _BYTES_PER_CHARACTER > MAX_DOCUMENT_BYTES // 2:
            for id, _, *varied in rows:
                _check_size(codec, id, {**alike.pattern, **dict(zip(varying, varied, strict=True))})
        values = _row_after_row(ids, list(map(_time, created)), *cells)
        parts = [Part(alike.collection, same, ("id", "created_at", *varying), values)]
        record = alike.record
        if record is not None:
            secrets = codec.collection.secrets
            columns = {
                name: _hidden(column, (record.after or {}).get(name))
                if name in secrets
                else self._json(kind, column, encoded)
                for name, kind, column, encoded in zip(varying, types, given, cells, strict=True)
            }
            after = _after(record.after or {}, columns, len(rows))
            lines = _row_after_row(alike.record_ids, ids, after, alike.record_salts)
            parts.append(Part(JOURNAL, _same_lines(record), _OWN, lines))
        return parts

    def _cells(self, codec: Codec, kind: FieldType, column: Sequence[Any]) -> Sequence[Any]:
        """A column's values as SQLite has them."""
        if kind in _NESTED:
            return [None if value is None else self._nested(value)[1] for value in column]
        convert = codec.dialect.encoders.get(kind)
        return column if convert is None else [None if value is None else convert(value) for value in column]

    def _nested(self, value: Any) -> tuple[Any, str, str]:
        """The stored text of a list or map and its text in the journal, cached by object identity. Rows share a few
        objects, which are not changed."""
        found = self._texts.get(id(value))
        if found is None:
            if len(self._texts) >= _MAX_REMEMBERED:
                self._texts.clear()
            # the reference to the value keeps the id from being reused
            found = self._texts[id(value)] = value, json_text(value), _values.quick_dumps(value)
        return found

    def _json(self, kind: FieldType, column: Sequence[Any], cells: Sequence[Any]) -> list[str]:
        """A column's values in the journal's JSON. `cells` are the same values as SQLite has them."""
        if kind is FieldType.TEXT:
            return ["null" if value is None else _string(value) for value in column]
        if kind is FieldType.INT:
            return ["null" if value is None else str(value) for value in column]
        if kind is FieldType.TIMESTAMP:
            return ["null" if cell is None else f'{{"$time":"{cell}"}}' for cell in cells]
        if kind in _NESTED:
            return ["null" if value is None else self._nested(value)[2] for value in column]
        return ["null" if value is None else _values.quick_dumps(value) for value in column]


def _time(moment: Any) -> str | None:
    return None if moment is None else _values.time_to_text(moment)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else 8


def _check_size(codec: Codec, id: str, document: Mapping[str, Any]) -> None:
    size = document_size({name: document[name] for name in codec.fields})
    if size > MAX_DOCUMENT_BYTES:
        name = f"{codec.collection.name}/{id}"
        raise TooLarge(f"{name}: found {size} bytes in a document, expected at most {MAX_DOCUMENT_BYTES}")


def _same_lines(record: Record) -> dict[str, Any]:
    found = dict(zip(JOURNAL_COLUMNS[1:], line(record, 0), strict=True))
    return {name: value for name, value in found.items() if name in _LINE and name not in _OWN}


def _row_after_row(*columns: Sequence[Any]) -> list[Any]:
    return list(chain.from_iterable(zip(*columns, strict=True)))


def _longest(columns: Sequence[Sequence[Any]]) -> int:
    """The length of the longest row's texts."""
    lengths = ([len(cell) if cell else 0 for cell in column] for column in columns)
    return max(map(sum, zip(*lengths, strict=True)), default=0)


def _hidden(column: Sequence[Any], shown: Any) -> list[str]:
    """A column of secrets in the journal's JSON: a secret that is set is shown as the pattern shows it."""
    text = _values.quick_dumps(shown)
    return ["null" if value is None else text for value in column]


def _after(pattern: Mapping[str, Any], columns: Mapping[str, Sequence[str]], count: int) -> list[bytes]:
    """The journal's JSON of each document: the pattern, with the document's own values in `columns`."""
    pieces: list[Iterable[str]] = []
    text, opening = "", "{"
    for name, value in pattern.items():
        text += f"{opening}{_string(name)}:"
        opening = ","
        if name in columns:
            pieces += repeat(text, count), columns[name]
            text = ""
        else:
            text += _values.quick_dumps(value)
    pieces.append(repeat(text + "}", count))
    return ["".join(texts).encode() for texts in zip(*pieces, strict=True)]
