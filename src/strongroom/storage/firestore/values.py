"""Port values as Firestore's own, and back: exact, by type, and ordered as the port says wherever Firestore orders."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from google.cloud.firestore_v1.types import document as _document
from google.cloud.firestore_v1.types import write as _write

from ...context import us_from_utc, utc_from_us
from ...entities import Collection, Document, FieldSpec, FieldType
from .. import tagged_json

# The plain protobuf classes: Google's wrappers around them cost as much as the rest of a point read.
ValuePb: Any = _document.Value.pb()
DocumentPb: Any = _document.Document.pb()
WritePb: Any = _write.Write.pb()
_Timestamp: Any = type(DocumentPb().update_time)

COMMIT_FIELD = "_commit"
"""The field with the id of the commit that wrote the document last. It makes every write change the document: Firestore
keeps the version of an unchanged one. After a lost answer it tells whether the commit was applied."""
MAX_STORED_BYTES = 1_048_487
"""Firestore's limit for one value, which it reaches before its limit for a document, 1 MiB."""
MAX_NATIVE_DEPTH = 16
"""Maps are stored natively down to here, and as tagged JSON below: Firestore allows 20 levels, tags included."""
MAX_NATIVE_BYTES = 65_536
"""A list or map that takes more than this is stored as compressed JSON: Firestore indexes each element, refuses a
document with more than 40,000 index entries, and sends a small map as five times its size."""
_DECIMAL, _JSON, _PACKED = "$decimal", "$json", "$packed"


# --- Times ----------------------------------------------------------------------------------------------------


def timestamp(us: int) -> Any:
    """Microseconds since the epoch as Firestore's timestamp."""
    seconds, micros = divmod(us, 1_000_000)
    return _Timestamp(seconds=seconds, nanos=micros * 1_000)


def micros(moment: Any) -> int:
    """Firestore's timestamp as microseconds since the epoch; its commits have no finer ones."""
    return int(moment.seconds) * 1_000_000 + int(moment.nanos) // 1_000


# --- Values ---------------------------------------------------------------------------------------------------
#
# Lists and maps are Firestore's own. A decimal inside them is the map {"$decimal": "1.5"}, a map below MAX_NATIVE_DEPTH
# is {"$json": "…"}. A user's key that begins with $, or that Firestore reserves (__x__), gets a $ before it, so that it
# cannot be confused with these. A field of type decimal is the sortable text of `tagged_json`. A large map is
# {"$packed": bytes}, a large list [{"$packed": null}, {"$packed": bytes}]. Every search for an element asks for the
# first element of packed lists too, so that they are found, and their elements compared here.


def put(slot: Any, value: Any, depth: int = 0) -> None:
    """Write a port value into a Firestore value."""
    if value is None:
        slot.null_value = 0
    elif isinstance(value, bool):
        slot.boolean_value = value
    elif isinstance(value, str):
        slot.string_value = value
    elif isinstance(value, int):
        slot.integer_value = value
    elif isinstance(value, float):
        slot.double_value = value
    elif isinstance(value, datetime):
        slot.timestamp_value.CopyFrom(timestamp(us_from_utc(value)))
    elif isinstance(value, bytes):
        slot.bytes_value = value
    elif isinstance(value, Decimal):
        slot.map_value.fields[_DECIMAL].string_value = str(value)
    elif isinstance(value, list):
        slot.array_value.SetInParent()
        for item in value:
            put(slot.array_value.values.add(), item, depth + 1)
    elif depth >= MAX_NATIVE_DEPTH:
        slot.map_value.fields[_JSON].string_value = tagged_json.dumps(value)
    else:
        slot.map_value.SetInParent()
        for key, item in value.items():
            put(slot.map_value.fields[_escaped(key)], item, depth + 1)


def put_field(slot: Any, value: Any, kind: FieldType | None) -> None:
    """Write the value of a field of this type."""
    if kind is FieldType.DECIMAL and value is not None:
        slot.string_value = tagged_json.decimal_to_text(value)
    else:
        put(slot, value)
        if kind in (FieldType.LIST, FieldType.MAP) and slot.ByteSize() > MAX_NATIVE_BYTES:
            _pack(slot, value)


def _pack(slot: Any, value: Any) -> None:
    packed = zlib.compress(tagged_json.dumps(value).encode(), 1)
    if len(packed) >= slot.ByteSize():
        return
    slot.Clear()
    if isinstance(value, list):
        slot.array_value.values.add().CopyFrom(PACKED_LIST)
        slot.array_value.values.add().map_value.fields[_PACKED].bytes_value = packed
    else:
        slot.map_value.fields[_PACKED].bytes_value = packed


def value_of(value: Any, kind: FieldType | None = None) -> Any:
    """A new Firestore value: of a field of type `kind`, or as it stands inside a list."""
    slot = ValuePb()
    put_field(slot, value, kind)
    return slot


def _marker() -> Any:
    marker = ValuePb()
    marker.map_value.fields[_PACKED].null_value = 0
    return marker


PACKED_LIST = _marker()
"""The first element of every packed list."""


def _escaped(key: str) -> str:
    return "$" + key if key.startswith("$") or (key.startswith("__") and key.endswith("__")) else key


def take(slot: Any) -> Any:
    """The port value behind a Firestore value."""
    kind = slot.WhichOneof("value_type")
    if kind == "map_value":
        fields = slot.map_value.fields
        if len(fields) == 1:
            if _DECIMAL in fields:
                return Decimal(fields[_DECIMAL].string_value)
            if _JSON in fields:
                return tagged_json.loads(fields[_JSON].string_value)
            if _PACKED in fields:
                return tagged_json.loads(zlib.decompress(fields[_PACKED].bytes_value))
        return {(k[1:] if k.startswith("$") else k): take(v) for k, v in fields.items()}
    return _TAKE[kind](slot)


def _take_list(slot: Any) -> list[Any]:
    values = slot.array_value.values
    if len(values) == 2 and values[0] == PACKED_LIST:
        found: list[Any] = take(values[1])
        return found
    return [take(item) for item in values]


_TAKE: dict[str | None, Callable[[Any], Any]] = {
    None: lambda slot: None,
    "null_value": lambda slot: None,
    "boolean_value": lambda slot: slot.boolean_value,
    "integer_value": lambda slot: slot.integer_value,
    "double_value": lambda slot: slot.double_value,
    "string_value": lambda slot: slot.string_value,
    "bytes_value": lambda slot: slot.bytes_value,
    "timestamp_value": lambda slot: utc_from_us(micros(slot.timestamp_value)),
    "array_value": _take_list,
}


def _take_decimal(slot: Any) -> Any:
    return None if slot.WhichOneof("value_type") == "null_value" else tagged_json.text_to_decimal(slot.string_value)


def stored_size(found: Any) -> int:
    """The bytes of a document as Firestore counts them against its limit."""
    return 32 + sum(len(part.encode()) + 1 for part in found.name.split("/")) + _size_of_fields(found.fields)


def _size_of_fields(fields: Any) -> int:
    return sum(len(name.encode()) + 1 + _size_of(value) for name, value in fields.items())


def _size_of(value: Any) -> int:
    match value.WhichOneof("value_type"):
        case "string_value":
            return len(value.string_value.encode()) + 1
        case "bytes_value":
            return len(value.bytes_value)
        case "map_value":
            return _size_of_fields(value.map_value.fields)
        case "array_value":
            return sum(map(_size_of, value.array_value.values))
        case "null_value" | "boolean_value":
            return 1
        case _:
            return 8


# --- Documents ------------------------------------------------------------------------------------------------


def copied(value: Any) -> Any:
    """A copy that shares no mutable part: callers may change their own."""
    if isinstance(value, dict):
        return {name: copied(inner) for name, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


class Codec:
    """Between one collection's documents and Firestore's."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._take = tuple(
            (spec.name, _take_decimal if spec.type is FieldType.DECIMAL else take, default_of(spec))
            for spec in collection.fields.values()
        )

    def fields_of(self, found: Any) -> Document:
        """The declared fields of a stored document; those it was written without have their defaults."""
        fields = found.fields
        return {
            name: reader(fields[name]) if name in fields else copied(default) for name, reader, default in self._take
        }

    def document(self, found: Any) -> Document:
        """A stored document as the port gives it."""
        fields = found.fields
        return {
            "id": fields["id"].string_value,
            "version": micros(found.update_time),
            "created_at": utc_from_us(micros(fields["created_at"].timestamp_value)),
            "updated_at": utc_from_us(micros(fields["updated_at"].timestamp_value)),
            **self.fields_of(found),
        }

    def put(self, target: Any, given: Mapping[str, Any]) -> None:
        """Write some declared fields into a Firestore document."""
        specs = self.collection.fields
        for name, value in given.items():
            put_field(target.fields[name], value, specs[name].type)


def default_of(spec: FieldSpec) -> Any:
    """The value of the field in a document that was written before the field existed."""
    return spec.default if spec.has_default else None
