"""A tenant as a file of JSON Lines: its export, whole, and its import into an empty tenant.

    {"type": "tenant_export", "version": 1, "tenant": "acme", "at": "…"}
    {"type": "tenant", "document": {…}}
    {"type": "record", "part": "documents", "collection": "users", "record": {…}}
    {"type": "journal", "record": {…}}
    {"type": "end", "counts": {"users": 1, …, "journal": 17}}

Both work in constant memory. A file without its last line was cut. No line has a secret in clear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from ..context import Context, check_tenant, repeated_name, utc_from_us
from ..entities import with_fields
from ..errors import InvalidInput, Problem
from ..journal import FIRST_PAGE, MASK, next_limit
from ..journal.leaf import HIDDEN
from ..storage.port import Record, Store
from ..storage.tagged_json import quick_dumps
from .model import Tenant
from .parts import Imported, TenantPart

VERSION = 1
MAX_LINE_BYTES = 4_000_000
MAX_PROBLEMS = 100
"""The problems of a file that its refusal names."""
GROUP = 50
GROUP_BYTES = 1_000_000
"""Records that are written together, at most, and their bytes."""
JOURNAL = "journal"
_encode = msgspec.json.Encoder(decimal_format="number").encode
_NOT_EXPORTED = ("version",)


# --- Export ---------------------------------------------------------------------------------------------------


async def export_lines(
    store: Store, parts: Sequence[TenantPart], tenant: Tenant, now_us: int, *, whole: bool
) -> AsyncGenerator[bytes, None]:
    """The lines of a tenant's export. `whole`: with the hashes of its keys' secrets. What changes meanwhile may be in
    the file or not."""
    name = tenant.id
    counts: Counter[str] = Counter()
    yield _line({"type": "tenant_export", "version": VERSION, "tenant": name, "at": utc_from_us(now_us)})
    yield _line({"type": "tenant", "document": tenant.model_dump(mode="json", exclude=set(_NOT_EXPORTED))})
    for part in parts:
        async with aclosing(_closable(part.export(name, whole=whole))) as records:
            async for collection, record in records:
                counts[collection] += 1
                head = {"type": "record", "part": part.name, "collection": collection}
                yield _line({**head, "record": msgspec.Raw(record.strip())})
    async for line in _journal_lines(store, name):
        counts[JOURNAL] += 1
        yield line
    yield _line({"type": "end", "counts": counts})


async def _closable(records: AsyncIterator[tuple[str, bytes]]) -> AsyncGenerator[tuple[str, bytes], None]:
    async for record in records:
        yield record


async def _journal_lines(store: Store, tenant: str) -> AsyncIterator[bytes]:
    cursor, limit = None, FIRST_PAGE
    while True:
        page = await store.changes(cursor, tenant=tenant, limit=limit)
        for record in page.records:
            yield _line({"type": JOURNAL, "record": msgspec.Raw(quick_dumps(_shown(record)).encode())})
        if not page.records:
            return
        cursor, limit = page.cursor, next_limit(limit, page)


def _shown(record: Record) -> dict[str, Any]:
    hidden = HIDDEN.get(record.collection, ())

    def shown(fields: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if fields is None:
            return None
        return {name: MASK if name in hidden and value is not None else value for name, value in fields.items()}

    return {
        "id": record.id,
        "sequence": record.sequence,
        "at": utc_from_us(record.at_us),
        "actor": record.actor,
        "request_id": record.request_id,
        "action": record.action,
        "collection": record.collection,
        "entity_id": record.entity_id,
        "before": shown(record.before),
        "after": shown(record.after),
        "version": record.version,
    }


def _line(fields: Mapping[str, Any]) -> bytes:
    return _encode(fields) + b"\n"


# --- Import ---------------------------------------------------------------------------------------------------


class TenantFile:
    """A file to import, checked whole before anything is written. `lines` begins to read it anew at each call."""

    def __init__(self, lines: Callable[[], Iterable[bytes]], parts: Sequence[TenantPart]) -> None:
        self._lines = lines
        self._parts = {part.name: part for part in parts}
        self.tenant = ""
        self.document: dict[str, Any] = {}

    def check(self) -> Tenant:
        """Read the whole file. Returns the tenant; raises InvalidInput with the problems of its lines."""
        problems: list[Problem] = []
        counts: Counter[str] = Counter()
        found: Tenant | None = None
        end: dict[str, Any] | None = None
        for number, line in self._numbered():
            try:
                if end is not None:
                    raise InvalidInput("found a line behind the end, expected none")
                fields = _parsed(line)
                kind = fields.get("type")
                if number == 1:
                    self.tenant = _header(fields)
                elif kind == "tenant":
                    found = self._tenant(fields)
                elif kind == "record":
                    counts[self._checked(fields)] += 1
                elif kind == JOURNAL:
                    counts[JOURNAL] += 1
                elif kind == "end":
                    end = fields
                else:
                    raise InvalidInput(f"found the type {str(kind)[:64]!r}, expected tenant, record, journal or end")
            except InvalidInput as error:
                problems += [
                    Problem(f"line {number}" + (f": {p.path}" if p.path else ""), p.message) for p in error.problems
                ]
                if number == 1 or len(problems) >= MAX_PROBLEMS:
                    raise InvalidInput(problems[:MAX_PROBLEMS]) from None
        if end is None:
            problems.append(Problem("file", "has no line of type end: it was cut"))
        elif end.get("counts") != counts and not problems:
            problems.append(Problem("file", "has other lines than its end says: some are missing or were added"))
        if found is None:
            problems.append(Problem("file", "has no line of type tenant"))
        if problems or found is None:
            raise InvalidInput(problems)
        return found

    async def write(self, context: Context, told: Imported) -> None:
        """Write the records, in groups."""
        group: list[tuple[str, bytes]] = []
        size, last = 0, ""
        for _, line in self._numbered():
            fields = _parsed(line)
            part = str(fields.get("part", "")) if fields["type"] == "record" else ""
            raw = bytes(fields["record"]) if part else b""
            if group and (part != last or len(group) >= GROUP or size + len(raw) > GROUP_BYTES):
                await self._parts[last].take(self.tenant, group, context, told)
                group, size = [], 0
            if part:
                group.append((str(fields["collection"]), raw))
                size += len(raw)
            elif fields["type"] == JOURNAL:
                told.left_out["records of the journal: the history stays with the store that wrote it"] += 1
            last = part

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        return ((number, line) for number, line in enumerate(self._lines(), 1) if line.strip())

    def _tenant(self, fields: dict[str, Any]) -> Tenant:
        document = msgspec.json.decode(bytes(fields.get("document", msgspec.Raw(b"null"))))
        if not isinstance(document, dict):
            raise InvalidInput([Problem("document", "expected an object")])
        tenant = Tenant.parse({name: value for name, value in document.items() if name != "updated_at"})
        if tenant.id != self.tenant:
            raise InvalidInput([Problem("document.id", f"found {tenant.id[:64]!r}, expected {self.tenant[:64]!r}")])
        if tenant.status == "deleting":  # what was left of it then is a tenant like others here
            return with_fields(tenant, status="active", reason=None, suspended_at=None)
        return tenant

    def _checked(self, fields: dict[str, Any]) -> str:
        part, collection = self._parts.get(str(fields.get("part"))), fields.get("collection")
        if part is None:
            message = f"found {str(fields.get('part'))[:64]!r}, expected {', '.join(self._parts)}"
            raise InvalidInput([Problem("part", message)])
        if not isinstance(collection, str) or not isinstance(fields.get("record"), msgspec.Raw):
            raise InvalidInput([Problem("record", "expected a collection and a record")])
        part.check(self.tenant, collection, bytes(fields["record"]))
        return collection


def _parsed(line: bytes) -> dict[str, Any]:
    """The names of a line; `document` and `record` are left as they are."""
    if len(line) > MAX_LINE_BYTES:
        raise InvalidInput(f"found {len(line)} bytes, expected at most {MAX_LINE_BYTES}")
    try:
        raw = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        fields = {n: v if n in ("document", "record") else msgspec.json.decode(v) for n, v in raw.items()}
        twice = repeated_name(line, msgspec.json.decode(line))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidInput("is not a JSON object") from None
    if twice is not None:
        raise InvalidInput(f"found the name {twice[:64]!r} more than once in one object, expected it once")
    return fields


def _header(fields: Mapping[str, Any]) -> str:
    """The tenant that a file's first line names."""
    if fields.get("type") != "tenant_export":
        raise InvalidInput("found no header, expected the first line of `strongroom tenants export`")
    if fields.get("version") != VERSION:
        raise InvalidInput([Problem("version", f"found {str(fields.get('version'))[:16]}, expected {VERSION}")])
    tenant = fields.get("tenant")
    check_tenant(tenant)  # type: ignore[arg-type]  # it says what it found
    return str(tenant)


__all__ = ["Imported", "TenantFile", "export_lines"]
