"""Journal records as Firestore documents, and back: their texts as they were written, and the fields of searches."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .. import tagged_json
from ..journal_rows import record_of
from ..port import JournalFilter, JournalRow, Record
from .paths import JOURNAL, JOURNAL_PARTS, Paths, last_of
from .places import Line
from .search_fields import put_search_fields
from .values import COMMIT_FIELD, DocumentPb, micros, put, take

MAX_TEXT_BYTES = 16_384
"""A record's documents are readable JSON up to this size, and compressed above."""
MAX_PART_BYTES = 900_000
"""A Firestore document holds 1 MiB, a record up to 2 MB: the rest goes to further documents."""
PLAIN = ("id", "tenant", "at_us", "actor", "request_id", "action", "collection", "entity_id")
REWRITTEN = ("actor", "entity_id", "before", "after", "packed", "parts", "salt", "claims")
"""The fields that redaction replaces; one that the new form of a record lacks is removed."""
_NULL = "null"
_texts = msgspec.json.Decoder(list[msgspec.Raw]).decode


def record_name(shard: int, number: int) -> str:
    return f"{shard:02}-{number:016}"


@dataclass(frozen=True, slots=True)
class Found:
    """A record's document, and its sort key: its commit and its position in the commit."""

    moment: int
    place: int
    shard: int
    number: int
    document: Any

    @classmethod
    def of(cls, document: Any) -> Found:
        # Not the time of its last update: redaction rewrites documents.
        shard, _, number = last_of(document.name).partition("-")
        place = document.fields["place"].integer_value
        return cls(micros(document.create_time), place, int(shard), int(number), document)

    def matches(self, where: JournalFilter) -> bool:
        return where.matches(self._plain())

    def _plain(self) -> JournalRow:
        """The row without its texts."""
        fields = self.document.fields
        id, tenant, at_us, actor, request_id, action, collection, entity_id = (take(fields[name]) for name in PLAIN)
        version: int | None = take(fields["version"]) if "version" in fields else None
        if "version_back" in fields:
            version = self.moment - fields["version_back"].integer_value
        sequence, salt = fields["sequence"].integer_value, b""
        return (
            sequence, id, tenant, at_us, actor, request_id, action, collection, entity_id, version,
            None, None, salt, None, None,
        )  # fmt: skip

    def part_names(self, paths: Paths) -> list[str]:
        """The names of the documents in which a large record continues."""
        fields = self.document.fields
        count = fields["parts"].integer_value if "parts" in fields else 0
        return part_names(paths, last_of(self.document.name), count)

    def row(self, paths: Paths, parts: Mapping[str, Any]) -> JournalRow:
        """The record as it was written."""
        fields = self.document.fields
        if "packed" in fields:
            packed = fields["packed"].bytes_value
            packed += b"".join(parts[name].fields["packed"].bytes_value for name in self.part_names(paths))
            before, after = (bytes(raw).decode() for raw in _texts(zlib.decompress(packed)))
        else:
            before, after = fields["before"].string_value, fields["after"].string_value
        if "salt" not in fields:  # written before there were salts, in the longer form of JSON
            before, after = (tagged_json.quick_dumps(tagged_json.loads(text)) for text in (before, after))
        claims = fields["claims"].string_value if "claims" in fields else None
        rules = fields["rules"].string_value if "rules" in fields else None
        salt = fields["salt"].bytes_value if "salt" in fields else b""
        texts = (None if before == _NULL else before, None if after == _NULL else after)
        return *self._plain()[:10], *texts, salt, claims, rules

    def record(self, paths: Paths, parts: Mapping[str, Any]) -> Record:
        return record_of(self.row(paths, parts))


def part_names(paths: Paths, name: str, count: int) -> list[str]:
    return [paths.internal(JOURNAL_PARTS, f"{name}-{number}") for number in range(1, count + 1)]


def record_documents(paths: Paths, line: Line, commit: str, place: int, back: int | None) -> list[Any]:
    """The documents of one record: its own, and further ones for the part that does not fit.

    `place` is its position in the commit. `back`: it takes the version of the commit that writes it, less so many
    microseconds; None: its own.
    """
    record = line.record
    name = record_name(line.shard, line.number)
    document = DocumentPb(name=paths.internal(JOURNAL, name))
    fields = document.fields
    for field in PLAIN:
        put(fields[field], getattr(record, field))
    fields["sequence"].integer_value = line.sequence
    fields["place"].integer_value = place
    fields[COMMIT_FIELD].string_value = commit
    if record.rules is not None:
        fields["rules"].string_value = record.rules
    if back is None:
        put(fields["version"], record.version)
    else:
        fields["version_back"].integer_value = back
    put_search_fields(fields, record.at_us, record.request_id, time.time_ns() // 1_000)
    before, after = tagged_json.quick_dumps(record.before), tagged_json.quick_dumps(record.after)
    claims = None if record.claims is None else tagged_json.quick_dumps(record.claims)
    return [document, *put_contents(paths, document, before, after, record.salt, claims, commit)]


def rewritten_documents(paths: Paths, document: Any, row: JournalRow, commit: str) -> list[Any]:
    """The documents of a record after redaction: those of its fields that redaction replaces."""
    new = DocumentPb(name=document.name)
    new.fields["actor"].string_value, new.fields["entity_id"].string_value = row[4], row[8]
    new.fields[COMMIT_FIELD].string_value = commit
    before, after = row[10] or _NULL, row[11] or _NULL
    return [new, *put_contents(paths, new, before, after, row[12], row[13], commit)]


def put_contents(
    paths: Paths, document: Any, before: str, after: str, salt: bytes, claims: str | None, commit: str
) -> Sequence[Any]:
    """Write a record's texts and salt into its document; returns the further documents of a large record."""
    fields = document.fields
    fields["salt"].bytes_value = salt
    if claims is not None:
        fields["claims"].string_value = claims
    if len(before) + len(after) <= MAX_TEXT_BYTES:
        fields["before"].string_value, fields["after"].string_value = before, after
        return ()
    packed = zlib.compress(f"[{before},{after}]".encode(), 1)
    parts = [packed[start : start + MAX_PART_BYTES] for start in range(0, len(packed), MAX_PART_BYTES)]
    fields["packed"].bytes_value = parts[0]
    fields["parts"].integer_value = len(parts) - 1
    further = []
    for name, part in zip(part_names(paths, last_of(document.name), len(parts) - 1), parts[1:], strict=True):
        more = DocumentPb(name=name)
        more.fields["packed"].bytes_value = part
        more.fields[COMMIT_FIELD].string_value = commit
        further.append(more)
    return further
