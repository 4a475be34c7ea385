"""New documents as rows of SQLite's tables, made ready for one statement of many rows; pure, for any process.

Documents that are alike are written by a function that is made for their varying fields: what all of them share is
encoded once, also inside the journal's JSON, and is bound once for each statement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
_MAX_REMEMBERED = 1_000
_string: Callable[[str], str] = json.encoder.encode_basestring
_TIMES = ("created_at", "updated_at")


class Part(NamedTuple):
    """Rows of one table: the columns in which they are all the same, and the values of the others, row after row."""

    table: str
    same: Mapping[str, Any]
    columns: tuple[str, ...]
    values: list[Any]


class SqlitePacker:
    """Documents of global collections as parts."""

    def __init__(self, collections: Sequence[Collection]) -> None:
        self._collections = tuple(collections)
        dialect = SqliteDialect()
        self._codecs = {c.name: Codec(c, dialect) for c in collections if not c.tenant_scoped}
        self._variable = {
            name: [i for i, spec in enumerate(codec.collection.fields.values()) if spec.type in _VARIABLE]
            for name, codec in self._codecs.items()
        }
        self._writers: dict[tuple[Any, ...], Callable[..., tuple[list[Any], list[Any], int]]] = {}
        self._texts: dict[int, tuple[Any, str]] = {}

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
        codec, record = self._codec(alike.collection), alike.record
        shown = record.after if record is not None else None
        key = (alike.collection, alike.varying, tuple(shown) if shown is not None else None)
        write = self._writers.get(key)
        if write is None:
            write = self._writers[key] = _writer(codec, alike.varying, shown, self._text)
        own = dict(zip(codec.fields, codec.encode(alike.pattern), strict=True))
        same = {name: value for name, value in own.items() if name not in alike.varying}
        constants = _between(shown, alike.varying, codec.collection.secrets) if shown is not None else ()
        values, lines, longest = write(alike.rows, alike.record_ids, constants)
        if (longest + sum(map(_length, same.values()))) * _BYTES_PER_CHARACTER > MAX_DOCUMENT_BYTES // 2:
            for id, _, *varied in alike.rows:
                _check_size(codec, id, {**alike.pattern, **dict(zip(alike.varying, varied, strict=True))})
        parts = [Part(alike.collection, same, ("id", "created_at", *alike.varying), values)]
        if record is not None:
            parts.append(Part(JOURNAL, _same_lines(record), ("id", "entity_id", "after"), lines))
        return parts

    def _text(self, value: Any) -> str:
        """`json_text` of a list or map, remembered by the object itself, which nobody changes: the same few come again
        and again."""
        found = self._texts.get(id(value))
        if found is None:
            if len(self._texts) >= _MAX_REMEMBERED:
                self._texts.clear()
            found = self._texts[id(value)] = value, json_text(value)  # that it is held keeps its id from being reused
        return found[1]


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
    return {name: value for name, value in found.items() if name in _LINE and name not in ("id", "entity_id", "after")}


def _between(shown: Mapping[str, Any], varying: Sequence[str], secrets: frozenset[str]) -> list[str]:
    """The JSON text of `shown` as what stands before, between and behind the varying values; behind all that, what is
    shown of each secret that varies."""
    texts, text, opening = [], "", "{"
    for name, value in shown.items():
        text += f"{opening}{_string(name)}:"
        opening = ","
        if name in varying:
            texts.append(text)
            text = ""
        else:
            text += json_text(value)
    masks = [json_text(shown[name]) for name in shown if name in varying and name in secrets]
    return [*texts, text + "}", *masks]


def _writer(
    codec: Codec, varying: Sequence[str], shown: Mapping[str, Any] | None, text: Callable[[Any], str]
) -> Callable[..., tuple[list[Any], list[Any], int]]:
    """What makes of rows, record ids and the constants of `_between` the values of the table, those of the journal, and
    the length of the longest row's texts."""
    collection, dialect = codec.collection, codec.dialect
    scope: dict[str, Any] = {"time": _values.time_to_text, "string": _string, "json_text": json_text}
    scope |= {"opens": '{"$time":"', "closes": '"}'}
    cells, lengths, values = [], [], dict[str, str]()
    for number, name in enumerate(varying):
        spec, value, cell = collection.fields[name], f"v{number}", f"c{number}"
        convert = dialect.encoders.get(spec.type)
        if spec.type in _NESTED:
            convert = text
        if convert is None:
            values[name] = value
        else:
            scope[f"encode{number}"] = convert
            cells.append(f"{cell} = None if {value} is None else encode{number}({value})")
            values[name] = cell
        if spec.type in _VARIABLE:
            lengths.append(f"len({values[name]} or '')")
    said = []
    names = [name for name in shown or () if name in varying]
    secret = [name for name in names if name in collection.secrets]
    for name in names:
        number = varying.index(name)
        mask = f"m{secret.index(name)}" if name in secret else None
        said.append(_said(collection.fields[name].type, f"v{number}", values[name], mask))
    pieces = "".join(f"s{n}, {one}, " for n, one in enumerate(said)) + f"s{len(said)}"
    given = ", ".join(f"v{number}" for number in range(len(varying)))
    with_record = shown is not None
    constants = [*(f"s{n}" for n in range(len(said) + 1)), *(f"m{n}" for n in range(len(secret)))]
    source = "\n".join([
        "def write(rows, ids, constants):",
        f"    {', '.join(constants)}, = constants" if with_record else "    ids = [None] * len(rows)",
        "    values, lines, longest = [], [], 0",
        "    add, tell = values.extend, lines.extend",
        f"    for (id, created, {given}), record in zip(rows, ids, strict=True):",
        *(f"        {cell}" for cell in cells),
        f"        length = {' + '.join(lengths) or '0'}",
        "        if length > longest:",
        "            longest = length",
        f"        add((id, None if created is None else time(created), {', '.join(values.values())}))",
        f"        tell((record, id, ''.join(({pieces},)).encode()))" if with_record else "",
        "    return values, lines, longest",
    ])  # fmt: skip
    exec(source, scope)  # noqa: S102  # the source holds numbers only, and no name that is declared
    made: Callable[..., tuple[list[Any], list[Any], int]] = scope["write"]
    return made


def _said(kind: FieldType, value: str, cell: str, mask: str | None) -> str:
    """A varying value in the journal's JSON, as an expression."""
    if mask is not None:
        found = mask
    elif kind is FieldType.TEXT:
        found = f"string({value})"
    elif kind is FieldType.INT:
        found = f"str({value})"
    elif kind is FieldType.TIMESTAMP:
        found = f"opens + {cell} + closes"
    elif kind in _NESTED:
        found = cell
    else:
        found = f"json_text({value})"
    return f"('null' if {value} is None else {found})"
