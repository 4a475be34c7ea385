"""Verifies an evidence pack without its store: the manifest's signature, each part against its hash, and each export
against its proofs. Each part is read once, in blocks."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from hashlib import sha256
from typing import IO, BinaryIO, cast

from ..errors import InvalidInput, Problem
from . import evidence_format as form
from .evidence_format import Manifest, Part
from .export_format import tree_origin
from .findings import Report, check_signatures
from .signed_note import MAX_NOTE_BYTES, Checkpoint, NoteError, SignedNote, VerifierKey
from .verify_export import Progress, verify_export

BLOCK_BYTES = 1024 * 1024
RECORDS = "records/"


def verify_evidence(
    file: BinaryIO,
    name: str,
    *,
    keys: Sequence[VerifierKey] = (),
    saved: Checkpoint | None = None,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Verify a pack that is open for reading. `saved`: a checkpoint kept elsewhere, of one of its trees. Raises
    InvalidInput if this is no pack, or if `saved` is of another log."""
    try:
        with zipfile.ZipFile(file) as pack:
            return _verified(pack, name, keys, saved, progress)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InvalidInput([Problem("file", f"{name}: cannot be read as an evidence pack: {error}")]) from None


def _verified(
    pack: zipfile.ZipFile, name: str, keys: Sequence[VerifierKey], saved: Checkpoint | None, progress: Progress
) -> Report:
    report = Report()
    manifest = _manifest(pack, name, keys, report)
    if saved is not None and saved.origin != manifest.origin and not saved.origin.startswith(f"{manifest.origin}/"):
        found = f"found a checkpoint of {saved.origin!r}, expected one of {manifest.origin!r}"
        raise InvalidInput([Problem("checkpoint", found)])
    there = pack.namelist()
    expected = {part.path for part in manifest.parts} | {form.MANIFEST, form.NOTE}
    for path in sorted(set(there) ^ expected):
        what = "is not in the manifest" if path in there else "is missing"
        report.found(None, "damaged", f"the part {path!r} {what}")
    if len(there) != len(set(there)):
        report.found(None, "damaged", "the pack has two parts of one name")
    total, done = sum(part.size for part in manifest.parts), 0
    compared = False
    for part in manifest.parts:
        if part.path in there:
            compared |= _check_part(pack, part, manifest, keys, saved, report)
        done += part.size
        progress(done, total)
    if saved is not None and not compared:
        report.note(f"the pack has no tree {saved.origin!r}, so the saved checkpoint was not compared")
    return report


def _manifest(pack: zipfile.ZipFile, name: str, keys: Sequence[VerifierKey], report: Report) -> Manifest:
    """The manifest; what is wrong with its signature goes to the report."""
    try:
        content = _read(pack, form.MANIFEST, form.MAX_MANIFEST_BYTES)
        manifest = form.decode_manifest(content)
        note = _read(pack, form.NOTE, MAX_NOTE_BYTES).decode()
    except (KeyError, ValueError, RecursionError) as error:
        raise InvalidInput([Problem("file", f"{name}: is not an evidence pack: {error}")]) from None
    if manifest.strongroom_evidence != form.FORMAT:
        found = f"has format {manifest.strongroom_evidence}, this version reads format {form.FORMAT}"
        raise InvalidInput([Problem("file", f"{name}: {found}")])
    try:
        signed = SignedNote.parse(note)
    except NoteError as error:
        report.found(None, "damaged", f"the manifest's signature cannot be read: {error}")
        return manifest
    if signed.text != form.signed_text(manifest.origin, content):
        report.found(None, "altered", "the manifest is not the one that was signed")
    else:
        # The checkpoints have both signatures; texts have the first.
        check_signatures(signed, keys, None, report)
    return manifest


def _read(pack: zipfile.ZipFile, path: str, most: int) -> bytes:
    with pack.open(path) as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return content


def _check_part(
    pack: zipfile.ZipFile,
    part: Part,
    manifest: Manifest,
    keys: Sequence[VerifierKey],
    saved: Checkpoint | None,
    report: Report,
) -> bool:
    """Verify one part. Whether the saved checkpoint was compared with it."""
    compared = False
    with pack.open(part.path) as opened:
        hashing = _Hashing(opened)
        if part.path.startswith(RECORDS):
            compared = _check_records(hashing, part, manifest, keys, saved, report)
        while hashing.read(BLOCK_BYTES):
            pass
    if (hashing.size, hashing.hexdigest()) != (part.size, part.sha256):
        report.found(part.tenant, "altered", f"the part {part.path!r} is not the one in the manifest")
    return compared


def _check_records(
    hashing: _Hashing,
    part: Part,
    manifest: Manifest,
    keys: Sequence[VerifierKey],
    saved: Checkpoint | None,
    report: Report,
) -> bool:
    before = len(report.trees)
    mine = saved if saved is not None and saved.origin == tree_origin(manifest.origin, part.tenant) else None
    checked = report.checked
    try:
        verify_export(cast(BinaryIO, hashing), part.path, keys=keys, saved=mine, workers=1, report=report)
    except InvalidInput as error:
        report.found(part.tenant, "damaged", error.message)
        return False
    if any(tree.tenant != part.tenant for tree in report.trees[before:]):
        report.found(part.tenant, "altered", f"the part {part.path!r} has the records of another tenant")
    elif report.checked - checked != part.records and report.whole:
        report.found(part.tenant, "damaged", f"the part {part.path!r} has another number of records")
    return mine is not None


class _Hashing:
    """A file that hashes what is read of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = sha256()
        self.size = 0

    def _noted(self, content: bytes) -> bytes:
        self._hash.update(content)
        self.size += len(content)
        return content

    def read(self, size: int = -1) -> bytes:
        return self._noted(self._file.read(size))

    def readline(self, size: int = -1) -> bytes:
        return self._noted(self._file.readline(size))

    def tell(self) -> int:
        return self.size

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


__all__ = ["verify_evidence"]
