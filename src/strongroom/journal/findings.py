"""The report of a verification: the range that was compared of each tree, its findings, and the signers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .signed_note import ALGORITHMS, Checkpoint, NoteError, SignedNote, VerifierKey

Kind = Literal[
    "altered", "deleted", "inserted", "swapped", "truncated", "forked", "signature", "old_copy", "damaged", "unsealed"
]
"""altered, deleted, inserted, swapped: one record. truncated: the last ones are gone. forked: the history is another
than the one that was signed or saved. signature: no given key signed. old_copy: older than the saved checkpoint.
damaged: the stored trees or the file, not the records. unsealed: records that should be in a tree and are in none."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong. `index` is the first bad leaf; None if it cannot be told, or if no record is bad."""

    tenant: str | None
    kind: Kind
    message: str
    index: int | None = None


@dataclass(slots=True)
class TreeReport:
    """One tree: `size` sealed records, of which those from `first` to before `end` were compared."""

    tenant: str | None
    size: int
    first: int
    end: int
    root: bytes = b""
    unsealed: int = 0
    redacted: int = 0


@dataclass(slots=True)
class Report:
    """`checked`: the records whose leaves were computed. `signers`: who signed the checkpoints, of the given keys.
    `notes`: what could not be checked, and other things to know."""

    findings: list[Finding] = field(default_factory=list)
    trees: list[TreeReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    signers: list[str] = field(default_factory=list)
    checked: int = 0

    @property
    def whole(self) -> bool:
        return not self.findings

    def found(self, tenant: str | None, kind: Kind, message: str, index: int | None = None) -> None:
        self.findings.append(Finding(tenant, kind, message, index))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def signed(self, names: Iterable[str]) -> None:
        self.signers += [name for name in names if name not in self.signers]


UNCHECKED = "the signature was not checked: give the log's public key (--public-key)"


def check_note(
    note: str, origin: str, keys: Sequence[VerifierKey], tenant: str | None, report: Report
) -> Checkpoint | None:
    """The checkpoint in a signed note; what is wrong with it and its signatures goes to the report. None: no
    checkpoint."""
    try:
        signed = SignedNote.parse(note)
        checkpoint = Checkpoint.parse(signed.text)
    except NoteError as error:
        report.found(tenant, "damaged", f"the checkpoint cannot be read: {error}")
        return None
    if checkpoint.origin != origin:
        report.found(tenant, "damaged", f"the checkpoint is of {checkpoint.origin!r}, expected {origin!r}")
        return None
    check_signatures(signed, keys, tenant, report)
    return checkpoint


def check_signatures(signed: SignedNote, keys: Sequence[VerifierKey], tenant: str | None, report: Report) -> None:
    """Report a signature that is not valid, and a text that none of the keys signed."""
    if not keys:
        report.note(UNCHECKED)
        return
    valid, invalid = signed.signers(keys)
    for key in invalid:
        report.found(tenant, "signature", f"the signature by {_described(key)} is not valid: the text was changed")
    if not valid and not invalid:
        others = ", ".join(sorted({f"{one.name} ({one.key_id.hex()})" for one in signed.signatures})) or "nobody"
        note = signed.text.split("\n", 1)[0]
        report.found(tenant, "signature", f"none of the given keys signed the note {note!r}; it is signed by {others}")
    report.signed(_described(key) for key in valid)


def _described(key: VerifierKey) -> str:
    return f"{key.name} ({ALGORITHMS[key.algorithm]}, {key.id.hex()})"


__all__ = ["UNCHECKED", "Finding", "Kind", "Report", "TreeReport", "check_note", "check_signatures"]
