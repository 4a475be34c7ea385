"""Keys that separate tenants, documents as bytes, and the envelope of an entry in Redis. Pure functions.

An envelope is `E1`, the ticket of its fill lease (8 bytes, big-endian), the document's version (8 bytes; 0 for a list
or an absent document), a checksum of key, shape and body (4 bytes), the body. The checksum detects an entry that is
damaged, stands under another key, or was written by a release with another declaration of the entity. It is no defence
against a client that can write to Redis.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import msgspec

from ..entities import Collection, FieldType

MAX_ENTRY_BYTES = 262_144
"""Larger documents and lists are not kept: they would delay the reads behind them."""
ENTRY, LEASE = b"E1", b"L1"
_HEAD = struct.Struct(">2sQQI")
_U64 = struct.Struct(">Q")
_DECIMAL = 1
_NESTED = (FieldType.MAP, FieldType.LIST, FieldType.DECIMAL)


def key_of(tenant: str | None, name: str, id: str) -> str:
    """The key of one document or list, below the store's prefix: `{tenant}:{name}:{id}`.

    Tenant and id are percent-encoded, so that a `:` in them is no separator: two different triples never have the same
    key. The platform's own documents (no tenant) have an empty first part, which no tenant can have.
    """
    return f"{_part(tenant) if tenant is not None else ''}:{name}:{_part(id)}"


def _part(text: str) -> str:
    return text if text.isascii() and text.isalnum() else quote(text, safe="")


def shape_of(collection: Collection) -> int:
    """A number that differs between declarations whose documents look different."""
    text = ";".join(f"{f.name}:{f.type}:{f.optional}" for f in sorted(collection.fields.values(), key=lambda f: f.name))
    return zlib.crc32(text.encode())


# --- Documents as bytes ---------------------------------------------------------------------------------------


def _tagged(value: Any) -> Any:
    if isinstance(value, Decimal):
        return msgspec.msgpack.Ext(_DECIMAL, str(value).encode())
    if isinstance(value, dict):
        return {name: _tagged(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    return value


def _from_extension(code: int, data: memoryview) -> Decimal:
    if code != _DECIMAL:
        raise ValueError(f"extension {code} is not known")
    return Decimal(bytes(data).decode())


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ext_hook=_from_extension).decode


def encode_body(value: Any, collection: Collection) -> bytes:
    """A document, None, or a list of documents as MessagePack; decimals and times keep their type and precision."""
    if any(field.type in _NESTED for field in collection.fields.values()):
        value = _tagged(value)
    return _encode(value)


def decode_body(body: bytes) -> Any:
    """The value that `encode_body` encoded, as new objects each time. Raises ValueError for any other bytes."""
    try:
        return _decode(body)
    except (msgspec.MsgspecError, ArithmeticError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None


# --- The envelope ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """The cached value of a key: the encoded document (or list, or absence), its version, its fill lease's ticket."""

    body: bytes
    version: int
    ticket: int = 0


ABSENT = _encode(None)


def seal(key: str, shape: int, entry: Entry) -> bytes:
    """The envelope of an entry, for Redis."""
    checksum = zlib.crc32(entry.body, zlib.crc32(key.encode(), shape))
    return _HEAD.pack(ENTRY, entry.ticket, entry.version, checksum) + entry.body


def unseal(key: str, shape: int, found: bytes) -> Entry | None:
    """The entry in an envelope. None for anything else: a lease, or a damaged, foreign or differently shaped entry."""
    if len(found) <= _HEAD.size or not found.startswith(ENTRY):
        return None
    _, ticket, version, checksum = _HEAD.unpack_from(found)
    body = found[_HEAD.size :]
    if zlib.crc32(body, zlib.crc32(key.encode(), shape)) != checksum:
        return None
    return Entry(body, version, ticket)


def is_lease(found: bytes) -> bool:
    """Whether these bytes are a fill lease: a node is filling the key now."""
    return found.startswith(LEASE)


def version_bytes(version: int) -> bytes:
    """A version as an envelope has it; empty for 0, which matches no envelope."""
    return _U64.pack(version) if version else b""
