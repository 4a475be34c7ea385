"""The JSON store: everything in memory and in one readable file, for development and tests.

The file is `{"strongroom": 2, "schema": …, "global": {collection: {id: document}}, "tenants": {tenant: {collection:
{id: document}}}, "last_sequence": …, "floors": …, "journal": […]}`, a document or record a line. Format 1 had neither
the last sequence nor floors: no record was ever dropped from it. Each group of commits writes it anew beside itself and
renames it into place, so a crash leaves the old or the new file, never a part of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from itertools import islice
from operator import attrgetter
from typing import Any, Literal, TypeVar

from msgspec import structs

from ...cooperative import in_slices
from ...entities import Aggregate, Collection, Document, Filter, Query, aggregate, evaluate
from ...errors import Gone, InvalidInput, Problem, StorageFull, StoreError, Unavailable
from .. import tagged_json as _values
from ..group_commit import GroupCommit, Waiting, up_to
from ..port import (
    MAX_CHANGES_PAGE,
    MAX_TENANTS_PAGE,
    WHOLE_JOURNAL,
    Batch,
    Capabilities,
    ChangesPage,
    Committed,
    Health,
    JournalFilter,
    JournalRow,
    Record,
    RowsPage,
    SchemaChange,
    past_the_end,
)
from . import memory as _memory
from .memory import Draft, Section, State, Stored, copied, key_of, line_of

FORMAT = 2
OLDEST_FORMAT = 1
MAX_GROUP = 10_000
"""Batches that share one write of the file, at most. The write takes the whole file's time, however many there are."""
_CURSOR = re.compile(r"[0-9]{1,18}")
_sequence: Callable[[Record], int] = attrgetter("sequence")
_T = TypeVar("_T")


# --- The file -------------------------------------------------------------------------------------------------


def _rendered(draft: Draft) -> str:
    """The content of the file for a draft."""
    tenants: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    for (tenant, collection), section in draft.sections.items():
        if section.stored:
            text = _braced((id, entry.text) for id, entry in section.stored.items())
            (shared if tenant is None else tenants.setdefault(tenant, {}))[collection] = text
    journal = ",\n".join([*draft.journal_lines, *draft.lines])
    return (
        f'{{"strongroom": {FORMAT},\n'
        f'"schema": {_braced((name, json.dumps(one)) for name, one in draft.schema.items())},\n'
        f'"deleted_version": {draft.deleted_version},\n'
        f'"global": {_braced(shared.items())},\n'
        f'"tenants": {_braced((tenant, _braced(parts.items())) for tenant, parts in tenants.items())},\n'
        f'"last_sequence": {draft.last_sequence},\n'
        f'"floors": {json.dumps(list(draft.floors.items()), ensure_ascii=False)},\n'
        f'"journal": [\n{journal}\n]}}\n'
    )


def _braced(members: Iterable[tuple[str, str]]) -> str:
    body = ",\n".join(f"{json.dumps(name, ensure_ascii=False)}: {text}" for name, text in members)
    return f"{{\n{body}\n}}" if body else "{}"


def _read(path: str) -> State:
    """The state in the file, empty if there is no file. StoreError if it is damaged, foreign or of a later format."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return State()
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror}") from None
    try:
        data = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: damaged at byte {error.start}: not UTF-8; it was left as it is") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise StoreError(f"{path}: damaged at {where}: {error.msg}; it was left as it is") from None
    except (RecursionError, ValueError):
        raise StoreError(f"{path}: damaged: nested too deeply, or a number too long; it was left as it is") from None
    if not isinstance(data, dict) or type(data.get("strongroom")) is not int:
        raise StoreError(f"{path}: is JSON, but not a Strongroom store; it was left as it is")
    if not OLDEST_FORMAT <= data["strongroom"] <= FORMAT:
        raise StoreError(
            f"{path}: has format {data['strongroom']}, this version of Strongroom reads formats {OLDEST_FORMAT} to "
            f"{FORMAT}"
        )
    return _Reader(path).state(data)


class _Reader:
    """Reads the parsed file. `at` is the current place, for the error message if the file is damaged there."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.at = "the top level"

    def state(self, data: dict[str, Any]) -> State:
        try:
            state = State(data["schema"], {}, [], [], int(data["deleted_version"]))
            self._sections(state, None, data["global"], "global")
            self.at = "tenants"
            for tenant, collections in data["tenants"].items():
                self._sections(state, tenant, collections, f"tenants/{tenant}")
            self._journal(state, data)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = f"{type(error).__name__}: {error}"
            raise StoreError(f"{self.path}: damaged at {self.at}: {what}; it was left as it is") from None
        return state

    def _journal(self, state: State, data: dict[str, Any]) -> None:
        self.at = "floors"
        state.floors = {tenant: int(sequence) for tenant, sequence in data.get("floors", ())}
        last = 0
        for number, line in enumerate(data["journal"], 1):
            self.at = f"journal record {number}"
            record = Record(**_values.untag(line))
            # Only after a drop may a sequence be missing.
            if record.sequence <= last or (not state.floors and record.sequence != number):
                raise ValueError(f"found sequence {record.sequence}")
            last = record.sequence
            state.journal.append(record)
            state.lines.append(line_of(record))
        self.at = "last_sequence"
        state.last_sequence = int(data.get("last_sequence", last))
        if state.last_sequence < last or (not state.floors and state.last_sequence != last):
            raise ValueError(f"found {state.last_sequence}")

    def _sections(self, state: State, tenant: str | None, collections: dict[str, Any], at: str) -> None:
        self.at = at
        for name, documents in collections.items():
            self.at = f"{at}/{name}"
            kinds = {**_SYSTEM_KINDS, **state.schema[name]["fields"]}
            section = state.sections[tenant, name] = Section()
            for id, tagged in documents.items():
                self.at = f"{at}/{name}/{id}"
                section.stored[id] = Stored.of(_fitting(_values.untag(tagged), id, kinds))


# The names are those in the file. People edit these files; a text among numbers would break later comparisons.
_SYSTEM_KINDS = {"id": "text", "version": "int", "created_at": "timestamp", "updated_at": "timestamp"}
_TYPES: dict[str, type] = {
    "bool": bool,
    "int": int,
    "float": float,
    "decimal": Decimal,
    "text": str,
    "bytes": bytes,
    "timestamp": datetime,
    "list": list,
    "map": dict,
}


def _fitting(document: Document, id: str, kinds: Mapping[str, str]) -> Document:
    """The document, or ValueError if its fields are not those of the schema."""
    if document.keys() != kinds.keys():
        raise ValueError(f"its fields differ from the schema's in {', '.join(sorted(document.keys() ^ kinds.keys()))}")
    for name, kind in kinds.items():
        value = document[name]
        if type(value) is not _TYPES[kind] and (value is not None or name in _SYSTEM_KINDS):
            raise ValueError(f"{name}: found {type(value).__name__}, expected {kind}")
    if document["id"] != id:
        raise ValueError("its id is another")
    return document


def _write_new(path: str, text: str) -> tuple[int, int]:
    """Write a new file beside the file, durably, with the same permissions. Returns the device and inode of the new
    file."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        mode = 0o600
    with open(os.open(_new(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
        status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _is_in_place(path: str, written: tuple[int, int]) -> bool:
    """Whether the written file is at `path` now."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == written


def _new(path: str) -> str:
    return path + ".new"


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: str) -> int:
    """A descriptor that holds the lock of the file at `path`. Unavailable if another one holds it."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Unavailable(f"{path}: its lock file cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise Unavailable(
            f"{path} is in use: a JSON store serves one process at a time; close the other, or use SQLite or PostgreSQL"
        ) from None
    return descriptor


def _row(record: Record) -> JournalRow:
    return (
        record.sequence,
        record.id,
        record.tenant,
        record.at_us,
        record.actor,
        record.request_id,
        record.action,
        record.collection,
        record.entity_id,
        record.version,
        None if record.before is None else _values.quick_dumps(record.before),
        None if record.after is None else _values.quick_dumps(record.after),
        record.salt,
        None if record.claims is None else _values.quick_dumps(record.claims),
        record.rules,
    )


# --- The store ------------------------------------------------------------------------------------------------


_Step = Callable[[Draft], Any]
_Waiting = Waiting[_Step, Any]


class JsonStore:
    """The storage port over one JSON file, or with None over memory alone."""

    def __init__(self, path: str | None) -> None:
        self._path = os.path.realpath(path) if path is not None else None
        self._state = State()
        self._declared: Mapping[str, Collection] = {}
        self._commits: GroupCommit[_Step, Any] = GroupCommit(
            path or ":memory:", up_to(MAX_GROUP), self._write_group, self._interrupted
        )
        self._lock: int | None = None
        self._closed: str | None = "the store is not open"  # the reason, if the store cannot be used
        self._broken: str | None = None  # the reason, if the store cannot be written to any more

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "json", multi_process=False, persistent=self._path is not None, embedded=True, ordered_journal=True
        )

    async def open(self) -> None:
        if self._closed is None:
            return
        state = State()
        if self._path is not None:
            self._lock = _lock(self._path)
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_new(self._path))  # left by a process that was killed during a write
                state = await asyncio.to_thread(_read, self._path)
            except BaseException:
                self._unlock()
                raise
        self._state, self._declared = state, {}
        self._closed = self._broken = None

    async def close(self) -> None:
        if self._closed is None:
            self._closed = "the store is closed"
        await self._commits.drain()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a forked child may still have a copy of the descriptor
            os.close(self._lock)
            self._lock = None

    async def prepare(
        self,
        collections: Sequence[Collection],
        *,
        mode: Literal["apply", "plan"] = "apply",
        allow_destructive: bool = False,
    ) -> tuple[SchemaChange, ...]:
        changes: tuple[SchemaChange, ...] = await self._do(
            lambda draft: _memory.prepare(draft, collections, mode == "plan", allow_destructive)
        )
        return changes

    async def get(self, collection: str, tenant: str | None, id: str) -> Document | None:
        entry = self._section(collection, tenant).stored.get(id)
        return copied(entry.document) if entry else None

    async def find(self, collection: str, tenant: str | None, query: Query) -> list[Document]:
        return await in_slices(copied, evaluate(query, self._section(collection, tenant).documents()))

    async def tenants(self, after: str | None = None, limit: int = MAX_TENANTS_PAGE) -> list[str]:
        self._check_open()
        names = {
            tenant for tenant, _ in self._state.sections if tenant is not None and (after is None or tenant > after)
        }
        return sorted(names)[:limit]  # code points are in the order of their UTF-8 bytes

    async def now_us(self) -> int:
        return time.time_ns() // 1_000  # a file belongs to one process, and so does its clock

    async def aggregate(
        self, collection: str, tenant: str | None, aggregates: Sequence[Aggregate], where: Filter | None
    ) -> dict[str, Any]:
        section = self._section(collection, tenant)
        return aggregate(aggregates, where, self._declared[collection], section.documents())

    def commit(self, batch: Batch) -> Awaitable[Committed]:
        return self._do(lambda draft: _memory.apply(draft, batch))

    async def changes(
        self, after: str | None, *, tenant: str | None = None, limit: int = MAX_CHANGES_PAGE
    ) -> ChangesPage:
        self._check_open()
        if after == "end":
            return ChangesPage((), str(self._state.last_sequence))
        floors = self._state.floors
        floor = max(floors.values(), default=0) if tenant is None else floors.get(tenant, 0)
        found: list[Record] = []
        position = self._position(after)
        if after is not None and position < floor:
            raise Gone("the records that come after the cursor were dropped")
        for record in self._records_after(position):
            if len(found) == limit:
                break
            position = record.sequence
            if tenant is None or record.tenant == tenant:
                found.append(
                    structs.replace(
                        record,
                        before=copied(record.before),
                        after=copied(record.after),
                        claims=copied(record.claims),
                    )
                )
        else:
            position = self._state.last_sequence
        return ChangesPage(tuple(found), str(position))

    def _position(self, after: str | None) -> int:
        """The sequence after which a cursor stands."""
        if after is not None and not _CURSOR.fullmatch(after):
            raise InvalidInput([Problem("after", "is not a cursor of this journal")])
        position = int(after or 0)
        if position > self._state.last_sequence:
            raise past_the_end()
        return position

    def _records_after(self, position: int) -> Iterator[Record]:
        journal = self._state.journal
        return islice(journal, bisect_right(journal, position, key=_sequence), None)

    async def rows(
        self, after: str | None = None, where: JournalFilter = WHOLE_JOURNAL, limit: int = MAX_CHANGES_PAGE
    ) -> RowsPage:
        self._check_open()
        found: list[JournalRow] = []
        position = self._position(after)
        for record in self._records_after(position):
            if len(found) == limit:
                break
            position = record.sequence
            row = _row(record)
            if where.matches(row):
                found.append(row)
        else:
            position = self._state.last_sequence
        return RowsPage(found, str(position))

    async def rewrite(self, rows: Sequence[JournalRow]) -> int:
        found: int = await self._do(lambda draft: draft.rewrite(rows))
        return found

    async def drop(self, tenant: str | None, through_sequence: int) -> int:
        removed: int = await self._do(lambda draft: draft.drop(tenant, through_sequence))
        return removed

    def on_change(self, callback: Callable[[], None]) -> None:
        """No other process can write to the file."""

    async def check(self) -> Health:
        began = time.perf_counter()
        documents = sum(len(section.stored) for section in self._state.sections.values())
        problem = self._closed or self._broken
        details = {"path": self._path or ":memory:", "documents": documents, "journal": len(self._state.journal)}
        return Health(
            problem is None, time.perf_counter() - began, {**details, "problem": problem} if problem else details
        )

    # --- Reading and writing ---

    def _check_open(self) -> None:
        if self._closed is not None:
            raise Unavailable(self._closed)

    def _section(self, collection: str, tenant: str | None) -> Section:
        self._check_open()
        return self._state.sections.get(key_of(self._declared, collection, tenant)) or Section()

    def _do(self, step: Callable[[Draft], _T]) -> asyncio.Future[_T]:
        """Queue a step for the next write. The future has its answer once the write is durable."""
        problem = self._closed or self._broken
        if problem is not None:
            refused: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
            refused.set_exception(Unavailable(problem))
            return refused
        return self._commits.submit(step)

    def _interrupted(self, error: BaseException) -> str:
        self._broken = f"writing ended with {type(error).__name__}; open the store again"
        return self._broken

    async def _write_group(self, group: list[_Waiting]) -> list[_Waiting]:
        draft = Draft(self._state, self._declared)
        answers = [draft.attempt(waiting.request) for waiting in group]
        try:
            if draft.changed:
                await self._write(draft)
            self._state, self._declared = draft.adopted(), draft.declared
        except Unavailable as error:
            # A failed precondition fails, too: it was evaluated against changes that were not committed.
            answers = [
                type(error)(error.message, **({} if isinstance(answer, Exception) else error.details))
                for answer in answers
            ]
        for waiting, answer in zip(group, answers, strict=True):
            waiting.answer(answer)
        return []

    async def _write(self, draft: Draft) -> None:
        """Write the draft to the file, durably. Raises Unavailable or StorageFull."""
        if self._broken is not None:
            raise Unavailable(self._broken)
        if self._path is not None:
            await asyncio.to_thread(self._write_file, self._path, draft)

    def _write_file(self, path: str, draft: Draft) -> None:
        try:
            written = _write_new(path, _rendered(draft))
            try:
                os.replace(_new(path), path)
            except OSError:
                if not _is_in_place(path, written):
                    raise
                # A network file system may have renamed the file and lost the answer.
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(_new(path))
            kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else Unavailable
            raise kind(f"{path}: cannot be written: {error.strerror}; nothing was changed") from None
        try:
            _sync_folder(path)
        except OSError as error:
            # The new file is in place, but a power loss could bring the old one back, and a second fsync would not
            # report it: memory and disk may differ until the store is opened again.
            self._broken = f"{path}: its folder cannot be synced: {error.strerror}; open the store again to write"
            raise Unavailable(self._broken, outcome="unknown") from None
