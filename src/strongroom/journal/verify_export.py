"""Verifies an export without its store: records against their leaves, the leaves against the root of the checkpoint,
and its signatures. Memory stays the same for any number of records.

Blocks of whole lines go to further processes, because hashing in threads would share one core.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from typing import BinaryIO

import msgspec
from msgspec import Struct

from ..errors import InvalidInput, Problem
from . import export_format as form
from .export_format import Closing, ExportedRecord, Header, Line, RoundProof, tree_origin
from .findings import Kind, Report, TreeReport, check_note
from .merkle import HASH_BYTES, Frontier, complete_subtrees
from .signed_note import Checkpoint, VerifierKey

BLOCK_BYTES = 1024 * 1024
MAX_WORKERS = 8
POOL_FROM_BYTES = 16 * 1024 * 1024
"""Smaller files are verified in this process: starting others takes longer."""

Progress = Callable[[int, int], None]


class _Bad(Struct, frozen=True):
    """What is wrong with a record. `at`: how many good ones stand before it in the block."""

    at: int
    kind: Kind
    message: str


class _Leaves(Struct, frozen=True):
    """The leaf hashes of a block's records up to the first bad one, one after the other. `first`: the index of the
    first record."""

    first: int | None
    hashes: bytes
    redacted: int
    bad: _Bad | None


def verify_export(
    file: BinaryIO,
    name: str,
    *,
    keys: Sequence[VerifierKey] = (),
    saved: Checkpoint | None = None,
    size: int = 0,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
    report: Report | None = None,
) -> Report:
    """Verify an export that is open for reading. `size`: the file's bytes, if known. `saved`: a checkpoint kept
    elsewhere. `workers`: processes (None: one for each core, for a large file). Raises InvalidInput if this is
    no export, or if `saved` is of another tree.
    """
    report = Report() if report is None else report
    header = _header(file, name)
    if saved is not None and saved.origin not in (header.origin, header.log):
        problem = f"found a checkpoint of {saved.origin!r}, expected one of {header.origin!r}"
        raise InvalidInput([Problem("checkpoint", problem)])
    check = _Check(header, saved, keys, report)
    if not check.begins():
        return report
    count = workers if workers is not None else (os.cpu_count() or 1) if size >= POOL_FROM_BYTES else 1
    blocks = _Blocks(file)
    with ExitStack() as stack:
        for leaves in _computed(blocks, header.tenant, min(count, MAX_WORKERS), stack):
            if not check.add(leaves):
                return report
            progress(file.tell(), size)
    check.ends(blocks.last)
    return report


def _header(file: BinaryIO, name: str) -> Header:
    line = file.readline(BLOCK_BYTES)
    try:
        header = form.decode_header(line)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidInput([Problem("file", f"{name}: is not an export with proofs (audit export --proofs)")]) from None
    if header.strongroom_audit != form.FORMAT:
        found = f"{name}: has format {header.strongroom_audit}, this version reads format {form.FORMAT}"
        raise InvalidInput([Problem("file", found)])
    if not 0 <= header.first <= header.end <= header.size or header.origin != tree_origin(header.log, header.tenant):
        raise InvalidInput([Problem("file", f"{name}: its first line contradicts itself")])
    return header


class _Check:
    """The state of a verification: the tree as far as it was read."""

    def __init__(self, header: Header, saved: Checkpoint | None, keys: Sequence[VerifierKey], report: Report) -> None:
        self._header = header
        self._keys = keys
        self._saved = saved if saved is not None and saved.origin == header.origin else None
        self._saved_log = saved if saved is not None and self._saved is None else None
        self._report = report
        self._tree = TreeReport(header.tenant, header.size, header.first, header.first)
        self._frontier = Frontier()
        report.trees.append(self._tree)

    def found(self, kind: Kind, message: str, index: int | None = None) -> None:
        self._report.found(self._header.tenant, kind, message, index)

    def begins(self) -> bool:
        """Whether the hashes left of the first record fit their number."""
        try:
            self._frontier = Frontier(self._header.first, self._header.before)
        except ValueError:
            self.found("damaged", f"the first line has {len(self._header.before)} hashes, expected another number")
            return False
        return self._marks(b"")

    def add(self, leaves: _Leaves) -> bool:
        """Add leaves; False once something is wrong."""
        if leaves.first is not None and leaves.first != self._frontier.size:
            bad = misplaced(0, self._frontier.size, leaves.first)
            self.found(bad.kind, bad.message, self._frontier.size)
            return False
        if not self._marks(leaves.hashes):
            return False
        add, hashes = self._frontier.add, leaves.hashes
        for at in range(0, len(hashes), HASH_BYTES):
            add(hashes[at : at + HASH_BYTES])
        self._report.checked += len(hashes) // HASH_BYTES
        self._tree.end, self._tree.redacted = self._frontier.size, self._tree.redacted + leaves.redacted
        if leaves.bad is not None:
            self.found(leaves.bad.kind, leaves.bad.message, self._frontier.size)
        elif self._frontier.size > self._header.end:
            self.found("inserted", "the file has more records than its first line says", self._header.end)
        return not self._report.findings

    def _marks(self, hashes: bytes) -> bool:
        """Whether the tree agrees with the saved checkpoint, if that lies within what comes now."""
        saved, size = self._saved, self._frontier.size
        if saved is None or not size <= saved.size <= size + len(hashes) // HASH_BYTES:
            return True
        reached = self._frontier.copy()
        for at in range(0, (saved.size - size) * HASH_BYTES, HASH_BYTES):
            reached.add(hashes[at : at + HASH_BYTES])
        if reached.root() != saved.root:
            self.found("forked", f"the first {saved.size} records are not those of the saved checkpoint")
            return False
        self._saved = None
        return True

    def ends(self, line: bytes) -> None:
        """Compare the tree with the checkpoint in the last line."""
        header, frontier = self._header, self._frontier
        closing = self._closing(line)
        if closing is None:
            return
        if frontier.size != header.end or closing.count != header.end - header.first:
            where = f"the first line says {header.end - header.first} records, found {frontier.size - header.first}"
            self.found("truncated", where, frontier.size)
            return
        ranges = list(complete_subtrees(header.end, header.size))
        if len(closing.after) != len(ranges) or any(len(one) != HASH_BYTES for one in closing.after):
            self.found("damaged", f"the last line has {len(closing.after)} hashes, expected {len(ranges)}")
            return
        for (level, _), root in zip(ranges, closing.after, strict=True):
            frontier.add_subtree(level, root)
        self._tree.root = frontier.root()
        checkpoint = check_note(closing.checkpoint, header.origin, self._keys, header.tenant, self._report)
        if checkpoint is None:
            return
        if (checkpoint.size, checkpoint.root) != (header.size, self._tree.root):
            message = (
                f"the records do not lead to the root of the checkpoint ({checkpoint.size} records): at least one from "
                f"index {header.first} on was replaced, together with its leaf hash, or the checkpoint is another's"
            )
            self.found("forked", message)
            return
        self._compare_saved(checkpoint)
        if closing.round is not None:
            self._round(closing.round, checkpoint)
        elif header.tenant is not None and self._saved_log is not None:
            self._report.note("the saved checkpoint is the platform's, and the file does not tie its own one to it")

    def _closing(self, line: bytes) -> Closing | None:
        try:
            return form.decode_closing(line)
        except (msgspec.DecodeError, RecursionError):
            at = self._frontier.size
            where = f" after index {at - 1}" if at > self._header.first else ""
            self.found("truncated", f"the file has no last line: it was cut{where}", at)
            return None

    def _compare_saved(self, checkpoint: Checkpoint) -> None:
        """The saved checkpoint of this tree, if its size lies outside of the records."""
        saved = self._saved
        if saved is None:
            return
        if saved.size > checkpoint.size:
            message = f"the file has the tree of {checkpoint.size} records, the saved checkpoint is of {saved.size}"
            self.found("old_copy", f"{message}: the file is older, or an old copy of the store was put back")
        elif saved.size == checkpoint.size:
            if saved.root != checkpoint.root:
                self.found("forked", f"the saved checkpoint of {saved.size} records has another root")
        else:
            what = f"the saved checkpoint ({saved.size} records) was not compared: the file has the records"
            self._report.note(f"{what} {self._header.first} to {self._header.end - 1}")

    def _round(self, proof: RoundProof, checkpoint: Checkpoint) -> None:
        """Check that the platform's checkpoint covers the tree's."""
        header = self._header
        platform = check_note(proof.checkpoint, header.log, self._keys, header.tenant, self._report)
        if platform is None:
            return
        try:
            fits = proof.fits(checkpoint, header.tenant, platform)
        except ValueError:
            fits = False
        if not fits:
            self.found("forked", "the platform's checkpoint does not cover this tree's: they are of two histories")
        saved = self._saved_log
        if saved is not None and fits:
            self._compare_platform(saved, platform)

    def _compare_platform(self, saved: Checkpoint, platform: Checkpoint) -> None:
        if saved.size > platform.size:
            message = f"the file is of {platform.size} records of the platform, the saved checkpoint of {saved.size}"
            self.found("old_copy", f"{message}: the file is older, or an old copy of the store was put back")
        elif saved.size == platform.size and saved.root != platform.root:
            self.found("forked", f"the saved checkpoint of {saved.size} records has another root")
        elif saved.size < platform.size:
            self._report.note(
                f"the saved checkpoint is of {saved.size} records of the platform, the file's of {platform.size}: "
                "verify the platform's export to compare them"
            )


# --- Reading and hashing --------------------------------------------------------------------------------------


class _Blocks:
    """Cuts a file into blocks of whole lines. `last` is what remains behind the last block: the last line."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.last = b""

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        while content := self._file.read(BLOCK_BYTES):
            rest += content
            begin = rest.rfind(b"\n", 0, max(rest.rfind(b"\n"), 0)) + 1  # of the last whole line
            if begin:
                yield rest[:begin]
                rest = rest[begin:]
            elif len(rest) > 2 * form.MAX_LINE_BYTES:
                break
        if b"\n" in rest[:-1]:  # behind the last whole line there is a part of another
            begin = rest.index(b"\n") + 1
            yield rest[:begin]
            rest = rest[begin:]
        self.last = rest


def _computed(blocks: _Blocks, tenant: str | None, workers: int, stack: ExitStack) -> Iterator[_Leaves]:
    """The leaves of each block, in order."""
    if workers < 2:
        yield from (leaves_of(block, tenant) for block in blocks)
        return
    pool = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")))
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    waiting: deque[Future[_Leaves]] = deque()
    for block in blocks:
        waiting.append(pool.submit(leaves_of, block, tenant))
        if len(waiting) > 2 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def leaves_of(block: bytes, tenant: str | None) -> _Leaves:
    """The leaf hashes of the records in a block of lines, as far as each of them follows the one before it and leads to
    the leaf hash that it has."""
    try:
        records, unreadable = form.lines_of(block), None
    except (msgspec.DecodeError, RecursionError):
        records, unreadable = _readable(block)
    exact = len(records)
    if unreadable is None and not form.is_exact(block, records):
        pairs = enumerate(zip(block.splitlines(keepends=True), records, strict=False))
        exact = next((n for n, (line, record) in pairs if line != form.line_of(record)), 0)
    hashes: list[bytes] = []
    redacted = 0
    first = records[0].index if records else None
    bad = None
    for number, record in enumerate(records, first or 0):
        if (bad := _bad(record, number, tenant, hashes)) is not None:
            break
        if len(hashes) > exact:
            hashes.pop()
            bad = _Bad(exact, "altered", f"the line of the record at index {number} is not as exports are written")
            break
        redacted += isinstance(record, ExportedRecord) and record.commitments is not None
    if bad is None and unreadable is not None:
        bad = _Bad(len(hashes), "damaged", unreadable)
    return _Leaves(first, b"".join(hashes), redacted, bad)


def _bad(record: Line, number: int, tenant: str | None, hashes: list[bytes]) -> _Bad | None:
    """What is wrong with a record; None if its leaf hash was added."""
    at = len(hashes)
    if record.index != number:
        return misplaced(at, number, record.index)
    if isinstance(record, ExportedRecord) and record.tenant != tenant:
        return _Bad(at, "inserted", f"the record at index {number} is of tenant {record.tenant!r}")
    try:
        leaf = record.leaf_hash()
    except ValueError as error:
        return _Bad(at, "altered", f"the record at index {number} cannot be verified: {error}")
    if leaf != record.leaf:
        return _Bad(at, "altered", f"the record at index {number} is not the one that was exported")
    hashes.append(leaf)
    return None


def misplaced(at: int, expected: int, found: int) -> _Bad:
    if found > expected:
        return _Bad(at, "deleted", f"after index {expected - 1} comes index {found}: the records between are missing")
    return _Bad(at, "inserted", f"after index {expected - 1} comes index {found} again: a record was put in or moved")


def _readable(block: bytes) -> tuple[list[Line], str]:
    """The records before the first line that is none, and what is wrong with that line."""
    records: list[Line] = []
    for line in block.splitlines():
        try:
            records += form.lines_of(line)
        except (msgspec.DecodeError, RecursionError) as error:
            after = f"the line after index {records[-1].index}" if records else "a line"
            return records, f"{after} is no record: {str(error)[:200]}"
    return records, "a line is no record"


__all__ = ["MAX_WORKERS", "leaves_of", "verify_export"]
