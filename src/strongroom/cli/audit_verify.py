"""`strongroom audit verify`: the journal of a store, an export or an evidence pack, compared with its proofs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import output
from .files import named, small_text
from .session import EXIT_FAILED, JsonOption, StoreOption, run, standing

if TYPE_CHECKING:
    from ..journal.findings import Finding, Report, TreeReport
    from ..journal.signed_note import Checkpoint, VerifierKey

MAX_KEYS_BYTES = 1024 * 1024
ZIP = b"PK\x03\x04"
"""How an evidence pack begins."""

FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help="An export with proofs, or an evidence pack; without it the store."),
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--public-key", metavar="FILE", help="Public keys as `audit keys` prints them, from before."),
]
SavedOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="FILE", help="A checkpoint that was kept elsewhere (`audit checkpoint`)."),
]


def verify(
    file: FileArgument = None,
    public_key: KeyOption = None,
    checkpoint: SavedOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Verify that no record was altered, removed, moved or added since it was sealed.

    Exit status 0: whole; 1: tampered, with the first bad index and what is wrong; 2: the call is wrong. A file is
    verified without the store.

    \b
    Example:
      strongroom audit verify --public-key keys.txt --checkpoint checkpoint-2026-12-01
      strongroom audit verify acme.jsonl --public-key keys.txt
    """
    keys = _keys(public_key)
    saved = _saved(checkpoint, keys)
    report = _verified_file(file, keys, saved) if file is not None else _verified_store(store, keys, saved)
    if json:
        output.print_json(view(report))
    else:
        _print(report)
    if not report.whole:
        raise typer.Exit(EXIT_FAILED)


def _keys(file: Path | None) -> Sequence[VerifierKey]:
    from ..journal.signed_note import NoteError, keys_of

    if file is None:
        return ()
    try:
        keys = keys_of(small_text("--public-key", file, MAX_KEYS_BYTES))
    except NoteError as error:
        raise InvalidInput([Problem("--public-key", f"{file}: {error}")]) from None
    if not keys:
        raise InvalidInput([Problem("--public-key", f"{file}: has no key")])
    return keys


def _saved(file: Path | None, keys: Sequence[VerifierKey]) -> Checkpoint | None:
    """The checkpoint of a file. If keys are given, one of them must have signed it."""
    from ..journal.signed_note import MAX_NOTE_BYTES, Checkpoint, NoteError, SignedNote

    if file is None:
        return None
    try:
        note = SignedNote.parse(small_text("--checkpoint", file, MAX_NOTE_BYTES))
        checkpoint = Checkpoint.parse(note.text)
    except NoteError as error:
        raise InvalidInput([Problem("--checkpoint", f"{file}: {error}")]) from None
    if keys and not note.signers(keys)[0]:
        raise InvalidInput([Problem("--checkpoint", f"{file}: none of the given public keys signed it")])
    return checkpoint


def _verified_file(file: Path, keys: Sequence[VerifierKey], saved: Checkpoint | None) -> Report:
    from ..journal.verify_evidence import verify_evidence
    from ..journal.verify_export import verify_export

    with named(file), file.open("rb") as opened, output.progress("verifying") as progress:
        if opened.read(len(ZIP)) == ZIP:
            return verify_evidence(opened, str(file), keys=keys, saved=saved, progress=progress)
        opened.seek(0)
        size = file.stat().st_size
        return verify_export(opened, str(file), keys=keys, saved=saved, size=size, progress=progress)


def _verified_store(store: str | None, keys: Sequence[VerifierKey], saved: Checkpoint | None) -> Report:
    from .. import config
    from ..entities import Registry
    from ..journal import TREE_ENTITIES
    from ..journal.verify_parallel import parallel_blocks
    from ..journal.verify_store import verify_store
    from ..storage import open_store

    settings = config.load(store=store)

    async def verified() -> Report:
        opened = await open_store(url)
        try:
            await opened.prepare(Registry(TREE_ENTITIES).collections)
            blocks = await parallel_blocks(opened, url)
            with output.progress("verifying") as progress:
                return await verify_store(opened, keys=keys, saved=saved, blocks=blocks, progress=progress)
        finally:
            await opened.close()

    with standing(store, settings.store_url, "refused") as url:
        return run(verified)


# --- The report -----------------------------------------------------------------------------------------------


def view(report: Report) -> dict[str, Any]:
    """A report as JSON."""
    return {
        "whole": report.whole,
        "checked": report.checked,
        "findings": [asdict(finding) for finding in report.findings],
        "trees": [
            {**asdict(tree), "root": base64.b64encode(tree.root).decode() if tree.root else None}
            for tree in report.trees
        ],
        "signers": report.signers,
        "notes": report.notes,
    }


def _print(report: Report) -> None:
    if report.trees:
        rows = [_row(tree) for tree in report.trees]
        output.print_table(("TENANT", "SEALED", "COMPARED", "REDACTED", "NOT SEALED"), rows)
        output.print_line()
    for finding in report.findings:
        output.print_line(_sentence(finding))
    for signer in report.signers:
        output.print_line(f"signed by {signer}")
    for note in report.notes:
        output.print_line(f"note: {note}")
    verdict = "whole" if report.whole else "TAMPERED"
    output.print_line(f"{verdict}: {report.checked} records compared")


def _row(tree: TreeReport) -> tuple[str, ...]:
    compared = f"{tree.first} to {tree.end - 1}" if tree.end > tree.first else "none"
    return _whose(tree.tenant), str(tree.size), compared, str(tree.redacted), str(tree.unsealed)


def _sentence(finding: Finding) -> str:
    where = f"index {finding.index}, " if finding.index is not None else ""
    return f"{_whose(finding.tenant)}: {where}{finding.kind.replace('_', ' ')}: {finding.message}"


def _whose(tenant: str | None) -> str:
    return "(platform)" if tenant is None else tenant


__all__ = ["verify", "view"]
