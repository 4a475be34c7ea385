"""Checksums that are equal on every engine: canonical bytes of a document, their digest, and the sum of a set.

The sum adds SHA-256 digests as numbers, modulo 2**256. It does not depend on an order, so each engine is read in its
fastest order. A duplicate document counts twice, where an exclusive or would cancel it. Versions are left out, because
each store assigns its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from hashlib import sha256
from operator import itemgetter
from typing import Any

import msgspec

from ..entities import Collection, Document, FieldType, encode_value
from ..storage.port import Record

MODULUS = 2**256
_DECIMAL_CODE = 1
_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_AMBIGUOUS = frozenset({FieldType.DECIMAL, FieldType.LIST, FieldType.MAP})


@dataclass(slots=True)
class SetSum:
    """The number of documents in a set, and the sum of their digests."""

    count: int = 0
    total: int = 0

    def add(self, digest: int) -> None:
        self.count += 1
        self.total = (self.total + digest) % MODULUS

    @property
    def text(self) -> str:
        return f"{self.total:064x}"

    @classmethod
    def of(cls, count: int, text: str) -> SetSum:
        return cls(count, int(text, 16))


class Canonical:
    """Documents of one collection as bytes: equal for equal documents only."""

    def __init__(self, collection: Collection) -> None:
        names = sorted(collection.fields)
        self._values = itemgetter("id", "created_at", "updated_at", *names)
        self._special = tuple(i for i, n in enumerate(names, 3) if collection.fields[n].type in _AMBIGUOUS)
        self._head = sha256(_encode([collection.name, names])).digest()

    def encoded(self, document: Document) -> bytes:
        values = self._values(document)
        for position in self._special:
            if values[position]:
                return _encode([tagged(v) if i in self._special else v for i, v in enumerate(values)])
        return _encode(values)

    def digest(self, encoded: bytes) -> int:
        return int.from_bytes(sha256(self._head + encoded).digest())

    def of(self, document: Document) -> int:
        """The document's digest."""
        return int.from_bytes(sha256(self._head + self.encoded(document)).digest())


def encoded_record(record: Record) -> bytes:
    """A journal record as canonical bytes, without its sequence, which each store assigns."""
    head = (record.id, record.tenant, record.at_us, record.actor, record.request_id, record.action)
    rest = (record.collection, record.entity_id, tagged(record.before), tagged(record.after), record.version)
    return _encode((*head, *rest, record.salt, tagged(record.claims), record.rules))


def record_digest(encoded: bytes) -> int:
    return int.from_bytes(sha256(encoded).digest())


_PLAIN = frozenset({type(None), bool, int, float, str, bytes, datetime})


def tagged(value: Any) -> Any:
    """The value with tagged decimals, which would otherwise equal texts."""
    kind = type(value)
    if kind is dict:
        if _PLAIN.issuperset(map(type, value.values())):
            return value
        return {name: inner if type(inner) in _PLAIN else tagged(inner) for name, inner in value.items()}
    if kind is list:
        return value if _PLAIN.issuperset(map(type, value)) else [tagged(inner) for inner in value]
    if kind is Decimal:
        return msgspec.msgpack.Ext(_DECIMAL_CODE, str(encode_value(value)).encode())
    return value
