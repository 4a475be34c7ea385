"""`strongroom import` of files of records: keys with any system's hashes, or all fields of another store's keys."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import InvalidInput, Problem
from . import output
from .session import EXIT_FAILED, Interrupted, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..keys.transfer import Finding, PlannedRecord, Record, RecordImport

MAX_SHOWN = 100
"""Rows of each kind that the output for people lists; --json lists MAX_KEPT."""
MAX_KEPT = 10_000
ROWS_AT_ONCE = 2_000


def is_records(file: Path) -> bool:
    """Whether the file has records. False for an unreadable file, whose error the import reports."""
    from ..keys.transfer import record_lines as recordlines

    try:
        with file.open("rb") as opened:
            return recordlines.is_records(opened.read(recordlines.MAX_LINE_BYTES))
    except OSError:
        return False


def read_secret(file: Path | None) -> bytes | None:
    """The secret in a file, without a trailing newline. Raises OSError."""
    if file is None:
        return None
    secret = file.read_bytes().removesuffix(b"\n").removesuffix(b"\r")
    if not secret:
        raise InvalidInput([Problem("hmac_secret_file", "found an empty file, expected the secret")])
    return secret


class RecordsImport:
    """One import: its options and its results. Each step reads the file again, so memory stays flat."""

    def __init__(
        self,
        file: Path,
        tenant: str,
        *,
        secret: bytes | None,
        dry_run: bool,
        skip_invalid: bool,
        update: bool,
    ) -> None:
        self.file = file
        self.tenant = tenant
        self.secret = secret
        self.dry_run = dry_run
        self.skip_invalid = skip_invalid
        self.update = update
        self.rows = self.refused = self.committed = self.missing = 0
        self.kept: dict[bool, list[Finding]] = {True: [], False: []}
        self.dropped = 0
        self.standings: Counter[str] = Counter()
        self.differences: list[PlannedRecord] = []

    def run(self, store: str | None, json: bool) -> None:
        """Check every row, import, read back, report. Raises Exit, Interrupted, and the errors of the store."""
        for record, findings in self._records():
            self.rows += 1
            self.refused += record is None
            for finding in findings:
                self._keep(finding)
        if self.refused and not self.skip_invalid:
            self._refuse(json)
        try:
            in_store(store, self._work, absent="imagined" if self.dry_run else "made")
        except Interrupted:
            raise Interrupted(
                f"stopped: {self.committed} keys were imported completely; the same command imports the rest"
            ) from None
        if self.standings["foreign"] and not self.skip_invalid and not self.committed:
            self._refuse(json)
        self._report(json)

    def _records(self) -> Iterator[tuple[Record | None, list[Finding]]]:
        from ..keys.transfer import KeyFileError, RecordReader

        reader = RecordReader(self.tenant, time.time_ns() // 1_000, with_secret=self.secret is not None)
        try:
            with self.file.open("rb") as opened:
                yield from reader.read(opened)
        except KeyFileError as error:
            raise KeyFileError(f"{self.file}: {error.message}") from None

    def _chunks(self) -> Iterator[list[Record]]:
        chunk: list[Record] = []
        for record, _ in self._records():
            if record is not None:
                chunk.append(record)
            if len(chunk) >= ROWS_AT_ONCE:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    async def _work(self, room: Strongroom) -> None:
        from ..keys.transfer import RecordImport

        job = RecordImport(room.database, room.keys.hasher, operator(), hmac_secret=self.secret)
        total = self.rows - self.refused
        with output.progress("comparing") as progress:
            for number, chunk in enumerate(self._chunks()):
                for planned in await job.plan(chunk):
                    self._count(planned)
                progress(min(total, (number + 1) * ROWS_AT_ONCE), total)
        if self.dry_run or (self.standings["foreign"] and not self.skip_invalid):
            return
        with output.progress("importing") as progress:
            await self._apply(job, lambda done: progress(min(done, total), total))
        with output.progress("checking") as progress:
            for number, chunk in enumerate(self._chunks()):
                for planned in await job.plan(chunk):
                    self.missing += planned.standing == "new" or (self.update and planned.standing == "changed")
                progress(min(total, (number + 1) * ROWS_AT_ONCE), total)

    async def _apply(self, job: RecordImport, progress: Callable[[int], None]) -> None:
        try:
            for number, chunk in enumerate(self._chunks()):
                await job.apply(await job.plan(chunk), update=self.update)
                progress((number + 1) * ROWS_AT_ONCE)
        finally:
            self.committed = job.committed

    # --- Reports -----------------------------------------------------------------------------------------------

    def _keep(self, finding: Finding) -> None:
        kept = self.kept[finding.refused]
        if len(kept) < MAX_KEPT:
            kept.append(finding)
        else:
            self.dropped += 1

    def _count(self, planned: PlannedRecord) -> None:
        from ..keys.transfer import Finding

        self.standings[planned.standing.value] += 1
        if planned.problem is not None:
            name, message = planned.problem
            path = planned.record.path + (f", {name}" if name else "")
            self._keep(Finding(path, "", planned.record.name, message, True))
        if planned.standing == "changed" and len(self.differences) < MAX_KEPT:
            self.differences.append(planned)

    def _refuse(self, json: bool) -> None:
        """Print the problems and that nothing was imported. Raises Exit."""
        wrong = self.refused + self.standings["foreign"]
        message = f"{self.file}: {wrong} of {self.rows} rows are invalid; nothing was imported"
        if json:
            errors = [{"path": f.path, "message": f.message} for f in self.kept[True]]
            error = {"code": "invalid_input", "message": message, "errors": errors}
            output.print_json({"error": error, **self._view()})
        else:
            self._print_findings()
            output.print_note(f"strongroom: {message} (--skip-invalid imports the others)")
        raise typer.Exit(EXIT_FAILED)

    def _report(self, json: bool) -> None:
        """Print the results. Raises Exit if the store, read back, differs from the file."""
        if json:
            output.print_json(self._view())
        else:
            self._print_findings()
            self._print_differences()
            output.print_fields(self._fields())
        if self.missing:
            output.print_note(f"strongroom: {self.missing} rows differ between the store and the file")
            raise typer.Exit(EXIT_FAILED)

    def _view(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "shape": "records",
            "tenant": self.tenant,
            "dry_run": self.dry_run,
            "rows": self.rows,
            "refused": self.refused + self.standings["foreign"],
            **{name: self.standings[name] for name in ("new", "unchanged", "changed", "rotated")},
            "written": self.committed,
            "missing": self.missing,
            "problems": [_view(finding) for finding in self.kept[True]],
            "notes": [_view(finding) for finding in self.kept[False]],
            "differences": [
                {"path": p.record.path, "id": p.id, "fields": [asdict(d) for d in p.differences]}
                for p in self.differences
            ],
        }

    def _print_findings(self) -> None:
        problems, notes = self.kept[True], self.kept[False]
        found = [*problems[:MAX_SHOWN], *notes[:MAX_SHOWN]]
        if not found:
            return
        rows = [(f.path, f.key, f.name, f.message if f.refused else f"note: {f.message}") for f in found]
        output.print_table(("ROW", "KEY", "NAME", "WHAT"), rows)
        hidden = len(problems) + len(notes) + self.dropped - len(found)
        if hidden:
            output.print_line(f"… and {hidden} more")
        output.print_line()

    def _print_differences(self) -> None:
        rows = [
            (p.record.path, p.id, d.field, _plain(d.file), _plain(d.store))
            for p in self.differences[:MAX_SHOWN]
            for d in p.differences
        ]
        if not rows:
            return
        output.print_table(("ROW", "ID", "FIELD", "IN THE FILE", "IN THE STORE"), rows)
        if self.standings["changed"] > MAX_SHOWN:
            output.print_line(f"… and {self.standings['changed'] - MAX_SHOWN} more keys")
        output.print_line()

    def _fields(self) -> list[tuple[str, str]]:
        standings = self.standings
        was = "would be " if self.dry_run else ""
        fields = [
            ("file", f"{self.file} (records)"),
            ("tenant", f"{self.tenant} (for rows without a tenant)"),
            ("rows", str(self.rows)),
            ("new", f"{standings['new']} ({was}imported)" if standings["new"] else "0"),
            ("unchanged", str(standings["unchanged"])),
        ]
        if standings["changed"]:
            what = f"{was}updated" if self.update else "not changed in the store; --update overwrites them"
            fields.append(("changed", f"{standings['changed']} ({what})"))
        if standings["rotated"]:
            fields.append(("rotated", f"{standings['rotated']} (have a newer secret; not changed)"))
        if wrong := self.refused + standings["foreign"]:
            fields.append(("refused", str(wrong)))
        fields.append(("dry run", "nothing was written") if self.dry_run else ("written", str(self.committed)))
        return fields


def _view(finding: Finding) -> dict[str, str]:
    return {"path": finding.path, "key": finding.key, "name": finding.name, "message": finding.message}


def _plain(value: Any) -> str:
    return output.moment(value) if isinstance(value, datetime) else "" if value is None else str(value)[:80]
